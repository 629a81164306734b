"""The plain matrix form of the methods on a timm ViT, as the field writes it by hand.

Eager attention, every map kept (and every gradient, where one is needed), then n x n products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def authors_generic_attention(model: nn.Module, images: Tensor, target: int) -> Tensor:
    """The same rule, run as GAE's authors run it.

    Every weight gets its gradient, the graph is retained, and the rule is itself recorded by
    autograd, because the maps still belong to the graph: one example at a time, (n,).
    """
    gradients: list[Tensor] = []
    with kept_maps(model) as maps:
        logits = model(images)
    for A in maps:
        A.register_hook(gradients.append)  # called from the last block to the first
    model.zero_grad()
    logits[:, target].sum().backward(retain_graph=True)
    R = torch.eye(maps[0].shape[-1], dtype=images.dtype, device=images.device)
    for A, gradient in zip(maps, reversed(gradients), strict=True):
        R = R + (gradient * A).clamp(min=0).mean((0, 1)) @ R
    return R[0].detach()


def vtranm(model: nn.Module, images: Tensor, target: int) -> Tensor:
    """C <- U C with U of Eq. 14 and 16, everything kept by hooks: (B, n), the class token's row."""
    kept: dict[tuple[nn.Module, str], Tensor] = {}

    def keep(name: str, what: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            kept[module, name] = inputs[0] if what == "in" else out

        return hook

    handles = []
    for block in model.blocks:
        handles += [
            block.norm1.register_forward_hook(keep("E", "in")),
            block.attn.qkv.register_forward_hook(keep("qkv", "out")),
            block.norm2.register_forward_hook(keep("E", "in")),
            block.mlp.register_forward_hook(keep("branch", "out")),
        ]
    try:
        with kept_maps(model) as maps:
            logits = model(images.detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(logits.softmax(-1)[:, target].sum(), maps)
    C = torch.diag_embed(kept[model.blocks[0].norm1, "E"].detach().norm(dim=-1))
    with torch.no_grad():
        for block, A, gradient in zip(model.blocks, maps, gradients, strict=True):
            heads = block.attn.num_heads
            V = kept[block.attn.qkv, "qkv"].chunk(3, -1)[2].unflatten(-1, (heads, -1))
            W = block.attn.proj.weight.T.unflatten(0, (heads, -1))
            after = torch.einsum("bnhd,hdm->bhnm", V, W)
            w = transformation(kept[block.norm1, "E"][:, None], after)
            U = (gradient.clamp(min=0) * A * w[:, :, None]).mean(1) + identity(A)
            C = U @ C
            C = (
                C
                * (1 + transformation(kept[block.norm2, "E"], kept[block.mlp, "branch"]))[..., None]
            )
    return C[:, 0]


def transformation(before: Tensor, after: Tensor) -> Tensor:
    """Eq. 12, 13: the ratio of lengths times NECC."""
    ratio = after.norm(dim=-1) / before.norm(dim=-1)
    return ratio * torch.cosine_similarity(before, after, dim=-1).softmax(-1)
