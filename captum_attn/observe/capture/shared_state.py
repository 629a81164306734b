"""What runs have to change where other threads see it: counted, the last one out puts it back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

Undo = Callable[[], object]
Change = tuple[Hashable, Callable[[], Undo] | None]


@dataclass
class _Held:
    """A change that `runs` runs need, and what takes it back."""

    undo: Undo
    runs: int = 0


class SharedState:
    """Changes that several runs need at once, each made by the first and undone by the last.

    A process that is forked meanwhile begins with none of them.

    Examples::

        >>> with shared_state.changed([("use_cache", id(config))], [switch_off]): ...
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: dict[Hashable, _Held] = {}
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire,
                after_in_parent=self._lock.release,
                after_in_child=self._forget,
            )

    @contextmanager
    def changed(self, changes: Iterable[Change]) -> Iterator[None]:
        """Makes changes that are not made yet, and holds all of them.

        Args:
            changes (iterable): of (key, change): what tells one change from another, and a
                callable that makes it and returns one that undoes it; None where nothing is to be
                changed, unless another run has changed it already. They are undone in the
                order in which they were made, the last one first.
        """
        held: list[Hashable] = []
        try:
            with self._lock:
                for key, change in changes:
                    if key not in self._held:
                        if change is None:
                            continue
                        self._held[key] = _Held(change())
                    self._held[key].runs += 1
                    held.append(key)
            yield
        finally:
            with self._lock, ExitStack() as undo:  # all of them, even if one fails
                for key in held:
                    self._held[key].runs -= 1
                    if not self._held[key].runs:
                        undo.callback(self._held.pop(key).undo)

    def _forget(self) -> None:
        """In a forked process: its one thread is none of those that made the changes."""
        while self._held:
            self._held.popitem()[1].undo()
        self._lock.release()


shared_state = SharedState()
