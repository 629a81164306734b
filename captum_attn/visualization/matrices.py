"""Tokens by tokens: which of those before, or of the source, a token goes back to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap
from torch import Tensor

from captum_attn._checks import FAILURES, listed, names_of, shown, texts, whole
from captum_attn.errors import InputError
from captum_attn.visualization._arrays import array, check_counts
from captum_attn.visualization._fonts import finished
from captum_attn.visualization._hover import Numbers
from captum_attn.visualization._matrix import cells_of, divide, draw_matrix, labels_of
from captum_attn.visualization._options import checked_options
from captum_attn.visualization._panels import colour_bar
from captum_attn.visualization._style import (
    of_sign,
    resolved_sign,
    scale_limit,
)
from captum_attn.visualization.picture import Picture

__all__ = ["visualize_generation", "visualize_matrix"]


class Table(NamedTuple):
    """The matrix of one example.

    Attributes:
        values (ndarray): (r, c).
        rows, columns (list of str): labels.
        mask (ndarray or None): (r, c), bool: which cells say nothing.
        groups (list of (str, int)): names and numbers of columns that belong together.
    """

    values: np.ndarray
    rows: list[str]
    columns: list[str]
    mask: np.ndarray | None = None
    groups: Sequence[tuple[str, int]] = ()


@checked_options(columns=None)
def visualize_matrix(
    matrix: Any,
    rows: Sequence[Any],
    columns: Sequence[Any] | None = None,
    *,
    mask: Any = None,
    sign: str = "auto",
    outlier_perc: float = 2,
    cmap: str | Colormap | None = None,
    titles: Sequence[str] | None = None,
) -> Picture:
    """Draws the relevance of tokens for tokens, a row for each that asks.

    Args:
        matrix (Tensor or array): (r, c) or (B, r, c), as `relevance_maps` gives them.
        rows (sequence of str, or one such for each example): labels of the rows; marks of
            tokenizers are taken away. Where there are very many, every second or third is shown.
        columns (the same, optional): of the columns. Default: the rows'.
        mask (Tensor or array, optional): bool, of the matrix's shape: True where it says nothing.
        sign, outlier_perc, cmap: as for `visualize_image`; one colour scale for each example.
        titles (sequence of str, optional): one for each example.

    Returns:
        Picture: a figure with a matrix for each example, one below the other.

    Raises:
        InputError: if the matrix and the labels do not fit, or are not finite.
        OptionError: for an unknown option.

    Examples::

        >>> maps = GenericAttention(bert).relevance_maps(inputs, target=1)
        >>> visualize_matrix(maps["input_ids", "input_ids"], [inputs.tokens(0)])
    """
    values = array(matrix, "matrix")
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise InputError(f"matrix: expected (r, c) or (B, r, c), got {values.shape}")
    values = values[None] if values.ndim == 2 else values
    hidden = None if mask is None else _mask(mask, values)
    on_rows = _labels(rows, len(values), values.shape[1], "rows")
    on_columns = _labels(rows if columns is None else columns, len(values), values.shape[2],
                         "columns")  # fmt: skip
    tables = [
        Table(one, on_rows[i], on_columns[i], None if hidden is None else hidden[i])
        for i, one in enumerate(values)
    ]
    return _draw(tables, sign, outlier_perc, cmap, titles)


@checked_options()
def visualize_generation(
    written: Any,
    tokenizer: Any,
    *,
    sources: Mapping[str, Any] | None = None,
    sign: str = "auto",
    outlier_perc: float = 2,
    cmap: str | Colormap | None = None,
    titles: Sequence[str] | None = None,
) -> Picture:
    """Draws generated tokens, each a row, by all that they were predicted from.

    Cells of tokens that came later are grey.

    Args:
        written (Generation): as `captum_attn.generation.explain_generation` returns it, or anything
            with its `relevance`, `stream`, `tokens`, `valid`, `columns` and `real`.
        tokenizer (tokenizer or callable): with `convert_ids_to_tokens`, or list of int -> list of
            str.
        sources (Mapping, optional): stream name -> ids (B, n), or lists of labels, of what an
            encoder read. A source without labels is one column, the sum: an image.
        sign, outlier_perc, cmap, titles: as for `visualize_matrix`.

    Returns:
        Picture: a figure with a matrix for each example, one below the other.

    Raises:
        InputError: if labels do not fit, or relevance is not finite.
        OptionError: for an unknown option.

    Examples::

        >>> written = explain_generation(GenericAttention(bart), inputs, max_new_tokens=20)
        >>> visualize_generation(written, tokenizer, sources={"input_ids": inputs["input_ids"]})
    """
    convert: Callable[[list[int]], list[str]]
    convert = getattr(tokenizer, "convert_ids_to_tokens", tokenizer)
    if not callable(convert):
        raise InputError(
            "tokenizer: expected a tokenizer or a callable list of int -> list of str, got "
            f"{type(tokenizer).__name__}"
        )
    relevance = _relevance(written)
    if sources is not None and not isinstance(sources, Mapping):
        raise InputError(f"sources: expected a Mapping of stream name to ids, got {shown(sources)}")
    names_of("sources", sources or (), list(relevance), InputError)
    batch, steps = written.tokens.shape
    prompt = written.columns.shape[1] - steps + 1
    tables = []
    for i in range(batch):
        valid = written.valid[i].cpu().numpy().astype(bool)
        if not valid.any():
            raise InputError(f"written: example {i} has no generated token")
        blocks: list[np.ndarray] = []
        labels: list[str] = []
        groups: list[tuple[str, int]] = []
        for name, rows in relevance.items():
            if name == written.stream:
                continue
            on_columns = _source(name, (sources or {}).get(name), i, rows.shape[2], convert)
            blocks.append(rows[i] if on_columns else rows[i].sum(1, keepdims=True))
            labels += on_columns or [f"{name} (sum)"]
            groups.append((name, len(on_columns) or 1))
        own = relevance[written.stream][i]
        count = written.columns.shape[1]
        if own.shape[1] > count:  # an image takes places in front of the text
            blocks.append(own[:, :-count].sum(1, keepdims=True))
            labels.append("image (sum)")
            groups.append(("", 1))
        real = written.real[i].cpu().numpy().astype(bool)
        blocks.append(own[:, -count:][:, real])
        labels += _converted(convert, written.columns[i][written.real[i].bool()].tolist())
        groups += [("prompt", int(real[:prompt].sum())), ("generated", int(real[prompt:].sum()))]
        later = np.zeros((steps, count), dtype=bool)
        later |= np.arange(count)[None] > prompt - 1 + np.arange(steps)[:, None]
        front = sum(block.shape[1] for block in blocks[:-1])
        mask = np.concatenate([np.zeros((steps, front), dtype=bool), later[:, real]], 1)
        names = _converted(convert, written.tokens[i].tolist())
        on_rows = [name for name, is_valid in zip(names, valid, strict=True) if is_valid]
        values = np.concatenate(blocks, 1)[valid]
        tables.append(Table(values, on_rows, labels, mask[valid], groups))
    return _draw(tables, sign, outlier_perc, cmap, titles, ("generated token", "looked at"))


def _source(
    name: str, given: Any, i: int, count: int, convert: Callable[[list[int]], list[str]]
) -> list[str]:
    """Labels of a source's columns; none if nothing is known of it."""
    if given is None:
        return []
    where = f"sources[{name!r}]"
    each = listed(where, given, "ids or labels for each example")
    one = listed(where, each[i] if i < len(each) else None, "ids or labels for each example")
    if len(one) != count:
        raise InputError(f"{where}: expected {count} labels or ids, got {len(one)}")
    if all(isinstance(label, str) for label in one):
        return labels_of(texts(where, one))
    return _converted(convert, [whole(where, token, 0, error=InputError) for token in one])


def _converted(convert: Callable[[list[int]], list[str]], ids: list[int]) -> list[str]:
    """What the tokenizer calls these ids."""
    try:
        found = convert(ids)
    except FAILURES as problem:
        raise InputError(
            f"tokenizer: expected a list of int -> list of str, but it raised "
            f"{type(problem).__name__} ({problem}) for {shown(ids)}"
        ) from problem
    return labels_of(texts("tokenizer", found, len(ids), "id"))


PARTS = ("tokens", "valid", "columns", "real")


def _relevance(written: Any) -> dict[str, np.ndarray]:
    """The relevance (B, T, n) of each stream; what is no `Generation` is refused."""
    relevance = getattr(written, "relevance", None)
    parts: list[Any] = [getattr(written, name, None) for name in PARTS]
    tensors = all(isinstance(part, Tensor) and part.ndim == 2 for part in parts)
    if not isinstance(relevance, Mapping) or not tensors:
        raise InputError(
            "written: expected `relevance`, `stream` and tensors `tokens`, `valid`, `columns` and "
            f"`real`, as explain_generation returns them; got {shown(written)}"
        )
    if getattr(written, "stream", None) not in relevance:
        raise InputError(f"written.stream: expected one of {list(relevance)}")
    tokens, valid, columns, real = (tuple(part.shape) for part in parts)
    if tokens != valid or columns != real or columns[1] < tokens[1] or columns[0] != tokens[0]:
        raise InputError(
            "written: expected `tokens` and `valid` (B, T), `columns` and `real` (B, p + T - 1); "
            f"got {tokens}, {valid}, {columns}, {real}"
        )
    found = {name: array(rows, f"relevance[{name!r}]") for name, rows in relevance.items()}
    for name, rows in found.items():
        least = columns[1] if name == written.stream else 1
        if rows.ndim != 3 or rows.shape[:2] != tokens or rows.shape[2] < least:
            raise InputError(
                f"relevance[{name!r}]: expected {tokens} and at least {least} columns, got "
                f"{rows.shape}"
            )
    return found


def _labels(given: Sequence[Any], batch: int, count: int, name: str) -> list[list[str]]:
    """The labels of each example."""
    items = listed(name, given, "labels, or of such a list for each example")
    one = bool(items) and isinstance(items[0], (str, Real))
    each = [items] * batch if one else items
    check_counts(batch, {name: each})
    return [labels_of(texts(name, labels, count, "token")) for labels in each]


def _mask(mask: Any, values: np.ndarray) -> np.ndarray:
    """Where the matrices (B, r, c) say nothing."""
    hidden = array(mask, "mask")
    if hidden.shape not in (values.shape, values.shape[1:]) or hidden.size != values.size:
        raise InputError(f"mask: expected the matrix's shape {values.shape}, got {hidden.shape}")
    return hidden.reshape(values.shape) > 0.5


def _draw(
    tables: list[Table],
    sign: str,
    outlier_perc: float,
    cmap: str | Colormap | None,
    titles: Sequence[str] | None,
    axes: tuple[str, str] = ("token", "looked at"),
) -> Picture:
    check_counts(len(tables), {"titles": titles})
    sign = resolved_sign(sign, [table.values for table in tables])
    cells = [cells_of(table.values.shape) for table in tables]
    sizes = np.array(
        [c.size(t.values, t.rows, t.columns) for c, t in zip(cells, tables, strict=True)]
    )
    sizes[:, 1] += 0.65 + 0.35 * (titles is not None)
    figure = Picture(
        alt="; ".join(titles) if titles else "relevance of tokens for tokens",
        figsize=(max(3.0, sizes[:, 0].max()), sizes[:, 1].sum()),
        layout="constrained",
    )
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=sizes[:, 1].tolist())[
        :, 0
    ]
    for i, (ax, table) in enumerate(zip(panels, tables, strict=True)):
        known = table.values if table.mask is None else table.values[~table.mask]
        limit = scale_limit(of_sign(known, sign), outlier_perc)
        if limit == 0:
            warnings.warn(f"matrix of example {i} is zero: drawn as empty", stacklevel=3)
        drawn: ScalarMappable = draw_matrix(
            ax, table.values, table.rows, table.columns, sign, limit, cmap, table.mask, cells[i]
        )
        figure.numbers.append(Numbers(ax, table.values, table.rows, table.columns, table.mask))
        divide(ax, table.groups)
        ax.set_ylabel(axes[0], fontsize=9)
        ax.set_xlabel(axes[1], fontsize=9)
        if titles is not None:
            ax.set_title(titles[i], fontsize=11, fontweight="bold", loc="left")
        wide = table.values.shape[1] * cells[i].wide
        share = min(0.9, 2.5 / max(wide, 2.5))
        colour_bar(figure, ax, drawn, limit, sign, shrink=share, aspect=25 * share + 5, pad=0.05)
    finished(figure)
    return figure
