"""An image with its attribution, as the PNG that a feature's output has."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor

__all__ = ["drawn", "drawn_boxes", "drawn_regions"]

PANEL, DPI = 3.0, 130  # width in inches, dots per inch
INK = "#777777"  # of a scale's numbers, by day and by night: the page's ground shows through


def drawn(heat: Tensor, image: Tensor, method: str) -> str:
    """A view of Captum's, as a PNG in base64."""
    from captum_attn.visualization import visualize_image

    picture = visualize_image(
        heat, image, method=method, show_original=False,
        show_colorbar=method != "original_image", panel_size=PANEL,
    )  # fmt: skip
    return _png(picture)


def drawn_regions(values: Tensor, image: Tensor, boxes: Tensor) -> str:
    """Boxes filled by their relevance; without any, their frames alone."""
    from captum_attn.visualization import Picture
    from captum_attn.visualization.shared import checked_boxes, draw_regions, image_list

    (shown,), _ = image_list(image)
    (frames,) = checked_boxes(boxes, [shown])
    shares = (values / (float(values.abs().max()) or 1.0)).numpy()
    picture = Picture(figsize=(PANEL, PANEL * shown.shape[0] / shown.shape[1]))
    draw_regions(picture.add_axes((0, 0, 1, 1)), shown, frames, shares, values.numpy())
    return _png(picture)


def drawn_boxes(
    image: Tensor, boxes: Tensor, heat: Tensor | None = None, chosen: int | None = None
) -> str:
    """Boxes with their numbers, the chosen one by a thick frame; or a box on its map.

    Args:
        image (Tensor): (1, C, H, W).
        boxes (Tensor): (n, 4), x_min, y_min, x_max, y_max in pixels.
        heat (Tensor, optional): (H, W), drawn over the image; the boxes then have no numbers.
        chosen (int, optional): among the boxes.
    """
    from captum_attn.visualization import visualize_image
    from captum_attn.visualization.shared import draw_box

    values = torch.ones(image.shape[-2:]) if heat is None else heat.detach().cpu()
    picture = visualize_image(
        values, image[0], method="original_image" if heat is None else "blended_heat_map",
        show_original=False, show_colorbar=heat is not None, panel_size=PANEL,
    )  # fmt: skip
    for i, box in enumerate(boxes.detach().cpu().tolist()):
        strong = heat is not None or i == chosen
        looks = {"linewidth": 2.5 if strong else 1.5, "linestyle": "-" if strong else "--"}
        draw_box(picture.axes[0], box, "" if heat is not None else str(i + 1), **looks)
    return _png(picture)


def _png(picture: Any) -> str:
    """In base64, without margins: two views side by side align."""
    from matplotlib.colors import to_rgba

    for ax in picture.axes:
        labels = ax.get_xticklabels()
        if any(to_rgba(label.get_color())[3] for label in labels):  # not those of a free place
            ax.tick_params(colors=INK)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.02,
                    facecolor="none")  # fmt: skip
    return base64.b64encode(buffer.getvalue()).decode("ascii")
