"What the lessons of 07_stats cannot show: statistics against other arithmetic, every claim's verdicts on runs of known outcome, odd tables"
import dataclasses, itertools, json, math, statistics
from pathlib import Path

import numpy, pandas, pytest, scipy.stats
from hypothesis import given, strategies as st

import nwrepro.stats
from nwrepro.probes import layers
from nwrepro.recipe import RECIPES, Recipe
from nwrepro.runs import Run, load_runs, to_json
from nwrepro.stats import (CLAIMS, FREE, SETTING, Course, Estimate, against_bn, answers, arm, by_setting, comparable, cost_records, early, epochs_to, gains, growth, holm,
                           judge, kind_of, log_gap, lr_limits, mcnemar, mean_interval, paired, rise, ruling, running_accuracy, spelt, welch, wilson)

NAN = math.nan
BASE = {f.name: None for f in dataclasses.fields(Recipe) if f.name not in ('norm', 'init', 'seed')} | RECIPES['paper'] | dict(
    data='digits', arch='resnet18', image_size=32, recipe='paper', epochs=8, batch_size=32, holdout=0., dropout=0., lr=0.1)
PAPER = BASE | dict(data='imagenet', arch='resnet50', image_size=224, epochs=120, batch_size=256)
INIT = dict(none='norm_preserving', wn='norm_preserving', np='np')


def runs_of(norm, top1, train_top1=None, **other):
    "One run per seed; nan = diverged"
    config = BASE | dict(norm=norm, init=INIT.get(norm, 'torch')) | other
    return pandas.DataFrame([config | dict(run=f"{norm}-{config['lr']}-{config['dropout']}-{config['weight_decay']}-s{seed}", seed=seed,
                                           status='diverged' if math.isnan(x) else 'finished', top1=x, train_top1=t)
                             for seed, (x, t) in enumerate(zip(top1, train_top1 or top1, strict=True))])


def table(*parts): return pandas.concat(parts, ignore_index=True)


def decide(key, *parts, folder=Path('nowhere')): return CLAIMS[key].decide(table(*parts), folder)


BN, WN = runs_of('bn', [97.1, 97.4, 96.9], [99.1, 99.3, 99.0]), runs_of('wn', [94.0, 93.1, 94.6], [99.8, 99.7, 99.9])
SWAPPED = runs_of('wn', [97.1, 97.4, 96.9], [99.1, 99.3, 99.0]), runs_of('bn', [94.0, 93.1, 94.6], [99.8, 99.7, 99.9])


# statistics against other arithmetic

def test_mean_interval_against_a_table_of_student():
    x = [5.1, 4.9, 5.6, 5.0, 5.4]
    half = 2.7764*statistics.stdev(x)/5**0.5
    e = mean_interval(x)
    assert (e.low, e.high) == pytest.approx(tuple(scipy.stats.ttest_1samp(x, 0).confidence_interval()))
    assert (e.n, e.value, e.sd) == (5, pytest.approx(statistics.mean(x)), pytest.approx(statistics.stdev(x)))
    assert (e.low, e.high) == (pytest.approx(5.2-half, abs=1e-4), pytest.approx(5.2+half, abs=1e-4))


@pytest.mark.parametrize('values, n, mean, has_sd', [([], 0, NAN, False), ([2.], 1, 2., False), ([2., 4.], 2, 3., True)])
def test_too_few_runs_have_no_interval(values, n, mean, has_sd):
    e = mean_interval(values)
    assert e.n == n and math.isnan(e.low) and math.isnan(e.high) and math.isnan(e.sd) != has_sd
    assert math.isnan(mean) == math.isnan(e.value) and (n == 0 or e.value == mean)
    assert ruling(e) == 'undecided' and '±' not in spelt(values) and f'n = {n}' in spelt(values) and all(f'{v:.2f}' in spelt(values) for v in values)


def test_welch_against_scipy():
    a, b = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4]
    reference = scipy.stats.ttest_ind(a, b, equal_var=False)
    e = welch(a, b)
    assert (e.n, e.value, e.p) == (4, pytest.approx(21-23.325), pytest.approx(reference.pvalue))
    assert (e.low, e.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert (welch(a, b, 0.99).low, welch(a, b, 0.99).high) == pytest.approx(tuple(reference.confidence_interval(0.99)))
    assert welch(b, a).low == pytest.approx(-e.high) and welch([a, a], [b, b]).low.tolist() == pytest.approx([e.low]*2)


def test_welch_without_spread_or_runs_decides_nothing():
    for a, b in (([1., 2., 3.], [1., 2.]), ([], [1., 2., 3.]), ([5., 5., 5.], [4., 4., 4.])):
        assert ruling(welch(a, b)) == 'undecided'


def test_paired_takes_the_seeds_that_both_have():
    e = paired(pandas.Series([3., 5., 8., 1.], [0, 1, 2, 9]), pandas.Series([1., 2., 4., 7.], [2, 1, 0, 8]))
    assert (e.n, e.value) == (3, pytest.approx((-1+3+7)/3))


@pytest.mark.parametrize('right, images, low, high', [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0, 16.11), (1, 29, 0.61, 17.18)])
def test_wilson_against_the_table_of_newcombe(right, images, low, high):
    e = wilson(right, images)
    assert (e.low, e.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


@pytest.mark.parametrize('first, second', [(9, 1), (1, 9), (3, 3), (5, 0)])
def test_mcnemar_against_coins(first, second):
    a = pandas.Series([True]*first+[False]*second+[True, False]*20)
    b = pandas.Series([False]*first+[True]*second+[True, False]*20)
    n = first+second
    e = mcnemar(a, b)
    assert e.p == pytest.approx(min(1, 2*sum(math.comb(n, k) for k in range(min(first, second)+1))/2**n))
    assert (e.n, e.value) == (len(a), pytest.approx(100*(first-second)/len(a)))
    share = scipy.stats.beta.ppf([0.025, 0.975], [first, first+1], [second+1, second])  # Clopper and Pearson's ends are quantiles of two beta distributions
    low, high = 100*n/len(a)*(2*numpy.where(numpy.isnan(share), [0, 1], share)-1)
    assert (e.low, e.high) == (pytest.approx(low), pytest.approx(high))
    assert (e.low > 0 or e.high < 0) == (e.p < 0.05)


def test_mcnemar_refuses_other_images_and_knows_twins():
    a = pandas.Series([True, False], ['x', 'y'])
    assert mcnemar(a, a)[1:4] == (0, 0, 0) and mcnemar(a, a).p == 1
    assert mcnemar(a, a[::-1]).p == 1
    with pytest.raises(ValueError, match='2 images were shown to one'): mcnemar(a, pandas.Series([True, False], ['x', 'z']))


def test_holm_against_his_example_and_with_gaps():
    assert holm(pandas.Series([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm(pandas.Series([0.02, NAN, 0.03]))
    assert adjusted[[0, 2]].tolist() == pytest.approx([0.04, 0.04]) and math.isnan(adjusted[1])
    assert holm(pandas.Series([0.9, 0.8])).tolist() == [1, 1] and holm(pandas.Series([], dtype=float)).empty


def test_answers_are_those_of_the_run(tmp_path):
    run = Run('one', tmp_path)
    run.begin(dict(source=dict(fingerprint='f00')), {})
    run.predictions([('a', 1, 1), (1, 2, 0)])
    assert answers('one', tmp_path).to_dict() == {'f00 a': True, 'f00 1': False}

def test_places_in_two_sources_are_not_the_same_image(tmp_path):
    for name in ('one', 'two'):
        run = Run(name, tmp_path)
        run.begin(dict(source=dict(fingerprint=name)), {})
        run.predictions([(0, 1, 1), (1, 2, 0)])
    with pytest.raises(ValueError, match='4 images were shown to one'): mcnemar(answers('one', tmp_path), answers('two', tmp_path))


# groups of runs

def test_every_field_of_a_recipe_is_part_of_the_setting_or_free():
    assert {f.name for f in dataclasses.fields(Recipe)} <= {*SETTING, *FREE} and not set(SETTING) & set(FREE)


@given(st.sampled_from([f.name for f in dataclasses.fields(Recipe) if f.name in SETTING]))
def test_any_other_setting_is_another_group(name):
    assert [len(group) for _, group in comparable(table(BN, WN))] == [6]
    assert [len(group) for _, group in comparable(table(BN, WN.assign(**{name: 'other'})))] == [3, 3]


def test_other_images_are_another_group():
    a, b = BN.assign(source=[dict(fingerprint='f00d', classes=10)]*3), WN.assign(source=[dict(fingerprint='beef', classes=10)]*3)
    assert [setting['fingerprint'] for setting, _ in comparable(table(a, b))] == ['f00d', 'beef']


def test_the_arm_of_a_scheme_is_the_lr_with_most_finished_seeds_at_the_norm_preserving_init():
    few, broken = runs_of('wn', [99., 99.], lr=0.2), runs_of('wn', [95., NAN, NAN, NAN], lr=0.3)
    other = runs_of('wn', [98.]*5, init='torch')
    chosen = arm(table(few, broken, WN, other, runs_of('wn', [50.]*3, lr=0.5)), 'wn')
    assert (set(chosen.lr), set(chosen.init)) == ({0.1}, {'norm_preserving'}) and set(arm(table(few, runs_of('wn', [50.]*3, lr=0.5)), 'wn').lr) == {0.5} and set(arm(table(few, broken), 'wn').lr) == {0.2}
    assert set(arm(table(few, runs_of('wn', [98., 98.], lr=0.4)), 'wn').lr) == {0.2}
    assert set(arm(other, 'wn').init) == {'torch'} and arm(BN, 'wn').empty


def test_a_run_that_has_just_begun_hides_no_finished_ones():
    other = runs_of('wn', [94.0, 93.1, 94.6], init='torch')
    begun = runs_of('wn', [NAN]).assign(status='started')
    assert set(arm(comparable(table(BN, other, begun))[0][1], 'wn').init) == {'torch'} and decide('C1', BN, other, begun).verdict == 'supported'

@pytest.mark.parametrize('first', (True, False))
def test_a_cut_run_of_the_same_seed_hides_no_finished_one(first):
    cut = runs_of('wn', [NAN], compile='network').assign(status='interrupted')
    parts = (cut, BN, WN) if first else (BN, WN, cut)
    assert decide('C1', *parts).verdict == 'supported' and '3 of 3 finished' in decide('C1', *parts).why

@pytest.mark.parametrize('first', (True, False))
def test_of_two_networks_with_as_many_seeds_the_one_nearest_to_the_papers_is_judged(first):
    other = [part.assign(arch='resnet50') for part in SWAPPED]
    found = decide('C1', *((BN, WN, *other) if first else (*other, BN, WN)))
    assert found.verdict == 'contradicted' and 'resnet50' in found.where

def test_by_setting_counts_what_was_started():
    rows = by_setting(table(BN, runs_of('wn', [94., 93., NAN]), runs_of('np', [95.]).assign(status='started', top1=NAN))).set_index('norm')
    assert rows[['n_started', 'n_finished', 'n_diverged']].values.tolist() == [[3, 3, 0], [1, 0, 0], [3, 2, 1]]
    e = mean_interval([97.1, 97.4, 96.9])
    assert rows.loc['bn', ['top1_mean', 'top1_sd', 'top1_low', 'top1_high']].tolist() == pytest.approx([e.value, e.sd, e.low, e.high])
    assert rows.top1_low.isna().tolist() == [False, True, True] and rows.train_top1_mean['bn'] == pytest.approx(99.1333, abs=1e-3)


def test_a_seed_counts_once():
    assert by_setting(table(BN, BN)).n_finished.tolist() == [3]
    assert decide('C1', BN[:1], WN[:1], BN[:1], WN[:1], BN[:1], WN[:1]).verdict == 'undecided'


def test_gaps_to_bn_are_adjusted_within_a_setting():
    rows = against_bn(table(BN, WN, runs_of('none', [97.0, 97.5, 96.8]), runs_of('np', [90.]), *(part.assign(image_size=64) for part in (BN, WN)))).set_index(['image_size', 'norm'])
    p = rows.p
    assert rows.holm[32, 'wn'] == pytest.approx(2*p[32, 'wn']) and rows.holm[64, 'wn'] == pytest.approx(p[64, 'wn']) and math.isnan(rows.holm[32, 'np'])
    assert rows.gap[32, 'wn'] == pytest.approx(97.1333-93.9, abs=1e-3) and rows.paired_n[32, 'np'] == 1 and math.isnan(rows.low[32, 'np'])
    assert against_bn(WN).empty and 'holm' in against_bn(WN)


# the claim itself, or an analogue

def test_only_the_papers_setting_is_the_claim_itself():
    def kind(**change): return kind_of(comparable(pandas.DataFrame([PAPER | dict(run='bn', norm='bn', init='torch', seed=0, source=dict(classes=1000, train=1281167)) | change]))[0][0])
    assert kind() == 'claim' and kind(precision='bf16') == 'claim'
    changes = [dict(data='imagenette'), dict(arch='resnet18'), dict(image_size=160), dict(recipe='modern'), dict(epochs=90), dict(batch_size=64), dict(train_images=1000),
               dict(holdout=0.1), dict(max_steps=10), dict(source=dict(classes=100, train=126689)), dict(strides='v1.5'), dict(schedule='cosine'), dict(zero_init=True), dict(label_smoothing=0.1),
               dict(warmup_epochs=5.), dict(bn_batch=64), dict(decay_on='v+w')]
    assert [kind(**change) for change in changes] == ['analogue']*len(changes)


def test_magnitude_is_spoken_of_on_the_claim_itself_alone():
    def c1(wn, **setting): return decide('C1', runs_of('bn', [73.1, 72.8, 73.2], **setting), runs_of('wn', wn, **setting))
    itself = c1([67.2, 66.8, 67.1], **PAPER)
    assert (itself.verdict, itself.kind) == ('supported', 'claim') and 'magnitude reproduced' in itself.why and 'resnet50 on imagenet at 224 px' in itself.where and 'analogue' not in itself.where
    assert all('magnitude not reproduced' in c1([x, x-0.4, x-0.1], **PAPER).why for x in (70.2, 62.2))
    small = c1([67.2, 66.8, 67.1])
    assert (small.verdict, small.kind) == ('supported', 'analogue') and 'magnitude' not in small.why and small.where.startswith('analogue (') and small.where.endswith(', not the claim itself')


def test_a_verdict_names_where_its_recipe_was_changed():
    usual, changed = (decide('C1', *(part.assign(**setting) for part in (BN, WN))).where for setting in ({}, dict(strides='v1.5', zero_init=True)))
    assert ', strides v1.5' in changed and ', zero_init True' in changed and 'strides' not in usual and 'zero_init' not in usual

def test_the_setting_that_can_decide_goes_before_the_claim_itself():
    one_each = [part[:1].assign(**{k: v for k, v in PAPER.items() if v is not None}) for part in (BN, WN)]
    assert decide('C1', BN[:2], WN[:2], *one_each).kind == 'claim' and decide('C1', *one_each, BN, WN).kind == 'analogue'


# C1, C2, C4

@pytest.mark.parametrize('key', ['C1', 'C2', 'C4'])
def test_claims_about_accuracy(key):
    near = runs_of('bn', [95., 97., 96.], [99., 98., 97.]), runs_of('wn', [96.5, 94.5, 97.2], [98., 99.2, 97.4])
    assert [decide(key, *parts).verdict for parts in ((BN, WN), SWAPPED, near)] == ['supported', 'contradicted', 'undecided']
    for few in ((BN[:1], WN[:1]), (BN[:2], WN[:2]), (BN, WN[:2])):
        verdict = decide(key, *few)
        assert verdict.verdict == 'undecided' and f'n = {len(few[1])}' in verdict.why and verdict.kind == 'analogue'
    assert [decide(key, *parts).verdict for parts in ((BN,), (WN,), (BN, WN.assign(image_size=64)), (BN, WN.assign(status='diverged', top1=NAN)))] == ['not tested']*4
    assert '(of 6 such runs 3 diverged)' in decide(key, BN, WN.assign(status='diverged', top1=NAN)).why


def test_a_verdict_shows_its_numbers_and_names_its_runs():
    broken = runs_of('wn', [94.0, 93.1, 94.6, NAN])
    verdict = decide('C1', BN, broken, runs_of('wn', [99.], lr=9.))
    assert sorted(verdict.runs) == sorted([*BN.run, *broken.run]) and '3 of 4 finished' in verdict.why
    assert verdict.numbers.columns.tolist() == ['what', 'scheme', 'n', 'value', 'low', 'high', 'unit']
    gap = verdict.numbers.set_index(['what', 'scheme']).loc[('top1', 'bn - wn')]
    e = welch(BN.top1, WN.top1)
    assert [gap.n, gap.value, gap.low, gap.high] == pytest.approx([3, e.value, e.low, e.high])


def test_runs_cut_short_have_no_final_accuracy():
    cut = decide('C1', BN.assign(max_steps=50), WN.assign(max_steps=50))
    assert cut.verdict == 'not tested' and '(of 6 such runs 6 were cut short by max_steps and do not count)' in cut.why


# records

def test_images_held_out_are_no_test_images():
    held = [part.assign(holdout=0.2) for part in (BN, WN)]
    assert [decide(key, *held).verdict for key in ('C1', 'C2', 'C4')] == ['not tested']*3 and 'held out' in decide('C1', *held).why
    both = decide('C1', *held, *SWAPPED)
    assert both.verdict == 'contradicted' and 'holdout' not in both.where

def write(folder, parts, curves=None, slopes=None, coherence=None):
    "Folders of runs; `curves`: scheme -> top1 per epoch, `slopes`: decades per block per epoch"
    layer = [name for i in range(1, 5) for name in (f'layer{i}.0.conv1', f'layer{i}.0')]
    for row in table(*parts).to_dict('records'):
        run = Run(row['run'], folder, folder)
        run.begin({k: None if v != v else v for k, v in row.items() if k not in ('run', 'status', 'top1', 'train_top1')}, {})
        for epoch, x in enumerate((curves or {}).get(row['norm'], ())):
            run.log('eval', epoch, epoch, train_top1=x+row['seed']/2, top1=x)
            if epoch: run.log('train', epoch, epoch, top1=x-5+row['seed'], images=10)
        for epoch, slope in enumerate((slopes or {}).get(row['norm'], ())):
            loud = [10**((slope+row['seed']/1000)*k) for k in range(4)]
            conv = [gain*entry for gain, entry in zip((1, 2, 3, 4), [1., *loud[:3]], strict=True)]
            means = dict(layer=layer[::2], mean=coherence[row['seed']]) if coherence else dict(layer=[], mean=[])
            run.log('probe', epoch, epoch, outputs=dict(layer=['conv1', *layer], rms=[1., *itertools.chain(*zip(conv, loud, strict=True))]), coherence=means)
        run.finish(row['status'], top1=row['top1'], train_top1=row['train_top1'])
    return load_runs(folder), folder


def test_running_accuracy_stands_beside_c2(tmp_path):
    runs, folder = write(tmp_path, (BN, WN), dict(bn=(10, 50, 90), wn=(10, 60, 95)))
    numbers = CLAIMS['C2'].decide(runs, folder).numbers.set_index(['what', 'scheme']).value
    assert numbers['running accuracy', 'bn'] == pytest.approx(86) and numbers['running accuracy', 'wn - bn'] == pytest.approx(5)


@pytest.mark.parametrize('wn, verdict', [((10, 80, 95), 'supported'), ((10, 30, 91), 'contradicted'), ((10, 80, 82), 'supported'), ((10, 40, 97), 'undecided'), ((5, 6, 7), 'not tested')])
def test_c3_needs_every_level_that_both_reach(tmp_path, wn, verdict):
    found = CLAIMS['C3'].decide(*write(tmp_path, (BN, WN), dict(bn=(10, 60, 92), wn=wn)))
    assert found.verdict == verdict
    assert verdict == 'not tested' or ('to 90 %' in found.why) == (wn[-1] > 90)


def test_c3_of_one_seed_decides_nothing(tmp_path):
    assert CLAIMS['C3'].decide(*write(tmp_path, (BN[:1], WN[:1]), dict(bn=(10, 60, 92), wn=(10, 80, 95)))).verdict == 'undecided'


def test_epochs_to_a_level():
    assert epochs_to(50, ((0, 60.),)) == 0 and epochs_to(50, ((0, 10.), (2, 50.))) == 2 and epochs_to(20, ((1, 0.), (2, 40.), (3, 0.), (4, 90.))) == 1.5
    assert math.isnan(epochs_to(50, ())) and math.isnan(epochs_to(50, ((0, 1.), (1, NAN))))


@pytest.mark.parametrize('wn, verdict', [((0., 0., 0.3), 'supported'), ((0., 0., -0.3), 'contradicted'), ((0.2, 0.2, 0.6), 'contradicted'), ((0.05, 0.05, 0.6), 'undecided'), ((-0.05, -0.05, 0.6), 'undecided')])
def test_c7_first_flat_then_rising(tmp_path, wn, verdict):
    runs, folder = write(tmp_path, (BN, WN), slopes=dict(bn=(0., 0., 0.), wn=wn))
    for name, k in zip(runs.run[runs.norm == 'wn'], (0.9, 1., 1.1), strict=True):  # seeds differ in how far they rise
        path = folder/name/'metrics.jsonl'
        probe = dict(event='probe', step=3, epoch=3, outputs=dict(layer=[f'layer{i}.0' for i in range(4)], rms=[10**(k*wn[-1]*i) for i in range(4)]))
        path.write_text(path.read_text()+to_json(probe)+'\n')
    found = CLAIMS['C7'].decide(runs, folder)
    assert found.verdict == verdict and set(found.numbers.scheme) == {'wn', 'bn'}
    before = found.numbers.set_index(['what', 'scheme']).loc[('slope before training', 'wn')]
    assert before.value == pytest.approx(wn[0], abs=0.002) and ('what contradicts is the first slope' in found.why) == (wn[0] > 0.05 and verdict == 'contradicted')


def test_c7_without_probes_or_with_one_seed(tmp_path):
    assert CLAIMS['C7'].decide(*write(tmp_path/'a', (BN, WN), dict(bn=(1, 2), wn=(1, 2)))).verdict == 'not tested'
    assert CLAIMS['C7'].decide(*write(tmp_path/'b', (WN[:1],), slopes=dict(wn=(0., 0., 1.)))).verdict == 'undecided'


UP = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.4, 0.3], [0.2, 0.1, 0.3, 0.4]]

@pytest.mark.parametrize('coherence, verdict', [(UP, 'supported'), ([c[::-1] for c in UP], 'contradicted'), ([UP[0], UP[0][::-1], UP[1]], 'undecided'), (UP[:1]*3, 'undecided'),
                                                ([[0.1]*4]*3, 'not tested'), (None, 'not tested')])
def test_c8_ranks_layers(tmp_path, coherence, verdict):
    assert CLAIMS['C8'].decide(*write(tmp_path, (WN,), slopes=dict(wn=(0., 0.)), coherence=coherence)).verdict == verdict


def test_first_and_last_slope_of_a_course():
    course = Course(growth=tuple((epoch, slope) for epoch, slope in enumerate([0.1, 0.3]+[0.5]*18+[1.])))
    assert early(course) == pytest.approx((0.1+0.3+0.5)/3) and rise(course) == pytest.approx(1-0.3)
    assert math.isnan(early(Course())) and math.isnan(rise(Course(growth=((0, 1.),))))


def test_growth_of_silent_broken_or_few_blocks_is_unknown():
    for rms in ([1., 0., 1.], [1., math.inf, 1.], [1., NAN, 1.], [1., 2.]):
        assert math.isnan(growth(dict(layer=[f'layer1.{i}' for i in range(len(rms))], rms=rms)))


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50'])
def test_gains_follow_the_network_of_timm(arch):
    import timm, torch
    seen, modules = {}, {}
    def hook(name):
        def see(module, args, output): seen[name] = [x.square().mean().sqrt().item() for x in (args[0], output)]
        return see
    model = timm.create_model(arch, num_classes=10, norm_layer=lambda channels, **kwargs: torch.nn.Identity(), act_layer=torch.nn.Identity).eval()
    model.maxpool = torch.nn.Identity()
    for name, module in layers(model).items(): module.register_forward_hook(hook(name))
    torch.manual_seed(0)
    model(torch.randn(2, 3, 64, 64))
    found = gains(dict(layer=list(seen), rms=[output for _, output in seen.values()]))
    assert set(found) == {name for name in seen if '.conv' in name or 'downsample' in name}
    assert all(found[name] == pytest.approx(seen[name][1]/seen[name][0], rel=1e-4) for name in found)  # without activations the recorded output is the input


# C5

def test_c5_best_cell_against_bn():
    def c5(*cells): return decide('C5', BN, WN, *cells)
    worse, better = runs_of('wn', [94.6, 94.9, 94.4], dropout=0.5), runs_of('wn', [99.4, 99.6, 99.5], weight_decay=1e-3)
    level = runs_of('wn', [97.0, 97.3, 97.1], dropout=0.3)
    assert [v.verdict for v in (c5(worse), c5(worse, better), c5(worse, level), c5())] == ['supported', 'contradicted', 'undecided', 'not tested']
    assert 'dropout 0.5' in c5(worse).why and 'decay on all' in c5(worse).why and len(c5(worse).runs) == 9
    assert len(decide('C5', BN, WN, worse, runs_of('bn', [90., 91., 92.], dropout=0.5)).runs) == 12  # all cells of the grid, for its figure
    gap = c5(worse).numbers.query("scheme == 'bn - wn'").set_index('what').loc['top1 at dropout 0.5, weight_decay 0.0001']
    e = welch(BN.top1, worse.top1, 0.975)
    assert [gap.low, gap.high] == pytest.approx([e.low, e.high])


def test_c5_counts_cells_with_three_seeds_only():
    lucky = runs_of('wn', [99.9], dropout=0.7)
    assert decide('C5', BN, WN, lucky).verdict == 'undecided'
    assert decide('C5', BN, WN, lucky, runs_of('wn', [94.6, 94.9, 94.4], dropout=0.5)).verdict == 'supported'
    assert decide('C5', BN[:1], WN[:1], runs_of('wn', [94.6], dropout=0.5)).verdict == 'undecided'
    assert decide('C5', BN, WN, runs_of('wn', [94.6, 94.9, 94.4], dropout=0.5, image_size=64)).verdict == 'not tested'
    assert decide('C5', BN, WN, runs_of('wn', [94.6, 94.9, 94.4], dropout=0.5, decay_on='v+w')).verdict == 'not tested'


# C6

LRS = 0.03, 0.1, 0.3, 1.

def ladder(norm, *limit, lrs=LRS, **other):
    "One seed per limit"
    return table(*(runs_of(norm, [90. if lr <= x else NAN for x in limit], lr=lr, **other) for lr in lrs))


def test_brackets_of_a_ladder():
    holes = table(runs_of('wn', [90., NAN, NAN, 90.], lr=0.1), runs_of('wn', [NAN, NAN, 90., 90.], lr=0.3), runs_of('wn', [NAN, NAN, NAN, 90.], lr=1.))
    assert lr_limits(holes).values.tolist() == [[0, 0.1, 0.3], [1, 0, 0.1], [2, 0.3, 1.], [3, 1., math.inf]]
    assert lr_limits(ladder('wn', 0.1, lrs=(0.1, 0.3))).values.tolist() == [[0, 0.1, 0.3]]
    assert lr_limits(runs_of('wn', [90., NAN])).empty and lr_limits(holes.assign(status='interrupted')).empty


def test_log_gap_is_as_wide_as_the_brackets():
    def brackets(*pairs): return pandas.DataFrame(pairs, columns=['below', 'above'])
    bn, wn = brackets(*[(0.3, 1.)]*3), brackets(*[(0.03, 0.1)]*3)
    e = log_gap(bn, wn)
    assert (e.low, e.high) == (pytest.approx(math.log(3)), pytest.approx(math.log(100/3)))
    assert log_gap(brackets(*[(0.3, math.inf)]*3), wn)[2:4] == (pytest.approx(math.log(3)), math.inf)
    assert log_gap(brackets(*[(0., 0.1)]*3), wn).low == -math.inf
    uneven = brackets((0.3, 1.), (1., 3.), (0.1, 0.3))
    assert log_gap(uneven, wn).low == pytest.approx(welch([math.log(x) for x in uneven.below], [math.log(0.1)]*3).low)


@pytest.mark.parametrize('bn, others, verdict', [
    ((1, 1, 1), dict(wn=(0.1, 0.1, 0.1)), 'supported'),
    ((0.3, 0.3, 0.3), dict(wn=(0.03, 0.03, 0.1)), 'undecided'),
    ((0.03, 0.03, 0.03), dict(wn=(0.3, 0.3, 0.3)), 'contradicted'),
    ((1, 1, 1), dict(wn=(1, 1, 1)), 'undecided'),
    ((1, 1, 1), dict(wn=(0, 0, 0)), 'supported'),
    ((1, 1, 1), dict(wn=(0.1, 0.1, 0.1), np=(0.03, 0.03, 0.03)), 'supported'),
    ((1, 1, 1), dict(wn=(0.1, 0.1, 0.1), trelu=(1, 1, 1)), 'undecided'),
    ((1,), dict(wn=(0.03,)), 'undecided'),
    ((1, 1), dict(wn=(0.03, 0.03)), 'undecided'),
    ((1, 1, 1), dict(np=(0.03, 0.03, 0.03)), 'not tested'),
    ((1, 1, 1), dict(none=(0.03, 0.03, 0.03)), 'not tested')])
def test_c6_compares_limits(bn, others, verdict):
    found = decide('C6', ladder('bn', *bn), *(ladder(norm, *limit) for norm, limit in others.items()))
    assert found.verdict == verdict
    assert verdict == 'not tested' or (found.kind == 'analogue' and f'of {4*len(bn)*(1+len(others))} runs diverged' in found.why)


def test_c6_shows_both_ends_of_a_bracket_as_means_over_the_same_seeds():
    found = decide('C6', ladder('bn', *[LRS[3]]*3), ladder('wn', LRS[0], LRS[1], LRS[2])).numbers.query("scheme == 'wn'").set_index('what')
    low, high = (found.loc[what] for what in ('largest lr that did not diverge', 'smallest lr above it that diverged'))
    assert low.value == pytest.approx(math.prod(LRS[:3])**(1/3)) and high.value == pytest.approx(math.prod(LRS[1:4])**(1/3)) and low.n == high.n == 3
    assert decide('C6', ladder('bn', *[LRS[3]]*3), ladder('wn', 0, LRS[1], LRS[1])).numbers.query("scheme == 'wn'")[['n', 'value']].values[0].tolist() == [3, 0]

def test_c6_takes_short_runs_but_no_mixture():
    assert decide('C6', ladder('bn', 1, 1, 1, max_steps=50), ladder('wn', 0.1, 0.1, 0.1, max_steps=50)).verdict == 'supported'
    assert decide('C6', ladder('bn', 1, 1, 1, grad_clip=1.), ladder('wn', 0.1, 0.1, 0.1)).verdict == 'not tested'
    assert decide('C6', BN, WN).verdict == 'not tested'


def test_c6_is_judged_with_warm_up_and_names_the_rest_beside_it():
    def pair(bn, wn, **other): return [ladder('bn', *[bn]*3, **other), ladder('wn', *[wn]*3, **other)]
    judged, cold, clipped = pair(1, 0.1, warmup_epochs=1.), pair(0.03, 0.3, warmup_epochs=0.), pair(1, 1, warmup_epochs=1., grad_clip=1.)
    for order in ([*judged, *cold, *clipped], [*clipped, *cold, *judged]):
        found = decide('C6', *order)
        assert found.verdict == 'supported' and found.why.endswith('; beside it, not judged, the limit of `bn` is below that of `wn` (warmup_epochs 0); not told apart from that of `wn` (grad_clip 1)')
        assert {'factor between the limits', 'factor between the limits, warmup_epochs 0', 'factor between the limits, grad_clip 1'} < set(found.numbers.what)
    few = decide('C6', *judged, ladder('bn', 1, warmup_epochs=1., grad_clip=1.), ladder('wn', 0.1, warmup_epochs=1., grad_clip=1.))
    assert 'beside' not in few.why and 'factor between the limits, grad_clip 1' in set(few.numbers.what)
    alone = decide('C6', *judged, ladder('wn', 0.1, 0.1, 0.1, warmup_epochs=1., grad_clip=1.), ladder('wn', 1, 1, 1, warmup_epochs=1., max_steps=50))
    assert alone.why == decide('C6', *judged).why


# C9 to C11

def test_c9_needs_a_shallow_network_on_cifar10():
    net = dict(data='cifar10', arch='shallow')
    bn, wn = runs_of('bn', [90., 90.3, 90.1], [100., 100., 99.9], **net), runs_of('wn', [91.6, 91.9, 91.5], [100., 99.9, 100.], **net)
    np = runs_of('np', [89.0, 89.2, 89.1], [100., 99.9, 100.], **net)
    assert [decide('C9', *p).verdict for p in ((bn, wn, np), (bn, np), (bn, wn.assign(train_top1=99.5)), (bn, wn.assign(train_top1=99.4)), (bn[:1], wn[:1]))] == ['supported', 'contradicted', 'supported', 'undecided', 'undecided']
    assert decide('C9', bn, wn).kind == 'analogue'
    assert decide('C9', bn, wn, np.assign(train_top1=60.)).verdict == 'undecided' and decide('C9', bn, wn, np[:1].assign(top1=95.)).verdict == 'supported'
    assert [decide('C9', *(part.assign(**other) for part in (bn, wn))).verdict for other in (dict(arch='resnet18'), dict(data='digits'))] == ['not tested']*2


def cost_verdicts(folder, **changes):
    "C10 and C11 on a record of ten rounds: bn 1.2 times none, wn 1.05, np 1.1"
    jitter = numpy.linspace(1, 1.002, 10)
    record = dict(arch='resnet18', image_size=32, batch_size=8, precision='fp32', channels_last=True, device='cpu', hardware='x',
                  seconds={norm: (times*jitter**k).tolist() for k, (norm, times) in enumerate(dict(none=1., bn=1.2, wn=1.05, np=1.1).items())})
    seconds = record['seconds'] | changes.pop('seconds', {})
    (folder/'cost').mkdir(exist_ok=True)
    (folder/'cost'/f'{len(list((folder/"cost").iterdir()))}.json').write_text(json.dumps(record | changes | dict(seconds=seconds)))
    return [CLAIMS[key].decide(table(BN, WN), folder/'runs') for key in ('C10', 'C11')]

@pytest.mark.parametrize('seconds, c10, c11', [({}, 'supported', 'supported'), (dict(wn=[1.3]*10), 'supported', 'contradicted'), (dict(wn=[1.205]*5+[1.2]*5), 'supported', 'supported'),
    (dict(wn=[1.1]*5+[1.3]*5), 'supported', 'undecided'), (dict(bn=numpy.linspace(1.03, 1.031, 10).tolist()), 'contradicted', 'contradicted'), (dict(bn=[1.]*5+[1.2]*5), 'undecided', 'undecided'),
    (dict(bn=numpy.linspace(1.041, 1.042, 10).tolist()), 'contradicted', 'contradicted'), (dict(bn=numpy.linspace(1.063, 1.064, 10).tolist()), 'supported', 'contradicted'),  # 4 and 6 % of a step
    (dict(wn=numpy.linspace(1.2085, 1.2095, 10).tolist()), 'supported', 'supported'), (dict(wn=numpy.linspace(1.217, 1.218, 10).tolist()), 'supported', 'contradicted')])  # 1.006 and 1.013 times bn
def test_cost_is_decided_by_the_median_over_rounds(seconds, c10, c11, tmp_path):
    verdicts = cost_verdicts(tmp_path, seconds=seconds)
    assert [v.verdict for v in verdicts] == [c10, c11] and {v.kind for v in verdicts} == {'analogue'} and all('not the claim itself' in v.where for v in verdicts)

def test_few_rounds_decide_nothing_and_the_papers_own_network_goes_first(tmp_path):
    few = {norm: [1.]*5 for norm in ('none', 'bn', 'wn', 'np')}
    assert [v.verdict for v in cost_verdicts(tmp_path, seconds=few)] == ['undecided']*2
    own = cost_verdicts(tmp_path, arch='resnet50', image_size=224, device='cuda')
    assert [(v.verdict, v.kind) for v in own] == [('supported', 'claim')]*2
    assert own[0].numbers.value[0] == pytest.approx(100*(1-1/1.2), abs=0.1) and (own[0].numbers.low < own[0].numbers.value).all() and (own[0].numbers.value < own[0].numbers.high).all()
    assert all('resnet50' in v.where and 'analogue' not in v.where for v in own)

@pytest.mark.parametrize('wn, verdict', [([1.05]*10, 'supported'), ([1.1]*5+[1.3]*5, 'undecided'), ([1.3]*10, 'contradicted')])
def test_cost_is_judged_in_every_precision(wn, verdict, tmp_path):
    cost_verdicts(tmp_path, precision='bf16', seconds=dict(wn=wn))
    c10, c11 = cost_verdicts(tmp_path)
    assert (c10.verdict, c11.verdict) == ('supported', verdict) and 'fp32 and bf16' in c11.where
    assert c11.why.index('in fp32 ') < c11.why.index('in bf16 ') and set(c11.numbers.what) == {f'step time over {norm}, {precision}' for norm in ('bn', 'none') for precision in ('fp32', 'bf16')}

def test_cost_of_two_networks_or_layouts_is_not_mixed(tmp_path):
    cost_verdicts(tmp_path, arch='resnet50', channels_last=False, precision='bf16', seconds=dict(wn=[1.3]*10))
    cost_verdicts(tmp_path, arch='resnet18', precision='bf16', seconds=dict(wn=[1.3]*10))
    long = {norm: times*numpy.linspace(1, 1.002, 20)**k for k, (norm, times) in enumerate(dict(none=1., bn=1.2, wn=1.05, np=1.1).items())}
    c10, c11 = cost_verdicts(tmp_path, arch='resnet50', seconds={norm: times.tolist() for norm, times in long.items()})
    assert c11.verdict == 'supported' and 'bf16' not in c11.where and 'contiguous' not in c11.where and 'resnet50' in c11.where

@pytest.mark.parametrize('unusual', (dict(compile='network'), dict(compile='off'), dict(allocator={'MALLOC_MMAP_MAX_': '0'})))
def test_a_record_of_another_compiler_or_allocator_is_not_judged(unusual, tmp_path):
    assert [v.verdict for v in cost_verdicts(tmp_path, image_size=999, **unusual)] == ['not tested']*2
    assert len(cost_records(tmp_path/'runs', usual=False)) == 1
    assert [v.verdict for v in cost_verdicts(tmp_path)] == ['supported']*2

def test_cost_without_records_says_what_is_missing(tmp_path):
    (tmp_path/'cost').mkdir()
    whole = dict(arch='resnet18', image_size=32, batch_size=8, precision='fp32', channels_last=True, device='cpu', hardware='x')
    uneven, single = (json.dumps(whole | dict(seconds=s)) for s in (dict(none=[1.]*8, bn=[1.]*7, wn=[1.]*8), dict(none=1., bn=1., wn=1.)))
    for name, text in dict(torn='{"arch": ', list='[]', part='{"arch": "resnet18"}', uneven=uneven, single=single).items(): (tmp_path/'cost'/f'{name}.json').write_text(text)
    for folder in (tmp_path/'runs', tmp_path/'elsewhere'/'runs'):
        for key in ('C10', 'C11'):
            verdict = CLAIMS[key].decide(table(BN, WN), folder)
            assert (verdict.verdict, verdict.kind, verdict.runs) == ('not tested', '', []) and 'papermill nbs/cost.ipynb' in verdict.why


# all claims, odd tables

def test_claims_are_complete_and_in_order():
    assert list(CLAIMS) == [f'C{i}' for i in range(1, 12)] and [v.key for v in judge(table(BN, WN), 'nowhere')] == list(CLAIMS)
    tags = dict(zip(CLAIMS, 'paper paper seed paper paper paper secondary secondary secondary paper paper'.split(), strict=True))
    for key, claim in CLAIMS.items():
        assert claim.key == key and claim.tag == tags[key] and all((claim.title, claim.sentence, claim.observable, claim.rule))
        assert ('G&G state' in claim.sentence or 'G&G attribute' in claim.sentence) == (claim.tag == 'paper')
        assert ('second hand' in claim.sentence) == (claim.tag == 'secondary')
        assert 'our choice' in claim.rule.lower()


ODD = dict(nothing=pandas.DataFrame(), names=pandas.DataFrame(columns=['run', 'status']), torn=pandas.DataFrame(dict(run=['a'], status=['started'])),
           diverged=table(BN, WN).assign(status='diverged', top1=NAN, train_top1=NAN), started=table(BN, WN).assign(status='started', top1=NAN),
           words=table(BN, WN).assign(top1='much', lr='fast'), no_source=table(BN, WN).assign(source=None), no_norm=table(BN, WN).assign(norm=None))

@pytest.mark.parametrize('name', ODD)
def test_tables_without_results_are_judged(name):
    verdicts = judge(ODD[name], 'nowhere')
    assert len(verdicts) == 11 and len(by_setting(ODD[name])) >= 0 and len(against_bn(ODD[name])) >= 0
    assert {v.verdict for v in verdicts} == {'not tested'} or name == 'no_source'
    assert all(v.why and v.numbers.columns[0] == 'what' and (v.verdict == 'not tested') == (not v.where) for v in verdicts)


@pytest.mark.parametrize('column', ['run', 'status', 'norm', 'init', 'lr', 'seed', 'top1', 'train_top1', 'dropout', 'max_steps', 'epochs', 'recipe', 'data', 'weight_decay'])
def test_a_missing_column_never_raises(column):
    runs = table(BN, WN, ladder('bn', 1, 1, 1), ladder('wn', 0.1, 0.1, 0.1), runs_of('wn', [94., 95., 96.], dropout=0.5)).drop(columns=column)
    assert len(judge(runs, 'nowhere')) == 11 and len(by_setting(runs)) >= 0 and len(against_bn(runs)) >= 0


@pytest.mark.parametrize('damage', ['{"event": "eval", "epoch": 1, "train_to', 'rubbish\n{"event": "eval", "step": 1, "epoch": 1, "train_top1": 5}\n', '{"event": "eval"}\n{"event": "train"}\n{"event": "probe"}\n'])
def test_a_torn_folder_is_left_out(tmp_path, damage):
    runs, folder = write(tmp_path, (BN, WN), dict(bn=(10, 60, 92), wn=(10, 80, 95)), dict(bn=(0., 0., 0.), wn=(0., 0., 1.)), UP)
    whole = {v.key: v.verdict for v in judge(runs, folder)}
    assert (whole['C1'], whole['C3'], whole['C8']) == ('supported', 'supported', 'supported')
    torn = folder/WN.run[0]
    (torn/'metrics.jsonl').write_text(damage)
    after = {v.key: v for v in judge(load_runs(folder), folder)}
    assert after['C1'].verdict == 'supported' and after['C8'].verdict == 'undecided' and 'n = 2' in after['C8'].why
    (torn/'config.json').write_text('{"norm": "w')
    assert {v.key: v.verdict for v in judge(load_runs(folder), folder)}['C1'] == 'undecided'


def test_records_are_read_once_and_only_where_they_are_needed(tmp_path, monkeypatch):
    unneeded = runs_of('wn', [90.], lr=7.), runs_of('none', [95.]*3)
    runs, folder = write(tmp_path, (BN, WN, *unneeded), dict(bn=(10, 60, 92), wn=(10, 80, 95), none=(1, 2)), dict(bn=(0., 0.), wn=(0., 1.)))
    read = []
    def count(path):
        read.append(path.parent.name)
        return whole(path)
    whole = nwrepro.stats.read_metrics
    monkeypatch.setattr(nwrepro.stats, 'read_metrics', count)
    judge(runs, folder)
    assert sorted(read) == sorted([*BN.run, *WN.run])


def test_a_record_that_grew_is_read_again(tmp_path):
    runs, folder = write(tmp_path, (BN, WN), dict(bn=(10, 60, 92), wn=(10, 80, 95)))
    assert CLAIMS['C3'].decide(runs, folder).verdict == 'supported'
    for name in WN.run: (folder/name/'metrics.jsonl').write_text('')
    assert CLAIMS['C3'].decide(runs, folder).verdict == 'not tested'


def test_running_accuracy_weights_by_images():
    lines = [dict(event='train', epoch=e, top1=t, images=n) for e, t, n in ((0.5, 10., 300), (1., 30., 100), (1.5, 50., 0))]
    assert running_accuracy(lines) == ((0.5, 15.),) and running_accuracy([dict(event='train'), {}]) == ()


def test_an_estimate_of_no_width_decides_nothing():
    assert [ruling(Estimate(3, 1, *ends)) for ends in ((0.1, 2), (-2, -0.1), (-1, 1), (1, 1+1e-15), (NAN, NAN), (0.1, math.inf), (-math.inf, math.inf))] == [
        'supported', 'contradicted', 'undecided', 'undecided', 'undecided', 'supported', 'undecided']
