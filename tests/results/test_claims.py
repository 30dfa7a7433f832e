"What the lessons of the pages on claims cannot show: every claim's verdicts on made-up runs of known outcome, who may be compared, odd tables"
import dataclasses, itertools, json, math
from pathlib import Path

import numpy, pandas, pytest
from hypothesis import given, strategies as st

import nwrepro.results.histories
from nwrepro.results.accuracy import recovery_ruling
from nwrepro.results.variants import FREE, SETTING, budget, by_setting, candidates, comparable, complete, grouped, primary
from nwrepro.results.claims import CLAIMS, HOLM_FAMILY, adjusted, judge
from nwrepro.results.costs import cost_records
from nwrepro.results.histories import RunHistory, early, epochs_to, first_block_ratio, gains, growth, premise, rise, running_accuracy, trend_note
from nwrepro.training.probes import probed_layers
from nwrepro.training.recipe import RECIPES, Recipe
from nwrepro.training.records import load_runs
from nwrepro.training.runs import Run
from nwrepro.training.files import to_json
from nwrepro.results.stability import limits_of
from nwrepro.results.statistics import Estimate, mean_interval, smallest_margin, welch
from nwrepro.experiments.tuning import largest_lr
from nwrepro.results.verdicts import Verdict, kind_of, ruling, table_of

NAN = math.nan
BASE = {f.name: None for f in dataclasses.fields(Recipe) if f.name not in ('norm', 'init', 'seed')} | RECIPES['paper'] | dict(
    data='digits', arch='resnet18', image_size=32, recipe='paper', epochs=8, batch_size=32, holdout=0., dropout=0., lr=0.1, zero_init=False)
PAPER = BASE | dict(data='imagenet', arch='resnet50', image_size=224, epochs=120, batch_size=256)
INIT = dict(none='norm_preserving', wn='norm_preserving', np='np')


def runs_of(norm, top1, train_top1=None, seeds=None, **other):
    "One run per seed; nan = diverged"
    config = BASE | dict(norm=norm, init=INIT.get(norm, 'torch')) | other
    name = '-'.join(str(config[k]) for k in ('norm', 'init', 'zero_init', 'lr', 'dropout', 'weight_decay', 'holdout', 'epochs',
                                             'max_steps'))
    return pandas.DataFrame([config | dict(run=f'{name}-s{seed}', seed=seed, status='diverged' if math.isnan(x) else 'finished', top1=x,
                                           train_top1=t)
                             for seed, x, t in zip(seeds or range(len(top1)), top1, train_top1 or top1, strict=True)])


def tuned(norm, scores, seeds=(100, 101), **other):
    "Candidates on a hold-out split; `scores`: lr -> accuracy with each seed"
    return table(*(runs_of(norm, found, seeds=seeds[:len(found)], lr=lr, **dict(holdout=0.1) | other) for lr, found in scores.items()))


def table(*parts): return pandas.concat(parts, ignore_index=True)


def decide(key, *parts, folder=Path('nowhere')): return CLAIMS[key].decide(table(*parts), folder)


BN, WN = runs_of('bn', [97.1, 97.4, 96.9], [99.1, 99.3, 99.0]), runs_of('wn', [94.0, 93.1, 94.6], [99.2, 99.1, 99.3])
SWAPPED = runs_of('wn', [97.1, 97.4, 96.9], [99.1, 99.3, 99.0]), runs_of('bn', [94.0, 93.1, 94.6], [99.2, 99.1, 99.3])
CLEAR = runs_of('bn', [97.1, 97.4, 96.9, 97.2, 97.3], [95.1, 95.3, 95.0, 95.2, 95.1]), runs_of('wn', [94.0, 93.1, 94.6, 93.8, 93.9],
    [98.2, 98.1, 98.3, 98.4, 98.2])


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


def test_by_setting_counts_what_was_started():
    rows = by_setting(table(BN, runs_of('wn', [94., 93., NAN]), runs_of('np', [95.]).assign(status='started', top1=NAN))).set_index('norm')
    assert rows[['n_started', 'n_finished', 'n_diverged']].values.tolist() == [[3, 3, 0], [1, 0, 0], [3, 2, 1]]
    e = mean_interval([97.1, 97.4, 96.9])
    assert rows.loc['bn', ['top1_mean', 'top1_sd', 'top1_low', 'top1_high']].tolist() == pytest.approx([e.value, e.sd, e.low, e.high])
    assert rows.top1_low.isna().tolist() == [False, True, True] and rows.train_top1_mean['bn'] == pytest.approx(99.1333, abs=1e-3)
    assert len(by_setting(table(BN, BN.assign(zero_init=True)))) == 2


def test_a_seed_counts_once():
    assert by_setting(table(BN, BN)).n_finished.tolist() == [3]
    assert decide('C1', BN[:1], WN[:1], BN[:1], WN[:1], BN[:1], WN[:1]).verdict == 'undecided'


# variants: what the hold-out split chooses, and test images never

def chosen(*parts, norm='wn'):
    verdict = decide('C1', *parts)
    return next(words for words in verdict.budgets if words.startswith(norm))

def test_the_hold_out_split_chooses_the_learning_rate():
    good, flattering = runs_of('wn', [94.0, 93.1, 94.6], lr=0.2), runs_of('wn', [99.9, 99.8, 99.9], lr=0.4)
    scores = tuned('wn', {0.1: [90.], 0.2: [93., 92.], 0.4: [92., 91.]}), tuned('bn', {0.05: [90.], 0.1: [93., 92.], 0.2: [92., 91.]})
    found = decide('C1', BN, good, flattering, *scores)
    assert found.verdict == 'supported' and 'wn (norm_preserving, lr 0.2): 3 lr tried, chosen with 2 seeds after 8 epochs' in found.budgets
    exchanged = decide('C1', BN, good, flattering, *(part.assign(top1=part.top1.where(part.lr != 0.4, 99.)) if part.norm[0] == 'wn'
                                                     else part for part in scores))
    assert exchanged.verdict == 'contradicted' and 'lr 0.4' in exchanged.budgets[1]


@given(st.permutations([99.9, 50., 97.5, 10.]))
def test_test_images_choose_nothing(accuracies):
    "Whatever the test accuracies of the candidates are, the same runs are compared, with hold-out records and without"
    finals = [runs_of('wn', [x, x-0.1, x+0.05], lr=lr, init=init, zero_init=zero) for x, (lr, init, zero) in
              zip(accuracies, ((0.1, 'norm_preserving', False), (0.2, 'norm_preserving', False), (0.1, 'torch', False),
                               (0.1, 'torch', True)), strict=True)]
    assert chosen(BN, *finals) == 'wn (norm_preserving, lr 0.1): no hold-out record of this lr'
    held = tuned('wn', {0.1: [80.], 0.2: [85.]}), tuned('wn', {0.1: [90.]}, init='torch'), tuned('wn', {0.1: [70.]}, init='torch',
        zero_init=True)
    assert chosen(BN, *finals, *held).startswith('wn (torch, lr 0.1)')
    group = comparable(table(BN, *finals, *held))[0][1]
    assert set(primary(group).query("norm == 'wn'").run) == set(finals[2].run)


def test_accuracies_on_the_hold_out_split_are_no_test_accuracies():
    held = [part.assign(holdout=0.2) for part in (BN, WN)]
    assert [decide(key, *held).verdict for key in ('C1', 'C2', 'C4')] == ['not tested']*3 and 'hold-out split' in decide('C1', *held).why
    both = decide('C1', *held, *SWAPPED)
    assert both.verdict == 'contradicted' and 'holdout' not in both.where


def test_of_candidates_the_longest_with_most_seeds_and_the_highest_mean_is_chosen():
    tried = next(iter(candidates(grouped(table(tuned('wn', {0.1: [99.]}, epochs=2),
                                               tuned('wn', {0.2: [95., 90.], 0.3: [94., 93.], 0.4: [98.], 0.5: [NAN, NAN]})))).values()))
    found = budget(tried)
    assert (found.lr, found.n, found.epochs, found.rates, found.seeds) == (0.3, 2, 8, (0.1, 0.2, 0.3, 0.4, 0.5),
        (100, 101)) and found.score == pytest.approx(93.5)
    assert math.isnan(budget(tried[tried.lr == 0.5]).lr)


def test_candidates_of_another_setting_choose_nothing():
    for other in (dict(weight_decay=1e-3), dict(image_size=64), dict(max_steps=50)):
        assert 'no hold-out record' in chosen(BN, WN, tuned('wn', {0.1: [90.]}, **other))
    assert 'no hold-out record' in chosen(BN, WN, tuned('wn', {0.7: [90.]}))  # no final runs at the rate that was chosen


FULL = {0.05: [90.], 0.1: [93., 92.], 0.2: [92., 91.]}

@pytest.mark.parametrize('change, words', [
    (dict(), ''), (dict(wn={0.05: [90.], 0.1: [93., 92.]}), 'at the end of the list'),
    (dict(wn=FULL | {0.4: [80.]}), 'unequal lists of lr'), (dict(wn={0.05: [90.], 0.1: [93.], 0.2: [92.]}), 'chosen with one seed (wn)'),
    (dict(epochs=4), 'chosen after 4 of 8 epochs'), (dict(seeds=(0, 101)), 'seed 0 used in tuning too'),
    (dict(final=3), '3 final seeds of 5'), (dict(train_images=500), 'one subset of the training images'),
    (dict(wn={}), 'without hold-out records (wn)')])
def test_what_makes_a_comparison_exploratory(change, words):
    more = {k: change[k] for k in ('train_images',) if k in change}
    finals = [part[:change.get('final', 5)].assign(**more) for part in CLEAR]
    held = [tuned(norm, scores, **{k: v for k, v in dict(epochs=change.get('epochs', 8), seeds=change.get('seeds', (100, 101)),
                                                         **more).items()})
            for norm, scores in (('bn', FULL), ('wn', change.get('wn', FULL))) if scores]
    found = decide('C1', *finals, *held)
    assert found.verdict == 'supported' and (words in found.exploratory if words else found.exploratory == '')


def test_budgets_are_shown_per_arm():
    found = decide('C1', *CLEAR, tuned('bn', FULL), tuned('wn', FULL))
    assert found.budgets == tuple(f'{norm}, lr 0.1): 3 lr tried, chosen with 2 seeds after 8 epochs'
                                  for norm in ('bn (torch', 'wn (norm_preserving'))


def test_a_run_that_has_just_begun_hides_no_finished_ones():
    other = runs_of('wn', [94.0, 93.1, 94.6], init='torch')
    begun = runs_of('wn', [NAN]).assign(status='started')
    assert decide('C1', BN, other, begun).verdict == 'supported'

@pytest.mark.parametrize('first', (True, False))
def test_an_interrupted_run_of_the_same_seed_hides_no_finished_one(first):
    cut = runs_of('wn', [NAN], compile='network').assign(status='interrupted')
    parts = (cut, BN, WN) if first else (BN, WN, cut)
    assert decide('C1', *parts).verdict == 'supported' and '3 of 3 finished' in decide('C1', *parts).why

@pytest.mark.parametrize('first', (True, False))
def test_of_two_networks_with_as_many_seeds_the_one_nearest_to_the_papers_is_judged(first):
    other = [part.assign(arch='resnet50') for part in SWAPPED]
    found = decide('C1', *((BN, WN, *other) if first else (*other, BN, WN)))
    assert found.verdict == 'contradicted' and 'resnet50' in found.where


# the claim itself, or an analogue

def test_only_the_papers_setting_is_the_claim_itself():
    def kind(**change): return kind_of(comparable(pandas.DataFrame([PAPER | dict(run='bn', norm='bn', init='torch', seed=0,
        source=dict(classes=1000, train=1281167)) | change]))[0][0])
    assert kind() == 'claim' and kind(precision='bf16') == 'claim' and kind(zero_init=True) == 'claim'
    changes = [dict(data='imagenette'), dict(arch='resnet18'), dict(image_size=160), dict(recipe='modern'), dict(epochs=90),
               dict(batch_size=64), dict(train_images=1000),
               dict(holdout=0.1), dict(max_steps=10), dict(source=dict(classes=100, train=126689)), dict(strides='v1.5'),
               dict(schedule='cosine'), dict(label_smoothing=0.1),
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
    usual, changed = (decide('C1', *(part.assign(**setting) for part in (BN, WN))).where for setting in ({}, dict(strides='v1.5')))
    assert ', strides v1.5' in changed and 'strides' not in usual

def test_the_setting_that_can_decide_goes_before_the_claim_itself():
    one_each = [part[:1].assign(**{k: v for k, v in PAPER.items() if v is not None}) for part in (BN, WN)]
    assert decide('C1', BN[:2], WN[:2], *one_each).kind == 'claim' and decide('C1', *one_each, BN, WN).kind == 'analogue'


# the family

def made_up(key, p, verdict='supported', **more): return Verdict(key, verdict, 'analogue', 'made up', table_of([]), [], p=p, **more)

def test_seven_claims_are_one_family():
    assert HOLM_FAMILY == ('C1', 'C2', 'C3', 'C4', 'C5', 'C6', 'C9')
    alone = [made_up(key, p) for key, p in zip(CLAIMS, (0.006, 0.009, 0.011, 0.02, 0.3, 0.4, 0.04, 0.04, 0.6, 0.04, 0.04), strict=True)]
    after = {v.key: v.verdict for v in adjusted(alone)}
    assert [key for key, verdict in after.items() if verdict == 'supported'] == ['C1', 'C7', 'C8', 'C10',
        'C11']  # 7 x .006 < .05 < 6 x .009; those outside stay
    assert 'by Holm over the 7 claims of the family 0.054, so undecided, which alone would be supported' in adjusted(alone)[1].why


def test_untested_members_of_the_family_count():
    assert adjusted([made_up('C1', 0.009), *(made_up(key, NAN, 'not tested') for key in HOLM_FAMILY[1:])])[0].verdict == 'undecided'
    assert adjusted([made_up('C1', 0.007), *(made_up(key, NAN, 'not tested') for key in HOLM_FAMILY[1:])])[0].verdict == 'supported'


def test_equivalence_has_holms_p_of_its_own():
    near = [made_up(key, 0.9, 'equivalent', equal_p=p) for key, p in zip(HOLM_FAMILY, (0.001, 0.008, 0.009, 0.3, 0.3, 0.3, 0.3),
        strict=True)]
    assert [v.verdict for v in adjusted(near)][:3] == ['equivalent', 'equivalent',
                                                       'equivalent'] and adjusted([near[2],
                                                           *(made_up(k, NAN, 'not tested')
                                                             for k in HOLM_FAMILY[1:])])[0].verdict == 'undecided'


def test_a_claim_that_holm_leaves_undecided_was_supported_alone():
    edge = runs_of('bn', [96.0, 96.6, 96.3], [90., 91., 90.5]), runs_of('wn', [95.0, 95.5, 95.2], [90., 91., 90.7])
    alone, whole = decide('C1', *edge), judge(table(*edge), 'nowhere')[0]
    assert alone.verdict == 'supported' and 0.05/7 < alone.p < 0.05 and whole.verdict == 'undecided'
    assert judge(table(*edge, ), 'nowhere')[4].verdict in ('not testable here', 'not tested')


# C1, C2, C4

@pytest.mark.parametrize('key', ['C1', 'C2', 'C4'])
def test_claims_about_accuracy(key):
    low = [part.assign(train_top1=part.train_top1-5) for part in CLEAR]
    swapped = [part.assign(norm=other, init='torch') for part, other in zip(low, ('wn', 'bn'), strict=True)]
    near = runs_of('bn', [95., 97., 96.], [90., 88., 87.]), runs_of('wn', [96.5, 94.5, 97.2], [88., 89.2, 87.4])
    assert [decide(key, *parts).verdict for parts in (low, swapped, near)] == ['supported', 'contradicted', 'undecided']
    for few in ((BN[:1], WN[:1]), (BN[:2], WN[:2]), (BN, WN[:2])):
        verdict = decide(key, *(part.assign(train_top1=part.train_top1-5) for part in few))
        assert verdict.verdict == 'undecided' and f'n = {len(few[1])}' in verdict.why and verdict.kind == 'analogue'
    assert [decide(key, *parts).verdict for parts in ((BN,), (WN,), (BN, WN.assign(image_size=64)),
                                                      (BN, WN.assign(status='diverged', top1=NAN)))] == ['not tested']*4
    assert '(of 6 such runs 3 diverged)' in decide(key, BN, WN.assign(status='diverged', top1=NAN)).why


def test_equal_within_the_margin_is_equivalent_and_else_undecided():
    same = [97.0, 97.2, 96.9, 97.1, 97.3]
    def c1(spread, shift=0.): return decide('C1', runs_of('bn', [97+spread*(x-97)+shift for x in same]),
                                            runs_of('wn', [97+spread*(x-97) for x in same[::-1]]))
    assert [c1(1).verdict, c1(10).verdict, c1(1, 0.9).verdict] == ['equivalent', 'undecided', 'supported']
    assert c1(10).p > 0.5 and 'equivalent within' in c1(10).why


def test_a_gap_just_inside_the_margin_is_not_equivalent():
    bn, wn = [71.0, 71.6, 70.6, 71.2, 71.3], [70.4, 70.9, 69.9, 70.5, 70.6]
    found = decide('C1', runs_of('bn', bn), runs_of('wn', wn))
    assert found.verdict == 'supported' or found.verdict == 'undecided' and smallest_margin(bn, wn) > 1
    assert found.verdict == ('supported' if welch(bn, wn).low > 0 else 'undecided')


def test_a_verdict_shows_its_numbers_and_names_its_runs():
    broken = runs_of('wn', [94.0, 93.1, 94.6, NAN])
    verdict = decide('C1', BN, broken)
    assert sorted(verdict.runs) == sorted([*BN.run, *broken.run]) and '3 of 4 finished' in verdict.why
    assert verdict.numbers.columns.tolist() == ['what', 'scheme', 'n', 'value', 'low', 'high', 'unit']
    gap = verdict.numbers.set_index(['what', 'scheme']).loc[('top1', 'bn - wn')]
    e = welch(BN.top1, WN.top1)
    assert [gap.n, gap.value, gap.low, gap.high] == pytest.approx([3, e.value, e.low, e.high])


def test_other_pairs_of_arms_stand_beside_with_both_signs():
    other, zero = runs_of('wn', [98.9, 99., 98.8], init='torch'), runs_of('bn', [92.1, 92.3, 92.], zero_init=True)
    found = decide('C1', BN, WN, other, zero, runs_of('wn', [50.], init='data'))
    assert found.verdict == 'supported' and 'the other 3 pairs of variants: -6.8 (' in found.why and 'bn (torch, zero-init, lr 0.1) - wn (torch, lr 0.1)' in found.why
    assert (found.numbers.what == 'top1, not compared').sum() == 3 and len(found.runs) == 6


def test_the_noise_of_tuning_is_that_of_a_factor_of_two():
    runs = table(BN, WN, runs_of('bn', [95.], lr=0.2), runs_of('bn', [90.], lr=0.4), runs_of('bn', [10.], lr=10.))
    assert 'a factor of two in lr moves that of one run of bn by 2.1 to 5.0 points' in decide('C1',
        runs).why and 'moves' not in decide('C1', BN, WN).why


def test_where_neither_is_shown_below_the_ceiling_c2_and_c4_have_nothing_to_decide():
    full = runs_of('bn', [97.1, 97.4, 96.9], [99.9, 99.7, 100.]), runs_of('wn', [94.0, 93.1, 94.6], [100., 100., 99.9])
    assert [(decide(key, *full).verdict, decide(key, *full).note) for key in ('C1', 'C2', 'C4')] == [('supported', ''),
        ('not testable here', 'both may be at 100 % of the training images'), ('not testable here', 'like C1, but for 0.1 points of training accuracy')]
    assert all('neither variant is shown to be below 99.5 % of the training images' in decide(key, *full).why
               and 'memorized' not in decide(key, *full).why for key in ('C2', 'C4'))
    assert 'this is the gap of C1 (3.23 points) but for 0.10 points of training accuracy' in decide('C4', *full).why
    below = full[0].assign(train_top1=[98.0, 98.2, 97.9]), full[1]
    assert [decide(key, *below).verdict for key in ('C2', 'C4')] == ['supported', 'supported']
    wide = full[0].assign(train_top1=[99.4, 99.2, 98.5]), full[1]  # its interval holds 99.5
    assert decide('C2', *wide).verdict == 'not testable here' and decide('C2', *(part[:2] for part in wide)).verdict == 'undecided'
    assert all(math.isnan(decide(key, *full).p) for key in ('C2', 'C4'))


def test_runs_cut_short_have_no_final_accuracy():
    cut = decide('C1', BN.assign(max_steps=50), WN.assign(max_steps=50))
    assert cut.verdict == 'not tested' and '(of 6 such runs 6 were stopped by max_steps and do not count)' in cut.why


# records

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
            run.log('probe', epoch, epoch, outputs=dict(layer=['conv1', *layer], rms=[1., *itertools.chain(*zip(conv, loud, strict=True))]),
                    coherence=means)
        run.finish(row['status'], top1=row['top1'], train_top1=row['train_top1'])
    return load_runs(folder), folder


def test_running_accuracy_and_loss_stand_beside_c2(tmp_path):
    runs, folder = write(tmp_path, [part.assign(train_top1=part.train_top1-9) for part in (BN, WN)], dict(bn=(10, 50, 90), wn=(10, 60, 95)))
    numbers = CLAIMS['C2'].decide(runs.assign(train_loss=runs.norm.map(dict(bn=0.2, wn=0.1))+runs.seed/100),
                                  folder).numbers.set_index(['what', 'scheme']).value
    assert numbers['running accuracy', 'bn'] == pytest.approx(86) and numbers['running accuracy',
        'wn - bn'] == pytest.approx(5) and numbers['train_loss', 'wn - bn'] == pytest.approx(-0.1)


@pytest.mark.parametrize('wn, verdict', [((10, 80, 95), 'supported'), ((10, 30, 91), 'contradicted'), ((10, 80, 82), 'supported'),
                                         ((10, 40, 97), 'undecided'), ((5, 6, 7), 'not tested')])
def test_c3_needs_every_level_that_both_reach(tmp_path, wn, verdict):
    found = CLAIMS['C3'].decide(*write(tmp_path, (BN, WN), dict(bn=(10, 60, 92), wn=wn)))
    assert found.verdict == verdict
    assert verdict == 'not tested' or ('to 90 %' in found.why) == (wn[-1] > 90)


def test_the_p_of_c3_is_the_largest_of_its_levels(tmp_path):
    runs, folder = write(tmp_path, (BN, WN), dict(bn=(10, 60, 92), wn=(10, 65, 95)))
    found = CLAIMS['C3'].decide(runs, folder)
    levels = found.numbers[(found.numbers.scheme == 'bn - wn') & ~found.numbers.what.str.contains('running')]
    assert len(levels) == 4 and found.p > 0.05/7 and found.verdict == 'supported' and judge(runs, folder)[2].verdict == 'undecided'


def test_c3_of_one_seed_decides_nothing(tmp_path):
    assert CLAIMS['C3'].decide(*write(tmp_path, (BN[:1], WN[:1]), dict(bn=(10, 60, 92), wn=(10, 80, 95)))).verdict == 'undecided'


def test_epochs_to_a_level():
    assert epochs_to(50, ((0, 60.),)) == 0 and epochs_to(50, ((0, 10.), (2, 50.))) == 2 and epochs_to(20,
        ((1, 0.), (2, 40.), (3, 0.), (4, 90.))) == 1.5
    assert math.isnan(epochs_to(50, ())) and math.isnan(epochs_to(50, ((0, 1.), (1, NAN))))


@pytest.mark.parametrize('wn, verdict, premise', [((0., 0., 0.3), 'supported', 'met'), ((0., 0., -0.3), 'contradicted', 'met'),
                                                  ((0.2, 0.2, 0.6), 'supported', 'not met by the init'),
                                                  ((-0.2, -0.2, -0.6), 'contradicted', 'not met by the init'),
                                                   ((0.05, 0.05, 0.6), 'supported', 'undecided')])
def test_c7_the_trend_decides_and_the_premise_stands_apart(tmp_path, wn, verdict, premise):
    runs, folder = write(tmp_path, (BN, WN), slopes=dict(bn=(0., 0., 0.), wn=wn))
    for name, k in zip(runs.run[runs.norm == 'wn'], (0.9, 1., 1.1), strict=True):  # seeds differ in how far they rise
        path = folder/name/'metrics.jsonl'
        probe = dict(event='probe', step=3, epoch=3, outputs=dict(layer=[f'layer{i}.0' for i in range(4)],
            rms=[10**(k*wn[-1]*i) for i in range(4)]))
        path.write_text(path.read_text()+to_json(probe)+'\n')
    found = CLAIMS['C7'].decide(runs, folder)
    assert found.verdict == verdict and set(found.numbers.scheme) == {'wn', 'bn'} and f'premise {premise}' in found.why
    assert found.numbers.set_index(['what', 'scheme']).loc[('slope before training', 'wn')].value == pytest.approx(wn[0], abs=0.002)


def test_a_premise_that_training_loses():
    flat, steep = mean_interval([0., 0.01, -0.01]), mean_interval([0.3, 0.31, 0.32])
    assert [premise(*pair) for pair in ((flat, flat), (flat, steep), (steep, flat), (mean_interval([0., 0.1, 0.2]), flat))] == ['met',
        'lost', 'not met by the init', 'undecided']


def test_c7_without_probes_or_with_one_seed(tmp_path):
    assert CLAIMS['C7'].decide(*write(tmp_path/'a', (BN, WN), dict(bn=(1, 2), wn=(1, 2)))).verdict == 'not tested'
    assert CLAIMS['C7'].decide(*write(tmp_path/'b', (WN[:1],), slopes=dict(wn=(0., 0., 1.)))).verdict == 'undecided'


UP = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.4, 0.3], [0.2, 0.1, 0.3, 0.4]]

@pytest.mark.parametrize('coherence, verdict', [(UP, 'supported'), ([c[::-1] for c in UP], 'contradicted'),
                                                ([UP[0], UP[0][::-1], UP[1]], 'undecided'), (UP[:1]*3, 'undecided'),
                                                ([[0.1]*4]*3, 'not tested'), (None, 'not tested')])
def test_c8_ranks_layers(tmp_path, coherence, verdict):
    found = CLAIMS['C8'].decide(*write(tmp_path, (WN,), slopes=dict(wn=(0., 0.)), coherence=coherence))
    assert found.verdict == verdict and (verdict == 'not tested' or 'in training' in found.why)


def test_c8_of_places_that_disagree_is_not_informative(tmp_path):
    runs, folder = write(tmp_path, (WN,), slopes=dict(wn=(0., 0.)))
    layer = [f'layer{i}.0.conv{k}' for i in range(1, 5) for k in (1, 2)]
    for seed, name in enumerate(WN.run):
        means = [c for pair in zip(UP[seed], UP[seed][::-1], strict=True) for c in pair]
        outputs = dict(layer=['conv1', *(n for i in range(1, 5) for n in (f'layer{i}.0.conv1', f'layer{i}.0.conv2', f'layer{i}.0'))],
                       rms=[1., *(x for k in (1, 2, 3, 4) for x in (k, k*k, 1.))])
        lines = [to_json(dict(event='probe', step=e, epoch=e, outputs=outputs, coherence=dict(layer=layer, mean=means))) for e in (0, 1)]
        (folder/name/'metrics.jsonl').write_text('\n'.join(lines)+'\n')
    found = CLAIMS['C8'].decide(load_runs(folder), folder)
    assert (found.verdict, found.note) == ('not testable here', 'not informative: the sign differs between places in a block') and 'conv1' in found.why and 'conv2' in found.why


def test_first_and_last_slope_of_a_course():
    history = RunHistory(growth=tuple((epoch, slope) for epoch, slope in enumerate([0.1, 0.3]+[0.5]*18+[1.])))
    assert early(history) == pytest.approx((0.1+0.3+0.5)/3) and rise(history) == pytest.approx(1-0.3)
    assert math.isnan(early(RunHistory())) and math.isnan(rise(RunHistory(growth=((0, 1.),))))


def test_a_first_block_that_shrinks_or_does_not_is_told():
    def ratios(*ends): return [first_block_ratio(RunHistory(first=((0, 2.), (1, 0.1), (5, end)))) for end in ends]
    assert ratios(1., 4.) == [0.5, 2.] and all(math.isnan(first_block_ratio(history))
                                               for history in (RunHistory(), RunHistory(first=((1, 2.), (5, 1.))),
                                                               RunHistory(first=((0, 0.), (5, 1.)))))
    grew, shrank, unclear = (mean_interval(ratios(*ends)) for ends in ((8., 8.4, 8.8), (1., 1.1, 1.2), (1., 2., 3.)))
    assert [trend_note('supported', e) for e in (grew, shrank, unclear)] == ['slope rises from its early value; no vanishing seen',
        'slope rises from its early value; first block shrinks', 'slope rises from its early value']
    assert trend_note('undecided', grew) == ''


def test_growth_of_silent_broken_or_few_blocks_is_unknown():
    for rms in ([1., 0., 1.], [1., math.inf, 1.], [1., NAN, 1.], [1., 2.]):
        assert math.isnan(growth(dict(layer=[f'layer1.{i}' for i in range(len(rms))], rms=rms)))


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50'])
def test_gains_follow_the_network_of_timm(arch):
    import timm, torch
    seen = {}
    def hook(name):
        def see(module, args, output): seen[name] = [x.square().mean().sqrt().item() for x in (args[0], output)]
        return see
    model = timm.create_model(arch, num_classes=10, norm_layer=lambda channels, **kwargs: torch.nn.Identity(),
                              act_layer=torch.nn.Identity).eval()
    model.maxpool = torch.nn.Identity()
    for name, module in probed_layers(model).items(): module.register_forward_hook(hook(name))
    torch.manual_seed(0)
    model(torch.randn(2, 3, 64, 64))
    found = gains(dict(layer=list(seen), rms=[output for _, output in seen.values()]))
    assert set(found) == {name for name in seen if '.conv' in name or 'downsample' in name}
    assert all(found[name] == pytest.approx(seen[name][1]/seen[name][0], rel=1e-4)
               for name in found)  # without activations the recorded output is the input


# C5

BASE_WN = runs_of('wn', [94.0, 93.1, 94.6, 93.8, 93.9], [95., 95., 95., 95., 95.1])
BASE_BN = runs_of('bn', [97.1, 97.4, 96.9, 97.2, 97.3], [95., 95., 95., 95., 95.1])
def cell(norm, held, top1, **setting): return table(tuned(norm, {0.1: [held]}, **setting), runs_of(norm, top1, **setting))
GRID_BN = cell('bn', 96., list(BASE_BN.top1)), cell('bn', 95., [96.0, 96.2, 95.9, 96.1, 96.0], dropout=0.5)

def c5(*cells): return decide('C5', *GRID_BN, cell('wn', 92., list(BASE_WN.top1)), *cells)

def test_c5_recovery_decides():
    some, most, all_of_it = (cell('wn', 95., [x+shift for x in (-0.1, 0.1, 0., 0.2, -0.2)], dropout=0.5) for shift in (94.6, 96.6, 97.2))
    assert [c5(some).verdict, c5(most).verdict, c5(all_of_it).verdict] == ['supported', 'contradicted', 'contradicted']
    assert 'dropout 0.5' in c5(some).why and 'decay on all' in c5(some).why and len(c5(some).runs) == 20


def test_c5_needs_c1_and_both_grids():
    one = cell('wn', 95., [94.6, 94.9, 94.4, 94.7, 94.5], dropout=0.5)
    assert decide('C5', BASE_BN, BASE_WN).verdict == 'not tested' and 'hold-out records to choose by' in decide('C5', BASE_BN, BASE_WN).why
    assert decide('C5', BASE_BN, cell('wn', 92., list(BASE_WN.top1)), one).verdict == 'not tested'  # no grid of bn
    swapped = decide('C5', *SWAPPED)
    assert (swapped.verdict, swapped.note) == ('not testable here', 'no gap to close, as C1 is contradicted') and decide('C5', BN).verdict == 'not tested'
    assert c5(one.assign(image_size=64)).verdict == 'not tested' and c5(one.assign(decay_on='v+w')).verdict == 'not tested'


def test_c5_cells_are_chosen_on_the_hold_out_split():
    flattering, honest = cell('wn', 91., [99.4, 99.6, 99.5, 99.3, 99.5], weight_decay=1e-3), cell('wn', 95., [94.6, 94.9, 94.4, 94.7, 94.5],
        dropout=0.5)
    assert c5(flattering, honest).verdict == 'supported' and 'wn at dropout 0.5' in c5(flattering, honest).why
    assert 'wn at dropout 0, weight_decay 0.0001, of 2 cells' in c5(cell('wn', 90., [99.]*5, dropout=0.3)).why and c5(cell('wn', 90.,
        [99.]*5, dropout=0.3)).verdict == 'supported'


def test_an_unbounded_recovery_is_undecided():
    near = [97.0, 97.5, 96.5, 97.2, 96.8]
    verdict, p, recovery, _ = recovery_ruling([x+0.1 for x in near], near, [2*x-96.9 for x in near])
    assert math.isinf(recovery.high) and verdict in ('undecided', 'contradicted')
    wide = [90., 100., 95., 97., 93.]
    assert recovery_ruling([x+1 for x in wide], wide, [x+2 for x in wide[::-1]])[0] == 'undecided'


# C6

RUNGS = [16/2**k for k in range(14)]

def ladder(norm, *limits, survives=16., **other):
    "One seed per limit: learns up to it, and is stuck above as far as it survives; down to the second rung that learns"
    config = dict(max_steps=220, epochs=220, train_images=640, warmup_epochs=1.) | other
    def rung(lr): return runs_of(norm, [50. if lr <= survives else NAN for _ in limits], lr=lr, **config).assign(
        verdict=['learning' if lr <= x else 'stuck' if lr <= survives else 'diverged' for x in limits], keep=[lr >= x/2 for x in limits])
    return table(*map(rung, RUNGS)).query('keep').drop(columns='keep')


def test_ends_of_a_bracket_are_the_rung_that_learns_and_the_next_higher_one():
    found = limits_of(complete(ladder('wn', 0.5, 2., survives=4.)))
    assert found[['below', 'above', 'no_divergence', 'exceptions']].values.tolist() == [[0.5, 1., 4., 0], [2., 4., 4., 0]]
    assert limits_of(complete(ladder('wn', 16.)))[['below', 'above']].values.tolist() == [[16., math.inf]]
    assert limits_of(complete(ladder('wn', 0.)))[['below', 'above']].values.tolist() == [[0., RUNGS[-1]]]


@pytest.mark.parametrize('tried, learns, above, exceptions', [
    ({16: 0, 8: 0, 4: 1, 2: 1}, 4, 8, []), ({16: 1, 8: 1}, 16, math.inf, []), ({16: 0, 8: 1, 4: 0, 2: 1, 1: 1}, 2, 4, [8]),
    ({8: 0, 4: 1, 2: 1, 1: 0}, 4, 8, [1]),
    ({16: 0, 8: 1}, 0, 8, [8]), ({16: 0, 4: 1, 1: 1}, 0, 1, [4, 1]), ({}, 0, math.inf, [])])
def test_two_rungs_in_a_row(tried, learns, above, exceptions):
    assert largest_lr({lr: bool(ok) for lr, ok in tried.items()}) == (learns, above, exceptions)


@pytest.mark.parametrize('bn, wn, verdict', [
    ((4, 4, 4), (0.25, 0.25, 0.25), 'supported'), ((0.25, 0.25, 0.25), (4, 4, 4), 'contradicted'), ((1, 1, 1), (1, 1, 1), 'undecided'),
    ((1, 2, 1), (0.5, 2, 1), 'undecided'),
    ((16, 16, 16), (0.25, 0.5, 0.25), 'supported'), ((4,), (0.25,), 'undecided'), ((4, 4), (0.25, 0.25), 'undecided'),
    ((0, 0, 0), (4, 4, 4), 'contradicted'), ((0, 0, 0), (0, 0, 0), 'undecided')])
def test_c6_compares_the_largest_lr_that_learn(bn, wn, verdict):
    found = decide('C6', ladder('bn', *bn), ladder('wn', *wn))
    assert found.verdict == verdict and found.kind == 'analogue' and found.exploratory
    assert {'largest lr that learns', 'next higher rung', 'largest lr that does not diverge',
            'ratio of the largest lr that learn'} <= set(found.numbers.what)


@pytest.mark.parametrize('survives', (16., 1.))
def test_a_stuck_run_never_counts_as_stable(survives):
    "bn learns nowhere, however high the learning rate at which it does not diverge"
    found = decide('C6', ladder('bn', 0, 0, 0), ladder('wn', 0.5, 0.5, 0.5, survives=survives))
    assert found.verdict != 'supported' and found.numbers.set_index(['what', 'scheme']).value['largest lr that does not diverge',
        'bn (torch)'] == pytest.approx(16)


def test_c6_judges_the_arms_of_the_primary_comparison():
    finals = [part.assign(init=init) for part, init in zip(CLEAR, ('torch', 'torch'), strict=True)]
    ladders = ladder('bn', 1, 1, 1), ladder('wn', 8, 8, 8), ladder('wn', 0.125, 0.125, 0.125, init='torch')
    assert decide('C6', *ladders).verdict == 'contradicted' and decide('C6', *ladders, *finals).verdict == 'supported'
    assert decide('C6', ladders[0], ladders[1], *finals).verdict == 'not tested'
    assert 'wn (norm_preserving)' in set(decide('C6', *ladders, *finals).numbers.scheme)


def test_short_probes_are_not_judged_but_told():
    short = decide('C6', ladder('bn', 4, 4, 4, max_steps=100), ladder('wn', 1, 1, 1, max_steps=100))
    assert short.verdict == 'not tested' and 'probes are on record that spent fewer than 200 steps at full lr' in short.why and 'bn 6 of 12; wn 6 of 18' in short.why
    assert decide('C6', ladder('bn', 4, 4, 4, epochs=20), ladder('wn', 1, 1, 1,
        epochs=20)).verdict == 'not tested'  # the schedule has let the lr fall
    assert decide('C6', ladder('bn', 4, 4, 4, grad_clip=1.), ladder('wn', 1, 1, 1)).verdict == 'not tested' and decide('C6', BN,
        WN).verdict == 'not tested'


def test_an_interrupted_ladder_is_left_out():
    whole = ladder('wn', 1, 1, 1)
    cut = whole[~((whole.seed == 2) & (whole.lr < 1))]
    assert limits_of(complete(cut)).seed.tolist() == [0, 1] and limits_of(complete(whole.assign(status=whole.status.where(whole.seed < 2,
        'interrupted')))).seed.tolist() == [0, 1]


# C9 to C11

def test_c9_needs_the_shallow_network_on_cifar10():
    net = dict(data='cifar10', arch='cifar10_nv')
    bn, wn = runs_of('bn', [90., 90.3, 90.1], [100., 100., 99.9], **net), runs_of('wn', [91.6, 91.9, 91.5], [100., 99.9, 100.], **net)
    np = runs_of('np', [89.0, 89.2, 89.1], [100., 99.9, 100.], **net)
    assert [decide('C9', *p).verdict for p in ((bn, wn, np), (bn, np), (bn, wn.assign(train_top1=99.5)), (bn, wn.assign(train_top1=99.4)),
                                               (bn[:1], wn[:1]))] == ['supported', 'contradicted', 'supported', 'undecided', 'undecided']
    assert decide('C9', bn, wn).kind == 'analogue' and decide('C9', bn, wn, np.assign(train_top1=60.)).verdict == 'undecided'
    assert [decide('C9', *(part.assign(**other) for part in (bn, wn))).verdict for other in (dict(arch='resnet18'),
        dict(data='digits'))] == ['not tested']*2


def test_the_scheme_of_c9_is_chosen_on_the_hold_out_split():
    net = dict(data='cifar10', arch='cifar10_nv')
    parts = [runs_of(norm, top1, [100., 99.9, 100.], **net) for norm, top1 in (('bn', [90., 90.3, 90.1]), ('wn', [91.6, 91.9, 91.5]),
        ('np', [89.0, 89.2, 89.1]))]
    held = [tuned(norm, {0.1: [score]}, **net) for norm, score in (('wn', 80.), ('np', 85.))]
    found = decide('C9', *parts, *held)
    assert found.verdict == 'contradicted' and 'best WN-type scheme on the hold-out split: np' in found.why


def cost_verdicts(folder, **changes):
    "C10 and C11 on three processes of ten rounds: bn 1.2 times none, wn 1.05, np 1.1"
    jitter = numpy.linspace(1, 1.002, 10)
    record = dict(arch='resnet18', image_size=32, batch_size=8, precision='fp32', channels_last=True, device='cpu', hardware='x',
                  seconds={norm: (times*jitter**k).tolist() for k, (norm, times) in enumerate(dict(none=1., bn=1.2, wn=1.05,
                      np=1.1).items())})
    seconds = record['seconds'] | changes.pop('seconds', {})
    (folder/'cost').mkdir(exist_ok=True)
    for k, factor in enumerate(numpy.linspace(0.9995, 1.0005, changes.pop('processes', 3))):
        own = {norm: [t*factor**j for t in times] for j, (norm, times) in enumerate(seconds.items())}
        (folder/'cost'/f'{len(list((folder/"cost").iterdir()))}.json').write_text(json.dumps(record | changes | dict(seconds=own)))
    return [CLAIMS[key].decide(table(BN, WN), folder/'cost') for key in ('C10', 'C11')]

@pytest.mark.parametrize('seconds, c10, c11', [({}, 'supported', 'supported'), (dict(wn=[1.3]*10), 'supported', 'contradicted'),
                                               (dict(wn=[1.2132]*10), 'supported', 'undecided'),
    (dict(bn=numpy.linspace(1.03, 1.031, 10).tolist()), 'contradicted', 'contradicted'), (dict(bn=[1.053]*10), 'undecided', 'contradicted'),
    (dict(bn=numpy.linspace(1.041, 1.042, 10).tolist()), 'contradicted', 'contradicted'),
                                               (dict(bn=numpy.linspace(1.063, 1.064, 10).tolist()), 'supported',
                                                'contradicted')])  # 4 and 6 % of a step
def test_cost_is_decided_over_processes(seconds, c10, c11, tmp_path):
    verdicts = cost_verdicts(tmp_path, seconds=seconds)
    assert [v.verdict for v in verdicts] == [c10, c11] and {v.kind for v in verdicts} == {'analogue'} and all('not the claim itself' in v.where for v in verdicts)

def test_one_process_decides_nothing_and_the_papers_own_network_goes_first(tmp_path):
    one = cost_verdicts(tmp_path, processes=1)
    assert [v.verdict for v in one] == ['undecided']*2 and all('in 1 process' in v.why for v in one) and '16.7 (' in one[0].why
    own = cost_verdicts(tmp_path, arch='resnet50', image_size=224, device='cuda')
    assert [(v.verdict, v.kind) for v in own] == [('supported', 'claim')]*2
    assert own[0].numbers.value[0] == pytest.approx(100*(1-1/1.2),
                                                    abs=0.1) and (own[0].numbers.low < own[0].numbers.value).all() and (own[0].numbers.value < own[0].numbers.high).all()
    assert all('resnet50' in v.where and 'analogue' not in v.where for v in own)

@pytest.mark.parametrize('wn, verdict', [([1.05]*10, 'supported'), ([1.2132]*10, 'undecided'), ([1.3]*10, 'contradicted')])
def test_cost_is_judged_in_every_precision(wn, verdict, tmp_path):
    cost_verdicts(tmp_path, precision='bf16', seconds=dict(wn=wn))
    c10, c11 = cost_verdicts(tmp_path)
    assert (c10.verdict, c11.verdict) == ('supported', verdict) and 'fp32 and bf16' in c11.where
    assert c11.why.index('in fp32 ') < c11.why.index('in bf16 ') and set(c11.numbers.what) == {f'step time over {norm}, {precision}'
        for norm in ('bn', 'none') for precision in ('fp32', 'bf16')}

def test_cost_of_two_networks_or_layouts_is_not_mixed(tmp_path):
    cost_verdicts(tmp_path, arch='resnet50', channels_last=False, precision='bf16', processes=2, seconds=dict(wn=[1.3]*10))
    cost_verdicts(tmp_path, arch='resnet18', precision='bf16', processes=2, seconds=dict(wn=[1.3]*10))
    c10, c11 = cost_verdicts(tmp_path, arch='resnet50')
    assert c11.verdict == 'supported' and 'bf16' not in c11.where and 'contiguous' not in c11.where and 'resnet50' in c11.where

@pytest.mark.parametrize('unusual', (dict(compile='network'), dict(compile='off'), dict(allocator={'MALLOC_MMAP_MAX_': '0'})))
def test_a_record_of_another_compiler_or_allocator_is_not_judged(unusual, tmp_path):
    assert [v.verdict for v in cost_verdicts(tmp_path, image_size=999, **unusual)] == ['not tested']*2
    assert len(cost_records(tmp_path/'cost', usual=False)) == 3
    assert [v.verdict for v in cost_verdicts(tmp_path)] == ['supported']*2

def test_cost_without_records_says_what_is_missing(tmp_path):
    (tmp_path/'cost').mkdir()
    whole = dict(arch='resnet18', image_size=32, batch_size=8, precision='fp32', channels_last=True, device='cpu', hardware='x')
    uneven, single = (json.dumps(whole | dict(seconds=s)) for s in (dict(none=[1.]*8, bn=[1.]*7, wn=[1.]*8), dict(none=1., bn=1., wn=1.)))
    for name, text in dict(torn='{"arch": ', list='[]', part='{"arch": "resnet18"}', uneven=uneven,
                           single=single).items(): (tmp_path/'cost'/f'{name}.json').write_text(text)
    for folder in (tmp_path/'cost', tmp_path/'elsewhere', None):
        for key in ('C10', 'C11'):
            verdict = CLAIMS[key].decide(table(BN, WN), folder)
            assert (verdict.verdict, verdict.kind, verdict.runs) == ('not tested', '', []) and 'papermill nbs/cost.ipynb' in verdict.why


# all claims, odd tables

def test_claims_are_complete_and_in_order():
    from nwrepro.results.claim_figures import FIGURES
    assert list(CLAIMS) == [f'C{i}' for i in range(1, 12)] and [v.key for v in judge(table(BN, WN), 'nowhere')] == list(CLAIMS)
    tags = dict(zip(CLAIMS, 'paper paper seed paper paper paper secondary secondary secondary paper paper'.split(), strict=True))
    for key, claim in CLAIMS.items():
        assert claim.key == key and claim.tag == tags[key] and all((claim.title, claim.short, claim.sentence, claim.observable, claim.rule))
        assert ('G&G state' in claim.sentence or 'G&G attribute' in claim.sentence) == (claim.tag == 'paper')
        assert ('second hand' in claim.sentence) == (claim.tag == 'secondary')
        assert 'our choice' in claim.rule.lower()
        assert claim.function.endswith(f'.decide_{key.lower()}')
    assert list(FIGURES) == list(CLAIMS)


ODD = dict(nothing=pandas.DataFrame(), names=pandas.DataFrame(columns=['run', 'status']),
           torn=pandas.DataFrame(dict(run=['a'], status=['started'])),
           diverged=table(BN, WN).assign(status='diverged', top1=NAN, train_top1=NAN),
           started=table(BN, WN).assign(status='started', top1=NAN),
           words=table(BN, WN).assign(top1='much', lr='fast'), no_source=table(BN, WN).assign(source=None),
           no_norm=table(BN, WN).assign(norm=None))

@pytest.mark.parametrize('name', ODD)
def test_tables_without_results_are_judged(name):
    verdicts = judge(ODD[name], 'nowhere')
    assert len(verdicts) == 11 and len(by_setting(ODD[name])) >= 0
    assert {v.verdict for v in verdicts} == {'not tested'} or name == 'no_source'
    assert all(v.why and v.numbers.columns[0] == 'what' and (v.verdict == 'not tested') == (not v.where) for v in verdicts)


@pytest.mark.parametrize('column', ['run', 'status', 'norm', 'init', 'lr', 'seed', 'top1', 'train_top1', 'dropout', 'max_steps', 'epochs',
                                    'recipe', 'data', 'weight_decay'])
def test_a_missing_column_never_raises(column):
    runs = table(BN, WN, ladder('bn', 1, 1, 1), ladder('wn', 0.125, 0.125, 0.125),
                 runs_of('wn', [94., 95., 96.], dropout=0.5)).drop(columns=column)
    assert len(judge(runs, 'nowhere')) == 11 and len(by_setting(runs)) >= 0


@pytest.mark.parametrize('damage', ['{"event": "eval", "epoch": 1, "train_to',
                                    'rubbish\n{"event": "eval", "step": 1, "epoch": 1, "train_top1": 5}\n',
                                    '{"event": "eval"}\n{"event": "train"}\n{"event": "probe"}\n'])
def test_a_torn_folder_is_left_out(tmp_path, damage):
    runs, folder = write(tmp_path, (BN, WN), dict(bn=(10, 60, 92), wn=(10, 80, 95)), dict(bn=(0., 0., 0.), wn=(0., 0., 1.)), UP)
    whole = {key: CLAIMS[key].decide(runs, folder).verdict for key in ('C1', 'C3', 'C8')}
    assert list(whole.values()) == ['supported']*3
    torn = folder/WN.run[0]
    (torn/'metrics.jsonl').write_text(damage)
    after = {key: CLAIMS[key].decide(load_runs(folder), folder) for key in ('C1', 'C8')}
    assert after['C1'].verdict == 'supported' and after['C8'].verdict == 'undecided' and 'n = 2' in after['C8'].why
    (torn/'config.json').write_text('{"norm": "w')
    assert CLAIMS['C1'].decide(load_runs(folder), folder).verdict == 'undecided'


def test_records_are_read_once_and_only_where_they_are_needed(tmp_path, monkeypatch):
    unneeded = runs_of('wn', [90.], lr=7.), runs_of('none', [95.]*3)
    runs, folder = write(tmp_path, (BN, WN, *unneeded), dict(bn=(10, 60, 92), wn=(10, 80, 95), none=(1, 2)), dict(bn=(0., 0.), wn=(0., 1.)))
    read = []
    def count(path):
        read.append(path.parent.name)
        return whole(path)
    whole = nwrepro.results.histories.read_metrics
    monkeypatch.setattr(nwrepro.results.histories, 'read_metrics', count)
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
    assert [ruling(Estimate(3, 1, *ends)) for ends in ((0.1, 2), (-2, -0.1), (-1, 1), (1, 1+1e-15), (NAN, NAN), (0.1, math.inf),
                                                       (-math.inf, math.inf))] == [
        'supported', 'contradicted', 'undecided', 'undecided', 'undecided', 'supported', 'undecided']
    assert [ruling(Estimate(3, 0, -0.5, 0.5), p) for p in (0.01, 0.2, NAN)] == ['equivalent', 'undecided', 'undecided']
