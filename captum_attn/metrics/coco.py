"""COCO's average precision of masks, and how sure it is.

Results are plain lists: those of several processes are joined by `+`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._checks import explaining, marks, number, positive_int

__all__ = ["coco_average_precision", "coco_bootstrap", "coco_results"]

SIZES = ("all", "medium", "large")
HIGHEST_IOU, IOU_STEP = 0.95, 0.05
RESULT = ("image_id", "category_id", "segmentation", "score")


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

    masks = marks("masks", masks)
    if not ((masks == 0) | (masks == 1)).all():
        raise InputError("masks: expected True on the object and False off it (or 1 and 0)")
    classes, sure = _listed("labels", labels), _listed("scores", scores)
    if type(image_id) is not int:
        raise InputError(f"image_id: expected a whole number, got {image_id!r}")
    if not all(float(label).is_integer() for label in classes):
        raise InputError(f"labels: expected whole numbers, got {classes}")
    if masks.ndim != 3 or not len(masks) == len(classes) == len(sure):
        raise InputError(
            f"expected as many masks (K, H, W) as labels and scores, got {tuple(masks.shape)}, "
            f"{len(classes)} and {len(sure)}"
        )
    results = []
    for mask, label, score in zip(masks.cpu().numpy(), classes, sure, strict=True):
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


def _listed(name: str, values: Any) -> list[float]:
    """A vector of finite numbers as a list."""
    found = (
        values.tolist()
        if isinstance(values, Tensor) and values.layout == torch.strided and not values.is_meta
        else values
    )
    if not isinstance(found, (list, tuple)) or not all(
        isinstance(v, (int, float)) and math.isfinite(v) for v in found
    ):
        raise InputError(f"{name}: expected one finite number per mask, got {values!r}")
    return list(found)


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
    positive_int("resamples", resamples, 2)
    positive_int("seed", seed, 0)
    scored = _scored(annotations, results, min_iou, image_ids)
    images = len(scored.params.imgIds)
    # evaluate() lists what it matched by category, range of areas and image.
    matched = np.empty((len(scored.evalImgs) // images, images), dtype=object)
    matched.flat[:] = scored.evalImgs
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        scored.evalImgs = matched[:, rng.integers(images, size=images)].ravel().tolist()
        drawn.append(_numbers(scored))
    return {
        name: torch.tensor([numbers[name] for numbers in drawn], dtype=torch.float64, device="cpu")
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

    number("min_iou", min_iou, 0, HIGHEST_IOU, above=True)
    results = _checked_results(results)
    if image_ids is not None and not (
        isinstance(image_ids, (list, tuple, set, range)) and all(type(i) is int for i in image_ids)
    ):
        raise OptionError(f"image_ids: expected ids of images, got {image_ids!r}")
    if image_ids is not None and not image_ids:
        raise OptionError("image_ids: expected at least one, got none")
    with (
        explaining("pycocotools could not read the annotations or the results"),
        contextlib.redirect_stdout(io.StringIO()),  # pycocotools prints as it goes
    ):
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


def _checked_results(results: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(results, (list, tuple)):
        raise InputError(
            f"results: expected a list of COCO's results, got {type(results).__name__}"
        )
    for number_, one in enumerate(results):
        missing = [k for k in RESULT if k not in one] if isinstance(one, Mapping) else list(RESULT)
        if missing:
            raise InputError(
                f"results: number {number_} has no {missing[0]!r}: expected what coco_results gives"
            )
        score = one["score"]
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InputError(f"results: number {number_} has the score {score!r}, not a number")
    return results


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
    elif not isinstance(annotations, (str, Path)):
        raise InputError(
            "annotations: expected a Mapping of COCO's instances format or its file, got "
            f"{type(annotations).__name__}"
        )
    else:
        try:
            found = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise InputError(
                f"cannot read COCO annotations from '{annotations}': {problem}"
            ) from problem
    found = found if isinstance(found, dict) else {}
    missing = [key for key in ("images", "annotations", "categories") if not found.get(key)]
    if missing:
        raise InputError(f"the annotations have no {missing}: expected COCO's instances format")
    return found
