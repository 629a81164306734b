"""How sure is a number, and which differences are real?

All methods saw the same examples, so they are compared on the same resamples of them (the paired
bootstrap; Efron & Tibshirani 1993): what makes an example hard for all of them drops out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from captum_attn.errors import OptionError

__all__ = ["Difference", "Resamples", "Value", "differences_of", "value_of"]

Array = np.ndarray
AT_ONCE = 4_000_000  # random numbers drawn at a time


class Value(NamedTuple):
    """A method's number in one column.

    Attributes:
        method, metric (str): whose, and of what.
        value (float): over the whole data set.
        standard_error (float or None): None for a single example.
        low, high (float): the bootstrap interval.
        better ("higher", "lower" or None): which way is better.
        examples (int): how many.
    """

    method: str
    metric: str
    value: float
    standard_error: float | None
    low: float
    high: float
    better: str | None
    examples: int


class Difference(NamedTuple):
    """A method's number less another's, on the same examples.

    Attributes:
        metric, method, other (str): `method` less `other`.
        difference (float): over the whole data set.
        standard_error (float or None): of the difference.
        low, high (float): its bootstrap interval.
        p (float): two-sided, of no difference, by the bootstrap.
        adjusted_p (float): by Holm over all pairs of the metric.
        real (bool): whether `adjusted_p` is below 1 - confidence.
    """

    metric: str
    method: str
    other: str
    difference: float
    standard_error: float | None
    low: float
    high: float
    p: float
    adjusted_p: float
    real: bool


class Resamples:
    """Means over the data set, and over data sets drawn from it with replacement.

    Args:
        kept (Mapping): name -> (n, ...), what was kept of every example; anything hashable names.
        groups (sequence): n names of what belongs together; whole groups are drawn.
        count (int): R, how many are drawn.
        seed (int): of the draws.

    Attributes:
        means, drawn (dict): name -> (1, ...) and (R, ...).
    """

    def __init__(
        self, kept: Mapping[Any, Array], groups: Sequence[Any], count: int, seed: int
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 100:
            raise OptionError(f"resamples: expected a whole number of at least 100, got {count!r}")
        values = {name: np.asarray(v, dtype=np.float64) for name, v in kept.items()}
        self.shapes = {name: v.shape[1:] for name, v in values.items()}
        flat = np.concatenate([v.reshape(len(v), -1) for v in values.values()], 1)
        of_group: dict[Any, int] = {}
        self.group = np.array([of_group.setdefault(g, len(of_group)) for g in groups])
        total = np.zeros((len(of_group), flat.shape[1]))
        np.add.at(total, self.group, flat)
        sizes = np.bincount(self.group).astype(np.float64)
        self.means = self._named(flat.mean(0, keepdims=True))
        self.drawn = self._named(_drawn(total, sizes, count, seed))

    def _named(self, flat: Array) -> dict[Any, Array]:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        parts = np.split(flat, ends[:-1], axis=1)
        return {
            name: part.reshape(len(flat), *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def standard_error_of_mean(self, values: Array) -> float | None:
        """Of the mean of (n,): s / sqrt(n), or its form for groups."""
        count = int(self.group.max()) + 1
        if count < 2:
            return None
        off = np.bincount(self.group, values - values.mean())
        return float(np.sqrt(count / (count - 1) * (off**2).sum()) / len(values))


def _drawn(total: Array, sizes: Array, count: int, seed: int) -> Array:
    """Means (count, F) over drawn groups, whose sums are (G, F) and sizes (G,)."""
    rng, groups = np.random.default_rng(seed), len(total)
    at_once = max(1, AT_ONCE // groups)
    found = []
    for start in range(0, count, at_once):
        rows = min(at_once, count - start)
        picks = rng.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        times = np.bincount(picks.ravel(), minlength=rows * groups).reshape(rows, groups)
        times = times.astype(np.float64)
        found.append(times @ total / (times @ sizes)[:, None])
    return np.concatenate(found)


def interval(drawn: Array, confidence: float) -> tuple[float, float]:
    """The percentile interval of resampled numbers (R,)."""
    if not 0 < confidence < 1:
        raise OptionError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def value_of(
    name: tuple[str, str], point: float, drawn: Array, error: float | None, better: str | None,
    examples: int, confidence: float,
) -> Value:  # fmt: skip
    """A number with its interval."""
    low, high = interval(drawn, confidence)
    return Value(*name, point, error, low, high, better, examples)


def differences_of(
    metric: str,
    methods: Sequence[str],
    points: Array,
    drawn: Array,
    errors: Mapping[tuple[int, int], float | None],
    confidence: float,
) -> list[Difference]:
    """All pairs of methods, from their numbers (M,) and the resampled ones (M, R)."""
    pairs = [(i, j) for i in range(len(methods)) for j in range(i + 1, len(methods))]
    between = [_less(drawn[i], drawn[j]) for i, j in pairs]
    p = np.array([_two_sided(difference) for difference in between])
    found = []
    for (i, j), difference, own, all_in_all in zip(pairs, between, p, holm(p), strict=True):
        low, high = interval(difference, confidence)
        real = errors[i, j] is not None and bool(all_in_all < 1 - confidence)
        found.append(
            Difference(
                metric,
                methods[i],
                methods[j],
                float(points[i] - points[j]),
                errors[i, j],
                low,
                high,
                float(own),
                float(all_in_all),
                real,
            )  # fmt: skip
        )
    return found


def _less(one: Array, other: Array) -> Array:
    """The difference, without what rounding leaves of equal numbers."""
    difference = one - other
    noise = 1e-12 * max(np.abs(one).max(), np.abs(other).max())
    return np.where(np.abs(difference) <= noise, 0.0, difference)


def _two_sided(drawn: Array) -> float:
    """Twice the share of resamples beyond 0, counting the sample itself, 1 at most."""
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return min(1.0, 2 * (int(beyond) + 1) / (len(drawn) + 1))


def holm(p: Array) -> Array:
    """Holm's adjustment (1979): the k-th smallest of m times m + 1 - k, never falling."""
    order = np.argsort(p, kind="stable")
    raised = p[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(raised)) if len(p) else raised
    return adjusted
