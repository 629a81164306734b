"""Fingerprints: equal for what gives the same numbers, without addresses in memory.

A value is described as JSON takes it. Tensors and weights become digests of their bytes; functions
become their code, defaults and closures; objects become their class and what they hold. What cannot
be told apart (a generator, a lock, an open file) is noted by name, so that a user can be warned.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import random
import re
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_attn._checks import FAILURES

__all__ = ["Describer", "described", "digest"]

PLAIN = (bool, int, str, type(None))
SHOWN = (complex, bytes, np.generic, torch.dtype, torch.device, Enum, PurePath, slice, re.Pattern)
DEEPEST = 40  # levels of nesting that are looked through
# Packages whose versions are compared, so that their code need not be.
VERSIONED = {
    "captum",
    "captum_attn",
    "numpy",
    "sklearn",
    "skimage",
    "timm",
    "torch",
    "transformers",
}
CACHES = "captum_attn.observe"  # what the engine remembers of a structure changes no number
PROPERTIES = (staticmethod, classmethod, functools.cached_property, property)


def described(value: Any) -> Any:
    """A value as JSON, see `Describer`."""
    return Describer()(value)


def digest(value: Any) -> str:
    """A short fingerprint of tensors, numbers and words, alone or in containers."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    words = json.dumps(described(value), sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


class Describer:
    """Describes values; each object once, however often it occurs.

    Attributes:
        unknown (dict): where something was met that cannot be told apart -> its class.

    Examples::

        >>> describe = Describer()
        >>> describe({"n_steps": 10, "rows": (i for i in range(3))}, "options")
        {'n_steps': 10, 'rows': {'class': 'builtins.generator'}}
        >>> describe.unknown
        {'options.rows': 'builtins.generator'}
    """

    def __init__(self) -> None:
        self.unknown: dict[str, str] = {}
        self._found: dict[int, Any] = {}
        self._alive: list[Any] = []  # else another object could get the address of one

    def __call__(self, value: Any, where: str = "", depth: int = 0) -> Any:
        """A value as JSON; `where` it is, for `unknown`."""
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, SHOWN):
            return repr(value)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if id(value) not in self._found:
            self._alive.append(value)
            self._found[id(value)] = f"cycle of {_path(type(value))}"
            if depth > DEEPEST:
                return self._cannot(value, where)
            self._found[id(value)] = self._anew(value, where, depth + 1)
        return self._found[id(value)]

    def _anew(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, (Tensor, np.ndarray, np.random.Generator, torch.Generator)):
            return self._numbers(value, where, depth)
        if isinstance(value, Mapping):
            return {str(k): self(v, f"{where}.{k}".lstrip("."), depth) for k, v in value.items()}
        if isinstance(value, (tuple, list, range)):
            return [self(v, f"{where}[{i}]", depth) for i, v in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            return sorted((self(v, where, depth) for v in value), key=repr)
        if isinstance(value, nn.Module):
            return self._module(value, where, depth)
        if isinstance(value, functools.partial):
            parts = {"args": value.args, "options": value.keywords}
            return {"partial": self(value.func, where, depth), **self(parts, where, depth)}
        if inspect.ismethod(value):
            own = self(value.__self__, where, depth)
            return {"method": value.__name__, "of": own}
        if inspect.isfunction(value):
            return self._function(value, where, depth)
        if isinstance(value, type):
            return self._class(value, where, depth)
        if isinstance(value, (types.BuiltinFunctionType, np.ufunc)) or inspect.isroutine(value):
            return _path(value)
        return self._object(value, where, depth)

    def _cannot(self, value: Any, where: str) -> Any:
        self.unknown[where] = _path(type(value))
        return {"class": _path(type(value))}

    def _numbers(self, value: Any, where: str, depth: int) -> Any:
        try:
            if isinstance(value, torch.Generator):
                return f"generator {_of_tensor(value.get_state())}"
            if isinstance(value, np.random.Generator):
                return {"generator": self(value.bit_generator.state, where, depth)}
            if isinstance(value, Tensor):
                return f"tensor {tuple(value.shape)} {_of_tensor(value)}"
            if value.dtype.hasobject:
                return [self(one, where, depth) for one in value.ravel().tolist()]
            raw = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
            return f"array {value.shape} {value.dtype} {raw}"
        except FAILURES:
            return self._cannot(value, where)

    def _module(self, module: nn.Module, where: str, depth: int) -> Any:
        """A model: its weights and buffers, where they are, and how each part is set."""
        weights = [*module.named_parameters(), *module.named_buffers()]
        parts = {}
        for name, part in module.named_modules():
            hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
            own = {k: v for k, v in vars(part).items() if k[0] != "_" and _is_plain(v)}
            place = f"{where}.{name}".strip(".")
            parts[name] = digest(self([type(part), own, hooks], place, depth))
        return {
            "class": _path(type(module)),
            "weights": digest([[name, t.device.type, self(t, name, depth)] for name, t in weights]),
            "parts": parts,
        }

    def _function(self, function: Any, where: str, depth: int) -> Any:
        """A function of the user's: its code, and what it finds in defaults, closure, globals."""
        if _versioned(function):
            return {"function": _path(function), **self._closure(function, where, depth)}
        given = {"defaults": function.__defaults__, "options": function.__kwdefaults__}
        return {
            "function": _path(function),
            "code": _of_code(function.__code__),
            **{k: self(v, f"{where}.{k}", depth) for k, v in given.items() if v},
            **self._closure(function, where, depth),
            **self._globals(function, where, depth),
        }

    def _closure(self, function: Any, where: str, depth: int) -> dict[str, Any]:
        found = {}
        cells = function.__closure__ or ()
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
            try:
                found[name] = self(cell.cell_contents, f"{where}.{name}".lstrip("."), depth)
            except ValueError:  # not yet filled
                found[name] = None
        return {"closure": found} if found else {}

    def _globals(self, function: Any, where: str, depth: int) -> dict[str, Any]:
        """Numbers, models and functions of the user's module that a function speaks of."""
        found = {}
        for name in sorted(set(_names(function.__code__)) & function.__globals__.keys()):
            value = function.__globals__[name]
            own = isinstance(value, type) or inspect.isfunction(value)
            if (own and not _versioned(value)) or _is_plain(value) or isinstance(
                value, (Tensor, np.ndarray, nn.Module)
            ):  # fmt: skip
                found[name] = self(value, f"{where}.{name}".lstrip("."), depth)
        return {"globals": found} if found else {}

    def _class(self, kind: type, where: str, depth: int) -> Any:
        """A class: its path, and the code of its methods where no version tells."""
        parts: dict[str, Any] = {}
        for base in kind.__mro__:
            if not _versioned(base):
                for name, value in vars(base).items():
                    value = _unwrapped(value)
                    if inspect.isfunction(value):
                        parts[f"{_path(base)}.{name}"] = self._function(value, where, depth)
                    elif _is_plain(value) and not name.startswith("__"):
                        parts[f"{_path(base)}.{name}"] = self(value, where, depth)
        return {"class": _path(kind), "code": digest(parts)} if parts else _path(kind)

    def _object(self, value: Any, where: str, depth: int) -> Any:
        kind = type(value)
        if kind.__module__.startswith(CACHES):
            return _path(kind)
        if isinstance(value, random.Random):
            return {"generator": digest(value.getstate())}
        try:
            held = dict(vars(value)) if hasattr(value, "__dict__") else {}
            for base in kind.__mro__:
                slots = base.__dict__.get("__slots__", ())
                names = (slots,) if isinstance(slots, str) else slots
                held |= {n: getattr(value, n) for n in names if hasattr(value, n)}
            if not held:  # of C or Rust: what pickle would keep of it
                held = {"state": value.__reduce_ex__(2)[1:3]}
        except Exception:  # it may raise whatever it likes
            return self._cannot(value, where)
        found = {"class": self(kind, where, depth)}
        for name, part in sorted(held.items()):
            if name not in ("__dict__", "__weakref__"):
                found[name] = self(part, f"{where}.{name}".lstrip("."), depth)
        return found


# ---------------------------------------------------------------------------- parts
def _path(value: Any) -> str:
    named = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return f"{getattr(value, '__module__', None)}.{named or type(value).__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(part) for part in value)
    return isinstance(value, (*PLAIN, float, *SHOWN))


def _versioned(value: Any) -> bool:
    """Whether the version of a package tells what a class or function does."""
    top = (getattr(value, "__module__", None) or "builtins").split(".")[0]
    return top in VERSIONED or (top != "__main__" and top in sys.stdlib_module_names)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, PROPERTIES):
        inner = getattr(value, "fget", None) or getattr(value, "func", None)
        return inner or getattr(value, "__func__", value)
    return value


def _of_tensor(tensor: Tensor) -> str:
    raw = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    raw = raw.cpu().contiguous()
    found = hashlib.sha256(f"{tuple(raw.shape)} {raw.dtype}".encode())
    found.update(raw.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _of_code(code: types.CodeType) -> str:
    """What a function does, wherever it stands."""
    found = hashlib.sha256(code.co_code)
    for part in (code.co_names, *code.co_consts):
        if isinstance(part, types.CodeType):
            found.update(_of_code(part).encode())
        else:  # the order of a set is another in every process
            found.update(repr(sorted(map(repr, part)) if isinstance(part, frozenset) else part)
                         .encode())  # fmt: skip
    return found.hexdigest()[:16]


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that a function looks up, those of functions in it included."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)
