"""How the elements of an input (pixels, samples, rows, words) enter the tokens of its stream."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError
from captum_attn.observe.capture.leaf import LENGTH_FIRST, PACKED, Leaf
from captum_attn.observe.streams.entering import entering
from captum_attn.observe.streams.states import InputMap
from captum_attn.observe.tracing.autograd_graph import (
    Graph,
    Node,
    before_node,
    gradients,
    samples_where_it_computes,
    shape_of,
)
from captum_attn.observe.tracing.mixing import Mixing
from captum_attn.observe.tracing.token_map import Downstream, TokenMap, Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer

_AT_ONCE = 16  # nodes of the graph that are asked in one go
_STEPS = 64  # from feature map to feature map
_FEW = 0.5  # the share of a map's cells below which they are points of it
_WHOLE = 0.9  # the share of an input that counts as all of it: dead units see nothing


def enter(
    leaf: Leaf,
    token_map: TokenMap,
    rows: Tensor | Downstream,
    graph: Graph,
    tracer: TokenTracer,
    kept: dict[Any, Any],
    key: Any,
) -> InputMap:
    """The entry of one input into tokens whose rows are `rows`, (B, P, features).

    Elements that enter one token each are mapped exactly. Overlapping inputs (convolutional stems,
    audio front ends) fall back to the grid of the feature map whose cells do.

    Args:
        token_map (TokenMap): where the leaf's elements enter, as probed.
        kept (dict): where the grid found in an earlier run is remembered, under `key`.
    """
    shape = leaf.axes(graph.batch)
    if not token_map.mixed:
        moving, notes = token_map.moving, token_map.notes
        return InputMap(leaf, token_map.to, shape, moving=moving, notes=notes)
    drawn = token_map.moving and token_map.partial is not None
    # Behind patches that are drawn one by one, the order of the tokens is no axis of the image.
    least = len(shape) - 1 if drawn and len(shape) > 2 else 1
    grid = kept[key] if key in kept else _feature_grid(leaf, rows, graph, tracer, least)
    # Cells that enter nowhere may do so for their content: a mask that multiplies, a dead unit.
    if not token_map.moving and (grid is None or bool((grid[0] >= 0).all())):
        kept[key] = grid
    if grid is not None:
        return InputMap(leaf, *grid)
    if drawn and _every_example_has_some(token_map.partial):
        warnings.warn(
            f"parts of {leaf.name!r} enter several tokens at once (patches that the model draws "
            "repeatedly); these parts get no relevance",
            stacklevel=2,
        )
        return InputMap(leaf, token_map.partial, shape, moving=True)
    rowwise = leaf.ids is not None or len(shape) <= 2  # not the channels of an image
    if rowwise and shape[:1] == rows.shape[1:2]:  # tokens mixed before the first attention
        warnings.warn(
            f"the tokens of {leaf.name!r} are mixed by something else than attention before the "
            "first attention call; this is passed over",
            stacklevel=2,
        )
        to = torch.arange(shape[0]).view(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)
        return InputMap(leaf, to.reshape(1, -1).to(leaf.tensor.device), shape)
    whole = _as_a_whole(leaf, rows, graph.batch, tracer) if len(shape) == 1 else None
    if whole is not None:
        return whole
    return _by_strength(leaf, rows, graph, kept, key)


def _by_strength(
    leaf: Leaf, rows: Tensor | Downstream, graph: Graph, kept: dict[Any, Any], key: Any
) -> InputMap:
    """An input all of whose elements enter several tokens, each more or less strongly.

    Key points of a feature map, descriptors of several scales, blurred patches.
    """
    down = Downstream.rows(rows) if isinstance(rows, Tensor) else rows
    path = graph.between(rows.grad_fn, graph.bit[leaf])
    samples = any(samples_where_it_computes(node) for node in path)
    single = down.shape[2] == 1  # channels taken for tokens: another layout tells them
    other = leaf.ids is not None or leaf.layout == PACKED or down.shape[0] != graph.batch
    if samples or single or other:
        why = "deformable attention, which is no softmax(QK^T)V, is" if samples else "there is"
        way = "the only way to them" if samples else "no feature map with one cell for each"
        raise WiringError(
            f"how {leaf.name!r} of shape {tuple(leaf.tensor.shape)} becomes {rows.shape[1]} tokens "
            f"could not be observed: its elements enter several tokens, and {why} {way}; explain "
            "the embeddings instead (pass them as a (B, n, D) input), or leave these calls out "
            "with `layers=`"
        )
    if ("by strength", key) not in kept:
        kept["by strength", key] = True
        warnings.warn(
            f"every element of {leaf.name!r} enters several of the {down.shape[1]} tokens that it "
            "becomes, which get it by how strongly each depends on it",
            stacklevel=2,
        )
    shape = leaf.axes(graph.batch)
    upstream = Upstream.tokens(leaf, graph.batch)
    mixing = Mixing([down], [(math.prod(shape), [upstream])], graph.cuts)
    return InputMap(leaf, None, shape, mixing=mixing)


def _every_example_has_some(partial: Tensor | None) -> bool:
    """Whether in every example some elements enter one token only."""
    return partial is not None and bool((partial >= 0).any(1).all())


def _as_a_whole(
    leaf: Leaf, rows: Tensor | Downstream, batch: int, tracer: TokenTracer
) -> InputMap | None:
    """A vector of which every element enters all the tokens that any of them enters."""
    if leaf.layout == PACKED or isinstance(rows, Downstream) or len(rows) != batch:
        return None
    here = tracer.entered_positions(rows, Upstream.tokens(leaf, batch))
    to = torch.where(here, torch.arange(rows.shape[1], device=here.device), -1)
    return InputMap(leaf, to, (to.shape[1],), (None,)) if bool(here.any()) else None


Box = tuple[tuple[int, int], ...]
Grid = tuple[Tensor, tuple[int, ...], tuple[int | None, ...] | None, Box | None]
Found = tuple[Tensor, tuple[int, ...], Node, list[int] | None]


def _feature_grid(
    leaf: Leaf, rows: Tensor | Downstream, graph: Graph, tracer: TokenTracer, least: int
) -> Grid | None:
    """The feature map on the way with one cell for each token, the nearest to the input.

    Args:
        least (int): how many axes its cells lie along at least.
    """
    bit, own = graph.bit[leaf], leaf.axes(graph.batch)
    start = rows if isinstance(rows, Tensor) else rows.edge
    # A map on one of several ways (a positional convolution) does not tell what the others bring;
    # it is taken where no map on every way has cells that move with what they see.
    on_every_way = [edge.node for edge, _ in graph.on_every_way([start], bit)]
    for path in (on_every_way, graph.between(rows.grad_fn, bit)):
        best = _nearest_grid(leaf, rows, path, graph, tracer)
        if best is None or len(best[3] or own) < least:
            continue
        to, grid, node, along = best
        if along is None:
            return to, grid, None, None
        if any(map(samples_where_it_computes, graph.between(node, bit))):
            return None  # its cells lie where the picture says, along no axis of it
        seen = _seen(leaf, node, along, tracer)
        runs = _axes(leaf, node, along, seen, graph, tracer)
        if runs is not None:
            return to, grid, runs, _box(seen, runs, grid)
    return None


def _nearest_grid(
    leaf: Leaf, rows: Tensor | Downstream, path: list[Node], graph: Graph, tracer: TokenTracer
) -> Found | None:
    """Of nodes, nearest to the tokens first, the last one whose cells enter one token each.

    Returns:
        tuple or None: the token of each cell, the cells' axes, the node, and which of its axes
            these are; None for the latter where they are the input's own.
    """
    batch, own = graph.batch, leaf.axes(graph.batch)
    packed = leaf.layout == PACKED
    alone = [n for n in path if graph.named(graph.reach(n)) == graph.bit[leaf]]
    nodes = [n for n in alone if packed or len(shape_of(n)) >= 3 and shape_of(n)[0] == batch]
    best: Found | None = None
    most, enough = 0, len(own) - (0 if len(own) <= 2 else 1)
    for start in range(0, len(nodes), _AT_ONCE):  # from the tokens outward
        chunk = nodes[start : start + _AT_ONCE]
        upstreams = [
            replace(Upstream.elements(GradientEdge(node, 0), not packed), batched=True)
            for node in chunk
        ]
        upstreams = [replace(upstream, packed=packed) for upstream in upstreams]
        maps = entering(tracer, rows, upstreams, batch)
        for node, token_map in zip(chunk, maps, strict=True):
            if token_map.mixed or token_map.to is None or bool((token_map.to < 0).all()):
                continue
            shape = shape_of(node)[0 if packed else 1 :]
            if shape == own:
                return token_map.to, shape, node, None
            cells = token_map.to.view(token_map.to.shape[0], *shape)
            vary = [axis for axis in range(len(shape)) if varies(cells, axis + 1)]
            if vary and most <= len(vary) <= enough:  # the last one is nearest to the input
                channels = [axis + 1 for axis in range(len(shape)) if axis not in vary]
                if _are_points(cells, channels):
                    continue
                cells = cells.amax(channels) if channels else cells
                axes = [a if packed else a + 1 for a in vary]
                best = cells.flatten(1), tuple(cells.shape[1:]), node, axes
                most = len(vary)
        if best is not None and maps[-1].mixed:
            break
    return best


def _are_points(cells: Tensor, others: list[int]) -> bool:
    """Whether tokens are made of few cells of a map, at places along further axes than they vary.

    Args:
        cells (Tensor): (B, *axes of the map), the token that each cell enters, -1 for none.
        others (list of int): the axes along which the token does not change.
    """
    for axis in others if len(others) > 1 else ():
        here = (cells >= 0).amax([a for a in others if a != axis])
        if float(here.float().mean()) < _FEW:
            return True  # else a few channels are dead, or masked cells see nothing
    return False


def varies(cells: Tensor, axis: int) -> bool:
    """Whether the token changes along an axis: along a channel axis it does not.

    Elements that enter nowhere (-1: padding, dead units) say nothing.
    """
    largest = cells.amax(axis)
    smallest = cells.masked_fill(cells < 0, torch.iinfo(cells.dtype).max).amin(axis)
    return bool(((largest >= 0) & (largest != smallest)).any())


def _axes(
    leaf: Leaf, node: Node, along: list[int], seen: Tensor, graph: Graph, tracer: TokenTracer
) -> tuple[int | None, ...] | None:
    """Which axis of the input each of these axes of a feature map runs along.

    Asked from one feature map to an earlier one, as far as the later one's cells see a part of the
    earlier one: what a cell sees moves along one axis when the cell moves along one. An operation
    that lets every cell see everything keeps the axes where they are.

    Args:
        seen (Tensor): (B, *axes of the elements), which of them any token sees.

    Returns:
        tuple of (int or None): the axes of the leaf's elements; None where every token sees all
            that any of them sees, by way of no feature map with these axes. None alone where what
            the cells see does not move with them.
    """
    bit, end, number = graph.bit[leaf], leaf.tensor, len(along)
    for _ in range(_STEPS):
        path = [n for n in graph.between(node, bit)[1:] if len(shape_of(n)) > len(along)]
        nodes = list(dict.fromkeys(path[len(path) >> i] for i in range(1, len(path).bit_length())))
        earlier = [end, *(GradientEdge(n, 0) for n in nodes)]
        found = _moves_along(GradientEdge(node, 0), along, earlier, tracer, end)
        if found[0] is not None:
            return tuple(_element_axis(leaf, axis) for axis in found[0])
        for nearer, axes in zip(nodes, found[1:], strict=True):
            if axes is not None:
                node, along = nearer, axes
                break
        else:
            before = [n for n, _ in before_node(node) if graph.reach(n) & bit]
            if not before or len(shape_of(before[0])) != len(shape_of(node)):
                break
            if node.name().startswith("GridSampler"):
                break  # points lie on no grid
            if graph.is_stop(before[0]):
                return tuple(_element_axis(leaf, axis) for axis in along)
            node = before[0]
    vector = torch.zeros(shape_of(node), dtype=end.dtype, device=end.device)
    center = tuple(size // 2 for size in shape_of(node)[1:])
    vector.movedim(0, -1)[center] = 1
    (of_one,) = gradients([(GradientEdge(node, 0), vector)], [end])
    if of_one is not None and float(of_one.ne(0).sum()) > _WHOLE * float(seen.sum()):
        return (None,) * number
    (moved,) = _moved(GradientEdge(node, 0), along, [end], tracer, end)
    placed = [axes[0] for axes in moved if axes]
    if placed and all(len(axes) < 2 for axes in moved) and len(set(placed)) == len(placed):
        # Several vectors that become several tokens each: those of one vector see all of it.
        return tuple(_element_axis(leaf, axes[0]) if axes else None for axes in moved)
    return None


def _moves_along(
    start: GradientEdge, along: list[int], earlier: list[Any], tracer: TokenTracer, like: Tensor
) -> list[list[int] | None]:
    """For each earlier tensor the axes along which what a cell sees moves, one for each of `along`.

    None where that is not one axis for each (a cell sees everything, axes are merged).
    """
    return [
        [axes[0] for axes in found]
        if all(len(axes) == 1 for axes in found) and len({axes[0] for axes in found}) == len(found)
        else None
        for found in _moved(start, along, earlier, tracer, like)
    ]


def _moved(
    start: GradientEdge, along: list[int], earlier: list[Any], tracer: TokenTracer, like: Tensor
) -> list[list[list[int]]]:
    """For each earlier tensor the axes along which what a cell sees moves, for each of `along`."""
    shape = shape_of(start.node, start.output_nr)
    moved: list[list[list[int]]] = [[] for _ in earlier]
    for axis in along:
        seen: list[list[Tensor | None]] = []
        last = shape[axis] - 1
        for places in ((0,), (last, last * 3 // 4, last // 2)):  # the last ones may be padding
            for place in places:
                cell = [shape[a] // 2 if a in along else slice(None) for a in range(len(shape))]
                cell[0], cell[axis] = 0, place  # of the first example
                vector = torch.zeros(shape, dtype=like.dtype, device=like.device)
                vector[tuple(cell)] = tracer.random(vector, *vector[tuple(cell)].shape)
                of_cell = gradients([(start, vector)], earlier)
                if any(g is not None and bool(g.any()) for g in of_cell):
                    break
            seen.append(of_cell)
        for found, low, high in zip(moved, *seen, strict=True):
            found.append([] if low is None or high is None else _parted(low != 0, high != 0))
    return moved


def _parted(one: Tensor, other: Tensor) -> list[int]:
    """The axes along which two sets of elements, none of them empty, do not lie alike."""
    if not bool(one.any() and other.any()):
        return []
    flat = [[t.movedim(a, 0).flatten(1).any(1) for t in (one, other)] for a in range(one.ndim)]
    return [a for a, (low, high) in enumerate(flat) if not torch.equal(low, high)]


def _element_axis(leaf: Leaf, axis: int) -> int:
    """The axis of a leaf's elements that an axis of its tensor is."""
    if leaf.layout == PACKED or (leaf.layout == LENGTH_FIRST and axis == 0):
        return axis
    return axis - 1


def _seen(leaf: Leaf, node: Node, along: list[int], tracer: TokenTracer) -> Tensor:
    """Which elements of a leaf a feature map sees, (B, *axes), (1, *axes) of a packed one.

    All of them, where cells at an end of the map see nothing: silence and masks have no gradient,
    which says nothing about what is seen.
    """
    vector = tracer.random(leaf.tensor, *shape_of(node))
    (found,) = gradients([(GradientEdge(node, 0), vector)], [leaf.tensor])
    seen = torch.zeros_like(leaf.tensor) if found is None else found.ne(0).to(leaf.tensor)
    for axis in along:
        for place in (0, vector.shape[axis] - 1):
            end = torch.zeros_like(vector)
            end.select(axis, place).copy_(vector.select(axis, place))
            (found,) = gradients([(GradientEdge(node, 0), end)], [leaf.tensor])
            if found is None or not bool(found.any()):
                seen = torch.ones_like(leaf.tensor)
    if leaf.layout == PACKED:
        return seen[None]
    return seen.transpose(0, 1) if leaf.layout == LENGTH_FIRST else seen


def _box(total: Tensor, runs: tuple[int | None, ...], grid: Sequence[int]) -> Box | None:
    """The range of the input that the tokens see, along each of its axes; None: all of it.

    Less than a cell at the end (pixels that a stride leaves over) is no range of its own.
    """
    box = []
    for axis, size in enumerate(total.shape[1:]):
        others = [a for a in range(total.ndim) if a != axis + 1]
        seen = (total.sum(others) > 0).nonzero()[:, 0]
        start, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, size)
        cell = size / grid[runs.index(axis)] if axis in runs else 1
        whole = axis in runs and size - (end - start) < cell
        box.append((0, size) if whole else (start, end))
    return (
        None if all(b == (0, n) for b, n in zip(box, total.shape[1:], strict=True)) else tuple(box)
    )
