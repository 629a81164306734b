"""Errors and differences against closed forms and scipy."""

import numpy as np
import pytest

from captum_attn.errors import OptionError
from captum_attn.evaluation.measures import METRICS
from captum_attn.evaluation.results import Results
from captum_attn.evaluation.statistics import Resamples, holm

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
