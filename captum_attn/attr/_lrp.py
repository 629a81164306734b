"""What the methods of relevance propagation share: where it is read, and the table of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_attn.attr._apart import check_apart
from captum_attn.attr._backward import explained_value, run_backward
from captum_attn.attr._base import AttentionAttribution, Relevance, Result, Run
from captum_attn.attr._describe import Description, describe_operations
from captum_attn.attr._engine import Engine, Targets
from captum_attn.attr._inputs import Inputs, checked
from captum_attn.attr._layers import Layers
from captum_attn.attr._leave_out import named
from captum_attn.attr._options import SharedOptions
from captum_attn.attr._request import Readout, Request
from captum_attn.attr._rule_sets import Form, overlaid
from captum_attn.attr._ruled import check_ruled, ruled_pass, warn_of_hidden
from captum_attn.errors import OptionError, TargetError, WiringError
from captum_attn.objectives import Objective
from captum_attn.observe.capture.attention_call import working_dtype
from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.capture.restore import left_as_found, modules_of
from captum_attn.observe.observation import watched
from captum_attn.observe.operators.bridge import Rules
from captum_attn.observe.streams.states import Source
from captum_attn.observe.vectors.recording_tap import RecordingTap, Term
from captum_attn.observe.vectors.vector_changes import VectorChanges

Made = TypeVar("Made")


@dataclass
class InputRun(Run[Any]):
    """A run of which nothing but its inputs is asked: its attention need not be wired.

    Args:
        arrived (list): (leaf, relevance of its elements) of every input.
        of_tokens (dict, optional): source -> relevance of the tokens that enter the first block.
    """

    arrived: list[tuple[Leaf, Tensor]] = field(default_factory=list)
    of_tokens: Relevance | None = None

    @property
    def like(self) -> Tensor:
        output = self.observation.output
        return torch.empty(self.batch, 0, dtype=working_dtype(output.dtype), device=output.device)

    def share(self) -> None:
        self.shared = {}


class End(NamedTuple):
    """Where relevance is read: a tensor's values, and its place in the graph (None: a constant)."""

    value: Tensor
    edge: GradientEdge | None


@dataclass
class InputEngine(Engine):
    """Runs a model, and follows relevance to its inputs in one backward pass a target.

    Args:
        form (str): see `InputRelevance`.
    """

    form: Form = "gradient"

    def _observed(
        self,
        forward_func: Callable,
        inputs: Inputs,
        request: Request,
        options: SharedOptions,
        roots: list[nn.Module],
        whole: bool = False,
    ) -> Run:
        if options.leave_out:  # what heads look at, and which row is read, the wiring says
            wired = super()._observed(forward_func, inputs, request, options, roots)
            return InputRun(wired.observation, options, wired.active)
        additional, rules = request.additional_forward_args, self.rules(options)
        assert rules is not None
        values = checked(inputs, additional)
        run = watched(forward_func, values, additional, roots, self.tap, (rules,))
        made = InputRun(run, options, set())  # type: ignore[arg-type]
        self._check_rules(made, rules)
        return made

    def _check_rules(self, run: Run, rules: Rules) -> None:
        """Relevance must not pass where there is no rule; a gradient may, if nothing hides."""
        if self.form == "relevance":
            edges = [end.edge for end in self._ends(run) if end.edge is not None]
            check_ruled(run.observation, [edge.node for edge in edges], rules)
        else:
            warn_of_hidden(run.observation)

    def _explain(self, run: Run, forward_func: Callable, request: Request) -> Run:
        assert isinstance(run, InputRun)
        if request.objective is None:
            request = replace(request, objective=self.default_objective)
        explained = explained_value(run.observation, request, True)
        if run.options.leave_out:
            seen = run.observation
            run.backward = run_backward(seen, request, explained, [], seen.reads(), run.like, True)
        value = explained.objective
        check_apart(run.observation, value)
        self._read(run, value)
        if run.shared is None:
            run.observation.output = value.detach()  # a language model's is large
        return run

    def _ends(self, run: Run) -> list[End]:
        leaves = _named_leaves(run)
        return [End(leaf.tensor.detach(), get_gradient_edge(leaf.tensor)) for leaf in leaves]

    def _read(self, run: InputRun, value: Tensor) -> None:
        arrived = self._followed(run, value, self._ends(run))
        run.arrived = list(zip(_named_leaves(run), arrived, strict=True))

    def _followed(self, run: InputRun, value: Tensor, ends: Sequence[End]) -> list[Tensor]:
        """Relevance at the ends: x ∘ g, or R as it arrives."""
        rules, observation = self.rules(run.options), run.observation
        assert rules is not None
        edges = [end.edge for end in ends if end.edge is not None]
        found = iter(ruled_pass(observation, value, edges, rules, run.shared is not None))
        arrived = [None if end.edge is None else next(found) for end in ends]
        return [
            torch.zeros_like(end.value)
            if share is None
            else (share if self.form == "relevance" else end.value * share)
            for end, share in zip(ends, arrived, strict=True)
        ]


@dataclass
class TokenEngine(InputEngine):
    """Follows relevance to the tokens that enter the first block."""

    def _observed(
        self,
        forward_func: Callable,
        inputs: Inputs,
        request: Request,
        options: SharedOptions,
        roots: list[nn.Module],
        whole: bool = False,
    ) -> Run:
        run = Engine._observed(self, forward_func, inputs, request, options, roots)
        return InputRun(run.observation, options, run.active)

    def _ends(self, run: Run) -> list[End]:
        return [End(term.vectors(), term.edge) for _, term, _ in _entering(run)]

    def _read(self, run: InputRun, value: Tensor) -> None:
        arrived = self._followed(run, value, self._ends(run))
        run.of_tokens = {
            source: rows(share).flatten(2).sum(-1).to(run.like)
            for (source, _, rows), share in zip(_entering(run), arrived, strict=True)
        }


def _named_leaves(run: Run) -> list[Leaf]:
    return [leaf for leaf in run.observation.tap.leaves if leaf.name]


def _entering(run: Run) -> list[tuple[Source, Term, Callable[[Tensor], Tensor]]]:
    """Every source's tokens as they enter the first block, and what brings them to (B, n, D)."""
    known = run.observation.notes
    if "entering" in known:
        return known["entering"]
    changes, found = VectorChanges(run.observation), known.setdefault("entering", [])
    for state in run.observation.wiring.stream_builder.initial_states:
        term, rows = changes.entering(state)
        if term is None:
            raise WiringError(
                f"the tokens of {state.stream!r} are asked for by the first attention and then no "
                "longer there, so that no tensor holds them as they enter; use `attribute`"
            )
        found.append((state.source, term, rows))
    return found


class InputRelevance(AttentionAttribution):
    r"""Base of the methods that read relevance at the inputs: a subclass supplies its rules.

    `attribute` needs no attention and no wiring. Float inputs get the relevance of every element,
    signed (of images, the sum over channels is the map); token ids the sum over their embedding's
    channels. `attribute_tokens` reads at the tokens that enter the first block instead. The sums of
    the two differ by what biases, positions and norms on the way absorb. Inputs whose embeddings
    are added to another input's (`token_type_ids`) get no entry.

    What reads rows or confines the method to some calls has no meaning here and is refused:
    `readout`, `start_layer`, `layers`, `relevance_maps`, `layer_maps`.

    Args:
        forward_func (Module or callable): the model, or any callable that runs one, as in Captum.

    Class attributes:
        form (str): "gradient" where rules rewrite the gradient and relevance is value x gradient,
            "relevance" where they share out relevance.
    """

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        rules: Mapping | str | None = None

    form: ClassVar[Form] = "gradient"
    confinable = False

    def __init__(self, forward_func: Callable, layers: Layers | None = None) -> None:
        super().__init__(forward_func, layers)
        if layers is not None:
            raise OptionError(
                f"layers: {self.get_name()} follows the whole model to its inputs; expected None"
            )
        settings = self.needs_gradient, self.keeps_graph, self.default_objective()
        self._engine: InputEngine = InputEngine(*settings, self.tap, self._rules, form=self.form)
        self._token_engine = TokenEngine(*settings, RecordingTap, self._rules, form=self.form)

    @classmethod
    def table(cls, options: Any) -> Rules:
        """The method's own table of rules."""
        raise NotImplementedError

    @classmethod
    def rules(cls, options: Any) -> Rules:
        return overlaid(cls.table(options), options.rules, cls.form)

    def _run(
        self, inputs: Inputs, request: Request, options: Mapping[str, Any]
    ) -> AbstractContextManager[Run]:
        self._check_request(request.readout, request.start_layer)
        return super()._run(inputs, request, options)

    def _check_request(self, readout: Any, start_layer: Any) -> None:
        if not isinstance(readout, str) or not isinstance(start_layer, int) or start_layer:
            given = "start_layer" if isinstance(readout, str) else "readout"
            raise OptionError(
                f"{given}: {self.get_name()} starts from the explained output itself and follows "
                "it to the inputs; leave it out, and choose what is explained by `target`"
            )

    def explain(self, run: Run[Any]) -> Result:
        assert isinstance(run, InputRun)
        if run.of_tokens is not None:
            _check_any(run.of_tokens.values())
            return Result(run, run.of_tokens)
        batch, found = run.batch, dict[str, Tensor]()
        for leaf, relevance in run.arrived:
            if not leaf.known or leaf.name in run.observation.additive:
                continue
            if leaf.of_integers:
                relevance = leaf.laid(leaf.rows(relevance, batch).sum(-1))
            found[leaf.name] = found.get(leaf.name, 0) + relevance.to(run.like)
        _check_any(found.values())
        return Result(run, None, found)

    def attribute_tokens(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        objective: Objective | None = None,
        readout: Readout = "auto",
        start_layer: int = 0,
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Relevance of the tokens that enter the first block, special tokens included.

        Args:
            inputs, target, ...: as for `attribute`.

        Returns:
            dict: stream name -> (B, n).

        Raises:
            WiringError: where that block was not found; `attribute` needs none.
        """
        return AttentionAttribution.attribute_tokens(
            self._of_tokens(), inputs, target, additional_forward_args, objective=objective,
            readout=readout, start_layer=start_layer, internal_batch_size=internal_batch_size,
            **options,
        )  # fmt: skip

    def explain_each(
        self,
        inputs: Inputs,
        targets: Targets,
        make: Callable[[Result], Made],
        additional_forward_args: Any = None,
        **shared: Any,
    ) -> Iterator[Made]:
        """`make(result)` for many targets of the same inputs, from one forward pass.

        Args:
            inputs, targets, make, ...: see `AttentionAttribution`.
        """
        self._check_request(shared.get("readout", "auto"), shared.get("start_layer", 0))
        reader = self._of_tokens() if make is Result.tokens else self
        return AttentionAttribution.explain_each(
            reader, inputs, targets, make, additional_forward_args, **shared
        )

    def _of_tokens(self) -> InputRelevance:
        """The same method, reading at the tokens that enter the first block."""
        reader = copy(self)
        reader._engine = self._token_engine
        return reader

    def relevance_maps(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: relevance is read at the inputs, and not passed from token to token."""
        raise self._no_matrices()

    def layer_maps(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the method makes nothing of attention maps."""
        raise self._no_matrices()

    def _no_matrices(self) -> OptionError:
        return OptionError(
            f"{self.get_name()} has relevance of inputs, not matrices of tokens by tokens: use "
            "`attribute` or `attribute_tokens`, or TransformerAttribution for maps of relevance"
        )

    def describe(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        **options: Any,
    ) -> Description:
        """Which kinds of operations ran, by which rule, and what has no rule of its own.

        Args:
            inputs, target, ...: as for `attribute`.

        Returns:
            Description: `str()` of it is the table.

        Examples::

            >>> print(AttnLRP(model).describe(images))
        """
        settled = self.settled(options)
        if settled.leave_out:
            with self._run(inputs, Request(target, additional_forward_args), options) as run:
                ruled = describe_operations(run.observation, self.rules(settled))
                return Description((), (), (), ruled, left_out=tuple(named(run)))
        roots = modules_of(self.forward_func)
        request = Request(target, additional_forward_args)
        with left_as_found(roots):
            run = self._engine._observed(self.forward_func, inputs, request, settled, roots)
            found = describe_operations(run.observation, self.rules(settled))
        return Description((), (), (), found)


def _check_any(relevance: Iterable[Tensor]) -> None:
    """Refuses what would be zero everywhere."""
    found = list(relevance)
    if found and not any(bool(values.any()) for values in found):
        raise TargetError(
            "no input got any relevance: the explained output does not depend on the inputs (a "
            "constant or saturated objective, a class without weights, a detached output); explain "
            "another target"
        )
