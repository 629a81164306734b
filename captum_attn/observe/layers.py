"""Modules, or patterns of their names, by which attention calls are chosen."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from captum_attn._checks import shown
from captum_attn.errors import OptionError

Layers = nn.Module | str | Sequence[nn.Module | str]


def check_layers(layers: Any) -> None:
    """Refuses what names no modules."""
    if layers is None or isinstance(layers, (str, nn.Module)):
        return
    listed = isinstance(layers, Collection) and not isinstance(layers, (Tensor, Mapping, bytes))
    if not listed or not all(isinstance(layer, (str, nn.Module)) for layer in layers):
        raise OptionError(
            "layers: expected a module, a pattern of names such as 'encoder.*', a list of them, or "
            f"None for all; got {shown(layers)}"
        )


def matches(module: str, layers: Layers | None, roots: Sequence[nn.Module]) -> bool:
    """Whether an attention call in `module` belongs to `layers` (modules or name patterns)."""
    if layers is None:
        return True
    patterns: list[str] = []
    for layer in [layers] if isinstance(layers, (str, nn.Module)) else layers:
        if isinstance(layer, str):
            patterns.append(layer)
        else:
            patterns += [name for root in roots for name, m in root.named_modules() if m is layer]
    return any(
        pattern in ("", module)
        or module.startswith(f"{pattern}.")
        or fnmatch.fnmatchcase(module, pattern)
        for pattern in patterns
    )
