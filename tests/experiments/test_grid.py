"Grids of runs: what they are made of, what stops them, and that killing one loses nothing"
import json, math, os, shutil, signal, subprocess, sys, time
from dataclasses import asdict

import nbformat, pytest
from safetensors.torch import load_file

from conftest import ROOT, snapshot
from nwrepro.experiments import grid
from nwrepro.experiments.grid import (Outcome, expand_grid, format_time, is_done, median_times, make_points, raise_failed, seconds_left, steps_done,
                                      total_time, unfinished_notebook)
from nwrepro.training.checkpoint import release_lock
from nwrepro.training.sources import load_source
from nwrepro.training.lifecycle import begin_run
from nwrepro.training.recipe import make_recipe
from nwrepro.training.records import load_runs
from nwrepro.training.runs import Record, Run, read_metrics

SMALL = dict(data='digits', arch='resnet18', train_images=100, image_size=16, batch_size=20, bn_batch=10, epochs=2, warmup_epochs=0)
@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A project of its own, with the notebook that trains"
    (tmp_path/'settings.ini').touch()
    (tmp_path/'nbs').mkdir()
    for name in ('train.ipynb', 'sweep.ipynb'): shutil.copy(ROOT/'nbs'/name, tmp_path/'nbs')
    (tmp_path/'reports').mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ('IN_TEST', 'NWREPRO_DATA'): monkeypatch.delenv(name, raising=False)
    return tmp_path

def pretend(point, status='finished', **summary):
    "A run that never was"
    run = Run(point.record.name)
    run.begin(asdict(point.recipe) | dict(source=dict(train=1437)), {})
    run.finish(status, **summary)

def preview(given): return grid.preview([make_points(expand_grid(given))])

# points

def test_a_grid_is_every_combination_once(elsewhere):
    points = preview(SMALL | dict(norm=['bn', 'wn'], seed=[0, 1, 2], dropout=[0.1]))
    assert [p.label for p in points] == [f'norm={norm} seed={seed}' for norm in ('bn', 'wn') for seed in (0, 1, 2)]
    assert len({p.record.name for p in points}) == 6 and {p.recipe.dropout for p in points} == {0.1}
    assert [p.label for p in preview(SMALL | dict(norm='wn'))] == ['norm=wn']
    assert len(make_points(expand_grid(SMALL | dict(norm='bn', lr=[0.1, '0.1'], init=['none', 'torch'])))) == 1

def test_a_point_is_the_run_that_the_same_command_begins(elsewhere):
    point, = preview(SMALL | dict(norm='wn', lr='0.02', max_steps=3))
    source = load_source('digits')
    run = begin_run(make_recipe(point.given, source), source, point.given)
    release_lock(run)
    assert (run.name, run.path) == (point.record.name, point.record.path) and point.steps == 3 and point.batches == 5

# what is over, and what it takes

def test_what_has_ended_is_over(elsewhere):
    done, diverged, cut, new = points = preview(SMALL | dict(norm='wn', seed=[0, 1, 2, 3]))
    for point, status in ((done, 'finished'), (diverged, 'diverged'), (cut, 'interrupted')): pretend(point, status)
    assert [is_done(p) for p in points] == [True, True, False, False]
    unfinished_notebook(done.record).touch()
    assert not is_done(done)
    unfinished_notebook(done.record).unlink()
    again, = preview(SMALL | dict(norm='wn', fresh=True))
    assert again.record.name == done.record.name and not is_done(again)

def test_a_point_that_ended_on_other_images_is_not_taken_for_over(elsewhere):
    done, = preview(SMALL | dict(norm='wn'))
    pretend(done)
    config = json.loads((done.record.path/'config.json').read_text())
    (done.record.path/'config.json').write_text(json.dumps(config | dict(source=dict(fingerprint='another', train=7, val=3, classes=2))))
    with pytest.raises(ValueError, match=r'^point norm=wn: run \S+ has ended, on other images \(7 to train on and 3 to test on in 2 classes\)'): preview(SMALL | dict(norm='wn'))
    for way in ('fresh', 'accept_changes'): assert preview(SMALL | dict(norm='wn') | {way: True})

def test_time_is_estimated_from_finished_runs_alone(elsewhere):
    points = preview(SMALL | dict(norm='wn', seed=[0, 1, 2, 3, 4]))
    left = lambda: [seconds_left(p, median_times(load_runs())) for p in points]
    assert all(map(math.isnan, left())) and format_time(total_time(left(), 2)) == 'unknown'
    pretend(points[0], 'diverged', steps=10, img_per_s=1., wall_s=1e6)
    Run(points[1].record.name).begin({}, {})
    assert left()[0] == 0 and all(map(math.isnan, left()[1:]))
    pretend(points[2], steps=10, img_per_s=200., wall_s=4.)    # 0.1 s per step, 1 s per evaluation
    assert left() == pytest.approx([0, 4, 0, 4, 4])
    pretend(points[3], steps=10, img_per_s=100., wall_s=8.)    # twice that
    assert left() == pytest.approx([0, 6, 0, 0, 6]) and total_time(left(), 2) == pytest.approx(6) and total_time([1, 9], 2) == 9
    half, = preview(SMALL | dict(norm='wn', seed=4))
    run = Run(half.record.name)
    run.begin(asdict(half.recipe), {})
    run.log('train', 5, 1., loss=1.)
    assert steps_done(half) == 5 and seconds_left(half, median_times(load_runs())) == pytest.approx(5*0.15+2*1.5)
    other, = preview(SMALL | dict(norm='wn', image_size=32))
    assert math.isnan(seconds_left(other, median_times(load_runs())))

@pytest.mark.parametrize('given, processes, threads', [('3', 2, '3'), (None, 1, 2), (None, 2, 1), (None, 5, 1)])
def test_threads_are_those_of_the_environment_or_a_share_of_the_cores(given, processes, threads, elsewhere, monkeypatch):
    class Launched(Exception): pass
    def launch_point(point, threads): raise Launched(threads)
    monkeypatch.setattr(grid, 'launch_point', launch_point)
    monkeypatch.setattr(grid, 'machine', lambda: dict(cores=8))
    if given: monkeypatch.setenv('OMP_NUM_THREADS', given)
    else: monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    with pytest.raises(Launched) as told: grid.run_points(make_points([SMALL | dict(norm='wn', processes=processes)]), 4, lambda running, failed: None)
    assert told.value.args == (threads,)

def test_what_failed_is_named_at_the_end(elsewhere):
    points = preview(SMALL | dict(norm=['bn', 'wn']))
    raise_failed(Outcome(points, {}))
    with pytest.raises(RuntimeError, match='^1 of 2 points failed; norm=wn: the disk is full$'): raise_failed(Outcome(points, {points[1].record.name: 'the disk is full'}))

# real sweeps

def start(folder, *command):
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'NWREPRO_DATA')} | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

def notebook(**given): return ['-m', 'papermill', 'nbs/sweep.ipynb', 'reports/sweep.ipynb', '--no-progress-bar', '-y', json.dumps(given)]

def script(**given): return ['-c', f'from nwrepro.experiments.grid import expand_grid, make_points, sweep\nsweep([make_points(expand_grid({given!r}))], 2, print)']

def ran(folder, *command):
    process = start(folder, *command)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out

def test_the_kernel_of_a_point_takes_no_port_that_another_could_have(elsewhere):
    asks = "import json\nfrom ipykernel import get_connection_file\njson.load(open(get_connection_file()))['transport']"
    asking = [nbformat.v4.new_code_cell('', metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(asks)]
    nbformat.write(nbformat.v4.new_notebook(cells=asking, metadata=dict(kernelspec=dict(name='python3', display_name='', language='python'))), 'nbs/train.ipynb')
    record = Record('a-run')
    record.path.mkdir(parents=True)
    grid.execute_notebook({}, 'a-run')
    assert nbformat.read(record.path/'train.ipynb', 4).cells[-1].outputs[0]['data']['text/plain'] == "'ipc'"

@pytest.mark.slow
def test_one_sweep_skips_runs_fails_and_diverges(elsewhere):
    asked = SMALL | dict(norm='wn', max_steps=2, lr=[0.01, 0.02, 0.03, 1e6])
    done, broken, new, wild = preview(asked)
    pretend(done, top1=12.5)
    broken.record.path.mkdir()
    (broken.record.path/'config.json').write_text('{"norm"')
    before = snapshot(done.record.path)
    code, out = ran(elsewhere, *notebook(**asked, jobs=2))
    assert code == 1 and 'RuntimeError: 1 of 4 points failed; lr=0.02: run '+broken.record.name+' cannot say what it was begun with' in out, out
    assert [p.record.status for p in (done, broken, new, wild)] == ['finished', 'started', 'finished', 'diverged']
    assert snapshot(done.record.path) == before
    for point in (new, wild):
        assert str(elsewhere) not in (point.record.path/'train.ipynb').read_text()
        executed = nbformat.read(point.record.path/'train.ipynb', 4)
        injected, = [c.source for c in executed.cells if 'injected-parameters' in c.metadata.get('tags', [])]
        assert f'lr = {point.recipe.lr}' in injected and not executed.metadata.papermill.exception
    assert not list((elsewhere/'reports/runs').glob('.*.ipynb'))
    table = [o['data']['text/plain'] for c in nbformat.read(elsewhere/'reports/sweep.ipynb', 4).cells for o in c.get('outputs', []) if 'text/plain' in o.get('data', {})]
    assert any('failed' in t and 'diverged' in t and '3 of 4' in t for t in table)

LONG = SMALL | dict(norm=['bn', 'wn'], epochs=6, lr=0.01, checkpoint_steps=5)

def ends(folder):
    "All that two runs come to, without clock times"
    found = {}
    for path in sorted((folder/'reports/runs').glob('[!.]*')):
        record = Record(path.name, path.parent, folder/'data/checkpoints')
        lines = [line for line in read_metrics(path/'metrics.jsonl') if line['event'] != 'resume']
        summary = {k: v for k, v in record.summary.items() if k not in ('img_per_s', 'wall_s')}
        found[path.name] = load_file(record.checkpoints/'final.safetensors'), summary, lines, (path/'predictions.csv').read_text()
    return found

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What an uncut sweep comes to"
    folder = tmp_path_factory.mktemp('whole')
    (folder/'settings.ini').touch()
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('images', '0*', '.*'))
    code, out = ran(folder, *script(**LONG))
    assert code == 0, out
    return ends(folder)

@pytest.mark.slow
def test_a_sweep_that_was_killed_ends_as_one_that_was_not(elsewhere, whole):
    points = preview(LONG)
    process = start(elsewhere, *notebook(**LONG, jobs=2))
    end = time.monotonic()+300
    while not all(list(p.record.checkpoints.glob('step-*.pt')) for p in points):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert [p.record.status for p in points] == ['started']*2
    code, out = ran(elsewhere, *script(**LONG))
    assert code == 0, out
    cut = ends(elsewhere)
    assert list(cut) == list(whole)
    for name, (weights, *rest) in whole.items():
        assert list(cut[name][0]) == list(weights) and all(cut[name][0][k].equal(w) for k, w in weights.items())
        assert cut[name][1:] == tuple(rest)
        resumed = [line['step'] for line in read_metrics(elsewhere/'reports/runs'/name/'metrics.jsonl') if line['event'] == 'resume']
        assert len(resumed) == 1 and resumed[0] >= 5
        assert (elsewhere/'reports/runs'/name/'train.ipynb').exists()

@pytest.mark.slow
def test_a_dry_run_of_the_notebook_runs_nothing(elsewhere):
    code, out = ran(elsewhere, *notebook(**SMALL, norm=['bn', 'wn'], grid='tune_lr', dry_run=True))
    assert code == 0, out
    assert not (elsewhere/'reports/runs').exists() and not (elsewhere/'reports/tuned_lr.csv').exists()
