"""Tokens taken out of the attention, and padding, which is no part of an example."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.intervene import ObservedModel
from captum_attn.metrics._checks import attended
from captum_attn.metrics._model import Key, Model, rows_of
from captum_attn.metrics._units import Units
from captum_attn.metrics.fills import Remove

ATTENTION_MASK, PIXEL_MASK, IDS = "attention_mask", "pixel_mask", "input_ids"


@dataclass(frozen=True)
class Unattended:
    """A perturbed input whose removed tokens are taken out of the attention.

    Args:
        units (Units): of the input.
        mask (str or int): the attention mask.
        close ("start", "end" or None): where the tokens that stay move together.
    """

    units: Units
    mask: Key
    close: str | None

    def changed(
        self, model: Model, entries: Mapping[Key, Any], rows: Tensor, gone: Tensor
    ) -> dict[Key, Any]:
        """The entries of the copies `rows` without the units `gone` (S, n)."""
        mask = mask_of(model, self.mask, self.units)[rows]
        held = mask.masked_fill(hidden(mask, gone), 0)
        if self.close is None:
            return {self.mask: held}
        # Those that stay, in their order, then (or before them) the others, which nothing reads
        order = (held == 0).to(torch.uint8)
        order = order.argsort(dim=1, stable=True, descending=self.close == "end")  # (S, n)
        moved = {self.mask: _gathered(held, order)}
        for key in self._companions(model):
            value = (
                entries[key] if key in entries else rows_of(model.values[key], rows, model.batch)
            )
            moved[key] = _gathered(value, order)
        return moved

    def _companions(self, model: Model) -> list[Key]:
        """The input and what enters the same positions; positions themselves stay in place."""
        own = model.values[self.units.key]
        return [
            key
            for key, value in model.values.items()
            if isinstance(value, Tensor)
            and value.shape[:2] == own.shape[:2]
            and value.is_floating_point() == own.is_floating_point()
            and key != self.mask
            and "position_ids" not in str(key)
        ]


@dataclass(frozen=True)
class Hidden:
    """A perturbed input whose removed tokens are hidden from the attention, without a mask.

    Args:
        units (Units): of the input.
        seen (list): the model as it was observed on the last copies, at most one.
    """

    units: Units
    seen: list[tuple[list[int], ObservedModel]] = field(default_factory=list)

    def hiding(
        self,
        model: Model,
        rows: Tensor,
        gone: Tensor,
        changed: tuple[Mapping[Key, Any], Mapping[int, Any]],
    ) -> AbstractContextManager[None]:
        """While it is entered, the tokens of the units `gone` (S, n) of the copies are hidden."""
        if not bool(gone.any()):
            return nullcontext()
        if not self.seen or self.seen[0][0] != rows.tolist():
            values, extra = model.inputs(rows, *changed)
            given = values if model.by_name else tuple(values.values())
            self.seen[:] = [
                (rows.tolist(), ObservedModel(model.forward_func, given, tuple(extra) or None))
            ]
        seen, key = self.seen[0][1], self.units.key
        name = key if isinstance(key, str) else seen.names[key]
        value = rows_of(model.values[key], rows, model.batch)
        elements = self.units.spread(gone, rows).expand(value.shape)
        return seen.hide_tokens(seen.tokens_of({name: elements}))


def _gathered(value: Tensor, order: Tensor) -> Tensor:
    """Rows of (S, n, ...) in another order (S, n)."""
    return value.gather(1, order.view(*order.shape, *[1] * (value.ndim - 2)).expand(value.shape))


def hidden(mask: Tensor, gone: Tensor) -> Tensor:
    """The tokens to hide (S, n), of which the first attended one stays where none would be left.

    What a softmax over keys that are all masked gives is up to its implementation: transformers'
    eager attention attends to all of them alike, its fused one does not. The first token is the
    same for every method, and carries the least of the input where it is [CLS] or its like.
    """
    attended_to = mask != 0
    nothing = ~(attended_to & ~gone).any(1, keepdim=True)
    first = attended_to.to(torch.uint8).argmax(1, keepdim=True)
    return gone & ~(torch.zeros_like(gone).scatter(1, first, True) & nothing)


def unattended(model: Model, units: Units, fill: Remove) -> Unattended:
    """The part of a perturbation that `Remove` asks for."""
    mask_of(model, fill.mask, units)
    if fill.close is not None and not model.by_name:
        raise OptionError(
            "fill: positions close up (Remove(close=...)) for inputs by name only, a Mapping, as "
            "all that belongs to a token has to move with it"
        )
    return Unattended(units, fill.mask, fill.close)


def mask_of(model: Model, name: Key, units: Units) -> Tensor:
    """The attention mask (B, n) of that name; all ones where a Mapping does not hold it."""
    batch, count = model.batch, units.count
    if isinstance(name, int):
        if not 0 <= name < len(model.additional):
            raise OptionError(
                f"Remove(mask={name}): there are {len(model.additional)} additional_forward_args"
            )
        mask = model.additional[name]
    else:
        if not model.by_name:
            raise OptionError(
                f"fill: to take tokens out of the attention, {name!r} has to be an entry of a "
                "Mapping; otherwise name its position: Remove(mask=0) is the first of the "
                "additional_forward_args"
            )
        default = torch.ones(batch, count, dtype=torch.long, device=units.index.device)
        mask = model.values.get(name, default)
    if not isinstance(mask, Tensor) or mask.shape != (batch, count):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention mask {name!r}: expected one per token {batch, count}, got {got}"
        )
    return attended(name, mask)


def real_elements(model: Model, key: Key) -> Tensor | None:
    """Which elements of an input are no padding: bool, broadcasting to it; None if all are.

    That is what its attention mask (B, n) says, or "pixel_mask" (B, H, W) of an image. An input has
    a mask of its own where their names begin alike ("visual_feats", "visual_attention_mask"); the
    plain "attention_mask" is that of the token ids, where there are any.
    """
    value, masks = model.values[key], model.values
    own = f"{str(key).split('_')[0]}_{ATTENTION_MASK}"
    name = own if own in masks else ATTENTION_MASK
    mask = masks.get(name)
    others = name == ATTENTION_MASK and IDS in masks and key != IDS
    if isinstance(mask, Tensor) and not others and mask.shape == value.shape[:2]:
        return (attended(name, mask) != 0).view(*mask.shape, *[1] * (value.ndim - 2))
    mask = masks.get(PIXEL_MASK)
    image = value.ndim == 4 and value.is_floating_point()
    if isinstance(mask, Tensor) and image and mask.shape == (len(value), *value.shape[2:]):
        return (attended(PIXEL_MASK, mask) != 0)[:, None]
    return None
