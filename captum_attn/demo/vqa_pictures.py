"""Pictures of an answer's explanation: the regions on the image, the question's words beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from captum_attn.demo.explanation import Explanation
from captum_attn.demo.pictures import AGAINST, DPI, FOR, _show, tint
from captum_attn.demo.vqa import DIFFERENCE, VQACase

SIGNED = LinearSegmentedColormap.from_list("signed", [tint(-1.0), tint(0.0), tint(1.0)])
GREY = np.full(3, 0.55)
ROW = 1.7  # inches
LABELLED = 0.05  # least share of the largest magnitude at which a region's value is written
VALUE = 5  # letters that a value takes, "+0.12"
LINE = 58  # letters that fit beside an image


def save_vqa_case(case: VQACase, path: Path) -> None:
    """One row per explanation: the regions with their relevance, and the words with theirs.

    Args:
        case (VQACase): a question about a scene.
        path (Path): the PNG file to write.

    Returns:
        None

    Examples::

        >>> save_vqa_case(next(explain_questions(load_digit_vqa())), Path("question.png"))
    """
    explanations = case.case.questions[0].explanations
    _save([(case, explanation) for explanation in explanations], path, ("against", "for"))


def save_inspections(cases: Sequence[VQACase], path: Path, inspection: str = DIFFERENCE) -> None:
    """One row per question: what speaks for yes rather than no.

    Args:
        cases (sequence of VQACase): questions with that inspection among their explanations.
        path (Path): the PNG file to write.
        inspection (str, optional): which one. Default: the difference of the logits.

    Returns:
        None

    Examples::

        >>> save_inspections(list(explain_examples(load_digit_vqa())), Path("examples.png"))
    """
    _save(
        [
            (case, explanation)
            for case in cases
            for explanation in case.case.questions[0].explanations
            if explanation.method == inspection
        ],
        path,
        ("for no", "for yes"),
    )


def _save(rows: Sequence[tuple[VQACase, Explanation]], path: Path, ends: tuple[str, str]) -> None:
    figure = Figure(figsize=(7.0, ROW * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(1, 3))
    for (on_image, on_words), (case, explanation) in zip(grid, rows, strict=True):
        # Regions and words share one unit, and so one scale.
        values = [*explanation.relevance.tolist(), *(word.relevance for word in explanation.words)]
        largest = max(map(abs, values)) or 1.0
        _draw_regions(on_image, case, explanation, largest)
        _draw_words(on_words, case, explanation, largest)
    scale = ScalarMappable(Normalize(-1, 1), SIGNED)
    bar = figure.colorbar(scale, ax=grid, location="bottom", shrink=0.4, aspect=40, pad=0.02)
    bar.set_ticks([-1, 0, 1], labels=[f"most {ends[0]}", "0", f"most {ends[1]}"])
    bar.ax.set_title("relevance, each row on a scale of its own", fontsize=8.5, color="0.35")
    figure.savefig(path, dpi=DPI)


def _signed(value: float) -> str:
    shown = f"{value:+.2f}".replace("-", "−")
    return shown if shown[1:] != "0.00" else "0"


def _draw_regions(ax: Axes, case: VQACase, explanation: Explanation, largest: float) -> None:
    image = case.case.image
    assert image is not None
    _show(ax, image)
    found = zip(explanation.relevance.tolist(), case.boxes.tolist(), strict=True)
    # The strongest last, on top of the others.
    for value, box in sorted(found, key=lambda pair: abs(pair[0])):
        x1, y1, x2, y2 = (edge - 0.5 for edge in box)  # a pixel's centre is a whole number here
        strength, colour = abs(value) / largest, FOR if value > 0 else AGAINST
        edge = (1 - strength) * GREY + strength * colour
        frame = {"xy": (x1, y1), "width": x2 - x1, "height": y2 - y1}
        ax.add_patch(Rectangle(**frame, color=colour, alpha=0.45 * strength, linewidth=0))
        ax.add_patch(Rectangle(**frame, fill=False, edgecolor=edge, linewidth=0.6 + strength))
        if strength >= LABELLED:
            label = {"facecolor": tint(value / largest), "edgecolor": "none", "pad": 0.8}
            ax.text(x1 + 0.9, y1 + 1.1, _signed(value), fontsize=6.5, va="top", bbox=label)


def _draw_words(ax: Axes, case: VQACase, explanation: Explanation, largest: float) -> None:
    question = case.case.questions[0]
    right = f", right answer: {case.right}" if case.right else ""
    widths = [max(len(word.text), VALUE) + 1 for word in explanation.words]
    ax.set_xlim(0, max(sum(widths), LINE))
    ax.set_ylim(4.2, -0.8)
    ax.axis("off")
    ax.text(0, 0, question.asked, fontsize=11.5, fontweight="bold", va="center")
    said = f"{case.case.title}; model: {case.answer} (p = {question.probability:.2f}){right}"
    ax.text(0, 0.75, said, fontsize=9.5, va="center")
    ax.text(LINE, 0, explanation.method, fontsize=9.5, color="0.35", va="center", ha="right")
    left = 0.0
    for word, width in zip(explanation.words, widths, strict=True):
        middle, value = left + (width - 1) / 2, word.relevance
        ax.fill_between([left, left + width - 1], 1.5, 2.5, color=tint(value / largest))
        ax.text(middle, 2.0, word.text, fontsize=11, ha="center", va="center")
        ax.text(middle, 2.9, _signed(value), fontsize=8, ha="center", va="center")
        left += width
