"""BI, Beyond Intuition: Chen, Li, Yu, Dou & Xiong, "Beyond Intuition: Rethinking Token Attributions
inside Transformers", TMLR 2023."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from captum_attn.attr._attended import attended_gradient, of_block, ratio, real_queries
from captum_attn.attr._base import Block, LinearRule, Run
from captum_attn.attr._feedback import FeedbackMethod
from captum_attn.observe import AttentionCall
from captum_attn.observe.streams.states import AttentionState
from captum_attn.observe.vectors.recording_tap import RecordingTap
from captum_attn.observe.vectors.vector_changes import VectorChanges


class BeyondIntuition(FeedbackMethod):
    r"""Beyond Intuition (BI), Chen et al., TMLR 2023: Σ_r ω_r (R ⊙ W)[r, :].

    - Perception, how the tokens form what is read: R_0 = I, R ← R + P_l R. BI-H ("head"):
      P_l = Σ_h c_h A_h with c_h = I_h / Σ I, I_h the mean of |A_h^T ∇A_h| over its entries. BI-T
      ("token"): P_l = E_h[A_l] diag(ρ_l), ρ_l[j] = ‖V_l[j] W_O‖ / ‖E_l[j]‖, with V_l all heads side
      by side, W_O the output projection and whatever linear scale follows, and E_l the vectors on
      the skip connection.
    - Feedback, how what is read moves the output: W = E_h[(1/K Σ_k ∂y/∂A_L(x_k))^+], x_k the input
      scaled from the baseline (α from 0 to 1, both ends).

    Floats are scaled themselves; of a model of token ids, the tokens that enter the first block.
    I_h is that of each example, and gradients count where a key is attended, so that neither the
    batch nor padding changes anything. Where all gradients are zero, so are all c_h.

    The authors start at layer 3 (BI-H) and 5 (BI-T) of ViT-B, counted from 0.

    An extension to models of several streams: R[s,x] = R[s,x] + P R[v,x] for the stream s that asks
    and v that answers; the last call within the stream that is read, and its last one to every
    other stream, have a feedback each.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        perception (str): "head", BI-H, or "token", BI-T. Default: "head".
        n_steps (int): K, runs of the model in all; 1: the gradient at the input. Default: 20.
        baselines (float, Tensor, tuple or Mapping, optional): where the path begins, as in
            Captum's IntegratedGradients; of token ids a number, tokens (B, n, D), or ids of the
            inputs' shapes (a (B, n) tensor, or one for each input). Default: 0.
        show_progress (bool): a progress bar over the runs. Default: False.

    Examples::

        >>> BeyondIntuition(model).attribute(images, target=3, perception="token").sum(1)
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(FeedbackMethod.Options):
        perception: Literal["head", "token"] = "head"

    keeps_graph = True
    tap = RecordingTap

    @classmethod
    def get_name(cls) -> str:
        return "Beyond Intuition (BI)"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        call, attention = block.call, block.attention()
        if run.options.perception == "token":
            lengths = run.once(("lengths", call), lambda: _length_ratios(run, call))
            return attention * lengths[:, :, None, None, : block.n_k]
        shares = run.once(("head shares", call), lambda: _head_shares(run, call))
        return attention * (call.heads * shares)  # the mean over heads is their weighted sum

    def perception(self, run: Run[Options], last: AttentionState, block: Block) -> LinearRule:
        return LinearRule(1.0, self.fuse_heads(self.weigh_heads(run, block)))


def _head_shares(run: Run, call: AttentionCall) -> Tensor:
    """c_h, (B, 1, H, 1, 1)."""
    total = run.like.new_zeros(run.batch, call.windows, call.heads, call.n_k, call.n_k)
    total = total.to(call.q.device)
    real = real_queries(run, call)
    for block in run.blocks(call):
        attention, n = block.attention(), block.n_k
        gradient = attended_gradient(run, block, attention)
        if real is not None:
            gradient = gradient * of_block(real, block)[:, :, None, :, None]
        total[..., :n, :n] += attention.mT @ gradient
    importance = total.abs().sum((1, 3, 4), keepdim=True)
    return ratio(importance, importance.sum(2, keepdim=True))


def _length_ratios(run: Run, call: AttentionCall) -> Tensor:
    """ρ, (B, F, k)."""
    changes: VectorChanges = run.once("vector changes", lambda: VectorChanges(run.observation))
    before, after = changes.of_all_heads(run.state_after(call))
    return ratio(after, before).unflatten(1, (call.windows, call.n_k))
