"""GenericAttention: Chefer, Gur & Wolf, "Generic Attention-model Explainability for Interpreting
Bi-Modal and Encoder-PositionDecoder Transformers", ICCV 2021 (GAE)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from captum_attn.attr._base import AttentionAttribution
from captum_attn.attr._blocks import Weighed
from captum_attn.attr._propagate import (
    Answer,
    BlockRow,
    add,
    answers,
    initial_block,
    is_cross_attention,
    is_self_attention,
    squared,
)
from captum_attn.attr._rules import normalized
from captum_attn.attr._run import Run
from captum_attn.errors import WiringError
from captum_attn.observe.capture.attention_call import Block
from captum_attn.observe.streams.states import AttentionState, Source, State


def positive_heads(attention: Tensor, gradient: Tensor) -> Tensor:
    """(∇A ⊙ A)^+, whose mean over heads is Eq. 5; any shape. Written into `gradient`."""
    return gradient.mul_(attention).clamp_min_(0)


def across(own: Tensor, read: Tensor, other: Tensor) -> Tensor:
    """Eq. 10: R̄[s,s]^T · Ā · R̄[q,q], both R̄ from before the call; (..., n_s, n_q).

    R̄[s,s] has the tokens of the stream in their present order along both axes.
    """
    return own.mT @ (read @ other)


class GenericAttention(AttentionAttribution):
    r"""Generic Attention explainability (GAE), Chefer, Gur & Wolf, ICCV 2021.

    For every attention call, with Ā = E_h((∇A ⊙ A)^+) (Eq. 5; ∇A the gradient of the explained
    logit, the clamp before the mean over heads as in the authors' code):

    - within a stream: R[s,x] += Ā R[s,x] for every source x (Eq. 6, 7);
    - across (s asks, q answers): R[s,q] += R̄[s,s]^T Ā R̄[q,q] (Eq. 10) and R[s,x] += Ā R[q,x] for
      the other sources x (Eq. 11), R̄ as in `normalized` (Eq. 8, 9).

    One deliberate difference to the authors' code: a token that nothing has flowed into yet (a row
    of R̂ that sums to 0) keeps just its identity in R̄, where the code divides 0 by 0 and gets NaN
    for the whole matrix.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        normalize (bool): False leaves out Eq. 8, 9 (the paper's ablation). Default: True.
        self_in_rule_10 (bool): False: R[s,q] += Ā (the paper's ablation). Default: True.
        aggregate (bool): False: every update replaces R instead of being added. Default: True.
        discard_self (bool): True sets the relevance of the token that is read out for itself to
            0, as the authors' code does before display. Default: False.

    Examples::

        >>> gae = GenericAttention(model)
        >>> attributions = gae.attribute(images, target=3)   # (B, 3, H, W)
        >>> heat = attributions.sum(1)                       # (B, H, W)
        >>> gae.relevance_maps(images, target=3)             # {("x", "x"): (B, n, n)}
    """

    options = {
        "normalize": True,
        "self_in_rule_10": True,
        "aggregate": True,
        "discard_self": False,
    }

    @classmethod
    def get_name(cls) -> str:
        return "Generic Attention (GAE)"

    def weigh_heads(self, run: Run, block: Block) -> Tensor:
        attention = block.attention()  # (B, F, H, q, k)
        gradient = run.attention_gradient(block)
        return (
            torch.zeros_like(attention) if gradient is None else positive_heads(attention, gradient)
        )

    def weigh(self, run: Run, update: AttentionState, block: Block) -> Weighed | None:
        if run.gradients[update.call] is None and run.options["aggregate"]:
            return None
        return float(run.options["aggregate"]), self.weigh_heads(run, block).mean(2)

    def update(self, run: Run, state: AttentionState, maps: Mapping[State, BlockRow]) -> BlockRow:
        asks, added = maps[state.query_state], {}  # type: BlockRow, BlockRow
        own = next((block for x, block in asks.items() if x.name == state.stream), None)
        read = run.whole_map(state, lambda block: self.weigh_heads(run, block).mean(2))
        for answer in answers(state, read, maps):
            for source, block in answer.rows.items():
                if answer.stream != state.stream and source.name == answer.stream:
                    change = self._across(run, state, own, answer)  # Eq. 10
                else:
                    change = answer.read @ block  # Eq. 6, 7, 11
                add(added, source, change)
        if not run.options["aggregate"]:  # what the other stream will hold is still 0 here
            later = {x: torch.zeros_like(b) for x, b in asks.items() if self._taken(run, state, x)}
            return {**asks, **later, **added}
        for source, block in asks.items():
            add(added, source, block)
        return added

    def _taken(self, run: Run, state: AttentionState, source: Source) -> bool:
        """Whether the stream that answers ever reads the stream of `source`."""
        reading = [u for u in run.seen.wiring.updates if u.stream == state.key_state.stream]
        return is_cross_attention(state) and any(u.key_state.stream == source.name for u in reading)

    def _across(
        self, run: Run, state: AttentionState, own: Tensor | None, answer: Answer
    ) -> Tensor:
        if not run.options["self_in_rule_10"]:
            return answer.read
        start = initial_block(state.query_state, run.like), initial_block(answer.state, run.like)
        other = next((b for x, b in answer.rows.items() if x.name == answer.stream), None)
        if own is None or other is None or start[0] is None or start[1] is None:
            without = state.stream if own is None or start[0] is None else answer.stream
            raise WiringError(
                f"{state.call.module!r} asks from {state.stream!r} across to {answer.stream!r}: "
                f"Eq. 10 needs the relevance of {without!r} for tokens of its own, and it has none "
                "(it is joined from other streams); set self_in_rule_10=False, or confine the "
                "method with `layers=`"
            )
        if run.options["normalize"]:
            own, other = normalized(own, start[0]), normalized(other, start[1])
        return across(squared(own, start[0]), answer.read, other)

    def relevance(self, run: Run) -> dict[Source, Tensor]:
        discard = run.options["discard_self"]
        one_row = all(bool(((w != 0).sum(1) == 1).all()) for w in run.weights.values())
        if all(map(is_self_attention, run.updates())) and (one_row or not discard):
            relevance = super().relevance(run)  # linear in the rows of R
            for state, weights in run.weights.items() if discard else ():
                for source, rows in relevance.items():
                    if source.name == state.stream:
                        relevance[source] = rows * (weights == 0)
            return relevance
        return self.relevance_of_maps(run, discard)
