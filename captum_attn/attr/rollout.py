"""AttentionRollout: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, with
the extension to several streams of Chefer, Gur & Wolf, ICCV 2021 (Eq. 12)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from captum_attn.attr._base import AttentionAttribution, Block, BlockRow, LinearRule, Run
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._propagate import (
    add,
    carried,
    dense,
    is_cross_attention,
    moved,
    relevance_rows,
    self_relevance,
)
from captum_attn.observe.streams.states import AttentionState, RearrangedState, State

FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda heads: heads.mean(2),
    "max": lambda heads: heads.amax(2),
    "min": lambda heads: heads.amin(2),
}


def residual(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Â = rownorm(A + I), as the shares of I and of A; (..., q, k) -> (..., q), (..., q, k)."""
    own = 1 / (attention.sum(-1) + 1)
    return own, attention * own[..., None]


class AttentionRollout(AttentionAttribution):
    r"""Attention rollout, Abnar & Zuidema, ACL 2020: the product of Â = rownorm(E_h A + I).

    Class-agnostic: `target` only serves to find the rows that the output reads. Across streams the
    rolled-out blocks are joined by the last cross-attention map, R[s,q] = R[s,s]^T · A · R[q,q]
    (Chefer, Gur & Wolf, ICCV 2021, Eq. 12).

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        head_fusion (str): "mean", "max" or "min" over the heads. Default: "mean".

    Examples::

        >>> AttentionRollout(model).attribute(images).sum(1)   # (B, H, W)
    """

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        head_fusion: Literal["mean", "max", "min"] = "mean"

    needs_gradient = False

    @classmethod
    def get_name(cls) -> str:
        return "Attention Rollout"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        return block.attention()

    def fused(self, run: Run[Options], block: Block) -> Tensor:
        return FUSIONS[run.options.head_fusion](self.weigh_heads(run, block))

    def rule(self, run: Run[Options], block: Block) -> LinearRule:
        if is_cross_attention(run.state_after(block.call)):  # the last one counts, in Eq. 12
            return UNCHANGED
        return LinearRule(*residual(self.fused(run, block)))

    def is_linear(self, run: Run[Options]) -> bool:
        return not run.has_cross_attention

    def matrices(self, run: Run[Options], last: Iterable[State]) -> dict[State, BlockRow]:
        return {state: self._joined(run, state) for state in last}

    def finish(self, run: Run[Options]) -> Callable[[State, BlockRow], BlockRow] | None:
        def begin(state: State, rows: BlockRow) -> BlockRow:
            """A stream that begins with another's tokens: what these have read comes with them."""
            parts = state.parts if isinstance(state, RearrangedState) else ()
            if all(part.state.stream == state.stream for part in parts):
                return rows
            rows = {}
            for part in parts:
                for source, block in self._joined(run, part.state).items():
                    add(rows, source, moved(block, part, state.n))
            return rows

        return begin

    def _joined(self, run: Run[Options], state: State) -> BlockRow:
        """R of a state with Eq. 12: through the last call to every other stream, and beyond it."""
        rows = dict(super().matrices(run, [state])[state])
        calls = [
            made
            for made in run.calls_into([state])
            if is_cross_attention(made) and made.stream == state.stream
        ]
        for last in {made.key_state.stream: made for made in calls}.values():
            asking = last.query_state
            own = self_relevance(asking, super().matrices(run, [asking])[asking])
            to = carried(state, last, run.like)  # not every token of a stream need ask
            if own is None or to is None:
                continue
            attended = self._attended(run, last, own.identity)
            own = own._replace(rows=own.rows * attended)
            read = dense(run.full_map(last.call, partial(self.fused, run)))
            read = to @ own.squared().mT @ read
            for source, block in self._joined(run, last.key_state).items():
                if source.name != state.stream:
                    add(rows, source, read @ block)
        return rows

    def _attended(self, run: Run[Options], asked: AttentionState, start: Tensor) -> Tensor:
        """(B, n, 1): which of the asking tokens some token of their stream attends.

        Padding is attended by none. It asks the other stream all the same, and the transpose in
        Eq. 12 would hand that on to the real tokens.
        """
        earlier = [s for s in run.calls_into([asked.query_state]) if s.stream == asked.stream]
        calls = [state for state in earlier if not is_cross_attention(state)][-1:]
        if not calls:
            return start.new_ones(*start.shape[:2], 1)

        def strongest(block: Block) -> LinearRule:
            if block.call is not calls[0].call:
                return UNCHANGED
            return LinearRule(0.0, self.weigh_heads(run, block).abs().amax(2))

        rows = run.like.new_ones(run.batch, calls[0].n)
        found = relevance_rows({calls[0]: rows}, strongest, run.queries_per_block)
        attended = next(rows for x, rows in found.items() if x.name == asked.stream)
        return (start @ attended[..., None] != 0).to(start)
