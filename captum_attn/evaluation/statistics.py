"""How sure is a number, and which differences are real?

All methods saw the same examples, so they are compared on the same ones: what makes an example hard
for all of them drops out. Errors are the textbook's, intervals those of the bootstrap (Efron &
Tibshirani 1993), and `chance` says which differences are real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from captum_attn.errors import OptionError
from captum_attn.evaluation.chance import (
    NOISE,
    errors_of,
    groups_needed,
    holm,
    p_values,
    resamples_of,
)

__all__ = ["Difference", "Numbers", "Resamples", "Value", "differences_of", "values_of"]

Array = np.ndarray


class Value(NamedTuple):
    """A method's number in one column.

    Attributes:
        method, metric (str): whose, and of what.
        value (float): over the whole data set.
        standard_error (float or None): None for a single example.
        low, high (float): the percentile interval of the bootstrap; too narrow for few groups.
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
        low, high (float): the percentile interval of the bootstrap; too narrow for few groups.
        p (float): two-sided, of no difference, see `captum_attn.evaluation.chance`.
        adjusted_p (float): by Holm over all pairs of the metric.
        real (bool): whether `adjusted_p` is below 1 - confidence, of at least `groups_needed`
            groups.
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
    """Means over the data set, over data sets drawn from it, and over all groups but one.

    Args:
        kept (Mapping): name -> (n, ...), what was kept of every example; anything hashable names.
        groups (sequence): n names of what belongs together; whole groups are drawn.
        count (int): R, how many are drawn.
        seed (int): of the draws.

    Attributes:
        means, drawn, without (dict): name -> (1, ...), (R, ...) and (G, ...).
        sizes (Array): (G,), how many examples each group has.
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
        group = np.array([of_group.setdefault(g, len(of_group)) for g in groups])
        total = np.zeros((len(of_group), flat.shape[1]))
        np.add.at(total, group, flat)
        self.sizes = np.bincount(group).astype(np.float64)
        times = resamples_of(len(total), count, seed)
        self.means = self._named(flat.mean(0, keepdims=True))
        self.drawn = self._named(
            np.concatenate([t @ total / (t @ self.sizes)[:, None] for t in times])
        )
        rest = self.sizes.sum() - self.sizes
        alone = len(rest) < 2  # then there is nothing to leave out
        mean = flat.mean(0, keepdims=True)
        self.without = self._named(mean if alone else (total.sum(0) - total) / rest[:, None])

    def _named(self, flat: Array) -> dict[Any, Array]:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        parts = np.split(flat, ends[:-1], axis=1)
        return {
            name: part.reshape(len(flat), *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


class Numbers(NamedTuple):
    """A column of M methods.

    Attributes:
        points (Array): (M,), over the data set.
        drawn (Array): (R, M), over the resamples.
        totals (Array): (G, M), what each group adds: their sum over that of the sizes is the
            number. Of a mean it is the group's sum, of a ratio of means what it is to first order
            (the jackknife's pseudo-values; Efron & Tibshirani 1993, chapter 11).
        sizes (Array): (G,), examples of each group.
    """

    points: Array
    drawn: Array
    totals: Array
    sizes: Array

    @classmethod
    def of(cls, points: Array, drawn: Array, without: Array, sizes: Array) -> Numbers:
        """From the numbers over all groups but one, (G, M)."""
        rest = (sizes.sum() - sizes)[:, None]
        return cls(points, drawn, points * sizes[:, None] + (points - without) * rest, sizes)

    def less(self, one: Sequence[int], other: Sequence[int]) -> Numbers:
        """Differences of methods, without what rounding leaves of equal numbers."""
        points, drawn, totals = (
            _less(values[..., one], values[..., other])
            for values in (self.points, self.drawn, self.totals)
        )
        return Numbers(points, drawn, totals, self.sizes)

    @property
    def errors(self) -> list[float | None]:
        """Standard errors; None where there is one group only."""
        if len(self.sizes) < 2:
            return [None] * len(self.points)
        return errors_of(self.totals, self.sizes).tolist()


def _less(one: Array, other: Array) -> Array:
    difference = one - other
    noise = NOISE * np.maximum(np.abs(one), np.abs(other)).max(initial=0.0)
    return np.where(np.abs(difference) <= noise, 0.0, difference)


def intervals(drawn: Array, confidence: float) -> list[tuple[float, float]]:
    """The percentile intervals of resampled numbers (R, M)."""
    if not 0 < confidence < 1:
        raise OptionError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    ends = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [(float(low), float(high)) for low, high in ends.T]


def values_of(
    column: str, methods: Sequence[str], found: Numbers, better: str | None, examples: int,
    confidence: float,
) -> list[Value]:  # fmt: skip
    """Every method's number with its error and its interval."""
    rows = zip(
        methods, found.points, found.errors, intervals(found.drawn, confidence), strict=True
    )  # fmt: skip
    return [
        Value(method, column, float(point), error, low, high, better, examples)
        for method, point, error, (low, high) in rows
    ]


def differences_of(
    column: str, methods: Sequence[str], found: Numbers, confidence: float, count: int, seed: int
) -> list[Difference]:
    """All pairs of methods."""
    pairs = [(i, j) for i in range(len(methods)) for j in range(i + 1, len(methods))]
    if not pairs:
        return []
    between = found.less([i for i, _ in pairs], [j for _, j in pairs])
    p = p_values(between.totals, between.sizes, confidence, count, seed)
    enough = len(found.sizes) >= groups_needed(len(pairs), confidence)
    rows = zip(
        pairs, between.points, between.errors, intervals(between.drawn, confidence), p, holm(p),
        strict=True,
    )  # fmt: skip
    return [
        Difference(
            column, methods[i], methods[j], float(point), error, low, high, float(own),
            float(all_in_all), enough and bool(all_in_all < 1 - confidence),
        )
        for (i, j), point, error, (low, high), own, all_in_all in rows
    ]  # fmt: skip
