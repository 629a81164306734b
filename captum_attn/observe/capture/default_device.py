"""Where tensors are made that name no device: the user's choice is the model's, not the package's.

`with torch.device("cuda")` and `torch.set_default_device` say where such tensors go. The model and
the user's own functions see that; what the package computes for itself is made on the CPU and taken
to where it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Chosen(threading.local):
    """The device that the user chose, while this thread computes on the package's own."""

    device: torch.device | None = None


_chosen = _Chosen()


@contextmanager
def on_own_device() -> Iterator[None]:
    """For what the package computes: the user's default device is out of the way."""
    users = torch.get_default_device()
    if users.type == "cpu":
        yield
        return
    outer, _chosen.device = _chosen.device, users
    try:
        with torch.device("cpu"):
            yield
    finally:
        _chosen.device = outer


@contextmanager
def on_users_device() -> Iterator[None]:
    """For the model and the user's functions, inside `on_own_device`."""
    users = _chosen.device
    if users is None:
        yield
        return
    _chosen.device = None
    try:
        with torch.device(users):
            yield
    finally:
        _chosen.device = users
