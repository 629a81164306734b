"""Captum Insights with registered methods, as a program: ``python -m tests.insights.captum_app``.

Captum's server runs in a thread that nothing can stop, so it gets a process of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from captum_attn import insights
from captum_attn.toy.scenes import scenes
from captum_attn.toy.topics import TEXTS, load_topic_classifier

COUNT = 4  # Captum Insights shows four examples


def images() -> dict[str, Any]:
    """Captum's own ImageFeature, three channels."""
    from captum.insights.attr_vis.features import ImageFeature

    from captum_attn.toy.texture_vit import load_texture_vit
    from captum_attn.toy.textures import TEXTURES, textured_objects

    batch = textured_objects(COUNT, split="test", seed=0)
    return {
        "models": [load_texture_vit()],
        "classes": [texture.name for texture in TEXTURES],
        "features": [ImageFeature("Photo", [zeros], [])],
        "batch": (batch.images, batch.labels),
    }


def grey() -> dict[str, Any]:
    """Our ImageFeature in Captum's page: one channel, which Captum's cannot draw."""
    from captum_attn.toy.digit_vit import load_digit_vit

    batch = scenes(COUNT, split="test", seed=0)
    return {
        "models": [load_digit_vit()],
        "classes": list("0123456789"),
        "features": [insights.ImageFeature("Scene", [zeros], [])],
        "batch": (batch.images, batch.labels[:, 0]),
    }


def texts() -> dict[str, Any]:
    """Captum's own TextFeature, a real text model."""
    from captum.insights.attr_vis.features import TextFeature

    model = load_topic_classifier()
    words = model.tokenizer.convert_ids_to_tokens
    encoded = model.tokenize(TEXTS[:COUNT])
    return {
        "models": [Masked(model)],
        "classes": list(model.labels),
        "features": [TextFeature("Text", [zeros], [], lambda ids: words(ids[0]))],
        "batch": (encoded["input_ids"], torch.tensor([7, 4, 1, 0])),
    }


class Masked(nn.Module):
    """The classifier, which finds its padding itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, (ids != 0).long())


def zeros(values: Tensor) -> Tensor:
    return torch.zeros_like(values)


def softmax(output: Tensor) -> Tensor:
    return output.softmax(-1)


KINDS = {"images": images, "grey": grey, "texts": texts}


def main(kind: str, port: int) -> None:
    from captum.insights import AttributionVisualizer, Batch

    torch.set_num_threads(1)
    insights.register()
    app = KINDS[kind]()
    inputs, labels = app.pop("batch")
    AttributionVisualizer(
        dataset=[Batch(inputs, labels)], score_func=softmax, **app
    ).serve(blocking=True, port=port)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
