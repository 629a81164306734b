"""Does the explained output of each example depend on that example alone?

Relevance of the inputs is asked of all examples in one backward pass. Where outputs read each
other's tokens, as those of a (B, B) matrix of scores do, it would mix what belongs to several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import ReadoutError
from captum_attn.observe.observation import Watched
from captum_attn.observe.operators.audit import nodes_behind
from captum_attn.observe.operators.examples import AmbiguousBatchError, sums_per_example
from captum_attn.observe.tracing.autograd_graph import before_node, gradients


def check_apart(run: Watched, value: Tensor) -> None:
    """Refuses explained outputs, (B,), that depend on another example than their own.

    The gradient is followed to the last attention calls and convolutions only, in models without
    either to the inputs: what mixes examples is the head (scores of all images for all texts).
    """
    if run.batch == 1 or not value.requires_grad:
        return
    first = torch.arange(run.batch, device=value.device) == 0
    ends: list[Any] = list(_last_places(run))
    ends = ends or [leaf.tensor for leaf in run.tap.leaves if leaf.name]
    for chosen in (first, ~first):
        vector = chosen.to(value.dtype)
        for arrived in gradients([(value, vector)], ends):
            if arrived is not None and bool(_sizes(arrived, run.batch)[~chosen].any()):
                raise ReadoutError(
                    "the explained output of an example depends on another example: expected "
                    "outputs that depend on their own example alone; of a (B, B) matrix of scores "
                    "explain the diagonal with objective=objectives.pairwise, or pass one example "
                    "at a time (internal_batch_size=1)"
                )


def _sizes(gradient: Tensor, batch: int) -> Tensor:
    """How much of a gradient lies in each example, (B,); 0 where that cannot be read off."""
    try:
        return sums_per_example(gradient.abs(), batch).view(batch, -1).amax(1)
    except AmbiguousBatchError:
        return gradient.new_zeros(batch)


def _last_places(run: Watched) -> Iterator[GradientEdge]:
    """Outputs of attention calls and convolutions that no other one of them was made of."""
    calls = {call.edge.node: call.edge for call in run.tap.calls}
    behind: set[Any] = set()
    for node in nodes_behind(run.top, lambda node: (n for n, _ in before_node(node))):
        place = calls.get(node)
        if place is None and node.name().startswith("Convolution"):
            place = GradientEdge(node, 0)
        if place is not None and node not in behind:
            yield place
        if place is not None or node in behind:
            behind.update(before for before, _ in before_node(node))
