"""One observed attention call: what asked, what answered, and its map A whenever it is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError

# Roles of the axes that lead an operand; a token position is a (window, place) pair.
BATCH, WINDOW, HEAD = "batch", "window", "head"


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
    rows: Tensor | None = None,
) -> Tensor:
    """A of `torch.nn.functional.scaled_dot_product_attention`, lead + (q, k), formed plainly.

    Args:
        rows (Tensor, optional): which queries these are, for `is_causal`; None: all, in order.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ repeat_heads(k, q).mT
    if is_causal:  # aligned at the upper left corner
        queries, keys = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        seen = keys <= (queries if rows is None else rows)[:, None]
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    # in place where no gradient needs the scores: new memory costs as much as the softmax
    weights = torch.softmax(scores, -1, out=None if scores.requires_grad else scores)
    if mask is None:
        return weights
    return weights.nan_to_num(0.0)  # a row masked everywhere attends to nothing


def detached(call: AttentionCall, like: AttentionCall) -> AttentionCall:
    """A call without its graph, its axes as those of the same call in another run."""
    weights = None if call.weights is None else call.weights.detach()
    q, k, v = call.q.detach(), call.k.detach(), call.v.detach()
    return replace(call, q=q, k=k, v=v, weights=weights, edge=like.edge, roles=like.roles)


def positions(folded: Tensor) -> Tensor:
    """(B, F, H, n, d) -> (B, F n, H d)."""
    return folded.transpose(2, 3).flatten(3).flatten(1, 2)


@dataclass(eq=False)
class AttentionCall:
    r"""One `softmax(QK^T)V` that ran.

    Operands keep their graph; their leading axes `lead` are the same for all three (an axis that
    one of them lacks has size 1), e.g. (B, H). `fold` brings them to (B, F, H, rows, columns): F
    windows are sequences folded beside each other (windows, channels), 1 in the ordinary case. B is
    1 where the examples are packed into one sequence.

    Args:
        index (int): position in the order of execution.
        module (str): qualified name of the innermost module that ran it.
        q, k, v (Tensor): lead + (n_q, d), lead + (n_k, d), lead + (n_k, d_v).
        lead (tuple of int): sizes of the leading axes of A.
        edge (GradientEdge): where the gradient of the call's output is taken.
        out_permutation (tuple of int): brings the output's axes to lead + (n_q, d_v); None where
            they are so already.
        detached_from: blind calls and graph nodes that the operands stem from without a gradient.
        roles: what each leading axis is, ((BATCH, 2), (HEAD, 4)); settled by the wiring.
        weights (Tensor): A, lead + (n_q, n_k), where the model formed it; None for the fused
            kernel, whose A is recomputed from q, k and `mask`.
        event (tuple): the module that ran its softmax, and its number there, counted from 0.
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
    detached_from: tuple[Any, ...] = ()
    roles: tuple[tuple[str, int], ...] = ()
    event: tuple[str, int] = ("", 0)

    @property
    def n_q(self) -> int:
        return (self.q if self.weights is None else self.weights).shape[-2]

    @property
    def n_k(self) -> int:
        return self.v.shape[-2]

    @property
    def packed(self) -> bool:
        """Whether the tokens of all examples lie in one sequence (or in windows of it)."""
        return bool(self.roles) and all(role != BATCH for role, _ in self.roles)

    def _size(self, role: str) -> int:
        return math.prod(size for name, size in self.roles if name == role)

    @property
    def examples(self) -> int:
        """The number of examples that it holds apart, 1 where they are packed."""
        return self._size(BATCH)

    @property
    def windows(self) -> int:
        return self._size(WINDOW)

    @property
    def heads(self) -> int:
        return self._size(HEAD)

    @property
    def positions(self) -> tuple[int, int]:
        """Numbers of query and of key positions per example, all windows together."""
        return self.windows * self.n_q, self.windows * self.n_k

    def fold(self, tensor: Tensor) -> Tensor:
        """lead + (rows, columns) -> (B, F, H, rows, columns)."""
        rows, columns = tensor.shape[-2:]
        tensor = tensor.expand(*self.lead, rows, columns)
        tensor = tensor.reshape(*(size for _, size in self.roles), rows, columns)
        order = [
            i for role in (BATCH, WINDOW, HEAD) for i, r in enumerate(self.roles) if r[0] == role
        ]
        tensor = tensor.permute(*order, -2, -1)
        return tensor.reshape(self._size(BATCH), self.windows, self._size(HEAD), rows, columns)

    def with_lead(self, lead: Sequence[int]) -> AttentionCall:
        """The same call of another run, with other leading axes: copies of the examples."""
        times, rest = divmod(math.prod(lead), math.prod(self.lead))
        batches = sum(role == BATCH for role, _ in self.roles)
        if len(lead) != len(self.lead) or rest or (times != 1 and batches != 1):
            raise WiringError(
                f"{self.module!r}: expected an attention map with leading axes {self.lead}, or "
                f"those of copies of the examples, got {tuple(lead)}: run the model on inputs like "
                "those that its attention was looked for on"
            )
        roles = tuple((role, n * times if role == BATCH else n) for role, n in self.roles)
        return replace(self, lead=tuple(lead), roles=roles)

    def unfold(self, folded: Tensor) -> Tensor:
        """(B, F, H or 1, rows, columns) -> lead + (rows, columns), the inverse of `fold`.

        Where there is one for all heads, the heads' axis has size 1 if it has no other part.
        """
        order = [
            i for role in (BATCH, WINDOW, HEAD) for i, r in enumerate(self.roles) if r[0] == role
        ]
        shared = folded.shape[2] == 1
        sizes = [1 if shared and role == HEAD else size for role, size in self.roles]
        apart = folded.reshape(*(sizes[i] for i in order), *folded.shape[-2:])
        apart = apart.permute(*(order.index(i) for i in range(len(order))), -2, -1)
        if tuple(size for _, size in self.roles) == self.lead:
            return apart
        whole = apart.expand(*(size for _, size in self.roles), *folded.shape[-2:])
        return whole.reshape(*self.lead, *folded.shape[-2:])

    def rows(self, operand: Tensor) -> Tensor:
        """lead + (n, d) -> (B, F n, H d): every position's row, window after window."""
        if operand.ndim - 2 != len(self.lead):
            raise WiringError(
                f"{self.module!r}: operand {tuple(operand.shape)} does not fit its attention map "
                f"with leading axes {self.lead}; confine the method to other calls with `layers=`"
            )
        return positions(self.fold(operand))

    def attention(self) -> Tensor:
        """A as the model used it, (B, F, H, q, k), detached, in the working precision."""
        return Block(self).attention()

    def output_rows(self, gradient: Tensor) -> Tensor:
        """The output's gradient as it arrives -> (B, F, H, q, d_v)."""
        if self.out_permutation is not None:
            gradient = gradient.permute(self.out_permutation)
        return self.fold(gradient)

    def map_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of the explained output with respect to A, (B, F, H, q, k): dO V^T."""
        return Block(self).map_gradient(gradient)


@dataclass(frozen=True)
class Block:
    """Some queries of an attention call, in all its windows and heads.

    Args:
        call (AttentionCall): the call.
        rows (Tensor, optional): (q',) ascending indices of the queries; None: all.
    """

    call: AttentionCall
    rows: Tensor | None = None

    @property
    def n_q(self) -> int:
        """The number of queries q'."""
        return self.call.n_q if self.rows is None else len(self.rows)

    @property
    def n_k(self) -> int:
        """The number of keys k': a causal call does not look behind its last query."""
        call = self.call
        if self.rows is None or not call.is_causal or call.weights is not None:
            return call.n_k
        return min(int(self.rows[-1]) + 1, call.n_k)

    def attention(self) -> Tensor:
        """A, (B, F, H, q', k'), detached, in the working precision."""
        call = self.call
        if call.weights is not None:
            weights = self._of_rows(call.weights.detach())
            return call.fold(weights.to(working_dtype(weights.dtype)))
        dtype, mask = working_dtype(call.q.dtype), call.mask
        q, k = self._of_rows(call.q.detach()).to(dtype), self._keys(call.k.detach()).to(dtype)
        if mask is not None:
            mask = mask.detach()[..., : self.n_k]
            mask = self._of_rows(mask) if mask.shape[-2] == call.n_q else mask
        weights = attention_map(q, k, mask, call.is_causal, call.scale, self.rows)
        return call.fold(weights)

    def queries(self) -> Tensor:
        """Q, (B, F, H, q', d), detached, in the working precision."""
        return self._operand(self._of_rows(self.call.q))

    def keys(self) -> Tensor:
        """K, (B, F, H, k', d), likewise; the keys that several heads share are repeated."""
        return self._operand(self._keys(repeat_heads(self.call.k, self.call.q)))

    def values(self) -> Tensor:
        """V, (B, F, H, k', d_v), likewise."""
        return self._operand(self._keys(self.call.v))

    def map_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of the explained output with respect to A, (B, F, H, q', k'): dO V^T.

        Args:
            gradient (Tensor): the one at the call's output, as it arrives.
        """
        return self.output_rows(gradient) @ self.values().mT

    def output_rows(self, arriving: Tensor) -> Tensor:
        """What arrives at the call's output, (B, F, H, q', d_v), in the working precision."""
        rows = self._of_rows(self.call.output_rows(arriving))
        return rows.to(working_dtype(arriving.dtype))

    def _operand(self, tensor: Tensor) -> Tensor:
        return self.call.fold(tensor.detach()).to(working_dtype(tensor.dtype))

    def _of_rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor.index_select(-2, self.rows)

    def _keys(self, tensor: Tensor) -> Tensor:
        return tensor[..., : self.n_k, :]
