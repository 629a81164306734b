"""Walks on the autograd graph: which attention calls and leaves does a tensor stem from?"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_attn.errors import AttnError, WiringError
from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.capture.own_state import recompute
from captum_attn.observe.capture.steps import KnownRun

Node = Any  # torch.autograd.graph.Node: the nodes of the C++ graph are no subclasses of it
Member = AttentionCall | Leaf

# Operations whose effect depends on the content of a tensor: the maps behind them differ by input.
_BY_CONTENT = (
    "Index", "Gather", "Scatter", "Take", "Sort", "Topk", "Where", "Masked", "Unique", "CopySlices",
)  # fmt: skip


class NotInGraph(Exception):
    """Something was asked of a part of a run that has no graph, because it is known."""


class Graph:
    """The graph of one forward run, cut at the outputs of its attention calls.

    A set of members (calls and leaves) is an int with a bit for each. The bits of calls come first,
    in the order of execution, so that `members` lists them in that order.

    Args:
        calls (list of AttentionCall): every call that ran with grad.
        leaves (list of Leaf): every leaf.
        batch (int): number of examples.
        known (KnownRun, optional): what stands for the parts that ran without a graph.
    """

    def __init__(
        self,
        calls: list[AttentionCall],
        leaves: list[Leaf],
        batch: int = 1,
        known: KnownRun | None = None,
    ) -> None:
        self.batch, self.known = batch, known
        self._given: dict[int, int] = {}  # id of an operand that has no graph -> what it stems from
        for call in [] if known is None else calls:
            assert known is not None
            operands = zip((call.q, call.k, call.v), known.reached[call.index], strict=True)
            self._given |= {
                id(operand): members
                for operand, members in operands
                if call.index > known.asked or not operand.requires_grad  # constants among them
            }
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
        if isinstance(start, Tensor) and id(start) in self._given:
            return self._given[id(start)]
        root = start.grad_fn or _accumulator(start) if isinstance(start, Tensor) else start
        if root is None and self.known is not None and start is not None:
            raise NotInGraph
        if root is None:
            return 0
        reached, stack = self._reached, [root]
        while stack:
            node = stack[-1]
            if node in reached:
                stack.pop()
                continue
            before = [n for n, _ in before_node(node)]
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
            for before, _ in before_node(node):
                if before in seen or before in self._stops:
                    continue
                if self.reach(before) & goal:
                    seen.add(before)
                    queue.append(before)
        return queue

    def on_every_way(
        self, starts: Iterable[Tensor | GradientEdge], goal: int
    ) -> Iterator[tuple[GradientEdge, list[Node]]]:
        """What every path from `starts` back to `goal` leads through, nearest to them first.

        Nodes are taken in the order in which they were made, the last one first: where no other
        one is waiting, all paths have met. Each place comes with the nodes between it and the one
        before.
        """
        waiting: dict[Node, set[int]] = {}
        for start in starts:
            edge = get_gradient_edge(start) if isinstance(start, Tensor) else start
            waiting.setdefault(edge.node, set()).add(edge.output_nr)
        order = [(-n._sequence_nr(), i, n) for i, n in enumerate(waiting)]
        heapq.heapify(order)
        count, passed = len(order), []  # type: int, list[Node]
        while order:
            node = heapq.heappop(order)[2]
            outputs = waiting.pop(node)
            if not order and len(outputs) == 1:
                yield GradientEdge(node, next(iter(outputs))), passed
                passed = []
            else:
                passed.append(node)
            for before, number in before_node(node):
                if not self.reach(before) & goal:
                    continue
                if before in self._stops:
                    return
                if before not in waiting:
                    heapq.heappush(order, (-before._sequence_nr(), count, before))
                    count += 1
                waiting.setdefault(before, set()).add(number)

    def fingerprint(self, starts: Iterable[Node | None]) -> str:
        """What tells the graph behind `starts` from others: its operations, shapes, axes and edges.

        Of the contents of tensors it says nothing.
        """
        if self.known is not None:
            return self.known.fingerprint
        queue = [node for node in dict.fromkeys(starts) if node is not None]
        number = {node: i for i, node in enumerate(queue)}
        said: list[Any] = []
        for node in queue:
            edges = [(before, output) for before, output in node.next_functions]
            for before, _ in edges:
                if before is not None and before not in number:
                    number[before] = len(queue)
                    queue.append(before)
            name = node.name()
            shapes = [_shape(made) for made in node._input_metadata]
            saved = [_plainly(getattr(node, attribute)) for attribute in _settings(name, node)]
            said.append((name, shapes, saved, [(number.get(n), i) for n, i in edges]))
        return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()

    def is_stop(self, node: Node) -> bool:
        """Whether the node is the output of a call, or a leaf."""
        return node in self._stops

    def closed(self, members: int) -> int:
        """All that went into `members`, directly or through earlier calls, and they themselves."""
        closed = members
        for bit in bits(members):
            closed |= self._closure.get(bit, 0)
        return closed


_SETTINGS: dict[str, list[str]] = {}


def _settings(name: str, node: Node) -> list[str]:
    """The attributes in which a kind of node has saved what is no tensor: axes, sizes, shifts."""
    if name not in _SETTINGS:
        has = dir(node)
        saved = [a for a in has if a.startswith("_saved_") and f"_raw{a}" not in has]
        _SETTINGS[name] = saved
    return _SETTINGS[name]


def _shape(made: Any) -> tuple[int, ...] | None:
    try:
        return tuple(made.shape)
    except RuntimeError:  # a nested tensor's
        return None


def _plainly(value: Any) -> Any:
    """Whole numbers and names; the others may depend on what the inputs hold."""
    if isinstance(value, (tuple, list)):
        return [_plainly(item) for item in value]
    return value if isinstance(value, (int, str)) else None


def before_node(node: Node) -> list[tuple[Node, int]]:
    """What the ordinary gradient reaches next from a node.

    The identity nodes that rules put into a graph (`observe.operators`) have more edges, which it
    does not take: `passes_on` of them say how many it takes.
    """
    edges = node.next_functions
    taken = getattr(node, "passes_on", len(edges))
    return [(n, nr) for n, nr in edges[:taken] if n is not None]


def is_identity(node: Node) -> bool:
    """Whether a node is one of those that rules put into a graph."""
    return hasattr(node, "passes_on")


@dataclass(frozen=True)
class Root:
    """The raw output, before the target is selected: where it hangs in the graph.

    The output itself is not held, because a language model's may be larger than all its layers.

    Args:
        edge (GradientEdge or None): where it was computed; None for a constant.
        shape (tuple of int): its shape.
        like (Tensor): an empty tensor of its dtype and device.
        detached_from: what it stems from without a gradient, see `Tap.detached_from`.
    """

    edge: GradientEdge | None
    shape: tuple[int, ...]
    like: Tensor
    detached_from: tuple[Any, ...]

    @staticmethod
    def of(output: Tensor, detached_from: tuple[Any, ...]) -> Root:
        edge = get_gradient_edge(output) if output.requires_grad else None
        like = output.detach().new_empty(0)
        return Root(edge, tuple(output.shape), like, detached_from)


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


def samples_where_it_computes(node: Node) -> bool:
    """Whether a node samples a feature map at places made of the tokens: deformable attention."""
    return node.name().startswith("GridSampler") and node.next_functions[1][0] is not None


def _accumulator(tensor: Tensor) -> Node | None:
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def gradients(
    outputs: Iterable[tuple[Tensor | GradientEdge, Tensor]],
    inputs: Iterable[Any],
    cuts: Iterable[Node] = (),
    keep: bool = True,
    several: bool = False,
) -> list[Tensor | None]:
    """Vector-Jacobian product of `outputs` (each with its vector) with respect to `inputs`.

    Args:
        cuts (iterable of graph nodes): where the gradient arrives, but does not pass through.
        keep (bool): False frees what the pass goes through as it goes; no other may follow.
        several (bool): whether the first axis of the vectors, and of the result, counts several
            products.
    """
    ends, vectors = zip(*outputs, strict=True)
    with cut_at(cuts), _failures_named(), recompute():
        found = torch.autograd.grad(
            ends,
            list(inputs),
            vectors,
            retain_graph=keep,
            allow_unused=True,
            is_grads_batched=several,
        )
    return list(found)


@contextmanager
def _failures_named() -> Iterator[None]:
    """A pass that torch cannot take says why in words that help."""
    try:
        yield
    except NotImplementedError as error:
        raise WiringError(
            f"a layer of the model has no derivative ({error}), so relevance cannot be traced "
            "through it; use layers that are differentiable (not quantised for inference alone)"
        ) from error
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise AttnError(
            "something that the gradient needs was overwritten: the weights of the model between "
            "its run and the last of the targets (by an optimizer in another thread?), or an "
            f"activation, in place, by the model itself; torch says: {error}"
        ) from error


@contextmanager
def cut_at(cuts: Iterable[Node]) -> Iterator[None]:
    """No gradient passes through these nodes."""
    handles = [node.register_prehook(_stop) for node in cuts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stop(arriving: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in arriving)
