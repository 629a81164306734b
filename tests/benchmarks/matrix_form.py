"""The plain matrix form of the methods on a timm ViT, as the field writes it by hand.

Eager attention, every map kept (and every gradient, where one is needed), then n x n products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def set_fused(model: nn.Module, fused: bool) -> None:
    """Chooses timm's fused kernel or its eager attention, in every block."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


@contextmanager
def kept_maps(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects A (B, H, n, n) of every block of an eager timm ViT while the model runs."""
    maps: list[Tensor] = []
    handles = [
        block.attn.attn_drop.register_forward_hook(lambda _m, _inputs, A: maps.append(A))
        for block in model.blocks
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def identity(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand(len(A), -1, -1)


def raw_attention(model: nn.Module, images: Tensor, target: int) -> Tensor:
    """E_h A of the last block: (B, n), the class token's row."""
    with torch.no_grad(), kept_maps(model) as maps:
        model(images)
    return maps[-1].mean(1)[:, 0]


def rollout(model: nn.Module, images: Tensor, target: int) -> Tensor:
    """Product of rownorm(E_h A + I) over the blocks: (B, n), the class token's row."""
    with torch.no_grad(), kept_maps(model) as maps:
        model(images)
    R = identity(maps[0])
    for A in maps:
        A_hat = A.mean(1) + identity(A)
        R = A_hat / A_hat.sum(-1, keepdim=True) @ R
    return R[:, 0]


def generic_attention(model: nn.Module, images: Tensor, target: int) -> Tensor:
    """R += E_h((grad A * A)^+) R, GAE Eq. 5 and 6: (B, n), the class token's row."""
    with kept_maps(model) as maps:
        logits = model(images.detach().requires_grad_())
    gradients = torch.autograd.grad(logits[:, target].sum(), maps)
    R = identity(maps[0])
    for A, gradient in zip(maps, gradients, strict=True):
        R = R + (gradient * A).clamp(min=0).mean(1).detach() @ R
    return R[:, 0]
