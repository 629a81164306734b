"""A plain timm ViT that names the texture of an object: one class per image, unlike the digits."""

from __future__ import annotations

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from captum_attn.toy.digit_vit import save_half, small_vit, with_weights

WEIGHTS = Path(__file__).parent / "weights" / "texture_vit.safetensors"


def build_texture_vit() -> VisionTransformer:
    """An untrained texture ViT of 0.32 M parameters, exactly as timm makes it.

    Returns:
        VisionTransformer: from images ``(B, 3, 64, 64)`` in [0, 1] to logits ``(B, 10)``, one
        class per image (softmax). 64 patches of 8 x 8 pixels and a class token, which the logits
        are read from.

    Examples::

        >>> logits = build_texture_vit()(torch.rand(2, 3, 64, 64))  # (2, 10)
    """
    return small_vit(in_chans=3, width=64, heads=4)


def load_texture_vit(weights: str | Path = WEIGHTS) -> VisionTransformer:
    """The trained texture ViT, in evaluation mode and float32.

    Args:
        weights (str or Path, optional): a safetensors file that ``train_textures`` wrote.
            Default: the weights in the package.

    Returns:
        VisionTransformer: :func:`build_texture_vit` with the weights loaded.

    Examples::

        >>> model = load_texture_vit()
        >>> batch = textured_objects(4, split="test", seed=0)
        >>> classes = model(batch.images).argmax(1)  # (4,)
    """
    return with_weights(build_texture_vit(), weights)


def save_texture_vit(model: VisionTransformer, path: str | Path) -> None:
    """Writes the weights in half precision.

    Args:
        model (VisionTransformer): a texture ViT.
        path (str or Path): the safetensors file to write.

    Returns:
        None

    Examples::

        >>> save_texture_vit(model, "texture_vit.safetensors")
    """
    save_half(model, path)
