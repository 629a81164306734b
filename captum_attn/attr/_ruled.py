"""Backward passes with rules: what arrives at the inputs, or at attention calls."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import InputError, RuleError
from captum_attn.observe.observation import Watched
from captum_attn.observe.operators.audit import custom_functions, nodes_without_rule
from captum_attn.observe.operators.bridge import Rules
from captum_attn.observe.operators.examples import AmbiguousBatchError
from captum_attn.observe.tracing.autograd_graph import gradients


def ruled_pass(
    run: Watched, value: Tensor, ends: Sequence[Any], rules: Rules, again: bool
) -> list[Tensor | None]:
    """One backward pass from `value`, (B,), with `rules` in force: what arrives at `ends`.

    Args:
        ends (sequence of Tensor or GradientEdge): leaves, or outputs of attention calls.
        again (bool): whether the graph is asked again; else it is freed.
    """
    operators = run.operators
    assert operators is not None
    if not value.requires_grad:
        raise InputError(
            "the explained output does not depend on the inputs with a gradient: remove "
            "`no_grad`, `detach` and rounding from the model's forward, or choose another target"
        )
    first = again or run.batch > 1  # it may have to be gone through once for every example

    def one_pass(vector: Tensor, apart: bool, keep: bool) -> list[Tensor | None]:
        with operators.cell.following(rules, last=not keep, apart=apart):
            return gradients([(value, vector)], ends, keep=keep)

    try:
        return one_pass(torch.ones_like(value), run.batch == 1, first)
    except AmbiguousBatchError:  # sums per example: then one example's relevance at a time
        examples = torch.eye(run.batch, dtype=value.dtype, device=value.device)
        passes = [one_pass(example, True, True) for example in examples]
    return [_total(arrived) for arrived in zip(*passes, strict=True)]


def _total(arrived: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in arrived if part is not None]
    return torch.stack(given).sum(0) if given else None


def check_ruled(run: Watched, goals: Collection[Any], rules: Rules) -> None:
    """Refuses relevance that would pass through an operation without a rule.

    Args:
        goals (collection of graph nodes): where it is wanted.
    """
    missing = nodes_without_rule(run.top, goals, rules)
    if not missing:
        return
    assert run.operators is not None
    read = {m.name: m.reader for m in reversed(missing)}
    listed = [f"{name} (read by {reader or 'the output'})" for name, reader in read.items()]
    seen = [f"{name} in {module!r}" for name, module in run.operators.unruled]
    where = f"; among the model's calls without a rule: {', '.join(seen[:4])}" if seen else ""
    raise RuleError(
        "relevance cannot be followed from the output to where it is wanted: no rule for "
        f"{', '.join(listed[:4])}{where}; use AttnLRP, which takes the gradient there, confine an "
        "attention method with `layers=` to the calls behind it, or give a rule of your own, "
        'rules={"other": ...} (TransformerLRP, TransformerAttribution, PartialLRP)'
    )


def warn_of_hidden(run: Watched) -> None:
    """Warns of the model's own autograd Functions, in which a nonlinearity may hide."""
    hidden = custom_functions(run.top)
    if hidden:
        warnings.warn(
            f"the model computes with autograd Functions of its own ({', '.join(hidden[:4])}), "
            "which hide their operations: their ordinary gradient is used; if they are "
            "nonlinear, relevance is not conserved there",
            stacklevel=3,
        )
