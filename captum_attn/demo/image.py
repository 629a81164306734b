"""Why does a small vision transformer see a 3 here? Scenes of two digits, or the user's picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import Attribution, IntegratedGradients
from PIL import Image
from torch import Tensor, nn

from captum_attn import AttentionRollout, AttnLRP, GenericAttention, RawAttention
from captum_attn._pictures import read_picture
from captum_attn.demo.deletion import keep_patches
from captum_attn.demo.explanation import Case, Question, explain
from captum_attn.toy.scenes import IMAGE_SIZE, scenes

# One call for all of them, Captum's own among them.
METHODS = (RawAttention, AttentionRollout, GenericAttention, AttnLRP, IntegratedGradients)
PATCH = 8  # side of the model's patches, pixels


def explain_scenes(model: nn.Module, count: int = 3, seed: int = 0) -> Iterator[Case]:
    """Held-out scenes, each asked about both of its digits.

    Args:
        model (nn.Module): images ``(B, 1, 64, 64)`` -> logits ``(B, 10)``, one per digit.
        count (int, optional): how many scenes. Default: 3.
        seed (int, optional): seed of the scenes. Default: 0.

    Returns:
        iterator of Case: computed one by one.

    Examples::

        >>> [case.name for case in explain_scenes(load_digit_vit(), count=2)]
        ['scene_1', 'scene_2']
    """
    batch = scenes(count, split="test", seed=seed)
    for i in range(count):
        digits = batch.labels[i].tolist()
        title = f"A scene with a {digits[0]} and a {digits[1]}"
        yield _explain(model, batch.images[i : i + 1], digits, f"scene_{i + 1}", title)


def explain_pictures(model: nn.Module, paths: Sequence[str | Path]) -> Iterator[Case]:
    """The user's own pictures, each asked about the digits that the model sees in it.

    Those are the digits of probability 0.5 or more, two at most, and the likeliest in any case.

    Args:
        model (nn.Module): see :func:`explain_scenes`.
        paths (sequence of str or Path): picture files.

    Returns:
        iterator of Case: computed one by one; the files are read at once.

    Examples::

        >>> next(explain_pictures(load_digit_vit(), ["seven.png"])).questions[0].asked
        'why 7?'
    """
    pictures = [load_picture(path) for path in paths]
    return (
        _explain(model, picture, _seen(model, picture), f"picture_{i}", f"Your {Path(path).name}")
        for i, (path, picture) in enumerate(zip(paths, pictures, strict=True), 1)
    )


def _seen(model: nn.Module, picture: Tensor) -> list[int]:
    with torch.no_grad():
        probabilities, digits = model(picture)[0].sigmoid().topk(2)
    return digits[: max(1, int((probabilities >= 0.5).sum()))].tolist()


def load_picture(path: str | Path) -> Tensor:
    """A picture file as the model wants it: grey, light ink on a dark ground, 64 x 64.

    The aspect ratio is kept and the rest filled with the picture's median. A picture whose
    median is light is inverted, so that ink on paper works too.

    Args:
        path (str or Path): a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file.

    Returns:
        Tensor: ``(1, 1, 64, 64)``, float32 in [0, 1].

    Examples::

        >>> load_picture("seven.png").shape
        torch.Size([1, 1, 64, 64])
    """
    return fit_picture(read_picture(path))


def fit_picture(picture: Image.Image) -> Tensor:
    """A picture in memory as the model wants it, see :func:`load_picture`.

    Args:
        picture (Image): upright, in colour or grey.

    Returns:
        Tensor: ``(1, 1, 64, 64)``, float32 in [0, 1].

    Examples::

        >>> fit_picture(Image.new("L", (100, 50))).shape
        torch.Size([1, 1, 64, 64])
    """
    grey = np.asarray(picture.convert("L"), dtype=np.float32) / 255
    ground = float(np.median(grey))
    if ground > 0.5:
        grey, ground = 1 - grey, 1 - ground
    pixels = torch.from_numpy(grey)[None, None]  # (1, 1, H, W)
    height, width = pixels.shape[-2:]
    scale = IMAGE_SIZE / max(height, width)
    size = [max(1, round(side * scale)) for side in (height, width)]
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2
    padding = [left, IMAGE_SIZE - size[1] - left, top, IMAGE_SIZE - size[0] - top]
    return F.pad(pixels, padding, value=ground).clamp(0, 1)


def _explain(model: nn.Module, image: Tensor, digits: list[int], name: str, title: str) -> Case:
    fill = float(image.median())  # the ground: most pixels carry no ink
    attributors = {method.__name__: method(model) for method in METHODS}

    def question(digit: int) -> Question:
        def attribute(attributor: Attribution) -> Tensor:
            return attributor.attribute(image, target=digit)[0].sum(0).detach()

        def probability(keep: Tensor) -> Tensor:
            return model(keep_patches(keep, image, PATCH, fill))[:, digit].sigmoid()

        def patches(relevance: Tensor) -> Tensor:
            return F.avg_pool2d(relevance[None, None], PATCH).flatten()

        calls = {name: partial(attribute, attributors[name]) for name in attributors}
        explanations, chance = explain(calls, probability, patches)
        with torch.no_grad():
            intact = float(model(image)[0, digit].sigmoid())
        return Question(f"why {digit}?", intact, explanations, chance)

    return Case(name, title, [question(digit) for digit in digits], image=image[0, 0])
