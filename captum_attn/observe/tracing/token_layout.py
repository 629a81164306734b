"""The token axes of any tensor, brought to (B, n, D)."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.observe.tracing.in_place import of_layout, rows_of
from captum_attn.observe.tracing.token_index import take
from captum_attn.observe.tracing.token_map import Downstream, Upstream


@dataclass(frozen=True)
class TokenLayout:
    """How a tensor holds tokens.

    Args:
        order (tuple of int): permutation that brings the examples' axis first, the tokens' axes
            behind it and the channels' last.
        shape (tuple of int): the permuted shape.
        batch (int): number of examples.
        n (int): number of positions an example has in the tensor.
        index (Tensor or None): (B or 1, E) the position of each of E tokens, -1 for a token that
            the tensor does not hold; None: the tokens are the positions, in order.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    batch: int
    n: int
    index: Tensor | None = field(default=None, compare=False)

    @property
    def width(self) -> int:
        """Number of channels D."""
        return math.prod(self.shape) // (self.batch * self.n)

    @property
    def is_whole(self) -> bool:
        """Whether a token stands at every position."""
        if self.index is None:
            return True
        return all(len(row[row >= 0].unique()) == self.n for row in self.index)

    @property
    def is_one_to_one(self) -> bool:
        """Whether no two tokens stand at one position."""
        if self.index is None:
            return True
        held = (row[row >= 0] for row in self.index)
        return all(len(row.unique()) == len(row) for row in held)

    @property
    def _last(self) -> int:
        """Number of axes of channels, which come last."""
        sizes = itertools.accumulate(self.shape, operator.mul)
        return len(self.shape) - 1 - list(sizes).index(self.batch * self.n)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of a shape can be read in this way."""
        ordered = len(shape) == len(self.order) and tuple(shape[axis] for axis in self.order)
        return ordered == self.shape

    def positions(self, tensor: Tensor) -> Tensor:
        """A tensor (or its gradient) -> (B, n, D), position by position."""
        return tensor.permute(self.order).reshape(self.batch, self.n, self.width)

    def tokens(self, tensor: Tensor) -> Tensor:
        """A tensor (or its gradient) -> (B, E, D), zeros for tokens that it does not hold."""
        return take(self.positions(tensor), self.index)

    def scatter_positions(self, rows: Tensor) -> Tensor:
        """(B, n, D) -> of the tensor's own shape; the inverse of `positions`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.expand(self.batch, self.n, self.width).reshape(self.shape).permute(inverse)

    def held(self, real: Tensor | None) -> Tensor | None:
        """Of the real tokens, (B, 1, E), those that it holds: no padding of windows."""
        if self.index is None or bool((self.index >= 0).all()):
            return real
        held = (self.index >= 0)[:, None]
        return held if real is None else real & held

    def upstream(self, edge: GradientEdge) -> Upstream:
        """The positions of the tensor at an edge of the graph, as the start of a token map."""
        axes = of_layout(self.shape, self.order, self.batch, self._last)
        return Upstream(edge, self.positions, axes=axes)

    def downstream(self, edge: GradientEdge, like: Tensor) -> Downstream:
        """The positions of the tensor at an edge of the graph, as the end of a token map."""
        read = partial(rows_of, order=self.order, last=self._last)
        shape = (self.batch, self.n, self.width)
        return Downstream(edge, shape, self.scatter_positions, like, read)


class TokenPoint(NamedTuple):
    """A point of the graph that holds tokens.

    Args:
        edge (GradientEdge): the point.
        layout (TokenLayout): how the tensor there holds them.
    """

    edge: GradientEdge
    layout: TokenLayout

    @property
    def upstream(self) -> Upstream:
        return self.layout.upstream(self.edge)

    @property
    def downstream(self) -> Downstream:
        made: Any = self.edge.node._input_metadata[self.edge.output_nr]
        like = torch.empty(0, dtype=made.dtype, device=made.device)
        return self.layout.downstream(self.edge, like)


def token_layouts(shape: tuple[int, ...], batch: int) -> Iterator[TokenLayout]:
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
            yield TokenLayout(order, permuted, batch, math.prod(permuted[:-1]) // batch)
