"""The perturbation engine: every metric that removes something runs through `Perturbation`.

What a copy lacks is an interval of ranks: the first k units (deletion), the last n - k (insertion),
or one bin of them (SaCo). So a metric names intervals, and the engine batches over examples and
intervals alike and runs no copy twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from captum._utils.progress import progress
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._attention import Hidden, Unattended, mask_of, real_elements, unattended
from captum_attn.metrics._checks import (
    a_callable,
    a_tensor,
    choice,
    flag,
    known_options,
    positive_int,
)
from captum_attn.metrics._model import (
    MEASURES,
    Attributions,
    Inputs,
    Key,
    Measure,
    Model,
    checked_target,
    measure_of,
    measured,
    named,
    predicted,
    target_rows,
)
from captum_attn.metrics._units import Units, ranks, removable_units, units_of
from captum_attn.metrics.fills import Filler, Hide, Mean, Remove, fill_of

Normalize = Callable[[Tensor], Tensor]


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
    parts: list[Filled | Unattended | Hidden]
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

    def counts(self, fractions: Tensor, keep_whole: bool = False) -> Tensor:
        """(B, L), the units that make up these fractions (L,), rounded to the nearest.

        Half a unit goes to the even number. With `keep_whole`, what is kept is rounded down, in
        GAE's own arithmetic.
        """
        fractions, sizes = fractions.to(self.sizes.device), self.sizes[:, None]
        if keep_whole:
            return sizes - ((1 - fractions) * sizes).long()
        return (fractions * sizes).round().long()

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
        with torch.no_grad(), ExitStack() as scope:
            changed = self._changed(rows, removed)
            for part, gone in self._parts(removed):
                if isinstance(part, Hidden):
                    scope.enter_context(part.hiding(self.model, rows, gone, changed))
            output = self.model(rows, *changed)
            target = target_rows(self.target, rows, self.model.batch)
            return measured(self.measure, output, target).to(rank.device)

    def _parts(self, removed: Tensor) -> Iterator[tuple[Filled | Unattended | Hidden, Tensor]]:
        """Every perturbed input with those of its units (S, n) that are removed."""
        widths = [part.units.count for part in self.parts]
        return zip(self.parts, removed.split(widths, 1), strict=True)

    def _changed(self, rows: Tensor, removed: Tensor) -> tuple[dict[Key, Any], dict[int, Any]]:
        """The entries and the additional arguments of the copies."""
        entries: dict[Key, Any] = {}
        arguments: dict[int, Any] = {}
        for part, gone in self._parts(removed):
            if isinstance(part, Filled):
                filled = part.fill(rows, part.units.spread(gone, rows))
                entries[part.units.key] = filled if part.after is None else part.after(filled)
            if not isinstance(part, Unattended):
                continue
            changed = part.changed(self.model, entries, rows, gone)
            if isinstance(part.mask, int):
                arguments[part.mask] = changed[part.mask]
            else:
                entries |= changed
        return entries, arguments


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
    **options: Any,
) -> Perturbation:
    """A batch ready to be perturbed; the arguments are those of `perturbation_curve`."""
    known_options(options, OPTIONS, "the measure")
    return _prepared(
        forward_func, inputs, attributions, target, additional_forward_args, **options
    )  # fmt: skip


def _prepared(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any,
    additional_forward_args: Any,
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
    model = Model.of(forward_func, inputs, additional_forward_args)
    maps = named(attributions)
    if isinstance(attributions, Tensor) and isinstance(perturb, Key):
        maps = {perturb: attributions}
    keys = _perturbed(model, maps, perturb)
    choice("reduce", reduce, ("mean", "sum"))
    flag("show_progress", show_progress)
    if flag("fill_after", fill_after) and normalize is None:
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
        real = real_elements(model, key)
        part = _part(model, units, fills[key], norms[key], fill_after, real)
        parts.append(part)
        own = a_tensor(f"attributions {key!r}", maps[key]).to(value.device)
        scores.append(units.scores(own, value, reduce))
        may_go.append(removable_units(units, allowed[key], _attended(model, part, real)))
    together = torch.cat(may_go, 1)
    empty = (~together.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"example {empty[0]} has nothing that may be removed: see removable=")
    measure = measure_of(measure)
    if measure in MEASURES.values():
        target = checked_target(target, model.batch)
    ready = Perturbation(
        model, parts, torch.cat(scores, 1), together, measure, target,
        positive_int("perturbations_per_eval", perturbations_per_eval), show_progress,
    )  # fmt: skip
    return ready if target is not None else _with_predicted(ready)


OPTIONS = tuple(inspect.signature(_prepared).parameters)[5:]


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
        keys = [perturb] if isinstance(perturb, Key) else _keys(perturb)
    for key in keys:
        if not isinstance(model.values.get(key), Tensor) or not isinstance(maps.get(key), Tensor):
            raise InputError(
                f"input {key!r} cannot be perturbed: expected one that has attributions; the "
                f"inputs are {list(model.values)}, the attributions {list(maps)}"
            )
    if not keys:
        raise InputError("there is no input to perturb: expected attributions of at least one")
    return keys


def _keys(perturb: Any) -> list[Key]:
    keys = list(perturb) if isinstance(perturb, (tuple, list, set)) else []
    if not keys or not all(isinstance(key, Key) for key in keys) or len(set(keys)) < len(keys):
        raise OptionError(
            f"perturb: expected the name (or position) of an input, or several, got {perturb!r}"
        )
    return keys


def _part(
    model: Model, units: Units, spec: Any, norm: Any, after: bool, real: Tensor | None
) -> Filled | Unattended | Hidden:
    value = model.values[units.key]
    fill = fill_of(spec, value)
    if norm is not None:
        a_callable("normalize", norm)
    if isinstance(fill, Remove):
        return unattended(model, units, fill)
    if isinstance(fill, Hide):
        return Hidden(units)
    if isinstance(fill, Mean) and fill.over is None:
        fill = Mean(real)
    if not value.is_floating_point():
        norm = None  # ids are not normalised
    if norm is not None and after:
        value, norm = norm(value), None
    return Filled(units, fill.prepare(value.detach()), norm)


def _attended(
    model: Model, part: Filled | Unattended | Hidden, real: Tensor | None
) -> Tensor | None:
    """Which units (B, n) are more than padding; None if all are."""
    if isinstance(part, Unattended):
        return mask_of(model, part.mask, part.units)
    return None if real is None else part.units.touching(real)
