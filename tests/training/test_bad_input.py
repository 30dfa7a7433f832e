"What a user can get wrong: each is answered by one sentence, changes no run that is there, and leaves none that looks finished"
import io, math, os, re, shutil
from pathlib import Path

import nbformat, numpy, pytest
from hypothesis import given as drawn, strategies as st
from PIL import Image

from conftest import ROOT, run_in, snapshot
from nwrepro.training.sources import load_source
from nwrepro.training.recipe import DEFAULTS, RULES, check_parameters, notebook_parameters, parse_value
from nwrepro.training.records import load_runs
from nwrepro.training.runs import read_metrics
from nwrepro.training.command import main, train as train_run

SMALL = dict(data='digits', arch='resnet18', train_images=100, epochs=1, warmup_epochs=0, image_size=16, batch_size=20, bn_batch=10, max_steps=1)

def words(given): return [word for k, v in given.items() for word in (f'--{k}', str(v))]

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "A project of its own"
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.delenv('NWREPRO_DATA', raising=False)
    return tmp_path

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A project in which one run has ended"
    folder, before = tmp_path_factory.mktemp('finished'), Path.cwd()
    (folder/'settings.ini').touch()
    os.chdir(folder)
    try: assert main(words(SMALL | dict(norm='wn'))) == 0
    finally: os.chdir(before)
    return folder

VALUES = [
    (dict(norm='vn'), r"unknown norm 'vn': did you mean '\w+'\? accepted: bn, none, wn, np, trelu"), (dict(norm='WN'), "unknown norm 'WN'"), (dict(norm=''), "unknown norm ''"),
    (dict(norm='../../etc'), "unknown norm '../../etc'"), (dict(norm='np', init='data'), "unknown init for norm 'np' 'data': accepted: np"), (dict(init='xavier'), "unknown init for norm 'bn' 'xavier'"),
    (dict(data='digts'), "did you mean 'digits'"), (dict(data='hfids/imagenet-1k'), 'is a stream, which has no index'), (dict(data='../digits'), "unknown data '../digits'"),
    (dict(arch='resnet5'), "did you mean 'resnet50'"), (dict(arch='vgg16'), "unknown arch 'vgg16'"), (dict(arch='seresnet50'), "unknown arch 'seresnet50'"), (dict(recipe='papr'), "did you mean 'paper'"),
    (dict(strides='v2'), 'strides = v2 is not accepted'), (dict(lr=0), 'lr = 0 is not accepted'), (dict(lr=-1.), 'lr = -1.0'), (dict(lr='fast'), 'lr = fast'), (dict(lr='nan'), 'lr = nan'),
    (dict(lr='inf'), 'lr = inf'), (dict(lr='1e999'), 'lr = 1e999'), (dict(lr='[0.1,0.2]'), r'lr = \[0.1,0.2\] is not accepted: expected peak learning rate, a number above 0'), (dict(lr=True), 'lr = True'),
    (dict(epochs=0), 'epochs = 0 is not accepted'), (dict(epochs=1.5), 'epochs = 1.5'), (dict(epochs='ten'), 'epochs = ten'), (dict(epochs=math.inf), 'epochs = inf'), (dict(max_steps=0), 'max_steps = 0'),
    (dict(image_size=8), 'image_size = 8 is not accepted'), (dict(batch_size=0), 'batch_size = 0'), (dict(batch_size=5000), 'batch_size = 5000 is more than the 100 training images of digits: give a batch_size of at most 100'),
    (dict(bn_batch=7), 'not a multiple of bn_batch = 7'), (dict(bn_batch=1), 'bn_batch = 1'), (dict(holdout=1), 'holdout = 1'), (dict(holdout=-0.1), 'holdout = -0.1'), (dict(train_images=99999), 'subset of 99999'),
    (dict(train_images=5, batch_size=5, bn_batch=5), 'cannot hold 10 classes: ask for at least 10'), (dict(weight_decay=-1), 'weight_decay = -1'), (dict(decay_on='v+h'), "unknown decay_on 'h'"), (dict(dropout=1), 'dropout = 1'),
    (dict(grad_clip=0), 'grad_clip = 0'), (dict(warmup_epochs=-1), 'warmup_epochs = -1'), (dict(warmup_epochs=9, epochs=5), 'leaves nothing of epochs = 5'), (dict(precision='fp8'), 'precision = fp8'),
    (dict(seed=-1), 'seed = -1'), (dict(seed='[0,1]'), r'seed = \[0,1\]'), (dict(workers=-1), 'workers = -1'), (dict(checkpoint_steps=0), 'checkpoint_steps = 0'), (dict(checkpoint_minutes=0), 'checkpoint_minutes = 0'),
    (dict(augment='zoom'), 'augment = zoom is not accepted: expected random views'), (dict(augment='mirror', recipe='modern'), 'augment = mirror is for recipe paper'), (dict(mixup=-1), 'mixup = -1'),
    (dict(freeze_statistics=-1), 'freeze_statistics = -1'), (dict(norm='wn', freeze_statistics=1), "freeze_statistics = 1.0 has nothing to freeze, since norm 'wn' takes no batch statistics"), (dict(eval_images=0), 'eval_images = 0'),
    (dict(fresh='perhaps'), 'fresh = perhaps'), (dict(accept_changes=1), 'accept_changes = 1'),
]

@pytest.mark.parametrize('given, sentence', VALUES, ids=[str(given) for given, _ in VALUES])
def test_a_value_that_is_not_accepted(given, sentence, finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    before = snapshot(finished)
    assert main(words(SMALL | dict(norm='bn') | given)) == 2
    printed = capsys.readouterr()
    last = printed.out.strip().splitlines()[-1]
    assert re.search(sentence, last), last
    assert printed.err == '' and snapshot(finished) == before

@pytest.mark.parametrize('name, near', [('nrom', 'norm'), ('learning_rate', None), ('epoch', 'epochs'), ('Norm', 'norm'), ('batchsize', 'batch_size'), ('fersh', 'fresh')])
def test_a_misspelt_parameter(name, near):
    for check in (check_parameters, notebook_parameters):
        with pytest.raises(ValueError) as error: check({name: 1})
        assert f"unknown parameter '{name}'" in str(error.value) and (near is None or f"did you mean '{near}'?" in str(error.value))

def test_a_misspelt_flag(elsewhere, capsys):
    with pytest.raises(SystemExit) as stopped: main(['--nrom', 'wn'])
    assert stopped.value.code == 2 and '--nrom' in capsys.readouterr().err and not (elsewhere/'reports').exists()

# folders

def photographs(folder, classes=('a', 'b'), n=6, splits=('train', 'val')):
    rng = numpy.random.default_rng(0)
    for split in splits:
        for kind in classes:
            (folder/split/kind).mkdir(parents=True, exist_ok=True)
            for i in range(n): Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype='uint8')).save(folder/split/kind/f'{i}.jpg')
    return folder

def no_folder(folder): return 'nowhere: no such folder'
def empty_folder(folder):
    folder.mkdir()
    return 'none holds train and val'
def one_class(folder):
    photographs(folder, ('a',))
    return r"fewer than two classes \(a\)"
def no_val(folder):
    photographs(folder, splits=('train',))
    return 'holds train only'
def no_images(folder):
    for split in ('train', 'val'): (folder/split/'a').mkdir(parents=True)
    return r'holds no image \(.jpg'
def other_classes(folder):
    photographs(folder)
    (folder/'val/b').rename(folder/'val/c')
    return 'b in training only; c in test only'
def stray_image(folder):
    photographs(folder)
    shutil.copy(folder/'val/a/0.jpg', folder/'val/0.jpg')
    return 'lies directly in val'
def dead_link(folder):
    photographs(folder)
    (folder/'train/a/9.jpg').symlink_to(folder/'gone.jpg')
    return r'9.jpg cannot be read \(.*No such file'

@pytest.mark.parametrize('spoil', [no_folder, empty_folder, one_class, no_val, no_images, other_classes, stray_image, dead_link], ids=lambda f: f.__name__)
def test_a_folder_that_is_no_data_set(spoil, elsewhere, capsys):
    folder = elsewhere/'nowhere'
    sentence = spoil(folder)
    assert main(words(SMALL | dict(data='folder', data_dir=folder, train_images='none', batch_size=4, bn_batch=4))) == 2
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(sentence, last), last
    assert not (elsewhere/'reports').exists()

# files: each trains, or stops the run with its name

def save(path, image, form, **kwargs): image.save(path, form, **kwargs)
RED = Image.new('RGB', (24, 20), (200, 30, 30))
def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path, RED, 'JPEG', exif=exif)
def palette(path):
    image = RED.convert('P')
    save(path, image, 'PNG', transparency=bytes(range(256)))
TRAINS = dict(cmyk=lambda path: save(path, RED.convert('CMYK'), 'JPEG'), grey16=lambda path: save(path, Image.fromarray(numpy.full((20, 24), 40000, 'uint16')), 'PNG'),
              palette_with_transparency=palette, rgba=lambda path: save(path, RED.convert('RGBA'), 'PNG'), png_named_jpg=lambda path: save(path, RED, 'PNG'),
              webp_named_jpg=lambda path: save(path, RED, 'WEBP'), turned_by_exif=turned, one_bit=lambda path: save(path, RED.convert('1'), 'PNG'))

def jpeg():
    file = io.BytesIO()
    RED.save(file, 'JPEG')
    return file.getvalue()
def bomb(path): save(path, Image.new('1', (20_000, 20_000)), 'PNG')
STOPS = dict(truncated=lambda path: path.write_bytes(jpeg()[:-60]), empty=lambda path: path.write_bytes(b''), page=lambda path: path.write_text('<html>404 Not Found</html>'),
             zeros=lambda path: path.write_bytes(b'\0'*2000), gone=lambda path: path.unlink(), bomb=bomb, folder=lambda path: (path.unlink(), path.mkdir()))
EXPECTED = dict(truncated='truncated', empty='empty or not an image', page='empty or not an image', zeros='empty or not an image', gone='No such file', bomb='decompression bomb', folder='Is a directory')

def train_with(folder, spoil, workers):
    "One epoch on a folder in which one training image was spoilt after the folder was read"
    photographs(folder)
    broken = folder/'train/b/3.jpg'
    def show(line):
        if line.startswith('run '): spoil(broken)
    return broken, lambda: train_run(SMALL | dict(data='folder', data_dir=str(folder), train_images='none', batch_size=4, bn_batch=4, max_steps='none', norm='wn', lr=0.001, workers=workers), show=show)

@pytest.mark.parametrize('how', TRAINS)
def test_an_unusual_image_trains(how, elsewhere):
    broken, train = train_with(elsewhere/'images', TRAINS[how], 0)
    assert train()['status'] == 'finished'
    image = load_source('folder', elsewhere/'images').train.load(9)
    assert image.size == ((20, 24) if how == 'turned_by_exif' else (24, 20))
    pixel = numpy.asarray(image, dtype=int).mean((0, 1))
    if how == 'grey16': assert abs(pixel-40000/256).max() < 1
    elif how != 'one_bit': assert abs(pixel-(200, 30, 30)).max() < 6, pixel

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('how', STOPS)
def test_a_broken_image_stops_the_run_with_its_name(how, workers, elsewhere):
    broken, train = train_with(elsewhere/'images', STOPS[how], workers)
    with pytest.raises(ValueError) as error: train()
    last = str(error.value).strip().splitlines()[-1]
    assert f'image {broken} cannot be read' in last and EXPECTED[how].lower() in last.lower() and last.endswith('put a whole JPEG or PNG file in its place, or delete it'), last
    assert load_runs()['status'].tolist() == ['started']

def test_images_that_vanish_are_asked_back(elsewhere, capsys):
    given = SMALL | dict(data='folder', data_dir=elsewhere/'images', train_images='none', batch_size=4, bn_batch=4, max_steps='none', norm='wn', lr=0.001, workers=2)
    photographs(elsewhere/'images')
    def show(line):
        if line.startswith('epoch 0.00'): (elsewhere/'images').rename(elsewhere/'away')
    with pytest.raises(ValueError) as error: train_run(given | dict(data_dir=str(given['data_dir'])), show=show)
    last = str(error.value).strip().splitlines()[-1]
    assert re.search(rf'image \S+\.jpg is gone, with all of {elsewhere/"images"}: bring the folder back and give the same command again', last), last
    assert load_runs()['status'].tolist() == ['started']
    assert main(words(given)) == 2 and 'no such folder' in capsys.readouterr().out
    (elsewhere/'away').rename(elsewhere/'images')
    assert main(words(given)) == 0 and load_runs()['status'].tolist() == ['finished']

# files of runs

@pytest.mark.parametrize('file, damage, sentence', [
    ('metrics.jsonl', b'{"event": "train"\n{"event": "train", "step": 1, "epoch": 0}\n', 'record 1 of 2 is damaged, which no interruption explains'),
    ('config.json', b'{"norm": "w', 'its config.json is damaged')])
def test_a_damaged_run_is_not_gone_on_with(file, damage, sentence, elsewhere, capsys):
    given = SMALL | dict(norm='wn')
    assert main(words(given)) == 0
    run, = (elsewhere/'reports/runs').iterdir()
    (run/'summary.json').unlink()
    (run/file).write_bytes(damage)
    before = snapshot(run)
    assert main(words(given)) == 2
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(sentence, last) and 'fresh=True' in last, last
    assert snapshot(run) == before
    assert main(words(given | dict(fresh=True))) == 0 and snapshot(run.with_name(f'{run.name}.old-1')) == before

def test_other_images_are_not_trained_into_the_same_run(elsewhere, capsys):
    given = SMALL | dict(data='imagenette', data_dir=elsewhere/'images', train_images='none', batch_size=4, bn_batch=4, norm='wn')
    photographs(elsewhere/'images')
    assert main(words(given)) == 0
    run, = (elsewhere/'reports/runs').iterdir()
    (run/'summary.json').unlink()
    Image.new('RGB', (9, 9)).save(elsewhere/'images/train/a/9.jpg')
    assert main(words(given)) == 2
    assert re.search(r'was begun with images \w{8}, now \w{8}: restore that', capsys.readouterr().out.strip().splitlines()[-1])
    assert main(words(given | dict(accept_changes=True))) == 0
    resume, = [line for line in read_metrics(run/'metrics.jsonl') if line['event'] == 'resume']
    assert list(resume['changed']) == ['images']
    assert main(words(given)) == 0  # what was accepted is what its result belongs to

def test_a_result_on_other_images_is_not_shown_for_these(elsewhere, capsys):
    given = SMALL | dict(data='imagenette', train_images='none', batch_size=4, bn_batch=4, norm='wn')
    for name in ('images', 'others'): photographs(elsewhere/name)
    Image.new('RGB', (9, 9)).save(elsewhere/'others/train/a/9.jpg')
    assert main(words(given | dict(data_dir=elsewhere/'images'))) == 0
    assert main(words(given | dict(data_dir=elsewhere/'others'))) == 2
    assert re.search(r'^run wn-imagenette-\S+ has ended, on other images \(.* in 2 classes\): give fresh = True', capsys.readouterr().out.strip().splitlines()[-1])
    assert main(words(given | dict(data_dir=elsewhere/'images'))) == 0 and main(words(given | dict(data_dir=elsewhere/'others', accept_changes=True))) == 0
    assert main(words(given | dict(data_dir=elsewhere/'others', fresh=True))) == 0

@pytest.mark.parametrize('more, sentence', [(dict(train_images=40, holdout=0.1, batch_size=36), 'batch_size = 36 is more than the 30 images that are left to train on'),
                                            (dict(arch='resnet50d'), 'is not a stock timm ResNet'), (dict(arch='resnet50_gn'), 'is not a stock timm ResNet')], ids=str)
def test_what_does_not_fit_leaves_no_run(more, sentence, elsewhere, capsys):
    assert main(words(SMALL | dict(norm='wn') | more)) == 2
    assert sentence in capsys.readouterr().out.strip().splitlines()[-1] and not (elsewhere/'reports').exists()

def test_uneven_classes_may_be_held_out(elsewhere):
    photographs(elsewhere/'images')
    for k in range(30): Image.new('RGB', (9, 9)).save(elsewhere/f'images/train/b/{k+10}.jpg')
    given = SMALL | dict(data='folder', data_dir=elsewhere/'images', train_images='none', holdout=0.3, batch_size=4, bn_batch=4, norm='wn')
    assert main(words(given)) == 0

# the parser, against anything

anything = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers(), max_size=2), st.binary(max_size=3), st.dictionaries(st.text(), st.integers(), max_size=1),
                     st.sampled_from(['none', 'None', 'true', 'False', '1e-3', '.5', '1.', '007', '1_0', '0x10', '-0', 'nan', 'inf', '1e999', '٣', ' 1 ', '1\n']))

@drawn(st.sampled_from(list(RULES)), anything)
def test_a_parsed_value_has_its_type_and_parses_to_itself(name, value):
    try: parsed = parse_value(name, value)
    except ValueError as error:
        assert str(error).startswith(f'{name} = ') and RULES[name].words in str(error)
        return
    assert parsed is None and name not in DEFAULTS or type(parsed) is RULES[name].kind
    again = parse_value(name, parsed)
    assert again == parsed and type(again) is type(parsed)
    if name != 'norm' and not isinstance(value, str): assert parse_value(name, str(value)) == parsed
    assert RULES[name].kind is not float or parsed is None or math.isfinite(parsed) or name == 'grad_clip'

@drawn(st.dictionaries(st.one_of(st.sampled_from(list(RULES)), st.text(max_size=6)), anything, max_size=4))
def test_parameters_are_all_there_or_refused_in_one_line(given):
    try: values = check_parameters(given)
    except ValueError as error: assert str(error)
    else:
        assert list(values) == list(RULES)
        assert check_parameters(values) == values

def test_paths_that_papermill_injects_are_no_parameters(tmp_path):
    prepared = tmp_path/'train.ipynb'
    done = run_in(ROOT, 'papermill', 'nbs/train.ipynb', str(prepared), '--prepare-only', '--inject-paths', '-p', 'norm', 'wn')
    assert done.returncode == 0, done.stderr
    (injected,) = [cell.source for cell in nbformat.read(prepared, 4).cells if 'injected-parameters' in cell.metadata.get('tags', [])]
    exec(injected, namespace := {})
    assert namespace['PAPERMILL_OUTPUT_PATH'] == str(prepared)
    assert notebook_parameters(namespace) == dict(norm='wn')
