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

from captum_attn._checks import FAILURES, listed, names_of, shown, shown_error, text
from captum_attn._method_names import method_class
from captum_attn.errors import AttnError, InputError, OptionError
from captum_attn.evaluation.batches import Batch

EXPECTED = (
    "Captum Attribution classes or their names, objects with `attribute`, functions or pairs of "
    "one and its options"
)

__all__ = ["Method", "check_options", "made", "methods_of", "own_randomness"]


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
        given (class or its name, object with `attribute`, function, a pair of one and its options;
            a sequence or a Mapping of them): classes are made with the model.
        model (callable): what is explained.
    """
    if isinstance(given, str) or callable(given) or hasattr(given, "attribute") or _is_pair(given):
        given = [given]
    given = given if isinstance(given, Mapping) else listed("methods", given, EXPECTED)
    items = given.items() if isinstance(given, Mapping) else [(None, spec) for spec in given]
    found: list[Method] = []
    for name, spec in items:
        source, options = spec if isinstance(spec, tuple) and len(spec) == 2 else (spec, {})
        name = None if name is None else text("methods: a name", name)
        if isinstance(source, str):
            name, source = name or source, method_class("methods", source)
        source = made(source, model) if isinstance(source, type) else source
        if not isinstance(options, Mapping) or not (
            hasattr(source, "attribute") or callable(source)
        ):
            raise OptionError(f"methods: expected {EXPECTED}, got {shown(spec)}")
        name = name or _name(source)
        check_options(source, options, name)
        if any(m.name == name for m in found):
            raise OptionError(
                f"methods: there are two named {name!r}; give them names: {{'name': method, ...}}"
            )
        found.append(Method(name, source, options))
    if not found:
        raise OptionError("methods: expected at least one")
    return found


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)


def made(kind: type, model: Any, options: Mapping[str, Any] | None = None) -> Any:
    """A method on the model.

    Raises:
        OptionError: where it wants more than the model, such as a layer or another method.
    """
    try:
        return kind(model, **(options or {}))
    except AttnError:
        raise
    except FAILURES as problem:
        raise OptionError(
            f"methods: {kind.__name__} cannot be made of the model"
            f"{f' and {dict(options)}' if options else ' alone'} ({shown_error(problem)}): make it "
            "yourself, and pass the object to captum_attn.evaluate"
        ) from problem


def check_options(source: Any, options: Mapping[str, Any], name: str) -> None:
    """Refuses options that a method does not have, and the lack of what it needs."""
    own = hasattr(source, "attribute")
    try:
        found = inspect.signature(source.attribute if own else source).parameters.values()
    except (TypeError, ValueError):  # of C, or it has none
        return
    in_order = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = {*in_order[:1], "target", "additional_forward_args"} if own else set(in_order[:3])
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in named if p.name not in taken]
    if not any(p.kind is p.VAR_KEYWORD for p in found):
        names_of(f"methods: options of {name}", options, known, OptionError)
    needed = [p.name for p in named if p.default is p.empty and p.name in known]
    if missing := [one for one in needed if one not in options]:
        raise OptionError(
            f"methods: {name} needs {', '.join(missing)}: pass ({name}, {{{missing[0]!r}: ...}})"
        )
    typed = getattr(source, "Options", None)  # those of this package's methods are typed
    if own and typed is not None:
        names = {field.name for field in typed.listed()}
        source.settled({option: value for option, value in options.items() if option in names})


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
