"""Trains the digit ViT: ``python -m tutorials.training.train_digits --out FILE``.

The defaults reproduce the packaged weights on a CPU, in twenty minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_attn.toy.digit_vit import build_digit_vit, save_digit_vit
from captum_attn.toy.scenes import SceneBatch, scenes
from tutorials.training.loop import HELD_OUT_SEED, command, epochs_on_fresh_scenes

EPOCHS, SCENES_PER_EPOCH = 16, 12_000


class Accuracy(NamedTuple):
    """How often both digits are right.

    Attributes:
        top2 (float): share of scenes whose two highest logits are the two digits.
        exact (float): share of scenes in which exactly the two digits have a probability
            over one half.
    """

    top2: float
    exact: float


@torch.no_grad()
def accuracy(model: nn.Module, batch: SceneBatch) -> Accuracy:
    """Measures a model on scenes, in evaluation mode.

    Args:
        model (nn.Module): from images ``(B, 1, 64, 64)`` to logits ``(B, 10)``.
        batch (SceneBatch): the scenes.

    Returns:
        Accuracy: top2 and exact, both in [0, 1].

    Examples::

        >>> accuracy(load_digit_vit(), scenes(1000, split="test"))
    """
    training = model.training
    model.eval()
    logits = torch.cat([model(images) for images in batch.images.split(250)])
    model.train(training)
    shown = batch.multi_hot.bool()
    top2 = torch.zeros_like(shown).scatter_(1, logits.topk(2).indices, True)
    exact = logits > 0  # a probability over one half
    return Accuracy(*((guess == shown).all(1).float().mean().item() for guess in (top2, exact)))


def train(
    epochs: int = EPOCHS,
    scenes_per_epoch: int = SCENES_PER_EPOCH,
    batch_size: int = 64,
    seed: int = 0,
    held_out: int = 1_000,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[VisionTransformer, Accuracy]]:
    """Trains a digit ViT and hands it out after every epoch. Equal arguments, equal weights.

    The learning rates warm up linearly and fall to 0 along a cosine over all epochs, so only the
    last model is the finished one. The global random state is left as it was.

    Args:
        epochs (int, optional): how often the model is measured and handed out.
        scenes_per_epoch (int, optional): fresh training scenes per epoch.
        batch_size (int, optional): scenes per step.
        seed (int, optional): seed of the initial weights and of all scenes. Default: 0.
        held_out (int, optional): scenes of test digits to measure on.
        device (torch.device or str, optional): where to train. Default: ``"cpu"``.

    Returns:
        Iterator of (VisionTransformer, Accuracy): the model, which goes on being trained, and its
        accuracy on the held-out scenes.

    Examples::

        >>> for model, held_out in train(epochs=2, scenes_per_epoch=640):
        ...     print(held_out.top2)
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_digit_vit()
    test = scenes(held_out, "test", HELD_OUT_SEED, device)

    def loss(batch: SceneBatch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch.images), batch.multi_hot)

    for _ in epochs_on_fresh_scenes(
        model, loss, model.blocks.parameters(), epochs, scenes_per_epoch, batch_size, seed, device
    ):
        yield model, accuracy(model, test)


def main() -> None:
    """The command line."""

    def said(held_out: Accuracy) -> str:
        return (
            f"both digits right in {held_out.top2:.1%} of held-out scenes, "
            f"exactly these two over one half in {held_out.exact:.1%}"
        )

    about, epoch = "Train the digit ViT of the demo.", f"{SCENES_PER_EPOCH:,} scenes"
    command(about, train, said, save_digit_vit, EPOCHS, epoch)


if __name__ == "__main__":
    main()
