"""Counts, operation by operation, what relevance comes in and goes out under gradient rules.

At every operation, with g what arrives at its output y: what arrives, Σ y∘g, is what goes on to the
activations that it read, Σ x∘g, and what is absorbed by constants: biases, f(0), constant summands,
and under AttnLRP what Taylor's expansion of softmax drops. Anything else is a missing rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from captum_attn.observe.operators import kinds
from captum_attn.observe.operators.call import Call, tensors
from captum_attn.observe.operators.operators import Operators
from captum_attn.observe.operators.rewrites import REWRITES

# Where what is missing has a name: Taylor's expansion, or constants among what is moved.
ABSORBING = kinds.SOFTMAXES | kinds.MOVING | {"scaled_dot_product_attention", "dropout"}


@dataclass
class Record:
    """One operation: what arrived, what went on, and what constants absorbed."""

    name: str
    module: str
    absorbs: bool
    arrived: float = 0.0
    went_on: float = 0.0
    absorbed: float = 0.0

    @property
    def missing(self) -> float:
        return 0.0 if self.absorbs else self.arrived - self.went_on - self.absorbed


class Probe(torch.autograd.Function):
    """x -> x; writes down Σ x∘g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, record: Record) -> Tensor:
        ctx.record, ctx.x = record, x.detach().clone()
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        (g,) = arriving
        if g is not None:
            ctx.record.went_on += float((ctx.x.double() * g.double()).sum())
        return g, None


class Counting(Operators):
    """Operators that keep books."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.records: list[Record] = []
        self._depth = 0

    def __torch_function__(
        self, func: Any, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name, in_place = kinds.read(func)
        call = Call(func, name, args, kwargs or {})
        active = [t for t in call.tensors() if self.is_activation(t)]
        counted = self._depth == 0 and active and torch.is_grad_enabled()
        if not counted or in_place or call.writes() or name in kinds.CONSTANT:
            return self._deeper(call)
        if name in REWRITES:  # what it is made of is counted
            return super().__torch_function__(func, types_, args, kwargs)
        plain = [t for t in active if not self.chains[t].statistic]
        if not plain or name in kinds.STATISTICS:
            return self._deeper(call)
        record = Record(name, self.tap.modules.name(), name in ABSORBING)
        out = self._deeper(self._probed(call, plain, record))
        if name in kinds.PRODUCTS and isinstance(out, Tensor) and out._is_view():
            # a fused product may end in a view; what the model writes into it passes that by
            alias, note = Probe.apply(out, Record(name, "", True)), self.chains[out]
            self.chains[alias], out = note, alias
        if not any(self.chains[made].statistic for made in tensors((out,))):
            self._watch(call, out, record)
        return out

    def _deeper(self, call: Call) -> Any:
        self._depth += 1
        try:
            return super().__torch_function__(call.func, (), call.args, call.kwargs)
        finally:
            self._depth -= 1

    def _probe(self, x: Tensor, record: Record) -> Tensor:
        probe = Probe.apply(x, record)
        root, at_zero = self.chains.root(x), self.chains.at_zero(x)
        self.chains[probe] = replace(self.chains[x], root=root, at_zero=at_zero)
        return probe

    def _probed(self, call: Call, plain: list[Tensor], record: Record) -> Call:
        def probed(value: Any) -> Any:
            if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
                return type(value)(probed(item) for item in value)
            mine = isinstance(value, Tensor) and any(value is t for t in plain)
            return self._probe(value, record) if mine else value

        kwargs = {name: probed(value) for name, value in call.kwargs.items()}
        return Call(call.func, call.name, tuple(map(probed, call.args)), kwargs)

    def _through(self, kind: str, call: Call, slots: Any, **settings: Any) -> Any:
        if settings.get("root") is not None:  # a composite leads straight to its root
            record = Record("composite", self.tap.modules.name(), False)
            settings["root"] = self._probe(settings["root"], record)
            out, operation = super()._through(kind, call, slots, **settings)
            at_zero = settings.get("at_zero", 0.0)
            self._count(out, record, lambda g: float((g.double() * at_zero).sum()))
            return out, operation
        if kind == "activation" and settings.get("at_zero") is not None and self._depth == 1:
            self._at_zero = settings["at_zero"]
        return super()._through(kind, call, slots, **settings)

    def _watch(self, call: Call, out: Any, record: Record) -> None:
        if call.name in ("mul", "div") and self._is_composite(out):
            return
        constant = self._constants(call)
        for made in tensors((out,)):
            if made.requires_grad and made.grad_fn is not None:
                self._count(made, record, constant)

    def _is_composite(self, out: Any) -> bool:
        operation = getattr(getattr(out, "grad_fn", None), "operation", None)
        return operation is not None and operation.kind == "composite"

    def _count(self, made: Tensor, record: Record, constant: Any) -> None:
        value, edge = made.detach().clone(), get_gradient_edge(made)

        def count(arriving: tuple[Tensor | None, ...]) -> None:
            g = arriving[edge.output_nr]
            if g is not None:
                record.arrived += float((value.double() * g.double()).sum())
                record.absorbed += constant(g)

        edge.node.register_prehook(count)  # the model may write into the tensor later
        self.records.append(record)

    def _constants(self, call: Call) -> Any:
        """What the constants in an operation absorb of g."""
        at_zero, self._at_zero = getattr(self, "_at_zero", 0.0), 0.0
        summand: Any = at_zero
        added = call.added() if call.name in kinds.PRODUCTS else None
        if call.name in ("add", "sub", "rsub"):
            one, other = (call.at(slot) for slot in call.pair())
            sign = {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}[call.name]
            alpha = call.kwargs.get("alpha", 1)
            if not self.is_activation(one):
                summand = one * sign[0]
            elif not self.is_activation(other):
                summand = other * sign[1] * alpha
            if any(self.is_activation(t) and self.chains[t].statistic for t in (one, other)):
                record_free = float("nan")
                return lambda g: record_free
        elif added is not None and not self.is_activation(call.at(added)):
            summand = call.at(added)
            if call.name in kinds.CONVOLUTIONS:
                return lambda g: float((g.double() * _over_channels(summand, g)).sum())
        elif call.name in kinds.NORMS:
            place = {"layer_norm": 3, "group_norm": 3, "instance_norm": 4, "batch_norm": 4}
            bias = call.argument(place[call.name], "bias") if call.name in place else None
            shift = 0.0 if bias is None else bias
            if call.name == "batch_norm":
                return lambda g: float((g.double() * _batch_shift(call, g)).sum())
            if bias is not None and call.name != "layer_norm":
                return lambda g: float((g.double() * _over_channels(shift, g)).sum())
            summand = shift
        summand = summand.detach().double() if isinstance(summand, Tensor) else summand
        return lambda g: float((g.double() * summand).sum())


def _over_channels(bias: Tensor, g: Tensor) -> Tensor:
    return bias.detach().double().view(-1, *[1] * (g.ndim - 2))


def _batch_shift(call: Call, g: Tensor) -> Tensor:
    """What a batch norm with kept statistics adds: b - mean w / std."""
    mean, var, weight, bias = (
        call.argument(i, n)
        for i, n in ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
    )
    shift = -mean / (var + call.argument(7, "eps", 1e-5)).sqrt()
    shift = shift if weight is None else shift * weight
    return _over_channels(shift if bias is None else shift + bias, g)
