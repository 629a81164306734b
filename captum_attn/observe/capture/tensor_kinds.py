"""Tensors of a kind that cannot be explained, or that weights cannot be: what to do about each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from captum_attn.errors import InputError


def check_kind(name: str, tensor: Tensor) -> None:
    """Refuses an input that is no plain tensor of numbers.

    Args:
        name (str): what the error calls it.
    """
    if _is_transformed(tensor):
        got, advice = "one inside a transform of `torch.func`", (
            "call it outside of `vmap`, `grad` and the like, with the whole batch at once"
        )  # fmt: skip
    elif tensor.is_meta:
        got, advice = "one on 'meta', which has none", "put the input on the model's device"
    elif tensor.is_nested:
        got, advice = "a nested one", "pad it (`torch.nested.to_padded_tensor`), with a mask"
    elif tensor.is_quantized:
        got, advice = f"a quantised one of {tensor.dtype}", "pass `tensor.dequantize()`"
    elif tensor.layout != torch.strided:
        got, advice = f"one of layout {tensor.layout}", "pass `tensor.to_dense()`"
    elif tensor.is_complex():
        got, advice = f"one of {tensor.dtype}", "pass `torch.view_as_real(tensor)`"
    elif tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        got, advice = f"one of {tensor.dtype}", "pass it in the dtype that the model computes in"
    else:
        return
    raise InputError(f"{name}: expected a dense tensor of real numbers, got {got}; {advice}")


def _is_transformed(tensor: Tensor) -> bool:
    """Whether it is a value of `vmap`, `grad` or `jvp`, of which the numbers cannot be read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_weights(modules: Iterable[nn.Module]) -> None:
    """Refuses models whose layers do not know their shapes yet."""
    for module in modules:
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is not None and is_lazy(weight):
                raise InputError(
                    f"the {name!r} of a {type(module).__name__} has no shape yet, as the layer is "
                    "lazy: run the model once on an example, `model(inputs)`, before it is "
                    "explained"
                )
