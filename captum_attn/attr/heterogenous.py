"""HeterogenousAttention: Cui, Fan & Chen, "Generic Interpretation Approach for Transformer Models
Incorporating Heterogenous Attention Structures", arXiv 2605.27458."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_attn.attr._base import AttentionAttribution
from captum_attn.attr._blocks import Weighed
from captum_attn.attr._propagate import BlockRow, initial_block, is_cross_attention, read_parts
from captum_attn.attr._rules import normalized
from captum_attn.attr._run import Run
from captum_attn.errors import OptionError
from captum_attn.observe.capture.attention_call import Block
from captum_attn.observe.streams.states import AttentionState, Source, State

CORRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda gradient: gradient.clamp_min(0),  # Eq. 1
    "full": lambda gradient: gradient,  # Eq. 2
    "absolute": lambda gradient: gradient.abs(),  # Eq. 3
}


class HeterogenousAttention(AttentionAttribution):
    r"""The heterogenous-attention rule, Cui, Fan & Chen, arXiv 2605.27458.

    Every attention call, within a stream or across two, and every information source x on its own:
    R[s,x] = R_q[s,x] + Ā R_v[·,x] (Eq. 4-7), R_q the version that asks and R_v the one that
    answers. Eq. 6 and 7 print Ã = I + Ā, which is not defined for a rectangular Ā; the residual is
    the first term, and within a stream the two are the same.

    With `correction="positive"` this is GAE without normalisation and with Eq. 10 there replaced by
    R[s,q] += Ā R[q,q] (where A >= 0).

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        correction (str): Ā is the mean over heads of ∇A^+ ⊙ A ("positive", Eq. 1), of ∇A ⊙ A
            ("full", Eq. 2: signed) or of \|∇A\| ⊙ A ("absolute", Eq. 3). Default: "positive".
        noise_link (bool): normalises R − I row by row (Eq. 8-10) in the version of a stream that
            another stream reads first, for all its readers and its own later updates. Not with
            `correction="full"`, whose rows may sum to 0. Default: False.
        part (str): "homogenous" leaves out the calls across streams: the stream that is read out
            gets its row, every other stream the total that each of its tokens receives (column
            sums). Default: "all".

    Examples::

        >>> method = HeterogenousAttention(model)
        >>> method.attribute(inputs, target=3)["pixel_values"].sum(1)        # (B, H, W)
        >>> why = objectives.logit_difference(3, 5)                          # rather 3 than 5
        >>> method.attribute(inputs, objective=why, correction="full")       # signed
    """

    options = {"correction": "positive", "noise_link": False, "part": "all"}
    choices = {"correction": tuple(CORRECTIONS), "part": ("all", "homogenous")}

    @classmethod
    def get_name(cls) -> str:
        return "Heterogenous Attention"

    @classmethod
    def settled(cls, options: dict[str, Any]) -> dict[str, Any]:
        settled = super().settled(options)
        if settled["noise_link"] and settled["correction"] == "full":
            raise OptionError(
                "noise_link: expected False with correction='full', whose relevance has both signs "
                "so that a row may sum to 0; use correction='positive' or 'absolute'"
            )
        return settled

    def weigh_heads(self, run: Run, block: Block) -> Tensor:
        attention = block.attention()  # (B, F, H, q, k)
        gradient = run.attention_gradient(block)
        if gradient is None:
            return torch.zeros_like(attention)
        return CORRECTIONS[run.options["correction"]](gradient).mul_(attention)

    def weigh(self, run: Run, update: AttentionState, block: Block) -> Weighed | None:
        alone = run.options["part"] == "homogenous"
        if run.gradients[update.call] is None or (alone and is_cross_attention(update)):
            return None
        return 1.0, self.weigh_heads(run, block).mean(2)

    def relevance(self, run: Run) -> dict[Source, Tensor]:
        if run.options["part"] == "homogenous":
            others = {
                state: run.like.new_ones(run.seen.batch, state.n)
                for stream, state in run.seen.wiring.final_states().items()
                if all(stream != read.stream for read in run.weights)
            }
            run.weights.update(others)
        if not run.options["noise_link"]:
            return super().relevance(run)
        return self.relevance_of_maps(run)

    def finish(self, run: Run) -> Callable[[State, BlockRow], BlockRow] | None:
        if not run.options["noise_link"]:
            return None
        first: dict[str, State] = {}  # the version of every stream that another one reads first
        for update in run.seen.wiring.updates:
            for part in read_parts(update):
                if part.state.stream != update.stream:
                    first.setdefault(part.state.stream, part.state)

        def link(state: State, rows: BlockRow) -> BlockRow:
            if first.get(state.stream) is not state:
                return rows
            start = initial_block(state, run.like)
            return {
                x: normalized(b, start) if x.name == state.stream else b for x, b in rows.items()
            }

        return link
