"""Token indices: for each element the position it stands at, (B or 1, E), -1 for none."""

from __future__ import annotations

import torch
from torch import Tensor


def take(values: Tensor, index: Tensor | None) -> Tensor:
    """What stands at each element's position, zeros for an element without one.

    Args:
        values (Tensor): (B or 1, n) or (B or 1, n, D).
        index (Tensor or None): (B or 1, E); None: every element in its own position.

    Returns:
        Tensor: (B, E) or (B, E, D).
    """
    if index is None:
        return values
    batch = max(len(values), len(index))
    index = index.expand(batch, -1).to(values.device)
    held = index >= 0
    if values.ndim == 3:
        index = index[..., None].expand(-1, -1, values.shape[-1])
        held = held[..., None]
    return values.expand(batch, *values.shape[1:]).gather(1, index.clamp_min(0)) * held


def scatter(values: Tensor, index: Tensor, n: int, fill: int | bool = -1) -> Tensor:
    """Each element's value at its position, `fill` where no element stands; (B, E) -> (B, n)."""
    out = torch.full((len(index), n + 1), fill, dtype=values.dtype, device=index.device)
    return out.scatter_(1, _or_behind(index, n), values.expand_as(index))[:, :n]


def scatter_sum(rows: Tensor, index: Tensor, n: int) -> Tensor:
    """The sum of the rows that meet in a position; (B, E, D) -> (B, n, D)."""
    out = rows.new_zeros(len(rows), n + 1, rows.shape[2])
    where = _or_behind(index.expand(len(rows), -1), n)[..., None]
    return out.scatter_add_(1, where.expand_as(rows), rows)[:, :n]


def inverse(index: Tensor | None, n: int) -> Tensor | None:
    """Which element stands at each of n positions, (B, n), -1 where none does."""
    if index is None:
        return None
    return scatter(torch.arange(index.shape[1], device=index.device), index, n)


def occupied(index: Tensor, n: int) -> Tensor:
    """Which of n positions an element stands at, (B, n)."""
    return scatter(torch.ones((), dtype=torch.bool, device=index.device), index, n, fill=False)


def earliest(steps: Tensor, index: Tensor, n: int) -> Tensor:
    """The smallest step (E,) among the elements at a position, E where there is none; (B, n)."""
    out = torch.full((len(index), n + 1), index.shape[1], device=index.device)
    steps = steps.to(index.device).expand_as(index)
    return out.scatter_reduce_(1, _or_behind(index, n), steps, "amin")[:, :n]


def _or_behind(index: Tensor, n: int) -> Tensor:
    """An element without a position goes behind the last one, which is cut off."""
    return torch.where(index < 0, n, index)
