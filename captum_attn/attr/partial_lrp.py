"""Partial LRP: Voita et al., "Analyzing Multi-Head Self-Attention", ACL 2019, as Chefer, Gur &
Wolf, CVPR 2021, use it as a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from captum_attn.attr._base import AttentionAttribution, Block, Run
from captum_attn.attr._layers import calls_of_layer
from captum_attn.attr._relevance_rules import transformer_lrp
from captum_attn.attr._rule_sets import overlaid
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.operators.bridge import Rules
from captum_attn.observe.streams.states import AttentionState, State


class PartialLRP(AttentionAttribution):
    r"""Partial LRP: E_h(R_A^+), the relevance of the last attention map that the output reads.

    R_A is what the relevance pass of `TransformerLRP` gives the map: R_A = ½ A ∘ (sd(R_O, A V) V^T)
    with R_O the relevance that arrives at the call's output.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        layer (int, str or Module): another call: its place among the stream's calls (-1: the
            last), or the module or pattern of module names that it runs in. Default: -1.
        renorm, joint (bool): see `TransformerLRP`; both False: the authors' "partial LRP" baseline.
            Default: True.
        rules (Mapping or str, optional): other rules for some kinds of operations in the relevance
            pass, see `captum_attn.attr.rules`. Default: None.

    Examples::

        >>> PartialLRP(model).attribute(images, target=3).sum(1)    # (B, H, W)
    """

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        layer: int | str | nn.Module = -1
        renorm: bool = True
        joint: bool = True
        rules: Mapping | str | None = None

    @classmethod
    def get_name(cls) -> str:
        return "Partial LRP"

    @classmethod
    def rules(cls, options: Options) -> Rules:
        table = transformer_lrp(options.renorm, options.joint)
        return overlaid(table, options.rules, "relevance")

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        return run.attention_relevance(block).clamp_min_(0)

    def shown_calls(self, run: Run[Options], state: State) -> list[AttentionState]:
        return calls_of_layer(run, state, run.options.layer, modules_of(self.forward_func))
