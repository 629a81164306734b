"""A proof, from the kinds of operations on the way, that tokens stay where they are.

Most hops consist of operations of which it is certain along which axes they mix: elementwise ones,
views, norms and products along the channels. Where nothing else lies between two places, and the
axes that the examples and the tokens lie along come through whole, every token enters its own
position, whatever the length, the weights and the inputs. Then there is nothing to ask autograd.

What an axis holds is written as its factors, outermost first: (("batch", 2), ("", 12)) is an axis
of 24, the examples with 12 heads (or channels) each. Factors of 1 are left out. Operations that are
not known here, or that touch an axis of tokens, prove nothing, and the tokens are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from torch.autograd.graph import GradientEdge

from captum_attn.observe.capture.attention_call import BATCH, HEAD, AttentionCall
from captum_attn.observe.capture.leaf import LENGTH_FIRST, PACKED, Leaf
from captum_attn.observe.tracing.autograd_graph import (
    Graph,
    Node,
    before_node,
    is_identity,
    shape_of,
)

Factors = tuple[tuple[str, int], ...]
Axes = tuple[Factors, ...]
FEATURES = ""  # what is neither an axis of examples nor one of tokens
_WRAPPED = 2**64  # axes that were counted from the end are saved as unsigned numbers

_ELEMENTWISE = frozenset(
    "Abs Add Addcmul Alias Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Gelu Hardsigmoid "
    "Hardswish Hardtanh LeakyRelu Lerp Log LogSigmoid Maximum Minimum Mish Mul NanToNum "
    "NativeDropout Neg Pow Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin Softplus Sqrt Sub Tanh "
    "ToCopy".split()
)
_VIEWS = frozenset("View UnsafeView ReshapeAlias Unsqueeze Squeeze".split())
# Along the axis, or the axes, that they have saved; the shape stays as it is.
_ALONG = frozenset("Softmax LogSoftmax Flip Roll".split())
_REDUCTIONS = frozenset("Mean Sum LinalgVectorNorm Var Amax Amin Logsumexp".split())
_PARTS = frozenset("Slice Split SplitWithSizes Glu".split())


class _NotCertain(Exception):
    """An operation may move or mix tokens, for all that is known of it here."""


def tidy(factors: Iterable[tuple[str, int]]) -> Factors:
    """Without factors of 1, and features that lie side by side as one factor."""
    tidied: list[tuple[str, int]] = []
    for label, size in factors:
        if size == 1:
            continue
        if tidied and label == FEATURES == tidied[-1][0]:
            size *= tidied.pop()[1]
        tidied.append((label, size))
    return tuple(tidied)


def flattened(axes: Iterable[Factors]) -> Factors:
    """Several axes as one."""
    return tidy(factor for axis in axes for factor in axis)


def features(size: int) -> Factors:
    """An axis of features."""
    return tidy([(FEATURES, size)])


def _is_free(axis: Factors) -> bool:
    """Whether an axis holds neither examples nor tokens."""
    return all(label == FEATURES for label, _ in axis)


# ---------------------------------------------------------------------------- what tensors hold
def of_output(call: AttentionCall) -> Axes | None:
    """What the axes of an attention call's output hold: examples, windows, heads, rows."""
    held, order = _by_role(call), call.out_permutation
    shape = shape_of(call.edge.node, call.edge.output_nr)
    axes = (*held, tidy([("token row", call.n_q)]), features(call.v.shape[-1])) if held else None
    if axes is None or len(shape) != len(axes):
        return None
    order = tuple(range(len(axes))) if order is None else order
    laid = tuple(axes[order.index(axis)] for axis in range(len(axes)))
    return laid if tuple(map(_size, laid)) == shape else None


def _by_role(call: AttentionCall) -> list[Factors] | None:
    """What each of a call's leading axes holds; an axis may hold several of its roles."""
    roles = [
        ({HEAD: FEATURES, BATCH: BATCH}.get(role, f"token {i}"), size)
        for i, (role, size) in enumerate(call.roles)
    ]
    held: list[Factors] = []
    for size in call.lead:
        factors: list[tuple[str, int]] = []
        while math.prod(s for _, s in factors) < size and roles:
            factors.append(roles.pop(0))
        if math.prod(s for _, s in factors) != size:
            return None
        held.append(tidy(factors))
    return held if all(size == 1 for _, size in roles) else None


def of_leaf(leaf: Leaf, batch: int, rowwise: bool = False) -> Axes | None:
    """What the axes of a leaf hold, its elements (or the rows of (B, n, D)) being the tokens."""
    shape, own = tuple(leaf.tensor.shape), len(leaf.own_shape)
    own = 2 if rowwise else own
    if leaf.layout == PACKED or not own or (leaf.layout == LENGTH_FIRST and own < 2):
        return None
    first = 1 if leaf.layout == LENGTH_FIRST else 0
    if shape[first] % batch:
        return None
    return tuple(
        tidy([(BATCH, batch), ("token", size // batch)])
        if axis == first
        else tidy([(f"token {axis}", size)])
        if axis < own
        else features(size)
        for axis, size in enumerate(shape)
    )


def of_layout(shape: Sequence[int], order: Sequence[int], batch: int, last: int) -> Axes:
    """What the axes of a tensor hold that `order` brings to (B ..., n ..., D ...).

    Args:
        shape (tuple of int): after `order`.
        last (int): how many axes of channels come last.
    """
    held = [
        tidy([(f"token {place}", size)]) if place < len(shape) - last else features(size)
        for place, size in enumerate(shape)
    ]
    held[0] = tidy([(BATCH, batch), ("token", shape[0] // batch)])
    return tuple(held[order.index(axis)] for axis in range(len(shape)))


# What is read of a tensor: of what its axes hold, that of the rows (B n); None: not rows.
Reader = Callable[[Axes], "Factors | None"]


def rows_of(axes: Axes, order: Sequence[int] | None = None, last: int = 1) -> Factors | None:
    """The rows of a tensor that `order` brings to (B ..., n ..., features), `last` axes of them."""
    ordered = axes if order is None else tuple(axes[axis] for axis in order)
    end = len(ordered) - last
    return flattened(ordered[:end]) if all(map(_is_free, ordered[end:])) else None


def operand_rows(call: AttentionCall, axes: Axes) -> Factors | None:
    """The rows of an operand, lead + (n, d), as `AttentionCall.rows` lists them."""
    if len(axes) != len(call.lead) + 2:
        return None
    lead = [axis or features(size) for axis, size in zip(axes, call.lead, strict=False)]
    sizes = [size for _, size in call.roles]
    split = viewed((*lead, *axes[-2:]), (*sizes, _size(axes[-2]), _size(axes[-1])))
    if split is None:
        return None
    by_role = [
        axis
        for wanted in (BATCH, "window", HEAD)
        for (role, _), axis in zip(call.roles, split, strict=False)
        if role == wanted
    ]
    heads = sum(role == HEAD for role, _ in call.roles)
    kept = by_role[: len(by_role) - heads]
    free = (*by_role[len(kept) :], split[-1])
    return flattened((*kept, split[-2])) if all(map(_is_free, free)) else None


def in_rows(axes: Axes) -> Factors:
    """All examples and tokens that a tensor holds, in the order in which its rows are counted."""
    return tuple(sorted(factor for axis in axes for factor in axis if factor[0] != FEATURES))


# ---------------------------------------------------------------------------- what is certain
class InPlace:
    """Follows what the axes of tensors hold through a graph.

    Args:
        graph (Graph): the run's graph, cut at the outputs of its attention calls.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._found: dict[Any, dict[tuple[Node, int], Axes | None]] = {}

    def proves(self, end: GradientEdge, read: Reader, start: GradientEdge, given: Axes) -> bool:
        """Whether every row at `start` enters its own row at `end`, if any.

        Args:
            read (callable): what the axes hold at `end` -> what the rows there are.
            given (tuple): what the axes at `start` hold.
        """
        if shape_of(start.node, start.output_nr) != tuple(map(_size, given)):
            return False
        try:
            axes = self._axes(end, start, given)
        except _NotCertain:
            return False
        return axes is not None and read(axes) == in_rows(given)

    def _axes(self, end: GradientEdge, start: GradientEdge, given: Axes) -> Axes | None:
        """What the axes hold at `end`; None where it does not stem from `start`."""
        graph, goal = self.graph, self.graph.reach(start.node)
        place = start.node, start.output_nr
        found = self._found.setdefault((*place, given), {place: given})
        stack = [(end.node, end.output_nr)]
        while stack:
            node, number = stack[-1]
            if (node, number) in found:
                stack.pop()
            elif node is start.node or graph.is_stop(node) or graph.reach(node) & goal != goal:
                found[node, number] = None
            else:
                kind = _kind(node)
                edges = before_node(node) if is_identity(node) else _edges(node)
                waiting = [e for e in edges if e is not None and e not in found]
                if waiting:
                    stack.extend(waiting)
                    continue
                before = [None if e is None else found[e] for e in edges]
                stem = any(axes is not None for axes in before)
                found[node, number] = _after(kind, node, number, before) if stem else None
        return found[end.node, end.output_nr]


def _edges(node: Node) -> list[tuple[Node, int] | None]:
    return [None if n is None else (n, number) for n, number in node.next_functions]


_NAMED = re.compile(r"(\w+)Backward\d")  # those of autograd Functions of the model end in no digit


def _kind(node: Node) -> str:
    """The kind of an operation; raises where nothing of it is certain."""
    kind = "Alias" if is_identity(node) else _kind_of(node.name())
    if kind not in _KNOWN:
        raise _NotCertain
    return kind


@lru_cache(maxsize=1024)
def _kind_of(name: str) -> str:
    named = _NAMED.fullmatch(name)
    return name if named is None else named[1]


def _after(kind: str, node: Node, number: int, before: Sequence[Axes | None]) -> Axes:
    """What the axes of an operation's output hold, by those of what it was given."""
    shape, given = shape_of(node, number), [axes for axes in before if axes is not None]
    if kind in _ELEMENTWISE:
        axes = _joined(given, shape)
    elif kind in _PRODUCTS:
        axes = _product(before, shape, _PRODUCTS[kind])
    elif kind not in ("Cat", "Stack") and (len(given) != 1 or before[0] is None):
        raise _NotCertain  # a weight that is made of tokens
    elif kind in _VIEWS:
        axes = viewed(given[0], shape)
    elif kind == "Expand":
        axes = _joined(given, shape)
    elif kind in _BY_AXIS:
        axes = _by_axis(kind, node, given, shape)
    else:
        axes = _SPECIAL[kind](node, given[0], shape)
    if axes is None or tuple(map(_size, axes)) != shape:
        raise _NotCertain
    return axes


def viewed(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The same elements in another shape; None where that parts the tokens or the examples."""
    left = list(flattened(axes))
    made: list[Factors] = []
    for size in shape:
        axis: list[tuple[str, int]] = []
        while size > 1 and left:
            label, held = left.pop(0)
            if size % held == 0:
                axis.append((label, held))
                size //= held
            elif label == FEATURES and held % size == 0:
                axis.append((label, size))
                left.insert(0, (label, held // size))
                size = 1
            else:
                return None
        if size != 1:
            return None
        made.append(tidy(axis))
    return None if left else tuple(made)


def _joined(given: Sequence[Axes], shape: Sequence[int]) -> Axes | None:
    """Tensors that are broadcast to one shape, if all that stem from tokens hold them alike."""
    held = []
    for axes in given:
        axes = ((),) * (len(shape) - len(axes)) + tuple(axes)
        held.append(tuple(axis or features(s) for axis, s in zip(axes, shape, strict=True)))
    return held[0] if all(axes == held[0] for axes in held) else None


def _product(before: Sequence[Axes | None], shape: Sequence[int], factors: int) -> Axes | None:
    """A matrix product with a constant: of what holds tokens, the features are summed over."""
    one, other = before[factors : factors + 2]
    beside = (*before[:factors], *before[factors + 2 :])
    if any(axes is not None for axes in beside) or (one is None) == (other is None):
        return None
    if one is not None:
        return (*one[:-1], features(shape[-1])) if _is_free(one[-1]) else None
    if other is None or len(other) != len(shape):
        return None
    lead, summed, columns = other[:-2], other[-2], other[-1]
    return (*lead, features(shape[-2]), columns) if _is_free(summed) else None


def _saved(node: Node, names: Sequence[str], ndim: int) -> list[int]:
    """The axes that an operation has saved, counted from the first."""
    for name in names:
        value = getattr(node, f"_saved_{name}", None)
        if value is not None:
            axes = [value] if isinstance(value, int) else list(value)
            axes = [a - _WRAPPED if a > _WRAPPED // 2 else a for a in axes]
            if axes and all(-ndim <= a < ndim for a in axes):
                return [a % ndim for a in axes]
    raise _NotCertain


def _by_axis(kind: str, node: Node, given: list[Axes], shape: tuple[int, ...]) -> Axes:
    """Operations along axes that they have saved, which must hold no tokens."""
    held = given[0]
    if kind == "Stack":
        (at,) = _saved(node, ["dim"], len(held) + 1)
        given = [(*axes[:at], (), *axes[at:]) for axes in given]
        held, along = given[0], [at]
    else:
        along = _saved(node, ["dim", "dims"], len(held))
    untouched = [[a for i, a in enumerate(axes) if i not in along] for axes in given]
    free = all(_is_free(axes[axis]) for axes in given for axis in along)
    if not free and not (kind == "Slice" and tuple(map(_size, held)) == shape):
        raise _NotCertain
    if any(axes != untouched[0] for axes in untouched):
        raise _NotCertain
    removed = kind in ("Select", "Unbind")
    removed |= kind in _REDUCTIONS and not getattr(node, "_saved_keepdim", False)
    if removed:
        return tuple(untouched[0])
    if not free:
        return held  # all of it
    return tuple(features(shape[i]) if i in along else axis for i, axis in enumerate(held))


def _permuted(node: Node, axes: Axes, shape: Sequence[int]) -> Axes:
    return tuple(axes[axis] for axis in _saved(node, ["dims"], len(axes)))


def _transposed(node: Node, axes: Axes, shape: Sequence[int]) -> Axes:
    (one,), (other,) = (_saved(node, [name], len(axes)) for name in ("dim0", "dim1"))
    swapped = list(axes)
    swapped[one], swapped[other] = axes[other], axes[one]
    return tuple(swapped)


def _normed(node: Node, axes: Axes, shape: Sequence[int]) -> Axes | None:
    over = len(getattr(node, "_saved_normalized_shape", axes))
    return axes if all(map(_is_free, axes[-over:])) else None


def _batch_normed(node: Node, axes: Axes, shape: Sequence[int]) -> Axes | None:
    return None if getattr(node, "_saved_training", True) else axes


def _convolved(node: Node, axes: Axes, shape: Sequence[int]) -> Axes | None:
    """A convolution over one position alone is a projection of the channels."""
    steps = set(node._saved_stride) == {1} and set(node._saved_padding) == {0}
    alone = tuple(map(_size, axes[2:])) == tuple(shape[2:])  # a wider kernel would leave less
    if not steps or not alone or node._saved_transposed or not _is_free(axes[1]):
        return None
    return (axes[0], features(shape[1]), *axes[2:])


def _repeated(node: Node, axes: Axes, shape: Sequence[int]) -> Axes | None:
    axes = ((),) * (len(shape) - len(axes)) + tuple(axes)
    made = []
    for axis, repeats, size in zip(axes, node._saved_repeats, shape, strict=True):
        if repeats != 1 and not _is_free(axis):
            return None
        made.append(axis if repeats == 1 else features(size))
    return tuple(made)


_SPECIAL: dict[str, Callable[[Node, Axes, Sequence[int]], Axes | None]] = {
    "Permute": _permuted,
    "Transpose": _transposed,
    "T": lambda node, axes, shape: tuple(reversed(axes)),
    "Linear": lambda node, axes, shape: (
        (*axes[:-1], features(shape[-1])) if _is_free(axes[-1]) else None
    ),
    "NativeLayerNorm": _normed,
    "FusedRmsNorm": _normed,
    "NativeBatchNorm": _batch_normed,
    "CudnnBatchNorm": _batch_normed,
    "Convolution": _convolved,
    "Repeat": _repeated,
    "ViewAsComplex": lambda node, axes, shape: axes[:-1] if _is_free(axes[-1]) else None,
    "ViewAsReal": lambda node, axes, shape: (*axes, features(2)),
}
# Matrix products: how many operands come before the two factors.
_PRODUCTS = {"Mm": 0, "Bmm": 0, "Addmm": 1, "Baddbmm": 1}
_BY_AXIS = _ALONG | _REDUCTIONS | _PARTS | {"Cat", "Stack", "Select", "Unbind"}
_KNOWN = _ELEMENTWISE | _VIEWS | _BY_AXIS | {"Expand"} | set(_SPECIAL) | set(_PRODUCTS)


def _size(axis: Factors) -> int:
    return math.prod(size for _, size in axis)
