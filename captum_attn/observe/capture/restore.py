"""The model is left as found: every change for a run is made here and undone in `finally`."""

from __future__ import annotations

import functools
import inspect
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")  # transformers; timm
_SEEN_FORMS = ("sdpa", "eager")  # attention implementations that the tap sees


class _Freezer:
    """Turns `requires_grad` off, and on again when the last of several runs is done with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[int, list[Any]] = {}  # id -> [parameter, number of runs]

    @contextmanager
    def frozen(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        held: list[nn.Parameter] = []
        try:
            with self._lock:
                for parameter in parameters:
                    if parameter.requires_grad or id(parameter) in self._runs:
                        self._runs.setdefault(id(parameter), [parameter, 0])[1] += 1
                        held.append(parameter)
                        parameter.requires_grad_(False)
            yield
        finally:
            with self._lock:
                for parameter in held:
                    entry = self._runs[id(parameter)]
                    entry[1] -= 1
                    if not entry[1]:
                        del self._runs[id(parameter)]
                        parameter.requires_grad_(True)


_freezer = _Freezer()


def root_of(forward_func: Callable) -> Callable:
    """The model itself behind wrappers that spread a batch over devices."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(forward_func, parallel):
        forward_func = forward_func.module
    return forward_func


def modules_of(forward_func: Any) -> list[nn.Module]:
    """The modules that a forward function runs, as far as it shows them."""
    if isinstance(forward_func, nn.Module):
        return [forward_func]
    if isinstance(forward_func, functools.partial):
        values = [forward_func.func, *forward_func.args, *forward_func.keywords.values()]
    elif inspect.ismethod(forward_func):
        values = [forward_func.__self__]
    elif inspect.isfunction(forward_func):
        seen = inspect.getclosurevars(forward_func)
        values = [*seen.nonlocals.values(), *seen.globals.values()]
    else:
        values = list(getattr(forward_func, "__dict__", {}).values())
    found: list[nn.Module] = []
    for value in values:
        if isinstance(value, nn.Module):
            found.append(value)
        elif value is not forward_func and _holds_more(value):
            found += modules_of(value)
    return list(dict.fromkeys(found))


def _holds_more(value: Any) -> bool:
    closure = inspect.isfunction(value) and bool(value.__closure__)
    return closure or isinstance(value, functools.partial) or inspect.ismethod(value)


@contextmanager
def left_as_found(roots: list[nn.Module]) -> Iterator[None]:
    """Everything that a run needs changed, on models that are as they were afterwards.

    Parameters require no gradient, gradient checkpointing and `use_cache` are off, attention runs
    in a form that can be seen, compiled code runs eagerly, gradients are on. Buffers of modules in
    train mode and the state of the random number generators are restored.
    """
    modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
    parameters = list(dict.fromkeys(p for m in modules for p in m.parameters(recurse=False)))
    with ExitStack() as stack:
        stack.enter_context(_random_state(parameters))
        stack.enter_context(_buffers(modules))
        stack.enter_context(_flags(modules))
        stack.enter_context(_freezer.frozen(parameters))
        if "torch._dynamo" in sys.modules:  # else nothing was compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _random_state(parameters: list[nn.Parameter]) -> Iterator[None]:
    devices = {p.device for p in parameters if p.is_cuda}
    here, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[d.index for d in devices]):
        try:
            yield
        finally:
            random.setstate(here)
            np.random.set_state(numpys)


@contextmanager
def _buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Restores the statistics that modules in train mode keep, with a warning."""
    training = [m for m in modules if m.training]
    changing = [m for m in training if next(m.buffers(recurse=False), None) is not None]
    random_ones = [m for m in training if getattr(m, "p", 0) or getattr(m, "dropout", 0)]
    if changing or random_ones:
        warnings.warn(
            "the model is in train mode: dropout and batch statistics are part of what is "
            "explained (call `model.eval()` to explain the model as it predicts); its buffers and "
            "the random state are restored",
            stacklevel=2,
        )
    saved = [(b, b.clone()) for m in changing for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)


@contextmanager
def _flags(modules: list[nn.Module]) -> Iterator[None]:
    configs = _configs(vars(module).get("config") for module in modules)
    undo: list[tuple[Any, str, Any]] = []

    def change(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    forms = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    try:
        for module in modules:
            for name in _CHECKPOINTING:
                if vars(module).get(name) is True:
                    change(module, name, False)
        for config in configs:
            if getattr(config, "use_cache", None) is True:
                change(config, "use_cache", False)
        for config, form in forms:
            if isinstance(form, str) and form not in _SEEN_FORMS:
                config._attn_implementation = _seen_form(config, modules)
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
        for config, form in forms:  # a config hands its form down: outer ones first
            if config._attn_implementation != form:
                config._attn_implementation = form


def _seen_form(config: Any, modules: list[nn.Module]) -> str:
    """The form that computes what flash or flex attention computes: SDPA where the model has it."""
    run = [m for m in modules if vars(m).get("config") is config]
    has_sdpa = all(getattr(m, "_supports_sdpa", True) for m in run)
    softcap = getattr(config, "attn_logit_softcapping", None)  # which SDPA has not
    return "sdpa" if has_sdpa and not softcap else "eager"


def _configs(found: Iterable[Any]) -> list[Any]:
    """The models' configurations, each before the ones inside it."""
    configs: dict[int, Any] = {}
    queue = [config for config in found if config is not None]
    for config in queue:
        configs.setdefault(id(config), config)
        inner = (getattr(config, key, None) for key in getattr(config, "sub_configs", None) or {})
        queue += [c for c in inner if c is not None and id(c) not in configs]
    return list(configs.values())
