"""Sub-layers: where each attention call, and each feed-forward branch, is added onto its stream.

Observed, not looked up. A skip connection is an addition. Onto an attention call's stream it is the
addition of something that stems from the call and of something that the call's query was made of;
a feed-forward branch is added to what it was itself made of.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field

from torch.autograd.graph import GradientEdge

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.streams.readout import MOVES
from captum_attn.observe.tracing.autograd_graph import (
    Graph,
    Node,
    before_node,
    edge_of,
    is_identity,
)
from captum_attn.observe.vectors.held_norms import is_of_norm
from captum_attn.observe.vectors.recording_tap import Addition, Term

# Steps that leave a token what it was: views, constant factors, and constants that are added.
_CONSTANT_STEPS = MOVES | {"Add", "Sub"}
# Steps of which rotary is made, beside those: whatever else is done to a token makes a branch.
_TURNS = _CONSTANT_STEPS | set(
    "Neg Stack Unbind Flip Roll ViewAsComplex ViewAsReal torch::autograd::AccumulateGrad".split()
)


@dataclass(eq=False)
class FeedForward:
    """A feed-forward sub-layer.

    Args:
        skip, branch (Term): the vectors on the skip connection, and what is added to them.
        start (GradientEdge): what both are made of; the skip connection itself, but for a scale.
        addition (Addition): the sum.
        version (int): what the skip connection stems from, the calls and leaves of its version.
        through (Term or None): the sum that the branch is a part of, if it is added by way of one
            (which may be scaled); None: it is added as it is.
    """

    skip: Term
    branch: Term
    start: GradientEdge
    addition: Addition
    version: int
    through: Term | None = None


@dataclass(eq=False)
class Residual:
    """Where an attention call is added onto its stream.

    Args:
        skip (Term or None): the vectors on the skip connection; None where there is none: the
            stream begins anew with the call (attention pooling).
        branch (Term): what is added to them.
        start (GradientEdge or None): what the skip connection and the query are made of; None
            where they are constants, or the skip connection is projected.
        addition (Addition or None): the sum.
        parallel (list of FeedForward): feed-forward branches that are added in the same step.
        joined (bool): whether the branch is made of something beside the call's output, too.
    """

    skip: Term | None
    branch: Term
    start: GradientEdge | None = None
    addition: Addition | None = None
    parallel: list[FeedForward] = field(default_factory=list)
    joined: bool = False


class SubLayers:
    """The sub-layers of one run.

    Args:
        graph (Graph): the run's graph.
        calls (list of AttentionCall): in the order of execution.
        additions (list of Addition): in the order of execution.
        output (GradientEdge or None): the model's output.

    Attributes:
        residuals (dict): call -> where it is added; calls for which that was not found are missing.
        feed_forwards (list of FeedForward): one after another; what mixes tokens is still among
            them (`Placements.tokenwise`).
    """

    def __init__(
        self,
        graph: Graph,
        calls: list[AttentionCall],
        additions: list[Addition],
        output: GradientEdge | None = None,
    ) -> None:
        self.graph, self.calls, self.additions, self.output = graph, calls, additions, output
        self._sums = {addition.out.node: addition for addition in additions}
        self._stems = {  # term -> all that it stems from
            term: 0 if term.edge is None else graph.closed(graph.reach(term.edge.node))
            for addition in additions
            for term in addition.terms
        }
        self._asked = {call: graph.latest(graph.reach(call.q)) for call in calls}
        self._in_a_step: set[Node] = set()  # sums by which a call is added
        self.residuals: dict[AttentionCall, Residual] = {}
        for call in calls:
            residual = self._residual(call) or self._projected(call)
            if residual is not None:
                self.residuals[call] = residual
        self.feed_forwards = self._feed_forwards()
        for call in calls:
            if call not in self.residuals:
                self._without_skip(call)

    # ------------------------------------------------------------------------ attention
    def _residual(self, call: AttentionCall) -> Residual | None:
        """The first sum of the call's branch with a tensor that its query is projected from.

        Sums that this one is a term of belong to the same step (x + attention + feed-forward).
        """
        graph, found, bit = self.graph, None, self.graph.bit[call]
        asked = self._asked[call]
        path = self._before_query(call)
        for addition in self.additions:
            one, other = (bool(self._stems[term] & bit) for term in addition.terms)
            if one == other:
                continue
            if found is not None and found[0].out.node not in self._step(addition, path):
                continue
            terms = list(self._terms(addition, path))
            holding = [term for term, _ in terms if self._stems[term] & bit]
            skips = [term for term, _ in terms if _on(term, path) is not None]
            if not skips and self._begins(call, [term for term, _ in terms]):
                skips = [term for term, _ in terms if term is not holding[0]]
            if len(skips) == 1 and self._is_one_branch(holding, call):
                found = addition, terms, holding, skips[0]
        if found is None:
            return None
        addition, terms, holding, skip = found
        branch = next(term for term in addition.terms if self._stems[term] & bit)
        start = _on(skip, path)
        residual = Residual(skip, branch, start, addition)
        self._in_a_step |= set(self._step(addition, path))
        if start is None:
            return residual
        residual.joined = self._stems_beside(holding[0], call)
        for term, through in terms:
            if term not in holding and term is not skip and self._made_of(term, start, asked):
                part = FeedForward(skip, term, start, addition, graph.named(asked), through)
                residual.parallel.append(part)
        return residual

    def _before_query(self, call: AttentionCall) -> set[Node]:
        """The nodes that a call's query is projected from, back to the version that asks.

        What comes behind the projection (rotary, a norm) is no skip connection, though some models
        add it to the output (pooling attention).
        """
        if call.q.grad_fn is None:
            return set()
        nodes = self.graph.between(call.q.grad_fn, self._asked[call])
        last = next((i for i, node in enumerate(nodes) if _transforms([node])), -1)
        return set(nodes[last + 1 :]) | set(self._stops(self._asked[call]))

    def _begins(self, call: AttentionCall, terms: list[Term]) -> bool:
        """Whether the call's stream begins with constants, which no path leads to (DETR)."""
        born = not self.graph.calls(self._asked[call]) and not self.graph.named(self._asked[call])
        return born and len(terms) == 2 and any(term.edge is None for term in terms)

    def _is_one_branch(self, terms: list[Term], call: AttentionCall) -> bool:
        """Whether terms are made of the call's output, and not of the sum that it enters."""
        bit = self.graph.bit[call]
        if not all(self.graph.reach(_edge(term).node) & bit for term in terms):
            return False
        return len(terms) == 1 or not any(self._stems_beside(term, call) for term in terms)

    def _stems_beside(self, term: Term, call: AttentionCall) -> bool:
        """Whether a call's branch also stems from the version that asks, not through the call."""
        reached = self.graph.reach(_edge(term).node) & ~self.graph.bit[call]
        return bool(reached & self._asked[call])

    def _projected(self, call: AttentionCall) -> Residual | None:
        """A sum with a projection of what asks: where a stage changes the width or the grid.

        The outermost one before the call goes into both terms of a sum, as in a feed-forward
        sub-layer: what is behind that is no longer the call's own step.
        """
        graph, found, bit = self.graph, None, self.graph.bit[call]
        asked = graph.named(self._asked[call])
        for addition in self.additions:
            holding = [term for term in addition.terms if self._stems[term] & bit]
            if len(holding) == 2:
                break
            skip = next((term for term in addition.terms if term not in holding), None)
            if not holding or skip is None or skip.edge is None or not asked:
                continue
            same = graph.named(graph.latest(graph.reach(skip.edge.node))) == asked
            if same and self._is_one_branch(holding, call):
                found = Residual(skip, holding[0], None, addition)
        if found is not None and found.addition is not None:
            self._in_a_step.add(found.addition.out.node)
        return found

    def _without_skip(self, call: AttentionCall) -> None:
        """A stream that begins with the call, if nothing of what asks goes by it.

        Its branch is what a feed-forward sub-layer adds to; else the call's first projection.
        """
        bit = self.graph.bit[call]
        for branch in self.feed_forwards:
            if branch.version == bit:
                self.residuals[call] = Residual(None, branch.skip)
                return
        if not self.graph.named(self._asked[call]):
            return  # learned queries, of which nothing could go by it
        ends = [t.grad_fn for later in self.calls for t in (later.q, later.k, later.v)]
        ends += [] if self.output is None else [self.output.node]
        behind = [node for node in ends if node is not None and self.graph.reach(node) & bit]
        if any(self.graph.reach(node) & self._asked[call] for node in behind):
            return
        projection = self.first_projection(call, GradientEdge(behind[0], 0)) if behind else None
        if projection is not None:
            self.residuals[call] = Residual(None, projection[0])

    def first_projection(self, call: AttentionCall, end: GradientEdge) -> tuple[Term, bool] | None:
        """What all ways from a call to `end` go through first, once something has transformed it.

        Returns:
            tuple or None: the place, and whether something else than a norm transforms it on the
            rest of them.
        """
        places = list(self.graph.on_every_way([end], self.graph.bit[call]))[::-1]  # call first
        for i, (edge, _) in enumerate(places):
            if _transforms([edge.node]):
                rest = [place.node for place, _ in places[i + 1 :]]
                rest += [node for _, passed in places[i:] for node in passed]
                return Term.at(edge), _transforms(n for n in rest if not is_of_norm(n))
        return None

    def _terms(
        self, addition: Addition, path: Container[Node], through: Term | None = None
    ) -> Iterator[tuple[Term, Term | None]]:
        """The terms of a sum of sums, each with the outermost one that it is a part of."""
        for term in addition.terms:
            inner = self._inner(term, path)
            if inner is None:
                yield term, through
            else:
                yield from self._terms(inner, path, through or term)

    def _step(self, addition: Addition, path: Container[Node]) -> Iterator[Node]:
        """A sum, and the sums that are terms of it."""
        yield addition.out.node
        for term in addition.terms:
            inner = self._inner(term, path)
            if inner is not None:
                yield from self._step(inner, path)

    def _inner(self, term: Term, path: Container[Node]) -> Addition | None:
        """The sum that a term is; not so for a skip connection, on `path`."""
        if term.edge is None or _on(term, path) is not None:
            return None
        found = _on(term, self._sums)
        return None if found is None else self._sums[found.node]

    # ------------------------------------------------------------------------ feed-forward
    def _feed_forwards(self) -> list[FeedForward]:
        found = []
        for addition in self.additions:
            if addition.out.node in self._in_a_step:
                continue
            for skip, branch in (addition.terms, addition.terms[::-1]):
                candidate = self._feed_forward(addition, skip, branch)
                if candidate is not None:
                    found.append(candidate)
                    break
        inner = self._inner_sums(found)
        return [f for f in found if f.addition.out.node not in inner]

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
        path = {*graph.between(branch.edge.node, version), *self._stops(version)}
        start = _on(skip, path)
        if start is None or not _transforms(_from(branch.edge.node, start.node)):
            return None
        if not graph.calls(version) and not self._in_first_block(addition):
            return None
        return FeedForward(skip, branch, start, addition, version)

    def _in_first_block(self, addition: Addition) -> bool:
        """Whether a sum before any attention belongs to the block of the call that asks next."""
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
        return addition.out.node in self.graph.between(call.q.grad_fn, self._asked[call])

    def _inner_sums(self, found: list[FeedForward]) -> set[Node]:
        """The sums that are steps inside a sub-layer: an adapter's skip connection, rotary."""
        inner: set[Node] = set()

        def note(end: Node, goal: int, start: GradientEdge | None) -> None:
            for node in self.graph.between(end, goal):
                if node in self._sums and (start is None or self._behind(node, start, goal)):
                    inner.add(node)

        for call, residual in self.residuals.items():
            note(_edge(residual.branch).node, self.graph.bit[call], None)
            for operand in (call.q, call.k, call.v) if residual.start is not None else ():
                if operand.grad_fn is not None:
                    goal = self.graph.latest(self.graph.reach(operand))
                    note(operand.grad_fn, goal, residual.start)
            for branch in residual.parallel:
                note(_edge(branch.branch).node, branch.version, branch.start)
        for branch in found:
            note(_edge(branch.branch).node, branch.version, branch.start)
        return inner

    # ------------------------------------------------------------------------ on the graph
    def _stops(self, members: int) -> list[Node]:
        """Where the walk back to a version ends: its calls' outputs, its leaves."""
        return [edge_of(member).node for member in self.graph.members(members)]

    def _made_of(self, term: Term, start: GradientEdge, version: int) -> bool:
        return term.edge is not None and self._behind(term.edge.node, start, version)

    def _behind(self, node: Node, start: GradientEdge | None, version: int) -> bool:
        """Whether a node is reached from `start`, itself left out."""
        if start is None or node is start.node:
            return False
        if self.graph.is_stop(start.node):
            return bool(self.graph.reach(node) & self.graph.reach(start.node))
        return start.node in self.graph.between(node, version)


def _on(term: Term, path: Container[Node]) -> GradientEdge | None:
    """Where on `path` a term is, but for views and constant factors."""
    if term.edge is None:
        return None
    node, output = term.edge.node, term.edge.output_nr
    while node not in path:
        before = before_node(node)
        if len(before) != 1 or not (is_identity(node) or _name(node) in _CONSTANT_STEPS):
            return None
        node, output = before[0]
    return GradientEdge(node, output)


def _from(end: Node, start: Node) -> list[Node]:
    """The nodes from `end` backwards, as far as `start`."""
    seen, queue = {end, start}, [end]
    for node in queue:
        before = [n for n, _ in before_node(node) if n not in seen]
        queue += before
        seen.update(before)
    return queue


def _transforms(path: Iterable[Node]) -> bool:
    """Whether tokens are transformed on a path, and not just moved, scaled and turned (rotary).

    By what it is not: a projection may be any function (a quantised one has a name of its own).
    """
    return any(_name(node) not in _TURNS for node in path)


def _name(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def _edge(term: Term) -> GradientEdge:
    assert term.edge is not None
    return term.edge
