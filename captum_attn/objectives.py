"""What scalar per example is explained.

An objective is a callable `(output, target) -> (B,)`. The default of every method is the raw logit
that the target selects. Objectives compute in float64, since a softmax at a logit gap of 20 has
gradient 0 in float32, and take Captum's target forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum._utils.common import _select_targets
from torch import Tensor

from captum_attn.errors import TargetError

__all__ = [
    "Objective",
    "logit",
    "logit_difference",
    "logit_ratio",
    "pairwise",
    "probability",
    "relative_logit_difference",
]

Objective = Callable[[Tensor, Any], Tensor]


def logit(output: Tensor, target: Any = None) -> Tensor:
    """The output that the target selects, as Captum selects it; the default objective.

    Args:
        output (Tensor): the model's output, (B, ...).
        target: any Captum target form; None where the output is one scalar per example.

    Returns:
        Tensor: (B,).

    Raises:
        TargetError: if the selection is not one scalar per example.

    Examples::

        >>> GenericAttention(model).attribute(images, target=3, objective=objectives.logit)
    """
    try:
        selected = _select_targets(output, target)
    except (AssertionError, IndexError, RuntimeError, TypeError) as error:
        raise TargetError(
            f"target {target!r} does not fit the output of shape {tuple(output.shape)}: {error}; "
            "expected a Captum target: an int, a tuple of ints, or one of them per example"
        ) from error
    batch = output.shape[0] if output.ndim else 1
    if selected.numel() != batch:
        missing = "no target was given" if target is None else f"target {target!r}"
        raise TargetError(
            f"expected one scalar per example ({batch} in all); {missing}, and the output of shape "
            f"{tuple(output.shape)} gives {tuple(selected.shape)}: pass `target=` (an int, a tuple "
            "of ints for outputs of more axes, or one per example) or an `objective=`"
        )
    return selected.reshape(batch)


def probability(output: Tensor, target: Any = None) -> Tensor:
    """The softmax probability, over the last axis, of the target's class; (B,)."""
    return logit(output.double().softmax(-1), target)


def logit_difference(a: Any, b: Any) -> Objective:
    """The logit of target `a` less that of target `b` (arXiv 2605.27458, logical inspection).

    Args:
        a, b: Captum targets; the `target` of `attribute` is not used.
    """

    def objective(output: Tensor, target: Any = None) -> Tensor:
        return logit(output.double(), a) - logit(output.double(), b)

    return objective


def logit_ratio(a: Any, b: Any) -> Objective:
    """The logit of target `a` over that of target `b` (arXiv 2605.27458, logical inspection)."""

    def objective(output: Tensor, target: Any = None) -> Tensor:
        return logit(output.double(), a) / logit(output.double(), b)

    return objective


def relative_logit_difference(a: Any, b: Any) -> Objective:
    """(y_a - y_b) / (y_a + y_b), (arXiv 2605.27458, logical inspection)."""

    def objective(output: Tensor, target: Any = None) -> Tensor:
        one, other = logit(output.double(), a), logit(output.double(), b)
        return (one - other) / (one + other)

    return objective


def pairwise(output: Tensor, target: Any = None) -> Tensor:
    """The diagonal of a (B, B) score matrix: example i's image with example i's text (CLIP)."""
    if output.ndim != 2 or output.shape[0] != output.shape[1]:
        raise TargetError(f"expected scores of shape (B, B), got {tuple(output.shape)}")
    return torch.diagonal(output.double())
