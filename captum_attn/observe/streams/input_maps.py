"""How the elements of an input (pixels, samples, rows, words) enter the tokens of its stream."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError
from captum_attn.observe.capture.leaf import LENGTH_FIRST, PACKED, Leaf
from captum_attn.observe.streams.entering import entering
from captum_attn.observe.streams.states import InputMap
from captum_attn.observe.tracing.autograd_graph import Graph, shape_of
from captum_attn.observe.tracing.token_map import TokenMap, Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer

_DRAWS = 8
_ENOUGH = 2**17  # elements of all draws together that give a good average
_AT_ONCE = 16  # nodes of the graph that are asked in one go
# Of what the first and the last token along a grid axis see of an input axis, the share that both
# see: above it there is no place along the axis. Convolutions of small images see wide.
_SEEN_BY_BOTH, _SEEN_BY_BOTH_OF_IMAGES = 0.5, 0.9


def enter(
    leaf: Leaf,
    token_map: TokenMap,
    rows: Tensor,
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
    if key not in kept:
        kept[key] = _feature_grid(leaf, rows, graph, tracer)
    if kept[key] is not None:
        return InputMap(leaf, *kept[key])
    rowwise = leaf.ids is not None or len(shape) <= 2  # not the channels of an image
    if rowwise and shape[:1] == rows.shape[1:2]:  # tokens mixed before the first attention
        warnings.warn(
            f"the tokens of {leaf.name!r} are mixed by something else than attention before the "
            "first attention call; this is passed over",
            stacklevel=2,
        )
        to = torch.arange(shape[0]).view(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)
        return InputMap(leaf, to.reshape(1, -1).to(rows.device), shape)
    whole = _as_a_whole(leaf, rows, graph.batch, tracer) if len(shape) == 1 else None
    if whole is not None:
        return whole
    raise WiringError(
        f"how {leaf.name!r} of shape {tuple(leaf.tensor.shape)} becomes {rows.shape[1]} tokens "
        "could not be observed: its elements enter several tokens and no feature map on the way "
        "has one cell for each (deformable attention and other mixing without softmax(QK^T)V can "
        "not be followed); explain the embeddings instead (pass them as a (B, n, D) input)"
    )


def _as_a_whole(leaf: Leaf, rows: Tensor, batch: int, tracer: TokenTracer) -> InputMap | None:
    """A vector of which every element enters all the tokens that any of them enters."""
    if leaf.layout == PACKED or len(rows) != batch:
        return None
    here = tracer.entered_positions(rows, Upstream.tokens(leaf, batch))
    to = torch.where(here, torch.arange(rows.shape[1], device=here.device), -1)
    return InputMap(leaf, to, (to.shape[1],), (None,)) if bool(here.any()) else None


Grid = tuple[Tensor, tuple[int, ...], "tuple[int | None, ...] | None", "Box | None"]
Box = tuple[tuple[int, int], ...]


def _feature_grid(leaf: Leaf, rows: Tensor, graph: Graph, tracer: TokenTracer) -> Grid | None:
    """The feature map on the way with one cell for each token, the nearest to the input."""
    batch, own = graph.batch, leaf.axes(graph.batch)
    packed = leaf.layout == PACKED
    path = graph.between(rows.grad_fn, graph.bit[leaf])
    alone = [n for n in path if graph.named(graph.reach(n)) == graph.bit[leaf]]
    nodes = [n for n in alone if packed or len(shape_of(n)) >= 3 and shape_of(n)[0] == batch]
    best: tuple[Tensor, tuple[int, ...]] | None = None
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
                return token_map.to, shape, None, None
            cells = token_map.to.view(token_map.to.shape[0], *shape)
            vary = [axis for axis in range(len(shape)) if varies(cells, axis + 1)]
            if most < len(vary) <= enough:
                channels = [axis + 1 for axis in range(len(shape)) if axis not in vary]
                cells = cells.amax(channels) if channels else cells
                best, most = (cells.flatten(1), tuple(cells.shape[1:])), len(vary)
        if most == enough or (best is not None and all(m.mixed for m in maps)):
            break
    if best is None:
        return None
    to, grid = best
    return to, grid, *_axes(leaf, to.view(to.shape[0], *grid), rows, batch, tracer)


def varies(cells: Tensor, axis: int) -> bool:
    """Whether the token changes along an axis: along a channel axis it does not.

    Elements that enter nowhere (-1: padding, dead units) say nothing.
    """
    largest = cells.amax(axis)
    smallest = cells.masked_fill(cells < 0, torch.iinfo(cells.dtype).max).amin(axis)
    return bool(((largest >= 0) & (largest != smallest)).any())


def _axes(
    leaf: Leaf, cells: Tensor, rows: Tensor, batch: int, tracer: TokenTracer
) -> tuple[tuple[int | None, ...], Box | None]:
    """Which axis of the input each axis of the feature map runs along, and the part they see.

    With independent random r_p the squared gradient of Σ_p a_p <t_p, r_p> is, on average,
    Σ_p a_p² |∂t_p|²: with a_p² the coordinate of p, an average coordinate for every element. The
    input's axes along which these averages rise most are the ones; of near ties the one that keeps
    the order of the axes. An axis of the feature map whose first and last tokens see the same of
    every axis of the input (a vector that becomes several tokens) runs along none.
    """
    places, examples = rows.shape[1], len(rows)
    index = cells.expand(examples, *cells.shape[1:]).flatten(1) if len(cells) <= examples else None
    if index is None:  # packed tokens of batched elements: each example has cells of its own
        index = cells.flatten()[None]
        cells = cells.flatten(0, 1)[None]
    squares: list[Tensor] = []

    def at_tokens(of_cells: Tensor) -> Tensor:
        squared = torch.zeros(examples, places + 1, device=cells.device)
        of_cells = of_cells.expand(cells.shape[1:]).flatten().expand(index.shape)
        squared.scatter_(1, index.remainder(places + 1), of_cells.contiguous())
        return squared[:, :-1]

    for axis, length in enumerate(cells.shape[1:]):
        coordinate = torch.arange(1.0, length + 1, device=cells.device) / length
        coordinate = coordinate.view([-1 if a == axis else 1 for a in range(cells.ndim - 1)])
        squares += [at_tokens(coordinate)]
        squares += [at_tokens((coordinate == coordinate.flatten()[end]).float()) for end in (0, -1)]
    draws = min(_DRAWS, max(1, _ENOUGH // leaf.tensor.numel()))  # a large input is an average
    found, total = tracer.mean_squares(rows, squares, leaf.tensor, draws)
    found, total = [_of_elements(f, leaf) for f in found], _of_elements(total, leaf)
    axes = range(total.ndim - 1)
    most = _SEEN_BY_BOTH if len(axes) <= 2 else _SEEN_BY_BOTH_OF_IMAGES
    ends = list(zip(found[1::3], found[2::3], strict=True))
    placed = [min(_overlap(one, two, a + 1) for a in axes) <= most for one, two in ends]
    rises = [[_rise(weighted, total, a + 1) for a in axes] for weighted in found[::3]]
    rises = [rise for rise, local in zip(rises, placed, strict=True) if local]

    def fit(axes: tuple[int, ...]) -> float:
        in_order = 1.25 if list(axes) == sorted(axes) else 1.0
        return in_order * sum(rises[axis][a] for axis, a in enumerate(axes))

    along = iter(max(permutations(axes, len(rises)), key=lambda order: fit(tuple(order))))
    runs = tuple(next(along) if local else None for local in placed)
    cut = [bool(one.any() and two.any()) for one, two in ends]
    return runs, _box(total, runs, cells.shape[1:], cut)


def _of_elements(squares: Tensor, leaf: Leaf) -> Tensor:
    """Of the leaf's shape -> (B, *axes of its elements)."""
    if leaf.layout == PACKED:
        return squares[None]
    return squares.transpose(0, 1) if leaf.layout == LENGTH_FIRST else squares


def _overlap(one: Tensor, two: Tensor, axis: int) -> float:
    """The share of what is seen along an axis that two sets of tokens see in common."""
    others = [a for a in range(one.ndim) if a != axis]
    sums = [seen.sum(others) for seen in (one, two)]
    shares = [s / s.sum().clamp_min(torch.finfo(s.dtype).tiny) for s in sums]
    return float(torch.minimum(*shares).sum())


def _box(
    total: Tensor, runs: tuple[int | None, ...], grid: Sequence[int], cut: Sequence[bool]
) -> Box | None:
    """The range of the input that the tokens see, along each of its axes; None: all of it.

    Less than a cell at the end (pixels that a stride leaves over) is no range of its own, nor is
    one outside which there are cells that see nothing (padding that the model has set to zero).

    Args:
        total (Tensor): (B, *axes), how much of each element is seen.
        runs (tuple of (int or None)): the axis that each axis of the grid runs along.
        grid (sequence of int): the grid.
        cut (sequence of bool): whether its first and its last cells see something.
    """
    box = []
    for axis, size in enumerate(total.shape[1:]):
        others = [a for a in range(total.ndim) if a != axis + 1]
        seen = (total.sum(others) > 0).nonzero()[:, 0]
        start, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, size)
        whole = False
        if axis in runs:
            along = runs.index(axis)
            whole = not cut[along] or size - (end - start) < size / grid[along]
        box.append((0, size) if whole else (start, end))
    return (
        None if all(b == (0, n) for b, n in zip(box, total.shape[1:], strict=True)) else tuple(box)
    )


def _rise(weighted: Tensor, total: Tensor, axis: int) -> float:
    """How steadily the average coordinate changes along an axis of the input."""
    others = [a for a in range(weighted.ndim) if a != axis]
    along, seen = weighted.sum(others), total.sum(others)
    mean = along[seen > 0] / seen[seen > 0]
    if len(mean) < 2:
        return 0.0
    steps = torch.arange(len(mean), dtype=mean.dtype, device=mean.device)
    mean, steps = mean - mean.mean(), steps - steps.mean()
    scale = mean.norm() * steps.norm()
    return float((mean @ steps).abs() / scale * mean.std()) if scale > 0 else 0.0
