"""Sensitivity-n: does the relevance of any units add up to what the output loses without them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor

from captum_attn.errors import OptionError
from captum_attn.metrics._checks import fractions_of, positive_int
from captum_attn.metrics._engine import Perturbation, prepare
from captum_attn.metrics._model import Attributions, Inputs
from captum_attn.metrics._units import ranks

__all__ = ["sensitivity_n"]

# From one unit to 80 % of them, on a logarithmic scale
SIZES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 0.8)


@log_usage()
def sensitivity_n(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    sizes: Sequence[float] = SIZES,
    subsets: int = 100,
    seed: int = 0,
    measure: Any = "logit",
    reduce: str = "sum",
    **options: Any,
) -> Tensor:
    r"""Sensitivity-n (Ancona et al., ICLR 2018, Section 3): a correlation, averaged over n.

    For every n, Pearson's correlation over random sets S of n units between the sum of their
    relevance and f(x) - f(x without S). 1 where the model is additive in the units and the
    relevance is what each adds; 0 is chance, and what is said where one of the two never varies.

    Quantus' `FaithfulnessCorrelation` is this with one n. Its `SensitivityN` is another measure: it
    removes the most relevant units step by step, sums the relevance of the last step only, and
    correlates over the examples.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        sizes (sequence of float): n as rising fractions of the units, rounded, at least one unit.
            Default: `SIZES`, 1 to 80 %, as in the paper.
        subsets (int): how many sets for every n. Default: 100, the paper's.
        seed (int): of the sets, which are the same whatever the batch. Default: 0.
        measure (str or callable): Default: "logit".
        reduce (str): Default: "sum", as relevance is to add up.

    Returns:
        Tensor: (B,), float64, in [-1, 1]; higher is better.

    Examples::

        >>> sensitivity_n(model, images, attributions, labels, patch_size=8).mean()
    """
    positive_int("subsets", subsets, 2)
    positive_int("seed", seed, 0)
    if isinstance(sizes, (int, str)):
        raise OptionError(f"sizes: expected rising fractions from 0 to 1, got {sizes!r}")
    ready = prepare(
        forward_func, inputs, attributions, target, additional_forward_args,
        measure=measure, reduce=reduce, **options,
    )  # fmt: skip
    counts = ready.counts(fractions_of(sizes)).clamp(min=1)
    return correlations(ready, counts, random_orders(ready, subsets, seed)).mean(1)


def random_orders(ready: Perturbation, subsets: int, seed: int) -> Iterator[Tensor]:
    """Numbers per unit (1, n) by whose order sets are taken."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(subsets):
        yield torch.rand(1, ready.scores.shape[1], generator=rng, dtype=torch.float64, device="cpu")


def correlations(ready: Perturbation, counts: Tensor, orders: Iterator[Tensor]) -> Tensor:
    """Pearson's correlation (B, L) over the orders, each of which gives sets of these counts."""
    none = torch.zeros_like(counts)
    intact = ready.run(none[:, :1], none[:, :1])
    sums, drops = [], []
    for order in orders:
        scores = order.to(ready.scores).expand_as(ready.scores)
        drops.append(intact - replace(ready, scores=scores).run(none, counts))
        place = ranks(scores, ready.removable, "most")
        inside = place[:, None] < counts[..., None]  # (B, L, n)
        sums.append((ready.scores[:, None] * inside).sum(-1))
    return _pearson(torch.stack(sums), torch.stack(drops))


def _pearson(one: Tensor, other: Tensor) -> Tensor:
    """Over the first axis; 0 where one of the two is constant but for rounding."""
    parts = []
    for values in (one, other):
        off = values - values.mean(0)
        noise = 1e-12 * values.abs().amax(0)
        parts.append(off.masked_fill(off.abs() <= noise, 0.0))
    a, b = parts
    norm = a.norm(dim=0) * b.norm(dim=0)
    return (a * b).sum(0) / norm.where(norm > 0, 1.0)
