"Searches for a learning rate: their rounds, what they write, and what a sweep refuses before anything runs"
import ast, csv, math, time
from concurrent.futures import ThreadPoolExecutor

import nbformat, pytest

from conftest import ROOT, snapshot
from nwrepro.experiments import grid, tuning
from nwrepro.experiments.grid import expand_grid, is_done, progress_table, make_points, raise_failed, sweep
from nwrepro.experiments.tuning import LR_FACTORS, GRIDS, PROBE_STEPS, lr_ladder, learns, lr_setting, largest_lr_table, sweep_parameters, write_tuned
from nwrepro.training.recipe import TUNED_BY, tuned_lr, tuned_table
from nwrepro.training.runs import Record
from test_grid import SMALL, elsewhere, pretend

OWN = dict(grid='points', jobs=1, cluster='local', hours=24., sbatch='none', dry_run=False)
CELL = dict(SMALL, norm='bn', **OWN)

def preview(given, name='points'): return grid.preview(GRIDS[name](given))

def cells(name): return {c.source.split(':')[0]: c.source for c in nbformat.read(ROOT/'nbs'/name, 4).cells if 'parameters' in c.metadata.get('tags', [])}

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
    monkeypatch.setattr(grid, 'launch_point', lambda *args: pytest.fail('something was run'))
    with pytest.raises(ValueError) as refusal:
        given, own = sweep_parameters(CELL | wrong)
        sweep(GRIDS[own.grid](given), own.jobs, lambda table: None)
    assert str(refusal.value).startswith(sentence) and '\n' not in str(refusal.value)
    assert not (elsewhere/'reports/runs').exists()

def test_a_preview_touches_nothing(elsewhere):
    before = snapshot(elsewhere)
    for name, n in (('points', 2), ('tune_lr', 2*(5+2)), ('survival', 2*18)):
        points = preview(SMALL | dict(norm=['bn', 'wn'], epochs='none' if name == 'survival' else 36), name)
        table = progress_table(points, jobs=2)
        assert len(points) == n and table.loc['all', 'status'] == f'0 of {n}' and set(table['left']) == {'unknown'}
    assert snapshot(elsewhere) == before

# the two ready grids, on made-up results

def test_tuning_runs_the_best_two_again_and_lr_tuned_reads_the_winner(elsewhere):
    asked = SMALL | dict(norm=['bn', 'wn'], epochs=36)
    def top1(recipe):  # bn is best inside the list, wn two factors of two above it; a second seed likes a larger lr
        best = {'bn': 0.006, 'wn': 0.8}[recipe.norm]
        return 90-10*abs(math.log(recipe.lr/best))+recipe.seed*(15*math.log(recipe.lr/best)+1)
    rounds = []
    for one in tuning.tune_lr(asked):
        for point in one: pretend(point, top1=top1(point.recipe)) if point.recipe.lr < 1 else pretend(point, 'diverged')
        rounds.append(one)
    first, *more, second = rounds
    tried = [p for one in rounds for p in one]
    assert [len(first), [len(one) for one in more], len(second)] == [2*len(LR_FACTORS), [1, 1, 1], 2*2]
    assert {p.recipe.holdout for p in tried} == {0.1} and {p.recipe.epochs for p in tried} == {36}
    assert {p.recipe.seed for p in first} == {0} and {p.recipe.seed for p in second} == {1}
    assert {(p.recipe.norm, p.recipe.lr) for one in more for p in one} == {('wn', 0.4), ('wn', 0.8), ('wn', 1.6)}
    assert {(p.recipe.norm, p.recipe.lr) for p in second} == {('bn', 0.005), ('bn', 0.01), ('wn', 0.8), ('wn', 0.4)}
    rows = write_tuned(tried)
    for norm, lr in (('bn', 0.01), ('wn', 0.8)):
        with pytest.raises(ValueError, match=f'finds no row for .*norm {norm}.*epochs 6 '): preview(SMALL | dict(norm=norm, lr='tuned', epochs=6))
        with pytest.raises(ValueError, match=f'finds no row for .*norm {norm}.*augment mirror'): preview(SMALL | dict(norm=norm, lr='tuned', epochs=36, augment='mirror'))
        point, = preview(SMALL | dict(norm=norm, lr='tuned', epochs=36))
        assert point.recipe.lr == lr == tuned_lr(lr_setting(point.recipe)) and point.given['lr'] == 'tuned'
    assert rows['n'].tolist() == [2, 2] and rows['epochs'].tolist() == [36, 36]
    assert all(len(runs.split()) == 2 and all(Record(run).status == 'finished' for run in runs.split()) for runs in rows['runs'])
    assert all(is_done(p) for one in tuning.tune_lr(asked) for p in one)

def test_the_committed_table_names_the_runs_of_each_learning_rate():
    rows = list(csv.DictReader((ROOT/'reports/tuned_lr.csv').open()))
    header = (ROOT/'reports/tuned_lr.csv').read_text().splitlines()[0].split(',')
    assert header == [*TUNED_BY, 'epochs', 'lr', 'top1', 'n', 'runs', 'date']
    assert all(float(row['lr']) > 0 and len(row['runs'].split()) == int(row['n']) for row in rows)

def test_a_second_tuning_replaces_its_row_and_keeps_the_others(elsewhere):
    def tune(norm, lr):
        point, = make_points(expand_grid(SMALL | dict(norm=norm, lr=lr, holdout=0.1)))
        pretend(point, top1=50.)
        write_tuned([point])
    tune('wn', 0.1), tune('bn', 0.2), tune('wn', 0.3)
    lines = (elsewhere/'reports/tuned_lr.csv').read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith('data,arch,image_size,recipe,norm,init,zero_init,batch_size,stem,width,weight_decay,precision,augment,epochs,lr,top1,n,runs,date')
    rates = [preview(SMALL | dict(norm=norm, lr='tuned'))[0].recipe.lr for norm in ('bn', 'wn')]
    assert rates == [0.2, 0.3]
    with pytest.raises(ValueError, match=r'finds no row for data digits, arch resnet18, image_size 16, recipe paper, norm wn, init norm_preserving, zero_init False, batch_size 10, stem imagenet, width 1.0, weight_decay 0.0001, precision fp32, augment crop\+mirror, epochs '):
        preview(SMALL | dict(norm='wn', lr='tuned', batch_size=10))

def test_two_sweeps_that_write_at_the_same_time_lose_no_row(elsewhere, monkeypatch):
    points = make_points(expand_grid(SMALL | dict(norm=['bn', 'wn'], lr=0.1, holdout=0.1)))
    for point in points: pretend(point, top1=50.)
    def slow_read():
        rows = tuned_table()
        time.sleep(0.5)
        return rows
    monkeypatch.setattr(tuning, 'tuned_table', slow_read)
    with ThreadPoolExecutor() as pool: list(pool.map(write_tuned, [[point] for point in points]))
    assert sorted(row['norm'] for row in tuned_table()) == ['bn', 'wn']

def test_a_setting_whose_every_learning_rate_diverged_gets_no_row(elsewhere):
    points = make_points(expand_grid(SMALL | dict(norm=['bn', 'wn'], lr=[0.1, 0.2], holdout=0.1)))
    for point in points: pretend(point, 'finished' if point.recipe.norm == 'bn' else 'diverged', top1=50. if point.recipe.norm == 'bn' else None)
    with pytest.raises(ValueError, match='^every learning rate diverged for wn from norm_preserving, so there is none to keep: give smaller ones'): write_tuned(points)
    assert [row['norm'] for row in tuned_table()] == ['bn']

@pytest.mark.parametrize('best, side', [(0.1, 'smaller'), (0.2, ''), (0.4, 'larger')])
def test_a_best_learning_rate_at_the_end_of_those_tried_says_where_to_go_on(best, side, elsewhere):
    points = make_points(expand_grid(SMALL | dict(norm=['bn', 'wn'], lr=[0.1, 0.2, 0.4], holdout=0.1)))
    for point in points: pretend(point, top1=60. if point.recipe.lr == (best if point.recipe.norm == 'wn' else 0.2) else 50.)
    assert write_tuned(points).set_index('norm')['try_next'].to_dict() == dict(bn='', wn=side)
    assert 'try_next' not in tuned_table()[0]

PROBED = SMALL | dict(epochs='none')

def judged(point, learned, survived):
    pretend(point, 'finished' if survived else 'diverged', verdict='learning' if learned else 'stuck' if survived else 'diverged')

@pytest.mark.parametrize('limit', [1e-4, 0.0123, 0.37, 5, 20])
def test_a_ladder_encloses_the_largest_lr_that_learns(limit, elsewhere):
    probed = []
    for one in lr_ladder(PROBED | dict(norm='wn', seed=[0, 1])):
        for point in one: judged(point, point.recipe.lr*2**point.recipe.seed <= limit, point.recipe.lr < 8*limit)
        probed += one
    assert {p.steps for p in probed} == {PROBE_STEPS}
    for row in largest_lr_table(probed).itertuples():
        at = limit/2**row.seed
        assert row.learns <= at and not row.above < at and row.exceptions == []
        if 2**-12 <= at < 16: assert row.above == 2*row.learns and row.no_divergence >= row.learns
        assert row.probes == (18 if at < 2**-12 else sum(p.recipe.seed == row.seed for p in probed))
    finest = min(p.recipe.lr for p in probed if p.recipe.seed == 0)
    assert finest == 2**-13 or finest <= limit/2

def test_a_stuck_probe_does_not_learn_and_a_lone_rung_does_not_end_the_ladder(elsewhere):
    probed = []
    for one in lr_ladder(PROBED | dict(norm='wn')):
        for point in one: judged(point, point.recipe.lr in (8, 2, 1), True)
        probed += one
    row, = largest_lr_table(probed).to_dict('records')
    assert (row['learns'], row['above'], row['exceptions'], row['no_divergence'], row['probes']) == (2, 4, [8], 16, 5)
    assert [learns(p.record) for p in probed] == [False, True, False, True, True]

def test_combinations_of_a_ladder_end_one_by_one(elsewhere):
    probed = []
    for one in lr_ladder(PROBED | dict(norm='wn', grad_clip=['none', 1.], lr=[0.01, 4])):
        for point in one: judged(point, point.recipe.lr < 3 and point.recipe.grad_clip == 1, point.recipe.lr < 0.1)
        probed += one
    table = largest_lr_table(probed)
    assert table['grad_clip'].isna().tolist() == [True, False] and table['learns'].tolist() == [0, 0.0625] and table['probes'].tolist() == [9, 8]

def test_a_probe_that_never_has_its_steps_at_its_learning_rate_is_refused(elsewhere):
    with pytest.raises(ValueError, match='a probe of 10 steps has 0 after its warm-up of 10, and 200 are needed: give max_steps = 210 and as many epochs as that takes, or neither$'):
        next(lr_ladder(SMALL | dict(norm='wn', epochs=3, warmup_epochs=2, max_steps=10)))
    with pytest.raises(ValueError, match='after 210 of 250 steps the schedule has lowered the learning rate to 0.03 of its value, and 0.9 is needed: give epochs = 840$'):
        next(lr_ladder(SMALL | dict(norm='wn', epochs=50, warmup_epochs=2)))
    point, = next(lr_ladder(SMALL | dict(norm='wn', epochs='none', warmup_epochs=2)))
    assert (point.steps, point.recipe.epochs, point.recipe.lr) == (210, 840, 16)

def test_a_grid_does_not_build_on_a_round_that_failed(elsewhere, monkeypatch):
    rounds = []
    def fail(points, jobs, show):
        rounds.append(points)
        return {points[0].record.name: 'no'}
    monkeypatch.setattr(grid, 'run_points', fail)
    outcome = sweep(GRIDS['survival'](PROBED | dict(norm='wn')), 1, lambda table: None)
    assert len(rounds) == 1 and list(outcome.failed) == [outcome.points[0].record.name]

@pytest.mark.slow
def test_a_real_ladder(elsewhere, monkeypatch):
    monkeypatch.setattr(tuning, 'PROBE_STEPS', 2)
    outcome = sweep(GRIDS['survival'](PROBED | dict(norm='wn', lr=[1e-13, 2e-13])), 1, lambda table: None)
    raise_failed(outcome)
    row, = largest_lr_table(outcome.points).to_dict('records')
    assert row['probes'] == 2 and (row['learns'], row['no_divergence']) == (0, 2e-13) and {p.steps for p in outcome.points} == {2}
