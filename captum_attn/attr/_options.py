"""What can be set about a method: typed, refused early, and shown by `help` and `inspect`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from functools import wraps
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from captum_attn._checks import shown
from captum_attn.attr._reasons import check_leave_out
from captum_attn.errors import InputError, OptionError
from captum_attn.observe.capture.restore import check_that_it_runs
from captum_attn.observe.capture.tensor_kinds import check_kind

Settled = TypeVar("Settled", bound="SharedOptions")

_WORDS = {int: "an int", float: "a number", str: "a str", type(None): "None"}


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """Options of every method; a method's own are fields of a subclass of this one.

    The types of the fields are held to: bool, Literal, int, float, str, classes, None and unions of
    them. A subclass refuses what does not go together in `__post_init__`, after `super`'s.

    Args:
        block_size (int, optional): the number of queries whose attention maps are formed at a time.
            Default: as many as suit the cache and the free memory.
        mixing_draws (int, optional): the number of random vectors by which it is estimated how
            something else than attention (a convolution, a recurrence, linear attention) mixes
            tokens. Default: as many as keep the error of a map under 5 %, fewer for wide models.
        leave_out (tuple of str): tokens that get no relevance: "sink", what most heads look at
            whatever is asked, as observed; "self", the one that the output is read from. `describe`
            and `left_out` say which they are. Default: (), none.
    """

    block_size: int | None = None
    mixing_draws: int | None = None
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("block_size", "mixing_draws"):
            count = getattr(self, name)
            whole = isinstance(count, int) and not isinstance(count, bool)
            if count is not None and (not whole or not 1 <= count < 2**31):
                raise OptionError(f"{name}: expected an int >= 1 or None, got {shown(count)}")
        check_leave_out(self.leave_out)
        for name, kind in _types(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind):
                raise OptionError(f"{name}: expected {_described(kind)}, got {shown(value)}")
            if isinstance(value, Tensor):
                try:
                    check_kind(name, value)
                except InputError as error:
                    raise OptionError(str(error)) from error

    @classmethod
    def settle(cls: type[Settled], given: Mapping[str, Any], method: str) -> Settled:
        """The options that a user has given, with the defaults; refuses unknown names.

        Args:
            given (Mapping): name -> value.
            method (str): the method's name, for the error.
        """
        known = [field.name for field in cls.listed()]
        for name in given:
            if name not in known:
                raise OptionError(f"unknown option {name!r}; {method} has: {', '.join(known)}")
        return cls(**given)

    @classmethod
    def of_examples(
        cls, given: Mapping[str, Any], part: slice, inputs: Any, batch: int
    ) -> Mapping[str, Any]:
        """The options for some examples; a method with values per example overrides it.

        Args:
            given (Mapping): name -> value, as the user gave them for all examples.
            part (slice): the examples.
            inputs: of all examples, as the user gave them.
            batch (int): the number of all examples.
        """
        return given

    @classmethod
    def listed(cls) -> list[Field]:
        """The fields, those of the method before those that all methods have."""
        shared = {field.name for field in fields(SharedOptions)}
        return sorted(fields(cls), key=lambda field: field.name in shared)

    @classmethod
    def choices(cls, name: str) -> tuple[Any, ...]:
        """The values that an option with a `Literal` type may have; () for other types."""
        kind = _types(cls)[name]
        return get_args(kind) if get_origin(kind) is Literal else ()


def _types(options: Any) -> dict[str, Any]:
    """The fields' types: field -> type."""
    hints = get_type_hints(options)
    return {field.name: hints[field.name] for field in fields(options)}


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if kind in (int, float):  # True is an int to Python
        if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
            return False  # more than torch computes with
        return isinstance(value, (int, float) if kind is float else int)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _described(kind: Any) -> str:
    if kind is bool:
        return "one of (True, False)"
    if get_origin(kind) is Literal:
        return f"one of {get_args(kind)}"
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return " or ".join(_WORDS.get(one, f"a {getattr(one, '__name__', one)}") for one in kinds)


def showing(call: Callable, options: type[SharedOptions]) -> Callable:
    """A public call of a method whose signature has the method's options for `**options`.

    Args:
        call (callable): with `**options`, or what this function returned for another method.
        options (type): the method's.
    """
    plain = getattr(call, "with_any_options", call)
    signature = inspect.signature(plain)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return call

    @wraps(plain)
    def shown(*args: Any, **kwargs: Any) -> Any:
        check_that_it_runs()
        return plain(*args, **kwargs)

    types, only = _types(options), inspect.Parameter.KEYWORD_ONLY
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = {parameter.name for parameter in given}  # `show_progress` over targets, not over masks
    own = [
        inspect.Parameter(f.name, only, default=f.default, annotation=types[f.name])
        for f in options.listed()
        if f.name not in taken
    ]
    shown.__signature__ = signature.replace(parameters=[*given, *own])  # type: ignore[attr-defined]
    shown.with_any_options = plain  # type: ignore[attr-defined]
    return shown
