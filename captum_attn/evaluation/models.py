"""Models by name, each with how its files are read: the package's own, timm's, transformers'."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_attn._checks import is_file, is_folder, shown, suggested
from captum_attn._pictures import read_picture
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation.embedded import LOADERS, mask_picture
from captum_attn.evaluation.hub import only_kept
from captum_attn.evaluation.loaded import Loaded
from captum_attn.evaluation.names import EMBEDDED, check_name
from captum_attn.evaluation.trust import loading, read_settings, read_weights

__all__ = ["EmbeddingGradients", "load"]


def load(name: str, labels: Sequence[str] | None = None) -> Loaded:
    """The model of a name.

    Args:
        name (str): one of the package's own ("digit-vit", "texture-vit", "clothing-vit", "topics",
            "smollm2"), "timm/" and a name of timm's, or a folder or hub id of transformers; a
            folder may be timm's, too.
        labels (sequence of str, optional): those of the data, which make the classes of "topics";
            [] for data without any. Default: for the model's own data.

    Returns:
        Loaded: the model in eval mode, and how its inputs are read.

    Raises:
        InputError: where there is no such model.
        OptionError: where it is of a kind that is not read here.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"model: expected a name or a folder, got {shown(name)}")
    if name in LOADERS:
        return LOADERS[name](labels)
    check_name(name)
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"))
    if is_file(saved := Path(name) / "config.json"):
        config = read_settings(saved)
        return (_timm_folder if "architecture" in config else _transformers)(saved.parent, config)
    return _transformers(name, {})


# ---------------------------------------------------------------------------------- timm
def _timm(name: str) -> Loaded:
    import timm

    _check_timm(name)
    saved = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if saved is None or not saved.has_weights:
        raise InputError(f"timm has no pretrained weights for '{name}'; give a folder of yours")
    if saved.hf_hub_id:
        only_kept(saved.hf_hub_id, saved.hf_hub_filename or "model.safetensors")
    with loading(f"timm cannot load the weights of '{name}'"):
        model = timm.create_model(name, pretrained=True).eval()
    return _of_timm(model, {})


def _check_timm(name: Any) -> None:
    """Refuses what is no architecture of timm's own, such as another folder or a hub's code."""
    import timm

    if not isinstance(name, str) or ":" in name or not timm.is_model(name):
        known = suggested(name, timm.list_models())
        raise InputError(
            f"timm has no architecture {shown(name)}{known}; a folder of timm's is given by its "
            "path, without timm/"
        )


def _timm_folder(folder: Path, config: Mapping[str, Any]) -> Loaded:
    """What `timm.models.save_for_hf` and the hub's folders hold."""
    import timm

    weights = next((p for p in map(folder.joinpath, TIMM_WEIGHTS) if is_file(p)), None)
    if weights is None:
        raise InputError(f"'{folder}' has no weights: expected {' or '.join(TIMM_WEIGHTS)}")
    _check_timm(config["architecture"])
    saved = config.get("pretrained_cfg") or {}
    given = config.get("model_args") or {}
    if not isinstance(saved, Mapping) or not isinstance(given, Mapping):
        raise InputError(f"'{folder}/config.json': expected Mappings pretrained_cfg and model_args")
    # Those of the builder itself would name other files.
    builder = set(inspect.signature(timm.create_model).parameters) - {"kwargs"}
    if asked := sorted(builder & set(given)):
        raise InputError(f"'{folder}/config.json': model_args has {asked}, which no model takes")
    with loading(f"timm cannot read the model in '{folder}'"):
        model = timm.create_model(
            config["architecture"],
            pretrained=False,
            pretrained_cfg=dict(saved),
            num_classes=config.get("num_classes", saved.get("num_classes")),
            **given,
        )
        model.load_state_dict(read_weights(weights))
    return _of_timm(model.eval(), config)


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
SAFE: dict[str, Any] = {"trust_remote_code": False}  # and does not ask whether it should


def _transformers(name: str | Path, saved: Mapping[str, Any]) -> Loaded:
    import transformers

    with loading(
        f"'{name}' is neither one of the package's models ({', '.join(EMBEDDED)}), nor timm/..., "
        "nor a folder or hub id of transformers"
    ):
        how = SAFE if is_folder(name) else SAFE | {
            "local_files_only": only_kept(str(name), "config.json")
        }  # fmt: skip
        config = transformers.AutoConfig.from_pretrained(name, **how)
    attention = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in attention:
        raise InputError(
            f"'{name}': its config asks for the attention {shown(attention)}, code of the hub's, "
            "which is not loaded; take the entry out of config.json"
        )
    made = config.architectures
    made = str(made[0]) if isinstance(made, (list, tuple)) and made else ""
    for ending, read in READ.items():
        if made.endswith(ending):
            with loading(f"'{name}' cannot be loaded"):
                return read(name, config, how)
    raise OptionError(
        f"'{name}' is a {made or 'model without a head'}: expected one for the "
        "classification of images, texts or tokens, or a causal language model; others go "
        "through captum_attn.evaluate"
    )


def _pretrained(kind: Any, name: str | Path, how: Mapping[str, Any]) -> Any:
    """A model in eval mode; one without some of its weights would have random ones."""
    model, told = kind.from_pretrained(name, output_loading_info=True, **how)
    missing = [*told.get("missing_keys", ()), *told.get("mismatched_keys", ())]
    if missing:
        raise InputError(
            f"'{name}' lacks weights of its model: {', '.join(map(str, missing[:5]))} "
            f"({len(missing)} in all); give a folder that has them all"
        )
    return model.eval()


def _text_classifier(name: str | Path, config: Any, how: Mapping[str, Any]) -> Loaded:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, **how)
    model = _pretrained(AutoModelForSequenceClassification, name, how)
    return Loaded(
        model, tokenizer=tokenizer, labels=_labels(config), independent=_independent(config)
    )


def _token_classifier(name: str | Path, config: Any, how: Mapping[str, Any]) -> Loaded:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, **how)
    model = _pretrained(AutoModelForTokenClassification, name, how)
    return Loaded(model, tokenizer=tokenizer, labels=_labels(config), tags=True)


def _language_model(name: str | Path, config: Any, how: Mapping[str, Any]) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, **how)
    model = _pretrained(AutoModelForCausalLM, name, how)
    return Loaded(model, tokenizer=tokenizer, next_token=True)


def _image_classifier(name: str | Path, config: Any, how: Mapping[str, Any]) -> Loaded:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = _pretrained(AutoModelForImageClassification, name, how)
    processor = AutoImageProcessor.from_pretrained(name, **how)

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
READ: dict[str, Callable[[str | Path, Any, Mapping[str, Any]], Loaded]] = {
    "ForSequenceClassification": _text_classifier,
    "ForTokenClassification": _token_classifier,
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
