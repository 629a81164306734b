"""Attributions held against a known place: is it found, and how much of the relevance has it?"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_attn.metrics._model import Attributions
from captum_attn.metrics.rationales import _against

__all__ = ["place_hit", "place_rank", "place_share"]


def place_hit(attributions: Attributions, place: Tensor, mask: Tensor | None = None) -> Tensor:
    """Whether the most relevant token is one of the place, the first of equal ones.

    Args:
        attributions (Tensor, or a container of one): (B, n), or (B, n, D) of embeddings, which
            are summed over D.
        place (Tensor): (B, n), 1 where the answer stands.
        mask (Tensor, optional): (B, n), 0 for padding, which counts nowhere.

    Returns:
        Tensor: (B,), float64, 0 or 1. Higher is better.

    Examples::

        >>> place_hit(torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([[0, 1, 0]]))
        tensor([1.], dtype=torch.float64)
    """
    return (place_rank(attributions, place, mask) == 1).double()


def place_rank(attributions: Attributions, place: Tensor, mask: Tensor | None = None) -> Tensor:
    """The rank of the place's most relevant token among all tokens, 1 for the first.

    Args:
        attributions, place, mask: see `place_hit`.

    Returns:
        Tensor: (B,), float64. Lower is better.
    """
    scores, truth, counted = _against(attributions, place, mask)
    best = scores.masked_fill(~truth, -torch.inf).amax(1, keepdim=True)
    above = (scores > best) & counted
    # Of equal ones the first in the text goes first, as an argmax has it.
    at = ((scores == best) & truth).double().argmax(1, keepdim=True)
    before = torch.arange(scores.shape[1], device=scores.device) < at
    equal = (scores == best) & counted & ~truth & before
    return 1 + (above | equal).sum(1).double()


def place_share(attributions: Attributions, place: Tensor, mask: Tensor | None = None) -> Tensor:
    """The place's share of the positive relevance; 0 where there is none.

    Args:
        attributions, place, mask: see `place_hit`.

    Returns:
        Tensor: (B,), float64, in [0, 1]. Higher is better.
    """
    scores, truth, counted = _against(attributions, place, mask)
    positive = scores.clamp_min(0) * counted
    total = positive.sum(1)
    return torch.where(total > 0, (positive * truth).sum(1) / total.where(total > 0, 1), 0.0)
