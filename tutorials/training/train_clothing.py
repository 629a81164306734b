"""Trains the clothing ViT: ``python -m tutorials.training.train_clothing --out FILE``.

It needs the whole set, Debian's package ``dataset-fashion-mnist``. The packaged weights are those
that the defaults have saved after their third epoch, while the learning rate is still falling, with
81.7 % of the test pictures right. A finished run of more epochs may well be better.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_attn.toy.clothing import CLOTHES, SIDE, Clothing, clothing, first_parts
from captum_attn.toy.clothing_vit import build_clothing_vit, save_clothing_vit
from captum_attn.toy.scenes import Split
from tutorials.training.loop import command, epochs_on_fresh_scenes

EPOCHS, PICTURES_PER_EPOCH = 4, 60_000
SHIFT = 2  # pixels, at most
CUT = 8  # one of so many pictures is cut together of two


class Drawn(NamedTuple):
    """Training pictures, and the share of each class in them."""

    images: Tensor  # (B, 1, 28, 28)
    shares: Tensor  # (B, 10)


def drawn(n: int, split: Split, seed: int, device: torch.device | str) -> Drawn:
    """Pictures of the set, mirrored and shifted by chance, every eighth cut together of two."""
    images, labels = clothing(split)
    rng = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(labels), (n,), generator=rng)
    mirrored = torch.randint(2, (n, 1, 1, 1), generator=rng) == 0
    found = torch.where(mirrored, images[picks].flip(3), images[picks])
    down, right = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=rng)
    rows, columns = (torch.arange(SIDE) + step for step in (down, right))  # (n, 28) each
    padded = F.pad(found[:, 0], [SHIFT] * 4)
    found = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]][:, None]
    shares = F.one_hot(labels[picks], len(CLOTHES)).float()
    first = torch.ones(n, SIDE, SIDE, dtype=torch.bool)
    first[: n // CUT] = first_parts(n // CUT, rng)
    share = first.float().mean((1, 2))[:, None]
    found = torch.where(first[:, None], found, found.roll(1, 0))
    return Drawn(found.to(device), (share * shares + (1 - share) * shares.roll(1, 0)).to(device))


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Clothing) -> float:
    """Share of the pictures whose highest logit is the label's, in evaluation mode.

    Args:
        model (nn.Module): from images ``(B, 1, 28, 28)`` to logits ``(B, 10)``.
        pictures (Clothing): the pictures.

    Returns:
        float: in [0, 1].

    Examples::

        >>> accuracy(load_clothing_vit(), clothing("test"))
    """
    training = model.training
    model.eval()
    guess = torch.cat([model(images).argmax(1) for images in pictures.images.split(250)])
    model.train(training)
    return (guess == pictures.labels.to(guess.device)).float().mean().item()


def train(
    epochs: int = EPOCHS,
    pictures_per_epoch: int = PICTURES_PER_EPOCH,
    batch_size: int = 64,
    seed: int = 0,
    held_out: int = 10_000,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[VisionTransformer, float]]:
    """Trains a clothing ViT and hands it out after every epoch. Equal arguments, equal weights.

    As :func:`tutorials.training.train_digits.train`, with one class per picture, or the shares of
    two.

    Args:
        epochs (int, optional): how often the model is measured and handed out.
        pictures_per_epoch (int, optional): training pictures per epoch, drawn by chance.
        batch_size (int, optional): pictures per step.
        seed (int, optional): seed of the initial weights and of all draws. Default: 0.
        held_out (int, optional): test pictures to measure on.
        device (torch.device or str, optional): where to train. Default: ``"cpu"``.

    Returns:
        Iterator of (VisionTransformer, float): the model, which goes on being trained, and its
        accuracy on the test pictures.

    Examples::

        >>> for model, held_out in train(epochs=2, pictures_per_epoch=640):
        ...     print(held_out)
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_clothing_vit()
    test = Clothing(*(part[:held_out].to(device) for part in clothing("test")))

    def loss(batch: Drawn) -> Tensor:
        return F.cross_entropy(model(batch.images), batch.shares)

    for _ in epochs_on_fresh_scenes(
        model, loss, model.blocks.parameters(), epochs, pictures_per_epoch, batch_size, seed,
        device, draw=drawn,
    ):  # fmt: skip
        yield model, accuracy(model, test)


def main() -> None:
    """The command line."""

    def said(held_out: float) -> str:
        return f"the class is right in {held_out:.1%} of test pictures"

    about, epoch = "Train the clothing ViT.", f"{PICTURES_PER_EPOCH:,} pictures"
    command(about, train, said, save_clothing_vit, EPOCHS, epoch)


if __name__ == "__main__":
    main()
