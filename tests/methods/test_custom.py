"A scheme from a file: what it may answer, and that no run ever shows another scheme's, code's or data's result"
from pathlib import Path
import pytest, timm, torch
from torch import nn
import nwrepro
import nwrepro.training.lifecycle
from conftest import run_in
from nwrepro import SCHEMES, Scheme, convert, load_runs
from nwrepro.methods.custom import BUILT_IN, load_schemes
from nwrepro.training.sources import load_source
from nwrepro.training.recipe import check_parameters, make_recipe
from nwrepro.training.records import records
from nwrepro.training.runs import run_name
from dataclasses import asdict
from nwrepro.training.loop import fit
from nwrepro.training.lifecycle import begin_run, recipe_of, trained
from nwrepro.training.build import make_model, make_views

HEAD = 'from torch import nn\nfrom nwrepro import SCHEMES, Scheme\n'
MINE = HEAD+"SCHEMES['ours'] = Scheme(norm=lambda bn: nn.GroupNorm({groups}, bn.num_features))\n"
digits = load_source('digits')

@pytest.fixture(autouse=True)
def as_before():
    yield
    SCHEMES.clear(), SCHEMES.update(BUILT_IN)

@pytest.fixture
def file(tmp_path):
    def write(text, name='my_schemes.py'):
        (tmp_path/name).write_text(text)
        return str(tmp_path/name)
    return write

def recipe(**given): return make_recipe(dict(arch='resnet18', image_size=16, lr=0.01, batch_size=20, bn_batch=10, train_images=100, epochs=1, warmup_epochs=0, max_steps=2, norm='ours') | given, digits)

def run_it(folder, show=lambda line: None, **given):
    values = dict(arch='resnet18', image_size=16, lr=0.01, batch_size=20, bn_batch=10, train_images=100, epochs=1, warmup_epochs=0, max_steps=2, norm='ours') | given
    r = make_recipe(values, digits)
    run = begin_run(r, digits, values, folder)
    return fit(make_model(r, 10), make_views(r, digits), r, run, show=show), run

def name(**given): return run_name(asdict(recipe(**given)))

# what a file may answer

@pytest.mark.parametrize('text, sentence', [
    (HEAD+'SCHEMES["ours"] = Scheme(', r"my_schemes.py, line 3: '\(' was never closed"),
    (HEAD+'\n\nSCHEMES["ours"] = Scheme(norms=1)', r'my_schemes.py, line 5: TypeError: .*norms'),
    ('import nothing_of_the_kind', r"my_schemes.py, line 1: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
    (HEAD, r'my_schemes.py adds no scheme: put one into the table'),
    (HEAD+'SCHEMES["bn"] = Scheme()', r"my_schemes.py defines scheme 'bn', a name that is taken: give it another"),
    (MINE.format(groups=7), r"scheme 'ours' cannot take an image: ValueError: num_channels .*must be divisible by num_groups"),
    (HEAD+'SCHEMES["ours"] = Scheme(act=lambda channels: nn.Linear(3, 3))', r"scheme 'ours' cannot take an image: RuntimeError"),
])
def test_a_file_that_cannot_be_used_is_one_sentence_and_changes_nothing(text, sentence, file):
    before = dict(SCHEMES)
    with pytest.raises(ValueError, match=sentence) as error: check_parameters(dict(schemes=file(text), norm='bn'))
    assert '\n' not in str(error.value) and SCHEMES == before

@pytest.mark.parametrize('schemes', ['nowhere.py', 'settings.ini', '.'])
def test_a_file_that_is_not_there_is_named(schemes):
    with pytest.raises(ValueError, match=f'schemes = {schemes} is not accepted: .* expected paths of .py files, joined by commas'): check_parameters(dict(schemes=schemes, norm='bn'))

def test_several_files_and_a_name_in_two_of_them(file):
    one, two = file(MINE.format(groups=8)), file(MINE.format(groups=4).replace('ours', 'other'), 'two.py')
    assert load_schemes(f'{one}, {two}') == ['ours', 'other'] == load_schemes(f'{one},{two}')
    with pytest.raises(ValueError, match="three.py defines scheme 'ours', a name that is taken"): load_schemes(f"{one},{file(MINE.format(groups=2), 'three.py')}")
    assert SCHEMES['ours'].file == one

def test_loading_draws_no_random_numbers(file):
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    load_schemes(file(MINE.format(groups=8)))
    assert torch.equal(torch.rand(3), first)

def test_the_public_interface():
    from nwrepro import SCHEMES, Scheme, convert, fold, load_model, load_runs, to_timm
    public = dict(Scheme=Scheme, convert=convert, fold=fold, load_model=load_model, load_runs=load_runs, to_timm=to_timm)
    assert all(map(callable, public.values())) and 'wn' in SCHEMES and set(nwrepro.__all__) == {'SCHEMES', *public}
    with pytest.raises(AttributeError, match="module 'nwrepro' has no attribute 'shemes'"): nwrepro.shemes

# results belong to what made them

def test_an_edited_scheme_is_another_run(file, tmp_path):
    path, runs = file(MINE.format(groups=8)), tmp_path/'runs'
    first, run = run_it(runs, schemes=path)
    again, same = run_it(runs, schemes=path)
    assert again == first and same.name == run.name and (run.path/'scheme.py').read_text() == MINE.format(groups=8)
    file(MINE.format(groups=4))
    second, edited = run_it(runs, schemes=path)
    assert edited.name != run.name and len(load_runs(runs)) == 2
    for r, groups in ((run, 8), (edited, 4)): assert trained(r).bn1.num_groups == groups
    assert SCHEMES['ours'].source == MINE.format(groups=4)

def test_a_comment_in_the_file_is_another_run_and_another_path_is_not(file):
    path = file(MINE.format(groups=8))
    first = name(schemes=path)
    SCHEMES.pop('ours')
    assert name(schemes=file(MINE.format(groups=8), 'renamed.py')) == first
    SCHEMES.pop('ours')
    assert name(schemes=file(MINE.format(groups=8)+'# edited')) != first

@pytest.mark.parametrize('norm', ('ours', 'wn'))
def test_a_scheme_that_was_typed_is_refused_before_anything_is_trained(norm, tmp_path):
    SCHEMES[norm] = Scheme(norm=lambda bn: nn.GroupNorm(8, bn.num_features))
    assert convert(timm.create_model('resnet18'), norm).bn1.num_groups == 8
    with pytest.raises(ValueError, match=f"scheme '{norm}' was defined in this session only.*%%writefile my_schemes.py.*schemes = my_schemes.py"): run_it(tmp_path, norm=norm)
    assert not list(tmp_path.iterdir())

def test_a_result_of_other_code_is_shown_as_such(tmp_path, monkeypatch):
    lines, (first, _) = [], run_it(tmp_path, norm='wn')
    assert run_it(tmp_path, lines.append, norm='wn')[0] == first and not lines
    monkeypatch.setattr(nwrepro.training.lifecycle, 'code_hash', lambda: 'feedfeedfeedfeed')
    assert run_it(tmp_path, lines.append, norm='wn')[0] == first
    assert [line for line in lines if 'was made by other code' in line and 'now feedfeed' in line and 'fresh=True' in line]
    assert load_runs(tmp_path)[['code', 'hardware']].notna().all(axis=None)

def folder_of(root, colour):
    from PIL import Image
    for split in ('train', 'val'):
        for k, label in enumerate(('a', 'b')):
            (root/split/label).mkdir(parents=True)
            for i in range(12): Image.new('RGB', (16+colour, 16), (colour+i, 90*k, len(split))).save(root/split/label/f'{i}.png')
    return root

def test_two_folders_of_images_are_two_runs(tmp_path):
    names = [run_name(asdict(make_recipe(dict(norm='bn', data='folder', batch_size=8, lr=0.1), load_source('folder', str(folder_of(tmp_path/str(c), c)))))) for c in (1, 7)]
    assert names[0] != names[1]

def test_each_seed_has_training_images_of_its_own():
    load = lambda **given: make_views(recipe(norm='wn', **given), digits).train.indices
    assert load(seed=0) == load(seed=0, subset_seed=0) == load(seed=1, subset_seed=0) != load(seed=1) == load(seed=0, subset_seed=1)
    assert name(norm='wn', seed=1) != name(norm='wn', seed=1, subset_seed=0)
    assert recipe(norm='wn', seed=1, train_images='none').subset_seed == 0

def test_records_of_before_keep_their_names():
    "Those that have all fields of their time; what is newer had one value then"
    folder = Path(__file__).parents[2]/'reports'/'study'
    checked = [record for record in records(folder) if 'compile' in record.config]
    assert len(checked) > 350 and [record.name for record in checked if run_name(asdict(recipe_of(record))) != record.name] == []

def test_the_same_shards_as_folders_have_the_same_defaults(monkeypatch):
    from nwrepro.training.data import CIFAR10, IMAGENETTE, Images, Source
    stored = {classes[0]: Source('wds/ours', classes, *(Images(None, list(range(10))*30, split) for split in ('train', 'val')), fingerprint='0'*64) for classes in (CIFAR10, IMAGENETTE, list('abcdefghij'))}
    made = {k: make_recipe(dict(norm='wn', lr=0.1), source) for k, source in stored.items()}
    assert (made['airplane'].data, made['airplane'].image_size, made['airplane'].batch_size) == ('cifar10-jpeg', 32, 128)
    assert (made['n01440764'].data, made['n01440764'].image_size) == ('imagenette', 64) and made['a'].data == 'wds/ours'
    assert all(r.images == '0'*16 for r in made.values())

def test_no_learning_rate_is_made_up(file):
    with pytest.raises(ValueError, match="norm 'ours' has no default learning rate on digits: give lr, a number, or tuned"): recipe(schemes=file(MINE.format(groups=8)), lr='none')

# as people use it

@pytest.mark.slow
def test_a_sweep_in_two_jobs_trains_an_edited_scheme_anew_and_keeps_the_rest(project):
    (project/'my_schemes.py').write_text(MINE.format(groups=8))
    grid = '{schemes: my_schemes.py, norm: [bn, ours], seed: [0, 1], arch: resnet18, lr: 0.05, epochs: 1, image_size: 16, max_steps: 2}'
    def sweep():
        done = run_in(project, 'papermill', 'nbs/sweep.ipynb', 'reports/ours.ipynb', '-y', grid, '-p', 'jobs', '2')
        assert done.returncode == 0, done.stderr
        return load_runs(project/'reports'/'runs')
    first = sweep()
    assert sorted(first.norm) == ['bn', 'bn', 'ours', 'ours'] and (first.status == 'finished').all()
    (project/'my_schemes.py').write_text(MINE.format(groups=4))
    second = sweep()
    assert set(first.run) < set(second.run) and (second.norm == 'bn').sum() == 2
    assert sorted(second.groupby('norm').size()) == [2, 2, 2] and second.norm.str.match(r'bn|ours \([0-9a-f]{6}\)').all()

@pytest.mark.slow
def test_a_scheme_of_ones_own_in_two_processes(project):
    (project/'my_schemes.py').write_text(MINE.format(groups=8))
    done = run_in(project, 'python', '-m', 'nwrepro.training', '--schemes', 'my_schemes.py', '--norm', 'ours', '--lr', '0.05', '--processes', '2', '--arch', 'resnet18', '--image_size', '16', '--epochs', '1', '--max_steps', '2')
    assert done.returncode == 0, done.stderr+done.stdout
    run, = load_runs(project/'reports'/'runs').to_dict('records')
    assert (run['norm'], run['status'], run['processes']) == ('ours', 'finished', 2)
