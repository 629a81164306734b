"""Births and joins: what a state is made of where it is not just an earlier call's version."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import WiringError
from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.leaf import BATCH_FIRST, PACKED, Leaf
from captum_attn.observe.streams.entering import entering
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
from captum_attn.observe.tracing.autograd_graph import Graph, Member, Node, shape_of
from captum_attn.observe.tracing.token_index import occupied, scatter, take
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
        self.call: AttentionCall | None = None  # the one that is being wired
        # state -> the call that it was born with, and the way from its operand back to its input
        self._ways: dict[State, tuple[AttentionCall | None, set[Node]]] = {}

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
        if leaf.layout == PACKED and self.batch > 1:
            raise WiringError(
                f"the rows of {leaf.name!r} belong to no example of their own, and something else "
                "than attention mixes them; explain one example at a time"
            )
        axes = leaf.axes(self.batch)
        if leaf.ids is None:
            n, entry = axes[0], _rowwise(leaf)
        else:
            n, entry = math.prod(axes), InputMap(leaf, None, axes)
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
            born = self._born_with(entry, rows)
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
            of_places = all(entry.mixing is None for entry in entries)
            if folded and of_places and isinstance(rows, Tensor):
                place = unfolded(entries, rows, learned, self.tracer)
            if place is None:
                return self._born(name, n, entries, rows)
            born = self._born(name, len(place), [renumbered(entries[0], place, n)], rows)
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
        of_names: dict[str, Tensor] = {}
        for leaf, token_map in sorted(leaves, key=_content_first):
            if (among or entries) and leaf.of_integers and token_map.mixed:
                self.added.add(leaf.name)
                continue  # spread over tokens that are there already, as the id of their image is
            key = ("grid", self.graph.bit[leaf], rows.shape, len(self.sources))
            entry = enter(leaf, token_map, rows, self.graph, self.tracer, self.kept, key)
            here = covered(TokenMap(entry.to), rows.shape[1], self.batch)
            filled = here & taken
            if bool(filled.any()):
                # The same input again: other elements of it count (codebooks that are added up),
                # the same ones (an id's vectors of several hashes) have been counted.
                known = of_names.get(leaf.name)
                if (
                    known is None
                    or not leaf.known
                    or bool((known & entered(entry, self.batch)).any())
                ):
                    self.added.add(leaf.name)
                    continue
            if leaf.known:
                here_too = of_names.get(leaf.name)
                now = entered(entry, self.batch)
                of_names[leaf.name] = now if here_too is None else now | here_too
            taken |= here
            entries.append(entry)
        return entries

    def _own_part(self, entry: InputMap, n: int) -> Part:
        """An input that joins tokens which are there already, as a source of its own."""
        leaf = entry.leaf
        if leaf.ids is not None:  # its tokens are its rows
            to, axes = entry.to, leaf.axes(self.batch)
            n, entry = math.prod(axes), InputMap(leaf, None, axes)
        elif leaf.tensor.ndim == 3 and leaf.layout == BATCH_FIRST and entry.mixing is None:
            n = leaf.tensor.shape[1]
            to, entry = _row_places(entry.to, n), _rowwise(leaf)
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

    def _born_with(
        self, entry: InputMap, rows: Tensor | Downstream | None = None
    ) -> InitialState | None:
        """The stream that an input has begun already, with the same tokens at other places."""
        for state in self.initial_states:
            for known in state.source.entries:
                same_leaf = known.leaf is entry.leaf and known.shape == entry.shape
                alike = known.axes == entry.axes and known.box == entry.box
                alike = alike and (known.mixing is None) == (entry.mixing is None)
                if entry.mixing is not None:
                    alike = alike and state.n == entry.mixing.shape[1]
                same = same_leaf and alike and _regrouped(known, entry, state.n)
                if same and (rows is None or self.embedded_together(state, rows)):
                    return state
        return None

    def embedded_together(self, state: State, rows: Tensor | Downstream) -> bool:
        """Whether an image became these tokens once, and not twice (two models of one image)."""
        if isinstance(state, RearrangedState) and len(state.parts) == 1:
            state = state.parts[0].state
        if not isinstance(state, InitialState) or state not in self._ways:
            return True  # its rows are tokens from the start
        call, way = self._ways[state]
        if call is self.call:
            return True
        images = [entry.leaf for entry in state.source.entries if is_image(entry.leaf)]
        pixels = {tuple(leaf.tensor.shape) for leaf in images}
        return any(shape_of(node) not in pixels for node in way & self._way(rows, images))

    def _way(self, rows: Tensor | Downstream, leaves: Sequence[Leaf]) -> set[Node]:
        goal = sum(self.graph.bit[leaf] for leaf in leaves)
        return set(self.graph.between(rows.grad_fn, goal)) if rows.grad_fn is not None else set()

    def _born(
        self, name: str, n: int, entries: list[InputMap], rows: Tensor | Downstream | None = None
    ) -> InitialState:
        source = Source(self._unique(name, entries), n, entries)
        self.sources.append(source)
        self.initial_states.append(InitialState(source.name, n, source))
        images = [entry.leaf for entry in entries if is_image(entry.leaf)]
        if rows is not None and images:
            self._ways[self.initial_states[-1]] = self.call, self._way(rows, images)
        return self.initial_states[-1]

    def _unique(self, name: str, entries: Sequence[InputMap] = ()) -> str:
        taken = {source.name for source in self.sources}
        if name not in taken:
            return name
        again = (
            not entries
            or not all(entry.of_input for entry in entries)
            or any(
                bool((entered(entry, self.batch) & entered(known, self.batch)).any())
                for entry in entries
                for source in self.sources
                for known in source.entries
                if known.leaf.name == entry.leaf.name and known.of_input and entry.of_input
            )
        )
        if name != "queries" and again and f"decoder_{name}" not in taken:
            return f"decoder_{name}"  # an input that the model embeds twice
        return next(f"{name}_{i}" for i in range(1, len(taken) + 2) if f"{name}_{i}" not in taken)


def entered(entry: InputMap, batch: int) -> Tensor:
    """Which elements of the input enter here, of the input's shape."""
    leaf = entry.leaf
    if entry.to is None or entry.axes is not None:
        here = torch.ones(1, math.prod(leaf.axes(batch)), device=leaf.tensor.device)
    else:
        here = (entry.to >= 0).float()
    return leaf.laid(here if leaf.layout == PACKED else here.expand(batch, -1)) > 0


def _regrouped(born: InputMap, now: InputMap, n: int) -> bool:
    """Whether the tokens that elements enter now are tokens that they entered before."""
    if born.to is None and now.to is None:
        return True
    given = born.to if born.to is not None else now.to
    assert given is not None
    elements = torch.arange(given.shape[1], device=given.device)[None]
    before, after = (elements if to is None else to for to in (born.to, now.to))
    batch = max(len(before), len(after))
    before, after = before.expand(batch, -1), after.expand(batch, -1)
    places = max(n, int(after.max()) + 1)

    def determines(one: Tensor, other: Tensor) -> bool:
        """Whether all elements of a token of `one` are in the same token of `other`."""
        image = take(scatter(other, one, places), one)
        return bool(((image == other) | (one < 0)).all())

    inside = torch.where(after < 0, -1, before)
    if bool(((inside < 0) & (after >= 0)).any()):
        return False  # elements that have not entered before
    return determines(before, after)  # a token is whole or absent; several may have been merged


def _content_first(pair: tuple[Leaf, TokenMap]) -> tuple[bool, int]:
    """As in the forward signature; integers that are spread over tokens (a time step) come last."""
    leaf, token_map = pair
    return token_map.mixed and leaf.of_integers, leaf.order


def is_image(leaf: Leaf) -> bool:
    """Whether single numbers, not rows of them, were given for each position."""
    return leaf.ids is None and leaf.tensor.ndim > 3


def covered(token_map: TokenMap, n: int, batch: int) -> Tensor:
    """(B, n) on the CPU: which positions are entered."""
    here = torch.zeros(batch, n, dtype=torch.bool)
    for to in token_map.places:
        if to is None:
            return torch.ones(batch, n, dtype=torch.bool)
        here |= occupied(to.cpu(), n)
    return here


def with_residual(maps: Sequence[TokenMap], i: int, n: int, batch: int) -> TokenMap:
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
    others = (covered(other, n, batch) for k, other in enumerate(maps) if k != i)
    return maps[i] if any(bool((gone & here).any()) for here in others) else IDENTITY


def bypassing(
    rows: Tensor | Downstream,
    maps: Sequence[TokenMap],
    earlier: Mapping[Member, Upstream],
    tracer: TokenTracer,
    batch: int,
) -> dict[Member, TokenMap]:
    """Earlier calls and inputs that stand where the latest ones (with `maps`) enter nowhere.

    Not every token passes through every call: class attention updates [CLS] alone, a decoder may
    let only its queries look at the image.

    Args:
        rows (Tensor): (B, n, features), the operand.
        earlier (mapping): inputs, and calls in the order of execution.
    """
    n = rows.shape[1]
    vacant = ~torch.stack([covered(token_map, n, batch) for token_map in maps]).any(0)
    older: dict[Member, TokenMap] = {}
    if not earlier or not bool(vacant.any()):
        return older
    if not tracer.any_enters(rows, list(earlier.values()), vacant):
        return older  # padding
    for member, token_map in _latest_first(rows, earlier, tracer, batch):
        if not bool(vacant.any()):
            break
        if isinstance(member, Leaf) and token_map.mixed:  # overlapping pictures
            if tracer.any_enters(rows, [earlier[member]], vacant):
                older[member] = token_map
            continue
        standing = []
        for to in token_map.places if not token_map.mixed else ():
            to = torch.arange(n)[None] if to is None else to.cpu()
            stands = take(vacant, to)
            if bool(stands.any()):
                standing.append(torch.where(stands, to, -1).to(rows.device))
        if standing:
            older[member] = TokenMap(standing[0], tuple(standing[1:]))
            if isinstance(member, AttentionCall):  # inputs are added to each other
                vacant &= ~covered(older[member], n, batch)
    return older


def _latest_first(
    rows: Tensor | Downstream, earlier: Mapping[Member, Upstream], tracer: TokenTracer, batch: int
) -> Iterator[tuple[Member, TokenMap]]:
    """Members with their maps to the rows, the latest first, asked for only as far as they are."""
    pairs = list(earlier.items())[::-1]
    for start in range(0, len(pairs), _AT_ONCE):
        chunk = pairs[start : start + _AT_ONCE]
        maps = entering(tracer, rows, [upstream for _, upstream in chunk], batch)
        yield from zip((member for member, _ in chunk), maps, strict=True)


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
    return scatter(places, tokens, n)
