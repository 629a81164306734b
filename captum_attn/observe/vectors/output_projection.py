"""The linear map from an attention call's output to what is added onto its stream.

A model's output projection, with whatever scale follows it, is read off autograd: the gradient of
the branch with respect to the call's output is that map transposed. A weight that the graph holds
is taken as a first guess; a probe with random vectors decides whether it, times a constant factor
per channel, is the map of every token. Else the map is read off row by row. What multiplies each
token's output by numbers of its own, a gate in front of the projection or behind it, or a norm, is
found by probes likewise, and is held at what it was in the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError
from captum_attn.observe.capture.attention_call import AttentionCall, positions, working_dtype
from captum_attn.observe.tracing.autograd_graph import Graph, Node, gradients
from captum_attn.observe.tracing.token_index import take
from captum_attn.observe.tracing.token_layout import TokenLayout
from captum_attn.observe.vectors.held_norms import held_norms
from captum_attn.observe.vectors.recording_tap import Term

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
_FITTED = 4  # probes that gains are fitted to, so that a number near 0 in one of them does no harm

Probe = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LinearMap:
    """How a call's output becomes what is added: each query's one is ((g_i ⊙ o_i) W) ⊙ r_i.

    Args:
        matrix (Tensor): W, (H, d, D), the output projection with its scale.
        gains (Tensor or None): g, (B, F q, H, d), what a query's output is multiplied with: its
            gate, the scale of a norm behind the projection; None: 1.
        behind (Tensor or None): r, (B, F q, D), a gate behind the projection; None: 1.
    """

    matrix: Tensor
    gains: Tensor | None = None
    behind: Tensor | None = None

    @property
    def by_query(self) -> bool:
        """Whether each query has numbers of its own."""
        return self.gains is not None or self.behind is not None

    def apply(self, output: Tensor) -> Tensor:
        """(B, F q, H d) -> (B, F q, D)."""
        if self.gains is not None:
            output = output * self.gains.flatten(2)
        rows = output @ self.matrix.flatten(0, 1)
        return rows if self.behind is None else rows * self.behind


@dataclass
class Branch:
    """What a call's output is added to its stream as.

    Args:
        call (AttentionCall): the call.
        term (Term): the branch, as it is added.
        layout (TokenLayout): how the branch holds the call's query positions.
        graph (Graph): the run's graph.
    """

    call: AttentionCall
    term: Term
    layout: TokenLayout
    graph: Graph

    @property
    def edge(self) -> GradientEdge:
        assert self.term.edge is not None
        return self.term.edge

    @property
    def like(self) -> Tensor:
        return self.term.value

    @cached_property
    def path(self) -> list[Node]:
        """The nodes between the call's output and the branch."""
        return self.graph.between(self.edge.node, self.graph.bit[self.call])

    @cached_property
    def tolerance(self) -> float:
        """That of the lowest precision on the way: norms may be computed in another one."""
        made: list[Any] = [node._input_metadata for node in self.path]
        used = {self.like.dtype, *(outputs[0].dtype for outputs in made if outputs)}
        return max(_TOLERANCE.get(dtype, 1e-3) for dtype in used)

    def pulled(self, rows: Tensor) -> Tensor:
        """Rows at the branch, (B, n, D), pulled back to the call's output: (B, n_q, H d)."""
        found = self._gradient(rows, self.call.edge)
        if found is None:
            raise WiringError(f"{self.call.module!r}: its branch does not depend on its output")
        found = positions(self.call.output_rows(found))
        return found.to(working_dtype(found.dtype))

    def _gradient(self, rows: Tensor, edge: GradientEdge) -> Tensor | None:
        vector = self.layout.scatter_positions(rows.to(self.like) * self.term.scale)
        with held_norms(self.path, self.like.numel()):
            return gradients([(self.edge, vector)], [edge])[0]

    def linear_map(self, generator: torch.Generator) -> LinearMap:
        """W^O with its scale, and the gains of each query.

        Raises:
            WiringError: if the branch is no linear map of every token's output.
        """
        probe, matrix = self._probe(generator), self._guess()
        if matrix is not None and self._is_map(matrix, probe):
            return self._heads(matrix)
        others = [self._probe(generator) for _ in range(_FITTED)]
        gains = None if matrix is None else self._gains(matrix, others)
        if matrix is None or gains is None or not self._is_map(matrix, probe, gains):
            relative = self._relative_gains(others)
            matrix = self._read(relative)
            gains = None if relative is None else self._gains(matrix, others)
            if not self._is_map(matrix, probe, gains):
                raise WiringError(
                    f"{self.call.module!r}: between its attention and the addition onto the skip "
                    "connection its output is not transformed by one linear map for all tokens, "
                    "nor by one with a gate or a norm in front of it or behind (tokens are mixed "
                    "on the way?), so that the value vectors cannot be followed; leave the block "
                    "out with `layers=`, or set length=False and direction=False"
                )
        return self._heads(matrix, gains)

    def gate_behind(self, projection: Branch, generator: torch.Generator) -> Tensor | None:
        """What multiplies each query's rows between a projection and here, (B, n_q, D).

        Returns:
            Tensor or None: None where something else happens there.
        """
        batch, n, width = self.layout.batch, self.layout.n, self.layout.width
        if projection.layout.width != width:
            return None
        probe = torch.randn(batch, n, width, generator=generator)
        of_ones, of_probe = (
            self._gradient(rows, projection.edge) for rows in (torch.ones_like(probe), probe)
        )
        if of_ones is None or of_probe is None:
            return None
        gate, found = (projection.layout.tokens(g) for g in (of_ones, of_probe))
        expected = take(probe.to(gate), self.layout.index) * gate
        if bool((found - expected).norm() > self.tolerance * expected.norm()):
            return None
        return gate.to(working_dtype(gate.dtype))

    def _heads(self, matrix: Tensor, gains: Tensor | None = None) -> LinearMap:
        shape = (self.call.heads, matrix.shape[0] // self.call.heads)
        gains = None if gains is None else gains.unflatten(-1, shape)
        return LinearMap(matrix.unflatten(0, shape), gains)

    # ------------------------------------------------------------------------ probing
    def _probe(self, generator: torch.Generator) -> Probe:
        """Vectors a_p r at the rows p, pulled back: (a of each query position, r, found)."""
        batch, n, width = self.layout.batch, self.layout.n, self.layout.width
        probe_vector = torch.randn(width, generator=generator).to(self.like)
        size = 0.5 + torch.rand(batch, n, 1, generator=generator).to(self.like)
        found = self.pulled(size * probe_vector)
        probe_vector, size = probe_vector.to(found), size.to(found)
        return take(size, self.layout.index), probe_vector, found

    def _is_map(self, matrix: Tensor, probe: Probe, gains: Tensor | None = None) -> bool:
        """Whether every query position that is added anywhere is added through `matrix`."""
        size, probe_vector, found = probe
        if matrix.shape != (found.shape[-1], len(probe_vector)):
            return False
        expected = size * (matrix @ probe_vector)
        expected = expected if gains is None else expected * gains
        entering = found.abs().amax(-1) > 0  # not so for a token whose output is thrown away
        missed = (found - expected).norm(dim=-1) * entering
        tolerance = self.tolerance
        return bool((missed <= tolerance * expected.norm(dim=-1).amax()).all())

    def _gains(self, matrix: Tensor, probes: list[Probe]) -> Tensor | None:
        """What multiplies each query's output before `matrix`, (B, n_q, H d), by least squares."""
        if matrix.shape != (probes[0][2].shape[-1], self.layout.width):
            return None
        expected = torch.stack([matrix @ probe_vector for _, probe_vector, _ in probes])
        found = torch.stack([_of_unit_size(probe) for probe in probes])
        return _fitted(found, expected[:, None, None])

    def _relative_gains(self, probes: list[Probe]) -> Tensor | None:
        """The gains of each query by those of one, (B, n_q, H d); None: they are all alike."""
        found = torch.stack([_of_unit_size(probe) for probe in probes])  # (P, B, n_q, H d)
        flat = found.flatten(1, 2)
        one = flat[:, flat.norm(dim=-1).sum(0).argmax()]  # (P, H d)
        relative = _fitted(found, one[:, None, None])
        entering = found.abs().amax((0, -1)) > 0
        alike = (relative - 1).abs().amax(-1) <= self.tolerance
        return None if bool((alike | ~entering).all()) else relative

    def _guess(self) -> Tensor | None:
        """The one weight on the way, times the factor per channel behind it."""
        products = [node for node in self.path if hasattr(node, "_saved_mat2")]
        if len(products) != 1 or products[0]._saved_mat2 is None:
            return None
        weight = products[0]._saved_mat2.detach()
        weight = weight[0] if weight.ndim == 3 else weight
        if weight.shape[-1] != self.layout.width:
            return None
        factor = self._factor(products[0])
        return None if factor is None else weight.to(factor) * factor

    def _factor(self, node: Node) -> Tensor | None:
        batch, n, width = self.layout.batch, self.layout.n, self.layout.width
        found = self._gradient(torch.ones(batch, n, width), GradientEdge(node, 0))
        if found is None or found.shape[-1] != width:
            return None
        factor = found.reshape(-1, width)
        factor = factor[factor.abs().amax(-1).argmax()]
        return factor.to(working_dtype(factor.dtype))

    def _read(self, relative: Tensor | None = None) -> Tensor:
        """The map, (H d, D), from the gradients of unit vectors, as many at once as fit.

        Args:
            relative (Tensor or None): (B, n_q, H d), gains by those of one query, whose map is
                read; queries with gains near 0 do not tell it.
        """
        batch, n, width = self.layout.batch, self.layout.n, self.layout.width
        own, index = torch.arange(n)[None], self.layout.index
        index = (own if index is None else index.cpu()).expand(batch, -1)
        tells = index >= 0
        if relative is not None:
            least = relative.abs().amin(-1).cpu()
            tells = tells & (least >= min(0.05, float(least[tells].max())))
        example, token = tells.nonzero(as_tuple=True)
        place = index[example, token]
        lines = []
        for start in range(0, width, len(place)):
            count = min(len(place), width - start)
            unit = torch.zeros(batch, n, width)
            unit[example[:count], place[:count], torch.arange(start, start + count)] = 1
            line = self.pulled(unit)[example[:count], token[:count]]
            if relative is not None:
                line = _ratio(line, relative[example[:count], token[:count]])
            lines.append(line)
        return torch.cat(lines).T.contiguous()


def _of_unit_size(probe: Probe) -> Tensor:
    size, _, found = probe
    return _ratio(found, size)


def _fitted(found: Tensor, expected: Tensor) -> Tensor:
    """g of g ⊙ expected ≈ found, number by number over the first axis; 1 where all is 0."""
    squares = expected.square().sum(0)
    return torch.where(squares == 0, 1.0, _ratio((found * expected).sum(0), squares))


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """0 where the other is 0."""
    return torch.where(other == 0, 0.0, one / torch.where(other == 0, 1.0, other))
