"""What the user asks for: the arguments that every method shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_attn.attr._layers import Layers
from captum_attn.errors import ReadoutError
from captum_attn.objectives import Objective

Readout = str | int | Tensor


@dataclass(frozen=True)
class Request:
    """What is explained: the arguments that every method shares, as documented in `attribute`.

    Args:
        layers: the modules, or patterns of their names, whose attention calls count; None: all.
        readout: which rows are read; None for the whole matrices, of which none is read.
        causal (bool): whether tokens behind the one that is read out stay as they were born, as if
            the sequence ended there.
    """

    target: Any = None
    additional_forward_args: Any = None
    objective: Objective | None = None
    readout: Readout | None = "auto"
    start_layer: int = 0
    layers: Layers | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.readout, str) and self.readout != "auto":
            raise ReadoutError(
                f"readout: expected 'auto', an int or a tensor; got {self.readout!r}"
            )
