"""Table 1 of GAE and Tables 1 and 2 of arXiv 2605.27458 in small: masks from a detector's maps.

    python -m tests.benchmarks.detr_tables            # 500 scenes, about 1,000 detections
    python -m tests.benchmarks.detr_tables --scenes 40 --resamples 20

The detector was trained on boxes of digits only. Every detection (a probability over one half) is
explained, its map on the 8 x 8 tokens is cut by a threshold (Otsu's, and 0.3 times that, which is
the second of arXiv 2605.27458), and GAE's Algorithm 1 makes a mask of it. COCO's average precision
and recall hold the masks to the digits, over the intersections over union from 0.2 to 0.95.

What a mask is held to is either the digit's ink or the whole box around it. On COCO objects fill
much of their boxes; a digit's strokes are thinner than a token, so no map of 8 x 8 tokens can
outline them. "ink per token" is no method: it is the digit's own ink at the resolution of the maps,
cut in the same way, a yardstick and no bound. Only positive relevance counts: thresholds are of the
map scaled to [0, 1], where one very negative token would move them all.

Digits are of one size, so there is no table by size. In per cent; standard errors by a bootstrap
over scenes, in which all methods see the same ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from tqdm import tqdm

from captum_attn import GenericAttention, VTranM
from captum_attn.detection import Detections, explain_detections
from captum_attn.metrics import RandomAttribution, coco_bootstrap, coco_results, query_masks
from captum_attn.metrics.coco import coco_average_precision
from captum_attn.toy.digit_detr import load_digit_detr
from captum_attn.toy.scenes import IMAGE_SIZE, NUM_CLASSES, SceneBatch, scenes
from tests.benchmarks import detector_share

OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    name: (getattr(detector_share.captum_attn, kind), options)
    for name, (kind, options) in detector_share.METHODS.items()
}
METHODS = OURS | {
    "VTranM": (VTranM, {}),
    "IntegratedGradients, n_steps=20": (IntegratedGradients, {"n_steps": 20}),
    "RandomAttribution": (RandomAttribution, {}),
}
THRESHOLDS = ("otsu", "0.3otsu")
TRUTHS = ("box", "ink")
COLUMNS = ("AP", "AR")
GRID = (8, 8)
BATCH = 25


class Found(NamedTuple):
    """What was detected in one scene, with the maps of it on the tokens (n, 8, 8)."""

    labels: Tensor
    scores: Tensor
    maps: Tensor


def explained(method: Any, options: dict[str, Any], images: Tensor) -> list[Found]:
    """The detections of every scene."""
    found = []
    for some in images.split(BATCH):
        found += explain_detections(method, some, **options)
    return [Found(one.labels, one.scores, on_tokens(one).clamp(min=0)) for one in found]


def on_tokens(found: Detections) -> Tensor:
    """(n, 8, 8): the tokens' own relevance, or the mean of the pixels' over each token."""
    if found.grid is not None:
        return found.grid.detach()
    return F.adaptive_avg_pool2d(found.maps, GRID) if len(found) else found.maps.new_zeros(0, *GRID)


def truth_of(batch: SceneBatch, kind: str) -> Tensor:
    """The objects' masks (B, 2, H, W): ink, or the box around it."""
    if kind == "ink":
        return batch.masks
    return detector_share.box_of(batch.masks.flatten(0, 1)).view_as(batch.masks)


def annotations(masks: Tensor, labels: Tensor) -> dict[str, Any]:
    """COCO's annotations of objects (B, K, H, W) and their classes (B, K)."""
    objects = []
    for image, (own, classes) in enumerate(zip(masks, labels, strict=True)):
        for mask, one in zip(own, coco_results(image, own, classes, [1.0] * len(own)), strict=True):
            objects.append(
                {**one, "id": len(objects) + 1, "area": int(mask.sum()), "iscrowd": 0, "bbox": []}
            )
    return {
        "images": [{"id": i, "height": IMAGE_SIZE, "width": IMAGE_SIZE} for i in range(len(masks))],
        "annotations": objects,
        "categories": [{"id": c, "name": str(c)} for c in range(NUM_CLASSES)],
    }


def results(found: list[Found], threshold: str) -> list[dict[str, Any]]:
    """Algorithm 1 on every scene, in COCO's format."""
    made = []
    for image, one in enumerate(found):
        masks = query_masks(one.maps, (IMAGE_SIZE, IMAGE_SIZE), threshold=threshold)
        made += coco_results(image, masks, one.labels, one.scores)
    return made


def ink_per_token(found: list[Found], batch: SceneBatch) -> list[Found]:
    """The detections with their digits' ink as maps; those of no digit of the scene with none."""
    made = []
    for one, labels, masks in zip(found, batch.labels, batch.masks, strict=True):
        right = (one.labels[:, None] == labels).double()  # (n, 2)
        ink = F.adaptive_avg_pool2d(masks.double(), GRID)  # (2, 8, 8)
        made.append(one._replace(maps=torch.einsum("nk,khw->nhw", right, ink)))
    return made


class Cell(NamedTuple):
    """A number, and the same over resampled scenes (R,)."""

    value: float
    drawn: Tensor

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * float(self.drawn.std()):.1f}"


def cells(truths: dict[str, Any], made: list[dict[str, Any]], resamples: int) -> list[Cell]:
    """AP and AR, against every truth."""
    row = []
    for truth in truths.values():
        whole = coco_average_precision(truth, made)
        drawn = coco_bootstrap(truth, made, resamples=resamples)
        row += [Cell(whole[name], drawn[name]) for name in COLUMNS]
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args(arguments)

    model = load_digit_detr()
    batch = scenes(options.scenes, split="test", seed=options.seed)
    truths = {kind: annotations(truth_of(batch, kind), batch.labels) for kind in TRUTHS}
    tables = tabulated(model, batch, truths, options)
    for threshold, rows in tables.items():
        print(f"\nthreshold: {threshold}\n")
        print(f"| method | {' | '.join(f'{c} of {t}' for t in TRUTHS for c in COLUMNS)} |")
        print("|---" * (1 + len(TRUTHS) * len(COLUMNS)) + "|")
        for name, row in rows.items():
            print(f"| {name} | {' | '.join(map(str, row))} |")
        if str(GenericAttention.__name__) in rows:
            print("\n" + "\n".join(advantages(rows)))
    return 0


def tabulated(
    model: nn.Module, batch: SceneBatch, truths: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, list[Cell]]]:
    """threshold -> row -> cells."""
    tables: dict[str, dict[str, list[Cell]]] = {t: {} for t in THRESHOLDS}
    found: list[Found] = []
    for name in tqdm(options.methods, unit="method"):
        kind, given = METHODS[name]
        method: Callable[..., Any] = kind(model)
        found = explained(method, given, batch.images)
        for threshold, rows in tables.items():
            rows[name] = cells(truths, results(found, threshold), options.resamples)
            line = f"{threshold}: {name} | {' | '.join(map(str, rows[name]))}"
            tqdm.write(line, file=sys.stderr)  # so that nothing of a stopped run is lost
    detected = sum(len(one.labels) for one in found)
    print(f"{len(batch.images)} held-out scenes, {detected} detections. In per cent.")
    for threshold, rows in tables.items():
        made = results(ink_per_token(found, batch), threshold)
        rows["ink per token"] = cells(truths, made, options.resamples)
    return tables


def advantages(rows: dict[str, list[Cell]]) -> list[str]:
    """How far every other row lies above GenericAttention, scene by scene."""
    own = rows["GenericAttention"]
    lines = ["less GenericAttention, on the same scenes:", ""]
    for name, row in rows.items():
        if row is not own:
            parts = (
                f"{100 * (a.value - b.value):+.1f} ± {100 * float((a.drawn - b.drawn).std()):.1f}"
                for a, b in zip(row, own, strict=True)
            )
            lines.append(f"- {name}: {', '.join(parts)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
