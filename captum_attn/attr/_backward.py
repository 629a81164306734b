"""One backward pass: the gradients at the attention calls, and the rows that the output reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_attn import objectives
from captum_attn._checks import FAILURES, shown, shown_error
from captum_attn.attr._request import Request
from captum_attn.errors import AttnError, InputError, ReadoutError, TargetError
from captum_attn.observe import AttentionCall, Observation
from captum_attn.observe.capture.default_device import on_users_device
from captum_attn.observe.observation import Watched
from captum_attn.observe.streams.readout import Read, given_weights, pieces
from captum_attn.observe.streams.states import State
from captum_attn.observe.tracing.autograd_graph import gradients


@dataclass
class Backward:
    """What one backward pass gave.

    Args:
        reads (list of Read): the states that the output reads.
        weights (dict): state -> the weights of its rows, (B, n).
        gradients (dict): call -> gradient of the objective at its output, None where it is zero.
        relevances (dict): call -> relevance at its output, None where it is zero; of methods with
            rules.
        last_rows (dict): stream -> the last row that is read, (B, 1), where those behind it are
            left out (`Request.causal`).
        objective (Tensor, optional): (B,), what is explained, of methods that keep the graph.
    """

    reads: list[Read] = field(default_factory=list)
    weights: dict[State, Tensor] = field(default_factory=dict)
    gradients: dict[AttentionCall, Tensor | None] = field(default_factory=dict)
    relevances: dict[AttentionCall, Tensor | None] = field(default_factory=dict)
    last_rows: dict[str, Tensor] = field(default_factory=dict)
    objective: Tensor | None = None

    @property
    def has_vanished(self) -> bool:
        """Whether gradients of calls were asked for, and all of them are zero."""
        arrived = self.gradients.values()
        return bool(arrived) and not any(g is not None and bool(g.any()) for g in arrived)

    def gradients_at(self, edges: Sequence[GradientEdge | None]) -> list[Tensor | None]:
        """The gradients of what is explained at places in the graph; None where one is zero."""
        if self.objective is None:
            return [None] * len(edges)
        arrived = iter(_gradients(self.objective, [edge for edge in edges if edge is not None]))
        return [None if edge is None else next(arrived) for edge in edges]


@dataclass(frozen=True)
class ExplainedValue:
    """The explained scalars.

    Args:
        objective (Tensor): (B,), what is explained.
        stand_in (Tensor): (B,), the output that `target` selects, for the readout where the
            objective's gradient has vanished: a saturated probability.
    """

    objective: Tensor
    stand_in: Tensor

    @property
    def may_vanish(self) -> bool:
        """Whether the objective is another one than the output that `target` selects."""
        return self.objective is not self.stand_in


def run_backward(
    observation: Observation,
    request: Request,
    value: ExplainedValue,
    calls: Sequence[AttentionCall],
    reads: Sequence[Read],
    like: Tensor,
    keep: bool,
) -> Backward:
    """One backward pass from what is explained.

    Args:
        observation (Observation): what the run showed.
        request (Request): what the user asks for.
        value (ExplainedValue): what is explained.
        calls (sequence of AttentionCall): where gradients are wanted.
        reads (sequence of Read): the states that the output reads.
        like (Tensor): of the working precision and the device.
        keep (bool): whether autograd is asked again later; else the graph is freed.
    """
    auto = isinstance(request.readout, str)
    edges = [edge for read in reads for edge in read.edges] if auto else []
    several = observation.batch > 1
    keep |= value.may_vanish or len(reads) > 1
    keep |= any(read.read_on or (read.packed and several) for read in reads)
    arrived = _gradients(value.objective, [*edges, *(call.edge for call in calls)], keep=keep)
    result = Backward(list(reads), {}, dict(zip(calls, arrived[len(edges) :], strict=True)))
    norms: dict[Read, Tensor] = {}
    for read in reads:
        if auto:
            at_edges, arrived = arrived[: len(read.edges)], arrived[len(read.edges) :]
            found = _observed_norms(read, at_edges, value, result, observation)
            norms |= {} if found is None else {read: found}
            weights = read.normalized(found)
        else:
            weights = given_weights(request.readout, read, observation.batch, like)
        if weights is not None:
            result.weights[read.state] = weights.to(like)
    for group in pieces(list(norms)):  # pieces of one stream share its weights, which sum to 1
        total = torch.stack([norms[read].sum(1) for read in group]).sum(0)
        if bool((total > 0).all() and torch.isfinite(total).all()):
            shares = {read.state: (norms[read] / total[:, None]).to(like) for read in group}
            result.weights |= shares
    if reads and not result.weights:
        raise ReadoutError(
            "the gradient of the explained output vanishes at every token it could read (a "
            "saturated or dead head, a class without weights such as the padding token's, an "
            "output that depends on no token, a layer without a derivative): choose another "
            "target, or give `readout=`, a row, a LongTensor (B,) of rows, or weights (B, n)"
        )
    if request.causal:
        for state, weights in result.weights.items():
            rows = torch.arange(state.n, device=weights.device)
            result.last_rows[state.stream] = ((weights != 0) * rows).amax(1, keepdim=True)
    return result


def explained_value(observation: Watched, request: Request, with_gradient: bool) -> ExplainedValue:
    """The explained scalars of a model's output.

    Args:
        with_gradient (bool): False for a class-agnostic method.
    """
    output, batch = observation.output, observation.batch
    target, objective = request.target, request.objective
    if not output.numel() or (len(output) if output.ndim else 1) != batch:
        raise TargetError(
            f"expected a model with an output for each of the {batch} examples, (B, ...); got one "
            f"of shape {tuple(output.shape)}"
        )
    if with_gradient and not output.requires_grad:
        raise TargetError(
            "expected a model whose output has a gradient, got whole numbers, or a tensor that was "
            "detached or computed under `no_grad`: explain the scores that it was made of (layers "
            "with int8 activations have no gradient: explain the model before it was quantised)"
        )
    if target is None and (objective is not None or not with_gradient):
        # A class-agnostic method only asks which rows are read; a plain sum of the outputs has no
        # gradient behind a softmax or LayerNorm, a fixed random weighting has.
        generator = torch.Generator().manual_seed(0)
        shape = output.shape or (1,)
        signs = torch.randint(2, shape, generator=generator)[:1] * 2 - 1
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
        return ExplainedValue(stand_in, stand_in)
    try:
        with on_users_device():
            value = objective(output, target)
    except AttnError:
        raise
    except FAILURES as error:
        raise TargetError(
            f"objective: failed on an output of shape {tuple(output.shape)} and the target "
            f"{shown(target)}: {shown_error(error)}; expected a callable (output, target) -> (B,)"
        ) from error
    if not isinstance(value, Tensor) or value.shape != (batch,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TargetError(f"objective: expected a tensor of shape ({batch},), got {got}")
    if not bool(torch.isfinite(value).all()):
        raise TargetError("objective: expected finite numbers, got NaN or inf")
    if not value.requires_grad and torch.is_grad_enabled():
        raise TargetError(
            "objective: expected a tensor that depends on the output with a gradient, got a "
            "constant or detached one"
        )
    return ExplainedValue(value, stand_in)


def _observed_norms(
    read: Read,
    at_edges: list[Tensor | None],
    value: ExplainedValue,
    result: Backward,
    observation: Observation,
) -> Tensor | None:
    """Norms of the gradient at a state's rows, (B, n); None where it has vanished."""
    cuts = observation.graph.cuts
    if read.packed and observation.batch > 1:
        return _norms_by_example(value.objective, read, observation)
    if len(result.reads) > 1 and observation.batch > 1:
        _check_examples_apart(value.objective, read, at_edges, observation)
    if read.read_on:  # only what arrives without another call in between
        at_edges = _gradients(value.objective, read.edges, cuts)
    norms = None if _is_dead(read, result) else read.norms(at_edges)
    if value.may_vanish and (norms is None or read.normalized(norms) is None):
        norms = read.norms(_gradients(value.stand_in, read.edges, cuts))
    return norms


def _norms_by_example(value: Tensor, read: Read, observation: Observation) -> Tensor:
    """Norms of the packed rows that each example's output reads, (B, n)."""
    examples = torch.eye(observation.batch, dtype=value.dtype, device=value.device)
    found = [
        read.norms(_gradients(value * one, read.edges, observation.graph.cuts)) for one in examples
    ]
    zeros = examples.new_zeros(1, read.state.n)
    norms = torch.cat([zeros if one is None else one.to(zeros) for one in found])
    if bool(((norms > 0).sum(0) > 1).any()):  # one image of several texts is no example's own
        graph = observation.graph
        members = sum(graph.bit[call] for call in read.calls)
        observation.wiring.refuse_shared(graph.leaves(graph.closed(members)))
    return norms


def _is_dead(read: Read, result: Backward) -> bool:
    """Whether no gradient at all arrives at the calls that made what is read."""
    arrived = [result.gradients[call] for call in read.calls if call in result.gradients]
    return bool(arrived) and not any(g is not None and bool(g.any()) for g in arrived)


def _check_examples_apart(
    value: Tensor, read: Read, arrived: list[Tensor | None], observation: Observation
) -> None:
    """Refuses outputs whose examples read each other's tokens, as a (B, B) score matrix does."""
    norms = read.norms(arrived)
    if norms is None or not bool(norms.any()):
        return
    first = torch.arange(observation.batch, device=value.device) == 0
    of_first = read.norms(_gradients(value * first, read.edges, observation.graph.cuts))
    crossing = of_first is not None and bool(of_first[1:].any())
    if crossing or bool((norms.sum(1) == 0).any()):
        raise ReadoutError(
            f"the explained output of an example reads tokens of {read.state.stream!r} of another "
            "one: expected outputs that depend on their own example alone; of a (B, B) matrix of "
            "scores explain the diagonal with objective=objectives.pairwise, or pass one example "
            "at a time"
        )


def _gradients(
    value: Tensor, edges: list[Any], cuts: Iterable[Any] = (), keep: bool = True
) -> list[Tensor | None]:
    if not edges or not value.requires_grad:
        return [None] * len(edges)
    return gradients([(value, torch.ones_like(value))], edges, cuts, keep)
