"""Sinks and self: tokens that take relevance whatever is asked (`leave_out`), seen and left out.

A language model's heads that have nothing to say look at the first token; so do many of an
encoder's at a separator. Such a *sink* gets relevance for every target and says nothing about any.
It is told by what the heads do, and not by its place: in most heads, most questions look at it more
than at any other token. A question is a query that is no padding and sees at least two tokens
beside its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_attn.attr._attended import of_block, real_queries
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._propagate import Relevance, add, is_self_attention, relevance_rows
from captum_attn.attr._reasons import SELF, SINK
from captum_attn.attr._run import Run
from captum_attn.errors import OptionError
from captum_attn.observe.streams.states import AttentionState, Source, State
from captum_attn.observe.streams.to_inputs import to_input

if TYPE_CHECKING:
    from captum_attn.attr._results import Result

MOST = 0.5  # of the heads, and of a head's questions

LeftOut = dict[str, Relevance]  # reason -> source -> (B, n) bool


def left_out(run: Run[Any]) -> LeftOut:
    """The tokens that the run's option `leave_out` names, for each reason: source -> (B, n)."""
    find = {SINK: sinks, SELF: read_alone}
    return {reason: find[reason](run) for reason in dict.fromkeys(run.options.leave_out)}


def without(result: Result) -> Result:
    """The result with the relevance of what is left out set to 0; refuses to leave out all."""
    run = result.run
    if not run.options.leave_out:
        return result
    found = left_out(run)
    masks = together(found)
    _check_some_left(result, masks)
    of_tokens, of_elements = result.of_tokens, dict(result.of_elements)
    if of_tokens is not None:
        of_tokens = {
            source: rows.masked_fill(masks[source].to(rows.device), 0) if source in masks else rows
            for source, rows in of_tokens.items()
        }
    for name, values in of_elements.items():
        for source in masks:
            for entry in source.entries:
                if entry.leaf.name == name and entry.of_input:
                    mask = to_input(entry, masks[source].to(values), "nearest") > 0
                    of_elements[name] = of_elements[name].masked_fill(mask, 0)
    return replace(result, of_tokens=of_tokens, of_elements=of_elements, left_out=found)


def together(found: Mapping[str, Relevance]) -> Relevance:
    """Source -> (B, n) bool, for whatever reason."""
    masks: Relevance = {}
    for of_sources in found.values():
        for source, mask in of_sources.items():
            masks[source] = masks[source] | mask if source in masks else mask
    return masks


def _check_some_left(result: Result, masks: Relevance) -> None:
    if not masks:
        return
    left = [~masks.get(s, torch.zeros(result.run.batch, s.n).bool()).cpu() for s in result.sources]
    none = (~torch.cat(left, 1).any(1)).nonzero().flatten().tolist()
    if none:
        raise OptionError(
            f"leave_out={result.run.options.leave_out!r} leaves nothing of example {none[0]}: "
            "expected more tokens than are left out; explain a longer input, or leave out less"
        )


# ---------------------------------------------------------------------------------- what is seen
def sinks(run: Run[Any]) -> Relevance:
    """Which tokens most heads look at whatever is asked: source -> (B, n) bool.

    With T_h[j] the share of head h's questions that see j and look at it more than at any other
    token: j is a sink where T_h[j] > 1/2 in more than half of the heads of all calls that count
    and that see j. So an example has one sink at most.
    """
    states = run.calls_into()
    return run.cached(("sinks", *states), lambda: _sinks(run, states))


def _sinks(run: Run[Any], states: list[AttentionState]) -> Relevance:
    won: dict[State, Tensor] = {}
    asked: dict[State, Tensor] = {}
    for state in states:
        most, every = _looked_at(run, state)
        add(won, state.key_state, (most > MOST * every).to(run.like).sum(2).flatten(1))
        add(asked, state.key_state, (every > 0).to(run.like).sum(2).flatten(1))
    heads_won, heads_asked = _at_sources(run, won), _at_sources(run, asked)
    return {source: heads_won[source] > MOST * heads for source, heads in heads_asked.items()}


def _looked_at(run: Run[Any], state: AttentionState) -> tuple[Tensor, Tensor]:
    """How many questions look most at a key, and how many see it, (B, F, H, k) both."""
    call = state.call
    shape = (run.batch, call.windows, call.heads, call.n_k)
    most, every = torch.zeros(2, *shape, device=call.q.device)
    real, own = real_queries(run, call), is_self_attention(state) and call.n_q == call.n_k
    for block in run.blocks(call):
        attention = block.attention().float()  # (B, F, H, q', k')
        if own:
            rows = torch.arange(call.n_q, device=attention.device)
            rows = rows if block.rows is None else block.rows
            keys = torch.arange(block.n_k, device=attention.device)
            attention = attention.masked_fill(keys == rows[:, None], 0)
        seen = attention > 0
        question = seen.sum(-1) > 1  # (B, F, H, q')
        if real is not None:
            question &= of_block(real, block)[:, :, None]
        top = torch.zeros_like(attention).scatter_(-1, attention.argmax(-1, keepdim=True), 1)
        most[..., : block.n_k] += (top * question[..., None]).sum(3)
        every[..., : block.n_k] += (seen & question[..., None]).sum(3)
    return most, every


def read_alone(run: Run[Any]) -> Relevance:
    """The token that the output is read from, where it is one and not a mean of many.

    It is a row with more than half of the readout's weight: the last token of a language model.
    """
    rows = {state: (weights > MOST).to(weights) for state, weights in run.weights.items()}
    return {source: found > MOST for source, found in _at_sources(run, rows).items()}


def _at_sources(run: Run[Any], rows: Mapping[State, Tensor]) -> dict[Source, Tensor]:
    """What states' rows have, at the tokens that they were born as: (B, n) of every source."""
    return relevance_rows(rows, lambda block: UNCHANGED, run.queries_per_block)


def named(run: Run[Any], example: int = 0) -> list[tuple[str, str, tuple[int, ...]]]:
    """(reason, stream, positions) of what is left out of an example; ("sink", "", ()): nothing."""
    rows = []
    for reason, sources in left_out(run).items():
        places = {s.name: tuple(m[example].nonzero()[:, 0].tolist()) for s, m in sources.items()}
        rows += [(reason, name, at) for name, at in places.items() if at] or [(reason, "", ())]
    return rows
