"""Picture files, decoded by Pillow alone: upright, and in colour."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from captum_attn._checks import is_file
from captum_attn.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "Image"

# Formats that Pillow decodes by itself; EPS, for one, would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def read_picture(path: str | Path) -> Picture:
    """A picture file of any mode, upright and in colour; what is none is refused.

    Transparency lies over white; 16 and 32 bits are scaled so that the least value is black and
    the greatest white.

    Args:
        path (str or Path): a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file.

    Returns:
        Image: of mode RGB.

    Raises:
        InputError: where there is no file, or none that can be decoded, or one that is too large.

    Examples::

        >>> read_picture("seven.png").mode
        'RGB'
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not is_file(path):
        raise InputError(f"no picture at '{path}'; give the path of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                return in_colour(ImageOps.exif_transpose(file))
    # A file cut short is an OSError, a broken PNG a SyntaxError, DecompressionBombError a plain
    # Exception: whatever Pillow raises, the file cannot be read.
    except Exception as problem:
        raise InputError(
            f"cannot read '{path}' as an image ({problem}); give a PNG or JPEG file"
        ) from problem


def in_colour(picture: Picture) -> Picture:
    """A picture of any mode in RGB; transparency lies over white."""
    from PIL import Image

    if picture.mode[0] in "IF":  # 16 and 32 bits: convert("RGB") would clip instead of scale
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are not finite")
        low, high = float(values.min()), float(values.max())
        scaled = 255 * (values - low) / (high - low or 1.0)
        picture = Image.fromarray(scaled.round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
