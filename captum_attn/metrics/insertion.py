"""Insertion and deletion, as RISE measures them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from captum.log import log_usage
from torch import Tensor

from captum_attn.errors import OptionError
from captum_attn.metrics._model import Attributions, Inputs
from captum_attn.metrics.perturbation import Steps, perturbation_curve

__all__ = ["deletion", "insertion"]


@log_usage()
def deletion(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    steps: Steps = 100,
    **options: Any,
) -> Tensor:
    r"""Area under the probability while the most relevant units are removed (RISE, Petsiuk et
    al. 2018). Lower is better.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        steps (int or sequence of float): Default: 100.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> deletion(model, images, attributions, perturbations_per_eval=10).mean()
    """
    curve = perturbation_curve(
        forward_func, inputs, attributions, target, additional_forward_args, steps=steps, **options
    )
    return curve.area()


@log_usage()
def insertion(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    steps: Steps = 100,
    fill: Any = "blur",
    **options: Any,
) -> Tensor:
    r"""Area under the probability while the most relevant units are put into an input without
    any (RISE, Petsiuk et al. 2018). Higher is better.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        steps (int or sequence of float): Default: 100.
        fill: what the units are put into. Default: "blur", the blurred image, which cannot show
            the edges of the units themselves.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> insertion(model, images, attributions, perturbations_per_eval=10).mean()
    """
    if "insert" in options:
        raise OptionError("insert: insertion inserts anyway; deletion(...) is the other way round")
    curve = perturbation_curve(
        forward_func, inputs, attributions, target, additional_forward_args,
        steps=steps, fill=fill, insert=True, **options,
    )  # fmt: skip
    return curve.area()
