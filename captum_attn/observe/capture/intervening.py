"""Changes attention calls while a model runs: keys that are hidden, maps that are replaced.

A `TorchFunctionMode`, so that it holds for this thread and this scope alone, and no module is
touched. It tells calls as the tap does, by the module that runs them and their number in it; keys
are hidden before the softmax, maps are replaced where they are multiplied with V.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from captum_attn.errors import InputError, WiringError
from captum_attn.observe.capture.attention_call import AttentionCall, attention_map, repeat_heads
from captum_attn.observe.capture.contraction import PRODUCTS, Contraction, align, contraction
from captum_attn.observe.capture.functions import SOFTMAX, without_override_check
from captum_attn.observe.capture.module_stack import ModuleStack
from captum_attn.observe.capture.operands import contracts_keys, is_parameter
from captum_attn.observe.capture.tensor_notes import Scores, axes_after, mapped, tensors

# What a float mask adds to a key that must not be seen, less than the row's largest entry.
_MASKED = -5e3
_CONCATENATIONS = frozenset({torch.cat, torch.concat})
_NOTHING = torch.empty(0, device="cpu")


@dataclass(frozen=True, eq=False)
class CallChange:
    """What is changed about one attention call.

    Args:
        call (AttentionCall): as it was observed.
        hidden (Tensor, optional): (B, F, k) bool, the keys that no query sees.
        attention (callable, optional): A, (B, F, H, q, k) -> what stands for it.
    """

    call: AttentionCall
    hidden: Tensor | None = None
    attention: Callable[[Tensor], Tensor] | None = None

    def hidden_on(self, lead: Sequence[int]) -> Tensor:
        """The hidden keys of a map with these leading axes, lead + (1, k), heads perhaps 1."""
        assert self.hidden is not None
        call = self.call.with_lead(lead)
        if len(self.hidden) not in (1, call.examples):
            raise InputError(
                f"{call.module!r}: tokens are hidden for {len(self.hidden)} examples, and the "
                f"model runs on {call.examples}: expected as many, or one for all"
            )
        return call.unfold(self.hidden.expand(call.examples, -1, -1)[:, :, None, None])

    def replaced(self, weights: Tensor) -> Tensor:
        """What stands for A, lead + (q, k)."""
        assert self.attention is not None
        call = self.call.with_lead(weights.shape[:-2])
        made = self.attention(call.fold(weights)).to(weights)
        return call.unfold(made).expand(weights.shape)


@dataclass(frozen=True)
class Followed(Scores):
    """Scores on their way to the product with V, and what is to be changed about it.

    Args:
        change (CallChange or None): of the call whose softmax has been passed.
        first (int): the number of foreign columns (sinks) before the keys.
    """

    change: CallChange | None = None
    first: int = 0


class Stack(ModuleStack):
    """The running modules; after a run that failed the calls are counted from the start again."""

    def __init__(self, root: nn.Module | None, counts: dict[str, int]) -> None:
        super().__init__(root)
        self._whole, self._counts, self.has_finished = root, counts, False

    def leave(self, module: nn.Module) -> None:
        super().leave(module)
        if self.is_idle and sys.exc_info()[0] is not None:
            self._counts.clear()
        elif self.is_idle and module is self._whole:
            self.has_finished = True


class Intervening(TorchFunctionMode):
    """Changes attention calls of a model while the context is entered, in this thread.

    Args:
        calls (iterable of AttentionCall): all calls of an observed run.
        events (Mapping): module's name -> how many attentions it ran, see `Tap`.
        changes (iterable of CallChange): what is changed about some of them.
        roots (sequence of Module): the model; other models run as they are.
    """

    def __init__(
        self,
        calls: Iterable[AttentionCall],
        events: Mapping[str, int],
        changes: Iterable[CallChange],
        roots: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self._counts: dict[str, int] = {}
        self._modules = Stack(roots[0] if len(roots) == 1 else None, self._counts)
        self._own = {id(module) for root in roots for module in root.modules()}
        self._events = events
        self._sites = {call.event: CallChange(call) for call in calls}
        changes = list(changes)
        self._sites |= {change.call.event: change for change in changes}
        self._scores = WeakTensorKeyDictionary()
        self._waiting = {change.call.event: change.call.module for change in changes}

    def __enter__(self) -> Intervening:
        self._modules.__enter__()
        try:
            super().__enter__()
        except BaseException:
            self._modules.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modules.__exit__(*error)
        if self._modules.has_finished and self._waiting and error[0] is None:
            raise WiringError(
                f"the attention of {sorted(set(self._waiting.values()))} was to be changed and did "
                "not run, or ran in a form that cannot be seen: expected the same calls as on the "
                "inputs that were given"
            )

    def __torch_function__(
        self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._own and not self._modules.runs_any(self._own):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with _Again(self):  # a mode is off inside its own handler
                return without_override_check(func)(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in SOFTMAX:
            return self._softmax(func, args, kwargs)
        if func in PRODUCTS:
            return self._product(func, args, kwargs)
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out)
        return out

    def _next(self) -> CallChange | None:
        """What is to be changed about the attention that runs now; None: nothing.

        A model that runs several times begins anew with every run.
        """
        name = self._modules.name()
        if name not in self._events:
            raise WiringError(
                f"{name!r} runs attention, which it did not on the inputs that were given: "
                "expected the same attention calls; enter another scope for other inputs"
            )
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        event = name, number % self._events[name]
        self._waiting.pop(event, None)
        return self._sites.get(event)

    # ------------------------------------------------------------------------ the fused kernel
    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scale, **({"enable_gqa": True} if enable_gqa else {})}
        change = self._next()
        if change is not None:
            _check_sizes(change.call, query.shape[-2], key.shape[-2])
        if change is not None and change.attention is not None:
            weights = change.replaced(attention_map(query, key, attn_mask, is_causal, scale))
            dropped = F.dropout(weights, dropout_p) if dropout_p else weights
            out = dropped @ repeat_heads(value, query)
            _here.weights[out] = dropped.detach()
            return out
        if change is None or change.hidden is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal=is_causal, **options
            )
        hidden = change.hidden_on(query.shape[:-2]).to(query.device)
        seen = _seen(query, key, attn_mask, is_causal)
        left = seen & ~hidden
        dead = ~left.any(-1, keepdim=True) & seen.any(-1, keepdim=True)  # all its keys are hidden
        some = left | (dead & seen)
        mask, nothing = some, 0.0  # False
        if attn_mask is not None and attn_mask.is_floating_point():
            mask = attn_mask.masked_fill(~some & seen.any(-1, keepdim=True), -math.inf)
            nothing = -math.inf
        made = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, **options)
        out = made.masked_fill(dead, 0)
        found, _ = changed_mask(made, mask, False)  # by an intervention around this one
        assert found is not None
        _here.masks[out] = found.masked_fill(dead, nothing)
        replaced = changed_weights(made, None)
        if replaced is not None:
            _here.weights[out] = replaced
        return out

    # ------------------------------------------------------------------------ softmax and product
    def _softmax(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        x = args[0] if args else kwargs["input"]
        scores = self._scores.get(x)
        if scores is None or scores.softmaxed:
            out = func(*args, **kwargs)
            self._follow(func, args, kwargs, out)
            return out
        change, out = self._next(), func(*args, **kwargs)
        if change is not None and change.hidden is not None:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            hidden = _on_scores(change, scores, x, dim).to(x.device)
            dead = out.masked_fill(hidden, 0).sum(dim, keepdim=True) == 0
            left = x.masked_fill(hidden & ~dead, -math.inf)
            again = (left, *args[1:]) if args else ()
            out = func(*again, **(kwargs if args else {**kwargs, "input": left}))
            out = out.masked_fill(dead, 0)
        axes = axes_after(func, args, kwargs, x, out, scores.axes)
        if axes is not None:
            self._scores[out] = replace(scores, axes=axes, softmaxed=True, change=change)
        return out

    def _product(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        product = contraction(func, args, kwargs)
        for side in (0, 1) if product is not None else ():
            assert product is not None
            scores = self._scores.get(product.operand(side))
            if scores is None or not scores.softmaxed or scores.change is None:
                continue
            change = scores.change
            if contracts_keys(product, side, scores) and change.attention is not None:
                return _replaced(func, args, kwargs, product, side, change)
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out)
        if product is not None and not any(map(is_parameter, (product.lhs, product.rhs))):
            rows = product.free(0)[-1:], product.free(1)[-1:]
            if all(rows) and product.contracted:
                one, other = ((product.out.index(row) - len(product.out),) for row in rows)
                self._scores[out] = Followed((_NOTHING, _NOTHING), (), (one, other))
        return out

    def _follow(self, func: Callable, args: tuple, kwargs: dict, out: Any) -> None:
        """What is made of scores is still scores, as long as their token axes can be followed."""
        if not self._scores:
            return
        given = list(tensors((*args, *kwargs.values())))
        scored = [(t, s) for t in given if (s := self._scores.get(t)) is not None]
        if not scored:
            return
        before, scores = next((pair for pair in reversed(scored) if pair[1].softmaxed), scored[0])
        if func in _CONCATENATIONS and not scores.softmaxed:
            scores = replace(scores, first=_columns_before(before, given, args, kwargs))
        for tensor in tensors((args[0] if func is Tensor.__setitem__ else out,)):
            axes = axes_after(func, args, kwargs, before, tensor, scores.axes)
            if axes is not None:
                self._scores[tensor] = replace(scores, axes=axes)


class _Again:
    """Enters a mode that is on already, inside its own handler, and nothing of its scope."""

    def __init__(self, mode: Intervening) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        TorchFunctionMode.__enter__(self._mode)

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self._mode, *error)


def _check_sizes(call: AttentionCall, n_q: int, n_k: int) -> None:
    if (n_q, n_k) != (call.n_q, call.n_k):
        raise InputError(
            f"{call.module!r}: expected an attention map of {call.n_q} queries by {call.n_k} keys "
            f"as on the inputs that were given, got {n_q} by {n_k}: run the model on inputs of the "
            "same shapes, or enter another scope for others"
        )


def _replaced(
    func: Callable, args: tuple, kwargs: dict, product: Contraction, side: int, change: CallChange
) -> Tensor:
    """A V with another A, by the function that the model multiplies them with."""
    lead, key = product.lead(), product.contracted
    letters = lead + product.free(side)[-1] + key
    before, axes = product.operand(side), product.axes(side)
    if set(axes) != set(letters):
        raise WiringError(
            f"{change.call.module!r}: one map {tuple(before.shape)} is multiplied with the values "
            "of several heads or windows, so that it cannot be replaced for each of them"
        )
    weights = align(before, axes, letters)
    _check_sizes(change.call, *weights.shape[-2:])
    made = change.replaced(weights)  # lead + (q, k)
    after = made.permute([letters.index(letter) for letter in axes])

    def another(value: Any) -> Any:
        return after if value is before else value

    out = func(*mapped(another, args), **{n: mapped(another, v) for n, v in kwargs.items()})
    _here.weights[out] = made.detach()
    return out


def _seen(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Which keys a query of the fused kernel sees, bool, broadcasting to lead + (q, k)."""
    n_q, n_k = query.shape[-2], key.shape[-2]
    seen = torch.ones(1, n_k, dtype=torch.bool, device=query.device)
    if mask is not None:
        floats = mask.is_floating_point()
        seen = mask > mask.amax(-1, keepdim=True) + _MASKED if floats else mask.bool()
    if is_causal:
        seen = seen & seen.new_ones(n_q, n_k).tril()
    return seen


def _on_scores(change: CallChange, scores: Followed, x: Tensor, dim: int) -> Tensor:
    """The hidden keys on a tensor of scores, whose axes may lie in any order."""
    call, axes = change.call, range(-x.ndim, 0)
    dim = dim if dim < 0 else dim - x.ndim
    keys = next((group for group in scores.axes if dim in group), ())
    if keys != (dim,):
        raise WiringError(
            f"{call.module!r}: its softmax runs over an axis that is not that of the keys alone, "
            "so that keys cannot be hidden; leave the call out with `layers=`"
        )
    tokens = {*scores.axes[0], *scores.axes[1]}
    lead = [axis for axis in axes if axis not in tokens]
    assert change.hidden is not None
    hidden = change.hidden_on([x.shape[axis] for axis in lead])[..., 0, :]  # lead + (k,)
    missing = x.shape[dim] - hidden.shape[-1]
    if missing < 0 or missing < scores.first:
        _check_sizes(call, call.n_q, x.shape[dim])
    hidden = F.pad(hidden, (scores.first, missing - scores.first))  # sinks are never hidden
    shape = [1] * x.ndim
    order = [*lead, dim]
    for axis, size in zip(order, hidden.shape, strict=True):
        shape[axis] = size
    by_axis = sorted(range(len(order)), key=lambda i: order[i])
    return hidden.permute(by_axis).reshape(shape)


def _columns_before(scores: Tensor, given: list[Tensor], args: tuple, kwargs: dict) -> int:
    """How many columns are put before scores along the axis on which tensors are joined."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    place = next(i for i, tensor in enumerate(given) if tensor is scores)
    return sum(tensor.shape[dim] for tensor in given[:place])


# ---------------------------------------------------------------------------- for the tap
class _Here(threading.local):
    """What was changed about calls of this thread, by their outputs."""

    def __init__(self) -> None:
        self.weights, self.masks = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()


_here = _Here()


def changed_weights(out: Tensor, weights: Tensor | None) -> Tensor | None:
    """A of a call with this output, where an intervention has replaced it."""
    found: Mapping[Tensor, Tensor] = _here.weights
    return found.get(out, weights) if found else weights


def changed_mask(out: Tensor, mask: Tensor | None, is_causal: bool) -> tuple[Tensor | None, bool]:
    """The mask of a fused call with this output, where an intervention has hidden keys."""
    found = _here.masks.get(out) if _here.masks else None
    return (mask, is_causal) if found is None else (found, False)
