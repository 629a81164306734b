"""Token maps, and their ends: where tokens, pixels, words or regions enter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from captum_attn.observe.capture.attention_call import AttentionCall, positions
from captum_attn.observe.capture.leaf import PACKED, Leaf
from captum_attn.observe.tracing.autograd_graph import edge_of
from captum_attn.observe.tracing.in_place import (
    Axes,
    Reader,
    of_leaf,
    of_output,
    rows_of,
)

# Of the elements that enter, one in so many may be told wrongly.
_HARDLY = 50


@dataclass
class Upstream:
    """Where a map starts.

    Args:
        edge: the tensor or graph edge whose gradient is taken.
        rows (callable): that gradient -> (B, E, features): E elements whose place is asked.
        batched (bool): False for a parameter, whose gradient is the sum over the examples (B = 1).
        repeats (bool): whether the positions of elements that are repeated are worth asking for.
        packed (bool): whether the elements are those of all examples, in one row.
        axes (tuple or None): what the axes at `edge` hold, see `in_place`; None: not said.
    """

    edge: Any
    rows: Callable[[Tensor], Tensor]
    batched: bool = True
    repeats: bool = False
    packed: bool = False
    axes: Axes | None = None

    @staticmethod
    def call(call: AttentionCall) -> Upstream:
        """The query positions of an earlier attention call, all windows in a row."""

        return Upstream(
            edge_of(call),
            lambda g: positions(call.output_rows(g)),
            repeats=True,
            packed=call.packed,
            axes=of_output(call),
        )

    @staticmethod
    def tokens(leaf: Leaf, batch: int) -> Upstream:
        """The elements of an input: the rows of an embedding, (B, n, D), or single numbers."""
        packed, axes = leaf.layout == PACKED, of_leaf(leaf, batch)
        return Upstream(leaf.tensor, lambda g: leaf.rows(g, batch), packed=packed, axes=axes)

    @staticmethod
    def rows_of(leaf: Leaf, batch: int) -> Upstream:
        """The rows of an embedding or of a float input, (B, n, D)."""
        if leaf.ids is not None:
            return Upstream.tokens(leaf, batch)
        axes = of_leaf(leaf, batch, rowwise=True)
        return Upstream(leaf.tensor, lambda gradient: gradient, axes=axes)

    @staticmethod
    def elements(leaf: Any, batched: bool = True) -> Upstream:
        """Every single element of a tensor."""

        def rows(gradient: Tensor) -> Tensor:
            return gradient.reshape(gradient.shape[0] if batched else 1, -1, 1)

        return Upstream(leaf, rows, batched)

    def flattened(self) -> Upstream:
        """The elements of all examples in one row, (1, B E, features)."""
        return replace(self, rows=lambda g: self.rows(g).flatten(0, 1)[None])


@dataclass
class Downstream:
    """Where a map ends, (B, P, features), for a tensor or an edge of the graph.

    Args:
        edge: the tensor or graph edge that the vectors are put in at.
        shape (tuple of int): (B, P, features).
        placed (callable): a vector of that shape -> one of the edge's own.
        like (Tensor): for the dtype and the device.
        read (callable): what the axes at `edge` hold -> what the rows there are, see `in_place`.
    """

    edge: Any
    shape: tuple[int, int, int]
    placed: Callable[[Tensor], Tensor]
    like: Tensor
    read: Reader

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def grad_fn(self) -> Any:
        """Its node of the graph, as a tensor's."""
        return self.edge.grad_fn if isinstance(self.edge, Tensor) else self.edge.node

    def flattened(self) -> Downstream:
        """The positions of all examples in one row, (1, B P, features)."""
        batch, places, features = self.shape
        return replace(
            self,
            shape=(1, batch * places, features),
            placed=lambda v: self.placed(v.view(self.shape)),
        )

    def confined(self, inside: Tensor) -> Downstream:
        """Only the positions inside, (B, P), count."""
        return replace(self, placed=lambda v: self.placed(v * inside.to(v)[..., None]))

    @staticmethod
    def rows(rows: Tensor) -> Downstream:
        return Downstream(rows, tuple(rows.shape), lambda v: v, rows, rows_of)  # type: ignore[arg-type]


@dataclass
class TokenMap:
    """Where each of E upstream elements enters.

    Args:
        to (Tensor or None): (B, E) position, -1 where an element enters nowhere; None: identity.
        copies (tuple of Tensor): further positions, like `to`, of elements that enter several
            because they are repeated ([CLS] before every frame of a video).
        mixed (bool): elements enter several positions at once, so that there is no map.
        partial (Tensor or None): where `mixed`, the places of those elements that enter one
            position only, (B, E), -1 for the others; None if hardly any does.
        entering (Tensor or None): where `mixed`, which elements enter at all, (B, E).
        moving (bool): the map depends on the content of the inputs.
        notes (dict): what was worked out from the map, kept as long as the map is.
    """

    to: Tensor | None = None
    copies: tuple[Tensor, ...] = ()
    mixed: bool = False
    partial: Tensor | None = None
    entering: Tensor | None = None
    moving: bool = False
    notes: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def places(self) -> tuple[Tensor | None, ...]:
        """`to` and the `copies`."""
        return (self.to, *self.copies)

    @property
    def is_identity(self) -> bool:
        """Whether every element enters the position of its own index, and no other."""
        return self.to is None and not self.copies and not self.mixed

    def same(self, other: TokenMap) -> bool:
        if self.mixed != other.mixed or len(self.copies) != len(other.copies):
            return False
        if self.mixed and not _mostly_alike(self.entering, other.entering):
            return False
        return all(_alike(a, b) for a, b in zip(self.places, other.places, strict=True))


IDENTITY = TokenMap()


def enters_nowhere(token_map: TokenMap) -> bool:
    """Whether no element enters any position."""
    if token_map.mixed or token_map.copies or token_map.to is None:
        return False
    return not bool((token_map.to >= 0).any())


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool((one == other).all())


def _mostly_alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether nearly the same elements enter: some do so hardly (a ReLU, the edge of a window)."""
    if one is None or other is None or one.shape != other.shape:
        return one is other or one is None or other is None
    differ = (one != other).sum()
    return bool(differ * _HARDLY <= torch.maximum(one.sum(), other.sum()))
