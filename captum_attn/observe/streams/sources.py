"""Births and joins: what a state is made of where it is not just an earlier call's version."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.streams.input_maps import enter
from captum_attn.observe.streams.states import (
    InitialState,
    InputMap,
    LearnedState,
    Part,
    RearrangedState,
    Source,
    State,
    joined_name,
)
from captum_attn.observe.streams.windows import renumbered, unfolded
from captum_attn.observe.tracing.autograd_graph import Graph, Member
from captum_attn.observe.tracing.token_map import IDENTITY, Downstream, TokenMap, Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer

_AT_ONCE = 4  # earlier calls that are asked about in one go


class StreamBuilder:
    """Makes the states that begin streams or join them, and knows every source.

    Args:
        graph (Graph): the run's graph.
        batch (int): number of examples.
        tracer (TokenTracer): asks for token maps.
        kept (dict): findings of earlier runs.
    """

    def __init__(self, graph: Graph, batch: int, tracer: TokenTracer, kept: dict[Any, Any]) -> None:
        self.graph, self.batch, self.tracer, self.kept = graph, batch, tracer, kept
        self.sources: list[Source] = []
        self.initial_states: list[InitialState] = []
        self.added: set[str] = set()  # inputs that are added to tokens of another one
        self._learned: list[tuple[int, InitialState]] = []

    def learned(self, members: int, n: int, asking: bool) -> State:
        """Tokens that stem from parameters alone: a `queries` stream if they ask."""
        for known, state in self._learned:
            if known & members and state.n == n:
                return state
        if not asking:
            return LearnedState("", n)
        state = self._born("queries", n, [])
        self._learned.append((members, state))
        return state

    def rows_of(self, leaf: Leaf) -> InitialState:
        """The stream that begins with the rows of an embedding or of a (B, n, D) input."""
        if leaf.ids is None:
            n, entry = leaf.tensor.shape[1], _rowwise(leaf)
        else:
            n = leaf.tensor.shape[:-1].numel() // self.batch
            entry = InputMap(leaf, None, tuple(leaf.shape[1:]))
        return self._born_with(entry) or self._born(leaf.name, n, [entry])

    def joined(
        self,
        parts: list[Part],
        leaves: Sequence[tuple[Leaf, TokenMap]],
        rows: Tensor | Downstream,
        members: int,
        asking: bool,
        folded: bool,
    ) -> State:
        """A state from earlier ones (`parts`), inputs, and learned tokens among them.

        Args:
            leaves: the inputs that enter, each with its map to the positions of `rows`.
            rows (Tensor): (B, n, features), the operand that the state is seen in.
            members (int): everything that the operand stems from.
            asking (bool): whether the operand is a query.
            folded (bool): whether its tokens are folded into windows.
        """
        n = rows.shape[1]
        parts, entries = list(parts), []
        for entry in self._entries(rows, leaves, among=bool(parts)):
            born = self._born_with(entry)
            if born is None:
                entries.append(entry)
            else:  # tokens of an earlier state at other places: keys behind a learned prefix
                first = next(e for e in born.source.entries if e.leaf is entry.leaf)
                parts.append(Part(born, _composed(first, entry, born.n)))
        parts += self._learned_parts(rows, members)
        if not parts:
            name = "+".join(dict.fromkeys(entry.leaf.name for entry in entries))
            learned = [leaf.tensor for leaf in self.graph.leaves(members) if not leaf.name]
            place = None
            if folded and isinstance(rows, Tensor):
                place = unfolded(entries, rows, learned, self.tracer)
            if place is None:
                return self._born(name, n, entries)
            born = self._born(name, len(place), [renumbered(entries[0], place, n)])
            return RearrangedState(born.stream, n, (Part(born, place[None]),))
        own = [self._own_part(entry, n) for entry in entries]
        streams = dict.fromkeys(part.state.stream for part in own or parts)
        name = next(iter(streams)) if own else joined_name(streams)
        if asking and not own and len(streams) > 1:
            name = self._unique(name)
        return RearrangedState(name, n, (*parts, *own))

    def _entries(
        self, rows: Tensor | Downstream, leaves: Sequence[tuple[Leaf, TokenMap]], among: bool
    ) -> list[InputMap]:
        """Of the inputs that enter here, those that carry the content of their positions.

        Inputs that enter positions which an earlier one (in the forward signature) has filled are
        added to it (`token_type_ids`, `position_ids`, `bbox`) and name nothing.
        """
        entries: list[InputMap] = []
        taken = torch.zeros(self.batch, rows.shape[1], dtype=torch.bool)
        for leaf, token_map in sorted(leaves, key=lambda pair: pair[0].order):
            if (among or entries) and leaf.ids is not None and token_map.mixed:
                self.added.add(leaf.name)
                continue  # spread over tokens that are there already, as the id of their image is
            entry = enter(leaf, token_map, rows, self.graph, self.tracer, self.kept)
            here = covered(TokenMap(entry.to), rows.shape[1], self.batch)
            if not (here & taken).any() and all(e.leaf.name != leaf.name for e in entries):
                taken |= here
                entries.append(entry)
            else:
                self.added.add(leaf.name)
        return entries

    def _own_part(self, entry: InputMap, n: int) -> Part:
        """An input that joins tokens which are there already, as a source of its own."""
        leaf = entry.leaf
        if leaf.tensor.ndim == 3:  # (B, n, D): its tokens are its rows
            n = leaf.tensor.shape[1]
            to = _row_places(entry.to, n)
            entry = InputMap(leaf, None, (n,)) if leaf.ids is not None else _rowwise(leaf)
        else:
            here = covered(TokenMap(entry.to), n, self.batch)
            to = torch.where(here, torch.arange(n), -1).to(leaf.tensor.device)
        return Part(self._born(leaf.name, n, [entry]), to)

    def _learned_parts(self, rows: Tensor | Downstream, members: int) -> list[Part]:
        """Rows of a `queries` stream among other keys: a resampler's `cat(media, latents)`."""
        parts = []
        for known, state in self._learned:
            for leaf in self.graph.leaves(known & members):
                upstream = Upstream.elements(leaf.tensor, batched=False)
                (token_map,) = self.tracer.maps(rows, [upstream])
                to = token_map.to
                if to is not None and to.shape[1] % state.n == 0:
                    parts.append(Part(state, to.view(to.shape[0], state.n, -1)[..., 0]))
                    break
        return parts

    def _born_with(self, entry: InputMap) -> InitialState | None:
        """The stream that an input has begun already, in the same patches."""

        def alike(known: InputMap) -> bool:
            return known.leaf is entry.leaf and known.shape == entry.shape

        return next((s for s in self.initial_states if any(map(alike, s.source.entries))), None)

    def _born(self, name: str, n: int, entries: list[InputMap]) -> InitialState:
        source = Source(self._unique(name), n, entries)
        self.sources.append(source)
        self.initial_states.append(InitialState(source.name, n, source))
        return self.initial_states[-1]

    def _unique(self, name: str) -> str:
        taken = {source.name for source in self.sources}
        if name not in taken:
            return name
        if name != "queries" and f"decoder_{name}" not in taken:
            return f"decoder_{name}"  # an input that the model embeds twice
        return next(f"{name}_{i}" for i in range(1, len(taken) + 2) if f"{name}_{i}" not in taken)


def covered(token_map: TokenMap, n: int, batch: int) -> Tensor:
    """(B, n) on the CPU: which positions are entered."""
    here = torch.zeros(batch, n + 1, dtype=torch.bool)
    for to in token_map.places:
        if to is None:
            return torch.ones(batch, n, dtype=torch.bool)
        to = to.expand(batch, -1).cpu()
        here.scatter_(1, torch.where(to < 0, n, to), True)
    return here[:, :n]


def with_residual(maps: Sequence[TokenMap], i: int, n: int) -> TokenMap:
    """A call's map, with the tokens to which it adds nothing where the residual leaves them.

    A token whose output is multiplied by zero enters nowhere through the call; if nobody else
    takes its place, it is the earlier version's token that stands there.
    """
    to = maps[i].to
    if to is None or to.shape[1] != n or bool((to >= 0).all()):
        return maps[i]
    places = torch.arange(n, device=to.device).expand_as(to)
    if not bool(((to == places) | (to < 0)).all()):
        return maps[i]
    gone = (to < 0).cpu()
    others = (covered(other, n, to.shape[0]) for k, other in enumerate(maps) if k != i)
    return maps[i] if any(bool((gone & here).any()) for here in others) else IDENTITY


def bypassing(
    rows: Tensor, maps: Sequence[TokenMap], earlier: Sequence[AttentionCall], tracer: TokenTracer
) -> dict[Member, TokenMap]:
    """Earlier calls whose tokens stand where the latest ones (with `maps`) enter nowhere.

    Not every token passes through every call: class attention updates [CLS] alone, a decoder may
    let only its queries look at the image.

    Args:
        rows (Tensor): (B, n, features), the operand.
        earlier (sequence of AttentionCall): in the order of execution.
    """
    batch, n = rows.shape[:2]
    vacant = ~torch.stack([covered(token_map, n, batch) for token_map in maps]).any(0)
    older: dict[Member, TokenMap] = {}
    if not earlier or not bool(vacant.any()):
        return older
    for call, token_map in _latest_first(rows, earlier, tracer):
        if not bool(vacant.any()):
            break
        standing = []
        for to in token_map.places if not token_map.mixed else ():
            to = torch.arange(n)[None] if to is None else to.cpu()
            to = to.expand(batch, -1)
            stands = (to >= 0) & vacant.gather(1, to.clamp_min(0))
            if bool(stands.any()):
                standing.append(torch.where(stands, to, -1).to(rows.device))
        if standing:
            older[call] = TokenMap(standing[0], tuple(standing[1:]))
            vacant &= ~covered(older[call], n, batch)
    return older


def _latest_first(
    rows: Tensor, earlier: Sequence[AttentionCall], tracer: TokenTracer
) -> Iterator[tuple[AttentionCall, TokenMap]]:
    """Calls with their maps to the rows, the latest first, asked for only as far as they are."""
    calls = list(reversed(earlier))
    for start in range(0, len(calls), _AT_ONCE):
        chunk = calls[start : start + _AT_ONCE]
        maps = tracer.maps(rows, [Upstream.call(call) for call in chunk])
        yield from zip(chunk, maps, strict=True)


def _row_places(to: Tensor | None, n: int) -> Tensor | None:
    """Positions of the n rows of a (B, n, D) input, from those of its elements."""
    if to is None or to.shape[1] == n:
        return to
    return to.view(to.shape[0], n, -1).amax(-1)


def _rowwise(leaf: Leaf) -> InputMap:
    n, features = leaf.tensor.shape[1:]
    to = torch.arange(n, device=leaf.tensor.device)[:, None].expand(n, features)
    return InputMap(leaf, to.reshape(1, -1), (n, features))


def _composed(born: InputMap, now: InputMap, n: int) -> Tensor | None:
    """Where the n tokens of a source are now: token <- element -> position."""
    if born.to is None:
        return now.to
    places = torch.arange(born.to.shape[1], device=born.to.device)[None]
    places = places if now.to is None else now.to
    batch = max(born.to.shape[0], places.shape[0])
    tokens, places = born.to.expand(batch, -1), places.expand(batch, -1)
    to = torch.full((batch, n + 1), -1, device=tokens.device)
    to.scatter_(1, torch.where(tokens < 0, n, tokens), places)
    return to[:, :n]
