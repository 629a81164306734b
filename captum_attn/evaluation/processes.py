"""Several processes: who am I, and what have the others found?

`torchrun` and `accelerate launch` say so in the environment; a process group that is there
already is used. The messages are plain Python objects, so they go by gloo whatever the models use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

__all__ = ["Processes", "processes"]

# The last process may be a long way behind the first; one that dies is noticed at once.
PATIENCE = timedelta(days=7)

# The launcher's store outlives a group: without a name of its own, the next group would find
# the addresses of the one before, where no process listens any more.
_MEETINGS = count()


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Args:
        rank, size (int): which one of how many.
        group (optional): by which they speak.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """What every process gives here, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found


@contextmanager
def processes() -> Iterator[Processes]:
    """This process among the others; every one of them has to come here."""
    available = dist.is_available()
    if available and dist.is_initialized():
        if dist.get_world_size() == 1:
            yield Processes()
            return
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield Processes(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)
    elif available and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"captum_attn/{next(_MEETINGS)}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        try:
            yield Processes(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Processes()
