"""The package's own models by name, each with how its files are read and with data of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn._pictures import Picture, read_picture
from captum_attn.evaluation.data import mask_as_it_is
from captum_attn.evaluation.loaded import Loaded

__all__ = ["LOADERS", "mask_picture"]

SCENES = 500  # of the digit ViT, and objects of the texture ViT, if no files are given


def _digit_vit(labels: Sequence[str] | None) -> Loaded:
    from captum_attn.demo.image import load_picture
    from captum_attn.toy.digit_vit import load_digit_vit
    from captum_attn.toy.scenes import IMAGE_SIZE, NUM_CLASSES

    def read_mask(path: Path) -> Tensor:
        on = mask_picture(path).convert("L")
        pixels = torch.tensor(list(on.getdata())).view(1, 1, on.height, on.width).float()
        scale = IMAGE_SIZE / max(on.size)
        size = [max(1, round(side * scale)) for side in (on.height, on.width)]
        pixels = F.interpolate(pixels, size, mode="nearest-exact")[0, 0]
        top, left = (IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2
        padding = [left, IMAGE_SIZE - size[1] - left, top, IMAGE_SIZE - size[0] - top]
        return F.pad(pixels, padding) > 0

    return Loaded(
        load_digit_vit(),
        lambda path: load_picture(path)[0],
        read_mask,
        labels={i: str(i) for i in range(NUM_CLASSES)},
        examples=_digit_scenes,
        independent=True,
    )


def _digit_scenes(limit: int | None, seed: int) -> list[Any]:
    """Held-out scenes, asked about both of their digits: (image, digit, mask and scene)."""
    from captum_attn.toy.scenes import scenes

    batch = scenes(SCENES if limit is None else -(-limit // 2), split="test", seed=seed)
    return [
        (batch.images[i], int(batch.labels[i, k]), {"masks": batch.masks[i, k], "groups": i})
        for i in range(len(batch.images))
        for k in (0, 1)
    ][:limit]


def _texture_vit(labels: Sequence[str] | None) -> Loaded:
    import numpy as np
    from PIL.Image import Resampling

    from captum_attn.toy.scenes import IMAGE_SIZE
    from captum_attn.toy.texture_vit import load_texture_vit
    from captum_attn.toy.textures import TEXTURES

    side = IMAGE_SIZE, IMAGE_SIZE

    def read(path: Path) -> Tensor:
        pixels = np.asarray(read_picture(path).resize(side, Resampling.BILINEAR))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255

    def read_mask(path: Path) -> Tensor:
        resized = mask_picture(path).resize(side, Resampling.NEAREST)
        return torch.from_numpy(np.asarray(resized)[..., 0] > 0)

    names = dict(enumerate(texture.name for texture in TEXTURES))
    return Loaded(load_texture_vit(), read, read_mask, labels=names, examples=_textured_objects)


def _textured_objects(limit: int | None, seed: int) -> list[Any]:
    """Held-out objects: (image, texture, mask)."""
    from captum_attn.toy.textures import textured_objects

    batch = textured_objects(SCENES if limit is None else limit, split="test", seed=seed)
    return list(zip(batch.images, batch.labels.tolist(), batch.masks, strict=True))


def _clothing_vit(labels: Sequence[str] | None) -> Loaded:
    import numpy as np
    from PIL.Image import Resampling

    from captum_attn.toy.clothing import CLOTHES, SIDE
    from captum_attn.toy.clothing_vit import load_clothing_vit

    def read(path: Path) -> Tensor:
        picture = read_picture(path).convert("L").resize((SIDE, SIDE), Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(picture).copy())[None] / 255

    def read_mask(path: Path) -> Tensor:
        resized = mask_picture(path).resize((SIDE, SIDE), Resampling.NEAREST)
        return torch.from_numpy(np.asarray(resized)[..., 0] > 0)

    names = dict(enumerate(CLOTHES))
    return Loaded(load_clothing_vit(), read, read_mask, labels=names, examples=_clothing)


def _clothing(limit: int | None, seed: int) -> list[Any]:
    """Pairs cut together, asked about both pieces: (image, piece, its part and the pair)."""
    from captum_attn.toy.clothing import clothing_pairs

    pairs = clothing_pairs(SCENES if limit is None else -(-limit // 2), seed)
    return [
        (pairs.images[i], int(pairs.labels[i, k]), {"masks": pairs.masks[i, k], "groups": i})
        for i in range(len(pairs.images))
        for k in (0, 1)
    ][:limit]


def _topics(labels: Sequence[str] | None) -> Loaded:
    from captum_attn.evaluation.data import TextFile, read_lines
    from captum_attn.toy.topics import (
        LABELLED_TEXTS,
        LABELS,
        MAX_TOKENS,
        load_topic_classifier,
    )

    own = read_lines(LABELLED_TEXTS).names if labels is None else labels
    model = load_topic_classifier(sorted(set(own)) if own else LABELS)
    names = dict(enumerate(model.labels))
    numbers = {name: number for number, name in names.items()}

    def examples(limit: int | None, seed: int) -> TextFile:
        return TextFile(LABELLED_TEXTS, model.tokenizer, numbers, MAX_TOKENS)

    return Loaded(
        model, tokenizer=model.tokenizer, max_length=MAX_TOKENS, labels=names, examples=examples
    )


def mask_picture(path: Path) -> Picture:
    """A mask as a picture of 0 and 255 in three channels."""
    from PIL import Image

    on = mask_as_it_is(path).numpy()
    return Image.fromarray((on * 255).astype("uint8")).convert("RGB")


def _smollm2(labels: Sequence[str] | None) -> Loaded:
    from captum_attn.toy.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    return Loaded(model, tokenizer=tokenizer, next_token=True)


LOADERS: dict[str, Callable[[Sequence[str] | None], Loaded]] = {  # for each of names.EMBEDDED
    "digit-vit": _digit_vit,
    "texture-vit": _texture_vit,
    "clothing-vit": _clothing_vit,
    "topics": _topics,
    "smollm2": _smollm2,
}
