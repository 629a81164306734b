"""Formulas that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(relevance: Tensor, initial: Tensor | None = None) -> Tensor:
    """R̄ = R̂ / rowsum(R̂) + I with R̂ = R − I; (..., n, n).

    Where tokens have moved or merged, `initial`, the carried identity, stands for I.

    Eq. 8, 9 of Chefer, Gur & Wolf, ICCV 2021, and Eq. 8-10 of Cui, Fan & Chen, arXiv 2605.27458. A
    row of R̂ that sums to 0 stays 0, where the reference divides 0 by 0 and gets NaN throughout.
    """
    if initial is None:
        initial = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    change = relevance - initial
    total = change.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, change / torch.where(total == 0, 1, total)) + initial
