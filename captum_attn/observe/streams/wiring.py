"""The wiring: which version of which token stream asked, and which answered.

Read off the autograd graph, with no table of architectures. What a query stems from without another
attention call in between is the version that is being updated; what the values stem from is the
version that is being read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import WiringError
from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.leaf import BATCH_FIRST, Leaf, UntracedCall
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.streams.entering import RowsAreNotExamples, crossing, entering
from captum_attn.observe.streams.sources import StreamBuilder, bypassing, with_residual
from captum_attn.observe.streams.states import AttentionState, ParallelState, Part, Source, State
from captum_attn.observe.streams.structure_cache import StructureCache
from captum_attn.observe.tracing.autograd_graph import Graph, Member, Node, depends_on_content
from captum_attn.observe.tracing.axis_roles import Roles, leading_roles, packed_roles
from captum_attn.observe.tracing.token_map import IDENTITY, TokenMap, Upstream, enters_nowhere
from captum_attn.observe.tracing.token_tracer import TokenTracer


class Wiring:
    """States of the token streams of one run, built call by call.

    Args:
        tap (Tap): what was observed.
        graph (Graph): the run's autograd graph.
        batch (int): number of examples.
        tracer (TokenTracer): asks for token maps.
        structure (StructureCache): what is known from earlier runs.
    """

    def __init__(
        self, tap: Tap, graph: Graph, batch: int, tracer: TokenTracer, structure: StructureCache
    ) -> None:
        self.tap, self.graph, self.batch, self.tracer = tap, graph, batch, tracer
        self.structure = structure.for_signature(
            (
                batch,
                tuple((c.module, c.q.shape, c.v.shape, c.lead) for c in tap.calls),
                tuple(
                    (leaf.name, leaf.tensor.shape, leaf.tensor.dtype, leaf.layout)
                    for leaf in tap.leaves
                ),
            )
        )
        self.stream_builder = StreamBuilder(graph, batch, tracer, self.structure.entries)
        self.updates: list[AttentionState] = []
        self._after: dict[AttentionCall, AttentionState] = {}
        self._known: dict[int, list[tuple[list[TokenMap], State]]] = {}
        self._passed_over: list[str] = []
        for call in tap.calls:
            self._wire(call)
        if self._passed_over and not structure.warned:
            structure.warned = True
            warnings.warn(
                "attention is explained, other ways of mixing tokens are passed over: "
                + ", ".join(dict.fromkeys(self._passed_over)),
                stacklevel=2,
            )

    @property
    def sources(self) -> list[Source]:
        return self.stream_builder.sources

    def after(self, call: AttentionCall) -> AttentionState:
        """The version of its stream that a call makes."""
        return self._after[call]

    def version(self, calls: list[AttentionCall]) -> State:
        """The version of one stream that several parallel calls make together."""
        after = [self._after[call] for call in calls]
        if len(after) == 1:
            return after[0]
        base = after[0].query_state
        if any(state.query_state is not base for state in after):
            modules = ", ".join(repr(state.call.module) for state in after)
            raise WiringError(
                f"versions of the stream {base.stream!r} that part at different places are joined "
                f"({modules}; queries {[tuple(s.call.q.shape) for s in after]}); confine the "
                "method with `layers=`"
            )
        return ParallelState(base.stream, base.n, base, tuple(after))

    def final_states(self) -> dict[str, State]:
        """The last version of every stream, by the stream's name."""
        final: dict[str, State] = {
            state.stream: state for state in self.stream_builder.initial_states
        }
        calls: dict[str, list[AttentionCall]] = {}
        for update in self.updates:
            calls.setdefault(update.stream, []).append(update.call)
        for stream, group in calls.items():
            latest = self.graph.latest(sum(self.graph.bit[call] for call in group))
            last = self.graph.calls(latest)
            base = self._after[last[-1]].query_state
            final[stream] = self.version([c for c in last if self._after[c].query_state is base])
        return final

    # ------------------------------------------------------------------------ one call
    def _wire(self, call: AttentionCall) -> None:
        self.refuse_detached(call.detached_from, (call.q, call.k, call.v), f"{call.module!r} reads")
        asked, read, values = self._latest(call.q), self._latest(call.v), call.v
        if not read:  # constant values (DETR's first decoder layer): the keys tell
            read, values = self._latest(call.k), call.k
        graph = self.graph
        if graph.calls(asked) == graph.calls(read) and graph.named(asked & read):
            asked &= read  # q = k = x + position, v = x: the positions are no tokens of their own
        if not self._is_ordinary(call, asked, read, values):
            call.roles = self._roles(call, (call.q, asked), (values, read))
        asks = self._state(call, "q", call.q, asked)
        reads = self._state(call, "v", values, read)
        number = sum(update.stream == asks.stream for update in self.updates)
        update = AttentionState(asks.stream, asks.n, call, asks, reads, number)
        self.updates.append(update)
        self._after[call] = update

    def _latest(self, tensor: Tensor) -> int:
        return self.graph.latest(self.graph.reach(tensor))

    def refuse_detached(
        self, detached_from: Iterable[Any], read_by: Iterable[Tensor | Node | None], how: str
    ) -> None:
        """Raises if tokens were read whose history was cut off and is not otherwise reached."""
        live = 0
        for start in read_by:
            live |= self.graph.reach(start)
        for cut in detached_from:
            if isinstance(cut, UntracedCall):
                names = [cut.module]
            else:
                calls = self.graph.calls(self.graph.reach(cut))
                names = [c.module for c in calls if not self.graph.contains(live, c)]
            if names:
                raise WiringError(
                    f"{how} what the attention of {names[0]!r} computed under `no_grad` or before "
                    "a `detach`, so relevance cannot be traced through it; expected a model that "
                    "is differentiable throughout: remove the `no_grad`/`detach` (or turn off "
                    "reentrant gradient checkpointing) around it"
                )

    # ------------------------------------------------------------------------ layout
    def _is_ordinary(self, call: AttentionCall, asked: int, read: int, values: Tensor) -> bool:
        """The ordinary hop, checked in one go: laid out as the call before, tokens in place."""
        found = self.graph.members(self.graph.named(asked))
        before = found[0] if len(found) == 1 else None
        if asked != read or not isinstance(before, AttentionCall) or before.lead != call.lead:
            return False

        def check() -> bool:
            call.roles = before.roles
            rows = [call.rows(operand) for operand in (call.q, values)]
            if rows[0].shape[:2] != rows[1].shape[:2]:
                return False
            return self.tracer.is_identity(torch.cat(rows, -1), Upstream.call(before))

        ordinary = self.structure.get_or_compute(("ordinary", call.index), check)
        call.roles = before.roles if ordinary else ()
        kept = (call.index, "q") in self.structure.entries
        if ordinary and not kept and not self._moves(asked, call.q, values):
            in_place = self.graph.named(asked), [IDENTITY]
            self.structure.entries[call.index, "q"] = self.structure.entries[call.index, "v"] = (
                in_place
            )
        return ordinary

    def _roles(self, call: AttentionCall, *operands: tuple[Tensor, int]) -> Roles:
        def settle() -> Roles | None:
            askable: list[tuple[Tensor, list[Upstream]]] = []
            for operand, members in operands:
                upstreams = [
                    self._upstream(m) for m in self.graph.members(self.graph.named(members))
                ]
                last = operand is operands[-1][0]
                if (upstreams or last) and operand.ndim - 2 == len(call.lead):
                    askable.append((operand, upstreams))
            for operand, upstreams in askable:
                if self.batch == 1 or not upstreams or not all(u.packed for u in upstreams):
                    found = leading_roles(call, operand, self.batch, upstreams, self.tracer)
                    if found is not None:
                        return found
            named = self.graph.members(self.graph.named(operands[0][1] | operands[-1][1]))
            leaves = [leaf for member in named for leaf in self._of_rows(member)]
            if leaves and self.batch > 1:  # their rows enter other examples' tokens
                raise RowsAreNotExamples(leaves)
            for operand, upstreams in askable:
                if upstreams:
                    return packed_roles(call, operand, upstreams, self.tracer)
            return None

        roles = self.structure.get_or_compute(("roles", call.index), settle)
        if roles is None:
            raise WiringError(
                f"{call.module!r}: which of the leading axes {call.lead} of its attention map "
                f"(queries {tuple(call.q.shape)}, values {tuple(call.v.shape)}) holds the "
                f"{self.batch} examples could not be observed; explain one example at a time, or "
                "confine the method to other calls with `layers=`"
            )
        return roles

    def _upstream(self, member: Member) -> Upstream:
        if isinstance(member, AttentionCall):
            return Upstream.call(member)
        return Upstream.tokens(member, self.batch)

    # ------------------------------------------------------------------------ states
    def _state(self, call: AttentionCall, side: str, operand: Tensor, members: int) -> State:
        """The version of a stream that an operand of `call` stems from."""
        self.stream_builder.call = call
        rows = call.rows(operand)  # (B, n, features)
        named, n = self.graph.named(members), rows.shape[1]
        if not named:
            return self.stream_builder.learned(members, n, asking=side == "q")
        found, maps = self._maps(call, side, rows, named, operand)
        for known, state in self._known.get(named, []):
            alike = state.n == n and all(a.same(b) for a, b in zip(known, maps, strict=True))
            if alike and self.stream_builder.embedded_together(state, rows):
                return state
        pairs = list(zip(found, maps, strict=True))
        pairs = [pair for pair in pairs if not enters_nowhere(pair[1])] or pairs
        after = [(self._after[m], t) for m, t in pairs if isinstance(m, AttentionCall)]
        leaves = [(m, t) for m, t in pairs if not isinstance(m, AttentionCall)]
        one_stream = len({state.stream for state, _ in after}) == 1
        if one_stream and not leaves and all(t.to is None for _, t in after):
            state = self.version([update.call for update, _ in after])
        else:
            parts = [Part(update, to) for update, t in after for to in t.places]
            state = self.stream_builder.joined(
                parts, leaves, rows, members, asking=side == "q", folded=call.windows > 1
            )
        self._known.setdefault(named, []).append((maps, state))
        return state

    def _maps(
        self, call: AttentionCall, side: str, rows: Tensor, named: int, operand: Tensor
    ) -> tuple[list[Member], list[TokenMap]]:
        """The members of an operand, with where their tokens (or elements) enter it."""
        kept = self.structure.entries.get((call.index, side))
        if kept is not None:
            return self.graph.members(kept[0]), kept[1]
        found = self.graph.members(named)
        known = self._known.get(named, [])
        likely = [maps for maps, state in known if state.n == rows.shape[1]]
        upstreams = [self._upstream(m) for m in found]
        maps = list(entering(self.tracer, rows, upstreams, self.batch, likely))
        for member, upstream, token_map in zip(found, upstreams, maps, strict=True):
            leaves = self._of_rows(member) if self.batch > 1 else []
            here = isinstance(member, Leaf) and call.packed
            if leaves and (here or token_map.mixed and crossing(self.tracer, rows, upstream)):
                raise RowsAreNotExamples(leaves)
        for i, member in enumerate(found):
            if isinstance(member, AttentionCall):
                if maps[i].mixed:
                    maps[i] = self._pass_over(call, member, rows, operand, named)
                maps[i] = with_residual(maps, i, rows.shape[1], self.batch)
        mixed = any(token_map.mixed for token_map in maps)
        earlier = [] if mixed else self.graph.calls(self.graph.reach(operand) & ~named)
        older = bypassing(rows, maps, earlier, self.tracer, self.batch)
        members = named | sum(self.graph.bit[member] for member in older)
        of_member = {**dict(zip(found, maps, strict=True)), **older}
        found = self.graph.members(members)
        maps = [of_member[member] for member in found]
        if self._moves(members, operand):
            return found, [self._moving(m, t) for m, t in zip(found, maps, strict=True)]
        if all(isinstance(m, AttentionCall) or m.ids is None for m in found):
            self.structure.entries[call.index, side] = members, maps
        return found, maps

    @staticmethod
    def _moving(member: Member, token_map: TokenMap) -> TokenMap:
        """A map that is made anew in every run, for the elements that enter one token each."""
        if token_map.partial is None or isinstance(member, AttentionCall):
            return replace(token_map, moving=True)
        warnings.warn(
            f"parts of {member.name!r} enter several tokens at once (patches that the model draws "
            "repeatedly); these parts get no relevance",
            stacklevel=2,
        )
        return TokenMap(token_map.partial, moving=True)

    def _of_rows(self, member: Member) -> list[Leaf]:
        """The float inputs with as many rows as examples that went into a member."""
        return [
            leaf
            for leaf in self.graph.leaves(self.graph.closed(self.graph.bit[member]))
            if leaf.name and leaf.layout == BATCH_FIRST and not leaf.of_integers
        ]

    def _moves(self, members: int, *operands: Tensor) -> bool:
        """Whether the way of the tokens into these operands may differ from input to input."""
        return any(
            depends_on_content(self.graph.between(operand.grad_fn, members)) for operand in operands
        )

    def _pass_over(
        self, call: AttentionCall, member: AttentionCall, rows: Tensor, operand: Tensor, goal: int
    ) -> TokenMap:
        """Tokens are mixed on the way by something else than attention."""
        if self._after[member].n != rows.shape[1]:
            raise WiringError(
                f"between {member.module!r} ({self._after[member].n} tokens) and {call.module!r} "
                f"({rows.shape[1]} tokens) the tokens are mixed in a way that could not be "
                "observed; confine the method to one side with `layers=`"
            )
        path = self.graph.between(operand.grad_fn, goal)
        mixers = [self.tap.mixers[node] for node in path if node in self.tap.mixers]
        self._passed_over += mixers or [f"between {member.module!r} and {call.module!r}"]
        return IDENTITY
