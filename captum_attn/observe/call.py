"""One observed attention call: what asked, what answered, and its map A whenever it is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError

# Roles of the axes that lead an operand; a token position is a (lane, place) pair.
BATCH, LANE, HEAD = "batch", "lane", "head"


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Relevance is computed in float32, in float64 for float64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def repeat_heads(tensor: Tensor, like: Tensor) -> Tensor:
    """Grouped keys or values, one head for several queries' heads -> one for each."""
    if tensor.ndim < 3 or like.ndim < 3 or tensor.shape[-3] in (1, like.shape[-3]):
        return tensor
    return tensor.repeat_interleave(like.shape[-3] // tensor.shape[-3], -3)


def attention_map(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """A of `torch.nn.functional.scaled_dot_product_attention`, lead + (q, k), formed plainly."""
    k = repeat_heads(k, q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ k.mT
    if is_causal:  # aligned at the upper left corner
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    else:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(-1).nan_to_num(0.0)  # a row masked everywhere attends to nothing


def positions(folded: Tensor) -> Tensor:
    """(B, F, H, n, d) -> (B, F n, H d)."""
    return folded.transpose(2, 3).flatten(3).flatten(1, 2)


@dataclass(eq=False)
class AttentionCall:
    r"""One `softmax(QK^T)V` that ran.

    Operands keep their graph; their leading axes `lead` are the same for all three (an axis that
    one of them lacks has size 1), e.g. (B, H). `fold` brings them to (B, F, H, rows, columns): F
    lanes are sequences folded beside each other (windows, channels), 1 in the ordinary case.

    Args:
        index (int): position in the order of execution.
        module (str): qualified name of the innermost module that ran it.
        q, k, v (Tensor): lead + (n_q, d), lead + (n_k, d), lead + (n_k, d_v).
        lead (tuple of int): sizes of the leading axes of A.
        edge (GradientEdge): where the gradient of the call's output is taken.
        out_permutation (tuple of int): brings the output's axes to lead + (n_q, d_v); None where
            they are so already.
        severed: blind calls and graph nodes that the operands stem from without a gradient.
        roles: what each leading axis is, ((BATCH, 2), (HEAD, 4)); settled by the wiring.
        weights (Tensor): A, lead + (n_q, n_k), where the model formed it; None for the fused
            kernel, whose A is recomputed from q, k and `mask`.
    """

    index: int
    module: str
    q: Tensor
    k: Tensor
    v: Tensor
    lead: tuple[int, ...]
    edge: GradientEdge
    weights: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    out_permutation: tuple[int, ...] | None = None
    severed: tuple[Any, ...] = ()
    roles: tuple[tuple[str, int], ...] = ()

    @property
    def n_q(self) -> int:
        return (self.q if self.weights is None else self.weights).shape[-2]

    @property
    def n_k(self) -> int:
        return self.v.shape[-2]

    def _size(self, role: str) -> int:
        return math.prod(size for name, size in self.roles if name == role)

    @property
    def lanes(self) -> int:
        return self._size(LANE)

    @property
    def heads(self) -> int:
        return self._size(HEAD)

    @property
    def positions(self) -> tuple[int, int]:
        """Numbers of query and of key positions per example, all lanes together."""
        return self.lanes * self.n_q, self.lanes * self.n_k

    def fold(self, tensor: Tensor) -> Tensor:
        """lead + (rows, columns) -> (B, F, H, rows, columns)."""
        rows, columns = tensor.shape[-2:]
        tensor = tensor.expand(*self.lead, rows, columns)
        tensor = tensor.reshape(*(size for _, size in self.roles), rows, columns)
        order = [
            i for role in (BATCH, LANE, HEAD) for i, r in enumerate(self.roles) if r[0] == role
        ]
        tensor = tensor.permute(*order, -2, -1)
        return tensor.reshape(self._size(BATCH), self.lanes, self._size(HEAD), rows, columns)

    def rows(self, operand: Tensor) -> Tensor:
        """lead + (n, d) -> (B, F n, H d): every position's own row, the lanes one after another."""
        if operand.ndim - 2 != len(self.lead):
            raise WiringError(
                f"{self.module!r}: operand {tuple(operand.shape)} does not fit its attention map "
                f"with leading axes {self.lead}; confine the method to other calls with `layers=`"
            )
        return positions(self.fold(operand))

    def attention(self) -> Tensor:
        """A as the model used it, (B, F, H, q, k), detached, in the working precision."""
        if self.weights is not None:
            weights = self.weights.detach()
            return self.fold(weights.to(working_dtype(weights.dtype)))
        dtype = working_dtype(self.q.dtype)
        q, k = self.q.detach().to(dtype), self.k.detach().to(dtype)
        mask = None if self.mask is None else self.mask.detach()
        return self.fold(attention_map(q, k, mask, self.is_causal, self.scale))

    def output_rows(self, gradient: Tensor) -> Tensor:
        """The output's gradient as it arrives -> (B, F, H, q, d_v)."""
        if self.out_permutation is not None:
            gradient = gradient.permute(self.out_permutation)
        return self.fold(gradient)

    def map_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of the explained output with respect to A, (B, F, H, q, k): dO V^T."""
        dtype = working_dtype(gradient.dtype)
        value = self.fold(self.v.detach()).to(dtype)
        return self.output_rows(gradient).to(dtype) @ value.mT
