"""Where inputs enter the graph, and where the graph was cut."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Leaf:
    """Where an input enters the model's graph: a float input, an embedding, learned tokens.

    Args:
        name (str): the input's name; "" for a parameter.
        tensor (Tensor): the leaf that requires grad.
        order (int): position of the input in the forward signature.
        ids (Tensor): for an embedding the indices that were looked up; None otherwise.
        shape (tuple of int): for ids, the shape of the input they were looked up for.
        verbatim (bool): whether these are the input's own ids, not shifted or cut ones.
        length_first (bool): whether they were looked up with the batch axis second (XLNet).
    """

    name: str
    tensor: Tensor
    order: int = sys.maxsize
    ids: Tensor | None = None
    shape: tuple[int, ...] = ()
    verbatim: bool = True
    length_first: bool = False

    def rows(self, gradient: Tensor, batch: int) -> Tensor:
        """An embedding's gradient -> (B, n, D)."""
        if self.length_first:
            gradient = gradient.transpose(0, 1)
        return gradient.reshape(batch, -1, gradient.shape[-1])


@dataclass(frozen=True)
class UntracedCall:
    """An attention call that ran without grad: nothing can be traced through it."""

    module: str
