"""The demo's pictures: maps laid over an image, words coloured by their relevance.

One scale throughout, safe for the colour-blind: orange speaks for the target, purple against it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from captum_attn.demo.explanation import Case, Explanation, Question
from captum_attn.demo.topics import Word

FOR, AGAINST = (np.array(to_rgb(colour)) for colour in ("#e08214", "#8073ac"))
LEGEND = "orange: for the target, purple: against it"
LINE = 84  # characters in a line of words
DPI = 150


def tint(value: float) -> tuple[float, float, float]:
    """The colour behind a word, light enough for black letters.

    Args:
        value (float): relevance divided by the largest magnitude, in [-1, 1].

    Returns:
        tuple: red, green and blue in [0, 1].

    Examples::

        >>> [round(part, 2) for part in tint(0.0)]
        [1.0, 1.0, 1.0]
    """
    red, green, blue = 1 - abs(value) * (1 - (FOR if value > 0 else AGAINST))
    return float(red), float(green), float(blue)


def scaled(words: Sequence[Word]) -> list[float]:
    """Relevance of words divided by the largest magnitude among them.

    Args:
        words (sequence of Word): the words of one explanation.

    Returns:
        list of float: in [-1, 1]; all 0 where no word has any.

    Examples::

        >>> scaled([Word("a", 0, 1, -1.0), Word("b", 2, 3, 4.0)])
        [-0.25, 1.0]
    """
    largest = max((abs(word.relevance) for word in words), default=0.0)
    return [word.relevance / (largest or 1.0) for word in words]


def save_image_case(case: Case, path: Path) -> None:
    """One row per question: the input, then the map of every method laid over it.

    Args:
        case (Case): a case with an image.
        path (Path): the PNG file to write.

    Returns:
        None

    Examples::

        >>> save_image_case(next(explain_scenes(load_digit_vit())), Path("scene.png"))
    """
    assert case.image is not None
    rows, columns = len(case.questions), 1 + len(case.questions[0].explanations)
    figure = Figure(figsize=(2.2 * columns, 2.55 * rows + 0.45), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, question in zip(grid, case.questions, strict=True):
        _show(axes[0], case.image)
        axes[0].set_title(question.asked, fontsize=13, fontweight="bold", loc="left")
        axes[0].set_xlabel(f"p = {question.probability:.3f}")
        if question.box:
            _frame(axes[0], question.box)
        for ax, explanation in zip(axes[1:], question.explanations, strict=True):
            _show(ax, case.image)
            _overlay(ax, explanation)
    figure.supxlabel(LEGEND, fontsize=9, color="0.35")
    figure.savefig(path, dpi=DPI)


def _show(ax: Axes, image: Tensor) -> None:
    ax.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _frame(ax: Axes, box: tuple[float, ...]) -> None:
    left, top, right, bottom = (side - 0.5 for side in box)  # imshow centres pixels on integers
    ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=FOR, lw=2))


def _overlay(ax: Axes, explanation: Explanation) -> None:
    relevance = explanation.relevance.numpy()
    # The 99.5th percentile, so that a single pixel does not set the scale of a fine map.
    limit = float(np.quantile(np.abs(relevance), 0.995)) or 1.0
    strength = np.clip(np.abs(relevance) / limit, 0, 1)[..., None]
    colour = np.where(relevance[..., None] > 0, FOR, AGAINST)
    ax.imshow(np.concatenate([colour, 0.85 * strength], -1))
    ax.set_title(explanation.method, fontsize=10)
    ax.set_xlabel(f"deletion {explanation.deletion:.2f}", fontsize=9)


def save_text_case(case: Case, path: Path) -> None:
    """For every question the text once per method, its words coloured.

    Args:
        case (Case): a case with a text.
        path (Path): the PNG file to write.

    Returns:
        None

    Examples::

        >>> save_text_case(next(explain_texts(load_topic_classifier())), Path("text.png"))
    """
    starts = _layout(case.text, case.questions[0].explanations[0].words)
    lines = 1 + max(line for line, _ in starts)
    blocks = [len(question.explanations) * (lines + 0.35) + 1.6 for question in case.questions]
    height = sum(blocks)
    figure = Figure(figsize=(11.0, 0.26 * (height + 1)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(-21, LINE + 3)
    ax.set_ylim(height + 1, 0)
    ax.axis("off")
    top = 0.0
    for question, block in zip(case.questions, blocks, strict=True):
        _write_question(ax, question, starts, lines, top)
        top += block
    ax.text(0, top + 0.3, LEGEND, fontsize=9, color="0.35", va="center")
    figure.savefig(path, dpi=DPI)


def _layout(text: str, words: Sequence[Word]) -> list[tuple[int, int]]:
    """(line, column) of every word when the text is wrapped; words are placed one by one."""
    places, line, column, end = [], 0, 0, 0
    for word in words:
        gap = min(1, word.start - end)  # any gap in the text is one blank
        width = min(len(word.text), LINE)
        # A full stop stays with its word, also past the margin.
        if column + gap + width > LINE and (gap or width > 1):
            line, column, gap = line + 1, 0, 0
        column += gap
        places.append((line, column))
        column, end = column + width, word.end
    return places


def _write_question(
    ax: Axes, question: Question, starts: Sequence[tuple[int, int]], lines: int, top: float
) -> None:
    mono: dict[str, Any] = {"family": "monospace", "fontsize": 11.5, "va": "center"}
    title = f"{question.asked}  (p = {question.probability:.2f})"
    ax.text(-20.5, top + 0.9, title, fontsize=11, fontweight="bold", va="center")
    top += 1.5
    for explanation in question.explanations:
        ax.text(-20.5, top + 0.5, explanation.method, fontsize=9.5, va="center")
        words = explanation.words
        for word, value, (line, column) in zip(words, scaled(words), starts, strict=True):
            shown = textwrap.shorten(word.text, LINE, placeholder="…")
            y = top + line
            ax.fill_between([column, column + len(shown)], y + 0.06, y + 0.94, color=tint(value))
            # One letter per column: the monospace advance need not be a column's width.
            for k, letter in enumerate(shown):
                ax.text(column + k + 0.5, y + 0.5, letter, ha="center", **mono)
        top += lines + 0.35
