"""Coloured words set in lines, and the same as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from captum_attn.visualization._fonts import direction, families, finished, in_sight
from captum_attn.visualization._style import GREY, tint
from captum_attn.visualization.picture import DPI, Picture

if TYPE_CHECKING:
    from captum_attn.visualization.text import Line
    from captum_attn.visualization.words import Word

Block = tuple[str, Sequence["Line"]]  # a heading, and the texts below it

SIZE, SMALL, BOLD = 11.0, 9.0, 11.5  # points
STEP = 19.0  # from line to line
MARGIN, BLANK = 8.0, 4.0
WIDEST_LABEL = 0.28  # of the figure
LEGENDS = {"for": 1.0, "neutral": 0.0, "against": -1.0}


class Placed(NamedTuple):
    """A word, what of it is shown, its width in points and its colour."""

    word: Word
    text: str
    width: float
    share: float


class TextPicture(Picture):
    """A :class:`Picture` of texts; its HTML form is text."""

    def __init__(
        self, blocks: Sequence[Block], *, width: float, max_lines: int, signs: set[str]
    ) -> None:
        headings = "; ".join(heading for heading, _ in blocks if heading)
        super().__init__(alt=headings or "words coloured by their relevance", figsize=(width, 1))
        self.blocks, self.signs = blocks, signs
        FigureCanvasAgg(self)
        texts = [w.text for _, lines in blocks for line in lines for w in line.words]
        self._families = families(texts)
        self._draw(width * 72, max_lines)
        finished(self)

    def html(self, dpi: float = DPI) -> str:
        """The texts as HTML, with the relevance of every word as its tooltip."""
        parts = []
        for heading, lines in self.blocks:
            if heading:
                parts.append(f'<p dir="auto"><b>{escape(heading)}</b></p>')
            parts.append('<table style="border-collapse: collapse">')
            for line in lines:
                cells = [
                    f'<td style="{CELL}; white-space: nowrap">{escape(line.label)}</td>',
                    f'<td dir="auto" style="{CELL}; line-height: 1.7">{_html_words(line)}</td>',
                    f'<td style="{CELL}; color: #595959">{escape(line.caption)}</td>',
                ]
                parts.append(f"<tr>{''.join(cells)}</tr>")
            parts.append("</table>")
        if self.signs:
            parts.append(_html_legend(self.signs))
        return "\n".join(["<div>", *parts, "</div>"])

    def _repr_html_(self) -> str:
        return self.html()

    def _width(self, text: str, **font: Any) -> float:
        """In points."""
        properties = FontProperties(family=self._families, **font)
        renderer = self.canvas.get_renderer()  # type: ignore[attr-defined]
        return renderer.get_text_width_height_descent(text, properties, False)[0] * 72 / self.dpi

    def _draw(self, width: float, max_lines: int) -> None:
        labels = [line.label for _, lines in self.blocks for line in lines]
        label = max((self._width(text, size=SMALL) for text in labels), default=0.0)
        label = min(label, WIDEST_LABEL * width)
        captions = [line.caption for _, lines in self.blocks for line in lines]
        caption = max((self._width(text, size=SMALL) for text in captions), default=0.0)
        left = MARGIN + label + (BLANK * 3 if label else 0)
        right = width - MARGIN - (caption + BLANK * 3 if caption else 0)
        ax = self.add_axes((0, 0, 1, 1))
        ax.axis("off")
        y = MARGIN
        for heading, lines in self.blocks:
            if heading:
                ax.text(MARGIN, y + STEP / 2, heading, size=BOLD, weight="bold", va="center")
                y += STEP * 1.3
            for line in lines:
                cut = self._cut(line.label, label, size=SMALL)
                ax.text(MARGIN, y + STEP / 2, cut, size=SMALL, va="center")
                small: dict[str, Any] = {
                    "size": SMALL,
                    "color": GREY,
                    "va": "center",
                    "ha": "right",
                }
                ax.text(width - MARGIN, y + STEP / 2, line.caption, **small)
                y = self._set(ax, line, left, right, y, max_lines) + STEP * 0.35
            y += STEP * 0.6
        if self.signs:
            y = self._legend(ax, y)
        ax.set_xlim(0, width)
        ax.set_ylim(y + MARGIN / 2, 0)
        self.set_size_inches(width / 72, (y + MARGIN / 2) / 72)

    def _cut(self, text: str, width: float, **font: Any) -> str:
        """As much of a text as there is room for."""
        if self._width(text, **font) <= width:
            return text
        fits = 0
        for count in range(1, len(text)):
            if self._width(text[:count] + "…", **font) > width:
                break
            fits = count
        return text[:fits] + "…"

    def _set(
        self, ax: Axes, line: Line, left: float, right: float, y: float, max_lines: int
    ) -> float:
        """Sets a text in lines from `y` down; where it ends."""
        base = next((way for word in line.words if (way := direction(word.text))), 1)
        rows: list[list[Placed]] = [[]]
        room = right - left
        for word, share in zip(line.words, line.shares, strict=True):
            shown = self._cut(word.text, room, size=SIZE)
            placed = Placed(word, shown, self._width(shown, size=SIZE), share)
            if rows[-1] and _length([*rows[-1], placed]) > room and (word.gap or len(shown) > 1):
                rows.append([])
            rows[-1].append(placed)
        for number, row in _folded(rows, max_lines):
            if row is None:
                lines = "1 line" if number == 1 else f"{number} lines"
                say = f"… {lines} with less relevance …"
                ax.text(left, y + STEP / 2, say, size=SMALL, color=GREY, va="center")
            else:
                self._set_row(ax, row, left, right, y, base)
            y += STEP
        return y

    def _set_row(
        self, ax: Axes, row: list[Placed], left: float, right: float, y: float, base: int
    ) -> None:
        ways = [direction(placed.text) for placed in row]
        x = left if base > 0 else right - _length(row)
        # A blank stands before a word as it is read: on its left, or on its right.
        for placed in in_sight(row, ways, base):
            first = placed is row[0]
            gap = BLANK * (placed.word.gap and not first)
            x += gap if base > 0 else 0
            colour = tint(placed.share)
            box = Rectangle((x, y + 1), placed.width, STEP - 2, color=colour, linewidth=0)
            ax.add_patch(box)
            ink = GREY if placed.word.special else "black"
            middle: dict[str, Any] = {
                "ha": "center",
                "va": "center_baseline",
                "size": SIZE,
                "color": ink,
            }
            ax.text(x + placed.width / 2, y + STEP / 2, placed.text, **middle)
            x += placed.width + (gap if base < 0 else 0)

    def _legend(self, ax: Axes, y: float) -> float:
        x = MARGIN
        for name in _legend_names(self.signs):
            box: dict[str, Any] = {"color": tint(LEGENDS[name]), "linewidth": 0}
            ax.add_patch(Rectangle((x, y + 4), 9, 9, **box))
            ax.add_patch(Rectangle((x, y + 4), 9, 9, fill=False, edgecolor=GREY, linewidth=0.5))
            shown = {"for": "for the target", "against": "against it"}.get(name, name)
            ax.text(x + 13, y + 9, shown, size=SMALL, color=GREY, va="center")
            x += 13 + self._width(shown, size=SMALL) + 14
        return y + STEP


CELL = "padding: .15rem .8rem .15rem 0; text-align: start; vertical-align: top"


def _length(row: Sequence[Placed]) -> float:
    return sum(p.width for p in row) + BLANK * sum(p.word.gap for p in row[1:])


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


def _legend_names(signs: set[str]) -> list[str]:
    absolute = signs & {"absolute_value"}
    return [
        name
        for name in LEGENDS
        if name == "neutral"
        or (name == "for" and signs & {"all", "positive", "absolute_value"})
        or (name == "against" and signs & {"all", "negative"} and not absolute)
    ]


def _css(share: float) -> str:
    red, green, blue = (round(255 * part) for part in tint(share))
    return f"rgb({red}, {green}, {blue})"


def _html_words(line: Line) -> str:
    parts = []
    for i, (word, share) in enumerate(zip(line.words, line.shares, strict=True)):
        ink = "#595959" if word.special else "#000"
        style = f"background: {_css(share)}; color: {ink}; border-radius: 3px; padding: 0 1px"
        parts.append(" " if word.gap and i else "")
        title = f"{word.relevance:.3g}"
        parts.append(f'<span style="{style}" title="{title}">{escape(word.text)}</span>')
    return "".join(parts)


def _html_legend(signs: set[str]) -> str:
    box = "display: inline-block; width: .7em; height: .7em; border: 1px solid #777"
    shown = {"for": "for the target", "against": "against it"}
    parts = [
        f'<span style="{box}; background: {_css(LEGENDS[name])}"></span> {shown.get(name, name)}'
        for name in _legend_names(signs)
    ]
    return f'<p style="color: #595959; font-size: 85%">{" &nbsp; ".join(parts)}</p>'
