"""A product of an activation with a constant, as rules need it: with other operands and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from captum_attn.observe.operators import kinds
from captum_attn.observe.operators.bridge import Formula, Operation


@dataclass
class LinearForm:
    """y = z(x, w) + bias.

    Args:
        forward (callable): (x, w) -> z, without the bias.
        weight (Tensor): w as the model has it.
        bias (Tensor or None): what is added, in a shape that fits y.
        adjoint (callable, optional): (s, w) -> the transposed layer; None: autograd's.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    bias: Any
    adjoint: Callable[[Tensor, Tensor], Tensor] | None = None

    def pull(self, s: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """w^T s, of the shape of x."""
        if self.adjoint is not None:
            return self.adjoint(s, weight)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            return torch.autograd.grad(self.forward(at, weight), at, s)[0]


def linear_form(op: Operation) -> LinearForm:
    """Reads an operation of kind "linear", "convolution" or "image"."""
    place, added = op.settings["weight"], op.settings["added"]
    weight = op.call.at(place).detach()
    given = None if added is None else op.call.at(added)
    sum_form = op.name in kinds.ADDED_TO  # input + product

    def forward(x: Tensor, w: Tensor) -> Tensor:
        call = op.call.having((*op.slots, place), (x, w))
        if added is not None:
            call = call.having((added,), (x.new_zeros(()) if sum_form else None,))
        return call.run()

    bias = None if given is None else given.detach()
    if bias is not None and op.name in kinds.CONVOLUTIONS:
        bias = bias.view(-1, *[1] * (op.output.ndim - 2))
    if bias is not None and sum_form:
        bias = bias * op.call.kwargs.get("beta", 1)
    return LinearForm(forward, weight, bias, _adjoint(op))


def _adjoint(op: Operation) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The transposed layer where it is plain to write down: no second forward pass is needed."""
    if op.name == "linear" and op.slots == ((0,),):
        return lambda s, w: s @ w
    if op.name == "addmm" and op.slots == ((1,),):
        alpha = op.call.kwargs.get("alpha", 1)
        return lambda s, w: alpha * (s @ w.mT)
    if op.name in ("conv1d", "conv2d", "conv3d") and len(op.call.args) == 7:
        return _transposed_convolution(op)
    return None


def _transposed_convolution(op: Operation) -> Callable[[Tensor, Tensor], Tensor] | None:
    stride, padding, dilation, groups = op.call.args[3:]
    (x,) = op.operands
    n = x.ndim - 2
    if isinstance(padding, str) or x.ndim != op.output.ndim:
        return None

    def each(value: Any) -> list[int]:
        return [value] * n if isinstance(value, int) else list(value) * (n // len(value))

    def adjoint(s: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            s, x, w, None, each(stride), each(padding), each(dilation), False, [0] * n, groups,
            [True, False, False],
        )[0]  # fmt: skip

    return adjoint


def where_reached(rule: Formula) -> Formula:
    """`rule` on the rows and columns of a linear layer that relevance arrives at; else R_x = 0.

    At the head of a language model that is one token of hundreds and one word of thousands.
    """

    @wraps(rule)
    def narrow(op: Operation, relevance: Tensor) -> Sequence[Tensor | None]:
        if op.name != "linear" or op.slots != ((0,),) or op.operands[0].ndim < 2:
            return rule(op, relevance)
        relevance = relevance.flatten(0, -2)
        rows, columns = relevance.any(1), relevance.any(0)
        if int(rows.sum()) * int(columns.sum()) > relevance.numel() // 2:
            return rule(op, relevance.view_as(op.output))
        (x,), y, given = op.operands, op.output, (op.settings["weight"], op.settings["added"])
        slots = [slot for slot in given if slot is not None]
        call = op.call.having(slots, [op.call.at(slot)[columns] for slot in slots])
        fewer = replace(
            op,
            call=call,
            operands=(x.flatten(0, -2)[rows],),
            output=y.flatten(0, -2)[rows][:, columns],
        )
        (share,) = rule(fewer, relevance[rows][:, columns])
        shared = x.new_zeros(x.shape)
        assert share is not None
        shared.view(-1, x.shape[-1])[rows] = share
        return (shared,)

    return narrow
