"""Identity nodes in the graph that ask, when the backward pass arrives, which rules are in force.

A `Gate` on an operand multiplies what arrives by a factor. A `Bridge` on an output hands what
arrives to the operation's own graph, or past it to the operands, as a rule says.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from captum_attn.observe.operators.call import Call, Slot


@dataclass(frozen=True)
class Shares:
    """A rule that multiplies the gradient into each operand by a factor.

    Args:
        factors (tuple of float): for the operands in the order of their kind.
        alone (tuple of float, optional): for the operand that is the only activation among them.
            Default: 1, for then the operation is linear.
    """

    factors: tuple[float, ...]
    alone: tuple[float, ...] | None = None

    def of(self, index: int, alone: bool) -> float:
        if alone:
            return self.alone[index] if self.alone is not None else 1.0
        return self.factors[index] if index < len(self.factors) else 1.0


# (operation, what arrives at its output) -> what each of its operands gets; None: nothing.
Formula = Callable[["Operation", Tensor], "Sequence[Tensor | None]"]
Rule = Shares | Formula
Rules = Mapping[str, Rule]


def without_output(rule: Callable) -> Callable:
    """Marks a rule that does not look at the operation's output, which then is not kept."""
    rule.wants_output = False  # type: ignore[attr-defined]
    return rule


@dataclass
class Cell:
    """What the backward pass that runs now asks for, shared by all nodes of one forward pass.

    Args:
        batch (int): number of examples, known when the run is over.
        rules (mapping, optional): kind of operation -> rule; None: the ordinary gradient.
        last (bool): whether no other pass follows, so that values may go as they are used.
        apart (bool): whether the pass is one example's alone.
    """

    batch: int = 1
    rules: Rules | None = None
    last: bool = False
    apart: bool = False

    @contextmanager
    def following(
        self, rules: Rules | None, last: bool = False, apart: bool = False
    ) -> Iterator[None]:
        """`rules` in force while the block runs."""
        before = self.rules, self.last, self.apart
        self.rules, self.last, self.apart = rules, last, apart
        try:
            yield
        finally:
            self.rules, self.last, self.apart = before

    def factor(self, uses: Sequence[tuple[str, int, bool]]) -> float:
        """The product of a gate's shares."""
        return 1.0 if self.rules is None else factor_of(self.rules, uses)

    def formula(self, kind: str) -> Formula | None:
        rule = self.rules.get(kind) if self.rules is not None else None
        return None if rule is None or isinstance(rule, Shares) else rule


def factor_of(rules: Rules, uses: Sequence[tuple[str, int, bool]]) -> float:
    """What a gate multiplies by under `rules`: the product of its shares."""
    product = 1.0
    for kind, index, alone in uses:
        rule = rules.get(kind)
        if isinstance(rule, Shares):
            product *= rule.of(index, alone)
    return product


@dataclass(eq=False)
class Operation:
    """One operation as it ran: what a rule sees.

    Args:
        kind (str): see `kinds.KINDS`.
        operands (tuple of Tensor): the activations among its arguments, detached.
        output (Tensor): detached.
        cell (Cell): of its run.
        call (Call): the torch function with its arguments, the operands left out.
        slots (tuple): where each operand stands.
        at_zero: of an elementwise function: f(0), for a composite its value where the root is 0.
        feeds_attention (bool): whether it projects to, or from, an attention call.
        settings (dict): more that its kind needs.
    """

    kind: str
    operands: tuple[Tensor, ...]
    output: Tensor
    cell: Cell
    call: Call
    slots: tuple[Slot, ...]
    at_zero: Any = 0.0
    feeds_attention: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The torch function's: "gelu"."""
        return self.call.name

    @property
    def batch(self) -> int:
        """The number of examples that the pass is of."""
        return 1 if self.cell.apart else self.cell.batch

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument of the call that is no operand, however it was passed."""
        return self.call.argument(place, name, default)

    def rerun(self, *operands: Tensor) -> Any:
        """The operation on other operands."""
        return self.call.having(self.slots, operands).run()

    def vjp(self, vector: Tensor, *operands: Tensor) -> list[Tensor]:
        """The vector-Jacobian product with respect to each operand, there or at other operands."""
        with torch.enable_grad():
            at = [x.detach().requires_grad_() for x in operands or self.operands]
            out = self.rerun(*at)
            vector = vector.to(out.dtype)
            return list(
                torch.autograd.grad(out, at, vector, allow_unused=True, materialize_grads=True)
            )

    def drop(self) -> None:
        """Lets the values go, after the last backward pass."""
        self.operands = ()
        self.output = self.output.new_empty(0)


class Gate(Function):
    """x -> x; what arrives is multiplied by the share that the rules in force give it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cell: Cell, uses: Sequence[tuple[str, int, bool]]) -> Tensor:
        ctx.cell, ctx.uses, ctx.passes_on = cell, uses, 1
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        (gradient,) = arriving
        factor = 1.0 if gradient is None else ctx.cell.factor(ctx.uses)
        if factor == 0.0:  # an undefined gradient: what lies behind is not computed at all
            gradient = None
        elif factor != 1.0:
            gradient = gradient * factor
        return gradient, None, None


class Bridge(Function):
    """(output, operands) -> output; what arrives goes to the one or to the others.

    The output is returned detached: a view that is made in a Function may not be written into.
    """

    @staticmethod
    def forward(ctx: Any, operation: Operation, out: Tensor, *at: Tensor) -> Tensor:
        ctx.operation, ctx.passes_on = operation, 1
        ctx.set_materialize_grads(False)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        (gradient,), operation = arriving, ctx.operation
        nothing = [None] * len(operation.slots)
        formula = operation.cell.formula(operation.kind)
        if gradient is None or formula is None:
            return None, gradient, *nothing
        with torch.no_grad():
            shares = formula(operation, gradient)
            shares = [
                None if share is None else fitted(share, x)
                for share, x in zip(shares, operation.operands, strict=True)
            ]
        if operation.cell.last:
            operation.drop()
        return None, None, *shares


def fitted(share: Tensor, operand: Tensor) -> Tensor:
    """A share in its operand's shape (broadcast axes are summed) and dtype."""
    if share.shape != operand.shape:
        share = share.sum_to_size(operand.shape)
    return share.to(operand.dtype)


class Kept:
    """The values that bridges keep, so that they are copied before the model overwrites them."""

    def __init__(self) -> None:
        self._of: dict[int, list[weakref.ref[Operation]]] = {}

    def keep(self, operation: Operation) -> None:
        note = weakref.ref(operation)
        for storage in {_storage(t) for t in (*operation.operands, operation.output)}:
            self._of.setdefault(storage, []).append(note)

    def before_write(self, target: Tensor) -> None:
        """Copies whatever shares the storage that is about to be written."""
        storage = _storage(target)
        for note in self._of.pop(storage, ()):
            operation = note()
            if operation is None:
                continue
            operation.operands = tuple(_apart(x, storage) for x in operation.operands)
            operation.output = _apart(operation.output, storage)
            self._of.setdefault(_storage(operation.output), []).append(note)
            for operand in operation.operands:
                self._of.setdefault(_storage(operand), []).append(note)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _apart(tensor: Tensor, storage: int) -> Tensor:
    return tensor.clone() if _storage(tensor) == storage else tensor
