"""What the user asks for: the arguments that every method shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_attn._checks import shown, whole
from captum_attn.attr._layers import Layers, check_layers
from captum_attn.errors import ReadoutError, TargetError
from captum_attn.objectives import Objective

Readout = str | int | Tensor


@dataclass(frozen=True)
class Request:
    """What is explained: the arguments that every method shares, as documented in `attribute`.

    Args:
        layers: the modules, or patterns of their names, whose attention calls count; None: all.
        readout: which rows are read.
        causal (bool): whether tokens behind the one that is read out stay as they were born, as if
            the sequence ended there.
        matrices (bool): whether the whole matrices are wanted, of which no row is read.
    """

    target: Any = None
    additional_forward_args: Any = None
    objective: Objective | None = None
    readout: Readout = "auto"
    start_layer: int = 0
    layers: Layers | None = None
    causal: bool = False
    matrices: bool = False

    def __post_init__(self) -> None:
        readout = self.readout
        named = isinstance(readout, str) and readout == "auto"
        if not named and (isinstance(readout, bool) or not isinstance(readout, (int, Tensor))):
            raise ReadoutError(
                "readout: expected 'auto', an int, a LongTensor (B,) of rows or a Tensor (B, n) of "
                f"weights; got {shown(readout)}"
            )
        check_objective(self.objective)
        check_layers(self.layers)
        whole("start_layer", self.start_layer, least=0)


def check_objective(objective: Any) -> None:
    """Refuses what is no objective."""
    if objective is not None and not callable(objective):
        raise TargetError(
            "objective: expected a callable (output, target) -> (B,), such as "
            f"objectives.probability, or None; got {shown(objective)}"
        )
