"""Grad-CAM on attention maps: Selvaraju et al., "Grad-CAM", ICCV 2017, as Chefer, Gur & Wolf, CVPR
2021 and ICCV 2021, use it as a baseline: heads take the place of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_attn.attr._attended import attended_gradient, of_block, ratio, real_queries
from captum_attn.attr._base import AttentionAttribution, Block, Result, Run
from captum_attn.attr._layers import calls_of_layer
from captum_attn.observe import AttentionCall
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.streams.states import AttentionState, State


class AttentionGradCam(AttentionAttribution):
    r"""Grad-CAM of the last attention map that the output reads: (E_h[w_h A_h])^+.

    w_h is the mean of ∇A_h over the entries that can be attended, of real queries; the clamp comes
    after the mean over heads, and nothing is normalised. The other streams get the last
    cross-attention map to each of them, each on its own.

    The authors differ among themselves in what the mean runs over: the whole map (BERT, VisualBERT,
    LXMERT, DETR), or the row that is read without the token's own column (ViT, CLIP). With a single
    readout row, the two differ by that column and a constant factor.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        weights (str): "map", w_h is the mean over the whole map; "row": over each row alone, its
            own column left out in attention of tokens to themselves. Default: "map".

    Examples::

        >>> AttentionGradCam(model).attribute(images, target=3).sum(1)   # (B, H, W)
    """

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        weights: Literal["map", "row"] = "map"

    @classmethod
    def get_name(cls) -> str:
        return "Attention Grad-CAM"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        attention = block.attention()
        if run.options.weights == "row":
            return _row_means(run, block, attention).mul(attention)
        call = block.call
        return run.once(("mean gradient", call), lambda: _map_means(run, call)) * attention

    def fuse_heads(self, heads: Tensor) -> Tensor:
        return heads.mean(2).clamp_min_(0)

    def shown_calls(self, run: Run[Options], state: State) -> list[AttentionState]:
        return calls_of_layer(run, state, -1, modules_of(self.forward_func))

    def explain(self, run: Run[Options]) -> Result:
        return Result(run, self.relevance(run), shows_calls=True)


def _row_means(run: Run, block: Block, attention: Tensor) -> Tensor:
    """The mean of ∇A_h over each row, (B, F, H, q', 1)."""
    counted = attention != 0
    state = run.state_after(block.call)
    if state.key_state is state.query_state:
        rows = torch.arange(block.call.n_q, device=counted.device)
        rows = rows if block.rows is None else block.rows
        counted &= torch.arange(block.n_k, device=counted.device) != rows[:, None]
    gradient = run.attention_gradient(block) * counted
    return ratio(gradient.sum(-1, keepdim=True), counted.sum(-1, keepdim=True))


def _map_means(run: Run, call: AttentionCall) -> Tensor:
    """The mean of ∇A_h over the whole map, (B, 1, H, 1, 1)."""
    total, count = run.like.new_zeros(2, run.batch, 1, call.heads, 1, 1)
    real = real_queries(run, call)
    for block in run.blocks(call):
        attention = block.attention()
        counted = attention != 0
        if real is not None:
            counted = counted & of_block(real, block)[:, :, None, :, None]
        gradient = attended_gradient(run, block, attention) * counted
        total = total + gradient.sum((1, 3, 4), keepdim=True).to(total)
        count = count + counted.sum((1, 3, 4), keepdim=True).to(count)
    return ratio(total, count).to(call.q.device)
