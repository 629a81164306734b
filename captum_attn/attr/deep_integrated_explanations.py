"""DIX, Deep Integrated Explanations: Barkan et al., CIKM 2023, its part for vision transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from captum_attn._checks import shown, whole
from captum_attn.attr._base import AttentionAttribution, Block, BlockRow, LinearRule, Relevance, Run
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._progress import with_progress
from captum_attn.attr._propagate import Step, add, linear, relevance_matrices, relevance_rows
from captum_attn.errors import OptionError
from captum_attn.observe import AttentionCall
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.interventions import replacing
from captum_attn.observe.streams.states import AttentionState, State

LAST_TWO = (-1, -2)
Maps = Mapping[AttentionCall, Tensor]
# A call as it ran at one step, and the gradient at its output.
At = tuple[AttentionCall, Tensor | None]


class DeepIntegratedExplanations(AttentionAttribution):
    r"""Deep Integrated Explanations (DIX), Barkan et al., CIKM 2023.

    For a block b, the model runs with A_b replaced by (k/K) A_b, k = 0 to K, and all behind it is
    computed anew. M_l = mean_k E_h[(A_l ⊙ ∇A_l)^+] for every call l; the relevance of b is the row
    that is read of Π_l rownorm(M_l + I), and that of several blocks is summed.

    Each block has its own attention on its path, as the paper says; the authors' code puts the last
    block's into the others too, so that with layers_integrated=(-1,) both agree.

    An extension to models of several streams: the blocks are calls of the stream that is read, and
    a call to another stream adds M R[v,x] to R[s,x], both over 1 plus the row's sum.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        n_steps (int): K; the fractions are 0, 1/K, ..., 1, in single precision as in the authors'
            code; the last one is the run itself, so that a block takes K runs more. Default: 10.
        layers_integrated (int or tuple of int): b, the places of the blocks among the calls of the
            stream that is read. Default: (-1, -2), the last two, or the only one.
        show_progress (bool): a progress bar over the runs of each block. Default: False.

    Examples::

        >>> DeepIntegratedExplanations(model).attribute(images, target=3).sum(1)   # (B, H, W)
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(AttentionAttribution.Options):
        n_steps: int = 10
        layers_integrated: int | tuple | list = LAST_TWO
        show_progress: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            whole("n_steps", self.n_steps, least=1, most=2**31)
            chosen = self.blocks
            ints = all(type(b) is int for b in chosen)  # else it may have no hash
            if not chosen or not ints or len(set(chosen)) < len(chosen):
                raise OptionError(
                    "layers_integrated: expected an int, or several different ones, got "
                    f"{shown(self.layers_integrated)}"
                )

        @property
        def blocks(self) -> tuple[int, ...]:
            given = self.layers_integrated
            return (given,) if isinstance(given, int) else tuple(given)

    @classmethod
    def get_name(cls) -> str:
        return "Deep Integrated Explanations (DIX)"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        return run.attention_gradient(block).mul_(block.attention()).clamp_min_(0)

    def relevance(self, run: Run[Options]) -> Relevance:
        found: Relevance = {}
        for state, weights in run.weights.items():
            for maps in self._mean_maps(run, state):
                rule = partial(_rollout, run, maps)
                rows = relevance_rows({state: weights}, rule, run.queries_per_block)
                for source, relevance in rows.items():
                    add(found, source, relevance)
        return found

    def matrices(self, run: Run[Options], last: Iterable[State]) -> dict[State, BlockRow]:
        found: dict[State, BlockRow] = {}
        for state in last:
            found[state] = {}
            for maps in self._mean_maps(run, state):

                def update(step: Step, maps: Maps = maps) -> BlockRow:
                    rule = run.full_rule(step.state.call, partial(_rollout, run, maps))
                    return run.mask_later_rows(step.state, linear(step, rule), step.before)

                blocks = relevance_matrices([state], update, run.like)[state]
                for source, rows in blocks.items():
                    add(found[state], source, rows)
        return found

    def _mean_maps(self, run: Run[Options], state: State) -> list[Maps]:
        """M of every call, for each block that is integrated."""
        roots = modules_of(self.forward_func)
        return [
            run.once(("mean maps", made.call), partial(self._integrated, run, made.call, roots))
            for made in self._blocks(run, state)
        ]

    def _blocks(self, run: Run[Options], state: State) -> list[AttentionState]:
        calls = [made for made in run.calls_into([state]) if made.stream == state.stream]
        if len(calls) == 1 and run.options.blocks == LAST_TWO:
            return calls
        for b in run.options.blocks:
            if not -len(calls) <= b < len(calls):
                raise OptionError(
                    f"layers_integrated: expected ints in [-{len(calls)}, {len(calls)}), the "
                    f"attention calls of {state.stream!r}, got {b}"
                )
        return [calls[b] for b in run.options.blocks]

    def _integrated(self, run: Run[Options], call: AttentionCall, roots: list[nn.Module]) -> Maps:
        """M_l = mean_k E_h[(A_l ⊙ ∇A_l)^+], (B, F, q, k), with (k/K) A in the place of one A."""
        calls = [state.call for state in run.attention_states if run.counts(state.call)]
        total: dict[AttentionCall, Tensor] = {}
        k = torch.arange(run.options.n_steps + 1, dtype=torch.float64) / run.options.n_steps
        steps = k.float().tolist()
        for share in with_progress(steps, self.get_name(), run.options):
            found: Sequence[At] = [(one, run.backward.gradients.get(one)) for one in calls]
            if share < 1:
                scaled = replacing(run.observation, {call: _scaled_by(share)}, roots)
                found = run.calls_on(run.inputs, calls, scaled)
            for one, (other, gradient) in zip(calls, found, strict=True):
                if gradient is not None:
                    add(total, one, run.full_map(one, partial(_positive, other, gradient)))
        return {one: rows / len(steps) for one, rows in total.items()}


def _scaled_by(share: float) -> Callable[[Tensor], Tensor]:
    return lambda attention: share * attention


def _positive(call: AttentionCall, gradient: Tensor, block: Block) -> Tensor:
    """E_h[(A ⊙ ∇A)^+] of a block's queries, of a call as it ran at one step."""
    at = Block(call, block.rows)
    product = at.map_gradient(gradient).mul_(at.attention())
    return product.clamp_min_(0).mean(2)[..., : block.n_k]


def _rollout(run: Run, maps: Maps, block: Block) -> LinearRule:
    """rownorm(M + I)."""
    if not run.counts(block.call) or block.call not in maps:
        return UNCHANGED
    read = maps[block.call][..., : block.n_k]
    read = read if block.rows is None else read[:, :, block.rows]
    total = 1 + read.sum(-1)
    return LinearRule(1 / total, read / total[..., None])
