"""Transformer Attribution: Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention
Visualization", CVPR 2021."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from captum_attn.attr._base import AttentionAttribution, Block, LinearRule, Run
from captum_attn.attr._relevance_rules import transformer_lrp
from captum_attn.attr._rule_sets import overlaid
from captum_attn.observe.operators.bridge import Rules


def weighed(gradient: Tensor, relevance: Tensor) -> Tensor:
    """(∇A ∘ R_A)^+, whose mean over heads is Ā; any shape. Written into `gradient`."""
    return gradient.mul_(relevance).clamp_min_(0)


class TransformerAttribution(AttentionAttribution):
    r"""Transformer Attribution, Chefer, Gur & Wolf, CVPR 2021.

    For every attention call R ← (I + Ā) R with Ā = E_h((∇A ∘ R_A)^+): ∇A the gradient of the
    explained logit, R_A the map's relevance, R_A = ½ A ∘ (sd(R_O, A V) V^T) with R_O what the
    relevance pass of `TransformerLRP` brings to the call's output. The clamp comes before the mean
    over heads, as in the authors' code. Calls that read another stream update R[s,x] += Ā R[q,x].

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        normalize (bool): True divides each row of I + Ā by its sum, as the authors' code for BERT
            does and that for ViT does not. Default: False.
        renorm, joint (bool): see `TransformerLRP`. Default: True.
        rules (Mapping or str, optional): other rules for some kinds of operations in the relevance
            pass, see `captum_attn.attr.rules`. Default: None.

    Examples::

        >>> heat = TransformerAttribution(model).attribute(images, target=3).sum(1)   # (B, H, W)
    """

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        normalize: bool = False
        renorm: bool = True
        joint: bool = True
        rules: Mapping | str | None = None

    @classmethod
    def get_name(cls) -> str:
        return "Transformer Attribution"

    @classmethod
    def rules(cls, options: Options) -> Rules:
        table = transformer_lrp(options.renorm, options.joint)
        return overlaid(table, options.rules, "relevance")

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        return weighed(run.attention_gradient(block), run.attention_relevance(block))

    def rule(self, run: Run[Options], block: Block) -> LinearRule:
        rule = super().rule(run, block)
        if not run.options.normalize or rule.read is None:
            return rule
        share = 1 / (1 + rule.read.sum(-1))  # (B, F, q)
        return LinearRule(share, rule.read * share[..., None])
