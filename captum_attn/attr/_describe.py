"""`describe`: what was observed of a model, in a table that a person can check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from captum_attn.attr._leave_out import named
from captum_attn.attr._run import Run
from captum_attn.observe.observation import Watched
from captum_attn.observe.operators.audit import custom_functions
from captum_attn.observe.operators.bridge import Rule, Rules, Shares
from captum_attn.observe.streams.states import (
    AttentionState,
    InitialState,
    LearnedState,
    MixedState,
    ParallelState,
    RearrangedState,
    State,
    streams_of,
)

_SHOWN = 4  # rows of the readout that are listed one by one


@dataclass(frozen=True)
class CallRow:
    """One attention call: `query_stream` at `query_version` asked, `key_streams` answered."""

    index: int
    module: str
    query_stream: str
    query_version: str
    key_streams: tuple[str, ...]
    key_version: str
    queries: int
    keys: int
    heads: int
    windows: int
    query_map: str
    key_map: str
    active: bool


@dataclass(frozen=True)
class ReadRow:
    """A stream that the output reads: (row, weight) of every row of the first example."""

    stream: str
    version: str
    rows: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Operations:
    """The operations of a run, by kind.

    Args:
        kinds (tuple of (str, int, str)): kind, how often one ran, and its rule.
        unruled (tuple of (str, str, int)): an operation that is neither linear nor ruled, its
            module, and how often it ran there; it keeps its ordinary gradient, or is refused.
        hidden (tuple of str): the model's own autograd Functions, which hide what they compute.
    """

    kinds: tuple[tuple[str, int, str], ...]
    unruled: tuple[tuple[str, str, int], ...]
    hidden: tuple[str, ...]

    def __str__(self) -> str:
        table = [("kind", "ran", "rule"), *((k, str(n), rule) for k, n, rule in self.kinds)]
        lines = _lined_up(table)
        for name, module, n in self.unruled:
            lines.append(f"without a rule: {name} in {module} ({n})")
        lines += [f"hidden in an autograd Function: {name}" for name in self.hidden]
        return "\n".join(line.rstrip() for line in lines)


def _lined_up(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(f"{t:<{w}}" for t, w in zip(r, widths, strict=True)) for r in table]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


def describe_operations(run: Watched, rules: Rules) -> Operations:
    """Puts the rules of a run into words."""
    operators = run.operators
    assert operators is not None
    ran = tuple((kind, operators.ran[kind], _named(rules.get(kind))) for kind in operators.ran)
    unruled = tuple((name, module, n) for (name, module), n in operators.unruled.items())
    return Operations(ran, unruled, tuple(custom_functions(run.top)))


def _named(rule: Rule | None) -> str:
    if rule is None:
        return "gradient"
    if isinstance(rule, Shares):
        return "x " + ", ".join(f"{factor:g}" for factor in rule.factors)
    if isinstance(rule, partial):
        given = ", ".join(f"{name}={value!r}" for name, value in rule.keywords.items())
        return f"{_named(rule.func)}({given})"
    return getattr(rule, "__name__", repr(rule))


@dataclass(frozen=True)
class MixingRow:
    """A mixing hop: what mixed the tokens, how many of what became how many, random vectors drawn.

    `draws` is 0 where the hop is so small that T was formed exactly.
    """

    by: tuple[str, ...]
    mixed: tuple[tuple[str, str, int], ...]
    tokens: int
    draws: int


@dataclass(frozen=True)
class Description:
    """What was observed; `str()` is the printable table.

    Args:
        calls (tuple of CallRow): in the order of execution.
        readout (tuple of ReadRow): the streams that the output reads.
        streams (tuple of (str, int)): the sources of relevance and their numbers of tokens.
        operations (Operations, optional): of a method with rules, which were applied.
        mixing (tuple of MixingRow): where something else than attention mixes the tokens.
        layers (tuple of (str, int, int)): where there is such mixing, for each stack of layers in
            which there is attention its name, the layers with attention, and all layers.
        left_out (tuple of (str, str, tuple of int)): what the option `leave_out` takes away of the
            first example: the reason, the stream and the positions; no positions where nothing is.
        known (bool): whether an earlier run of the same operations was observed, so that nothing
            that its structure says was asked for again.
    """

    calls: tuple[CallRow, ...]
    readout: tuple[ReadRow, ...]
    streams: tuple[tuple[str, int], ...]
    operations: Operations | None = None
    mixing: tuple[MixingRow, ...] = ()
    layers: tuple[tuple[str, int, int], ...] = ()
    left_out: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    known: bool = False

    def __str__(self) -> str:
        parts = [self._wiring()] if self.calls else []
        parts += [str(self.operations)] if self.operations is not None else []
        parts += ["\n".join(map(_left_out, self.left_out))] if self.left_out else []
        return "\n\n".join(parts)

    def _wiring(self) -> str:
        head = ("call", "module", "asks", "answers", "size", "heads", "positions")
        table = [head]
        for c in self.calls:
            windows = f"{c.windows} x " if c.windows > 1 else ""
            keys = "+".join(c.key_streams) or "(learned keys)"
            table.append(
                (
                    f"{c.index}" + ("" if c.active else " (left out)"),
                    c.module,
                    f"{c.query_stream}@{c.query_version}",
                    f"{keys}@{c.key_version}",
                    f"{windows}{c.queries} x {c.keys}",
                    str(c.heads),
                    f"{c.query_map}, {c.key_map}",
                )
            )
        lines = _lined_up(table)
        for r in self.readout:
            shown = ", ".join(f"{row}: {weight:.3g}" for row, weight in r.rows[:_SHOWN])
            more = f", ... {len(r.rows)} rows in all" if len(r.rows) > _SHOWN else ""
            lines.append(f"readout of {r.stream}@{r.version}: {shown}{more}")
        for m in self.mixing:
            parts = " + ".join(f"{n} of {stream}@{of}" for stream, of, n in m.mixed)
            how = f"{m.draws} draws" if m.draws else "exactly"
            by = ", ".join(m.by) or "the sum of several versions"
            lines.append(f"mixing: {parts} -> {m.tokens} tokens by {by} ({how})")
        for name, with_attention, every in self.layers:
            lines.append(f"attention in {with_attention} of {every} layers of {name!r}")
        lines.append("tokens: " + ", ".join(f"{name} {n}" for name, n in self.streams))
        lines.append("structure: " + ("known from an earlier run" if self.known else "observed"))
        return "\n".join(line.rstrip() for line in lines)


def describe(run: Run, rules: Rules | None = None, roots: Sequence[nn.Module] = ()) -> Description:
    """Puts the wiring of a run into words, and its rules where the method has some.

    Args:
        roots (sequence of Module): the modules that ran, for the share of layers with attention.
    """
    calls = []
    for state in run.attention_states:
        call = state.call
        calls.append(
            CallRow(
                index=call.index,
                module=call.module,
                query_stream=state.stream,
                query_version=version(state.query_state),
                key_streams=streams_of(state.key_state),
                key_version=version(state.key_state),
                queries=call.n_q,
                keys=call.n_k,
                heads=call.heads,
                windows=call.windows,
                query_map=_map(state.query_state),
                key_map=_map(state.key_state),
                active=run.counts(call),
            )
        )
    sources = tuple((s.name, s.n) for s in run.observation.wiring.sources)
    readout = []
    for read in run.backward.reads:
        rows = run.weights[read.state][0].tolist() if read.state in run.weights else []
        kept = tuple((i, weight) for i, weight in enumerate(rows) if weight)
        readout.append(ReadRow(read.state.stream, version(read.state), kept))
    operations = None if rules is None else describe_operations(run.observation, rules)
    mixing = tuple(map(_mixing, run.observation.wiring.mixed_states))
    layers = tuple(_stacks(roots[0], calls)) if mixing and len(roots) == 1 else ()
    left_out, known = tuple(named(run)), run.observation.wiring.structure.known
    return Description(
        tuple(calls), tuple(readout), sources, operations, mixing, layers, left_out, known
    )


def _left_out(row: tuple[str, str, tuple[int, ...]]) -> str:
    reason, stream, places = row
    at = ", ".join(map(str, places[:_SHOWN])) + ", ..." * (len(places) > _SHOWN)
    return f"left out as {reason}: {f'{at} of {stream}' if places else 'nothing'}"


def _mixing(state: MixedState) -> MixingRow:
    mixed = tuple((part.stream, version(part), part.n) for part in state.parts)
    draws = 0 if state.mixing.is_exact else state.mixing.draws
    return MixingRow(state.by, mixed, state.n, draws)


def _stacks(root: nn.Module, calls: Sequence[CallRow]) -> Iterator[tuple[str, int, int]]:
    """Stacks of layers, the outermost ones: (name, layers with attention, all layers)."""
    inside: list[str] = []
    for name, module in root.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        if any(name.startswith(outer) for outer in inside):
            continue
        layers = [f"{name}.{layer}." for layer, _ in module.named_children()]
        there = [any(f"{c.module}.".startswith(layer) for c in calls) for layer in layers]
        if any(there):
            inside.append(f"{name}.")
            yield name, sum(there), len(there)


def version(state: State) -> str:
    """A version's name: 0 at birth, then the index of the call that made it."""
    if isinstance(state, AttentionState):
        return f"call {state.call.index}"
    if isinstance(state, ParallelState):
        return "calls " + "+".join(str(s.call.index) for s in state.branches if _made(s))  # type: ignore[attr-defined]
    if isinstance(state, (RearrangedState, MixedState)):
        return "+".join(dict.fromkeys(version(before) for before in state.before))
    return "-" if isinstance(state, LearnedState) else "input"


def _made(state: State) -> bool:
    return isinstance(state, AttentionState)


def _map(state: State) -> str:
    if isinstance(state, RearrangedState):
        parts = Counter(
            f"{'all' if part.to is None else int((part.to[0] >= 0).sum())} of {part.state.stream}"
            for part in state.parts
        )
        return " + ".join(f"{n} x ({part})" if n > 1 else part for part, n in parts.items())
    if isinstance(state, MixedState):
        return "mixed"
    return (
        "-"
        if isinstance(state, LearnedState)
        else "as born"
        if isinstance(state, InitialState)
        else "same"
    )
