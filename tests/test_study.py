"The first study: what its page says by hand is what its records hold"
import pandas, pytest
from conftest import ROOT
from nwrepro.recipe import tuned_table
from nwrepro.runs import load_runs, read_metrics
from nwrepro.claims import judge
from nwrepro.statistics import mean_interval, smallest_margin, welch

FOLDER = ROOT/'reports/study'

@pytest.fixture(scope='module')
def found(): return load_runs(FOLDER)

@pytest.fixture(scope='module')
def runs(found): return found.query("arch == 'resnet26'")

@pytest.fixture(scope='module')
def deep(found): return found.query("arch == 'resnet50'")

@pytest.fixture(scope='module')
def verdicts(found): return {v.key: v for v in judge(found, FOLDER)}

@pytest.fixture(scope='module')
def page(): return (ROOT/'reports/README.md').read_text()

BN, ZERO = dict(norm='bn', zero_init=False, lr=0.025), dict(norm='bn', zero_init=True, lr=0.05)
WN, WN_TORCH = (dict(norm='wn', init=init, zero_init=False) for init in ('norm_preserving', 'torch'))
NONE, NONE_TORCH = (dict(norm='none', init=init, zero_init=False) for init in ('norm_preserving', 'torch'))
NP, EVEN = dict(norm='np'), dict(norm='trelu', init='even')

def of(runs, what, start):
    whole = runs[runs['max_steps'].isna() & (runs['holdout'] == 0) & (runs['status'] == 'finished')]
    return whole[(whole[list(start)] == pandas.Series(start)).all(axis=1)].sort_values('seed')[what]

@pytest.mark.parametrize('one, other, what', [(WN, BN, 'top1'), (ZERO, WN, 'top1'), (ZERO, BN, 'top1'), (NP, WN, 'top1'), (NP, BN, 'top1'), (WN_TORCH, WN, 'top1'), (WN_TORCH, WN, 'train_top1'),
                                              (WN_TORCH, BN, 'top1'), (ZERO, WN_TORCH, 'top1'), (NONE, WN, 'top1'), (NONE, WN, 'train_top1'), (NONE_TORCH, NONE, 'top1'),
                                              (NONE_TORCH, WN_TORCH, 'top1'), (EVEN, WN, 'top1')], ids=str)
def test_gaps_are_those_of_the_records(one, other, what, runs, page):
    gap = welch(of(runs, what, one), of(runs, what, other))
    assert gap.n == 3 and f'{gap.low:.1f} to {gap.high:.1f}' in page

@pytest.mark.parametrize('start', [WN_TORCH, NONE_TORCH, EVEN], ids=str)
def test_accuracies_are_those_of_the_records(start, runs, page):
    first, *more, last = (f'{value:.1f}' for value in of(runs, 'top1', start))
    assert f"{', '.join([first, *more])} and {last} %" in page

def test_the_search_from_the_data_dependent_start_came_out_as_told(runs, page):
    tried = runs[(runs['norm'] == 'wn') & (runs['holdout'] > 0) & runs['max_steps'].isna() & ~runs['zero_init']]
    def scored(init, lr, epochs): return f"{tried[(tried[['init', 'lr', 'epochs']] == [init, lr, epochs]).all(axis=1)]['top1'].item():.1f}"
    rows = {row['init']: float(row['lr']) for row in tuned_table() if row['norm'] == 'wn'}
    data, torch, own = (scored(init, rows[init], 20) for init in ('data', 'torch', 'norm_preserving'))
    assert f"{rows['data']:g} was chosen: {data} % after 20 epochs, where torch's start has {torch} at its own rate and the norm-preserving one {own}" in page
    assert f"At 0.0125 and 0.025 it is at {scored('data', 0.0125, 5)} and {scored('data', 0.025, 5)} % after 5 epochs" in page
    lost = tried[(tried['init'] == 'data') & (tried['status'] == 'diverged')]
    assert lost['lr'].min() == 0.05 and lost['diverged_step'].max() == 5 and set(tried[(tried['init'] == 'data') & (tried['lr'] > 0.025)]['status']) == {'diverged'}

def test_the_study_is_judged_as_told(verdicts, page):
    told = dict(C7="supported", C1='undecided', C2='not testable here', C3='undecided', C4='not testable here', C5='not testable here', C6='not tested', C8='not testable here', C9='not tested', C10='undecided', C11='undecided')
    assert {key: verdicts[key].verdict for key in told} == told and [verdicts[key].note for key in ('C2', 'C4', 'C8')] == ['both memorized', 'same as C1', 'not informative']
    assert all(verdicts[key].exploratory for key in ('C1', 'C2', 'C3', 'C4', 'C5', 'C7', 'C8')) and 'after 20 of 60 epochs' in verdicts['C1'].exploratory
    assert 'premise undecided' in verdicts['C7'].why and 'decay was all but off' in page

def test_the_gap_of_c1_is_that_of_its_numbers(verdicts, page):
    numbers = verdicts['C1'].numbers.set_index(['what', 'scheme'])
    gap, others = numbers.loc[('top1', 'bn - wn')], verdicts['C1'].numbers.query("what == 'top1, not compared'")
    assert f'`wn` tests {-gap.value:.1f} points better ({-gap.high:.1f} to {-gap.low:.1f})' in page and others.value.min() < 0 < others.value.max()
    assert 'moves that of one run of bn by 0.9 to 5.1 points' in verdicts['C1'].why and 'moves one run of `bn` by 0.9 to 5.1 points' in page

def test_the_margin_that_is_proven_is_told(runs, page):
    assert f"equivalent within {smallest_margin(of(runs, 'top1', NONE), of(runs, 'top1', WN)):.1f} points** on val" in page

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
    assert 10**(7*rise.high) < 2 and verdicts['C7'].verdict == 'supported'

def test_accuracies_of_resnet50_are_those_of_the_records(runs, deep, page):
    part = page[page.index('* **ResNet-50'):page.index('* **Training')]
    assert len(deep) == 6 and all(f'{top1:.1f}' in part for top1 in deep['top1'])
    def lost(start): return f"{of(runs, 'top1', start | dict(seed=0)).item()-of(deep, 'top1', start).item():.1f}"
    assert f"lose {lost(BN)} and {lost(NP)} points" in part and f"gain {lost(WN)[1:]}, `none` loses {lost(NONE)}" in part and lost(ZERO) == lost(WN)
    def head(run): return next(line for line in read_metrics(FOLDER/run/'metrics.jsonl') if line['event'] == 'probe')['outputs']['rms'][-1]
    small, large = (head(of(group, 'run', EVEN | dict(seed=0)).item()) for group in (runs, deep))
    assert f'a size of {large:.2g}, a twelfth of' in part and round(small/large) == 12

def test_hours_are_those_of_the_records(runs, deep, page):
    part = ['accuracy' if pandas.isna(steps) and not held else 'stability' if pandas.notna(steps) else 'search' for steps, held in zip(runs['max_steps'], runs['holdout'], strict=True)]
    hours = {name: f'{seconds/3600:.0f}' for name, seconds in {**runs.groupby(part)['wall_s'].sum(), 'deep': deep['wall_s'].sum()}.items()}
    assert 'the search took {search} hours, the accuracy part {accuracy} and {deep} more for ResNet-50, the stability part {stability} '.format(**hours) in page
