"""The mode below the tap: runs the model's own operations, and puts gates and bridges around them.

What the model computes is what it computes without: the operations run on the model's own tensors.
An *activation* is a tensor that depends on an input; weights, positions, masks and learned tokens
are constants.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_attn.errors import InputError
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.operators import kinds
from captum_attn.observe.operators.bridge import (
    Bridge,
    Cell,
    Gate,
    Kept,
    Operation,
    Rules,
    Shares,
    Slot,
    filled,
    taken,
)
from captum_attn.observe.operators.chains import (
    EMPTY,
    LEARNED,
    NONLINEAR,
    SOFTMAX,
    Chains,
    Note,
    Version,
    is_number,
    joined,
    moved,
    scaled,
)

_OVERRIDE_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_INSIDE = 3  # nodes between a clone of an input and its leaf


class Operators(TorchFunctionMode):
    """Puts gates and bridges around the operations of one forward run.

    Entered outside the tap (`with operators, tap:`), so that the tap sees the model's own operands
    and its calls land here.

    Args:
        tap (Tap): knows which leaves are inputs.
        batch (int): number of examples.
        tables (iterable of Rules): the tables that a backward pass may ask for.

    Attributes:
        cell (Cell): what the backward pass that runs asks for.
        unruled (dict): (name of an operation that is neither linear nor ruled, module) -> how
            often it ran.
    """

    def __init__(self, tap: Tap, batch: int, tables: Iterable[Rules]) -> None:
        super().__init__()
        self.tap, self.batch, self.cell = tap, batch, Cell()
        self.unruled: dict[tuple[str, str], int] = {}
        self.chains, self._kept = Chains(), Kept()
        rules = [(kind, rule) for table in tables for kind, rule in table.items()]
        self._gated = {kind for kind, rule in rules if isinstance(rule, Shares)}
        self._bridged = {kind for kind, rule in rules if not isinstance(rule, Shares)}
        self._wants_output = {
            kind for kind, rule in rules if getattr(rule, "wants_output", True)
        } & self._bridged
        self._inputs: set[int] = set()  # ids of the inputs' leaves
        self._open: set[Callable] = set()

    # ------------------------------------------------------------------------ the mode
    def __torch_function__(
        self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place = kinds.read(func)
        if name in kinds.CONSTANT:
            return func(*args, **kwargs)
        in_place = in_place or _asks_in_place(name, args, kwargs)
        given = [t for t in _tensors((*args, *kwargs.values())) if t.requires_grad]
        active = [t for t in given if self.is_activation(t)]
        handler = _HANDLERS.get(name)
        if in_place and isinstance(args[0] if args else None, Tensor):
            if not active or handler is None or not torch.is_grad_enabled():
                self._kept.before_write(args[0])
            else:
                return self._written(func, name, args, kwargs, handler)
        if not active or not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            if given:
                self._note(out, LEARNED)
            return out
        _check_plain(name, active, kwargs)
        if handler is not None:
            return handler(self, func, name, args, kwargs)
        if name in kinds.MOVING:
            return self._move(func, name, args, kwargs, active)
        return self._unknown(func, name, args, kwargs)

    def is_activation(self, value: Any) -> bool:
        """Whether a tensor depends on an input, by more than the learned tokens of the model."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        if value.grad_fn is not None:
            return not self.chains[value].learned
        if id(value) not in self._inputs:
            self._inputs = {id(leaf.tensor) for leaf in self.tap.leaves if leaf.name}
        return id(value) in self._inputs

    def _written(
        self, func: Callable, name: str, args: tuple, kwargs: dict, handler: Handler
    ) -> Tensor:
        """An operation that writes into its first operand: on a clone, and the result copied in.

        Bridges cannot follow a write, and what they keep must not be overwritten.
        """
        target = args[0]
        if not self._rules_for(name):
            self._kept.before_write(target)
            out = func(*args, **kwargs)
            self.chains[target] = EMPTY
            return out
        before = target.clone()
        root = self.chains.root(target)
        self.chains[before] = replace(self.chains[target], root=root)
        func, args, kwargs = _out_of_place(func, name, args, kwargs)
        made = handler(self, func, name, (before, *args[1:]), kwargs)
        self._kept.before_write(target)
        target.copy_(made)
        self.chains[target] = self.chains[made]
        return target

    def _rules_for(self, name: str) -> bool:
        """Whether any table in play has a rule for what the operation may be."""
        return bool(_KINDS_OF.get(name, set(kinds.KINDS)) & (self._gated | self._bridged))

    # ------------------------------------------------------------------------ the funnel
    def _through(
        self,
        kind: str,
        func: Callable,
        name: str,
        args: tuple,
        kwargs: dict,
        slots: Sequence[Slot],
        *,
        uses: Sequence[Sequence[tuple[str, int, bool]]] | None = None,
        at: Sequence[Tensor] | None = None,
        at_zero: Any = 0.0,
        **settings: Any,
    ) -> tuple[Tensor, Operation | None]:
        """Runs an operation with the gates and the bridge that the rules of its kind need.

        Args:
            slots: where its activations stand.
            uses: each activation's shares, see `Cell.factor`; default: those of `kind`, in order.
            at: what the bridge leads to; default: what stands at the slots.
        """
        operands = [taken(args, kwargs, slot) for slot in slots]
        uses = uses or [[(kind, index, False)] for index in range(len(slots))]
        if any(use[0] in self._gated for each in uses for use in each):
            gated = [Gate.apply(x, self.cell, use) for x, use in zip(operands, uses, strict=True)]
            gated_args, gated_kwargs = filled(args, kwargs, slots, gated)
            out = func(*gated_args, **gated_kwargs)
        else:
            out = func(*args, **kwargs)
        if kind not in self._bridged or not out.requires_grad:
            return out, None
        ends = operands if at is None else list(at)
        left_out = [None] * len(slots)
        plain_args, plain_kwargs = filled(args, kwargs, slots, left_out)
        operation = Operation(
            kind,
            name,
            tuple(x.detach() for x in ends),
            out.detach() if kind in self._wants_output else out.detach().new_empty(0),
            self.batch,
            func,
            plain_args,
            plain_kwargs,
            tuple(slots) if at is None else tuple((i,) for i in range(len(ends))),
            at_zero,
            settings=settings,
        )
        self._kept.keep(operation)
        return Bridge.apply(self.cell, operation, out, *ends), operation

    def _note(self, out: Any, note: Note) -> Any:
        """Writes a note on whatever was made."""
        for made in _tensors((out,)):
            if made.requires_grad:
                self.chains[made] = note
        return out

    # ------------------------------------------------------------------------ elementwise
    def _activation(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slot = _slot(args, kwargs, 0, "input", "self")
        x = taken(args, kwargs, slot)
        note = self.chains[x]
        if note.statistic or not self.is_activation(x):
            return self._note(func(*args, **kwargs), Note(statistic=note.statistic))
        return self._nonlinear(func, name, args, kwargs, slot, name in kinds.ZERO_AT_ZERO)

    def _nonlinear(
        self, func: Callable, name: str, args: tuple, kwargs: dict, slot: Slot, zero: bool
    ) -> Tensor:
        x = taken(args, kwargs, slot)

        def value(at: float) -> Any:
            if zero and at == 0.0:
                return 0.0
            with torch.no_grad():
                point = torch.full((), at, dtype=x.dtype, device=x.device)
                args_, kwargs_ = filled(args, kwargs, [slot], [point])
                made = func(*args_, **kwargs_)
            return float(made) if made.ndim == 0 else made

        at_zero = value(0.0)
        if isinstance(at_zero, float) and not -1e30 < at_zero < 1e30:
            self._name_unruled(name)
        start = self.chains.at_zero(x)
        chained = at_zero if start == 0.0 else value(start)
        root = self.chains.root(x)
        out, _ = self._through("activation", func, name, args, kwargs, [slot], at_zero=at_zero)
        known = isinstance(chained, float)
        return self._note(
            out,
            Note(gate=NONLINEAR, root=root if known else None, at_zero=chained if known else 0.0),
        )

    def _power(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        base, exponent = _slot(args, kwargs, 0, "input", "self"), _slot(args, kwargs, 1, "exponent")
        if name == "rpow":
            base, exponent = exponent, base
        power = taken(args, kwargs, exponent)
        if self.is_activation(power):
            if self.is_activation(taken(args, kwargs, base)):
                return self._unknown(func, name, args, kwargs)
            return self._nonlinear(func, name, args, kwargs, exponent, False)
        if isinstance(power, Tensor) and power.numel() > 1:
            return self._nonlinear(func, name, args, kwargs, base, bool((power >= 1).all()))
        if float(power) < 1:
            return self._statistic(func, name, args, kwargs)
        if self.chains[taken(args, kwargs, base)].statistic:
            return self._note(func(*args, **kwargs), Note(statistic=True))
        return self._nonlinear(func, name, args, kwargs, base, True)

    def _statistic(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slot = _slot(args, kwargs, 0, "input", "self")
        if self.chains[taken(args, kwargs, slot)].statistic:
            return self._note(func(*args, **kwargs), Note(statistic=True))
        out, _ = self._through("statistic", func, name, args, kwargs, [slot])
        return self._note(out, Note(statistic=True))

    def _multiply(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slots = _slot(args, kwargs, 0, "input", "self"), _slot(args, kwargs, 1, "other")
        active = [s for s in slots if self.is_activation(taken(args, kwargs, s))]
        if len(active) == 1:
            (slot,) = active
            other = taken(args, kwargs, slots[1 - slots.index(slot)])
            return self._scaled(func, name, args, kwargs, slot, other)
        a, b = (taken(args, kwargs, s) for s in slots)
        if self.chains[a].statistic or self.chains[b].statistic:
            return self._normalised(func, name, args, kwargs, slots)
        if self._same_root(a, b):
            at_zero = self.chains.at_zero(a) * self.chains.at_zero(b)
            return self._composite(func, name, args, kwargs, slots, at_zero)
        gates = [bool(self.chains[x].gate) for x in (a, b)]
        if sum(gates) == 1:
            gate, other = (slots[0], slots[1]) if gates[0] else (slots[1], slots[0])
            out, _ = self._through("gate", func, name, args, kwargs, [gate, other])
            return self._note(out, EMPTY)
        out, _ = self._through("multiply", func, name, args, kwargs, slots)
        return self._note(out, Note(gate=NONLINEAR if all(gates) else ""))

    def _divide(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slots = _slot(args, kwargs, 0, "input", "self"), _slot(args, kwargs, 1, "other")
        if name == "rdiv":
            slots = slots[1], slots[0]
        if kwargs.get("rounding_mode") is not None:
            return func(*args, **kwargs)
        above, below = (taken(args, kwargs, s) for s in slots)
        if not self.is_activation(below):
            return self._scaled(func, name, args, kwargs, slots[0], below, inverse=True)
        if not self.is_activation(above):  # a constant over an activation, as `reciprocal`
            if self.chains[below].statistic:
                return self._note(func(*args, **kwargs), Note(statistic=True))
            out, _ = self._through("statistic", func, name, args, kwargs, [slots[1]])
            return self._note(out, Note(statistic=True))
        if self.chains[below].statistic:
            return self._normalised(func, name, args, kwargs, slots)
        zero = self.chains.at_zero(below)
        if self._same_root(above, below) and zero:
            at_zero = self.chains.at_zero(above) / zero
            return self._composite(func, name, args, kwargs, slots, at_zero)
        out, _ = self._through("divide", func, name, args, kwargs, slots)
        return self._note(out, Note(gate=self.chains[above].gate))

    def _same_root(self, a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and self.chains.root(a).same(self.chains.root(b))

    def _composite(
        self,
        func: Callable,
        name: str,
        args: tuple,
        kwargs: dict,
        slots: Sequence[Slot],
        at_zero: float,
    ) -> Tensor:
        root = self.chains.root(taken(args, kwargs, slots[0]))
        out, _ = self._through(
            "composite", func, name, args, kwargs, slots, at=[root.tensor], at_zero=at_zero
        )
        return self._note(out, Note(gate=NONLINEAR, root=root, at_zero=at_zero))

    def _normalised(
        self, func: Callable, name: str, args: tuple, kwargs: dict, slots: Sequence[Slot]
    ) -> Tensor:
        """a * s or a / s with a statistic s: everything to a; of two statistics, a statistic."""
        kept = [s for s in slots if not self.chains[taken(args, kwargs, s)].statistic]
        if len(kept) != 1:
            return self._note(func(*args, **kwargs), Note(statistic=True))
        note = self.chains[taken(args, kwargs, kept[0])]
        out, _ = self._through("scale", func, name, args, kwargs, kept)
        return self._note(out, scaled(note))

    def _scaled(
        self,
        func: Callable,
        name: str,
        args: tuple,
        kwargs: dict,
        slot: Slot,
        by: Any,
        inverse: bool = False,
    ) -> Tensor:
        """A product with a constant; a chain that is 0 at 0 stays so under any."""
        x = taken(args, kwargs, slot)
        note, start = self.chains[x], self.chains.at_zero(x)
        out, _ = self._through("scale", func, name, args, kwargs, [slot])
        if note.statistic:
            return self._note(out, Note(statistic=True))
        if start == 0.0 and out.shape == x.shape:
            return self._note(out, scaled(note, self.chains.root(x)))
        if is_number(by):
            value = start / by if inverse else start * by
            return self._note(out, scaled(note, self.chains.root(x), value))
        return self._note(out, scaled(note))

    def _add(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slots = _slot(args, kwargs, 0, "input", "self"), _slot(args, kwargs, 1, "other")
        active = [s for s in slots if self.is_activation(taken(args, kwargs, s))]
        notes = [self.chains[taken(args, kwargs, s)] for s in active]
        if len(active) == 1:
            other = taken(args, kwargs, slots[1 - slots.index(active[0])])
            return self._shifted(func, name, args, kwargs, active[0], slots, other)
        a, b = (taken(args, kwargs, s) for s in slots)
        if name == "sub" and notes[1].mean_of is not None and notes[1].mean_of.tensor is a:
            out, _ = self._through("centre", func, name, args, kwargs, [slots[0]])
            return self._note(out, EMPTY)
        root = self.chains.root(a) if self._same_root(a, b) else None
        with_zero = root is not None and not kwargs
        out, _ = self._through("add", func, name, args, kwargs, slots)
        return self._note(
            out,
            Note(
                root=root if with_zero else None,
                at_zero=_sum(name, self.chains.at_zero(a), self.chains.at_zero(b)),
                statistic=all(note.statistic for note in notes),
                scores=any(note.scores for note in notes),
                makers=joined(notes),
            ),
        )

    def _shifted(
        self,
        func: Callable,
        name: str,
        args: tuple,
        kwargs: dict,
        slot: Slot,
        slots: Sequence[Slot],
        by: Any,
    ) -> Tensor:
        """A sum with a constant: a number, a mask or bias on scores, or a tensor like any other."""
        x = taken(args, kwargs, slot)
        note, number = self.chains[x], is_number(by) or (isinstance(by, Tensor) and by.ndim == 0)
        kind = "scale" if number or note.scores else "add"
        out, _ = self._through(kind, func, name, args, kwargs, [slot])
        if note.statistic:
            return self._note(out, Note(statistic=True))
        kept = Note(scores=note.scores, makers=note.makers)
        if is_number(by) and not kwargs:
            pair = (self.chains.at_zero(x), by) if slot == slots[0] else (by, self.chains.at_zero(x))
            kept = replace(kept, root=self.chains.root(x), at_zero=_sum(name, *pair))
        return self._note(out, kept)

    # ------------------------------------------------------------------------ products
    def _product(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        added = _added(name, args, kwargs)
        if added is not None and self.is_activation(taken(args, kwargs, added)):
            return self._sum_of_product(func, name, args, kwargs, added)
        slots = _factors(name, args, kwargs)
        active = [s for s in slots if self.is_activation(taken(args, kwargs, s))]
        if len(slots) != 2 or not active:
            if len(slots) > 2 and len(active) > 1:
                return self._unknown(func, name, args, kwargs)
            return self._note(func(*args, **kwargs), EMPTY) if not active else self._linear(
                func, name, args, kwargs, active[0], slots
            )
        if len(active) == 1:
            return self._linear(func, name, args, kwargs, active[0], slots)
        notes = [self.chains[taken(args, kwargs, s)] for s in slots]
        for maker in (maker for note in notes for maker in note.makers):
            maker.feeds_attention = True
        maps = [note.gate == SOFTMAX for note in notes]
        kind = "map" if sum(maps) == 1 else "product"
        ordered = slots if maps[0] or kind == "product" else (slots[1], slots[0])
        out, _ = self._through(
            kind, func, name, args, kwargs, ordered, added=_added(name, args, kwargs)
        )
        return self._note(out, Note(attended=kind == "map", scores=kind == "product"))

    def _sum_of_product(
        self, func: Callable, name: str, args: tuple, kwargs: dict, added: Slot
    ) -> Tensor:
        """A product that is added to an activation: as the sum that it is."""
        summand, out = taken(args, kwargs, added), func(*args, **kwargs)
        if name in kinds.ADDED_TO:
            empty = torch.zeros((), dtype=summand.dtype, device=summand.device)
            scale = kwargs.get("beta", 1)
            summand = summand if scale == 1 else self._call(torch.mul, summand, scale)
        else:
            empty = None
            summand = summand.view(-1, *[1] * (out.ndim - 2 if name != "linear" else 0))
        args, kwargs = filled(args, kwargs, [added], [empty])
        product = self._call(func, *args, **kwargs)
        return self._stand_in(out, self._call(torch.add, product, summand))

    def _linear(
        self, func: Callable, name: str, args: tuple, kwargs: dict, slot: Slot, slots: Sequence[Slot]
    ) -> Tensor:
        """A product with constants."""
        x = taken(args, kwargs, slot)
        note = self.chains[x]
        convolves = name in kinds.CONVOLUTIONS
        image = convolves and x.ndim >= 4 and self._is_input(x)
        kind = "image" if image and "image" in self._bridged | self._gated else (
            "convolution" if convolves else "linear"
        )
        weights = tuple(s for s in slots if s != slot)
        out, operation = self._through(
            kind, func, name, args, kwargs, [slot],
            weight=weights[0] if len(weights) == 1 else None, added=_added(name, args, kwargs),
        )  # fmt: skip
        if operation is not None:
            operation.feeds_attention = note.attended
        mixes_heads = out.shape == x.shape and x.ndim == 4  # talking heads
        makers = () if operation is None else (operation,)
        if mixes_heads and (note.scores or note.gate == SOFTMAX):
            return self._note(out, Note(gate=note.gate, scores=note.scores, makers=makers))
        return self._note(out, Note(makers=makers))

    def _is_input(self, x: Tensor) -> bool:
        """Whether a tensor is an input itself, cast or cloned."""
        node = x.grad_fn
        for _ in range(_INSIDE):
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                return self.is_activation(leaf)
            if node is None or not node.name().startswith(("Clone", "ToCopy", "Alias", "View")):
                return False
            node = node.next_functions[0][0]
        return False

    def _attention(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        names = ("query", "key", "value", "attn_mask")
        slots = [_slot(args, kwargs, i, role) for i, role in enumerate(names)]
        on = [s is not None and self.is_activation(taken(args, kwargs, s)) for s in slots]
        scored = on[0] or on[1] or on[3]
        shares: list[list[tuple[str, int, bool]]] = [
            [("map", 0, not on[2]), ("product", 0, not (on[0] and on[1]))],
            [("map", 0, not on[2]), ("product", 1, not (on[0] and on[1]))],
            [("map", 1, not scored)],
            [("map", 0, not on[2])],
        ]
        roles = [i for i in range(4) if on[i]]
        for i in roles:
            for maker in self.chains[taken(args, kwargs, slots[i])].makers:
                maker.feeds_attention = True
        out, _ = self._through(
            "attention", func, name, args, kwargs, [slots[i] for i in roles],
            uses=[shares[i] for i in roles], roles=tuple(names[i] for i in roles),
        )  # fmt: skip
        return self._note(out, Note(attended=True))

    # ------------------------------------------------------------------------ other kinds
    def _norm(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slot = _slot(args, kwargs, 0, "input")
        active = [t for t in _tensors((*args, *kwargs.values())) if self.is_activation(t)]
        if len(active) != 1 or active[0] is not taken(args, kwargs, slot):
            return self._unknown(func, name, args, kwargs)  # a scale that depends on the input
        kind = "batch_norm" if _is_linear_norm(name, args, kwargs) else "norm"
        makers = self.chains[active[0]].makers
        out, _ = self._through(kind, func, name, args, kwargs, [slot])
        return self._note(out, Note(makers=makers))

    def _softmax(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slot = _slot(args, kwargs, 0, "input", "self")
        out, _ = self._through("softmax", func, name, args, kwargs, [slot])
        return self._note(out, EMPTY if name == "log_softmax" else Note(gate=SOFTMAX))

    def _reduce(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slot = _slot(args, kwargs, 0, "input", "self")
        x = taken(args, kwargs, slot)
        if not self.is_activation(x):
            return self._unknown(func, name, args, kwargs)  # sampled at places that it computes
        note = self.chains[x]
        out, _ = self._through("reduce", func, name, args, kwargs, [slot])
        mean = Version.of(x) if name == "mean" and out.ndim == x.ndim else None
        return self._note(out, Note(statistic=note.statistic, mean_of=mean))

    def _accumulate(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        slots = [_slot(args, kwargs, 0, "input", "self"), _slot(args, kwargs, 3, "source", "src")]
        active = [s for s in slots if s and self.is_activation(taken(args, kwargs, s))]
        out, _ = self._through("accumulate", func, name, args, kwargs, active)
        return self._note(out, EMPTY)

    def _dropout(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        x = args[0] if args else kwargs["input"]
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        if not training or "scale" not in self._bridged:
            return self._move(func, name, args, kwargs, [x])
        slot = _slot(args, kwargs, 0, "input")
        out, _ = self._through("scale", func, name, args, kwargs, [slot])
        return self._note(out, replace(self.chains[x], root=None, at_zero=0.0))

    def _move(
        self, func: Callable, name: str, args: tuple, kwargs: dict, active: Sequence[Tensor]
    ) -> Any:
        notes = [self.chains[x] for x in active]
        still = len(active) == 1 and name in kinds.STILL
        roots = [(self.chains.root(x), self.chains.at_zero(x)) for x in active] if still else []
        out = func(*args, **kwargs)
        made = args[0] if name == "setitem" else out
        note = moved(notes)
        if still and isinstance(made, Tensor) and made.shape == active[0].shape:
            note = replace(notes[0], root=roots[0][0], at_zero=roots[0][1])
        if made is not (active[0] if active else None) or name == "setitem":
            self._note(made, note)
        return out

    def _unknown(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
        """No rule: torch's own Python functions are looked into, others keep their gradient."""
        if _can_be_opened(func) and func not in self._open:
            self._open.add(func)
            try:
                with self:  # a mode is off inside its own handler
                    return _opened(func)(*args, **kwargs)
            finally:
                self._open.discard(func)
        out = func(*args, **kwargs)
        if any(t.requires_grad for t in _tensors((out,))) and name not in kinds.LINEAR_AS_IS:
            self._name_unruled(name)
        return self._note(out, EMPTY)

    def _name_unruled(self, name: str) -> None:
        key = name, self.tap._module()
        self.unruled[key] = self.unruled.get(key, 0) + 1

    # ------------------------------------------------------------------------ stand-ins
    def _call(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(func, (), args, kwargs)

    def _glu(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        x, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else -1)
        a, b = self._call(torch.chunk, x, 2, dim)
        other = self._call(torch.mul, a, self._call(torch.sigmoid, b))
        return self._stand_in(func(*args, **kwargs), other)

    def _fused_sum(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        """addcmul, addcdiv, lerp: as the sums that they are."""
        x, one, two = (args + tuple(kwargs[k] for k in _FUSED[name] if k in kwargs))[:3]
        if name == "lerp":
            apart = self._call(torch.sub, one, x)
            other = self._call(torch.mul, apart, two)
        else:
            pair = self._call(torch.mul if name == "addcmul" else torch.div, one, two)
            other = self._call(torch.mul, pair, kwargs.get("value", 1))
        return self._stand_in(func(*args, **kwargs), self._call(torch.add, x, other))

    def _and_mean(self, func: Callable, name: str, args: tuple, kwargs: dict) -> tuple:
        """var_mean, std_mean: a statistic and a mean."""
        spread, mean = func(*args, **kwargs)
        alone = torch.var if name == "var_mean" else torch.std
        x, dim, keep = args[0], kwargs.get("dim"), kwargs.get("keepdim", False)
        if dim is None and len(args) > 1 and not isinstance(args[1], bool):
            dim = args[1]
        dims = tuple(range(x.ndim)) if dim is None else dim
        other = self._call(torch.mean, x, dims, keepdim=keep)
        return (
            self._stand_in(spread, self._call(alone, *args, **kwargs)),
            self._stand_in(mean, other),
        )

    def _cosine(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Tensor:
        a, b = args[:2]
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 1)
        eps = kwargs.get("eps", args[3] if len(args) > 3 else 1e-8)
        with self:
            a, b = (x / x.norm(dim=dim, keepdim=True).clamp_min(eps) for x in (a, b))
            other = (a * b).sum(dim)
        return self._stand_in(func(*args, **kwargs), other)

    def _stand_in(self, out: Tensor, other: Tensor) -> Tensor:
        """The model's own values, with the graph of what they were rewritten as."""
        return self._note(_StandIn.apply(out.detach(), other), self.chains[other])


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, other: Tensor) -> Tensor:
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        return None, arriving[0]


Handler = Callable[[Operators, Callable, str, tuple, dict], Any]
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(kinds.ACTIVATIONS, Operators._activation),
    **dict.fromkeys(("pow", "rpow", "float_power"), Operators._power),
    **dict.fromkeys(kinds.STATISTICS, Operators._statistic),
    "mul": Operators._multiply,
    **dict.fromkeys(("div", "rdiv"), Operators._divide),
    **dict.fromkeys(("add", "sub", "rsub"), Operators._add),
    **dict.fromkeys(kinds.PRODUCTS, Operators._product),
    "scaled_dot_product_attention": Operators._attention,
    **dict.fromkeys(kinds.NORMS, Operators._norm),
    **dict.fromkeys(kinds.SOFTMAXES, Operators._softmax),
    **dict.fromkeys(kinds.REDUCTIONS, Operators._reduce),
    **dict.fromkeys(kinds.ACCUMULATIONS, Operators._accumulate),
    "dropout": Operators._dropout,
    "glu": Operators._glu,
    **dict.fromkeys(("addcmul", "addcdiv", "lerp"), Operators._fused_sum),
    **dict.fromkeys(("var_mean", "std_mean"), Operators._and_mean),
    "cosine_similarity": Operators._cosine,
}
_FUSED = {
    "addcmul": ("tensor1", "tensor2"),
    "addcdiv": ("tensor1", "tensor2"),
    "lerp": ("end", "weight"),
}
# What an in-place operation may be; others may be anything.
_KINDS_OF = {
    **dict.fromkeys(kinds.ACTIVATIONS, {"activation"}),
    **dict.fromkeys(("add", "sub"), {"add", "scale", "centre"}),
    **dict.fromkeys(kinds.ACCUMULATIONS, {"accumulate"}),
    "dropout": {"scale"},
    "scaled_dot_product_attention": {"map", "product", "attention"},
}
# Where functions of torch.nn.functional take `inplace`.
_INPLACE_AT = {
    "relu": 1, "relu6": 1, "selu": 1, "silu": 1, "mish": 1, "hardswish": 1, "hardsigmoid": 1,
    "elu": 2, "celu": 2, "leaky_relu": 2, "hardtanh": 3, "threshold": 3, "rrelu": 4, "dropout": 3,
}  # fmt: skip


def _asks_in_place(name: str, args: tuple, kwargs: dict) -> bool:
    place = _INPLACE_AT.get(name)
    if place is None:
        return False
    return kwargs.get("inplace", args[place] if len(args) > place else False) is True


def _out_of_place(
    func: Callable, name: str, args: tuple, kwargs: dict
) -> tuple[Callable, tuple, dict]:
    """The same operation with a result of its own."""
    if _asks_in_place(name, args, kwargs):
        return func, args[: _INPLACE_AT[name]], {**kwargs, "inplace": False}
    return getattr(Tensor, name, None) or getattr(torch, name), args, kwargs


def _sum(name: str, a: float, b: float) -> float:
    return {"add": a + b, "sub": a - b, "rsub": b - a}[name]


def _slot(args: tuple, kwargs: dict, place: int, *names: str) -> Any:
    """Where an argument stands; None where it was not given."""
    if place < len(args):
        return (place,)
    return next(((name,) for name in names if name in kwargs), None)


def _factors(name: str, args: tuple, kwargs: dict) -> list[Slot]:
    """Where the factors of a product stand."""
    if name == "einsum":
        if len(args) == 2 and isinstance(args[1], (list, tuple)):
            return [(1, i) for i in range(len(args[1]))]
        return [(i,) for i in range(1, len(args))] or [
            ("operands", i) for i in range(len(kwargs["operands"]))
        ]
    places = kinds.PRODUCTS[name]
    found = [_slot(args, kwargs, p, *n) for p, n in zip(places, kinds.FACTOR_NAMES, strict=True)]
    return [slot for slot in found if slot is not None]


def _added(name: str, args: tuple, kwargs: dict) -> Slot | None:
    """Where the tensor stands that a product is added to: a bias, or addmm's first operand."""
    if name in kinds.ADDED_TO:
        return _slot(args, kwargs, 0, "input", "self")
    if name == "linear" or name in kinds.CONVOLUTIONS:
        slot = _slot(args, kwargs, 2, "bias")
        return slot if slot is not None and taken(args, kwargs, slot) is not None else None
    return None


def _is_linear_norm(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a norm uses statistics that were kept, not those of its input."""
    if name == "batch_norm":
        return not kwargs.get("training", args[5] if len(args) > 5 else False)
    if name == "instance_norm":
        return not kwargs.get("use_input_stats", args[5] if len(args) > 5 else True)
    return False


def _check_plain(name: str, active: Sequence[Tensor], kwargs: dict) -> None:
    if kwargs.get("out") is not None:
        raise InputError(
            f"{name}(out=...) writes an activation into a given tensor, which no rule can follow; "
            "let the model use what the function returns"
        )
    if any(x.is_nested for x in active):
        raise InputError(f"{name} of nested tensors: expected dense ones, padded to one length")


def _can_be_opened(func: Any) -> bool:
    return isinstance(func, types.FunctionType) and _OVERRIDE_CHECKS[1] in func.__globals__


def _opened(func: Any) -> Callable:
    """`func` with the checks switched off that would send it back to the active mode."""
    namespace = {**func.__globals__, **dict.fromkeys(_OVERRIDE_CHECKS, lambda *_: False)}
    plain = types.FunctionType(
        func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__
    )
    plain.__kwdefaults__ = func.__kwdefaults__
    return plain


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found
