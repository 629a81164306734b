"""What all attention attribution methods share: the entry points, and the way of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor

from captum_attn.attr._batches import in_batches
from captum_attn.attr._blocks import Weighed, rows_of
from captum_attn.attr._describe import Description, describe
from captum_attn.attr._each import ManyTargets
from captum_attn.attr._inputs import Inputs, checked_interpolation
from captum_attn.attr._propagate import BlockRow, add, linear, relevance_matrices, relevance_rows
from captum_attn.attr._run import Readout, Request, Run, finite
from captum_attn.objectives import Objective
from captum_attn.observe.capture.attention_call import AttentionCall, Block
from captum_attn.observe.streams.states import AttentionState, Source, State
from captum_attn.observe.streams.to_inputs import in_order, input_order


class AttentionAttribution(ManyTargets):
    r"""Base of the attention methods: a subclass supplies what it makes of A, and its options.

    Args:
        forward_func (Module or callable): the model, or any callable that runs one, as in Captum.
        layers (Module, str, or sequence of them, optional): modules, or patterns of their names
            ("encoder.*"), to which the attention calls are confined; the others stay wired, with a
            map of zeros. Default: all that run.

    Class attributes: see `Observing`.
    """

    # ------------------------------------------------------------------------ a method's own
    def weigh_heads(self, run: Run, block: Block) -> Tensor:
        """What the method makes of A, head by head: (B, F, H, q', k'), for the block's queries."""
        raise NotImplementedError

    def weigh(self, run: Run, update: AttentionState, block: Block) -> Weighed | None:
        """(own, A-bar) of a linear rule, R = own * R_asks + A-bar R_reads; None for R = R_asks.

        own is (B, F, q') or a number, A-bar (B, F, q', k'), for the block's queries.
        """
        return 1.0, self.weigh_heads(run, block).mean(2)

    def update(self, run: Run, state: AttentionState, maps: Mapping[State, BlockRow]) -> BlockRow:
        """The matrix form of the rule: R of the query stream after the call."""
        return linear(state, run.whole(state, partial(self.weigh, run)), maps)

    def relevance(self, run: Run) -> dict[Source, Tensor]:
        """Relevance of every source's tokens, (B, n): row vectors, from the readout down."""
        return relevance_rows(run.weights, partial(self.weighed, run), run.at_once)

    def maps(self, run: Run, last: Iterable[State]) -> dict[State, BlockRow]:
        """R of the states in `last`: matrices, from the inputs up."""

        def update(state: AttentionState, maps: Mapping[State, BlockRow]) -> BlockRow:
            before = maps[state.query_state]
            active = state.call.index in run.active
            return (
                run.mask_later_rows(state, self.update(run, state, maps), before)
                if active
                else before
            )

        return relevance_matrices(last, update, run.like, self.finish(run))

    def finish(self, run: Run) -> Callable[[State, BlockRow], BlockRow] | None:
        """What the matrix form does to a state's R once it is there; None: nothing."""
        return None

    def relevance_of_maps(self, run: Run, discard_self: bool = False) -> dict[Source, Tensor]:
        """The read rows of the matrix form, for rules that are not linear in them."""
        relevance: dict[Source, Tensor] = {}
        maps = self._maps_read(run)
        for state, weights in run.weights.items():
            for source, block in maps[state].items():
                if discard_self and source.name == state.stream:
                    block = block - torch.diag_embed(torch.diagonal(block, dim1=-2, dim2=-1))
                add(relevance, source, (weights[:, None] @ block)[:, 0])
        return relevance

    def weighed(self, run: Run, update: AttentionState, block: Block) -> Weighed | None:
        """`weigh` for the calls that count."""
        if update.call.index not in run.active:
            return None
        if self.needs_gradient or run.shared is None:
            return self.weigh(run, update, block)
        weigh = partial(self.weigh, run)  # no target changes it
        return rows_of(run.cached(("weighed", update), lambda: run.whole(update, weigh)), block)

    def _maps_read(self, run: Run) -> dict[State, BlockRow]:
        if self.needs_gradient or run.last:
            return self.maps(run, run.weights)
        return run.cached(("maps", *run.weights), lambda: self.maps(run, run.weights))

    # ------------------------------------------------------------------------ public
    @log_usage()
    def attribute(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        objective: Objective | None = None,
        readout: Readout = "auto",
        start_layer: int = 0,
        interpolation: str = "bilinear",
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        r"""Relevance of every element of the inputs for the explained output.

        Args:
            inputs (Tensor, tuple of Tensor, or Mapping of str to Tensor): the model's inputs, the
                batch axis first: images, token ids, embeddings, or a processor's or tokenizer's
                output as it is.
            target (int, tuple, Tensor or list, optional): what is explained, in every form that
                Captum takes; None where the output is one scalar per example, and for
                class-agnostic methods.
            additional_forward_args (any, optional): further positional arguments of the model,
                which get no attribution.
            objective (callable, optional): (output, target) -> (B,), see
                `captum_attn.objectives`. Default: the output that the target selects.
            readout ("auto", int, LongTensor (B,) or Tensor (B, n)): which final tokens are read.
                Default: "auto", as observed.
            start_layer (int): attention calls of a stream before this one count as if they moved
                nothing. Default: 0.
            interpolation (str): "bilinear" smooths images between patches, "nearest" is exact per
                patch. Default: "bilinear".
            internal_batch_size (int, optional): how many examples are explained at a time, for
                batches that do not fit into memory; every input, and whatever else holds a value
                for each example, is divided. Default: all at once.
            **options: the method's own, see the class; and `block_size` (int, optional), the number
                of queries whose attention maps are formed at a time. Default: as many as suit the
                cache and the free memory.

        Returns:
            *Tensor*, *tuple of Tensor* or *dict* of **attributions**: in the container of the
            inputs, each of its input's shape, in float32 (float64 for float64 models). Token ids
            get their token's relevance; of images and embeddings, `attr.sum(1)` and
            `attr.sum(-1)` are the map. Entries of a Mapping that feed no token stream have none.

        Raises:
            AttnError: one of its subclasses, for whatever cannot be explained as it is.

        Examples::

            >>> attributions = GenericAttention(model).attribute(images, target=3)
            >>> attributions = GenericAttention(model).attribute(tokenizer(texts, ...), target=1)
        """
        checked_interpolation(interpolation)
        explained = Request(target, additional_forward_args, objective, readout, start_layer)

        def attributions(inputs: Inputs, explained: Request) -> Any:
            with self._run(inputs, explained, options) as run:
                return run.attributions(finite(self.relevance(run)), inputs, interpolation)

        return in_batches(attributions, inputs, explained, internal_batch_size)

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
        """Relevance of every token, special tokens included, in the order of the inputs.

        Args:
            inputs, target, ...: as for `attribute`.

        Returns:
            dict: stream name -> (B, n).
        """
        explained = Request(target, additional_forward_args, objective, readout, start_layer)

        def tokens(inputs: Inputs, explained: Request) -> dict[str, Tensor]:
            with self._run(inputs, explained, options) as run:
                return run.tokens(finite(self.relevance(run)))

        return in_batches(tokens, inputs, explained, internal_batch_size)

    def relevance_maps(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        objective: Objective | None = None,
        start_layer: int = 0,
        **options: Any,
    ) -> dict[tuple[str, str], Tensor]:
        """The final relevance matrices, every token's for every token.

        Args:
            inputs, target, ...: as for `attribute`.

        Returns:
            dict: (row stream, source stream) -> (B, n_row, n_source).
        """
        explained = Request(target, additional_forward_args, objective, None, start_layer)
        with self._run(inputs, explained, options) as run:
            last = run.seen.wiring.final_states()
            found = self.maps(run, last.values())
            orders = {s.name: input_order(s, run.seen.batch) for s in run.seen.wiring.sources}
            return {
                (stream, source.name): in_order(
                    in_order(block, orders[source.name]).mT, orders.get(stream)
                ).mT
                for stream, state in last.items()
                for source, block in found[state].items()
            }

    def layer_maps(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        objective: Objective | None = None,
        start_layer: int = 0,
        **options: Any,
    ) -> list[tuple[AttentionCall, Tensor]]:
        """What the method makes of every attention call's map, head by head.

        Args:
            inputs, target, ...: as for `attribute`.

        Returns:
            list of (AttentionCall, Tensor): (B, H, q, k) each, (B F, H, q, k) where F sequences
            (windows, channels) are folded beside each other; `call.module` names the module.
        """
        explained = Request(target, additional_forward_args, objective, None, start_layer)
        with self._run(inputs, explained, options) as run:
            return [
                (update.call, self.weigh_heads(run, Block(update.call)).flatten(0, 1))
                for update in run.seen.wiring.updates
                if update.call.index in run.active
            ]

    def describe(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        objective: Objective | None = None,
        readout: Readout = "auto",
        start_layer: int = 0,
        **options: Any,
    ) -> Description:
        """What was observed, as a table that can be checked by eye.

        Args:
            inputs, target, ...: as for `attribute`.

        Returns:
            Description: `str()` of it is the table: per attention call its module, the stream and
            version that asked and that answered and the maps of their positions; then the rows
            that the output reads, with their weights.

        Examples::

            >>> print(GenericAttention(model).describe(images, target=3))
        """
        explained = Request(target, additional_forward_args, objective, readout, start_layer)
        with self._run(inputs, explained, options) as run:
            return describe(run.seen.wiring, run.reads, run.weights, run.active)
