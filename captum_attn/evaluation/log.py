"""Finished batches on disk: one JSON line each, after a line with the settings.

Every process appends to a file of its own, and a line is on disk before the next batch begins, so
a killed run loses the batch it was at and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captum_attn.errors import InputError, OptionError

__all__ = ["Log", "finished_batches"]

PATTERN = "batches-*.jsonl"
FORMAT = 1


class Log:
    """Where one process appends its batches.

    Args:
        folder (Path): of the results.
        rank (int): of the process.
        settings (Mapping): what the first line says.
    """

    def __init__(self, folder: Path, rank: int, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = folder / f"batches-{rank}.jsonl", settings

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a finished batch; the file is made with the first one."""
        header = {"format": FORMAT, "settings": self.settings}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                if not _cut_to_whole_lines(file):
                    file.write(_line(header))
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            raise InputError(
                f"cannot write to '{self.path}' ({problem.strerror}); give out= a directory of "
                "yours"
            ) from problem


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _cut_to_whole_lines(file: Any) -> int:
    """Cuts off what a kill left of a line; returns how much there is."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
    file.seek(0, os.SEEK_END)
    return size


def finished_batches(
    folder: Path, settings: Mapping[str, Any], resume: bool
) -> dict[int, dict[str, Any]]:
    """Batch number -> what was found, of all processes of earlier runs.

    Args:
        folder (Path): of the results.
        settings (Mapping): of this run; those of the files have to be the same.
        resume (bool): False refuses a folder with finished batches.

    Returns:
        dict: empty for a new folder.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: '{folder}' is a file; give a directory")
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob(PATTERN)):
        lines = _lines(path)
        header = next(lines, None)
        if header is None:
            continue
        if not resume:
            raise OptionError(
                f"'{folder}' has results already: resume=True (--resume) goes on with them, or "
                "give another directory"
            )
        differing = differences(header.get("settings"), settings)
        if header.get("format") != FORMAT or differing:
            raise OptionError(
                f"'{path}' was made with other settings, so it cannot be gone on with: "
                f"{'; '.join(differing) or 'another format'}. Its batches are kept as they are: "
                "take its settings, or give another directory"
            )
        found.update((record["batch"], record) for record in lines)
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; the last one of a killed run has no end and is left out."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                value = json.loads(line)
                complete = isinstance(value, dict) and (number == 1 or "batch" in value)
            except ValueError:
                complete = False
            if not complete:
                raise InputError(
                    f"line {number} of '{path}' is no finished batch: the file was changed; "
                    "delete the line, and its batch is computed again"
                )
            yield value


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two nested settings, in words."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [*here, *(k for k in there if k not in here)]
        parts = [
            differences(there.get(k), here.get(k), f"{name}.{k}" if name else str(k)) for k in keys
        ]
        return [text for part in parts for text in part]
    return [] if there == here else [f"{name or 'settings'} was {there!r} and is {here!r}"]
