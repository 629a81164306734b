"""Relevance along the wired graph: from the readout down as row vectors, or up as matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_attn.attr._blocks import AtOnce, Weigh, Weighed, passed
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

# R of one state: its rows' relevance for the tokens of every source, source -> (B, n, n_source).
BlockRow = dict[Source, Tensor]
# What a state's own rows are multiplied with, (B, n); None: nothing.
Factor = Callable[[State], "Tensor | None"]
# Any rule: (update, R of the earlier states) -> R of the query stream after the call.
MatrixRule = Callable[[AttentionState, Mapping[State, BlockRow]], BlockRow]


def relevance_rows(
    weights: Mapping[State, Tensor],
    weigh: Weigh,
    at_once: AtOnce,
    factor: Factor | None = None,
) -> dict[Source, Tensor]:
    """Row-vector form of a linear rule: O(L n^2) time, and no n x n matrix at any time.

    Args:
        weights (dict): state that is read -> weights of its rows, (B, n).
        weigh (callable): the rule.
        at_once (callable): how many queries of a call are weighed at a time.
        factor (callable, optional): state -> what each of its tokens' rows is multiplied with.

    Returns:
        dict: source -> relevance of its tokens, (B, n_source).
    """
    arriving: dict[State, Tensor] = dict(weights)
    relevance: dict[Source, Tensor] = {}

    for state in reversed(list(ancestry(list(weights)))):
        rows = arriving.pop(state, None)
        if rows is None or isinstance(state, LearnedState):
            continue
        scale = None if factor is None else factor(state)
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
            asks, reads = passed(state, rows, weigh, at_once)
            add(arriving, state.query_state, asks)
            if reads is not None:
                add(arriving, state.key_state, reads)
    return relevance


@dataclass
class Answer:
    """What one stream answers to an attention call.

    Args:
        state (State): the version that is read.
        read (Tensor): A-bar's columns on its tokens, (B, n_q, n).
        rows (dict): R of the version that is read, source -> (B, n, n_source).
    """

    state: State
    read: Tensor
    rows: BlockRow

    @property
    def stream(self) -> str:
        return self.state.stream


def initial_block(state: State, like: Tensor) -> Tensor | None:
    """R[s,s] as it would be without any attention: I, carried along where tokens move or merge.

    Returns:
        Tensor or None: (B, n, n_source); None for a stream that has no tokens of its own.
    """
    rows = relevance_matrices([state], lambda update, maps: maps[update.query_state], like)[state]
    return next((block for source, block in rows.items() if source.name == state.stream), None)


def squared(own: Tensor, initial: Tensor) -> Tensor:
    """R[s,s], (B, n, n_source), for the tokens as they are now, (B, n, n).

    Args:
        initial (Tensor): (B, n, n_source), see `initial_block`; its rows do not overlap.
    """
    met = initial.square().sum(-1).clamp_min(torch.finfo(initial.dtype).tiny)
    return own @ (initial / met[..., None]).mT


def carried(state: State, update: AttentionState, like: Tensor) -> Tensor | None:
    """Where the tokens that asked in `update` stand in a later version of their stream.

    Returns:
        Tensor or None: (B, n, n_update), `initial_block` with the call in place of the source.
    """
    mark = Source("", update.n)
    eye = torch.eye(update.n, dtype=like.dtype, device=like.device)
    own = {mark: eye.expand(like.shape[0], -1, -1)}
    rows = relevance_matrices(
        [state], lambda u, maps: own if u is update else maps[u.query_state], like
    )
    return rows[state].get(mark)


def answers(update: AttentionState, read: Tensor, maps: Mapping[State, BlockRow]) -> list[Answer]:
    """Splits A-bar, (B, F, q, k), by the streams that its columns belong to."""
    read = dense(read)
    parts = read_parts(update)
    return [Answer(p.state, _columns(read, p), maps[p.state]) for p in parts]


def linear(
    update: AttentionState, weighed: Weighed | None, maps: Mapping[State, BlockRow]
) -> BlockRow:
    """R after a call by a rule that is linear in R: own * R_asks + A-bar R_reads."""
    if weighed is None:
        return maps[update.query_state]
    own, read = weighed
    scale = own.flatten(1)[..., None] if isinstance(own, Tensor) else own
    rows = {source: block * scale for source, block in maps[update.query_state].items()}
    for answer in answers(update, read, maps):
        for source, block in answer.rows.items():
            add(rows, source, answer.read @ block)
    return rows


def is_cross_attention(update: AttentionState) -> bool:
    """Whether a call reads other streams than the one it updates, and only such."""
    streams = {p.state.stream for p in read_parts(update) if not isinstance(p.state, LearnedState)}
    return bool(streams) and update.stream not in streams


def is_self_attention(update: AttentionState) -> bool:
    """Whether a call reads the stream that it updates, and no other."""
    streams = {p.state.stream for p in read_parts(update) if not isinstance(p.state, LearnedState)}
    return streams <= {update.stream}


def relevance_matrices(
    last: Iterable[State],
    update: MatrixRule,
    like: Tensor,
    finish: Callable[[State, BlockRow], BlockRow] | None = None,
) -> dict[State, BlockRow]:
    """Matrix form: every state's block row, from the inputs up.

    Args:
        last (iterable of State): the states whose R is wanted.
        update (callable): (update, R of the earlier states) -> R after the call.
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
        made = (
            update(state, maps) if isinstance(state, AttentionState) else _raised(state, maps, like)
        )
        maps[state] = made if finish is None else finish(state, made)
        for earlier in _needed(state):
            uses[earlier] -= 1
            if not uses[earlier]:
                del maps[earlier]
    return {state: maps[state] for state in last}


def _needed(state: State) -> list[State]:
    if isinstance(state, AttentionState):
        return [state.query_state, *(part.state for part in read_parts(state)), state.key_state]
    return list(state.before)


def read_parts(update: AttentionState) -> tuple[Part, ...]:
    """The states that answer a call, each with the places of its tokens along the key axis."""
    reads = update.key_state
    if isinstance(reads, RearrangedState) and reads.stream != update.stream:
        return reads.parts
    return (Part(reads, None),)


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
        for before, mixing in zip(state.parts, state.mixing.matrices(), strict=True):
            for source, block in maps[before].items():
                add(rows, source, mixing.to(block) @ block)
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


def _columns(read: Tensor, part: Part) -> Tensor:
    """A-bar's columns on the tokens of a part, (B, q, n_from)."""
    if part.to is None or part.shares is None:
        return read
    index = part.to.to(read.device).expand(read.shape[0], -1)[:, None].expand(-1, read.shape[1], -1)
    return read.gather(2, index.clamp_min(0)) * part.shares.to(read)[:, None]


def _taken(rows: Tensor, part: Part) -> Tensor:
    """(B, n) -> (B, n_from): to each row of a part its share of what arrives at its position."""
    if part.to is None or part.shares is None:
        return rows
    to = part.to.to(rows.device).expand(len(rows), -1)
    return rows.gather(1, to.clamp_min(0)) * part.shares.to(rows)


def moved(block: Tensor, part: Part, n: int) -> Tensor:
    """The rows of a part, each at its new position; rows that meet are averaged."""
    if part.to is None or part.shares is None:
        return block
    to = part.to.to(block.device).expand(len(block), -1)
    block = block * part.shares.to(block)[..., None]
    placed = block.new_zeros(len(block), n + 1, block.shape[2])
    index = torch.where(to < 0, n, to)[..., None].expand_as(block)
    return placed.scatter_add_(1, index, block)[:, :n]
