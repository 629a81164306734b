"""From tokens back to the inputs' own shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn._checks import one_of
from captum_attn.observe.capture.leaf import PACKED
from captum_attn.observe.streams.input_maps import varies
from captum_attn.observe.streams.states import InputMap, Source
from captum_attn.observe.tracing.token_index import earliest, take

INTERPOLATIONS = ("bilinear", "nearest")


def check_interpolation(interpolation: str) -> None:
    """Refuses an unknown `interpolation`."""
    one_of("interpolation", interpolation, INTERPOLATIONS)


def to_input(entry: InputMap, relevance: Tensor, interpolation: str) -> Tensor:
    """Relevance of a source's tokens, laid on an input that enters them.

    Along axes on which the token changes every element gets its token's relevance; along channel
    axes, on which it does not, the relevance is divided, so that their sum is the map.

    Args:
        entry (InputMap): how the input's elements enter the tokens.
        relevance (Tensor): (B, n).
        interpolation (str): "bilinear" smooths images and feature maps between token centres;
            "nearest" is exact per patch.

    Returns:
        Tensor: of the shape of the input.
    """
    return entry.leaf.laid(_on_elements(entry, relevance, interpolation))


def _on_elements(entry: InputMap, relevance: Tensor, interpolation: str) -> Tensor:
    """Relevance of a source's tokens, (B, n), on the elements of a leaf: (B, *axes)."""
    relevance = relevance.to(entry.leaf.tensor.device)
    if entry.axes is not None:
        return _from_grid(entry, relevance, interpolation)
    batch = relevance.shape[0]
    shape = entry.shape
    if entry.mixing is not None:
        return entry.mixing.passed(relevance)[0].view(batch, *shape)
    if entry.leaf.ids is not None:
        laid = take(relevance, entry.to)
        return laid.view(laid.numel() // math.prod(shape), *shape)  # one example's texts in a row
    if entry.to is None:
        return relevance.view(batch, *shape)
    to = entry.to.view(-1, *shape)
    channels = _noted(entry, "channels", lambda: _channel_axes(to))
    divided = relevance / math.prod(shape[a] for a in channels)
    of_image = shape[1:] if entry.leaf.layout == PACKED else shape
    if interpolation == "bilinear" and len(of_image) in (3, 4):
        patches = _noted(entry, "patches", lambda: _patches(to, channels))
        if patches is not None:
            return patches.smooth(divided)
    return take(divided, entry.to).view(batch, *shape)


def patch_grid(entry: InputMap) -> tuple[Tensor, tuple[int, int]] | None:
    """The token of every patch of an image, and what the patches cover; None where it has none.

    Returns:
        tuple: (B or 1, h, w) tokens, and height and width of the pixels that they cover.
    """
    image = entry.leaf.tensor
    if entry.to is None or image.ndim != 4 or entry.leaf.layout == PACKED:
        return None
    if entry.axes is not None:
        whole = len(entry.shape) == 2 and entry.axes == (1, 2) and entry.box is None
        covered = image.shape[2], image.shape[3]
        return (entry.to.view(-1, *entry.shape), covered) if whole else None
    to = entry.to.view(-1, *entry.shape)
    if len(entry.shape) != 3:
        return None
    channels = _noted(entry, "channels", lambda: _channel_axes(to))
    patches = _noted(entry, "patches", lambda: _patches(to, channels))
    if patches is None or patches.shape[-2:] != tuple(image.shape[2:]):
        return None
    return patches.grid[:, 0], patches.covered


def _noted(entry: InputMap, key: str, find: Callable[[], Any]) -> Any:
    if key not in entry.notes:
        entry.notes[key] = find()
    return entry.notes[key]


def input_order(source: Source, batch: int) -> Tensor | None:
    """For each place in the order of the inputs, the token that stands there; (B, n) or None.

    A model may permute its patches (ViLT does so at random); the tokens of an input are listed in
    the order of its elements, at the places that they occupy together.
    """
    order: Tensor | None = None
    for entry in source.entries:
        if entry.to is None or not entry.moving:
            continue
        to = entry.to.expand(batch, -1)
        first = earliest(torch.arange(to.shape[1]), to, source.n)
        for b in range(batch):
            tokens = (first[b] < to.shape[1]).nonzero()[:, 0]
            moved = tokens[first[b, tokens].argsort()]
            if not torch.equal(tokens, moved):
                if order is None:
                    order = torch.arange(source.n, device=to.device).repeat(batch, 1)
                order[b, tokens] = moved
    return order


def in_order(rows: Tensor, order: Tensor | None) -> Tensor:
    """(B, ..., n) with the last axis in the order (B, n)."""
    if order is None or order.shape[-1] != rows.shape[-1]:
        return rows
    return rows.gather(-1, order.view(order.shape[0], *[1] * (rows.ndim - 2), -1).expand_as(rows))


def _channel_axes(to: Tensor) -> list[int]:
    """The axes of an input (without the batch axis) along which the token is the same.

    An image has one, also where it is a single patch high or wide, or the only one of several.
    """
    shape = to.shape[1:]
    constant = [a for a in range(len(shape)) if not varies(to, a + 1)]
    if len(constant) > 1:  # along some only one of several rows or images enters
        inside = to >= 0
        whole = [a for a in constant if bool((inside.amax(a + 1) == inside.amin(a + 1)).all())]
        constant = whole or constant
    if len(shape) >= 3 and len(constant) > 1:
        alone = [a for a in constant if shape[a] == 1 and a < len(shape) - 3]
        return [a for a in constant if a not in alone][:1]
    return constant


@dataclass
class _Patches:
    """A regular grid of patches over the two last token axes of an input.

    Args:
        grid (Tensor): (B or 1, ..., h, w), the token of every patch.
        covered (tuple of int): height and width of what the patches cover.
        shape (tuple of int): (..., H, W), the input's axes in this order.
        order (list of int): brings them back to the input's own.
    """

    grid: Tensor
    covered: tuple[int, int]
    shape: tuple[int, ...]
    order: list[int]

    def smooth(self, relevance: Tensor) -> Tensor:
        """Bilinear between the patches' centres."""
        batch, (rows, columns) = relevance.shape[0], self.grid.shape[-2:]
        grid = self.grid.expand(batch, *self.grid.shape[1:])
        values = take(relevance, grid.flatten(1)).view(batch, -1, rows, columns)
        smooth = F.interpolate(values, self.covered, mode="bilinear", align_corners=False)
        full = smooth.new_zeros(batch, smooth.shape[1], *self.shape[-2:])
        full[..., : self.covered[0], : self.covered[1]] = smooth
        return full.view(batch, *self.shape).permute(0, *(o + 1 for o in self.order))


def _patches(to: Tensor, channels: list[int]) -> _Patches | None:
    """The grid of patches in a map (B, *input axes) to tokens; None if it is not regular."""
    axes = [a for a in range(to.ndim - 1) if a not in channels][-2:]
    if len(axes) < 2:
        return None
    lead = [a for a in range(to.ndim - 1) if a not in axes]
    cells = to.permute(0, *(a + 1 for a in lead), *(a + 1 for a in axes))  # (B, ..., H, W)
    inside = (cells >= 0).flatten(0, -3).any(0)
    height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
    if not height or not bool(inside[:height, :width].all()):
        return None
    covered = cells[..., :height, :width]
    rows, columns = _starts(covered, -2), _starts(covered, -1)
    if rows is None or columns is None:
        return None
    grid = covered[..., rows[:, None], columns]
    back = grid.repeat_interleave(height // len(rows), -2)
    if not torch.equal(back.repeat_interleave(width // len(columns), -1), covered):
        return None
    order = [lead.index(a) if a in lead else len(lead) + axes.index(a) for a in range(to.ndim - 1)]
    return _Patches(grid, (height, width), tuple(cells.shape[1:]), order)


def _starts(cells: Tensor, axis: int) -> Tensor | None:
    """Where a new patch begins along an axis; None if the patches differ in size."""
    moved = cells.movedim(axis, -1).flatten(0, -2)
    changes = (moved[:, 1:] != moved[:, :-1]).any(0).nonzero()[:, 0] + 1
    starts = torch.cat([changes.new_zeros(1), changes])
    size, rest = divmod(moved.shape[1], len(starts))
    regular = torch.arange(len(starts), device=cells.device) * size
    return starts if not rest and torch.equal(starts, regular) else None


def _from_grid(entry: InputMap, relevance: Tensor, interpolation: str) -> Tensor:
    """A coarse feature map's relevance, stretched over the input's axes that it runs along.

    What runs along no axis is shared by all elements.
    """
    batch, shape = relevance.shape[0], entry.leaf.axes(relevance.shape[0])
    axes = list(entry.axes or ())
    values = take(relevance, entry.to).view(batch, *entry.shape)
    nowhere = [a + 1 for a, axis in enumerate(axes) if axis is None]
    if nowhere:  # a token of several cells there is one token still
        values = (values / _cells_of_its_token(entry).to(values)).sum(nowhere)
    along = [axis for axis in axes if axis is not None]
    order = sorted(range(len(along)), key=along.__getitem__)
    values = values.permute(0, *(o + 1 for o in order))  # grid axes in the input's order
    box = entry.box or tuple((0, n) for n in shape)
    size = [box[a][1] - box[a][0] for a in sorted(along)]
    if along:
        mode = interpolation if len(along) == 2 else "nearest"
        options = {"align_corners": False} if mode == "bilinear" else {}
        values = F.interpolate(values[:, None], size, mode=mode, **options)[:, 0]
    for axis in range(len(shape)):
        if axis not in along:
            values = values.unsqueeze(axis + 1)
    values = values.expand(batch, *(end - start for start, end in box))
    values = values / math.prod(end - start for a, (start, end) in enumerate(box) if a not in along)
    if entry.box is None:
        return values
    full = values.new_zeros(batch, *shape)
    part = [slice(None)] + [slice(start, end) for start, end in box]
    full[tuple(part)] = values
    return full


def _cells_of_its_token(entry: InputMap) -> Tensor:
    """How many cells of a feature map have the token of each cell, (B or 1, *grid)."""
    if entry.to is None:
        return torch.ones(1, *entry.shape)
    index = entry.to + 1  # 0: no token
    met = torch.zeros(len(index), int(index.max()) + 1, device=index.device)
    met.scatter_add_(1, index, torch.ones_like(index, dtype=met.dtype))
    return met.gather(1, index).view(-1, *entry.shape)
