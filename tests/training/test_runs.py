"""What the lessons of the page cannot show: torn tails of every kind, processes that are killed, real git, hostile names"""
import csv, itertools, json, math, multiprocessing, os, random, shutil, signal, string, subprocess, sys, time
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from hypothesis import given, settings, strategies as st

import nwrepro.training.files, nwrepro.training.provenance
from nwrepro.training.records import load_runs
from nwrepro.training.files import plain, restored, to_json, write_atomic
from nwrepro.training.provenance import code_hash, determinism, git_state, imported_files, provenance
from nwrepro.training.runs import Record, Run, canonical, move_aside, read_json, read_metrics, run_name

CONFIG = dict(norm='wn', data='digits', arch='resnet50', seed=0, lr=0.05, epochs=8)
ORIGIN = dict(code='0123', date='then')

numbers = st.one_of(st.integers(-2**53, 2**53), st.floats(), st.booleans(), st.none())
words = st.text(max_size=8).filter(lambda s: s not in ('nan', 'inf', '-inf'))
values = st.recursive(st.one_of(numbers, words), lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)), max_leaves=6)
records = st.lists(st.fixed_dictionaries(dict(event=words, step=st.integers(0, 99)), optional=dict(loss=st.floats(), rms=st.lists(st.floats(), max_size=3), note=values)), max_size=6)


@pytest.fixture
def run(tmp_path): return Run(run_name(CONFIG), tmp_path/'runs', tmp_path/'checkpoints')


def same(a, b): return repr(a) == repr(b)


@settings(max_examples=200)
@given(values)
def test_json_is_strict_and_gives_back_what_went_in(value):
    def refuse(name): raise AssertionError(f'{name} is not JSON')
    assert same(restored(json.loads(to_json(value), parse_constant=refuse)), value)


def test_plain_takes_what_a_loop_has_and_refuses_the_rest(tmp_path):
    loop = dict(loss=torch.tensor(0.5), hist=torch.tensor([1, 2]), acc=numpy.float32(0.25), rms=numpy.array([numpy.nan]), path=tmp_path, pair=(1, 2.5), ok=numpy.bool_(True))
    assert plain(loop) == dict(loss=0.5, hist=[1, 2], acc=0.25, rms=['nan'], path=str(tmp_path), pair=[1, 2.5], ok=True)
    for odd in ({1, 2}, object(), b'bytes', print):
        with pytest.raises(TypeError): to_json(dict(odd=odd))


@settings(max_examples=200)
@given(st.data(), records)
def test_a_record_cut_at_any_byte_gives_its_whole_lines(data, lines):
    folder = Path(os.environ['TEST_RUNS_TMP'])
    text = ''.join(to_json(line)+'\n' for line in lines).encode()
    cut = data.draw(st.integers(0, len(text)))
    (folder/'m.jsonl').write_bytes(text[:cut])
    whole = text[:cut].count(b'\n') + (text[cut:cut+1] == b'\n')
    assert same(read_metrics(folder/'m.jsonl'), lines[:whole])


@settings(max_examples=200)
@given(records, st.binary(min_size=1, max_size=30).filter(lambda b: b'\n' not in b and b.strip()))
def test_rubbish_after_the_last_line_is_passed_over(lines, rubbish):
    folder = Path(os.environ['TEST_RUNS_TMP'])
    text = ''.join(to_json(line)+'\n' for line in lines).encode()
    for end in (b'', b'\n', b'\n\n'):
        (folder/'m.jsonl').write_bytes(text+rubbish+end)
        assert same(read_metrics(folder/'m.jsonl'), lines)


@pytest.fixture(autouse=True, scope='module')
def scratch(tmp_path_factory):
    os.environ['TEST_RUNS_TMP'] = str(tmp_path_factory.mktemp('records'))
    yield
    del os.environ['TEST_RUNS_TMP']


@pytest.mark.parametrize('damage', [b'{"event": "tr', b'\0'*40, b'\xff\xfe', b'12', b'[]'])
def test_damage_in_the_middle_is_an_error_that_names_file_and_line(tmp_path, damage):
    path = tmp_path/'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n'+damage+b'\n{"step": 3}\n')
    with pytest.raises(ValueError) as error: read_metrics(path)
    assert str(path) in str(error.value) and 'record 2 of 3' in str(error.value) and 'fresh=True' in str(error.value)


def test_no_file_is_no_record(tmp_path):
    assert read_metrics(tmp_path/'none.jsonl') == [] and read_json(tmp_path/'none.json') == {}
    for text in (b'', b'{"top1": 9', b'[1]', b'\xff'):
        (tmp_path/'half.json').write_bytes(text)
        assert read_json(tmp_path/'half.json') == {}


@pytest.mark.parametrize('call', ['replace', 'fsync'])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, call):
    write_atomic(tmp_path/'a.json', 'old')
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(nwrepro.training.files.os, call, full)
    with pytest.raises(OSError, match='No space left'): write_atomic(tmp_path/'a.json', 'new')
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a.json', 'old')]


def test_a_written_file_has_the_users_permissions(tmp_path):
    mask = os.umask(0o027)
    try: write_atomic(tmp_path/'a', b'x')
    finally: os.umask(mask)
    assert (tmp_path/'a').stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError): write_atomic(tmp_path/'none'/'a', 'x')


def write_forever(folder, ready):
    run = Run('killed', folder, folder)
    run.begin(dict(norm='wn'), {})
    for step in itertools.count(1):
        run.log('train', step, 0, rms=[step+0.5]*300)
        write_atomic(run.path/'state.json', '{"step": %d, "pad": "%s"}' % (step, 'x'*20000))
        ready.set()


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='starting many processes is only fast with fork')
def test_a_writer_killed_at_any_moment_leaves_whole_files(tmp_path):
    dice, fork = random.Random(0), multiprocessing.get_context('fork')
    for round in range(12):
        ready = fork.Event()
        process = fork.Process(target=write_forever, args=(tmp_path, ready), daemon=True)
        process.start()
        assert ready.wait(30)
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        process.join()
        run = Record('killed', tmp_path)
        assert process.exitcode == -signal.SIGKILL and run.status == 'started' and run.config == {'norm': 'wn'}
        lines = read_metrics(run.path/'metrics.jsonl')
        starts = [i for i, line in enumerate(lines) if line['step'] == 1]
        assert len(starts) == round+1
        assert [line['step'] for line in lines[starts[-1]:]] == list(range(1, len(lines)-starts[-1]+1))
        assert json.loads((run.path/'state.json').read_text())['step'] >= 1


def test_names_do_not_change_between_versions():
    assert run_name(CONFIG) == 'wn-digits-resnet50-s0-9841de1d'
    assert canonical(dict(b=[1.0, 2.5, None], a=math.inf, c='é')) == '{"a":"inf","b":[1,2.5,null],"c":"\\u00e9"}'


configs = st.dictionaries(st.text(string.ascii_lowercase, min_size=1, max_size=4).filter(lambda k: k not in ('norm', 'data', 'arch', 'seed')), st.one_of(st.integers(-5, 5), st.floats(-5, 5), st.sampled_from(['bn', 'wn', None, [1, 2]])), max_size=5)


@settings(max_examples=200)
@given(configs, configs, st.randoms())
def test_equal_parameters_have_one_name_and_others_another(a, b, shuffler):
    base = dict(norm='wn', data='digits', arch='resnet50', seed=0)
    keys = list(base|a)
    shuffler.shuffle(keys)
    shuffled = {k: float(v) if type(v) is int and k != 'seed' else v for k in keys for v in [(base|a)[k]]}
    assert run_name(shuffled) == run_name(base|a)
    assert (run_name(base|a) == run_name(base|b)) == (base|a == base|b)


@settings(max_examples=200)
@given(st.text(), st.text(), st.text(), st.one_of(st.integers(), st.text()))
def test_any_name_is_one_safe_folder(norm, data, arch, seed):
    name = run_name(dict(norm=norm, data=data, arch=arch, seed=seed))
    assert Path(name).name == name and not name.startswith('.') and len(name.encode()) < 200
    assert set(name) <= set(string.ascii_letters+string.digits+'._-')
    assert Record(name, 'runs').path.parent == Path('runs').absolute()


@pytest.mark.parametrize('name', ['', '.', '..', '../x', 'a/b', '/etc', 'a/', './a'])
def test_a_run_cannot_lie_elsewhere(name, tmp_path):
    with pytest.raises(ValueError, match='is not the name of a run: give one folder name'): Run(name, tmp_path)


def test_default_folders_hang_on_the_project(tmp_path, monkeypatch):
    (tmp_path/'settings.ini').write_text('[DEFAULT]\n')
    (tmp_path/'nbs').mkdir()
    monkeypatch.chdir(tmp_path/'nbs')
    run = Run('x')
    assert (run.path, run.checkpoints) == (tmp_path/'reports'/'runs'/'x', tmp_path/'data'/'checkpoints'/'x')
    run.begin(CONFIG, ORIGIN)
    monkeypatch.chdir(tmp_path)
    assert load_runs().run.tolist() == ['x'] and run.status == 'started'


def test_from_begin_to_finish(run):
    assert run.status == 'new' and run.summary == run.config == run.provenance == {}
    run.begin(CONFIG, ORIGIN)
    assert (run.status, run.config, run.provenance) == ('started', CONFIG, ORIGIN)
    assert json.loads((run.path/'config.json').read_text())['norm'] == 'wn'
    run.log('train', 1, 0.5, loss=math.nan, grad_length=torch.tensor(math.inf))
    run.log('eval', 1, 0.5, top1=50)
    metrics = run.metrics()
    assert metrics.event.tolist() == ['train', 'eval'] and math.isnan(metrics.loss[0]) and metrics.grad_length[0] == math.inf
    run.finish('diverged', step=1, last_finite_loss=None)
    assert Record(run.name, run.path.parent).summary == dict(status='diverged', step=1, last_finite_loss=None)


@pytest.mark.parametrize('status', ['Finished', 'done', 'started', None])
def test_a_run_cannot_end_in_an_unknown_way(run, status):
    run.begin(CONFIG, ORIGIN)
    with pytest.raises(ValueError, match='accepted: finished, diverged, interrupted'): run.finish(status)
    assert run.status == 'started'


@pytest.mark.parametrize('status', ['finished', 'diverged'])
def test_a_run_that_has_ended_is_left_alone(run, status):
    run.begin(CONFIG, ORIGIN)
    run.log('train', 1, 0)
    run.finish(status, top1=90.)
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    with pytest.raises(ValueError, match=rf'has ended \({status}\)'): run.begin(CONFIG, ORIGIN)
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before
    run.begin(CONFIG, ORIGIN, fresh=True)
    old = run.path.with_name(run.name+'.old-1')
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before and run.status == 'started' and len(run.metrics()) == 0


@pytest.mark.parametrize('end', [None, 'interrupted'])
def test_a_cut_run_goes_on_with_its_own_config_and_whole_lines(run, end):
    run.begin(CONFIG, ORIGIN)
    run.checkpoints.mkdir(parents=True)
    for step in range(1, 4): run.log('train', step, 0, loss=1/3)
    whole = (run.path/'metrics.jsonl').read_bytes()
    with (run.path/'metrics.jsonl').open('ab') as f: f.write(b'{"event": "train", "st')
    if end: run.finish(end)
    run.begin(CONFIG, dict(code='4567'))
    assert (run.status, run.provenance, (run.path/'metrics.jsonl').read_bytes()) == ('started', ORIGIN, whole)
    assert run.checkpoints.exists() and not (run.path/'summary.json').exists()


def test_fresh_moves_checkpoints_too_and_weights_without_a_run_are_not_taken(run):
    for n in (1, 2, 3):
        run.checkpoints.mkdir(parents=True)
        (run.checkpoints/'w').write_text(str(n))
        run.begin(CONFIG, ORIGIN, fresh=n > 1)
        assert not run.checkpoints.exists()
        assert run.checkpoints.with_name(f'{run.name}.old-{n}').joinpath('w').read_text() == str(n)
    assert sorted(p.name[len(run.name):] for p in run.path.parent.iterdir()) == ['', '.old-2', '.old-3']


def test_a_new_run_keeps_what_else_is_in_its_folder(run):
    run.path.mkdir(parents=True)
    (run.path/'train.ipynb').write_text('{}')
    run.begin(CONFIG, ORIGIN)
    assert (run.path/'train.ipynb').exists() and run.status == 'started'


@settings(max_examples=50)
@given(records, st.integers(0, 99))
def test_cut_drops_later_steps_and_nothing_else(lines, step):
    run = Run('cut', os.environ['TEST_RUNS_TMP'], os.environ['TEST_RUNS_TMP'])
    run.path.mkdir(exist_ok=True)
    def text(kept): return ''.join(to_json(line, separators=(',', ':'))+'\n' for line in kept)
    (run.path/'metrics.jsonl').write_text(text(lines))
    run.truncate(step)
    assert (run.path/'metrics.jsonl').read_text() == text(line for line in lines if line['step'] <= step or line['event'] == 'resume')


def test_predictions_survive_any_image_name(run):
    run.begin(CONFIG, ORIGIN)
    rows = [('val/n01440764/a,b.JPEG', 0, 1), ('quote"d', 1, 1), ('two\nlines', 2, 0), ('Größe ü', 3, 3)]
    run.predictions(iter(rows))
    with (run.path/'predictions.csv').open(newline='', encoding='utf-8') as f: read = list(csv.reader(f))
    assert read == [['image', 'label', 'prediction'], *([name, str(a), str(b)] for name, a, b in rows)]


def test_the_table_of_runs(tmp_path):
    for seed, status in enumerate(('finished', 'diverged', 'interrupted', None)):
        run = Run(run_name(CONFIG|dict(seed=seed)), tmp_path, tmp_path/'w')
        run.begin(CONFIG|dict(seed=seed), ORIGIN)
        if status: run.finish(status, top1=10.*seed, val_loss=math.nan)
    run.begin(CONFIG|dict(seed=3), ORIGIN, fresh=True)
    (tmp_path/'empty').mkdir()
    (tmp_path/'file').write_text('x')
    (tmp_path/'lost').mkdir()
    write_atomic(tmp_path/'lost'/'summary.json', '{"status": "finished", "top1": 5}')
    table = load_runs(tmp_path).set_index('run')
    assert table.status.to_dict() == {run_name(CONFIG|dict(seed=s)): status for s, status in enumerate(('finished', 'diverged', 'interrupted', 'started'))} | {'lost': 'finished'}
    assert table.loc[run_name(CONFIG), ['norm', 'lr', 'top1']].tolist() == ['wn', 0.05, 0.] and 'provenance' not in table
    assert table.index.tolist() == sorted(table.index) and load_runs(str(tmp_path)).columns[:2].tolist() == ['run', 'status']
    assert table.top1.dtype == float and math.isnan(table.top1[run_name(CONFIG|dict(seed=3))])


def test_no_runs_are_an_empty_table(tmp_path):
    for folder in (tmp_path, tmp_path/'none'): assert load_runs(folder).equals(pandas.DataFrame(columns=['run', 'status']))


def test_move_aside_finds_the_first_number_free_for_all(tmp_path):
    a, b = tmp_path/'a', tmp_path/'b'
    for folder in (a, tmp_path/'a.old-1', tmp_path/'b.old-2'): folder.mkdir()
    assert move_aside(a, b) == [tmp_path/'a.old-3'] and move_aside(a, b) == []


def git(folder, *args): subprocess.run(['git', '-C', str(folder), '-c', 'user.name=x', '-c', 'user.email=x@x', *args], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which('git') is None, reason='git is not installed')
def test_git_state_of_a_real_checkout(tmp_path, monkeypatch):
    assert git_state(tmp_path/'none') == dict(revision=None, dirty=None)
    git(tmp_path, 'init', '-q')
    assert git_state(tmp_path) == dict(revision=None, dirty=None)
    (tmp_path/'a').write_text('1')
    git(tmp_path, 'add', 'a')
    git(tmp_path, 'commit', '-qm', 'x')
    clean = git_state(tmp_path)
    assert len(clean['revision']) == 40 and clean['dirty'] is False
    (tmp_path/'new').write_text('runs write files')
    assert git_state(tmp_path) == clean
    (tmp_path/'a').write_text('2')
    assert git_state(tmp_path) == clean | dict(dirty=True)
    monkeypatch.setenv('PATH', '')
    assert git_state(tmp_path) == dict(revision=None, dirty=None)


def test_code_hash_sees_what_is_imported_and_nothing_else(tmp_path):
    (tmp_path/'inner').mkdir()
    files = {'loop.py': 'from .layers import a\nfrom . import data\nimport torch', 'layers.py': 'from .inner.deep import b', 'data.py': 'from .loop import c', 'inner/deep.py': 'from ..extra import d',
             'inner/__init__.py': '', 'extra.py': 'd = 1', 'figures.py': 'from .loop import a'}
    def hash_with(**changed):
        for name, text in (files | {k.replace('__', '/')+'.py': v for k, v in changed.items()}).items(): (tmp_path/name).write_text(text)
        return code_hash(tmp_path/'loop.py')
    first = hash_with()
    assert {p.name for p in imported_files(tmp_path/'loop.py')} == {'loop.py', 'layers.py', 'data.py', 'deep.py', 'extra.py'}
    assert hash_with(figures='other') == hash_with(notes='no code') == first == hash_with()
    for name in ('loop', 'layers', 'data', 'inner__deep', 'extra'): assert hash_with(**{name: files[name.replace('__', '/')+'.py']+'\n# edited'}) != first, name
    (tmp_path/'extra.py').unlink()
    assert code_hash(tmp_path/'loop.py') != first
    assert code_hash() == code_hash(Path(nwrepro.__file__).parent/'training'/'command.py')


def test_provenance_is_complete_and_plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = provenance()
    assert json.loads(to_json(found)) == found
    assert set(found) == {'versions', 'git', 'code', 'machine', 'determinism', 'date'}
    assert set(found['versions']) == {'python', 'nwrepro', 'torch', 'torchvision', 'timm', 'accelerate', 'numpy'}
    assert found['versions']['python'] == '.'.join(map(str, sys.version_info[:3])) and found['versions']['numpy'] == numpy.__version__
    assert found['date'].endswith('+00:00') and found['git'] == dict(revision=None, dirty=None)
    assert found['machine']['cores'] <= os.cpu_count() and isinstance(found['machine']['gpus'], list)
    monkeypatch.setattr(nwrepro.training.provenance.metadata, 'version', lambda package: (_ for _ in ()).throw(nwrepro.training.provenance.metadata.PackageNotFoundError(package)))
    assert nwrepro.training.provenance.versions()['timm'] is None


def test_determinism_follows_the_switches():
    before = determinism()
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.benchmark = True
        changed = {k for k, v in determinism().items() if v != before[k]}
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
    assert changed == {'matmul_tf32', 'cudnn_benchmark'} and determinism() == before
