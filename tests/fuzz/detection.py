"""Detections, by one of our methods and by one of Captum's."""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import Saliency

from captum_attn import GenericAttention
from captum_attn.detection import explain_detections, explain_missed
from tests.fuzz.models import detector
from tests.fuzz.public import Public

MODEL = detector()


def of_output(**said: Any) -> Any:
    """What a detector with that output is told."""

    def model(pixel_values: torch.Tensor) -> dict[str, Any]:
        return MODEL(pixel_values) | said

    return explain_detections(
        Saliency(model), {"pixel_values": torch.rand(2, 3, 8, 8)}, activation="softmax"
    )


def arguments(method: Any) -> dict[str, Any]:
    return {
        "method": method(MODEL), "inputs": {"pixel_values": torch.rand(2, 3, 8, 8)},
        "activation": "softmax", "threshold": 0.0,
    }  # fmt: skip


def missed(method: Any) -> dict[str, Any]:
    return {
        "method": method(MODEL), "inputs": {"pixel_values": torch.rand(1, 3, 8, 8)},
        "box": (1, 1, 6, 6), "label": 0, "activation": "softmax",
    }  # fmt: skip


def labelled(id2label: Any) -> Any:
    """A missed object whose class has a name."""
    return explain_missed(**missed(Saliency) | {"label": "cat", "id2label": id2label})


PUBLIC = [
    Public(
        f"explain_detections by {method.__name__}", explain_detections,
        lambda method=method: arguments(method),
        {
            "method": "anything", "inputs": "anything-volume", "threshold": "share",
            "activation": "choice-auto", "queries": "anything?-empty_list,numbers",
            "max_detections": "count?", "target_sizes": "anything?-array", "id2label": "mapping?",
            "show_progress": "flag",
        },
        {"inputs": "expected", "threshold": "threshold"},
    )
    for method in (GenericAttention, Saliency)
] + [
    Public("a detector's output", of_output, dict, {"logits": "tensor", "pred_boxes": "tensor"},
           {"logits": "logits", "pred_boxes": "boxes"}),
] + [
    Public(
        f"explain_missed by {method.__name__}", explain_missed,
        lambda method=method: missed(method),
        {
            "method": "anything", "inputs": "anything", "box": "anything", "label": "anything",
            "min_overlap": "share", "activation": "choice-auto", "target_sizes": "anything?",
            "id2label": "mapping?", "show_progress": "flag",
        },
        {"inputs": "expected"},
    )
    for method in (GenericAttention, Saliency)
] + [
    Public("explain_missed by name", labelled, lambda: {"id2label": {0: "cat"}},
           {"id2label": "anything"}, {"id2label": "id2label|label"}),
]  # fmt: skip
