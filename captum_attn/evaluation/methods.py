"""Methods as an evaluation takes them: by name, and with random numbers of their own."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation.batches import Batch

__all__ = ["Method", "methods_of", "own_randomness"]


@dataclass(frozen=True)
class Method:
    """What explains a batch.

    Args:
        name (str): in the table.
        source (any): an object with `attribute`, as Captum's methods are, or a function
            (inputs, target, additional_forward_args) -> attributions.
        options (Mapping): further keyword arguments.
    """

    name: str
    source: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def explain(self, batch: Batch, target: Any, first: int = 0) -> Any:
        """The attributions of a batch, in the container of its inputs; refuses NaN.

        Args:
            batch (Batch), target (any): what is explained.
            first (int): the number of the batch's first example, for errors.
        """
        additional = batch.additional_forward_args
        if hasattr(self.source, "attribute"):
            more = {} if additional is None else {"additional_forward_args": additional}
            found = self.source.attribute(batch.inputs, target=target, **more, **self.options)
        else:
            found = self.source(batch.inputs, target, additional, **self.options)
        return _checked(found, len(batch), first)


def _checked(found: Any, size: int, first: int) -> Any:
    if isinstance(found, Tensor):
        return _checked((found,), size, first)[0]
    parts = found.values() if isinstance(found, Mapping) else found
    if not isinstance(found, (tuple, list, Mapping)) or not any(
        isinstance(p, Tensor) for p in parts
    ):
        raise InputError(f"expected attributions, got {type(found).__name__}")
    for part in parts:
        if not isinstance(part, Tensor):
            continue
        if not part.ndim or len(part) != size:
            raise InputError(
                f"expected attributions of {size} examples, got the shape {tuple(part.shape)}"
            )
        bad = (~part.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"the attributions of example {first + bad[0]} have NaN or infinity ({len(bad)} of "
                f"the {size} in its batch)"
            )
    values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in _items(found)}
    return values if isinstance(found, Mapping) else tuple(values.values())


def _items(found: Any) -> Iterator[tuple[Any, Any]]:
    return iter(found.items() if isinstance(found, Mapping) else enumerate(found))


def methods_of(given: Any, model: Callable) -> list[Method]:
    """The methods by the names that the table gives them.

    Args:
        given (class, object with `attribute`, function, a pair of one and its options; a sequence
            or a Mapping of them): classes are made with the model.
        model (callable): what is explained.
    """
    if callable(given) or hasattr(given, "attribute"):
        given = [given]
    items = given.items() if isinstance(given, Mapping) else [(None, spec) for spec in given]
    found: list[Method] = []
    for name, spec in items:
        source, options = spec if isinstance(spec, tuple) and len(spec) == 2 else (spec, {})
        source = source(model) if isinstance(source, type) else source
        if not isinstance(options, Mapping) or not (
            hasattr(source, "attribute") or callable(source)
        ):
            raise OptionError(
                "methods: expected Captum Attribution classes, objects with `attribute`, functions "
                f"or pairs of one and its options, got {spec!r}"
            )
        name = name or _name(source)
        if any(m.name == name for m in found):
            raise OptionError(
                f"methods: there are two named {name!r}; give them names: {{'name': method, ...}}"
            )
        _check_options(name, source, options)
        found.append(Method(name, source, options))
    if not found:
        raise OptionError("methods: expected at least one")
    return found


def _check_options(name: str, source: Any, options: Mapping[str, Any]) -> None:
    """Refuses options that a method's `attribute` does not show, before any model runs.

    The methods of this package have typed options, so that their values are held to it as well.
    """
    if not hasattr(source, "attribute"):
        return
    parameters = inspect.signature(source.attribute).parameters
    unknown = [option for option in options if option not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = ", ".join(p for p in parameters if p not in ("inputs", "target"))
        raise OptionError(f"methods: {name} has no option {unknown[0]!r}; it has: {known}")
    typed = getattr(source, "Options", None)
    if typed is not None:
        own = {field.name for field in typed.listed()}
        source.settled({option: value for option, value in options.items() if option in own})


def _name(source: Any) -> str:
    named = getattr(source, "get_name", None)
    return str(named()) if named else getattr(source, "__name__", type(source).__name__)


@contextmanager
def own_randomness(seed: int, *of: Any) -> Iterator[None]:
    """Random numbers that depend on a seed and on what they are for alone.

    So a batch gets the same ones whoever computes it, and whatever was computed before. The
    global states are left as they were.
    """
    digest = hashlib.sha256(repr((seed, *of)).encode()).digest()
    number = int.from_bytes(digest[:4], "big")
    kept = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(_devices()):
            torch.manual_seed(number)
            np.random.seed(number)
            random.seed(number)
            yield
    finally:
        np.random.set_state(kept[0])
        random.setstate(kept[1])


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
