"""Mixing hops: states whose tokens something else than attention has mixed on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import proxy

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError
from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.streams.entering import entering
from captum_attn.observe.streams.states import (
    MixedState,
    Part,
    RearrangedState,
    State,
    joined_name,
)
from captum_attn.observe.tracing.autograd_graph import Member, Node, gradients, shape_of
from captum_attn.observe.tracing.mixing import Mixing
from captum_attn.observe.tracing.token_layout import TokenLayout, TokenPoint, token_layouts
from captum_attn.observe.tracing.token_map import Downstream, TokenMap, Upstream

if TYPE_CHECKING:
    from captum_attn.observe.streams.wiring import Wiring

# What only moves, splits or masks a tensor, and what projects it.
_VIEWS = frozenset(
    "Permute Transpose View UnsafeView Reshape ReshapeAlias Clone ToCopy Slice Select Squeeze "
    "Unsqueeze Expand T Alias Split SplitWithSizes Unbind Chunk AsStrided".split()
)
_PROJECTIONS = frozenset("Addmm Mm Bmm Baddbmm Linear MkldnnLinear Convolution".split())
_TRIED = 6  # places on the way that are asked whether they hold the tokens


@dataclass
class Operand:
    """What a call asks or reads with, of mixed tokens.

    Args:
        call (AttentionCall): the call.
        side (str): "q" or "v".
        tensor (Tensor): the query, or the values (the keys where these are constant).
        beside (tuple of Tensor): the call's other operands that the same members went into.
        named (int): the calls and inputs that it stems from.
    """

    call: AttentionCall
    side: str
    tensor: Tensor
    beside: tuple[Tensor, ...]
    named: int


class MixingHops:
    """Makes the states of mixed tokens of one run.

    Args:
        wiring (Wiring): makes the states that are mixed.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring: Wiring = proxy(wiring)  # which has the hops: a circle would keep the run alive
        self.graph, self.tracer = wiring.graph, wiring.tracer
        self.states: list[MixedState] = []
        self._at: dict[Any, MixedState] = {}

    def state(self, operand: Operand) -> State:
        """The state that an operand of a call stems from, its tokens mixed on the way."""
        found = self._in_front(operand)
        if found is None:
            return self._mixed((operand.call.index, operand.side), self._rows(operand), operand)
        tokens, token_map = found
        mixed = self._mixed((tokens.edge.node, tokens.edge.output_nr), [tokens.downstream], operand)
        return self._rearranged(mixed, token_map, operand.call.rows(operand.tensor).shape[1])

    def born(self, call: AttentionCall, values: Tensor, named: int) -> tuple[State, State] | None:
        """What a call asks from and reads, of inputs that it asks in other pieces than it reads.

        The tokens are those that both are projected from; on the way to either they are merged,
        pooled or mixed by a convolution.

        Returns:
            tuple of State or None: None where no such place was found.
        """
        kept, key = self.wiring.structure.entries, ("born", call.index)
        for number, edge in self._places((call.q, call.k, call.v), named):
            known = kept.get(key)
            if known is None:
                ways = self._by_support(edge, call, values)
            else:
                ways = [known[1]] if known[0] == number else []
            for layout in ways:
                tokens = TokenPoint(edge, layout)
                state = self._begun(tokens, named)
                if state is None:
                    continue
                kept[key] = number, layout
                asks = self._behind(tokens, state, Operand(call, "q", call.q, (), named))
                beside = () if call.k is values else (call.k,)
                return asks, self._behind(tokens, state, Operand(call, "v", values, beside, named))
        return None

    def _begun(self, tokens: TokenPoint, named: int) -> State | None:
        """The state that inputs make at a place; None where they cannot be followed to it."""
        found = self.graph.members(named)
        upstreams = [self.wiring.upstream(member) for member in found]
        try:
            maps = entering(self.tracer, tokens.downstream, upstreams, self.wiring.batch)
            pairs = list(zip(found, maps, strict=True))
            return self.wiring.met(pairs, tokens.downstream, named, asking=True)
        except WiringError:
            return None

    def _by_support(
        self, edge: GradientEdge, call: AttentionCall, values: Tensor
    ) -> list[TokenLayout]:
        """The layouts of a place, first the one in which a row sees the fewest tokens."""
        rows, batch = call.rows(values), self.wiring.batch
        vector = torch.zeros_like(rows)
        vector[:, rows.shape[1] // 2] = self.tracer.random(rows, rows.shape[2])
        (found,) = gradients([(rows, vector)], [edge], self.graph.cuts)
        ways = list(token_layouts(shape_of(edge.node, edge.output_nr), batch))
        if found is None:
            return []
        seen = [float(way.positions(found).ne(0).any(-1).float().mean()) for way in ways]
        return [way for _, way in sorted(zip(seen, ways, strict=True), key=lambda pair: pair[0])]

    def _behind(self, tokens: TokenPoint, state: State, operand: Operand) -> State:
        """The state of an operand that is made of the tokens at a place."""
        rows = operand.call.rows(operand.tensor)

        def find() -> TokenMap:
            return self.tracer.maps(rows, [tokens.upstream])[0]

        key = ("behind", operand.call.index, operand.side)
        token_map = self.wiring.structure.get_or_compute(key, find)
        if token_map.mixed:
            return self._mixed(key, self._rows(operand), operand, [(state, [tokens.upstream])])
        return self._rearranged(state, token_map, rows.shape[1])

    def added(
        self, versions: list[tuple[State, list[AttentionCall]]], rows: Tensor | Downstream
    ) -> MixedState:
        """Versions of one stream that part at different places and are added: T says their shares.

        Args:
            versions: each with the calls that make it.
            rows (Tensor or Downstream): (B, n, features), the tokens that they make.
        """
        down = Downstream.rows(rows) if isinstance(rows, Tensor) else rows
        members = [(s, [Upstream.call(call) for call in group]) for s, group in versions]
        return self._made([down], members, ())

    # ------------------------------------------------------------------------ the tokens t
    def _in_front(self, operand: Operand) -> tuple[TokenPoint, TokenMap] | None:
        """Where the tokens stand last before they are projected, and where they are in the operand.

        None where the projection itself mixes them, or there is no such place.
        """
        rows = operand.call.rows(operand.tensor)
        together = (operand.tensor, *operand.beside)

        def find() -> tuple[int, TokenLayout, TokenMap] | None:
            for number, edge in self._places(together, operand.named):
                for layout in token_layouts(shape_of(edge.node, edge.output_nr), self.wiring.batch):
                    (found,) = self.tracer.maps(rows, [layout.upstream(edge)])
                    entered = found.to is None or bool((found.to >= 0).any())
                    if entered and not found.mixed:
                        return number, layout, found
            return None

        key = ("in front", operand.call.index, operand.side)
        known = self.wiring.structure.get_or_compute(key, find)
        if known is None:
            return None
        wanted, layout, token_map = known
        places = self._places(together, operand.named)
        edge = next(edge for number, edge in places if number == wanted)
        return TokenPoint(edge, layout), token_map

    def _places(self, operands: Sequence[Tensor], goal: int) -> Iterator[tuple[int, GradientEdge]]:
        """Places that all operands are made of, behind the projection, the nearest first."""
        projected = False
        for number, (edge, passed) in enumerate(self.graph.on_every_way(operands, goal)):
            projected |= any(_name(node) in _PROJECTIONS for node in passed)
            name = _name(edge.node)
            if name in _VIEWS:
                continue
            if name in _PROJECTIONS and not projected:
                projected = True
                continue
            yield number, edge
            if number >= _TRIED:
                return

    # ------------------------------------------------------------------------ the tokens u
    @staticmethod
    def _rearranged(state: State, token_map: TokenMap, n: int) -> State:
        if token_map.to is None:
            return state
        return RearrangedState(state.stream, n, tuple(Part(state, to) for to in token_map.places))

    @staticmethod
    def _rows(operand: Operand) -> list[Downstream]:
        """The rows of an operand, and of the others that have as many."""
        call, own = operand.call, operand.call.rows(operand.tensor)
        beside = [call.rows(t) for t in operand.beside if _fits(call, t)]
        return [Downstream.rows(r) for r in (own, *beside) if r.shape[1] == own.shape[1]]

    def _mixed(
        self,
        key: Any,
        downs: list[Downstream],
        operand: Operand,
        members: list[tuple[State, list[Upstream]]] | None = None,
    ) -> MixedState:
        if key in self._at:
            return self._at[key]
        members = self._members(downs, operand) if members is None else members
        self._at[key] = self._made(downs, members, self._by(operand))
        return self._at[key]

    def _made(
        self,
        downs: list[Downstream],
        members: list[tuple[State, list[Upstream]]],
        by: tuple[str, ...],
    ) -> MixedState:
        sizes = [(state.n, upstreams) for state, upstreams in members]
        mixing = Mixing(downs, sizes, self.graph.cuts, seed=len(self.states))
        states = tuple(state for state, _ in members)
        name = joined_name(state.stream for state in states)
        self.states.append(MixedState(name, downs[0].shape[1], states, mixing, by))
        return self.states[-1]

    def _members(
        self, downs: list[Downstream], operand: Operand
    ) -> list[tuple[State, list[Upstream]]]:
        """The states that are mixed, and where the gradients of their tokens are taken."""
        wiring, found = self.wiring, self.graph.members(operand.named)
        groups = wiring.versions([m for m in found if isinstance(m, AttentionCall)])
        leaves = [m for m in found if isinstance(m, Leaf)]
        if len(groups) + len(leaves) > 1:
            joined = self._joined(downs, operand, found)
            if joined is not None:
                return [joined]
        members: list[tuple[State, list[Upstream]]] = [
            (state, [Upstream.call(call) for call in group]) for state, group in groups
        ]
        for leaf in leaves:
            if leaf.tensor.ndim != 3:
                raise WiringError(
                    f"{leaf.name!r} of shape {tuple(leaf.tensor.shape)} is mixed with tokens that "
                    f"were attended before {operand.call.module!r}, and where it joins them could "
                    "not be observed; leave the calls out with `layers=`, or explain the embeddings"
                )
            state = wiring.stream_builder.rows_of(leaf)
            members.append((state, [Upstream.rows_of(leaf, wiring.batch)]))
        return members

    def _joined(
        self, downs: list[Downstream], operand: Operand, found: list[Member]
    ) -> tuple[State, list[Upstream]] | None:
        """The state in which several members have met before anything mixed their tokens."""
        ways = self.graph.on_every_way([down.edge for down in downs], operand.named)
        places = [edge for edge, _ in ways]
        if not places:
            return None
        last = places[-1]
        upstreams = [self.wiring.upstream(member) for member in found]
        for layout in token_layouts(shape_of(last.node, last.output_nr), self.wiring.batch):
            tokens = TokenPoint(last, layout)
            maps = entering(self.tracer, tokens.downstream, upstreams, self.wiring.batch)
            if not any(token_map.mixed for token_map in maps):
                pairs = list(zip(found, maps, strict=True))
                asking = operand.side == "q"
                state = self.wiring.met(pairs, tokens.downstream, operand.named, asking=asking)
                return state, [tokens.upstream]
        return None

    def _by(self, operand: Operand) -> tuple[str, ...]:
        """What mixes: the modules of mixing operations, or between which calls it happens."""
        path, mixers = self.graph.between(operand.tensor.grad_fn, operand.named), self.wiring.mixers
        names = [mixers[node] for node in path if node in mixers]
        calls = self.graph.calls(operand.named)
        before = f"between {calls[-1].module!r} and " if calls else "before "
        return tuple(dict.fromkeys(names)) or (before + repr(operand.call.module),)


def _fits(call: AttentionCall, operand: Tensor) -> bool:
    """Whether an operand has as many heads as the call; grouped keys have fewer."""
    lead = operand.shape[:-2]
    alike = len(lead) == len(call.lead)
    return alike and all(a in (1, b) for a, b in zip(lead, call.lead, strict=True))


def _name(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")
