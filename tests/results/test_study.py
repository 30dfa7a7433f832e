"The first study: what its page says by hand is what its records hold"
import json
import nbformat, pandas, pytest
from conftest import ROOT
from nwrepro.training.recipe import tuned_table
from nwrepro.training.records import load_runs
from nwrepro.training.runs import Record, read_metrics
from nwrepro.results.claims import judge
from nwrepro.results.figures import RunCache
from nwrepro.results.histories import read_histories, rise
from nwrepro.results.page import draw_figures
from nwrepro.results.statistics import mean_interval, smallest_margin, welch
from nwrepro.results.variants import comparable

FOLDER = ROOT/'reports/study'

@pytest.fixture(scope='module')
def found(): return load_runs(FOLDER)

@pytest.fixture(scope='module')
def runs(found): return found.query("arch == 'resnet26'")

@pytest.fixture(scope='module')
def deep(found): return found.query("arch == 'resnet50'")

@pytest.fixture(scope='module')
def verdicts(found): return {v.key: v for v in judge(found, FOLDER, ROOT/'reports'/'cost')}

@pytest.fixture(scope='module')
def page(): return (ROOT/'reports/README.md').read_text()

@pytest.fixture(scope='module')
def surprises(): return '\n'.join(c.source for c in nbformat.read(ROOT/'nbs/results/surprises.ipynb', 4).cells if c.cell_type == 'markdown')

BN, ZERO = dict(norm='bn', zero_init=False, lr=0.025), dict(norm='bn', zero_init=True, lr=0.05)
WN, WN_TORCH = (dict(norm='wn', init=init, zero_init=False) for init in ('norm_preserving', 'torch'))
NONE, NONE_TORCH = (dict(norm='none', init=init, zero_init=False) for init in ('norm_preserving', 'torch'))
NP, EVEN = dict(norm='np'), dict(norm='trelu', init='even')

def of(runs, what, start):
    whole = runs[runs['max_steps'].isna() & (runs['holdout'] == 0) & (runs['status'] == 'finished')]
    return whole[(whole[list(start)] == pandas.Series(start)).all(axis=1)].sort_values('seed')[what]

@pytest.mark.parametrize('one, other, what', [(WN, BN, 'top1'), (ZERO, WN, 'top1'), (ZERO, BN, 'top1'), (NP, WN, 'top1'), (NP, BN, 'top1'),
                                              (WN_TORCH, WN, 'top1'), (WN_TORCH, WN, 'train_top1'),
                                              (WN_TORCH, BN, 'top1'), (ZERO, WN_TORCH, 'top1'), (NONE, WN, 'top1'),
                                              (NONE, WN, 'train_top1'), (NONE_TORCH, NONE, 'top1'),
                                              (NONE_TORCH, WN_TORCH, 'top1'), (EVEN, WN, 'top1')], ids=str)
def test_gaps_are_those_of_the_records(one, other, what, runs, page):
    gap = welch(of(runs, what, one), of(runs, what, other))
    assert gap.n == 3 and f'{gap.low:.1f} to {gap.high:.1f}' in page

@pytest.mark.parametrize('start', [WN_TORCH, NONE_TORCH, EVEN], ids=str)
def test_accuracies_are_those_of_the_records(start, runs, page):
    first, *more, last = (f'{value:.1f}' for value in of(runs, 'top1', start))
    assert f"{', '.join([first, *more])} and {last} %" in page

def test_the_search_from_the_data_dependent_init_came_out_as_told(runs, page):
    tried = runs[(runs['norm'] == 'wn') & (runs['holdout'] > 0) & runs['max_steps'].isna() & ~runs['zero_init']]
    def scored(init, lr, epochs): return f"{tried[(tried[['init', 'lr', 'epochs']] == [init, lr, epochs]).all(axis=1)]['top1'].item():.1f}"
    rows = {row['init']: float(row['lr']) for row in tuned_table() if row['norm'] == 'wn'}
    data, torch, own = (scored(init, rows[init], 20) for init in ('data', 'torch', 'norm_preserving'))
    assert f"{rows['data']:g} was chosen: {data} % after 20 epochs, where torch's init has {torch} at its own learning rate and the norm-preserving one {own}" in page
    assert f"At 0.0125 and 0.025 it is at {scored('data', 0.0125, 5)} and {scored('data', 0.025, 5)} % after 5 epochs" in page
    lost = tried[(tried['init'] == 'data') & (tried['status'] == 'diverged')]
    assert lost['lr'].min() == 0.05 and lost['diverged_step'].max() == 5 and set(tried[(tried['init'] == 'data') & (tried['lr'] > 0.025)]['status']) == {'diverged'}

def test_the_study_is_judged_as_told(verdicts, page):
    told = dict(C7="supported", C1='undecided', C2='not testable here', C3='undecided', C4='not testable here', C5='not testable here',
                C6='not tested', C8='not testable here', C9='not tested', C10='undecided', C11='undecided')
    assert {key: verdicts[key].verdict for key in told} == told and [verdicts[key].note
        for key in ('C2', 'C4', 'C8')] == ['both may be at 100 % of the training images', 'like C1, but for 0.8 points of training accuracy', 'not informative: the sign differs between places in a block']
    assert verdicts['C7'].note == 'slope rises from its early value; no vanishing seen'
    assert all(verdicts[key].exploratory for key in ('C1', 'C2', 'C3', 'C4', 'C5', 'C7',
                                                     'C8')) and 'after 20 of 60 epochs' in verdicts['C1'].exploratory
    assert 'premise undecided' in verdicts['C7'].why and 'decay was all but off' in page

def test_the_gap_of_c1_is_that_of_its_numbers(verdicts, page):
    numbers = verdicts['C1'].numbers.set_index(['what', 'scheme'])
    gap, others = numbers.loc[('top1', 'bn - wn')], verdicts['C1'].numbers.query("what == 'top1, not compared'")
    assert f'`wn` tests {-gap.value:.1f} points better ({-gap.high:.1f} to {-gap.low:.1f})' in page and others.value.min() < 0 < others.value.max()
    assert 'moves that of one run of bn by 0.9 to 5.1 points' in verdicts['C1'].why and 'moves one run of `bn` by 0.9 to 5.1 points' in page

def test_the_margin_that_is_proven_is_told(runs, page):
    none, wn = of(runs, 'top1', NONE), of(runs, 'top1', WN)
    gap, margin = welch(none, wn), smallest_margin(none, wn)
    assert margin > 1 and f"equivalent, found afterwards, is {margin:.1f} points" in page
    assert f"`none` - `wn` is {round(gap.value, 1)+0:.1f} points on val ({gap.low:.1f} to {gap.high:.1f}, n = 3): the 95 % interval allows an effect of up to {max(-gap.low, gap.high):.1f} points" in page

def test_the_gap_of_c4_is_told_beside_that_of_c1(verdicts, page):
    gap = verdicts['C4'].numbers.query("scheme == 'wn - bn'").value.iloc[0]
    more = verdicts['C2'].numbers.query("scheme == 'wn - bn' and what == 'train_top1'").value.item()
    less = verdicts['C1'].numbers.query("scheme == 'bn - wn' and what == 'top1'").value.item()
    assert gap == pytest.approx(less+more) and f'**C4**, {gap:.1f} points, is then the gap of C1 but for {more:.1f} points of training accuracy' in page
    assert f'the gap of C1 ({less:.2f} points) but for {more:.2f} points of training accuracy' in verdicts['C4'].why

def test_training_accuracies_at_the_ceiling_are_told(runs, page):
    ends = {norm: mean_interval(of(runs, 'train_top1', start)) for norm, start in (('bn', BN), ('wn', WN_TORCH | dict(lr=0.0125)))}
    words = {norm: f'`{norm}` {e.value:.1f} ± {e.high-e.value:.1f}' for norm, e in ends.items()}
    assert words['bn']+' %, '+words['wn'] in page

def test_probes_that_learned_are_counted(found, verdicts, page):
    alive = found[found['max_steps'].notna() & (found['status'] == 'finished')]
    for norm, own in alive.groupby('norm'):
        counted = f"{(own['verdict'] == 'learning').sum()} of {len(own)}"
        assert f'`{norm}` {counted}' in page and f'{norm} {counted}' in verdicts['C6'].why

def test_convergence_is_as_told(verdicts, page):
    gaps = verdicts['C3'].numbers.query("scheme == 'bn - wn'").set_index('what')
    low, high = gaps.low, gaps.high
    assert f"`wn` is sooner at 25 % ({low['epochs to 25 %']:.1f} to {high['epochs to 25 %']:.1f} epochs), `bn` at 75 and 90 ({-high['epochs to 75 %']:.1f} to {-low['epochs to 75 %']:.1f} and {-high['epochs to 90 %']:.1f} to {-low['epochs to 90 %']:.1f})" in page
    assert low['epochs to 50 %'] < 0 < high['epochs to 50 %']

def test_the_trend_of_signals_is_as_told(verdicts, page):
    numbers = verdicts['C7'].numbers.query("scheme == 'wn'").set_index('what')
    rise, before = numbers.loc['rise'], numbers.loc['slope before training']
    assert f'rises by {rise.value:.3f} decades per block ({rise.low:.3f} to {rise.high:.3f})' in page and f'the slope is {before.value:.3f} ({before.low:.3f} to {before.high:.3f})' in page
    end, first, early = (numbers.loc[what] for what in ('slope at the end', 'first block, end over before training', 'early slope'))
    assert 10**(7*rise.high) < 2 and verdicts['C7'].verdict == 'supported' and early.high < 0 and end.value < before.value
    assert f'an early dip ({early.value:.3f}): at the end the slope is {end.value:.3f} ({end.low:.3f} to {end.high:.3f})' in page
    assert first.low > 1 and f'it ends at {first.value:.1f} times what it had before training ({first.low:.1f} to {first.high:.1f})' in page

def test_the_slope_of_other_schemes_is_as_told(runs, page):
    def rises(start): return mean_interval(read_histories(of(runs, ['run', 'seed'], start), FOLDER).map(rise))
    plain, torch, bn = map(rises, (NONE, NONE_TORCH, BN))
    assert plain.low > 0 and torch.low > 0 and f"The slope of `none` rises too ({plain.value:.3f} from the norm-preserving init, {torch.value:.3f} from torch's)" in page
    assert f'is not shown to ({bn.low:.3f} to {bn.high:.3f})' in page and bn.low < 0 < bn.high

def test_accuracies_of_resnet50_are_those_of_the_records(runs, deep, page):
    part = page[page.index('* **ResNet-50'):page.index('* **Training')]
    assert len(deep) == 6 and all(f'{top1:.1f}' in part for top1 in deep['top1'])
    def lost(start): return f"{of(runs, 'top1', start | dict(seed=0)).item()-of(deep, 'top1', start).item():.1f}"
    assert f"lose {lost(BN)} and {lost(NP)} points" in part and f"gain {lost(WN)[1:]}, `none` loses {lost(NONE)}" in part and lost(ZERO) == lost(WN)
    def head(run): return next(line for line in read_metrics(Record(run, FOLDER).path/'metrics.jsonl')
                               if line['event'] == 'probe')['outputs']['rms'][-1]
    small, large = (head(of(group, 'run', EVEN | dict(seed=0)).item()) for group in (runs, deep))
    assert f'a size of {large:.2g}, a twelfth of' in part and round(small/large) == 12

def test_hours_are_those_of_the_records(runs, deep, page):
    part = ['accuracy' if pandas.isna(steps) and not held else 'stability' if pandas.notna(steps) else 'search'
            for steps, held in zip(runs['max_steps'], runs['holdout'], strict=True)]
    hours = {name: f'{seconds/3600:.0f}' for name, seconds in {**runs.groupby(part)['wall_s'].sum(), 'deep': deep['wall_s'].sum()}.items()}
    assert 'the search took {search} hours, the accuracy part {accuracy} and {deep} more for ResNet-50, the stability part {stability} '.format(**hours) in page

def test_numbers_of_the_page_on_surprises_are_those_of_the_records(found, runs, page, surprises):
    def one(start, what='top1'): return f"{of(runs, what, start | dict(seed=0)).item():.1f}"
    clipped = dict(norm='bn', grad_clip=1., lr=0.1)
    assert f"({one(clipped)} and {one(BN)} %)" in surprises
    assert f"({one(ZERO | dict(lr=0.025), 'train_top1')} against {one(BN, 'train_top1')} %)" in surprises
    end = welch(of(runs, 'top1', WN_TORCH), of(runs, 'top1', WN))
    assert f'({end.low:.1f} to {end.high:.1f} points, n = 3)' in surprises and end.low < 0 < end.high
    trelu, even = of(runs, 'train_top1', dict(norm='trelu', init='torch')).item(), of(runs, 'train_top1', EVEN).mean()
    assert surprises.count(f'training accuracy of {trelu:.1f} % (n = 1)') == 2 and f'training accuracy {trelu:.1f} %, n = 1' in page
    assert f'From there {even:.1f} % of the training images are right (n = 3), against {trelu:.1f} % (n = 1)' in surprises
    assert all(mean >= 99 for mean in (of(runs, 'train_top1', start).mean() for start in (BN, NONE, WN, NP)))

def test_short_runs_and_probes_told_on_the_page_on_surprises_are_those_of_the_records(found, runs, surprises):
    held = runs[(runs['holdout'] > 0) & runs['max_steps'].isna() & ~runs['zero_init']]
    def score(norm, init, lr, epochs=5):
        part = held[(held[['norm', 'init', 'epochs']] == [norm, init, epochs]).all(axis=1) & (held['lr'] == lr)]
        return f"{part['top1'].item():.1f}"
    *some, last = (score('bn', 'torch', lr) for lr in (0.025, 0.05, 0.1, 0.2))
    assert f"is at {', '.join(some)} and {last} % at learning rates from 0.025 to 0.2" in surprises
    assert f"`wn` is at {score('wn', 'norm_preserving', 0.4)} and {score('wn', 'torch', 0.4)} % at 0.4" in surprises
    assert f"at {score('wn', 'data', 0.0125)} and {score('wn', 'data', 0.025)} % at 0.0125 and 0.025, the highest" in surprises
    assert f"it is at {score('wn', 'torch', 0.0125, 20)} % after 20 epochs and the first at {score('wn', 'norm_preserving', 0.1, 20)} " in surprises
    clipped = found[(found['norm'] == 'bn') & found['max_steps'].notna() & (found['grad_clip'] == 1) & (found['lr'] == 0.1)]
    assert set(clipped['verdict']) == {'stuck'} and f"at 0.1 with {clipped['top1'].min():.0f} to {clipped['top1'].max():.0f} %" in surprises

def test_what_batch_statistics_cost_is_told(surprises):
    modes = {line['run'].split('-')[0]: line['top1'] for line in map(json.loads, (FOLDER/'modes.jsonl').read_text().splitlines())}
    assert f"batch statistics cost it {modes['bn']['random crops, eval mode']-modes['bn']['random crops, batch statistics']:.1f} points" in surprises

# the figures

DRAWN = dict(C1=('value', 18, 53.86931), C2=('mean', 170, 49.64986), C3=('value', 32, 17.49772), C4=('value', 18, 41.03069),
             C6=('lr', 70, 1.147), C7=('value', 221, -0.03842), C8=('value', 16, 0.24444), inits=('value', 92, 74.29088),
             rates=('top1', 100, 27.37366))

@pytest.fixture(scope='module')
def pictures(found, verdicts): return draw_figures(list(verdicts.values()), comparable(found), RunCache(FOLDER))

def test_every_figure_of_the_study_is_drawn(pictures): assert set(pictures)-{'C10', 'C11'} == set(DRAWN)

@pytest.mark.parametrize('key', DRAWN)
def test_figures_draw_the_same_numbers_as_ever(key, pictures):
    column, rows, mean = DRAWN[key]
    numbers = pictures[key].numbers
    assert len(numbers) == rows and numbers[column].mean() == pytest.approx(mean, abs=1e-4)

ESTIMATE = ['n', 'value', 'low', 'high']

@pytest.mark.parametrize('key, what, row', [('C1', 'top1', '{norm}: '), ('C4', 'train_top1 - top1', '{norm}: '),
                                            *(('C3', f'epochs to {level} %', f'{level} %: {{norm}}') for level in (25, 50, 75, 90)),
                                            *(('C8', f'rank correlation, {place}', place) for place in ('conv1', 'conv2', 'conv3'))])
def test_a_figure_draws_the_numbers_that_decide(key, what, row, pictures, verdicts):
    drawn = pictures[key].numbers.query("what == 'mean'").set_index('row')
    decided = verdicts[key].numbers.query('what == @what').set_index('scheme')
    for norm in ('wn',) if key == 'C8' else ('bn', 'wn'):
        one = drawn[drawn.index.str.startswith(row.format(norm=norm))].iloc[0]
        assert one[ESTIMATE].tolist() == pytest.approx(decided.loc[norm, ESTIMATE].tolist())

def test_the_figure_of_c7_draws_the_slopes_that_decide(pictures, verdicts):
    ends = pictures['C7'].numbers.query("scheme == 'wn'").groupby('run').last()['value']
    decided = verdicts['C7'].numbers.query("what == 'slope at the end' and scheme == 'wn'").iloc[0]
    assert mean_interval(ends)[:4] == pytest.approx(decided[ESTIMATE].tolist())
