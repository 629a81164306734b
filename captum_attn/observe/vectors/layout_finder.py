"""Which row of a tensor is which token of a state, behind or in front of an attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.streams.wiring import Wiring
from captum_attn.observe.tracing.autograd_graph import Graph, depends_on_content, shape_of
from captum_attn.observe.tracing.token_index import inverse
from captum_attn.observe.tracing.token_layout import TokenLayout, token_layouts
from captum_attn.observe.tracing.token_map import Downstream, TokenMap, Upstream
from captum_attn.observe.vectors.recording_tap import Term


class LayoutFinder:
    """Asks autograd for layouts, and keeps those that cannot depend on the inputs' content."""

    def __init__(self, wiring: Wiring, graph: Graph, batch: int) -> None:
        self.wiring, self.graph, self.batch = wiring, graph, batch

    def behind(self, call: AttentionCall, term: Term) -> TokenLayout | None:
        """How a tensor that stems from a call holds the call's query positions."""
        edge = term.edge
        if edge is None:
            return None

        def indexed(layout: TokenLayout) -> TokenLayout | None:
            down = layout.downstream(edge, term.value)
            (found,) = self.wiring.tracer.maps(down, [Upstream.call(call)])
            return replace(layout, index=found.to) if _fits(found) else None

        path = self.graph.between(edge.node, self.graph.bit[call])
        key = ("behind", call.index, self._number(edge))
        ways = self._layouts(call, term)
        return self._kept(key, depends_on_content(path), ways, indexed)

    def before(self, call: AttentionCall, side: str, term: Term) -> TokenLayout | None:
        """How a tensor in front of a call's operand ("q", "v") holds the operand's positions."""
        operand, edge = getattr(call, side), term.edge
        if edge is None:
            return None
        with torch.enable_grad():
            rows = call.rows(operand)

        def indexed(layout: TokenLayout) -> TokenLayout | None:
            up = layout.upstream(edge)
            (found,) = self.wiring.tracer.maps(Downstream.rows(rows), [up])
            if not _fits(found):
                return None
            held = replace(layout, index=found.to)
            if not held.is_one_to_one:
                return None  # pooled on the way
            return replace(layout, index=inverse(found.to, rows.shape[1]))

        goal = self.graph.latest(self.graph.reach(operand))
        path = self.graph.between(operand.grad_fn, goal)
        key = ("before", call.index, side, self._number(edge))
        ways = self._layouts(call, term)
        return self._kept(key, depends_on_content(path), ways, indexed)

    def _layouts(self, call: AttentionCall, term: Term) -> list[TokenLayout]:
        """How a tensor may hold a call's tokens: packed ones have no axis of examples."""
        return list(token_layouts(tuple(term.value.shape), 1 if call.packed else self.batch))

    def tokenwise(self, start: GradientEdge, end: Term, layout: TokenLayout) -> bool:
        """Whether a tensor in `layout` is made of another one row by row, apart from attention."""
        last, shape = end.edge, shape_of(start.node, start.output_nr)
        if last is None or not layout.fits(end.value.shape):
            return False

        def find() -> bool:
            down = layout.downstream(last, end.value)
            same = shape == tuple(end.value.shape)
            ways = [layout] if same else list(token_layouts(shape, layout.batch))
            return any(
                _in_place(self.wiring.tracer.maps(down, [way.upstream(start)])[0])
                for way in ways
                if way.n == layout.n
            )

        key = ("tokenwise", self._number(start), self._number(last), replace(layout, index=None))
        return self.wiring.structure.get_or_compute(key, find)

    def _number(self, edge: GradientEdge) -> Any:
        """What tells tensors of a run apart, alike in the next run."""
        tap: Any = self.wiring.tap
        for i, addition in enumerate(tap.additions):
            for k, term in enumerate(addition.terms):
                if term.edge is not None and term.edge.node is edge.node:
                    return i, k
        return edge.node.name()

    def _kept(
        self,
        key: Any,
        moves: bool,
        ways: list[TokenLayout],
        indexed: Callable[[TokenLayout], TokenLayout | None],
    ) -> TokenLayout | None:
        def find() -> TokenLayout | None:
            found = (indexed(layout) for layout in ways)
            return next((layout for layout in found if layout is not None), None)

        return find() if moves else self.wiring.structure.get_or_compute((*key, *ways), find)


def _fits(found: TokenMap) -> bool:
    return not found.mixed and (found.to is None or bool((found.to >= 0).any()))


def _in_place(found: TokenMap) -> bool:
    """Whether every row stays where it is, or (a dead unit, a dropped token) enters nowhere."""
    if found.mixed or found.to is None:
        return not found.mixed
    places = torch.arange(found.to.shape[1], device=found.to.device)
    return _fits(found) and bool(((found.to == places) | (found.to < 0)).all())
