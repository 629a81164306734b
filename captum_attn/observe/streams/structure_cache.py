"""What an attribution object remembers of a model's structure from one run to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Found = TypeVar("Found")
_SIGNATURES = 4


@dataclass
class StructureCache:
    """What an attribution object remembers of a model's structure from one run to the next.

    Only what cannot depend on the content of the inputs is kept, for the signatures (the shapes of
    the calls and the leaves) that were met last.
    """

    met: dict[Any, dict[Any, Any]] = field(default_factory=dict)
    entries: dict[Any, Any] = field(default_factory=dict)
    warned: bool = False
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def for_signature(self, signature: Any) -> StructureCache:
        """What is remembered for one signature; another thread may ask for another one."""
        with self._lock:
            entries = self.met.pop(signature, {})
            self.met[signature] = entries  # the last met comes last
            if len(self.met) > _SIGNATURES:
                del self.met[next(iter(self.met))]
        return StructureCache(entries=entries)

    def get_or_compute(self, key: Any, find: Callable[[], Found]) -> Found:
        """A finding that is sought once per signature."""
        if key not in self.entries:
            self.entries[key] = find()
        return self.entries[key]
