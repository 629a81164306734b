"""One observed run of the user's model, with the gradients and the readout that methods ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from captum._utils.common import _format_tensor_into_tuples
from torch import Tensor

from captum_attn import objectives
from captum_attn.errors import AttnError, InputError, ReadoutError, TargetError
from captum_attn.observe.call import AttentionCall, working_dtype
from captum_attn.observe.graph import gradients
from captum_attn.observe.mapback import to_input
from captum_attn.observe.observation import Observation
from captum_attn.observe.readout import Read, given_weights
from captum_attn.observe.streams import Source, State, Updated, ancestry

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]
Readout = str | int | Tensor


@dataclass(frozen=True)
class Explained:
    """What is explained: the arguments that every method shares, as documented in `attribute`."""

    target: Any
    additional_forward_args: Any
    objective: objectives.Objective | None
    readout: Readout | None
    start_layer: int


@dataclass
class Run:
    """One observed run.

    Args:
        seen (Observation): what the run showed.
        active (set of int): indices of the calls that count (`layers`, `start_layer`).
        options (dict): the method's own options.
        reads (list of Read), weights (dict): the states that the output reads, and the weights of
            their rows, (B, n).
        gradients (dict): call -> gradient of the objective at its output, None where it is zero.
    """

    seen: Observation
    active: set[int]
    options: dict[str, Any]
    reads: list[Read] = field(default_factory=list)
    weights: dict[State, Tensor] = field(default_factory=dict)
    gradients: dict[AttentionCall, Tensor | None] = field(default_factory=dict)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the batch size, the working precision and the device of the run."""
        value = self.seen.tap.calls[0].v
        dtype = working_dtype(value.dtype)
        return torch.empty(self.seen.batch, 0, dtype=dtype, device=value.device)

    def attention_gradient(self, call: AttentionCall) -> Tensor | None:
        """d objective / d A, (B, F, H, q, k); None where the objective does not depend on A."""
        gradient = self.gradients.get(call)
        return None if gradient is None else call.map_gradient(gradient)

    def updates(self, last: Iterable[State] | None = None) -> list[Updated]:
        """The active attention calls that went into `last` (default: into what is read)."""
        states = ancestry(list(self.weights if last is None else last))
        return [s for s in states if isinstance(s, Updated) and s.call.index in self.active]

    def rows_of(self, relevance: Mapping[Source, Tensor], source: Source) -> Tensor:
        """(B, n), zeros for a source that nothing was read from."""
        rows = relevance.get(source)
        return self.like.new_zeros(self.seen.batch, source.n) if rows is None else rows

    def laid_on(
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

    def explain(self, explained: Explained, with_gradient: bool) -> None:
        """One backward pass: the gradients at the attention calls, and the readout's weights."""
        seen, readout = self.seen, explained.readout
        if isinstance(readout, str) and readout != "auto":
            raise ReadoutError(f"readout: expected 'auto', an int or a tensor; got {readout!r}")
        auto = isinstance(readout, str)
        value, stand_in = _explained_output(seen.output, explained, with_gradient, seen.batch)
        self.reads = [] if readout is None else seen.reads()
        calls = [u.call for u in seen.wiring.updates if u.call.index in self.active]
        calls = calls if with_gradient else []
        wanted = [edge for read in self.reads for edge in read.edges] if auto else []
        found = _gradients(value, [*wanted, *(call.edge for call in calls)])
        self.gradients = dict(zip(calls, found[len(wanted) :], strict=True))
        for read in self.reads:
            if not auto:
                weights = given_weights(readout, read, seen.batch, self.like)
                self.weights[read.state] = weights
                continue
            at_edges, found = found[: len(read.edges)], found[len(read.edges) :]
            if len(self.reads) > 1 and seen.batch > 1:
                _check_examples_apart(value, read, at_edges, seen)
            if read.read_on:  # only what arrives without another call in between
                at_edges = _gradients(value, read.edges, seen.graph.cuts)
            auto_weights = None if self._is_dead(read) else read.weights(at_edges)
            if auto_weights is None and stand_in is not value:  # e.g. a saturated probability
                auto_weights = read.weights(_gradients(stand_in, read.edges, seen.graph.cuts))
            if auto_weights is not None:
                self.weights[read.state] = auto_weights.to(self.like)
        if self.reads and not self.weights:
            raise ReadoutError(
                "the gradient of the explained output vanishes at every token it could read (a "
                "saturated or dead head, or an output that depends on no token): give `readout=`, "
                "a row, a LongTensor (B,) of rows, or weights (B, n)"
            )

    def _is_dead(self, read: Read) -> bool:
        """Whether no gradient at all arrives at the calls that made what is read."""
        arrived = [self.gradients[call] for call in read.calls if call in self.gradients]
        return bool(arrived) and not any(g is not None and bool(g.any()) for g in arrived)


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
    output: Tensor, explained: Explained, with_gradient: bool, batch: int
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
        stand_in = objectives.logit(output, target)
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


def _gradients(value: Tensor, edges: list[Any], cuts: Iterable[Any] = ()) -> list[Tensor | None]:
    if not edges or not value.requires_grad:
        return [None] * len(edges)
    return gradients([(value, torch.ones_like(value))], edges, cuts)


def finite(relevance: dict[Source, Tensor]) -> dict[Source, Tensor]:
    """Refuses relevance that overflowed on the way instead of handing out NaN."""
    for source, rows in relevance.items():
        if not bool(torch.isfinite(rows).all()):
            raise AttnError(
                f"the relevance of {source.name!r} has NaN or inf: expected gradients and maps "
                "that are finite; run the model in float32 or float64 instead of half precision"
            )
    return relevance


def checked(inputs: Any, additional: Any) -> tuple[Tensor, ...] | Mapping[str, Any]:
    """Inputs as a tuple or a Mapping, refused early if they cannot be explained."""
    if isinstance(inputs, Mapping):
        return _checked_mapping(inputs, additional)
    if not isinstance(inputs, (Tensor, tuple)) or (
        isinstance(inputs, tuple) and not (inputs and all(isinstance(v, Tensor) for v in inputs))
    ):
        raise InputError(
            "expected a Tensor, a tuple of Tensors or a Mapping of them (a tokenizer's or "
            f"processor's output), got {type(inputs).__name__}"
        )
    formatted: tuple[Tensor, ...] = _format_tensor_into_tuples(inputs)
    for i, value in enumerate(formatted):
        _check_batch(f"input {i}", value, formatted[0])
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"input {i} has NaN or inf: expected finite inputs")
    return formatted


def _checked_mapping(inputs: Mapping[str, Any], additional: Any) -> Mapping[str, Any]:
    if additional is not None:
        raise InputError(
            "expected either a Mapping of inputs or positional `additional_forward_args`, got "
            "both: put the further arguments into the Mapping"
        )
    if inputs.get("past_key_values") is not None:
        raise InputError(
            "expected inputs without `past_key_values` (the tokens they stand for would get no "
            "relevance); pass the whole sequence instead"
        )
    tensors = {name: v for name, v in inputs.items() if isinstance(v, Tensor)}
    if not tensors:
        raise InputError(f"expected a Mapping with tensors, got entries {list(inputs)}")
    for name, value in tensors.items():
        if value.ndim == 0 or value.shape[0] == 0:
            raise InputError(f"{name!r}: expected at least one example, got {tuple(value.shape)}")
        finite = torch.isfinite(value) | (value == -torch.inf if "mask" in name else False)
        if not bool(finite.all()):
            raise InputError(f"{name!r} has NaN or inf: expected finite inputs")
    return inputs


def _check_batch(name: str, value: Tensor, first: Tensor) -> None:
    if value.ndim == 0 or value.shape[0] == 0:
        raise InputError(f"{name}: expected at least one example, got {tuple(value.shape)}")
    if value.shape[0] != first.shape[0]:
        raise InputError(
            f"{name}: expected {first.shape[0]} examples as input 0 has, got {value.shape[0]}"
        )
