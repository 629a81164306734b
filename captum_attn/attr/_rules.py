"""Formulas that several methods share."""

from __future__ import annotations

from typing import NamedTuple

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


class SelfRelevance(NamedTuple):
    """R[s,s], a stream's relevance for its own tokens, beside what it was without any attention.

    Attributes:
        rows (Tensor): R[s,s], (B, n, n_source).
        identity (Tensor): likewise; I, carried along where tokens have moved or merged.
    """

    rows: Tensor
    identity: Tensor

    def normalized(self) -> SelfRelevance:
        """R̄[s,s], see `normalized`."""
        return SelfRelevance(normalized(self.rows, self.identity), self.identity)

    def squared(self) -> Tensor:
        """R[s,s] with the tokens in their present order along both axes, (B, n, n).

        The identity becomes I. Of anything else a source's part goes to the present tokens that it
        has become: to one where tokens were moved or merged, by their shares where they were mixed.
        """
        identity = self.identity
        tiny = torch.finfo(identity.dtype).tiny
        shares = identity / identity.sum(1, keepdim=True).clamp_min(tiny)
        there = (identity != 0).any(-1).to(identity)
        return torch.diag_embed(there) + (self.rows - identity) @ shares.mT

    def to(self, dtype: torch.dtype) -> SelfRelevance:
        return SelfRelevance(self.rows.to(dtype), self.identity.to(dtype))
