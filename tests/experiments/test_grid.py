"Grids of runs: what they are made of, what stops them, and that killing one loses nothing"
import ast, csv, json, math, os, shutil, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path

import nbformat, pytest
from safetensors.torch import load_file

from conftest import ROOT, run_in, snapshot
from nwrepro import sweeps
from nwrepro.training.recipe import TUNED_BY, make_recipe, tuned_lr, tuned_table
from nwrepro.training.records import load_runs
from nwrepro.training.runs import Record, Run, read_metrics
from nwrepro.training.checkpoint import acquire_lock, release_lock
from nwrepro.experiments.grid import (FACTORS, GRIDS, Outcome, PROBE_STEPS, expand, in_words, ladder, learns, over, overview, paces, plan, preview, raise_failed, resolve, seconds_left,
                            setting, steps_done, survivors, sweep, sweep_parameters, together, tuning, unfinished_notebook, write_tuned)
from nwrepro.training.lifecycle import begin_run
from nwrepro.training.data import load_source

SMALL = dict(data='digits', arch='resnet18', train_images=100, image_size=16, batch_size=20, bn_batch=10, epochs=2, warmup_epochs=0)
OWN = dict(grid='points', jobs=1, cluster='local', hours=24., sbatch='none', dry_run=False)
CELL = dict(SMALL, norm='bn', **OWN)

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

def cells(name): return {c.source.split(':')[0]: c.source for c in nbformat.read(ROOT/'nbs'/name, 4).cells if 'parameters' in c.metadata.get('tags', [])}

# points

def test_a_grid_is_every_combination_once(elsewhere):
    points = preview(SMALL | dict(norm=['bn', 'wn'], seed=[0, 1, 2], dropout=[0.1]), 'points')
    assert [p.label for p in points] == [f'norm={norm} seed={seed}' for norm in ('bn', 'wn') for seed in (0, 1, 2)]
    assert len({p.record.name for p in points}) == 6 and {p.recipe.dropout for p in points} == {0.1}
    assert [p.label for p in preview(SMALL | dict(norm='wn'), 'points')] == ['norm=wn']
    assert len(plan(expand(SMALL | dict(norm='bn', lr=[0.1, '0.1'], init=['none', 'torch'])))) == 1

def test_a_point_is_the_run_that_the_same_command_begins(elsewhere):
    point, = preview(SMALL | dict(norm='wn', lr='0.02', max_steps=3), 'points')
    source = load_source('digits')
    run = begin_run(make_recipe(point.given, source), source, point.given)
    release_lock(run)
    assert (run.name, run.path) == (point.record.name, point.record.path) and point.steps == 3 and point.batches == 5

def test_the_notebook_knows_every_parameter_of_a_run_with_the_same_default():
    def defaults(name):
        source, = cells(name).values()
        return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}
    train, both = defaults('train.ipynb'), defaults('sweep.ipynb')
    assert {name: both[name] for name in both if name not in OWN} == train
    given, own = sweep_parameters(both)
    assert given == train and vars(own) == OWN | dict(sbatch=None)

REFUSED = [
    (dict(nrom='wn'), "unknown parameter 'nrom': did you mean 'norm'"), (dict(job=2), "unknown parameter 'job': did you mean 'jobs'"), (dict(grid='tune'), "unknown grid 'tune'"),
    (dict(jobs=0), 'jobs = 0 is not accepted'), (dict(jobs='none'), 'jobs = none is not accepted'), (dict(dry_run=1), 'dry_run = 1 is not accepted'), (dict(cluster='sge'), 'cluster = sge is not accepted'), (dict(hours=0), 'hours = 0 is not accepted'), (dict(seed=[]), 'seed = [] holds no value'),
    (dict(norm=['bn', 'vn']), "point norm=vn: unknown norm 'vn'"), (dict(norm=['bn', 'wn'], lr=[0.1, 0]), 'point norm=bn lr=0: lr = 0 is not accepted'),
    (dict(norm=['bn', 'wn'], init=['torch', 'data']), "point norm=bn init=data: unknown init for norm 'bn'"), (dict(seed=[[0, 1]]), 'point norm=bn: seed = [0, 1] is not accepted'),
    (dict(batch_size=[20, 500]), 'point batch_size=500: batch_size = 500 is more than'), (dict(train_images=[100, 9999]), 'point train_images=9999: '), (dict(norm='[bn,wn]'), "point norm=[bn,wn]: unknown norm '[bn,wn]'"),
    (dict(lr='tuned'), 'point norm=bn: lr = tuned finds no row for data digits'), (dict(grid='tune_lr', dropout=[0, 0.5]), 'dropout = [0, 0.5] is a list, which tune_lr takes only for'),
    (dict(grid='survival', lr=0.1), 'lr = 0.1 is not accepted: survival takes two bounds'), (dict(grid='survival', lr=[1, 0.1]), 'lr = [1, 0.1] is not accepted: survival'), (dict(grid='survival', lr=[0.1, 'none']), "lr = [0.1, 'none'] is not accepted: survival"),
    (dict(grid='survival', lr=[0.1, 'tuned']), "lr = [0.1, 'tuned'] is not accepted: survival"),
    (dict(grid='survival', lr=['a', 1]), 'lr = a is not accepted'),
]

@pytest.mark.parametrize('wrong, sentence', REFUSED, ids=[str(wrong) for wrong, _ in REFUSED])
def test_a_refused_value_stops_before_anything_runs(wrong, sentence, elsewhere, monkeypatch):
    monkeypatch.setattr(sweeps, 'launch', lambda *args: pytest.fail('something was run'))
    with pytest.raises(ValueError) as refusal:
        given, own = sweep_parameters(CELL | wrong)
        sweep(given, own.grid, own.jobs, lambda table: None)
    assert str(refusal.value).startswith(sentence) and '\n' not in str(refusal.value)
    assert not (elsewhere/'reports/runs').exists()

# what is over, and what it takes

def test_what_has_ended_is_over(elsewhere):
    done, diverged, cut, new = points = preview(SMALL | dict(norm='wn', seed=[0, 1, 2, 3]), 'points')
    for point, status in ((done, 'finished'), (diverged, 'diverged'), (cut, 'interrupted')): pretend(point, status)
    assert [over(p) for p in points] == [True, True, False, False]
    unfinished_notebook(done.record).touch()
    assert not over(done)
    unfinished_notebook(done.record).unlink()
    again, = preview(SMALL | dict(norm='wn', fresh=True), 'points')
    assert again.record.name == done.record.name and not over(again)

def test_a_point_that_ended_on_other_images_is_not_taken_for_over(elsewhere):
    done, = preview(SMALL | dict(norm='wn'), 'points')
    pretend(done)
    config = json.loads((done.record.path/'config.json').read_text())
    (done.record.path/'config.json').write_text(json.dumps(config | dict(source=dict(fingerprint='another', train=7, val=3, classes=2))))
    with pytest.raises(ValueError, match=r'^point norm=wn: run \S+ has ended, on other images \(7 to train on and 3 to test on in 2 classes\)'): preview(SMALL | dict(norm='wn'), 'points')
    for way in ('fresh', 'accept_changes'): assert preview(SMALL | dict(norm='wn') | {way: True}, 'points')

def test_time_is_estimated_from_finished_runs_alone(elsewhere):
    points = preview(SMALL | dict(norm='wn', seed=[0, 1, 2, 3, 4]), 'points')
    left = lambda: [seconds_left(p, paces(load_runs())) for p in points]
    assert all(map(math.isnan, left())) and in_words(together(left(), 2)) == 'unknown'
    pretend(points[0], 'diverged', steps=10, img_per_s=1., wall_s=1e6)
    Run(points[1].record.name).begin({}, {})
    assert left()[0] == 0 and all(map(math.isnan, left()[1:]))
    pretend(points[2], steps=10, img_per_s=200., wall_s=4.)    # 0.1 s per step, 1 s per evaluation
    assert left() == pytest.approx([0, 4, 0, 4, 4])
    pretend(points[3], steps=10, img_per_s=100., wall_s=8.)    # twice that
    assert left() == pytest.approx([0, 6, 0, 0, 6]) and together(left(), 2) == pytest.approx(6) and together([1, 9], 2) == 9
    half, = preview(SMALL | dict(norm='wn', seed=4), 'points')
    run = Run(half.record.name)
    run.begin(asdict(half.recipe), {})
    run.log('train', 5, 1., loss=1.)
    assert steps_done(half) == 5 and seconds_left(half, paces(load_runs())) == pytest.approx(5*0.15+2*1.5)
    other, = preview(SMALL | dict(norm='wn', image_size=32), 'points')
    assert math.isnan(seconds_left(other, paces(load_runs())))

def test_a_preview_touches_nothing(elsewhere):
    before = snapshot(elsewhere)
    for grid, n in (('points', 2), ('tune_lr', 2*(5+2)), ('survival', 2*18)):
        points = preview(SMALL | dict(norm=['bn', 'wn'], epochs='none' if grid == 'survival' else 36), grid)
        table = overview(points, jobs=2)
        assert len(points) == n and table.loc['all', 'status'] == f'0 of {n}' and set(table['left']) == {'unknown'}
    assert snapshot(elsewhere) == before

# the two ready grids, on made-up results

def test_tuning_runs_the_best_two_again_and_lr_tuned_reads_the_winner(elsewhere):
    asked = SMALL | dict(norm=['bn', 'wn'], epochs=36)
    def top1(recipe):  # bn is best inside the list, wn two factors of two above it; a second seed likes a larger lr
        best = {'bn': 0.006, 'wn': 0.8}[recipe.norm]
        return 90-10*abs(math.log(recipe.lr/best))+recipe.seed*(15*math.log(recipe.lr/best)+1)
    rounds = []
    for one in tuning(asked):
        for point in one: pretend(point, top1=top1(point.recipe)) if point.recipe.lr < 1 else pretend(point, 'diverged')
        rounds.append(one)
    first, *more, second = rounds
    tried = [p for one in rounds for p in one]
    assert [len(first), [len(one) for one in more], len(second)] == [2*len(FACTORS), [1, 1, 1], 2*2]
    assert {p.recipe.holdout for p in tried} == {0.1} and {p.recipe.epochs for p in tried} == {36}
    assert {p.recipe.seed for p in first} == {0} and {p.recipe.seed for p in second} == {1}
    assert {(p.recipe.norm, p.recipe.lr) for one in more for p in one} == {('wn', 0.4), ('wn', 0.8), ('wn', 1.6)}
    assert {(p.recipe.norm, p.recipe.lr) for p in second} == {('bn', 0.005), ('bn', 0.01), ('wn', 0.8), ('wn', 0.4)}
    rows = write_tuned(tried)
    for norm, lr in (('bn', 0.01), ('wn', 0.8)):
        with pytest.raises(ValueError, match=f'finds no row for .*norm {norm}.*epochs 6 '): preview(SMALL | dict(norm=norm, lr='tuned', epochs=6), 'points')
        with pytest.raises(ValueError, match=f'finds no row for .*norm {norm}.*augment mirror'): preview(SMALL | dict(norm=norm, lr='tuned', epochs=36, augment='mirror'), 'points')
        point, = preview(SMALL | dict(norm=norm, lr='tuned', epochs=36), 'points')
        assert point.recipe.lr == lr == tuned_lr(setting(point.recipe)) and point.given['lr'] == 'tuned'
    assert rows['n'].tolist() == [2, 2] and rows['epochs'].tolist() == [36, 36]
    assert all(len(runs.split()) == 2 and all(Record(run).status == 'finished' for run in runs.split()) for runs in rows['runs'])
    assert all(over(p) for one in tuning(asked) for p in one)

def test_the_committed_table_names_the_runs_of_each_rate():
    rows = list(csv.DictReader((ROOT/'reports/tuned_lr.csv').open()))
    header = (ROOT/'reports/tuned_lr.csv').read_text().splitlines()[0].split(',')
    assert header == [*TUNED_BY, 'epochs', 'lr', 'top1', 'n', 'runs', 'date']
    assert all(float(row['lr']) > 0 and len(row['runs'].split()) == int(row['n']) for row in rows)

def test_a_second_tuning_replaces_its_row_and_keeps_the_others(elsewhere):
    def tune(norm, lr):
        point, = plan(expand(SMALL | dict(norm=norm, lr=lr, holdout=0.1)))
        pretend(point, top1=50.)
        write_tuned([point])
    tune('wn', 0.1), tune('bn', 0.2), tune('wn', 0.3)
    lines = (elsewhere/'reports/tuned_lr.csv').read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith('data,arch,image_size,recipe,norm,init,zero_init,batch_size,stem,width,weight_decay,precision,augment,epochs,lr,top1,n,runs,date')
    rates = [preview(SMALL | dict(norm=norm, lr='tuned'), 'points')[0].recipe.lr for norm in ('bn', 'wn')]
    assert rates == [0.2, 0.3]
    with pytest.raises(ValueError, match='finds no row for data digits, arch resnet18, image_size 16, recipe paper, norm wn, init norm_preserving, zero_init False, batch_size 10, stem imagenet, width 1.0, weight_decay 0.0001, precision fp32, augment crop\+mirror, epochs '):
        preview(SMALL | dict(norm='wn', lr='tuned', batch_size=10), 'points')

def test_a_setting_whose_every_rate_diverged_gets_no_row(elsewhere):
    points = plan(expand(SMALL | dict(norm=['bn', 'wn'], lr=[0.1, 0.2], holdout=0.1)))
    for point in points: pretend(point, 'finished' if point.recipe.norm == 'bn' else 'diverged', top1=50. if point.recipe.norm == 'bn' else None)
    with pytest.raises(ValueError, match='^every rate diverged for wn from norm_preserving, so there is none to keep: give smaller ones'): write_tuned(points)
    assert [row['norm'] for row in tuned_table()] == ['bn']

@pytest.mark.parametrize('best, side', [(0.1, 'smaller'), (0.2, ''), (0.4, 'larger')])
def test_a_best_rate_at_the_end_of_those_tried_says_where_to_go_on(best, side, elsewhere):
    points = plan(expand(SMALL | dict(norm=['bn', 'wn'], lr=[0.1, 0.2, 0.4], holdout=0.1)))
    for point in points: pretend(point, top1=60. if point.recipe.lr == (best if point.recipe.norm == 'wn' else 0.2) else 50.)
    assert write_tuned(points).set_index('norm')['try_next'].to_dict() == dict(bn='', wn=side)
    assert 'try_next' not in tuned_table()[0]

@pytest.mark.parametrize('given, processes, threads', [('3', 2, '3'), (None, 1, 2), (None, 2, 1), (None, 5, 1)])
def test_threads_are_those_of_the_environment_or_a_share_of_the_cores(given, processes, threads, elsewhere, monkeypatch):
    class Launched(Exception): pass
    def launch(point, threads): raise Launched(threads)
    monkeypatch.setattr(sweeps, 'launch', launch)
    monkeypatch.setattr(sweeps, 'machine', lambda: dict(cores=8))
    if given: monkeypatch.setenv('OMP_NUM_THREADS', given)
    else: monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    with pytest.raises(Launched) as told: sweeps.run_points(plan([SMALL | dict(norm='wn', processes=processes)]), 4, lambda running, failed: None)
    assert told.value.args == (threads,)

PROBED = SMALL | dict(epochs='none')

def judged(point, learned, survived):
    pretend(point, 'finished' if survived else 'diverged', verdict='learning' if learned else 'stuck' if survived else 'diverged')

@pytest.mark.parametrize('limit', [1e-4, 0.0123, 0.37, 5, 20])
def test_a_ladder_encloses_the_largest_lr_that_learns(limit, elsewhere):
    probed = []
    for one in ladder(PROBED | dict(norm='wn', seed=[0, 1])):
        for point in one: judged(point, point.recipe.lr*2**point.recipe.seed <= limit, point.recipe.lr < 8*limit)
        probed += one
    assert {p.steps for p in probed} == {PROBE_STEPS}
    for row in survivors(probed).itertuples():
        at = limit/2**row.seed
        assert row.learns <= at and not row.above < at and row.exceptions == []
        if 2**-12 <= at < 16: assert row.above == 2*row.learns and row.no_divergence >= row.learns
        assert row.probes == (18 if at < 2**-12 else sum(p.recipe.seed == row.seed for p in probed))
    finest = min(p.recipe.lr for p in probed if p.recipe.seed == 0)
    assert finest == 2**-13 or finest <= limit/2

def test_a_stuck_probe_does_not_learn_and_a_lone_rung_does_not_end_the_ladder(elsewhere):
    probed = []
    for one in ladder(PROBED | dict(norm='wn')):
        for point in one: judged(point, point.recipe.lr in (8, 2, 1), True)
        probed += one
    row, = survivors(probed).to_dict('records')
    assert (row['learns'], row['above'], row['exceptions'], row['no_divergence'], row['probes']) == (2, 4, [8], 16, 5)
    assert [learns(p.record) for p in probed] == [False, True, False, True, True]

def test_combinations_of_a_ladder_end_one_by_one(elsewhere):
    probed = []
    for one in ladder(PROBED | dict(norm='wn', grad_clip=['none', 1.], lr=[0.01, 4])):
        for point in one: judged(point, point.recipe.lr < 3 and point.recipe.grad_clip == 1, point.recipe.lr < 0.1)
        probed += one
    table = survivors(probed)
    assert table['grad_clip'].isna().tolist() == [True, False] and table['learns'].tolist() == [0, 0.0625] and table['probes'].tolist() == [9, 8]

def test_a_probe_that_never_has_its_steps_at_its_rate_is_refused(elsewhere):
    with pytest.raises(ValueError, match='a probe of 10 steps has 0 after its warm-up of 10, and 200 are needed: give max_steps = 210 and as many epochs as that takes, or neither$'):
        next(ladder(SMALL | dict(norm='wn', epochs=3, warmup_epochs=2, max_steps=10)))
    with pytest.raises(ValueError, match='after 210 of 250 steps the schedule has lowered the learning rate to 0.03 of its value, and 0.9 is needed: give epochs = 840$'):
        next(ladder(SMALL | dict(norm='wn', epochs=50, warmup_epochs=2)))
    point, = next(ladder(SMALL | dict(norm='wn', epochs='none', warmup_epochs=2)))
    assert (point.steps, point.recipe.epochs, point.recipe.lr) == (210, 840, 16)

def test_what_failed_is_named_at_the_end(elsewhere):
    points = preview(SMALL | dict(norm=['bn', 'wn']), 'points')
    raise_failed(Outcome(points, {}))
    with pytest.raises(RuntimeError, match='^1 of 2 points failed; norm=wn: the disk is full$'): raise_failed(Outcome(points, {points[1].record.name: 'the disk is full'}))

def test_a_grid_does_not_build_on_a_round_that_failed(elsewhere, monkeypatch):
    rounds = []
    def fail(points, jobs, show):
        rounds.append(points)
        return {points[0].record.name: 'no'}
    monkeypatch.setattr(sweeps, 'run_points', fail)
    outcome = sweep(PROBED | dict(norm='wn'), 'survival', 1, lambda table: None)
    assert len(rounds) == 1 and list(outcome.failed) == [outcome.points[0].record.name]

# real sweeps

def start(folder, *command):
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'NWREPRO_DATA')} | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

def notebook(**given): return ['-m', 'papermill', 'nbs/sweep.ipynb', 'reports/sweep.ipynb', '--no-progress-bar', '-y', json.dumps(given)]

def script(**given): return ['-c', f'from nwrepro.experiments.grid import sweep\nsweep({given!r}, "points", 2, print)']

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
    sweeps.execute({}, 'a-run')
    assert nbformat.read(record.path/'train.ipynb', 4).cells[-1].outputs[0]['data']['text/plain'] == "'ipc'"

@pytest.mark.slow
def test_one_sweep_skips_runs_fails_and_diverges(elsewhere):
    asked = SMALL | dict(norm='wn', max_steps=2, lr=[0.01, 0.02, 0.03, 1e6])
    done, broken, new, wild = preview(asked, 'points')
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
    points = preview(LONG, 'points')
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

@pytest.mark.slow
def test_a_real_ladder(elsewhere, monkeypatch):
    monkeypatch.setattr(sweeps, 'PROBE_STEPS', 2)
    outcome = sweep(PROBED | dict(norm='wn', lr=[1e-13, 2e-13]), 'survival', 1, lambda table: None)
    raise_failed(outcome)
    row, = survivors(outcome.points).to_dict('records')
    assert row['probes'] == 2 and (row['learns'], row['no_divergence']) == (0, 2e-13) and {p.steps for p in outcome.points} == {2}
