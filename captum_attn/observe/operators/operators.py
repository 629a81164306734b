"""The mode below the tap: runs the model's own operations, and puts gates and bridges around them.

What the model computes is what it computes without: the operations run on the model's own tensors.
An *activation* is a tensor that depends on an input; weights, positions, masks and learned tokens
are constants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
)
from captum_attn.observe.operators.call import Call, Slot, tensors
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
from captum_attn.observe.operators.rewrites import REWRITES, can_be_opened, opened, stand_in

Uses = Sequence[tuple[str, int, bool]]  # a gate's shares, see `Cell.factor`
_INSIDE = 3  # nodes between a clone of an input and its leaf
_LARGEST = 1e30  # an f(0) beyond this is infinite


class Operators(TorchFunctionMode):
    """Puts gates and bridges around the operations of one forward run.

    Entered outside the tap (`with operators, tap:`), so that the tap sees the model's own operands
    and its calls land here.

    Args:
        tap (Tap): knows which leaves are inputs.
        tables (iterable of Rules): the tables that a backward pass may ask for.

    Attributes:
        cell (Cell): what the backward pass that runs asks for; its number of examples is known
            once the model has run.
        additive (set of str): inputs whose tokens were added to another input's, position by
            position, before anything mixed them (`token_type_ids`).
        ran (Counter): kind of operation -> how often one ran.
        unruled (Counter): (name of an operation that is neither linear nor ruled, module) -> how
            often it ran.
    """

    def __init__(self, tap: Tap, tables: Iterable[Rules]) -> None:
        super().__init__()
        self.tap, self.cell = tap, Cell()
        self.additive: set[str] = set()
        self.ran: Counter[str] = Counter()
        self.unruled: Counter[tuple[str, str]] = Counter()
        self.chains, self._kept = Chains(), Kept()
        rules = [(kind, rule) for table in tables for kind, rule in table.items()]
        self._gated = {kind for kind, rule in rules if isinstance(rule, Shares)}
        self._bridged = {kind for kind, rule in rules if not isinstance(rule, Shares)}
        self._with_output = {
            kind for kind, rule in rules if getattr(rule, "wants_output", True)
        } & self._bridged
        self._inputs: set[int] = set()  # ids of the inputs' leaves
        self._open: set[Callable] = set()

    # ------------------------------------------------------------------------ the mode
    def __torch_function__(
        self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.tap.is_paused:
            return func(*args, **(kwargs or {}))
        name, in_place = kinds.read(func)
        call = Call(func, name, args, kwargs or {})
        if name in kinds.CONSTANT:
            return self._note(call.run(), LEARNED) if name in kinds.ROUNDINGS else call.run()
        given = [t for t in call.tensors() if t.requires_grad]
        active = [t for t in given if self.is_activation(t)]
        handler = _HANDLERS.get(name)
        ruled = handler is not None and bool(active) and torch.is_grad_enabled()
        if (in_place or call.writes()) and args and isinstance(args[0], Tensor):
            if ruled and handler is not None and self._rules_for(name):
                return self._written(call, handler)
            self._kept.before_write(args[0])
        if not active or not torch.is_grad_enabled():
            out = call.run()
            return self._note(out, LEARNED) if given else out
        _check_plain(call, active)
        if handler is not None:
            return handler(self, call)
        if name in kinds.MOVING:
            return self._move(call, active)
        return self._unknown(call)

    def is_activation(self, value: Any) -> bool:
        """Whether a tensor depends on an input, by more than the learned tokens of the model."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        if value.grad_fn is not None:
            return not self.chains[value].learned
        if id(value) not in self._inputs:
            self._inputs = {id(leaf.tensor) for leaf in self.tap.leaves if leaf.name}
        return id(value) in self._inputs

    def enter(self, entered: Mapping[str, Any]) -> None:
        """Notes which input a tensor is, before the run."""
        for name, value in entered.items():
            if isinstance(value, Tensor) and value.requires_grad:
                self.chains[value] = Note(inputs=frozenset([name]))

    def call(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Runs a function as if the model had called it."""
        return self.__torch_function__(func, (), args, kwargs)

    def _written(self, call: Call, handler: Handler) -> Tensor:
        """An operation that writes into its first operand: on a clone, and the result copied in.

        Bridges cannot follow a write, and what they keep must not be overwritten.
        """
        target = call.args[0]
        before = target.clone()
        self.chains[before] = replace(self.chains[target], root=self.chains.root(target))
        made = handler(self, call.on(before))
        self._kept.before_write(target)
        target.copy_(made)
        self.chains[target] = self.chains[made]
        return target

    def _rules_for(self, name: str) -> bool:
        """Whether any table in play has a rule for what the operation may be."""
        return bool(_KINDS_OF.get(name, set(kinds.KINDS)) & (self._gated | self._bridged))

    def _note(self, out: Any, note: Note) -> Any:
        """Writes a note on whatever was made."""
        for made in tensors((out,)):
            if made.requires_grad:
                self.chains[made] = note
        return out

    # ------------------------------------------------------------------------ the funnel
    def _through(
        self,
        kind: str,
        call: Call,
        slots: Sequence[Slot],
        *,
        uses: Sequence[Uses] | None = None,
        root: Tensor | None = None,
        at_zero: Any = 0.0,
        **settings: Any,
    ) -> tuple[Tensor, Operation | None]:
        """Runs an operation with the gates and the bridge that the rules of its kind need.

        Args:
            slots: where its activations stand.
            uses: each activation's shares; default: those of `kind`, in order.
            root: what the bridge leads to; default: what stands at the slots.
        """
        self.ran[kind] += 1
        operands = [call.at(slot) for slot in slots]
        uses = uses or [[(kind, index, False)] for index in range(len(slots))]
        if any(use[0] in self._gated for each in uses for use in each):
            gated = [Gate.apply(x, self.cell, use) for x, use in zip(operands, uses, strict=True)]
            out = call.having(slots, gated).run()
        else:
            out = call.run()
        if kind not in self._bridged or not out.requires_grad:
            return out, None
        ends = operands if root is None else [root]
        value = out.detach()
        operation = Operation(
            kind,
            tuple(x.detach() for x in ends),
            value if kind in self._with_output else value.new_empty(0),
            self.cell,
            call.having(slots, [None] * len(slots)),
            tuple(slots) if root is None else ((0,),),
            at_zero,
            settings=settings,
        )
        self._kept.keep(operation)
        return Bridge.apply(operation, out, *ends), operation

    # ------------------------------------------------------------------------ elementwise
    def _activation(self, call: Call) -> Tensor:
        slot = call.slot(0, "input", "self")
        note = self.chains[call.at(slot)]
        if note.statistic or not self.is_activation(call.at(slot)):
            return self._note(call.run(), Note(statistic=note.statistic))
        return self._nonlinear(call, slot, call.name in kinds.ZERO_AT_ZERO)

    def _nonlinear(self, call: Call, slot: Slot, zero: bool) -> Tensor:
        """An elementwise function of what stands at `slot`; `zero`: whether f(0) = 0."""
        x = call.at(slot)

        def value(at: float) -> Any:
            if zero and at == 0.0:
                return 0.0
            point = torch.full((), at, dtype=x.dtype, device=x.device)
            made = call.having([slot], [point]).run().detach()
            return float(made) if made.ndim == 0 else made

        at_zero, start = value(0.0), self.chains.at_zero(x)
        if isinstance(at_zero, float) and not abs(at_zero) < _LARGEST:
            self._name_unruled(call.name)
        chained = at_zero if start == 0.0 else value(start)
        root = self.chains.root(x)
        out, _ = self._through("activation", call, [slot], at_zero=at_zero)
        if not isinstance(chained, float):
            return self._note(out, Note(gate=NONLINEAR, inputs=self.chains[x].inputs))
        note = Note(gate=NONLINEAR, root=root, at_zero=chained, inputs=self.chains[x].inputs)
        return self._note(out, note)

    def _power(self, call: Call) -> Tensor:
        base, exponent = call.slot(0, "input", "self"), call.slot(1, "exponent", "other")
        if call.name == "rpow":
            base, exponent = exponent, base
        power = call.at(exponent)
        if self.is_activation(power):
            both = self.is_activation(call.at(base))
            return self._unknown(call) if both else self._nonlinear(call, exponent, False)
        if isinstance(power, Tensor) and power.numel() > 1:
            return self._nonlinear(call, base, bool((power >= 1).all()))
        if float(power) < 1:
            return self._statistic(call)
        if self.chains[call.at(base)].statistic:
            return self._note(call.run(), Note(statistic=True))
        return self._nonlinear(call, base, True)

    def _statistic(self, call: Call, slot: Slot | None = None) -> Tensor:
        slot = call.slot(0, "input", "self") if slot is None else slot
        if self.chains[call.at(slot)].statistic:
            return self._note(call.run(), Note(statistic=True))
        out, _ = self._through("statistic", call, [slot])
        return self._note(out, Note(statistic=True))

    def _multiply(self, call: Call) -> Tensor:
        slots = call.pair()
        active = [s for s in slots if self.is_activation(call.at(s))]
        if len(active) == 1:
            return self._scaled(call, active[0], call.at(slots[1 - slots.index(active[0])]))
        a, b = (call.at(s) for s in slots)
        if self.chains[a].statistic or self.chains[b].statistic:
            return self._normalised(call, slots)
        if self._same_root(a, b):
            return self._composite(call, self.chains.at_zero(a) * self.chains.at_zero(b))
        gates = [bool(self.chains[x].gate) for x in (a, b)]
        if sum(gates) == 1:
            out, _ = self._through("gate", call, slots if gates[0] else slots[::-1])
            return self._note(out, EMPTY)
        out, _ = self._through("multiply", call, slots)
        return self._note(out, Note(gate=NONLINEAR if all(gates) else ""))

    def _divide(self, call: Call) -> Tensor:
        slots = call.pair()
        if call.name == "rdiv":
            slots = slots[::-1]
        if call.kwargs.get("rounding_mode") is not None:
            return call.run()
        above, below = (call.at(s) for s in slots)
        if not self.is_activation(below):
            return self._scaled(call, slots[0], below)
        if not self.is_activation(above):  # a constant over an activation, as `reciprocal`
            return self._statistic(call, slots[1])
        if self.chains[below].statistic:
            return self._normalised(call, slots)
        zero = self.chains.at_zero(below)
        if self._same_root(above, below) and zero:
            return self._composite(call, self.chains.at_zero(above) / zero)
        out, _ = self._through("divide", call, slots)
        return self._note(out, Note(gate=self.chains[above].gate))

    def _same_root(self, a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and self.chains.root(a).same(self.chains.root(b))

    def _composite(self, call: Call, at_zero: float) -> Tensor:
        """A product or quotient of two functions of one tensor, straight to that tensor."""
        slots = call.pair()
        root = self.chains.root(call.at(slots[0]))
        out, _ = self._through("composite", call, slots, root=root.tensor, at_zero=at_zero)
        return self._note(out, Note(gate=NONLINEAR, root=root, at_zero=at_zero))

    def _normalised(self, call: Call, slots: Sequence[Slot]) -> Tensor:
        """a * s or a / s with a statistic s: everything to a; of two statistics, a statistic."""
        kept = [s for s in slots if not self.chains[call.at(s)].statistic]
        if len(kept) != 1:
            return self._note(call.run(), Note(statistic=True))
        note = self.chains[call.at(kept[0])]
        out, _ = self._through("scale", call, kept)
        return self._note(out, scaled(note))

    def _scaled(self, call: Call, slot: Slot, by: Any) -> Tensor:
        """A product with a constant; a chain that is 0 at 0 stays so under any."""
        x = call.at(slot)
        note, start, root = self.chains[x], self.chains.at_zero(x), self.chains.root(x)
        out, _ = self._through("scale", call, [slot])
        if note.statistic:
            return self._note(out, Note(statistic=True))
        if start == 0.0 and out.shape == x.shape:
            return self._note(out, scaled(note, root))
        if is_number(by):
            value = start * by if call.name == "mul" else start / by
            return self._note(out, scaled(note, root, value))
        return self._note(out, scaled(note))

    def _times(self, call: Call) -> Tensor:
        """-x and the like: a product with a number that is not written."""
        slot = call.slot(0, "input", "self")
        note = self.chains[call.at(slot)]
        out, _ = self._through("scale", call, [slot])
        return self._note(out, scaled(note))

    def _add(self, call: Call) -> Tensor:
        slots = call.pair()
        active = [s for s in slots if self.is_activation(call.at(s))]
        if len(active) == 1:
            return self._shifted(call, active[0], call.at(slots[1 - slots.index(active[0])]))
        a, b = (call.at(s) for s in slots)
        notes = self.chains[a], self.chains[b]
        if call.name == "sub" and notes[1].mean_of is not None and notes[1].mean_of.tensor is a:
            out, _ = self._through("centre", call, slots[:1])
            return self._note(out, EMPTY)
        note = Note(
            statistic=all(note.statistic for note in notes),
            scores=any(note.scores for note in notes),
            makers=joined(notes),
            inputs=self._added_inputs(*(note.inputs for note in notes)),
        )
        if self._same_root(a, b) and not call.kwargs:
            value = _sum(call.name, self.chains.at_zero(a), self.chains.at_zero(b))
            note = replace(note, root=self.chains.root(a), at_zero=value)
        out, _ = self._through("add", call, slots)
        return self._note(out, note)

    def _added_inputs(self, one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
        """The inputs of a sum of tokens; those that come second in the signature are noted."""
        if not one or not other:
            return frozenset()
        if not one & other:
            order = {leaf.name: leaf.order for leaf in self.tap.leaves}
            later = max(one, other, key=lambda names: min(order.get(n, 0) for n in names))
            self.additive |= later
        return one | other

    def _shifted(self, call: Call, slot: Slot, by: Any) -> Tensor:
        """A sum with a constant: a number, a mask or bias on scores, or a tensor like any other."""
        x = call.at(slot)
        note, start, root = self.chains[x], self.chains.at_zero(x), self.chains.root(x)
        number = is_number(by) or (isinstance(by, Tensor) and by.ndim == 0)
        out, _ = self._through("scale" if number or note.scores else "add", call, [slot])
        if note.statistic:
            return self._note(out, Note(statistic=True))
        kept = Note(scores=note.scores, makers=note.makers, inputs=note.inputs)
        if is_number(by) and not call.kwargs:
            first = slot == call.pair()[0]
            value = _sum(call.name, start, by) if first else _sum(call.name, by, start)
            kept = replace(kept, root=root, at_zero=value)
        return self._note(out, kept)

    # ------------------------------------------------------------------------ products
    def _product(self, call: Call) -> Tensor:
        added = call.added()
        if added is not None and self.is_activation(call.at(added)):
            return stand_in(self, call, REWRITES["sum of a product"](self, call))
        slots = call.factors()
        active = [s for s in slots if self.is_activation(call.at(s))]
        if len(active) == 1:
            return self._linear(call, active[0], slots)
        if len(slots) != 2 or not active:
            return self._unknown(call)
        notes = [self.chains[call.at(s)] for s in slots]
        for maker in (maker for note in notes for maker in note.makers):
            maker.feeds_attention = True
        maps = [note.gate == SOFTMAX for note in notes]
        if sum(maps) == 1:
            ordered = slots if maps[0] else slots[::-1]
            out, _ = self._through("map", call, ordered)
            return self._note(out, Note(attended=True))
        out, _ = self._through("product", call, slots)
        return self._note(out, Note(scores=True))

    def _linear(self, call: Call, slot: Slot, slots: Sequence[Slot]) -> Tensor:
        """A product with constants."""
        x = call.at(slot)
        note, kind = self.chains[x], "linear"
        if call.name in kinds.CONVOLUTIONS:
            of_image = "image" in self._bridged | self._gated and self._is_image(x)
            kind = "image" if of_image else "convolution"
        weights = [s for s in slots if s != slot]
        out, operation = self._through(
            kind, call, [slot], weight=weights[0] if len(weights) == 1 else None, added=call.added()
        )
        if operation is not None:
            operation.feeds_attention = note.attended
        makers = () if operation is None else (operation,)
        if out.shape == x.shape and x.ndim == 4:  # talking heads
            return self._note(out, Note(gate=note.gate, scores=note.scores, makers=makers))
        return self._note(out, Note(makers=makers, inputs=note.inputs))

    def _is_image(self, x: Tensor) -> bool:
        """Whether a tensor is an input itself, cast or cloned, with two axes of pixels or more."""
        node = x.grad_fn if x.ndim >= 4 else None
        for _ in range(_INSIDE):
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                return self.is_activation(leaf)
            if node is None or not node.name().startswith(("Clone", "ToCopy", "Alias", "View")):
                return False
            node = node.next_functions[0][0]
        return False

    def _attention(self, call: Call) -> Tensor:
        names = ("query", "key", "value", "attn_mask")
        slots = [call.slot(i, role) for i, role in enumerate(names)]
        on = [s is not None and self.is_activation(call.at(s)) for s in slots]
        of_map = "map", 0, not on[2]
        alone = not (on[0] and on[1])
        shares: list[Uses] = [
            [of_map, ("product", 0, alone)],
            [of_map, ("product", 1, alone)],
            [("map", 1, not (on[0] or on[1] or on[3]))],
            [of_map],
        ]
        roles = [i for i in range(4) if on[i]]
        for i in roles:
            for maker in self.chains[call.at(slots[i])].makers:
                maker.feeds_attention = True
        out, _ = self._through(
            "attention", call, [slots[i] for i in roles],
            uses=[shares[i] for i in roles], roles=tuple(names[i] for i in roles),
        )  # fmt: skip
        return self._note(out, Note(attended=True))

    # ------------------------------------------------------------------------ other kinds
    def _norm(self, call: Call) -> Tensor:
        slot = call.slot(0, "input")
        active = [t for t in call.tensors() if self.is_activation(t)]
        if len(active) != 1 or active[0] is not call.at(slot):
            return self._unknown(call)  # a scale that depends on the input
        kind = "batch_norm" if _has_kept_statistics(call) else "norm"
        note = self.chains[active[0]]
        out, _ = self._through(kind, call, [slot])
        return self._note(out, Note(makers=note.makers, inputs=note.inputs))

    def _softmax(self, call: Call) -> Tensor:
        out, _ = self._through("softmax", call, [call.slot(0, "input", "self")])
        return self._note(out, EMPTY if call.name == "log_softmax" else Note(gate=SOFTMAX))

    def _reduce(self, call: Call) -> Tensor:
        slot = call.slot(0, "input", "self")
        x = call.at(slot)
        places = call.slot(1, "grid") if call.name == "grid_sample" else None
        if places is not None and self.is_activation(call.at(places)):
            self.ran["places"] += 1
            if "places" in self._gated:
                held = Gate.apply(call.at(places), self.cell, [("places", 0, False)])
                call = call.having([places], [held])
                if not self.is_activation(x):  # a learned table: its entries are constants
                    return self._note(call.run(), LEARNED)
            else:
                self._name_unruled(call.name)
        if not self.is_activation(x):
            return self._unknown(call)
        out, _ = self._through("reduce", call, [slot])
        mean = Version.of(x) if call.name == "mean" and out.ndim == x.ndim else None
        return self._note(out, Note(statistic=self.chains[x].statistic, mean_of=mean))

    def _solve(self, call: Call) -> Tensor:
        matrix, given = call.slot(0, "A", "input"), call.slot(1, "B")
        active = [self.is_activation(call.at(slot)) for slot in (given, matrix)]
        if not active[0]:
            return self._unknown(call)  # an inverse
        out, _ = self._through("solve", call, [given, matrix] if active[1] else [given])
        return self._note(out, EMPTY)

    def _accumulate(self, call: Call) -> Tensor:
        slots = [call.slot(0, "input", "self"), call.slot(3, "source", "src")]
        active = [s for s in slots if s is not None and self.is_activation(call.at(s))]
        out, _ = self._through("accumulate", call, active)
        return self._note(out, EMPTY)

    def _dropout(self, call: Call) -> Tensor:
        slot = call.slot(0, "input")
        if not call.argument(2, "training", True) or "scale" not in self._bridged:
            return self._move(call, [call.at(slot)])
        note = self.chains[call.at(slot)]
        out, _ = self._through("scale", call, [slot])
        return self._note(out, scaled(note))

    def _move(self, call: Call, active: Sequence[Tensor]) -> Any:
        """Moves, picks and repeats entries: what is known goes along."""
        if call.name in kinds.LIKE_ANOTHER:
            active = [x for x in active if x is call.args[0]]
            if not active:  # `scale.expand_as(tokens)` is as learned as `scale`
                return self._note(call.run(), LEARNED)
        first, still = active[0], len(active) == 1 and call.name in kinds.STILL
        if first.grad_fn is None:  # an input's leaf
            names = frozenset(leaf.name for leaf in self.tap.leaves if leaf.tensor is first)
            self.chains[first] = Note(inputs=names)
        note = moved([self.chains[x] for x in active])
        kept = replace(
            self.chains[first], root=self.chains.root(first), at_zero=self.chains.at_zero(first)
        )
        out = call.run()
        made = call.args[0] if call.name == "setitem" else out
        if still and isinstance(made, Tensor) and made.shape == first.shape:
            note = kept
        if made is not first or call.name == "setitem":
            self._note(made, note)
        return out

    def _rewritten(self, call: Call) -> Any:
        return stand_in(self, call, REWRITES[call.name](self, call))

    def _unknown(self, call: Call) -> Any:
        """No rule: torch's own Python functions are looked into, others keep their gradient."""
        if can_be_opened(call.func) and call.func not in self._open:
            self._open.add(call.func)
            try:
                with self:  # a mode is off inside its own handler
                    return opened(call.func)(*call.args, **call.kwargs)
            finally:
                self._open.discard(call.func)
        if call.name not in kinds.LINEAR_AS_IS:
            self._name_unruled(call.name)
        slots = [(i,) for i, value in enumerate(call.args) if self.is_activation(value)]
        if "other" in self._bridged and len(slots) == sum(map(self.is_activation, call.tensors())):
            return self._note(self._through("other", call, slots)[0], EMPTY)
        return self._note(call.run(), EMPTY)

    def _name_unruled(self, name: str) -> None:
        self.unruled[name, self.tap.modules.name()] += 1


Handler = Callable[[Operators, Call], Any]
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(kinds.ACTIVATIONS, Operators._activation),
    **dict.fromkeys(("pow", "rpow", "float_power"), Operators._power),
    **dict.fromkeys(kinds.STATISTICS, Operators._statistic),
    **dict.fromkeys(("neg", "rad2deg", "deg2rad"), Operators._times),
    "mul": Operators._multiply,
    **dict.fromkeys(("div", "rdiv"), Operators._divide),
    **dict.fromkeys(("add", "sub", "rsub"), Operators._add),
    **dict.fromkeys(kinds.PRODUCTS, Operators._product),
    "scaled_dot_product_attention": Operators._attention,
    **dict.fromkeys(kinds.NORMS, Operators._norm),
    **dict.fromkeys(kinds.SOFTMAXES, Operators._softmax),
    **dict.fromkeys(kinds.REDUCTIONS, Operators._reduce),
    **dict.fromkeys(kinds.ACCUMULATIONS, Operators._accumulate),
    **dict.fromkeys(kinds.SOLVES, Operators._solve),
    "dropout": Operators._dropout,
    **dict.fromkeys(REWRITES, Operators._rewritten),
}
# What an in-place operation may be; others may be anything.
_KINDS_OF = {
    **dict.fromkeys(kinds.ACTIVATIONS, {"activation"}),
    **dict.fromkeys(("add", "sub"), {"add", "scale", "centre"}),
    **dict.fromkeys(kinds.ACCUMULATIONS, {"accumulate"}),
    **dict.fromkeys(("dropout", "neg"), {"scale"}),
}


def _sum(name: str, a: float, b: float) -> float:
    return {"add": a + b, "sub": a - b, "rsub": b - a}[name]


def _has_kept_statistics(call: Call) -> bool:
    """Whether a norm uses statistics that were kept, not those of its input."""
    if call.name == "batch_norm":
        return not call.argument(5, "training", False)
    if call.name == "instance_norm":
        return not call.argument(5, "use_input_stats", True)
    return False


def _check_plain(call: Call, active: Sequence[Tensor]) -> None:
    if call.kwargs.get("out") is not None:
        raise InputError(
            f"{call.name}(out=...) writes an activation into a given tensor, which no rule can "
            "follow; let the model use what the function returns"
        )
    if any(x.is_nested for x in active):
        raise InputError(
            f"{call.name} of nested tensors: expected dense ones, padded to one length"
        )
