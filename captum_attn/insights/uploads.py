"""Pictures that a stranger sends: limited in bytes and pixels, and decoded by Pillow alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_attn import _pictures
from captum_attn._checks import shown
from captum_attn._pictures import Picture
from captum_attn.errors import InputError

__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "Picture", "fitted", "read_picture"]

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def read_picture(path: str | Path) -> Picture:
    """A picture file of unknown origin.

    Its header is read first: nothing is decoded of what is too large or of another format.

    Args:
        path (str or Path): a PNG, JPEG, WebP, GIF (its first frame) or BMP file, at most 10 MiB
            and 40 megapixels.

    Returns:
        Image: in RGB, upright, transparency over white.

    Raises:
        InputError: for whatever is no such picture; it names the file without its folder.

    Examples::

        >>> read_picture("cat.jpg").mode
        'RGB'
    """
    from PIL import Image

    if not isinstance(path, (str, PathLike)):
        raise InputError(f"expected the path of a picture, got {shown(path)}")
    name = Path(path).name
    with _readable(name):
        size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise InputError(
            f"'{name}' has {size / 2**20:.1f} MiB: expected at most {MAX_BYTES >> 20}; give a "
            "smaller picture"
        )
    with _readable(name), Image.open(path, formats=FORMATS) as file:
        width, height = file.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"'{name}' has {width} x {height} pixels: expected at most {MAX_PIXELS / 1e6:.0f} "
            "megapixels; give a smaller picture"
        )
    with _readable(name):
        return _pictures.read_picture(path)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Whatever Pillow raises, the file cannot be read."""
    try:
        yield
    except Exception as problem:
        raise InputError(
            f"'{name}' is no picture that can be read; give a PNG, JPEG, WebP, GIF or BMP file"
        ) from problem


def fitted(picture: Picture, shape: Sequence[int]) -> Tensor:
    """A picture as a tensor (C, H, W) in [0, 1]: the middle of it, resized; grey where C is 1."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    if channels not in (1, 3):
        raise InputError(
            f"pictures have 1 or 3 channels, the examples have {channels}: pass `upload=` to the "
            "ImageFeature, from a PIL image to the tensor"
        )
    resized = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    pixels: Any = np.asarray(resized.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255).reshape(height, width, channels).permute(2, 0, 1)
