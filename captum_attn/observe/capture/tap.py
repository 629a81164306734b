"""The tap: sees every softmax(QK^T)V while the user's own model runs, and changes nothing.

A `TorchFunctionMode` is active around the forward run. The fused kernel is seen as such; the inline
form is followed from the product QK^T over scaling, masks and casts to a softmax, and from there
over dropout, casts, views, slices, sinks and head mixing to the product with V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from captum_attn.errors import InputError
from captum_attn.observe.capture.attention_call import AttentionCall, attention_map, repeat_heads
from captum_attn.observe.capture.contraction import PRODUCTS, Contraction, align, contraction
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
from captum_attn.observe.capture.module_stack import (
    name_of,
    running_modules,
    without_override_check,
)
from captum_attn.observe.capture.operands import contracts_keys, is_parameter, with_lead
from captum_attn.observe.capture.origins import Origins
from captum_attn.observe.capture.tensor_notes import (
    Notes,
    Provenance,
    Scores,
    axes_after,
    mapped,
    tensors,
)

SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
DETACH = frozenset({torch.detach, Tensor.detach, Tensor.data.__get__})  # type: ignore[attr-defined]
# A parameter that one of these turns into tokens (queries, latents, [CLS]) becomes a leaf.
TOKEN_MAKERS = frozenset(
    {Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.__getitem__}
    | {Tensor.repeat, torch.tile, Tensor.tile, torch.repeat_interleave, Tensor.repeat_interleave}
    | {torch.unsqueeze, Tensor.unsqueeze, torch.cat, torch.concat, torch.stack}
)
# Operations that mix tokens without attention: named when a model's tokens pass through them.
TOKEN_MIXERS = frozenset("conv1d conv2d conv3d cumsum lstm gru rnn_tanh rnn_relu".split())


class Tap(TorchFunctionMode):
    """Records the attention calls and the leaves of one forward run.

    Args:
        root (Module or None): the model, for the modules' names; None: the outermost that runs.

    Attributes:
        calls (list of AttentionCall): in the order of execution.
        leaves (list of Leaf): in the order in which they entered.
        blind (list of UntracedCall): calls that ran without grad.
        mixers (dict): graph node of another token mixer's output -> its module's name.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        super().__init__()
        self.root = root
        self.calls: list[AttentionCall] = []
        self.leaves: list[Leaf] = []
        self.blind: list[UntracedCall] = []
        self.mixers: dict[Any, str] = {}
        self._scores, self._provenance = Notes(), Notes()
        self._origins, self._numbers, self._one_hot = Origins(), Notes(), Notes()
        self._order: dict[str, int] = {}
        self._given: dict[str, Tensor] = {}
        self._learned: dict[int, tuple[Tensor, Tensor]] = {}
        self._names: dict[int, str] | None = None

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

    # ------------------------------------------------------------------------ the mode
    def __torch_function__(
        self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
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
        out = self._numbers_entered(func, args, kwargs) if self._origins else func(*args, **kwargs)
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
        if enable_gqa:
            options["enable_gqa"] = True
        if not torch.is_grad_enabled():
            return self._unseen(
                F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
            )
        detached_from = sum((self.detached_from(t) for t in (query, key, value)), ())
        if not any(t.requires_grad for t in (query, key, value)):
            query = self._born(query)
        weights = None
        if dropout_p:  # a map that lost entries cannot be recomputed: form it, drop, keep it
            weights = attention_map(query, key, attn_mask, is_causal, scale)
            weights = F.dropout(weights, dropout_p)
            out = weights @ repeat_heads(value, weights)
            weights = weights.detach()
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        call = AttentionCall(
            index=len(self.calls),
            module=self._module(),
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
        )
        self.calls.append(call)
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
            rows = product.free(0)[-1:], product.free(1)[-1:]
            if all(rows) and product.contracted:  # it may be QK^T; an outer product is not
                lead, detached_from = product.lead(), self.detached_from(product.lhs)
                self._scores[out] = Scores(
                    operands=tuple(  # type: ignore[arg-type]
                        align(
                            product.operand(side),
                            product.axes(side),
                            lead + rows[side] + product.contracted,
                        ).flatten(len(lead) + 1)
                        for side in (0, 1)
                    ),
                    detached_from=detached_from + self.detached_from(product.rhs),
                    axes=tuple(product.out.index(row) - len(product.out) for row in rows),  # type: ignore[arg-type]
                )
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
        if not torch.is_grad_enabled():
            return self._unseen(func(*args, **kwargs))
        if not (weights.requires_grad or value.requires_grad):
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
        keys = scores.axes.index(position) if position in scores.axes else 1
        call = AttentionCall(
            index=len(self.calls),
            module=self._module(),
            q=with_lead(scores.operands[1 - keys], sizes, weights_.shape[-2]),
            k=with_lead(scores.operands[keys], sizes, weights_.shape[-1]),
            v=value_,
            lead=tuple(sizes),
            edge=get_gradient_edge(out),
            weights=weights_,
            out_permutation=tuple(product.out.index(c) for c in lead + query + channel),
            detached_from=scores.detached_from + self.detached_from(value),
        )
        self.calls.append(call)
        return out

    def _unseen(self, out: Tensor) -> Tensor:
        self.blind.append(UntracedCall(self._module()))
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
                f"{self._module()!r}: expected ids in [0, {rows}), got {int(ids.min())} to "
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
        out = args[0] if in_place and args else func(*args, **kwargs)
        if not (_is_float(out) and torch.is_grad_enabled()) or "rand" in name:
            return func(*args, **kwargs) if in_place else out
        whole = {id(t): t for t in tensors((*args, *kwargs.values())) if not _is_float(t)}
        numbers = {key: self._number(t, out.dtype) for key, t in whole.items()}
        numbers = {key: number for key, number in numbers.items() if number is not None}
        if not numbers:
            return func(*args, **kwargs) if in_place else out

        def entered(value: Any) -> Any:
            return numbers.get(id(value), value)

        try:
            again = func(
                *mapped(entered, args), **{n: mapped(entered, v) for n, v in kwargs.items()}
            )
        except (IndexError, RuntimeError, TypeError):  # they say where, not what
            return func(*args, **kwargs) if in_place else out
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

    # ------------------------------------------------------------------------ following
    def _follow(self, func: Callable, args: tuple, kwargs: dict, out: Any) -> None:
        """Carries the notes of the arguments over to what was made of them."""
        cut = func in DETACH or not torch.is_grad_enabled()
        mixes = getattr(func, "__name__", "") in TOKEN_MIXERS
        if not (cut or mixes or self._provenance or self._scores):
            return
        inputs: frozenset[str] = frozenset()
        detached_from: tuple[Any, ...] = ()
        scored: tuple[Tensor, Scores] | None = None
        for tensor in tensors((*args, *kwargs.values())):
            past, scores = self._provenance.get(tensor), self._scores.get(tensor)
            if past is not None:
                inputs, detached_from = inputs | past.inputs, detached_from + past.detached_from
            if cut and tensor.grad_fn is not None:
                detached_from += (tensor.grad_fn,)
            if scores is not None and (scored is None or scores.softmaxed):
                scored = tensor, scores
        if func is Tensor.__setitem__:  # writes into its first argument
            out = args[0]
        if inputs:
            conditions = (t for t in tensors((*args, *kwargs.values())) if t.dtype == torch.bool)
            by_value = any(self._provenance.get(t) is not None for t in conditions)
            self._origins.follow(func, args, kwargs, out, by_value)
        made_tensors = out if isinstance(out, (tuple, list)) else (out,)
        for made in made_tensors:
            if not isinstance(made, Tensor):
                continue
            if made.is_floating_point() and detached_from:
                self._provenance[made] = Provenance(
                    detached_from=tuple(dict.fromkeys(detached_from))
                )
            elif not made.is_floating_point() and inputs:
                self._provenance[made] = Provenance(inputs)
            if scored is not None:
                before, scores = scored
                axes = axes_after(func, args, kwargs, before, made, scores.axes)
                if axes is not None:
                    passed = scores.softmaxed or func in SOFTMAX
                    self._scores[made] = replace(scores, axes=axes, softmaxed=passed)
            if mixes and made.grad_fn is not None:
                self.mixers[made.grad_fn] = self._module()

    def _module(self) -> str:
        """Qualified name of the module that is running."""
        running = running_modules()
        if self._names is None and (self.root is not None or running):
            root = self.root if self.root is not None else running[-1]
            self._names = {id(module): name for name, module in root.named_modules()}
        return name_of(running, self._names or {})


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
