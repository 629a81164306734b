"""Errors and differences against closed forms and scipy."""

import numpy as np
import pytest

from captum_attn.errors import OptionError
from captum_attn.evaluation.chance import by_bootstrap, by_swaps, groups_needed, holm
from captum_attn.evaluation.measures import METRICS
from captum_attn.evaluation.results import Results
from captum_attn.evaluation.statistics import Resamples
from tests.benchmarks import false_positives

RNG = np.random.default_rng(5)


def results(kept, metric="aopc", groups=None, **options):
    """{method: {name: (n, ...)}} as results of one metric."""
    of = {(method, metric): {k: np.asarray(v) for k, v in values.items()}
          for method, values in kept.items()}  # fmt: skip
    size = len(next(iter(next(iter(of.values())).values())))
    groups = groups if groups is not None else list(range(size))
    return Results(list(kept), {metric: METRICS[metric]}, of, groups, {}, **options)


def test_the_error_of_a_mean_is_the_textbooks():
    x = RNG.normal(2, 3, 50)
    value = results({"a": {"value": x}}).value("a", "aopc")
    assert value.value == pytest.approx(x.mean())
    assert value.standard_error == pytest.approx(x.std(ddof=1) / 50**0.5)
    assert value.low < x.mean() < value.high
    assert (value.high - value.low) / (2 * 1.96) == pytest.approx(value.standard_error, rel=0.05)


def test_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    x, y = RNG.exponential(1, 40), RNG.exponential(1, 40)
    found = results({"a": {"value": x}, "b": {"value": x + 0.3 * y}})
    for ours, sample in (
        (found.value("a", "aopc"), x), (found.differences("aopc")[0], -0.3 * y),
    ):  # fmt: skip
        theirs = stats.bootstrap((sample,), np.mean, method="percentile", n_resamples=9999)
        assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
        assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_ratios_are_resampled_whole():
    stats = pytest.importorskip("scipy.stats")
    union = RNG.integers(5, 60, (40, 2))
    inside = (union * RNG.uniform(0.2, 0.9, (40, 2))).astype(int)
    kept = {"correct": inside.sum(1), "labelled": union.sum(1), "intersection": inside,
            "union": union, "precision": RNG.uniform(size=40)}  # fmt: skip
    found = results({"a": kept}, "segmentation").value("a", "segmentation.mIoU")

    def mean_iou(a, b, c, d, axis):
        return (a.sum(axis) / b.sum(axis) + c.sum(axis) / d.sum(axis)) / 2

    sample = (inside[:, 0], union[:, 0], inside[:, 1], union[:, 1])
    theirs = stats.bootstrap(
        sample, mean_iou, paired=True, vectorized=True, method="percentile", n_resamples=9999
    )
    assert found.value == pytest.approx(mean_iou(*sample, axis=0))
    assert found.standard_error == pytest.approx(theirs.standard_error, rel=0.05)
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)


def test_pairs_share_their_examples():
    hard = RNG.normal(0, 10, 80)  # some examples are hard for both
    better = RNG.normal(0.5, 0.5, 80)
    found = results({"a": {"value": hard + better}, "b": {"value": hard}})
    difference = found.differences("aopc")[0]
    assert difference.difference == pytest.approx(better.mean())
    assert difference.standard_error == pytest.approx(better.std(ddof=1) / 80**0.5)
    assert difference.real and difference.p < 0.01 and difference.low > 0
    errors = [found.value(m, "aopc").standard_error for m in "ab"]
    assert min(errors) > 10 * difference.standard_error


def test_equal_methods_are_rarely_called_different():
    called = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        kept = {name: {"value": rng.normal(size=40)} for name in "abcd"}
        found = results(kept, resamples=1000)
        called += any(d.real for d in found.differences("aopc"))
    assert called <= 6  # 5 % of 40 families are expected; each has six pairs


def test_holm_by_hand():
    assert holm(np.array([0.03, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])
    assert holm(np.array([0.9, 0.4])) == pytest.approx([0.9, 0.8])


def test_groups_are_drawn_whole():
    scene = RNG.normal(0, 1, 30)
    twice = {"a": {"value": np.repeat(scene, 2)}}
    alone, together = results(twice), results(twice, groups=np.repeat(np.arange(30), 2).tolist())
    once = results({"a": {"value": scene}})
    error = [r.value("a", "aopc").standard_error for r in (alone, together, once)]
    assert error[1] == pytest.approx(error[2])
    assert error[0] == pytest.approx(error[2] / 2**0.5, rel=0.02)
    width = [r.value("a", "aopc").high - r.value("a", "aopc").low for r in (alone, together)]
    assert width[1] == pytest.approx(2**0.5 * width[0], rel=0.06)
    uneven = results({"a": {"value": [1.0, 3.0, 8.0]}}, groups=["x", "x", "y"])
    assert uneven.value("a", "aopc").value == 4  # examples count alike, not groups
    drawn = Resamples({"v": np.array([1.0, 3.0, 8.0])}, ["x", "x", "y"], 1000, 0).drawn["v"]
    assert set(np.round(drawn, 6)) == {2.0, 4.0, 8.0}


def test_one_example_has_no_error():
    found = results({"a": {"value": [3.0]}, "b": {"value": [1.0]}})
    assert found.value("a", "aopc").standard_error is None
    assert not found.differences("aopc")[0].real
    assert "n/a" in str(found)


def test_the_draws_are_seeded_and_need_enough():
    x = {"a": {"value": RNG.normal(size=20)}}
    low = [results(x, seed=s).value("a", "aopc").low for s in (0, 0, 1)]
    assert low[0] == low[1] != low[2]
    with pytest.raises(OptionError, match="resamples"):
        results(x, resamples=10).values("aopc")
    with pytest.raises(OptionError, match="columns"):
        results(x).values("saco")


# ------------------------------------------------------------------ is a difference real?
def test_swaps_are_scipys_permutation_test():
    stats = pytest.importorskip("scipy.stats")
    sizes = np.array([3.0, 1, 1, 5, 2, 2, 1, 4])
    totals = RNG.normal(0.4, 1, (8, 3)) * sizes[:, None]
    found = by_swaps(totals, 10_000, 0)
    for ours, own in zip(found, totals.T, strict=True):
        theirs = stats.permutation_test(
            (own, np.zeros(8)), lambda x, y, axis: (x - y).sum(axis) / sizes.sum(),
            permutation_type="samples", vectorized=True, n_resamples=np.inf,
        )  # fmt: skip
        assert ours == pytest.approx(theirs.pvalue)
    many = RNG.normal(0.2, 1, (40, 2))
    for ours, own in zip(by_swaps(many, 20_000, 0), many.T, strict=True):
        theirs = stats.permutation_test(
            (own, np.zeros(40)), lambda x, y, axis: (x - y).mean(axis),
            permutation_type="samples", vectorized=True, n_resamples=20_000, rng=1,
        )  # fmt: skip
        assert ours == pytest.approx(theirs.pvalue, abs=0.015)


def test_the_bootstrap_t_is_a_plain_loops():
    sizes = np.array([1.0, 4, 2, 2, 3, 1, 1, 6, 2, 2, 1, 5])
    totals = RNG.exponential(1, 12) * sizes - 0.3 * sizes

    def mean_and_error(t, n):
        mean, count = t.sum() / n.sum(), len(t)
        off = t - mean * n
        return mean, (count / (count - 1) * (off**2).sum()) ** 0.5 / n.sum()

    mean, error = mean_and_error(totals, sizes)
    drawn = []
    for picks in np.random.default_rng(3).integers(12, size=(20_000, 12)):
        m, e = mean_and_error(totals[picks], sizes[picks])
        drawn.append((m - mean) / e)
    beyond = min(np.mean(np.array(drawn) >= mean / error), np.mean(np.array(drawn) <= mean / error))
    assert by_bootstrap(totals[:, None], sizes, 20_000, 0)[0] == pytest.approx(2 * beyond, abs=0.01)


@pytest.mark.parametrize("kind", list(false_positives.DIFFERENCES))
@pytest.mark.parametrize("sizes", list(false_positives.SIZES))
def test_no_difference_is_called_real_less_than_6_times_in_100(kind, sizes, monkeypatch):
    """The script's simulation, in small: 1,000 data sets, so a standard error of 0.7."""
    monkeypatch.setattr(false_positives, "BATCHES", 5)
    monkeypatch.setattr(false_positives, "AT_ONCE", 200)
    monkeypatch.setattr(false_positives, "RESAMPLES", 999)
    for groups in (3, 5, 9):
        assert false_positives.rate(false_positives.DIFFERENCES[kind],
                                    false_positives.SIZES[sizes], groups) == 0  # fmt: skip
    for groups in (10, 20, 100):
        found = false_positives.rate(
            false_positives.DIFFERENCES[kind], false_positives.SIZES[sizes], groups, seed=1
        )
        assert found < 0.06 + 2 * 0.007


def test_the_signs_come_from_ten_groups_on_and_say_so():
    for n, enough in ((9, False), (10, True)):
        x = np.linspace(1, 2, n)
        found = results({"a": {"value": x}, "b": {"value": x - 0.9}})
        assert found.differences("aopc")[0].real == enough == ("*" in str(found).split("±")[1])
        assert ("No * and no ~: with 9 examples" in str(found)) == (not enough)
    grouped = results({"a": {"value": x}, "b": {"value": x - 0.9}}, groups=list("aabbccddee"))
    assert "with 5 groups no difference of 2 methods" in str(grouped) and "takes 10" in str(grouped)
    assert [groups_needed(m * (m - 1) // 2, 0.95) for m in (2, 7, 8, 23)] == [10, 10, 11, 14]


def test_many_methods_leave_room_for_a_real_difference():
    """More draws where Holm's correction asks for them: 276 pairs of 24 methods."""
    rng = np.random.default_rng(0)
    kept = {str(i): {"value": rng.normal(size=40)} for i in range(23)}
    kept["better"] = {"value": rng.normal(3, 1, size=40)}
    real = [d for d in results(kept, resamples=1000).differences("aopc") if d.real]
    assert {d.other for d in real} == {"better"} and len(real) == 23


def test_equal_methods_with_an_unlike_ratio_of_sums_are_exchangeable_too():
    assert false_positives.of_results(2, 12, runs=150, metric="segmentation") < 0.06 + 0.04


def test_a_few_large_differences_among_none():
    """One example differs: no test of the mean may call that real."""
    x = np.zeros(30)
    x[7] = 50.0
    found = results({"a": {"value": x}, "b": {"value": np.zeros(30)}}).differences("aopc")[0]
    assert found.p == 1.0 and not found.real
