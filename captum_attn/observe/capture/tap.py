"""The tap: sees every softmax(QK^T)V while the user's own model runs, and changes nothing.

A `TorchFunctionMode` is active around the forward run. The fused kernel is seen as such; the inline
form is followed from the product QK^T over scaling, masks and casts to a softmax, and from there
over dropout, casts, views, slices, sinks and head mixing to the product with V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from captum_attn.errors import InputError
from captum_attn.observe.capture.attention_call import AttentionCall, attention_map, repeat_heads
from captum_attn.observe.capture.contraction import PRODUCTS, Contraction, align, contraction
from captum_attn.observe.capture.functions import (
    BATCH_NORMS,
    DETACH,
    OPERATORS,
    SOFTMAX,
    TOKEN_MAKERS,
    TOKEN_MIXERS,
    without_override_check,
)
from captum_attn.observe.capture.intervening import changed_mask, changed_weights
from captum_attn.observe.capture.leaf import Leaf, UntracedCall
from captum_attn.observe.capture.lookups import (
    IN_PLACE,
    LOOKUPS,
    SCATTER,
    bag_of,
    is_looked_up,
    one_for_each_row,
    stems_from,
    table_and_index,
)
from captum_attn.observe.capture.module_stack import ModuleStack
from captum_attn.observe.capture.operands import (
    contracts_keys,
    is_parameter,
    scores_of,
    with_lead,
)
from captum_attn.observe.capture.origins import Origins
from captum_attn.observe.capture.own_state import OwnState, own_state
from captum_attn.observe.capture.tensor_notes import (
    Provenance,
    Scores,
    axes_after,
    mapped,
    tensors,
)


def laid_out(shape: torch.Size, stride: tuple[int, ...], gradient: Tensor | None) -> Tensor | None:
    """A gradient in the memory format of what it is a gradient of; None where a rule stops it.

    On the CPU torch (2.14) computes the backward pass of a batch norm wrongly for one example whose
    gradient arrives with the channels last, as it does from tokens, where its input has them first.
    """
    if gradient is None or gradient.stride() == stride:
        return gradient
    return gradient.new_empty_strided(shape, stride).copy_(gradient)


class Tap(TorchFunctionMode):
    """Records the attention calls and the leaves of one forward run.

    Args:
        root (Module or None): the model, for the modules' names; None: the outermost that runs.

    Attributes:
        calls (list of AttentionCall): in the order of execution.
        leaves (list of Leaf): in the order in which they entered.
        blind (list of UntracedCall): calls that ran without grad.
        mixers (dict): graph node of another token mixer's output -> its module's name.
        underivable (dict): graph node of an operator without a derivative -> what ran it.
        events (dict): module's name -> how many softmaxes of scores, or fused calls, it ran.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        super().__init__()
        self.modules = ModuleStack(root)
        self.own = own_state() or OwnState()
        self.calls: list[AttentionCall] = []
        self.leaves: list[Leaf] = []
        self.blind: list[UntracedCall] = []
        self.mixers: dict[Any, str] = {}
        self.underivable: dict[Any, str] = {}
        self._scores, self._provenance = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._origins = Origins()
        self._numbers, self._one_hot = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._order: dict[str, int] = {}
        self._given: dict[str, Tensor] = {}
        self._learned: dict[int, tuple[Tensor, Tensor]] = {}
        self.events: dict[str, int] = {}
        self.step = 0  # of the functions that ran, for taps that count them

    def enter(self, name: str, tensor: Tensor) -> Tensor:
        """Makes an input a leaf (floats) or remembers where it goes (integers)."""
        order = self._order.setdefault(name, len(self._order))
        if not tensor.is_floating_point():
            tensor = (
                tensor.clone()
            )  # the note is not on the user's tensor; the model may write here
            self._provenance[tensor] = Provenance(frozenset([name]))
            self._given[name] = tensor
            if tensor.dtype != torch.bool:
                self._origins.enter(name, tensor)
            return tensor
        self.leaves.append(Leaf(name, tensor, order))
        return tensor.clone()  # the model may write into its input, but not into a leaf

    def detached_from(self, tensor: Tensor) -> tuple[Any, ...]:
        """Untraced calls, and graph nodes, that `tensor` stems from without a gradient."""
        past = self._provenance.get(tensor)
        return past.detached_from if past is not None else ()

    def _event(self) -> tuple[str, int]:
        """The module that runs an attention, and its number there: what tells it from others."""
        name = self.modules.name()
        self.events[name] = self.events.get(name, 0) + 1
        return name, self.events[name] - 1

    # ------------------------------------------------------------------------ for other taps
    @property
    def cuts(self) -> bool:
        """Whether the graph begins anew behind the call at hand."""
        return False

    @property
    def _is_blind(self) -> bool:
        return not torch.is_grad_enabled()

    def _passed_on(self, out: Tensor) -> Tensor:
        """The output of a call, as the model goes on with it."""
        return out

    def _note_call(self, call: AttentionCall, scores: Scores | None = None) -> None:
        """A call has been seen; `scores` are those of the inline form."""
        self.calls.append(call)

    @property
    def is_paused(self) -> bool:
        """Whether another run is in progress, inside a hook of the model."""
        return own_state() not in (None, self.own)

    # ------------------------------------------------------------------------ the mode
    def __torch_function__(
        self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        args, kwargs = self.own.arguments(func, args, kwargs or {})
        return self.own.result(self._called(func, args, kwargs))

    def _called(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a function of torch, and writes down what it means."""
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:  # a mode is off inside its own handler
                return without_override_check(func)(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(func, args, kwargs)
        if func is F.embedding_bag and self._origins:
            return self._embedding_bag(func, args, kwargs)
        if func is F.one_hot and self._origins.followed(args[0] if args else kwargs["tensor"]):
            out = func(*args, **kwargs)
            self._one_hot[out] = args[0] if args else kwargs["tensor"]
            return out
        if func in LOOKUPS and self._origins:
            found = self._indexed(func, args, kwargs)
            if found is not None:
                return found
        if func in PRODUCTS:
            return self._product(func, args, kwargs)
        if func in TOKEN_MAKERS and torch.is_grad_enabled():
            args = mapped(self._learned_leaf, args)
        follows = bool(self._origins)
        out = (self._numbers_entered if follows else self.own.run)(func, args, kwargs)
        if isinstance(func, OPERATORS):
            self._note_underivable(func, out)
        if func in BATCH_NORMS and out.requires_grad:
            out.register_hook(partial(laid_out, out.shape, out.stride()))
        self._follow(func, args, kwargs, out)
        return out

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
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
        event = self._event()
        if enable_gqa:
            options["enable_gqa"] = True
        if self._is_blind:
            return self._unseen(
                F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
            )
        detached_from = sum((self.detached_from(t) for t in (query, key, value)), ())
        if not (self.cuts or any(t.requires_grad for t in (query, key, value))):
            query = self._born(query)
        weights = None
        if dropout_p:  # a map that lost entries cannot be recomputed: form it, drop, keep it
            weights = attention_map(query, key, attn_mask, is_causal, scale)
            weights = self.own.run(F.dropout, (weights, dropout_p), {})
            out = weights @ repeat_heads(value, weights)
            weights = weights.detach()
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        weights = changed_weights(out, weights)
        attn_mask, is_causal = changed_mask(out, attn_mask, is_causal)
        out = self._passed_on(out)
        call = AttentionCall(
            index=len(self.calls),
            module=event[0],
            q=query,
            k=key,
            v=repeat_heads(value, query),
            lead=tuple(out.shape[:-2]),
            edge=get_gradient_edge(out),
            weights=weights,
            mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            detached_from=detached_from,
            event=event,
        )
        self._note_call(call)
        return out

    def _product(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        product = contraction(func, args, kwargs)
        if product is not None:
            for side in (0, 1):
                scores = self._scores.get(product.operand(side))
                past_softmax = scores is not None and scores.softmaxed
                if past_softmax and contracts_keys(product, side, scores):
                    return self._inline(func, args, kwargs, product, side, scores)
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out)
        if product is not None and not any(map(is_parameter, (product.lhs, product.rhs))):
            scores = scores_of(product)
            if scores is not None:
                past = self.detached_from(product.lhs) + self.detached_from(product.rhs)
                self._scores[out] = replace(scores, detached_from=past, step=self.step)
        return out

    def _inline(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        product: Contraction,
        side: int,
        scores: Scores,
    ) -> Any:
        weights, value = product.operand(side), product.operand(1 - side)
        if self._is_blind:
            return self._unseen(func(*args, **kwargs))
        if not (self.cuts or weights.requires_grad or value.requires_grad):
            leaf = self._born(weights)
            args = mapped(lambda tensor: leaf if tensor is weights else tensor, args)
            kwargs = {n: leaf if v is weights else v for n, v in kwargs.items()}
        out = func(*args, **kwargs)
        lead, key = product.lead(), product.contracted
        query, channel = product.free(side)[-1], product.free(1 - side)[-1]
        weights_ = align(weights.detach(), product.axes(side), lead + query + key)
        value_ = align(value, product.axes(1 - side), lead + key + channel)
        sizes = torch.broadcast_shapes(weights_.shape[:-2], value_.shape[:-2])
        # Of the two factors of QK^T the keys are the one whose rows are contracted with V.
        position = product.axes(side).index(key) - len(product.axes(side))
        keys = scores.axes.index((position,))
        changed, out = changed_weights(out, weights_), self._passed_on(out)
        call = AttentionCall(
            index=len(self.calls),
            module=self.modules.name(),
            q=with_lead(scores.operands[1 - keys], sizes, weights_.shape[-2]),
            k=with_lead(scores.operands[keys], sizes, weights_.shape[-1]),
            v=value_,
            lead=tuple(sizes),
            edge=get_gradient_edge(out),
            weights=changed,
            out_permutation=tuple(product.out.index(c) for c in lead + query + channel),
            detached_from=scores.detached_from + self.detached_from(value),
            event=scores.event,
        )
        self._note_call(call, scores)
        return out

    def _unseen(self, out: Tensor) -> Tensor:
        self.blind.append(UntracedCall(self.modules.name()))
        self._provenance[out] = Provenance(detached_from=(self.blind[-1],))
        return out

    # ------------------------------------------------------------------------ leaves
    def _embedding(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        ids = args[0] if args else kwargs["input"]
        if ids.is_floating_point():
            raise InputError(
                "expected integer token ids, got floats: a tool that perturbs its inputs "
                "(NoiseTunnel, sensitivity_max) cannot perturb ids; let it perturb "
                "`inputs_embeds`, the embedding layer's output, instead"
            )
        try:
            out = func(*args, **kwargs)
        except IndexError as error:
            rows = len(args[1] if len(args) > 1 else kwargs["weight"])
            raise InputError(
                f"{self.modules.name()!r}: expected ids in [0, {rows}), got {int(ids.min())} to "
                f"{int(ids.max())}; use the model's own tokenizer, and no more tokens than it takes"
            ) from error
        return self._looked_up(out, ids, args[1] if len(args) > 1 else kwargs["weight"])

    def _looked_up(self, out: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        """A leaf in place of vectors, ids.shape + (D,), that were looked up for an input's ids."""
        past = self._provenance.get(ids)
        if past is None or not past.inputs or self._is_activation(table):
            return out
        name, origin = self._input_of(ids, past)
        ids, origin = one_for_each_row(out, ids, origin)
        with torch.enable_grad():
            leaf = out.detach().requires_grad_()
            shape = tuple(self._given[name].shape)
            self.leaves.append(Leaf(name, leaf, self._order[name], ids, shape, origin))
            return leaf.clone()

    def _input_of(self, ids: Tensor, past: Provenance) -> tuple[str, Tensor | None]:
        """The input that ids stem from, and which of its elements each of them was."""
        names = sorted(past.inputs, key=self._order.__getitem__)
        for name in sorted(names, key=lambda name: "mask" in name):  # a mask selects tokens
            origin = self._origins.origin(ids, name)
            if origin is not None:
                return name, origin
        return names[0], None

    def _is_activation(self, table: Tensor) -> bool:
        """Whether more went into a table than parameters: rows are then moved, not looked up."""
        return table.grad_fn is not None and not stems_from(
            table, {id(leaf) for _, leaf in self._learned.values()}
        )

    def _indexed(self, func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
        """`table[ids]`, `table.index_select(0, ids)` and the like; None for other indexing."""
        table, ids = table_and_index(func, args, kwargs)
        if (
            table is None
            or ids is None
            or not self._origins.followed(ids)
            or self._is_activation(table)
        ):
            return None
        in_place = func in SCATTER and func.__name__.endswith("_")
        out = func(*(table.clone() if t is table else t for t in args), **kwargs)
        if not is_looked_up(out, ids):
            return None
        leaf = self._looked_up(out, ids, table)
        return table.copy_(leaf) if in_place else leaf

    def _embedding_bag(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Bags of ids: looked up one by one, and put together as the bags are."""
        out = func(*args, **kwargs)
        ids, table, together = bag_of(*args, **kwargs)
        if not self._origins.followed(ids) or not isinstance(out, Tensor):
            return out
        with torch.enable_grad():
            made = together(self._looked_up(F.embedding(ids, table), ids, table))
        return made if torch.allclose(made.to(out), out, rtol=1e-3, atol=1e-5) else out

    def _numbers_entered(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """`func`, with a leaf for integers that are computed with (uint8 pictures, counts)."""
        name = getattr(func, "__name__", "")
        in_place = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        out = args[0] if in_place and args else self.own.run(func, args, kwargs)
        if not (_is_float(out) and torch.is_grad_enabled()) or "rand" in name:
            return self.own.run(func, args, kwargs) if in_place else out
        whole = {id(t): t for t in tensors((*args, *kwargs.values())) if not _is_float(t)}
        numbers = {key: self._number(t, out.dtype) for key, t in whole.items()}
        numbers = {key: number for key, number in numbers.items() if number is not None}
        if not numbers:
            return self.own.run(func, args, kwargs) if in_place else out

        def entered(value: Any) -> Any:
            return numbers.get(id(value), value)

        try:
            again = func(
                *mapped(entered, args), **{n: mapped(entered, v) for n, v in kwargs.items()}
            )
        except (IndexError, RuntimeError, TypeError):  # they say where, not what
            return self.own.run(func, args, kwargs) if in_place else out
        if in_place or (_is_float(again) and again.requires_grad and torch.equal(again, out)):
            if len(whole) == 1:  # integers again later on, perhaps
                (given,) = whole.values()
                if self._origins.followed(given) and given.shape == again.shape:
                    self._origins.note(again, given)
                    self._provenance[again] = self._provenance.get(given)
            return again
        return out

    def _number(self, whole: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The float leaf of an integer tensor; None where none of its elements is an input's."""
        known = self._numbers.get(whole)
        if known is not None:
            return known.to(dtype, copy=True)
        ids = self._one_hot.get(whole)
        past = self._provenance.get(whole if ids is None else ids)
        if past is None or not past.inputs:
            return None
        name, origin = self._input_of(whole if ids is None else ids, past)
        if origin is None or "mask" in name:  # a mask selects tokens, it is none
            return None
        leaf = whole.detach().to(dtype).requires_grad_()
        shape = tuple(self._given[name].shape)
        self.leaves.append(Leaf(name, leaf, self._order[name], ids, shape, origin))
        self._numbers[whole] = leaf
        return leaf.clone()

    def _born(self, tensor: Tensor) -> Tensor:
        """A leaf in place of a tensor that nothing but parameters and constants went into."""
        leaf = tensor.detach().requires_grad_()
        self.leaves.append(Leaf("", leaf))
        return leaf

    def _learned_leaf(self, value: Any) -> Any:
        """The leaf of a parameter that becomes tokens, the same one at every use."""
        if not isinstance(value, nn.Parameter) or not value.is_floating_point():
            return value
        if id(value) not in self._learned:
            self._learned[id(value)] = (value, self._born(value))
        return self._learned[id(value)][1]

    def _note_underivable(self, func: Any, out: Any) -> None:
        """Keeps operators whose gradient autograd drops: it warns in the backward pass, no more."""
        for tensor in tensors((out,)):
            node = tensor.grad_fn
            if node is not None and "NotImplemented" in node.name():
                self.underivable[node] = f"{self.modules.name()!r} ({func})"

    # ------------------------------------------------------------------------ following
    def _follow(self, func: Callable, args: tuple, kwargs: dict, out: Any) -> None:
        """Carries the notes of the arguments over to what was made of them."""
        cut = func in DETACH or not torch.is_grad_enabled()
        mixes = getattr(func, "__name__", "") in TOKEN_MIXERS
        if not (cut or mixes or self._provenance or self._scores):
            return
        given = list(tensors((*args, *kwargs.values())))
        # `__setitem__` returns nothing and writes into its first argument
        made = list(tensors((args[0] if func is Tensor.__setitem__ else out,)))
        if self._origins:
            self._follow_ids(func, args, kwargs, given, made)
        if cut or self._provenance:
            self._carry_provenance(given, made, cut)
        if self._scores:
            self._carry_scores(func, args, kwargs, given, made)
        if mixes:
            name = self.modules.name()
            self.mixers |= {tensor.grad_fn: name for tensor in made if tensor.grad_fn is not None}

    def _follow_ids(
        self, func: Callable, args: tuple, kwargs: dict, given: list[Tensor], made: list[Tensor]
    ) -> None:
        """The elements of integer inputs are followed through what is done to them."""
        known = {id(t) for t in given if (p := self._provenance.get(t)) is not None and p.inputs}
        if known:
            by_value = any(t.dtype == torch.bool and id(t) in known for t in given)
            self._origins.follow(func, args, kwargs, made, by_value)

    def _carry_provenance(self, given: list[Tensor], made: list[Tensor], cut: bool) -> None:
        """Integers stem from the inputs that their arguments stem from, floats from past cuts."""
        inputs: frozenset[str] = frozenset()
        detached_from: dict[Any, None] = {}  # in order, each once
        for tensor in given:
            past = self._provenance.get(tensor)
            if past is not None:
                inputs |= past.inputs
                detached_from |= dict.fromkeys(past.detached_from)
            if cut and tensor.grad_fn is not None:
                detached_from[tensor.grad_fn] = None
        for tensor in made:
            if tensor.is_floating_point() and detached_from:
                self._provenance[tensor] = Provenance(detached_from=tuple(detached_from))
            elif not tensor.is_floating_point() and inputs:
                self._provenance[tensor] = Provenance(inputs)

    def _carry_scores(
        self, func: Callable, args: tuple, kwargs: dict, given: list[Tensor], made: list[Tensor]
    ) -> None:
        """What is made of scores is still scores, as long as their token axes can be followed."""
        scored = [(t, s) for t in given if (s := self._scores.get(t)) is not None]
        if not scored:
            return
        # Of two that meet, the one past its softmax, and of those the last, is followed.
        before, scores = next((pair for pair in reversed(scored) if pair[1].softmaxed), scored[0])
        if func in SOFTMAX and not scores.softmaxed:
            scores = replace(scores, softmaxed=True, event=self._event())
        for tensor in made:
            axes = axes_after(func, args, kwargs, before, tensor, scores.axes)
            if axes is not None:
                self._scores[tensor] = replace(scores, axes=axes)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
