"""HeterogenousAttention: Cui, Fan & Chen, "Generic Interpretation Approach for Transformer Models
Incorporating Heterogenous Attention Structures", arXiv 2605.27458."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from captum_attn.attr._base import AttentionAttribution, Block, BlockRow, LinearRule, Run
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._propagate import is_cross_attention, read_parts, self_relevance
from captum_attn.errors import OptionError
from captum_attn.observe.streams.states import State

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

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        correction: Literal["positive", "full", "absolute"] = "positive"
        noise_link: bool = False
        part: Literal["all", "homogenous"] = "all"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.noise_link and self.correction == "full":
                raise OptionError(
                    "noise_link: expected False with correction='full', whose relevance has both "
                    "signs so that a row may sum to 0; use correction='positive' or 'absolute'"
                )

    @classmethod
    def get_name(cls) -> str:
        return "Heterogenous Attention"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        correct = CORRECTIONS[run.options.correction]
        return correct(run.attention_gradient(block)).mul_(block.attention())

    def rule(self, run: Run[Options], block: Block) -> LinearRule:
        alone = run.options.part == "homogenous"
        if alone and is_cross_attention(run.state_after(block.call)):
            return UNCHANGED
        return super().rule(run, block)

    def weights(self, run: Run[Options]) -> Mapping[State, Tensor]:
        if run.options.part == "all":
            return run.weights
        read = {state.stream for state in run.weights}
        others = {
            state: run.like.new_ones(run.batch, state.n)
            for stream, state in run.final_states().items()
            if stream not in read
        }
        return {**run.weights, **others}

    def is_linear(self, run: Run[Options]) -> bool:
        return not run.options.noise_link

    def finish(self, run: Run[Options]) -> Callable[[State, BlockRow], BlockRow] | None:
        if not run.options.noise_link:
            return None
        first: dict[str, State] = {}  # the version of every stream that another one reads first
        for state in run.attention_states:
            for part in read_parts(state):
                if part.state.stream != state.stream:
                    first.setdefault(part.state.stream, part.state)

        def link(state: State, rows: BlockRow) -> BlockRow:
            own = self_relevance(state, rows) if first.get(state.stream) is state else None
            if own is None:
                return rows
            linked = own.normalized().rows  # Eq. 8-10
            return {x: linked if x.name == state.stream else b for x, b in rows.items()}

        return link
