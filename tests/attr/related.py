"""Tiny models whose maps are seen by hand, for the methods that the papers compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo import ZOO


def by_hand(x: Tensor, target: int) -> tuple[torch.nn.Module, list[Tensor], list[Tensor]]:
    """A model in float64, its maps (B, H, n, n) and their gradients."""
    model = ZOO["by_matmul"].fresh().double()
    record: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attention.record = record
    model(x)[:, target].sum().backward()
    for block in model.blocks:  # type: ignore[union-attr]
        block.attention.record = None
    gradients = [A.grad for A in record]
    model.zero_grad()
    return model, [A.detach() for A in record], gradients  # type: ignore[return-value]


def inputs(batch: int = 3) -> Tensor:
    return ZOO["by_matmul"].sample(batch).to(torch.float64).inputs
