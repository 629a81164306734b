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
        verbatim (bool): whether these are the input's own ids, not shifted or cut ones.
    """

    name: str
    tensor: Tensor
    order: int = sys.maxsize
    ids: Tensor | None = None
    verbatim: bool = True


@dataclass(frozen=True)
class Blind:
    """An attention call that ran without grad: nothing can be traced through it."""

    module: str
