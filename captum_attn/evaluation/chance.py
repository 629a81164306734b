"""Is a difference of two methods more than chance?

Two tests of no difference, of which the larger p counts:

- *swaps* (a sign-flip permutation test; Fisher 1935): if two methods are equal, exchanging them on
  any group of examples changes nothing, so the difference found is one of all that such exchanges
  give. Exact, however few, unequal or discrete the groups are.
- *bootstrap-t* (Efron & Tibshirani 1993, section 12.5): the difference over its standard error,
  beside the same ratio in data sets drawn with replacement. It keeps its level where the
  differences are skewed, as swaps alone do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

__all__ = ["FEWEST_GROUPS", "errors_of", "groups_needed", "holm", "p_values", "resamples_of"]

Array = np.ndarray
AT_ONCE = 4_000_000  # random numbers drawn at a time
FEWEST_GROUPS = 10  # below, the error of a skewed mean is not known well enough
# What a p may be a multiple of is at most this part of what Holm asks of the smallest.
FINENESS = 4
NOISE = 1e-12  # relative: what rounding leaves of equal numbers


def groups_needed(pairs: int, confidence: float) -> int:
    """From how many groups on one of so many pairs can be told from chance.

    2 ** (1 - G) is the smallest p of swaps of G groups, and Holm multiplies it by all pairs.
    """
    smallest = math.floor(math.log2(pairs / (1 - confidence) * (1 + NOISE))) + 2
    return max(FEWEST_GROUPS, smallest)


def p_values(totals: Array, sizes: Array, confidence: float, count: int, seed: int) -> Array:
    """Two-sided p (P,) of no difference, for P pairs of methods.

    Args:
        totals (Array): (G, P), each group's sum of differences; their sum over that of the sizes
            is the difference.
        sizes (Array): (G,), examples of each group.
        confidence (float): that Holm's adjustment of all P is to be able to reach.
        count (int): resamples, at least; more are drawn where P asks for it.
        seed (int): of the draws.
    """
    groups, pairs = totals.shape
    if groups < 2:
        return np.ones(pairs)
    draws = max(count, math.ceil(FINENESS * pairs / (1 - confidence)))
    swapped, drawn = by_swaps(totals, draws, seed), by_bootstrap(totals, sizes, draws, seed)
    return np.maximum(swapped, drawn)


def by_swaps(totals: Array, count: int, seed: int) -> Array:
    """The share of exchanges that give a difference as large, (P,): all of them, or a sample."""
    groups = len(totals)
    found = np.abs(totals.sum(0)) * (1 - NOISE) - NOISE * np.abs(totals).sum(0)
    as_large, all_in_all = np.zeros(totals.shape[1]), 0
    for signs in _signs(groups, count, seed):
        as_large += (np.abs(signs @ totals) >= found).sum(0)
        all_in_all += len(signs)
    return as_large / all_in_all


def _signs(groups: int, count: int, seed: int) -> Iterator[Array]:
    """1 and -1 (rows, G), the first row all 1: what was found is one of the exchanges."""
    at_once = max(1, AT_ONCE // groups)
    exact = 2 ** (groups - 1) <= count  # the first group stays: the other half is these negated
    rows = 2 ** (groups - 1) if exact else count + 1
    rng = np.random.default_rng([seed, 1])
    for start in range(0, rows, at_once):
        number = np.arange(start, min(rows, start + at_once))
        if exact:
            bits = (number[:, None] >> np.arange(groups)) & 1
        else:
            bits = rng.integers(0, 2, size=(len(number), groups))
            bits[number == 0] = 0
        yield 1.0 - 2.0 * bits


def by_bootstrap(totals: Array, sizes: Array, count: int, seed: int) -> Array:
    """Twice the share of resamples whose t lies beyond the one found, (P,)."""
    groups = len(sizes)
    noise = NOISE * np.abs(totals).sum(0) / sizes.sum()
    # All that the error of a drawn mean needs are sums over the groups that were drawn.
    columns = np.concatenate([totals, totals**2, totals * sizes[:, None]], 1)
    of_sizes = np.stack([sizes, sizes**2], 1)

    def ratio(times: Array, center: Array | float) -> tuple[Array, Array]:
        total, squares, weighed = np.split(times @ columns, 3, axis=1)
        size, squared_size = np.split(times @ of_sizes, 2, axis=1)
        mean = total / size
        off = squares - 2 * mean * weighed + mean**2 * squared_size
        off = np.where(off <= NOISE * squares, 0.0, off)
        error = np.sqrt(off * groups / (groups - 1)) / size
        away = np.where(np.abs(mean - center) <= noise, 0.0, mean - center)
        certain = np.where(away == 0, 0.0, np.copysign(np.inf, away))  # where there is no error
        return mean, np.divide(away, error, out=certain, where=error > 0)

    found, t = ratio(np.ones((1, groups)), 0.0)
    below, above = np.zeros(len(noise)), np.zeros(len(noise))
    for times in resamples_of(groups, count, seed):
        drawn = ratio(times, found)[1]
        below += (drawn <= t).sum(0)
        above += (drawn >= t).sum(0)
    return np.minimum(1.0, 2 * (np.minimum(below, above) + 1) / (count + 1))


def errors_of(totals: Array, sizes: Array) -> Array:
    """Standard errors (P,) of means whose groups sum to (G, P): s / sqrt(n), for groups."""
    off = totals - totals.sum(0) / sizes.sum() * sizes[:, None]
    return np.sqrt(len(sizes) / (len(sizes) - 1) * (off**2).sum(0)) / sizes.sum()


def resamples_of(groups: int, count: int, seed: int) -> Iterator[Array]:
    """How often each of G groups is drawn, (rows, G), in `count` rows altogether."""
    rng = np.random.default_rng(seed)
    at_once = max(1, AT_ONCE // groups)
    for start in range(0, count, at_once):
        rows = min(at_once, count - start)
        picks = rng.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        times = np.bincount(picks.ravel(), minlength=rows * groups).reshape(rows, groups)
        yield times.astype(np.float64)


def holm(p: Array) -> Array:
    """Holm's adjustment (1979): the k-th smallest of m times m + 1 - k, never falling."""
    order = np.argsort(p, kind="stable")
    raised = p[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(raised)) if len(p) else raised
    return adjusted
