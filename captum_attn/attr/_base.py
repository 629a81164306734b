"""What all attention methods share: the public calls, and the way from one map to the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from captum._utils.progress import progress
from captum.attr import GradientAttribution
from captum.log import log_usage
from torch import Tensor

from captum_attn._checks import flag
from captum_attn.attr._batches import in_batches
from captum_attn.attr._blocks import UNCHANGED, LinearRule
from captum_attn.attr._describe import Description, describe
from captum_attn.attr._engine import Engine, Objectives, Targets
from captum_attn.attr._inputs import Inputs
from captum_attn.attr._layers import Layers, check_layers
from captum_attn.attr._leave_out import without
from captum_attn.attr._options import SharedOptions, showing
from captum_attn.attr._propagate import (
    BlockRow,
    Flow,
    Relevance,
    RowScale,
    Step,
    add,
    linear,
    relevance_matrices,
    relevance_rows,
)
from captum_attn.attr._request import Readout, Request
from captum_attn.attr._results import Result, matrices_by_name
from captum_attn.attr._rule_sets import RULE_SETS
from captum_attn.attr._run import Run
from captum_attn.errors import OptionError
from captum_attn.objectives import Objective
from captum_attn.observe import AttentionCall, Block
from captum_attn.observe.capture.restore import check_that_it_runs, modules_of, root_of
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.operators.bridge import Rules
from captum_attn.observe.streams.states import AttentionState, State
from captum_attn.observe.streams.to_inputs import check_interpolation

__all__ = ["AttentionAttribution", "Block", "BlockRow", "Flow", "LinearRule", "Relevance", "Result",
           "Run", "Step"]  # fmt: skip

Made = TypeVar("Made")
Matrices = dict[State, BlockRow]
Finish = Callable[[State, BlockRow], BlockRow]


class AttentionAttribution(GradientAttribution):
    r"""Base of the attention methods: a subclass supplies what it makes of A, and its options.

    A method overrides `weigh_heads`, and where its rule differs `keep`, `rule` or `flow`; a method
    whose relevance is no product over the layers overrides `shown_calls` or `relevance`.

    Args:
        forward_func (Module or callable): the model, or any callable that runs one, as in Captum.
        layers (Module, str, or sequence of them, optional): modules, or patterns of their names
            ("encoder.*"), to which the attention calls are confined; the others stay wired, with a
            map of zeros. Default: all that run.

    Class attributes:
        Options (type): the method's own options, a frozen dataclass.
        needs_gradient (bool): False for a class-agnostic method.
        keeps_graph (bool): True for a rule that asks autograd for more than the gradients at the
            attention calls.
        tap (type): what watches the model run.
        confinable (bool): whether `layers`, `start_layer` and `readout` mean anything to it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(SharedOptions):
        """Options of a method; a subclass adds fields with their types and defaults."""

    # What stands for A in a method that may have either: the map itself, or its relevance R_A.
    MapKind = Literal["attention", "lrp"]

    needs_gradient: ClassVar[bool] = True
    keeps_graph: ClassVar[bool] = False
    tap: ClassVar[type[Tap]] = Tap
    confinable: ClassVar[bool] = True

    def __init__(self, forward_func: Callable, layers: Layers | None = None) -> None:
        check_that_it_runs()
        if isinstance(forward_func, type):
            raise OptionError(
                f"expected a model or a callable that runs one, got the class "
                f"{forward_func.__name__}: pass an object of it"
            )
        if not callable(forward_func):
            raise OptionError(
                f"expected a model or a callable that runs one, got {type(forward_func).__name__}"
            )
        check_layers(layers)
        super().__init__(root_of(forward_func))
        self.layers = layers
        self._engine = Engine(
            self.needs_gradient, self.keeps_graph, self.default_objective(), self.tap, self._rules
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Public calls show the options of their method to `help` and `inspect.signature`."""
        super().__init_subclass__(**kwargs)
        for name in _PUBLIC_CALLS:
            setattr(cls, name, showing(getattr(cls, name), cls.Options))

    # ------------------------------------------------------------------------ a method's own
    def default_objective(self) -> Objective | None:
        """What is explained where the user names no objective; None: the logit."""
        return None

    @classmethod
    def rules(cls, options: Any) -> Rules | str | None:
        """The rules of a relevance pass beside the gradient's, or the name of a published table.

        None: no such pass is wanted, and `run.attention_relevance` is not there.
        """
        return None

    @classmethod
    def _rules(cls, options: Any) -> Rules | None:
        rules = cls.rules(options)
        return RULE_SETS[rules] if isinstance(rules, str) else rules

    def weigh_heads(self, run: Run[Any], block: Block) -> Tensor:
        """What the method makes of A, head by head: (B, F, H, q', k'), for the block's queries."""
        raise NotImplementedError

    def keep(self, run: Run[Any], block: Block) -> Tensor | float:
        """The share of its own relevance that a query keeps: (B, F, q') or a number."""
        return 1.0

    def rule(self, run: Run[Any], block: Block) -> LinearRule:
        """A linear rule, R = keep * R_query + read R_key: the mean over heads is read.

        Where the objective does not depend on the call, nothing is read.
        """
        keep = self.keep(run, block)
        if self.needs_gradient and not run.has_gradient(block.call):
            return LinearRule(keep)
        return LinearRule(keep, self.fuse_heads(self.weigh_heads(run, block)))

    def fuse_heads(self, heads: Tensor) -> Tensor:
        """E_h, (B, F, H, q', k') -> (B, F, q', k'); override it for a clamp after the mean."""
        return heads.mean(2)

    def flow(self, run: Run[Any], flow: Flow) -> Tensor:
        """What one stream hands to another about one source, (B, n_s, n_x), in the matrix form."""
        return flow.read @ flow.rows

    def is_linear(self, run: Run[Any]) -> bool:
        """Whether `rule` is all: then rows are propagated from the readout down, not matrices."""
        return True

    def update(self, run: Run[Any], step: Step) -> BlockRow:
        """The matrix form of the rule: R of the stream that asks, after the call."""
        rule = run.full_rule(step.state.call, partial(self.rule, run))
        return linear(step, rule, partial(self.flow, run))

    def row_scale(self, run: Run[Any]) -> RowScale | None:
        """What the rows of a state are multiplied with, state -> (B, n); None: nothing."""
        return None

    def finish(self, run: Run[Any]) -> Finish | None:
        """What the matrix form does to a state's R once it is there; None: nothing."""
        row_scale = self.row_scale(run)
        if row_scale is None:
            return None

        def scaled(state: State, rows: BlockRow) -> BlockRow:
            scale = row_scale(state)
            return rows if scale is None else {x: b * scale[..., None] for x, b in rows.items()}

        return scaled

    def shown_calls(self, run: Run[Any], state: State) -> list[AttentionState] | None:
        """The calls whose maps are shown as they are, each alone; None: all are multiplied.

        Args:
            state (State): one that the output reads.
        """
        return None

    def weights(self, run: Run[Any]) -> Mapping[State, Tensor]:
        """The states that relevance is read out of, with the weights of their rows, (B, n)."""
        return run.weights

    def discards_self(self, run: Run[Any]) -> bool:
        """Whether a token that is read out gets no relevance from itself."""
        return False

    def check(self, run: Run[Any]) -> None:
        """Refuses options that do not fit what was observed, before anything is made of it."""

    def relevance(self, run: Run[Any]) -> Relevance:
        """Relevance of every source's tokens, (B, n)."""
        weights, discard = self.weights(run), self.discards_self(run)
        if not self.is_linear(run) or (discard and not run.reads_one_row):
            return self._read_out(run, weights, discard)
        relevance = self._rows(run, weights)
        for state, rows in weights.items() if discard else ():
            for source in relevance:
                if source.name == state.stream:
                    relevance[source] = relevance[source] * (rows == 0)
        return relevance

    def matrices(self, run: Run[Any], last: Iterable[State]) -> Matrices:
        """R of the states in `last`: matrices, from the inputs up."""

        def update(step: Step) -> BlockRow:
            if not run.counts(step.state.call):
                return step.before
            return run.mask_later_rows(step.state, self.update(run, step), step.before)

        last = list(last)
        shown = {state: self.shown_calls(run, state) for state in last}
        if all(calls is None for calls in shown.values()):
            return relevance_matrices(last, update, run.like, self.finish(run))
        found: Matrices = {state: {} for state in last}
        for state, calls in shown.items():
            for call in calls or ():
                rule = partial(self._only_matrix, run, call)
                blocks = relevance_matrices([state], rule, run.like)
                for source, block in blocks[state].items():
                    add(found[state], source, block)
        return found

    def explain(self, run: Run[Any]) -> Result:
        """Relevance of one target; override it to give that of the inputs' own elements."""
        return Result(run, self.relevance(run))

    # ------------------------------------------------------------------------ the way through
    def _rule(self, run: Run[Any], block: Block) -> LinearRule:
        """The rule of the calls that count; made once for all targets if none changes it."""
        call, rule = block.call, partial(self.rule, run)
        if not run.counts(call):
            return UNCHANGED
        if self.needs_gradient or run.shared is None:
            return rule(block)
        return run.cached(("rule", call), lambda: run.full_rule(call, rule)).of(block)

    def _only(self, run: Run[Any], shown: AttentionState, block: Block) -> LinearRule:
        """One call's map as it is; below and above it, every token stays where it is."""
        if block.call is not shown.call:
            return UNCHANGED
        return LinearRule(0.0, self.fuse_heads(self.weigh_heads(run, block)))

    def _only_matrix(self, run: Run[Any], shown: AttentionState, step: Step) -> BlockRow:
        """The same in the matrix form."""
        return linear(step, run.full_rule(step.state.call, partial(self._only, run, shown)))

    def _rows(self, run: Run[Any], weights: Mapping[State, Tensor]) -> Relevance:
        """The relevance of the rows that are read, from the readout down."""
        size = run.queries_per_block
        shown = {state: self.shown_calls(run, state) for state in weights}
        if all(calls is None for calls in shown.values()):
            return relevance_rows(weights, partial(self._rule, run), size, self.row_scale(run))
        relevance: Relevance = {}
        for state, calls in shown.items():
            for call in calls or ():
                found = relevance_rows(
                    {state: weights[state]}, partial(self._only, run, call), size
                )
                for source, rows in found.items():
                    add(relevance, source, rows)
        return relevance

    def _read_out(
        self, run: Run[Any], weights: Mapping[State, Tensor], discard_self: bool
    ) -> Relevance:
        """The rows that are read, of the matrices."""
        make = partial(self.matrices, run, list(weights))
        targets_differ = self.needs_gradient or run.backward.last_rows
        maps = make() if targets_differ else run.cached(("maps", *weights), make)
        relevance: Relevance = {}
        for state, rows in weights.items():
            for source, block in maps[state].items():
                if discard_self and source.name == state.stream:
                    block = block - torch.diag_embed(torch.diagonal(block, dim1=-2, dim2=-1))
                add(relevance, source, (rows[:, None] @ block)[:, 0])
        return relevance

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
                of queries whose attention maps are formed at a time (default: as many as suit the
                cache and the free memory), and `mixing_draws` (int, optional), the number of random
                vectors by which mixing of tokens by something else than attention is estimated
                (default: as many as keep the error of a map under 5 %); and `leave_out` (tuple of
                "sink" and "self"), tokens whose relevance is set to 0, see `left_out` (default:
                none).

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
        check_interpolation(interpolation)
        request = Request(target, additional_forward_args, objective, readout, start_layer)

        def attributions(inputs: Inputs, request: Request, options: Mapping[str, Any]) -> Any:
            with self._run(inputs, request, options) as run:
                return without(self.explain(run)).attributions(inputs, interpolation)

        return self._in_batches(attributions, inputs, request, internal_batch_size, options)

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
        request = Request(target, additional_forward_args, objective, readout, start_layer)

        def tokens(
            inputs: Inputs, request: Request, options: Mapping[str, Any]
        ) -> dict[str, Tensor]:
            with self._run(inputs, request, options) as run:
                return without(self.explain(run)).tokens(inputs)

        return self._in_batches(tokens, inputs, request, internal_batch_size, options)

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
        check_interpolation(interpolation)
        return self.explain_each(
            inputs,
            targets,
            lambda result: result.attributions(inputs, interpolation),
            additional_forward_args,
            objective=objective,
            readout=readout,
            start_layer=start_layer,
            show_progress=show_progress,
            **options,
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
        return self.explain_each(
            inputs,
            targets,
            Result.tokens,
            additional_forward_args,
            objective=objective,
            readout=readout,
            start_layer=start_layer,
            show_progress=show_progress,
            **options,
        )

    def explain_each(
        self,
        inputs: Inputs,
        targets: Targets,
        make: Callable[[Result], Made],
        additional_forward_args: Any = None,
        *,
        objective: Objectives = None,
        readout: Readout = "auto",
        start_layer: int = 0,
        causal: bool = False,
        show_progress: bool = False,
        **options: Any,
    ) -> Iterator[Made]:
        """`make(result)` for many targets of the same inputs, from one forward pass.

        Args:
            inputs, targets, ...: as for `attribute_each`.
            make (callable): the relevance of one target -> what is wanted of it.
            causal (bool): whether tokens behind the one that is read out stay as they were born, as
                if the sequence ended there. Default: False.

        Returns:
            *iterator* of what `make` returns, one for each target.
        """
        request = Request(
            None, additional_forward_args, None, readout, start_layer, self.layers, causal
        )
        flag("show_progress", show_progress)
        count, results = self._engine.explained_each(
            self.forward_func, inputs, targets, request, self.settled(options), objective,
            lambda run: make(without(self._checked(run))),
        )  # fmt: skip
        if not show_progress:
            return results
        return iter(progress(results, desc=f"{self.get_name()} attribution", total=count))

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
        request = Request(
            target, additional_forward_args, objective, start_layer=start_layer, matrices=True
        )
        with self._run(inputs, request, options) as run:
            last = run.final_states()
            return matrices_by_name(run, last, self.matrices(run, last.values()))

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
        request = Request(
            target, additional_forward_args, objective, start_layer=start_layer, matrices=True
        )
        with self._run(inputs, request, options) as run:
            return [
                (state.call, self.weigh_heads(run, Block(state.call)).flatten(0, 1))
                for state in run.attention_states
                if run.counts(state.call)
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
        request = Request(target, additional_forward_args, objective, readout, start_layer)
        with self._run(inputs, request, options) as run:
            roots = modules_of(self.forward_func)
            return describe(run, self._rules(run.options), roots)

    def left_out(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        objective: Objective | None = None,
        readout: Readout = "auto",
        start_layer: int = 0,
        **options: Any,
    ) -> Any:
        """Where the option `leave_out` takes the relevance away, for the pictures to mark.

        "sink" is a token that, in more than half of the heads, more than half of the questions look
        at more than at any other; a question is a query that sees two tokens or more beside its
        own. "self" is the token with more than half of the readout's weight.

        Args:
            inputs, target, ...: as for `attribute`.

        Returns:
            *Tensor*, *tuple of Tensor* or *dict*: as `attribute` returns them, bool.

        Examples::

            >>> asked = dict(target=1, leave_out=("sink", "self"))
            >>> gae.attribute(inputs, **asked), gae.left_out(inputs, **asked)
        """
        request = Request(target, additional_forward_args, objective, readout, start_layer)
        with self._run(inputs, request, options) as run:
            return without(self.explain(run)).marks(inputs)

    @classmethod
    def settled(cls, options: Mapping[str, Any]) -> SharedOptions:
        """The method's options with their defaults; raises `OptionError` for others."""
        return cls.Options.settle(options, cls.get_name())

    def _in_batches(
        self,
        explain: Callable[[Inputs, Request, Mapping[str, Any]], Made],
        inputs: Inputs,
        request: Request,
        size: int | None,
        options: Mapping[str, Any],
    ) -> Made:
        return in_batches(explain, inputs, request, size, options, self.Options.of_examples)

    def _checked(self, run: Run[Any]) -> Result:
        self.check(run)
        return self.explain(run)

    def _run(
        self, inputs: Inputs, request: Request, options: Mapping[str, Any]
    ) -> AbstractContextManager[Run]:
        """The observed run of one target."""
        request, settled = replace(request, layers=self.layers), self.settled(options)
        if request.matrices and settled.leave_out:
            raise OptionError(
                f"leave_out={settled.leave_out!r}: expected () for matrices, of which no row is "
                "read; use `attribute` or `attribute_tokens`"
            )
        return self._checked_run(inputs, request, settled)

    @contextmanager
    def _checked_run(
        self, inputs: Inputs, request: Request, options: SharedOptions
    ) -> Iterator[Run]:
        with self._engine.explained(self.forward_func, inputs, request, options) as run:
            self.check(run)
            yield run


# What `__init_subclass__` gives the signature of a method.
_PUBLIC_CALLS = (
    "attribute", "attribute_tokens", "attribute_each", "attribute_tokens_each", "explain_each",
    "relevance_maps", "layer_maps", "describe", "left_out",
)  # fmt: skip
