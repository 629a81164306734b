"""The tracer: at which position does each upstream token, pixel, word or region enter?

Autograd answers. Let s_p = <t_p, r> for the rows t_p of a tensor and a random r. The gradients of
Σ_p s_p and of Σ_p ±s_p at an upstream element have the ratio ±1 if the element enters one position
only, and with the sign given by bit k of p that ratio is bit k of the position. About log2(n)
backward passes through a norm and a projection read the whole map, whatever the model does on the
way; two of them check that it is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_attn.observe.tracing.autograd_graph import gradients
from captum_attn.observe.tracing.sign_codes import (
    PositionDecoder,
    enters_at,
    is_identity,
    mostly_mixed,
    repeated_positions,
    sign_of,
    vanishes,
)
from captum_attn.observe.tracing.token_map import IDENTITY, Downstream, TokenMap, Upstream

# Random codes by which a map that is likely is confirmed.
_DRAWS = 3


class TokenTracer:
    """Asks autograd for token maps, with random numbers of its own.

    Args:
        cuts (sequence of graph nodes): the outputs of attention calls, which no map leads through.
    """

    def __init__(self, cuts: Sequence[Any] = (), seed: int = 0) -> None:
        self._cuts = cuts
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, like: Tensor, *shape: int) -> Tensor:
        """Normal numbers of a generator of its own, on the device and in the dtype of `like`."""
        return torch.randn(shape, generator=self._generator).to(like)

    def _signs(self, like: Tensor, *shape: int) -> Tensor:
        signs = torch.randint(2, shape, generator=self._generator) * 2 - 1
        signs.view(-1)[:2] = torch.tensor([1, -1])[: signs.numel()]  # both signs occur
        return signs.to(like)

    def maps(
        self,
        down: Downstream | Tensor,
        upstreams: Sequence[Upstream],
        likely: Iterable[list[TokenMap]] = (),
    ) -> list[TokenMap]:
        """Maps the elements of each upstream to the positions P of `down`, (B, P, features).

        Args:
            likely (iterable of list of TokenMap): what the maps may be, tried first.
        """
        if isinstance(down, Tensor):
            down = Downstream.rows(down)
        for maps in likely:
            if self._confirmed(down, upstreams, maps):
                return maps
        first = self._maps(down, upstreams)
        if not any(m.to is not None and (m.to < 0).any() for m in first):
            return first
        second = self._maps(down, upstreams)  # entering nowhere is believed the second time
        for one, two in zip(first, second, strict=True):
            if one.to is not None and two.to is not None:
                one.to = torch.where(one.to < 0, two.to, one.to)
        return first

    def _confirmed(
        self, down: Downstream, upstreams: Sequence[Upstream], maps: Sequence[TokenMap]
    ) -> bool:
        """Whether the elements enter where these maps say, and nowhere else."""
        batch, places, features = down.shape
        if not all(u.batched for u in upstreams):
            return False
        if any(m.to is None or m.copies or m.mixed for m in maps):
            return False
        probe_vector = self.random(down.like, 1, 1, features).expand(down.shape)
        edges = [upstream.edge for upstream in upstreams]
        plain: list[Tensor] = []
        for draw in range(1 + _DRAWS):  # the first is the plain one
            signs = self._signs(down.like, batch, places) if draw else None
            vector = down.placed(probe_vector if signs is None else probe_vector * signs[..., None])
            found = gradients([(down.edge, vector)], edges, self._cuts)
            if any(g is None for g in found):
                return False
            arrived = [u.rows(g) for u, g in zip(upstreams, found, strict=True) if g is not None]
            if signs is None:
                plain = arrived
            elif not all(
                m.to is not None and enters_at(p, g, m.to, signs)
                for p, g, m in zip(plain, arrived, maps, strict=True)
            ):
                return False
        return True

    def is_identity(self, rows: Tensor, upstream: Upstream) -> bool:
        """Whether every element of an upstream enters the position of its own index, and no other.

        Two backward passes, for whole maps see `maps`.
        """
        signs = self._signs(rows, *rows.shape[:2])
        probe_vector = self.random(rows, 1, 1, rows.shape[2]).expand_as(rows)
        found = [
            gradients([(rows, vector)], [upstream.edge], self._cuts)[0]
            for vector in (probe_vector, probe_vector * signs[..., None])
        ]
        if found[0] is None or found[1] is None:
            return False
        return is_identity(upstream.rows(found[0]), upstream.rows(found[1]), signs)

    def _maps(self, down: Downstream, upstreams: Sequence[Upstream]) -> list[TokenMap]:
        batch, places, features = down.shape
        rows = down.like
        probe_vector = self.random(rows, 1, 1, features).expand(down.shape)
        edges = [upstream.edge for upstream in upstreams]

        def seen(code: Tensor) -> list[Tensor | None]:  # code: (B or 1, P)
            vector = down.placed(probe_vector * code[..., None])
            found = gradients([(down.edge, vector)], edges, self._cuts)
            return [None if g is None else u.rows(g) for u, g in zip(upstreams, found, strict=True)]

        def seen_at(i: int, code: Tensor) -> Tensor | None:
            return seen(code)[i]

        plain = seen(rows.new_ones(1, places))
        signs = self._signs(rows, batch, places)
        if batch > 1 and not all(u.batched for u in upstreams):
            signs = signs[:1]
        coded = seen(signs)
        if all(
            p is not None and c is not None and is_identity(p, c, signs)
            for p, c in zip(plain, coded, strict=True)
        ):
            return [IDENTITY for _ in upstreams]
        if all(
            p is not None and c is not None and mostly_mixed(~sign_of(p, c)[1] & ~vanishes(p))
            for p, c in zip(plain, coded, strict=True)
        ):
            return [
                TokenMap(mixed=True, entering=None if p is None else ~vanishes(p)) for p in plain
            ]
        if all(u.batched for u in upstreams):
            index = torch.arange(batch * places, device=rows.device).view(batch, places)
        else:
            index = torch.arange(places, device=rows.device)[None]
        total = int(index.max()) + 1
        del coded
        decoders = [PositionDecoder(p) for p in plain]
        for bit in range(max(1, (total - 1).bit_length())):
            for decoder, code in zip(
                decoders, seen((index >> bit & 1).to(rows) * 2 - 1), strict=True
            ):
                decoder.read(bit, code)
        return [
            _map(decoder, u, places, partial(seen_at, i))
            for i, (decoder, u) in enumerate(zip(decoders, upstreams, strict=True))
        ]

    def entered_positions(self, rows: Tensor, upstream: Upstream) -> Tensor:
        """(B, P): which positions any element of an upstream enters, found by halving."""
        batch, places, features = rows.shape
        inside = torch.zeros(batch, places, dtype=torch.bool, device=rows.device)
        probe_vector = self.random(rows, 1, 1, features).expand(rows.shape)
        ranges = [(0, places)]
        while ranges:
            first, end = ranges.pop()
            code = torch.zeros(1, places, 1, dtype=rows.dtype, device=rows.device)
            code[:, first:end] = 1
            (found,) = gradients([(rows, probe_vector * code)], [upstream.edge], self._cuts)
            if found is None or not bool(found.any()):
                continue
            if end - first == 1:
                inside[:, first] = upstream.rows(found).flatten(1).ne(0).any(1)
            else:
                middle = (first + end) // 2
                ranges += [(first, middle), (middle, end)]
        return inside

    def mean_squares(
        self, rows: Tensor, squared: Sequence[Tensor], leaf: Tensor, draws: int
    ) -> tuple[list[Tensor], Tensor]:
        """Squared gradients at `leaf` of Σ_p a_p <t_p, r_p>, summed over draws of r_p.

        Args:
            squared (sequence of Tensor): (B, P) each, a_p squared, positive at the same positions.

        Returns:
            With each of these a, and with a_p = 1 wherever a_p > 0; all of the leaf's shape.
        """
        codes = [*(one.sqrt() for one in squared), squared[0] > 0]
        sums = [torch.zeros_like(leaf) for _ in codes]
        for _ in range(draws):
            probe_vector = self.random(rows, *rows.shape)
            for total, code in zip(sums, codes, strict=True):
                vector = probe_vector * code[..., None].to(rows)
                (found,) = gradients([(rows, vector)], [leaf], self._cuts)
                if found is not None:
                    total += found.square()
        return sums[:-1], sums[-1]

    def follows(
        self, rows: Tensor, axis: int, upstreams: Sequence[Upstream], by_example: bool = False
    ) -> bool:
        """Whether every upstream token enters one index of `axis` only (its own example's)."""
        edges = [upstream.edge for upstream in upstreams]
        probe_vector = self.random(rows, *rows.shape[:-2], 1, rows.shape[-1]).expand_as(rows)
        code = self._signs(rows, rows.shape[axis])
        shape = [1] * rows.ndim
        shape[axis] = -1
        plain = gradients([(rows, probe_vector)], edges, self._cuts)
        coded = gradients([(rows, probe_vector * code.view(shape))], edges, self._cuts)
        entered = False
        for upstream, p, c in zip(upstreams, plain, coded, strict=True):
            if p is None or c is None:
                continue
            p, c = upstream.rows(p), upstream.rows(c)
            ratio, single = sign_of(p, c)
            zero = vanishes(p)
            if not bool((single | zero).all()):
                return False
            if by_example and not bool(((ratio * code[:, None].to(ratio) > 0) | zero).all()):
                return False
            entered = entered or not bool(zero.all())
        return entered


def _map(
    decoder: PositionDecoder,
    upstream: Upstream,
    places: int,
    seen: Callable[[Tensor], Tensor | None],
) -> TokenMap:
    """The map of one upstream, whose gradients for every bit of the position have been read."""
    plain = decoder.plain
    if plain is None:
        return TokenMap(torch.full((1, 1), -1))
    position, mixed = decoder.positions(places, upstream.batched)
    if not bool(mixed.any()):
        in_place = torch.arange(places, device=position.device)
        ordinary = position.shape[1] == places and bool((position == in_place).all())
        return IDENTITY if ordinary else TokenMap(position)
    entering = ~vanishes(plain)
    if mostly_mixed(mixed):
        return TokenMap(mixed=True, entering=entering)

    def enters(first: int, end: int) -> Tensor:
        code = plain.new_zeros(1, places)
        code[:, first:end] = 1
        found = seen(code)
        return torch.zeros_like(mixed) if found is None else ~vanishes(found, plain)

    def own_example_only() -> bool:
        signs = torch.ones_like(plain[:, :1, 0])
        signs[1::2] = -1
        found = seen(signs.expand(-1, places))
        if found is None:
            return False
        ratio, single = sign_of(plain, found)
        return bool((single & (ratio * signs > 0) | vanishes(plain)).all())

    if upstream.repeats and own_example_only():
        found = repeated_positions(enters, position, mixed, places)
        if found is not None:
            return TokenMap(found[0], tuple(found[1:]))
    return TokenMap(mixed=True, partial=position, entering=entering)
