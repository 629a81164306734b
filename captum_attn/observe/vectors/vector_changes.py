"""How vectors change: lengths and angles of tokens before and after each sub-layer's transform.

What VTranM asks of a run, beside its attention maps. E are the vectors on the skip connection, and
E-tilde is what the values of a head, or a feed-forward branch, would add to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import WiringError
from captum_attn.observe.capture.attention_call import AttentionCall, positions, working_dtype
from captum_attn.observe.observation import Observation
from captum_attn.observe.streams.states import (
    AttentionState,
    InitialState,
    ParallelState,
    Part,
    RearrangedState,
    State,
)
from captum_attn.observe.tracing.autograd_graph import gradients
from captum_attn.observe.tracing.token_index import scatter_sum, take
from captum_attn.observe.tracing.token_layout import TokenLayout, token_layouts
from captum_attn.observe.vectors.layout_finder import LayoutFinder
from captum_attn.observe.vectors.output_projection import Branch, LinearMap
from captum_attn.observe.vectors.padding import Padding
from captum_attn.observe.vectors.recording_tap import RecordingTap, Term
from captum_attn.observe.vectors.sublayers import FeedForward, Residual, SubLayers
from captum_attn.observe.vectors.value_change import ValueChange, VectorChange

_NO_VECTORS = (
    "its tokens are no rows of what it is added to, or of what its values are projected from "
    "(channels that attend to each other; tokens that are pooled or mixed on the way), so they "
    "have no vectors whose change could be measured: their lengths count as kept"
)
_WAY_OUT = "leave the block out with `layers=`, or set length=False and direction=False"


class _NoVectors(WiringError):
    """What attends are no rows of the tensors around it."""


class _NeverEnters(WiringError):
    """No block was seen to take a stream's own tokens."""


class VectorChanges:
    """The changes of vectors in one run, found when they are asked for.

    Args:
        seen (Observation): a run that was recorded.
    """

    def __init__(self, seen: Observation) -> None:
        assert isinstance(seen.tap, RecordingTap)
        self.tap, self.wiring, self.graph = seen.tap, seen.wiring, seen.graph
        self.layouts = LayoutFinder(seen.wiring, seen.graph, seen.batch)
        self.padding = Padding(seen.wiring)
        self.layers = SubLayers(seen.graph, seen.tap.calls, seen.tap.additions, seen.root.edge)
        self._generator = torch.Generator().manual_seed(0)
        self._maps: dict[AttentionCall, LinearMap] = {}
        self._longer: set[AttentionCall] = set()  # whose projection is not all of their branch
        self._values: dict[AttentionCall, ValueChange] = {}
        self._behind: dict[Any, list[tuple[FeedForward, TokenLayout]]] | None = None

    # ------------------------------------------------------------------------ attention
    def attention(self, update: AttentionState, rows: Tensor | None = None) -> VectorChange | None:
        """The values of every head through its slice of the output projection; n = F k keys.

        Args:
            rows (Tensor or None): which queries, for transformations that differ by query; None:
                all. There are F q' of them.

        Returns:
            VectorChange or None: None where there is nothing to measure it by, see `is_pooling`.

        Raises:
            WiringError: if the skip connection, the projection or the vectors were not observed.
        """
        if self.is_pooling(update):
            return None
        call = update.call
        if call not in self._values:
            try:
                self._values[call] = self._of_values(update)
            except _NoVectors:
                return self._unmeasured(update)
        if not self._linear_map(call).by_query:
            return self._values[call].change
        return self._values[call].of_queries(rows)

    def _unmeasured(self, update: AttentionState) -> VectorChange:
        """Where tokens have no vectors: as long after as before, and no angle."""
        call, n = update.call, update.call.positions[1]
        ones = torch.ones(call.examples, 1, n, device=call.v.device)
        real = self.padding.keys(update)
        alike = ones.expand(-1, call.heads, -1)
        return VectorChange(ones, alike, None, real, call.module, _NO_VECTORS, measured=False)

    def _of_values(self, update: AttentionState) -> ValueChange:
        before, real = self._keys(update)
        call, found = update.call, self._linear_map(update.call)
        values = call.fold(call.v.detach()).to(found.matrix)  # (B, F, H, k, d)
        values = values.transpose(1, 2).flatten(2, 3)  # (B, H, F k, d)
        return ValueChange(values, before.to(values), found, real, call)

    def of_all_heads(self, update: AttentionState) -> tuple[Tensor, Tensor]:
        """Lengths of the keys' vectors, and of all heads' values together through the projection.

        Returns:
            tuple of Tensor: (B, F k) each.

        Raises:
            WiringError: as `attention`, and where the projection is not the same for all queries.
        """
        call, found = update.call, self._linear_map(update.call)
        if found.by_query:
            raise WiringError(
                f"{call.module!r}: its output is multiplied with numbers of each query (a gate, a "
                "norm before the skip connection), so the length of a value is not the same for "
                'all queries; leave the block out with `layers=`, or use perception="head"'
            )
        values = positions(call.fold(call.v.detach()).to(found.matrix))  # (B, F k, H d)
        before, _ = self._keys(update)
        return before.to(values).norm(dim=-1), found.apply(values).norm(dim=-1)

    def _linear_map(self, call: AttentionCall) -> LinearMap:
        if call not in self._maps:
            residual, layout = self._residual(call), self._layout(call)
            branch = Branch(call, residual.branch, layout, self.graph)
            try:
                self._maps[call] = branch.linear_map(self._generator)
            except WiringError:
                if not self._in_steps(call, branch):
                    raise
        return self._maps[call]

    def _in_steps(self, call: AttentionCall, branch: Branch) -> bool:
        """Whether something stands between a call's output projection and the addition.

        A gate belongs to the map. A feed-forward has no skip connection of its own, and so counts
        as U = I; the projection is the map.
        """
        found = self.layers.first_projection(call, branch.edge)
        layout = None if found is None else self.layouts.behind(call, found[0])
        if found is None or layout is None or found[0].edge is None:
            return False
        projection = Branch(call, found[0], layout, self.graph)
        gate = branch.gate_behind(projection, self._generator)
        if gate is None:
            if not (
                found[1] and self.layouts.tokenwise(projection.edge, branch.term, branch.layout)
            ):
                return False
            self._longer.add(call)
        self._maps[call] = replace(projection.linear_map(self._generator), behind=gate)
        return True

    def _residual(self, call: AttentionCall) -> Residual:
        residual = self.layers.residuals.get(call)
        if residual is None:
            raise WiringError(
                f"{call.module!r}: where its output is added onto a skip connection could not be "
                "observed (looked for an addition of something that stems from it and of what its "
                f"queries are made of), so the vectors around it are unknown; {_WAY_OUT}"
            )
        return residual

    def _layout(self, call: AttentionCall) -> TokenLayout:
        """How the skip connection of a call holds the call's query positions."""
        residual = self._residual(call)
        found = self.layouts.behind(call, residual.branch)
        if found is None and residual.skip is not None:  # a branch that is scaled by 0
            found = self.layouts.before(call, "q", residual.skip)
        if found is None or not found.is_one_to_one:
            raise _NoVectors(
                f"{call.module!r}: which of its {call.positions[0]} positions are which rows of "
                f"the {tuple(residual.branch.value.shape)} that it is added to could not be "
                f"observed (something else than attention mixes the tokens); {_WAY_OUT}"
            )
        return found

    def _skip_rows(self, call: AttentionCall) -> Tensor | None:
        """The vectors on the skip connection, (B, n_q, D), in the order of the query positions."""
        skip = self._residual(call).skip
        return None if skip is None else self._layout(call).tokens(skip.vectors())

    def _keys(self, update: AttentionState) -> tuple[Tensor, Tensor | None]:
        """The vectors E of the key positions, (B, F k, D), and which of them are real tokens.

        The tokens on the skip connection where the call reads those (of several that are pooled to
        one key their mean); else (another stream, other
        tokens of its own) the vectors that the values are projected from.
        """
        call, n = update.call, update.call.positions[1]
        rows, real = self._skip_rows(call), self.padding.keys(update)
        reads = update.key_state
        if reads is update.query_state and rows is not None:
            return rows, self._layout(call).held(real)
        parts = reads.parts if isinstance(reads, RearrangedState) else ()
        if rows is not None and parts and all(part.state is update.query_state for part in parts):
            return torch.stack([_met(rows, part, n) for part in parts]).sum(0), real
        origin, layout = self._key_term(update)
        return layout.tokens(origin.vectors()), real

    def _key_term(self, update: AttentionState) -> tuple[Term, TokenLayout]:
        """The tensor that a call's values are projected from."""
        call, n = update.call, update.call.positions[1]
        origin = self.tap.origins.get(call)
        layout = None if origin is None else self.layouts.before(call, "v", origin)
        if origin is None or layout is None:
            raise _NoVectors(
                f"{call.module!r}: the vectors that its values are made of could not be observed "
                "(it reads other tokens than those it updates, and no tensor of one row for each "
                f"of its {n} keys was projected to its values); {_WAY_OUT}"
            )
        return origin, layout

    # ------------------------------------------------------------------------ feed-forward
    def keeps(self, update: AttentionState) -> bool:
        """Whether a call is added to what asked, and does not replace it (attention pooling)."""
        residual = self.layers.residuals.get(update.call)
        if residual is None:
            return not self.is_pooling(update)
        return residual.skip is not None

    def is_pooling(self, update: AttentionState) -> bool:
        """Whether learned queries pool the tokens, and what they get is added to nothing."""
        asks = update.query_state
        learned = isinstance(asks, InitialState) and not asks.source.entries
        return update.call not in self.layers.residuals and learned

    def beside(self, update: AttentionState) -> Iterator[VectorChange]:
        """Feed-forward branches that are added in the same step as an attention call."""
        residual = self.layers.residuals.get(update.call)
        if residual is None or residual.start is None:
            return
        try:
            layout = self._layout(update.call)
        except _NoVectors:
            return
        together = [c for c, r in self.layers.residuals.items() if r.addition is residual.addition]
        if together[0] is not update.call:  # several calls in one step: with the first of them
            return
        for part in residual.parallel:
            if self.layouts.tokenwise(part.start, part.branch, layout):
                yield self._changed(part, layout, update)
        apart = residual.joined and self._are_linear(together)
        if apart and self.layouts.tokenwise(residual.start, residual.branch, layout):
            joined = self._joined(residual, together, update)
            if joined is not None:
                yield joined

    def _are_linear(self, calls: list[AttentionCall]) -> bool:
        """Whether what a branch adds beside the calls' output can be told from it."""
        try:
            return all(
                self._linear_map(call) is not None and call not in self._longer for call in calls
            )
        except WiringError:
            return False

    def _joined(
        self, residual: Residual, together: list[AttentionCall], update: AttentionState
    ) -> VectorChange | None:
        """What a branch adds beside the calls' output, where one projection is for both.

        A gate stems from the tokens too, but adds nothing of its own: None.
        """
        assert residual.skip is not None
        layout = self._layout(update.call)
        whole = layout.tokens(residual.branch.vectors())
        rows = whole.to(working_dtype(whole.dtype))
        for call in together:
            output = positions(call.output_rows(self.tap.outputs[call].vectors()))
            rows = rows - self._linear_map(call).apply(output.to(rows))
        gate, rest = self._linear_map(together[0]).behind, rows
        if gate is not None:
            squares = gate.square().sum((0, 1))
            fitted = (gate * rows).sum((0, 1)) / torch.where(squares == 0, 1, squares)
            rest = rows - gate * fitted
        gated = any(self._linear_map(call).by_query for call in together)
        if gated and _are_alike(rest, layout, float(whole.norm(dim=-1).max())):
            return None  # the projection's bias
        skip = layout.tokens(residual.skip.vectors())
        return _change(skip, rows, self.padding.tokens(update), update.call.module)

    def behind(self, state: State) -> Iterator[VectorChange]:
        """The feed-forward sub-layers that act on a state, its tokens in their order."""
        for branch, layout in self._by_state().get(_key(state), []):
            yield self._changed(branch, layout, state)

    def _by_state(self) -> dict[Any, list[tuple[FeedForward, TokenLayout]]]:
        if self._behind is None:
            self._behind = {}
            for branch in self.layers.feed_forwards:
                for key, layout in self._acts_on(branch):
                    self._behind.setdefault(key, []).append((branch, layout))
        return self._behind

    def _acts_on(self, branch: FeedForward) -> list[tuple[Any, TokenLayout]]:
        """The states that a sub-layer acts on, and how it holds their tokens; none: on no tokens.

        A sum that mixes the tokens (a convolution that is added) is no feed-forward sub-layer.
        """
        partly = False
        for key, layout in self._held_by(branch):
            if self.layouts.tokenwise(branch.start, branch.branch, layout):
                if layout.is_whole:
                    return [(key, layout)]
                partly = True
        pieces = self._in_pieces(branch)
        if partly and not pieces:
            warnings.warn(
                f"{branch.addition.module!r}: which of the tokens that are followed its "
                f"feed-forward branch {tuple(branch.branch.value.shape)} acts on could not be "
                "observed, so it is left out (U = I)",
                stacklevel=2,
            )
        return pieces

    def _in_pieces(self, branch: FeedForward) -> list[tuple[Any, TokenLayout]]:
        """Packed sequences that attention keeps apart, and a feed-forward does not."""
        calls = self.graph.calls(branch.version)
        found = [(call, self.layouts.behind(call, branch.skip)) for call in calls]
        pieces = [((call,), p) for call, p in found if p is not None and p.index is not None]
        layouts = {layout for _, layout in pieces}
        if len(pieces) < len(calls) or len(layouts) != 1 or len(pieces) < 2:
            return []
        indices = [p.index for _, p in pieces if p.index is not None]
        batch = max(map(len, indices))
        joined = torch.cat([index.expand(batch, -1) for index in indices], 1)
        whole = replace(layouts.pop(), index=joined)
        if not whole.is_whole or joined.shape[1] != whole.n:
            return []
        alone = self.layouts.tokenwise(branch.start, branch.branch, whole)
        return pieces if alone else []

    def _held_by(self, branch: FeedForward) -> Iterator[tuple[Any, TokenLayout]]:
        """The states that a skip connection may be a version of, the likeliest first."""
        calls = self.graph.calls(branch.version)
        behind = [self.layouts.behind(call, branch.skip) for call in calls]
        alike = all(found is not None and found.index is None for found in behind)
        if behind and behind[0] is not None and (alike or len(behind) == 1):
            yield tuple(calls), behind[0]
        for update in self.wiring.updates:  # tokens of several states: the state they make next
            if self.layers.leads_to(branch.addition, update.call):
                layout = self.layouts.before(update.call, "q", branch.skip)
                if layout is not None:
                    yield _key(update.query_state), layout
                break
        batch = 1 if calls and calls[0].packed else self.layouts.batch
        layout = next(token_layouts(tuple(branch.skip.value.shape), batch), None)
        if calls and layout is not None and layout.n == calls[0].positions[0]:
            yield tuple(calls), layout  # mixed on the way, passed over

    def _changed(self, branch: FeedForward, layout: TokenLayout, state: State) -> VectorChange:
        skip = layout.tokens(branch.skip.vectors())
        rows = layout.tokens(self._scaled(branch))
        real = layout.held(self.padding.tokens(state))
        return _change(skip, rows, real, branch.addition.module)

    def _scaled(self, branch: FeedForward) -> Tensor:
        """The branch's output, with whatever scale follows before it is added."""
        value = branch.branch.vectors()
        start, end = branch.branch.edge, None if branch.through is None else branch.through.edge
        if branch.through is None or start is None or end is None:
            return value
        if branch.through.value.shape != value.shape:
            raise WiringError(
                f"{branch.addition.module!r}: its feed-forward branch {tuple(value.shape)} is "
                "reshaped before it is added; leave the block out with `layers=`"
            )
        # The gradient holds the factors of the sums in between, the branch's own among them.
        ones = torch.full_like(value, branch.through.scale / branch.branch.scale)
        (scale,) = gradients([(end, ones)], [start])
        return value if scale is None else value * scale

    # ------------------------------------------------------------------------ tokens
    def initial(self, state: State) -> Tensor:
        """Lengths of the tokens that enter the first block, (B, n)."""
        term: Term | None = None
        try:
            term, rows = self.entering(state)
        except _NoVectors:
            pass
        except _NeverEnters:
            looked_up = self._looked_up(state)
            if looked_up is None:
                raise
            return looked_up
        if term is None:  # no vectors; or these tokens are asked for, and then no longer there
            device = self.tap.calls[0].v.device
            return torch.ones(self.layouts.batch, state.n, device=device)
        return _lengths(rows(term.vectors()))

    def _looked_up(self, state: State) -> Tensor | None:
        """Lengths of a stream's embeddings, where tokens are mixed before the first attention."""
        entries = state.source.entries if isinstance(state, InitialState) else []
        if len(entries) != 1 or entries[0].leaf.ids is None or entries[0].mixing is not None:
            return None
        leaf, to = entries[0].leaf, entries[0].to
        lengths = leaf.elements(_lengths(leaf.tensor.detach()), self.layouts.batch)
        lengths = lengths.expand(self.layouts.batch, -1)
        if to is None:
            return lengths
        return scatter_sum(lengths[..., None], to, state.n)[..., 0]

    def entering(self, state: State) -> tuple[Term | None, Callable[[Tensor], Tensor]]:
        """The tensor of tokens that enter the first block, and how it is laid out.

        Returns:
            tuple: the tensor, None where no skip connection holds it; and what brings one of its
            shape to (B, n, D).
        """
        for branch, layout in self._by_state().get(state, []):
            return branch.skip, layout.tokens
        asks, nowhere = False, None
        for update in self.wiring.updates:
            for side, used in ((True, update.query_state), (False, update.key_state)):
                parts = used.parts if isinstance(used, RearrangedState) else ()
                part = next((p for p in parts if p.state is state), None)
                if used is not state and part is None:
                    continue
                if side and not self.keeps(update):
                    asks = True
                    continue  # they may answer as well
                try:
                    term, layout = self._query_term(update) if side else self._key_term(update)
                except _NoVectors as error:
                    nowhere = error  # they may be elsewhere
                    continue
                to = None if part is None else part.to
                return term, partial(_placed, layout, to, part is not None)
        if nowhere is not None:
            raise nowhere
        if asks:
            return None, lambda tensor: tensor
        raise _NeverEnters(
            f"the vectors of the stream {state.stream!r} before its first attention could not be "
            "observed; set length=False"
        )

    def keys(self, update: AttentionState) -> tuple[Term, Callable[[Tensor], Tensor]]:
        """The tensor of the tokens that answer a call, as it enters the block, and its layout.

        Returns:
            tuple: the tensor, that on the skip connection where the call reads what it updates; and
            what brings one of its shape to (B, F k, D), in the order of the keys.
        """
        residual = self.layers.residuals.get(update.call)
        own = update.key_state is update.query_state
        if own and residual is not None and residual.skip is not None:
            return residual.skip, self._layout(update.call).tokens
        term, layout = self._key_term(update)
        return term, layout.tokens

    def projected(self, update: AttentionState) -> tuple[Term, Callable[[Tensor], Tensor]]:
        """The tensor that a call's values are projected from, and its layout, as `keys`.

        Raises:
            WiringError: if it was not observed.
        """
        term, layout = self._key_term(update)
        return term, layout.tokens

    def after(self, update: AttentionState) -> Tensor:
        """The vectors of the tokens that asked, after the last sum behind a call, (B, F q, D).

        Raises:
            WiringError: if no sum was observed there.
        """
        behind = self._by_state().get((update.call,), [])
        if behind:
            branch, layout = behind[-1]
            addition = branch.addition
        else:
            found = self._residual(update.call)
            if found.addition is None:
                raise WiringError(
                    f"{update.call.module!r}: no sum of its output with the tokens was observed, "
                    "so that their vectors behind it are unknown; leave the call out with `layers=`"
                )
            addition, layout = found.addition, self._layout(update.call)
        one, other = addition.terms
        return layout.tokens(one.vectors() + other.vectors())

    def _query_term(self, update: AttentionState) -> tuple[Term, TokenLayout]:
        skip = self._residual(update.call).skip
        assert skip is not None
        return skip, self._layout(update.call)


def _met(rows: Tensor, part: Part, n: int) -> Tensor:
    """Rows of a part at n positions; where several meet (pooled keys), their mean."""
    if part.to is None or part.shares is None:
        return rows
    shares = part.shares.to(rows)[..., None]
    return scatter_sum(rows * shares, part.to.to(rows.device), n)


def _placed(layout: TokenLayout, to: Tensor | None, moved: bool, tensor: Tensor) -> Tensor:
    rows = layout.tokens(tensor)
    return take(rows, to) if moved else rows


def _are_alike(rows: Tensor, layout: TokenLayout, size: float) -> bool:
    """Whether the vectors of all tokens that a tensor holds are one, by the size of those in it."""
    held = rows.flatten(0, 1)
    if layout.index is not None:
        held = held[(layout.index >= 0).expand(rows.shape[:2]).flatten().to(rows.device)]
    return bool((held - held[:1]).norm(dim=-1).max() <= 1e-3 * size)


def _change(skip: Tensor, rows: Tensor, real: Tensor | None, module: str) -> VectorChange:
    dtype = working_dtype(rows.dtype)
    before, after = skip.to(dtype), rows.to(dtype)
    dot = (before * after).sum(-1)[:, None]
    return VectorChange(_lengths(before)[:, None], _lengths(after)[:, None], dot, real, module)


def _lengths(rows: Tensor) -> Tensor:
    return rows.to(working_dtype(rows.dtype)).norm(dim=-1)


def _key(state: State) -> Any:
    """What names a state: the calls that made it together, or the state itself."""
    if isinstance(state, AttentionState):
        return (state.call,)
    if isinstance(state, ParallelState):
        made = [branch.call for branch in state.branches if isinstance(branch, AttentionState)]
        return tuple(sorted(made, key=lambda call: call.index))
    return state
