"""Layout: what the axes that lead an attention map are, examples, windows or heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from captum_attn.observe.capture.attention_call import BATCH, HEAD, WINDOW, AttentionCall
from captum_attn.observe.tracing.token_map import Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer

Roles = tuple[tuple[str, int], ...]


def leading_roles(
    call: AttentionCall,
    operand: Tensor,
    batch: int,
    upstreams: Sequence[Upstream],
    tracer: TokenTracer,
) -> Roles | None:
    """What the axes that lead an operand are; None if that could not be observed.

    An upstream token enters every head of its own example, but one window only.

    Args:
        operand (Tensor): lead + (n, d).
        batch (int): number of examples.
        upstreams (sequence of Upstream): what the operand stems from.
    """
    upstreams = [u for u in upstreams if u.batched and (batch == 1 or not u.packed)]
    operand = operand.expand(*call.lead, *operand.shape[-2:])
    splits = _splits(call.lead, batch)
    for split in splits:
        rows = operand.reshape(*(size for _, size in split), *operand.shape[-2:])
        axis = [name for name, _ in split].index(BATCH)
        alone = len(splits) == 1 and axis == 0  # else the heads may just be as many
        settled = batch == 1 or not upstreams or alone
        if not settled and not tracer.follows(rows, axis, upstreams, by_example=True):
            continue
        roles = []
        for i, (name, size) in enumerate(split):
            if name == BATCH:
                roles.append((name, size))
                continue
            windows = _window_count(rows, i, upstreams, tracer, merged=len(split) > len(call.lead))
            roles += [(WINDOW, windows)] if windows > 1 else []
            roles += [(HEAD, size // windows)] if windows < size or windows == 1 else []
        return tuple(roles)
    return None


def packed_roles(
    call: AttentionCall, operand: Tensor, upstreams: Sequence[Upstream], tracer: TokenTracer
) -> Roles:
    """What the leading axes are where no one is that of the examples: they are packed."""
    rows = operand.expand(*call.lead, *operand.shape[-2:])
    upstreams = [upstream.flattened() for upstream in upstreams]
    roles: Roles = ()
    for axis, size in enumerate(call.lead):
        windows = _window_count(rows, axis, upstreams, tracer, merged=len(call.lead) == 1)
        roles += ((WINDOW, windows),) if windows > 1 else ()
        roles += ((HEAD, size // windows),) if windows < size or windows == 1 else ()
    return roles or ((WINDOW, 1),)


def _window_count(
    rows: Tensor, axis: int, upstreams: Sequence[Upstream], tracer: TokenTracer, merged: bool
) -> int:
    """Into how many windows an axis falls: the most of which every upstream token enters one.

    An axis that was merged with the batch, (B · windows · heads, q, k), may hold heads as well.
    """
    size = rows.shape[axis]
    if not upstreams or size == 1:
        return 1
    for windows in range(size, 1, -1) if merged else (size,):
        if size % windows == 0:
            split = rows.unflatten(axis, (windows, size // windows))
            if tracer.follows(split, axis, upstreams):
                return windows
    return 1


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
