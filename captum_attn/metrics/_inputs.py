"""The model as a metric calls it: named inputs, copies of examples, one number per copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from captum._utils.common import _select_targets
from torch import Tensor

from captum_attn.errors import InputError, OptionError, TargetError

Key = int | str
Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]
Attributions = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Measure = Callable[[Tensor, Any], Tensor]  # (output, target) -> (S,)


def named(values: Any) -> dict[Key, Any]:
    """Inputs, attributions or options by name: a Mapping's keys, a tuple's positions, or 0."""
    if isinstance(values, Mapping):
        return dict(values)
    return dict(enumerate(values)) if isinstance(values, (tuple, list)) else {0: values}


def tensor_of(output: Any) -> Tensor:
    """The model's output tensor: `.logits` if there is one, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", None) if logits is None else logits
    if isinstance(logits, Tensor):
        return logits
    parts = output.values() if isinstance(output, Mapping) else output
    found = [p for p in parts if isinstance(p, Tensor)] if isinstance(output, _LISTS) else []
    if not found:
        raise InputError(
            f"the model returned {type(output).__name__} without a tensor: pass a callable that "
            "runs the model and returns one"
        )
    return found[0]


_LISTS = (tuple, list, Mapping)


def rows_of(value: Any, rows: Tensor, batch: int) -> Any:
    """The copies `rows` of what is given per example; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value[rows.to(value.device)]
    return value


def target_rows(target: Any, rows: Tensor, batch: int) -> Any:
    """A Captum target for the copies `rows` of a batch."""
    if isinstance(target, Tensor):
        if target.numel() == 1:
            return int(target)
        if len(target) != batch:
            raise TargetError(
                f"target: expected one per example ({batch}), got {tuple(target.shape)}"
            )
        return target[rows.to(target.device)]
    if isinstance(target, list):
        if len(target) != batch:
            raise TargetError(f"target: expected one per example ({batch}), got {len(target)}")
        return [target[i] for i in rows.tolist()]
    return target


@dataclass(frozen=True)
class Model:
    """What a metric runs.

    Args:
        forward_func (callable): the model.
        values (dict): the inputs by name, see `named`.
        additional (tuple): further positional arguments.
        batch (int): number of examples.
        by_name (bool): whether the inputs came as a Mapping.
    """

    forward_func: Callable
    values: dict[Key, Any]
    additional: tuple[Any, ...]
    batch: int
    by_name: bool

    @classmethod
    def of(cls, forward_func: Callable, inputs: Inputs, additional: Any = None) -> Model:
        if not callable(forward_func):
            raise OptionError(
                f"expected a model or a callable that runs one, got {type(forward_func).__name__}"
            )
        values, by_name = named(inputs), isinstance(inputs, Mapping)
        sizes = {k: len(v) for k, v in values.items() if isinstance(v, Tensor) and v.ndim}
        if not sizes:
            raise InputError(f"expected tensors with a batch axis, got {type(inputs).__name__}")
        if len(set(sizes.values())) > 1:
            raise InputError(f"the inputs differ in their batch size: {sizes}")
        if by_name and additional is not None:
            raise InputError(
                "a Mapping goes in by keyword, so positional additional_forward_args would take "
                "the place of its entries; put them into the Mapping"
            )
        (batch,) = set(sizes.values())
        if not batch:
            raise InputError("the batch is empty: expected at least one example")
        extra = additional if isinstance(additional, tuple) else (additional,)
        return cls(forward_func, values, () if additional is None else extra, batch, by_name)

    def __call__(self, rows: Tensor, changed: Mapping[Key, Any], additional: Mapping) -> Tensor:
        """The output (S, ...) for the copies `rows`, with some entries and arguments changed."""
        values: dict[Any, Any] = {
            k: changed[k] if k in changed else rows_of(v, rows, self.batch)
            for k, v in self.values.items()
        }
        values |= {k: v for k, v in changed.items() if k not in values}
        extra = [
            additional[i] if i in additional else rows_of(v, rows, self.batch)
            for i, v in enumerate(self.additional)
        ]
        if self.by_name:
            output = tensor_of(self.forward_func(**values))
        else:
            output = tensor_of(self.forward_func(*values.values(), *extra))
        if not output.ndim or len(output) != len(rows):
            raise InputError(
                f"expected one output per example ({len(rows)} in this call), got an output of "
                f"shape {tuple(output.shape)}"
            )
        return output


def select(output: Tensor, target: Any) -> Tensor:
    """The number (S,) that the target selects from an output (S, ...), as in Captum."""
    each = target if isinstance(target, (Tensor, list)) else None
    if each is not None and output.ndim == 2 and not any(isinstance(t, tuple) for t in each):
        classes = torch.as_tensor(each)
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < output.shape[1]:
            raise TargetError(
                f"the labels reach from {int(classes.min())} to {int(classes.max())}, but the "
                f"output has {output.shape[1]} classes: expected 0 to {output.shape[1] - 1}"
            )
    try:
        selected = _select_targets(output, target)
    except (AssertionError, IndexError, RuntimeError, TypeError) as error:
        raise TargetError(
            f"target {target!r} does not fit the output of shape {tuple(output.shape)}: {error}; "
            "expected a Captum target: an int, a tuple of ints, or one of them per example"
        ) from error
    if selected.numel() != len(output):
        raise TargetError(
            f"expected one number per example; the output of shape {tuple(output.shape)} with "
            f"target {target!r} gives {tuple(selected.shape)}: pass `target=`"
        )
    return selected.reshape(len(output))


def _over_classes(function: Callable[[Tensor], Tensor]) -> Measure:
    def measure(output: Tensor, target: Any) -> Tensor:
        if output.ndim < 2 or output.shape[-1] == 1:
            raise OptionError(
                f"the output of shape {tuple(output.shape)} is one number per example, over which "
                "there is no softmax: pass measure='logit' or 'sigmoid'"
            )
        return select(function(output), target)

    return measure


def _hit(output: Tensor) -> Tensor:
    return F.one_hot(output.argmax(-1), output.shape[-1]).double()


# In float64: differences of probabilities near 1 and logarithms of small ones keep their digits.
MEASURES: dict[str, Measure] = {
    "probability": _over_classes(lambda output: output.double().softmax(-1)),
    "log_probability": _over_classes(lambda output: output.double().log_softmax(-1)),
    "accuracy": _over_classes(_hit),
    "sigmoid": lambda output, target: select(output.double().sigmoid(), target),
    "log_sigmoid": lambda output, target: select(F.logsigmoid(output.double()), target),
    "sigmoid_accuracy": lambda output, target: (select(output.double(), target) > 0).double(),
    "logit": lambda output, target: select(output.double(), target),
}


def measure_of(measure: str | Measure) -> Measure:
    """The measure of that name, or the caller's own."""
    if callable(measure):
        return measure
    if measure not in MEASURES:
        raise OptionError(
            f"measure: expected one of {list(MEASURES)} or a callable, got {measure!r}"
        )
    return MEASURES[measure]


def measured(measure: Measure, output: Tensor, target: Any) -> Tensor:
    """The measure as float64 (S,); refuses what is not one finite number per example."""
    found = measure(output, target)
    if not isinstance(found, Tensor) or found.numel() != len(output):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise OptionError(f"measure: expected one number per example ({len(output)},), got {got}")
    found = found.reshape(len(output)).double()
    if not found.isfinite().all():
        raise InputError(
            "the model's output has NaN or infinity where it is measured: check the model, and "
            "whether the fill is an input that it can take"
        )
    return found


def predicted(output: Tensor) -> Tensor:
    """The class of the highest output (B,); refuses where there is more to choose from."""
    if output.ndim != 2:
        raise TargetError(
            f"no target was given, and an output of shape {tuple(output.shape)} has no one "
            "predicted class: pass `target=`"
        )
    return output.argmax(1)


def finite_attributions(attributions: Tensor, name: Any = "") -> Tensor:
    """The attributions as float64; refuses NaN and infinity, naming the example."""
    bad = ~attributions.isfinite().flatten(1).all(1)
    if bad.any():
        where = bad.nonzero().flatten().tolist()
        raise InputError(
            f"the attributions {name if isinstance(name, str) else ''} of example {where[0]} have "
            f"NaN or infinity ({len(where)} of {len(bad)} examples: {where[:10]}); a metric of "
            "them would mean nothing"
        )
    return attributions.detach().double()


def one_map(attributions: Attributions) -> Tensor:
    """The tensor of attributions that hold one only; others have to be chosen by the caller."""
    entries = named(attributions)
    if len(entries) != 1:
        raise InputError(
            f"expected the attributions of one input, got {list(entries)}: pass the one that is "
            "meant, such as attributions['pixel_values']"
        )
    (only,) = entries.values()
    if not isinstance(only, Tensor):
        raise InputError(f"attributions: expected a tensor, got {type(only).__name__}")
    return only


def positive_int(name: str, value: Any, least: int = 1) -> int:
    """An option that is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return value


def fractions_of(steps: int | Sequence[float]) -> Tensor:
    """The fractions removed, float64 (L,): `steps` equal steps from 0 to 1, or as they are."""
    if isinstance(steps, int):
        return torch.arange(positive_int("steps", steps) + 1, dtype=torch.float64) / steps
    levels = torch.as_tensor(steps, dtype=torch.float64)
    rising = levels.ndim == 1 and len(levels) and bool((levels[1:] > levels[:-1]).all())
    if not rising or levels[0] < 0 or levels[-1] > 1:
        raise OptionError(
            f"steps: expected a number of steps or rising fractions from 0 to 1, got {steps!r}"
        )
    return levels
