"""Which attention calls count: those of `layers`, from `start_layer` on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from captum_attn.errors import OptionError
from captum_attn.observe.layers import Layers, check_layers, matches
from captum_attn.observe.streams.states import AttentionState, State

if TYPE_CHECKING:
    from captum_attn.attr._run import Run

__all__ = ["Layers", "active_calls", "calls_of_layer", "check_layers", "matches"]


def active_calls(
    updates: Sequence[AttentionState],
    layers: Layers | None,
    roots: Sequence[nn.Module],
    start_layer: int,
) -> set[int]:
    """Indices of the calls that count: those of `layers`, from `start_layer` on in their stream."""
    chosen = [u for u in updates if matches(u.call.module, layers, roots)]
    if not chosen:
        names = sorted({u.call.module for u in updates})
        raise OptionError(f"layers={layers!r} matches none of the attention calls: {names}")
    active = {u.call.index for u in chosen if u.number >= start_layer}
    if not active:
        raise OptionError(
            f"start_layer: expected less than {max(u.number for u in updates) + 1}, the number "
            f"of attention calls of the longest stream; got {start_layer}"
        )
    return active


def calls_of_layer(
    run: Run[Any], state: State, layer: int | str | nn.Module, roots: Sequence[nn.Module]
) -> list[AttentionState]:
    """The calls of a state's stream that `layer` chooses: by its place, a module or a pattern.

    -1: the last within the stream, and the last to every other stream.
    """
    calls = [made for made in run.calls_into([state]) if made.stream == state.stream]
    if not calls:
        raise OptionError(
            f"no attention call of {state.stream!r} is left to be shown: expected `layers` and "
            "`start_layer` that let one in"
        )
    if layer == -1:
        return run.last_calls(state)
    if isinstance(layer, int):
        if not -len(calls) <= layer < len(calls):
            raise OptionError(
                f"layer: expected an int in [-{len(calls)}, {len(calls)}), got {layer}"
            )
        return [calls[layer]]
    calls = [made for made in calls if matches(made.call.module, layer, roots)]
    if not calls:
        raise OptionError(f"layer={layer!r} matches no attention call of {state.stream!r}")
    return calls[-1:]
