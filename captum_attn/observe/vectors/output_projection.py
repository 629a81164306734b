"""The linear map from an attention call's output to what is added onto its stream.

A model's output projection, with whatever scale follows it, is read off autograd: the gradient of
the branch with respect to the call's output is that map transposed. A weight that the graph holds
is taken as a first guess; a probe with random vectors decides whether it, times a constant factor
per channel, is the map of every token. Else the map is read off row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn.errors import WiringError
from captum_attn.observe.capture.attention_call import AttentionCall, positions, working_dtype
from captum_attn.observe.tracing.autograd_graph import Graph, Node, gradients
from captum_attn.observe.tracing.token_index import take
from captum_attn.observe.tracing.token_layout import TokenLayout
from captum_attn.observe.vectors.recording_tap import Term

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass
class Branch:
    """What a call's output is added to its stream as.

    Args:
        call (AttentionCall): the call.
        term (Term): the branch, as it is added.
        layout (TokenLayout): how the branch holds the call's query positions.
    """

    call: AttentionCall
    term: Term
    layout: TokenLayout

    @property
    def edge(self) -> GradientEdge:
        assert self.term.edge is not None
        return self.term.edge

    @property
    def like(self) -> Tensor:
        return self.term.value

    def pulled(self, rows: Tensor) -> Tensor:
        """Rows at the branch, (B, n, D), pulled back to the call's output: (B, n_q, H d)."""
        vector = self.layout.scatter_positions(rows.to(self.like) * self.term.scale)
        (found,) = gradients([(self.edge, vector)], [self.call.edge])
        if found is None:
            raise WiringError(f"{self.call.module!r}: its branch does not depend on its output")
        found = positions(self.call.output_rows(found))
        return found.to(working_dtype(found.dtype))

    def linear_map(self, graph: Graph, generator: torch.Generator) -> Tensor:
        """W^O with its scale, (H, d, D).

        Raises:
            WiringError: if the branch is not one and the same linear map of every token's output.
        """
        probe = self._probe(generator)
        matrix = self._guess(graph)
        if matrix is None or not self._is_map(matrix, probe):
            matrix = self._read()
            if not self._is_map(matrix, probe):
                raise WiringError(
                    f"{self.call.module!r}: between its attention and the addition onto the skip "
                    "connection its output is not transformed by one linear map for all tokens (a "
                    "norm, a gate, dropout in train mode), so that the value vectors cannot be "
                    "followed; call `model.eval()`, leave the block out with `layers=`, or set "
                    "length=False and direction=False"
                )
        call = self.call
        return matrix.view(call.heads, matrix.shape[0] // call.heads, -1)

    # ------------------------------------------------------------------------ probing
    def _probe(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors a_p r at the rows p, pulled back: (a of each query position, r, found)."""
        batch, n, width = self.layout.batch, self.layout.n, self.layout.width
        probe_vector = torch.randn(width, generator=generator).to(self.like)
        size = 0.5 + torch.rand(batch, n, 1, generator=generator).to(self.like)
        found = self.pulled(size * probe_vector)
        probe_vector, size = probe_vector.to(found), size.to(found)
        return take(size, self.layout.index), probe_vector, found

    def _is_map(self, matrix: Tensor, probe: tuple[Tensor, Tensor, Tensor]) -> bool:
        """Whether every query position that is added anywhere is added through `matrix`."""
        size, probe_vector, found = probe
        if matrix.shape != (found.shape[-1], len(probe_vector)):
            return False
        expected = size * (matrix @ probe_vector)
        entering = found.abs().amax(-1) > 0  # not so for a token whose output is thrown away
        missed = (found - expected).norm(dim=-1) * entering
        tolerance = _TOLERANCE.get(self.like.dtype, 1e-3)
        return bool((missed <= tolerance * expected.norm(dim=-1).amax()).all())

    def _guess(self, graph: Graph) -> Tensor | None:
        """The one weight on the way, times the factor per channel behind it."""
        path = graph.between(self.edge.node, graph.bit[self.call])
        products = [node for node in path if hasattr(node, "_saved_mat2")]
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
        ones = torch.full((batch, n, width), self.term.scale).to(self.like)
        ones = self.layout.scatter_positions(ones)
        (found,) = gradients([(self.edge, ones)], [GradientEdge(node, 0)])
        if found is None or found.shape[-1] != width:
            return None
        factor = found.reshape(-1, width)
        factor = factor[factor.abs().amax(-1).argmax()]
        return factor.to(working_dtype(factor.dtype))

    def _read(self) -> Tensor:
        """The map, (H d, D), from the gradients of unit vectors, as many at once as fit."""
        batch, n, width = self.layout.batch, self.layout.n, self.layout.width
        own, index = torch.arange(n)[None], self.layout.index
        index = (own if index is None else index.cpu()).expand(batch, -1)
        example, token = (index >= 0).nonzero(as_tuple=True)
        place = index[example, token]
        lines = []
        for start in range(0, width, len(place)):
            count = min(len(place), width - start)
            unit = torch.zeros(batch, n, width)
            unit[example[:count], place[:count], torch.arange(start, start + count)] = 1
            lines.append(self.pulled(unit)[example[:count], token[:count]])
        return torch.cat(lines).T.contiguous()
