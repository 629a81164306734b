"""A tap that also notes what lies between attention calls: additions, and what values are made of.

Residual connections are additions. Which of those a model makes are residual connections is read
off the graph afterwards (`sublayers.py`); here their terms are only kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_attn.errors import WiringError
from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.capture.contraction import PRODUCTS
from captum_attn.observe.capture.operands import is_parameter
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.capture.tensor_notes import CONVOLUTIONS, tensors

ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.add_})
LINEAR_MAPS = CONVOLUTIONS | {F.linear, torch.addmm, Tensor.addmm}
_WALK = 32  # nodes of views, casts and norms that may lie between values and their projection


@dataclass(eq=False)
class Term:
    """A tensor as it was when it was added, or projected to values.

    Args:
        value (Tensor): detached.
        edge (GradientEdge or None): where its gradient is taken; None where it has no history.
        scale (float): what it was multiplied with in the addition (`alpha=`).
    """

    value: Tensor
    edge: GradientEdge | None
    scale: float = 1.0
    version: int = 0

    @staticmethod
    def of(tensor: Tensor, scale: float = 1.0, kept: bool = False) -> Term:
        """The tensor as it is now; `kept` copies one that is about to be overwritten."""
        edge = get_gradient_edge(tensor) if tensor.requires_grad else None
        value = tensor.detach()
        value = value.clone() if kept else value
        return Term(value, edge, scale, value._version)

    @staticmethod
    def at(edge: GradientEdge) -> Term:
        """A place of the graph, of which the vectors themselves are not known."""
        made: Any = edge.node._input_metadata[edge.output_nr]
        value = torch.empty((), dtype=made.dtype, device=made.device).expand(tuple(made.shape))
        return Term(value, edge, 1.0, -1)

    def vectors(self) -> Tensor:
        """What was added, of the tensor's own shape."""
        if self.value._version != self.version:
            raise WiringError(
                f"a tensor of shape {tuple(self.value.shape)} on a skip connection or a branch was "
                "overwritten in place afterwards, so its vectors are gone; write that step of the "
                "model out of place"
            )
        return self.value if self.scale == 1 else self.value * self.scale


@dataclass(eq=False)
class Addition:
    """The sum of two tensors of one shape, on the way from the inputs to the output.

    Args:
        terms (pair of Term): what was added.
        out (GradientEdge): the sum.
        module (str): qualified name of the module that ran it.
    """

    terms: tuple[Term, Term]
    out: GradientEdge
    module: str


class RecordingTap(Tap):
    """Records additions, and for every attention call its output and what its values stem from.

    Attributes:
        additions (list of Addition): in the order of execution.
        outputs (dict): call -> its output, detached.
        origins (dict): call -> the tensor that was projected to its values, where it was seen.
    """

    def __init__(self, root: torch.nn.Module | None = None) -> None:
        super().__init__(root)
        self.additions: list[Addition] = []
        self.outputs: dict[AttentionCall, Term] = {}
        self.origins: dict[AttentionCall, Term] = {}
        self._projected: dict[Any, tuple[weakref.ref, GradientEdge | None]] = {}

    def _called(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        terms = self._terms(func, args, kwargs) if func in ADDITIONS else None
        made = len(self.calls)
        out = super()._called(func, args, kwargs)
        if terms is not None and isinstance(out, Tensor) and out.requires_grad:
            self.additions.append(Addition(terms, get_gradient_edge(out), self.modules.name()))
        for call in self.calls[made:]:
            if call not in self.outputs and isinstance(out, Tensor):
                self.outputs[call] = Term.of(out)
                origin = self._origin(call.v)
                if origin is not None:
                    self.origins[call] = origin
        if func in LINEAR_MAPS or func in PRODUCTS:
            self._note(args, kwargs, out)
        return out

    def _terms(self, func: Callable, args: tuple, kwargs: dict) -> tuple[Term, Term] | None:
        given = [*args, *(kwargs[name] for name in ("input", "other") if name in kwargs)]
        if len(given) < 2 or not torch.is_grad_enabled() or kwargs.get("out") is not None:
            return None
        one, other = given[:2]
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return None
        if one.shape != other.shape or one.ndim < 2 or not one.is_floating_point():
            return None
        if self._scores.get(one) is not None or self._scores.get(other) is not None:
            return None  # attention scores and their bias
        if not (one.requires_grad or other.requires_grad):
            return None
        in_place = func is Tensor.add_
        if in_place:
            self._keep(one)
        alpha = float(kwargs.get("alpha", 1))
        return Term.of(one, kept=in_place), Term.of(other, alpha)

    def _keep(self, overwritten: Tensor) -> None:
        """Copies the terms that share a tensor which is about to be overwritten."""
        storage = overwritten.untyped_storage().data_ptr()
        for addition in self.additions:
            for term in addition.terms:
                if term.value.untyped_storage().data_ptr() == storage:
                    term.value = term.vectors().clone() / term.scale
                    term.version = term.value._version

    def _note(self, args: tuple, kwargs: dict, out: Any) -> None:
        """Notes what was projected, by the node of the projection."""
        if not isinstance(out, Tensor) or out.grad_fn is None:
            return
        activations = [
            t
            for t in tensors((*args, *kwargs.values()))
            if t.requires_grad and t.ndim > 1 and not is_parameter(t)
        ]
        if len(activations) == 1:
            (projected,) = activations
            noted = weakref.ref(projected), get_gradient_edge(projected)
            self._projected[out.grad_fn] = noted

    def _origin(self, values: Tensor) -> Term | None:
        """The tensor whose projection became these values, if the model still holds it."""
        for node in _chain(values.grad_fn):
            if node in self._projected:
                tensor, edge = self._projected[node][0](), self._projected[node][1]
                return None if tensor is None else Term(tensor.detach(), edge, 1.0, tensor._version)
        return None


def _chain(node: Any) -> Iterator[Any]:
    """The nodes from `node` backwards, along the first that has a history."""
    for _ in range(_WALK):
        if node is None:
            return
        yield node
        node = next((n for n, _ in node.next_functions if n is not None), None)
