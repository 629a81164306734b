"""The token axes of any tensor, brought to (B, n, D)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.observe.tracing.in_place import of_layout, rows_of
from captum_attn.observe.tracing.token_map import Downstream, TokenMap, Upstream


@dataclass(frozen=True)
class Layout:
    """One way of reading a tensor as rows of tokens.

    Args:
        order (tuple of int): permutation that brings batch first and channels last.
        shape (tuple of int): the permuted shape.
        batch (int): number of examples.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    batch: int

    @property
    def n(self) -> int:
        return math.prod(self.shape[:-1]) // self.batch

    @property
    def width(self) -> int:
        return self.shape[-1]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of a shape can be read in this way."""
        ordered = len(shape) == len(self.order) and tuple(shape[axis] for axis in self.order)
        return ordered == self.shape

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor (or its gradient) -> (B, n, D)."""
        return tensor.permute(self.order).reshape(self.batch, self.n, self.width)

    def placed(self, rows: Tensor) -> Tensor:
        """(B, n, D) -> of the tensor's own shape."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.expand(self.batch, self.n, self.width).reshape(self.shape).permute(inverse)

    def upstream(self, edge: GradientEdge) -> Upstream:
        own = tuple(self.shape[self.order.index(axis)] for axis in range(len(self.order)))
        return Upstream(edge, self.rows, axes=of_layout(own, self.order, self.batch))

    def downstream(self, edge: GradientEdge, like: Tensor) -> Downstream:
        read = partial(rows_of, order=self.order)
        return Downstream(edge, (self.batch, self.n, self.width), self.placed, like, read)


def layouts(shape: tuple[int, ...], batch: int) -> Iterator[Layout]:
    """The ways in which a shape may hold tokens, the likeliest first."""
    axes = tuple(range(len(shape)))
    orders = [axes]  # (B, n, D), (B, h, w, D); (B F, n, D), (B n, D)
    if len(shape) == 3 and shape[1] % batch == 0:
        orders.append((1, 0, 2))  # (n, B, D)
        if shape[0] != batch and shape[1] == batch:
            orders.reverse()
    if len(shape) >= 3:
        orders.append((0, *axes[2:], 1))  # (B, D, n), (B, D, h, w)
    for order in orders:
        permuted = tuple(shape[axis] for axis in order)
        if len(permuted) > 1 and permuted[0] % batch == 0:
            yield Layout(order, permuted, batch)


def gathered(rows: Tensor, index: Tensor | None) -> Tensor:
    """rows[b, index[b]], zeros at -1; (B, n, D) and (B or 1, m) -> (B, m, D)."""
    if index is None:
        return rows
    rows = rows.expand(max(len(rows), len(index)), -1, -1)
    index = index.expand(rows.shape[0], -1)
    taken = rows.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, rows.shape[-1]))
    return taken * (index >= 0)[..., None]


def inverted(token_map: TokenMap, places: int) -> Tensor | None:
    """Which element stands at each place: (B, places), -1 where none does."""
    to = token_map.to
    if to is None:
        return None
    elements = torch.arange(to.shape[1], device=to.device).expand_as(to)
    found = torch.full((to.shape[0], places + 1), -1, device=to.device)
    found.scatter_(1, torch.where(to < 0, places, to), elements)
    return found[:, :places]
