"""Detection: explanations of a detector's queries as segmentation masks, scored as COCO does.

The weakly supervised protocol of GAE (appendix, Algorithm 1) on DETR: a detector that only ever
saw boxes is asked, by the relevance of its detections, for masks. `query_masks` makes the masks of
one image; `captum_attn.metrics.coco` scores those of all images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.metrics._checks import a_callable, a_tensor, flag, number, size
from captum_attn.metrics._model import finite_attributions
from captum_attn.metrics.thresholds import binary_map

__all__ = ["DetectedQueries", "detections", "query_masks", "segment_detections"]


class DetectedQueries(NamedTuple):
    """The queries of one image that a detector is sure of.

    Attributes:
        queries (Tensor): (K,), int64, their indices.
        labels (Tensor): (K,), int64, their classes.
        scores (Tensor): (K,), the classes' probabilities.
    """

    queries: Tensor
    labels: Tensor
    scores: Tensor


def detections(
    logits: Tensor, *, threshold: float = 0.5, no_object: bool = True
) -> DetectedQueries:
    r"""The queries whose likeliest class is likelier than a threshold.

    Args:
        logits (Tensor): (Q, classes + 1) of one image, the last one for "no object", as DETR's;
            or (Q, classes), see `no_object`.
        threshold (float): in [0, 1]. Default: 0.5.
        no_object (bool): False for detectors whose classes are independent (Conditional and
            Deformable DETR): a sigmoid of all logits takes the place of the softmax. Default: True.

    Returns:
        DetectedQueries: in the order of the queries.

    Examples::

        >>> detections(model(**inputs).logits[0])
    """
    number("threshold", threshold, 0, 1)
    classes = 2 if flag("no_object", no_object) else 1
    logits = a_tensor("logits", logits)
    if logits.ndim != 2 or logits.shape[1] < classes:
        raise InputError(
            f"logits: expected those of one image, (queries, classes), got {tuple(logits.shape)}"
        )
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    bad = (~logits.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"logits: query {bad[0]} has NaN or infinity ({len(bad)} of {len(logits)} queries), of "
            "which no class is the likeliest: check the model and its inputs"
        )
    probabilities = logits.softmax(-1)[:, :-1] if no_object else logits.sigmoid()
    scores, labels = probabilities.max(-1)
    queries = (scores > threshold).nonzero().flatten()
    return DetectedQueries(queries, labels[queries], scores[queries])


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
    maps = a_tensor("maps", maps)
    if maps.ndim != 3 or (len(maps) and not maps.numel()):
        raise InputError(f"maps: expected (detections, h, w), got {tuple(maps.shape)}")
    padded_size = size("padded_size", padded_size)
    image_size = padded_size if image_size is None else size("image_size", image_size)
    original_size = image_size if original_size is None else size("original_size", original_size)
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
) -> tuple[DetectedQueries, Tensor]:
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
        tuple: `DetectedQueries` and masks (K, *original_size).

    Examples::

        >>> method = GenericAttention(model)
        >>> def explain(query, label):
        ...     return method.attribute(images, target=(query, label), interpolation="nearest")
        >>> found, masks = segment_detections(logits[0], explain, (64, 64), grid=(8, 8))
    """
    grid = None if grid is None else size("grid", grid)
    found = detections(logits, threshold=number("min_score", min_score, 0, 1), no_object=no_object)
    if len(found.queries):
        a_callable("explain", explain)
    pairs = zip(found.queries.tolist(), found.labels.tolist(), strict=True)
    maps = [_on_grid(explain(query, label), grid) for query, label in pairs]
    shapes = {tuple(map_.shape) for map_ in maps}
    if len(shapes) > 1:
        raise InputError(f"explain: the maps differ in their size, {sorted(shapes)}: pass grid=")
    stacked = torch.stack(maps) if maps else logits.new_zeros(0, 1, 1)
    return found, query_masks(
        stacked, padded_size,
        image_size=image_size, original_size=original_size, threshold=threshold,
    )  # fmt: skip


def _on_grid(relevance: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """(h, w): summed over the channels, averaged down to the grid."""
    map_ = a_tensor("explain", relevance).detach()
    if map_.ndim == 4 and len(map_) == 1:
        map_ = map_[0]
    map_ = map_.sum(0) if map_.ndim == 3 else map_
    if map_.ndim != 2 or not map_.numel():
        raise InputError(
            f"explain: expected (h, w), (C, H, W) or (1, C, H, W), got {tuple(relevance.shape)}"
        )
    map_ = finite_attributions(map_[None])
    return (map_ if grid is None else F.adaptive_avg_pool2d(map_[None], grid)[0])[0]
