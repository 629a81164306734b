"""What may be explained: inputs that are refused early if they cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from captum._utils.common import _format_tensor_into_tuples
from torch import Tensor

from captum_attn._checks import FAILURES, shown, shown_error, way_out
from captum_attn.errors import InputError
from captum_attn.observe.capture.tensor_kinds import check_kind

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]


def checked(inputs: Any, additional: Any) -> tuple[Tensor, ...] | Mapping[str, Any]:
    """Inputs as a tuple or a Mapping, refused early if they cannot be explained."""
    if isinstance(inputs, Mapping):
        return _checked_mapping(inputs, additional)
    if not isinstance(inputs, (Tensor, tuple)) or (
        isinstance(inputs, tuple) and not (inputs and all(isinstance(v, Tensor) for v in inputs))
    ):
        raise InputError(
            "expected a Tensor, a tuple of Tensors or a Mapping of them (a tokenizer's or "
            f"processor's output), got {type(inputs).__name__}{way_out(inputs)}"
        )
    _check_additional(additional)
    formatted: tuple[Tensor, ...] = _format_tensor_into_tuples(inputs)
    for i, value in enumerate(formatted):
        check_kind(f"input {i}", value)
        _check_batch(f"input {i}", value, formatted[0])
        _check_finite(f"input {i}", value)
    return formatted


def _check_additional(additional: Any) -> None:
    """Sparse and complex tensors may be what the model takes; others have no numbers to take."""
    for i, value in enumerate(additional if isinstance(additional, tuple) else (additional,)):
        if isinstance(value, Tensor) and not (value.is_sparse or value.is_complex()):
            check_kind(f"additional_forward_args, {i}", value)


def _checked_mapping(inputs: Mapping[str, Any], additional: Any) -> Mapping[str, Any]:
    if additional is not None:
        raise InputError(
            "expected either a Mapping of inputs or positional `additional_forward_args`, got "
            "both: put the further arguments into the Mapping"
        )
    others = [key for key in inputs if not isinstance(key, str)]
    if others:
        raise InputError(
            "expected a Mapping whose keys are the names of the model's arguments, got the key "
            f"{shown(others[0])}"
        )
    if inputs.get("past_key_values") is not None:
        raise InputError(
            "expected inputs without `past_key_values` (the tokens they stand for would get no "
            "relevance); pass the whole sequence instead"
        )
    tensors = {name: v for name, v in inputs.items() if isinstance(v, Tensor)}
    if not tensors:
        raise InputError(
            f"expected a Mapping with tensors, got entries {list(inputs)}{way_out(inputs)}"
        )
    for name, value in tensors.items():
        if not value.is_complex():  # rotations, which are no tokens
            check_kind(repr(name), value)
        if value.ndim == 0 or value.shape[0] == 0:
            raise InputError(f"{name!r}: expected at least one example, got {tuple(value.shape)}")
        _check_finite(repr(name), value, -torch.inf if "mask" in name else None)
    return inputs


def _check_finite(name: str, value: Tensor, allowed: float | None = None) -> None:
    try:
        finite = torch.isfinite(value)
        if allowed is not None:
            finite |= value == allowed
        all_finite = bool(finite.all())
    except FAILURES as error:
        raise InputError(
            f"{name}: expected a tensor whose numbers can be read, got {type(value).__name__} of "
            f"{value.dtype}: {shown_error(error)}"
        ) from error
    if not all_finite:
        raise InputError(f"{name} has NaN or inf: expected finite inputs")


def _check_batch(name: str, value: Tensor, first: Tensor) -> None:
    if value.ndim == 0 or value.shape[0] == 0:
        raise InputError(f"{name}: expected at least one example, got {tuple(value.shape)}")
    if value.shape[0] != first.shape[0]:
        raise InputError(
            f"{name}: expected {first.shape[0]} examples as input 0 has, got {value.shape[0]}"
        )
