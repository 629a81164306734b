"""How the elements of an input (pixels, samples, rows, words) enter the tokens of its stream."""

from __future__ import annotations

import warnings
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError
from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.streams.states import InputMap
from captum_attn.observe.tracing.autograd_graph import Graph, shape_of
from captum_attn.observe.tracing.token_map import Downstream, TokenMap, Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer

_DRAWS = 8
_ENOUGH = 2**17  # elements of all draws together that give a good average
_AT_ONCE = 16  # nodes of the graph that are asked in one go


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
        kept[key] = grid
        return InputMap(leaf, *grid)
    rowwise = leaf.ids is not None or leaf.tensor.ndim <= 3  # not the channels of an image
    if rowwise and shape[:1] == rows.shape[1:2]:  # tokens mixed before the first attention
        warnings.warn(
            f"the tokens of {leaf.name!r} are mixed by something else than attention before the "
            "first attention call; this is passed over",
            stacklevel=2,
        )
        to = torch.arange(shape[0]).view(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)
        return InputMap(leaf, to.reshape(1, -1).to(rows.device), shape)
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
    best: tuple[Tensor, tuple[int, ...]] | None = None
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
            if most < len(vary) <= enough:
                channels = [axis + 1 for axis in range(len(shape)) if axis not in vary]
                cells = cells.amax(channels) if channels else cells
                best, most = (cells.flatten(1), tuple(cells.shape[1:])), len(vary)
        if most == enough or (best is not None and all(m.mixed for m in maps)):
            break
    if best is None:
        return None
    to, grid = best
    return to, grid, _axes(leaf, to.view(to.shape[0], *grid), rows, tracer)


def varies(cells: Tensor, axis: int) -> bool:
    """Whether the token changes along an axis: along a channel axis it does not.

    Elements that enter nowhere (-1: padding, dead units) say nothing.
    """
    largest = cells.amax(axis)
    smallest = cells.masked_fill(cells < 0, torch.iinfo(cells.dtype).max).amin(axis)
    return bool(((largest >= 0) & (largest != smallest)).any())


def _axes(
    leaf: Leaf, cells: Tensor, rows: Tensor | Downstream, tracer: TokenTracer
) -> tuple[int, ...]:
    """Which axis of the input each axis of the feature map runs along.

    With independent random r_p the squared gradient of Σ_p a_p <t_p, r_p> is, on average,
    Σ_p a_p² |∂t_p|²: with a_p² the coordinate of p, an average coordinate for every element. The
    input's axes along which these averages rise most are the ones; of near ties the one that keeps
    the order of the axes.
    """
    places, batch = rows.shape[1], rows.shape[0]
    index = cells.expand(batch, *cells.shape[1:]).flatten(1)
    squares = []
    for axis, length in enumerate(cells.shape[1:]):
        coordinate = torch.arange(1.0, length + 1, device=cells.device) / length
        coordinate = coordinate.view([-1 if a == axis else 1 for a in range(cells.ndim - 1)])
        coordinate = coordinate.expand(cells.shape[1:]).flatten().expand(index.shape)
        squared = torch.zeros(batch, places + 1, device=cells.device)
        squared.scatter_(1, index.remainder(places + 1), coordinate.contiguous())
        squares.append(squared[:, :-1])
    draws = min(_DRAWS, max(1, _ENOUGH // leaf.tensor.numel()))  # a large input is an average
    found, total = tracer.mean_squares(rows, squares, leaf.tensor, draws)
    axes = range(leaf.tensor.ndim - 1)
    rises = [[_rise(weighted, total, a + 1) for a in axes] for weighted in found]

    def fit(axes: tuple[int, ...]) -> float:
        in_order = 1.25 if list(axes) == sorted(axes) else 1.0
        return in_order * sum(rises[axis][a] for axis, a in enumerate(axes))

    return max(permutations(axes, len(rises)), key=fit)


def _rise(weighted: Tensor, total: Tensor, axis: int) -> float:
    """How steadily the average coordinate changes along an axis of the input."""
    others = [a for a in range(weighted.ndim) if a != axis]
    mean = weighted.sum(others) / total.sum(others).clamp_min(torch.finfo(total.dtype).tiny)
    steps = torch.arange(len(mean), dtype=mean.dtype, device=mean.device)
    mean, steps = mean - mean.mean(), steps - steps.mean()
    scale = mean.norm() * steps.norm()
    return float((mean @ steps).abs() / scale * mean.std()) if scale > 0 else 0.0
