"""Reading positions off gradients: the arithmetic behind the token maps.

A *plain* gradient is that of Σ_p s_p, a *coded* one that of Σ_p ±s_p, both (B, E, features) for E
upstream elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from captum_attn.observe.call import working_dtype

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
_MOST_QUESTIONS = 512


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
    return ratio, rest <= _tolerance(plain) * norms


def mostly(mixed: Tensor) -> bool:
    """Whether most elements enter several positions: then there is no map at all."""
    return bool(mixed.float().mean() > 0.5)


def is_identity(plain: Tensor, coded: Tensor, signs: Tensor) -> bool:
    """Whether every element enters the position of its own index, which has the sign (B, P)."""
    if plain.shape[1] != signs.shape[1] or bool(vanishes(plain).any()):
        return False
    wanted = plain * signs[..., None]
    return bool((_norms(coded - wanted) <= _tolerance(plain) * _norms(plain)).all())


def decoded(
    plain: Tensor, codes: Sequence[Tensor | None], places: int, batched: bool
) -> tuple[Tensor, Tensor]:
    """The position of each element, -1 for none, and whether it enters several; (B, E).

    Args:
        codes (sequence of Tensor or None): the gradient for every bit of the position.
        places (int): number of positions of one example.
        batched (bool): whether positions count on from one example to the next.
    """
    zero = vanishes(plain)
    position = torch.zeros_like(zero, dtype=torch.long)
    mixed = torch.zeros_like(zero)
    for k, code in enumerate(codes):
        ratio, single = sign_of(plain, torch.zeros_like(plain) if code is None else code)
        position += (ratio > 0).long() << k
        mixed |= ~single & ~zero
    if batched:
        example = torch.arange(plain.shape[0], device=plain.device)[:, None]
        mixed |= (position // places != example) & ~zero
        position = position % places
    return position.masked_fill(zero | mixed, -1), mixed


def repeated(
    enters: Callable[[int, int], Tensor], position: Tensor, mixed: Tensor, places: int
) -> list[Tensor] | None:
    """The positions of every element, also of those that are repeated at several.

    Found by halving. Elements that are repeated together ([CLS] of every frame, averaged and put
    before every frame again) share all their positions; where elements share some of them only, or
    share them with an element that enters there alone, tokens are mixed.

    Args:
        enters (callable): (first, end) -> (B, E), whether an element enters positions of a range.
        position, mixed (Tensor): (B, E), as `decoded` gives them.

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


def _tolerance(tensor: Tensor) -> float:
    return _TOLERANCE.get(tensor.dtype, 1e-3)


def _norms(tensor: Tensor) -> Tensor:
    return tensor.to(working_dtype(tensor.dtype)).norm(dim=-1)
