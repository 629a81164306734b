"""What torch's functions mean to a tap, and how one is run past its override check."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
DETACH = frozenset({torch.detach, Tensor.detach, Tensor.data.__get__})  # type: ignore[attr-defined]
# A parameter that one of these turns into tokens (queries, latents, [CLS]) becomes a leaf.
TOKEN_MAKERS = frozenset(
    {Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.__getitem__}
    | {Tensor.repeat, torch.tile, Tensor.tile, torch.repeat_interleave, Tensor.repeat_interleave}
    | {torch.unsqueeze, Tensor.unsqueeze, torch.cat, torch.concat, torch.stack}
)
# Operators called as such (`torch.ops.quantized...`): some have no derivative.
OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
BATCH_NORMS = frozenset({F.batch_norm, torch.batch_norm})
# Operations that mix tokens without attention: named when a model's tokens pass through them.
TOKEN_MIXERS = frozenset(
    "conv1d conv2d conv3d cumsum lstm gru rnn_tanh rnn_relu grid_sample".split()
)


def without_override_check(func: Any) -> Callable:
    """`func` with the check switched off that would send it back to the active mode."""
    namespace = {**func.__globals__, "has_torch_function": lambda _: False}
    plain = types.FunctionType(
        func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__
    )
    plain.__kwdefaults__ = func.__kwdefaults__
    return plain
