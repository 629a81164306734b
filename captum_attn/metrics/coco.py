"""COCO's average precision of masks, and how sure it is.

Results are plain lists: those of several processes are joined by `+`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._checks import positive_int

__all__ = ["coco_average_precision", "coco_bootstrap", "coco_results"]

SIZES = ("all", "medium", "large")
HIGHEST_IOU, IOU_STEP = 0.95, 0.05


def coco_results(
    image_id: int, masks: Tensor, labels: Tensor | Sequence[int], scores: Tensor | Sequence[float]
) -> list[dict[str, Any]]:
    r"""Masks of one image in COCO's results format, with their run lengths as text (JSON).

    Args:
        image_id (int): its id in the annotations.
        masks (Tensor): (K, H, W), bool.
        labels (Tensor): (K,), category ids.
        scores (Tensor): (K,).

    Returns:
        list of dict: one per mask.

    Examples::

        >>> results += coco_results(42, masks, found.labels, found.scores)
    """
    from pycocotools import mask as coco_mask

    if masks.ndim != 3 or not len(masks) == len(labels) == len(scores):
        raise InputError(
            f"expected as many masks (K, H, W) as labels and scores, got {tuple(masks.shape)}, "
            f"{len(labels)} and {len(scores)}"
        )
    results = []
    for mask, label, score in zip(masks.cpu().numpy(), labels, scores, strict=True):
        runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}
        results.append(
            {
                "image_id": int(image_id),
                "category_id": int(label),
                "segmentation": segmentation,
                "score": float(score),
            }
        )
    return results


def coco_average_precision(
    annotations: Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]],
    *,
    min_iou: float = 0.2,
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    r"""Average precision and recall of masks, by pycocotools.

    Args:
        annotations (Mapping, str or Path): COCO annotations, or their JSON file.
        results (sequence of Mapping): see `coco_results`.
        min_iou (float): the means are over the IoU thresholds from here to 0.95 in steps of 0.05.
            COCO's is 0.5; GAE's Table 1, for masks that nothing was trained for, begins at 0.2.
            Default: 0.2.
        image_ids (sequence of int, optional): the images that were evaluated. Default: all of the
            annotations.

    Returns:
        dict: "AP", "AP_medium", "AP_large", "AR", "AR_medium", "AR_large", in [0, 1]; -1, as in
        COCO, where no annotation has that size. Recall is with up to 100 detections per image.

    Examples::

        >>> coco_average_precision("instances_val2017.json", results)["AP"]
    """
    scored = _scored(annotations, results, min_iou, image_ids)
    return _numbers(scored)


def coco_bootstrap(
    annotations: Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]],
    *,
    min_iou: float = 0.2,
    image_ids: Sequence[int] | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""The numbers of `coco_average_precision` over images drawn with replacement.

    Their standard deviation is the standard error. Equal seeds draw equal images, so two methods
    are compared by the difference of their draws.

    Args:
        annotations, results, min_iou, image_ids: see `coco_average_precision`.
        resamples (int): R, how many times as many images as there are are drawn. Default: 200.
        seed (int): of the draws. Default: 0.

    Returns:
        dict: the same names -> (R,), float64.

    Examples::

        >>> ours, others = (coco_bootstrap(truth, r)["AP"] for r in (results, other_results))
        >>> (ours - others).mean(), (ours - others).std()
    """
    scored = _scored(annotations, results, min_iou, image_ids)
    images = len(scored.params.imgIds)
    # evaluate() lists what it matched by category, range of areas and image.
    matched = np.empty((len(scored.evalImgs) // images, images), dtype=object)
    matched.flat[:] = scored.evalImgs
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(positive_int("resamples", resamples, 2)):
        scored.evalImgs = matched[:, rng.integers(images, size=images)].ravel().tolist()
        drawn.append(_numbers(scored))
    return {
        name: torch.tensor([numbers[name] for numbers in drawn], dtype=torch.float64)
        for name in drawn[0]
    }


def _scored(
    annotations: Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]],
    min_iou: float,
    image_ids: Sequence[int] | None,
) -> Any:
    """A COCOeval that has matched results and annotations."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not 0 < min_iou <= HIGHEST_IOU:
        raise OptionError(f"min_iou: expected one above 0 and up to {HIGHEST_IOU}, got {min_iou}")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth = COCO()
        truth.dataset = _annotations(annotations)
        truth.createIndex()
        wanted = sorted(truth.getImgIds() if image_ids is None else image_ids)
        unknown = ({r["image_id"] for r in results} | set(wanted)) - set(truth.getImgIds())
        if unknown:
            raise InputError(f"images {sorted(unknown)[:10]} are not in the annotations")
        found = COCO()  # loadRes takes no empty list; nothing found is nothing recalled
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
        found = truth.loadRes([dict(r) for r in results]) if results else found
        scored = COCOeval(truth, found, "segm")
        count = round((HIGHEST_IOU - min_iou) / IOU_STEP) + 1
        scored.params.iouThrs = min_iou + IOU_STEP * np.arange(count)
        scored.params.imgIds = wanted
        scored.params.maxDets = scored.params.maxDets[-1:]
        areas = zip(scored.params.areaRngLbl, scored.params.areaRng, strict=True)
        kept = [(name, area) for name, area in areas if name in SIZES]
        scored.params.areaRngLbl, scored.params.areaRng = map(list, zip(*kept, strict=True))
        scored.evaluate()
    return scored


def _numbers(scored: Any) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        scored.accumulate()
    areas = [scored.params.areaRngLbl.index(size) for size in SIZES]
    precision = [scored.eval["precision"][:, :, :, area, -1] for area in areas]
    recall = [scored.eval["recall"][:, :, area, -1] for area in areas]
    return _by_name([_mean_of_known(values) for values in (*precision, *recall)])


def _by_name(values: Sequence[float]) -> dict[str, float]:
    """The numbers of AP, then of AR, each in the order of `SIZES`."""
    endings = ["" if size == "all" else f"_{size}" for size in SIZES]
    names = [what + ending for what in ("AP", "AR") for ending in endings]
    return dict(zip(names, values, strict=True))


def _mean_of_known(values: np.ndarray) -> float:
    """The mean over all but -1, which stands for categories without annotations."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _annotations(annotations: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(annotations, Mapping):
        found = dict(annotations)
    else:
        try:
            found = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise InputError(
                f"cannot read COCO annotations from '{annotations}': {problem}"
            ) from problem
    missing = [key for key in ("images", "annotations", "categories") if not found.get(key)]
    if missing:
        raise InputError(f"the annotations have no {missing}: expected COCO's instances format")
    return found
