"""TAM, Transition Attention Maps: Yuan, Li, Xiong, Cao & Dou, "Explaining Information Flow Inside
Vision Transformers Using Markov Chain", NeurIPS 2021 workshop XAI4Debugging."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_attn.attr._base import Block, LinearRule, Run
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._feedback import FeedbackMethod
from captum_attn.observe.streams.states import AttentionState, ancestry


class TransitionAttention(FeedbackMethod):
    r"""Transition Attention Maps (TAM), Yuan et al., NeurIPS 2021 workshop XAI4Debugging.

    With Â = E_h A: s = Â_L[r, :] for the row r that is read, without an identity; then, from the
    layer below the last one down to `start_layer`, s ← s Â_l + s. The relevance is s ⊙ W[r, :] with
    W = E_h[(1/K Σ_k ∂y/∂A_L(x_k))^+], x_k the input scaled from the baseline (α from 0 to 1, both
    ends). Where several rows are read, each is weighed on its own.

    Floats are scaled themselves; of a model of token ids, the tokens that enter the first block.
    The authors evaluate ViT-B with start_layer=4 and 20 steps.

    An extension to models of several streams: the last call within the stream that is read, and
    its last one to every other stream, begin a chain each, with a feedback each; below them R[s,x]
    is R[s,x] + Â R[v,x], for the stream s that asks and v that answers.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        n_steps (int): K, runs of the model in all; 1: the gradient at the input. Default: 20.
        baselines (float, Tensor, tuple or Mapping, optional): where the path begins, as in
            Captum's IntegratedGradients; of token ids a number, tokens (B, n, D), or ids of the
            inputs' shapes (a (B, n) tensor, or one for each input). Default: 0.
        show_progress (bool): a progress bar over the runs. Default: False.
        normalize (bool): True has (Â_l + I) / 2, a common factor of all tokens. Default: False.

    Examples::

        >>> TransitionAttention(model).attribute(images, target=3, start_layer=4).sum(1)
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(FeedbackMethod.Options):
        normalize: bool = False

    @classmethod
    def get_name(cls) -> str:
        return "Transition Attention (TAM)"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        return block.attention()

    def perception(self, run: Run[Options], last: AttentionState, block: Block) -> LinearRule:
        read = self.fuse_heads(self.weigh_heads(run, block))
        if block.call is last.call:
            return LinearRule(0.0, read)
        if block.call not in run.once(("below", last), lambda: _calls_below(last)):
            return UNCHANGED
        return LinearRule(0.5, read / 2) if run.options.normalize else LinearRule(1.0, read)


def _calls_below(last: AttentionState) -> set:
    """The calls that go into one."""
    return {state.call for state in ancestry([last]) if isinstance(state, AttentionState)}
