"""A model small enough to check by hand, data for it, and methods that can be watched."""

from __future__ import annotations

import torch
from torch import nn

CLASSES = 3


class Linear(nn.Module):
    """Images (B, 1, 4, 4) -> logits (B, 3); counts the examples that it saw."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(16, CLASSES, generator=rng))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images.flatten(1) @ self.weight


def linear() -> Linear:
    return Linear().eval()


def examples(count: int = 19, masks: bool = True) -> list:
    rng = torch.Generator().manual_seed(3)
    images = torch.rand(count, 1, 4, 4, generator=rng)
    labels = torch.randint(CLASSES, (count,), generator=rng).tolist()
    places = torch.rand(count, 4, 4, generator=rng) > 0.6
    places[:, 0, 0] = True
    rows = list(zip(images, labels, places, strict=True))
    return rows if masks else [row[:2] for row in rows]


class Noisy:
    """Input times gradient and noise from the global state."""

    def __init__(self, model: Linear) -> None:
        self.model = model

    def attribute(self, images, target):
        weights = self.model.weight.detach().T[torch.as_tensor(target)]
        return images * weights.view(-1, 1, 4, 4) + 0.1 * torch.randn(images.shape)
