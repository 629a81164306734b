"""The demo's pictures, drawn by :mod:`captum_attn.visualization`."""

from __future__ import annotations

from collections.abc import Sequence

from captum_attn.demo.explanation import Case, MethodAnswer
from captum_attn.demo.vqa import DIFFERENCE, VQACase
from captum_attn.toy.topics import TextWord
from captum_attn.visualization import (
    Picture,
    Word,
    visualize_image,
    visualize_image_text,
    visualize_text,
)


def draw_image_case(case: Case) -> Picture:
    """One row per question: the input, then the map of every method laid over it.

    Args:
        case (Case): a case with an image.

    Returns:
        Picture: the figure.

    Examples::

        >>> draw_image_case(next(explain_scenes(load_digit_vit()))).save("scene.png")
    """
    assert case.image is not None
    questions = case.questions
    boxes = [[question.box] if question.box else [] for question in questions]
    return visualize_image(
        {
            e.method: [question.explanations[i].relevance for question in questions]
            for i, e in enumerate(questions[0].explanations)
        },
        [case.image] * len(questions),
        titles=[f"{question.asked} p = {question.probability:.3f}" for question in questions],
        captions=_deletions(case),
        boxes=boxes if any(boxes) else None,
    )


def draw_text_case(case: Case) -> Picture:
    """For every question the text once per method, its words coloured.

    Args:
        case (Case): a case with a text.

    Returns:
        Picture: the figure; its HTML form is text.

    Examples::

        >>> draw_text_case(next(explain_texts(load_topic_classifier()))).save("text.html")
    """
    questions = case.questions
    return visualize_text(
        {
            e.method: [_drawn(question.explanations[i].words) for question in questions]
            for i, e in enumerate(questions[0].explanations)
        },
        titles=[f"{question.asked} (p = {question.probability:.2f})" for question in questions],
        captions=_deletions(case),
    )


def draw_vqa_case(case: VQACase) -> Picture:
    """One row per explanation: the regions with their relevance, and the words with theirs.

    Args:
        case (VQACase): a question about a scene.

    Returns:
        Picture: the figure.

    Examples::

        >>> draw_vqa_case(next(explain_questions(load_digit_vqa()))).save("question.png")
    """
    explanations = case.questions[0].explanations
    return _draw_pairs([(case, e.method, e) for e in explanations], ("for", "against"))


def draw_inspections(cases: Sequence[VQACase], inspection: str = DIFFERENCE) -> Picture:
    """One row per question: what speaks for yes rather than no.

    Args:
        cases (sequence of VQACase): questions with that inspection among their explanations.
        inspection (str, optional): which one. Default: the difference of the logits.

    Returns:
        Picture: the figure.

    Examples::

        >>> draw_inspections(list(explain_examples(load_digit_vqa()))).save("examples.png")
    """
    rows = [
        (case, e.method, e)
        for case in cases
        for e in case.questions[0].explanations
        if e.method == inspection
    ]
    return _draw_pairs(rows, ("for yes", "for no"))


def _draw_pairs(
    rows: Sequence[tuple[VQACase, str, MethodAnswer]], legend: tuple[str, str]
) -> Picture:
    images = [case.case.image for case, *_ in rows]
    words = [_drawn(explanation.words) for *_, explanation in rows]
    return visualize_image_text(
        (words, [explanation.relevance for *_, explanation in rows]),
        None,
        images,
        boxes=[case.boxes for case, *_ in rows],
        titles=[case.questions[0].asked for case, *_ in rows],
        captions=[f"{label}. {_said(case)}" for case, label, _ in rows],
        legend=legend,
        sign="all",
    )


def _said(case: VQACase) -> str:
    right = f", right answer: {case.right}" if case.right else ""
    probability = case.questions[0].probability
    return f"{case.title}; model: {case.answer} (p = {probability:.2f}){right}"


def _deletions(case: Case) -> dict[str, list[str]]:
    """Method -> what is said of it under each question."""
    return {
        e.method: [f"deletion {q.explanations[i].deletion:.2f}" for q in case.questions]
        for i, e in enumerate(case.questions[0].explanations)
    }


def _drawn(words: Sequence[TextWord]) -> list[Word]:
    """Words as they are drawn: with a blank where the text has one."""
    ends = [0, *(word.end for word in words)]
    return [
        Word(word.text, word.relevance, word.start > end)
        for word, end in zip(words, ends, strict=False)
    ]
