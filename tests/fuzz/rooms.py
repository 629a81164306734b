"""The rooms whose public functions are held to it; each imports its models when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from tests.fuzz.public import Public


def _of(room: str) -> Callable[[], list[Public]]:
    return lambda: import_module(f"tests.fuzz.{room}").PUBLIC


NAMES = ("objectives", "visualization", "detection", "generation", "evaluation", "insights", "cli")
ROOMS = {room: _of(room) for room in NAMES}
