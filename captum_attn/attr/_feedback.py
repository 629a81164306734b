"""Methods that weigh what the tokens became with an averaged gradient: Σ_r ω_r (R ⊙ W)[r, :].

W = E_h[(1/K Σ_k ∇A_L(x_k))^+] is the feedback of the last call that the output reads, x_k the
inputs of `_path.py`, the clamp after the mean over steps and before the mean over heads; R says how
the tokens that are read are made of the inputs' tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from captum_attn.attr._base import (
    AttentionAttribution,
    Block,
    LinearRule,
    Relevance,
    Result,
    Run,
)
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._layers import calls_of_layer
from captum_attn.attr._path import (
    At,
    baselines_of,
    before_the_end,
    check_baselines,
    check_steps,
    mean_gradient,
    path_gradients,
)
from captum_attn.attr._progress import with_progress
from captum_attn.attr._propagate import (
    BlockRow,
    Step,
    add,
    linear,
    relevance_matrices,
    relevance_rows,
)
from captum_attn.observe import AttentionCall
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.streams.states import AttentionState, State


class FeedbackMethod(AttentionAttribution):
    """Base of these methods: a subclass says what R is by `perception`.

    The streams: the last call within the stream that is read, and its last one to every other
    stream, have a feedback each, which weighs what R says of the tokens that they read.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(AttentionAttribution.Options):
        n_steps: int = 20
        baselines: float | Tensor | tuple | Mapping | None = None
        show_progress: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            check_steps(self.n_steps)

        @classmethod
        def of_examples(
            cls, given: Mapping[str, Any], part: slice, inputs: Any, batch: int
        ) -> Mapping[str, Any]:
            if "baselines" not in given:
                return given
            return {**given, "baselines": baselines_of(given["baselines"], part, inputs, batch)}

    def perception(self, run: Run[Any], last: AttentionState, block: Block) -> LinearRule:
        """The rule of R for a call that counts, where `last` is the call with the feedback."""
        raise NotImplementedError

    def check(self, run: Run[Any]) -> None:
        check_baselines(run, run.options.baselines)

    def relevance(self, run: Run[Any]) -> Relevance:
        if not run.reads_one_row:
            return self._read_out(run, run.weights, False)
        found: Relevance = {}
        for state, last in self._last(run, run.weights):
            size, weights = run.queries_per_block, run.weights[state]
            perceived = relevance_rows({state: weights}, partial(self._perceived, run, last), size)
            row = {state: (weights != 0).to(weights)}
            fed_back = relevance_rows(row, partial(self._fed_back, run, last), size)
            for source in perceived.keys() & fed_back.keys():
                add(found, source, perceived[source] * fed_back[source])
        return found

    def matrices(self, run: Run[Any], last: Iterable[State]) -> dict[State, BlockRow]:
        last = list(last)
        found: dict[State, BlockRow] = {state: {} for state in last}
        for state, call in self._last(run, last):
            perceived = self._matrix(run, state, partial(self._perceived, run, call))
            fed_back = self._matrix(run, state, partial(self._fed_back, run, call))
            for source in perceived.keys() & fed_back.keys():
                add(found[state], source, perceived[source] * fed_back[source])
        return found

    def explain(self, run: Run[Any]) -> Result:
        return Result(run, self.relevance(run), shows_calls=True)

    def _last(self, run: Run[Any], read: Iterable[State]) -> list[tuple[State, AttentionState]]:
        """The states that are read, with the calls that have a feedback."""
        roots = modules_of(self.forward_func)
        pairs = [(state, call) for state in read for call in calls_of_layer(run, state, -1, roots)]
        calls = list(dict.fromkeys(last.call for _, last in pairs))

        def path() -> dict[AttentionCall, list[At]]:
            fractions = with_progress(
                before_the_end(run.options.n_steps), self.get_name(), run.options
            )
            return path_gradients(run, calls, fractions, run.options.baselines, roots)

        run.once("path", path)
        return pairs

    def _matrix(self, run: Run[Any], state: State, rule: Any) -> BlockRow:
        def update(step: Step) -> BlockRow:
            after = linear(step, run.full_rule(step.state.call, rule))
            return run.mask_later_rows(step.state, after, step.before)

        return relevance_matrices([state], update, run.like)[state]

    def _perceived(self, run: Run[Any], last: AttentionState, block: Block) -> LinearRule:
        return self.perception(run, last, block) if run.counts(block.call) else UNCHANGED

    def _fed_back(self, run: Run[Any], last: AttentionState, block: Block) -> LinearRule:
        """W of the last call; everywhere else every token stays where it is."""
        if block.call is not last.call:
            return UNCHANGED
        path: dict[AttentionCall, list[At]] = run.notes["path"]
        gradient = mean_gradient(path[last.call], block).clamp_min_(0)
        return LinearRule(0.0, gradient.masked_fill_(block.attention() == 0, 0).mean(2))
