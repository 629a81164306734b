"""Norms held at the scale that they had in the run, so that what is left of them is linear.

A norm divides by a statistic of the token (its length, its standard deviation). With that statistic
held, as a gate is, a token's vector is multiplied with a number, centred if the norm does so, and
scaled per channel: a linear map, which gradients tell once none passes through the statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from captum_attn.observe.tracing.autograd_graph import Node, cut_at, shape_of

# What makes a statistic of many numbers, or of their squares, beside sums and means.
_STATISTICS = frozenset("Sqrt Rsqrt Pow Reciprocal Var Std Norm LinalgVectorNorm".split())


_SUMS = frozenset("Mean Sum NativeLayerNorm FusedRmsNorm".split())


def is_of_norm(node: Node) -> bool:
    """Whether norms are made of such steps."""
    return _name(node) in _STATISTICS | _SUMS


@contextmanager
def held_norms(path: Iterable[Node], size: int) -> Iterator[None]:
    """Within it no gradient passes through the statistics of the norms on a path.

    Args:
        path (iterable of graph nodes): the nodes.
        size (int): the number of elements of the tensors that are normed; statistics have fewer.
    """
    nodes = list(path)
    with ExitStack() as stack:
        stack.enter_context(cut_at([node for node in nodes if _is_statistic(node, size)]))
        for node in nodes:
            linear = _linear_part(node)
            if linear is not None:
                stack.callback(node.register_hook(linear).remove)
        yield


def _is_statistic(node: Node, size: int) -> bool:
    return _name(node) in _STATISTICS and torch.Size(shape_of(node)).numel() < size


def _name(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def _linear_part(node: Node) -> Callable | None:
    """For the node of a fused norm, the gradient of what is linear in it."""
    if node.name().startswith("NativeLayerNorm"):
        return _of_norm(node, node._saved_result2, centred=True)
    if node.name().startswith("FusedRmsNorm"):
        return _of_norm(node, node._saved_result1, centred=False)
    return None


def _of_norm(node: Node, factor: Tensor, centred: bool) -> Callable:
    weight = node._saved_weight
    axes = tuple(range(-len(node._saved_normalized_shape), 0))

    def linear(to_inputs: tuple, to_outputs: tuple) -> tuple:
        if to_inputs[0] is None or to_outputs[0] is None:
            return to_inputs
        gradient = to_outputs[0] if weight is None else to_outputs[0] * weight.detach()
        if centred:
            gradient = gradient - gradient.mean(axes, keepdim=True)
        return ((gradient * factor).to(to_inputs[0]), *to_inputs[1:])

    return linear
