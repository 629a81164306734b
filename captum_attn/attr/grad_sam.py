"""Grad-SAM: Barkan et al., "Grad-SAM: Explaining Transformers via Gradient Self-Attention Maps",
CIKM 2021."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from captum_attn.attr._attended import of_block, real_queries
from captum_attn.attr._base import Block, Run
from captum_attn.attr._propagate import add
from captum_attn.attr._token_sums import TokenSums
from captum_attn.observe.streams.states import AttentionState, State


class GradSam(TokenSums):
    r"""Grad-SAM, Barkan et al., CIKM 2021: H_l = A_l ⊙ (∇A_l)^+, summed over all maps.

    r_j = 1/(L H N) Σ_l Σ_h Σ_i H_l[h,i,j], with L the calls that go into the output, H their heads
    and N the real queries. The sum over the queries is what others take from a token, relevance in
    the sense of every other method here. As printed, the paper sums over the keys of the token's
    own row, so that it credits the last layer to the token that is read (`axis="query"`).

    Nothing is propagated from layer to layer: a token of a later layer stands for the same token of
    the input. An extension to models of several streams: every call counts, and the sum over its
    queries belongs to the stream that answers.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        axis (str): whether the tokens of the result are the "key" or the "query" axis of the maps.
            Default: "key".

    Examples::

        >>> GradSam(model).attribute(tokenizer(texts, ...), target=1)["input_ids"]   # (B, n)
    """

    @dataclass(frozen=True)
    class Options(TokenSums.Options):
        axis: Literal["key", "query"] = "key"

    @classmethod
    def get_name(cls) -> str:
        return "Grad-SAM"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        return run.attention_gradient(block).clamp_min_(0).mul_(block.attention())

    def credits(self, run: Run[Options]) -> dict[State, Tensor]:
        calls = [state for state in run.calls_into() if run.has_gradient(state.call)]
        found: dict[State, Tensor] = {}
        by_key = run.options.axis == "key"
        for state in calls:
            rows = self._sums(run, state, by_key) / (len(run.calls_into()) * state.call.heads)
            add(found, state.key_state if by_key else state.query_state, rows)
        return found

    def _sums(self, run: Run[Options], state: AttentionState, by_key: bool) -> Tensor:
        """1/N Σ_h Σ H over the other axis, (B, F k) or (B, F q)."""
        call, real = state.call, real_queries(run, state.call)
        found = run.like.new_zeros(run.batch, call.windows, call.n_k if by_key else call.n_q)
        for block in run.blocks(call):
            heads = self.weigh_heads(run, block).sum(2)  # (B, F, q', k')
            if real is not None:
                heads = heads * of_block(real, block)[..., None]
            if by_key:
                found[..., : block.n_k] += heads.sum(2).to(found)
            else:
                found[:, :, slice(None) if block.rows is None else block.rows] = heads.sum(3)
        count = call.positions[0] if real is None else real.sum((1, 2))[:, None].clamp_min(1)
        return found.flatten(1) / count
