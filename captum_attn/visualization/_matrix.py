"""A matrix with a label for each row and column, as large as the labels need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap

from captum_attn.visualization._style import DIVERGING, GREY, SEQUENTIAL, shares_of
from captum_attn.visualization.words import words_of

CELL, WIDEST, TALLEST = 0.23, 13.0, 10.0  # inches: of a cell, of a matrix
LARGEST, SMALLEST = 8.5, 5.5  # points, of labels
LONGEST = 16  # letters of a label
LETTER = 0.62  # width of a letter, of its size
UNKNOWN = "0.9"  # the colour of cells that say nothing


class Cells(NamedTuple):
    """How large a matrix is drawn.

    Attributes:
        wide, high (float): of a cell, in inches.
        columns, rows (int): every so many are labelled.
    """

    wide: float
    high: float
    columns: int
    rows: int

    @property
    def letters(self) -> tuple[float, float]:
        """Sizes of the columns' and rows' labels, in points."""
        wide, high = self.wide * self.columns, self.high * self.rows
        return tuple(min(LARGEST, max(SMALLEST, 62 * side)) for side in (wide, high))  # type: ignore[return-value]

    def size(self, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
        """Width and height of the whole in inches, labels and all."""
        on_columns, on_rows = self.letters
        beside = max(map(len, rows), default=0) * LETTER * on_rows / 72
        above = max(map(len, columns), default=0) * LETTER * on_columns / 72
        count = values.shape
        return np.array([count[1] * self.wide + beside + 0.3, count[0] * self.high + above + 0.3])


def cells_of(shape: tuple[int, ...]) -> Cells:
    """The largest cells with which a matrix of that shape fits; some labels are left out."""
    rows, columns = shape
    wide, high = min(CELL, WIDEST / columns), min(CELL, TALLEST / rows)
    least = SMALLEST / 62
    return Cells(wide, high, max(1, int(np.ceil(least / wide))), max(1, int(np.ceil(least / high))))


def labels_of(tokens: Sequence[str]) -> list[str]:
    """Tokens without the marks of their tokenizer; bytes within a letter are a dot."""
    labels = [str(token) for token in tokens]  # padding is no word
    for word in words_of(labels.copy(), [0.0] * len(labels), merge=False):
        first, *others = word.positions
        labels[first] = word.text
        for position in others:
            labels[position] = "·"
    return [label if len(label) <= LONGEST else label[: LONGEST - 1] + "…" for label in labels]


def draw_matrix(
    ax: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    sign: str,
    limit: float,
    cmap: str | Colormap | None = None,
    mask: np.ndarray | None = None,
    cells: Cells | None = None,
) -> ScalarMappable:
    """Values `(r, c)` of a scale that ends at `limit`; where `mask` is, nothing is known."""
    shares = np.abs(shares_of(values, sign, limit)) if sign != "all" else values / (limit or 1.0)
    colours = colormaps[cmap] if isinstance(cmap, str) else cmap
    colours = colours or colormaps[DIVERGING if sign == "all" else SEQUENTIAL]
    colours = colours.with_extremes(bad=UNKNOWN)
    shown = np.ma.masked_array(shares.clip(-1, 1), False if mask is None else mask)
    drawn = ax.imshow(shown, cmap=colours, vmin=-1 if sign == "all" else 0, vmax=1, aspect="auto")
    cells = cells or cells_of(values.shape)
    on_columns, on_rows = cells.letters
    ax.xaxis.tick_top()
    across, down = range(0, len(columns), cells.columns), range(0, len(rows), cells.rows)
    ax.set_xticks(list(across), [columns[i] for i in across], rotation=90, fontsize=on_columns)
    ax.set_yticks(list(down), [rows[i] for i in down], fontsize=on_rows)
    ax.tick_params(length=0, pad=2)
    ax.spines[:].set_visible(False)
    return drawn


def divide(ax: Axes, groups: Sequence[tuple[str, int]]) -> None:
    """Lines between groups of columns, their names below."""
    start = 0
    for name, count in groups:
        if start:
            ax.axvline(start - 0.5, color="white", linewidth=2.5)
        if count:
            middle = start + (count - 1) / 2
            below: dict[str, Any] = {"xytext": (0, -4), "textcoords": "offset points"}
            below |= {"ha": "center", "va": "top", "fontsize": 8, "color": GREY}
            ax.annotate(name, (middle, 0), xycoords=ax.get_xaxis_transform(), **below)
        start += count
