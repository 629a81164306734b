"""Where tokens and elements enter an operand, example by example, packed or not.

The rows of a *packed* tensor (patches of all images of a batch, one after the other) are not those
of one example each: the example is the one whose tokens they enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.tracing.token_map import IDENTITY, Downstream, TokenMap, Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer


class RowsAreNotExamples(Exception):
    """The rows of these leaves were taken for examples, and are none.

    Args:
        leaves (sequence of Leaf): float inputs.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        super().__init__([leaf.name for leaf in leaves])
        self.leaves = leaves


def entering(
    tracer: TokenTracer,
    rows: Tensor | Downstream,
    upstreams: Sequence[Upstream],
    batch: int,
    likely: Iterable[list[TokenMap]] = (),
) -> list[TokenMap]:
    """Maps of the upstreams' elements to the positions of `rows`, (B, P, features).

    Args:
        rows (Tensor or Downstream): (1, P, features) where the operand is packed.
        batch (int): number of examples B.

    Returns:
        list of TokenMap: `to` is (B or 1, E); of packed elements that enter the tokens of examples
            it has a row for each example, -1 in those of the others.
    """
    packed = any(upstream.packed for upstream in upstreams)
    count, places = rows.shape[:2]
    if count == batch and not packed:
        return tracer.maps(rows, upstreams, likely)
    down = Downstream.rows(rows) if isinstance(rows, Tensor) else rows
    flat = tracer.maps(down.flattened(), [u.flattened() for u in upstreams])
    return [
        _by_example(token_map, upstream, count, places, batch)
        for token_map, upstream in zip(flat, upstreams, strict=True)
    ]


def crossing(tracer: TokenTracer, rows: Tensor, upstream: Upstream) -> bool:
    """Whether the elements enter one position each, but not all in their own example."""
    flat = rows.flatten(0, 1)[None]
    (token_map,) = tracer.maps(flat, [replace(upstream.flattened(), repeats=False)])
    return not token_map.mixed and not token_map.copies


def _by_example(
    token_map: TokenMap, upstream: Upstream, rows: int, places: int, batch: int
) -> TokenMap:
    if token_map.mixed and token_map.partial is None:
        return token_map
    found = [_split(to, upstream, rows, places, batch) for to in token_map.places]
    partial = token_map.partial
    split = None if partial is None else _split(partial, upstream, rows, places, batch)
    own = [to for to in found if to is not None]
    if len(own) < len(found):
        return TokenMap(mixed=True, entering=token_map.entering)
    in_place = torch.arange(places, device=own[0].device)
    ordinary = not token_map.mixed and len(own) == 1 and own[0].shape[1] == places
    if ordinary and torch.equal(own[0], in_place.expand_as(own[0])):
        return IDENTITY
    return replace(token_map, to=own[0], copies=tuple(own[1:]), partial=split)


def _split(
    to: Tensor | None, upstream: Upstream, rows: int, places: int, batch: int
) -> Tensor | None:
    """(1, all elements) -> all positions, to (B or 1, E) -> P; None if examples cross."""
    if to is None:
        size = rows * places
        to = torch.arange(size)[None]
    if rows == 1:
        return to if upstream.packed else to.view(batch, -1)
    example, position = to // places, to % places
    own = torch.arange(batch, device=to.device)[:, None]
    if upstream.packed:
        return torch.where((example == own) & (to >= 0), position, -1)
    example, position, to = (t.view(batch, -1) for t in (example, position, to))
    if not bool(((example == own) | (to < 0)).all()):
        return None
    return torch.where(to < 0, -1, position)
