"""Which entries of a map are attention at all: masked keys and padding are none.

The gradient of A is dO V^T also where A is masked, so whatever averages it has to leave these out:
then padded and unpadded inputs are explained alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_attn.attr._run import Run
from captum_attn.observe import AttentionCall, Block
from captum_attn.observe.vectors.padding import Padding


def attended_gradient(run: Run[Any], block: Block, attention: Tensor | None = None) -> Tensor:
    """∇A, zero where attention is masked; (B, F, H, q', k').

    Masked is what has A = 0: where the model forms A itself nothing else shows, and a model under
    the fused kernel is explained as its twin.
    """
    attention = block.attention() if attention is None else attention
    return run.attention_gradient(block).masked_fill_(attention == 0, 0)


def real_queries(run: Run[Any], call: AttentionCall) -> Tensor | None:
    """Which queries are no padding, (B or 1, F, q); None: all."""

    def find() -> Tensor | None:
        asking = run.state_after(call).query_state
        real = Padding(run.observation.wiring).tokens(asking)
        return None if real is None else real.view(len(real), call.windows, call.n_q)

    return run.once(("real queries", call), find)


def of_block(values: Tensor, block: Block) -> Tensor:
    """The part of (B, F, q) that belongs to a block's queries."""
    return values if block.rows is None else values[:, :, block.rows]


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where the whole is 0."""
    return torch.where(whole == 0, 0, part / torch.where(whole == 0, 1, whole))
