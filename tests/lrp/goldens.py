"""The models of the stored cases, with their inputs and the authors' numbers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "goldens" / "lrp"


def read(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, expected)."""
    return load_file(FOLDER / case / "inputs.safetensors"), load_file(
        FOLDER / case / "expected.safetensors"
    )


def hugging_face(case: str, attention: str) -> nn.Module:
    import transformers

    config = json.loads((FOLDER / case / "config.json").read_text())
    settings = getattr(transformers, config["config_class"])(**config["kwargs"])
    settings._attn_implementation = attention
    model = getattr(transformers, config["class"])(settings)
    model = model.double()  # some weights are stored in float64
    weights = load_file(FOLDER / case / "weights.safetensors")
    missing = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"}
    assert not missing.unexpected_keys and set(missing.missing_keys) <= tied, missing
    model.tie_weights()
    return model.eval()


def timm_vit(fused: bool) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    case = FOLDER / "chefer_vit_grid4"
    kwargs: dict[str, Any] = json.loads((case / "config.json").read_text())["kwargs"]
    kwargs["norm_layer"] = functools.partial(nn.LayerNorm, eps=1e-6)
    model = VisionTransformer(**kwargs)
    model.load_state_dict(load_file(case / "weights.safetensors"))
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model.double().eval()


def error(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest entry."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def each(method: Any, inputs: Tensor, targets: list[Any], tokens: bool, **options: Any) -> Tensor:
    """(B, targets, ...): what a method gives for several targets of one forward pass."""
    if not tokens:
        return torch.stack(list(method.attribute_each(inputs, targets, **options)), 1)
    found = method.attribute_tokens_each(inputs, targets, **options)
    return torch.stack([next(iter(rows.values())) for rows in found], 1)
