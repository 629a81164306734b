"""Interventions on an observed model: run it again with some keys hidden, or one map replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.intervening import CallChange, Intervening
from captum_attn.observe.observation import Observation
from captum_attn.observe.streams.hidden_keys import hidden_positions
from captum_attn.observe.streams.states import InputMap, Source
from captum_attn.observe.streams.to_inputs import input_order, to_input


def hiding(
    seen: Observation,
    hidden: Mapping[Source, Tensor],
    calls: Iterable[AttentionCall],
    roots: Sequence[nn.Module],
) -> Intervening:
    """While it is entered, no query of the calls sees the keys of hidden tokens.

    Args:
        hidden (Mapping): source -> (B, n) bool, or of copies of the batch one after the other.
        calls (iterable of AttentionCall): in which the tokens are hidden.
    """
    keys = {call: seen.wiring.after(call).key_state for call in calls}
    like = next(iter(hidden.values())).to(dtype=torch.get_default_dtype())
    gone = hidden_positions(dict.fromkeys(keys.values()), hidden, like)
    changes = []
    for call, state in keys.items():
        positions = gone[state]
        if call.packed:  # one sequence holds the tokens of all examples
            positions = positions.any(0, keepdim=True)
        if bool(positions.any()):
            changes.append(CallChange(call, positions.unflatten(1, (call.windows, call.n_k))))
    return Intervening(seen.tap.calls, seen.tap.events, changes, roots)


def replacing(
    seen: Observation,
    maps: Mapping[AttentionCall, Callable[[Tensor], Tensor]],
    roots: Sequence[nn.Module],
) -> Intervening:
    """While it is entered, something else stands for A of some calls.

    Args:
        maps (Mapping): call -> callable, A (B, F, H, q, k) -> what stands for it.
    """
    changes = [CallChange(call, attention=made) for call, made in maps.items()]
    return Intervening(seen.tap.calls, seen.tap.events, changes, roots)


def in_token_order(source: Source, batch: int, chosen: Tensor) -> Tensor:
    """Tokens (B, n) that are told in the order of the inputs, in the model's own order."""
    order = input_order(source, batch)
    if order is None:
        return chosen
    order = order.to(chosen.device).repeat(len(chosen) // batch, 1)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def share_of_tokens(entry: InputMap, n: int, chosen: Tensor, batch: int) -> Tensor | None:
    """Which share of each token's elements is chosen, (B, n); None where the input has none.

    Args:
        entry (InputMap): how the input enters the tokens.
        n (int): the number of tokens.
        chosen (Tensor): bool, of the input's shape.
    """
    numbers = torch.arange(1.0, n + 1, dtype=torch.float64).expand(batch, n)
    inside = to_input(entry, torch.ones_like(numbers), "nearest")  # channels share what is theirs
    if inside.shape != chosen.shape:
        return None
    laid = to_input(entry, numbers, "nearest")
    token = torch.where(inside > 0, laid / torch.where(inside > 0, inside, 1), 0).round().long()
    whole = torch.zeros(batch, n + 1, dtype=torch.float64, device=token.device)
    part = whole.clone()
    index = token.flatten(1)
    whole.scatter_add_(1, index, torch.ones_like(index, dtype=whole.dtype))
    part.scatter_add_(1, index, chosen.to(part).flatten(1))
    return part[:, 1:] / whole[:, 1:].clamp_min(1)
