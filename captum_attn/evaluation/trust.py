"""Folders are not trusted: no file of a model runs code, and one that is broken is an error."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_attn._checks import shown, shown_error
from captum_attn.errors import AttnError, InputError

__all__ = ["loading", "only_weights", "read_settings", "read_weights"]

# torch.load asks these for what its caller says: a pickle is weights alone, or it is refused.
FORCED, LIFTED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_environment = threading.RLock()


@contextmanager
def only_weights() -> Iterator[None]:
    """Whoever calls `torch.load` here, of whatever package and version, gets weights alone."""
    with _environment:
        before = {name: os.environ.pop(name, None) for name in (FORCED, LIFTED)}
        os.environ[FORCED] = "1"
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Reads a model of somebody's: whatever is raised, it cannot be loaded."""
    try:
        with only_weights():
            yield
    except AttnError:
        raise
    except Exception as problem:  # pickle, zip, JSON and model code have errors of their own
        raise InputError(f"{what}: {shown_error(problem)}") from problem


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it.

    Raises:
        InputError: for anything else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise InputError(f"cannot read '{path}' as JSON: {shown_error(problem)}") from problem
    if not isinstance(found, dict):
        raise InputError(f"'{path}': expected a JSON object, got {shown(found)}")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a .safetensors file or a pickle that holds nothing else.

    Training's wrappers are taken off: an entry "state_dict" or "model", names below "module.".
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError(f"'{path}': expected tensors by name, got {shown(found)}")
    return {str(name).removeprefix("module."): value for name, value in found.items()}
