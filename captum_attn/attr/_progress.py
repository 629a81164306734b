"""A progress bar over the runs of a method that runs the model many times, as Captum shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from captum._utils.progress import progress

Step = TypeVar("Step")


def with_progress(steps: Sequence[Step], name: str, options: Any) -> Iterable[Step]:
    """The steps, under a bar where `options.show_progress` asks for one."""
    if not options.show_progress:
        return steps
    return progress(steps, desc=f"{name} attribution", total=len(steps))
