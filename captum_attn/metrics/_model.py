"""The model as a metric calls it: named inputs, copies of examples, one number per copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from captum._utils.common import _select_targets
from torch import Tensor

from captum_attn._checks import shown
from captum_attn.errors import InputError, OptionError, TargetError
from captum_attn.metrics._checks import a_callable, a_tensor

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


MULTI_HOT = (
    "a row of 0 and 1 per example names several classes, of which a measure follows one: repeat "
    "the example for each of its classes, or pass a function of the output as measure="
)


def checked_target(target: Any, batch: int) -> Any:
    """A Captum target: a whole number, a tuple of them, or one of either per example.

    Raises:
        TargetError: for anything else, a multi-hot row (B, K) per example among it.
    """
    if isinstance(target, Tensor):
        found = a_tensor("target", target)
        if found.is_floating_point() or found.dtype == torch.bool:
            hot = found.ndim == 2 and found.shape[1] > 1
            more = MULTI_HOT if hot else "pass target.long() if they are classes"
            raise TargetError(f"target: expected whole numbers, got {found.dtype}; {more}")
        if found.numel() == 1:
            return int(found)
        if found.ndim != 1 or len(found) != batch:
            more = f"; {MULTI_HOT}" if found.ndim == 2 and len(found) == batch else ""
            raise TargetError(
                f"target: expected one per example ({batch}), got {tuple(found.shape)}{more}"
            )
        return found
    if isinstance(target, list) and len(target) != batch:
        raise TargetError(f"target: expected one per example ({batch}), got {len(target)}")
    for one in target if isinstance(target, list) else [target]:
        parts = one if isinstance(one, tuple) else (one,)
        if one is not None and not (parts and all(type(part) is int for part in parts)):
            raise TargetError(
                "target: expected a whole number, a tuple of them, or a list or tensor with one "
                f"per example, got {shown(target)}; {MULTI_HOT if isinstance(one, list) else ''}"
            )
    return target


def target_rows(target: Any, rows: Tensor, batch: int) -> Any:
    """A Captum target for the copies `rows` of a batch."""
    if isinstance(target, Tensor):
        return target[rows.to(target.device)]
    return [target[i] for i in rows.tolist()] if isinstance(target, list) else target


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
        a_callable("forward_func", forward_func)
        values, by_name = named(inputs), isinstance(inputs, Mapping)
        for key, value in values.items():
            if isinstance(value, Tensor):
                a_tensor(f"input {key!r}", value)
            elif not by_name:
                raise InputError(f"input {key!r}: expected a tensor, got {type(value).__name__}")
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
        for number, value in enumerate(extra):
            if isinstance(value, Tensor):
                a_tensor(f"additional_forward_args, {number}", value)
        return cls(forward_func, values, () if additional is None else extra, batch, by_name)

    def inputs(
        self, rows: Tensor, changed: Mapping[Key, Any], additional: Mapping
    ) -> tuple[dict[Any, Any], list[Any]]:
        """The inputs by name and the further arguments of the copies `rows`."""
        values: dict[Any, Any] = {
            k: changed[k] if k in changed else rows_of(v, rows, self.batch)
            for k, v in self.values.items()
        }
        values |= {k: v for k, v in changed.items() if k not in values}
        extra = [
            additional[i] if i in additional else rows_of(v, rows, self.batch)
            for i, v in enumerate(self.additional)
        ]
        return values, extra

    def __call__(self, rows: Tensor, changed: Mapping[Key, Any], additional: Mapping) -> Tensor:
        """The output (S, ...) for the copies `rows`, with some entries and arguments changed."""
        values, extra = self.inputs(rows, changed, additional)
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
        classes = torch.as_tensor(each, device="cpu")
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < output.shape[1]:
            raise TargetError(
                f"the labels reach from {int(classes.min())} to {int(classes.max())}, but the "
                f"output has {output.shape[1]} classes: expected 0 to {output.shape[1] - 1}"
            )
    try:
        selected = _select_targets(output, target)
    except (AssertionError, IndexError, RuntimeError, TypeError) as error:
        raise TargetError(
            f"target {shown(target)} does not fit the output of shape {tuple(output.shape)}: "
            f"{error}; expected a Captum target: an int, a tuple of ints, or one of either per "
            "example"
        ) from error
    if selected.numel() != len(output):
        raise TargetError(
            f"expected one number per example; the output of shape {tuple(output.shape)} with "
            f"target {shown(target)} gives {tuple(selected.shape)}: pass `target=`"
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
    """1 where the output is highest, at the first of equal ones; NaN is refused."""
    return F.one_hot(_finite(output).argmax(-1), output.shape[-1]).double()


def _over_a_half(output: Tensor, target: Any) -> Tensor:
    return (_finite(select(output.double(), target)) > 0).double()


def _finite(output: Tensor) -> Tensor:
    if not output.isfinite().all():
        raise InputError(
            "the model's output has NaN or infinity where it is measured: check the model, and "
            "whether the fill is an input that it can take"
        )
    return output


# In float64: differences of probabilities near 1 and logarithms of small ones keep their digits.
MEASURES: dict[str, Measure] = {
    "probability": _over_classes(lambda output: output.double().softmax(-1)),
    "log_probability": _over_classes(lambda output: output.double().log_softmax(-1)),
    "accuracy": _over_classes(_hit),
    "sigmoid": lambda output, target: select(output.double().sigmoid(), target),
    "log_sigmoid": lambda output, target: select(F.logsigmoid(output.double()), target),
    "sigmoid_accuracy": _over_a_half,
    "logit": lambda output, target: select(output.double(), target),
}


def measure_of(measure: str | Measure) -> Measure:
    """The measure of that name, or the caller's own."""
    if callable(measure):
        return a_callable("measure", measure)
    if not isinstance(measure, str) or measure not in MEASURES:
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
    return _finite(a_tensor("measure", found).reshape(len(output)).double())


def predicted(output: Tensor) -> Tensor:
    """The class of the highest output (B,); refuses where there is more to choose from."""
    if output.ndim != 2:
        raise TargetError(
            f"no target was given, and an output of shape {tuple(output.shape)} has no one "
            "predicted class: pass `target=`"
        )
    return _finite(output).argmax(1)


def finite_attributions(attributions: Tensor, name: Any = "") -> Tensor:
    """The attributions as float64; refuses NaN and infinity, naming the example."""
    attributions = a_tensor(f"attributions {name}".strip(), attributions)
    if not attributions.ndim:
        raise InputError("attributions: expected a batch axis, got a single number")
    bad = ~attributions.isfinite().reshape(len(attributions), -1).all(1)
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
    return a_tensor("attributions", only)
