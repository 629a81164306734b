"""Taps that write down the steps of a run, and that hold a later run against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.contraction import contraction
from captum_attn.observe.capture.module_stack import NoModules
from captum_attn.observe.capture.operands import scores_of
from captum_attn.observe.capture.steps import KnownCall, KnownRun, Steps
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.capture.tensor_notes import Scores

_PRODUCTS = frozenset({F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__})
_MHA = F.multi_head_attention_forward  # whose steps are seen one by one


class NotingTap(Tap):
    """A tap that also writes down every step.

    Attributes:
        said, shapes (list): of every step, see `KnownRun`.
        known_calls (list of KnownCall): how each call came about.
        born (list of int): for every leaf, how many calls had run when it was made.
        rounded (list of int): for every product that torch rounds otherwise without a graph, how
            many calls had run.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        super().__init__(root)
        self.steps = Steps()
        self.said: list[Any] = []
        self.shapes: list[Any] = []
        self.known_calls: list[KnownCall] = []
        self.born: list[int] = []
        self.rounded: list[int] = []
        self._side = 0
        self._always_with_grad = True

    @property
    def tells(self) -> bool:
        """Whether a later run without a graph can be told to be the same."""
        hidden = self.steps.hides or self.blind or self.underivable
        detached = any(call.detached_from for call in self.calls)
        return self._always_with_grad and not (hidden or detached)

    def enter(self, name: str, tensor: Tensor) -> Tensor:
        entered = super().enter(name, tensor)
        self.steps.note(entered, ("input", name))
        return entered

    def __torch_function__(
        self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        step = self.step = len(self.said)
        self.said.append(self.steps.said(func, args, kwargs or {}))
        self.shapes.append(None)
        self._always_with_grad &= torch.is_grad_enabled()
        calls = len(self.calls)
        if func in _PRODUCTS and _is_folded(args):
            self.rounded.append(calls)
        out = super().__torch_function__(func, types_, args, kwargs)
        self.born += [calls] * (len(self.leaves) - len(self.born))
        self.shapes[step] = self.steps.made(step, args, out)
        return out

    def _inline(
        self, func: Any, args: Any, kwargs: Any, product: Any, side: int, scores: Scores
    ) -> Any:
        self._side = side
        return super()._inline(func, args, kwargs, product, side, scores)

    def _note_call(self, call: AttentionCall, scores: Scores | None = None) -> None:
        super()._note_call(call, scores)
        known = KnownCall(self.step, call.module, call.event)
        if scores is not None:
            known = replace(known, scored=scores.step, side=self._side, axes=scores.axes)
        self.known_calls.append(known)


def _is_folded(args: tuple) -> bool:
    """Whether a product makes one matrix of a batch whose rows do not lie one after the other.

    Torch decides how by whether a gradient is wanted, so that the last bits differ.
    """
    tensors = [x for x in args[:2] if isinstance(x, Tensor)]
    of_matrix = any(x.ndim < 3 for x in tensors)
    return of_matrix and any(x.ndim > 2 and not x.is_contiguous() for x in tensors)


class KnownTap(Tap):
    """A tap for a run that is known, for as long as its steps are those of the known one.

    Between the last call that autograd is asked about and the first one that the output reads, the
    model runs without a graph, and nothing but the attention calls is looked at.

    Args:
        known (KnownRun): what the run is held against.

    Attributes:
        lost (bool): whether a step was another one; then what was seen means nothing.
    """

    def __init__(self, known: KnownRun, root: nn.Module | None = None) -> None:
        super().__init__(root)
        self.modules = NoModules()  # the calls' names are known
        self.steps, self.known, self.lost, self.step = Steps(), known, False, -1
        later = known.calls[known.asked + 1 :]
        self._calls_at = {call.step: call for call in later}
        self._scored_at = {call.scored for call in later if call.scored >= 0}
        self._kept: dict[int, Scores] = {}
        self._without_graph = False
        self._passes = False  # whether functions just run
        nested = {i for i, said in enumerate(known.said) if said[0] is _MHA}
        self._special = {*self._calls_at, *self._scored_at, *known.writes, *nested}

    def enter(self, name: str, tensor: Tensor) -> Tensor:
        entered = super().enter(name, tensor)
        self.steps.note(entered, ("input", name))
        return entered

    @property
    def is_known(self) -> bool:
        """Whether the run, which is over, was the known one."""
        names = [leaf.name for leaf in self.leaves]
        over = self.step == len(self.known.said) - 1
        return over and not self.lost and names == self.known.leaves

    def __torch_function__(
        self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        kwargs = {} if kwargs is None else kwargs
        self.step = step = self.step + 1
        said = self.known.said
        if self.lost or step >= len(said) or said[step] != self.steps.said(func, args, kwargs):
            self.lost = True
            args, kwargs = self.own.arguments(func, args, kwargs)
            return self.own.result(self.own.run(func, args, kwargs))
        if self._passes and step not in self._special:
            out = func(*args, **kwargs)
        else:
            out = self._run(step, func, args, kwargs)
            self._passes = self._without_graph and self.own.is_models
        if self.known.shapes[step] != self.steps.made(step, args, out):
            self.lost = True
        return out

    def _run(self, step: int, func: Callable, args: tuple, kwargs: dict) -> Any:
        call = self._calls_at.get(step)
        if call is None and not self._without_graph:
            self._keep_scores(step, func, args, kwargs)
            args, kwargs = self.own.arguments(func, args, kwargs)
            return self.own.result(self._called(func, args, kwargs))
        args, kwargs = self.own.arguments(func, args, kwargs)
        if call is not None and call.scored < 0:
            return self._fused(*args, **kwargs)
        if call is not None:
            product, scores = contraction(func, args, kwargs), self._kept.pop(call.scored)
            assert product is not None
            scores = replace(scores, axes=call.axes)
            return self._inline(func, args, kwargs, product, call.side, scores)
        if func is _MHA:
            return self._called(func, args, kwargs)
        self._keep_scores(step, func, args, kwargs)
        return self.own.result(self.own.run(func, args, kwargs))

    def _keep_scores(self, step: int, func: Callable, args: tuple, kwargs: dict) -> None:
        """Keeps the factors of a product that is the QK^T of a call."""
        if step in self._scored_at:
            product = contraction(func, args, kwargs)
            scores = None if product is None else scores_of(product)
            assert scores is not None
            self._kept[step] = scores

    # ------------------------------------------------------------------------ calls
    @property
    def cuts(self) -> bool:
        return self.step in self._calls_at

    @property
    def _is_blind(self) -> bool:
        return not self.cuts and super()._is_blind

    def _passed_on(self, out: Tensor) -> Tensor:
        if not self.cuts:
            return out
        out = out.detach().requires_grad_()
        if len(self.calls) < self.known.read:
            return out  # no graph begins here
        with torch.enable_grad():
            return out.clone()  # the model may write into it

    def _note_call(self, call: AttentionCall, scores: Scores | None = None) -> None:
        super()._note_call(call, scores)
        if call.index < len(self.known.calls):
            known = self.known.calls[call.index]
            call.module, call.event = known.module, known.event
        if call.index in (self.known.asked, self.known.read):
            self._with_graph(call.index == self.known.read)

    def _with_graph(self, wanted: bool) -> None:
        """Goes on with or without a graph; in `__torch_function__` no other mode is asked."""
        if self._without_graph == wanted:
            self._without_graph = not wanted
            torch._C._set_grad_enabled(wanted)
