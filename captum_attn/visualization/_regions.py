"""Regions of an image in the colours of their relevance: boxes, or patches in reading order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.patches import Rectangle
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.visualization._arrays import array, resized
from captum_attn.visualization._panels import show_image
from captum_attn.visualization._style import AGAINST, FOR, OVERLAYS, signed, tint

EDGE = np.full(3, 0.55)  # of a region without relevance
ALPHA = 0.85  # of a map over its image
LABEL = (0.2, 0.075)  # width and height of a written value, of the image's width
LABELLED = 0.05  # least share of the scale at which a region's value is written


def checked_boxes(boxes: Any, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Boxes (R, 4) of each image, in its pixels; (R, 4) alone are those of all."""
    if isinstance(boxes, (list, tuple)) and boxes and _is_table(boxes[0]):
        each = [array(one, "boxes") for one in boxes]
    else:
        values = array(boxes, "boxes")
        each = list(values) if values.ndim == 3 else [values] * len(images)
    if len(each) != len(images):
        raise InputError(f"boxes: expected those of {len(images)} images, got {len(each)}")
    for one, image in zip(each, images, strict=True):
        if one.ndim != 2 or one.shape[1] != 4:
            raise InputError(f"boxes: expected (R, 4) or (B, R, 4), got {one.shape}")
        if (one[:, :2] > one[:, 2:]).any():
            raise InputError(
                "boxes: expected x_min <= x_max and y_min <= y_max; for (x, y) of the centre, "
                "width and height, convert them first"
            )
        side = max(image.shape[:2])
        if len(one) and side > 2 and one.min() >= 0 and one.max() <= 1:
            raise InputError(
                f"boxes: expected pixels of an image of {image.shape[:2]}, got numbers in [0, 1]; "
                "multiply them by width and height"
            )
    return each


def _is_table(values: Any) -> bool:
    """Whether there are boxes of one image here."""
    if isinstance(values, (list, tuple)):
        return bool(values) and isinstance(values[0], (list, tuple, Tensor, np.ndarray))
    return getattr(values, "ndim", 0) == 2


def draw_regions(
    ax: Axes,
    image: np.ndarray,
    boxes: np.ndarray,
    shares: np.ndarray,
    values: np.ndarray | None = None,
) -> None:
    """Boxes `(R, 4)` filled by their share of the scale, in [-1, 1]; with `values` labelled."""
    show_image(ax, image, (1, 1), grey=True)
    # The strongest last, on top of the others.
    for i in np.argsort(np.abs(shares), kind="stable"):
        share = float(shares[i])
        x1, y1, x2, y2 = (float(edge) - 0.5 for edge in boxes[i])  # pixels' centres are integers
        strength, colour = abs(share), FOR if share > 0 else AGAINST
        edge = (1 - strength) * EDGE + strength * colour
        frame: dict[str, Any] = {"xy": (x1, y1), "width": x2 - x1, "height": y2 - y1}
        ax.add_patch(Rectangle(**frame, color=tuple(colour), alpha=0.45 * strength, linewidth=0))
        ax.add_patch(
            Rectangle(**frame, fill=False, edgecolor=tuple(edge), linewidth=0.6 + strength)
        )
    if values is not None:
        _write_values(ax, image.shape[1], boxes, shares, values)


def _write_values(
    ax: Axes, width: int, boxes: np.ndarray, shares: np.ndarray, values: np.ndarray
) -> None:
    strongest = np.argsort(-np.abs(shares), kind="stable")
    for i in apart(boxes, strongest.tolist(), width):
        if abs(shares[i]) >= LABELLED:
            x, y = (float(edge) - 0.5 + 0.012 * width for edge in boxes[i, :2])
            label = {"facecolor": tint(float(shares[i])), "edgecolor": "none", "pad": 0.8}
            ax.text(x, y, signed(float(values[i])), fontsize=6.5, va="top", bbox=label)


def apart(boxes: np.ndarray, order: Sequence[int], width: int) -> list[int]:
    """Those boxes whose upper left corner can be labelled: on none that came before in `order`."""
    taken: list[int] = []
    room = np.array(LABEL) * width
    for i in order:
        if all((np.abs(boxes[i, :2] - boxes[j, :2]) > room).any() for j in taken):
            taken.append(i)
    return taken


def draw_shares(
    ax: Axes,
    image: np.ndarray,
    shares: np.ndarray,
    sign: str,
    alpha: float,
    cmap: str | Colormap | None = None,
) -> None:
    """A map `(H, W)` of shares of the scale, in [-1, 1], over its image."""
    show_image(ax, image, (1, 1), grey=True)
    low = -1 if sign == "all" else 0
    ax.imshow(shares, cmap=cmap or OVERLAYS[sign], vmin=low, vmax=1, alpha=alpha)


def grid_of(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of patches; as square as their number where nothing is said."""
    side = round(count**0.5)
    rows, columns = (side, side) if grid is None else grid
    if rows * columns != count:
        raise OptionError(
            f"grid: expected (rows, columns) of {count} patches, got {grid}; regions that form no "
            "grid need `boxes=`"
        )
    return rows, columns


def over_image(
    shares: np.ndarray, grid: tuple[int, int], image: np.ndarray, interpolation: str
) -> np.ndarray:
    """Patches `(rows * columns,)` at the image's size `(H, W)`."""
    return resized(shares.reshape(grid), (image.shape[0], image.shape[1]), interpolation)
