"""Attention calls a block of queries at a time: no n x n matrix of every head is ever formed."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn.observe.capture.attention_call import AttentionCall, Block
from captum_attn.observe.streams.states import AttentionState

# A rule that is linear in R: own and A-bar, R = own * R_asks + A-bar R_reads, for some queries of a
# call: own (B, F, q') or a number, A-bar (B, F, q', k'); None leaves the state as it was.
Weighed = tuple["Tensor | float", Tensor]
Weigh = Callable[[AttentionState, Block], "Weighed | None"]
# How many queries of a call are weighed at a time.
AtOnce = Callable[[AttentionCall], int]

# Elements of one block's map of all heads: on the CPU it should stay in the cache.
_MOST_ELEMENTS = (2**22, 2**26)


def passed(
    update: AttentionState, rows: Tensor, weigh: Weigh, at_once: AtOnce
) -> tuple[Tensor, Tensor | None]:
    """What arrives at a call's queries, (B, F q), passed on to what asked and what was read.

    Queries at which nothing arrives are left out: the last layer reads one row.
    """
    call = update.call
    rows = rows.to(call.q.device)  # each layer's work stays where the layer is
    arriving = rows.view(len(rows), call.windows, -1)
    live = (arriving != 0).flatten(0, 1).any(0).nonzero()[:, 0]
    asks = torch.zeros_like(arriving)
    reads = arriving.new_zeros(*arriving.shape[:2], call.n_k)
    for block in _blocks(call, live, at_once(call)):
        weighed = weigh(update, block)
        if weighed is None:
            return rows, None
        own, read = weighed
        part = arriving if block.rows is None else arriving[:, :, block.rows]
        asks[:, :, _all(block)] = part * own
        reads[..., : read.shape[-1]] += (part[:, :, None] @ read)[:, :, 0]
    return asks.flatten(1), reads.flatten(1)


def _blocks(call: AttentionCall, rows: Tensor, most: int) -> list[Block]:
    """Some queries of a call, ascending, in blocks of `most` at most."""
    if len(rows) == call.n_q <= most:
        return [Block(call)]
    return [Block(call, part) for part in rows.split(most) if len(part)]


def _all(block: Block) -> Tensor | slice:
    return slice(None) if block.rows is None else block.rows


def whole(update: AttentionState, weigh: Weigh, at_once: AtOnce) -> Weighed | None:
    """(own, A-bar) of all queries of a call, formed block by block: (B, F, q), (B, F, q, k)."""
    call = update.call
    every = torch.arange(call.n_q, device=call.q.device)
    found = [weigh(update, block) for block in _blocks(call, every, at_once(call))]
    weighed = [one for one in found if one is not None]
    if len(weighed) < len(found):
        return None
    if len(weighed) == 1:
        return weighed[0]
    read = [F.pad(part, (0, call.n_k - part.shape[-1])) for _, part in weighed]
    varying = [own for own, _ in weighed if isinstance(own, Tensor)]
    return torch.cat(varying, 2) if varying else weighed[0][0], torch.cat(read, 2)


def rows_of(weighed: Weighed | None, block: Block) -> Weighed | None:
    """The part of a whole call's (own, A-bar) that belongs to a block's queries."""
    if weighed is None or block.rows is None:
        return weighed
    own, read = weighed
    return own[:, :, block.rows] if isinstance(own, Tensor) else own, read[:, :, block.rows]


def queries_at_once(batch: int, block_size: int | None) -> AtOnce:
    """How many queries are weighed at a time: `block_size`, or what free memory suggests.

    Args:
        batch (int): number of examples.
        block_size (int, optional): as the user gave it.
    """

    def at_once(call: AttentionCall) -> int:
        if block_size is not None:
            return block_size
        device = call.q.device
        elements = min(_MOST_ELEMENTS[device.type != "cpu"], _free_bytes(device) // 64)
        return max(1, elements // (batch * call.windows * call.heads * call.n_k))

    return at_once


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return 2**32
