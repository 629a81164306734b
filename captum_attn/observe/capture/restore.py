"""The model is left as found: every change for a run is made here and undone afterwards."""

from __future__ import annotations

import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from captum_attn.errors import AttnError
from captum_attn.observe.capture.default_device import on_own_device
from captum_attn.observe.capture.own_state import OwnState, alone, running_on
from captum_attn.observe.capture.shared_state import Change, Undo, shared_state
from captum_attn.observe.capture.tensor_kinds import check_weights

_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")  # transformers; timm
_COMPILED = (
    "explaining cannot be part of compiled code: call it outside of the function that "
    "`torch.compile` runs, or in one with the decorator `torch.compiler.disable`"
)
_SEEN_FORMS = ("sdpa", "eager")  # attention implementations that the tap sees


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
    if isinstance(forward_func, partial):
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


def every_module(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of several models, each once; `Module.modules` takes ten times as long."""
    found: dict[nn.Module, None] = {}
    waiting = list(reversed(list(roots)))
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [m for m in reversed(list(module._modules.values())) if m is not None]
    return list(found)


def _holds_more(value: Any) -> bool:
    closure = inspect.isfunction(value) and bool(value.__closure__)
    return closure or isinstance(value, partial) or inspect.ismethod(value)


@contextmanager
def left_as_found(roots: list[nn.Module]) -> Iterator[None]:
    """Everything that a run needs changed, on models that are as they were afterwards.

    Weights require no gradient, buffers that are written into are copies, random numbers come
    from copied generators where other threads draw as well: these are the run's own (`OwnState`).
    Gradient checkpointing and `use_cache` are off, attention runs in a form that can be seen,
    compiled code runs eagerly: these are changed until the last run that needs them is out.
    Buffers that a module replaces are put back. Gradients are on, and the user's default device
    is out of the way, for this thread.
    """
    check_that_it_runs()
    modules = every_module(roots)
    check_weights(modules)
    _warn_of_train_mode(modules)
    own = OwnState(modules)
    with ExitStack() as stack:
        stack.enter_context(_random_state(modules))
        stack.enter_context(shared_state.changed(_changes(modules)))
        stack.enter_context(on_own_device())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(running_on(own))
        yield
        own.check_unchanged()


def check_that_it_runs() -> None:
    """Refuses to explain where code is recorded or compiled, not run.

    `torch.compile` looks at the first lines of this; with `fullgraph=True` its own error quotes
    what they raise.
    """
    if torch.compiler.is_compiling():
        raise AttnError(_COMPILED)
    if torch.jit.is_tracing():
        raise AttnError(
            "explaining cannot be part of what `torch.jit.trace` records: trace the model alone, "
            "and explain outside of it"
        )
    if _is_watched_by_dynamo():
        raise AttnError(_COMPILED)


def _is_watched_by_dynamo() -> bool:
    """Whether `torch.compile` looks at each function that is called here."""
    if "torch._dynamo" not in sys.modules:
        return False
    watching = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    return watching is not None and callable(watching())


@contextmanager
def attention_is_seen(roots: list[nn.Module]) -> Iterator[None]:
    """Attention runs in a form that can be seen and changed, and nothing runs a second time.

    Gradient checkpointing is off and compiled code runs eagerly; both are put back afterwards.
    """
    check_that_it_runs()
    modules = every_module(roots)
    wanted = ("attention form", "torch.compile", *_CHECKPOINTING)
    changes = (c for c in _changes(modules) if _kind(c) in wanted)
    with shared_state.changed(changes):
        yield


# ---------------------------------------------------------------------------- random numbers
@contextmanager
def _random_state(modules: list[nn.Module]) -> Iterator[None]:
    """Sets the process's random generators back, unless another thread may have drawn from them.

    Such a thread would draw its numbers again. (The run draws torch's from generators of its own
    then; a model that draws from `numpy.random` or `random` moves these on.)
    """
    if not alone():
        yield
        return
    draw_again = drawing_again(modules)
    try:
        yield
    finally:
        draw_again()


def drawing_again(modules: list[nn.Module]) -> Callable[[], None]:
    """What sets the random generators back to where they are now, unless other threads draw too.

    Then a run draws from copies of the process's generators, which begin where these are.
    """
    devices: set[int] = set()
    if torch.cuda.is_initialized():
        devices = {
            p.device.index for m in modules for p in m.parameters(recurse=False) if p.is_cuda
        }
    cpu, here, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_devices = {index: torch.cuda.get_rng_state(index) for index in devices}

    def draw_again() -> None:
        if alone():
            torch.set_rng_state(cpu)
            random.setstate(here)
            np.random.set_state(numpys)
            for index, state in on_devices.items():
                torch.cuda.set_rng_state(state, index)

    return draw_again


def _warn_of_train_mode(modules: list[nn.Module]) -> None:
    training = [m for m in modules if m.training]
    changing = any(next(m.buffers(recurse=False), None) is not None for m in training)
    if changing or any(getattr(m, "p", 0) or getattr(m, "dropout", 0) for m in training):
        warnings.warn(
            "the model is in train mode: dropout and batch statistics are part of what is "
            "explained (call `model.eval()` to explain the model as it predicts); its buffers and "
            "the random state are left as they are",
            stacklevel=2,
        )


# ---------------------------------------------------------------------------- shared changes
def _changes(modules: list[nn.Module]) -> Iterator[Change]:
    """What the run needs changed on the model and on the process."""
    for module in modules:
        if module._buffers:
            yield ("buffers", id(module)), partial(_kept_buffers, module)
        if module.training and isinstance(module, torch.jit.ScriptModule):
            yield ("statistics", id(module)), partial(_kept_statistics, module)
        for name in _CHECKPOINTING:
            if name in vars(module):
                yield _switched_off(module, name)
    for config in _configs(vars(module).get("config") for module in modules):
        if hasattr(config, "use_cache"):
            yield _switched_off(config, "use_cache")
        form = getattr(config, "_attn_implementation", None)
        if isinstance(form, str):
            hidden = form not in _SEEN_FORMS
            change = partial(_set_form, config, _seen_form(config, modules)) if hidden else None
            yield ("attention form", id(config)), change
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        yield "torch.compile", _run_eagerly


def _kind(change: Change) -> Any:
    key = change[0]
    return key[0] if isinstance(key, tuple) else key


def _switched_off(owner: Any, name: str) -> Change:
    on = getattr(owner, name) is True
    return (name, id(owner)), partial(_set, owner, name, False) if on else None


def _set(owner: Any, name: str, value: Any) -> Undo:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _set_form(config: Any, form: str) -> Undo:
    """Sets the attention implementation of one configuration, not of those inside it."""
    before = config._attn_implementation
    inner = [c for c in _configs([config])[1:] if hasattr(c, "_attn_implementation")]

    def set_to(form: str) -> None:
        forms = [(c, c._attn_implementation) for c in inner]
        config._attn_implementation = form  # which hands it down
        for c, own in forms:
            if c._attn_implementation != own:
                c._attn_implementation = own

    set_to(form)
    return lambda: set_to(before)


def _kept_buffers(module: nn.Module) -> Undo:
    """Buffers that the forward replaces (a table that grows) are put back, new ones taken out."""
    before, transient = dict(module._buffers), set(module._non_persistent_buffers_set)

    def put_back() -> None:
        now = module._buffers
        kept = list(now) == list(before) and all(now[name] is before[name] for name in before)
        if not kept:
            module._buffers.clear()
            module._buffers.update(before)
        module._non_persistent_buffers_set.intersection_update(transient)

    return put_back


def _kept_statistics(module: nn.Module) -> Undo:
    """Scripted code writes into the buffers themselves."""
    saved = [(b, b.clone()) for b in module.buffers(recurse=False)]

    def copy_back() -> None:
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)

    return copy_back


def _run_eagerly() -> Undo:
    """Compiled code is hidden from a tap: `torch.compile` runs it eagerly for the while."""
    try:
        stance = torch.compiler.set_stance("force_eager")  # from here on
    except RuntimeError as error:
        raise AttnError(_COMPILED) from error
    return lambda: stance.__exit__(None, None, None)


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
