"""Relevance along the wired graph: from the readout down as row vectors, or up as matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_attn.attr._blocks import LinearRule, QueriesPerBlock, Rule, propagate_call
from captum_attn.attr._rules import SelfRelevance
from captum_attn.errors import WiringError
from captum_attn.observe.streams.states import (
    AttentionState,
    InitialState,
    LearnedState,
    MixedState,
    ParallelState,
    Part,
    RearrangedState,
    Source,
    State,
    ancestry,
)
from captum_attn.observe.tracing.token_index import scatter_sum, take

# Relevance of every source's tokens, source -> (B, n_source).
Relevance = dict[Source, Tensor]
# R of one state: its rows' relevance for the tokens of every source, source -> (B, n, n_source).
BlockRow = dict[Source, Tensor]
# What a state's own rows are multiplied with, (B, n); None: nothing.
RowScale = Callable[[State], "Tensor | None"]
# Any rule: a call with R from before it -> R of the state that it makes.
MatrixRule = Callable[["Step"], BlockRow]


def relevance_rows(
    weights: Mapping[State, Tensor],
    rule: Rule,
    size: QueriesPerBlock,
    row_scale: RowScale | None = None,
) -> Relevance:
    """Row-vector form of a linear rule: O(L n^2) time, and no n x n matrix at any time.

    Args:
        weights (dict): state that is read -> weights of its rows, (B, n).
        rule (callable): the rule.
        size (callable): the number of queries of a call in a block.
        row_scale (callable, optional): state -> what each of its tokens' rows is multiplied with.

    Returns:
        dict: source -> relevance of its tokens, (B, n_source).
    """
    arriving: dict[State, Tensor] = dict(weights)
    relevance: Relevance = {}

    for state in reversed(list(ancestry(list(weights)))):
        rows = arriving.pop(state, None)
        if rows is None or isinstance(state, LearnedState):
            continue
        scale = None if row_scale is None else row_scale(state)
        rows = rows if scale is None else rows * scale.to(rows.device)
        if isinstance(state, InitialState):
            add(relevance, state.source, rows)
        elif isinstance(state, RearrangedState):
            for part in state.parts:
                add(arriving, part.state, _taken(rows, part))
        elif isinstance(state, MixedState):
            for before, passed_on in zip(state.parts, state.mixing.passed(rows), strict=True):
                add(arriving, before, passed_on)
        elif isinstance(state, ParallelState):
            add(arriving, state.base, rows * (1 - len(state.branches)))
            for branch in state.branches:
                add(arriving, branch, rows)
        elif isinstance(state, AttentionState):
            kept, read = propagate_call(state.call, rows, rule, size)
            add(arriving, state.query_state, kept)
            if read is not None:
                add(arriving, state.key_state, read)
    return relevance


@dataclass(frozen=True)
class Step:
    """One attention call in the matrix form.

    Args:
        state (AttentionState): the state that the call makes.
        maps (Mapping): R of the earlier states, source -> (B, n, n_source) each.
    """

    state: AttentionState
    maps: Mapping[State, BlockRow]

    @property
    def before(self) -> BlockRow:
        """R of the version that asks."""
        return self.maps[self.state.query_state]

    @property
    def brought(self) -> set[Source]:
        """The sources that the answering streams hold something of."""
        return {source for part in read_parts(self.state) for source in self.maps[part.state]}

    def flows(self, read: Tensor) -> Iterator[Flow]:
        """What is handed over: A-bar, (B, F, q, k), split by streams and by sources."""
        read = dense(read)
        for part in read_parts(self.state):
            columns = columns_of(read, part)
            for source, rows in self.maps[part.state].items():
                yield Flow(self, part.state, source, columns.to(rows.dtype), rows)


@dataclass(frozen=True)
class Flow:
    """What one stream hands to another in an attention call, about one source of relevance.

    With s the stream that asks, q the one that answers and x the source, `read @ rows` is what a
    linear rule adds to R[s,x].

    Args:
        step (Step): the call.
        answering (State): the version of q that is read.
        source (Source): x.
        read (Tensor): A-bar's columns on the tokens of q, (B, n_s, n_q).
        rows (Tensor): R[q,x], (B, n_q, n_x).
    """

    step: Step
    answering: State
    source: Source
    read: Tensor
    rows: Tensor

    @property
    def is_across(self) -> bool:
        """Whether q is another stream than s, and x are its own tokens."""
        return self.step.state.stream != self.answering.stream == self.source.name

    def self_relevance(self, equation: str, remedy: str) -> tuple[SelfRelevance, SelfRelevance]:
        """R[s,s] and R[q,q], both from before the call.

        Args:
            equation (str), remedy (str): for the error where a stream has no tokens of its own.
        """
        state, maps = self.step.state, self.step.maps
        asking = state.query_state
        own, other = (self_relevance(s, maps[s]) for s in (asking, self.answering))
        if own is None or other is None:
            without = state.stream if own is None else self.answering.stream
            raise WiringError(
                f"{state.call.module!r} asks from {state.stream!r} across to "
                f"{self.answering.stream!r}: {equation} needs the relevance of {without!r} for "
                f"tokens of its own, and it has none (it is joined from other streams); {remedy}, "
                "or confine the method with `layers=`"
            )
        dtype = torch.promote_types(own.rows.dtype, other.rows.dtype)
        return own.to(dtype), other.to(dtype)


def self_relevance(state: State, rows: BlockRow) -> SelfRelevance | None:
    """R[s,s] of a state whose block row is `rows`; None for a stream without tokens of its own."""
    own = next((block for source, block in rows.items() if source.name == state.stream), None)
    identity = None if own is None else initial_block(state, own)
    return None if own is None or identity is None else SelfRelevance(own, identity)


def initial_block(state: State, like: Tensor) -> Tensor | None:
    """R[s,s] as it would be without any attention: I, carried along where tokens move or merge.

    Returns:
        Tensor or None: (B, n, n_source); None for a stream that has no tokens of its own.
    """
    rows = relevance_matrices([state], lambda step: step.before, like)[state]
    return next((block for source, block in rows.items() if source.name == state.stream), None)


def carried(state: State, asked: AttentionState, like: Tensor) -> Tensor | None:
    """Where the tokens that asked in a call stand in a later version of their stream.

    Returns:
        Tensor or None: (B, n, n_asked), `initial_block` with the call in place of the source.
    """
    mark = Source("", asked.n)
    eye = torch.eye(asked.n, dtype=like.dtype, device=like.device)
    own = {mark: eye.expand(like.shape[0], -1, -1)}
    rows = relevance_matrices(
        [state], lambda step: own if step.state is asked else step.before, like
    )
    return rows[state].get(mark)


def linear(step: Step, rule: LinearRule, flow: Callable[[Flow], Tensor] | None = None) -> BlockRow:
    """R after a call, R[s,x] = keep * R_query[s,x] + the sum of what is handed over.

    Args:
        step (Step): the call.
        rule (LinearRule): for all queries.
        flow (callable, optional): what is handed over, (B, n_s, n_x). Default: read R_key.
    """
    keep = rule.keep.flatten(1)[..., None] if isinstance(rule.keep, Tensor) else rule.keep
    rows = dict(step.before)
    if isinstance(keep, Tensor) or keep != 1.0:
        rows = {source: block * keep for source, block in rows.items()}
    for part in () if rule.read is None else step.flows(rule.read):
        add(rows, part.source, part.read @ part.rows if flow is None else flow(part))
    return rows


def is_cross_attention(state: AttentionState) -> bool:
    """Whether a call reads other streams than the one it updates, and only such."""
    streams = {p.state.stream for p in read_parts(state) if not isinstance(p.state, LearnedState)}
    return bool(streams) and state.stream not in streams


def is_self_attention(state: AttentionState) -> bool:
    """Whether a call reads the stream that it updates, and no other."""
    streams = {p.state.stream for p in read_parts(state) if not isinstance(p.state, LearnedState)}
    return streams <= {state.stream}


def relevance_matrices(
    last: Iterable[State],
    rule: MatrixRule,
    like: Tensor,
    finish: Callable[[State, BlockRow], BlockRow] | None = None,
) -> dict[State, BlockRow]:
    """Matrix form: every state's block row, from the inputs up.

    Args:
        last (iterable of State): the states whose R is wanted.
        rule (callable): a call with R from before it -> R after it.
        like (Tensor): (B, ...), for the batch size, the dtype and the device.
        finish (callable, optional): (state, R) -> R, once a state's block row is there.

    Returns:
        dict: state -> R, for each state in `last`.
    """
    last = list(dict.fromkeys(last))
    order = list(ancestry(last))
    uses: dict[State, int] = dict.fromkeys(last, 1)
    for state in order:
        for earlier in _needed(state):
            uses[earlier] = uses.get(earlier, 0) + 1
    maps: dict[State, BlockRow] = {}
    for state in order:
        if isinstance(state, AttentionState):
            made = rule(Step(state, maps))
        else:
            made = _raised(state, maps, like)
        maps[state] = made if finish is None else finish(state, made)
        for earlier in _needed(state):
            uses[earlier] -= 1
            if not uses[earlier]:
                del maps[earlier]
    return {
        state: {source: block.to(like.dtype) for source, block in maps[state].items()}
        for state in last
    }


def _needed(state: State) -> list[State]:
    if isinstance(state, AttentionState):
        return [state.query_state, *(part.state for part in read_parts(state)), state.key_state]
    return list(state.before)


def read_parts(state: AttentionState) -> tuple[Part, ...]:
    """The states that answer a call, each with the places of its tokens along the key axis."""
    key_state = state.key_state
    if isinstance(key_state, RearrangedState) and key_state.stream != state.stream:
        return key_state.parts
    return (Part(key_state, None),)


def _raised(state: State, maps: Mapping[State, BlockRow], like: Tensor) -> BlockRow:
    if isinstance(state, InitialState):
        eye = torch.eye(state.n, dtype=like.dtype, device=like.device)
        return {state.source: eye.expand(like.shape[0], -1, -1)}
    rows: BlockRow = {}
    if isinstance(state, RearrangedState):
        for part in state.parts:
            for source, block in maps[part.state].items():
                add(rows, source, moved(block, part, state.n))
    elif isinstance(state, MixedState):
        # In float64: what attention adds is small beside T, and rules look at R - T alone.
        for before, mixing in zip(state.parts, state.mixing.matrices(), strict=True):
            for source, block in maps[before].items():
                add(rows, source, mixing.to(block.device, torch.float64) @ block.double())
    elif isinstance(state, ParallelState):
        base = maps[state.base]
        rows = dict(base)
        for branch in state.branches:
            for source, block in maps[branch].items():
                add(rows, source, block - base[source] if source in base else block)
    return rows


def add(store: dict[Any, Tensor], key: Any, rows: Tensor) -> None:
    """store[key] += rows, out of place, on the device of what is there."""
    store[key] = store[key] + rows.to(store[key].device) if key in store else rows


def dense(read: Tensor) -> Tensor:
    """(B, F, q, k) -> (B, F q, F k): the windows do not see each other."""
    batch, windows, queries, keys = read.shape
    if windows == 1:
        return read[:, 0]
    apart = read.new_zeros(batch, windows, queries, windows, keys)
    window = torch.arange(windows, device=read.device)
    apart[:, window, :, window] = read.transpose(0, 1)
    return apart.view(batch, windows * queries, windows * keys)


def columns_of(read: Tensor, part: Part) -> Tensor:
    """A-bar's columns on the tokens of a part, (B, q, n_from)."""
    if part.to is None or part.shares is None:
        return read
    index = part.to.to(read.device).expand(read.shape[0], -1)[:, None].expand(-1, read.shape[1], -1)
    return read.gather(2, index.clamp_min(0)) * part.shares.to(read)[:, None]


def _taken(rows: Tensor, part: Part) -> Tensor:
    """(B, n) -> (B, n_from): to each row of a part its share of what arrives at its position."""
    if part.to is None or part.shares is None:
        return rows
    return take(rows, part.to) * part.shares.to(rows)


def moved(block: Tensor, part: Part, n: int) -> Tensor:
    """The rows of a part, each at its new position; rows that meet are averaged."""
    if part.to is None or part.shares is None:
        return block
    return scatter_sum(block * part.shares.to(block)[..., None], part.to.to(block.device), n)
