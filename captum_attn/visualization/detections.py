"""Detections: a panel for each object, with its box, its score and its map, and its mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

from captum_attn._checks import shown, texts
from captum_attn.errors import InputError
from captum_attn.visualization._arrays import array, check_counts, fitted, image_list
from captum_attn.visualization._fonts import finished
from captum_attn.visualization._options import checked_options, known
from captum_attn.visualization._panels import (
    VIEWS,
    Style,
    checked_view,
    draw_box,
    draw_map,
    no_bar,
    show_image,
    title,
)
from captum_attn.visualization._regions import apart, checked_boxes
from captum_attn.visualization._style import FOR, GREY, LEGEND, resolved_sign
from captum_attn.visualization.picture import Picture

__all__ = ["visualize_detections"]


@checked_options(method=known(VIEWS))
def visualize_detections(
    found: Any,
    images: Any,
    *,
    masks: Any = None,
    method: str = "blended_heat_map",
    sign: str = "auto",
    outlier_perc: float = 2,
    cmap: str | Colormap | None = None,
    alpha_overlay: float = 0.85,
    titles: Sequence[str] | None = None,
    show_colorbar: bool = True,
    columns: int = 5,
    panel_size: float = 2.0,
) -> Picture:
    """Draws each image with its detections, and the map of each of them beside it.

    Args:
        found (Detections or sequence of them): of one image or of several, as
            `captum_attn.detection.explain_detections` returns them, or anything with `boxes` (n, 4)
            in pixels, `scores` (n,), `names` or `labels`, and `maps` (n, H, W).
        images: as for `visualize_image`, of the boxes' and maps' size.
        masks (Tensor, array, or sequence of these, optional): (n, H, W), bool, for each image, as
            `captum_attn.metrics.query_masks` makes them; drawn below the maps.
        method, sign, outlier_perc, cmap, alpha_overlay: as for `visualize_image`.
        titles (sequence of str, optional): one for each image.
        show_colorbar (bool): Default: True.
        columns (int): at most so many detections beside each other. Default: 5.
        panel_size (float): width of a panel in inches. Default: 2.

    Returns:
        Picture: for each image a block of rows, the image itself first.

    Raises:
        InputError: if detections, images and masks do not fit, or are not finite.
        OptionError: for an unknown option.

    Examples::

        >>> found = explain_detections(GenericAttention(detr), images)
        >>> masks = [query_masks(one.maps, (64, 64)) for one in found]
        >>> visualize_detections(found, images, masks=masks).save("detected.png")
    """
    pictures, batched = image_list(images)
    every = list(found) if isinstance(found, (list, tuple)) else [found]
    check_counts(len(pictures), {"found": every, "titles": titles})
    covers = _masks(masks, every, pictures, batched)
    maps = [_maps(one, picture) for one, picture in zip(every, pictures, strict=True)]
    flat = [one for of_image in maps for one in of_image]
    view, shown = checked_view(method, resolved_sign(sign, flat), sign == "auto", True)
    style = Style(view, shown, outlier_perc, cmap, alpha_overlay)
    across = max(1, min(columns, max(len(of_image) for of_image in maps)))
    blocks = [math.ceil(len(of_image) / across) or 1 for of_image in maps]
    kinds = 1 + (covers is not None)
    tall = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    below = 0.35 * show_colorbar
    figure = Picture(
        alt="; ".join(titles) if titles else "detections and their maps",
        figsize=(
            panel_size * (1 + across),
            sum(blocks) * (kinds * (panel_size * tall + 0.35) + below) + 0.2,
        ),
        layout="constrained",
    )
    grid = figure.subplots(sum(blocks) * kinds, 1 + across, squeeze=False)
    for ax in grid.ravel():
        ax.axis("off")
    row = 0
    for i, picture in enumerate(pictures):
        boxes = checked_boxes(every[i].boxes, [picture])[0].reshape(-1, 4)
        labels = _labels(every[i])
        first = grid[row, 0]
        show_image(first, picture, (1, 1), grey=False)
        if show_colorbar:
            no_bar(figure, first)
        labelled = apart(boxes, range(len(boxes)), picture.shape[1])
        for j, box in enumerate(boxes):
            draw_box(first, box, labels[j].rsplit(" ", 1)[0] if j in labelled else "")
        if not labels:
            first.set_xlabel("nothing detected", fontsize=9, color=GREY)
        first.axis("on")
        if titles is not None:
            title(first, titles[i], panel_size, fontsize=10, fontweight="bold", loc="left")
        for j, label in enumerate(labels):
            ax = grid[row + kinds * (j // across), 1 + j % across]
            ax.axis("on")
            name = f"{label} of image {i}"
            draw_map(figure, ax, maps[i][j], picture, style, show_colorbar, name)
            draw_box(ax, boxes[j], linewidth=1.5)
            title(ax, label, panel_size)
            if covers is not None:
                below_it = grid[row + kinds * (j // across) + 1, 1 + j % across]
                _draw_mask(below_it, picture, covers[i][j], boxes[j])
                title(below_it, "mask", panel_size, fontsize=9)
        row += kinds * blocks[i]
    if cmap is None and style.sign == "all":
        figure.supxlabel(LEGEND, fontsize=9, color=GREY)
    finished(figure)
    return figure


def _maps(found: Any, picture: np.ndarray) -> list[np.ndarray]:
    given = (getattr(found, name, None) for name in ("maps", "boxes", "scores"))
    maps, boxes, scores = (None if one is None else array(one, "found") for one in given)
    if maps is None or boxes is None or scores is None:
        raise InputError(
            "found: expected `boxes`, `scores` and `maps`, as explain_detections returns them; got "
            f"{shown(found)}"
        )
    count = len(scores) if scores.ndim == 1 else None
    if maps.ndim != 3 or boxes.shape != (count, 4) or len(maps) != count:
        raise InputError(
            "found: expected `boxes` (n, 4), `scores` (n,) and `maps` (n, H, W), got "
            f"{boxes.shape}, {scores.shape} and {maps.shape}"
        )
    size = (picture.shape[0], picture.shape[1])
    return [fitted(one, size, None, None, "found.maps") for one in maps]


def _labels(found: Any) -> list[str]:
    scores = array(found.scores, "found.scores")
    names = getattr(found, "names", None)
    names = getattr(found, "labels", None) if names is None else names
    names = texts("found.names", names, len(scores), "detection")
    return [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]


def _masks(
    masks: Any, found: list[Any], pictures: list[np.ndarray], batched: bool
) -> list[np.ndarray] | None:
    if masks is None:
        return None
    each = list(masks) if isinstance(masks, (list, tuple)) else [masks]
    if len(each) != len(pictures):
        raise InputError(f"masks: expected those of {len(pictures)} images, got {len(each)}")
    arrays = [array(one, "masks") > 0.5 for one in each]
    for one, of_image, picture in zip(arrays, found, pictures, strict=True):
        expected = (len(of_image.boxes), *picture.shape[:2])
        if one.shape != expected:
            raise InputError(f"masks: expected {expected}, got {one.shape}")
    return arrays


def _draw_mask(ax: Axes, picture: np.ndarray, mask: np.ndarray, box: np.ndarray) -> None:
    """The image where the mask is, the rest dimmed."""
    ax.axis("on")
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    inside = 0.45 * grey + 0.55 * FOR
    show_image(ax, np.where(mask[..., None], inside, grey), (1, 1), grey=False)
    draw_box(ax, box, linewidth=1, linestyle="--")
