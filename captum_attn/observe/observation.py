"""One observed run of the user's model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from captum._utils.common import _format_additional_forward_args, _run_forward
from captum._utils.gradient import apply_gradient_requirements
from torch import Tensor, nn

from captum_attn.errors import AttnError, InputError, NoAttentionFoundError
from captum_attn.observe.capture.default_device import on_users_device
from captum_attn.observe.capture.leaf import PACKED
from captum_attn.observe.capture.reasons import reasons_named
from captum_attn.observe.capture.steps import KnownRun
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.capture.tensor_kinds import check_kind
from captum_attn.observe.operators.bridge import Rules
from captum_attn.observe.operators.operators import Operators
from captum_attn.observe.streams.entering import RowsAreNotExamples
from captum_attn.observe.streams.readout import Read, find_reads
from captum_attn.observe.streams.structure_cache import StructureCache
from captum_attn.observe.streams.unseen import warn_of_unseen
from captum_attn.observe.streams.wiring import Wiring
from captum_attn.observe.tracing.autograd_graph import Graph, Root
from captum_attn.observe.tracing.in_place import InPlace
from captum_attn.observe.tracing.token_tracer import TokenTracer


@dataclass
class Watched:
    """What one run showed before anything is said about its tokens.

    Args:
        output (Tensor): the model's output, the tensor that targets select from; emptied when no
            other target follows, because a language model's is large.
        batch (int): number of examples.
        tap (Tap): what was seen.
        names (list of str): names of the inputs, in the order of the user's container.
        top (graph node or None): the output's.
        operators (Operators or None): the rules' gates and bridges, if any were asked for.
    """

    output: Tensor
    batch: int
    tap: Tap
    names: list[str]
    top: Any
    operators: Operators | None

    @property
    def additive(self) -> set[str]:
        """Inputs that are added to another one's tokens before anything mixes them.

        Integers, and features (B, n, D) of a model with attention: two images or feature vectors
        that a model adds are both its inputs.
        """
        if self.operators is None:
            return set()
        leaves = [leaf for leaf in self.tap.leaves if leaf.name in self.operators.additive]
        attends = bool(self.tap.calls)
        return {
            leaf.name
            for leaf in leaves
            if leaf.ids is not None or (attends and leaf.tensor.ndim == 3)
        }


@dataclass
class Observation(Watched):
    """A run whose token streams are known.

    Args:
        root (Root): where the output hangs in the graph.
        graph, wiring: how what was seen hangs together.
        notes (dict): what was worked out from it.
    """

    root: Root
    graph: Graph
    wiring: Wiring
    notes: dict[str, Any] = field(default_factory=dict)

    def reads(self) -> list[Read]:
        return find_reads(self.root, self.wiring, self.graph)


def observe(
    forward_func: Callable,
    inputs: tuple[Tensor, ...] | Mapping[str, Any],
    additional_forward_args: Any,
    roots: list[nn.Module],
    structure: StructureCache,
    tap_class: Callable[[nn.Module | None], Tap] = Tap,
    tables: Sequence[Rules] = (),
) -> Observation:
    """Runs the model once on `inputs` and reads off how its attention is wired.

    To be called inside `left_as_found`. Inputs and additional tensors enter as leaves of their own;
    the user's tensors are not touched.

    Args:
        tables (sequence of Rules): the rules that backward passes will ask for.
    """
    run = watched(forward_func, inputs, additional_forward_args, roots, tap_class, tables)
    return wired(run, structure)


def wired(run: Watched, structure: StructureCache, known: KnownRun | None = None) -> Observation:
    """Reads off which token streams a run's attention calls ask and read.

    Args:
        known (KnownRun, optional): what is known of its parts that have no graph.
    """
    tap = run.tap
    _check_seen(tap)
    graph = Graph(tap.calls, tap.leaves, run.batch, known)
    root = Root.of(run.output, tap.detached_from(run.output))
    wiring = _settled(tap, graph, root, run.batch, structure)
    warn_of_unseen(root, wiring, graph)
    return Observation(**vars(run), root=root, graph=graph, wiring=wiring)


def watched(
    forward_func: Callable,
    inputs: tuple[Tensor, ...] | Mapping[str, Any],
    additional_forward_args: Any,
    roots: list[nn.Module],
    tap_class: Callable[[nn.Module | None], Tap] = Tap,
    tables: Sequence[Rules] = (),
) -> Watched:
    """Runs the model once on `inputs`, which enter as leaves, and watches its operations."""
    tap = tap_class(roots[0] if len(roots) == 1 else None)
    if isinstance(inputs, Mapping):
        given, names = inputs, list(inputs)
        entered: dict[str, Any] = {
            name: _entered(tap, name, value)
            for name, value in sorted(inputs.items(), key=_by_signature(forward_func))
        }

        def forward() -> Any:
            if _takes_mapping(forward_func, inputs):
                return forward_func(_like(inputs, entered))
            return forward_func(**entered)
    else:
        extra = _format_additional_forward_args(additional_forward_args) or ()
        values = (*inputs, *extra)
        names = _positional_names(forward_func, len(values))
        given = dict(zip(names, values, strict=True))
        entered = {
            name: _entered(tap, name, value, given=i < len(inputs))
            for i, (name, value) in enumerate(given.items())
        }
        names, every = names[: len(inputs)], tuple(entered.values())
        first, rest = every[: len(inputs)], every[len(inputs) :]

        def forward() -> Any:
            return _run_forward(
                lambda *args: tensor_of(forward_func(*args), list(entered.values())),
                first,
                None,
                rest or None,
            )

    operators = Operators(tap, tables) if tables else None
    if operators is not None:
        operators.enter(entered)
    run_by_name = isinstance(inputs, Mapping)
    with (
        on_users_device(),
        tap.modules,
        operators or nullcontext(),
        tap,
        reasons_named(forward_func, given, roots, run_by_name),
        _misfits_named(given),
    ):
        output = tensor_of(forward(), list(entered.values()))
    check_kind("the model's output", output)
    batch = _examples({name: given[name] for name in names}, output)
    for leaf in tap.leaves:
        leaf.settle(batch)
    if operators is not None:
        operators.cell.batch = batch
    return Watched(output, batch, tap, names, output.grad_fn, operators)


def _settled(tap: Tap, graph: Graph, root: Root, batch: int, structure: StructureCache) -> Wiring:
    """The wiring; inputs whose rows turn out not to be examples are read as packed."""
    while True:
        try:
            tracer = TokenTracer(graph.cuts, in_place=InPlace(graph))
            return Wiring(tap, graph, root, batch, tracer, structure)
        except RowsAreNotExamples as found:
            for leaf in found.leaves:
                leaf.layout = PACKED
            for call in tap.calls:
                call.roles = ()


def tensor_of(output: Any, inputs: Sequence[Any] = ()) -> Tensor:
    """The tensor that targets select from: `.logits` if there is one, else the first tensor.

    Inputs that a model hands on (`input_ids` in a dict of features) are no outputs.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, torch.futures.Future):
        return tensor_of(output.value(), inputs)
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", None) if logits is None else logits
    if isinstance(logits, Tensor):
        return logits
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, (tuple, list)) or isinstance(output, Mapping):
        for value in values:
            if isinstance(value, Tensor) and not any(value is given for given in inputs):
                return value
    raise InputError(
        f"expected a model whose output is a tensor, or holds one; got {type(output).__name__}: "
        "pass a callable that returns the tensor, e.g. lambda x: model(x).scores"
    )


def _entered(tap: Tap, name: str, value: Any, given: bool = False) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.is_inference():
        value = value.clone()
    if value.is_floating_point():
        if "mask" in name and not given:
            return value  # a mask selects tokens and is not one
        apply_gradient_requirements((value,), warn=False)
    return tap.enter(name, value)


def _examples(inputs: Mapping[str, Any], output: Tensor) -> int:
    """Number of examples: rows of the inputs; where these differ, those that the output has, too.

    One image with several texts, in a row of scores, is one example; packed patches are none.
    """
    rows = [len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim]
    explained = len(output) if output.ndim else 1
    if output.ndim and explained == 1:
        return 1  # all images went into one sequence
    return explained if explained in rows else rows[0]


def _takes_mapping(forward_func: Callable, inputs: Mapping[str, Any]) -> bool:
    """Whether a forward function takes the inputs as one dict (sentence-transformers does)."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in _parameters(forward_func) if p.kind in kinds]
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    known = any(p.name in inputs for p in _parameters(forward_func))
    return len(needed) == 1 and not known


def _like(inputs: Mapping[str, Any], entered: dict[str, Any]) -> Mapping[str, Any]:
    """The entered inputs in a container of the user's kind (a `BatchEncoding`)."""
    try:
        return type(inputs)({name: entered[name] for name in inputs})  # type: ignore[call-arg]
    except TypeError:
        return entered


def _parameters(forward_func: Callable) -> list[inspect.Parameter]:
    function = forward_func.forward if isinstance(forward_func, nn.Module) else forward_func
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _positional_names(forward_func: Callable, count: int) -> list[str]:
    """Names of the first `count` positional parameters of a forward function."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in _parameters(forward_func) if p.kind in kinds]
    return (names + [f"input_{i}" for i in range(len(names), count)])[:count]


def _by_signature(forward_func: Callable) -> Callable[[tuple[str, Any]], int]:
    names = [p.name for p in _parameters(forward_func)]
    return lambda item: names.index(item[0]) if item[0] in names else len(names)


@contextmanager
def _misfits_named(inputs: Mapping[str, Any]) -> Iterator[None]:
    """A model that fails at a mask which fits no input says so; others fail in their own words."""
    try:
        yield
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        dense = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and not v.is_nested}
        shapes = {name: tuple(value.shape) for name, value in dense.items()}
        masked = [shape for name, shape in shapes.items() if "mask" not in name]
        for name, shape in shapes.items():
            fits = any(_fits(shape, other) for other in masked)
            if "mask" in name and not fits and masked and not isinstance(error, AttnError):
                raise InputError(
                    f"{name!r} has shape {shape}, which fits none of the inputs {shapes}: expected "
                    f"an entry for every token or pixel of every example; the model says: {error}"
                ) from error
        raise


def _fits(mask: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a mask may be one of (B, n) or (B, n, D) tokens, (B, D, n) frames, or pixels."""
    if len(mask) == 2:
        rows, n = mask
        return len(other) < 4 and n in other[1:] and rows in (other[0], n)  # (n, n): of all pairs
    return len(mask) > 2 and set(mask) - {1} <= set(other)


def _check_seen(tap: Tap) -> None:
    if tap.calls:
        return
    if tap.blind:
        raise NoAttentionFoundError(
            f"the attention of {tap.blind[0].module!r} ran without gradients (under `no_grad`, "
            "`inference_mode` or reentrant gradient checkpointing), so that nothing can be traced "
            "through it; remove that from the model's forward"
        )
    raise NoAttentionFoundError(
        "no softmax(QK^T)V was seen while the model ran: looked for "
        "`scaled_dot_product_attention`, `nn.MultiheadAttention`, and a softmax of a product of "
        "two activations that is multiplied with values (`matmul`, `@`, `bmm`, `baddbmm`, "
        "`einsum`); convolutional, recurrent, state-space, linear and deformable attention models "
        "have none, raw flash kernels, `flex_attention` and traced or scripted modules hide it: "
        "choose an `sdpa` or `eager` implementation"
    )
