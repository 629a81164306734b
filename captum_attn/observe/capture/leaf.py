"""Where inputs enter the graph, and where the graph was cut."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

# How the examples lie in a leaf: one after the other; along the second axis (XLNet); or anyhow, as
# in packed patches, whose rows belong to the example whose tokens they enter.
BATCH_FIRST, LENGTH_FIRST, PACKED = "batch first", "length first", "packed"


@dataclass(eq=False)
class Leaf:
    """Where an input enters the model's graph: a float input, an embedding, learned tokens.

    Its elements are the single numbers of `tensor`; those of an embedding are its rows.

    Args:
        name (str): the input's name; "" for a parameter.
        tensor (Tensor): the leaf that requires grad.
        order (int): position of the input in the forward signature.
        ids (Tensor): for an embedding the indices that were looked up; None otherwise.
        shape (tuple of int): the shape of the input.
        origin (Tensor or None): for what was made of an integer input, the element of the input
            that each element of the leaf was, counted in order, (E,); -1: none. None for a float
            input, and where no element could be told (positions counted from a mask).
        layout (str): how the examples lie in it.
    """

    name: str
    tensor: Tensor
    order: int = sys.maxsize
    ids: Tensor | None = None
    shape: tuple[int, ...] = ()
    origin: Tensor | None = None
    layout: str = BATCH_FIRST

    @property
    def of_integers(self) -> bool:
        return self.ids is not None or self.origin is not None

    @property
    def known(self) -> bool:
        """Whether its elements can be found in the input."""
        return self.origin is not None or self.ids is None

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The axes of its elements, in `tensor`: those of an embedding are the ids'."""
        return tuple(self.tensor.shape if self.ids is None else self.ids.shape)

    def settle(self, batch: int) -> None:
        """Decides how the examples lie in it, now that their number is known."""
        own = self.own_shape
        if not self.name or not own:
            return
        if self.origin is None or self.shape[0] != batch:
            fits = own[0] == batch or (self.ids is not None and own[0] % batch == 0)
            self.layout = BATCH_FIRST if fits and self.shape[:1] in ((), (batch,)) else PACKED
            return
        example = self.origin // math.prod(self.shape[1:])  # -1 stays -1
        for layout in (BATCH_FIRST, LENGTH_FIRST):
            if layout == LENGTH_FIRST and (len(own) < 2 or own[1] != batch):
                continue
            if example.numel() % batch == 0:
                rows = self._by_example(example.view(own), batch, layout)
                wanted = torch.arange(batch, device=rows.device)[:, None]
                if bool(((rows == wanted) | (rows < 0)).all()):
                    self.layout = layout
                    return
        self.layout = PACKED

    def elements(self, values: Tensor, batch: int) -> Tensor:
        """One value for each element, of `own_shape` -> (B, E), (1, E) of a packed leaf."""
        return self._by_example(values, batch, self.layout)

    def rows(self, gradient: Tensor, batch: int) -> Tensor:
        """A gradient, of the shape of `tensor`, -> (B, E, features), (1, E, features) if packed."""
        features = math.prod(self.tensor.shape[len(self.own_shape) :])
        if self.layout == LENGTH_FIRST:
            gradient = gradient.transpose(0, 1)
        return gradient.reshape(1 if self.layout == PACKED else batch, -1, features)

    def axes(self, batch: int) -> tuple[int, ...]:
        """The axes of the E elements of one example, or of all where they are packed."""
        own = self.own_shape
        if self.layout == PACKED:
            return own
        if self.layout == LENGTH_FIRST:
            return (own[0], *own[2:])
        return own[1:] if own[:1] == (batch,) else (math.prod(own) // batch,)

    def laid(self, values: Tensor) -> Tensor:
        """Values of the elements, (B, *axes), on the input itself.

        Elements of the input that enter more than once get the sum; of packed ones each has its
        value in the row of the example whose tokens it enters, and zero in the others.
        """
        batch = len(values)
        values = values.sum(0, keepdim=True) if self.layout == PACKED else values
        if self.origin is None:
            return values.reshape(self.own_shape)
        origin = self.elements(self.origin.view(self.own_shape), batch).flatten()
        given = values.new_zeros(math.prod(self.shape))
        given.index_add_(0, origin.clamp_min(0), values.flatten() * (origin >= 0))
        return given.view(self.shape)

    @staticmethod
    def _by_example(values: Tensor, batch: int, layout: str) -> Tensor:
        values = values.transpose(0, 1) if layout == LENGTH_FIRST else values
        return values.reshape(1 if layout == PACKED else batch, -1)


@dataclass(frozen=True)
class UntracedCall:
    """An attention call that ran without grad: nothing can be traced through it."""

    module: str
