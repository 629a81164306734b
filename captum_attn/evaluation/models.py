"""Models by name, each with how its files are read: the package's own, timm's, transformers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn.errors import InputError, OptionError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = ["EmbeddingGradients", "Loaded", "load"]

SCENES = 500  # of the digit ViT and the texture ViT, if no files are given
OWN_DATA = ("digit-vit", "texture-vit", "topics")  # what needs no files


@dataclass(frozen=True)
class Loaded:
    """A model with what brings its inputs about.

    Args:
        model (Module): in eval mode.
        read, read_mask (callable, optional): path -> image (C, H, W), mask (H, W).
        tokenizer (callable, optional): of a text model.
        max_length (int, optional): of a text, in tokens.
        classes (Mapping): name -> number.
        independent (bool): whether the classes are (a sigmoid each, not a softmax over all).
        examples (callable, optional): (limit, seed) -> the model's own data set.
    """

    model: nn.Module
    read: Callable[[Path], Tensor] | None = None
    read_mask: Callable[[Path], Tensor] | None = None
    tokenizer: Any = None
    max_length: int | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    independent: bool = False
    examples: Callable[[int | None, int], Any] | None = None


def load(name: str, labels: list[str] | None = None) -> Loaded:
    """The model of a name.

    Args:
        name (str): one of the package's own ("digit-vit", "texture-vit", "topics"), "timm/" and a
            name of timm's, or a folder or hub id of transformers.
        labels (list of str, optional): those of the data, which make the classes of "topics"; []
            for data without any. Default: for the model's own data.
    """
    if name == "digit-vit":
        return _digit_vit()
    if name == "texture-vit":
        return _texture_vit()
    if name == "topics":
        return _topics(labels)
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"))
    return _transformers(name)


def _digit_vit() -> Loaded:
    from captum_attn.demo.digit_vit import load_digit_vit
    from captum_attn.demo.image import load_picture
    from captum_attn.demo.scenes import IMAGE_SIZE

    def read_mask(path: Path) -> Tensor:
        on = _mask_picture(path).convert("L")
        pixels = torch.tensor(list(on.getdata())).view(1, 1, on.height, on.width).float()
        scale = IMAGE_SIZE / max(on.size)
        size = [max(1, round(side * scale)) for side in (on.height, on.width)]
        pixels = F.interpolate(pixels, size, mode="nearest-exact")[0, 0]
        top, left = (IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2
        padding = [left, IMAGE_SIZE - size[1] - left, top, IMAGE_SIZE - size[0] - top]
        return F.pad(pixels, padding) > 0

    return Loaded(
        load_digit_vit(), lambda path: load_picture(path)[0], read_mask,
        independent=True, examples=_digit_scenes,
    )  # fmt: skip


def _digit_scenes(limit: int | None, seed: int) -> list[Any]:
    """Held-out scenes, asked about both of their digits: (image, digit, mask and scene)."""
    from captum_attn.demo.scenes import scenes

    batch = scenes(SCENES if limit is None else -(-limit // 2), split="test", seed=seed)
    return [
        (batch.images[i], int(batch.labels[i, k]), {"masks": batch.masks[i, k], "groups": i})
        for i in range(len(batch.images))
        for k in (0, 1)
    ][:limit]


def _texture_vit() -> Loaded:
    from captum_attn.demo.texture_vit import load_texture_vit
    from captum_attn.demo.textures import IMAGE_SIZE, TEXTURES

    def resized(picture: Picture, resample: int) -> Tensor:
        import numpy as np

        pixels = np.array(picture.resize((IMAGE_SIZE, IMAGE_SIZE), resample))
        return torch.from_numpy(pixels).movedim(-1, 0) / 255

    def read(path: Path) -> Tensor:
        from PIL import Image

        with Image.open(path) as file:
            return resized(file.convert("RGB"), Image.Resampling.BILINEAR)

    def read_mask(path: Path) -> Tensor:
        from PIL import Image

        return resized(_mask_picture(path), Image.Resampling.NEAREST)[0] > 0.5

    classes = {texture.name: i for i, texture in enumerate(TEXTURES)}
    return Loaded(load_texture_vit(), read, read_mask, classes=classes, examples=_textures)


def _textures(limit: int | None, seed: int) -> list[Any]:
    """Held-out textured objects: (image, texture, mask)."""
    from captum_attn.demo.textures import textured_objects

    batch = textured_objects(limit or SCENES, split="test", seed=seed)
    rows = zip(batch.images, batch.labels.tolist(), batch.masks, strict=True)
    return list(rows)


def _topics(labels: list[str] | None) -> Loaded:
    from captum_attn.demo.topics import (
        LABELLED_TEXTS,
        LABELS,
        MAX_TOKENS,
        load_topic_classifier,
    )
    from captum_attn.evaluation.data import TextFile, read_lines

    names = read_lines(LABELLED_TEXTS).names if labels is None else labels
    model = load_topic_classifier(sorted(set(names or LABELS)))
    classes = {name: i for i, name in enumerate(model.labels)}
    tokenizer = model.tokenizer
    return Loaded(
        model, tokenizer=tokenizer, max_length=MAX_TOKENS, classes=classes,
        examples=lambda limit, seed: TextFile(LABELLED_TEXTS, tokenizer, classes, MAX_TOKENS),
    )  # fmt: skip


def _timm(name: str) -> Loaded:
    import timm
    from PIL import Image

    try:
        model = timm.create_model(name, pretrained=True).eval()
    except (RuntimeError, ValueError, OSError, TypeError) as problem:
        raise InputError(f"timm has no pretrained model '{name}': {problem}") from problem
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    plain = {"mean": (0.0,) * len(config["mean"]), "std": (1.0,) * len(config["std"])}
    of_masks = timm.data.create_transform(**{**config, **plain, "interpolation": "nearest"})

    def read(path: Path) -> Tensor:
        with Image.open(path) as file:
            return transform(file.convert("RGB"))

    return Loaded(model, read, lambda path: of_masks(_mask_picture(path))[0] > 0.5)


def _transformers(name: str) -> Loaded:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as problem:
        raise InputError(
            f"'{name}' is neither one of the package's models ({', '.join(OWN_DATA)}), nor "
            f"timm/..., nor a folder or hub id of transformers: {' '.join(str(problem).split())}"
        ) from problem
    made = (config.architectures or [""])[0]
    classes = {str(label): int(i) for label, i in (config.label2id or {}).items()}
    if made.endswith("ForSequenceClassification"):
        auto = transformers.AutoModelForSequenceClassification
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return Loaded(auto.from_pretrained(name).eval(), tokenizer=tokenizer, classes=classes)
    if not made.endswith("ForImageClassification"):
        raise OptionError(
            f"'{name}' is a {made or 'model without a head'}: expected one for image or sequence "
            "classification; others go through captum_attn.evaluate"
        )
    model = transformers.AutoModelForImageClassification.from_pretrained(name).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(name)

    def read(path: Path) -> Tensor:
        from PIL import Image

        with Image.open(path) as file:
            picture = file.convert("RGB")
        return processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def read_mask(path: Path) -> Tensor:
        # The processor's own resizing and cropping, by the nearest pixels.
        found = processor(
            images=_mask_picture(path), return_tensors="pt", resample=0, do_rescale=False,
            do_normalize=False,
        )["pixel_values"][0, 0]  # fmt: skip
        return found > 127

    return Loaded(model, read, read_mask, classes=classes)


def _mask_picture(path: Path) -> Picture:
    """A mask as a picture of 0 and 255 in three channels."""
    from PIL import Image

    from captum_attn.evaluation.data import mask_as_it_is

    on = mask_as_it_is(path).numpy()
    return Image.fromarray((on * 255).astype("uint8")).convert("RGB")


class EmbeddingGradients:
    """Captum's Integrated Gradients of a text model, behind its word embeddings.

    Ids cannot be interpolated. The baseline is the padding token, special tokens kept.

    Args:
        model (Module): a text model of transformers, or one that holds one.
        tokenizer (callable): its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.blank = tokenizer.pad_token_id or 0
        self.special = tuple(tokenizer.all_special_ids)
        self.words = next(m for m in model.modules() if isinstance(m, nn.Embedding))

    def attribute(self, inputs: Mapping[str, Tensor], target: Any = None, **options: Any) -> Any:
        """{"input_ids": (B, n)}, summed over the embedding's components."""
        from captum.attr import LayerIntegratedGradients

        from captum_attn.metrics._inputs import tensor_of

        names = [name for name in inputs if name != "input_ids"]

        def forward(ids: Tensor, *rest: Tensor) -> Tensor:
            more = dict(zip(names, rest, strict=True))
            return tensor_of(self.model(input_ids=ids, **more))

        ids = inputs["input_ids"]
        special = torch.isin(ids, torch.tensor(self.special, device=ids.device))
        found = LayerIntegratedGradients(forward, self.words).attribute(
            ids,
            baselines=ids.where(special, self.blank),
            target=target,
            additional_forward_args=tuple(inputs[name] for name in names),
            **options,
        )
        return {"input_ids": found.sum(-1)}
