"""What a run has for itself, so that nothing is switched that other threads use as well.

Weights are used without a gradient, buffers that are written into are copied, random numbers come
from generators of the run's own. So the model may be explained by several threads at once, and
beside one that trains it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_attn.errors import AttnError
from captum_attn.observe.capture.functions import without_override_check
from captum_attn.observe.capture.own_random import DRAWING, OwnRandom
from captum_attn.observe.capture.tensor_notes import mapped

_GRAD = torch.autograd.grad


class OwnState:
    """The run's own weights, buffers and random numbers, made as they are used.

    Args:
        modules (iterable of Module): the model's. Buffers of those in train mode are copied at
            their first use; other buffers, and weights, when they are written into.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._weights: dict[int, tuple[Tensor, int]] = {}  # id -> weight, the count of its changes
        self._buffers: dict[int, Tensor] = {}
        self._copied: set[int] = set()
        self.trains = False  # whether a module is in train mode
        for module in modules:
            # not `parameters()`, which takes ten times as long
            for weight in module._parameters.values():
                if weight is not None:
                    self._weights[id(weight)] = weight, _changes(weight)
            for buffer in module._buffers.values():
                if buffer is not None:
                    self._buffers[id(buffer)] = buffer
                    if module.training:
                        self._copied.add(id(buffer))
            self.trains |= module.training
        self._own: dict[int, tuple[Tensor, Tensor]] = {}  # id -> the model's tensor, the run's
        self._models: dict[int, Tensor] = {}  # id of the run's tensor -> the model's
        self._random = None if alone() else OwnRandom()

    def check_unchanged(self) -> None:
        """Refuses a run while which something else changed the weights."""
        if any(_changes(weight) != before for weight, before in self._weights.values()):
            raise AttnError(
                "the weights of the model were changed while it was explained (by an optimizer in "
                "another thread?), so that no single model was: explain between the steps, or "
                "explain a copy (`copy.deepcopy(model).eval()`)"
            )

    def arguments(self, func: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a function of torch, with the run's own tensors for the model's."""
        if _writes_in_place(func) and args and isinstance(args[0], Tensor):
            self._copy(args[0])
        args = tuple([mapped(self._tensor, value) for value in args])
        if kwargs:
            if isinstance(kwargs.get("out"), Tensor):
                self._copy(kwargs["out"])
            kwargs = {name: mapped(self._tensor, value) for name, value in kwargs.items()}
        return args, kwargs

    @property
    def is_models(self) -> bool:
        """Whether a function that wants no gradient, and writes into nothing, may take the
        model's own tensors: none was written into, and no random numbers are the run's."""
        return not self._copied and self._random is None

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a function of torch on arguments that `arguments` returned."""
        if self._random is not None and func in DRAWING:
            return self._random.run(func, args, kwargs)
        return func(*args, **kwargs)

    def result(self, out: Any) -> Any:
        """The model's tensor where a function returned the run's: it wrote into it, or it had
        nothing to do."""
        return self._models.get(id(out), out) if self._models else out

    def recompute(self) -> AbstractContextManager:
        """For a backward pass, in which checkpointed parts of the model run once more."""
        return _Recomputing(self)

    @property
    def draws_own(self) -> bool:
        """Whether random numbers come from the run's own generators."""
        return self._random is not None

    def _tensor(self, value: Any) -> Any:
        """The run's tensor in place of the model's; others, and what is no tensor, as they are."""
        if not isinstance(value, Tensor):
            return value
        known = self._own.get(id(value))
        if known is not None:
            return known[1]
        if value.requires_grad:
            is_weight = value.is_leaf and isinstance(value, nn.Parameter)
            return self._weight(value) if is_weight else value
        if id(value) in self._buffers:
            copied = id(value) in self._copied or value.is_inference()
            return self._keep(value, value.clone()) if copied else value
        frozen = value.is_inference() and isinstance(value, nn.Parameter)
        return self._weight(value) if frozen else value

    def _weight(self, models: Tensor) -> Tensor:
        """A weight without a gradient, which shares its numbers and the count of its changes."""
        if torch.is_inference_mode_enabled():
            return models
        weight = models.detach()
        weight = weight.clone() if weight.is_inference() else weight
        return self._keep(models, nn.Parameter(weight, requires_grad=False))

    def _copy(self, target: Tensor) -> None:
        """Makes a copy of a buffer or weight of the model that is about to be written into."""
        base = target if target._base is None else target._base
        if id(base) in self._buffers:
            self._copied.add(id(base))
            copy = self._tensor(base)
            if base is not target and id(target) not in self._own:
                offset = target.storage_offset() - base.storage_offset() + copy.storage_offset()
                self._keep(target, copy.as_strided(target.shape, target.stride(), offset))
        elif id(target) in self._weights and id(target) not in self._copied:
            self._copied.add(id(target))
            self._keep(target, nn.Parameter(target.detach().clone(), requires_grad=False))

    def _keep(self, models: Tensor, own: Tensor) -> Tensor:
        before = self._own.get(id(models))
        if before is not None:  # it may be freed, and another tensor get its id
            self._models.pop(id(before[1]), None)
        self._own[id(models)] = models, own
        self._models[id(own)] = models
        return own


class _Recomputing(TorchFunctionMode):
    """Runs parts of the model again on the run's own tensors."""

    def __init__(self, own: OwnState) -> None:
        super().__init__()
        self._own = own

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in (_GRAD, torch.autograd.grad):  # somebody may have wrapped it
            with self:  # a mode is off inside its own handler
                return without_override_check(_GRAD)(*args, **(kwargs or {}))
        if func in DRAWING and self._own.draws_own:
            raise AttnError(
                "a checkpointed part of a model in train mode draws its random numbers again in "
                "the backward pass, which cannot be the same ones while other threads run; call "
                "`model.eval()`, or switch its gradient checkpointing off"
            )
        args, kwargs = self._own.arguments(func, args, kwargs or {})
        return self._own.result(func(*args, **kwargs))


class _Runs(threading.local):
    """The runs of this thread, one inside the other."""

    def __init__(self) -> None:
        self.own: list[OwnState] = []


_runs = _Runs()


@contextmanager
def running_on(own: OwnState) -> Iterator[None]:
    """Makes `own` the state of the innermost run of this thread."""
    _runs.own.append(own)
    try:
        yield
    finally:
        _runs.own.remove(own)


def own_state() -> OwnState | None:
    """The state of the innermost run of this thread; None outside of one."""
    return _runs.own[-1] if _runs.own else None


def recompute() -> AbstractContextManager:
    """For the backward passes of the innermost run of this thread."""
    own = own_state()
    return nullcontext() if own is None else own.recompute()


def _changes(weight: Tensor) -> int:
    """How often a tensor was written into; 0 where it is not counted."""
    return 0 if weight.is_inference() else weight._version


def alone() -> bool:
    """Whether no other thread can use the model or draw random numbers."""
    return threading.active_count() == 1


def writes(func: Callable, given: Iterable[Any]) -> bool:
    """Whether a function writes into what it is given.

    Args:
        given (iterable): its arguments, with the names of those that have one.
    """
    return _writes_in_place(func) or any(isinstance(g, str) and g == "out" for g in given)


@lru_cache(maxsize=4096)
def _writes_in_place(func: Callable) -> bool:
    """Whether a function writes into its first argument: `add_`, `__iadd__`, `__setitem__`."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name in _IN_PLACE)
    return name.endswith("_")


_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in "add sub mul matmul truediv floordiv mod pow lshift rshift and xor or".split()
)
