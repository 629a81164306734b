"""AttentionRollout: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, with
the extension to several streams of Chefer, Gur & Wolf, ICCV 2021 (Eq. 12)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from captum_attn.attr._base import AttentionAttribution
from captum_attn.attr._blocks import Weighed
from captum_attn.attr._propagate import (
    BlockRow,
    add,
    carried,
    dense,
    initial_block,
    is_cross_attention,
    moved,
    relevance_rows,
    squared,
)
from captum_attn.attr._run import Run
from captum_attn.observe.capture.attention_call import Block
from captum_attn.observe.streams.states import AttentionState, RearrangedState, Source, State

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

    options = {"head_fusion": "mean"}
    choices = {"head_fusion": tuple(FUSIONS)}
    needs_gradient = False

    @classmethod
    def get_name(cls) -> str:
        return "Attention Rollout"

    def weigh_heads(self, run: Run, block: Block) -> Tensor:
        return block.attention()

    def fused(self, run: Run, block: Block) -> Tensor:
        return FUSIONS[run.options["head_fusion"]](self.weigh_heads(run, block))

    def weigh(self, run: Run, update: AttentionState, block: Block) -> Weighed | None:
        if is_cross_attention(update):  # of these only the last one counts, in Eq. 12
            return None
        return residual(self.fused(run, block))

    def relevance(self, run: Run) -> dict[Source, Tensor]:
        if not any(map(is_cross_attention, run.updates())):
            return super().relevance(run)
        return self.relevance_of_maps(run)

    def maps(self, run: Run, last: Iterable[State]) -> dict[State, BlockRow]:
        return {state: self._joined(run, state) for state in last}

    def finish(self, run: Run) -> Callable[[State, BlockRow], BlockRow] | None:
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

    def _joined(self, run: Run, state: State) -> BlockRow:
        """R of a state with Eq. 12: through the last call to every other stream, and beyond it."""
        rows = dict(super().maps(run, [state])[state])
        calls = [
            u for u in run.updates([state]) if is_cross_attention(u) and u.stream == state.stream
        ]
        for update in {u.key_state.stream: u for u in calls}.values():
            before = super().maps(run, [update.query_state])[update.query_state]
            own = next((b for x, b in before.items() if x.name == state.stream), None)
            start = initial_block(update.query_state, run.like)
            to = carried(state, update, run.like)  # not every token of a stream need ask
            if own is None or start is None or to is None:
                continue
            own = own * self._attended(run, update, start)
            read = dense(run.whole_map(update, partial(self.fused, run)))
            read = to @ squared(own, start).mT @ read
            for source, block in self._joined(run, update.key_state).items():
                if source.name != state.stream:
                    add(rows, source, read @ block)
        return rows

    def _attended(self, run: Run, update: AttentionState, start: Tensor) -> Tensor:
        """(B, n, 1): which of the asking tokens some token of their stream attends.

        Padding is attended by none. It asks the other stream all the same, and the transpose in
        Eq. 12 would hand that on to the real tokens.
        """
        earlier = [u for u in run.updates([update.query_state]) if u.stream == update.stream]
        calls = [u for u in earlier if not is_cross_attention(u)][-1:]
        if not calls:
            return start.new_ones(*start.shape[:2], 1)

        def strongest(update: AttentionState, block: Block) -> Weighed | None:
            own = update is calls[0]
            return (0.0, self.weigh_heads(run, block).abs().amax(2)) if own else None

        rows = run.like.new_ones(run.seen.batch, calls[0].n)
        found = relevance_rows({calls[0]: rows}, strongest, run.at_once)
        attended = next(rows for x, rows in found.items() if x.name == update.stream)
        return (start @ attended[..., None] != 0).to(start)
