"""Localisation: does the relevance lie on the object?

`segmentation` keeps the counts of every example, and the conventions of a data set (the
ImageNet-Segmentation protocol of Chefer et al., CVPR 2021) are computed from all of them:
`segmentation(...) + segmentation(...)` is the data set of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.metrics._checks import number
from captum_attn.metrics._model import Attributions
from captum_attn.metrics.thresholds import (
    IGNORED,
    binary_map,
    maps_of,
    masks_of,
    objects_of,
    otsu_threshold,
    scaled_maps,
)

__all__ = [
    "Segmentation",
    "binary_map",
    "energy_inside",
    "otsu_threshold",
    "pointing_game",
    "segmentation",
]


@dataclass(frozen=True)
class Segmentation:
    """What was counted, per example; `+` joins data sets, indexing picks examples.

    Attributes:
        correct, labelled (Tensor): (B,), int64, pixels that are right, and pixels that count.
        intersection, union (Tensor): (B, 2), int64, of background and object.
        precision (Tensor): (B,), float64, average precision over both classes.
    """

    correct: Tensor
    labelled: Tensor
    intersection: Tensor
    union: Tensor
    precision: Tensor

    def __add__(self, other: Segmentation) -> Segmentation:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Segmentation(*(torch.cat(pair) for pair in pairs))

    def __getitem__(self, index: Tensor | slice) -> Segmentation:
        return Segmentation(*(value[index] for value in vars(self).values()))

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def pixel_accuracy(self) -> float:
        """Right pixels over all pixels of the data set."""
        return float(self.correct.sum().double() / self.labelled.sum())

    @property
    def mean_iou(self) -> float:
        """Intersection over union of each class over the whole data set, then their mean."""
        return float(_iou(self.intersection.sum(0), self.union.sum(0)).mean())

    @property
    def mean_average_precision(self) -> float:
        """The mean over the examples of their average precision."""
        return float(self.precision.mean())

    @property
    def accuracies(self) -> Tensor:
        """Pixel accuracy of every example alone, (B,)."""
        return self.correct.double() / self.labelled

    @property
    def ious(self) -> Tensor:
        """Mean over the two classes of every example alone, (B,)."""
        return _iou(self.intersection, self.union).mean(-1)

    def compute(self) -> dict[str, float]:
        """The three numbers of the papers' tables."""
        return {
            "pixel_accuracy": self.pixel_accuracy,
            "mIoU": self.mean_iou,
            "mAP": self.mean_average_precision,
        }


def _iou(intersection: Tensor, union: Tensor) -> Tensor:
    # A class that neither the masks nor the maps know was predicted without a fault.
    return torch.where(union > 0, intersection.double() / union.clamp(min=1), 1.0)


def segmentation(
    attributions: Attributions, masks: Tensor, *, threshold: str | float = "mean"
) -> Segmentation:
    r"""Relevance as a segmentation: pixel accuracy, mean IoU and mean average precision.

    The protocol of Chefer, Gur & Wolf (CVPR 2021) on ImageNet-Segmentation, which GAE and VTranM
    follow: each map is scaled to [0, 1]; pixels above the threshold are object, the others
    background; average precision is of both classes' scores, the map and one minus it, together.

    Args:
        attributions (Tensor, or a container of one): (B, C, H, W), which is summed over C, or
            (B, H, W).
        masks (Tensor): (B, H, W) or (B, 1, H, W): 1 or True on the object, 0 off it, -1 where a
            pixel does not count; or 255 on the object where there is nothing but 0 and 255.
        threshold (str or float): "mean", "otsu", "0.3otsu" or a number in [0, 1], of the scaled
            map. Otsu's method cuts after the last background bin of 256, as GAE's code does, so
            that no pixel of that bin is object; "0.3otsu" cuts after bin 0.3 t where Otsu's cuts
            after bin t. Default: "mean".

    A constant map finds nothing, whatever the threshold: no pixel is object, and its scores are
    all equal. A class in neither the mask nor the map was found without a fault (IoU 1).

    Returns:
        Segmentation: with the counts of every example.

    Examples::

        >>> total = segmentation(first, masks) + segmentation(second, more_masks)
        >>> total.pixel_accuracy, total.mean_iou, total.mean_average_precision
    """
    from sklearn.metrics import average_precision_score

    scaled, truth = scaled_maps(attributions), masks_of(maps_of(attributions), masks)
    found = binary_map(attributions, threshold=threshold).long()
    valid = truth != IGNORED
    classes = [
        [((found == c) & (truth == c) & valid), ((found == c) | (truth == c)) & valid]
        for c in (0, 1)
    ]
    intersection, union = (
        torch.stack([counts[i].flatten(1).sum(1) for counts in classes], 1) for i in (0, 1)
    )
    precision: list[float] = []
    for map_, mask, counted in zip(scaled, truth, valid, strict=True):
        if not counted.any():
            raise InputError(f"example {len(precision)} has a mask in which no pixel counts")
        score, label = map_[counted], mask[counted]
        # scikit-learn breaks ties as one step of the curve
        both = torch.cat([1 - score, score]), torch.cat([1 - label, label])
        precision.append(average_precision_score(both[1].cpu().numpy(), both[0].cpu().numpy()))
    correct = ((found == truth) & valid).flatten(1).sum(1)
    return Segmentation(
        correct.cpu(), valid.flatten(1).sum(1).cpu(), intersection.cpu(), union.cpu(),
        torch.tensor(precision, dtype=torch.float64, device="cpu"),
    )  # fmt: skip


def pointing_game(attributions: Attributions, masks: Tensor, *, tolerance: int = 0) -> Tensor:
    r"""Whether the most relevant pixel lies on the object (Zhang et al. 2016).

    Args:
        attributions, masks: see `segmentation`; pixels of -1 do not count. Of equal pixels the
            first in reading order does.
        tolerance (float): the distance in pixels, from centre to centre and not rounded, up to
            which it is a hit: 15 in the paper. (TorchRay's code wants less than it: 14.99 is its
            15.) Default: 0.

    Returns:
        Tensor: (B,), float64, 1 for a hit and 0 for a miss.

    Examples::

        >>> pointing_game(attributions, masks, tolerance=15).mean()
    """
    number("tolerance", tolerance, 0)
    maps = maps_of(attributions)
    truth, on = masks_of(maps, masks), objects_of(maps, masks)
    width = maps.shape[-1]
    counted = maps.masked_fill(truth == IGNORED, -torch.inf)
    peak = counted.flatten(1).argmax(1)  # the first of equal ones
    hits = []
    for place, object_ in zip(peak.tolist(), on, strict=True):
        there = torch.tensor([place // width, place % width], device=on.device)
        pixels = object_.nonzero() - there
        hits.append(float((pixels**2).sum(1).min() <= tolerance**2))
    return torch.tensor(hits, dtype=torch.float64, device="cpu")


def energy_inside(attributions: Attributions, masks: Tensor) -> Tensor:
    r"""The share of the positive relevance that lies on the object (Wang et al. 2020).

    Chance is the object's share of the area. A map without positive relevance has 0.

    Args:
        attributions, masks: see `segmentation`; pixels of -1 do not count.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> energy_inside(attributions, masks).mean()
    """
    truth = masks_of(maps_of(attributions), masks)
    positive = maps_of(attributions).clamp(min=0) * (truth != IGNORED)
    on_object = (positive * objects_of(maps_of(attributions), masks)).sum((1, 2))
    total = positive.sum((1, 2))
    return (on_object / total.where(total > 0, 1.0)).cpu()
