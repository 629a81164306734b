"""The readout: which final tokens the explained output reads, and how strongly.

A stream is read where its version is reached from the output without another attention call in
between. On those paths, the gradient of the explained output at the point where tokens are
selected or pooled (the last place that still has the token axis) says which rows are read: one row
for [CLS], the last token or query j of a detector, equal rows for mean pooling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import InputError, ReadoutError
from captum_attn.observe.capture.attention_call import AttentionCall, positions, working_dtype
from captum_attn.observe.capture.tensor_kinds import check_kind
from captum_attn.observe.streams.sources import bypassing
from captum_attn.observe.streams.states import AttentionState, InitialState, State
from captum_attn.observe.streams.wiring import Wiring
from captum_attn.observe.tracing.autograd_graph import (
    Graph,
    Node,
    Root,
    before_node,
    depends_on_content,
    gradients,
    is_identity,
    shape_of,
)
from captum_attn.observe.tracing.token_layout import TokenLayout, TokenPoint
from captum_attn.observe.tracing.token_map import TokenMap, Upstream

# Operations that move, mask or weight tokens without mixing channels: looked through, so that a
# masked mean gives padding no weight and a weighted one its weights.
MOVES = frozenset(
    "Mul Div Permute Transpose View UnsafeView Reshape ReshapeAlias Clone ToCopy Slice Select "
    "Squeeze Unsqueeze Expand MaskedFill Where T Alias Cat Split Index AsStrided".split()
)


@dataclass(eq=False)
class Read:
    """A state that the output reads.

    Args:
        state (State): the version of a stream.
        calls (list of AttentionCall): the calls it was last updated by.
        points (list of TokenPoint): where its tokens are selected or pooled.
        read_on (bool): whether later attention calls read the state, too.
    """

    state: State
    calls: list[AttentionCall]
    points: list[TokenPoint]
    read_on: bool

    @property
    def packed(self) -> bool:
        """Whether the tokens of all examples lie in one sequence: each asks for its own rows."""
        return any(call.packed for call in self.calls)

    @property
    def edges(self) -> list[GradientEdge]:
        """Where `weights` wants the gradient of the explained output."""
        if self.points:
            return [point.edge for point in self.points]
        return [call.edge for call in self.calls]

    def norms(self, found: list[Tensor | None]) -> Tensor | None:
        """Norms of the rows' gradients, (B, n); None where none arrived.

        Args:
            found (list of Tensor): gradients at `edges`.
        """
        if self.points:
            pairs = zip(self.points, found, strict=True)
            return _norms([point.layout.tokens(g) for point, g in pairs if g is not None])
        folded = [
            positions(call.output_rows(g))
            for call, g in zip(self.calls, found, strict=True)
            if g is not None
        ]
        return _norms(folded)

    def weights(self, found: list[Tensor | None]) -> Tensor | None:
        """Weights of the rows, (B, n), that sum to 1; None where the gradient has vanished."""
        return self.normalized(self.norms(found))

    def normalized(self, norms: Tensor | None) -> Tensor | None:
        """Norms, (B, n), that sum to 1; None where the gradient has vanished."""
        if norms is None:
            return None
        if not self.points and bool(((norms > 0).sum(1) > 1).any()):
            raise ReadoutError(
                f"the output reads several tokens of the stream {self.state.stream!r} "
                f"({self.state.n} tokens), but where they are pooled could not be observed; give "
                "`readout=`: a row, a LongTensor (B,) of rows, or weights (B, n)"
            )
        totals = norms.sum(1, keepdim=True)
        if not bool((totals > 0).all() and torch.isfinite(totals).all()):
            return None
        return norms / totals


def pieces(reads: list[Read]) -> list[list[Read]]:
    """Reads of one input that the same modules have run over piece by piece (chunks, views).

    Together they are one stream that was cut, as if the pieces had been folded into the batch.
    """
    grouped: dict[Any, list[Read]] = {}
    for read in reads:
        modules = tuple(call.module for call in read.calls)
        grouped.setdefault((_inputs_of(read.state), modules), []).append(read)
    return [group for group in grouped.values() if len(group) > 1]


def _inputs_of(state: State) -> frozenset[str]:
    """Names of the inputs that a state's own tokens grow from."""
    names: set[str] = set()
    queue = [state]
    for state in queue:
        if isinstance(state, InitialState):
            names.update(entry.leaf.name for entry in state.source.entries)
        before = (state.query_state,) if isinstance(state, AttentionState) else state.before
        queue += [earlier for earlier in before if earlier not in queue]
    return frozenset(names)


def find_reads(root: Root, wiring: Wiring, graph: Graph) -> list[Read]:
    """The states that the model's output reads."""
    start = root.edge.node if root.edge is not None else None
    wiring.refuse_detached(root.detached_from, (start,), "the output reads")
    calls = graph.calls(graph.latest(graph.reach(start)))
    if root.edge is None or not calls:
        raise ReadoutError(
            "the output does not depend on any attention call that ran: expected a model whose "
            "output reads attended tokens, through layers that have a derivative (int8 ones have "
            "none); explain another output with a callable around the model"
        )
    reads = []
    for state, group in wiring.versions(calls):
        goal = sum(graph.bit[call] for call in group)
        read_on = any(
            state in (u.query_state, u.key_state, *u.key_state.before) for u in wiring.updates
        )
        read = _of_whole_stream(root, root.edge, state, group, wiring, graph)
        if read is None:
            sizes = {state.n, *(_uncropped(root, root.edge, call, wiring) for call in group)}
            points = _points(root, root.edge, goal, state, sizes, wiring, graph)
            read = Read(state, group, points, read_on)
        else:
            read.read_on = read_on
        reads.append(read)
    return reads


def _of_whole_stream(
    root: Root,
    start: GradientEdge,
    state: State,
    group: list[AttentionCall],
    wiring: Wiring,
    graph: Graph,
) -> Read | None:
    """What is read where the last calls asked from few tokens, and the others stand beside them.

    Class attention updates [CLS] alone: a mean over all tokens reads the others as they were.

    Returns:
        Read or None: None where the output reads no token beside those of the last calls.
    """
    goal = sum(graph.bit[call] for call in group)
    before = graph.named(graph.reach(start.node) & ~goal)
    earlier = {member: wiring.upstream(member) for member in wiring.in_order(before)}
    sizes = {n for member in earlier for n in wiring.lengths(member) if n > state.n}
    points = _points(root, start, goal, state, sizes, wiring, graph) if sizes else []
    if len(points) != 1 or graph.latest(before) & ~graph.closed(goal):
        return None
    (point,) = points
    index = TokenMap(point.layout.index)
    older = bypassing(point.downstream, [index], earlier, wiring.tracer, wiring.batch)
    if not older or len(group) > 1:
        return None
    pairs = [(group[0], index), *older.items()]
    members = goal | sum(graph.bit[member] for member in older)
    rows = wiring.where_calls_left_inputs(pairs, point.downstream, goal)
    whole = wiring.met(pairs, rows, members, asking=True)
    layout = replace(point.layout, index=None)
    return Read(whole, group, [TokenPoint(point.edge, layout)], read_on=False)


def _points(
    root: Root,
    start: GradientEdge,
    goal: int,
    state: State,
    sizes: set[int],
    wiring: Wiring,
    graph: Graph,
) -> list[TokenPoint]:
    """Where the tokens of `state` are selected or pooled on the way to the output.

    Args:
        sizes (set of int): how many tokens may stand there.
    """
    all_calls = sum(graph.bit[call] for call in wiring.tap.calls)
    packed = any(call.packed for call in graph.calls(goal))
    batch = 1 if packed else wiring.batch

    def held(node: Node, output_nr: int = 0) -> list[TokenLayout]:
        reached = graph.reach(node)
        if graph.latest(reached) & all_calls != goal:
            return []
        shape = shape_of(node, output_nr)
        orders = [(n, order) for n in sizes for order in _token_orders(shape, batch, n)]
        if packed and shape[:1] == (state.n,):  # (n, D): no axis of examples at all
            orders.insert(0, (state.n, tuple(range(len(shape)))))
        return [
            TokenLayout(order, tuple(shape[axis] for axis in order), batch, n)
            for n, order in orders
        ]

    found: dict[Node, TokenPoint] = {}
    seen, queue = {start.node}, [(start.node, start.output_nr)]
    for node, output_nr in queue:
        before = [
            (n, nr) for n, nr in before_node(node) if not graph.is_stop(n) and graph.reach(n) & goal
        ]
        layouts = held(node, output_nr)
        passes = len(before) == 1 and _moves(node) and (_moves(before[0][0]) or held(*before[0]))
        if layouts and not passes:
            edge = GradientEdge(node, output_nr)
            layout = _settled(edge, layouts, len(seen), goal, wiring, graph, root.like)
            if layout is not None:
                found[node] = TokenPoint(edge, layout)
                continue
        queue += [(n, nr) for n, nr in before if n not in seen]
        seen.update(n for n, _ in before)
    # What flows on into another such point is counted there.
    return [
        point
        for node, point in found.items()
        if not any(n in found for n in graph.between(node, goal)[1:])
    ]


def _settled(
    edge: GradientEdge,
    layouts: list[TokenLayout],
    number: int,
    goal: int,
    wiring: Wiring,
    graph: Graph,
    like: Tensor,
) -> TokenLayout | None:
    """Of the ways in which a point may hold the tokens, the one in which it does.

    Sizes do not tell axes apart where there are as many tokens as examples or channels. Read in a
    wrong way, a token enters several rows at once, or those of another example.
    """
    moving = depends_on_content(graph.between(edge.node, goal))
    upstream = Upstream.call(graph.calls(goal)[0])
    for layout in layouts:

        def find(layout: TokenLayout = layout) -> TokenMap:
            return wiring.tracer.maps(layout.downstream(edge, like), [upstream])[0]

        # Where the tokens of the last call are along the token axis of the point.
        key = ("read point", goal, number, layout, edge.node.name(), graph.known is None)
        order = find() if moving else wiring.structure.get_or_compute(key, find)
        if not order.mixed and (order.to is None or bool((order.to >= 0).any())):
            return replace(layout, index=order.to)
    return None


def _uncropped(root: Root, start: GradientEdge, call: AttentionCall, wiring: Wiring) -> int:
    """How many of a call's tokens go on: windows may be padded, and are cropped behind the call."""
    if call.windows == 1:
        return call.positions[0]
    probe_vector = wiring.tracer.random(root.like, *root.shape)
    (found,) = gradients([(start, probe_vector)], [call.edge], wiring.graph.cuts)
    if found is None:
        return call.positions[0]
    return int(positions(call.output_rows(found)).ne(0).any(-1).sum(1).max())


def _moves(node: Node) -> bool:
    return is_identity(node) or node.name().rstrip("0123456789").removesuffix("Backward") in MOVES


def _token_orders(shape: tuple[int, ...], batch: int, n: int) -> list[tuple[int, ...]]:
    """The orders of axes, the examples first, then the tokens, that sizes allow; likeliest first.

    (B, n, D), (B, h, w, D), (n, B, D), (B, D, h, w), (B, f, D, h, w), (B windows, n, D).
    """
    if len(shape) < 3:
        return []
    axes = range(len(shape))
    examples = [axis for axis in axes if shape[axis] == batch]
    orders: list[tuple[int, ...]] = []
    for example in examples[:1] if batch == 1 else examples:
        others = [axis for axis in axes if axis != example]
        wide = [axis for axis in others if shape[axis] > 1]
        for count in range(min(len(wide), len(others) - 1) + 1):
            for tokens in combinations(wide, count):
                if math.prod(shape[axis] for axis in tokens) == n:
                    orders.append((example, *tokens, *(a for a in others if a not in tokens)))
    windows, rest = divmod(shape[0], batch)
    if windows > 1 and not rest and windows * shape[1] == n:
        orders.append(tuple(axes))
    return orders


def _norms(rows: list[Tensor]) -> Tensor | None:
    """Norm of each row over the features of all `rows`, (B, n)."""
    total: Tensor | None = None
    for row in rows:
        norms = torch.linalg.vector_norm(row, dim=-1, dtype=working_dtype(row.dtype))
        total = norms if total is None else torch.hypot(total, norms)
    return total


def given_weights(readout: Any, read: Read, batch: int, like: Tensor) -> Tensor:
    """Row weights (B, n) from the user's `readout`: a row, rows (B,), or weights (B, n)."""
    n = read.state.n
    expected = (
        f"readout: expected 'auto', an int in [-{n}, {n}), a LongTensor of shape ({batch},) of "
        f"such, or weights of shape ({batch}, {n}) for the stream {read.state.stream!r}"
    )
    if isinstance(readout, bool) or not isinstance(readout, (int, Tensor)):
        raise ReadoutError(f"{expected}; got {readout!r}")
    if isinstance(readout, int):
        if not -n <= readout < n:
            raise ReadoutError(f"{expected}; got {readout}")
        readout = torch.full((batch,), readout)
    try:
        check_kind("readout", readout)
    except InputError as error:
        raise ReadoutError(f"{expected}; {error}") from error
    if readout.ndim in (1, 2) and readout.shape[0] != batch and batch % max(len(readout), 1) == 0:
        readout = readout.repeat_interleave(batch // max(len(readout), 1), 0)  # NoiseTunnel
    dtype = working_dtype(like.dtype)
    if readout.ndim == 2 and readout.shape == (batch, n):
        weights = readout.to(like.device, dtype)
        if not bool(torch.isfinite(weights).all()) or bool((weights == 0).all(1).any()):
            raise ReadoutError(f"{expected}; got weights that are not finite or all zero")
        return weights
    whole = not readout.is_floating_point() and readout.dtype != torch.bool
    if readout.ndim != 1 or len(readout) != batch or not whole:
        raise ReadoutError(f"{expected}; got {tuple(readout.shape)} of {readout.dtype}")
    readout = readout.long()
    if bool(((readout < -n) | (readout >= n)).any()):
        raise ReadoutError(f"{expected}; got {readout.tolist()}")
    weights = torch.zeros(batch, n, dtype=dtype, device=like.device)
    return weights.scatter_(1, (readout.to(like.device) % n)[:, None], 1.0)
