"""GenericAttention: Chefer, Gur & Wolf, "Generic Attention-model Explainability for Interpreting
Bi-Modal and Encoder-Decoder Transformers", ICCV 2021 (GAE)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_attn.attr._base import AttentionAttribution, Block, BlockRow, Flow, Run, Step


def positive_heads(attention: Tensor, gradient: Tensor) -> Tensor:
    """(∇A ⊙ A)^+, whose mean over heads is Eq. 5; any shape. Written into `gradient`."""
    return gradient.mul_(attention).clamp_min_(0)


def across(own: Tensor, read: Tensor, other: Tensor) -> Tensor:
    """Eq. 10: R̄[s,s]^T · Ā · R̄[q,q], both R̄ from before the call; (..., n_s, n_q).

    R̄[s,s] has the tokens of the stream in their present order along both axes.
    """
    return own.mT @ (read.to(other.dtype) @ other)


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
        relevance (str): "lrp" has the map's relevance R_A in place of A in Eq. 5 (the paper's
            appendix E), see `TransformerAttribution`. Default: "attention".

    Examples::

        >>> gae = GenericAttention(model)
        >>> attributions = gae.attribute(images, target=3)   # (B, 3, H, W)
        >>> heat = attributions.sum(1)                       # (B, H, W)
        >>> gae.relevance_maps(images, target=3)             # {("x", "x"): (B, n, n)}
    """

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        normalize: bool = True
        self_in_rule_10: bool = True
        aggregate: bool = True
        discard_self: bool = False
        relevance: AttentionAttribution.MapKind = "attention"

    @classmethod
    def get_name(cls) -> str:
        return "Generic Attention (GAE)"

    @classmethod
    def rules(cls, options: Options) -> str | None:
        return "transformer_lrp" if options.relevance == "lrp" else None

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        by_lrp = run.options.relevance == "lrp"
        attention = run.attention_relevance(block) if by_lrp else block.attention()
        return positive_heads(attention, run.attention_gradient(block))

    def keep(self, run: Run[Options], block: Block) -> float:
        return float(run.options.aggregate)

    def flow(self, run: Run[Options], flow: Flow) -> Tensor:
        if not flow.is_across:
            return flow.read @ flow.rows  # Eq. 6, 7, 11
        if not run.options.self_in_rule_10:
            return flow.read
        own, other = flow.self_relevance("Eq. 10", "set self_in_rule_10=False")
        if run.options.normalize:
            own, other = own.normalized(), other.normalized()  # Eq. 8, 9
        return across(own.squared(), flow.read, other.rows)  # Eq. 10

    def update(self, run: Run[Options], step: Step) -> BlockRow:
        rows = super().update(run, step)
        if not run.options.aggregate:  # replaced is only what the call could have brought
            rows |= run.out_of_reach(step)
        return rows

    def is_linear(self, run: Run[Options]) -> bool:
        return run.is_within_streams

    def discards_self(self, run: Run[Options]) -> bool:
        return run.options.discard_self
