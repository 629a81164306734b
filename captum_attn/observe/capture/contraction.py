"""Products of two tensors in one notation: which axes are shared, free and contracted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MATMUL: tuple[Callable[..., Any], ...] = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.mm,
    Tensor.mm,
)
RMATMUL: tuple[Callable[..., Any], ...] = (Tensor.__rmatmul__,)
BADDBMM: tuple[Callable[..., Any], ...] = (torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_)
EINSUM: tuple[Callable[..., Any], ...] = (torch.einsum, torch.functional.einsum)
PRODUCTS = frozenset(MATMUL + RMATMUL + BADDBMM + EINSUM)

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPERANDS = {  # names under which the two factors may be passed
    "first": ("input", "mat1", "batch1", "self"),
    "second": ("other", "mat2", "batch2", "tensor2"),
}


@dataclass
class Contraction:
    """`out = lhs x rhs` with one letter per axis, as in einsum.

    Args:
        lhs, rhs (Tensor): the two factors.
        left, right, out (str): their axes, a letter each; a letter in both factors that is not in
            `out` is contracted, a letter in one factor and in `out` is free, one in all three
            is shared (batch, heads).
    """

    lhs: Tensor
    rhs: Tensor
    left: str
    right: str
    out: str

    def axes(self, side: int) -> str:
        return (self.left, self.right)[side]

    def operand(self, side: int) -> Tensor:
        return (self.lhs, self.rhs)[side]

    @property
    def contracted(self) -> str:
        return "".join(c for c in self.left if c in self.right and c not in self.out)

    def free(self, side: int) -> str:
        other = self.axes(1 - side)
        return "".join(c for c in self.out if c in self.axes(side) and c not in other)

    def lead(self) -> str:
        """Axes that both factors carry along, those broadcast by one of them included."""
        frees = [c for side in (0, 1) for c in self.free(side)]
        last = {c for side in (0, 1) for c in self.free(side)[-1:]}
        return "".join(c for c in self.out if c not in frees or c not in last)


def align(tensor: Tensor, axes: str, order: str) -> Tensor:
    """Permutes `tensor` (axes named by letters) to `order`; a letter it lacks becomes size 1."""
    present = [axes.index(c) for c in order if c in axes]
    tensor = tensor.permute(present)
    for position, letter in enumerate(order):
        if letter not in axes:
            tensor = tensor.unsqueeze(position)
    return tensor


def contraction(func: Callable[..., Any], args: tuple, kwargs: dict) -> Contraction | None:
    """Reads a call to a matrix product as a `Contraction`; None if it is not one of two tensors."""
    if func in EINSUM:
        return _einsum(args, kwargs)
    if func in BADDBMM:
        args = args[1:]
    lhs, rhs = _pick(args, kwargs, "first", 0), _pick(args, kwargs, "second", 1)
    if func in RMATMUL:
        lhs, rhs = rhs, lhs
    if lhs is None or rhs is None or lhs.ndim < 2 or rhs.ndim < 2:
        return None
    lead = _LETTERS[: max(lhs.ndim, rhs.ndim) - 2]
    left = lead[len(lead) - (lhs.ndim - 2) :] + "YX"
    right = lead[len(lead) - (rhs.ndim - 2) :] + "XZ"
    return Contraction(lhs, rhs, left, right, lead + "YZ")


def _pick(args: tuple, kwargs: dict, which: str, position: int) -> Tensor | None:
    if position < len(args):
        return args[position] if isinstance(args[position], Tensor) else None
    return next((kwargs[name] for name in _OPERANDS[which] if name in kwargs), None)


def _einsum(args: tuple, kwargs: dict) -> Contraction | None:
    equation = args[0] if args else kwargs.get("equation")
    operands = args[1:] if args else kwargs.get("operands", ())
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    lhs, rhs = operands
    terms, _, out = equation.replace(" ", "").partition("->")
    left, right = terms.split(",")
    spare = [c for c in reversed(_LETTERS) if c not in equation]
    widths = [t.ndim - len(axes.replace("...", "")) for t, axes in ((lhs, left), (rhs, right))]
    dots = "".join(spare[: max(widths)])
    left = left.replace("...", dots[len(dots) - widths[0] :])
    right = right.replace("...", dots[len(dots) - widths[1] :])
    if "->" not in equation:  # implicit output: the axes seen once, alphabetically
        seen = left + right
        out = dots + "".join(sorted(c for c in set(seen) - set(dots) if seen.count(c) == 1))
    out = out.replace("...", dots)
    if len(set(left)) < len(left) or len(set(right)) < len(right):
        return None  # a diagonal
    return Contraction(lhs, rhs, left, right, out)
