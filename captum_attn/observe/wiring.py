"""The wiring: which version of which token stream asked, and which answered.

Read off the autograd graph, with no table of architectures. What a query stems from without another
attention call in between is the version that is being updated; what the values stem from is the
version that is being read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import WiringError
from captum_attn.observe.call import AttentionCall
from captum_attn.observe.entries import enter
from captum_attn.observe.graph import Graph, Member, bits, depends_on_content, edge_of
from captum_attn.observe.streams import (
    Born,
    Constant,
    Entry,
    Gathered,
    Merged,
    Part,
    Source,
    State,
    Updated,
)
from captum_attn.observe.tap import Blind, Leaf, Tap
from captum_attn.observe.tokenmap import IDENTITY, Prober, TokenMap, Upstream


@dataclass
class Findings:
    """What an attribution object remembers of a model's structure from one run to the next.

    Only what cannot depend on the content of the inputs is kept, for one signature (the shapes of
    the calls and the leaves); another signature starts afresh.
    """

    signature: Any = None
    kept: dict[Any, Any] = field(default_factory=dict)
    warned: bool = False

    def of(self, signature: Any) -> Findings:
        if signature != self.signature:
            self.signature, self.kept = signature, {}
        return self


class Wiring:
    """States of the token streams of one run, built call by call.

    Args:
        tap (Tap): what was observed.
        graph (Graph): the run's autograd graph.
        batch (int): number of examples.
        prober (Prober): asks for token maps.
        findings (Findings): what is known from earlier runs.
    """

    def __init__(
        self, tap: Tap, graph: Graph, batch: int, prober: Prober, findings: Findings
    ) -> None:
        self.tap, self.graph, self.batch, self.prober = tap, graph, batch, prober
        self.findings = findings.of(
            (
                batch,
                tuple((c.module, c.q.shape, c.v.shape, c.lead) for c in tap.calls),
                tuple((leaf.name, leaf.tensor.shape, leaf.tensor.dtype) for leaf in tap.leaves),
            )
        )
        self.sources: list[Source] = []
        self.updates: list[Updated] = []
        self._after: dict[AttentionCall, Updated] = {}
        self._known: dict[int, list[tuple[list[TokenMap], State]]] = {}
        self._learned: list[tuple[int, State]] = []
        self._births: list[Born] = []
        self._passed_over: list[str] = []
        self._calls_of: dict[str, int] = {}
        for call in tap.calls:
            self._wire(call)
        if self._passed_over and not findings.warned:
            findings.warned = True
            warnings.warn(
                "attention is explained, other ways of mixing tokens are passed over: "
                + ", ".join(dict.fromkeys(self._passed_over)),
                stacklevel=2,
            )

    # ------------------------------------------------------------------------ one call
    def _wire(self, call: AttentionCall) -> None:
        self.refuse_severed(call.severed, (call.q, call.k, call.v), f"{call.module!r} reads")
        asked, read = self._latest(call.q), self._latest(call.v)
        values = call.v
        if not read:  # constant values (DETR's first decoder layer): the keys tell
            read, values = self._latest(call.k), call.k
        if self._calls(asked) == self._calls(read) and self._named(asked & read):
            asked &= read  # q = k = x + position, v = x: the positions are no tokens of their own
        if not call.roles:
            call.roles = self._roles(call, (call.q, asked), (values, read))
        asks = self._state(call, "q", call.q, asked)
        reads = self._state(call, "v", values, read)
        number = self._calls_of.get(asks.stream, 0)
        self._calls_of[asks.stream] = number + 1
        update = Updated(asks.stream, asks.n, call, asks, reads, number)
        self.updates.append(update)
        self._after[call] = update

    def _latest(self, tensor: Tensor) -> int:
        return self.graph.latest(self.graph.reach(tensor))

    def _calls(self, members: int) -> int:
        return sum(self.graph.bit[m] for m in self.graph.members(members) if is_call(m))

    def _named(self, members: int) -> int:
        """Without the leaves that stem from parameters."""
        found = self.graph.members(members)
        return sum(self.graph.bit[m] for m in found if is_call(m) or m.name)  # type: ignore[union-attr]

    def refuse_severed(self, severed: tuple[Any, ...], read_by: Any, how: str) -> None:
        """Raises if tokens were read whose history was cut off and is not otherwise reached."""
        live = 0
        for tensor in read_by:
            live |= self.graph.reach(tensor)
        for cut in severed:
            if isinstance(cut, Blind):
                names = [cut.module]
            else:
                calls = self._calls(self.graph.reach(cut))
                lost = [b for b in bits(calls) if not self.graph.contains(live, b)]
                names = [m.module for b in lost for m in self.graph.members(b) if is_call(m)]  # type: ignore[union-attr]
            if names:
                raise WiringError(
                    f"{how} what the attention of {names[0]!r} computed under `no_grad` or before "
                    "a `detach`, so relevance cannot be traced through it; expected a model that "
                    "is differentiable throughout: remove the `no_grad`/`detach` (or turn off "
                    "reentrant gradient checkpointing) around it"
                )

    def after(self, call: AttentionCall) -> Updated:
        """The version of its stream that a call makes."""
        return self._after[call]

    def version(self, calls: list[AttentionCall]) -> State:
        """The version of one stream that several parallel calls make together."""
        after = [self._after[call] for call in calls]
        if len(after) == 1:
            return after[0]
        base = after[0].asks
        if any(state.asks is not base for state in after):
            modules = ", ".join(repr(state.call.module) for state in after)
            raise WiringError(
                f"versions of the stream {base.stream!r} that part at different places are joined "
                f"({modules}; queries {[tuple(s.call.q.shape) for s in after]}); confine the "
                "method with `layers=`"
            )
        return Merged(base.stream, base.n, base, tuple(after))

    def final_states(self) -> dict[str, State]:
        """The last version of every stream, by the stream's name."""
        calls: dict[str, list[AttentionCall]] = {}
        for update in self.updates:
            calls.setdefault(update.stream, []).append(update.call)
        born: dict[str, State] = {state.stream: state for state in self._births}
        return {**born, **{name: self.version(self._maximal(g)) for name, g in calls.items()}}

    def _maximal(self, calls: list[AttentionCall]) -> list[AttentionCall]:
        latest = self.graph.latest(sum(self.graph.bit[call] for call in calls))
        found = [m for m in self.graph.members(latest) if is_call(m)]
        base = self._after[found[-1]].asks  # type: ignore[index]
        return [m for m in found if self._after[m].asks is base]  # type: ignore[misc,index]

    # ------------------------------------------------------------------------ layout
    def _roles(self, call: AttentionCall, *operands: tuple[Tensor, int]) -> Any:
        def settle() -> Any:
            for operand, members in operands:
                upstreams = [self._upstream(m) for m in self.graph.members(self._named(members))]
                if upstreams or operand is operands[-1][0]:
                    if operand.ndim - 2 == len(call.lead):
                        return self.prober.roles(call, operand, self.batch, upstreams)
            return None

        roles = self.keep(("roles", call.index), settle)
        if roles is None:
            raise WiringError(
                f"{call.module!r}: which of the leading axes {call.lead} of its attention map "
                f"(queries {tuple(call.q.shape)}, values {tuple(call.v.shape)}) holds the "
                f"{self.batch} examples could not be observed; confine the method to other calls "
                "with `layers=`"
            )
        return roles

    def keep(self, key: Any, find: Callable[[], Any]) -> Any:
        """A finding that the content of the inputs cannot change: sought once per signature."""
        if key not in self.findings.kept:
            self.findings.kept[key] = find()
        return self.findings.kept[key]

    def _upstream(self, member: Member) -> Upstream:
        if is_call(member):
            return Upstream.call(member)  # type: ignore[arg-type]
        if member.ids is not None:  # type: ignore[union-attr]
            return Upstream.tokens(member.tensor)  # type: ignore[union-attr]
        return Upstream.elements(member.tensor)  # type: ignore[union-attr]

    # ------------------------------------------------------------------------ states
    def _state(self, call: AttentionCall, side: str, operand: Tensor, members: int) -> State:
        """The version of a stream that an operand of `call` stems from."""
        rows = _positions(call, operand)  # (B, P, features)
        named = self._named(members)
        if not named:
            return self._learned_state(side, rows.shape[1], members)
        found = self.graph.members(named)
        maps = self._maps(call, side, rows, named, found, operand)
        for known, state in self._known.get(named, []):
            if state.n == rows.shape[1] and all(a.same(b) for a, b in zip(known, maps, strict=True)):
                return state
        state = self._made(call, side, rows, found, maps, members)
        self._births += [state] if isinstance(state, Born) else []
        self._known.setdefault(named, []).append((maps, state))
        return state

    def _learned_state(self, side: str, n: int, members: int) -> State:
        for known, state in self._learned:
            if known & members and state.n == n:
                return state
        if side != "q":
            return Constant("", n)
        source = self._source("queries", n)
        state = Born(source.name, n, source)
        self._learned.append((members, state))
        return state

    def _maps(
        self,
        call: AttentionCall,
        side: str,
        rows: Tensor,
        named: int,
        found: list[Member],
        operand: Tensor,
    ) -> list[TokenMap]:
        """Where the tokens (or elements) of every member enter this operand."""
        key = (call.index, side)
        kept = self.findings.kept.get(key)
        if kept is not None:
            return kept
        maps = self.prober.maps(rows, [self._upstream(member) for member in found])
        for i, member in enumerate(found):
            if is_call(member):
                if maps[i].mixed:
                    maps[i] = self._pass_over(call, member, rows, operand, named)  # type: ignore[arg-type]
                maps[i] = _with_residual(maps, i, rows.shape[1])
        if depends_on_content(self.graph.between(operand.grad_fn, named)):
            return [replace(token_map, moving=True) for token_map in maps]
        if all(is_call(m) or m.ids is None for m in found):  # type: ignore[union-attr]
            self.findings.kept[key] = maps
        return maps

    def _pass_over(
        self, call: AttentionCall, member: AttentionCall, rows: Tensor, operand: Tensor, named: int
    ) -> TokenMap:
        """Tokens are mixed on the way by something else than attention."""
        if self._after[member].n != rows.shape[1]:
            raise WiringError(
                f"between {member.module!r} ({self._after[member].n} tokens) and {call.module!r} "
                f"({rows.shape[1]} tokens) the tokens are mixed in a way that could not be "
                "observed; confine the method to one side with `layers=`"
            )
        path = self.graph.between(operand.grad_fn, named)
        mixers = [self.tap.mixers[node] for node in path if node in self.tap.mixers]
        self._passed_over += mixers or [f"between {member.module!r} and {call.module!r}"]
        return IDENTITY

    def _made(
        self,
        call: AttentionCall,
        side: str,
        rows: Tensor,
        found: list[Member],
        maps: list[TokenMap],
        members: int,
    ) -> State:
        n = rows.shape[1]
        calls = [(m, t) for m, t in zip(found, maps, strict=True) if is_call(m)]
        leaves = [(m, t) for m, t in zip(found, maps, strict=True) if not is_call(m)]
        after = [self._after[m] for m, _ in calls]  # type: ignore[index]
        streams = list(dict.fromkeys(state.stream for state in after))
        if not leaves and all(t.to is None for _, t in calls):
            if len(after) == 1:
                return after[0]
            if len(streams) == 1:
                return self.version([state.call for state in after])
        parts = [Part(state, t.to) for state, (_, t) in zip(after, calls, strict=True)]
        entries = []
        for entry in self._entries(call, rows, leaves):
            born = self._born_of(entry.leaf)
            if born is None:
                entries.append(entry)
            else:  # the tokens of an earlier state, at other places: keys behind a learned prefix
                parts.append(Part(born, _composed(self._entry_of(born, entry.leaf), entry, born.n)))
        parts += self._learned_parts(rows, members)
        if not parts:
            names = dict.fromkeys(entry.leaf.name for entry in entries)
            source = self._source("+".join(names), n, entries)
            return Born(source.name, n, source)
        for entry in entries:
            parts.append(self._own_part(entry, n))
        names = [part.state.stream for part in parts[len(parts) - len(entries) :]]
        known = list(dict.fromkeys(part.state.stream for part in parts))
        name = names[0] if names else known[0] if len(known) == 1 else "+".join(known)
        if side == "q" and not names and len(known) > 1:
            name = self._unique(name)
        return Gathered(name, n, tuple(parts))

    def _own_part(self, entry: Entry, n: int) -> Part:
        """An input that joins tokens which are there already, as a source of its own."""
        leaf = entry.leaf
        if leaf.tensor.ndim == 3:  # (B, n, D): its tokens are its rows
            n = leaf.tensor.shape[1]
            to = _rows_of(entry.to, n)
            entry = Entry(leaf, None, (n,)) if leaf.ids is not None else _rowwise(leaf)
        else:
            here = _covered(TokenMap(entry.to), n, self.batch)
            to = torch.where(here, torch.arange(n), -1).to(leaf.tensor.device)
        source = self._source(leaf.name, n, [entry])
        self._births.append(Born(source.name, n, source))
        return Part(self._births[-1], to)

    def _born_of(self, leaf: Leaf) -> Born | None:
        return next(
            (s for s in self._births if any(e.leaf is leaf for e in s.source.entries)), None
        )

    @staticmethod
    def _entry_of(state: Born, leaf: Leaf) -> Entry:
        return next(entry for entry in state.source.entries if entry.leaf is leaf)

    def _learned_parts(self, rows: Tensor, members: int) -> list[Part]:
        """Rows of a `queries` stream among other keys: a resampler's `cat(media, latents)`."""
        parts = []
        for known, state in self._learned:
            for leaf in self.graph.members(known & members):
                upstream = Upstream.elements(leaf.tensor, batched=False)  # type: ignore[union-attr]
                (token_map,) = self.prober.maps(rows, [upstream])
                to = token_map.to
                if to is not None and not token_map.mixed and to.shape[1] % state.n == 0:
                    to = to.view(to.shape[0], state.n, -1)[..., 0]
                    parts.append(Part(state, to))
                    break
        return parts

    def _entries(
        self,
        call: AttentionCall,
        rows: Tensor,
        leaves: list[tuple[Any, TokenMap]],
    ) -> list[Entry]:
        """Of the inputs that enter here, those that carry the content of their positions.

        Inputs that enter positions which an earlier one (in the forward signature) has filled are
        added to it (`token_type_ids`, `position_ids`, `bbox`) and name nothing.
        """
        entries: list[Entry] = []
        taken = torch.zeros(self.batch, rows.shape[1], dtype=torch.bool)
        for leaf, token_map in sorted(leaves, key=lambda pair: pair[0].order):
            key = (call.index, leaf.name, tuple(leaf.tensor.shape))
            entry = enter(leaf, token_map, rows, self.graph, self.prober, self.findings.kept, key)
            here = _covered(TokenMap(entry.to), rows.shape[1], self.batch)
            if (here & taken).any() or any(e.leaf.name == leaf.name for e in entries):
                continue
            taken |= here
            entries.append(entry)
        return entries

    # ------------------------------------------------------------------------ names
    def _source(self, name: str, n: int, entries: list[Entry] | None = None) -> Source:
        source = Source(self._unique(name), n, entries or [])
        self.sources.append(source)
        return source

    def _unique(self, name: str) -> str:
        taken = {source.name for source in self.sources}
        if name not in taken:
            return name
        if name != "queries" and f"decoder_{name}" not in taken:
            return f"decoder_{name}"  # an input that the model embeds twice
        return next(f"{name}_{i}" for i in range(1, len(taken) + 2) if f"{name}_{i}" not in taken)


def is_call(member: Member) -> bool:
    return isinstance(member, AttentionCall)


def _positions(call: AttentionCall, operand: Tensor) -> Tensor:
    """lead + (n, d) -> (B, P, H d): every position's own row, all lanes beside each other."""
    if operand.ndim - 2 != len(call.lead):
        raise WiringError(
            f"{call.module!r}: operand {tuple(operand.shape)} does not fit its attention map "
            f"with leading axes {call.lead}; confine the method to other calls with `layers=`"
        )
    folded = call.fold(operand).transpose(2, 3)  # (B, F, n, H, d)
    return folded.flatten(3).flatten(1, 2)


def _with_residual(maps: list[TokenMap], i: int, n: int) -> TokenMap:
    """A call's map, with the tokens to which it adds nothing where the residual leaves them.

    A token whose output is multiplied by zero enters nowhere through the call; if nobody else
    takes its place, it is the earlier version's token that stands there.
    """
    to = maps[i].to
    if to is None or to.shape[1] != n or bool((to >= 0).all()):
        return maps[i]
    places = torch.arange(n, device=to.device).expand_as(to)
    taken = torch.zeros_like(to, dtype=torch.bool)
    for k, other in enumerate(maps):
        if k != i:
            taken = taken | _covered(other, n, to.shape[0]).to(to.device)
    if bool((to == torch.where(to < 0, to, places)).all()) and not bool(taken[to < 0].any()):
        return IDENTITY
    return maps[i]


def _covered(token_map: TokenMap, n: int, batch: int) -> Tensor:
    """(B, n): which positions are entered."""
    if token_map.to is None:
        return torch.ones(batch, n, dtype=torch.bool)
    covered = torch.zeros(batch, n + 1, dtype=torch.bool)
    to = token_map.to.expand(batch, -1).cpu()
    covered.scatter_(1, torch.where(to < 0, n, to), True)
    return covered[:, :n]


def _rows_of(to: Tensor | None, n: int) -> Tensor | None:
    """Positions of the n rows of a (B, n, D) input, from those of its elements."""
    if to is None or to.shape[1] == n:
        return to
    return to.view(to.shape[0], n, -1).amax(-1)


def _rowwise(leaf: Leaf) -> Entry:
    n, features = leaf.tensor.shape[1:]
    to = torch.arange(n, device=leaf.tensor.device)[:, None].expand(n, features)
    return Entry(leaf, to.reshape(1, -1), (n, features))


def _composed(born: Entry, now: Entry, n: int) -> Tensor | None:
    """Where the n tokens of a source are now: token <- element -> position."""
    if born.to is None:
        return now.to
    size = born.to.shape[1]
    places = torch.arange(size, device=born.to.device)[None] if now.to is None else now.to
    batch = max(born.to.shape[0], places.shape[0])
    tokens, places = born.to.expand(batch, -1), places.expand(batch, -1)
    to = torch.full((batch, n + 1), -1, device=tokens.device)
    to.scatter_(1, torch.where(tokens < 0, n, tokens), places)
    return to[:, :n]


__all__ = ["Findings", "Leaf", "Wiring", "edge_of", "is_call"]
