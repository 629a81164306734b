"""What an evaluation found: a table with its errors, the differences, and files of both."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation.chance import groups_needed
from captum_attn.evaluation.measures import Metric
from captum_attn.evaluation.settings import versions
from captum_attn.evaluation.statistics import (
    Difference,
    Numbers,
    Resamples,
    Value,
    differences_of,
    values_of,
)

__all__ = ["Results", "gathered"]

Kept = Mapping[tuple[str, str], Mapping[str, np.ndarray]]  # (method, metric) -> name -> (n, ...)
LEGEND = "± standard error over {examples} examples{groups}. "
SIGNS = (
    "* best of its column, ~ not really different from it (swaps and bootstrap-t, Holm over all "
    "pairs, {confidence:g} %)."
)
TOO_FEW = (
    "No * and no ~: with {groups} {kind} no difference of {methods} methods can be told from "
    "chance ({confidence:g} %); it takes {needed}."
)


@dataclass(frozen=True)
class Results:
    """What was kept of every example, and the table that it amounts to.

    Args:
        methods (list of str): rows of the table.
        metrics (Mapping): name -> Metric.
        kept (Mapping): (method, metric) -> name -> array (n, ...), in the data set's order.
        groups (list): n names of what belongs together.
        settings (Mapping): what it was made with.
        confidence (float): of the intervals, and of what is called real.
        resamples (int): of the bootstrap and of the tests, which draw more for many methods.
        seed (int): of the draws.

    Examples::

        >>> print(results)
        >>> results.value("Generic Attention (GAE)", "segmentation.mIoU").standard_error
        >>> [d for d in results.differences("aopc") if d.real]
    """

    methods: Sequence[str]
    metrics: Mapping[str, Metric]
    kept: Kept
    groups: Sequence[Any]
    settings: Mapping[str, Any]
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def columns(self) -> list[str]:
        """Names of the columns: a metric's, or `metric.column` where it has several."""
        return list(self._columns)

    @cached_property
    def _columns(self) -> dict[str, tuple[str, str]]:
        return {
            metric if list(found.columns) == ["value"] else f"{metric}.{column}": (metric, column)
            for metric, found in self.metrics.items()
            for column in found.columns
        }

    @cached_property
    def _resampled(self) -> Resamples:
        flat = {(*of, name): v for of, kept in self.kept.items() for name, v in kept.items()}
        return Resamples(flat, self.groups, self.resamples, self.seed)

    def _numbers(self, column: str) -> Numbers:
        """A column of all methods: over the data set, the resamples, and all groups but one."""
        if column not in self._columns:
            raise OptionError(f"expected one of the columns {self.columns}, got {column!r}")
        metric, name = self._columns[column]
        of = self.metrics[metric].columns[name]

        def numbers(means: Mapping[Any, np.ndarray]) -> np.ndarray:
            values = [
                of.value({k: means[method, metric, k] for k in self.kept[method, metric]})
                for method in self.methods
            ]
            return np.stack(values, 1)

        every = self._resampled
        means, drawn, without = map(numbers, (every.means, every.drawn, every.without))
        return Numbers.of(means[0], drawn, without, every.sizes)

    def examples(self, method: str, metric: str) -> Mapping[str, np.ndarray]:
        """What was kept of every example, name -> (n, ...), in the data set's order."""
        if (method, metric) not in self.kept:
            raise OptionError(f"expected one of {list(self.kept)}, got {(method, metric)}")
        return self.kept[method, metric]

    def values(self, column: str) -> list[Value]:
        """A column's number of every method."""
        found = self._numbers(column)
        metric, name = self._columns[column]
        better = self.metrics[metric].better(name)
        return values_of(column, self.methods, found, better, len(self), self.confidence)

    def value(self, method: str, column: str) -> Value:
        """One number of the table."""
        found = {value.method: value for value in self.values(column)}
        if method not in found:
            raise OptionError(f"expected one of the methods {list(found)}, got {method!r}")
        return found[method]

    def differences(self, column: str) -> list[Difference]:
        """All pairs of methods in a column, on the same examples."""
        return differences_of(
            column, self.methods, self._numbers(column), self.confidence, self.resamples, self.seed
        )  # fmt: skip

    @property
    def groups_needed(self) -> int:
        """From how many groups on a difference can be called real, and cells get their signs."""
        count = len(self.methods)
        return groups_needed(max(1, count * (count - 1) // 2), self.confidence)

    def __str__(self) -> str:
        """The table, which is Markdown as well, and what its signs mean."""
        return self.table()

    def table(self, width: int | None = None) -> str:
        """The table with its columns in groups, one below the other, that fit a terminal.

        Methods with the same numbers in all columns, as HeterogenousAttention and GenericAttention
        on one stream of tokens, are one row.

        Args:
            width (int, optional): letters in a line. Default: all columns side by side.

        Returns:
            str: Markdown, and what its signs mean.

        Examples::

            >>> print(results.table(shutil.get_terminal_size().columns))
        """
        columns = [[self._heading(column), *self._cells(column)] for column in self.columns]
        exact = [self.values(column) for column in self.columns]
        alike: dict[tuple[float, ...], list[int]] = {}
        for i in range(len(self.methods)):
            alike.setdefault(tuple(found[i].value for found in exact), []).append(i)
        names = ["method", *(" = ".join(self.methods[i] for i in row) for row in alike.values())]
        shown = [
            # Of equal ones one is called the best, and stands for them.
            [
                column[0],
                *(max((column[i + 1] for i in row), key=_is_best) for row in alike.values()),
            ]
            for column in columns
        ]
        groups, room = [[names]], (width or 10**9)
        for column in shown:
            if len(groups[-1]) > 1 and len(_markdown([*groups[-1], column])[0]) > room:
                groups.append([names])
            groups[-1].append(column)
        tables = ["\n".join(_markdown(group)) for group in groups]
        return "\n\n".join([*tables, self._legend()])

    def _legend(self) -> str:
        groups = len(set(self.groups))
        alone = groups == len(self)
        legend = LEGEND.format(
            examples=len(self), groups="" if alone else f" in {groups} groups"
        )  # fmt: skip
        confidence = 100 * self.confidence
        if groups >= self.groups_needed or len(self.methods) < 2:
            return legend + SIGNS.format(confidence=confidence)
        return legend + TOO_FEW.format(
            groups=groups, kind="examples" if alone else "groups", methods=len(self.methods),
            confidence=confidence, needed=self.groups_needed,
        )  # fmt: skip

    def _heading(self, column: str) -> str:
        metric, name = self._columns[column]
        arrows = {"higher": " ↑", "lower": " ↓", None: ""}
        return column + arrows[self.metrics[metric].better(name)]

    def _cells(self, column: str) -> list[str]:
        values = self.values(column)
        best = _best(values) if len(set(self.groups)) >= self.groups_needed else None
        real = {frozenset((d.method, d.other)): d.real for d in self.differences(column)}
        cells = []
        for value in values:
            error = "n/a" if value.standard_error is None else f"{value.standard_error:.4f}"
            sign = ""
            if best is not None:
                same = not real.get(frozenset((value.method, best)), True)
                sign = " *" if value.method == best else " ~" if same else ""
            cells.append(f"{value.value:.4f} ± {error}{sign}")
        return cells

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can take it, but what was kept of the examples."""
        return {
            "settings": self.settings,
            "versions": versions(),
            "examples": len(self),
            "groups": len(set(self.groups)),
            "groups_needed": self.groups_needed,
            "confidence": self.confidence,
            "resamples": self.resamples,
            "values": [v._asdict() for c in self.columns for v in self.values(c)],
            "differences": [d._asdict() for c in self.columns for d in self.differences(c)],
        }

    def write(self, folder: str | Path) -> list[Path]:
        """Writes results.json, results.csv, differences.csv and table.md.

        Args:
            folder (str or Path): made if it is not there.

        Returns:
            list of Path: the files.
        """
        out, found = Path(folder), self.as_dict()
        paths = [out / n for n in ("results.json", "results.csv", "differences.csv", "table.md")]
        try:
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(found, indent=2, allow_nan=False)
            paths[0].write_text(text + "\n", encoding="utf-8")
            _write_csv(paths[1], Value._fields, found["values"])
            _write_csv(paths[2], Difference._fields, found["differences"])
            paths[3].write_text(f"{self}\n", encoding="utf-8")
        except OSError as problem:
            raise InputError(
                f"cannot write to '{out}' ({problem.strerror}); give a directory of yours"
            ) from problem
        return paths


def _is_best(cell: str) -> bool:
    return cell.endswith("*")


def _markdown(columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in zip(*columns, strict=True)
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _best(values: Sequence[Value]) -> str | None:
    if not values[0].better or len(values) < 2:
        return None
    choose = max if values[0].better == "higher" else min
    return choose(values, key=lambda value: value.value).method


def _write_csv(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def gathered(
    records: Mapping[int, Mapping[str, Any]], methods: Sequence[str], metrics: Sequence[str]
) -> tuple[Kept, list[Any]]:
    """What was kept of every example, and the groups, from the batches in their order."""
    order = sorted(records)
    kept = {}
    for method in methods:
        for metric in metrics:
            parts = [records[number]["kept"][method][metric] for number in order]
            kept[method, metric] = {
                name: np.concatenate([np.asarray(part[name]) for part in parts])
                for name in parts[0]
            }
    groups = []
    for number in order:
        record = records[number]
        numbers = range(record["first"], record["first"] + record["size"])
        groups += [f"example {i}" for i in numbers] if record["groups"] is None else [
            str(g) for g in record["groups"]
        ]  # fmt: skip
    return kept, groups
