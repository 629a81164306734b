"""Fused operations as what they are made of: the values stay the model's own, the graph is theirs.

And torch's Python functions, looked into so that the mode sees what they are made of.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_attn.observe.operators import kinds
from captum_attn.observe.operators.call import Call

if TYPE_CHECKING:
    from captum_attn.observe.operators.operators import Operators

_OVERRIDE_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


class StandIn(torch.autograd.Function):
    """(the model's values, the same otherwise computed) -> the first, with the second's graph."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, other: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.passes_on = 2  # the first has no history
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        return None, arriving[0]


def stand_in(operators: Operators, call: Call, other: Any) -> Any:
    """The call's own values, with the graph of `other`."""
    with torch.no_grad():
        out = call.run()
    if isinstance(out, tuple):
        return tuple(_stand_in(operators, o, p) for o, p in zip(out, other, strict=True))
    return _stand_in(operators, out, other)


def _stand_in(operators: Operators, out: Tensor, other: Tensor) -> Tensor:
    made = StandIn.apply(out, other)
    operators.chains[made] = operators.chains[other]
    return made


def _glu(ops: Operators, call: Call) -> Tensor:
    a, b = ops.call(torch.chunk, call.args[0], 2, call.argument(1, "dim", -1))
    return ops.call(torch.mul, a, ops.call(torch.sigmoid, b))


def _addc(ops: Operators, call: Call) -> Tensor:
    """addcmul, addcdiv: x + value * a * b, x + value * a / b."""
    x, a, b = call.args[0], call.argument(1, "tensor1"), call.argument(2, "tensor2")
    pair = ops.call(torch.mul if call.name == "addcmul" else torch.div, a, b)
    return ops.call(torch.add, x, ops.call(torch.mul, pair, call.kwargs.get("value", 1)))


def _lerp(ops: Operators, call: Call) -> Tensor:
    """x + weight * (end - x)."""
    x, end, weight = call.args[0], call.argument(1, "end"), call.argument(2, "weight")
    return ops.call(torch.add, x, ops.call(torch.mul, ops.call(torch.sub, end, x), weight))


def _and_mean(ops: Operators, call: Call) -> tuple[Tensor, Tensor]:
    """var_mean, std_mean: a statistic and a mean."""
    x, dim = call.args[0], call.kwargs.get("dim")
    if dim is None and len(call.args) > 1 and not isinstance(call.args[1], bool):
        dim = call.args[1]
    dims = tuple(range(x.ndim)) if dim is None else dim
    alone = torch.var if call.name == "var_mean" else torch.std
    mean = ops.call(torch.mean, x, dims, keepdim=call.kwargs.get("keepdim", False))
    return ops.call(alone, *call.args, **call.kwargs), mean


def _cosine(ops: Operators, call: Call) -> Tensor:
    dim, eps = call.argument(2, "dim", 1), call.argument(3, "eps", 1e-8)
    with ops:
        a, b = (x / x.norm(dim=dim, keepdim=True).clamp_min(eps) for x in call.tensors()[:2])
        return (a * b).sum(dim)


def _sum_of_product(ops: Operators, call: Call) -> Tensor:
    """A product that is added to an activation, as the sum that it is."""
    added = call.added()
    assert added is not None
    summand, scale = call.at(added), call.kwargs.get("beta", 1)
    if call.name in kinds.ADDED_TO:
        summand = summand if scale == 1 else ops.call(torch.mul, summand, scale)
        nothing = torch.zeros((), dtype=summand.dtype, device=summand.device)
        call = Call(getattr(torch, call.name), call.name, call.args, call.kwargs)
        return ops.call(torch.add, _called(ops, call.having([added], [nothing])), summand)
    product = _called(ops, call.having([added], [None]))
    if call.name != "linear":
        summand = ops.call(torch.reshape, summand, (-1, *[1] * (product.ndim - 2)))
    return ops.call(torch.add, product, summand)


def _called(ops: Operators, call: Call) -> Tensor:
    return ops.call(call.func, *call.args, **call.kwargs)


REWRITES: dict[str, Callable[[Operators, Call], Any]] = {
    "glu": _glu,
    "addcmul": _addc,
    "addcdiv": _addc,
    "lerp": _lerp,
    "var_mean": _and_mean,
    "std_mean": _and_mean,
    "cosine_similarity": _cosine,
    "sum of a product": _sum_of_product,
}


def can_be_opened(func: Any) -> bool:
    """Whether it is one of torch's Python functions, which asks itself for an active mode."""
    return isinstance(func, types.FunctionType) and _OVERRIDE_CHECKS[1] in func.__globals__


def opened(func: Any) -> Callable:
    """`func` with the checks switched off that would send it back to the active mode."""
    namespace = {**func.__globals__, **dict.fromkeys(_OVERRIDE_CHECKS, lambda *_: False)}
    plain = types.FunctionType(
        func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__
    )
    plain.__kwdefaults__ = func.__kwdefaults__
    return plain
