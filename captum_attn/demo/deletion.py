"""How fast does a prediction fall when the most relevant units are taken away first?

One definition for image patches and for text tokens: a unit is either kept or removed, and how a
removed unit looks is the caller's `score` function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_attn.metrics import Curve, perturbation_curve

Score = Callable[[Tensor], Tensor]  # keep (S, n), bool -> (S,): the explained output


def deletion_curve(score: Score, relevance: Tensor, steps: int | None = None) -> Tensor:
    """The explained output while units are removed, the most relevant first.

    Args:
        score (callable): takes ``keep`` of shape ``(S, n)``, bool, and returns the explained
            output ``(S,)`` of the input with only these units kept.
        relevance (Tensor): ``(n,)``, relevance of every unit. Equal ones keep their order.
        steps (int, optional): how many equal steps lead from all units to none. Default: one
            unit at a time, but at most 64 steps.

    Returns:
        Tensor: ``(steps + 1,)``, from the intact input to the empty one.

    Examples::

        >>> weights = torch.tensor([1.0, 3.0, 0.0])
        >>> deletion_curve(lambda keep: (keep * weights).sum(1), relevance=weights)
        tensor([4., 1., 0., 0.])
    """
    return _curve(score, relevance, steps).values[0].float()


def _curve(score: Score, relevance: Tensor, steps: int | None) -> Curve:
    if relevance.dim() != 1 or not len(relevance):
        raise ValueError(f"relevance must be (n,) with n > 0, got {tuple(relevance.shape)}")
    steps = min(len(relevance), 64) if steps is None else steps
    return perturbation_curve(
        lambda keep: score(keep > 0),  # the input is what is kept: all of it, then less
        torch.ones(1, len(relevance), device=relevance.device),
        relevance[None],
        steps=steps,
        measure=lambda output, _target: output,
        perturbations_per_eval=steps + 1,
    )


def deletion_score(score: Score, relevance: Tensor, steps: int | None = None) -> float:
    """Area under :func:`deletion_curve` by the trapezoid rule, over the fraction removed.

    With a probability as output it lies in [0, 1]. Lower is better: the units that were named
    first carried the prediction.

    Args:
        score (callable): see :func:`deletion_curve`.
        relevance (Tensor): ``(n,)``, relevance of every unit.
        steps (int, optional): see :func:`deletion_curve`.

    Returns:
        float: the area.

    Examples::

        >>> weights = torch.tensor([1.0, 3.0, 0.0])
        >>> round(deletion_score(lambda keep: (keep * weights).sum(1), relevance=weights), 3)
        1.0
    """
    return float(_curve(score, relevance, steps).area())


def random_deletion_score(score: Score, n: int, orders: int = 10, seed: int = 0) -> float:
    """Mean :func:`deletion_score` of random orders: what an explanation has to beat.

    Args:
        score (callable): see :func:`deletion_curve`.
        n (int): number of units.
        orders (int, optional): how many random orders. Default: 10.
        seed (int, optional): seed of their own generator. Default: 0.

    Returns:
        float: the mean area.

    Examples::

        >>> random_deletion_score(lambda keep: keep.float().mean(1), n=8)
        0.5
    """
    rng = torch.Generator().manual_seed(seed)
    areas = [deletion_score(score, torch.rand(n, generator=rng)) for _ in range(orders)]
    return sum(areas) / orders


def keep_patches(keep: Tensor, image: Tensor, patch: int, fill: float) -> Tensor:
    """Images ``(S, C, H, W)`` of one image ``(1, C, H, W)`` with only the kept patches.

    Args:
        keep (Tensor): ``(S, n)``, bool, patches in reading order.
        image (Tensor): ``(1, C, H, W)``, sides divisible by ``patch``.
        patch (int): side of a patch in pixels.
        fill (float): what a removed patch shows.

    Returns:
        Tensor: ``(S, C, H, W)``.

    Examples::

        >>> keep_patches(torch.tensor([[True, False]]), torch.ones(1, 1, 1, 2), 1, fill=0.0)
        tensor([[[[1., 0.]]]])
    """
    rows, columns = image.shape[-2] // patch, image.shape[-1] // patch
    grid = keep.view(len(keep), 1, rows, columns)
    pixels = grid.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    return torch.where(pixels, image, torch.full_like(image, fill))
