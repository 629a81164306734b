"""The operands of an attention call, brought into one form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from captum_attn.observe.capture.contraction import Contraction, align
from captum_attn.observe.capture.tensor_notes import Scores


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one: then a product with it is no QK^T."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def contracts_keys(product: Contraction, side: int, scores: Scores) -> bool:
    """Whether this is A V: one token axis of A is summed over, and the other one stays."""
    if len(product.contracted) != 1 or not product.free(side) or not product.free(1 - side):
        return False
    axes = product.axes(side)
    return (axes.index(product.contracted) - len(axes),) in scores.axes


def with_lead(operand: Tensor, lead: torch.Size, rows: int) -> Tensor:
    """A factor of QK^T with its leading axes split or merged as those of A are."""
    if operand.ndim - 2 == len(lead) and operand.shape[-2] == rows:
        return operand
    if operand.numel() % (math.prod(lead) * rows) == 0:
        return operand.reshape(*lead, rows, -1)
    return operand


def scores_of(product: Contraction) -> Scores | None:
    """QK^T with its two factors, if a product may be that: an outer product is not."""
    rows = product.free(0)[-1:], product.free(1)[-1:]
    if not (all(rows) and product.contracted):
        return None
    lead = product.lead()
    one, other = (
        align(
            product.operand(side), product.axes(side), lead + rows[side] + product.contracted
        ).flatten(len(lead) + 1)
        for side in (0, 1)
    )
    axes = [(product.out.index(row) - len(product.out),) for row in rows]
    return Scores(operands=(one, other), detached_from=(), axes=(axes[0], axes[1]))
