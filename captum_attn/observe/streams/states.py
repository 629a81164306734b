"""Token streams and their versions: what a state of the tokens is made of.

A *source* is a set of tokens that relevance is expressed in, with the inputs that enter them. A
*state* is one version of a token stream: born from a source, updated by an attention call, gathered
from earlier states, or merged from parallel branches. The states of a run form a directed graph in
the order of execution; every propagation rule walks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.tracing.mixing import Mixing


@dataclass(eq=False)
class InputMap:
    """How an input's elements enter the tokens of a source.

    Args:
        leaf (Leaf): the input.
        to (Tensor or None): (B or 1, E) token of each element, -1 for none; None: the identity.
        shape (tuple of int): the E elements' own axes, (n,) for the rows of an embedding.
        axes (tuple of (int or None) or None): where the elements are those of a coarser feature
            map, the axis of the leaf's elements that each of `shape`'s axes runs along; None for
            one whose every token sees all of the input.
        box (tuple of (int, int) or None): the range along each of the elements' axes that such a
            feature map sees; None: all of it.
        moving (bool): the places depend on the content of the inputs.
        mixing (Mixing or None): where no element and no cell of a feature map enters one token
            only, T[i, j], how strongly token i depends on element j; `to` says nothing then.
        notes (dict): what was worked out from the places, kept as long as their map is.
    """

    leaf: Leaf
    to: Tensor | None
    shape: tuple[int, ...]
    axes: tuple[int | None, ...] | None = None
    box: tuple[tuple[int, int], ...] | None = None
    moving: bool = False
    mixing: Mixing | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def of_input(self) -> bool:
        """Whether its elements can be found in the input (positions counted from a mask cannot)."""
        return self.leaf.known


@dataclass(eq=False)
class Source:
    """Tokens that relevance is expressed in.

    Args:
        name (str): the name of the inputs they grow from.
        n (int): number of tokens per example.
        entries (list of InputMap): the inputs that enter them.
    """

    name: str
    n: int
    entries: list[InputMap] = field(default_factory=list)


@dataclass(eq=False)
class State:
    """One version of a token stream.

    Args:
        stream (str): the stream's name.
        n (int): number of tokens per example.
    """

    stream: str
    n: int

    @property
    def before(self) -> tuple[State, ...]:
        """The states that this one is made of."""
        return ()


@dataclass(eq=False)
class InitialState(State):
    """The first version of a stream: R[s, s] = I."""

    source: Source


@dataclass(eq=False)
class LearnedState(State):
    """Tokens of no stream: learned prefixes, `bias_k`. Relevance that reaches them ends there."""


@dataclass(eq=False)
class Part:
    """Rows of an earlier state in a gathered one.

    Args:
        state (State): where they come from.
        to (Tensor or None): (B or 1, n_from) their new position, -1 for none; None: identity.
    """

    state: State
    to: Tensor | None

    @cached_property
    def shares(self) -> Tensor | None:
        """What a row contributes to its new position, like `to`; None where `to` is the identity.

        BlockRow that meet (patches that are merged, keys that are pooled) have equal shares of 1.
        """
        if self.to is None:
            return None
        index = self.to + 1  # 0: no position
        met = torch.zeros(len(index), int(index.max()) + 1, device=index.device)
        met.scatter_add_(1, index, torch.ones_like(index, dtype=met.dtype))
        return (index > 0) / met.gather(1, index)


@dataclass(eq=False)
class RearrangedState(State):
    """Rows of other states, moved (a permutation, a join, a merge); those of several are added."""

    parts: tuple[Part, ...]

    @property
    def before(self) -> tuple[State, ...]:
        return tuple(part.state for part in self.parts)


@dataclass(eq=False)
class MixedState(State):
    """Tokens mixed by something else than attention, R = Σ T_k R_k; rows of all T_k sum to 1.

    Args:
        parts (tuple of State): the states that are mixed.
        mixing (Mixing): T, with a member for each of them.
        by (tuple of str): what mixes them, for people.
    """

    parts: tuple[State, ...]
    mixing: Mixing
    by: tuple[str, ...] = ()

    @property
    def before(self) -> tuple[State, ...]:
        return self.parts


@dataclass(eq=False)
class ParallelState(State):
    """Parallel branches of one version, x + f(x) + g(x): R = R_base + sum(R_i - R_base)."""

    base: State
    branches: tuple[State, ...]

    @property
    def before(self) -> tuple[State, ...]:
        return (self.base, *self.branches)


@dataclass(eq=False)
class AttentionState(State):
    """A stream after an attention call that asked from `query_state` and read `key_state`."""

    call: AttentionCall
    query_state: State
    key_state: State
    number: int  # counts the attention calls of the stream, from 0

    @property
    def before(self) -> tuple[State, ...]:
        return (self.query_state, self.key_state)


def streams_of(state: State) -> tuple[str, ...]:
    """The streams that a state's rows belong to: several for joined keys, none for constants."""
    if isinstance(state, LearnedState):
        return ()
    if isinstance(state, (RearrangedState, MixedState)):
        found = [name for before in state.before for name in streams_of(before)]
        return tuple(dict.fromkeys(found))
    return (state.stream,)


def joined_name(streams: Iterable[str]) -> str:
    """The name of streams in one sequence: every input's name once, joined with +."""
    return "+".join(dict.fromkeys(name for stream in streams for name in stream.split("+")))


def ancestry(states: list[State]) -> Iterator[State]:
    """Every state that goes into `states`, each after all that it is made of."""
    done: set[int] = set()
    stack = list(reversed(states))
    while stack:
        state = stack[-1]
        waiting = [s for s in state.before if id(s) not in done]
        if id(state) in done:
            stack.pop()
        elif waiting:
            stack.extend(waiting)
        else:
            done.add(id(stack.pop()))
            yield state
