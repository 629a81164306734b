"""What a name on the command line stands for: a model, and what brings its inputs about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["Loaded"]


def _as_it_is(image: Tensor) -> Tensor:
    return image


@dataclass(frozen=True)
class Loaded:
    """A model with what brings its inputs about.

    Args:
        model (Module): in eval mode.
        read, read_mask (callable, optional): path -> image (C, H, W), mask (H, W).
        shown (callable): image (C, H, W) as the model takes it -> in [0, 1], to look at.
        tokenizer (callable, optional): of a text model.
        max_length (int, optional): of a text, in tokens.
        labels (Mapping): number of a class -> its name.
        independent (bool): whether every class is a question of its own, with a sigmoid.
        next_token (bool): whether it is a causal language model, whose classes are tokens.
        tags (bool): whether it gives every token a class of its own.
        examples (callable, optional): (limit, seed) -> the model's own data set.
    """

    model: nn.Module
    read: Callable[[Path], Tensor] | None = None
    read_mask: Callable[[Path], Tensor] | None = None
    shown: Callable[[Tensor], Tensor] = _as_it_is
    tokenizer: Any = None
    max_length: int | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    independent: bool = False
    next_token: bool = False
    tags: bool = False
    examples: Callable[[int | None, int], Any] | None = None

    @property
    def classes(self) -> dict[str, int]:
        """Name of a class -> its number."""
        return {name: number for number, name in self.labels.items()}
