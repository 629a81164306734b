"""Does the relevance of a detection lie on the detected digit? Held-out scenes, every detection.

    python -m tests.benchmarks.detector_share            # 500 scenes, about 1,000 detections
    python -m tests.benchmarks.detector_share --scenes 40 --methods GenericAttention

A detection is a query with a probability over one half; it detects the digit whose box it overlaps
best, if by an intersection over union of one half or more. Request is the logit of its class.
Only positive relevance counts. Standard errors are over scenes, because two detections in one
scene are not independent.

Two rows are no methods: "chance" spreads relevance evenly over the scene, and "ink per token" is
the detected digit's own ink at the resolution of the maps, 8 x 8 tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

import captum_attn
from captum_attn.toy.digit_detr import digit_boxes, load_digit_detr
from captum_attn.toy.scenes import SceneBatch, scenes
from tests.benchmarks.digit_share import mean_and_error, shares
from tutorials.training.loop import HELD_OUT_SEED
from tutorials.training.train_detector import average_precision

METHODS = {
    "RawAttention": ("RawAttention", {}),
    "AttentionRollout": ("AttentionRollout", {}),
    "GenericAttention": ("GenericAttention", {}),
    "Heterogenous, positive": ("HeterogenousAttention", {}),
    "Heterogenous, positive, noise_link": ("HeterogenousAttention", {"noise_link": True}),
    "Heterogenous, absolute": ("HeterogenousAttention", {"correction": "absolute"}),
    "Heterogenous, absolute, noise_link": (
        "HeterogenousAttention",
        {"correction": "absolute", "noise_link": True},
    ),
    "Heterogenous, full": ("HeterogenousAttention", {"correction": "full"}),
}
OVERLAP = 0.5
BATCH = 25


class Detections(NamedTuple):
    """Detections of all scenes that overlap a digit; D of them.

    Attributes:
        scene (Tensor): (D,), which scene.
        query (Tensor): (D,), which query.
        label (Tensor): (D,), the class with the highest probability.
        regions (Tensor): (D, 3, H, W), the detected digit's ink, the other digit's ink, and the
            detected digit's box.
        astray (int): how many detections overlap no digit; they are in none of the others.
    """

    scene: Tensor
    query: Tensor
    label: Tensor
    regions: Tensor
    astray: int


@torch.no_grad()
def detect(model: nn.Module, batch: SceneBatch, threshold: float = 0.5) -> Detections:
    outputs = [model(images) for images in batch.images.split(BATCH)]
    scores, labels = torch.cat([o.logits for o in outputs]).sigmoid().max(-1)  # (B, Q)
    found = box_convert(torch.cat([o.pred_boxes for o in outputs]), "cxcywh", "xyxy")
    truth = box_convert(digit_boxes(batch.masks), "cxcywh", "xyxy")
    overlap = torch.stack([box_iou(f, t) for f, t in zip(found, truth, strict=True)])  # (B, Q, 2)
    best, digit = overlap.max(-1)
    shown = scores > threshold
    scene, query = (shown & (best >= OVERLAP)).nonzero(as_tuple=True)
    digit = digit[scene, query]
    ink = batch.masks[scene, digit]
    regions = torch.stack([ink, batch.masks[scene, 1 - digit], box_of(ink)], 1)
    astray = int(shown.sum()) - len(scene)
    return Detections(scene, query, labels[scene, query], regions, astray)


def box_of(ink: Tensor) -> Tensor:
    """The smallest rectangle around every mask (D, H, W), bool."""

    def between_ends(line: Tensor) -> Tensor:
        counted = line.long()
        return (counted.cumsum(-1) > 0) & (counted.flip(-1).cumsum(-1).flip(-1) > 0)

    return between_ends(ink.any(-1))[:, :, None] & between_ends(ink.any(-2))[:, None]


def attributed(method: Callable, options: dict, batch: SceneBatch, found: Detections) -> Tensor:
    """Maps (D, H, W) of all detections."""
    maps = []
    for part in torch.arange(len(found.scene)).split(BATCH):
        target = list(zip(found.query[part].tolist(), found.label[part].tolist(), strict=True))
        inputs = {"pixel_values": batch.images[found.scene[part]]}
        maps.append(method.attribute(inputs, target=target, **options)["pixel_values"].sum(1))
    return torch.cat(maps)


def per_scene(values: Tensor, scene: Tensor) -> Tensor:
    """Means (S, n) of values (D, n) over the detections of every scene that has any."""
    _, index = scene.unique(return_inverse=True)
    sums = values.new_zeros(int(index.max()) + 1, values.shape[1]).index_add_(0, index, values)
    return sums / index.bincount()[:, None]


def row(name: str, maps: Tensor, found: Detections) -> str:
    on = shares(maps, found.regions).double()  # (D, 3)
    ahead = (on[:, 0] > on[:, 1]).double()
    columns = per_scene(torch.cat([on, ahead[:, None]], 1), found.scene).unbind(1)
    cells = ("{:.1f} ± {:.1f} %".format(*(100 * x for x in mean_and_error(c))) for c in columns)
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ap-scenes", type=int, default=3_000, help="to measure the detector on")
    parser.add_argument("--weights", help="of the detector (default: those in the package)")
    options = parser.parse_args(arguments)

    model = load_digit_detr(*filter(None, [options.weights]))
    batch = scenes(options.scenes, split="test", seed=options.seed)
    precision = average_precision(model, scenes(options.ap_scenes, "test", HELD_OUT_SEED))
    found = detect(model, batch)
    right = (found.label[:, None] == batch.labels[found.scene]).any(1)
    print(
        f"AP on {options.ap_scenes} held-out scenes: {precision.at_50:.3f} at IoU 0.5, "
        f"{precision.coco:.3f} over 0.5 to 0.95\n"
        f"{options.scenes} other held-out scenes: {len(found.scene)} detections on a digit "
        f"({right.double().mean():.1%} named right), {found.astray} on none\n"
    )
    print("| method | detected digit's ink | other digit's ink | detected digit's box | ahead |")
    print("|---|---|---|---|---|")
    ink = found.regions[:, :1].float()
    tokens = F.interpolate(F.avg_pool2d(ink, 8), ink.shape[-2:], mode="bilinear")[:, 0]
    print(row("chance", torch.ones_like(tokens), found))
    print(row("ink per token", tokens, found))
    # One object per class: the model is observed once for all of its options.
    methods = {c: getattr(captum_attn, c)(model) for c, _ in METHODS.values()}
    for name in options.methods:
        method, settings = METHODS[name]
        maps = attributed(methods[method], settings, batch, found)
        print(row(name, maps, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
