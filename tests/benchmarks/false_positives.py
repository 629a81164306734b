"""How often is a difference called real that is none?

    python -m tests.benchmarks.false_positives            # prints the tables
    python -m tests.benchmarks.false_positives --write    # and puts them into tutorials/measures.md

Data sets without a difference are drawn, and the test of `captum_attn.evaluation.chance` is asked
about each, as `evaluate` asks it: nominally it is wrong 5 times in 100, and it must stay below 6.

Two methods are equal in one of two senses. *Exchangeable*: both draw their numbers alike, be they
bell-shaped, skewed or 0 and 1; so the differences are symmetric. *Equal on average*: differences
are skewed themselves and add up to nothing, as where a method is a little better on most examples
and much worse on some; no test of few such groups can be exact.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import numpy as np

from captum_attn.evaluation.chance import by_bootstrap, by_swaps, groups_needed
from captum_attn.evaluation.measures import METRICS
from captum_attn.evaluation.results import Results
from tests.benchmarks import pages

Array = np.ndarray
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
GROUPS = (3, 5, 8, 10, 12, 15, 20, 30, 50, 100)
BATCHES, AT_ONCE, RESAMPLES = 10, 400, 2000


def exchangeable(one: Draw) -> Draw:
    """Differences of two methods that draw alike."""
    return lambda rng, shape: one(rng, shape) - one(rng, shape)


def bell(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.normal(size=shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.lognormal(size=shape)


def hits(rate: float) -> Draw:
    return lambda rng, shape: (rng.random(shape) < rate).astype(float)


DIFFERENCES: dict[str, Draw] = {
    "exchangeable, bell-shaped": exchangeable(bell),
    "exchangeable, skewed (log-normal)": exchangeable(skewed),
    "exchangeable, 0 and 1 (half are 1)": exchangeable(hits(0.5)),
    "exchangeable, 0 and 1 (nine tenths are 1)": exchangeable(hits(0.9)),
    "equal on average, skewed (exponential)": lambda rng, shape: rng.exponential(size=shape) - 1,
}


def alike(rng: np.random.Generator, groups: int) -> Array:
    return np.ones(groups)


def unlike(rng: np.random.Generator, groups: int) -> Array:
    return rng.integers(1, 11, groups).astype(float)


def one_large(rng: np.random.Generator, groups: int) -> Array:
    """Half of all examples are in one group."""
    return np.array([groups - 1.0, *np.ones(groups - 1)])


SIZES = {"of one size": alike, "of 1 to 10": unlike, "one has half": one_large}


def simulated(
    draw: Draw, sizes_of: Callable, groups: int, seed: int
) -> Iterator[tuple[Array, Array]]:
    """Sums (G, P) of the groups of P data sets, and their sizes: half is shared in a group."""
    rng = np.random.default_rng([groups, seed])
    for _ in range(BATCHES):
        sizes = sizes_of(rng, groups)
        shared = draw(rng, (groups, AT_ONCE)) * sizes[:, None]
        if (sizes == 1).all():
            yield shared, sizes
            continue
        own = np.zeros((groups, AT_ONCE))
        for k in range(int(sizes.max())):
            own += draw(rng, own.shape) * (sizes > k)[:, None]
        yield 0.5 * shared + 0.5 * own, sizes


def rate(draw: Draw, sizes_of: Callable, groups: int, seed: int = 0) -> float:
    """The share of data sets without a difference in which one is called real."""
    if groups < groups_needed(1, 0.95):
        return 0.0
    wrong = []
    for totals, sizes in simulated(draw, sizes_of, groups, seed):
        p = np.maximum(
            by_swaps(totals, RESAMPLES, seed), by_bootstrap(totals, sizes, RESAMPLES, seed)
        )
        wrong.append(np.mean(p < 0.05))
    return float(np.mean(wrong))


def of_results(count: int, groups: int, runs: int, metric: str = "aopc") -> float:
    """How often `Results` calls any difference of so many exchangeable methods real."""
    wrong = 0
    for seed in range(runs):
        rng = np.random.default_rng([count, groups, seed])
        kept = {(str(i), metric): _kept(metric, groups, rng) for i in range(count)}
        names = [str(i) for i in range(count)]
        made = Results(
            names, {metric: METRICS[metric]}, kept, range(groups), {}, resamples=1000, seed=seed
        )  # fmt: skip
        wrong += any(d.real for d in made.differences(made.columns[-1 if metric == "aopc" else 1]))
    return wrong / runs


def _kept(metric: str, n: int, rng: np.random.Generator) -> dict[str, Array]:
    if metric == "aopc":
        return {"value": rng.lognormal(size=n)}
    union = rng.integers(5, 60, (n, 2))
    inside = (union * rng.uniform(0.2, 0.9, (n, 2))).astype(int)
    return {"correct": inside.sum(1), "labelled": np.full(n, 64), "intersection": inside,
            "union": union, "precision": rng.uniform(size=n)}  # fmt: skip


def tables(runs: int) -> str:
    """Both tables, as Markdown."""
    rows = []
    for name, draw in DIFFERENCES.items():
        for kind, sizes_of in SIZES.items():
            found = [rate(draw, sizes_of, groups) for groups in GROUPS]
            rows.append([name, kind, *(f"{100 * share:.1f}" for share in found)])
            print(rows[-1], file=sys.stderr, flush=True)
    first = pages.table(["differences", "groups", *map(str, GROUPS)], rows)
    families = [
        ["two, mean IoU of segmentation", 2, "segmentation"],
        ["seven, any of 21 pairs", 7, "aopc"],
    ]
    rows = []
    for name, count, metric in families:
        found = [of_results(count, groups, runs, metric) for groups in (12, 30, 100)]
        rows.append([name, *(f"{100 * share:.1f}" for share in found)])
    second = pages.table(["equal methods", "12", "30", "100"], rows)
    note = (
        f"Differences called real, in per cent of {BATCHES * AT_ONCE:,} data sets each (of 5.0 the "
        "standard error is 0.3), by the number of groups; fewer than "
        f"{groups_needed(1, 0.95)} are never enough."
    )
    also = f"Through `evaluate`'s own results, {runs:,} data sets each, by the number of examples:"
    return f"\n{note}\n\n{first}\n\n{also}\n\n{second}\n\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000, help="data sets of the second table")
    parser.add_argument("--write", action="store_true", help="into tutorials/measures.md")
    options = parser.parse_args(arguments)
    found = tables(options.runs)
    print(found)
    if options.write:
        pages.write("false_positives", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
