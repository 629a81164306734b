"""The demo's image model: a plain timm ViT that names the two digits of a scene.

Its size and its files are shared with the texture ViT.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from captum_attn.toy.scenes import IMAGE_SIZE, NUM_CLASSES

WEIGHTS = Path(__file__).parent / "weights" / "digit_vit.safetensors"


def small_vit(in_chans: int, width: int, heads: int) -> VisionTransformer:
    """An untrained ViT of six blocks, exactly as timm makes it.

    Args:
        in_chans (int): channels of the images.
        width (int): length of a token's vector.
        heads (int): attention heads per block.

    Returns:
        VisionTransformer: from images ``(B, in_chans, 64, 64)`` to logits ``(B, 10)``; 64 patches
        of 8 x 8 pixels and a class token, which the logits are read from.

    Examples::

        >>> logits = small_vit(in_chans=3, width=64, heads=4)(torch.rand(2, 3, 64, 64))
    """
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=8,
        in_chans=in_chans,
        num_classes=NUM_CLASSES,
        embed_dim=width,
        depth=6,
        num_heads=heads,
        class_token=True,
        global_pool="token",
    )


def with_weights(model: VisionTransformer, weights: str | Path) -> VisionTransformer:
    """The model with the weights of a file, in evaluation mode and float32."""
    model.load_state_dict({name: w.float() for name, w in load_file(weights).items()})
    return model.eval()


def save_half(model: VisionTransformer, path: str | Path) -> None:
    """Writes a model's weights in half precision."""
    half = {name: w.detach().cpu().to(torch.float16) for name, w in model.state_dict().items()}
    save_file(half, path)


def build_digit_vit() -> VisionTransformer:
    """An untrained digit ViT of 0.68 M parameters, exactly as timm makes it.

    The patch embedding does not overlap, so that every pixel belongs to one token and a map per
    patch is exact.

    Returns:
        VisionTransformer: from images ``(B, 1, 64, 64)`` in [0, 1] to logits ``(B, 10)``, one
        independent "is this digit shown?" each (multi-label: sigmoid, not softmax). 64 patches
        of 8 x 8 pixels and a class token, which the logits are read from.

    Examples::

        >>> model = build_digit_vit()
        >>> logits = model(torch.rand(2, 1, 64, 64))  # (2, 10)
    """
    return small_vit(in_chans=1, width=96, heads=6)


def load_digit_vit(weights: str | Path = WEIGHTS) -> VisionTransformer:
    """The trained digit ViT, in evaluation mode and float32.

    Both digits are its two highest logits in 95 % of scenes of held-out digits.

    Args:
        weights (str or Path, optional): a safetensors file that ``train_digits`` wrote.
            Default: the weights in the package.

    Returns:
        VisionTransformer: :func:`build_digit_vit` with the weights loaded.

    Examples::

        >>> model = load_digit_vit()
        >>> batch = scenes(4, split="test", seed=0)
        >>> pairs = model(batch.images).topk(2).indices  # (4, 2)
    """
    return with_weights(build_digit_vit(), weights)


def save_digit_vit(model: VisionTransformer, path: str | Path) -> None:
    """Writes the weights in half precision: half the bytes, about 0.1 % of accuracy lost.

    Args:
        model (VisionTransformer): a digit ViT.
        path (str or Path): the safetensors file to write.

    Returns:
        None

    Examples::

        >>> save_digit_vit(model, "digit_vit.safetensors")
    """
    save_half(model, path)
