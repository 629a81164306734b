"""A function of one input under rules: what arrives at the input for a given g at the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.operators.operators import Operators


def ran(function: Callable[..., Tensor], *inputs: Tensor, tables: Any) -> tuple[Tensor, Operators]:
    """(output, operators); the inputs are the leaves that a backward pass is asked for."""
    tap = Tap()
    operators = Operators(tap, tables)
    operators.cell.batch = len(inputs[0])
    entered = {f"x{i}": tap.enter(f"x{i}", x) for i, x in enumerate(inputs)}
    operators.enter(entered)
    with tap.modules, operators, tap:
        return function(*entered.values()), operators


def arriving(
    function: Callable[..., Tensor], *inputs: Tensor, rules: Any, at_output: Tensor | None = None
) -> list[Tensor]:
    """What arrives at each input where `at_output` (default: ones) arrives at the output."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out, operators = ran(function, *inputs, tables=[rules])
    vector = torch.ones_like(out) if at_output is None else at_output
    with operators.cell.following(rules):
        return [
            torch.zeros_like(x) if g is None else g
            for x, g in zip(
                inputs, torch.autograd.grad(out, inputs, vector, allow_unused=True), strict=True
            )
        ]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
