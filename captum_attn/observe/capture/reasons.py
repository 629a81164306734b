"""Errors that a model raises, with their reason and what to do where these can be told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from captum_attn._checks import shown_error
from captum_attn.errors import AttnError, InputError


@contextmanager
def reasons_named(
    forward_func: Callable, inputs: Mapping[str, Any], roots: Iterable[nn.Module], by_name: bool
) -> Iterator[None]:
    """Around the model's run: what comes of its weights or its signature says so.

    Whatever else the model raises comes through in its own words.

    Args:
        inputs (Mapping): what it is run on, in order.
        by_name (bool): whether these are passed by their names.
    """
    try:
        yield
    except AttnError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = _of_inference(error) or _of_meta(roots)
        if reason is None and isinstance(error, TypeError):
            reason = _of_signature(forward_func, inputs, by_name)
        if reason is None:
            raise
        raise InputError(f"{reason}; it was said: {shown_error(error)}") from error


def _of_inference(error: BaseException) -> str | None:
    if "nference tensor" not in str(error):
        return None
    return (
        "a tensor that the model computes with was made under `torch.inference_mode()` and is "
        "neither a weight nor a buffer, so that no gradient passes it: make it under "
        "`torch.no_grad()`, or clone it"
    )


def _of_meta(roots: Iterable[nn.Module]) -> str | None:
    for root in roots:
        for name, weight in (*root.named_parameters(), *root.named_buffers()):
            if weight.is_meta:
                return (
                    f"the weight {name!r} is on 'meta' and has no numbers: load the model's "
                    "weights before it is explained"
                )
    return None


def _of_signature(forward_func: Callable, inputs: Mapping[str, Any], by_name: bool) -> str | None:
    function = forward_func.forward if isinstance(forward_func, nn.Module) else forward_func
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of builtins
        return None
    try:
        signature.bind(**inputs) if by_name else signature.bind(*inputs.values())
    except TypeError:
        given = f"the inputs {list(inputs)}" if by_name else f"{len(inputs)} inputs in order"
        return f"expected a model that can be called with {given}, got one that takes {signature}"
    return None
