"""Trains the digit ViT: ``python -m captum_attn.demo.train_digits --out FILE``.

Scenes are drawn afresh in every step, since a fixed set of them is learnt by heart. The weight
matrices of the blocks take Muon's orthogonalised steps, which here need a fraction of the scenes
that AdamW needs; embeddings, head, norms and biases take AdamW's. (Muon needs torch 2.9.)

The defaults reproduce the packaged weights on a CPU, in twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from .digit_vit import build_digit_vit, save_digit_vit
from .scenes import SceneBatch, scenes

MUON_RATE, ADAMW_RATE = 0.02, 2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # share of all steps
HELD_OUT_SEED = 10**6  # scenes of test digits, apart from the training seeds by their split


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
    epochs: int = 16,
    scenes_per_epoch: int = 12_000,
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
        model = build_digit_vit().to(device)
    steps = scenes_per_epoch // batch_size
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: _rate(s / (epochs * steps)))
        for o in optimizers
    ]
    test = scenes(held_out, "test", HELD_OUT_SEED, device)
    for epoch in range(epochs):
        model.train()
        for step in tqdm(range(steps), f"epoch {epoch + 1}/{epochs}", leave=False):
            batch = scenes(batch_size, "train", _step_seed(seed, epoch * steps + step), device)
            loss = F.binary_cross_entropy_with_logits(model(batch.images), batch.multi_hot)
            _update(model, loss, optimizers)
            for schedule in schedules:
                schedule.step()
        yield model, accuracy(model, test)


def _optimizers(model: VisionTransformer) -> list[Optimizer]:
    from torch.optim import Muon  # torch 2.9; the rest of the demo runs on older ones

    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY),
        AdamW(groups, lr=ADAMW_RATE, betas=(0.9, 0.95)),
    ]


def _rate(progress: float) -> float:
    """Learning rate relative to its peak, after a share of all steps."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def _step_seed(seed: int, step: int) -> int:
    return seed * 10**7 + step


def _update(model: nn.Module, loss: Tensor, optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the digit ViT of the demo.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=16, help="of 12,000 scenes (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args()
    # One thread, so that no sum's order, and no weight, depends on the number of cores.
    torch.set_num_threads(1)
    for epoch, (model, held_out) in enumerate(
        train(epochs=args.epochs, seed=args.seed, device=args.device), 1
    ):
        tqdm.write(
            f"epoch {epoch:3d}  both digits right in {held_out.top2:.1%} of held-out scenes, "
            f"exactly these two over one half in {held_out.exact:.1%}"
        )
        save_digit_vit(model, args.out)  # also after each epoch, so that a stopped run is not lost
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
