"""Texts with coloured words as a figure, and the same as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from captum_attn.visualization._page import (
    BLANK,
    BOLD,
    LEGENDS,
    MARGIN,
    SMALL,
    STEP,
    Page,
    legend_names,
)
from captum_attn.visualization._style import GREY, LEFT_OUT, tint
from captum_attn.visualization.picture import DPI
from captum_attn.visualization.words import Word

WIDEST_LABEL = 0.28  # of the figure
NOTE = "color: #595959; white-space: nowrap"
CELL = "padding: .15rem .8rem .15rem 0; text-align: start; vertical-align: top"


class Line(NamedTuple):
    """One text as it is drawn.

    Attributes:
        label (str): what stands before it: a method, a target.
        words (list of Word): its words, with their relevance.
        shares (list of float): of every word, in [-1, 1]: its colour.
        caption (str): what stands behind it.
    """

    label: str
    words: list[Word]
    shares: list[float]
    caption: str


Block = tuple[str, Sequence[Line]]  # a heading, and the texts below it


class TextPicture(Page):
    """A :class:`Picture` of texts; its HTML form is text."""

    def __init__(
        self, blocks: Sequence[Block], *, width: float, max_lines: int, signs: set[str]
    ) -> None:
        headings = "; ".join(heading for heading, _ in blocks if heading)
        texts = [word.text for _, lines in blocks for line in lines for word in line.words]
        super().__init__(width, texts, headings or "words coloured by their relevance")
        self.blocks, self.signs = blocks, signs
        self._draw(max_lines)
        self.finish()

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
                    f'<td style="{CELL}; {NOTE}">{escape(line.caption)}</td>',
                ]
                parts.append(f"<tr>{''.join(cells)}</tr>")
            parts.append("</table>")
        if self.signs:
            parts.append(_html_legend(self.signs))
        return "\n".join(["<div>", *parts, "</div>"])

    def _repr_html_(self) -> str:
        return self.html()

    def _draw(self, max_lines: int) -> None:
        every = [line for _, lines in self.blocks for line in lines]
        label = max((self.measure(line.label, size=SMALL) for line in every), default=0.0)
        label = min(label, WIDEST_LABEL * self.points)
        caption = max((self.measure(line.caption, size=SMALL) for line in every), default=0.0)
        left = MARGIN + label + (BLANK * 3 if label else 0)
        right = self.points - MARGIN - (caption + BLANK * 3 if caption else 0)
        y = MARGIN
        for heading, lines in self.blocks:
            if heading:
                shown = self.cut(heading, self.points - 2 * MARGIN, size=BOLD, weight="bold")
                self.say(MARGIN, y, shown, size=BOLD, weight="bold")
                y += STEP * 1.3
            for line in lines:
                self.say(MARGIN, y, self.cut(line.label, label, size=SMALL))
                self.say(self.points - MARGIN, y, line.caption, color=GREY, ha="right")
                place = (left, right, y)
                y = self.set_words(line.words, line.shares, *place, max_lines=max_lines)
                y += STEP * 0.35
            y += STEP * 0.6
        self.close((self.set_legend(self.signs, y) if self.signs else y) + MARGIN / 2)


def _css(share: float) -> str:
    red, green, blue = (round(255 * part) for part in tint(share))
    return f"rgb({red}, {green}, {blue})"


def _html_words(line: Line) -> str:
    parts = []
    for i, (word, share) in enumerate(zip(line.words, line.shares, strict=True)):
        ink = "#595959" if word.special else "#000"
        style = f"background: {_css(share)}; color: {ink}; border-radius: 3px; padding: 0 1px"
        style += "; outline: 1px dashed #595959" if word.left_out else ""
        parts.append(" " if word.gap and i else "")
        title = "left out" if word.left_out else f"{word.relevance:.3g}"
        parts.append(f'<span style="{style}" title="{title}">{escape(word.text)}</span>')
    return "".join(parts)


def _html_legend(signs: set[str]) -> str:
    box = "display: inline-block; width: .7em; height: .7em; border: 1px"
    parts = [
        f'<span style="{box} {"dashed" if name == LEFT_OUT else "solid"} #777; '
        f'background: {_css(LEGENDS[name])}"></span> {said}'
        for name, said in legend_names(signs).items()
    ]
    return f'<p style="color: #595959; font-size: 85%">{" &nbsp; ".join(parts)}</p>'
