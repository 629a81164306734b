"""Detection: explanations of a detector's queries as segmentation masks, scored as COCO does.

The weakly supervised protocol of GAE (appendix, Algorithm 1) on DETR: a detector that only ever
saw boxes is asked, by the relevance of its detections, for masks. `query_masks` makes the masks of
one image, `coco_results` writes them in COCO's format, and `coco_average_precision` scores the
results of all images. Results are plain lists: those of several processes are joined by `+`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._inputs import finite_attributions
from captum_attn.metrics.localization import binary_map

__all__ = [
    "Detections",
    "coco_average_precision",
    "coco_results",
    "detections",
    "query_masks",
    "segment_detections",
]

SIZES = ("all", "medium", "large")
HIGHEST_IOU, IOU_STEP = 0.95, 0.05


class Detections(NamedTuple):
    """The queries of one image that a detector is sure of.

    Attributes:
        queries (Tensor): (K,), int64, their indices.
        labels (Tensor): (K,), int64, their classes.
        scores (Tensor): (K,), the classes' probabilities.
    """

    queries: Tensor
    labels: Tensor
    scores: Tensor


def detections(logits: Tensor, *, threshold: float = 0.5, no_object: bool = True) -> Detections:
    r"""The queries whose likeliest class is likelier than a threshold.

    Args:
        logits (Tensor): (Q, classes + 1) of one image, the last one for "no object", as DETR's;
            or (Q, classes), see `no_object`.
        threshold (float): Default: 0.5.
        no_object (bool): False for detectors whose classes are independent (Conditional and
            Deformable DETR): a sigmoid of all logits takes the place of the softmax. Default: True.

    Returns:
        Detections: in the order of the queries.

    Examples::

        >>> detections(model(**inputs).logits[0])
    """
    if logits.ndim != 2:
        raise InputError(
            f"logits: expected those of one image, (queries, classes), got {tuple(logits.shape)}"
        )
    logits = logits.detach()
    probabilities = logits.softmax(-1)[:, :-1] if no_object else logits.sigmoid()
    scores, labels = probabilities.max(-1)
    queries = (scores > threshold).nonzero().flatten()
    return Detections(queries, labels[queries], scores[queries])


def query_masks(
    maps: Tensor,
    padded_size: tuple[int, int],
    *,
    image_size: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    threshold: str | float = "otsu",
) -> Tensor:
    r"""Masks of detections from their relevance (GAE, appendix, Algorithm 1).

    Each map is cut by Otsu's threshold, the resulting 0 and 1 are upsampled bilinearly to the
    size of the model's input, pixels whose sigmoid exceeds 0.5 are the object, the padding is cut
    off, and what remains is brought to the original size by its nearest pixels.

    Args:
        maps (Tensor): (K, h, w), relevance on the grid of the encoder.
        padded_size (tuple of int): height and width of the model's input.
        image_size (tuple of int, optional): of the image in it, at the upper left. Default:
            `padded_size`.
        original_size (tuple of int, optional): of the image that the annotations are for. Default:
            `image_size`.
        threshold (str or float): see `captum_attn.metrics.segmentation`; "0.3otsu" is the second
            of arXiv 2605.27458. Default: "otsu".

    Returns:
        Tensor: (K, *original_size), bool. A constant map gives no mask.

    Examples::

        >>> query_masks(maps, (800, 1066), original_size=(480, 640))
    """
    if maps.ndim != 3:
        raise InputError(f"maps: expected (detections, h, w), got {tuple(maps.shape)}")
    image_size = image_size or padded_size
    original_size = original_size or image_size
    if image_size[0] > padded_size[0] or image_size[1] > padded_size[1]:
        raise InputError(f"an image of {image_size} does not lie in an input of {padded_size}")
    if not len(maps):
        return torch.zeros(0, *original_size, dtype=torch.bool, device=maps.device)
    named = binary_map(maps, threshold=threshold).double()[:, None]
    # The sigmoid of 0 is 0.5, so whatever the upsampling reaches at all is object.
    smooth = F.interpolate(named, tuple(padded_size), mode="bilinear", align_corners=False)
    masks = (smooth.sigmoid() > 0.5)[..., : image_size[0], : image_size[1]]
    return F.interpolate(masks.double(), tuple(original_size), mode="nearest")[:, 0] > 0.5


def segment_detections(
    logits: Tensor,
    explain: Callable[[int, int], Tensor],
    padded_size: tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    min_score: float = 0.5,
    no_object: bool = True,
    threshold: str | float = "otsu",
) -> tuple[Detections, Tensor]:
    r"""The whole of Algorithm 1 for one image: detections, and a mask for each.

    Args:
        logits (Tensor): see `detections`.
        explain (callable): (query, class) -> its relevance: (h, w) on the encoder's grid, or
            (H, W), (C, H, W) or (1, C, H, W) on the input, as Captum attributions are, which is
            averaged down to `grid`.
        padded_size, image_size, original_size, threshold: see `query_masks`.
        grid (tuple of int, optional): height and width of the encoder's grid. Default: that of
            what `explain` returns.
        min_score, no_object: see `detections`.

    Returns:
        tuple: `Detections` and masks (K, *original_size).

    Examples::

        >>> method = GenericAttention(model)
        >>> def explain(query, label):
        ...     return method.attribute(images, target=(query, label), interpolation="nearest")
        >>> found, masks = segment_detections(logits[0], explain, (64, 64), grid=(8, 8))
    """
    found = detections(logits, threshold=min_score, no_object=no_object)
    pairs = zip(found.queries.tolist(), found.labels.tolist(), strict=True)
    maps = [_on_grid(explain(query, label), grid) for query, label in pairs]
    stacked = torch.stack(maps) if maps else logits.new_zeros(0, 1, 1)
    return found, query_masks(
        stacked, padded_size,
        image_size=image_size, original_size=original_size, threshold=threshold,
    )  # fmt: skip


def _on_grid(relevance: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """(h, w): summed over the channels, averaged down to the grid."""
    map_ = relevance.detach()
    if map_.ndim == 4 and len(map_) == 1:
        map_ = map_[0]
    map_ = map_.sum(0) if map_.ndim == 3 else map_
    if map_.ndim != 2:
        raise InputError(
            f"explain: expected (h, w), (C, H, W) or (1, C, H, W), got {tuple(relevance.shape)}"
        )
    map_ = finite_attributions(map_[None])
    return (map_ if grid is None else F.adaptive_avg_pool2d(map_[None], grid)[0])[0]


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
        if not results:  # COCO takes no empty list; nothing found is nothing recalled
            return _by_name([0.0 if _sized(truth, wanted, size) else -1.0 for size in SIZES] * 2)
        scored = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "segm")
        count = round((HIGHEST_IOU - min_iou) / IOU_STEP) + 1
        scored.params.iouThrs = min_iou + IOU_STEP * np.arange(count)
        scored.params.imgIds = wanted
        scored.evaluate()
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


def _sized(truth: Any, image_ids: Sequence[int], size: str) -> bool:
    ranges = {"all": [0, 1e10], "medium": [32**2, 96**2], "large": [96**2, 1e10]}
    return bool(truth.getAnnIds(imgIds=list(image_ids), areaRng=ranges[size], iscrowd=False))


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
