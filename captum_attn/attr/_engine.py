"""What runs the user's model and watches it: one forward pass, one backward pass a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from captum_attn._checks import FAILURES, shown, shown_error
from captum_attn.attr._backward import Backward, explained_value, run_backward
from captum_attn.attr._batches import copied_request
from captum_attn.attr._inputs import Inputs, checked
from captum_attn.attr._layers import active_calls
from captum_attn.attr._options import SharedOptions
from captum_attn.attr._request import Request, check_objective
from captum_attn.attr._ruled import check_ruled, ruled_pass
from captum_attn.attr._run import Run
from captum_attn.errors import AttnError, OptionError, TargetError
from captum_attn.objectives import Objective, logit
from captum_attn.observe import AttentionCall, observe
from captum_attn.observe.capture.attention_call import detached
from captum_attn.observe.capture.default_device import on_users_device
from captum_attn.observe.capture.module_stack import outputs_of
from captum_attn.observe.capture.restore import (
    drawing_again,
    every_module,
    left_as_found,
    modules_of,
)
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.known import observe_or_know
from captum_attn.observe.observation import watched
from captum_attn.observe.operators.bridge import Rules
from captum_attn.observe.streams.structure_cache import StructureCache
from captum_attn.observe.tracing.autograd_graph import gradients

Made = TypeVar("Made")
# The targets, or what chooses them by the model's output.
Targets = Iterable[Any] | Callable[[Any], Iterable[Any]]
Objectives = Objective | Sequence[Objective | None] | None


@dataclass
class Engine:
    """Runs a model, and explains one target or many of one forward pass.

    Args:
        needs_gradient (bool): whether gradients at the attention calls are wanted.
        keeps_graph (bool): whether the method asks autograd for more later.
        default_objective (callable, optional): explained where the user names none; None: the
            output that the target selects.
        tap (type): what watches the model run.
        rules (callable): a method's options -> the rules of its relevance pass, or None.
        structure (StructureCache): what was found out about the model's structure.
    """

    needs_gradient: bool
    keeps_graph: bool
    default_objective: Objective | None
    tap: type[Tap]
    rules: Callable[[Any], Rules | None] = lambda options: None
    structure: StructureCache = field(default_factory=StructureCache)

    @contextmanager
    def explained(
        self, forward_func: Callable, inputs: Inputs, request: Request, options: SharedOptions
    ) -> Iterator[Run]:
        """The run of one target; inside, the model is as the run needs it."""
        roots = modules_of(forward_func)
        with left_as_found(roots):
            run = self._observed(forward_func, inputs, request, options, roots)
            self._explain(run, forward_func, request)
            with torch.no_grad():
                yield run

    def explained_each(
        self,
        forward_func: Callable,
        inputs: Inputs,
        targets: Targets,
        request: Request,
        options: SharedOptions,
        objective: Objectives,
        make: Callable[[Run], Made],
    ) -> tuple[int, Iterator[Made]]:
        """`make` of every target's run, from one forward pass: their number, and the results.

        The first is made here, each other one when it is asked for; the model is as it was found
        in between.

        Args:
            request (Request): what the targets have in common; its target and objective are not
                used.
            make (callable): run -> a result.
        """
        roots = modules_of(forward_func)

        def made(one: Request) -> Made:
            another = self._explain(replace(run, backward=Backward()), forward_func, one)
            with torch.no_grad():
                return make(another)

        with left_as_found(roots):
            forward, outputs = _remembering(forward_func)
            run = self._observed(forward, inputs, request, options, roots)
            requests = _requests(request, targets, objective, outputs, run.observation.output)
            if len(requests) > 1:
                run.share()
            first = [made(one) for one in requests[:1]]

        def results() -> Iterator[Made]:
            yield from first
            first.clear()
            for one in requests[1:]:
                with left_as_found(roots):
                    found = made(one)
                yield found

        return len(requests), results()

    def _observed(
        self,
        forward_func: Callable,
        inputs: Inputs,
        request: Request,
        options: SharedOptions,
        roots: list[nn.Module],
        whole: bool = False,
    ) -> Run:
        """One forward pass, of which nothing is explained yet.

        Args:
            whole (bool): whether gradients of the inputs are wanted.
        """
        additional = request.additional_forward_args
        values = checked(inputs, additional)
        rules = self.rules(options)
        draw_again = drawing_again(every_module(roots))
        given = forward_func, values, additional, roots, self.structure
        if whole or self.needs_gradient or self.keeps_graph or self.tap is not Tap or rules:
            tables = () if rules is None else (rules,)
            observation = observe(*given, self.tap, tables)
        else:
            observation = observe_or_know(*given, draw_again)
        for mixing in observation.wiring.mixings:
            mixing.draws = options.mixing_draws or mixing.draws
        states = observation.wiring.updates
        active = active_calls(states, request.layers, roots, request.start_layer)
        axes = observation.output.ndim
        run = Run(
            observation, options, active, inputs=inputs, draw_again=draw_again, output_axes=axes
        )
        if rules is not None:
            self._check_rules(run, rules)
        return run

    def _check_rules(self, run: Run, rules: Rules) -> None:
        """Relevance must have a rule wherever it passes on its way to the calls that count."""
        outputs = [s.call.edge.node for s in run.attention_states if run.counts(s.call)]
        check_ruled(run.observation, outputs, rules)

    def _explain(self, run: Run, forward_func: Callable, request: Request) -> Run:
        """One backward pass of what the user asked for, or of the method's own objective."""
        if request.objective is None:
            request = replace(request, objective=self.default_objective)
        observation, several = run.observation, run.shared is not None
        value = explained_value(observation, request, self.needs_gradient)
        if not several:
            observation.output = value.objective.detach()  # a language model's is large
        reads = [] if request.matrices else run.cached("reads", observation.reads)
        calls = [s.call for s in run.attention_states if run.counts(s.call) and self.needs_gradient]
        mixes = bool(observation.wiring.mixings)  # they ask autograd again
        rules = self.rules(run.options)
        keep = self.keeps_graph or several or mixes or rules is not None
        run.backward = run_backward(observation, request, value, calls, reads, run.like, keep)
        if self.keeps_graph:
            run.backward.objective = value.objective
        if rules is not None:
            again = self.keeps_graph or several or mixes
            edges = [call.edge for call in calls]
            found = ruled_pass(observation, value.objective, edges, rules, again)
            run.backward.relevances = dict(zip(calls, found, strict=True))
        run.asked = partial(self._depended_on, forward_func, request, run.options)
        if run.backward.has_vanished and not run.depended_on(run.inputs):
            raise TargetError(
                "the gradient of what is explained is zero at every attention call, so that its "
                "maps would be: an objective that is constant or saturated, a class without "
                "weights, a readout that the output does not depend on; explain the output itself "
                "(objective=objectives.logit), or another target"
            )  # else attention adds nothing (a dead layer scale), which its maps say
        run.again = partial(self._again, forward_func, request, run.options)
        run.along = partial(self._calls_on, forward_func, request, run.draw_again)
        run.valued = partial(self._value_on, forward_func, request, run.batch, run.draw_again)
        run.of_layer = partial(self._layer_on, forward_func, request, run.draw_again)
        return run

    def _again(
        self, forward_func: Callable, request: Request, options: SharedOptions, inputs: Inputs
    ) -> Run:
        """The run of the same target on other inputs, while a run is in progress."""
        roots = modules_of(forward_func)
        with torch.enable_grad():
            run = self._observed(forward_func, inputs, request, options, roots)
            return self._explain(run, forward_func, request)

    def _calls_on(
        self,
        forward_func: Callable,
        request: Request,
        draw_again: Callable[[], None],
        inputs: Inputs,
        calls: Sequence[AttentionCall],
        during: AbstractContextManager,
    ) -> list[tuple[AttentionCall, Tensor | None]]:
        """Attention calls on other inputs, with their gradients, while a run is in progress."""
        roots, additional = modules_of(forward_func), request.additional_forward_args
        values = checked(inputs, additional)
        with left_as_found(roots), torch.enable_grad():
            draw_again()  # a model that permutes its tokens (ViLT) does so alike
            with during:
                seen = watched(forward_func, values, additional, roots, self.tap)
            value = explained_value(seen, request, True).objective
            by_index = {call.index: call for call in seen.tap.calls}
            again = [by_index.get(call.index) for call in calls]
            if any(
                other is None or (other.module, other.lead) != (call.module, call.lead)
                for call, other in zip(calls, again, strict=True)
            ):
                raise AttnError(
                    "the model makes other attention calls where its inputs are scaled: expected "
                    "the same ones at every step of the path; set n_steps=1"
                )
            found = [other for other in again if other is not None]
            ones = torch.ones_like(value)
            arrived = gradients([(value, ones)], [other.edge for other in found], keep=False)
        made = [detached(other, call) for call, other in zip(calls, found, strict=True)]
        return list(zip(made, arrived, strict=True))

    def _value_on(
        self,
        forward_func: Callable,
        request: Request,
        batch: int,
        draw_again: Callable[[], None],
        inputs: Inputs,
        copies: int,
        during: AbstractContextManager,
    ) -> Tensor:
        """What is explained, on other inputs, while a run is in progress."""
        request = copied_request(request, copies, batch)
        roots, additional = modules_of(forward_func), request.additional_forward_args
        values = checked(inputs, additional)
        with left_as_found(roots), torch.no_grad():
            draw_again()
            with during:
                seen = watched(forward_func, values, additional, roots)
            if seen.batch != copies * batch:
                raise OptionError(
                    "perturbations_per_eval: expected 1 for this model, whose rows are not one for "
                    f"each example: of {copies} copies of {batch} it makes {seen.batch}"
                )
            return explained_value(seen, request, False).objective

    def _layer_on(
        self,
        forward_func: Callable,
        request: Request,
        draw_again: Callable[[], None],
        inputs: Inputs,
        module: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        """A module's output, and its gradient, while a run is in progress."""
        roots, additional = modules_of(forward_func), request.additional_forward_args
        values = checked(inputs, additional)
        outputs: list[Tensor] = []
        with left_as_found(roots), torch.enable_grad():
            draw_again()
            with outputs_of(module, outputs):
                seen = watched(forward_func, values, additional, roots, self.tap)
            if len(outputs) != 1 or not outputs[0].requires_grad:
                raise OptionError(
                    "layer: expected a module that runs once and returns a tensor which the output "
                    f"depends on, got {type(module).__name__}, which gave {len(outputs)} tensors"
                )
            value = explained_value(seen, request, True).objective
            ones, edge = torch.ones_like(value), get_gradient_edge(outputs[0])
            (gradient,) = gradients([(value, ones)], [edge], keep=False)
        found = outputs[0].detach()
        return found, torch.zeros_like(found) if gradient is None else gradient

    def _depended_on(
        self, forward_func: Callable, request: Request, options: SharedOptions, inputs: Inputs
    ) -> set[str]:
        """Names of the inputs that what is explained has a gradient for."""
        roots = modules_of(forward_func)
        with left_as_found(roots), torch.enable_grad():
            run = self._observed(forward_func, inputs, request, options, roots, whole=True)
            seen = run.observation
            value = explained_value(seen, request, self.needs_gradient).objective
            leaves = [leaf for leaf in seen.tap.leaves if leaf.name]
            ones = torch.ones_like(value)
            found = gradients([(value, ones)], [leaf.tensor for leaf in leaves], keep=False)
        return {
            leaf.name
            for leaf, gradient in zip(leaves, found, strict=True)
            if gradient is not None and bool(gradient.any())
        }


def _requests(
    request: Request, targets: Targets, objective: Objectives, outputs: list[Any], output: Tensor
) -> list[Request]:
    """A request for each target; refused before the first backward pass if one does not fit."""
    with torch.no_grad():
        chosen = _listed(_chosen(targets, outputs[-1]) if callable(targets) else targets)
        outputs.clear()
        for target in chosen:
            if target is not None:
                logit(output, target)
    objectives = _for_each(objective, len(chosen))
    return [
        replace(request, target=target, objective=one)
        for target, one in zip(chosen, objectives, strict=True)
    ]


def _chosen(targets: Callable[[Any], Iterable[Any]], output: Any) -> Iterable[Any]:
    try:
        with on_users_device():
            return targets(output)
    except AttnError:
        raise
    except FAILURES as error:
        raise TargetError(
            f"targets: failed on the model's output, {shown(output)}: {shown_error(error)}; "
            "expected a callable output -> targets"
        ) from error


def _listed(targets: Any) -> list[Any]:
    try:
        if isinstance(targets, (str, bytes, Mapping)):
            raise TypeError
        return list(targets)
    except FAILURES as error:  # an int, a tensor without rows
        raise TargetError(
            "targets: expected several targets, or a callable that is given the model's output "
            f"and returns them; got {shown(targets)}: use `attribute` for a single one"
        ) from error


def _for_each(objective: Objectives, count: int) -> Sequence[Objective | None]:
    if not isinstance(objective, (list, tuple)):
        check_objective(objective)
        return [objective] * count  # type: ignore[list-item]
    if len(objective) != count:
        raise TargetError(
            f"objective: expected one callable, or one for each of the {count} targets; got "
            f"{len(objective)}"
        )
    return objective


def _remembering(forward_func: Callable) -> tuple[Callable, list[Any]]:
    """A forward function with the same signature, and the list that its outputs go to."""
    outputs: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward_func(*args, **kwargs))
        return outputs[-1]

    is_module = isinstance(forward_func, nn.Module)
    forward.__wrapped__ = forward_func.forward if is_module else forward_func  # type: ignore
    return forward, outputs
