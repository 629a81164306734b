"""Localisation: does the relevance lie on the object?

`segmentation` keeps the counts of every example, and the conventions of a data set (the
ImageNet-Segmentation protocol of Chefer et al., CVPR 2021) are computed from all of them:
`segmentation(...) + segmentation(...)` is the data set of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._inputs import Attributions, finite_attributions, one_map

__all__ = [
    "Segmentation",
    "binary_map",
    "energy_inside",
    "otsu_threshold",
    "pointing_game",
    "segmentation",
]

IGNORED = -1
BINS = 256  # of Otsu's histogram
THRESHOLDS = ("mean", "otsu", "0.3otsu")


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
            pixel does not count.
        threshold (str or float): "mean", "otsu", "0.3otsu" or a number in [0, 1], of the scaled
            map. Otsu's method cuts after the last background bin of 256, as GAE's code does, so
            that no pixel of that bin is object; "0.3otsu" cuts after bin 0.3 t where Otsu's cuts
            after bin t. Default: "mean".

    A constant map finds nothing, whatever the threshold: no pixel is object, and its scores are
    all equal.

    Returns:
        Segmentation: with the counts of every example.

    Examples::

        >>> total = segmentation(first, masks) + segmentation(second, more_masks)
        >>> total.pixel_accuracy, total.mean_iou, total.mean_average_precision
    """
    from sklearn.metrics import average_precision_score

    scaled, truth = scaled_maps(attributions), _masks(attributions, masks)
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
        torch.tensor(precision, dtype=torch.float64),
    )  # fmt: skip


def maps_of(attributions: Attributions) -> Tensor:
    """Maps (B, H, W), float64: summed over the channels."""
    maps = one_map(attributions)
    if maps.ndim not in (3, 4) or not maps.numel():
        raise InputError(
            f"attributions: expected maps (B, C, H, W) or (B, H, W), got {tuple(maps.shape)}"
        )
    maps = finite_attributions(maps)
    return maps.sum(1) if maps.ndim == 4 else maps


def scaled_maps(attributions: Attributions) -> Tensor:
    """Maps (B, H, W) scaled to [0, 1] each; constant ones become 0.5."""
    maps = maps_of(attributions)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    width = high - low
    return torch.where(width > 0, (maps - low) / width.where(width > 0, 1.0), 0.5)


def otsu_threshold(maps: Tensor) -> Tensor:
    r"""Otsu's threshold (B,) of maps (B, H, W): where the last background bin of 256 ends.

    A pixel is object from there on: `map >= threshold`. (scikit-image returns the centre of that
    bin, which is for `>` on whole numbers: of other numbers it lets half of the bin through.) A
    constant map has its own value.

    Args:
        maps (Tensor): (B, H, W), of any range; the bins divide each map's own.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> otsu_threshold(torch.tensor([[[0.0, 0.001, 0.003, 1.0]]]))
        tensor([0.0039], dtype=torch.float64)
    """
    maps = maps_of(maps)
    low, high = maps.amin((1, 2)), maps.amax((1, 2))
    last = _last_background_bin(_bins(scaled_maps(maps)))
    return torch.where(high > low, low + (last + 1) / BINS * (high - low), low)


def _bins(scaled: Tensor) -> Tensor:
    """The bin, 0 to 255, of every pixel of maps scaled to [0, 1]."""
    return (scaled * BINS).long().clamp(max=BINS - 1)


def _last_background_bin(bins: Tensor) -> Tensor:
    """t (B,) with the largest variance between bins 0 ... t and the others (Otsu 1979, Eq. 18)."""
    flat = bins.flatten(1)
    counts = torch.zeros(len(flat), BINS, dtype=torch.float64, device=flat.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    # Whole numbers, so that cuts between which there is no pixel are exactly equally good.
    below = counts.cumsum(1)
    sum_below = (counts * torch.arange(BINS, device=flat.device)).cumsum(1)
    pixels, total = below[:, -1:], sum_below[:, -1:]
    above = pixels - below
    between = (total * below - sum_below * pixels) ** 2 / (below * above).clamp(min=1)
    return between.argmax(1)  # the first of equal ones


def binary_map(attributions: Attributions, *, threshold: str | float = "mean") -> Tensor:
    r"""The pixels that a map names: those above a threshold of the map scaled to [0, 1].

    Args:
        attributions, threshold: see `segmentation`.

    Returns:
        Tensor: (B, H, W), bool. A constant map names none.

    Examples::

        >>> binary_map(attributions, threshold="otsu")
    """
    scaled = scaled_maps(attributions)
    constant = scaled.amin((1, 2)) == scaled.amax((1, 2))
    return _above(scaled, threshold) & ~constant[:, None, None]


def _above(scaled: Tensor, threshold: str | float) -> Tensor:
    """Which pixels (B, H, W) of maps scaled to [0, 1] lie above the threshold."""
    if threshold == "mean":
        return scaled > scaled.mean((1, 2), keepdim=True)
    if isinstance(threshold, str) and threshold in THRESHOLDS:
        bins, factor = _bins(scaled), 0.3 if threshold == "0.3otsu" else 1.0
        return bins > factor * _last_background_bin(bins)[:, None, None]
    if type(threshold) in (int, float) and 0 <= float(threshold) <= 1:
        return scaled > float(threshold)
    raise OptionError(
        f"threshold: expected one of {THRESHOLDS} or a number in [0, 1], got {threshold!r}"
    )


def pointing_game(attributions: Attributions, masks: Tensor, *, tolerance: int = 0) -> Tensor:
    r"""Whether the most relevant pixel lies on the object (Zhang et al. 2016).

    Args:
        attributions, masks: see `segmentation`. Of equal pixels the first in reading order counts.
        tolerance (int): the distance in pixels from the object up to which it is a hit; the
            paper's is 15. Default: 0.

    Returns:
        Tensor: (B,), float64, 1 for a hit and 0 for a miss.

    Examples::

        >>> pointing_game(attributions, masks, tolerance=15).mean()
    """
    if tolerance < 0:
        raise OptionError(f"tolerance: expected a distance in pixels, got {tolerance}")
    maps, truth = maps_of(attributions), _objects(attributions, masks)
    width = maps.shape[-1]
    peak = maps.flatten(1).argmax(1)  # the first of equal ones
    hits = []
    for place, on in zip(peak.tolist(), truth, strict=True):
        pixels = on.nonzero() - torch.tensor([place // width, place % width], device=on.device)
        hits.append(float((pixels**2).sum(1).min() <= tolerance**2))
    return torch.tensor(hits, dtype=torch.float64)


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
    truth = _masks(attributions, masks)
    positive = maps_of(attributions).clamp(min=0) * (truth != IGNORED)
    on_object = (positive * _objects(attributions, masks)).sum((1, 2))
    total = positive.sum((1, 2))
    return (on_object / total.where(total > 0, 1.0)).cpu()


def _masks(attributions: Attributions, masks: Tensor) -> Tensor:
    """Masks (B, H, W), int64, on the maps' device: 1, 0, or -1."""
    maps = maps_of(attributions)
    truth = masks[:, 0] if masks.ndim == 4 and masks.shape[1] == 1 else masks
    if truth.shape != maps.shape:
        raise InputError(
            f"masks: expected the shape {tuple(maps.shape)} of the maps, got {tuple(masks.shape)}; "
            "resize the masks (nearest) or the maps"
        )
    truth = truth.to(maps.device)
    known = (truth == 0) | (truth == 1) | (truth == IGNORED)
    if not known.all():
        value = truth[~known][0].item()
        raise InputError(f"masks: expected 1, 0 or -1 (does not count), got {value}")
    return truth.long()


def _objects(attributions: Attributions, masks: Tensor) -> Tensor:
    """Where the objects are, (B, H, W); refuses a mask without one."""
    on = _masks(attributions, masks) == 1
    empty = (~on.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"example {empty[0]} has a mask without an object: leave it out")
    return on
