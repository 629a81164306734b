"""What is known of a tensor on its way: is it made of QK^T, and what does it stem from?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GET_T, _GET_MT = Tensor.T.__get__, Tensor.mT.__get__  # type: ignore[attr-defined]

PERMUTE = frozenset({torch.permute, Tensor.permute})
TRANSPOSE = frozenset(
    {torch.transpose, Tensor.transpose, Tensor.transpose_, torch.swapaxes, Tensor.swapaxes}
    | {torch.swapdims, Tensor.swapdims, torch.t, Tensor.t, _GET_T, _GET_MT}
)
MOVEDIM = frozenset({torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis})
# Along these the length of a token axis may change without the axis losing its meaning.
RESIZERS = frozenset(
    {Tensor.__getitem__, torch.cat, torch.concat, torch.narrow, Tensor.narrow, F.pad, torch.gather}
    | {Tensor.gather, torch.index_select, Tensor.index_select, torch.split, Tensor.split}
    | {torch.chunk, Tensor.chunk}
)
CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})


@dataclass(frozen=True)
class Scores:
    """A tensor on its way from QK^T to the product with V.

    Args:
        operands: the two factors of QK^T, each lead + (rows, channels).
        detached_from: what those factors stem from without a gradient (see `Provenance`).
        axes: for each factor, the (negative) axis of its rows in the tensor at hand.
        softmaxed (bool): whether the softmax has been passed.
    """

    operands: tuple[Tensor, Tensor]
    detached_from: tuple[Any, ...]
    axes: tuple[int, int]
    softmaxed: bool = False


@dataclass(frozen=True)
class Provenance:
    """What a tensor stems from that its gradient does not tell.

    Args:
        inputs: names of the integer inputs it was computed from.
        detached_from: graph nodes at which its history was detached, and calls that ran
            without grad.
    """

    inputs: frozenset[str] = frozenset()
    detached_from: tuple[Any, ...] = ()


def tensors(args: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, those in lists and tuples included."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `change` applied to it, or to every item of lists and tuples."""
    if type(value) in (tuple, list):
        return type(value)(mapped(change, item) for item in value)
    return change(value)


def axes_after(
    func: Callable, args: tuple, kwargs: dict, before: Tensor, after: Tensor, axes: tuple[int, int]
) -> tuple[int, int] | None:
    """Where the two token axes of scores are after `func`; None where they are lost."""
    n = before.ndim
    order = _permutation(func, args, kwargs, n)
    if order is not None:
        return tuple(order.index(axis % n) - n for axis in axes)  # type: ignore[return-value]
    if not after.is_floating_point():
        return None
    if after.ndim != n:  # heads merged, split or squeezed in front of the token axes
        kept = set(axes) == {-1, -2} and after.ndim >= 2 and after.shape[-2:] == before.shape[-2:]
        return axes if kept else None
    if func is F.linear and -1 in axes:
        return None  # mixes keys, not heads
    if func in CONVOLUTIONS and max(_weight(args, kwargs).shape[2:]) > 1:
        return None
    if func in RESIZERS or all(after.shape[axis] == before.shape[axis] for axis in axes):
        return axes
    return None


def _weight(args: tuple, kwargs: dict) -> Tensor:
    return args[1] if len(args) > 1 else kwargs["weight"]


def _permutation(func: Callable, args: tuple, kwargs: dict, n: int) -> list[int] | None:
    """The order of the old axes in the new tensor, if `func` only permutes axes."""
    order = list(range(n))
    given = [*args[1:], *kwargs.values()]
    if func in PERMUTE:
        dims = given[0] if isinstance(given[0], (tuple, list, torch.Size)) else given
        return [int(d) % n for d in dims]
    if func in TRANSPOSE:
        one, two = (int(d) % n for d in given[:2]) if len(given) >= 2 else (n - 2, n - 1)
        order[one], order[two] = order[two], order[one]
        return order
    if func in MOVEDIM:
        sources, targets = ([v] if isinstance(v, int) else list(v) for v in given[:2])
        for source in sources:
            order.remove(source % n)
        for source, target in sorted(zip(sources, targets, strict=True), key=lambda p: p[1] % n):
            order.insert(target % n, source % n)
        return order
    return None
