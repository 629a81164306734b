"""Textured objects over noise, with their masks: an image's class is the texture of its object.

Ellipses, polygons and blobs of any colours cover 15 to 40 % of the image; only the texture tells
the classes apart, so that the evidence lies on the object and all over it. Some textures differ in
orientation alone and some in frequency alone; all of them repeat within one or two patches of the
demo's ViT.

Colours, phases, shapes and places are drawn afresh for every image and say nothing about the class.
The ground is noise of the object's brightness: soft clouds of colour under pixel noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn.toy.scenes import IMAGE_SIZE, Split, _normal, _pixel_grid, _uniform

AREA = (0.15, 0.40)  # share of the image that the object covers
MAX_TILT = math.radians(8.0)  # of a texture against its class's orientation
MAX_SCALING = 0.10  # relative, of a texture's period
CONTRAST = 0.35  # least root mean square difference of a texture's two colours
OBJECT_NOISE, GROUND_NOISE = 0.06, 0.15  # standard deviations of a pixel
_CLOUDS = 9  # cells along a side of the ground's clouds
_HARMONICS = 4  # of a blob's outline
_ANGLES = 360  # at which an outline is measured

Wave = Callable[[Tensor, Tensor], Tensor]  # of the coordinates in periods; its sign is the colour


class Texture(NamedTuple):
    """One class.

    Attributes:
        name (str): the class's name.
        wave (callable): from coordinates in periods (u, v) to a number whose sign is the colour.
        angle (float): orientation, degrees.
        period (float): pixels.
    """

    name: str
    wave: Wave
    angle: float
    period: float


def _turn(x: Tensor) -> Tensor:
    return (2 * math.pi * x).sin()


def _stripes(u: Tensor, v: Tensor) -> Tensor:
    return _turn(v)


def _checks(u: Tensor, v: Tensor) -> Tensor:
    return _turn(u) * _turn(v)


def _dots(u: Tensor, v: Tensor) -> Tensor:
    return 0.32 - torch.hypot(u - u.round(), v - v.round())


def _zigzag(u: Tensor, v: Tensor) -> Tensor:
    return _turn(v + (u - u.round()).abs())


TEXTURES = (
    Texture("horizontal stripes", _stripes, 0.0, 5.0),
    Texture("rising stripes", _stripes, 45.0, 5.0),
    Texture("vertical stripes", _stripes, 90.0, 5.0),
    Texture("falling stripes", _stripes, 135.0, 5.0),
    Texture("wide horizontal stripes", _stripes, 0.0, 10.0),
    Texture("wide vertical stripes", _stripes, 90.0, 10.0),
    Texture("fine checks", _checks, 0.0, 6.0),
    Texture("coarse checks", _checks, 0.0, 12.0),
    Texture("dots", _dots, 0.0, 8.0),
    Texture("zigzag", _zigzag, 0.0, 8.0),
)


class TextureBatch(NamedTuple):
    """A batch of textured objects.

    Attributes:
        images (Tensor): ``(B, 3, 64, 64)``, float32 in [0, 1].
        labels (Tensor): ``(B,)``, int64, positions in ``TEXTURES``.
        masks (Tensor): ``(B, 64, 64)``, bool, where the object is.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor


def textured_objects(
    n: int, split: Split = "test", seed: int = 0, device: torch.device | str = "cpu"
) -> TextureBatch:
    """Draws ``n`` images of one textured object each. Equal arguments give equal images.

    All random numbers come from one generator on the CPU, as in
    :func:`~captum_attn.toy.scenes.scenes`. The two splits have no seed of that generator in
    common, whatever the seeds given.

    Args:
        n (int): how many images.
        split (str, optional): ``"test"`` (default) or ``"train"``.
        seed (int, optional): seed of the images, not negative. Default: 0.
        device (torch.device or str, optional): where they are rendered. Default: ``"cpu"``.

    Returns:
        TextureBatch: images ``(n, 3, 64, 64)``, labels ``(n,)`` and masks ``(n, 64, 64)``.

    Examples::

        >>> batch = textured_objects(4, split="test", seed=0)
        >>> logits = load_texture_vit()(batch.images)
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = torch.Generator().manual_seed(2 * seed + (split == "test"))
    labels = torch.randint(len(TEXTURES), (n,), generator=rng)
    masks = _draw_masks(n, rng, device)
    ground = _render_ground(n, rng, device)
    surface = _render_surfaces(labels, rng, device)
    images = torch.where(masks[:, None], surface, ground).clamp(0, 1)
    return TextureBatch(images, labels.to(device), masks)


def _draw_masks(n: int, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """Objects ``(n, 64, 64)``, bool: a third ellipses, a third polygons, a third blobs."""
    radii = _outlines(n, rng)  # (n, _ANGLES)
    area = _uniform(rng, n, 1, low=AREA[0], high=AREA[1]) * IMAGE_SIZE**2
    radii = radii * (area / (math.pi * radii.square().mean(1, keepdim=True))).sqrt()
    angles = torch.arange(_ANGLES, dtype=torch.float32) * (2 * math.pi / _ANGLES)
    outline = radii[..., None] * torch.stack([angles.cos(), angles.sin()], -1)  # (n, _ANGLES, 2)
    low, high = -outline.amin(1), IMAGE_SIZE - outline.amax(1)  # centres that keep it inside
    free = _uniform(rng, n, 2)
    centre = low + (high - low) * torch.where(high > low, free, 0.5)
    offset = _pixel_grid(device) - centre.to(device)[:, None, None]  # (n, 64, 64, 2)
    angle = torch.atan2(offset[..., 1], offset[..., 0]) * (_ANGLES / (2 * math.pi))
    nearest = angle.round().long() % _ANGLES
    reach = radii.to(device).gather(1, nearest.flatten(1)).view(nearest.shape)
    return offset.norm(dim=-1) <= reach


def _outlines(n: int, rng: torch.Generator) -> Tensor:
    """Distances ``(n, _ANGLES)`` of outlines from their centres, in no particular unit."""
    turned = _uniform(rng, n, 1, high=2 * math.pi)
    angle = torch.arange(_ANGLES, dtype=torch.float32) * (2 * math.pi / _ANGLES) + turned
    stretch = _uniform(rng, n, 1, low=1.0, high=1.7)
    ellipse = 1 / torch.hypot(angle.cos(), stretch * angle.sin())
    sector = 2 * math.pi / torch.randint(4, 8, (n, 1), generator=rng)  # 4 to 7 corners
    polygon = 1 / (angle % sector - sector / 2).cos()
    order = torch.arange(2, 2 + _HARMONICS)  # the first only moves the outline
    phase = _uniform(rng, n, 1, _HARMONICS, high=2 * math.pi)
    height = _normal(rng, n, 1, _HARMONICS, std=0.35) / order
    blob = (1 + (height * (order * angle[..., None] + phase).cos()).sum(-1)).clamp(0.5, 1.5)
    kind = torch.randint(3, (n, 1), generator=rng)
    return torch.where(kind == 0, ellipse, torch.where(kind == 1, polygon, blob))


def _render_ground(n: int, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """Noise ``(n, 3, 64, 64)``, not yet confined to [0, 1]."""
    clouds = _uniform(rng, n, 3, _CLOUDS, _CLOUDS).to(device)
    clouds = F.interpolate(clouds, IMAGE_SIZE, mode="bicubic", align_corners=True)
    return clouds + _normal(rng, n, 3, IMAGE_SIZE, IMAGE_SIZE, std=GROUND_NOISE).to(device)


def _render_surfaces(labels: Tensor, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """Textures ``(n, 3, 64, 64)`` all over the image, in two colours each, under pixel noise."""
    n = len(labels)
    tilt = _uniform(rng, n, 1, 1, low=-MAX_TILT, high=MAX_TILT)
    scaling = _uniform(rng, n, 1, 1, low=1 - MAX_SCALING, high=1 + MAX_SCALING)
    phase = _uniform(rng, n, 1, 1, 2).to(device)
    angle = torch.tensor([math.radians(t.angle) for t in TEXTURES])[labels, None, None] + tilt
    period = torch.tensor([t.period for t in TEXTURES])[labels, None, None] * scaling
    along = torch.stack([angle.cos(), -angle.sin()], -1).to(device)  # y points down
    across = torch.stack([angle.sin(), angle.cos()], -1).to(device)
    grid = _pixel_grid(device) / period[..., None].to(device)
    u = (grid * along).sum(-1) + phase[..., 0]  # (n, 64, 64)
    v = (grid * across).sum(-1) + phase[..., 1]
    sign = torch.empty_like(u, dtype=torch.bool)
    for label, texture in enumerate(TEXTURES):
        own = (labels == label).to(device)
        sign[own] = texture.wave(u[own], v[own]) > 0
    first, second = (c.to(device)[..., None, None] for c in _draw_colours(n, rng))
    surface = torch.where(sign[:, None], first, second)
    return surface + _normal(rng, n, 3, IMAGE_SIZE, IMAGE_SIZE, std=OBJECT_NOISE).to(device)


def _draw_colours(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two colours ``(n, 3)`` that differ by at least `CONTRAST`."""
    first, second = _uniform(rng, n, 3), _uniform(rng, n, 3)
    apart = (first - second).square().mean(1, keepdim=True).sqrt()
    # Opposite corners of the cube are far from any colour that is too close to the other one.
    return first, torch.where(apart < CONTRAST, (first < 0.5).float(), second)
