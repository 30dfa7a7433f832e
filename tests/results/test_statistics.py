"What the lessons of the pages cannot show: arithmetic against other arithmetic, coverage and size, odd input"
import math, statistics

import numpy, pandas, pytest, scipy.stats
from hypothesis import given, strategies as st

from nwrepro.results.predictions import correct_predictions, crossed_gap, mcnemar, wilson
from nwrepro.training.runs import Run
from nwrepro.results.statistics import contrast, equivalence, fieller, format_mean, holm, mean_interval, paired, smallest_margin, threshold_gap, welch

NAN, INF = math.nan, math.inf


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
    assert '±' not in format_mean(values) and f'n = {n}' in format_mean(values) and all(f'{v:.2f}' in format_mean(values) for v in values)


def test_welch_against_a_published_example():
    a, b = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4]
    va, vb = statistics.variance(a)/6, statistics.variance(b)/4
    nu, error = (va+vb)**2/(va**2/5+vb**2/3), (va+vb)**0.5
    e, wide = welch(a, b), welch(a, b, 0.99)
    assert (e.n, e.value, e.p) == (4, pytest.approx(21-23.325), pytest.approx(2*scipy.stats.t.sf(2.325/error, nu)))
    assert (e.high-e.low, wide.high-wide.low) == pytest.approx(tuple(2*error*scipy.stats.t.ppf([0.975, 0.995], nu)))
    assert welch(b, a).low == pytest.approx(-e.high) and welch([a, a], [b, b]).low.tolist() == pytest.approx([e.low]*2)


def test_without_spread_or_runs_nothing_is_tested():
    for a, b in (([1., 2., 3.], [1., 2.]), ([], [1., 2., 3.]), ([5., 5., 5.], [4., 4., 4.])):
        assert math.isnan(welch(a, b).p) and math.isnan(equivalence(a, b, 1.))
    assert math.isnan(crossed_gap(numpy.ones((2, 9)), numpy.ones((2, 9))).low)


def test_paired_takes_the_seeds_that_both_have():
    e = paired(pandas.Series([3., 5., 8., 1.], [0, 1, 2, 9]), pandas.Series([1., 2., 4., 7.], [2, 1, 0, 8]))
    assert (e.n, e.value) == (3, pytest.approx((-1+3+7)/3))


# equivalence

@given(st.lists(st.floats(-3, 3), min_size=3, max_size=6), st.lists(st.floats(-3, 3), min_size=3, max_size=6), st.floats(0.1, 5))
def test_equivalent_means_that_the_90_percent_interval_is_inside_the_margin(a, b, margin):
    if numpy.ptp(a)+numpy.ptp(b) < 1e-3: return
    e, p = welch(a, b, 0.9), equivalence(a, b, margin)
    inside = -margin < e.low and e.high < margin
    assert inside == (p < 0.05) or min(abs(e.low+margin), abs(e.high-margin)) < 1e-6
    assert smallest_margin(a, b) == pytest.approx(max(-e.low, e.high))


def test_equivalence_depends_on_the_margin():
    a, b = [70.1, 70.3, 69.9, 70.2, 70.0], [70.0, 70.2, 70.1, 69.9, 70.4]
    assert equivalence(a, b, 1.) < 0.05 < equivalence(a, b, 0.1) and equivalence(a, b, 0.5) > equivalence(a, b, 1.)


def test_equivalence_is_claimed_in_at_most_one_of_twenty_at_the_margin():
    random = numpy.random.default_rng(1)
    for n in (3, 5): assert (equivalence(random.normal(1, 0.3, (10_000, n)), random.normal(0, 0.3, (10_000, n)), 1.) < 0.05).mean() <= 0.055


# families

def test_holm_against_his_example():
    assert holm(pandas.Series([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(pandas.Series([0.9, 0.8])).tolist() == [1, 1] and holm(pandas.Series([], dtype=float)).empty


def test_a_member_that_was_not_tested_counts_in_the_family():
    adjusted = holm(pandas.Series([0.02, NAN, 0.03], ['C1', 'C2', 'C3']))
    assert adjusted[['C1', 'C3']].tolist() == pytest.approx([0.06, 0.06]) and math.isnan(adjusted['C2'])


def test_a_family_without_truth_is_wrong_in_at_most_one_of_twenty():
    random = numpy.random.default_rng(2)
    for n in (3, 5):
        p = welch(random.normal(size=(7, 2000, n)), random.normal(size=(7, 2000, n))).p
        found = numpy.mean([holm(pandas.Series(family)).min() < 0.05 for family in p.T])
        assert found <= 0.055 < 0.15 < (p.min(0) < 0.05).mean()


# ratios

def test_fieller_inverts_the_contrast():
    random = numpy.random.default_rng(3)
    wn_star, wn, bn_star = (random.normal(mean, 0.4, 6) for mean in (68.5, 67, 73))
    e = fieller(wn_star, wn, bn_star)
    assert e.value == pytest.approx((wn_star.mean()-wn.mean())/(bn_star.mean()-wn.mean()))
    for r in (e.low, e.high): assert abs(contrast([wn_star, wn, bn_star], [1, r-1,
        -r]).p-0.05) < 0.02  # one number of degrees of freedom for all r


def test_fieller_of_two_independent_means_without_noise_in_the_base():
    e = fieller([1., 1.2, 0.8], [0., 0., 0.], [10., 10., 10.])
    t = scipy.stats.t.ppf(0.975, 2)*0.2/3**0.5
    assert (e.low, e.high) == pytest.approx(((1-t)/10, (1+t)/10))


def test_a_ratio_to_a_gap_that_may_be_0_is_unbounded():
    assert fieller([1., 2., 3.], [0., 1., 2.], [0.5, 1.5, 2.])[2:4] == (-INF, INF)
    assert math.isnan(fieller([1., 2.], [0., 1., 2.], [5., 6., 7.]).low)


@pytest.mark.parametrize('n', (3, 5))
def test_fieller_holds_the_truth(n):
    random, found = numpy.random.default_rng(4), []
    for _ in range(4000):
        e = fieller(random.normal(1, 0.5, n), random.normal(0, 0.5, n), random.normal(4, 0.5, n))
        found.append(e.low <= 0.25 <= e.high)
    assert numpy.mean(found) >= 0.94


# thresholds

def rungs(*works): return tuple((lr, 2*lr) for lr in works)

def test_a_threshold_gap_is_as_wide_as_its_rungs():
    e = threshold_gap(rungs(2, 2, 2), rungs(0.25, 0.25, 0.25))
    assert e.low < math.log(4) and e.high > math.log(16) and e.value == pytest.approx(math.log(8), abs=0.05)
    assert threshold_gap(rungs(0.25, 0.25, 0.25), rungs(2, 2, 2))[2:4] == pytest.approx((-e.high, -e.low))


def test_ends_of_a_bracket_are_not_exchanged():
    "A rung that works bounds the threshold from below, the next one from above"
    e = threshold_gap(rungs(4, 4, 4), ((0.001, 4.),)*3)
    assert e.high > math.log(8/0.01) and -0.2 < e.low < 0.2
    wrong = threshold_gap(((8., 4.),)*3, rungs(0.5, 0.5, 0.5))
    assert wrong.value != pytest.approx(threshold_gap(rungs(4, 4, 4), rungs(0.5, 0.5, 0.5)).value, abs=0.01)


def test_open_ladders_leave_an_end_open():
    top = threshold_gap(((16., INF),)*3, rungs(1, 1, 2))
    assert math.isinf(top.high) and 0 < top.low < INF and top.p < 0.05 and math.isnan(top.value)
    none = threshold_gap(rungs(1, 1, 2), ((0., 0.01),)*3)
    assert math.isinf(none.high) and none.low > 0
    both = threshold_gap(((16., INF),)*3, ((16., INF),)*3)
    assert (both.low, both.high) == (-INF, INF) and both.p > 0.9
    assert math.isnan(threshold_gap((), rungs(1)).value) and math.isnan(threshold_gap(rungs(1), rungs(1)).low)


@pytest.mark.parametrize('n', (3, 5))
def test_thresholds_known_to_a_tenth_of_a_standard_deviation_give_students_interval(n):
    random = numpy.random.default_rng(5)
    a, b = random.normal(1, 1, n), random.normal(0, 1, n)
    def brackets(x): return tuple((math.exp(v-0.05), math.exp(v+0.05)) for v in x)
    e, student = threshold_gap(brackets(a), brackets(b)), scipy.stats.ttest_ind(a, b)
    low, high = student.confidence_interval()
    assert (e.low, e.high) == (pytest.approx(low, abs=0.25), pytest.approx(high, abs=0.25)) and e.p == pytest.approx(student.pvalue,
        abs=0.05)


# predictions

@pytest.mark.parametrize('right, images, low, high', [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0, 16.11),
                                                      (1, 29, 0.61, 17.18)])
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
    share = scipy.stats.beta.ppf([0.025, 0.975], [first, first+1],
                                 [second+1, second])  # Clopper and Pearson's ends are quantiles of two beta distributions
    low, high = 100*n/len(a)*(2*numpy.where(numpy.isnan(share), [0, 1], share)-1)
    assert (e.low, e.high) == (pytest.approx(low), pytest.approx(high))
    assert (e.low > 0 or e.high < 0) == (e.p < 0.05)


def test_mcnemar_refuses_other_images_and_knows_twins():
    a = pandas.Series([True, False], ['x', 'y'])
    assert mcnemar(a, a)[1:4] == (0, 0, 0) and mcnemar(a, a).p == 1
    assert mcnemar(a, a[::-1]).p == 1
    with pytest.raises(ValueError, match='2 images were shown to one'): mcnemar(a, pandas.Series([True, False], ['x', 'z']))


def test_answers_are_those_of_the_run(tmp_path):
    run = Run('one', tmp_path)
    run.begin(dict(source=dict(fingerprint='f00')), {})
    run.predictions([('a', 1, 1), (1, 2, 0)])
    assert correct_predictions('one', tmp_path).to_dict() == {'f00 a': True, 'f00 1': False}


def test_places_in_two_sources_are_not_the_same_image(tmp_path):
    for name in ('one', 'two'):
        run = Run(name, tmp_path)
        run.begin(dict(source=dict(fingerprint=name)), {})
        run.predictions([(0, 1, 1), (1, 2, 0)])
    with pytest.raises(ValueError, match='4 images were shown to one'): mcnemar(correct_predictions('one', tmp_path),
        correct_predictions('two', tmp_path))


def test_other_images_widen_a_gap_and_different_ones_are_refused():
    random = numpy.random.default_rng(6)
    a, b = (random.random((4, 50)) < p for p in (0.7, 0.5))
    e, seeds = crossed_gap(a, b), welch(100*a.mean(1), 100*b.mean(1))
    half = 1.96*100*(a.mean(0)-b.mean(0)).std(ddof=1)/50**0.5
    assert (e.value, e.high-e.value) == (pytest.approx(seeds.value), pytest.approx(math.hypot(seeds.high-seeds.value, half), rel=1e-4))
    with pytest.raises(ValueError, match='50 and 49 images: compare runs on the same images'): crossed_gap(a, b[:,1:])
