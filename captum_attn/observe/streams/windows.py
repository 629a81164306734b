"""Tokens folded into windows (windows, frames, channels): in the order of the input again."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_attn.observe.streams.states import InputMap
from captum_attn.observe.tracing.autograd_graph import gradients
from captum_attn.observe.tracing.token_index import earliest
from captum_attn.observe.tracing.token_map import Downstream
from captum_attn.observe.tracing.token_tracer import TokenTracer


def unfolded(
    entries: Sequence[InputMap],
    rows: Tensor | Downstream,
    learned: Sequence[Tensor],
    tracer: TokenTracer,
) -> Tensor | None:
    """Where the tokens of an input are among windows, in the order of the input's elements.

    Positions that no input enters are padding (of windows), unless learned tokens stand there.

    Args:
        entries (sequence of InputMap): the inputs that enter.
        rows (Tensor or Downstream): (B, n, features), all windows in a row.
        learned (sequence of Tensor): the parameters that may stand among them.
        tracer (TokenTracer): for a random vector.

    Returns:
        Tensor or None: (real tokens,); None where the tokens are in place, or differ by example.
    """
    n, to = rows.shape[1], entries[0].to
    if len(entries) > 1 or to is None or entries[0].moving or bool((to != to[0]).any()):
        return None
    elements = to.shape[1]
    first = earliest(_reading_order(entries[0]), to[:1], n)[0]
    padding = first == elements
    if learned and bool(padding.any()):
        down = rows if isinstance(rows, Downstream) else Downstream.rows(rows)
        vector = down.placed(tracer.random(down.like, *down.shape) * padding[:, None])
        if any(g is not None and bool(g.any()) for g in gradients([(down.edge, vector)], learned)):
            return None
    place = first.argsort(stable=True)[: n - int(padding.sum())]
    in_place = len(place) == n and torch.equal(place, torch.arange(n, device=place.device))
    return None if in_place else place


def renumbered(entry: InputMap, place: Tensor, n: int) -> InputMap:
    """The entry with its tokens numbered as they are in `place`."""
    if "renumbered" not in entry.notes:
        number = torch.full((n + 1,), -1, device=place.device)
        number[place] = torch.arange(len(place), device=place.device)
        assert entry.to is not None
        entry.notes["renumbered"] = number[entry.to]  # -1 stays -1
    to = entry.notes["renumbered"]
    return InputMap(entry.leaf, to, entry.shape, entry.axes, entry.box, notes=entry.notes)


def _reading_order(entry: InputMap) -> Tensor:
    """(E,): the number of each element when the axes are in the order of the input's."""
    if not entry.axes:
        return torch.arange(math.prod(entry.shape))
    order = sorted(range(len(entry.axes)), key=lambda a: _last(entry.axes, a))
    steps = torch.arange(math.prod(entry.shape)).view([entry.shape[o] for o in order])
    return steps.permute([order.index(i) for i in range(len(order))]).flatten()


def _last(axes: tuple[int | None, ...] | None, a: int) -> int:
    """The input's axis that the a-th axis of a grid runs along; those along none come last."""
    axis = axes[a] if axes is not None else None
    return sys.maxsize if axis is None else axis
