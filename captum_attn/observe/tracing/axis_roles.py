"""Layout: what the axes that lead an attention map are, examples, windows or heads.

Sizes do not tell: there may be as many heads as examples, as many windows as heads. Autograd does.
A token enters every head of its own example, but one window only. Where the tokens that are known
(pixels, words) have been mixed on the way and enter everything, the tensors in between tell: behind
the projection a token's features lie in one head each, before it they enter every head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.observe.capture.attention_call import BATCH, HEAD, WINDOW, AttentionCall
from captum_attn.observe.tracing.autograd_graph import Node, before_node, shape_of
from captum_attn.observe.tracing.token_map import Upstream
from captum_attn.observe.tracing.token_tracer import Spread, TokenTracer

Roles = tuple[tuple[str, int], ...]
_AT_ONCE = 128  # tensors on the way that are asked in one go
_MOST = 0.5  # a token that is repeated ([CLS] before every frame) enters several windows
_ROW = 0.9  # a projection keeps to a row; a convolution over large patches mostly does


@dataclass(frozen=True)
class OperandOrigin:
    """An operand of an attention call, and what it stems from.

    Args:
        operand (Tensor): lead + (n, d).
        batch (int): number of examples.
        upstreams (sequence of Upstream): what it stems from, with the tokens of every example.
        path (sequence of Node): the graph's nodes on the way, nearest to the operand first.
        ends (collection of Node): the nodes of `upstreams`, where the way ends.
        tracer (TokenTracer): asks autograd.
    """

    operand: Tensor
    batch: int
    upstreams: Sequence[Upstream]
    path: Sequence[Node]
    ends: Collection[Node]
    tracer: TokenTracer

    @property
    def is_packed(self) -> bool:
        """Whether it stems from packed tokens alone, which have no axis of examples."""
        return bool(self.upstreams) and all(u.packed for u in self.upstreams)

    @property
    def has_packed(self) -> bool:
        """Whether packed tokens went into it, beside others (an image's size, for its grid)."""
        return any(u.packed for u in self.upstreams)


def leading_roles(call: AttentionCall, asked: OperandOrigin) -> Roles | None:
    """What the axes that lead an operand are; None if that could not be observed."""
    of_examples = [u for u in asked.upstreams if u.batched and (asked.batch == 1 or not u.packed)]
    packed, asked = asked.has_packed, replace(asked, upstreams=of_examples)
    operand = asked.operand.expand(*call.lead, *asked.operand.shape[-2:])
    splits = _splits(call.lead, asked.batch)
    for split in splits:
        rows = operand.reshape(*(size for _, size in split), *operand.shape[-2:])
        axis = [name for name, _ in split].index(BATCH)
        alone = len(splits) == 1 and axis == 0 and not packed  # no other axis can hold them
        settled = asked.batch == 1 or alone
        if not settled and not asked.tracer.by_example(rows, axis, asked.upstreams):
            continue
        roles = []
        for i, (name, size) in enumerate(split):
            if name == BATCH:
                roles.append((name, size))
                continue
            windows = _window_count(rows, i, axis, asked, merged=len(split) > len(call.lead))
            if windows is None:
                return None
            roles += [(WINDOW, windows)] if windows > 1 else []
            roles += [(HEAD, size // windows)] if windows < size or windows == 1 else []
        return tuple(roles)
    return None


def packed_roles(call: AttentionCall, asked: OperandOrigin) -> Roles | None:
    """What the leading axes are where no one is that of the examples: they are packed."""
    rows = asked.operand.expand(*call.lead, *asked.operand.shape[-2:])
    asked = replace(asked, upstreams=[upstream.flattened() for upstream in asked.upstreams])
    roles: Roles = ()
    for axis, size in enumerate(call.lead):
        windows = _window_count(rows, axis, axis, asked, merged=len(call.lead) == 1)
        if windows is None:
            return None
        roles += ((WINDOW, windows),) if windows > 1 else ()
        roles += ((HEAD, size // windows),) if windows < size or windows == 1 else ()
    return roles or ((WINDOW, 1),)


def roles_by_output(
    call: AttentionCall, plain: Tensor | None, coded: Tensor | None, code: Tensor
) -> Roles | None:
    """`leading_roles` of a call that stems from no example (learned queries), by where it goes.

    Args:
        plain, coded (Tensor or None): gradients at the call's output of Σ s and of Σ c s over the
            model's outputs s, c that of their example; None: nothing depends on the call.
        code (Tensor): (B,) the factor c of each example.
    """
    for split in _splits(call.lead, len(code)):
        roles = tuple((name or HEAD, size) for name, size in split)
        if plain is None or coded is None or not bool(plain.any()):
            return roles
        order = call.out_permutation or range(plain.ndim)
        one, other = (
            g.permute(*order).expand(*call.lead, -1, -1).reshape(*(n for _, n in split), -1)
            for g in (plain, coded)
        )
        axis = [name for name, _ in split].index(BATCH)
        factor = code.view([-1 if a == axis else 1 for a in range(one.ndim)])
        if torch.equal(other, one * factor):
            return roles
    return None


def _window_count(
    rows: Tensor, axis: int, examples: int, asked: OperandOrigin, merged: bool
) -> int | None:
    """Into how many windows an axis falls: the most of which a token enters one.

    An axis that was merged with the batch, (B · windows · heads, q, k), may hold heads as well.

    Returns:
        int or None: None if that could not be observed.
    """
    size = rows.shape[axis]
    if not asked.upstreams or size == 1:
        return 1
    for windows in range(size, 1, -1) if merged else (size,):
        if size % windows == 0:
            split = rows.unflatten(axis, (windows, size // windows))
            found = _are_windows(split, axis, examples + (examples > axis), asked)
            if found is None or found:
                return windows if found else None
    return 1


def _are_windows(rows: Tensor, axis: int, examples: int, asked: OperandOrigin) -> bool | None:
    """Whether an axis holds windows, so that a token enters one index of it; None: not observed."""
    tracer = asked.tracer
    in_one = tracer.share_in_one(rows, axis, asked.upstreams)
    if in_one is None or in_one > _MOST:
        return None if in_one is None else True
    if rows.shape[-2] == 1:  # one row tells nothing: a window may have a single token
        return bool(_as_on_the_way(rows, axis, examples, asked))
    one_row = tracer.share_in_one(rows, rows.ndim - 2, asked.upstreams)
    if one_row is not None and one_row > _ROW:
        return False  # the same row of every head
    return _as_on_the_way(rows, axis, examples, asked)


def _as_on_the_way(rows: Tensor, axis: int, examples: int, asked: OperandOrigin) -> bool | None:
    """`_are_windows` where every token enters everything: asked of the tensors in between.

    The nearest operation behind which elements enter one index, and in front of which they enter
    several, mixes heads if it keeps to a token's row. If it mixes the tokens, too, windows are
    parts of the axes that the tokens lie along, beside which there are channels; heads are parts
    of the channels.
    """
    way = _Way(asked, rows, (axis, rows.ndim - 2, examples))
    number, one_row = {node: i for i, node in enumerate(asked.path)}, rows.shape[-2] == 1
    for i, node in enumerate(asked.path):
        by_index, by_row, by_example, reached = way[i]
        if by_index.in_one <= _MOST:
            continue
        before = [n for n, _ in before_node(node)]
        mixed = [number.get(n) for n in before if n in number or n in asked.ends]
        mixed = [k for k in mixed if k is None or way[k][0].in_one <= _MOST]
        if not one_row and any(k is not None and way[k][1].in_one > _ROW for k in mixed):
            return False
        if mixed:
            if _is_product(node, asked.tracer, rows):
                return False
            along = by_index.axes | by_row.axes | by_example.axes | reached
            return any(size > 1 and a not in along for a, size in enumerate(shape_of(node)))
    return None


class _Way:
    """How the tensors on the way enter an operand, asked for only as far as that is needed.

    A way may be very long (a loop over the samples of a series), and its end is rarely looked at.

    Args:
        rows (Tensor): the operand.
        axes (tuple of int): the axes of the index, the rows and the examples.
    """

    def __init__(self, asked: OperandOrigin, rows: Tensor, axes: tuple[int, int, int]) -> None:
        self._asked, self._rows, self._axes = asked, rows, axes
        self._found: list[tuple[Spread, Spread, Spread, frozenset[int]]] = []

    def __getitem__(self, i: int) -> tuple[Spread, Spread, Spread, frozenset[int]]:
        """By the index, by the row, by the example, and the axes that a row reaches partly."""
        tracer, known = self._asked.tracer, len(self._found)
        while len(self._found) <= i:
            nodes = self._asked.path[known : max(i + 1, known + _AT_ONCE)]
            edges = [GradientEdge(node, 0) for node in nodes]
            spread = tracer.spread(self._rows, self._axes, edges)
            reached = tracer.reached_axes(self._rows, edges)
            self._found += zip(*spread, reached, strict=True)
        return self._found[i]


def _is_product(node: Node, tracer: TokenTracer, like: Tensor) -> bool:
    """Whether an operation is a plain matrix product: every element enters all of one axis."""
    shape = shape_of(node)
    for before, number in node.next_functions:
        if before is not None and tracer.mixes(
            GradientEdge(node, 0), shape, GradientEdge(before, number), like
        ):
            return True
    return False


def _splits(lead: tuple[int, ...], batch: int) -> list[list[tuple[str, int]]]:
    """Ways in which the leading axes may hold the examples, the likeliest first."""
    splits = []
    for i, size in enumerate(lead):
        before, after = [("", s) for s in lead[:i]], [("", s) for s in lead[i + 1 :]]
        if size == batch:
            splits.append([*before, (BATCH, batch), *after])
        elif size % batch == 0:
            rest = [("", size // batch)]
            splits.append([*before, (BATCH, batch), *rest, *after])
            splits.append([*before, *rest, (BATCH, batch), *after])
            splits += _in_between(before, size // batch, batch, after)
    if not lead and batch == 1:
        splits.append([(BATCH, 1)])
    return sorted(splits, key=len)  # stable: those that take an axis apart least come first


def _in_between(
    before: list[tuple[str, int]], rest: int, batch: int, after: list[tuple[str, int]]
) -> list[list[tuple[str, int]]]:
    """An axis of two inputs, one batch behind the other, and heads: (2 · B · heads)."""
    outer = [size for size in range(2, rest) if rest % size == 0 and batch > 1]
    return [[*before, ("", o), (BATCH, batch), ("", rest // o), *after] for o in outer]
