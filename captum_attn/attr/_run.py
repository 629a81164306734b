"""One observed run of the user's model, with the gradients and the readout that methods ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from captum._utils.common import _format_output, _format_tensor_into_tuples
from torch import Tensor

from captum_attn import objectives
from captum_attn.attr._blocks import AtOnce, Weigh, Weighed, queries_at_once, whole
from captum_attn.attr._inputs import Inputs
from captum_attn.attr._propagate import BlockRow
from captum_attn.errors import AttnError, InputError, ReadoutError, TargetError
from captum_attn.observe.capture.attention_call import (
    AttentionCall,
    Block,
    attention_map,
    working_dtype,
)
from captum_attn.observe.observation import Observation
from captum_attn.observe.streams.readout import Read, given_weights, pieces
from captum_attn.observe.streams.states import AttentionState, Source, State, ancestry
from captum_attn.observe.streams.to_inputs import in_order, input_order, to_input
from captum_attn.observe.tracing.autograd_graph import gradients

Readout = str | int | Tensor
Made = TypeVar("Made")

# Attention maps kept where one forward pass serves several targets, at most, in bytes.
KEPT_MAPS = 2**30


@dataclass(frozen=True)
class Request:
    """What is explained: the arguments that every method shares, as documented in `attribute`.

    Args:
        causal (bool): whether tokens behind the one that is read out are left as they are born, as
            if the sequence ended there.
    """

    target: Any
    additional_forward_args: Any
    objective: objectives.Objective | None
    readout: Readout | None
    start_layer: int
    causal: bool = False


@dataclass
class Run:
    """One observed run, of which one target is explained.

    Args:
        seen (Observation): what the run showed.
        active (set of int): indices of the calls that count (`layers`, `start_layer`).
        options (dict): the method's own options.
        reads (list of Read), weights (dict): the states that the output reads, and the weights of
            their rows, (B, n).
        gradients (dict): call -> gradient of the objective at its output, None where it is zero.
        last (dict): stream -> the last row that is read, (B, 1), where those behind it are left
            out (`Request.causal`).
        shared (dict or None): what the targets of one forward pass have in common.
    """

    seen: Observation
    active: set[int]
    options: dict[str, Any]
    reads: list[Read] = field(default_factory=list)
    weights: dict[State, Tensor] = field(default_factory=dict)
    gradients: dict[AttentionCall, Tensor | None] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[Any, Any] | None = None

    def cached(self, key: Any, make: Callable[[], Made]) -> Made:
        """What no target changes: made once for all of them, and not kept for a single one."""
        if self.shared is None:
            return make()
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def share(self) -> None:
        """Makes the run one of several: A of the fused calls is formed once, if it fits."""
        self.shared, left = {}, KEPT_MAPS
        for call in (u.call for u in self.seen.wiring.updates if u.call.index in self.active):
            dtype = working_dtype(call.q.dtype)
            size = math.prod(call.lead) * call.n_q * call.n_k * dtype.itemsize
            if call.weights is None and size <= left:
                q, k = call.q.detach().to(dtype), call.k.detach().to(dtype)
                mask = None if call.mask is None else call.mask.detach()
                call.weights = attention_map(q, k, mask, call.is_causal, call.scale)
                left -= size

    def for_next_target(self) -> Run:
        """The same forward pass, for another target."""
        return Run(self.seen, self.active, self.options, shared=self.shared)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the batch size, the working precision and the device of the run."""
        value = self.seen.tap.calls[0].v
        dtype = working_dtype(value.dtype)
        return torch.empty(self.seen.batch, 0, dtype=dtype, device=value.device)

    def attention_gradient(self, block: Block) -> Tensor | None:
        """d objective / d A, (B, F, H, q', k'); None where the objective does not depend on A."""
        gradient = self.gradients.get(block.call)
        return None if gradient is None else block.map_gradient(gradient)

    @property
    def at_once(self) -> AtOnce:
        """How many queries of a call are weighed at a time."""
        return queries_at_once(self.seen.batch, self.options["block_size"])

    def whole(self, update: AttentionState, weigh: Weigh) -> Weighed | None:
        """(own, A-bar) for all queries of a call, formed block by block."""
        weighed, device = whole(update, weigh, self.at_once), self.like.device
        if weighed is None or weighed[1].device == device:
            return weighed
        own, read = weighed  # the matrices of R stay where the first layer is
        return own.to(device) if isinstance(own, Tensor) else own, read.to(device)

    def whole_map(self, update: AttentionState, form: Callable[[Block], Tensor]) -> Tensor:
        """`form` of every block of a call, (B, F, q', k'), put together: (B, F, q, k)."""
        weighed = self.whole(update, lambda _, block: (0.0, form(block)))
        assert weighed is not None
        return weighed[1]

    def updates(self, last: Iterable[State] | None = None) -> list[AttentionState]:
        """The active attention calls that went into `last` (default: into what is read)."""
        states = ancestry(list(self.weights if last is None else last))
        return [s for s in states if isinstance(s, AttentionState) and s.call.index in self.active]

    def rows_of(self, relevance: Mapping[Source, Tensor], source: Source) -> Tensor:
        """(B, n), zeros for a source that nothing was read from."""
        rows = relevance.get(source)
        return self.like.new_zeros(self.seen.batch, source.n) if rows is None else rows

    def input_attribution(
        self, name: str, relevance: Mapping[Source, Tensor], interpolation: str
    ) -> Tensor | None:
        """Attribution of the input `name`; None if it enters no token stream."""
        total = None
        for source in self.seen.wiring.sources:
            for entry in source.entries:
                if entry.leaf.name == name and entry.of_input:
                    laid = to_input(entry, self.rows_of(relevance, source), interpolation)
                    total = laid if total is None else total + laid
        return total

    def tokens(self, relevance: Mapping[Source, Tensor]) -> dict[str, Tensor]:
        """Stream name -> (B, n), in the order of the inputs."""
        tokens = {}
        for source in self.seen.wiring.sources:
            order = input_order(source, self.seen.batch)
            tokens[source.name] = in_order(self.rows_of(relevance, source), order)
        return tokens

    def attributions(
        self, relevance: Mapping[Source, Tensor], inputs: Inputs, interpolation: str
    ) -> Any:
        """Attributions in the container of the inputs, as `attribute` returns them."""
        found = {
            name: self.input_attribution(name, relevance, interpolation) for name in self.seen.names
        }
        if all(laid is None for laid in found.values()):
            raise InputError(
                f"none of the inputs {list(found)} enters a token stream: expected at least one "
                "whose embedding or patches the attention reads"
            )
        if isinstance(inputs, Mapping):
            return {name: laid for name, laid in found.items() if laid is not None}
        laid = tuple(
            torch.zeros(x.shape, dtype=self.like.dtype, device=x.device) if r is None else r
            for x, r in zip(_format_tensor_into_tuples(inputs), found.values(), strict=True)
        )
        return _format_output(isinstance(inputs, tuple), laid)

    def mask_later_rows(self, state: State, after: BlockRow, before: BlockRow) -> BlockRow:
        """R of `state` after a call, but as before it in rows behind the one that is read."""
        if state.stream not in self.last:
            return after
        behind = torch.arange(state.n, device=self.like.device) > self.last[state.stream]
        return {
            source: torch.where(behind[..., None], before.get(source, torch.zeros_like(rows)), rows)
            for source, rows in after.items()
        }

    def explain(self, explained: Request, with_gradient: bool, keep: bool) -> None:
        """One backward pass: the gradients at the attention calls, and the readout's weights.

        Args:
            keep (bool): whether the rule asks autograd again later; else the graph is freed.
        """
        seen, readout = self.seen, explained.readout
        if isinstance(readout, str) and readout != "auto":
            raise ReadoutError(f"readout: expected 'auto', an int or a tensor; got {readout!r}")
        auto = isinstance(readout, str)
        value, stand_in = _explained_output(seen.output, explained, with_gradient, seen.batch)
        if self.shared is None:  # no other target follows
            seen.output = value.detach()
        self.reads = [] if readout is None else self.cached("reads", seen.reads)
        calls = [u.call for u in seen.wiring.updates if u.call.index in self.active]
        calls = calls if with_gradient else []
        wanted = [edge for read in self.reads for edge in read.edges] if auto else []
        keep |= self.shared is not None or stand_in is not value or len(self.reads) > 1
        keep |= any(read.read_on or (read.packed and seen.batch > 1) for read in self.reads)
        found = _gradients(value, [*wanted, *(call.edge for call in calls)], keep=keep)
        self.gradients = dict(zip(calls, found[len(wanted) :], strict=True))
        norms: dict[Read, Tensor] = {}
        for read in self.reads:
            if not auto:
                weights = given_weights(readout, read, seen.batch, self.like)
                self.weights[read.state] = weights
                continue
            at_edges, found = found[: len(read.edges)], found[len(read.edges) :]
            if read.packed and seen.batch > 1:
                norms[read] = _norms_by_example(value, read, seen)
                shares = read.normalized(norms[read])
                if shares is not None:
                    self.weights[read.state] = shares.to(self.like)
                continue
            if len(self.reads) > 1 and seen.batch > 1:
                _check_examples_apart(value, read, at_edges, seen)
            if read.read_on:  # only what arrives without another call in between
                at_edges = _gradients(value, read.edges, seen.graph.cuts)
            auto_weights = None if self._is_dead(read) else read.weights(at_edges)
            if auto_weights is None and stand_in is not value:  # e.g. a saturated probability
                at_edges = _gradients(stand_in, read.edges, seen.graph.cuts)
                auto_weights = read.weights(at_edges)
            arrived = read.norms(at_edges)
            if arrived is not None:
                norms[read] = arrived
            if auto_weights is not None:
                self.weights[read.state] = auto_weights.to(self.like)
        self._weigh_pieces(norms)
        if self.reads and not self.weights:
            raise ReadoutError(
                "the gradient of the explained output vanishes at every token it could read (a "
                "saturated or dead head, a class without weights such as the padding token's, an "
                "output that depends on no token): choose another target, or give `readout=`, a "
                "row, a LongTensor (B,) of rows, or weights (B, n)"
            )
        if explained.causal:
            for state, weights in self.weights.items():
                rows = torch.arange(state.n, device=weights.device)
                self.last[state.stream] = ((weights != 0) * rows).amax(1, keepdim=True)

    def _weigh_pieces(self, norms: Mapping[Read, Tensor]) -> None:
        """The pieces of one stream share its weights, which sum to 1."""
        for group in pieces([read for read in self.reads if read in norms]):
            total = torch.stack([norms[read].sum(1) for read in group]).sum(0)
            if bool((total > 0).all() and torch.isfinite(total).all()):
                for read in group:
                    self.weights[read.state] = (norms[read] / total[:, None]).to(self.like)

    def _is_dead(self, read: Read) -> bool:
        """Whether no gradient at all arrives at the calls that made what is read."""
        arrived = [self.gradients[call] for call in read.calls if call in self.gradients]
        return bool(arrived) and not any(g is not None and bool(g.any()) for g in arrived)


def _norms_by_example(value: Tensor, read: Read, seen: Observation) -> Tensor:
    """Norms of the packed rows that each example's output reads, (B, n)."""
    examples = torch.eye(seen.batch, dtype=value.dtype, device=value.device)
    found = [read.norms(_gradients(value * one, read.edges, seen.graph.cuts)) for one in examples]
    zeros = examples.new_zeros(1, read.state.n)
    return torch.cat([zeros if one is None else one.to(zeros) for one in found])


def _check_examples_apart(
    value: Tensor, read: Read, arrived: list[Tensor | None], seen: Observation
) -> None:
    """Refuses outputs whose examples read each other's tokens, as a (B, B) score matrix does."""
    norms = read.norms(arrived)
    if norms is None or not bool(norms.any()):
        return
    first = torch.arange(seen.batch, device=value.device) == 0
    of_first = read.norms(_gradients(value * first, read.edges, seen.graph.cuts))
    crossing = of_first is not None and bool(of_first[1:].any())
    if crossing or bool((norms.sum(1) == 0).any()):
        raise ReadoutError(
            f"the explained output of an example reads tokens of {read.state.stream!r} of another "
            "one: expected outputs that depend on their own example alone; of a (B, B) matrix of "
            "scores explain the diagonal with objective=objectives.pairwise, or pass one example "
            "at a time"
        )


def _explained_output(
    output: Tensor, explained: Request, with_gradient: bool, batch: int
) -> tuple[Tensor, Tensor]:
    """The explained scalars, (B,), and what stands in for them where their gradient vanishes."""
    target, objective = explained.target, explained.objective
    if target is None and (objective is not None or not with_gradient):
        # A class-agnostic method only asks which rows are read; a plain sum of the outputs has no
        # gradient behind a softmax or LayerNorm, a fixed random weighting has.
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, output.shape, generator=generator)[:1] * 2 - 1
        finite = output.masked_fill(output == -torch.inf, 0)  # outputs that a model has masked
        stand_in = (finite * signs.to(output)).reshape(batch, -1).sum(1)
    else:
        stand_in = objectives.logit(output, target).clone()  # a view would hold the whole output
    if not bool(torch.isfinite(stand_in).all()):
        raise InputError(
            "the model's output has NaN or inf: expected finite weights and inputs; check the "
            "weights (`torch.isfinite(p).all()` for each parameter) and the inputs' range"
        )
    if objective is None:
        return stand_in, stand_in
    value = objective(output, target)
    if not isinstance(value, Tensor) or value.shape != (batch,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TargetError(f"objective: expected a tensor of shape ({batch},), got {got}")
    if not value.requires_grad:
        raise TargetError(
            "objective: expected a tensor that depends on the output with a gradient, got a "
            "constant or detached one"
        )
    return value, stand_in


def _gradients(
    value: Tensor, edges: list[Any], cuts: Iterable[Any] = (), keep: bool = True
) -> list[Tensor | None]:
    if not edges or not value.requires_grad:
        return [None] * len(edges)
    return gradients([(value, torch.ones_like(value))], edges, cuts, keep)


def finite(relevance: dict[Source, Tensor]) -> dict[Source, Tensor]:
    """Refuses relevance that overflowed on the way instead of handing out NaN."""
    for source, rows in relevance.items():
        if not bool(torch.isfinite(rows).all()):
            raise AttnError(
                f"the relevance of {source.name!r} has NaN or inf: expected gradients and maps "
                "that are finite; run the model in float32 or float64 instead of half precision"
            )
    return relevance
