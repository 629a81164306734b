"""Which attention calls count: those of `layers`, from `start_layer` on."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from captum_attn._checks import shown
from captum_attn.errors import OptionError
from captum_attn.observe.streams.states import AttentionState, State

if TYPE_CHECKING:
    from captum_attn.attr._run import Run

Layers = nn.Module | str | Sequence[nn.Module | str]


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


def check_layers(layers: Any) -> None:
    """Refuses what names no modules."""
    if layers is None or isinstance(layers, (str, nn.Module)):
        return
    listed = isinstance(layers, Collection) and not isinstance(layers, (Tensor, Mapping, bytes))
    if not listed or not all(isinstance(layer, (str, nn.Module)) for layer in layers):
        raise OptionError(
            "layers: expected a module, a pattern of names such as 'encoder.*', a list of them, or "
            f"None for all; got {shown(layers)}"
        )


def matches(module: str, layers: Layers | None, roots: Sequence[nn.Module]) -> bool:
    """Whether an attention call in `module` belongs to `layers` (modules or name patterns)."""
    if layers is None:
        return True
    patterns: list[str] = []
    for layer in [layers] if isinstance(layers, (str, nn.Module)) else layers:
        if isinstance(layer, str):
            patterns.append(layer)
        else:
            patterns += [name for root in roots for name, m in root.named_modules() if m is layer]
    return any(
        pattern in ("", module)
        or module.startswith(f"{pattern}.")
        or fnmatch.fnmatchcase(module, pattern)
        for pattern in patterns
    )


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
