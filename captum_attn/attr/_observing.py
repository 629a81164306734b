"""What runs the user's model and watches it: one forward pass, one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from captum.attr import GradientAttribution

from captum_attn.attr._inputs import Inputs, checked
from captum_attn.attr._run import Request, Run
from captum_attn.attr._settings import Layers, active_calls, settle
from captum_attn.errors import OptionError
from captum_attn.objectives import Objective
from captum_attn.observe.capture.restore import left_as_found, modules_of, root_of
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.observation import observe
from captum_attn.observe.streams.structure_cache import StructureCache


class Observing(GradientAttribution):
    """A Captum attribution that observes the attention of the model that it runs.

    Args:
        forward_func, layers: see `AttentionAttribution`.

    Class attributes:
        options (dict): the method's own options and their defaults.
        choices (dict): the values an option may have, where it is not a bool.
        needs_gradient (bool): False for a class-agnostic method.
        asks_again (bool): True for a rule that asks autograd for more than the gradients at the
            attention calls, so that the graph has to be kept for it.
        tap (type): what watches the model run.
    """

    options: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    needs_gradient: ClassVar[bool] = True
    asks_again: ClassVar[bool] = False
    tap: ClassVar[type[Tap]] = Tap

    def __init__(self, forward_func: Callable, layers: Layers | None = None) -> None:
        if not callable(forward_func):
            raise OptionError(
                f"expected a model or a callable that runs one, got {type(forward_func).__name__}"
            )
        super().__init__(root_of(forward_func))
        self.layers = layers
        self._structure = StructureCache()

    def default_objective(self) -> Objective | None:
        """What is explained where the user names no objective; None: the logit."""
        return None

    @classmethod
    def settled(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The method's options with their defaults; raises `OptionError` for others."""
        return settle(options, cls.options, cls.choices, cls.get_name())

    def explain(self, run: Run, explained: Request) -> None:
        """One backward pass of what the user asked for, or of the method's own objective."""
        if explained.objective is None:
            explained = replace(explained, objective=self.default_objective())
        run.explain(explained, self.needs_gradient, self.asks_again)

    @contextmanager
    def _run(self, inputs: Inputs, explained: Request, options: dict[str, Any]) -> Iterator[Run]:
        roots = modules_of(self.forward_func)
        with left_as_found(roots):
            run = self._observed(self.forward_func, inputs, explained, options)
            self.explain(run, explained)
            with torch.no_grad():
                yield run

    def _observed(
        self,
        forward_func: Callable,
        inputs: Inputs,
        explained: Request,
        options: dict[str, Any],
    ) -> Run:
        """One forward pass, of which nothing is explained yet."""
        settled, additional = self.settled(options), explained.additional_forward_args
        values, roots = checked(inputs, additional), modules_of(self.forward_func)
        seen = observe(forward_func, values, additional, roots, self._structure, self.tap)
        active = active_calls(seen.wiring.updates, self.layers, roots, explained.start_layer)
        return Run(seen, active, settled)
