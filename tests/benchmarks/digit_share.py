"""Does the map move with the question? Held-out scenes of two digits, each asked about both.

    python -m tests.benchmarks.digit_share            # 500 scenes, 1,000 questions
    python -m tests.benchmarks.digit_share --scenes 40 --methods GenericAttention Saliency
    python -m tests.benchmarks.digit_share --pictures clothing

Or test photographs of two pieces of clothing, cut together along a border between patches; what is
said of a digit's ink then goes for a piece's part of the picture.

A question is right if the asked digit's ink holds more relevance than the other digit's ink. A
method that cannot tell the two apart is right in exactly half of the questions. Only positive
relevance counts. Standard errors are over scenes, because the two questions about one scene are
not independent.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import captum.attr
import torch
from torch import Tensor

import captum_attn
from captum_attn.toy.clothing import clothing_pairs
from captum_attn.toy.clothing_vit import load_clothing_vit
from captum_attn.toy.digit_vit import load_digit_vit
from captum_attn.toy.scenes import scenes

DEFAULT = (
    "RawAttention",
    "AttentionRollout",
    "GenericAttention",
    "VTranM",
    "HeterogenousAttention",
    "IntegratedGradients",
)
BATCH = 50


class Share(NamedTuple):
    """Results of one method, each as (mean, standard error)."""

    right: tuple[float, float]
    asked: tuple[float, float]
    other: tuple[float, float]


def find(name: str) -> type:
    """The class of that name in captum_attn or captum.attr."""
    for package in (captum_attn, captum.attr):
        if hasattr(package, name):
            return getattr(package, name)
    raise SystemExit(f"no method {name!r} in captum_attn or captum.attr")


def mean_and_error(per_scene: Tensor) -> tuple[float, float]:
    return float(per_scene.mean()), float(per_scene.std() / len(per_scene) ** 0.5)


def shares(relevance: Tensor, masks: Tensor) -> Tensor:
    """Shares (B, 2) of the positive relevance (B, H, W) on either mask (B, 2, H, W)."""
    positive = relevance.clamp(min=0)
    total = positive.sum((-2, -1))[:, None].clamp(min=torch.finfo(positive.dtype).tiny)
    return (positive[:, None] * masks).sum((-2, -1)) / total


def evaluate(method: type, model: torch.nn.Module, batch) -> Share:
    attribution = method(model)
    on_masks = []
    for images, labels, masks in zip(
        batch.images.split(BATCH), batch.labels.split(BATCH), batch.masks.split(BATCH), strict=True
    ):
        asked_twice = [
            shares(attribution.attribute(images, target=labels[:, k]).detach().sum(1), masks)
            for k in (0, 1)
        ]
        on_masks.append(torch.stack(asked_twice, 1))
    found = torch.cat(on_masks).double()  # (B, asked, on)
    asked = torch.stack([found[:, 0, 0], found[:, 1, 1]], 1)
    other = torch.stack([found[:, 0, 1], found[:, 1, 0]], 1)
    right = (asked > other).double()
    return Share(*(mean_and_error(values.mean(1)) for values in (right, asked, other)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    present = [n for n in DEFAULT if hasattr(captum_attn, n) or hasattr(captum.attr, n)]
    parser.add_argument("--methods", nargs="+", default=present, metavar="NAME")
    parser.add_argument("--pictures", choices=("digits", "clothing"), default="digits")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    if options.pictures == "digits":
        model, batch = load_digit_vit(), scenes(options.scenes, split="test", seed=options.seed)
        named = "held-out scenes; the model names both digits"
    else:
        model, batch = load_clothing_vit(), clothing_pairs(options.scenes, options.seed)
        named = "pairs of test pictures; the model names both pieces"
    with torch.no_grad():
        pairs = torch.cat([model(images).topk(2).indices for images in batch.images.split(BATCH)])
    both = (pairs.sort(1).values == batch.labels.sort(1).values).all(1).double().mean()
    print(f"{options.scenes} {named} in {both:.1%}\n")
    thing = "digit" if options.pictures == "digits" else "piece"
    print(f"| method | asked {thing} ahead | relevance on the asked {thing} | on the other |")
    print("|---|---|---|---|")
    for name in options.methods:
        share = evaluate(find(name), model, batch)
        right, asked, other = (f"{100 * mean:.1f} ± {100 * error:.1f} %" for mean, error in share)
        print(f"| {name} | {right} | {asked} | {other} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
