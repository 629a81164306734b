"""What a run does, step by step: by this a later run is told to be the same one, without a graph.

A step is a function of torch that the model calls. It is said by the function, by where its tensors
were made, by which weights it takes (a model may choose among equal layers), and by its whole
numbers and names; what the tensors hold is not said. Two runs that say the same of every step, and
make the same shapes, have the same graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_attn.observe.capture.tensor_notes import TokenAxes

# What a function of torch is given beside tensors, as far as the graph may depend on it.
_PLAIN = frozenset(
    {int, bool, str, type(None), type(...), torch.Size, torch.dtype, torch.device, torch.layout}
)


@dataclass(frozen=True)
class KnownCall:
    """How an attention call comes about in a run that is known.

    Args:
        step (int): the fused kernel's, or that of the product with V.
        module (str), event (tuple): as those of `AttentionCall`.
        scored (int): the step of the product QK^T; -1 for the fused kernel.
        side (int): which factor of the product with V is A.
        axes: the axes of A that were the rows of the two factors of QK^T.
    """

    step: int
    module: str
    event: tuple[str, int]
    scored: int = -1
    side: int = 0
    axes: TokenAxes = ((), ())


@dataclass
class KnownRun:
    """A run that was observed, as far as a later one is held against it.

    Args:
        said (list): what was said of every step.
        shapes (list): the shapes of what every step made.
        calls (list of KnownCall): the attention calls.
        reached (list of tuple of int): for every call, what its queries, keys and values stem from,
            as `Graph.reach` says it.
        leaves (list of str): the names of the leaves.
        events (dict): as those of `Tap`.
        writes (set of int): the steps that write into what they are given.
        fingerprint (str): the graph's.
        asked (int): the last call that autograd is asked about in every run: up to there the graph
            is built again.
        read (int): the first call that the output reads: from there on as well.
    """

    said: list[Any]
    shapes: list[Any]
    calls: list[KnownCall]
    reached: list[tuple[int, int, int]]
    leaves: list[str]
    events: dict[str, int]
    writes: set[int]
    fingerprint: str
    asked: int
    read: int


class Steps:
    """Says steps, with numbers for the tensors that they made."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref, Hashable]] = {}
        self.hides = False  # whether something computes what no step has made

    def note(self, tensor: Tensor, place: Hashable) -> None:
        """Remembers where a tensor was made, or written into last."""
        self._made[id(tensor)] = weakref.ref(tensor), place

    def said(self, func: Callable, args: tuple, kwargs: dict) -> tuple:
        """What is said of a step before it runs."""
        said: list[Any] = [func]
        known = self._made
        for value in args:  # the kinds that come most often first
            kind = type(value)
            if kind is Tensor:
                made = known.get(id(value))
                told = made is not None and made[0]() is value
                said.append(made[1] if told else self._said(value))  # type: ignore[index]
            elif kind is nn.Parameter:
                said.append(id(value))
            else:
                said.append(value if kind in _PLAIN else self._said(value))
        for name, value in kwargs.items():
            said.append(name)
            said.append(value if type(value) in _PLAIN else self._said(value))
        return tuple(said)

    def made(self, step: int, args: tuple, out: Any) -> Any:
        """Notes what a step made, and returns its shapes."""
        if isinstance(out, Tensor):
            self.note(out, ("step", step))
            return out.shape
        if isinstance(out, (tuple, list)):
            tensors = [t for t in out if isinstance(t, Tensor)]
            for i, tensor in enumerate(tensors):
                self.note(tensor, ("step", step, i))
            return tuple(t.shape for t in tensors)
        if out is None and args and isinstance(args[0], Tensor):  # `__setitem__`
            self.note(args[0], ("step", step))
        return None

    def _said(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return id(value)
        if isinstance(value, Tensor):
            known = self._made.get(id(value))
            if known is not None and known[0]() is value:
                return known[1]
            self.hides |= value.grad_fn is not None
            return Tensor
        if type(value) in _PLAIN:
            return value
        if isinstance(value, (tuple, list)):
            return tuple(map(self._said, value))
        if isinstance(value, slice):
            return slice, *map(self._said, (value.start, value.stop, value.step))
        return type(value)
