"""What did the detector look at? Scenes of two digits, one map for each that it finds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from captum.attr import Attribution, IntegratedGradients
from torch import Tensor, nn

from captum_attn import AttentionRollout, GenericAttention, HeterogenousAttention, RawAttention
from captum_attn.demo.deletion import keep_patches
from captum_attn.demo.explanation import Case, Question, explain
from captum_attn.detection import Detections, explain_detections
from captum_attn.toy.scenes import scenes

METHODS = (
    RawAttention, AttentionRollout, GenericAttention, HeterogenousAttention, IntegratedGradients,
)  # fmt: skip
PATCH = 8  # side of the model's tokens, pixels


def explain_detected(model: nn.Module, count: int = 2, seed: int = 0) -> Iterator[Case]:
    """Held-out scenes, one question for each detected digit.

    Args:
        model (nn.Module): a detector, images ``(B, 1, 64, 64)`` -> logits and boxes of its queries.
        count (int, optional): how many scenes. Default: 2.
        seed (int, optional): seed of the scenes. Default: 0.

    Returns:
        iterator of Case: computed one by one.

    Examples::

        >>> case = next(explain_detected(load_digit_detr()))
        >>> case.name, len(case.questions)
        ('detection_1', 2)
    """
    images = scenes(count, split="test", seed=seed).images
    for i in range(count):
        image = images[i : i + 1]
        (found,) = explain_detections(GenericAttention(model), image)
        digits = [f"a {label}" for label in found.labels.tolist()]
        title = f"A scene in which it finds {' and '.join(digits) or 'nothing'}"
        questions = [_question(model, image, found, j) for j in range(len(found))]
        yield Case(f"detection_{i + 1}", title, questions, image=image[0, 0])


def _question(model: nn.Module, image: Tensor, found: Detections, j: int) -> Question:
    query, label = int(found.queries[j]), int(found.labels[j])
    fill = float(image.median())  # the ground: most pixels carry no ink

    def logits(images: Tensor) -> Tensor:
        return model(images).logits

    def attribute(attributor: Attribution) -> Tensor:
        return attributor.attribute(image, target=(query, label))[0].sum(0).detach()

    def probability(keep: Tensor) -> Tensor:
        return logits(keep_patches(keep, image, PATCH, fill))[:, query, label].sigmoid()

    def patches(relevance: Tensor) -> Tensor:
        return F.avg_pool2d(relevance[None, None], PATCH).flatten()

    calls = {method.__name__: partial(attribute, method(logits)) for method in METHODS}
    with torch.no_grad():
        explanations, chance = explain(calls, probability, patches)
    box = tuple(found.boxes[j].tolist())
    return Question(f"why this {label}?", float(found.scores[j]), explanations, chance, box)
