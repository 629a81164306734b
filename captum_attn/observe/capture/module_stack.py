"""Which module is running: forward hooks tell, for as long as a run lasts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from captum_attn.observe.capture.shared_state import Change, shared_state
from captum_attn.observe.capture.tensor_notes import tensors


class ModuleStack:
    """The modules that are running in this thread, told by hooks while the context is entered.

    The hooks are those of all modules, so that models which hide inside a callable are seen too.
    What other threads run is passed by: two of them may run the same model, each with its stack.

    Args:
        root (Module or None): the model, for the modules' names; None: the outermost that runs.

    Examples::

        >>> with ModuleStack(model) as modules: ...     # inside a forward: modules.name()
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        self._root = root
        self._names: dict[int, str] = {}
        self._running: list[nn.Module] = []  # the innermost last
        self._hooked = ExitStack()

    def __enter__(self) -> ModuleStack:
        root = self._root
        change: Change
        with ExitStack() as hooked:  # taken back where one of the steps fails
            if root is not None and _has_compiled_parts(root):  # they warn of hooks on all modules
                change = ("hooks", id(self)), partial(_hook_those_in, root, self)
            else:
                change = ("hooks", "all modules"), _hook_all
                hooked.callback(_here.stacks.remove, self)
                _here.stacks.append(self)
            hooked.enter_context(shared_state.changed([change]))
            self._hooked = hooked.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooked.close()
        self._running.clear()

    def name(self) -> str:
        """Qualified name of the innermost running module that has one; its class where none has."""
        if not self._running:
            return "-"
        if not self._names:
            root = self._running[0] if self._root is None else self._root
            self._names = {id(module): name for name, module in root.named_modules()}
        names = (self._names.get(id(module), "") for module in reversed(self._running))
        return next(filter(None, names), type(self._running[-1]).__name__)

    def runs_any(self, modules: Container[int]) -> bool:
        """Whether one of these modules, told by their ids, is running."""
        return any(id(module) in modules for module in reversed(self._running))

    @property
    def is_idle(self) -> bool:
        """Whether no module is running."""
        return not self._running

    def enter(self, module: nn.Module) -> None:
        """A module begins to run."""
        self._running.append(module)

    def leave(self, module: nn.Module) -> None:
        """A module has run, or raised."""
        # Those behind it left without a word (a `BaseException` that the model swallowed).
        for depth in range(len(self._running) - 1, -1, -1):
            if self._running[depth] is module:
                del self._running[depth:]
                return


class NoModules(ModuleStack):
    """Stands for the modules where nobody asks for their names: hooks take time."""

    def __enter__(self) -> NoModules:
        return self


class _Here(threading.local):
    """The stacks of this thread: those of runs inside each other's hooks."""

    def __init__(self) -> None:
        self.stacks: list[ModuleStack] = []


_here = _Here()


def _hook_all() -> Callable[[], None]:
    """One pair of hooks on all modules, for the runs of all threads; returns what takes it off."""

    def entered(module: nn.Module, args: Any) -> None:
        for stack in _here.stacks:
            stack.enter(module)

    def left(module: nn.Module, args: Any, output: Any) -> None:
        for stack in _here.stacks:
            stack.leave(module)

    # the second one is also called for a module that raises: the model may go on without it
    return _hung(
        [
            partial(register_module_forward_pre_hook, entered),
            partial(register_module_forward_hook, left, always_call=True),
        ]
    )


def _hook_those_in(root: nn.Module, stack: ModuleStack) -> Callable[[], None]:
    """A pair of hooks on every module of a model, for one run."""
    thread = threading.get_ident()

    def entered(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            stack.enter(module)

    def left(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            stack.leave(module)

    pairs = (
        (
            partial(m.register_forward_pre_hook, entered),
            partial(m.register_forward_hook, left, always_call=True),
        )
        for m in root.modules()
    )
    return _hung(chain.from_iterable(pairs))


def _hung(hooks: Iterable[Callable[[], RemovableHandle]]) -> Callable[[], None]:
    """Hangs hooks up, all or none of them; returns what takes them off."""
    handles: list[RemovableHandle] = []

    def off() -> None:
        for handle in handles:
            handle.remove()

    try:
        for hook in hooks:
            handles.append(hook())
    except BaseException:
        off()
        raise
    return off


@contextmanager
def hooked(module: nn.Module, hook: Callable[[nn.Module, tuple, dict], Any]) -> Iterator[None]:
    """A forward pre-hook with keywords on one module, which other threads' runs pass by."""
    thread = threading.get_ident()

    def of_this_thread(module: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
        # torch leaves the keywords out where the hook is taken off while another thread calls it
        if threading.get_ident() != thread or kwargs is None:
            return None
        return hook(module, args, kwargs)

    def change() -> Callable[[], None]:
        return module.register_forward_pre_hook(of_this_thread, with_kwargs=True).remove

    with shared_state.changed([(("hook", id(of_this_thread)), change)]):
        yield


@contextmanager
def outputs_of(module: nn.Module, into: list[Tensor]) -> Iterator[None]:
    """Appends the outputs of one module, or the first tensor of each, in this thread."""
    thread = threading.get_ident()

    def left(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            values = list(output.values()) if isinstance(output, Mapping) else [output]
            into.extend(islice(tensors(values), 1))

    def change() -> Callable[[], None]:
        return module.register_forward_hook(left).remove

    with shared_state.changed([(("hook", id(left)), change)]):
        yield


def _has_compiled_parts(root: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and any(
        isinstance(module, dynamo.OptimizedModule) for module in root.modules()
    )
