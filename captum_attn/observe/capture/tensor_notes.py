"""What is known of a tensor on its way: is it made of QK^T, and what does it stem from?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
RESHAPES = frozenset(
    {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}
    | {Tensor.unflatten, torch.unflatten, Tensor.view_as, Tensor.reshape_as}
)
CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})


TokenAxes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Scores:
    """A tensor on its way from QK^T to the product with V.

    Args:
        operands: the two factors of QK^T, each lead + (rows, channels).
        detached_from: what those factors stem from without a gradient (see `Provenance`).
        axes: for each factor, the (negative) axes of its rows in the tensor at hand; several where
            they were split, as (h, w) for decomposed relative positions.
        softmaxed (bool): whether the softmax has been passed.
        event (tuple): the module that ran the softmax, and its number there.
        step (int): which step of the run the product QK^T was, for taps that count them.
    """

    operands: tuple[Tensor, Tensor]
    detached_from: tuple[Any, ...]
    axes: TokenAxes
    softmaxed: bool = False
    event: tuple[str, int] = ("", 0)
    step: int = 0


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
    func: Callable, args: tuple, kwargs: dict, before: Tensor, after: Tensor, axes: TokenAxes
) -> TokenAxes | None:
    """Where the token axes of scores are after `func`; None where they are lost."""
    n = before.ndim
    order = _permutation(func, args, kwargs, n)
    if order is not None:
        one, two = (tuple(order.index(axis % n) - n for axis in group) for group in axes)
        return one, two
    if not after.is_floating_point():
        return None
    if after.ndim != n or func in RESHAPES:
        return _regrouped(before.shape, after.shape, axes)
    if func is F.linear and -1 in axes[0] + axes[1]:
        return None  # mixes keys, not heads
    if func in CONVOLUTIONS and max(_weight(args, kwargs).shape[2:]) > 1:
        return None
    if func in RESIZERS or all(after.shape[a] == before.shape[a] for a in axes[0] + axes[1]):
        return axes
    return None


def _regrouped(before: torch.Size, after: torch.Size, axes: TokenAxes) -> TokenAxes | None:
    """Where token axes are in another shape of the same elements, split or put together again.

    (B, H, n, m) <-> (B, H, n, h, w) <-> (B, H, h', w', h, w); heads may be merged, split, selected
    or averaged in front. From the back, the shortest runs of axes with as many elements are alike.
    """
    ends = [len(before), len(after)]
    into: tuple[list[int], list[int]] = ([], [])
    waiting = {axis % len(before) for axis in axes[0] + axes[1]}
    while waiting:
        runs = _last_run(before[: ends[0]], after[: ends[1]])
        if runs is None or (before.numel() != after.numel() and runs[0] != 1 != runs[1]):
            return None
        old, new = (range(end - run, end) for end, run in zip(ends, runs, strict=True))
        wide = [axis for axis in old if before[axis] > 1] or old
        owners = {_owner(axis - len(before), axes) for axis in wide}
        if len(owners) > 1:
            return None  # tokens merged with something else
        for group in (into[owner] for owner in owners if owner is not None):
            group[:0] = [axis - len(after) for axis in new if after[axis] > 1 or runs[1] == 1]
        waiting -= set(old)
        ends = [ends[0] - runs[0], ends[1] - runs[1]]
    return (tuple(into[0]), tuple(into[1])) if all(into) else None


def _owner(axis: int, axes: TokenAxes) -> int | None:
    return next((i for i, group in enumerate(axes) if axis in group), None)


def _last_run(before: Sequence[int], after: Sequence[int]) -> tuple[int, int] | None:
    """How many of the last axes of two shapes hold as many elements, the fewest that do."""
    one, other = 1, 1
    while one <= len(before) and other <= len(after):
        sizes = math.prod(before[-one:]), math.prod(after[-other:])
        if sizes[0] == sizes[1]:
            return one, other
        one, other = (one + 1, other) if sizes[0] < sizes[1] else (one, other + 1)
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
