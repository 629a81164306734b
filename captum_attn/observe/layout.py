"""Layout: what the axes that lead an attention map are, examples, lanes or heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from captum_attn.observe.call import BATCH, HEAD, LANE, AttentionCall
from captum_attn.observe.tokenmap import Prober, Upstream

Roles = tuple[tuple[str, int], ...]


def leading_roles(
    call: AttentionCall,
    operand: Tensor,
    batch: int,
    upstreams: Sequence[Upstream],
    prober: Prober,
) -> Roles | None:
    """What the axes that lead an operand are; None if that could not be observed.

    An upstream token enters every head of its own example, but one lane only.

    Args:
        operand (Tensor): lead + (n, d).
        batch (int): number of examples.
        upstreams (sequence of Upstream): what the operand stems from.
    """
    upstreams = [u for u in upstreams if u.batched]
    operand = operand.expand(*call.lead, *operand.shape[-2:])
    splits = _splits(call.lead, batch)
    for split in splits:
        rows = operand.reshape(*(size for _, size in split), *operand.shape[-2:])
        axis = [name for name, _ in split].index(BATCH)
        settled = batch == 1 or not upstreams or len(splits) == 1
        if not settled and not prober.follows(rows, axis, upstreams, by_example=True):
            continue
        roles = []
        for i, (name, size) in enumerate(split):
            if name != BATCH:
                lane = size > 1 and bool(upstreams) and prober.follows(rows, i, upstreams)
                name = LANE if lane else HEAD
            roles.append((name, size))
        return tuple(roles)
    return None


def _splits(lead: tuple[int, ...], batch: int) -> list[list[tuple[str, int]]]:
    """Ways in which the leading axes may hold the examples, the likeliest first."""
    splits = []
    for i, size in enumerate(lead):
        before, after = [("", s) for s in lead[:i]], [("", s) for s in lead[i + 1 :]]
        if size == batch:
            splits.append([*before, (BATCH, batch), *after])
        elif size % batch == 0:
            rest = [("", size // batch)]
            splits.append([*before, (BATCH, batch), *rest, *after])
            splits.append([*before, *rest, (BATCH, batch), *after])
    if not lead and batch == 1:
        splits.append([(BATCH, 1)])
    return splits
