"""Finished batches on disk: one JSON line each, after a line with the settings.

Every process appends to a file of its own, and a line is on disk before the next batch begins, so
a killed run loses the batch it was at and nothing else. Each line carries its checksum: one that
was changed is refused, with its number. One run at a time writes to a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from captum_attn.errors import InputError, OptionError

__all__ = ["Log", "finished_batches", "only_writer"]

PATTERN, LOCK = "batches-*.jsonl", ".lock"
FORMAT = 2
CHECK = "check"


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
                file.write(_line({**record, CHECK: _checksum(record)}))
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            raise _unwritable(self.path, problem) from problem


def _unwritable(path: Path, problem: OSError) -> InputError:
    return InputError(
        f"out: cannot write to '{path}' ({problem.strerror}); give a directory of yours"
    )


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


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


# ---------------------------------------------------------------------------- one writer
@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder for one run, as two would write into each other's lines.

    The system lets go of it with the process, however that ends.

    Raises:
        InputError: where another run holds it, or it cannot be written to.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"out: '{folder}' is a file; give a directory")
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+b")  # noqa: SIM115
    except OSError as problem:
        raise _unwritable(folder, problem) from problem
    with file:
        try:
            _lock(file)
        except OSError as problem:
            raise InputError(
                f"out: another run is writing to '{folder}': wait for its end, or give another "
                "directory"
            ) from problem
        yield


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------------------- reading
def finished_batches(
    folder: Path, settings: Mapping[str, Any], resume: bool, batches: int | None = None
) -> dict[int, dict[str, Any]]:
    """Batch number -> what was found, of all processes of earlier runs.

    Args:
        folder (Path): of the results.
        settings (Mapping): of this run; those of the files have to be the same.
        resume (bool): False refuses a folder with finished batches.
        batches (int, optional): how many the data set has.

    Returns:
        dict: empty for a new folder.

    Raises:
        OptionError: for results of other settings, or any where `resume` is False.
        InputError: for a line that was changed, with its number.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob(PATTERN)):
        lines = _lines(path)
        _, header = next(lines, (0, None))
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
        for number, record in lines:
            batch = _checked(record, settings, batches, f"line {number} of '{path}'")
            if found.setdefault(batch, record) != record:
                raise InputError(
                    f"line {number} of '{path}' has batch {batch}, which another line has with "
                    "other numbers: delete one of them"
                )
    return found


def _checked(
    record: Mapping[str, Any], settings: Mapping[str, Any], batches: int | None, where: str
) -> int:
    """The number of a batch; a record that this program has not written is refused."""
    unsigned = {name: value for name, value in record.items() if name != CHECK}
    batch = record.get("batch")
    batch = batch if isinstance(batch, int) and not isinstance(batch, bool) else -1
    if record.get(CHECK) != _checksum(unsigned) or batch < 0 or not _complete(record, settings):
        raise InputError(
            f"{where} is no finished batch: the file was changed; delete the line, and its batch "
            "is computed again"
        )
    if batches is not None and batch >= batches:
        raise InputError(
            f"{where} has batch {batch}, but the data set has {batches}: delete the line, or take "
            "the data set that it was made of"
        )
    return batch


def _complete(record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether every method and metric has a finite number for each example."""
    kept, size, groups = (record.get(name) for name in ("kept", "size", "groups"))
    if not isinstance(size, int) or size < 1 or not isinstance(record.get("first"), int):
        return False
    if groups is not None and (not isinstance(groups, list) or len(groups) != size):
        return False
    parts = [
        kept[method].get(metric) if isinstance(kept.get(method), dict) else None
        for method in settings["methods"]
        for metric in settings["metrics"]
    ] if isinstance(kept, dict) else [None]  # fmt: skip
    return all(isinstance(p, dict) and p and all(_numbers(v, size) for v in p.values())
               for p in parts)  # fmt: skip


def _numbers(values: Any, size: int) -> bool:
    try:
        found = np.asarray(values)
    except ValueError:
        return False
    numeric = found.dtype.kind in "biuf" and found.ndim > 0 and len(found) == size
    return numeric and bool(np.isfinite(found).all())


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines of a file; the last one of a killed run has no end and is left out."""
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise InputError(
            f"out: cannot read '{path}' ({problem.strerror}): expected a file of finished batches; "
            "give another directory"
        ) from problem
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(
                f"line {number} of '{path}' is no finished batch: the file was changed; delete the "
                "line, and its batch is computed again"
            )
        yield number, value


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two nested settings, in words."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [*here, *(k for k in there if k not in here)]
        parts = [
            differences(there.get(k), here.get(k), f"{name}.{k}" if name else str(k)) for k in keys
        ]
        return [text for part in parts for text in part]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        parts = [differences(a, b, f"{name}[{i}]") for i, (a, b) in pairs]
        return [text for part in parts for text in part]
    return (
        [] if there == here else [f"{name or 'settings'} was {_short(there)} and is {_short(here)}"]
    )


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 200 else f"{words[:200]} ..."
