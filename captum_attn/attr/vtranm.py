"""VTranM: "Vision Transformer explainability with vector transformations measurement", submitted to
ICLR 2024; published as TokenTM, CVPR 2024."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_attn import objectives
from captum_attn.attr._base import AttentionAttribution
from captum_attn.attr._blocks import Weigh, Weighed
from captum_attn.attr._propagate import (
    BlockRow,
    MatrixRule,
    add,
    is_cross_attention,
    linear,
    relevance_matrices,
    relevance_rows,
)
from captum_attn.attr._run import Run
from captum_attn.errors import WiringError
from captum_attn.objectives import Objective
from captum_attn.observe.capture.attention_call import Block
from captum_attn.observe.streams.states import (
    AttentionState,
    InitialState,
    ParallelState,
    Source,
    State,
)
from captum_attn.observe.vectors.recording_tap import RecordingTap
from captum_attn.observe.vectors.vector_changes import VectorChange, VectorChanges


def length_ratio(before: Tensor, after: Tensor) -> Tensor:
    """‖Ẽ‖ / ‖E‖ (Eq. 12); 0 for a token of no length, which has nothing to be kept of."""
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
    feed-forwards. A block in which the skip connection or the linear map was not found is a
    `WiringError` that names it. Calls that are left out by `layers` and `start_layer` have U = I,
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

    options = {"length": True, "direction": True, "aggregate": True}
    asks_again = True
    tap = RecordingTap

    @classmethod
    def get_name(cls) -> str:
        return "VTranM"

    def default_objective(self) -> Objective:
        return target_probability

    def weights_of(self, run: Run, change: VectorChange) -> Tensor:
        """w of Eq. 12 and 13, (B, H, n)."""
        weights = torch.ones_like(change.after)
        if run.options["length"]:
            weights = length_ratio(change.before, change.after)
        if run.options["direction"]:
            if change.dot is None:
                raise WiringError(
                    f"{change.module!r}: its values come from vectors of another width than those "
                    "they are added to, so the angle between the two is not defined; set "
                    "direction=False, or leave the block out with `layers=`"
                )
            lengths = change.before * change.after
            weights = weights * necc(length_ratio(lengths, change.dot), change.real)
        return weights

    def weigh_heads(self, run: Run, block: Block) -> Tensor:
        attention = block.attention()  # (B, F, H, q, k)
        gradient = run.attention_gradient(block)
        if gradient is None:
            return torch.zeros_like(attention)
        weighted = gradient.clamp_min_(0).mul_(attention)
        if run.options["length"] or run.options["direction"]:
            update = run.seen.wiring.after(block.call)
            weights = self.weights_of(run, _vector_changes(run).attention(update))  # (B, H, F k)
            weights = weights.unflatten(-1, (block.call.windows, -1)).transpose(1, 2)
            weighted = weighted.mul_(weights[..., None, : block.n_k])
        return weighted

    def weigh(self, run: Run, update: AttentionState, block: Block) -> Weighed | None:
        transforms = _vector_changes(run)
        own: Tensor | float = float(transforms.keeps(update))
        for change in transforms.beside(update):
            weights = self.weights_of(run, change)[:, 0].unflatten(-1, (block.call.windows, -1))
            own = own + (weights if block.rows is None else weights[..., block.rows])
        if run.gradients[update.call] is None and isinstance(own, float) and own:
            return None
        return own, self.weigh_heads(run, block).mean(2)

    def _factor(self, run: Run) -> Callable[[State], Tensor | None]:
        """What the feed-forward sub-layers and C⁰ multiply the rows of a state with, (B, n)."""

        def factor(state: State) -> Tensor | None:
            found: Tensor | None = None
            if self._counts(run, state):
                for change in _vector_changes(run).behind(state):
                    step = 1 + self.weights_of(run, change)[:, 0]
                    found = step if found is None else found * step
            if isinstance(state, InitialState) and run.options["length"]:
                lengths = _vector_changes(run).initial(state)
                found = lengths if found is None else found * lengths
            return found

        return factor

    @staticmethod
    def _counts(run: Run, state: State) -> bool:
        """Whether the block that a state's feed-forward sub-layers belong to counts."""
        made = state.branches if isinstance(state, ParallelState) else (state,)
        calls = [s.call for s in made if isinstance(s, AttentionState)]
        if not calls:
            calls = [u.call for u in run.seen.wiring.updates if u.query_state is state][:1]
        return all(call.index in run.active for call in calls)

    def relevance(self, run: Run) -> dict[Source, Tensor]:
        if run.options["aggregate"]:
            weigh = partial(self.weighed, run)
            return relevance_rows(run.weights, weigh, run.at_once, self._factor(run))
        relevance: dict[Source, Tensor] = {}
        for state, weights in run.weights.items():
            for last in self._last(run, state):
                alone = relevance_rows({state: weights}, self._alone(run, last), run.at_once)
                for source, rows in alone.items():
                    add(relevance, source, rows)
        return relevance

    def maps(self, run: Run, last: Iterable[State]) -> dict[State, BlockRow]:
        if run.options["aggregate"]:
            return super().maps(run, last)
        found: dict[State, BlockRow] = {state: {} for state in last}
        for state, rows in found.items():
            for call in self._last(run, state):
                blocks = relevance_matrices(
                    [state], _matrix_form(run, self._alone(run, call)), run.like
                )
                for source, block in blocks[state].items():
                    add(rows, source, block)
        return found

    def finish(self, run: Run) -> Callable[[State, BlockRow], BlockRow] | None:
        factor = self._factor(run)

        def scaled(state: State, rows: BlockRow) -> BlockRow:
            scale = factor(state)
            return rows if scale is None else {x: b * scale[..., None] for x, b in rows.items()}

        return scaled

    def _alone(self, run: Run, last: AttentionState) -> Weigh:
        """Eq. 8: one call's map, the tokens staying where they are below and above it."""
        return lambda update, block: (
            (0.0, self.weigh_heads(run, block).mean(2)) if update is last else None
        )

    @staticmethod
    def _last(run: Run, state: State) -> list[AttentionState]:
        """The last call within the stream, and the last one to every other stream."""
        calls = [u for u in run.updates([state]) if u.stream == state.stream]
        return list(
            {u.key_state.stream if is_cross_attention(u) else u.stream: u for u in calls}.values()
        )


def _matrix_form(run: Run, weigh: Weigh) -> MatrixRule:
    return lambda update, maps: linear(update, run.whole(update, weigh), maps)


def _vector_changes(run: Run) -> VectorChanges:
    notes = run.seen.notes
    if "transforms" not in notes:
        notes["transforms"] = VectorChanges(run.seen)
    return notes["transforms"]
