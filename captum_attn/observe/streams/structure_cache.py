"""What an attribution object remembers of a model's structure from one run to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from captum_attn.observe.capture.steps import KnownRun

Found = TypeVar("Found")
_SIGNATURES = 4


@dataclass
class StructureCache:
    """What an attribution object remembers of a model's structure from one run to the next.

    Only what cannot depend on the content of the inputs is kept, for the signatures (the graph, the
    shapes of the calls and the leaves) that were met last. All of it is plain data, which is
    copied and pickled with the object.
    """

    met: dict[Any, dict[Any, Any]] = field(default_factory=dict)
    entries: dict[Any, Any] = field(default_factory=dict)
    warned: bool = False
    runs: dict[Any, KnownRun | None] = field(default_factory=dict)  # not copied with the object
    known: bool = False  # of one signature: whether an earlier run had it
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is known goes along with a copy, also into another process; the lock does not."""
        with self._lock:
            met = {signature: dict(entries) for signature, entries in self.met.items()}
        return {"met": met, "entries": dict(self.entries), "warned": self.warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def for_signature(self, signature: Any) -> StructureCache:
        """What is remembered for one signature; another thread may ask for another one."""
        with self._lock:
            entries = self.met.pop(signature, {})
            self.met[signature] = entries  # the last met comes last
            if len(self.met) > _SIGNATURES:
                del self.met[next(iter(self.met))]
        return StructureCache(entries=entries, known=bool(entries))

    def run_like(self, inputs: Any) -> KnownRun | None:
        """The run that inputs of such shapes had before, where it can be known again."""
        with self._lock:
            return self.runs.get(inputs)

    def keep_run(self, inputs: Any, run: KnownRun | None) -> None:
        """Remembers a run; None: inputs of such shapes are observed anew each time."""
        with self._lock:
            self.runs.pop(inputs, None)
            self.runs[inputs] = run
            if len(self.runs) > _SIGNATURES:
                del self.runs[next(iter(self.runs))]

    def get_or_compute(self, key: Any, find: Callable[[], Found]) -> Found:
        """A finding that is sought once per signature."""
        if key not in self.entries:
            self.entries[key] = find()
        return self.entries[key]
