"""What a run changes on the model, while it lasts and no longer."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from captum_attn import GenericAttention


@pytest.mark.parametrize("fails", [False, True])
def test_every_weight_is_frozen_while_the_model_runs(fails):
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
    ).eval()
    model.pos_embed.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    during = []

    def look(module, inputs, output):
        during.append([p.requires_grad for p in model.parameters()])
        if fails:
            raise RuntimeError("in the middle")

    model.register_forward_hook(look)
    explain = GenericAttention(model)
    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            explain.attribute(torch.randn(1, 3, 16, 16), target=0)
    else:
        explain.attribute(torch.randn(1, 3, 16, 16), target=0)
    assert during and not any(map(any, during))
    assert [p.requires_grad for p in model.parameters()] == before
