"""Many targets of one input, explained from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from captum._utils.progress import progress
from captum.log import log_usage
from torch import Tensor, nn

from captum_attn.attr._inputs import Inputs, checked_interpolation
from captum_attn.attr._observing import Observing
from captum_attn.attr._run import Readout, Request, Run, finite
from captum_attn.errors import TargetError
from captum_attn.objectives import Objective, logit
from captum_attn.observe.capture.restore import left_as_found, modules_of
from captum_attn.observe.streams.states import Source

Made = TypeVar("Made")
# The targets, or what chooses them by the model's output.
Targets = Iterable[Any] | Callable[[Any], Iterable[Any]]
Objectives = Objective | Sequence[Objective | None] | None


class ManyTargets(Observing):
    """What explains many targets of one input: one forward pass, one backward pass for each."""

    def relevance(self, run: Run) -> dict[Source, Tensor]:
        """Relevance of every source's tokens, (B, n)."""
        raise NotImplementedError

    @log_usage()
    def attribute_each(
        self,
        inputs: Inputs,
        targets: Targets,
        additional_forward_args: Any = None,
        *,
        objective: Objectives = None,
        readout: Readout = "auto",
        start_layer: int = 0,
        interpolation: str = "bilinear",
        show_progress: bool = False,
        **options: Any,
    ) -> Iterator[Any]:
        r"""`attribute` for many targets of the same inputs, from one forward pass.

        What no target changes (the model's run, the attention maps up to 1 GiB, which tokens are
        where) is computed once. The forward pass runs in this call; every step of the iterator is
        one backward pass. Between the steps the model is as it was found, and may be used; its
        weights must not be changed before the last. The graph is freed with the iterator.

        Args:
            inputs, additional_forward_args, ...: as for `attribute`.
            targets (iterable or callable): the targets, each in every form that `attribute` takes;
                or a callable that is given the model's output and returns them.
            objective (callable or sequence of callable, optional): one for all targets, or one for
                each.
            show_progress (bool): a progress bar over the targets. Default: False.

        Returns:
            *iterator* of what `attribute` returns, one for each target, in their order.

        Raises:
            AttnError: as `attribute`, in this call for what does not depend on a gradient.

        Examples::

            >>> three, five = GenericAttention(model).attribute_each(images, [3, 5])
            >>> likeliest = lambda logits: logits.topk(5).indices.T     # 5 targets, (B,) each
            >>> for maps in GenericAttention(model).attribute_each(images, likeliest): ...
        """
        checked_interpolation(interpolation)
        explained = Request(None, additional_forward_args, None, readout, start_layer)

        def laid(run: Run, relevance: dict[Source, Tensor]) -> Any:
            return run.attributions(relevance, inputs, interpolation)

        return self.explain_each(
            inputs,
            targets,
            explained,
            options,
            laid,
            objective=objective,
            show_progress=show_progress,
        )

    @log_usage()
    def attribute_tokens_each(
        self,
        inputs: Inputs,
        targets: Targets,
        additional_forward_args: Any = None,
        *,
        objective: Objectives = None,
        readout: Readout = "auto",
        start_layer: int = 0,
        show_progress: bool = False,
        **options: Any,
    ) -> Iterator[dict[str, Tensor]]:
        """`attribute_tokens` for many targets of the same inputs, from one forward pass.

        Args:
            inputs, targets, ...: as for `attribute_each`.

        Returns:
            *iterator* of dict: for each target, stream name -> (B, n).

        Examples::

            >>> places = [(i, token) for i, token in enumerate(ids[0, 1:].tolist())]
            >>> rows = [t["input_ids"] for t in gae.attribute_tokens_each(ids, places)]
        """
        explained = Request(None, additional_forward_args, None, readout, start_layer)
        return self.explain_each(
            inputs, targets, explained, options, Run.tokens,
            objective=objective, show_progress=show_progress,
        )  # fmt: skip

    def explain_each(
        self,
        inputs: Inputs,
        targets: Targets,
        explained: Request,
        options: dict[str, Any],
        made: Callable[[Run, dict[Source, Tensor]], Made],
        *,
        objective: Objectives = None,
        show_progress: bool = False,
    ) -> Iterator[Made]:
        """The engine of both: `made(run, relevance)` for every target.

        Args:
            explained (Request): what the targets have in common; its target and objective are
                not used.
            made (callable): (run, relevance of every source's tokens) -> a result.
        """
        roots = modules_of(self.forward_func)

        def result(run: Run, one: Request) -> Made:
            self.explain(run, one)
            with torch.no_grad():
                return made(run, finite(self.relevance(run)))

        with left_as_found(roots):
            forward_func, outputs = _remembering(self.forward_func)
            run = self._observed(forward_func, inputs, explained, options)
            with torch.no_grad():
                chosen = _checked(targets(outputs[-1]) if callable(targets) else targets)
                outputs.clear()
                wanted = [
                    replace(explained, target=target, objective=one)
                    for target, one in zip(chosen, _for_each(objective, len(chosen)), strict=True)
                ]
                for one in wanted:
                    if one.target is not None:  # refused before the first backward pass
                        logit(run.seen.output, one.target)
            if len(wanted) > 1:
                run.share()
            first = [result(run.for_next_target(), one) for one in wanted[:1]]

        def results() -> Iterator[Made]:
            yield from first
            first.clear()
            for one in wanted[1:]:
                with left_as_found(roots):
                    found = result(run.for_next_target(), one)
                yield found

        if not show_progress:
            return results()
        name = f"{self.get_name()} attribution"
        return iter(progress(results(), desc=name, total=len(wanted)))


def _checked(targets: Any) -> list[Any]:
    single = targets.ndim == 0 if isinstance(targets, Tensor) else isinstance(targets, (str, int))
    if single or not isinstance(targets, Iterable):
        raise TargetError(
            "targets: expected several targets, or a callable that is given the model's output "
            f"and returns them; got {targets!r}: use `attribute` for a single one"
        )
    return list(targets)


def _for_each(objective: Objectives, count: int) -> Sequence[Objective | None]:
    if not isinstance(objective, (list, tuple)):
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
