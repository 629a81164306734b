"""Maps and masks as localisation takes them, and thresholds that make a mask of a map."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._checks import marks
from captum_attn.metrics._model import Attributions, finite_attributions, one_map

__all__ = ["binary_map", "otsu_threshold"]

IGNORED = -1
BINS = 256  # of Otsu's histogram
THRESHOLDS = ("mean", "otsu", "0.3otsu")


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
    if isinstance(threshold, str) and threshold in THRESHOLDS:
        if threshold == "mean":
            return scaled > scaled.mean((1, 2), keepdim=True)
        bins, factor = _bins(scaled), 0.3 if threshold == "0.3otsu" else 1.0
        return bins > factor * _last_background_bin(bins)[:, None, None]
    if type(threshold) in (int, float) and 0 <= float(threshold) <= 1:
        return scaled > float(threshold)
    raise OptionError(
        f"threshold: expected one of {THRESHOLDS} or a number in [0, 1], got {threshold!r}"
    )


def masks_of(maps: Tensor, masks: Tensor) -> Tensor:
    """Masks (B, H, W), int64, on the device of the maps (B, H, W): 1, 0, or -1."""
    masks = marks("masks", masks)
    truth = masks[:, 0] if masks.ndim == 4 and masks.shape[1] == 1 else masks
    if truth.shape != maps.shape:
        raise InputError(
            f"masks: expected the shape {tuple(maps.shape)} of the maps, got {tuple(masks.shape)}; "
            "resize the masks (nearest) or the maps"
        )
    truth = truth.to(maps.device)
    if ((truth == 0) | (truth == 255)).all():  # a picture's black and white
        truth = truth != 0
    known = (truth == 0) | (truth == 1) | (truth == IGNORED)
    if not known.all():
        value = truth[~known][0].item()
        raise InputError(
            "masks: expected 1, 0 or -1 (does not count), or nothing but 0 and 255, got "
            f"{value} among them"
        )
    return truth.long()


def objects_of(maps: Tensor, masks: Tensor) -> Tensor:
    """Where the objects are, (B, H, W); refuses a mask without one."""
    on = masks_of(maps, masks) == 1
    empty = (~on.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"example {empty[0]} has a mask without an object: leave it out")
    return on
