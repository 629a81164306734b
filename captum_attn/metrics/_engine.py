"""The perturbation engine: every metric that removes something runs through `Perturbation`.

What a copy lacks is an interval of ranks: the first k units (deletion), the last n - k (insertion),
or one bin of them (SaCo). So a metric names intervals, and the engine batches over examples and
intervals alike and runs no copy twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from captum._utils.progress import progress
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._inputs import (
    MEASURES,
    Attributions,
    Inputs,
    Key,
    Measure,
    Model,
    measure_of,
    measured,
    named,
    positive_int,
    predicted,
    target_rows,
)
from captum_attn.metrics._units import Units, ranks, removable_units, units_of
from captum_attn.metrics.fills import Filler, Remove, fill_of

Normalize = Callable[[Tensor], Tensor]
ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class Filled:
    """A perturbed input in which something else stands for what was removed.

    Args:
        units (Units): of the input.
        fill (callable): makes the copies.
        after (callable, optional): the model's normalisation, where it comes after the fill.
    """

    units: Units
    fill: Filler
    after: Normalize | None


@dataclass(frozen=True)
class Unattended:
    """A perturbed input whose removed tokens are taken out of the attention.

    Args:
        units (Units): of the input.
        mask (str or int): the attention mask.
    """

    units: Units
    mask: Key


@dataclass(frozen=True)
class Perturbation:
    """A batch ready to be perturbed.

    Args:
        model (Model): what runs.
        parts (list): the perturbed inputs.
        scores, removable (Tensor): (B, n), over the units of all of them.
        measure (callable), target: what is read off the output.
        per_eval (int): copies of every example in one forward.
        show_progress (bool): whether a bar is shown.
    """

    model: Model
    parts: list[Filled | Unattended]
    scores: Tensor
    removable: Tensor
    measure: Measure
    target: Any
    per_eval: int
    show_progress: bool

    @property
    def sizes(self) -> Tensor:
        """(B,), how many units of every example may be removed."""
        return self.removable.sum(1)

    def counts(self, fractions: Tensor) -> Tensor:
        """(B, L), the units that make up these fractions (L,), rounded to the nearest."""
        return (fractions.to(self.sizes.device) * self.sizes[:, None]).round().long()

    def run(self, start: Tensor, stop: Tensor, order: str = "most") -> Tensor:
        """The measure (B, L) without the units whose rank is in [start, stop), both (B, L)."""
        rank = ranks(self.scores, self.removable, order)
        batch, device = len(rank), rank.device
        start, stop = start.to(device), stop.to(device)
        nothing = start >= stop
        start, stop = start.masked_fill(nothing, 0), stop.masked_fill(nothing, 0)
        example = torch.arange(batch, device=device)[:, None].expand_as(start)
        wanted = torch.stack([example, start, stop], -1).flatten(0, 1)
        jobs, places = wanted.unique(dim=0, return_inverse=True)
        chunks = jobs.split(batch * self.per_eval)
        if self.show_progress:
            chunks = progress(chunks, desc="Perturbation", total=len(chunks))
        found = torch.cat([self._measured(rank, *chunk.unbind(1)) for chunk in chunks])
        return found[places].view(start.shape)

    def _measured(self, rank: Tensor, rows: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        of_rows = rank[rows]
        removed = (of_rows >= start[:, None]) & (of_rows < stop[:, None])
        with torch.no_grad():
            output = self.model(rows, *self._changed(rows, removed))
            target = target_rows(self.target, rows, self.model.batch)
            return measured(self.measure, output, target).to(rank.device)

    def _changed(self, rows: Tensor, removed: Tensor) -> tuple[dict[Key, Any], dict[int, Any]]:
        """The entries and the additional arguments of the copies."""
        entries: dict[Key, Any] = {}
        arguments: dict[int, Any] = {}
        widths = [part.units.count for part in self.parts]
        for part, gone in zip(self.parts, removed.split(widths, 1), strict=True):
            if isinstance(part, Filled):
                filled = part.fill(rows, part.units.spread(gone, rows))
                entries[part.units.key] = filled if part.after is None else part.after(filled)
                continue
            held = mask_of(self.model, part.mask, part.units)[rows].masked_fill(gone, 0)
            if isinstance(part.mask, int):
                arguments[part.mask] = held
            else:
                entries[part.mask] = held
        return entries, arguments


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
    return mask


def per_input(option: Any, keys: list[Key], default: Any = None) -> dict[Key, Any]:
    """An option that may be one for all perturbed inputs, or a Mapping by their names."""
    if isinstance(option, Mapping):
        unknown = [k for k in option if k not in keys]
        if unknown:
            raise OptionError(f"options for {unknown}, but the perturbed inputs are {keys}")
        return {k: option.get(k, default) for k in keys}
    return dict.fromkeys(keys, option)


def prepare(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    measure: str | Measure = "probability",
    unit: Any = "auto",
    patch_size: Any = None,
    feature_mask: Any = None,
    fill: Any = "zero",
    normalize: Any = None,
    fill_after: bool = False,
    perturb: Any = None,
    removable: Any = None,
    reduce: str = "mean",
    perturbations_per_eval: int = 1,
    show_progress: bool = False,
) -> Perturbation:
    """A batch ready to be perturbed; the arguments are those of `perturbation_curve`."""
    model = Model.of(forward_func, inputs, additional_forward_args)
    maps = named(attributions)
    if isinstance(attributions, Tensor) and isinstance(perturb, Key):
        maps = {perturb: attributions}
    keys = _perturbed(model, maps, perturb)
    if reduce not in ("sum", "mean"):
        raise OptionError(f"reduce: expected 'sum' or 'mean', got {reduce!r}")
    if fill_after and normalize is None:
        raise OptionError(
            "fill_after: there is no normalisation that the fill could come after; pass it as "
            "normalize=, or leave fill_after out where the inputs are normalised already"
        )
    named_units, patches = per_input(unit, keys, "auto"), per_input(patch_size, keys)
    masks, fills = per_input(feature_mask, keys), per_input(fill, keys, "zero")
    norms, allowed = per_input(normalize, keys), per_input(removable, keys)
    parts, scores, may_go = [], [], []
    for key in keys:
        value = model.values[key]
        units = units_of(key, value, named_units[key], patches[key], masks[key])
        part = _part(model, units, fills[key], norms[key], fill_after)
        padding = _padding(model, part)
        parts.append(part)
        scores.append(units.scores(maps[key].to(value.device), value, reduce))
        may_go.append(removable_units(units, allowed[key], padding))
    together = torch.cat(may_go, 1)
    empty = (~together.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"example {empty[0]} has nothing that may be removed: see removable=")
    measure = measure_of(measure)
    ready = Perturbation(
        model, parts, torch.cat(scores, 1), together, measure, target,
        positive_int("perturbations_per_eval", perturbations_per_eval), show_progress,
    )  # fmt: skip
    return ready if target is not None else _with_predicted(ready)


def _with_predicted(ready: Perturbation) -> Perturbation:
    """Without a target, the class that is predicted for the intact inputs."""
    if ready.measure not in MEASURES.values():  # the caller's own, which may need no target
        return ready
    with torch.no_grad():
        everyone = torch.arange(ready.model.batch, device=ready.removable.device)
        whole = torch.zeros_like(ready.removable)
        output = ready.model(everyone, *ready._changed(everyone, whole))
    one_number = output.ndim == 1 or output[0].numel() == 1
    return ready if one_number else replace(ready, target=predicted(output))


def _perturbed(model: Model, maps: Mapping[Key, Any], perturb: Any) -> list[Key]:
    """The inputs to perturb: those that are named, or all that have attributions."""
    if perturb is None:
        keys = [key for key, attributions in maps.items() if attributions is not None]
    else:
        keys = [perturb] if isinstance(perturb, Key) else list(perturb)
    for key in keys:
        if not isinstance(model.values.get(key), Tensor) or not isinstance(maps.get(key), Tensor):
            raise InputError(
                f"input {key!r} cannot be perturbed: expected one that has attributions; the "
                f"inputs are {list(model.values)}, the attributions {list(maps)}"
            )
    if not keys:
        raise InputError("there is no input to perturb: expected attributions of at least one")
    return keys


def _part(
    model: Model, units: Units, spec: Any, norm: Normalize | None, after: bool
) -> Filled | Unattended:
    value = model.values[units.key]
    fill = fill_of(spec, value)
    if isinstance(fill, Remove):
        mask_of(model, fill.mask, units)
        return Unattended(units, fill.mask)
    if not value.is_floating_point():
        norm = None  # ids are not normalised
    if norm is not None and after:
        value, norm = norm(value), None
    return Filled(units, fill.prepare(value.detach()), norm)


def _padding(model: Model, part: Filled | Unattended) -> Tensor | None:
    """The mask of an input's tokens, so that padding is not removed; None if there is none."""
    if isinstance(part, Unattended):
        return mask_of(model, part.mask, part.units)
    value, mask = model.values[part.units.key], model.values.get(ATTENTION_MASK)
    ids = not value.is_floating_point() and part.units.plain
    return mask if ids and isinstance(mask, Tensor) and mask.shape == value.shape else None
