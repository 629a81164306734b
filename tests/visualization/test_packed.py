"""Packed patches are put back where the processor took them from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.visualization import unpack_patches, visualize_image


def packed(video: Tensor, size: int, merge: int, frames: int) -> Tensor:
    """(T, C, H, W) -> (patches, values), patch by patch, plainly."""
    rows = []
    for t in range(0, len(video), frames):
        for top in range(0, video.shape[2], size * merge):
            for left in range(0, video.shape[3], size * merge):
                for y in range(top, top + size * merge, size):
                    for x in range(left, left + size * merge, size):
                        patch = video[t : t + frames, :, y : y + size, x : x + size]
                        rows.append(patch.transpose(0, 1).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize(("merge", "frames"), [(2, 2), (1, 1), (2, 1)])
def test_images_come_back(merge: int, frames: int) -> None:
    one = torch.rand(1, 3, 16, 24).expand(frames, -1, -1, -1)
    other = torch.rand(2 * frames, 3, 8, 16)
    rows = torch.cat([packed(video, 4, merge, frames) for video in (one, other)])
    grid = torch.tensor([[1, 4, 6], [2, 2, 4]])
    options = {"merge_size": merge, "temporal_patch_size": frames}
    first, second = unpack_patches(rows, grid, **options, frames="mean")
    torch.testing.assert_close(first, one[0])
    torch.testing.assert_close(second, other.unflatten(0, (2, frames)).mean(1))
    first, second = unpack_patches(rows, grid, **options)
    torch.testing.assert_close(first, one.sum(0))
    assert len(visualize_image(first, one[0]).axes) > 1


def test_a_number_for_each_patch() -> None:
    grid = torch.arange(24.0).view(4, 6)
    rows = packed(grid[None, None], 1, 2, 1)[:, 0]
    (found,) = unpack_patches(rows, torch.tensor([[1, 4, 6]]))
    assert torch.equal(found, grid)


@pytest.mark.parametrize(
    ("rows", "grid"),
    [((24, 96), [[1, 4, 4]]), ((12, 96), [[1, 3, 4]]), ((16, 95), [[1, 4, 4]]), ((16, 96), [4, 4])],
)
def test_patches_of_other_grids_are_refused(rows: tuple[int, int], grid: list) -> None:
    with pytest.raises(InputError, match="expected"):
        unpack_patches(torch.rand(rows), torch.tensor(grid))
