"""A public function, and what becomes of a call with a mistake."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from captum_attn.errors import AttnError
from tests.fuzz.kinds import mistakes

REFUSED, SILENT, RAW, VAGUE = "refused", "silent", "raw", "vague"


@dataclass(frozen=True)
class Public:
    """A public function.

    Args:
        name (str): what it is called.
        call (callable): takes the arguments by keyword.
        right (callable): makes arguments that work, anew for every call.
        kinds (Mapping): argument -> its kind, see `tests.fuzz.kinds.mistakes`.
        said (Mapping): argument -> how errors name it. Default: its own name.
    """

    name: str
    call: Callable[..., Any]
    right: Callable[[], Mapping[str, Any]]
    kinds: Mapping[str, str]
    said: Mapping[str, str] = field(default_factory=dict)

    def run(self, **changed: Any) -> Any:
        """The result; quiet, and without its state left behind."""
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            found = self.call(**{**self.right(), **changed})
            return list(found) if hasattr(found, "__next__") else found

    def mistakes(self) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        """(argument, name of the mistake, what makes it)."""
        for argument, kind in self.kinds.items():
            for name, make in mistakes(kind).items():
                yield argument, name, make

    def verdict(self, argument: str, make: Callable[[], Any]) -> Verdict:
        """What becomes of the call with one mistake."""
        try:
            found = self.run(**{argument: make()})
        except AttnError as error:
            named = self.said.get(argument, argument).split("|")
            if any(name in str(error) for name in named):
                return Verdict(REFUSED, str(error))
            return Verdict(VAGUE, str(error))
        except Exception as error:
            return Verdict(RAW, f"{type(error).__name__}: {error}")
        return Verdict(SILENT, type(found).__name__)


class Verdict(NamedTuple):
    """refused (by an error that names the argument), vague (one that does not), silent or raw."""

    kind: str
    text: str
