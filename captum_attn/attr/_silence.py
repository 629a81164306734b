"""Never silently empty: inputs that got no relevance although the explained output depends on them.

An input may enter by another way than as tokens that attention reads (a condition that scales the
features, a second tower without attention), or by attention that could not be seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor

from captum_attn.attr._inputs import Inputs
from captum_attn.attr._run import Run
from captum_attn.errors import OptionError, WiringError
from captum_attn.observe import Observation
from captum_attn.observe.streams.states import InitialState, ancestry, streams_of


def check_heard(
    run: Run, found: Mapping[str, Tensor | None], inputs: Inputs, shows_calls: bool
) -> None:
    """Names the inputs without relevance that the explained output has a gradient for.

    Inputs that are added to another one's tokens (`token_type_ids`) share that one's relevance.

    Args:
        found (Mapping): name of an input -> its attribution, or the relevance of its tokens; None:
            it entered no token stream.
        inputs: as the user gave them.
        shows_calls (bool): whether the method shows single attention calls, see `Result`.

    Raises:
        OptionError: if no input got anything, because a call that leads to it does not count.
        WiringError: if no input got anything, because none's tokens are read.
    """
    silent = [name for name, laid in found.items() if laid is None or not bool(laid.any())]
    if not isinstance(run.observation, Observation):  # relevance of the elements themselves
        return
    none_heard = not any(laid is not None and bool(laid.any()) for laid in found.values())
    silent = [name for name in silent if _is_connected(run, name)]
    if not silent:
        return
    depended_on = run.depended_on(inputs)
    silent = [name for name in silent if name in depended_on]
    if not silent:
        return
    entered = {name for name in silent if _enters(run, name)}
    reasons = [_reason(name in entered, shows_calls) for name in silent]
    message = (
        f"{', '.join(map(repr, silent))} got no relevance although the explained output depends "
        f"on it: {'; '.join(dict.fromkeys(reasons))}"
    )
    all_count = all(run.counts(state.call) for state in run.attention_states)
    if none_heard and not shows_calls:  # these zeros are no finding about the model
        if not all_count and entered:
            raise OptionError(_left_out(run, silent))
        if all_count and not entered:
            raise WiringError(f"{message}; explain it with a method that needs no tokens")
    warnings.warn(message, stacklevel=3)


def _left_out(run: Run, silent: list[str]) -> str:
    """Says which call that does not count would have brought anything of an input."""
    out = [state for state in run.attention_states if not run.counts(state.call)]
    across = [s for s in out if s.stream not in streams_of(s.key_state)] or out
    return (
        f"{', '.join(map(repr, silent))} got no relevance: `layers` or `start_layer` leave out "
        f"{', '.join(dict.fromkeys(repr(s.call.module) for s in across))}, by which alone the "
        "tokens that the output reads have anything of it; let these calls count, too"
    )


def name_others(inputs: Inputs) -> None:
    """Names the entries of a Mapping that hold numbers in no tensor: they get no relevance."""
    if not isinstance(inputs, Mapping):
        return
    others = [n for n, value in inputs.items() if not isinstance(value, (Tensor, Number))]
    others = [name for name in others if _holds_numbers(inputs[name])]
    if others:
        warnings.warn(
            f"{', '.join(map(repr, others))}: what holds numbers in another form than a tensor (a "
            "list, an array, a dict of its own) has no entry in the result; pass tensors, "
            "`torch.as_tensor(...)`, as entries of the Mapping itself",
            stacklevel=3,
        )


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(value.size) and np.issubdtype(value.dtype, np.number)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_numbers, value))
    return isinstance(value, (Tensor, Number)) and not isinstance(value, bool)


def _is_connected(run: Run, name: str) -> bool:
    """Whether there is any way from an input to the output, on which it has no other's tokens."""
    seen = run.observation
    leaves = [leaf for leaf in seen.tap.leaves if leaf.name == name]
    if not leaves or name in seen.wiring.stream_builder.added:
        return False
    graph = seen.graph
    reached = graph.reach(None if seen.root.edge is None else seen.root.edge.node)
    for call in reversed(seen.tap.calls):  # through what a call asks, and what it reads
        if reached & graph.bit[call]:
            reached |= graph.reach(call.q) | graph.reach(call.k) | graph.reach(call.v)
    return any(reached & graph.bit[leaf] for leaf in leaves)


def _enters(run: Run, name: str) -> bool:
    """Whether an input's tokens are among those that what is read was made of."""
    sources = [
        state.source for state in ancestry(list(run.weights)) if isinstance(state, InitialState)
    ]
    return any(entry.leaf.name == name for source in sources for entry in source.entries)


def _reason(entered: bool, shows_calls: bool) -> str:
    if entered and shows_calls:
        return (
            "the attention calls that are shown read other tokens; AttentionRollout and "
            "GenericAttention follow the tokens further down"
        )
    if entered:
        return (
            "whatever reaches its tokens from those that the output reads is 0 or counts against "
            "the target; explain another target, or use a method that counts negative "
            "contributions (HeterogenousAttention with correction='absolute') or none "
            "(AttentionRollout)"
        )
    return "it enters by another way than as tokens that an attention call reads"
