"""Images and maps in the forms that users have, as lists of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn._checks import FAILURES, listed, plain, shown, whole
from captum_attn._pictures import in_colour
from captum_attn.errors import InputError, OptionError

LARGEST = 1e100  # beyond it sums overflow
Values = Any  # Tensor, array, PIL image, or a sequence of them


def array(values: Any, name: str) -> np.ndarray:
    """Numbers on the CPU in float64; NaN, infinity and what is no real number are refused."""
    try:
        if isinstance(values, Tensor):
            real = not values.is_complex() and not values.is_quantized
            values = values.detach().cpu().double().numpy() if real else values
        found = np.asarray(values)
    except FAILURES as problem:
        raise _no_numbers(values, name) from problem
    if found.dtype.kind not in "biuf":
        raise _no_numbers(values, name)
    found = found.astype(np.float64)
    bad = ~(np.abs(found) < LARGEST)
    if bad.any():
        raise InputError(
            f"{name}: expected finite numbers, got {int(bad.sum())} of {bad.size} NaN or infinite "
            f"(or beyond {LARGEST:g}); look for NaN in the model's inputs or outputs"
        )
    return found


def _no_numbers(values: Any, name: str) -> InputError:
    more = f" ({values.layout})" if isinstance(values, Tensor) else ""
    return InputError(
        f"{name}: expected numbers, a dense tensor or an array of real ones; got {shown(values)}"
        f"{more}"
    )


def by_label(attributions: Any) -> dict[str, Any]:
    """Several attributions side by side by their labels; a single one has no label."""
    if not isinstance(attributions, Mapping):
        return {"": attributions}
    if not attributions:
        raise InputError("attributions: expected at least one, got an empty Mapping")
    return {plain("attributions: label", label): v for label, v in attributions.items()}


def check_counts(count: int, given: Mapping[str, Any]) -> None:
    """What is said of the examples is said of each of them."""
    for name, values in given.items():
        if values is not None and (found := len(listed(name, values))) != count:
            raise InputError(f"{name}: expected one for each example ({count}), got {found}")


def is_list(values: Any) -> bool:
    """A sequence of examples, not one of numbers."""
    return isinstance(values, (list, tuple)) and not (values and isinstance(values[0], Real))


def image_list(images: Any) -> tuple[list[np.ndarray], bool]:
    """Images as `(H, W, 3)` in [0, 1], and whether they came as a batch.

    Tensors have their channels first, arrays and PIL images last, as in Captum.
    """
    if is_list(images):
        if not images:
            raise InputError("images: expected at least one, got none")
        return [one_image(image, f"images[{i}]") for i, image in enumerate(images)], True
    if hasattr(images, "getbands"):  # of Pillow: palettes, transparency and 16 bits as they look
        images = _of_pillow(images)
    values = array(images, "images")
    if _of_bytes(images):
        values = values / 255
    if isinstance(images, Tensor) and values.ndim in (3, 4):
        values = np.moveaxis(values, -3, -1)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim not in (3, 4) or values.shape[-1] not in (1, 3, 4) or 0 in values.shape:
        raise InputError(
            "images: expected tensors (C, H, W) or (B, C, H, W), arrays (H, W, C) or PIL images, "
            f"with 1 or 3 channels; got {tuple(np.shape(images))}"
        )
    check_two_sides("images", values.shape[-3:-1])
    batched = values.ndim == 4
    shown = [_displayed(image) for image in (values if batched else values[None])]
    return shown, batched


def one_image(image: Any, name: str) -> np.ndarray:
    """One image as `(H, W, 3)` in [0, 1]."""
    found, _ = image_list(image)
    if len(found) != 1:
        raise InputError(f"{name}: expected one image, got {shown(image)}")
    return found[0]


def _of_pillow(picture: Any) -> np.ndarray:
    try:
        return np.asarray(in_colour(picture))
    except FAILURES as problem:
        raise InputError(f"images: cannot read {shown(picture)} ({problem})") from problem


def _of_bytes(images: Any) -> bool:
    """Whether pixels go from 0 to 255: whole numbers, but not bool."""
    if isinstance(images, Tensor):
        return not images.is_floating_point() and images.dtype != torch.bool
    return np.asarray(images).dtype.kind in "iu"


def _displayed(image: np.ndarray) -> np.ndarray:
    """`(H, W, 3)` in [0, 1]: as it is, or stretched where it is normalised."""
    if image.shape[-1] == 4:  # transparency over white
        image = image[..., 3:] * image[..., :3] + 1 - image[..., 3:]
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        # Floats from 0 to 255 keep their ground, as in Captum; normalised ones have none.
        image = image / 255 if low >= 0 and 2 < high <= 255 else _stretched(image, low, high)
    return np.repeat(image, 3, -1) if image.shape[-1] == 1 else image


def _stretched(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return (image - low) / (high - low) if high > low else np.full_like(image, 0.5)


def map_list(
    values: Any, images: Sequence[np.ndarray] | None, batched: bool, name: str = "attributions"
) -> list[np.ndarray]:
    """Maps `(H, W)`, one for each image: attributions summed over their channels."""
    if is_list(values):
        ones = [None] * len(values) if images is None else [[image] for image in images]
        if len(ones) != len(values):
            raise InputError(_unlike_counts(name, len(values), len(ones)))
        each = zip(values, ones, strict=True)
        return [map_list(value, image, False, name)[0] for value, image in each]
    found = array(values, name)
    first = isinstance(values, Tensor)
    if found.ndim == 2:
        found = found[None]
    elif found.ndim == 3 and batched:
        pass  # (B, H, W)
    elif found.ndim == 3 and (images is not None or not first):
        if (channels := found.shape[0 if first else -1]) not in (1, 2, 3, 4):
            raise InputError(
                f"{name}: expected (H, W) or {'(C, H, W)' if first else '(H, W, C)'} of one image, "
                f"got {channels} channels in {found.shape}; pass a batch of images for a batch of "
                "maps, or a Mapping of label to map for several maps of one image"
            )
        found = found.sum(0 if first else -1)[None]
    elif found.ndim == 4:
        found = found.sum(1 if first else -1)
    else:
        raise InputError(
            f"{name}: expected (H, W), (C, H, W) or (B, C, H, W), and without an image (H, W) or "
            f"(B, C, H, W), as three axes could be either; got {found.shape}"
        )
    if 0 in found.shape:
        raise InputError(f"{name}: expected a map, got the empty shape {found.shape}")
    check_two_sides(name, found.shape[1:])
    if images is not None and len(found) != len(images):
        raise InputError(_unlike_counts(name, len(found), len(images)))
    return list(found)


def check_two_sides(name: str, size: Sequence[int]) -> None:
    """Refuses a row of tokens, or of samples: it would be drawn as a line of pixels."""
    if min(size) == 1 < max(size):
        raise InputError(
            f"{name}: expected a picture, got {max(size)} values in a row, {tuple(size)}; use "
            "visualize_text for tokens and visualize_signal for audio and series"
        )


def _unlike_counts(name: str, found: int, images: int) -> str:
    return f"{name}: expected one map for each image ({images}), got {found}"


def side_of(patch_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a patch."""
    if isinstance(patch_size, (tuple, list)):
        return pair_of("patch_size", patch_size, "a whole number or (height, width) in pixels")
    side = whole("patch_size", patch_size)
    return side, side


def pair_of(name: str, value: Any, expected: str = "(rows, columns)") -> tuple[int, int]:
    """Two whole numbers of at least 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise OptionError(f"{name}: expected {expected}, got {shown(value)}")
    return whole(f"{name}[0]", value[0]), whole(f"{name}[1]", value[1])


def fitted(
    values: np.ndarray,
    size: tuple[int, int],
    patch_size: int | Sequence[int] | None,
    interpolation: str | None,
    name: str = "attributions",
) -> np.ndarray:
    """A map at the image's size `(H, W)`: as it is, patch by patch, or smooth between them."""
    if patch_size is None:
        if interpolation is not None:
            raise OptionError(f"interpolation={interpolation!r} needs `patch_size=`, in pixels")
        if values.shape != tuple(size):
            raise InputError(
                f"{name}: expected a map of the image's size {tuple(size)}, got {values.shape}; "
                "for a map of patches pass `patch_size=`, for other images resize one of them"
            )
        return values
    height, width = side_of(patch_size)
    grid = (size[0] // height, size[1] // width)
    if size[0] % height or size[1] % width:
        raise OptionError(f"patch_size={patch_size!r} does not divide the image's size {size}")
    if values.shape not in (tuple(size), grid):
        raise InputError(
            f"{name}: expected a map of the image's size {tuple(size)} or of its patches {grid}, "
            f"got {values.shape}"
        )
    if values.shape != grid:
        blocks = values.reshape(grid[0], height, grid[1], width)
        values = blocks.mean((1, 3))
    return resized(values, size, interpolation or "nearest")


def resized(values: np.ndarray, size: Sequence[int], interpolation: str) -> np.ndarray:
    """A map `(h, w)` of patches at the image's size: patch-exact, or smooth between them."""
    cells = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    return F.interpolate(cells, tuple(size), mode=interpolation)[0, 0].numpy()
