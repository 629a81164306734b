"""Trains the digit detector: ``python -m tutorials.training.train_detector --out FILE``.

The defaults reproduce the packaged weights on a CPU, in sixteen minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from transformers import ConditionalDetrForObjectDetection

from captum_attn.toy.digit_detr import build_digit_detr, digit_boxes, save_digit_detr
from captum_attn.toy.scenes import NUM_CLASSES, SceneBatch, scenes
from tutorials.training.loop import HELD_OUT_SEED, command, epochs_on_fresh_scenes

EPOCHS, SCENES_PER_EPOCH = 12, 12_000


class AveragePrecision(NamedTuple):
    """COCO's average precision, the mean over the ten digits.

    Attributes:
        at_50 (float): a detection is right from an intersection over union of 0.5 on.
        coco (float): mean over the thresholds 0.5, 0.55, ..., 0.95.
    """

    at_50: float
    coco: float


@torch.no_grad()
def average_precision(
    model: ConditionalDetrForObjectDetection, batch: SceneBatch
) -> AveragePrecision:
    """Measures a detector on scenes, in evaluation mode, with torchmetrics and pycocotools.

    Every query counts once for every digit, with its probability as score.

    Args:
        model (ConditionalDetrForObjectDetection): a digit detector.
        batch (SceneBatch): the scenes.

    Returns:
        AveragePrecision: at_50 and coco, both in [0, 1].

    Examples::

        >>> average_precision(load_digit_detr(), scenes(1000, split="test"))
    """
    training = model.training
    model.eval()
    outputs = [model(images) for images in batch.images.split(250)]
    model.train(training)
    scores = torch.cat([output.logits for output in outputs]).sigmoid()  # (B, Q, 10)
    boxes = torch.cat([output.pred_boxes for output in outputs])  # (B, Q, 4)
    digits = torch.arange(NUM_CLASSES, device=boxes.device).repeat(boxes.shape[1])
    found = [
        {"boxes": b.repeat_interleave(NUM_CLASSES, 0), "scores": s.flatten(), "labels": digits}
        for b, s in zip(boxes, scores, strict=True)
    ]
    truth = [
        {"boxes": b, "labels": d}
        for b, d in zip(digit_boxes(batch.masks), batch.labels, strict=True)
    ]
    metric = MeanAveragePrecision(box_format="cxcywh", backend="pycocotools")
    metric.update(found, truth)
    result = metric.compute()
    return AveragePrecision(at_50=result["map_50"].item(), coco=result["map"].item())


def train(
    epochs: int = EPOCHS,
    scenes_per_epoch: int = SCENES_PER_EPOCH,
    batch_size: int = 64,
    seed: int = 0,
    held_out: int = 1_000,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[ConditionalDetrForObjectDetection, AveragePrecision]]:
    """Trains a digit detector and hands it out after every epoch. Equal arguments, equal weights.

    The loss is the model's own: Hungarian matching, then focal loss of the digits, and L1 and
    generalised intersection over union of the boxes. Only the last model is the finished one, see
    ``_training``. The global random state is left as it was.

    Args:
        epochs (int, optional): how often the model is measured and handed out.
        scenes_per_epoch (int, optional): fresh training scenes per epoch.
        batch_size (int, optional): scenes per step.
        seed (int, optional): seed of the initial weights and of all scenes. Default: 0.
        held_out (int, optional): scenes of test digits to measure on.
        device (torch.device or str, optional): where to train. Default: ``"cpu"``.

    Returns:
        Iterator of (ConditionalDetrForObjectDetection, AveragePrecision): the model, which goes on
        being trained, and its average precision on the held-out scenes.

    Examples::

        >>> for model, held_out in train(epochs=2, scenes_per_epoch=640):
        ...     print(held_out.at_50)
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_digit_detr()
    test = scenes(held_out, "test", HELD_OUT_SEED, device)
    blocks = [*model.model.encoder.layers.parameters(), *model.model.decoder.layers.parameters()]

    def loss(batch: SceneBatch) -> Tensor:
        truth = [
            {"class_labels": digits, "boxes": boxes}
            for digits, boxes in zip(batch.labels, digit_boxes(batch.masks), strict=True)
        ]
        with torch.random.fork_rng(devices=[]):  # transformers 4 draws for a layer drop of 0 too
            return model(batch.images, labels=truth).loss

    for _ in epochs_on_fresh_scenes(
        model, loss, blocks, epochs, scenes_per_epoch, batch_size, seed, device
    ):
        yield model, average_precision(model, test)


def main() -> None:
    """The command line."""

    def said(held_out: AveragePrecision) -> str:
        return (
            f"on held-out scenes AP {held_out.at_50:.3f} at IoU 0.5, "
            f"{held_out.coco:.3f} over 0.5 to 0.95"
        )

    about, epoch = "Train the digit detector of the demo.", f"{SCENES_PER_EPOCH:,} scenes"
    command(about, train, said, save_digit_detr, EPOCHS, epoch)


if __name__ == "__main__":
    main()
