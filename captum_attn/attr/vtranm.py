"""VTranM: "Vision Transformer explainability with vector transformations measurement", submitted to
ICLR 2024; published as TokenTM, CVPR 2024."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_attn import objectives
from captum_attn.attr._base import AttentionAttribution, Block, Run
from captum_attn.attr._propagate import RowScale
from captum_attn.objectives import Objective
from captum_attn.observe.streams.states import (
    AttentionState,
    InitialState,
    MixedState,
    ParallelState,
    State,
)
from captum_attn.observe.vectors.recording_tap import RecordingTap
from captum_attn.observe.vectors.vector_changes import VectorChange, VectorChanges

_NO_SKIP = (
    "VTranM: what {!r} pools is added to no skip connection, so there is nothing to measure the "
    "change of vectors by: its w (Eq. 12, 13) is taken to be 1"
)


def length_ratio(before: Tensor, after: Tensor) -> Tensor:
    """‖Ẽ‖ / ‖E‖ (Eq. 12); 0 for a token of length 0."""
    return torch.where(before == 0, 0, after / torch.where(before == 0, 1, before))


def necc(cosine: Tensor, real: Tensor | None = None) -> Tensor:
    """NECC, the softmax of cos(E_j, Ẽ_j) over the tokens j of one example (Eq. 13); (..., n)."""
    if real is not None:
        cosine = cosine.masked_fill(~real, -torch.inf)
    return cosine.softmax(-1).nan_to_num(0.0)  # an example of padding alone


def target_probability(output: Tensor, target: Any = None) -> Tensor:
    """The target's softmax probability; of a single output, whose softmax is 1, the output."""
    single = output.ndim < 2 or output.shape[-1] == 1
    return (
        objectives.logit(output.double(), target)
        if single
        else objectives.probability(output, target)
    )


class VTranM(AttentionAttribution):
    r"""Vector transformation measurement, ICLR 2024 submission (TokenTM, CVPR 2024).

    Tokens are followed not by attention alone: each sub-layer's transformation counts by how much
    it changes their vectors. With E the vectors on the skip connection, Ẽ_h the values of head h
    through their slice of the output projection (and any linear scale before the residual), or the
    whole output of a feed-forward branch:

    - w_h[j] = ‖Ẽ_h,j‖ / ‖E_j‖ · softmax_j(cos(E_j, Ẽ_h,j)) (Eq. 12, 13), the softmax (NECC) over
      the tokens of one example, padding left out;
    - attention: U = I + E_h[∇A_h^+ ⊙ (A_h diag(w_h))] (Eq. 14); feed-forward: U = I + diag(w)
      (Eq. 16); branches that are added in one step act in one step, U = I + the sum of both;
    - C ← U C (Eq. 19), from C⁰ = diag(‖E⁰_i‖), the tokens that enter the first block.

    ∇A is the gradient of the target's softmax probability, or of any other `objective`; of an
    output of a single scalar, whose softmax is 1, it is that of the scalar itself.

    All of this is observed as the model runs: pre-norm and post-norm blocks, fused or separate
    projections, grouped queries, LayerScale, parallel branches, gated and mixture-of-experts
    feed-forwards. What the paper leaves open is taken as follows:

    - A gate on the attention's output, in front of the projection or behind it, and the scale of a
      norm between the projection and the addition, are held at what they were for the query i:
      Ẽ_h,j, and with it w_h, is that of its map, U = I + E_h[∇A_h^+ ⊙ A_h ⊙ w_h] with w_h (q, k).
    - A skip connection that is projected (where the width or the grid changes): E are the projected
      vectors.
    - No skip connection: U without I, E the vectors that the values are projected from. Learned
      queries that pool the tokens, and are added to nothing: w is 1, with a warning. A feed-forward
      without one: U = I, so between the projection and the addition.
    - Vectors of another width than what they become have no angle to it: NECC is 1/n, with a
      warning. Keys that are pooled of several tokens: E_j is their mean.
    - Tokens that are rows of no tensor around the attention (channels that attend to each other,
      keys that a convolution made behind their projection) have no vectors: lengths count as kept
      and NECC is 1/n, w = 1/n, with a warning.
    - A feed-forward of which it cannot be told which of the followed tokens it acts on: U = I, with
      a warning.

    A block in which the skip connection or the linear map was not found is a `WiringError` that
    names it. Calls that are left out by `layers` and `start_layer` have U = I,
    their feed-forward sub-layers too.

    An extension to models of several streams, which the paper does not treat: a call across uses
    the same U inside the heterogenous rule, R[s,x] = R_q[s,x] + (U − I) R_v[·,x], its E_j the
    vectors of the answering tokens that the values are projected from.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions, the ablations of the paper's Table 4:
        length (bool): False: C⁰ = I and no ratio of lengths. Default: True.
        direction (bool): False: no NECC. Default: True.
        aggregate (bool): False: E_h[∇A_h^+ ⊙ (A_h diag(w_h))] (Eq. 8) of the last attention call
            that counts alone, as it is. Default: True.

    Examples::

        >>> attributions = VTranM(model).attribute(images, target=3)   # (B, 3, H, W)
        >>> VTranM(model).attribute(images, target=3, direction=False)
    """

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        length: bool = True
        direction: bool = True
        aggregate: bool = True

    keeps_graph = True
    tap = RecordingTap

    @classmethod
    def get_name(cls) -> str:
        return "VTranM"

    def default_objective(self) -> Objective:
        return target_probability

    def change_weights(self, run: Run[Options], change: VectorChange) -> Tensor:
        """w of Eq. 12 and 13, (B, H, n)."""
        weights = torch.ones_like(change.after)
        if change.why and (run.options.direction or not change.measured):
            _warn_of_directions(run, change)
        if run.options.length:
            weights = length_ratio(change.before, change.after)
        if run.options.direction:
            lengths = change.before * change.after
            dot = torch.zeros_like(lengths) if change.dot is None else change.dot
            weights = weights * necc(length_ratio(lengths, dot), change.real)
        return weights

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        weighted = run.attention_gradient(block).clamp_min_(0).mul_(block.attention())
        if run.options.length or run.options.direction:
            change = _vector_changes(run).attention(run.state_after(block.call), block.rows)
            if change is None:
                warnings.warn(_NO_SKIP.format(block.call.module), stacklevel=2)
                return weighted
            weights = self.change_weights(run, change)  # (B, H, F k) or, of each query, + (F q', )
            weighted = weighted.mul_(_by_window(weights, block.call.windows)[..., : block.n_k])
        return weighted

    def keep(self, run: Run[Options], block: Block) -> Tensor | float:
        changes, state = _vector_changes(run), run.state_after(block.call)
        keep: Tensor | float = float(changes.keeps(state))
        for change in changes.beside(state):
            weights = self.change_weights(run, change)[:, 0]
            weights = weights.unflatten(-1, (block.call.windows, -1))
            keep = keep + (weights if block.rows is None else weights[..., block.rows])
        return keep

    def row_scale(self, run: Run[Options]) -> RowScale:
        """The feed-forward sub-layers (Eq. 16), and C⁰."""

        def scale(state: State) -> Tensor | None:
            found: Tensor | None = None
            if self._counts(run, state):
                for change in _vector_changes(run).behind(state):
                    step = 1 + self.change_weights(run, change)[:, 0]
                    found = step if found is None else found * step
            if run.options.length and _enters_first_block(run, state):
                lengths = _vector_changes(run).initial(state)
                found = lengths if found is None else found * lengths
            return found

        return scale

    @staticmethod
    def _counts(run: Run[Any], state: State) -> bool:
        """Whether the block that a state's feed-forward sub-layers belong to counts."""
        made = state.branches if isinstance(state, ParallelState) else (state,)
        calls = [s.call for s in made if isinstance(s, AttentionState)]
        if not calls:
            calls = [s.call for s in run.attention_states if s.query_state is state][:1]
        return all(map(run.counts, calls))

    def shown_calls(self, run: Run[Options], state: State) -> list[AttentionState] | None:
        """Eq. 8: the last call alone, without aggregation."""
        return None if run.options.aggregate else run.last_calls(state)


def _enters_first_block(run: Run[Any], state: State) -> bool:
    """Whether C⁰ belongs to a state: a stream's first one, or what is mixed of it on the way."""
    mixed = run.observation.wiring.mixed_states
    if isinstance(state, MixedState):
        return all(isinstance(part, InitialState) for part in state.parts)
    return isinstance(state, InitialState) and not any(state in one.parts for one in mixed)


def _warn_of_directions(run: Run[Any], change: VectorChange) -> None:
    warned = run.observation.notes.setdefault("no directions", set())
    if change.module not in warned:
        warned.add(change.module)
        warnings.warn(
            f"{change.module!r}: {change.why}; each token's direction counts alike (NECC = 1/n): "
            "set direction=False, or leave the block out with `layers=`",
            stacklevel=2,
        )


def _by_window(weights: Tensor, windows: int) -> Tensor:
    """Weights of all keys, (B, H, F k) or (B, H, F q', F k) -> (B, F, H, 1 or q', k)."""
    weights = weights.unflatten(-1, (windows, -1))
    if weights.ndim == 4:
        return weights.transpose(1, 2)[..., None, :]
    weights = weights.unflatten(2, (windows, -1))  # (B, H, F, q', F, k)
    return weights.diagonal(dim1=2, dim2=4).movedim(-1, 1)


def _vector_changes(run: Run[Any]) -> VectorChanges:
    notes = run.observation.notes
    if "vector changes" not in notes:
        notes["vector changes"] = VectorChanges(run.observation)
    return notes["vector changes"]
