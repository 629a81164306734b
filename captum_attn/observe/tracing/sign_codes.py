"""Reading positions off gradients: the arithmetic behind the token maps.

A *plain* gradient is that of Σ_p s_p, a *coded* one that of Σ_p ±s_p (or, where a likely position
is confirmed, of Σ_p c_p s_p with random factors c_p: no two positions have the same), both
(B, E, features) for E upstream elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_attn.observe.capture.attention_call import working_dtype

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
_NEAR = 0.1  # of that, for a single number to have one of many factors
_MOST_QUESTIONS = 512
_AT_ONCE = 2**18


def vanishes(found: Tensor, plain: Tensor | None = None) -> Tensor:
    """(B, E): whether a gradient is zero for an element, on the scale of the plain one."""
    norms = _norms(found)
    if not norms.numel():
        return norms > 0
    largest = (norms if plain is None else _norms(plain)).max()
    return norms <= largest * torch.finfo(found.dtype).eps * 1e-2


def sign_of(plain: Tensor, coded: Tensor) -> tuple[Tensor, Tensor]:
    """coded / plain for each element, and whether the element enters one position only."""
    dtype = working_dtype(plain.dtype)
    p, c = plain.to(dtype), coded.to(dtype)
    norms = p.norm(dim=-1)
    ratio = (p * c).sum(-1) / norms.square().clamp_min(torch.finfo(dtype).tiny)
    rest = torch.minimum((c - p).norm(dim=-1), (c + p).norm(dim=-1))
    return ratio, rest <= tolerance(plain) * norms


def factor_of(plain: Tensor, coded: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest factor of the code in coded / plain, and whether it is that one alone, (B, E).

    Signs would not do: of the elements that enter two positions, every second one has the same
    sign at both. Single numbers are multiples of each other, so that the factor itself counts.
    """
    dtype = working_dtype(plain.dtype)
    p, c = plain.to(dtype), coded.to(dtype)
    ratio = sign_of(plain, coded)[0]
    factors, order = code.to(ratio).sort()
    after = torch.searchsorted(factors, ratio.contiguous()).clamp_max(len(factors) - 1)
    before = (after - 1).clamp_min(0)
    lower = (ratio - factors[before]).abs() < (ratio - factors[after]).abs()
    nearest = torch.where(lower, before, after)
    if plain.shape[-1] > 1:
        alone = (c - ratio[..., None] * p).norm(dim=-1) <= tolerance(plain) * p.norm(dim=-1)
    else:
        alone = (ratio - factors[nearest]).abs() <= _NEAR * tolerance(plain)
    return order[nearest], alone


def mostly_mixed(mixed: Tensor) -> bool:
    """Whether most elements enter several positions: then there is no map at all."""
    return bool(mixed.float().mean() > 0.5)


def is_identity(plain: Tensor, coded: Tensor, code: Tensor) -> bool:
    """Whether every element enters the position of its own index, which has the factor (B, P)."""
    if plain.shape[1] != code.shape[1] or bool(vanishes(plain).any()):
        return False
    code = code.to(plain.device)
    for part in _parts(plain):
        p, c = plain[:, part], coded[:, part]
        wanted = p * code[:, part, None]
        if not bool((_norms(c - wanted) <= tolerance(p) * _norms(p)).all()):
            return False
    return True


def enters_at(plain: Tensor, coded: Tensor, to: Tensor, code: Tensor) -> bool:
    """Whether every element enters the position `to`, (B or 1, E), and no other; -1: none."""
    if to.shape[1] != plain.shape[1]:
        return False
    to, code = to.expand(plain.shape[:2]), code.to(plain.device)
    if not torch.equal(to < 0, vanishes(plain)):
        return False
    for part in _parts(plain):
        p, c, t = plain[:, part], coded[:, part], to[:, part]
        wanted = p * code.gather(1, t.clamp_min(0))[..., None]
        if not bool(((_norms(c - wanted) <= tolerance(p) * _norms(p)) | (t < 0)).all()):
            return False
    return True


class PositionDecoder:
    """The position of each element, read bit by bit: no more than one coded gradient is held.

    Args:
        plain (Tensor or None): the plain gradient; None: no element enters anywhere.
    """

    def __init__(self, plain: Tensor | None) -> None:
        self.plain = plain
        if plain is not None:
            self._zero = vanishes(plain)
            self._position = torch.zeros_like(self._zero, dtype=torch.int32)
            self._mixed = torch.zeros_like(self._zero)

    def read(self, bit: int, coded: Tensor | None) -> None:
        """Takes the gradient whose signs are one bit of the position."""
        if self.plain is None:
            return
        for part in _parts(self.plain):
            plain = self.plain[:, part]
            ratio, single = sign_of(plain, plain.new_zeros(()) if coded is None else coded[:, part])
            self._position[:, part] += (ratio > 0).int() << bit
            self._mixed[:, part] |= ~single & ~self._zero[:, part]

    def positions(self, places: int, batched: bool) -> tuple[Tensor, Tensor]:
        """The position of each element, -1 for none, and whether it enters several; (B, E).

        Args:
            places (int): number of positions of one example.
            batched (bool): whether positions count on from one example to the next.
        """
        position, mixed = self._position.long(), self._mixed
        if batched and len(position) > 1:
            example = torch.arange(len(position), device=position.device)[:, None]
            mixed = mixed | (position // places != example) & ~self._zero
            position = position % places
        return position.masked_fill_(self._zero | mixed, -1), mixed


def repeated_positions(
    enters: Callable[[int, int], Tensor], position: Tensor, mixed: Tensor, places: int
) -> list[Tensor] | None:
    """The positions of every element, also of those that are repeated at several.

    Found by halving. Elements that are repeated together ([CLS] of every frame, averaged and put
    before every frame again) share all their positions; where elements share some of them only, or
    share them with an element that enters there alone, tokens are mixed.

    Args:
        enters (callable): (first, end) -> (B, E), whether an element enters positions of a range.
        position, mixed (Tensor): (B, E), as `PositionDecoder.positions` gives them.

    Returns:
        list of Tensor or None: (B, E) each, -1 where an element enters no further position; None
            if the elements are mixed.
    """
    inside = torch.zeros(*mixed.shape, places, dtype=torch.bool, device=mixed.device)
    ranges, questions = [(0, places)], 0
    while ranges:
        first, end = ranges.pop()
        questions += 1
        if questions > _MOST_QUESTIONS:
            return None
        here = enters(first, end) & mixed
        if not bool(here.any()):
            continue
        if end - first == 1:
            inside[..., first] = here
        else:
            middle = (first + end) // 2
            ranges += [(first, middle), (middle, end)]
    for elements, alone in zip(inside, position, strict=True):
        groups = elements[elements.any(-1)].unique(dim=0).sum(0)
        groups[alone[alone >= 0]] += groups[alone[alone >= 0]] > 0
        if bool((groups > 1).any()):
            return None
    count = inside.sum(-1)
    order = inside.long().argsort(dim=-1, descending=True, stable=True)
    found = [order[..., k].masked_fill(count <= k, -1) for k in range(int(count.max()))]
    return [torch.where(mixed, found[0], position), *found[1:]]


def _parts(tensor: Tensor) -> list[slice]:
    """The elements of (B, E, features) in parts that fit the cache: an image has millions."""
    size = max(1, _AT_ONCE // (len(tensor) * tensor.shape[2]))
    return [slice(i, i + size) for i in range(0, tensor.shape[1], size)]


def tolerance(tensor: Tensor) -> float:
    """What counts as equal, relative to the plain gradient."""
    return _TOLERANCE.get(tensor.dtype, 1e-3)


def _norms(tensor: Tensor) -> Tensor:
    return tensor.to(working_dtype(tensor.dtype)).norm(dim=-1)
