"""Trains the texture ViT: ``python -m tutorials.training.train_textures --out FILE``.

The defaults reproduce the packaged weights on a CPU, in under ten minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_attn.toy.texture_vit import build_texture_vit, save_texture_vit
from captum_attn.toy.textures import TextureBatch, textured_objects
from tutorials.training.loop import HELD_OUT_SEED, command, epochs_on_fresh_scenes

EPOCHS, IMAGES_PER_EPOCH = 8, 6_400


@torch.no_grad()
def accuracy(model: nn.Module, batch: TextureBatch) -> float:
    """Share of the images whose highest logit is the texture's, in evaluation mode.

    Args:
        model (nn.Module): from images ``(B, 3, 64, 64)`` to logits ``(B, 10)``.
        batch (TextureBatch): the images.

    Returns:
        float: in [0, 1].

    Examples::

        >>> accuracy(load_texture_vit(), textured_objects(1000, split="test"))
    """
    training = model.training
    model.eval()
    guess = torch.cat([model(images).argmax(1) for images in batch.images.split(250)])
    model.train(training)
    return (guess == batch.labels).float().mean().item()


def train(
    epochs: int = EPOCHS,
    images_per_epoch: int = IMAGES_PER_EPOCH,
    batch_size: int = 64,
    seed: int = 0,
    held_out: int = 1_000,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[VisionTransformer, float]]:
    """Trains a texture ViT and hands it out after every epoch. Equal arguments, equal weights.

    As :func:`tutorials.training.train_digits.train`, with one class per image.

    Args:
        epochs (int, optional): how often the model is measured and handed out.
        images_per_epoch (int, optional): fresh training images per epoch.
        batch_size (int, optional): images per step.
        seed (int, optional): seed of the initial weights and of all images. Default: 0.
        held_out (int, optional): images of the test split to measure on.
        device (torch.device or str, optional): where to train. Default: ``"cpu"``.

    Returns:
        Iterator of (VisionTransformer, float): the model, which goes on being trained, and its
        accuracy on the held-out images.

    Examples::

        >>> for model, held_out in train(epochs=2, images_per_epoch=640):
        ...     print(held_out)
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_texture_vit()
    test = textured_objects(held_out, "test", HELD_OUT_SEED, device)

    def loss(batch: TextureBatch) -> Tensor:
        return F.cross_entropy(model(batch.images), batch.labels)

    for _ in epochs_on_fresh_scenes(
        model, loss, model.blocks.parameters(), epochs, images_per_epoch, batch_size, seed, device,
        draw=textured_objects,
    ):  # fmt: skip
        yield model, accuracy(model, test)


def main() -> None:
    """The command line."""

    def said(held_out: float) -> str:
        return f"the texture is right in {held_out:.1%} of held-out images"

    about, epoch = "Train the texture ViT of the demo.", f"{IMAGES_PER_EPOCH:,} images"
    command(about, train, said, save_texture_vit, EPOCHS, epoch)


if __name__ == "__main__":
    main()
