"""A batch that does not fit: explained a few examples at a time (`internal_batch_size`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from captum._utils.common import _format_additional_forward_args
from torch import Tensor

from captum_attn._checks import shown
from captum_attn.attr._inputs import Inputs, checked
from captum_attn.attr._request import Request
from captum_attn.errors import InputError, OptionError, TargetError

Result = TypeVar("Result")


def in_batches(
    explain: Callable[[Inputs, Request, Mapping[str, Any]], Result],
    inputs: Inputs,
    explained: Request,
    size: int | None,
    options: Mapping[str, Any],
    of_examples: Callable[[Mapping[str, Any], slice, Inputs, int], Mapping[str, Any]],
) -> Result:
    """`explain` for at most `size` examples at a time, the results put together again.

    Args:
        explain (callable): (inputs, what is explained, options) -> a Tensor, or a tuple or dict of
            them.
        size (int, optional): None: all at once.
        options (Mapping): the method's, for all examples.
        of_examples (callable): (options, examples, inputs, batch) -> options for these examples.
    """
    if size is None:
        return explain(inputs, explained, options)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise OptionError(f"internal_batch_size: expected an int >= 1 or None, got {size!r}")
    values = checked(inputs, explained.additional_forward_args)
    named = values if isinstance(values, Mapping) else dict(enumerate(values))
    batch = next(len(value) for value in named.values() if isinstance(value, Tensor))
    for name, value in named.items():
        if isinstance(value, Tensor) and len(value) != batch:
            raise InputError(
                f"internal_batch_size: {name!r} has {len(value)} rows where the first input has "
                f"{batch} examples: expected as many, or it cannot be told which rows belong to "
                "which example; explain such a batch in one go, or one example at a time"
            )
    _check_target(explained.target, batch)
    parts = [slice(start, start + size) for start in range(0, batch, size)]
    return _joined(
        [
            explain(
                _rows(inputs, part, batch),
                _of_rows(explained, part, batch),
                of_examples(options, part, inputs, batch),
            )
            for part in parts
        ]
    )


def _check_target(target: Any, batch: int) -> None:
    """A list of another length would lose its end, or its last batch."""
    rows = isinstance(target, Tensor) and target.numel() > 1
    if (isinstance(target, list) or rows) and len(target) != batch:
        raise TargetError(f"target: expected one for each of {batch} examples, got {len(target)}")
    if rows and target.ndim > 1:
        raise TargetError(f"target: expected one for each of {batch} examples, got {shown(target)}")


def _of_rows(explained: Request, part: slice, batch: int) -> Request:
    """What is explained of some examples."""
    additional = _format_additional_forward_args(explained.additional_forward_args)
    return replace(
        explained,
        target=_rows(explained.target, part, batch, one_for_all=True),
        additional_forward_args=None if additional is None else _rows(additional, part, batch),
        readout=_rows(explained.readout, part, batch),
    )


def _rows(value: Any, part: slice, batch: int, one_for_all: bool = False) -> Any:
    """Some examples' rows of a value, and of the values in it; others are as they are."""
    if isinstance(value, Tensor):
        whole = value.ndim == 0 or len(value) != batch or (one_for_all and value.numel() == 1)
        return value if whole else value[part]
    if isinstance(value, Mapping):
        return {name: _rows(entry, part, batch) for name, entry in value.items()}
    if isinstance(value, list) and len(value) == batch:
        return value[part]
    if isinstance(value, tuple) and not one_for_all:  # a target's tuple selects one output
        return tuple(_rows(entry, part, batch) for entry in value)
    return value


def copied(value: Any, times: int, batch: int) -> Any:
    """A value for copies of the batch, one after the other; what all share is as it is."""
    if times == 1:
        return value
    if isinstance(value, Tensor):
        whole = value.ndim == 0 or len(value) != batch
        return value if whole else value.repeat(times, *[1] * (value.ndim - 1))
    if isinstance(value, Mapping):
        return {name: copied(entry, times, batch) for name, entry in value.items()}
    if isinstance(value, list) and len(value) == batch:
        return value * times
    return tuple(copied(v, times, batch) for v in value) if isinstance(value, tuple) else value


def copied_request(explained: Request, times: int, batch: int) -> Request:
    """What is explained of copies of the batch, one after the other."""
    target = explained.target
    is_one = isinstance(target, tuple) or (isinstance(target, Tensor) and target.numel() == 1)
    return replace(
        explained,
        target=target if is_one else copied(target, times, batch),
        additional_forward_args=copied(
            _format_additional_forward_args(explained.additional_forward_args), times, batch
        ),
    )


def _joined(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, dict):
        return {name: _joined([result[name] for result in results]) for name in first}
    if isinstance(first, tuple):
        return tuple(map(_joined, map(list, zip(*results, strict=True))))
    return torch.cat(results)
