"""What the training scripts of the demo share: steps on fresh scenes, optimisers, options.

Scenes are drawn afresh in every step, since a fixed set of them is learnt by heart. The weight
matrices of the blocks take Muon's orthogonalised steps, which here need a fraction of the scenes
that AdamW needs; embeddings, convolutions, heads, norms and biases take AdamW's. (Muon needs
torch 2.9.)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from captum_attn.toy.scenes import Split, scenes

Batch = TypeVar("Batch")
Model = TypeVar("Model")
Measured = TypeVar("Measured")
Draw = Callable[[int, Split, int, torch.device | str], Batch]  # of n, split, seed and device

MUON_RATE, ADAMW_RATE = 0.02, 2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # share of all steps
HELD_OUT_SEED = 10**6  # scenes of test digits, apart from the training seeds by their split


def epochs_on_fresh_scenes(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    blocks: Iterable[Tensor],
    epochs: int,
    scenes_per_epoch: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    draw: Draw[Batch] = scenes,  # type: ignore[assignment]  # then Batch is SceneBatch
) -> Iterator[int]:
    """Trains a model in place and yields after every epoch. Equal arguments, equal weights.

    The learning rates warm up linearly and fall to 0 along a cosine over all epochs, so only the
    last state is the finished one.

    Args:
        model (nn.Module): the model; it is moved to `device`.
        loss (callable): the scalar that is to fall, of a batch of training scenes.
        blocks (iterable of Tensor): parameters of the transformer's blocks.
        epochs (int): how often it yields.
        scenes_per_epoch (int): fresh training scenes per epoch.
        batch_size (int): scenes per step.
        seed (int): seed of all scenes.
        device (torch.device or str): where to train.
        draw (callable, optional): from n, split, seed and device to a batch. Default:
            :func:`~captum_attn.toy.scenes.scenes`.

    Returns:
        Iterator of int: the epoch that is over, from 1 on.

    Examples::

        >>> for epoch in epochs_on_fresh_scenes(model, loss, model.blocks.parameters(), ...):
        ...     print(epoch, accuracy(model, held_out))
    """
    model.to(device)
    optimizers = optimizers_of(model.parameters(), [p for p in blocks if p.ndim == 2])

    def drawn(step_seed: int) -> Tensor:
        return loss(draw(batch_size, "train", step_seed, device))

    yield from epochs_of(model, drawn, optimizers, epochs, scenes_per_epoch // batch_size, seed)


def epochs_of(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    optimizers: list[Optimizer],
    epochs: int,
    steps: int,
    seed: int,
) -> Iterator[int]:
    """The same for a loss that draws for itself.

    Args:
        loss (callable): the scalar that is to fall, from the seed of a step.
        optimizers (list of Optimizer): see :func:`optimizers_of`.
        steps (int): steps per epoch.
        model, epochs, seed: see :func:`epochs_on_fresh_scenes`.

    Returns:
        Iterator of int: the epoch that is over, from 1 on.
    """
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: _rate(s / (epochs * steps)))
        for o in optimizers
    ]
    for epoch in range(epochs):
        model.train()
        for step in tqdm(range(steps), f"epoch {epoch + 1}/{epochs}", leave=False):
            _update(model, loss(_step_seed(seed, epoch * steps + step)), optimizers)
            for schedule in schedules:
                schedule.step()
        yield epoch + 1


def optimizers_of(parameters: Iterable[Tensor], matrices: Sequence[Tensor]) -> list[Optimizer]:
    """Muon for the blocks' matrices, AdamW for the other parameters."""
    from torch.optim import Muon  # torch 2.9; the rest of the demo runs on older ones

    others = [p for p in parameters if all(p is not m for m in matrices)]
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


def command(
    description: str,
    train: Callable[..., Iterator[tuple[Model, Measured]]],
    said: Callable[[Measured], str],
    save: Callable[[Model, Path], None],
    epochs: int,
    epoch: str,
) -> None:
    """The command line of a training script: `--out`, `--epochs`, `--seed` and `--device`.

    Torch is confined to one thread, so that no sum's order, and no weight, depends on the number of
    cores. The model is saved after each epoch, so that a stopped run is not lost.

    Args:
        description (str): what the script does.
        train (callable): from epochs, seed and device to the model after every epoch, and what was
            measured on held-out scenes.
        said (callable): from what was measured to the words for it.
        save (callable): writes a model to a file.
        epochs (int): the default.
        epoch (str): what an epoch is, such as "12,000 scenes".

    Examples::

        >>> command("Train the digit ViT.", train, str, save_digit_vit, 16, "12,000 scenes")
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument(
        "--epochs", type=int, default=epochs, help=f"of {epoch} (default: {epochs})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained = train(epochs=args.epochs, seed=args.seed, device=args.device)
    for number, (model, measured) in enumerate(trained, 1):
        tqdm.write(f"epoch {number:3d}  {said(measured)}")
        save(model, args.out)
    print(f"wrote {args.out}")
