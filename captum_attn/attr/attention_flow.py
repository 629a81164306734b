"""Attention flow: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_attn.attr._base import AttentionAttribution, Block, BlockRow, Relevance, Run
from captum_attn.attr._propagate import add, columns_of, dense, read_parts
from captum_attn.errors import MissingExtraError, OptionError
from captum_attn.observe.streams.states import (
    AttentionState,
    InitialState,
    MixedState,
    ParallelState,
    RearrangedState,
    State,
    ancestry,
)

UNIT = 2**30  # capacities are whole numbers, as the solver wants them: shares of this
MOST_WORK = 2 * 10**9  # flows times edges for one example: some minutes


class AttentionFlow(AttentionAttribution):
    r"""Attention flow, Abnar & Zuidema, ACL 2020: Σ_r ω_r flow[r, :]; class-agnostic.

    The layers are a network of pipes: from token q behind a call to token k before it runs one of
    capacity rownorm(E_h A + I)[q, k]. flow[r, j] is the maximum flow from the row r that is read to
    the input's token j, each pair on its own, so that they do not sum to 1; where several rows are
    read, their flows are summed with their weights. (The authors divide the flows of a row by their
    sum, and sum over or take the largest of all rows, whichever is read.)

    No flow is more than 1, nor more than what the first layer can bring into the token: in deep
    models ever more pairs reach this bound, and what is left are the first layer's column sums.

    Flows are found by scipy, a maximum flow for every token and row, with capacities rounded to
    2^-30: 0.03 s a token for 12 layers of 197 tokens. Beyond 2 * 10^9 (flows times edges of an
    example) it is refused.

    An extension to models of several streams: all streams' tokens are nodes of one network, and a
    call to another stream's tokens shares its row among them and the token itself.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Raises:
        OptionError: where the network is too large.
        MissingExtraError: without scipy.

    Examples::

        >>> AttentionFlow(model).attribute(tokenizer(texts, ...))["input_ids"]   # (B, n)
    """

    needs_gradient = False

    @classmethod
    def get_name(cls) -> str:
        return "Attention Flow"

    def weigh_heads(self, run: Run[AttentionAttribution.Options], block: Block) -> Tensor:
        return block.attention()

    def relevance(self, run: Run[AttentionAttribution.Options]) -> Relevance:
        # Only rows that are read are solved, and another target may read others of the same run.
        read = ((s, tuple(map(tuple, w.nonzero().tolist()))) for s, w in run.weights.items())
        flows = run.cached(("flows", *read), lambda: self.matrices(run, run.weights))
        found: Relevance = {}
        for state, weights in run.weights.items():
            for source, block in flows[state].items():
                add(found, source, (weights[:, None] @ block)[:, 0])
        return found

    def matrices(
        self, run: Run[AttentionAttribution.Options], last: Iterable[State]
    ) -> dict[State, BlockRow]:
        """flow[r, j] of the rows that are read, zeros in others; of all where none is read."""
        last = list(last)
        network = self._network(run, last)
        found: dict[State, BlockRow] = {}
        for state in last:
            weights = run.weights.get(state)
            read = None if weights is None else weights != 0
            found[state] = {
                start.source: network.flows(state, start, read, run.like)
                for start in network.starts
            }
        return found

    def _network(self, run: Run[Any], last: list[State]) -> Network:
        network = Network(list(ancestry(last)), run.batch)
        for state in network.first:
            if isinstance(state, AttentionState) and run.counts(state.call):
                read = run.full_map(state.call, lambda block: block.attention().mean(2))
                self._attend(network, state, dense(read))
            elif isinstance(state, AttentionState):
                network.move(state, state.query_state)
            elif isinstance(state, RearrangedState):
                for part in state.parts:
                    network.move(state, part.state, part.to)
            elif isinstance(state, MixedState):
                for before, mixing in zip(state.parts, state.mixing.matrices(), strict=True):
                    network.connect(state, before, mixing)
            elif isinstance(state, ParallelState):
                for before in state.before:
                    network.move(state, before)
        return network

    def _attend(self, network: Network, state: AttentionState, read: Tensor) -> None:
        """rownorm(E_h A + I), (B, q, k)."""
        total = 1 + read.sum(-1, keepdim=True)
        eye = torch.eye(state.n, dtype=read.dtype, device=read.device)
        network.connect(state, state.query_state, eye / total)
        for part in read_parts(state):
            network.connect(state, part.state, columns_of(read / total, part))


@dataclass
class Network:
    """Tokens of all states, and the capacities between them.

    Args:
        states (list of State): each after those that it is made of.
        batch (int): number of examples.
    """

    states: list[State]
    batch: int
    first: dict[State, int] = field(default_factory=dict)
    _edges: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        number = 0
        for state in self.states:
            self.first[state] = number
            number += state.n
        self.size = number

    @property
    def starts(self) -> list[InitialState]:
        """The states that hold the inputs' tokens."""
        return [state for state in self.states if isinstance(state, InitialState)]

    def connect(self, after: State, before: State, capacity: Tensor) -> None:
        """Pipes from every token of a state to those of an earlier one, (B, n_after, n_before)."""
        here, there = self.first[after], self.first[before]
        rows = here + torch.arange(after.n)[:, None].expand(after.n, before.n)
        columns = there + torch.arange(before.n).expand(after.n, before.n)
        size = self.batch, after.n, before.n
        self._edges.append((
            rows.expand(size).flatten(1), columns.expand(size).flatten(1),
            capacity.cpu().double().expand(size).flatten(1),
        ))  # fmt: skip

    def move(self, after: State, before: State, to: Tensor | None = None) -> None:
        """Tokens that stay what they are; `to` (B or 1, n_before) are their new places, -1 none."""
        to = torch.arange(before.n)[None] if to is None else to.cpu()
        rows = self.first[after] + to.clamp_min(0).expand(self.batch, -1)
        columns = self.first[before] + torch.arange(before.n).expand(self.batch, -1)
        self._edges.append((rows, columns, (to >= 0).double().expand(self.batch, -1)))

    def flows(self, state: State, start: InitialState, read: Tensor | None, like: Tensor) -> Tensor:
        """flow[r, j] of the rows of a state that are read, (B, n, n_source); zeros in others."""
        found = torch.zeros(self.batch, state.n, start.n, dtype=torch.float64)
        for b in range(self.batch):
            rows = range(state.n) if read is None else read[b].nonzero()[:, 0].tolist()
            self._check_size(len(rows) * start.n)
            graph = self._graph(b)
            for r in rows:
                for j in range(start.n):
                    source, sink = self.first[state] + r, self.first[start] + j
                    found[b, r, j] = maximum_flow(graph, source, sink) / UNIT
        return found.to(like)

    def _graph(self, example: int) -> Any:
        from scipy.sparse import coo_array

        rows, columns, values = (
            torch.cat([edge[i][example] for edge in self._edges]).numpy() for i in range(3)
        )
        whole = coo_array((values, (rows, columns)), shape=(self.size, self.size)).tocsr()
        whole.data = np.rint(whole.data * UNIT).astype(np.int32)
        whole.eliminate_zeros()
        return whole

    def _check_size(self, flows: int) -> None:
        edges = sum(edge[0].shape[1] for edge in self._edges)
        if flows * edges > MOST_WORK:
            raise OptionError(
                "Attention Flow solves a maximum flow for each token and row that is read: "
                f"{flows} flows over {edges} edges are more than {MOST_WORK} (their product), the "
                "most it takes on; expected fewer tokens, layers (`layers=`) or rows (`readout=`), "
                "or AttentionRollout"
            )


def maximum_flow(graph: Any, source: int, sink: int) -> int:
    """The largest flow between two nodes; a token that is read as it is gives all to itself."""
    try:
        from scipy.sparse.csgraph import maximum_flow as solve
    except ImportError as error:
        raise MissingExtraError(
            "attention flow is solved by scipy: pip install 'captum_attn[solvers]'"
        ) from error
    return UNIT if source == sink else int(solve(graph, source, sink).flow_value)
