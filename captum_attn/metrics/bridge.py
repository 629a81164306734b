"""A bridge to Quantus: its metrics call `quantus_explain_func` to get attributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution
from torch import nn

from captum_attn.errors import OptionError
from captum_attn.metrics._checks import explaining, flag
from captum_attn.metrics._model import finite_attributions, one_map

__all__ = ["quantus_explain_func"]


def quantus_explain_func(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    *,
    method: Callable[[nn.Module], Attribution],
    device: Any = None,
    sum_channels: bool = False,
    **options: Any,
) -> np.ndarray:
    r"""Attributions of any Captum method, in the form in which Quantus asks for them.

    Quantus itself is not imported here.

    Args:
        model (Module): given by Quantus; its randomisation metrics give randomised copies.
        inputs (array): (B, ...), given by Quantus.
        targets (array): (B,), given by Quantus.
        method (callable): the method's class, or whatever makes the method from the model. An
            instance would go on explaining its own model, so it is refused.
        device (optional): where the method runs. Default: where the model is.
        sum_channels (bool): sum over the channels and keep the axis, (B, 1, ...), as Quantus'
            own `explain` does for images. Default: False.
        **options: of the method's `attribute`.

    Returns:
        numpy.ndarray: of the inputs' shape.

    Examples::

        >>> metric = quantus.PixelFlipping(features_in_step=64)
        >>> metric(model, x, y, explain_func=quantus_explain_func,
        ...        explain_func_kwargs={"method": GenericAttention, "sum_channels": True})
    """
    if isinstance(method, Attribution) or not callable(method):
        raise OptionError(
            "method: expected a class such as GenericAttention, or a callable that makes the "
            f"method from Quantus' model, got an instance of {type(method).__name__}"
        )
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a torch module, got {type(model).__name__}")
    flag("sum_channels", sum_channels)
    with explaining("the method could not explain what Quantus gave"):
        return _explained(model, inputs, targets, method, device, sum_channels, options)


def _explained(
    model: nn.Module, inputs: Any, targets: Any, method: Any, device: Any, sum_channels: bool,
    options: dict[str, Any],
) -> np.ndarray:  # fmt: skip
    place = next((p for p in model.parameters()), torch.zeros(0, device="cpu"))
    where = place.device if device is None else device
    values = torch.as_tensor(np.asarray(inputs), device="cpu").to(where)
    values = values.to(place.dtype) if values.is_floating_point() else values
    target = (
        None
        if targets is None
        else torch.as_tensor(np.asarray(targets), device="cpu").to(where).long()
    )
    found = method(model).attribute(values, target=target, **options)
    found = one_map(found)
    found = found.sum(1, keepdim=True) if sum_channels else found
    return finite_attributions(found, "of the method").to(found.dtype).cpu().numpy()
