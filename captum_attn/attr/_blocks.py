"""Attention calls a block of queries at a time: no n x n matrix of every head is ever formed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn.observe.capture.attention_call import AttentionCall, Block


@dataclass(frozen=True)
class LinearRule:
    """A rule that is linear in R, for some queries of a call: R = keep * R_query + read R_key.

    Args:
        keep (Tensor or float): the share of its own relevance that each query keeps, (B, F, q').
        read (Tensor, optional): A-bar, (B, F, q', k'); None for zeros.
    """

    keep: Tensor | float = 1.0
    read: Tensor | None = None

    def of(self, block: Block) -> LinearRule:
        """The part of a whole call's rule that belongs to a block's queries."""
        if block.rows is None:
            return self
        keep = self.keep[:, :, block.rows] if isinstance(self.keep, Tensor) else self.keep
        return LinearRule(keep, None if self.read is None else self.read[:, :, block.rows])

    def to(self, device: torch.device) -> LinearRule:
        """The same on a device."""
        keep = self.keep.to(device) if isinstance(self.keep, Tensor) else self.keep
        return LinearRule(keep, None if self.read is None else self.read.to(device))


UNCHANGED = LinearRule()
Rule = Callable[[Block], LinearRule]
# How many queries of a call are in a block.
QueriesPerBlock = Callable[[AttentionCall], int]

# Elements of one block's map of all heads: on the CPU it should stay in the cache.
_MOST_ELEMENTS = (2**22, 2**26)


def propagate_call(
    call: AttentionCall, rows: Tensor, rule: Rule, size: QueriesPerBlock
) -> tuple[Tensor, Tensor | None]:
    """What arrives at a call's queries, handed on to what asked and to what was read.

    Queries at which nothing arrives are left out: of the last layer one row is read.

    Args:
        call (AttentionCall): the call.
        rows (Tensor): (B, F q), what arrives.
        rule (callable): the rule.
        size (callable): the number of queries in a block.

    Returns:
        tuple of Tensor: (B, F q) for the state that asked, (B, F k) for the one that was read or
        None where nothing goes there.
    """
    rows = rows.to(call.q.device)  # each layer's work stays where the layer is
    arriving = rows.view(len(rows), call.windows, -1)
    live = arriving.flatten(0, 1).any(0).nonzero()[:, 0]
    kept = torch.zeros_like(arriving)
    read: Tensor | None = None
    for block in _blocks(call, live, size(call)):
        step = rule(block)
        part = arriving if block.rows is None else arriving[:, :, block.rows]
        kept[:, :, slice(None) if block.rows is None else block.rows] = part * step.keep
        if step.read is not None:
            if read is None:
                read = arriving.new_zeros(*arriving.shape[:2], call.n_k)
            read[..., : step.read.shape[-1]] += (part[:, :, None] @ step.read)[:, :, 0]
    return kept.flatten(1), None if read is None else read.flatten(1)


def full_rule(call: AttentionCall, rule: Rule, size: QueriesPerBlock) -> LinearRule:
    """A rule for all queries of a call, formed block by block: (B, F, q), (B, F, q, k)."""
    steps = [rule(block) for block in all_blocks(call, size)]
    if len(steps) == 1:
        return steps[0]
    varying = [step.keep for step in steps if isinstance(step.keep, Tensor)]
    keep = torch.cat(varying, 2) if varying else steps[0].keep
    maps = [step.read for step in steps if step.read is not None]
    read = [F.pad(part, (0, call.n_k - part.shape[-1])) for part in maps]
    return LinearRule(keep, torch.cat(read, 2) if read else None)


def all_blocks(call: AttentionCall, size: QueriesPerBlock) -> list[Block]:
    """All queries of a call, in blocks."""
    return _blocks(call, torch.arange(call.n_q, device=call.q.device), size(call))


def _blocks(call: AttentionCall, rows: Tensor, most: int) -> list[Block]:
    """Some queries of a call, ascending, in blocks of `most` at most."""
    if len(rows) == call.n_q <= most:
        return [Block(call)]
    return [Block(call, part) for part in rows.split(most) if len(part)]


def queries_per_block(batch: int, block_size: int | None) -> QueriesPerBlock:
    """The number of queries in a block: `block_size`, or what free memory suggests.

    Args:
        batch (int): number of examples.
        block_size (int, optional): as the user gave it.
    """

    def size(call: AttentionCall) -> int:
        if block_size is not None:
            return block_size
        device = call.q.device
        elements = min(_MOST_ELEMENTS[device.type != "cpu"], _free_bytes(device) // 64)
        return max(1, elements // (batch * call.windows * call.heads * call.n_k))

    return size


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return 2**32
