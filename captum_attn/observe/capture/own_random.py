"""Random numbers of a run's own, for where other threads draw from the process's generators.

They begin where the process's stand, so that a run draws what it would draw alone, and the
process's are not moved. Dropout draws as torch's own on a CPU does, and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Those that take `generator=`.
_SAMPLERS = frozenset(
    {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli}
    | {torch.multinomial, torch.poisson, Tensor.bernoulli, Tensor.bernoulli_, Tensor.multinomial}
    | {Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.geometric_, Tensor.random_}
    | {Tensor.cauchy_, Tensor.log_normal_}
)
_LIKE: dict[Callable, Callable] = {
    torch.rand_like: Tensor.uniform_,
    torch.randn_like: Tensor.normal_,
}
# Dropout -> the axes of the input that it drops whole (None: all, element by element).
_DROPOUT: dict[Callable, int | None] = {
    F.dropout: None, torch.dropout: None, F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5,
}  # fmt: skip
DRAWING = frozenset({*_SAMPLERS, *_LIKE, *_DROPOUT})


class OwnRandom:
    """Generators of a run's own, one per device, each made when it is first drawn from."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """`func`, one of `DRAWING`, with the run's own numbers where it can take them."""
        if func in _DROPOUT:
            return self._dropout(func, *args, **kwargs)
        given = next((a for a in args if isinstance(a, Tensor)), None)
        device = torch.get_default_device() if given is None else given.device
        generator = self._generator(torch.device(kwargs.get("device") or device))
        if generator is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in _LIKE:
            return _LIKE[func](torch.empty_like(*args, **kwargs), generator=generator)
        return func(*args, **{**kwargs, "generator": generator})

    def _dropout(
        self,
        func: Callable,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        **other: Any,
    ) -> Tensor:
        training, axes = other.get("train", training), _DROPOUT[func]
        generator = self._generator(input.device)
        if not training or not 0 < p < 1 or axes not in (None, input.ndim) or generator is None:
            more = {} if func is torch.dropout else {"inplace": inplace}
            return func(input, p, training, **more)
        shape = input.shape if axes is None else (*input.shape[:2], *[1] * (input.ndim - 2))
        noise = torch.empty_like(input) if axes is None else input.new_empty(shape)
        noise = noise.detach().bernoulli_(1 - p, generator=generator).div_(1 - p)
        return input.mul_(noise) if inplace else input * noise

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """None for a device whose generator cannot be copied."""
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            device, process = torch.device("cuda", index), torch.cuda.default_generators[index]
        elif device.type == "cpu":
            process = torch.default_generator
        else:
            return None
        if device not in self._generators:
            own = self._generators[device] = torch.Generator(device)
            own.set_state(process.get_state())
        return self._generators[device]
