"""Sub-layers: where each attention call, and each feed-forward branch, is added onto its stream.

Observed, not looked up. A skip connection is an addition. Onto an attention call's stream it is the
addition of something that stems from the call and of something that the call's query was made of;
a feed-forward branch is added to what it was itself made of, token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.autograd.graph import GradientEdge

from captum_attn.observe.call import AttentionCall
from captum_attn.observe.graph import Graph, Node, edge_of
from captum_attn.observe.readout import MOVES
from captum_attn.observe.recording import Addition, Term


@dataclass(eq=False)
class FeedForward:
    """A feed-forward sub-layer.

    Args:
        skip, branch (Term): the vectors on the skip connection, and what is added to them.
        through (GradientEdge or None): where the branch is added, if other branches (and a scale)
            lie in between; None: it is added as it is.
        addition (Addition): the sum.
        version (int): what the skip connection stems from, the calls and leaves of its version.
    """

    skip: Term
    branch: Term
    addition: Addition
    version: int
    through: GradientEdge | None = None


@dataclass(eq=False)
class Residual:
    """Where an attention call is added onto its stream.

    Args:
        skip (Term or None): the vectors on the skip connection; None where the stream begins anew
            with the call (attention pooling).
        branch (Term): what is added to them.
        addition (Addition): the sum; None where there is none.
        parallel (list of FeedForward): feed-forward branches that are added in the same step.
        joined (bool): whether the branch holds another one that was added to the call's output, or
            joined with it, before a projection of both.
    """

    skip: Term | None
    branch: Term
    addition: Addition | None = None
    parallel: list[FeedForward] = field(default_factory=list)
    joined: bool = False

    @property
    def edge(self) -> GradientEdge:
        return _edge(self.branch)


class SubLayers:
    """The sub-layers of one run.

    Args:
        graph (Graph): the run's graph.
        calls (list of AttentionCall): in the order of execution.
        additions (list of Addition): in the order of execution.
    """

    def __init__(self, graph: Graph, calls: list[AttentionCall], additions: list[Addition]) -> None:
        self.graph, self.calls, self.additions = graph, calls, additions
        self._sums = {addition.out.node: addition for addition in additions}
        self._inside: set[Node] = set()  # sums that are part of a larger one
        self.residuals: dict[AttentionCall, Residual] = {}
        for call in calls:
            residual = self._residual(call)
            if residual is not None:
                self.residuals[call] = residual
        self.feed_forwards = self._feed_forwards()
        for call in calls:
            if call not in self.residuals:
                self._pooled(call)

    # ------------------------------------------------------------------------ attention
    def _residual(self, call: AttentionCall) -> Residual | None:
        """The first sum of the call's branch with a tensor that its query is projected from.

        Sums that this one is a term of belong to the same step (x + attention + feed-forward).
        """
        graph, found = self.graph, None
        asked = graph.latest(graph.reach(call.q))
        path = self._before_query(call, asked)
        for addition in self.additions:
            one, other = (self._holds(term, call) for term in addition.terms)
            if one == other:
                continue
            if found is not None and found[0].out.node not in self._tree(addition, path):
                continue
            leaves = list(self._leaves(addition, path))
            holding = [leaf for leaf, _ in leaves if self._holds(leaf, call)]
            skips = [leaf for leaf, _ in leaves if self._on(leaf, path) is not None]
            if not skips and self._begins(call, asked, leaves):
                skips = [leaf for leaf, _ in leaves if leaf is not holding[0]]
            if len(holding) == 1 and len(skips) == 1 and self._reaches(holding[0], call):
                found = addition, leaves, holding[0], skips[0]
        if found is None:
            return None
        addition, leaves, holds, skip = found
        side = next(t for t in addition.terms if self._holds(t, call))
        residual = Residual(skip, side, addition)
        self._inside |= {n for n in self._tree(addition, path)}
        start = self._on(skip, path)
        for leaf, through in leaves:
            if leaf is holds or leaf is skip or leaf.edge is None or start is None:
                continue
            if graph.reach(leaf.edge.node) & asked and self._made_of(leaf.edge.node, start, asked):
                branch = FeedForward(skip, leaf, addition, asked, through)
                residual.parallel.append(branch)
        if start is not None and graph.reach(_edge(holds).node) & ~graph.bit[call] & asked:
            residual.joined = True
        return residual

    def _before_query(self, call: AttentionCall, asked: int) -> set[Node]:
        """The nodes that a call's query is projected from, back to the version that asks.

        What comes behind the projection (rotary, a norm) is no skip connection, though some models
        add it to the output (pooling attention).
        """
        if call.q.grad_fn is None:
            return set()
        path = self.graph.between(call.q.grad_fn, asked)
        behind: set[Node] = set()
        for node in path:
            behind.add(node)
            if _projects([node]):
                return (set(path) | set(self._stops(asked))) - behind
        return set(path) | set(self._stops(asked))

    def _begins(self, call: AttentionCall, asked: int, leaves: list[Any]) -> bool:
        """Whether the call's stream begins with constants, which no path leads to (DETR)."""
        if self.graph.calls(asked) or len(leaves) != 2:
            return False
        return any(leaf.edge is None for leaf, _ in leaves) and not self.graph.named(asked)

    def _pooled(self, call: AttentionCall) -> None:
        """A stream that begins with the call: its branch is what a feed-forward one adds to."""
        bit = self.graph.bit[call]
        for branch in self.feed_forwards:
            if branch.version == bit and branch.skip.edge is not None:
                self.residuals[call] = Residual(None, branch.skip)
                return

    def _leaves(
        self, addition: Addition, path: set[Node], through: GradientEdge | None = None
    ) -> Iterator[tuple[Term, GradientEdge | None]]:
        """The terms of a sum of sums, each with the outermost term that it is a part of."""
        for term in addition.terms:
            inner = None
            if term.edge is not None and self._on(term, path) is None:
                inner = self._sums.get(_moved(term.edge.node, self._sums))
            if inner is None:
                yield term, through
            else:
                yield from self._leaves(inner, path, through or term.edge)

    def _tree(self, addition: Addition, path: set[Node]) -> Iterator[Node]:
        yield addition.out.node
        for term in addition.terms:
            if term.edge is not None and self._on(term, path) is None:
                inner = self._sums.get(_moved(term.edge.node, self._sums))
                if inner is not None:
                    yield from self._tree(inner, path)

    # ------------------------------------------------------------------------ feed-forward
    def _feed_forwards(self) -> list[FeedForward]:
        found = []
        for addition in self.additions:
            if addition.out.node in self._inside:
                continue
            for skip, branch in (addition.terms, addition.terms[::-1]):
                candidate = self._feed_forward(addition, skip, branch)
                if candidate is not None:
                    found.append(candidate)
                    break
        return [f for f in found if not self._within_a_branch(f, found)]

    def _feed_forward(self, addition: Addition, skip: Term, branch: Term) -> FeedForward | None:
        graph = self.graph
        if skip.edge is None or branch.edge is None:
            return None
        # An expert's weight, picked by an index, is no token though it is a leaf.
        version, made_of = (
            graph.named(graph.latest(graph.reach(edge.node))) for edge in (skip.edge, branch.edge)
        )
        if not version or made_of != version:
            return None
        path = set(graph.between(branch.edge.node, version)) | set(self._stops(version))
        start = self._on(skip, path)
        if start is None or not _projects(_from(branch.edge.node, start)):
            return None
        if not graph.calls(version) and not self._in_first_block(addition):
            return None
        return FeedForward(skip, branch, addition, version)

    def _in_first_block(self, addition: Addition) -> bool:
        """Whether a sum before any attention belongs to the block of the first call above it."""
        for call in self.calls:
            if self.leads_to(addition, call):
                residual = self.residuals.get(call)
                block = None if residual is None else residual.addition
                return block is not None and addition.module == block.module
        return False

    def leads_to(self, addition: Addition, call: AttentionCall) -> bool:
        """Whether a sum is on the way from a version of a stream to the call that asks next."""
        if call.q.grad_fn is None:
            return False
        asked = self.graph.latest(self.graph.reach(call.q))
        return addition.out.node in self.graph.between(call.q.grad_fn, asked)

    def _within_a_branch(self, inner: FeedForward, found: list[FeedForward]) -> bool:
        """Whether a sum is a step inside the branch of another sub-layer (an adapter's skip)."""
        node, graph = inner.addition.out.node, self.graph
        for call, residual in self.residuals.items():
            if node in graph.between(residual.edge.node, graph.bit[call]):
                return True
            start = None if residual.skip is None else residual.skip.edge
            if start is not None and start.node is not node and self._asks(call, node):
                asked = graph.latest(graph.reach(call.q))
                if self._made_of(node, start.node, asked):
                    return True
        beside = [branch for residual in self.residuals.values() for branch in residual.parallel]
        for outer in [*found, *beside]:
            if outer is inner or outer.version != inner.version:
                continue
            start = _edge(outer.skip).node
            if start is node or node not in graph.between(_edge(outer.branch).node, outer.version):
                continue
            if self._made_of(node, start, outer.version):
                return True
        return False

    def _asks(self, call: AttentionCall, node: Node) -> bool:
        """Whether a sum is a step on the way to a call's operands (rotary positions)."""
        for operand in (call.q, call.k, call.v):
            if operand.grad_fn is not None:
                reached = self.graph.latest(self.graph.reach(operand))
                if node in self.graph.between(operand.grad_fn, reached):
                    return True
        return False

    # ------------------------------------------------------------------------ on the graph
    def _holds(self, term: Term, call: AttentionCall) -> bool:
        """Whether a term stems from the call, directly or through later ones."""
        if term.edge is None:
            return False
        return self.graph.contains(self.graph.reach(term.edge.node), call)

    def _reaches(self, term: Term, call: AttentionCall) -> bool:
        return bool(self.graph.reach(_edge(term).node) & self.graph.bit[call])

    def _stops(self, members: int) -> list[Node]:
        """Where the walk back to a version ends: its calls' outputs, its leaves."""
        return [edge_of(member).node for member in self.graph.members(members)]

    def _on(self, term: Term, path: set[Node]) -> Node | None:
        """The node of `path` that a term is, but for a view or a constant factor."""
        if term.edge is None:
            return None
        node = _moved(term.edge.node, path)
        return node if node in path else None

    def _made_of(self, node: Node, start: Node, version: int) -> bool:
        return start in self.graph.between(node, version) or (
            self.graph.is_stop(start) and bool(self.graph.reach(node) & self.graph.reach(start))
        )


def _from(end: Node, start: Node) -> set[Node]:
    """The nodes from `end` backwards, as far as `start`."""
    seen, queue = {end, start}, [end]
    for node in queue:
        before = [n for n, _ in node.next_functions if n is not None and n not in seen]
        queue += before
        seen.update(before)
    return set(queue) - {start}


def _projects(path: Iterable[Node]) -> bool:
    """Whether there is a projection on a path: a feed-forward branch has one, rotary has none."""
    names = {node.name().lower() for node in path}
    return any(word in name for name in names for word in ("mm", "conv", "bilinear"))


def _moved(node: Node, goal: Any) -> Node:
    """Back from `node` over views and constant factors, up to the first that is in `goal`."""
    start = node
    while node not in goal:
        before = [n for n, _ in node.next_functions if n is not None]
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if len(before) != 1 or name not in MOVES:
            return start
        node = before[0]
    return node


def _edge(term: Term) -> GradientEdge:
    assert term.edge is not None
    return term.edge
