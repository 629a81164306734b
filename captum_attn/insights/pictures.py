"""An image with its attribution, as the PNG that a feature's output has."""

from __future__ import annotations

import base64
import io
from typing import Any

from torch import Tensor

__all__ = ["drawn", "drawn_regions"]

PANEL, DPI = 3.0, 130  # width in inches, dots per inch


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


def _png(picture: Any) -> str:
    """In base64, without margins: two views side by side align."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.02)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
