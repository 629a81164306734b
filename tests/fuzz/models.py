"""Small models for the rooms that run one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class ViT(nn.Module):
    """(B, 3, 8, 8) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 8, 4, 4), Attention(8, 2)
        self.place, self.head = nn.Parameter(torch.randn(1, 5, 8)), nn.Linear(8, 3)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([x.new_zeros(len(x), 1, 8), x], 1) + self.place
        return x + self.attention(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x)[:, 0])


class Detector(nn.Module):
    """(B, 3, 8, 8) -> logits (B, 3, 4), boxes (B, 3, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.classes, self.boxes = ViT(), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        x = self.vit.tokens(pixel_values)[:, :3]
        return {"logits": self.classes(x), "pred_boxes": self.boxes(x).sigmoid()}


def vit() -> ViT:
    torch.manual_seed(0)
    return ViT().eval()


def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()
