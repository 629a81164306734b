"""Models by name, each with how its files are read: the package's own, timm's, transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_attn._pictures import read_picture
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation.embedded import EMBEDDED, mask_picture
from captum_attn.evaluation.loaded import Loaded

__all__ = ["EmbeddingGradients", "load"]


def load(name: str, labels: Sequence[str] | None = None) -> Loaded:
    """The model of a name.

    Args:
        name (str): one of the package's own ("digit-vit", "texture-vit", "topics"), "timm/" and a
            name of timm's, or a folder or hub id of transformers; a folder may be timm's, too.
        labels (sequence of str, optional): those of the data, which make the classes of "topics";
            [] for data without any. Default: for the model's own data.

    Returns:
        Loaded: the model in eval mode, and how its inputs are read.

    Raises:
        InputError: where there is no such model.
        OptionError: where it is of a kind that is not read here.
    """
    if name in EMBEDDED:
        return EMBEDDED[name](labels)
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"))
    saved = Path(name) / "config.json"
    if saved.is_file() and "architecture" in (config := json.loads(saved.read_text("utf-8"))):
        return _timm_folder(saved.parent, config)
    return _transformers(name)


# ---------------------------------------------------------------------------------- timm
def _timm(name: str) -> Loaded:
    import timm

    try:
        model = timm.create_model(name, pretrained=True).eval()
    except (RuntimeError, ValueError, OSError, TypeError) as problem:
        raise InputError(f"timm has no pretrained model '{name}': {problem}") from problem
    return _of_timm(model, {})


def _timm_folder(folder: Path, config: Mapping[str, Any]) -> Loaded:
    """What `timm.models.save_for_hf` and the hub's folders hold."""
    import timm

    weights = next((p for p in map(folder.joinpath, TIMM_WEIGHTS) if p.is_file()), None)
    if weights is None:
        raise InputError(f"'{folder}' has no weights: expected {' or '.join(TIMM_WEIGHTS)}")
    try:
        model = timm.create_model(
            config["architecture"],
            pretrained_cfg=config.get("pretrained_cfg"),
            num_classes=config.get("num_classes", config["pretrained_cfg"]["num_classes"]),
            checkpoint_path=str(weights),
            **(config.get("model_args") or {}),
        ).eval()
    except (RuntimeError, ValueError, OSError, TypeError, KeyError) as problem:
        raise InputError(f"timm cannot read the model in '{folder}': {problem}") from problem
    return _of_timm(model, config)


TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def _of_timm(model: Any, config: Mapping[str, Any]) -> Loaded:
    import timm

    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings)
    plain = {"mean": (0.0,) * len(settings["mean"]), "std": (1.0,) * len(settings["std"])}
    of_masks = timm.data.create_transform(**{**settings, **plain, "interpolation": "nearest"})
    return Loaded(
        model,
        lambda path: transform(read_picture(path)),
        lambda path: of_masks(mask_picture(path))[0] > 0.5,
        _shown(settings["mean"], settings["std"]),
        labels=_timm_labels(model, config),
    )


def _timm_labels(model: Any, config: Mapping[str, Any]) -> dict[int, str]:
    """The folder's own names, or those of the ImageNet with as many classes."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if names := config.get("label_names"):
        return dict(enumerate(map(str, names)))
    subset = infer_imagenet_subset(model)
    if subset is None:
        return {}
    info = ImageNetInfo(subset)
    return {i: info.index_to_description(i) for i in range(model.num_classes)}


# ---------------------------------------------------------------------------------- transformers
def _transformers(name: str) -> Loaded:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as problem:
        raise InputError(
            f"'{name}' is neither one of the package's models ({', '.join(EMBEDDED)}), nor "
            f"timm/..., nor a folder or hub id of transformers: {_line(problem)}"
        ) from problem
    made = (config.architectures or [""])[0]
    for ending, read in READ.items():
        if made.endswith(ending):
            try:
                return read(name, config)
            except (OSError, ValueError, ImportError) as problem:
                raise InputError(f"'{name}' cannot be loaded: {_line(problem)}") from problem
    raise OptionError(
        f"'{name}' is a {made or 'model without a head'}: expected one for image or sequence "
        "classification, or a causal language model; others go through captum_attn.evaluate"
    )


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())


def _text_classifier(name: str, config: Any) -> Loaded:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    return Loaded(
        model, tokenizer=tokenizer, labels=_labels(config), independent=_independent(config)
    )


def _language_model(name: str, config: Any) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    return Loaded(model, tokenizer=tokenizer, next_token=True)


def _image_classifier(name: str, config: Any) -> Loaded:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(name).eval()
    processor = AutoImageProcessor.from_pretrained(name)

    def read(path: Path) -> Tensor:
        return processor(images=read_picture(path), return_tensors="pt")["pixel_values"][0]

    def read_mask(path: Path) -> Tensor:
        # The processor's own resizing and cropping, by the nearest pixels.
        found = processor(
            images=mask_picture(path), return_tensors="pt", resample=0, do_rescale=False,
            do_normalize=False,
        )["pixel_values"][0, 0]  # fmt: skip
        return found > 127

    normal = getattr(processor, "do_normalize", False)
    scale = (processor.image_mean, processor.image_std) if normal else ([0.0], [1.0])
    return Loaded(
        model, read, read_mask, _shown(*scale), labels=_labels(config),
        independent=_independent(config),
    )  # fmt: skip


# How the name of a model's class ends -> how it is read.
READ: dict[str, Callable[[str, Any], Loaded]] = {
    "ForSequenceClassification": _text_classifier,
    "ForImageClassification": _image_classifier,
    "ForCausalLM": _language_model,
    "LMHeadModel": _language_model,
}


def _labels(config: Any) -> dict[int, str]:
    return {int(number): str(label) for number, label in (config.id2label or {}).items()}


def _independent(config: Any) -> bool:
    return getattr(config, "problem_type", None) == "multi_label_classification"


def _shown(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """What undoes the normalisation of an image (C, H, W)."""

    def shown(image: Tensor) -> Tensor:
        middle, spread = (image.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
        return (image * spread + middle).clamp(0, 1)

    return shown


# ---------------------------------------------------------------------------------- a method
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

        from captum_attn.metrics.shared import tensor_of

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
