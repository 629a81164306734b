"""Grad-ECLIP: Zhao, Wang, Zeng, Zhao & Chan, "Gradient-based Visual Explanation for
Transformer-based CLIP", ICML 2024; extended in arXiv 2502.18816."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn._checks import shown
from captum_attn.attr._attended import attended_gradient, ratio
from captum_attn.attr._base import (
    AttentionAttribution,
    Block,
    BlockRow,
    LinearRule,
    Relevance,
    Result,
    Run,
)
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._layers import calls_of_layer
from captum_attn.attr._propagate import (
    Step,
    add,
    initial_block,
    linear,
    relevance_matrices,
    relevance_rows,
)
from captum_attn.errors import OptionError, WiringError
from captum_attn.observe import AttentionCall
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.streams.states import AttentionState, Source, State
from captum_attn.observe.tracing.token_index import occupied


def min_max(values: Tensor, counted: Tensor) -> Tensor:
    """Each row from 0 to 1 over its entries that count, 0 at the others and in constant rows."""
    least = values.masked_fill(~counted, torch.inf).amin(-1, keepdim=True)
    most = values.masked_fill(~counted, -torch.inf).amax(-1, keepdim=True)
    return ratio(values - least, most - least).masked_fill(~counted, 0)


class GradEclip(AttentionAttribution):
    r"""Grad-ECLIP, Zhao et al., ICML 2024: λ_j Σ_h ∇A_h[r,j] of the row r that is read.

    With o the output of an attention call before its projection and g = ∂y/∂o[r]: the paper's
    h_j = λ_j Σ_d g_d V[j,d] is, by the product rule, λ_j Σ_h ∇A_h[r,j]. λ_j is cos(q_r, k_j), all
    heads side by side, brought to [0, 1] over the keys that the row can attend; tokens that no
    input enters ([CLS] of an image) are left out and get 0. An image gets Σ_l (h^l)^+, token ids
    get (Σ_l h^l)^+. Where several rows are read, each is clamped on its own.

    The method is meant for the two towers of CLIP, which never meet in attention, with their
    similarity as the output (logits_per_image: a constant times the cosine); a classifier whose
    tokens attend to each other alone is one such tower. The authors' code recomputes the explained
    layers with a single head; here the model is explained as it is. The authors explain the last
    layer of the image, and 8 of the 12 of the text.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        layers_explained (int): how many of the last layers are summed. Default: 1.
        similarity (bool): False: λ = 1. Default: True.

    Raises:
        WiringError: where an attention call reads another stream.

    Examples::

        >>> GradEclip(clip).attribute(dict(processor(text, image, ...)), target=0)["pixel_values"]
    """

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        layers_explained: int = 1
        similarity: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.layers_explained < 1:
                got = shown(self.layers_explained)
                raise OptionError(f"layers_explained: expected an int >= 1, got {got}")

    @classmethod
    def get_name(cls) -> str:
        return "Grad-ECLIP"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        attention = block.attention()
        gradient = attended_gradient(run, block, attention)
        if not run.options.similarity:
            return gradient
        counted = (attention != 0).any(2)  # (B, F, q', k')
        entered = run.once(("entered", block.call), lambda: _entered(run, block.call))
        if entered is not None:
            counted &= entered[:, :, None, : block.n_k]
        q, k = (x.transpose(2, 3).flatten(3) for x in (block.queries(), block.keys()))
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return gradient * min_max(cosine, counted)[:, :, None]

    def fuse_heads(self, heads: Tensor) -> Tensor:
        return heads.sum(2)

    def relevance(self, run: Run[Options]) -> Relevance:
        if not run.reads_one_row:
            return self._read_out(run, run.weights, False)
        found: Relevance = {}
        for state, weights in run.weights.items():
            row, size = {state: (weights != 0).to(weights)}, run.queries_per_block
            layers = (
                relevance_rows(row, partial(self._one_layer, run, last), size)
                for last in self._explained(run, state)
            )
            for source, total in _summed(layers).items():
                add(found, source, total * weights.sum(1, keepdim=True))
        return found

    def matrices(self, run: Run[Options], last: Iterable[State]) -> dict[State, BlockRow]:
        def of(state: State, call: AttentionState) -> BlockRow:
            def update(step: Step) -> BlockRow:
                rule = run.full_rule(step.state.call, partial(self._one_layer, run, call))
                return run.mask_later_rows(step.state, linear(step, rule), step.before)

            return relevance_matrices([state], update, run.like)[state]

        return {s: _summed(of(s, call) for call in self._explained(run, s)) for s in last}

    def explain(self, run: Run[Options]) -> Result:
        return Result(run, self.relevance(run), shows_calls=True)

    def _explained(self, run: Run[Options], state: State) -> list[AttentionState]:
        """The last calls within a stream."""
        calls_of_layer(run, state, -1, modules_of(self.forward_func))  # refuses where none is left
        calls = [made for made in run.calls_into([state]) if made.stream == state.stream]
        if not run.is_within_streams:
            raise WiringError(
                f"{self.get_name()} is meant for the two towers of CLIP, or one such tower: "
                "expected attention calls within a stream only, got some that read another one; "
                "use GenericAttention or AttentionGradCam"
            )
        return calls[-run.options.layers_explained :]

    def _one_layer(self, run: Run[Options], shown: AttentionState, block: Block) -> LinearRule:
        """One call's row; below and above it, every token stays where it is."""
        if block.call is not shown.call:
            return UNCHANGED
        return LinearRule(0.0, self.fuse_heads(self.weigh_heads(run, block)))


def _summed(layers: Iterable[dict[Source, Tensor]]) -> dict[Source, Tensor]:
    """The layers' rows together: of ids clamped after the sum, else each layer's before."""
    total: dict[Source, Tensor] = {}
    for layer in layers:
        for source, rows in layer.items():
            add(total, source, rows if _of_ids(source) else rows.clamp_min(0))
    return {source: rows.clamp_min(0) for source, rows in total.items()}


def _of_ids(source: Source) -> bool:
    return any(entry.leaf.ids is not None for entry in source.entries)


def _entered(run: Run, call: AttentionCall) -> Tensor | None:
    """Which keys hold something of an input, (B, F, k); None: all."""
    keys = run.state_after(call).key_state
    source = next((s for s in run.observation.wiring.sources if s.name == keys.stream), None)
    if source is None or not source.entries or any(e.to is None for e in source.entries):
        return None
    tokens = torch.zeros(run.batch, source.n, dtype=torch.bool, device=run.like.device)
    for entry in source.entries:
        assert entry.to is not None
        tokens |= occupied(entry.to.to(tokens.device), source.n)
    block = initial_block(keys, run.like)
    if block is None:
        return None
    held = (block @ tokens[..., None].to(block))[..., 0] != 0
    return held.view(run.batch, call.windows, call.n_k).to(call.q.device)
