"""Why did the model say yes? Questions about the digits of a scene, explained in both streams.

The logical inspection of Cui, Fan & Chen (arXiv 2605.27458) asks for two answers at once: what
speaks for yes rather than no, with a sign, in the words and in the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from captum.attr import Attribution
from torch import Tensor, nn

from captum_attn import GenericAttention, HeterogenousAttention, objectives
from captum_attn.demo.explanation import Case, MethodAnswer, Question, explain
from captum_attn.errors import InputError, OptionError
from captum_attn.toy.digit_vqa import ANSWERS, NO, YES, questions, region_features, regions
from captum_attn.toy.scenes import SceneBatch, scenes
from captum_attn.toy.topics import TextWord
from captum_attn.toy.vocabulary import WORD, split_words, tokenize

DIFFERENCE = "yes − no"
INSPECTIONS: dict[str, objectives.Objective] = {
    DIFFERENCE: objectives.logit_difference(YES, NO),
    "yes / no": objectives.logit_ratio(YES, NO),
    "(yes − no) / (yes + no)": objectives.relative_logit_difference(YES, NO),
}


class VQACase(NamedTuple):
    """One question about one scene.

    Attributes:
        case (Case): image, text and one question; of every explanation, ``relevance`` is ``(R,)``
            over the regions and ``words`` are the words of the text.
        boxes (Tensor): ``(R, 4)``, the regions as (x1, y1, x2, y2) in pixels.
        answer (str): what the model says, "yes" or "no".
        right (str): the right answer; "" where it is not known.
    """

    case: Case
    boxes: Tensor
    answer: str
    right: str

    @property
    def name(self) -> str:
        """The stem of its files."""
        return self.case.name

    @property
    def title(self) -> str:
        """One line for the report."""
        return self.case.title

    @property
    def questions(self) -> list[Question]:
        """The one question."""
        return self.case.questions


def explain_question(
    model: nn.Module,
    image: Tensor,
    boxes: Tensor,
    text: str,
    name: str = "question",
    title: str = "Your question",
    right: str = "",
    inspections: Sequence[str] = (DIFFERENCE,),
) -> VQACase:
    """One question about one image: GAE on the model's answer, then signed inspections.

    An inspection is :class:`~captum_attn.HeterogenousAttention` with ``correction="full"``; what
    speaks for yes rather than no is positive, whichever the model says. The two quotients of
    logits are as the paper has them; where the logits of yes and no are nearly opposite, as those
    of this model, their denominators make them far less steady than the difference.

    In the deletion score a removed word is masked out of the attention, and a removed region shows
    the image's median instead of its pixels; the score is of the model's answer.

    Args:
        model (nn.Module): a digit LXMERT.
        image (Tensor): ``(1, 1, H, W)`` in [0, 1].
        boxes (Tensor): ``(R, 4)`` as (x1, y1, x2, y2) in pixels.
        text (str): the question.
        name (str, optional): the stem of its files.
        title (str, optional): what the image shows.
        right (str, optional): the right answer, if it is known.
        inspections (sequence of str, optional): names in ``INSPECTIONS``. Default: the difference.

    Returns:
        VQACase: the explanations of regions and words.

    Raises:
        InputError: where a word is unknown, or the boxes are none in the image.
        OptionError: where an inspection is unknown.

    Examples::

        >>> batch = scenes(1, split="test")
        >>> found = regions(batch)
        >>> explain_question(load_digit_vqa(), batch.images, found.boxes[0], "Is there a 3?").answer
        'no'
    """
    split_words(text)
    _check_boxes(image, boxes)
    if unknown := set(inspections) - set(INSPECTIONS):
        raise OptionError(f"inspections: expected some of {list(INSPECTIONS)}, got {unknown}")
    inputs = tokenize(text) | region_features(image, boxes[None])
    with torch.no_grad():
        probabilities = model(**inputs).question_answering_score[0].sigmoid()
    answer = int(probabilities.argmax())
    score = partial(_probability, model, inputs, float(image.median()), answer)
    gae = partial(_relevance, GenericAttention(model), inputs, answer)
    explanations, chance = explain({"GenericAttention": gae}, score, lambda r: r)
    full = HeterogenousAttention(model)
    calls = {
        inspected: partial(
            _relevance, full, inputs, answer, objective=INSPECTIONS[inspected], correction="full"
        )
        for inspected in inspections
    }
    sign = 1 if answer == YES else -1  # what speaks for the answer is removed first
    explanations += explain(calls, score, lambda r: sign * r)[0]
    explanations = [_split(e, text, len(boxes)) for e in explanations]
    question = Question(text, float(probabilities[answer]), explanations, chance)
    case = Case(name, title, [question], image=image[0, 0], text=text)
    return VQACase(case, boxes, ANSWERS[answer], right)


def explain_questions(model: nn.Module, count: int = 3, seed: int = 0) -> Iterator[VQACase]:
    """Held-out scenes with a question drawn about each.

    Args:
        model (nn.Module): a digit LXMERT.
        count (int, optional): how many. Default: 3.
        seed (int, optional): seed of scenes, regions and questions. Default: 0.

    Returns:
        iterator of VQACase: computed one by one.

    Examples::

        >>> [case.case.name for case in explain_questions(load_digit_vqa(), count=2)]
        ['question_1', 'question_2']
    """
    return _explain_rows(model, scenes(count, split="test", seed=seed), seed, range(count))


def explain_examples(model: nn.Module, seed: int = 0) -> Iterator[VQACase]:
    """The first held-out question of each kind: yes, no, no about a side, and a wrong answer.

    The digit is there; it is not; it is, but not on that side; and whatever the model gets wrong.

    Args:
        model (nn.Module): a digit LXMERT.
        seed (int, optional): seed of scenes, regions and questions. Default: 0.

    Returns:
        iterator of VQACase: at most four; a kind of which there is none is left out.

    Examples::

        >>> [case.answer for case in explain_examples(load_digit_vqa())][:3]
        ['yes', 'no', 'no']
    """
    batch = scenes(500, split="test", seed=seed)
    found = regions(batch, seed)
    asked = questions(found, seed)
    with torch.no_grad():
        logits = model(**tokenize(asked.texts), **found.inputs).question_answering_score
    right = logits.argmax(1) == asked.answers
    there = (found.digits == asked.digits[:, None]).any(1)
    side = torch.tensor([bool(side) for side in asked.sides])
    kinds = (
        right & ~side & (asked.answers == YES),
        right & ~side & (asked.answers == NO),
        right & side & there & (asked.answers == NO),
        ~right,
    )
    rows = [int(kind.nonzero()[0, 0]) for kind in kinds if kind.any()]
    return _explain_rows(model, batch, seed, rows)


def _explain_rows(
    model: nn.Module, batch: SceneBatch, seed: int, rows: Sequence[int]
) -> Iterator[VQACase]:
    found = regions(batch, seed)
    asked = questions(found, seed)
    for number, row in enumerate(rows, 1):
        one, other = batch.labels[row].tolist()
        yield explain_question(
            model,
            batch.images[row : row + 1],
            found.boxes[row],
            asked.texts[row],
            f"question_{number}",
            f"A scene with a {one} and a {other}",
            ANSWERS[asked.answers[row]],
        )


def _check_boxes(image: Tensor, boxes: Tensor) -> None:
    height, width = image.shape[-2:]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise InputError(
            f"boxes: expected shape (R, 4) with R > 0, got {tuple(boxes.shape)}; give one "
            "(x1, y1, x2, y2) per region"
        )
    start, end = boxes[:, :2], boxes[:, 2:]
    if not ((start >= 0) & (start < end) & (end <= boxes.new_tensor([width, height]))).all():
        raise InputError(
            f"boxes: expected 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}, got "
            f"{boxes.tolist()}; give them in pixels"
        )


def _relevance(
    attribution: Attribution, inputs: dict[str, Tensor], answer: int, **options: Any
) -> Tensor:
    """``(R + W,)``: of the regions, then of the words."""
    found = attribution.attribute(inputs, target=answer, **options)
    return torch.cat([found["visual_feats"][0].sum(-1), found["input_ids"][0, 1:-1]]).detach()


def _probability(
    model: nn.Module, inputs: dict[str, Tensor], ground: float, answer: int, keep: Tensor
) -> Tensor:
    """The answer's probability with only some regions and words kept, ``keep`` (S, R + W)."""
    copies = {name: x.expand(len(keep), *x.shape[1:]) for name, x in inputs.items()}
    count = inputs["visual_feats"].shape[1]
    on_regions, words = keep[:, :count], keep[:, count:]
    copies["visual_feats"] = copies["visual_feats"].where(on_regions[..., None], ground)
    # [CLS] and [SEP] stay.
    copies["attention_mask"] = F.pad(words, [1, 1], value=True).to(inputs["attention_mask"].dtype)
    return model(**copies).question_answering_score[:, answer].sigmoid()


def _split(explanation: MethodAnswer, text: str, count: int) -> MethodAnswer:
    """Relevance of regions and words apart, each word where it stands in the text."""
    found, words = explanation.relevance[:count], explanation.relevance[count:].tolist()
    spans = zip(WORD.finditer(text), words, strict=True)
    at = tuple(TextWord(m.group(), m.start(), m.end(), value) for m, value in spans)
    return explanation._replace(relevance=found, words=at)
