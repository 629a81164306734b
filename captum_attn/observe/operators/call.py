"""One call of a torch function: which of its arguments stand where, however they were passed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_attn.observe.operators import kinds

Slot = tuple[Any, ...]  # where an operand stands: (1,), (1, 0) in args; ("other",) in kwargs

# Where functions of torch.nn.functional take `inplace`.
_INPLACE_AT = {
    "relu": 1, "relu6": 1, "selu": 1, "silu": 1, "mish": 1, "hardswish": 1, "hardsigmoid": 1,
    "elu": 2, "celu": 2, "leaky_relu": 2, "hardtanh": 3, "threshold": 3, "rrelu": 4, "dropout": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A torch function and its arguments.

    Args:
        func (callable): the function, method or slot wrapper.
        name (str): as `kinds.read` gives it: "add" for `torch.add`, `Tensor.add_` and `+`.
        args, kwargs: as they were passed.
    """

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    def at(self, slot: Slot) -> Any:
        """What stands at a slot."""
        value = self.kwargs[slot[0]] if isinstance(slot[0], str) else self.args[slot[0]]
        return value if len(slot) == 1 else value[slot[1]]

    def having(self, slots: Sequence[Slot], values: Sequence[Any]) -> Call:
        """The same call with `values` at `slots`."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for slot, value in zip(slots, values, strict=True):
            store: Any = kwargs if isinstance(slot[0], str) else args
            if len(slot) == 2:
                items = list(store[slot[0]])
                items[slot[1]] = value
                value = items
            store[slot[0]] = value
        return Call(self.func, self.name, tuple(args), kwargs)

    def slot(self, place: int, *names: str) -> Any:
        """Where an argument stands; None where it was not given."""
        if place < len(self.args):
            return (place,)
        return next(((name,) for name in names if name in self.kwargs), None)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, or its default where it was left out or None."""
        value = self.args[place] if place < len(self.args) else self.kwargs.get(name)
        return default if value is None else value

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, those in lists and tuples included."""
        return tensors((*self.args, *self.kwargs.values()))

    def pair(self) -> tuple[Slot, Slot]:
        """Where the two operands of an elementwise operation stand."""
        return self.slot(0, "input", "self"), self.slot(1, "other")

    def factors(self) -> list[Slot]:
        """Where the factors of a product stand."""
        if self.name == "einsum":
            if len(self.args) == 2 and isinstance(self.args[1], (list, tuple)):
                return [(1, i) for i in range(len(self.args[1]))]
            return [(i,) for i in range(1, len(self.args))] or [
                ("operands", i) for i in range(len(self.kwargs["operands"]))
            ]
        places = kinds.PRODUCTS[self.name]
        found = [self.slot(p, *n) for p, n in zip(places, kinds.FACTOR_NAMES, strict=True)]
        return [slot for slot in found if slot is not None]

    def added(self) -> Slot | None:
        """Where the tensor stands that a product is added to: a bias, or addmm's first operand."""
        if self.name in kinds.ADDED_TO:
            return self.slot(0, "input", "self")
        if self.name == "linear" or self.name in kinds.CONVOLUTIONS:
            slot = self.slot(2, "bias")
            return slot if slot is not None and self.at(slot) is not None else None
        return None

    def writes(self) -> bool:
        """Whether a function of torch.nn.functional is told to work in place."""
        place = _INPLACE_AT.get(self.name)
        if place is None:
            return False
        return self.kwargs.get("inplace", self.args[place : place + 1] == (True,)) is True

    def on(self, first: Tensor) -> Call:
        """The same operation on another first operand, with a result of its own."""
        if self.writes():
            args, kwargs = self.args[1 : _INPLACE_AT[self.name]], {**self.kwargs, "inplace": False}
            return Call(self.func, self.name, (first, *args), kwargs)
        func = getattr(Tensor, self.name, None) or getattr(torch, self.name)
        return Call(func, self.name, (first, *self.args[1:]), self.kwargs)


def tensors(args: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors(value)
    return found
