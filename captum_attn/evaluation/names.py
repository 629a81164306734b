"""The package's own models by name, and near names: known before a model library is loaded."""

from __future__ import annotations

from captum_attn._checks import is_folder, suggested
from captum_attn.errors import InputError

__all__ = ["EMBEDDED", "check_name"]

EMBEDDED = ("digit-vit", "texture-vit", "clothing-vit", "topics", "smollm2")
MODELS = f"one of the package's models ({', '.join(EMBEDDED)}), timm/NAME, or a folder or hub id " \
    "of transformers"  # fmt: skip


def check_name(name: str) -> None:
    """Refuses what is nearly the name of one of the package's models, and what looks like a path.

    Raises:
        InputError: before anything is looked up.

    Examples::

        >>> check_name("topic")
        Traceback (most recent call last):
        InputError: --model: there is no model 'topic'; did you mean 'topics'? ...
    """
    if name in EMBEDDED or is_folder(name):
        return
    near = suggested(name.casefold(), EMBEDDED) if "/" not in name else ""
    path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if near or (path and not name.startswith("timm/")):
        said = near or f": no folder at '{name}';"
        raise InputError(f"--model: there is no model '{name}'{said} expected {MODELS}")
