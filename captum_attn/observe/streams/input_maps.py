"""How the elements of an input (pixels, samples, rows, words) enter the tokens of its stream."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError
from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.streams.states import InputMap
from captum_attn.observe.tracing.autograd_graph import (
    Graph,
    Node,
    before_node,
    gradients,
    shape_of,
)
from captum_attn.observe.tracing.token_map import Downstream, TokenMap, Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer

_AT_ONCE = 16  # nodes of the graph that are asked in one go
_STEPS = 64  # from feature map to feature map
_WHOLE = 0.9  # the share of an input that counts as all of it: dead units see nothing


def enter(
    leaf: Leaf,
    token_map: TokenMap,
    rows: Tensor | Downstream,
    graph: Graph,
    tracer: TokenTracer,
    kept: dict[Any, Any],
) -> InputMap:
    """The entry of one input into tokens whose rows are `rows`, (B, P, features).

    Elements that enter one token each are mapped exactly. Overlapping inputs (convolutional stems,
    audio front ends) fall back to the grid of the feature map whose cells do.

    Args:
        token_map (TokenMap): where the leaf's elements enter, as probed.
        kept (dict): where the grid found in an earlier run is remembered.
    """
    shape = tuple(leaf.shape[1:] if leaf.ids is not None else leaf.tensor.shape[1:])
    if not token_map.mixed:
        moving, notes = token_map.moving, token_map.notes
        return InputMap(leaf, token_map.to, shape, moving=moving, notes=notes)
    key = ("grid", leaf.name, shape, rows.shape)
    if key in kept:
        return InputMap(leaf, *kept[key])
    grid = _feature_grid(leaf, rows, graph, tracer)
    if grid is not None:
        if not token_map.moving:
            kept[key] = grid
        return InputMap(leaf, *grid)
    if token_map.moving and token_map.partial is not None:
        warnings.warn(
            f"parts of {leaf.name!r} enter several tokens at once (patches that the model draws "
            "repeatedly); these parts get no relevance",
            stacklevel=2,
        )
        return InputMap(leaf, token_map.partial, shape, moving=True)
    rowwise = leaf.ids is not None or leaf.tensor.ndim <= 3  # not the channels of an image
    if rowwise and shape[:1] == rows.shape[1:2]:  # tokens mixed before the first attention
        warnings.warn(
            f"the tokens of {leaf.name!r} are mixed by something else than attention before the "
            "first attention call; this is passed over",
            stacklevel=2,
        )
        to = torch.arange(shape[0]).view(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)
        return InputMap(leaf, to.reshape(1, -1).to(leaf.tensor.device), shape)
    raise WiringError(
        f"how {leaf.name!r} of shape {tuple(leaf.tensor.shape)} becomes {rows.shape[1]} tokens "
        "could not be observed: its elements enter several tokens and no feature map on the way "
        "has one cell for each (deformable attention and other mixing without softmax(QK^T)V can "
        "not be followed); explain the embeddings instead (pass them as a (B, n, D) input)"
    )


def _feature_grid(
    leaf: Leaf, rows: Tensor | Downstream, graph: Graph, tracer: TokenTracer
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...] | None] | None:
    """The feature map on the way with one cell for each token, the nearest to the input."""
    batch = rows.shape[0]
    path = graph.between(rows.grad_fn, graph.bit[leaf])
    alone = [n for n in path if graph.named(graph.reach(n)) == graph.bit[leaf]]
    nodes = [n for n in alone if len(shape_of(n)) >= 3 and shape_of(n)[0] == batch]
    best: tuple[Tensor, tuple[int, ...], Node, list[int]] | None = None
    most, enough = 0, leaf.tensor.ndim - (1 if leaf.tensor.ndim <= 3 else 2)
    for start in range(0, len(nodes), _AT_ONCE):  # from the tokens outward
        chunk = nodes[start : start + _AT_ONCE]
        upstreams = [Upstream.elements(GradientEdge(node, 0)) for node in chunk]
        maps = tracer.maps(rows, upstreams)
        for node, token_map in zip(chunk, maps, strict=True):
            if token_map.mixed or token_map.to is None or bool((token_map.to < 0).all()):
                continue
            shape = shape_of(node)[1:]
            if shape == tuple(leaf.tensor.shape[1:]):
                return token_map.to, shape, None
            cells = token_map.to.view(token_map.to.shape[0], *shape)
            vary = [axis for axis in range(len(shape)) if varies(cells, axis + 1)]
            if vary and most <= len(vary) <= enough:  # the last one is nearest to the input
                channels = [axis + 1 for axis in range(len(shape)) if axis not in vary]
                cells = cells.amax(channels) if channels else cells
                best = cells.flatten(1), tuple(cells.shape[1:]), node, [a + 1 for a in vary]
                most = len(vary)
        if best is not None and maps[-1].mixed:
            break
    if best is None:
        return None
    to, grid, node, vary = best
    return to, grid, _axes(leaf, node, vary, graph, tracer)


def varies(cells: Tensor, axis: int) -> bool:
    """Whether the token changes along an axis: along a channel axis it does not.

    Elements that enter nowhere (-1: padding, dead units) say nothing.
    """
    largest = cells.amax(axis)
    smallest = cells.masked_fill(cells < 0, torch.iinfo(cells.dtype).max).amin(axis)
    return bool(((largest >= 0) & (largest != smallest)).any())


def _axes(
    leaf: Leaf, node: Node, along: list[int], graph: Graph, tracer: TokenTracer
) -> tuple[int, ...]:
    """Which axis of the input each of these axes of a feature map runs along.

    Asked from one feature map to an earlier one, as far as the later one's cells see a part of the
    earlier one: what a cell sees moves along one axis when the cell moves along one. An operation
    that lets every cell see everything keeps the axes where they are.

    Returns:
        tuple of int: the input's axes, 0: the first behind the batch; () where every token sees the
            whole input, by way of no feature map with these axes.
    """
    bit, end = graph.bit[leaf], leaf.tensor
    for _ in range(_STEPS):
        path = [n for n in graph.between(node, bit)[1:] if len(shape_of(n)) > len(along)]
        nodes = list(dict.fromkeys(path[len(path) >> i] for i in range(1, len(path).bit_length())))
        earlier = [end, *(GradientEdge(n, 0) for n in nodes)]
        found = _moves_along(GradientEdge(node, 0), along, earlier, tracer, end)
        if found[0] is not None:
            return tuple(axis - 1 for axis in found[0])
        for nearer, axes in zip(nodes, found[1:], strict=True):
            if axes is not None:
                node, along = nearer, axes
                break
        else:
            before = [n for n, _ in before_node(node) if graph.reach(n) & bit]
            if not before or len(shape_of(before[0])) != len(shape_of(node)):
                break
            if graph.is_stop(before[0]):
                return tuple(axis - 1 for axis in along)
            node = before[0]
    vector = torch.zeros(shape_of(node), dtype=end.dtype, device=end.device)
    center = tuple(size // 2 for size in shape_of(node)[1:])
    vector.movedim(0, -1)[center] = 1
    (seen,) = gradients([(GradientEdge(node, 0), vector)], [end])
    if seen is not None and float(seen.ne(0).float().mean()) > _WHOLE:
        return ()
    raise WiringError(
        f"along which axes of {leaf.name!r} {tuple(end.shape)} its tokens lie could not be "
        f"observed (they were found in a tensor {shape_of(node)}, whose cells see parts of it that "
        "do not move with them); explain the embeddings instead (pass them as a (B, n, D) input)"
    )


def _moves_along(
    start: GradientEdge, along: list[int], earlier: list[Any], tracer: TokenTracer, like: Tensor
) -> list[list[int] | None]:
    """For each earlier tensor the axes along which what a cell sees moves, one for each of `along`.

    None where that is not one axis for each (a cell sees everything, axes are merged).
    """
    shape = shape_of(start.node, start.output_nr)
    moved: list[list[list[int]]] = [[] for _ in earlier]
    for axis in along:
        seen: list[list[Tensor | None]] = []
        for place in (0, shape[axis] - 1):
            cell = [shape[a] // 2 if a in along else slice(None) for a in range(len(shape))]
            cell[0], cell[axis] = 0, place  # of the first example
            vector = torch.zeros(shape, dtype=like.dtype, device=like.device)
            vector[tuple(cell)] = tracer.random(vector, *vector[tuple(cell)].shape)
            seen.append(gradients([(start, vector)], earlier))
        for found, low, high in zip(moved, *seen, strict=True):
            found.append([] if low is None or high is None else _parted(low != 0, high != 0))
    return [
        [axes[0] for axes in found]
        if all(len(axes) == 1 for axes in found) and len({axes[0] for axes in found}) == len(found)
        else None
        for found in moved
    ]


def _parted(one: Tensor, other: Tensor) -> list[int]:
    """The axes along which two sets of elements, none of them empty, do not lie alike."""
    if not bool(one.any() and other.any()):
        return []
    flat = [[t.movedim(a, 0).flatten(1).any(1) for t in (one, other)] for a in range(one.ndim)]
    return [a for a, (low, high) in enumerate(flat) if not torch.equal(low, high)]
