"""The demo's report: PNG files, one HTML page that needs nothing beside it, and the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from captum_attn.demo.explanation import Case
from captum_attn.demo.pictures import draw_image_case, draw_text_case, draw_vqa_case
from captum_attn.demo.vqa import VQACase
from captum_attn.visualization import Picture

Shown = Case | VQACase

NOTE = (
    "Orange speaks for the target, purple against it. RawAttention and AttentionRollout are "
    "class-agnostic: they answer every question alike. On texts, GenericAttention leaves out each "
    "token’s relevance to itself (discard_self=True). Deletion score: area under the "
    "probability of the target while patches (or word pieces) are removed, the most relevant "
    "first; lower is better. “random order” is the mean of ten random orders. Seconds: one "
    "attribute call after a first one, in which the model is observed."
)

# Measured in tutorials/results.md.
WHY = (
    "Integrated Gradients has the better deletion score nearly everywhere, as it adds up the very "
    "differences of outputs that are measured, per pixel and with signs; what are the others for? "
    "One map of theirs costs a forward and a backward pass (GenericAttention on ViT-B/16: 1.06 "
    "times, Integrated Gradients of 50 steps: 39 times), needs no baseline, and can be looked at "
    "stream by stream, layer by layer and head by head. And they outline what was seen: on 500 "
    "scenes of two digits the map's mean IoU with the digit is 60.7 % by GenericAttention and "
    "40.4 % by Integrated Gradients, and it lies rather on the digit that was asked for in 99.2 % "
    "against 95.2 % of the questions."
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } h3 { margin-bottom: .3rem; }
p.note { color: #555; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td { border-top: 1px solid #ddd; }
"""

Row = tuple[str, float | None, float]  # method, seconds, deletion score


class Chapter(NamedTuple):
    """Cases of one kind.

    Attributes:
        title (str): what they are.
        model (str): the model that they are about.
        draw (callable): a case -> its picture.
    """

    title: str
    model: str
    draw: Callable[[Any], Picture]


def summary(cases: Sequence[Shown]) -> list[Row]:
    """Mean seconds and deletion score of every method over the questions of some cases.

    Args:
        cases (sequence of Case): cases of one kind.

    Returns:
        list of tuple: method, seconds, deletion score; random orders come last.

    Examples::

        >>> summary([])
        []
    """
    questions = [question for case in cases for question in case.questions]
    if not questions:
        return []
    rows: list[Row] = []
    for answers in zip(*(question.explanations for question in questions), strict=True):
        seconds = fmean(answer.seconds for answer in answers)
        rows.append((answers[0].method, seconds, fmean(answer.deletion for answer in answers)))
    rows.append(("random order", None, fmean(q.random_deletion for q in questions)))
    return rows


def text_table(title: str, cases: Sequence[Shown]) -> str:
    """The summary as plain text, for a terminal.

    Args:
        title (str): what the cases are.
        cases (sequence of Case): cases of one kind.

    Returns:
        str: several lines.

    Examples::

        >>> print(text_table("Text", cases))
        Text (7 questions)      seconds  deletion
        ...
    """
    count = sum(len(case.questions) for case in cases)
    lines = [f"{f'{title} ({_questions(count)})':<24}{'seconds':>9}{'deletion':>10}"]
    for method, seconds, deletion in summary(cases):
        time = "-" if seconds is None else f"{seconds:.3f}"
        lines.append(f"  {method:<22}{time:>9}{deletion:>10.3f}")
    return "\n".join(lines)


def write_report(out: Path, parts: Sequence[tuple[Chapter, Sequence[Shown]]]) -> list[Path]:
    """Writes a PNG file per case and ``index.html`` with everything in it.

    Args:
        out (Path): an existing directory.
        parts (sequence of tuple): parts of the report, each with its cases.

    Returns:
        list of Path: the files, the page first.

    Examples::

        >>> [path.name for path in write_report(Path("out"), [(TEXT, texts)])][:2]
        ['index.html', 'text_1.png']
    """
    page, files = out / "index.html", []
    shown = ["<h1>Why did the model say that?</h1>", f'<p class="note">{escape(NOTE)}</p>',
             f'<p class="note">{escape(WHY)}</p>']  # fmt: skip
    for part, cases in parts:
        if cases:
            heading = escape(f"{part.title}: {part.model}")
            shown += [f"<h2>{heading}</h2>", _html_table(part.title, cases)]
        for case in cases:
            picture = part.draw(case)
            files.append(picture.save(out / f"{case.name}.png"))
            shown += [f"<h3>{escape(case.title)}</h3>", picture.html()]
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>captum_attn demo</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(shown)
        + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return [page, *files]


def _questions(count: int) -> str:
    return "1 question" if count == 1 else f"{count} questions"


def _html_table(title: str, cases: Sequence[Shown]) -> str:
    count = sum(len(case.questions) for case in cases)
    head = f"{title}, mean of {_questions(count)}"
    rows = [
        f"<tr><th>{head}</th>"
        '<th class="number">seconds</th><th class="number">deletion score</th></tr>'
    ]
    for method, seconds, deletion in summary(cases):
        time = "–" if seconds is None else f"{seconds:.3f}"
        rows.append(
            f'<tr><td>{escape(method)}</td><td class="number">{time}</td>'
            f'<td class="number">{deletion:.3f}</td></tr>'
        )
    return "<table>" + "\n".join(rows) + "</table>"


TEXT = Chapter("Text", "all-MiniLM-L6-v2 as a zero-shot topic classifier", draw_text_case)
IMAGES = Chapter("Images", "a small vision transformer on two digits", draw_image_case)
DETECTION = Chapter("Detection", "a small Conditional DETR, a map per digit", draw_image_case)
QUESTIONS = Chapter("Questions", "a small LXMERT, words and regions", draw_vqa_case)
