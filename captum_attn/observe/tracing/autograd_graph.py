"""Walks on the autograd graph: which attention calls and leaves does a tensor stem from?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.leaf import Leaf

Node = Any  # torch.autograd.graph.Node: the nodes of the C++ graph are no subclasses of it
Member = AttentionCall | Leaf

# Operations whose effect depends on the content of a tensor: the maps behind them differ by input.
_BY_CONTENT = ("Index", "Gather", "Scatter", "Take", "Sort", "Topk", "Where", "Masked", "Unique")


class Graph:
    """The graph of one forward run, cut at the outputs of its attention calls.

    A set of members (calls and leaves) is an int with a bit for each. The bits of calls come first,
    in the order of execution, so that `members` lists them in that order.

    Args:
        calls (list of AttentionCall): every call that ran with grad.
        leaves (list of Leaf): every leaf.
        batch (int): number of examples.
    """

    def __init__(self, calls: list[AttentionCall], leaves: list[Leaf], batch: int = 1) -> None:
        self.batch = batch
        self._members: list[Member] = [*calls, *leaves]
        self.cuts: list[Node] = [call.edge.node for call in calls]
        self.bit: dict[Member, int] = {m: 1 << i for i, m in enumerate(self._members)}
        self._unnamed = sum(self.bit[leaf] for leaf in leaves if not leaf.name)
        self._stops: dict[Node, int] = {edge_of(m).node: bit for m, bit in self.bit.items()}
        self._reached: dict[Node, int] = dict(self._stops)
        self._closure: dict[int, int] = {}  # bit of a call -> all that its query stems from
        for call in calls:
            self._closure[self.bit[call]] = self.closed(self.reach(call.q))

    def reach(self, start: Tensor | Node | None) -> int:
        """Calls and leaves that `start` stems from without another call in between."""
        root = start.grad_fn or _accumulator(start) if isinstance(start, Tensor) else start
        if root is None:
            return 0
        reached, stack = self._reached, [root]
        while stack:
            node = stack[-1]
            if node in reached:
                stack.pop()
                continue
            before = [n for n, _ in node.next_functions if n is not None]
            waiting = [n for n in before if n not in reached]
            if waiting:
                stack.extend(waiting)
            else:
                members = 0
                for n in before:
                    members |= reached[n]
                reached[stack.pop()] = members
        return reached[root]

    def latest(self, members: int) -> int:
        """The maximal ones: those not contained in another one's own query version."""
        contained = 0
        for bit in bits(members):
            contained |= self._closure.get(bit, 0)
        return members & ~contained

    def contains(self, members: int, other: Member) -> bool:
        """Whether `other` went into `members`, directly or through earlier calls."""
        return bool(self.bit[other] & self.closed(members))

    def members(self, members: int) -> list[Member]:
        return [self._members[bit.bit_length() - 1] for bit in bits(members)]

    def calls(self, members: int) -> list[AttentionCall]:
        return [m for m in self.members(members) if isinstance(m, AttentionCall)]

    def leaves(self, members: int) -> list[Leaf]:
        return [m for m in self.members(members) if isinstance(m, Leaf)]

    def named(self, members: int) -> int:
        """Without the leaves that stem from parameters."""
        return members & ~self._unnamed

    def between(self, start: Node, goal: int) -> list[Node]:
        """The nodes on the paths from `start` back to `goal`, nearest to `start` first."""
        seen, queue = {start}, [start]
        for node in queue:
            for before, _ in node.next_functions:
                if before is None or before in seen or before in self._stops:
                    continue
                if self.reach(before) & goal:
                    seen.add(before)
                    queue.append(before)
        return queue

    def is_stop(self, node: Node) -> bool:
        """Whether the node is the output of a call, or a leaf."""
        return node in self._stops

    def closed(self, members: int) -> int:
        """All that went into `members`, directly or through earlier calls, and they themselves."""
        closed = members
        for bit in bits(members):
            closed |= self._closure.get(bit, 0)
        return closed


def bits(members: int) -> Iterator[int]:
    while members:
        lowest = members & -members
        yield lowest
        members ^= lowest


def edge_of(member: Member) -> GradientEdge:
    return member.edge if isinstance(member, AttentionCall) else get_gradient_edge(member.tensor)


def depends_on_content(path: Iterable[Node]) -> bool:
    """Whether the way tokens take along `path` may differ from one input to the next."""
    return any(word in node.name() for node in path for word in _BY_CONTENT)


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Shape of what a graph node computed in the forward run."""
    return tuple(node._input_metadata[output].shape)


def _accumulator(tensor: Tensor) -> Node | None:
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def gradients(
    outputs: Iterable[tuple[Tensor | GradientEdge, Tensor]],
    inputs: Iterable[Any],
    cuts: Iterable[Node] = (),
    keep: bool = True,
) -> list[Tensor | None]:
    """Vector-Jacobian product of `outputs` (each with its vector) with respect to `inputs`.

    Args:
        cuts (iterable of graph nodes): where the gradient arrives, but does not pass through.
        keep (bool): False frees what the pass goes through as it goes; no other may follow.
    """
    ends, vectors = zip(*outputs, strict=True)
    handles = [node.register_prehook(_stop) for node in cuts]
    try:
        return list(
            torch.autograd.grad(ends, list(inputs), vectors, retain_graph=keep, allow_unused=True)
        )
    finally:
        for handle in handles:
            handle.remove()


def _stop(arriving: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in arriving)
