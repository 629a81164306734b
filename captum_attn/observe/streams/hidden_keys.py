"""Which keys of an attention call hold hidden tokens: tokens are followed as far as they stay
themselves, over moves, merges and mixing, and not over what attention adds to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

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

# Of each position of a state, what it holds of the sources' tokens, and the hidden part of it.
Held = tuple[Tensor, Tensor]


def hidden_positions(
    states: Iterable[State], hidden: Mapping[Source, Tensor], like: Tensor
) -> dict[State, Tensor]:
    """The positions that hold more of hidden tokens than of others.

    Args:
        states (iterable of State): whose positions are asked for.
        hidden (Mapping): source -> (B, n) bool; a source that is missing is not hidden.
        like (Tensor): (B, ...), for the number of examples, or of their copies, and the dtype.

    Returns:
        dict: state -> (B, n) bool.
    """
    states = list(states)
    held: dict[State, Held] = {}
    for state in ancestry(states):
        held[state] = _held(state, held, hidden, like)
    found = {}
    for state in states:
        whole, gone = held[state]
        found[state] = (whole > 0) & (gone > whole / 2)
    return found


def _held(
    state: State, held: Mapping[State, Held], hidden: Mapping[Source, Tensor], like: Tensor
) -> Held:
    zeros = like.new_zeros(len(like), state.n)
    if isinstance(state, InitialState):
        gone = hidden.get(state.source)
        return zeros + 1, zeros if gone is None else gone.to(zeros)
    if isinstance(state, AttentionState):
        return held[state.query_state]
    if isinstance(state, ParallelState):
        return held[state.base]
    if isinstance(state, LearnedState):
        return zeros, zeros
    whole, gone = zeros, zeros
    if isinstance(state, RearrangedState):
        for part in state.parts:
            one, other = (_moved(rows, part, state.n) for rows in held[part.state])
            whole, gone = whole + one, gone + other
    elif isinstance(state, MixedState):
        for before, mixing in zip(state.parts, state.mixing.matrices(), strict=True):
            matrix = _copied(mixing.to(zeros), len(zeros))
            one, other = ((matrix @ rows[..., None])[..., 0] for rows in held[before])
            whole, gone = whole + one, gone + other
    return whole, gone


def _moved(rows: Tensor, part: Part, n: int) -> Tensor:
    """The rows of a part, each at its new position; rows that meet are averaged."""
    if part.to is None or part.shares is None:
        return rows
    to = _copied(part.to.to(rows.device), len(rows))
    rows = rows * _copied(part.shares.to(rows), len(rows))
    placed = rows.new_zeros(len(rows), n + 1)
    return placed.scatter_add_(1, torch.where(to < 0, n, to), rows)[:, :n]


def _copied(per_example: Tensor, count: int) -> Tensor:
    """(B or 1, ...) for `count` examples, which are copies of the batch one after the other."""
    if len(per_example) == 1:
        return per_example.expand(count, *per_example.shape[1:])
    return per_example.repeat(count // len(per_example), *[1] * (per_example.ndim - 1))
