"The first study: what its page says by hand is what its records hold"
import pandas, pytest
from conftest import ROOT
from nwrepro.recipe import tuned_table
from nwrepro.runs import load_runs, read_metrics
from nwrepro.stats import judge, welch

FOLDER = ROOT/'reports/study'

@pytest.fixture(scope='module')
def found(): return load_runs(FOLDER)

@pytest.fixture(scope='module')
def runs(found): return found.query("arch == 'resnet26'")

@pytest.fixture(scope='module')
def deep(found): return found.query("arch == 'resnet50'")

@pytest.fixture(scope='module')
def numbers(runs): return {v.key: v.numbers for v in judge(runs, FOLDER)}

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

@pytest.mark.parametrize('conditions, schemes, words', [
    ('', 'bn / wn', 'survives {} times its rate'), (', init torch', 'bn / wn', "{} times from torch's"), (', init data', 'bn / wn', '{} times from the data-dependent one'),
    ('', 'bn / np', '{} times the rate of `np`'), ('', 'bn / trelu', '{} times that of `trelu`'), (', init even', 'bn / trelu', '({} from `even`)'), ('', 'bn / none', '{} times that of `none`'), (', init torch', 'bn / none', "of the last from torch's start {} times")])
def test_factors_between_largest_rates_are_those_of_the_records(conditions, schemes, words, numbers, page):
    low, high = numbers['C6'].set_index(['what', 'scheme']).loc[(f'factor between the limits{conditions}', schemes), ['low', 'high']]
    def forms(x): return {f'{x:{form}}' for form in ('.0f', '.1f', '.2f', '.2g')}
    assert any(words.format(f'{a} to {b}') in page for a in forms(low) for b in forms(high)), (low, high)

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
