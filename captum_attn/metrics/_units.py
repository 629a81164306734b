"""What is removed as one: pixels, patches, tokens, regions; their scores and their ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._checks import choice, marks, positive_int
from captum_attn.metrics._model import Key, finite_attributions

UNITS = ("auto", "pixel", "patch", "token", "region", "element")


@dataclass(frozen=True)
class Units:
    """Which unit every element of one input belongs to.

    Args:
        key (str or int): the input.
        index (LongTensor): (1 or B, ...), of the input's axes; an axis of size 1 goes along whole.
        count (int): how many units there are.
        present (Tensor): (B, count), bool: which of them an example has.
        plain (bool): whether they are simply the positions, in reading order.
    """

    key: Key
    index: Tensor
    count: int
    present: Tensor
    plain: bool

    def spread(self, removed: Tensor, rows: Tensor) -> Tensor:
        """Removed units (S, count) of the copies `rows` -> elements (S, ...) of the input."""
        if self.plain:
            return removed.view(-1, *self.index.shape[1:])
        if len(self.index) == 1:
            return removed[:, self.index.flatten()].view(-1, *self.index.shape[1:])
        index = self.index[rows]
        return removed.gather(1, index.flatten(1)).view(index.shape)

    def touching(self, elements: Tensor) -> Tensor:
        """The units (B, count) that have one of these elements, bool, broadcasting to the input."""
        shape = torch.broadcast_shapes(elements.shape, self.index.shape)
        index = self.index.expand(shape).flatten(1)
        found = torch.zeros(len(index), self.count, device=index.device)
        values = elements.expand(shape).flatten(1).to(found)
        return found.scatter_reduce(1, index, values, "amax") > 0

    def scores(self, attributions: Tensor, inputs: Tensor, reduce: str) -> Tensor:
        """The relevance (B, count) of every unit: over its elements, the sum or the mean."""
        values = finite_attributions(self.aligned(attributions, inputs), self.key)
        axes = [i for i in range(1, values.ndim) if self.index.shape[i] == 1 < values.shape[i]]
        values = values.sum(axes, keepdim=True) if axes else values
        index = self.index.to(values.device).expand(values.shape).flatten(1)
        if self.plain:
            total = values.flatten(1)
        else:
            total = values.new_zeros(len(values), self.count)
            total = total.scatter_add(1, index, values.flatten(1))
        if reduce == "sum":
            return total
        ones = torch.ones_like(values).flatten(1)
        return total / torch.zeros_like(total).scatter_add(1, index, ones).clamp(min=1)

    def aligned(self, attributions: Tensor, inputs: Tensor) -> Tensor:
        """Attributions of the input's shape, or a map of it summed over its channels."""
        shape, given = tuple(inputs.shape), tuple(attributions.shape)
        if given == shape:
            return attributions
        for axis in range(1, inputs.ndim):
            if inputs.ndim > 2 and self.index.shape[axis] == 1:
                before, after = shape[:axis], shape[axis + 1 :]
                if given in (before + after, (*before, 1, *after)):
                    return attributions.view(*before, 1, *after)
        raise InputError(
            f"the attributions of shape {given} fit no input: expected the shape {shape} of the "
            f"input {self.key!r}, or that of its map summed over the channels"
        )


def units_of(
    key: Key, inputs: Tensor, unit: str, patch_size: int | None, feature_mask: Tensor | None
) -> Units:
    """The units of one input.

    Args:
        key (str or int): its name.
        inputs (Tensor): (B, ...).
        unit (str): one of `UNITS`.
        patch_size (int, optional): side of a patch; those at the border may be smaller.
        feature_mask (Tensor, optional): ids of regions, broadcasting to the input, as in Captum.
    """
    choice("unit", unit, UNITS)
    if inputs.ndim < 2:
        raise InputError(
            f"input {key!r} has nothing to remove part of: expected (B, n, ...), got the shape "
            f"{tuple(inputs.shape)}"
        )
    if unit == "auto":
        unit = _kind(inputs, patch_size, feature_mask)
    if (feature_mask is not None) != (unit == "region") and not (
        unit == "region" and inputs.ndim <= 3
    ):
        raise OptionError(
            "unit: 'region' takes feature_mask= (the rows of (B, n, D) need none), and "
            f"feature_mask= is for regions only; got unit={unit!r}"
        )
    if feature_mask is not None:
        return _regions(key, inputs, feature_mask)
    shape, device = inputs.shape, inputs.device
    if unit == "patch":
        size = positive_int("patch_size", patch_size)
        if inputs.ndim < 4:
            raise OptionError(f"unit: patches are of images (B, C, H, W), got {tuple(shape)}")
        rows, columns = (torch.arange(side, device=device) // size for side in shape[-2:])
        index = rows[:, None] * (int(columns[-1]) + 1) + columns
        index = index.view([1] * (inputs.ndim - 2) + list(index.shape))
        if inputs.ndim > 4:  # the axes between the channels and the image: each has its patches
            between = shape[2:-2]
            offset = torch.arange(between.numel(), device=device).view(1, 1, *between, 1, 1)
            index = index + offset * (int(index.max()) + 1)
    else:
        sizes = {
            "pixel": [1, 1, *shape[2:]],
            "token": [1, shape[1]] + [1] * (inputs.ndim - 2),
            "region": [1, shape[1]] + [1] * (inputs.ndim - 2),
            "element": [1, *shape[1:]],
        }[unit]
        if unit == "pixel" and inputs.ndim < 3:
            raise OptionError(f"unit: pixels are of images (B, C, H, W), got {tuple(shape)}")
        index = torch.arange(torch.Size(sizes).numel(), device=device).view(sizes)
    count = int(index.max()) + 1 if index.numel() else 0
    present = torch.ones(len(inputs), count, dtype=torch.bool, device=device)
    return Units(key, index, count, present, plain=unit != "patch")


def _kind(inputs: Tensor, patch_size: int | None, feature_mask: Tensor | None) -> str:
    if feature_mask is not None:
        return "region"
    if inputs.ndim >= 4:
        return "pixel" if patch_size is None else "patch"
    return "token" if inputs.ndim == 3 or not inputs.is_floating_point() else "element"


def _regions(key: Key, inputs: Tensor, feature_mask: Any) -> Units:
    if not isinstance(feature_mask, Tensor):
        raise OptionError(f"feature_mask: expected a tensor, got {type(feature_mask).__name__}")
    if feature_mask.ndim > inputs.ndim:
        raise OptionError(
            f"feature_mask: the shape {tuple(feature_mask.shape)} does not broadcast to the input "
            f"of shape {tuple(inputs.shape)}"
        )
    if feature_mask.is_floating_point() or feature_mask.is_complex():
        raise OptionError(f"feature_mask: expected whole numbers, got {feature_mask.dtype}")
    mask = feature_mask.to(inputs.device)
    mask = mask.view([1] * (inputs.ndim - mask.ndim) + list(mask.shape))
    fits = mask.ndim == inputs.ndim and all(
        m in (1, n) for m, n in zip(mask.shape, inputs.shape, strict=True)
    )
    if not fits:
        raise OptionError(
            f"feature_mask: the shape {tuple(feature_mask.shape)} does not broadcast to the input "
            f"of shape {tuple(inputs.shape)}"
        )
    ids, index = mask.unique(return_inverse=True)
    present = torch.zeros(len(mask), len(ids), dtype=torch.bool, device=inputs.device)
    present = present.scatter(1, index.flatten(1), True)
    return Units(key, index, len(ids), present.expand(len(inputs), -1), plain=False)


def ranks(scores: Tensor, removable: Tensor, order: str) -> Tensor:
    """Place (B, n) of every unit in the order of removal; what is not removable comes last.

    Equal scores keep the order of their index.
    """
    choice("order", order, ("most", "least"), " relevant first")
    scores = scores if order == "least" else -scores
    scores = scores.masked_fill(~removable, torch.inf)
    # Infinity only ever stands for what is not removable: attributions are finite.
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return torch.empty_like(places).scatter(1, scores.argsort(dim=1, stable=True), places)


def removable_units(units: Units, given: Any, mask: Tensor | None) -> Tensor:
    """(B, count): what may be removed: present, attended to, and allowed by the caller."""
    allowed = units.present
    for value in (given, mask):
        if value is None:
            continue
        try:
            value = torch.as_tensor(value, device=allowed.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"removable: expected one bool per unit, got {type(value).__name__}"
            ) from error
        marks("removable", value)
        if value.shape not in (allowed.shape, allowed.shape[1:]):
            raise OptionError(
                f"removable: expected one bool per unit, {tuple(allowed.shape)} for the input "
                f"{units.key!r}, got {tuple(value.shape)}"
            )
        allowed = allowed & (value != 0)
    return allowed
