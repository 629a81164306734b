"""What is explained: the objectives, on outputs and targets of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from captum_attn import objectives
from tests.fuzz.public import Public


def of_two(make: Callable[[Any, Any], Callable]) -> Callable[..., Any]:
    return lambda a, b, output: make(a, b)(output)


OUTPUT = "tensor-nested,empty_text"
TARGET = "anything-ids,numbers,vector,three"
PUBLIC = [
    Public(name, getattr(objectives, name), lambda: {"output": torch.rand(3, 5), "target": 1},
           {"output": OUTPUT, "target": TARGET})
    for name in ("logit", "probability")
] + [
    Public("pairwise", objectives.pairwise, lambda: {"output": torch.rand(3, 3)},
           {"output": OUTPUT}),
] + [
    Public(name, of_two(getattr(objectives, name)),
           lambda: {"a": 0, "b": 1, "output": torch.rand(3, 5)},
           {"output": OUTPUT, "a": TARGET, "b": TARGET},
           {"a": "a: |target", "b": "b: |target"})
    for name in ("logit_difference", "logit_ratio", "relative_logit_difference")
]  # fmt: skip
