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

from captum_attn._checks import FAILURES, finite, shown, shown_error
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
    output = _scores(output)
    if isinstance(target, bool) or (isinstance(target, Tensor) and target.dtype == torch.bool):
        raise TargetError(f"target: expected a Captum target such as the int 3, got {target}")
    _has_values("target", target)
    try:
        selected = _select_targets(output, _from_the_start(output, target))
    except FAILURES as error:
        raise TargetError(
            f"target {shown(target)} does not fit the output of shape {tuple(output.shape)}: "
            f"{shown_error(error)}; "
            "expected a Captum target: an int, a tuple of ints, or one of them per example"
        ) from error
    batch = output.shape[0] if output.ndim else 1
    if selected.numel() != batch:
        missing = "no target was given" if target is None else f"target {shown(target)}"
        raise TargetError(
            f"expected one scalar per example ({batch} in all); {missing}, and the output of shape "
            f"{tuple(output.shape)} gives {tuple(selected.shape)}: pass `target=` (an int, a tuple "
            "of ints for outputs of more axes, or one per example) or an `objective=`"
        )
    return _finite(selected.reshape(batch), "the output that the target selects")


def _from_the_start(output: Tensor, target: Any) -> Any:
    """A target with a class for each example; those counted from the end, as -1 is, from the start.

    Captum takes both of them, and every type of whole number, for a single example alone.
    """
    if output.ndim != 2 or not isinstance(target, (list, Tensor)):
        return target
    classes = output.shape[1]
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex():
            return target
        target = target.long()
        return torch.where((target < 0) & (target >= -classes), target + classes, target)
    if all(_is_place(one) and isinstance(one, int) for one in target):
        return [one + classes if -classes <= one < 0 else one for one in target]
    return target


def _has_values(name: str, target: Any) -> None:
    """Refuses classes that cannot be read: indexing with them reads whatever the memory holds."""
    for part in target if isinstance(target, (list, tuple)) else [target]:
        if isinstance(part, Tensor) and part.is_meta:
            raise TargetError(
                f"{name}: expected whole numbers, got a tensor on 'meta', which holds no values"
            )


def _scores(output: Any) -> Tensor:
    """The output, a dense tensor of real numbers."""
    if not isinstance(output, Tensor):
        raise TargetError(
            f"output: expected a tensor (B, ...), got {shown(output)}; pass the part of the "
            "model's output that is explained"
        )
    if output.is_complex() or output.is_quantized or output.layout != torch.strided:
        raise TargetError(f"output: expected dense real numbers, got {shown(output)}")
    if output.is_meta:
        raise TargetError("output: expected numbers, got a tensor on 'meta', which has none")
    return output


def _finite(found: Tensor, what: str) -> Tensor:
    return finite("output", found, f"{what} has to be a number; look at the inputs and weights",
                  TargetError)  # fmt: skip


def _target(name: str, target: Any) -> Any:
    """A Captum target of an objective that is made before there is an output."""
    _has_values(name, target)
    whole = not isinstance(target, bool) and isinstance(target, (int, tuple, list, Tensor))
    if isinstance(target, Tensor):
        whole = not target.is_floating_point() and not target.is_complex() and bool(target.numel())
        whole = whole and target.dtype != torch.bool and target.layout == torch.strided
    if isinstance(target, (tuple, list)):
        whole = bool(target) and all(_is_place(part) for part in target)
    if not whole:
        raise TargetError(
            f"{name}: expected a Captum target (an int, a tuple of ints, or one of them per "
            f"example), got {shown(target)}"
        )
    return target


def _is_place(part: Any) -> bool:
    if isinstance(part, tuple):
        return bool(part) and all(_is_place(one) for one in part)
    return isinstance(part, int) and not isinstance(part, bool)


def probability(output: Tensor, target: Any = None) -> Tensor:
    """The softmax probability, over the last axis, of the target's class; (B,)."""
    output = _scores(output)
    if not output.ndim:
        raise TargetError("output: expected scores of classes on the last axis, got a scalar")
    return logit(output.double().softmax(-1), target)


def logit_difference(a: Any, b: Any) -> Objective:
    """The logit of target `a` less that of target `b` (arXiv 2605.27458, logical inspection).

    Args:
        a, b: Captum targets; the `target` of `attribute` is not used.
    """
    a, b = _target("a", a), _target("b", b)

    def objective(output: Tensor, target: Any = None) -> Tensor:
        output = _scores(output).double()
        return logit(output, a) - logit(output, b)

    return objective


def logit_ratio(a: Any, b: Any) -> Objective:
    """The logit of target `a` over that of target `b` (arXiv 2605.27458, logical inspection)."""
    a, b = _target("a", a), _target("b", b)

    def objective(output: Tensor, target: Any = None) -> Tensor:
        output = _scores(output).double()
        return _finite(logit(output, a) / logit(output, b), "the ratio")

    return objective


def relative_logit_difference(a: Any, b: Any) -> Objective:
    """(y_a - y_b) / (y_a + y_b), (arXiv 2605.27458, logical inspection)."""
    a, b = _target("a", a), _target("b", b)

    def objective(output: Tensor, target: Any = None) -> Tensor:
        output = _scores(output).double()
        one, other = logit(output, a), logit(output, b)
        return _finite((one - other) / (one + other), "the relative difference")

    return objective


def pairwise(output: Tensor, target: Any = None) -> Tensor:
    """The diagonal of a (B, B) score matrix: example i's image with example i's text (CLIP)."""
    output = _scores(output)
    if output.ndim != 2 or output.shape[0] != output.shape[1]:
        raise TargetError(f"output: expected scores of shape (B, B), got {tuple(output.shape)}")
    return _finite(torch.diagonal(output.double()), "every score of the diagonal")
