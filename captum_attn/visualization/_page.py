"""Figures whose places are counted in points from the upper left: words set in lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from captum_attn.visualization._fonts import (
    direction,
    families,
    finished,
    in_sight,
    without_glyph_warnings,
)
from captum_attn.visualization._style import GREY, LEFT_OUT, signed, tint
from captum_attn.visualization.picture import Picture
from captum_attn.visualization.words import Word

SIZE, SMALL, TINY, BOLD = 11.0, 9.0, 7.5, 11.5  # of letters
STEP = 19.0  # from line to line
MARGIN, BLANK = 8.0, 4.0
LEGENDS = {"for": 1.0, "neutral": 0.0, "against": -1.0, LEFT_OUT: 0.0}
TARGET = ("for the target", "against it")  # what orange and purple say


class Placed(NamedTuple):
    """A word, what of it is shown, its width and its colour."""

    word: Word
    text: str
    width: float
    share: float


class Page(Picture):
    """A :class:`Picture` on which words are set; `close` gives it its height.

    Args:
        width (float): in inches.
        texts (iterable of str): all words that will be set, for their letters' fonts.
        alt (str): what it shows.
    """

    def __init__(self, width: float, texts: Iterable[str], alt: str) -> None:
        super().__init__(alt=alt, figsize=(width, 1))
        FigureCanvasAgg(self)
        self._families = families(texts)
        self.points = width * 72
        self.sheet: Axes = self.add_axes((0, 0, 1, 1))
        self.sheet.axis("off")
        self.sheet.set_xlim(0, self.points)

    def close(self, height: float) -> None:
        """Fits the figure to what was set, down to `height`."""
        self.sheet.set_ylim(height, 0)
        self.set_size_inches(self.points / 72, height / 72)

    def finish(self) -> None:
        """After everything was drawn."""
        finished(self)

    def measure(self, text: str, **font: Any) -> float:
        """The width of a text."""
        properties = FontProperties(family=self._families, **font)
        renderer = self.canvas.get_renderer()  # type: ignore[attr-defined]
        with without_glyph_warnings():
            size = renderer.get_text_width_height_descent(text, properties, False)
        return size[0] * 72 / self.dpi

    def cut(self, text: str, width: float, **font: Any) -> str:
        """As much of a text as there is room for."""
        if self.measure(text, **font) <= width:
            return text
        fits = 0
        for count in range(1, len(text)):
            if self.measure(text[:count] + "…", **font) > width:
                break
            fits = count
        return text[:fits] + "…"

    def say(self, x: float, y: float, text: str, **options: Any) -> None:
        """A text in the middle of the line below `y`."""
        self.sheet.text(x, y + STEP / 2, text, **{"va": "center", "size": SMALL, **options})

    def set_words(
        self,
        words: Sequence[Word],
        shares: Sequence[float],
        left: float,
        right: float,
        y: float,
        *,
        max_lines: int = 1000,
        values: bool = False,
    ) -> float:
        """Sets a text in lines from `y` down, each word on its colour; where it ends.

        With `values` its relevance stands below each word.
        """
        base = next((way for word in words if (way := direction(word.text))), 1)
        rows: list[list[Placed]] = [[]]
        room, step = right - left, STEP * (1.8 if values else 1)
        for word, share in zip(words, shares, strict=True):
            shown = self.cut(word.text, room, size=SIZE)
            width = self.measure(shown, size=SIZE)
            if values:
                width = max(width, self.measure(signed(word.relevance), size=TINY))
            placed = Placed(word, shown, width, share)
            full = _length([*rows[-1], placed], values) > room
            if rows[-1] and full and (word.gap or values or len(shown) > 1):
                rows.append([])
            rows[-1].append(placed)
        for number, row in _folded(rows, max_lines):
            if row is None:
                lines = "1 line" if number == 1 else f"{number} lines"
                self.say(left, y, f"… {lines} with less relevance …", color=GREY)
                y += STEP
            else:
                x = left if base > 0 else right - _length(row, values)
                self._set_row(row, x, y, base, values)
                y += step
        return y

    def _set_row(self, row: list[Placed], x: float, y: float, base: int, values: bool) -> None:
        # A blank stands before a word as it is read: on its left, or on its right.
        for placed in in_sight(row, [direction(placed.text) for placed in row], base):
            gap = _blank(placed, values) if placed is not row[0] else 0.0
            x += gap if base > 0 else 0
            colour = tint(placed.share)
            box = Rectangle((x, y + 1), placed.width, STEP - 2, color=colour, linewidth=0)
            self.sheet.add_patch(box)
            if placed.word.left_out:
                self.sheet.add_patch(
                    Rectangle((x, y + 1), placed.width, STEP - 2, fill=False, edgecolor=GREY,
                              linewidth=0.8, linestyle="--")
                )  # fmt: skip
            ink = GREY if placed.word.special else "black"
            middle: dict[str, Any] = {"ha": "center", "x": x + placed.width / 2}
            self.sheet.text(
                y=y + STEP / 2, s=placed.text, va="center_baseline", size=SIZE, color=ink, **middle
            )
            if values:
                value = signed(placed.word.relevance)
                self.sheet.text(y=y + STEP * 1.3, s=value, va="center", size=TINY, **middle)
            x += placed.width + (gap if base < 0 else 0)

    def set_legend(
        self, signs: set[str], y: float, names: tuple[str, str] = TARGET, note: str = ""
    ) -> float:
        """What the colours say; where it ends."""
        x = MARGIN
        for name, said in legend_names(signs, names).items():
            frame: dict[str, Any] = {"xy": (x, y + 4), "width": 9, "height": 9}
            self.sheet.add_patch(Rectangle(**frame, color=tint(LEGENDS[name]), linewidth=0))
            edge: dict[str, Any] = {"fill": False, "edgecolor": GREY, "linewidth": 0.5}
            edge |= {"linewidth": 0.8, "linestyle": "--"} if name == LEFT_OUT else {}
            self.sheet.add_patch(Rectangle(**frame, **edge))
            self.say(x + 13, y - 1, said, color=GREY)
            x += 13 + self.measure(said, size=SMALL) + 14
        self.say(x, y - 1, note, color=GREY)
        return y + STEP


def legend_names(signs: set[str], names: tuple[str, str] = TARGET) -> dict[str, str]:
    """The colours that occur where these of Captum's signs are shown, and what they say."""
    shown = {
        "for": (signs & {"all", "positive", "absolute_value"}, names[0]),
        "neutral": (signs - {LEFT_OUT}, "neutral"),
        "against": (signs & {"all", "negative"}, names[1]),
        LEFT_OUT: (signs & {LEFT_OUT}, LEFT_OUT),
    }
    return {name: said for name, (occurs, said) in shown.items() if occurs}


def _length(row: Sequence[Placed], values: bool) -> float:
    return sum(p.width for p in row) + sum(_blank(p, values) for p in row[1:])


def _blank(placed: Placed, values: bool) -> float:
    """Before a word; values, which belong to their words, need more room."""
    return 2 * BLANK if values else BLANK * placed.word.gap


def _folded(rows: list[list[Placed]], max_lines: int) -> list[tuple[int, list[Placed] | None]]:
    """The lines with the strongest words, in their order, and how many are left out between."""
    strength = [max((abs(p.share) for p in row), default=0.0) for row in rows]
    kept = sorted(range(len(rows)), key=lambda i: -strength[i])[:max_lines]
    found: list[tuple[int, list[Placed] | None]] = []
    for i, row in enumerate(rows):
        if i in kept:
            found.append((1, row))
        elif found and found[-1][1] is None:
            found[-1] = (found[-1][0] + 1, None)
        else:
            found.append((1, None))
    return found
