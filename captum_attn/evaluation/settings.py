"""What an evaluation was made with, in a form that can be stored and compared."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["described", "digest", "versions"]

PACKAGES = (
    "captum_attn", "torch", "captum", "numpy", "transformers", "timm", "scikit-learn",
    "scikit-image",
)  # fmt: skip
PLAIN = (bool, int, float, str, type(None))


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def described(value: Any) -> Any:
    """A value as JSON: equal for what is made alike, without addresses in memory."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {digest(value)}"
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, (tuple, list, range)):
        return [described(v) for v in value]
    if isinstance(value, nn.Module):
        return {"class": _path(type(value)), "weights": digest(value.state_dict())}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": _path(type(value)), **described(fields)}
    if isinstance(value, functools.partial):
        parts = {"args": value.args, "options": value.keywords}
        return {"partial": described(value.func), **described(parts)}
    owner = getattr(value, "__self__", None)
    if isinstance(owner, nn.Module):
        return {"method": value.__name__, "of": described(owner)}
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return _path(value)
    return {
        "class": _path(type(value)),
        **{k: v for k, v in sorted(getattr(value, "__dict__", {}).items()) if isinstance(v, PLAIN)},
    }


def _path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def digest(value: Any) -> str:
    """A short fingerprint of tensors, alone or in containers."""
    found = hashlib.sha256()
    for tensor in _tensors(value):
        raw = tensor.detach().cpu().contiguous()
        found.update(f"{tuple(raw.shape)} {raw.dtype}".encode())
        found.update(raw.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for _, part in sorted(value.items()):
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
