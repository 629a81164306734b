"""Maps of images: beside each other for several methods or targets, a row for each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Colormap

from captum_attn.errors import InputError, OptionError
from captum_attn.visualization._arrays import (
    by_label,
    check_counts,
    fitted,
    image_list,
    map_list,
)
from captum_attn.visualization._fonts import finished
from captum_attn.visualization._options import INTERPOLATIONS, checked_options, known, optional
from captum_attn.visualization._panels import (
    Style,
    checked_view,
    draw_box,
    draw_map,
    frame_left_out,
    no_bar,
    show_image,
    title,
)
from captum_attn.visualization._regions import checked_boxes
from captum_attn.visualization._style import GREY, LEGEND, resolved_sign
from captum_attn.visualization.picture import Picture

__all__ = ["visualize_image"]


@checked_options(interpolation=optional(known(INTERPOLATIONS)))
def visualize_image(
    attributions: Any,
    images: Any = None,
    *,
    method: str | Sequence[str] = "blended_heat_map",
    sign: str = "auto",
    outlier_perc: float = 2,
    patch_size: int | tuple[int, int] | None = None,
    interpolation: str | None = None,
    cmap: str | Colormap | None = None,
    alpha_overlay: float = 0.85,
    titles: Sequence[str] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    boxes: Sequence[Any] | None = None,
    show_original: bool = True,
    show_colorbar: bool = True,
    panel_size: float = 2.2,
    left_out: Any = None,
) -> Picture:
    r"""Draws the attributions of images, each map with a colour scale and a colour bar of its own.

    Tensors have their channels first; arrays and PIL images last, as in Captum. Channels are
    summed.

    Args:
        attributions (Tensor, array, or Mapping of label to such): of one image, (H, W) or
            (C, H, W), or of a batch, (B, C, H, W), or (B, H, W) where `images` is a batch. With
            `patch_size`, (H, W) may be the grid of patches. A Mapping has a column for each label:
            several methods, or several targets.
        images (Tensor, array, PIL image, or sequence of these, optional): what was explained.
            Floats are in [0, 1]; those beyond, of a normalised image, are stretched to it. Whole
            numbers are 0 to 255. Default: none, for method="heat_map" and "contour".
        method (str or sequence of str): the view, or several beside each other, as in Captum:
            "heat_map", "blended_heat_map" (over the grey image), "masked_image", "alpha_scaling",
            "original_image"; and "contour". Default: "blended_heat_map".
        sign (str): as in Captum, "all", "positive", "negative" or "absolute_value". Default:
            "auto", "all" for the columns that have negative values, else "positive" (views that
            cannot show both: "absolute_value").
        outlier_perc (float): as in Captum: the largest values that make up so many per cent of the
            sum have the colour of the scale's end. In [0, 100). Default: 2.
        patch_size (int or (int, int), optional): height and width of a patch in pixels, to which
            the maps are averaged. Default: maps are drawn pixel by pixel, as they are.
        interpolation (str, optional): between patches: "nearest", patch-exact, or "bilinear",
            smooth. Default: "nearest".
        cmap (str or Colormap, optional): a colour map of matplotlib. Default: viridis, purple to
            orange with white at zero for both signs, and a transparent one over images.
        alpha_overlay (float): how much of the image a blended map covers where it is strongest.
        titles (sequence of str, optional): one for each example, "a cat (0.93)".
        captions (Mapping, optional): label -> what is said below its panels, one for each example.
        boxes (sequence, optional): for each example (n, 4), x_min, y_min, x_max, y_max in pixels,
            drawn on the image itself; empty for none.
        show_original (bool): whether the image itself is the first column. Default: True.
        show_colorbar (bool): Default: True.
        panel_size (float): width of a panel in inches. Default: 2.2.
        left_out (Tensor, array, or Mapping of label to such, optional): as a method's `left_out`
            returns it, in the forms of `attributions`: a dashed line goes round the tokens whose
            relevance was taken away. Default: none.

    Returns:
        Picture: a figure with a row for each example.

    Raises:
        InputError: for sizes or numbers of images and maps that do not fit, for NaN.
        OptionError: for an unknown option.

    Examples::

        >>> maps = {"GAE": gae.attribute(x, target=3), "rollout": rollout.attribute(x)}
        >>> visualize_image(maps, x, titles=["a 3"]).save("why.png")
        >>> visualize_image(maps["GAE"], x, patch_size=16, interpolation="bilinear")
        >>> visualize_image(maps["GAE"], x, method=["heat_map", "masked_image", "contour"])
    """
    pictures, batched = (None, False) if images is None else image_list(images)
    labelled = by_label(attributions)
    columns = {
        label: _maps(values, pictures, batched, patch_size, interpolation, label)
        for label, values in labelled.items()
    }
    marks = _marks(left_out, columns, pictures, batched)
    views = [method] if isinstance(method, str) else list(method)
    styles = [
        (label, Style(*checked, outlier_perc, cmap, alpha_overlay))
        for label, checked in _checked_views(views, columns, sign, pictures is not None)
    ]
    rows = len(next(iter(columns.values())))
    check_counts(rows, {f"attributions[{label!r}]": maps for label, maps in columns.items()})
    check_counts(rows, {f"captions[{label!r}]": said for label, said in (captions or {}).items()})
    check_counts(rows, {"titles": titles, "boxes": boxes})
    frames = None if boxes is None or pictures is None else _frames(boxes, pictures)
    if unknown := set(captions or {}) - set(columns):
        raise InputError(f"captions: expected some of {list(columns)}, got {sorted(unknown)}")
    original = pictures is not None and show_original
    tall = [_tall([maps[i].shape for maps in columns.values()]) for i in range(rows)]
    below = 0.35 * show_colorbar + 0.2 * bool(captions)
    above = 0.35 + 0.17 * (len(views) > 1)
    heights = [panel_size * high + above + below for high in tall]
    signed = cmap is None and any(style.sign in ("all", "negative") for _, style in styles)
    picture = Picture(
        alt=_alt(columns, titles),
        figsize=(
            panel_size * (len(styles) + original),
            sum(heights) + 0.3 * signed,
        ),
        layout="constrained",
    )
    grid = picture.subplots(rows, len(styles) + original, squeeze=False, height_ratios=heights)
    for row, axes in enumerate(grid):
        image = None if pictures is None else pictures[row]
        if original:
            show_image(axes[0], image, (1, 1), grey=False)
            if show_colorbar:
                no_bar(picture, axes[0])
            for box in () if frames is None else frames[row]:
                draw_box(axes[0], box)
        for ax, (label, style) in zip(axes[original:], styles, strict=True):
            name = f"{label or 'the map'} of example {row}"
            draw_map(picture, ax, columns[label][row], image, style, show_colorbar, name)
            if label in marks:
                frame_left_out(ax, marks[label][row])
            lines = [label, style.view.replace("_", " ") if len(views) > 1 else ""]
            title(ax, " – ".join(filter(None, lines)), panel_size)
            if captions and label in captions:
                ax.set_xlabel(captions[label][row], fontsize=9)
        if titles is not None and original:
            heading = {"fontsize": 11, "fontweight": "bold", "loc": "left"}
            title(axes[0], titles[row], panel_size, **heading)
        elif titles is not None:
            axes[0].set_ylabel(titles[row], fontsize=10, fontweight="bold")
    if signed:
        picture.supxlabel(LEGEND, fontsize=9, color=GREY)
    finished(picture)
    return picture


def _tall(shapes: Sequence[tuple[int, ...]]) -> float:
    """The height of a row, of its panels' width; of pictures like ribbons not less than of bars."""
    return min(max(max(shape[0] / shape[1] for shape in shapes), 0.1), 4.0)


def _frames(boxes: Sequence[Any], pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Boxes (n, 4) of each image, which may have none."""
    each = [np.zeros((0, 4)) if np.size(one) == 0 else one for one in boxes]
    return [checked_boxes(one, [p])[0] for one, p in zip(each, pictures, strict=True)]


def _maps(
    values: Any,
    pictures: list[np.ndarray] | None,
    batched: bool,
    patch_size: Any,
    interpolation: str | None,
    label: str,
) -> list[np.ndarray]:
    name = f"attributions[{label!r}]" if label else "attributions"
    found = map_list(values, pictures, batched, name)
    sizes = [one.shape for one in found] if pictures is None else [p.shape[:2] for p in pictures]
    return [
        fitted(one, size, patch_size, interpolation, name)
        for one, size in zip(found, sizes, strict=True)
    ]


def _checked_views(
    views: Sequence[str], columns: Mapping[str, list[np.ndarray]], sign: str, on_image: bool
) -> list[tuple[str, tuple[str, str]]]:
    """(label, (view, sign)) of every panel of a row."""
    if not views:
        raise OptionError("method: expected at least one view, got none")
    return [
        (label, checked_view(view, resolved_sign(sign, maps), sign == "auto", on_image))
        for label, maps in columns.items()
        for view in views
    ]


def _marks(
    left_out: Any,
    columns: Mapping[str, list[np.ndarray]],
    pictures: list[np.ndarray] | None,
    batched: bool,
) -> dict[str, list[np.ndarray]]:
    """Where tokens were left out, (H, W) bool, by the columns' labels."""
    given = {} if left_out is None else by_label(left_out)
    if unknown := set(given) - {"", *columns}:
        raise InputError(f"left_out: expected some of {list(columns)}, got {sorted(unknown)}")
    marks = {}
    for label, maps in columns.items():
        if (mask := given.get(label, given.get(""))) is not None:
            found = map_list(mask, pictures, batched, "left_out")
            if [one.shape for one in found] != [one.shape for one in maps]:
                raise InputError(
                    f"left_out: expected {[one.shape for one in maps]} as the maps have, got "
                    f"{[one.shape for one in found]}"
                )
            marks[label] = [one != 0 for one in found]
    return marks


def _alt(columns: Mapping[str, Any], titles: Sequence[str] | None) -> str:
    labels = ", ".join(filter(None, columns)) or "attributions"
    return f"{labels}: {'; '.join(titles)}" if titles else f"maps of {labels}"
