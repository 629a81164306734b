"""What the demo computes: cases, the questions asked about each, one explanation per method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from captum_attn.demo.deletion import Score, deletion_score, random_deletion_score
from captum_attn.toy.topics import TextWord


class MethodAnswer(NamedTuple):
    """One method's answer to one question.

    Attributes:
        method (str): the method's name.
        relevance (Tensor): a map ``(H, W)`` of an image, or ``(n,)`` over the tokens of a text.
        seconds (float): time of one `attribute` call; the first call, in which the model is
            observed, is not counted.
        deletion (float): deletion score, lower is better.
        words (tuple of TextWord): a text's words with their relevance; empty for an image.
    """

    method: str
    relevance: Tensor
    seconds: float
    deletion: float
    words: tuple[TextWord, ...] = ()


class Question(NamedTuple):
    """One target asked about.

    Attributes:
        asked (str): the question as a title, ``"why 3?"``.
        probability (float): what the model gives the target.
        explanations (list of MethodAnswer): one per method.
        random_deletion (float): mean deletion score of random orders.
        box (tuple of float): x_min, y_min, x_max, y_max of what was detected, in pixels; empty
            where nothing was.
    """

    asked: str
    probability: float
    explanations: list[MethodAnswer]
    random_deletion: float
    box: tuple[float, ...] = ()


class Case(NamedTuple):
    """One input and the questions asked about it.

    Attributes:
        name (str): the stem of its files, ``"scene_1"``.
        title (str): one line for the report.
        questions (list of Question): at least one.
        image (Tensor or None): ``(H, W)`` in [0, 1] of an image.
        text (str): the text of a text.
    """

    name: str
    title: str
    questions: list[Question]
    image: Tensor | None = None
    text: str = ""


def explain(
    methods: Mapping[str, Callable[[], Tensor]],
    score: Score,
    units: Callable[[Tensor], Tensor],
) -> tuple[list[MethodAnswer], float]:
    """Runs every method on one question, times it and scores it by deletion.

    Args:
        methods (Mapping): name -> a call that returns the relevance of one example.
        score (callable): the explained output of kept units, see
            :func:`~captum_attn.demo.deletion.deletion_curve`.
        units (callable): relevance as a method returns it -> ``(n,)`` over the units.

    Returns:
        tuple: the explanations, and the mean deletion score of random orders.

    Examples::

        >>> relevance = torch.tensor([0.2, 0.8])
        >>> explanations, random = explain(
        ...     {"Constant": lambda: relevance}, lambda keep: keep.float().mean(1), lambda r: r
        ... )
        >>> explanations[0].method, random
        ('Constant', 0.5)
    """
    explanations = []
    for name, attribute in methods.items():
        attribute()  # the first call observes the model
        start = time.perf_counter()
        relevance = attribute()
        seconds = time.perf_counter() - start
        deletion = deletion_score(score, units(relevance))
        explanations.append(MethodAnswer(name, relevance, seconds, deletion))
    n = len(units(explanations[0].relevance))
    return explanations, random_deletion_score(score, n)
