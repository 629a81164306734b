"""Scenes of two different handwritten digits on a cluttered background, with their masks.

The digits are real (scikit-learn's ``load_digits``: 8 x 8 pixels, 1,797 images by 13 writers).
Every scene shows two of different classes that do not overlap, so one image has two right
answers at two known places: a class-specific explanation must move when the target does.

The two stand in different quarters of the scene. A quarter is 4 x 4 whole patches of the demo's
ViT, so that hardly a patch sees both digits and a map per patch can tell them apart.

One channel, because the digits are grey: a map then *is* the attribution of the image, with
nothing to sum over.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Split = Literal["train", "test"]

IMAGE_SIZE = 64  # pixels
NUM_CLASSES = 10
DIGIT_SIZE = (28.0, 32.0)  # side of a digit's 8 x 8 frame in the scene, pixels
MAX_ROTATION = math.radians(10.0)
MAX_SHEAR = 0.10
MAX_STRETCH = 0.10  # relative narrowing of the digit's width
ELASTIC = 0.8  # standard deviation of the elastic displacement, pixels
NUM_STROKES = 4  # clutter strokes per scene
_QUARTER = IMAGE_SIZE // 2  # side of a quarter of the scene, pixels
_FRAME = 8  # pixels of the source images
_MARGIN = 2  # blank source pixels around the frame, so that strokes end softly
_UPSAMPLING = 4


class SceneBatch(NamedTuple):
    """A batch of scenes.

    Attributes:
        images (Tensor): ``(B, 1, 64, 64)``, float32 in [0, 1], light ink on a dark ground.
        labels (Tensor): ``(B, 2)``, int64, the two digits, always different.
        masks (Tensor): ``(B, 2, 64, 64)``, bool, where the ink of either digit lies, in the
            order of ``labels``; the two never overlap.
        multi_hot (Tensor): ``(B, 10)``, float32, 1 for the two digits shown.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    multi_hot: Tensor


class DigitSplit(NamedTuple):
    """The digits of one split, sorted by class.

    Attributes:
        indices (Tensor): ``(N,)``, int64, positions in ``load_digits()``.
        glyphs (Tensor): ``(N, 1, 48, 48)``, float32 in [0, 1], padded and upsampled.
        starts (Tensor): ``(10,)``, int64, where each class begins.
        counts (Tensor): ``(10,)``, int64, how many digits each class has.
    """

    indices: Tensor
    glyphs: Tensor
    starts: Tensor
    counts: Tensor


@cache
def digit_split(split: Split) -> DigitSplit:
    """The digits that scenes of one split are made of: 80 % for training, 20 % held out.

    Args:
        split (str): ``"train"`` or ``"test"``. The partition is fixed and stratified by class.

    Returns:
        DigitSplit: the digits, sorted by class.

    Examples::

        >>> train, test = digit_split("train"), digit_split("test")
        >>> set(train.indices.tolist()) & set(test.indices.tolist())
        set()
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    digits = load_digits()
    train, test = train_test_split(
        range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    indices = torch.tensor(sorted(train if split == "train" else test))
    classes = torch.as_tensor(digits.target)[indices]
    order = classes.argsort(stable=True)
    indices, counts = indices[order], classes.bincount(minlength=NUM_CLASSES)
    glyphs = torch.as_tensor(digits.images, dtype=torch.float32)[indices, None] / 16  # (N, 1, 8, 8)
    glyphs = F.pad(glyphs, [_MARGIN] * 4)
    glyphs = F.interpolate(glyphs, scale_factor=_UPSAMPLING, mode="bicubic").clamp(0, 1)
    return DigitSplit(indices, glyphs, counts.cumsum(0) - counts, counts)


def scenes(
    n: int, split: Split = "test", seed: int = 0, device: torch.device | str = "cpu"
) -> SceneBatch:
    """Draws ``n`` scenes. Equal arguments give equal scenes.

    All random numbers come from one generator on the CPU, so a seed means the same scenes on
    every device; the global random state is neither read nor changed.

    Args:
        n (int): how many scenes.
        split (str, optional): ``"test"`` (default) or ``"train"``: which digits are shown.
        seed (int, optional): seed of the scenes. Default: 0.
        device (torch.device or str, optional): where they are rendered. Default: ``"cpu"``.

    Returns:
        SceneBatch: images ``(n, 1, 64, 64)``, labels ``(n, 2)``, masks ``(n, 2, 64, 64)`` and
        multi_hot ``(n, 10)``.

    Examples::

        >>> batch = scenes(4, split="test", seed=0)
        >>> logits = load_digit_vit()(batch.images)
    """
    rng = torch.Generator().manual_seed(seed)
    labels, picks = _draw_digits(n, digit_split(split), rng)
    ink = _render_digits(digit_split(split).glyphs[picks], rng, device)  # (n, 2, 64, 64)
    background = _render_clutter(n, rng, device)  # (n, 64, 64)
    contrast = _uniform(rng, n, 2, low=0.75, high=1.0).to(device)[..., None, None]
    noise = _normal(rng, n, IMAGE_SIZE, IMAGE_SIZE, std=0.03).to(device)
    cover, paint = ink.amax(1), (ink * contrast).amax(1)
    image = (background * (1 - cover) + paint + noise).clamp(0, 1)
    first = ink[:, 0] >= ink[:, 1]  # a pixel belongs to its stronger digit
    masks = (ink > 0.4) & torch.stack([first, ~first], 1)
    labels = labels.to(device)
    multi_hot = F.one_hot(labels, NUM_CLASSES).sum(1).to(torch.float32)
    return SceneBatch(image[:, None], labels, masks, multi_hot)


def _uniform(rng: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    # The data type is spelled out here and below: scenes do not follow torch's default.
    return low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float32)


def _normal(rng: torch.Generator, *shape: int, std: float) -> Tensor:
    return std * torch.randn(*shape, generator=rng, dtype=torch.float32)


def _draw_digits(n: int, digits: DigitSplit, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two different classes and one digit of each: labels and picks, both ``(n, 2)``."""
    first = torch.randint(NUM_CLASSES, (n,), generator=rng)
    other = torch.randint(1, NUM_CLASSES, (n,), generator=rng)
    labels = torch.stack([first, (first + other) % NUM_CLASSES], 1)
    counts = digits.counts[labels]
    within = (_uniform(rng, n, 2) * counts).long().minimum(counts - 1)  # the product may round up
    return labels, digits.starts[labels] + within


def _place(sizes: Tensor, rng: torch.Generator) -> Tensor:
    """Centres ``(n, 2, 2)`` as (x, y) of two frames of ``sizes`` (n, 2), in different quarters."""
    n = len(sizes)
    first = torch.randint(4, (n,), generator=rng)
    other = torch.randint(1, 4, (n,), generator=rng)
    quarter = torch.stack([first, (first + other) % 4], 1)
    corner = torch.stack([quarter % 2, quarter // 2], -1) * _QUARTER  # (n, 2, 2)
    room = _QUARTER - sizes[..., None]
    return corner + sizes[..., None] / 2 + room * _uniform(rng, n, 2, 2)


def _pixel_grid(device: torch.device | str) -> Tensor:
    axis = torch.arange(IMAGE_SIZE, device=device, dtype=torch.float32) + 0.5
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (64, 64, 2) as (x, y)


def _render_digits(glyphs: Tensor, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """Ink ``(n, 2, 64, 64)`` in [0, 1] of glyphs ``(n, 2, 1, 48, 48)``, affine and elastic."""
    n = len(glyphs)
    sizes = _uniform(rng, n, 2, low=DIGIT_SIZE[0], high=DIGIT_SIZE[1])
    centres = _place(sizes, rng).to(device)
    angle = _uniform(rng, n, 2, low=-MAX_ROTATION, high=MAX_ROTATION)
    shear = _uniform(rng, n, 2, low=-MAX_SHEAR, high=MAX_SHEAR)
    widen = 1 / _uniform(rng, n, 2, low=1 - MAX_STRETCH)
    cos, sin = angle.cos(), angle.sin()
    rows = [widen * (cos + shear * sin), widen * (sin - shear * cos), -sin, cos]
    # Scene pixels to grid_sample's [-1, 1] over the padded glyph; it samples, so it is inverse.
    to_glyph = torch.stack(rows, -1).unflatten(-1, (2, 2)) * (
        2 * _FRAME / (_FRAME + 2 * _MARGIN) / sizes[..., None, None]
    )
    bend = _normal(rng, 2 * n, 2, 5, 5, std=ELASTIC).to(device)
    bend = F.interpolate(bend, IMAGE_SIZE, mode="bicubic", align_corners=True)
    offset = _pixel_grid(device) - centres.flatten(0, 1)[:, None, None]  # (2n, 64, 64, 2)
    offset = offset + bend.permute(0, 2, 3, 1)
    grid = torch.einsum("bhwj,bij->bhwi", offset, to_glyph.flatten(0, 1).to(device))
    ink = F.grid_sample(glyphs.flatten(0, 1).to(device), grid, align_corners=False)
    return ink.view(n, 2, IMAGE_SIZE, IMAGE_SIZE)


def _render_clutter(n: int, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """Background ``(n, 64, 64)``: soft clouds and short strokes, both fainter than ink."""
    clouds = _uniform(rng, n, 1, 6, 6, high=0.2).to(device)
    canvas = F.interpolate(clouds, IMAGE_SIZE, mode="bilinear", align_corners=True)[:, 0]
    grid = _pixel_grid(device)
    for _ in range(NUM_STROKES):  # one at a time: memory stays that of one canvas
        start = _uniform(rng, n, 1, 1, 2, high=IMAGE_SIZE).to(device)
        angle = _uniform(rng, n, 1, 1, high=2 * math.pi).to(device)
        length = _uniform(rng, n, 1, 1, low=3.0, high=10.0).to(device)
        shade = _uniform(rng, n, 1, 1, low=0.2, high=0.5).to(device)
        along = torch.stack([angle.cos(), angle.sin()], -1)  # (n, 1, 1, 2)
        offset = grid - start
        reach = (offset * along).sum(-1).clamp(min=0).minimum(length)
        distance = (offset - reach[..., None] * along).norm(dim=-1)
        canvas = torch.maximum(canvas, shade * (2.0 - distance).clamp(0, 1))
    return canvas
