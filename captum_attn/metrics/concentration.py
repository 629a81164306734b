"""Where the most relevant pixels lie, and how few of them carry a map."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._checks import flag, marks, positive_int
from captum_attn.metrics._model import Attributions, finite_attributions, one_map
from captum_attn.metrics.thresholds import IGNORED, maps_of, masks_of, objects_of

__all__ = ["relevance_rank", "sparseness", "top_k_intersection"]


def top_k_intersection(
    attributions: Attributions, masks: Tensor, *, k: int = 1000, concept_influence: bool = False
) -> Tensor:
    r"""The share of the k most relevant pixels that lies on the object (Theiner et al. 2022).

    |top_k(R) ∩ M| / k. Chance is the object's share of the area; higher is better.

    Args:
        attributions, masks: see `segmentation`; pixels of -1 do not count. Of equal pixels the
            first in reading order go first.
        k (int): up to the number of pixels that count. Default: 1000, the paper's.
        concept_influence (bool): divide by the object's share of the area, so that chance is 1
            whatever its size. Default: False.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> top_k_intersection(attributions, masks, k=100).mean()
    """
    positive_int("k", k)
    on, counted = _ranked(attributions, masks)
    fewest = int(counted.sum(1).min())
    if k > fewest:
        raise OptionError(f"k: expected up to {fewest}, the pixels that count, got {k}")
    found = on[:, :k].double().mean(1)
    if flag("concept_influence", concept_influence):
        found = found * counted.sum(1) / on.sum(1)
    return found.cpu()


def relevance_rank(attributions: Attributions, masks: Tensor) -> Tensor:
    r"""Relevance rank accuracy: `top_k_intersection` with k the object's own size (Arras, Osman &
    Samek 2022, Eq. 2).

    Chance is the object's share of the area; higher is better.

    Args:
        attributions, masks: see `top_k_intersection`.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> relevance_rank(attributions, masks).mean()
    """
    on, _ = _ranked(attributions, masks)
    size = on.sum(1, keepdim=True)
    first = torch.arange(on.shape[1], device=on.device) < size
    return ((on & first).sum(1).double() / size[:, 0]).cpu()


def _ranked(attributions: Attributions, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (B, HW), the most relevant first: on the object, and those that count (come first)."""
    maps = maps_of(attributions)
    counted = (masks_of(maps, masks) != IGNORED).flatten(1)
    scores = maps.flatten(1).masked_fill(~counted, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return objects_of(maps, masks).flatten(1).gather(1, order), counted.gather(1, order)


def sparseness(attributions: Attributions, mask: Tensor | None = None) -> Tensor:
    r"""The Gini index of the magnitudes: how few units carry a map (Chalasani et al. 2020).

    Of n magnitudes in rising order, sum_i (2 i - n - 1) a_i / (n sum_i a_i): 0 where all are alike
    (and of a map of zeros), 1 - 1 / n where one has everything. Higher is sparser, which is easier
    to read and no truer. Quantus adds 1e-7 to every magnitude first.

    Args:
        attributions (Tensor, or a container of one): (B, C, H, W) or embeddings (B, n, D) with a
            `mask`, which are summed over C or D; (B, H, W) or (B, n).
        mask (Tensor, optional): (B, n), 0 for tokens that count nowhere. Default: all count.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> sparseness(attributions).mean()
        >>> sparseness(attributions["input_ids"], encoding["attention_mask"])
    """
    found = one_map(attributions)
    if found.ndim < 2 or not found.numel():
        raise InputError(
            "attributions: expected maps (B, C, H, W) or (B, H, W), or (B, n), got "
            f"{tuple(found.shape)}"
        )
    found = finite_attributions(found)
    counted = torch.ones_like(found, dtype=torch.bool)
    if mask is not None:
        found = found.sum(-1) if found.ndim == 3 else found
        counted = marks("mask", mask).to(found.device) != 0
        if counted.shape != found.shape:
            raise InputError(
                f"mask: expected one value per token, {tuple(found.shape)} as the attributions "
                f"have, got {tuple(mask.shape)}"
            )
    if found.ndim == 4:
        found, counted = found.sum(1), counted[:, 0]
    counted = counted.flatten(1)
    # What does not count is 0 and comes first, with a place that is no place: i <= 0.
    rising = (found.flatten(1).abs() * counted).sort(1).values
    size = counted.sum(1, keepdim=True)
    place = torch.arange(1, rising.shape[1] + 1, device=size.device) - (rising.shape[1] - size)
    total = rising.sum(1)
    weighed = ((2 * place - size - 1) * rising).sum(1)
    return (weighed / (size[:, 0] * total).where(total > 0, 1.0)).cpu()
