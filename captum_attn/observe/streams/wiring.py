"""The wiring: which version of which token stream asked, and which answered.

Read off the autograd graph, with no table of architectures. What a query stems from without another
attention call in between is the version that is being updated; what the values stem from is the
version that is being read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import InputError, WiringError
from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.leaf import BATCH_FIRST, PACKED, Leaf, UntracedCall
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.streams.entering import RowsAreNotExamples, crossing, entering
from captum_attn.observe.streams.mixing_hops import MixingHops, Operand
from captum_attn.observe.streams.sources import StreamBuilder, bypassing, covered, with_residual
from captum_attn.observe.streams.states import (
    AttentionState,
    MixedState,
    ParallelState,
    Part,
    Source,
    State,
)
from captum_attn.observe.streams.structure_cache import StructureCache
from captum_attn.observe.tracing.autograd_graph import (
    Graph,
    Member,
    Node,
    NotInGraph,
    Root,
    depends_on_content,
    edge_of,
    gradients,
)
from captum_attn.observe.tracing.axis_roles import (
    OperandOrigin,
    Roles,
    leading_roles,
    packed_roles,
    roles_by_output,
)
from captum_attn.observe.tracing.in_place import operand_rows
from captum_attn.observe.tracing.mixing import Mixing
from captum_attn.observe.tracing.token_map import (
    IDENTITY,
    Downstream,
    TokenMap,
    Upstream,
    enters_nowhere,
)
from captum_attn.observe.tracing.token_tracer import TokenTracer

_NO_DERIVATIVE = (
    "no derivative (int8 and other quantised layers have none), so relevance cannot be traced "
    "through it; explain the model before it was quantised, or a quantisation whose layers are "
    "differentiable (of the weights alone)"
)


class Wiring:
    """States of the token streams of one run, built call by call.

    Args:
        tap (Tap): what was observed.
        graph (Graph): the run's autograd graph.
        root (Root): the model's output in it.
        batch (int): number of examples.
        tracer (TokenTracer): asks for token maps.
        structure (StructureCache): what is known from earlier runs.
    """

    def __init__(
        self,
        tap: Tap,
        graph: Graph,
        root: Root,
        batch: int,
        tracer: TokenTracer,
        structure: StructureCache,
    ) -> None:
        self.tap, self.graph, self.root, self.batch, self.tracer = tap, graph, root, batch, tracer
        ends = [None if root.edge is None else root.edge.node, *graph.cuts]
        self.fingerprint = graph.fingerprint(ends)
        self.structure = structure.for_signature(
            (
                batch,
                self.fingerprint,
                tuple((c.module, c.q.shape, c.v.shape, c.lead) for c in tap.calls),
                tuple(
                    (leaf.name, leaf.tensor.shape, leaf.tensor.dtype, leaf.layout)
                    for leaf in tap.leaves
                ),
            )
        )
        if graph.known is not None and not self.structure.known:
            raise NotInGraph
        self.stream_builder = StreamBuilder(graph, batch, tracer, self.structure.entries)
        self.updates: list[AttentionState] = []
        self._after: dict[AttentionCall, AttentionState] = {}
        self._known: dict[int, list[tuple[list[TokenMap], State]]] = {}
        self.mixers = tap.mixers
        self.mixing_hops = MixingHops(self)
        self._refuse_underivable()
        for call in tap.calls:
            self._wire(call)
        if self.mixed_states and not structure.warned:
            structure.warned = True
            by = dict.fromkeys(name for state in self.mixed_states for name in state.by)
            warnings.warn(
                "tokens are mixed by something else than attention, which is followed by how "
                f"strongly each depends on each (see `describe`): {', '.join(by)}",
                stacklevel=2,
            )

    @property
    def sources(self) -> list[Source]:
        return self.stream_builder.sources

    @property
    def mixed_states(self) -> list[MixedState]:
        """The states whose tokens something else than attention has mixed."""
        return self.mixing_hops.states

    def is_settled(self, call: AttentionCall) -> bool:
        """Whether nothing is asked about a call in another run of this structure."""
        entries = self.structure.entries
        kept = [entries.get((call.index, side)) for side in ("q", "v")]
        roles = entries.get(("ordinary", call.index)) or ("roles", call.index) in entries
        return bool(roles) and all(
            found is not None and found[0] and not self.graph.leaves(found[0]) for found in kept
        )

    @property
    def mixings(self) -> list[Mixing]:
        """Whatever asks autograd again when relevance passes through it."""
        entries = [entry for source in self.sources for entry in source.entries]
        laid = [entry.mixing for entry in entries if entry.mixing is not None]
        return [*(state.mixing for state in self.mixed_states), *laid]

    def after(self, call: AttentionCall) -> AttentionState:
        """The version of its stream that a call makes."""
        return self._after[call]

    def version(self, calls: list[AttentionCall]) -> State:
        """The version of one stream that several parallel calls make together."""
        versions = self.versions(calls)
        if len(versions) == 1:
            return versions[0][0]
        after = [self._after[call] for call in calls]
        modules = ", ".join(repr(state.call.module) for state in after)
        raise WiringError(
            f"versions of the stream {after[0].stream!r} that part at different places are joined "
            f"({modules}; queries {[tuple(s.call.q.shape) for s in after]}); confine the method "
            "with `layers=`"
        )

    def versions(self, calls: list[AttentionCall]) -> list[tuple[State, list[AttentionCall]]]:
        """The versions of streams that calls make, each with those that make it together."""
        groups: dict[tuple[str, State], list[AttentionCall]] = {}
        for call in calls:
            after = self._after[call]
            groups.setdefault((after.stream, after.query_state), []).append(call)
        made: list[tuple[State, list[AttentionCall]]] = []
        for (stream, base), group in groups.items():
            branches = tuple(self._after[call] for call in group)
            together = ParallelState(stream, base.n, base, branches)
            made.append((branches[0] if len(branches) == 1 else together, group))
        return made

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
        asks, reads = self._born(call, values, asked, read) or (
            self._state(call, "q", call.q, asked),
            self._state(call, "v", values, read),
        )
        number = sum(update.stream == asks.stream for update in self.updates)
        update = AttentionState(asks.stream, asks.n, call, asks, reads, number)
        self.updates.append(update)
        self._after[call] = update

    def _born(
        self, call: AttentionCall, values: Tensor, asked: int, read: int
    ) -> tuple[State, State] | None:
        """What asks and what answers, where both begin with the same inputs in unlike pieces."""
        named = self.graph.named(asked)
        if not named or named != self.graph.named(read) or self.graph.calls(named):
            return None
        if call.rows(call.q).shape[1] == call.rows(values).shape[1]:
            return None
        return self.mixing_hops.born(call, values, named)

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

    def _refuse_underivable(self) -> None:
        """Raises if what an input was made into went through an operator without a derivative."""
        for node, where in self.tap.underivable.items():
            reached = self.graph.reach(node)
            if self.graph.named(reached):
                raise WiringError(f"{where} has {_NO_DERIVATIVE}")

    # ------------------------------------------------------------------------ layout
    def _is_ordinary(self, call: AttentionCall, asked: int, read: int, values: Tensor) -> bool:
        """The ordinary hop, checked in one go: laid out as the call before, tokens in place."""
        found = self.graph.members(self.graph.named(asked))
        before = found[0] if len(found) == 1 else None
        if asked != read or not isinstance(before, AttentionCall) or before.lead != call.lead:
            return False

        call.roles, upstream = before.roles, Upstream.call(before)

        def check() -> bool:
            if all(self._stays(call, operand, upstream) for operand in (call.q, values)):
                return True
            rows = [call.rows(operand) for operand in (call.q, values)]
            if rows[0].shape[:2] != rows[1].shape[:2]:
                return False
            return self.tracer.is_identity(torch.cat(rows, -1), upstream)

        ordinary = self.structure.get_or_compute(("ordinary", call.index), check)
        call.roles = before.roles if ordinary else ()
        kept = (call.index, "q") in self.structure.entries
        if ordinary and not kept and not self._moves(asked, call.q, values):
            in_place = self.graph.named(asked), [IDENTITY]
            self.structure.entries[call.index, "q"] = self.structure.entries[call.index, "v"] = (
                in_place
            )
        return ordinary

    def _stays(self, call: AttentionCall, operand: Tensor, upstream: Upstream) -> bool:
        """Whether the rows of an operand are certain to be in the order of the tokens before."""
        return self.tracer.stays(operand, partial(operand_rows, call), upstream)

    def _roles(self, call: AttentionCall, *operands: tuple[Tensor, int]) -> Roles:
        def settle() -> Roles | None:
            entered = False
            packed: list[OperandOrigin] = []
            for operand, latest in operands:
                last = operand is operands[-1][0]
                everything = self.graph.named(self.graph.reach(operand)) if latest else 0
                for members in dict.fromkeys((latest, everything)):
                    asked = self._asked_of(operand, members)
                    fits = (asked.ends or last) and operand.ndim - 2 == len(call.lead)
                    if fits and asked.is_packed and self.batch > 1:
                        packed.append(asked)
                    elif fits:
                        found = leading_roles(call, asked)
                        if found is not None:
                            return found
                        if asked.has_packed and self.batch > 1:
                            packed.append(asked)
                    if self.tracer.any_enters(operand, asked.upstreams):
                        entered = True
                        break  # else the latest calls add nothing (a dead layer): those before
            if not entered:
                return self._roles_by_output(call)
            named = self.graph.members(self.graph.named(operands[0][1] | operands[-1][1]))
            leaves = [leaf for member in named for leaf in self._of_rows(member)]
            if leaves and self.batch > 1:  # their rows enter other examples' tokens
                raise RowsAreNotExamples(leaves)
            return packed_roles(call, packed[0]) if packed else None

        roles = self.structure.get_or_compute(("roles", call.index), settle)
        if roles is None:
            reached = [self.graph.named(self.graph.reach(operand)) for operand, _ in operands]
            if self.root.edge is None and not any(reached):
                raise WiringError(
                    f"neither what {call.module!r} attends to nor the model's output has a "
                    f"gradient: a layer in front has {_NO_DERIVATIVE}"
                )
            self.refuse_shared([m for _, members in operands for m in self.graph.leaves(members)])
            raise WiringError(
                f"{call.module!r}: which of the leading axes {call.lead} of its attention map "
                f"(queries {tuple(call.q.shape)}, values {tuple(call.v.shape)}) holds the "
                f"{self.batch} examples could not be observed; explain one example at a time, or "
                "confine the method to other calls with `layers=`"
            )
        return roles

    def _asked_of(self, operand: Tensor, members: int) -> OperandOrigin:
        stems, start = self.graph.members(self.graph.named(members)), operand.grad_fn
        path = [] if start is None else self.graph.between(start, members)
        upstreams = [u for u in map(self.upstream, stems) if u.batched]
        ends = {edge_of(member).node for member in stems}
        return OperandOrigin(operand, self.batch, upstreams, path, ends, self.tracer)

    def _roles_by_output(self, call: AttentionCall) -> Roles | None:
        root = self.root
        if root.edge is None or root.shape[:1] != (self.batch,):
            return None
        code, *vectors = self.tracer.coded_by_example(root.like, root.shape)
        plain, coded = (gradients([(root.edge, v)], [call.edge])[0] for v in vectors)
        return roles_by_output(call, plain, coded, code)

    def refuse_shared(self, leaves: Iterable[Leaf]) -> None:
        """Raises where an input has other rows than the output has examples: one image, k texts."""
        rows = {leaf.name: len(leaf.tensor) for leaf in self.tap.leaves if leaf.name}
        for leaf in leaves:
            if leaf.name and (rows[leaf.name] % self.batch or leaf.layout == PACKED):
                raise InputError(
                    f"the explained output has {self.batch} rows, and {leaf.name!r} has "
                    f"{rows[leaf.name]} (rows of the inputs: {rows}): what belongs to which "
                    "example cannot be told; explain an output with a row for each of "
                    f"{leaf.name!r} (one image's scores for all texts), or repeat it"
                )

    def upstream(self, member: Member) -> Upstream:
        if isinstance(member, AttentionCall):
            return Upstream.call(member)
        return Upstream.tokens(member, self.batch)

    # ------------------------------------------------------------------------ states
    def _state(self, call: AttentionCall, side: str, operand: Tensor, members: int) -> State:
        """The version of a stream that an operand of `call` stems from."""
        self.stream_builder.call = call
        named = self.graph.named(members)
        before = self._in_place(named, *self.structure.entries.get((call.index, side), (0, [])))
        if before is not None:
            return self._after[before]
        rows = call.rows(operand)  # (B, n, features)
        n = rows.shape[1]
        if not named:
            return self.stream_builder.learned(members, n, asking=side == "q")
        found, maps = self._maps(call, side, rows, named, operand)
        for known, state in self._known.get(named, []):
            alike = state.n == n and all(a.same(b) for a, b in zip(known, maps, strict=True))
            if alike and self.stream_builder.embedded_together(state, rows):
                return state
        pairs = list(zip(found, maps, strict=True))
        pairs = [pair for pair in pairs if not enters_nowhere(pair[1])] or pairs
        if self._are_mixed(pairs, rows):
            state = self.mixing_hops.state(self._mixed_operand(call, side, operand, named))
        else:
            folded = call.windows > 1
            left = self.where_calls_left_inputs(pairs, rows, named)
            state = self.met(pairs, left, members, asking=side == "q", folded=folded)
        self._known.setdefault(named, []).append((maps, state))
        return state

    def where_calls_left_inputs(
        self, pairs: list[tuple[Member, TokenMap]], rows: Tensor | Downstream, named: int
    ) -> Tensor | Downstream:
        """The rows, but those that calls have made, where inputs stand in the other ones still."""
        members = [member for member, _ in pairs]
        if not any(isinstance(m, Leaf) and not self.graph.bit[m] & named for m in members):
            return rows
        made = torch.zeros(self.batch, rows.shape[1], dtype=torch.bool)
        for member, token_map in pairs:
            if isinstance(member, AttentionCall):
                made |= covered(token_map, rows.shape[1], self.batch)
        down = Downstream.rows(rows) if isinstance(rows, Tensor) else rows
        return down.confined((~made).to(rows.device))

    def _in_place(self, named: int, members: int, maps: list[TokenMap]) -> AttentionCall | None:
        """The one call whose tokens stand in place, if that is what is known of an operand."""
        if members != named or len(maps) != 1 or not maps[0].is_identity:
            return None
        (before,) = self.graph.members(named)
        return before if isinstance(before, AttentionCall) else None

    def met(
        self,
        pairs: list[tuple[Member, TokenMap]],
        rows: Tensor | Downstream,
        members: int,
        asking: bool,
        folded: bool = False,
    ) -> State:
        """The state that several members make together, each with its map to the rows."""
        after = [(self._after[m], t) for m, t in pairs if isinstance(m, AttentionCall)]
        leaves = [(m, t) for m, t in pairs if not isinstance(m, AttentionCall)]
        one_stream = len({state.stream for state, _ in after}) == 1
        if one_stream and not leaves and all(t.to is None for _, t in after):
            versions = self.versions([update.call for update, _ in after])
            if len(versions) > 1:
                return self.mixing_hops.added(versions, rows)
            return versions[0][0]
        parts = [Part(update, to) for update, t in after for to in t.places]
        return self.stream_builder.joined(
            parts, leaves, rows, members, asking=asking, folded=folded
        )

    def _are_mixed(self, pairs: list[tuple[Member, TokenMap]], rows: Tensor) -> bool:
        """Whether tokens of earlier calls, or ids that fill positions, enter several positions.

        Not so for ids that are added to tokens which are there already (the kind of an image), nor
        for overlapping pictures, which are followed by the feature map that they become.
        """
        n = rows.shape[1]
        there = torch.zeros(self.batch, n, dtype=torch.bool)
        for member, token_map in sorted(pairs, key=lambda pair: _order(pair[0])):
            if not token_map.mixed:
                there |= covered(token_map, n, self.batch)
                continue
            if isinstance(member, AttentionCall):
                return True
            if member.ids is None or bool(there.all()):
                continue
            if not self.tracer.any_enters(rows, [self.upstream(member)], there):
                return True  # else added to tokens that nothing has mixed, and to learned ones
        return False

    def _mixed_operand(
        self, call: AttentionCall, side: str, operand: Tensor, named: int
    ) -> Operand:
        """An operand whose tokens are mixed, with what was made of the same ones beside it."""

        def alike(other: Tensor) -> bool:
            reached = self.graph.named(self._latest(other))
            return other is not operand and bool(reached) and not reached & ~named

        beside = [t for t in (call.q, call.k, call.v) if alike(t) and t.grad_fn is not None]
        return Operand(call, side, operand, tuple(beside), named)

    def _maps(
        self, call: AttentionCall, side: str, rows: Tensor, named: int, operand: Tensor
    ) -> tuple[list[Member], list[TokenMap]]:
        """The members of an operand, with where their tokens (or elements) enter it."""
        kept = self.structure.entries.get((call.index, side))
        if kept is not None:
            return self.graph.members(kept[0]), kept[1]
        found = self.graph.members(named)
        if ("mixed", call.index, side) in self.structure.entries:
            return found, self.structure.entries["mixed", call.index, side]
        known = self._known.get(named, [])
        likely = [maps for maps, state in known if state.n == rows.shape[1]]
        upstreams = [self.upstream(m) for m in found]
        maps = list(entering(self.tracer, rows, upstreams, self.batch, likely))
        mixed = any(token_map.mixed for token_map in maps)
        for member, upstream, token_map in zip(found, upstreams, maps, strict=True):
            leaves = self._of_rows(member) if self.batch > 1 else []
            here = isinstance(member, Leaf) and call.packed
            if leaves and (here or token_map.mixed and crossing(self.tracer, rows, upstream)):
                raise RowsAreNotExamples(leaves)
        if self._are_mixed(list(zip(found, maps, strict=True)), rows):
            self.structure.entries["mixed", call.index, side] = maps
            return found, maps
        for i, member in enumerate(found):
            if isinstance(member, AttentionCall):
                maps[i] = with_residual(maps, i, rows.shape[1], self.batch)
        before = 0 if mixed else self.graph.named(self.graph.reach(operand) & ~named)
        earlier = {member: self.upstream(member) for member in self.in_order(before)}
        older = bypassing(rows, maps, earlier, self.tracer, self.batch)
        members = named | sum(self.graph.bit[member] for member in older)
        of_member = {**dict(zip(found, maps, strict=True)), **older}
        found = self.graph.members(members)
        maps = [of_member[member] for member in found]
        if self._moves(members, operand):
            return found, [replace(token_map, moving=True) for token_map in maps]
        if all(isinstance(m, AttentionCall) or m.ids is None for m in found):
            self.structure.entries[call.index, side] = members, maps
        return found, maps

    def lengths(self, member: Member) -> list[int]:
        """How many tokens a call or an input has made."""
        if isinstance(member, AttentionCall):
            return [self._after[member].n]
        begun = self.stream_builder.initial_states
        return [s.n for s in begun if any(entry.leaf is member for entry in s.source.entries)]

    def in_order(self, members: int) -> list[Member]:
        """Inputs, then calls in the order of execution."""
        return [*self.graph.leaves(members), *self.graph.calls(members)]

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


def _order(member: Member) -> int:
    return -1 if isinstance(member, AttentionCall) else member.order
