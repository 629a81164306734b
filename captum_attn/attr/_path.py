"""Gradients along the straight path from a baseline to the input: x_k = x' + α_k (x - x').

Floats that enter token streams are scaled themselves. Where there are none (token ids), the tokens
that enter the first block are: what a module on the way to the first attention call is given. A
baseline that is token ids itself stands for the tokens that it becomes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from captum_attn._checks import FAILURES, shown, shown_error, suggested, whole
from captum_attn.attr._inputs import Inputs
from captum_attn.attr._run import Run
from captum_attn.errors import AttnError, OptionError
from captum_attn.observe import AttentionCall, Block
from captum_attn.observe.capture.module_stack import hooked
from captum_attn.observe.capture.tensor_kinds import check_kind
from captum_attn.observe.streams.states import Source

Baselines = float | Tensor | tuple | Mapping | None
# Where the path of a stream's tokens begins.
Start = Callable[[Source], Baselines]
# A call as it ran at one step, and the gradient at its output.
At = tuple[AttentionCall, Tensor | None]


def check_steps(n_steps: int) -> None:
    whole("n_steps", n_steps, least=1, most=2**31)


def before_the_end(n_steps: int) -> list[float]:
    """α = linspace(0, 1, n_steps) but for the last one; one step is x itself."""
    return torch.linspace(0, 1, n_steps, dtype=torch.float64).tolist()[:-1]


def path_gradients(
    run: Run[Any],
    calls: Sequence[AttentionCall],
    fractions: Iterable[float],
    baselines: Baselines,
    roots: Sequence[nn.Module],
) -> dict[AttentionCall, list[At]]:
    """Some calls as they are at every step; the last step is the run itself.

    Args:
        fractions (iterable of float): α of the other steps, see `before_the_end`.
    """
    found: dict[AttentionCall, list[At]] = {
        call: [(call, run.backward.gradients.get(call))] for call in calls
    }
    start = None if _floats(run) else _start(run, calls, baselines, roots)
    for alpha in fractions:
        inputs, scaled = _at(run, alpha, baselines, start, roots)
        try:
            steps = run.calls_on(inputs, calls, scaled)
        except AttnError:
            raise
        except FAILURES as error:  # the inputs themselves could be read
            raise OptionError(
                f"baselines: the model cannot read its inputs at {alpha:.2f} of the way from the "
                "baseline to them (it may leave out images that are all 0): expected a baseline "
                "that is an input of the model's, got "
                f"{'0' if baselines is None else shown(baselines)}; give another one as baselines=,"
                f" or set n_steps=1; the model says: {shown_error(error)}"
            ) from error
        for call, step in zip(calls, steps, strict=True):
            found[call].append(step)
    return found


def mean_gradient(steps: Sequence[At], block: Block) -> Tensor:
    """1/K Σ_k ∇A(x_k) of a block's queries, (B, F, H, q', k')."""
    total = torch.zeros_like(block.attention())
    for call, gradient in steps:
        if gradient is not None:
            total += Block(call, block.rows).map_gradient(gradient)[..., : block.n_k]
    return total / len(steps)


def check_baselines(run: Run[Any], baselines: Baselines) -> None:
    """Refuses baselines that do not fit the inputs, or name none that is scaled."""
    names, floats = run.observation.names, _floats(run)
    if not floats:  # tokens are scaled, (B, n, D), of a width that is not known yet
        _check_of_tokens(run, baselines)
        return
    if isinstance(baselines, Mapping):
        others = [name for name in baselines if name not in floats]
        if others:
            raise OptionError(
                f"baselines: expected names among {sorted(floats)}, the inputs that are scaled, "
                f"got {shown(others[0])}{suggested(others[0], floats)}"
            )
    elif isinstance(baselines, tuple) and len(baselines) != len(names):
        raise OptionError(
            f"baselines: expected one for each of the {len(names)} inputs, got {len(baselines)}"
        )
    for name, place, x in _given(run):
        if name in floats and isinstance(x, Tensor) and x.is_floating_point():
            _between(_baseline_of(baselines, name, place), x, 1.0)


def _check_of_tokens(run: Run[Any], baselines: Baselines) -> None:
    if _are_ids(baselines):
        _with_ids(run, baselines)
        return
    if not isinstance(baselines, Tensor):
        _between(baselines, run.like.new_zeros(1), 1.0)
        return
    width = baselines.shape[-1] if baselines.ndim else 1
    for source in run.observation.wiring.sources:
        _between(baselines, run.like.new_zeros(1).expand(run.batch, source.n, width), 1.0)


def _floats(run: Run[Any]) -> set[str]:
    """Names of the inputs that enter token streams as floats."""
    return {
        entry.leaf.name
        for source in run.observation.wiring.sources
        for entry in source.entries
        if entry.leaf.name in run.observation.names and entry.leaf.ids is None
    }


def _given(run: Run[Any]) -> list[tuple[str, int, Any]]:
    """The inputs: name, place, value."""
    given = run.inputs
    if isinstance(given, Mapping):
        return [(name, i, x) for i, (name, x) in enumerate(given.items())]
    values = given if isinstance(given, tuple) else (given,)
    return [(n, i, x) for i, (n, x) in enumerate(zip(run.observation.names, values, strict=True))]


def _at(
    run: Run[Any],
    alpha: float,
    baselines: Baselines,
    start: Start | None,
    roots: Sequence[nn.Module],
) -> tuple[Inputs, AbstractContextManager]:
    """The inputs of one step, and what scales the tokens while the model runs."""
    floats, given = _floats(run), run.inputs
    if start is not None:
        tokens = _tokens(run, roots, lambda source, x: _between(start(source), x, alpha))
        return given, tokens
    made: dict[str, Any] = {}
    for name, place, x in _given(run):
        scaled = name in floats and isinstance(x, Tensor) and x.is_floating_point()
        made[name] = _between(_baseline_of(baselines, name, place), x, alpha) if scaled else x
    if isinstance(given, Mapping):
        return made, nullcontext()
    values = tuple(made.values())
    return (values if isinstance(given, tuple) else values[0]), nullcontext()


def baselines_of(baselines: Any, part: slice, inputs: Any, batch: int) -> Any:
    """The baselines of some examples: rows of those that have one for each, as the input has."""

    def rows(baseline: Any, value: Any) -> Any:
        each = isinstance(baseline, Tensor) and isinstance(value, Tensor) and batch > 1
        each = each and baseline.ndim == value.ndim and len(baseline) == batch
        return baseline[part] if each else baseline

    if isinstance(baselines, Mapping) and isinstance(inputs, Mapping):
        return {name: rows(value, inputs.get(name)) for name, value in baselines.items()}
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(baselines, tuple):
        return tuple(map(rows, baselines, values)) if len(baselines) == len(values) else baselines
    if isinstance(inputs, Mapping):  # one tensor for all floats; of ids, of the tokens (B, n, D)
        given = [v for v in inputs.values() if isinstance(v, Tensor)]
        of_tokens = isinstance(baselines, Tensor) and baselines.ndim == 3
        floats = [v for v in given if v.is_floating_point()]
        return rows(baselines, baselines if of_tokens and not floats else (floats or given)[0])
    value = values[0]
    ids = isinstance(value, Tensor) and not value.is_floating_point()
    return rows(baselines, baselines if ids and getattr(baselines, "ndim", 0) == 3 else value)


def _baseline_of(baselines: Baselines, name: str, place: int) -> Any:
    if isinstance(baselines, Mapping):
        return baselines.get(name)
    if isinstance(baselines, tuple):
        return baselines[place] if place < len(baselines) else None
    return baselines


def _between(baseline: Any, x: Tensor, alpha: float) -> Tensor:
    if baseline is None:
        return x * alpha
    try:
        if isinstance(baseline, Tensor):
            check_kind("baselines", baseline)
        start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
        fits = torch.broadcast_shapes(start.shape, x.shape) == x.shape
        fits = fits and bool(start.isfinite().all())
    except FAILURES:
        fits = False
    if not fits:
        raise OptionError(
            f"baselines: expected a finite number, or a tensor of them that fits {tuple(x.shape)}, "
            f"got {shown(baseline)}"
        )
    return start + alpha * (x - start)


# ---------------------------------------------------------------------------- tokens of ids
def _are_ids(baselines: Baselines) -> bool:
    """Whether baselines of ids are ids, as Captum gives them: of each input, or a tensor (B, n)."""
    if isinstance(baselines, Tensor):
        return baselines.ndim > 1 and not baselines.is_floating_point()
    return isinstance(baselines, (tuple, Mapping))


def _with_ids(run: Run[Any], baselines: Baselines) -> Inputs:
    """The inputs with the baselines' ids in the place of theirs; masks and the like stay."""
    ids = {
        entry.leaf.name
        for source in run.observation.wiring.sources
        for entry in source.entries
        if entry.leaf.ids is not None
    }
    given = _given(run)
    if isinstance(baselines, tuple) and len(baselines) != len(given):
        raise OptionError(
            f"baselines: expected one for each of the {len(given)} inputs, got {len(baselines)}"
        )
    if isinstance(baselines, Mapping):
        for name in baselines:
            if name not in ids:
                raise OptionError(
                    f"baselines: expected names among {sorted(ids)}, the inputs whose tokens are "
                    f"scaled, got {shown(name)}{suggested(name, ids)}"
                )
    made: dict[str, Any] = {}
    for name, place, x in given:
        baseline = _baseline_of(baselines, name, place) if name in ids else None
        made[name] = x if baseline is None else _ids_like(baseline, x)
    if isinstance(run.inputs, Mapping):
        return made
    values = tuple(made.values())
    return values if isinstance(run.inputs, tuple) else values[0]


def _ids_like(baseline: Any, x: Tensor) -> Tensor:
    """Ids as baselines; a number would say either an id or what all tokens' vectors hold."""
    try:
        fits = isinstance(baseline, Tensor) and baseline.ndim > 0
        if fits:
            check_kind("baselines", baseline)
            fits = not (baseline.is_floating_point() or baseline.is_complex())
            fits = fits and baseline.dtype != torch.bool
            fits = fits and torch.broadcast_shapes(baseline.shape, x.shape) == x.shape
    except FAILURES:
        fits = False
    if not fits:
        raise OptionError(
            f"baselines: expected a tensor of token ids that fits {tuple(x.shape)} in the place of "
            "the input's, or a number or tokens (B, n, D) for all inputs together, got "
            f"{shown(baseline)}"
        )
    return baseline.to(device=x.device, dtype=x.dtype).expand(x.shape)


def _start(
    run: Run[Any],
    calls: Sequence[AttentionCall],
    baselines: Baselines,
    roots: Sequence[nn.Module],
) -> Start:
    """Where the path of each stream's tokens begins; baselines that are ids take one run more."""
    if not _are_ids(baselines):
        return lambda source: baselines
    became: dict[Source, Tensor] = {}

    def note(source: Source, x: Tensor) -> Tensor:
        became[source] = x.detach()
        return x

    try:
        run.calls_on(_with_ids(run, baselines), calls, _tokens(run, roots, note))
    except FAILURES as error:  # behind the first block it may fail: a text of padding alone
        if len(became) < len(run.observation.wiring.sources):
            raise OptionError(
                "baselines: the model cannot read these ids: expected ids of its vocabulary, got "
                f"{shown(baselines)}; the model says: {shown_error(error)}"
            ) from error
    return lambda source: became[source]


@contextmanager
def _tokens(
    run: Run[Any], roots: Sequence[nn.Module], change: Callable[[Source, Tensor], Tensor]
) -> Iterator[None]:
    """Changes the tokens that enter the first block of every stream, while the model runs."""
    done: list[Source] = []
    with ExitStack() as hooks:
        for source in run.observation.wiring.sources:
            for module in _on_the_way(run, source, roots):
                hook = _hook(run, source, done, change)
                hooks.enter_context(hooked(module, hook))
        yield
    if len(done) < len(run.observation.wiring.sources):
        raise OptionError(
            "the tokens that enter the first block were not observed (no module on the way to the "
            "first attention is given them as a tensor (B, n, D)), so they cannot be scaled along "
            "a path: pass the embeddings as the inputs, or set n_steps=1"
        )


def _on_the_way(run: Run[Any], source: Source, roots: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The modules around the first attention call of a stream, the outermost first."""
    state = next((s for s in run.attention_states if s.stream == source.name), None)
    parts = [] if state is None else state.call.module.split(".")
    for root in roots:
        modules = dict(root.named_modules())
        for i in range(1, len(parts) + 1):
            if ".".join(parts[:i]) in modules:
                yield modules[".".join(parts[:i])]


def _hook(
    run: Run[Any],
    source: Source,
    done: list[Source],
    change: Callable[[Source, Tensor], Tensor],
) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        given = {**dict(enumerate(args)), **kwargs}
        held = [key for key, x in given.items() if _holds(x, run.batch, source.n)]
        if source in done or len(held) != 1:
            return None
        done.append(source)
        given[held[0]] = change(source, given[held[0]])
        return tuple(given[i] for i in range(len(args))), {name: given[name] for name in kwargs}

    return hook


def _holds(x: Any, batch: int, n: int) -> bool:
    """Whether an argument is the tokens: positions, masks and rotations have no gradient."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.requires_grad
        and x.ndim == 3
        and tuple(x.shape[:2]) in ((batch, n), (n, batch))
    )
