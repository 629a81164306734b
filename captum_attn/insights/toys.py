"""The package's own models as dashboards: pictures, texts, both, a detector, a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_attn.insights.detected import DetectionSession
from captum_attn.insights.features import (
    Batch,
    EmptyFeature,
    ImageFeature,
    RegionFeature,
    TextFeature,
)
from captum_attn.insights.session import Session
from captum_attn.insights.tab import Absent, Tab
from captum_attn.insights.writing import WritingSession

if TYPE_CHECKING:
    from captum_attn.insights.uploads import Picture

__all__ = ["DASHBOARDS"]

EXAMPLES = 12
PROMPTS = (
    "The capital of France is",
    "Tom lives in Paris. Anna lives in Rome. Kim lives in Oslo. Anna lives in the city of",
    "When Mary and John went to the store, John gave a drink to",
    "The keys to the cabinet",
)


def digits() -> Session:
    """A ViT that names the two digits of a scene; a picture of digits may be uploaded."""
    from captum_attn.demo.image import PATCH, fit_picture
    from captum_attn.toy.digit_vit import load_digit_vit
    from captum_attn.toy.scenes import NUM_CLASSES, scenes

    def upload(picture: Picture) -> Tensor:
        return fit_picture(picture)[0]

    batch, model = scenes(EXAMPLES, split="test", seed=0), load_digit_vit()
    pairs = batch.labels.tolist()
    with torch.no_grad():
        sure = model(batch.images).sigmoid().gather(1, batch.labels).amin(1)
    order = sure.argsort(descending=True)  # the clearest scene first
    names = [f"a {pairs[i][0]} and a {pairs[i][1]}" for i in order.tolist()]
    scene = ImageFeature("Scene", baseline_transforms=ground, upload=upload, patch_size=PATCH)
    return Session(
        {"digit ViT": model}, list(map(str, range(NUM_CLASSES))), scene,
        [Batch(batch.images[order], names=names)],
        torch.sigmoid,
        note="A scene has two digits. Each digit is a question of its own, with a probability of "
        "its own: they need not add up to one.",
    )  # fmt: skip


def topics() -> Session:
    """A real pretrained text model as a zero-shot classifier; a text may be typed."""
    from captum_attn.toy.topics import LABELS, TEXTS, check_text, load_topic_classifier

    model = load_topic_classifier(LABELS)
    tokenizer = model.tokenizer

    def tokenize(text: str) -> Tensor:
        check_text(model, text)
        return model.tokenize(text)["input_ids"]

    def padded(ids: Tensor) -> Tensor:
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        return torch.where(special, ids, tokenizer.pad_token_id)

    text = TextFeature(
        "Text", padded, None, lambda ids: tokenizer.convert_ids_to_tokens(ids[0]),
        tokenize=tokenize, special_ids=tokenizer.all_special_ids,
    )  # fmt: skip
    batches = [Batch(model.tokenize(example)["input_ids"]) for example in TEXTS]
    # The mean reads every token, so each is relevant to itself by merely being there.
    presets = {"discard_self": True}
    return Session({"MiniLM topics": model}, model.labels, text, batches, softmax, presets=presets)


def questions() -> Session:
    """An LXMERT that answers yes or no about a scene; a question may be typed."""
    from captum_attn.toy import digit_vqa
    from captum_attn.toy.scenes import scenes
    from captum_attn.toy.vocabulary import PAD, SPECIAL, VOCABULARY, tokenize

    words = {index: word for word, index in VOCABULARY.items()}
    batch = scenes(EXAMPLES, split="test", seed=0)
    found = digit_vqa.regions(batch)
    asked = digit_vqa.questions(found)

    def typed(text: str) -> Tensor:
        return tokenize(text)["input_ids"]

    question = TextFeature(
        "Question", lambda ids: torch.full_like(ids, VOCABULARY[PAD]), None,
        lambda ids: [words[i] for i in ids[0].tolist()],
        tokenize=typed, special_ids=[VOCABULARY[token] for token in SPECIAL],
    )  # fmt: skip

    def drawn(features: Tensor) -> tuple[Tensor, Tensor]:
        row = int((found.visual_feats == features).flatten(1).all(1).nonzero()[0])
        return batch.images[row], found.boxes[row]

    regions = RegionFeature("Regions", ground, None, drawn)
    batches = [
        Batch(
            (typed(asked.texts[i]), found.visual_feats[i : i + 1], found.visual_pos[i : i + 1]),
            asked.answers[i : i + 1],
        )
        for i in range(EXAMPLES)
    ]
    return Session(
        {"digit LXMERT": Answers(digit_vqa.load_digit_vqa())}, digit_vqa.ANSWERS,
        [question, regions, EmptyFeature("boxes")], batches, torch.sigmoid,
    )  # fmt: skip


def detector() -> DetectionSession:
    """A DETR that finds the digits of a scene; a picture of digits may be uploaded."""
    from captum_attn.demo.image import PATCH, fit_picture
    from captum_attn.toy.digit_detr import load_digit_detr
    from captum_attn.toy.scenes import scenes

    def upload(picture: Picture) -> Tensor:
        return fit_picture(picture)[0]

    batch = scenes(EXAMPLES, split="test", seed=0)
    names = [f"a {a} and a {b}" for a, b in batch.labels.tolist()]
    scene = ImageFeature("Scene", baseline_transforms=ground, upload=upload, patch_size=PATCH)
    return DetectionSession(
        {"digit DETR": load_digit_detr()}, scene, [Batch(batch.images, names=names)],
        id2label={digit: f"digit {digit}" for digit in range(10)},
        note="Each map explains the class of one box: its object query looked there.",
    )  # fmt: skip


def smollm2() -> Tab:
    """A real language model, if its package is installed; a prompt may be typed."""
    from captum_attn.toy.smollm2 import HOW_TO_GET_IT, is_installed, load_smollm2

    if not is_installed():
        return Absent(HOW_TO_GET_IT)
    return WritingSession(load_smollm2, None, PROMPTS, name="SmolLM2-135M-Instruct")


class Answers(nn.Module):
    """LXMERT with its inputs by position and its answers as the output, as Captum wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, visual_feats: Tensor, visual_pos: Tensor) -> Tensor:
        """Logits (B, 2) for no and yes."""
        inputs = {"input_ids": input_ids, "visual_feats": visual_feats, "visual_pos": visual_pos}
        return self.model(**inputs).question_answering_score


def ground(values: Tensor) -> Tensor:
    """The median everywhere: most pixels carry no ink."""
    return torch.full_like(values, float(values.median()))


def softmax(logits: Tensor) -> Tensor:
    """Probabilities of topics."""
    return logits.softmax(-1)


DASHBOARDS: dict[str, Callable[[], Tab]] = {
    "digits": digits,
    "topics": topics,
    "questions": questions,
    "detector": detector,
    "smollm2": smollm2,
}
