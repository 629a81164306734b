"""Packed patches, as Qwen2-VL and its kin take their images, put back on their grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_attn._checks import one_of, shown, whole
from captum_attn.errors import InputError

__all__ = ["unpack_patches"]


def unpack_patches(
    patches: Tensor,
    grid_thw: Tensor,
    *,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    channels: int = 3,
    frames: str = "sum",
) -> list[Tensor]:
    """Puts the packed patches of several images or videos back on their grids.

    The rows are the patches of one image after the other, those that are merged into one token
    (`merge_size` x `merge_size`) beside each other; a row holds (channels, frames, height, width).

    Args:
        patches (Tensor): (patches, values) attributions or pixel values, or (patches,) one number
            for each.
        grid_thw (Tensor): (images, 3) numbers of patches in time, height and width, the
            processor's `image_grid_thw` or `video_grid_thw`.
        merge_size (int): the processor's `merge_size`. Default: 2.
        temporal_patch_size (int): frames in a patch, the processor's; 1 for VideoLLaMA3.
            Default: 2.
        channels (int): colours of a pixel. Default: 3.
        frames (str): "sum" of the frames of a patch, for attributions, or their "mean", for pixel
            values (of a still picture all are the same). Default: "sum".

    Returns:
        list of Tensor: for each image (C, H, W), for a video (T, C, H, W); without channels where
        each patch has one number.

    Raises:
        InputError: if the patches are not those of the grids.

    Examples::

        >>> found = GenericAttention(model).attribute(inputs, target=(-1, token))
        >>> maps = unpack_patches(found["pixel_values"], inputs["image_grid_thw"])
        >>> pixels = unpack_patches(inputs["pixel_values"], inputs["image_grid_thw"], frames="mean")
        >>> visualize_image(maps[0], pixels[0])
    """
    one_of("frames", frames, ("sum", "mean"))
    merge_size, channels = whole("merge_size", merge_size), whole("channels", channels)
    temporal_patch_size = whole("temporal_patch_size", temporal_patch_size)
    for name, tensor in (("patches", patches), ("grid_thw", grid_thw)):
        if not isinstance(tensor, Tensor) or tensor.is_complex() or tensor.dtype == torch.bool:
            raise InputError(f"{name}: expected a tensor of numbers, got {shown(tensor)}")
    if grid_thw.is_floating_point() or bool((grid_thw < 1).any()):
        raise InputError(f"grid_thw: expected whole numbers of patches >= 1, got {shown(grid_thw)}")
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or patches.ndim not in (1, 2):
        raise InputError(
            "expected patches (patches, values) and grid_thw (images, 3), got "
            f"{tuple(patches.shape)} and {tuple(grid_thw.shape)}"
        )
    grids = [tuple(map(int, grid)) for grid in grid_thw]
    counts = [math.prod(grid) for grid in grids]
    if sum(counts) != len(patches) or any(h % merge_size or w % merge_size for _, h, w in grids):
        raise InputError(
            f"expected the {sum(counts)} patches of the grids {grids}, in whole blocks of "
            f"{merge_size} x {merge_size}, got {len(patches)}"
        )
    inside = (1, 1) if patches.ndim == 1 else (channels, temporal_patch_size)
    values = patches[:, None] if patches.ndim == 1 else patches
    size = math.isqrt(values.shape[1] // math.prod(inside))
    if math.prod(inside) * size**2 != values.shape[1]:
        raise InputError(
            f"expected square patches of {channels} channels and {temporal_patch_size} frames, got "
            f"{values.shape[1]} values; give `channels=` and `temporal_patch_size=`"
        )
    images = []
    for (time, height, width), rows in zip(grids, values.split(counts), strict=True):
        h, w, m = height // merge_size, width // merge_size, merge_size
        blocks = rows.reshape(time, h, w, m, m, *inside, size, size)
        # (time, frames, channels, h, m, size, w, m, size): rows and columns of pixels together
        laid = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        laid = laid.reshape(time, inside[1], inside[0], height * size, width * size)
        image = laid.sum(1) if frames == "sum" else laid.to(torch.get_default_dtype()).mean(1)
        image = image[:, 0] if patches.ndim == 1 else image
        images.append(image[0] if time == 1 else image)
    return images
