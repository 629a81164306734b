"""SaCo: is what is said to matter more what matters more?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor

from captum_attn.errors import OptionError
from captum_attn.metrics._checks import positive_int
from captum_attn.metrics._engine import Perturbation, prepare
from captum_attn.metrics._model import Attributions, Inputs
from captum_attn.metrics._units import ranks

__all__ = ["saco"]


@log_usage()
def saco(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    bins: int = 10,
    fill: Any = "mean",
    **options: Any,
) -> Tensor:
    r"""Salience-guided Faithfulness Coefficient (Wu et al., CVPR 2024, Algorithm 1).

    The units, in the order of their relevance, fall into K bins G_1 ... G_K of equal size. With
    s(G) the relevance of a bin and d(G) = p(c | x) - p(c | x without G), every pair i < j counts
    s(G_i) - s(G_j), for if d(G_i) >= d(G_j) and against otherwise; the sum is divided by that of
    the magnitudes. In [-1, 1], higher is better. Where all bins are equally relevant there is
    nothing to judge: 0. A number of units that K does not divide leaves bins that differ by one
    unit, so s is the mean over a bin; where it divides, that is the paper's sum up to a factor,
    which cancels.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        bins (int): K. Default: 10.
        fill: Default: "mean".

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> saco(model, images, attributions, perturbations_per_eval=11).mean()
    """
    positive_int("bins", bins, least=2)
    ready = prepare(
        forward_func, inputs, attributions, target, additional_forward_args, fill=fill, **options
    )
    few = (ready.sizes < bins).nonzero().flatten().tolist()
    if few:
        raise OptionError(
            f"bins: example {few[0]} has {int(ready.sizes[few[0]])} units for {bins} bins"
        )
    edges = torch.arange(bins + 1, device=ready.sizes.device) * ready.sizes[:, None] // bins
    start, stop = edges[:, :-1], edges[:, 1:]
    none = torch.zeros_like(start[:, :1])
    found = ready.run(torch.cat([start, none], 1), torch.cat([stop, none], 1))
    drop = found[:, -1:] - found[:, :-1]  # (B, K)
    relevance = mean_scores(ready, start, stop)
    first, second = torch.triu_indices(bins, bins, 1, device=drop.device)
    difference = relevance[:, first] - relevance[:, second]
    # Equal units give equal means but for rounding, which must not decide.
    noise = 1e-12 * relevance.abs().amax(1, keepdim=True)
    difference = difference.masked_fill(difference.abs() <= noise, 0.0)
    sign = torch.where(drop[:, first] >= drop[:, second], 1.0, -1.0).to(difference)
    weight = difference.abs().sum(1)
    return (sign * difference).sum(1) / weight.masked_fill(weight == 0, 1.0)


def mean_scores(ready: Perturbation, start: Tensor, stop: Tensor) -> Tensor:
    """The mean score (B, K) of the units whose rank is in [start, stop), both (B, K)."""
    rank = ranks(ready.scores, ready.removable, "most")
    ranked = torch.zeros_like(ready.scores).scatter(1, rank, ready.scores)
    places = torch.arange(rank.shape[1], device=rank.device).repeat(len(rank), 1)
    which = torch.searchsorted(stop.contiguous(), places, right=True)
    which = which.clamp(max=stop.shape[1])  # what is not removable falls into a bin of its own
    total = ranked.new_zeros(len(ranked), stop.shape[1] + 1).scatter_add(1, which, ranked)
    return total[:, :-1] / (stop - start)
