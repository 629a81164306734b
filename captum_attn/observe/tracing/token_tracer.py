"""The tracer: at which position does each upstream token, pixel, word or region enter?

Autograd answers. Let s_p = <t_p, r_p> for the rows t_p of a tensor and random r_p (one r for all
would vanish behind a norm over p). The gradients of Σ_p s_p and of Σ_p ±s_p at an upstream element
have the ratio ±1 if the element enters one position only, and with the sign given by bit k of p
that ratio is bit k of the position. About log2(n) backward passes through a norm and a projection
read the whole map, whatever the model does on the way; two of them, the second with a random factor
for each position, check that it is the identity. Where the graph proves that (`in_place`), nothing
is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_attn.observe.tracing.autograd_graph import gradients
from captum_attn.observe.tracing.in_place import InPlace, Reader
from captum_attn.observe.tracing.sign_codes import (
    PositionDecoder,
    enters_at,
    factor_of,
    is_identity,
    mostly_mixed,
    repeated_positions,
    sign_of,
    tolerance,
    vanishes,
)
from captum_attn.observe.tracing.token_map import IDENTITY, Downstream, TokenMap, Upstream

# Random codes by which a map that is likely is confirmed.
_DRAWS = 3
_SQUARE_UNDERFLOWS = 1e-15


@dataclass(frozen=True)
class Spread:
    """How the elements of a tensor enter the indices of an axis of a later one.

    Args:
        in_one (float): the share of elements, of those that enter, that enter one index only.
        axes (set of int): along which of their own axes the index changes.
    """

    in_one: float
    axes: frozenset[int]

    @staticmethod
    def of(plain: Tensor | None, coded: Tensor | None, code: Tensor) -> Spread:
        if plain is None or coded is None:
            return Spread(0.0, frozenset())
        index, single = factor_of(plain[..., None], coded[..., None], code)
        single &= ~vanishes(plain[..., None])
        highest, lowest = torch.where(single, index, -1), torch.where(single, index, len(code))
        axes = [a for a in range(plain.ndim) if (highest.amax(a) > lowest.amin(a)).any()]
        entered = (plain != 0).sum().clamp_min(1)
        return Spread(float(single.sum() / entered), frozenset(axes))


class TokenTracer:
    """Asks autograd for token maps, with random numbers of its own.

    Args:
        cuts (sequence of graph nodes): the outputs of attention calls, which no map leads through.
        in_place (InPlace, optional): what proves that tokens stay in place, without a question.
    """

    def __init__(
        self, cuts: Sequence[Any] = (), seed: int = 0, in_place: InPlace | None = None
    ) -> None:
        self._cuts, self._in_place = cuts, in_place
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, like: Tensor, *shape: int) -> Tensor:
        """Normal numbers of a generator of its own, on the device and in the dtype of `like`."""
        return torch.randn(shape, generator=self._generator).to(like)

    def _signs(self, like: Tensor, *shape: int) -> Tensor:
        signs = torch.randint(2, shape, generator=self._generator) * 2 - 1
        signs.view(-1)[:2] = torch.tensor([1, -1])[: signs.numel()]  # both signs occur
        return signs.to(like)

    def _factors(self, like: Tensor, *shape: int) -> Tensor:
        """Random factors, ±0.5 to ±1.5: as signs alone they would be alike at half the places."""
        size = 0.5 + torch.rand(shape, generator=self._generator)
        return self._signs(like, *shape) * size.to(like)

    def _exact_factors(self, like: Tensor, *shape: int) -> Tensor:
        """Signed powers of two: they scale without rounding, also what nearly cancels out."""
        size = 2.0 ** torch.randint(-3, 4, shape, generator=self._generator)
        return self._signs(like, *shape) * size.to(like)

    def coded_by_example(
        self, like: Tensor, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A factor for each example, (B,), a random tensor of a shape, and one times the other."""
        code, vector = self._exact_factors(like, shape[0]), self.random(like, *shape)
        return code, vector, vector * code.view(-1, *[1] * (len(shape) - 1))

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
        if upstreams and all(self.stays(down.edge, down.read, u) for u in upstreams):
            return [IDENTITY for _ in upstreams]
        for maps in likely:
            if self._confirmed(down, upstreams, maps):
                return maps
        first = self._maps(down, upstreams)
        if not any(m.to is not None and (m.to < 0).any() for m in first):
            return first
        second = self._maps(down, upstreams)  # confirms that a token enters nowhere
        for one, two in zip(first, second, strict=True):
            if one.to is not None and two.to is not None:
                one.to = torch.where(one.to < 0, two.to, one.to)
        return first

    def stays(self, end: Tensor | GradientEdge, read: Reader, upstream: Upstream) -> bool:
        """Whether it is certain that every element enters the position of its own index, if any.

        Args:
            end (Tensor or GradientEdge): where the positions are.
            read (callable): what the axes there hold -> what the positions are, see `in_place`.
        """
        ends = (end, upstream.edge)
        if self._in_place is None or upstream.axes is None:
            return False
        if any(isinstance(e, Tensor) and not e.requires_grad for e in ends):
            return False
        last, first = (get_gradient_edge(e) if isinstance(e, Tensor) else e for e in ends)
        return self._in_place.proves(last, read, first, upstream.axes)

    def _confirmed(
        self, down: Downstream, upstreams: Sequence[Upstream], maps: Sequence[TokenMap]
    ) -> bool:
        """Whether the elements enter where these maps say, and nowhere else."""
        batch, places, features = down.shape
        if not all(u.batched for u in upstreams):
            return False
        if any(m.to is None or m.copies or m.mixed for m in maps):
            return False
        probe_vector = self.random(down.like, 1, places, features).expand(down.shape)
        edges = [upstream.edge for upstream in upstreams]
        plain: list[Tensor] = []
        for draw in range(1 + _DRAWS):  # the first is the plain one
            code = self._exact_factors(down.like, batch, places) if draw else None
            vector = down.placed(probe_vector if code is None else probe_vector * code[..., None])
            found = gradients([(down.edge, vector)], edges, self._cuts)
            if any(g is None for g in found):
                return False
            arrived = [u.rows(g) for u, g in zip(upstreams, found, strict=True) if g is not None]
            if code is None:
                plain = arrived
            elif not all(
                m.to is not None and enters_at(p, g, m.to, code)
                for p, g, m in zip(plain, arrived, maps, strict=True)
            ):
                return False
        return True

    def is_identity(self, rows: Tensor, upstream: Upstream) -> bool:
        """Whether every element of an upstream enters the position of its own index, and no other.

        Two backward passes, for whole maps see `maps`.
        """
        code = self._factors(rows, *rows.shape[:2])
        probe_vector = self.random(rows, 1, *rows.shape[1:]).expand_as(rows)
        found = [
            gradients([(rows, vector)], [upstream.edge], self._cuts)[0]
            for vector in (probe_vector, probe_vector * code[..., None])
        ]
        if found[0] is None or found[1] is None:
            return False
        return is_identity(upstream.rows(found[0]), upstream.rows(found[1]), code)

    def _maps(self, down: Downstream, upstreams: Sequence[Upstream]) -> list[TokenMap]:
        batch, places, features = down.shape
        rows = down.like
        probe_vector = self.random(rows, 1, places, features).expand(down.shape)
        edges = [upstream.edge for upstream in upstreams]

        sizes = [1.0] * len(upstreams)

        def seen(code: Tensor) -> list[Tensor | None]:  # code: (B or 1, P)
            vector = down.placed(probe_vector * code[..., None])
            found = gradients([(down.edge, vector)], edges, self._cuts)
            return [
                None if g is None else u.rows(g) * size
                for u, g, size in zip(upstreams, found, sizes, strict=True)
            ]

        def seen_at(i: int, code: Tensor) -> Tensor | None:
            return seen(code)[i]

        plain = seen(rows.new_ones(1, places))
        sizes = [_to_order_one(p) for p in plain]
        if any(size != 1 for size in sizes):
            plain = seen(rows.new_ones(1, places))
        shared = batch > 1 and not all(u.batched for u in upstreams)
        code = self._factors(rows, 1 if shared else batch, places)
        if all(
            p is not None and c is not None and is_identity(p, c, code)
            for p, c in zip(plain, seen(code), strict=True)
        ):
            return [IDENTITY for _ in upstreams]
        coded = seen(self._signs(rows, 1 if shared else batch, places))
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
            read = seen((index >> bit & 1).to(rows) * 2 - 1)
            for decoder, gradient in zip(decoders, read, strict=True):
                decoder.read(bit, gradient)
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

    def by_example(self, rows: Tensor, axis: int, upstreams: Sequence[Upstream]) -> bool | None:
        """Whether every upstream token enters its own example's index of `axis`, and no other.

        Returns:
            bool or None: None where none was seen to enter anywhere.
        """
        code = self._exact_factors(rows, rows.shape[axis])
        entered = False
        for p, c in self._plain_and_coded(rows, code, axis, upstreams):
            if len(p) != len(code):
                return False
            off = (c - p * code.view(-1, 1, 1).to(p)).norm(dim=-1) > tolerance(p) * p.norm(dim=-1)
            zero = vanishes(p)
            if bool((off & ~zero).any()):
                return False
            entered = entered or not bool(zero.all())
        return True if entered else None

    def any_enters(
        self,
        rows: Tensor | Downstream,
        upstreams: Sequence[Upstream],
        inside: Tensor | None = None,
    ) -> bool:
        """Whether any upstream token enters anywhere: "none does" is not "not observed".

        Args:
            inside (Tensor, optional): (B, P), the positions that count; None: all.
        """
        edges = [upstream.edge for upstream in upstreams]
        if not edges or isinstance(rows, Tensor) and not rows.requires_grad:
            return False
        down = Downstream.rows(rows) if isinstance(rows, Tensor) else rows
        vector = self.random(down.like, *down.shape)
        if inside is not None:
            vector = vector * inside.to(vector)[..., None]
        found = gradients([(down.edge, down.placed(vector))], edges, self._cuts)
        return any(g is not None and bool(g.any()) for g in found)

    def share_in_one(self, rows: Tensor, axis: int, upstreams: Sequence[Upstream]) -> float | None:
        """The share of upstream tokens, of those that enter, that enter one index of `axis` only.

        Returns:
            float or None: None where none was seen to enter anywhere.
        """
        code = self._factors(rows, rows.shape[axis])
        single, entered = 0, 0
        for p, c in self._plain_and_coded(rows, code, axis, upstreams):
            alone, enters = factor_of(p, c, code)[1], ~vanishes(p)
            single, entered = single + int((alone & enters).sum()), entered + int(enters.sum())
        return single / entered if entered else None

    def spread(self, rows: Tensor, axes: Sequence[int], edges: Sequence[Any]) -> list[list[Spread]]:
        """For each of these axes of `rows` how the elements at each edge enter its indices."""
        probe_vector = self.random(rows, *rows.shape)
        plain = gradients([(rows, probe_vector)], edges, self._cuts)
        found = []
        for axis in axes:
            code = self._factors(rows, rows.shape[axis])
            along = code.view([-1 if a == axis else 1 for a in range(rows.ndim)])
            coded = gradients([(rows, probe_vector * along)], edges, self._cuts)
            found.append([Spread.of(*pair, code) for pair in zip(plain, coded, strict=True)])
        return found

    def reached_axes(self, rows: Tensor, edges: Sequence[Any]) -> list[frozenset[int]]:
        """The axes of each edge's tensor of which one row of `rows` does not see every index.

        Tokens lie along these, also where a row sees its neighbours (pooled or convolved queries).
        """
        probe_vector = torch.zeros_like(rows)
        middle = rows.shape[-2] // 2
        probe_vector[..., middle, :] = self.random(rows, *rows.shape[:-2], rows.shape[-1])
        found = gradients([(rows, probe_vector)], edges, self._cuts)
        return [frozenset() if g is None else _partly_zero(g) for g in found]

    def mixes(self, edge: Any, shape: tuple[int, ...], before: Any, like: Tensor) -> bool:
        """Whether each element of `before` enters all indices of a single axis of an operation.

        Args:
            edge: the operation's output.
            shape (tuple of int): its shape.
            before: what the operation was given.
            like (Tensor): of its dtype and device.
        """

        def found(vector: Tensor) -> Tensor | None:
            return gradients([(edge, vector)], [before], self._cuts)[0]

        probe_vector = self.random(like, *shape)
        plain, spread = found(probe_vector), []
        for axis, size in enumerate(shape):
            code = self._factors(like, size)
            along = code.view([-1 if a == axis else 1 for a in range(len(shape))])
            in_one = Spread.of(plain, found(probe_vector * along), code).in_one
            spread += [axis] if size > 1 and in_one < 0.95 else []
        if len(spread) != 1:
            return False
        one = torch.zeros_like(probe_vector)
        one.select(spread[0], shape[spread[0]] // 2).fill_(1.0)
        seen = found(one * probe_vector)
        return seen is not None and plain is not None and bool(((seen != 0) == (plain != 0)).all())

    def _plain_and_coded(
        self, rows: Tensor, code: Tensor, axis: int, upstreams: Sequence[Upstream]
    ) -> list[tuple[Tensor, Tensor]]:
        """Gradients of Σ s and Σ c s at each upstream, c the code of the index of `axis`."""
        if not upstreams:
            return []
        edges = [upstream.edge for upstream in upstreams]
        probe_vector = self.random(rows, *rows.shape)
        shape = [1] * rows.ndim
        shape[axis] = -1
        plain = gradients([(rows, probe_vector)], edges, self._cuts)
        coded = gradients([(rows, probe_vector * code.view(shape))], edges, self._cuts)
        return [
            (upstream.rows(p) * _to_order_one(p), upstream.rows(c) * _to_order_one(p))
            for upstream, p, c in zip(upstreams, plain, coded, strict=True)
            if p is not None and c is not None
        ]


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


def _to_order_one(gradient: Tensor | None) -> float:
    """What brings a gradient whose square underflows (weights near zero) to the order of one."""
    if gradient is None or gradient.dtype not in (torch.float32, torch.bfloat16):
        return 1.0
    largest = float(gradient.abs().max()) if gradient.numel() else 0.0
    return 1 / largest if _SQUARE_UNDERFLOWS > largest > torch.finfo(torch.float32).tiny else 1.0


def _partly_zero(tensor: Tensor) -> frozenset[int]:
    """The axes at some index of which everything is zero."""
    by_axis = [(tensor != 0).movedim(axis, 0).reshape(n, -1) for axis, n in enumerate(tensor.shape)]
    return frozenset(axis for axis, seen in enumerate(by_axis) if not bool(seen.any(1).all()))
