"""Evaluations: the data set, the methods, the metrics, every option; files as data sets."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from captum.attr import InputXGradient
from PIL import Image
from torch import nn

from captum_attn.evaluation import Batch, ImageFolder, TextFile, evaluate
from captum_attn.evaluation.models import load
from tests.fuzz.public import Public

FOLDER = Path(tempfile.mkdtemp(prefix="captum_attn_fuzz_"))
Image.new("L", (4, 4)).save(FOLDER / "a.png")


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


MODEL = Linear().eval()
ROWS = [(torch.rand(1, 4, 4), i % 3, torch.rand(4, 4) > 0.5) for i in range(3)]


def arguments() -> Mapping[str, Any]:
    return {
        "model": MODEL, "dataset": ROWS, "methods": InputXGradient,
        "metrics": {"a": ("aopc", {"steps": 2})}, "show_progress": False, "resamples": 20,
    }  # fmt: skip


def of_labels(labels: Any) -> Any:
    return evaluate(**{**arguments(), "dataset": [(x, labels, m) for x, _, m in ROWS]})


def of_masks(masks: Any) -> Any:
    given = [(x, y, masks) for x, y, _ in ROWS]
    return evaluate(**{**arguments(), "dataset": given, "metrics": "energy_inside"})


def explained_as(attributions: Any) -> Any:
    given = {"methods": lambda inputs, target, additional: attributions}
    return evaluate(**{**arguments(), **given})


def measured_as(value: Any) -> Any:
    def metric(*_: Any, **__: Any) -> Any:
        return value

    return evaluate(**{**arguments(), "metrics": {"m": metric}})


def resumed(out: Any) -> Any:
    return evaluate(**{**arguments(), "out": out})


OPTIONS = {
    "target": "anything-three,numbers", "perturbation": "mapping?", "batch_size": "count?",
    "collate_fn": "callable?", "limit": "count?", "seed": "count-zero", "out": "path?",
    "resume": "flag", "confidence": "share-half", "resamples": "count", "show_progress": "flag",
}  # fmt: skip
PUBLIC = [
    Public(
        "evaluate", evaluate, arguments,
        {"model": "callable", "dataset": "anything-vector,volume,array",
         "methods": "anything-a_lambda", "metrics": "anything-a_lambda"} | OPTIONS,
        {"model": "|", "dataset": "|", "metrics": "|", "target": "arget|labels",
         "collate_fn": "collate_fn|example"},
    ),
    Public("labels", of_labels, lambda: {"labels": 1}, {"labels": "anything"}, {"labels": "|"}),
    Public("masks", of_masks, lambda: {"masks": torch.ones(4, 4) > 0},
           {"masks": "tensor-none"}, {"masks": "|"}),
    Public("attributions", explained_as, lambda: {"attributions": torch.rand(3, 1, 4, 4)},
           {"attributions": "tensor"}, {"attributions": "|"}),
    Public("a metric's values", measured_as, lambda: {"value": torch.rand(3)},
           {"value": "tensor"}, {"value": "|"}),
    Public("Batch", Batch, lambda: {"inputs": torch.rand(2, 3)}, {}),
    Public("ImageFolder", ImageFolder, lambda: {"root": FOLDER, "read": torch.load},
           {"root": "path", "read": "callable"},
           {"root": "|", "read": "|"}),
    Public("load", load, dict, {"name": "path-bytes"}, {"name": "|"}),
    Public("TextFile", lambda path: TextFile(path, None), dict, {"path": "path"}, {"path": "|"}),
]  # fmt: skip
