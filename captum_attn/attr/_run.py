"""What a method sees of one observed run: attention calls, gradients, what is read, its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from captum_attn.attr._backward import Backward
from captum_attn.attr._blocks import (
    LinearRule,
    QueriesPerBlock,
    Rule,
    all_blocks,
    full_rule,
    queries_per_block,
)
from captum_attn.attr._inputs import Inputs
from captum_attn.attr._options import SharedOptions
from captum_attn.attr._propagate import (
    BlockRow,
    Step,
    is_cross_attention,
    is_self_attention,
)
from captum_attn.attr._relevance_rules import quotient
from captum_attn.observe import AttentionCall, Block, Observation
from captum_attn.observe.capture.attention_call import attention_map, working_dtype
from captum_attn.observe.streams.states import AttentionState, State, ancestry

Made = TypeVar("Made")
Own = TypeVar("Own", bound=SharedOptions)

# Attention maps kept where one forward pass serves several targets, at most, in bytes.
KEPT_MAPS = 2**30


@dataclass
class Run(Generic[Own]):
    """One observed run of the model, of which one target is explained.

    Args:
        observation (Observation): what the run showed.
        options (Options): the method's own.
        active (set of int): indices of the calls that count (`layers`, `start_layer`).
        backward (Backward): the gradients, and the rows that the output reads.
        again (callable): inputs -> the run of the same target on them, see `rerun`.
        asked (callable): inputs -> names of those that what is explained has a gradient for.
        shared (dict or None): what the targets of one forward pass have in common.
        inputs: as the user gave them.
        draw_again (callable): sets the random generators back to where they were before the run.
        along (callable): see `calls_on`.
        valued (callable): see `value_on`.
        of_layer (callable): see `layer_on`.
        output_axes (int): the number of axes of the output that the target selects from.
        notes (dict): what was worked out for this target, see `once`.
    """

    observation: Observation
    options: Own
    active: set[int]
    backward: Backward = field(default_factory=Backward)
    again: Callable[[Inputs], Run] | None = None
    asked: Callable[[Inputs], set[str]] | None = None
    shared: dict[Any, Any] | None = None
    inputs: Any = None
    draw_again: Callable[[], None] = lambda: None
    along: Callable[..., list[tuple[AttentionCall, Tensor | None]]] | None = None
    valued: Callable[[Inputs, int, AbstractContextManager], Tensor] | None = None
    of_layer: Callable[[Inputs, nn.Module], tuple[Tensor, Tensor]] | None = None
    output_axes: int = 0
    notes: dict[Any, Any] = field(default_factory=dict, init=False)

    # ------------------------------------------------------------------------ what is explained
    @property
    def batch(self) -> int:
        """The number of examples."""
        return self.observation.batch

    @property
    def weights(self) -> Mapping[State, Tensor]:
        """The states that the output reads, with the weights of their rows, (B, n)."""
        return MappingProxyType(self.backward.weights)

    @property
    def reads_one_row(self) -> bool:
        """Whether of every state that is read, each example has one row."""
        return all(bool(((w != 0).sum(1) == 1).all()) for w in self.weights.values())

    @property
    def like(self) -> Tensor:
        """An empty tensor of the batch size, the working precision and the device of the run."""
        value = self.observation.tap.calls[0].v
        dtype = working_dtype(value.dtype)
        return torch.empty(self.batch, 0, dtype=dtype, device=value.device)

    def rerun(self, inputs: Inputs) -> Run[Own]:
        """The same target on other inputs of the same shapes, a forward and a backward pass more.

        Args:
            inputs: as the user gave them, but for their values: scaled, or with noise.
        """
        assert self.again is not None, "nothing has been explained yet"
        return self.again(inputs)

    def calls_on(
        self, inputs: Inputs, calls: Sequence[AttentionCall], during: AbstractContextManager
    ) -> list[tuple[AttentionCall, Tensor | None]]:
        """Some calls as they are on other inputs, with the same target's gradients there.

        A forward and a backward pass more, and nothing else: which tokens ask and answer is not
        looked for again.

        Args:
            inputs: as the user gave them, but for their values.
            calls (sequence of AttentionCall): those of this run.
            during (context manager): what is done to the model meanwhile.

        Returns:
            list of (AttentionCall, Tensor or None): the call, without its graph, and the gradient
            at its output; None where that is zero.
        """
        assert self.along is not None, "nothing has been explained yet"
        return self.along(inputs, calls, during)

    def value_on(
        self,
        inputs: Inputs,
        copies: int = 1,
        during: AbstractContextManager | None = None,
    ) -> Tensor:
        """What is explained, on other inputs: a forward pass more, and nothing else.

        Args:
            inputs: as the user gave them, but for their values, or several copies of such batches
                one after the other.
            copies (int): their number; targets and further arguments are repeated.
            during (context manager, optional): what is done to the model meanwhile.

        Returns:
            Tensor: (copies B,).
        """
        assert self.valued is not None, "nothing has been explained yet"
        return self.valued(inputs, copies, nullcontext() if during is None else during)

    def layer_on(self, inputs: Inputs, module: nn.Module) -> tuple[Tensor, Tensor]:
        """A module's output on other inputs, and its gradient; a forward and a backward pass more.

        Args:
            inputs: as the user gave them, but for their values.
            module (Module): of the model.
        """
        assert self.of_layer is not None, "nothing has been explained yet"
        return self.of_layer(inputs, module)

    def depended_on(self, inputs: Inputs) -> set[str]:
        """The inputs that what is explained has a gradient for; a forward and a backward pass more.

        Args:
            inputs: as the user gave them.
        """
        assert self.asked is not None, "nothing has been explained yet"
        return self.asked(inputs)

    # ------------------------------------------------------------------------ attention calls
    @property
    def attention_states(self) -> list[AttentionState]:
        """The states that attention calls made, in the order of execution, left out or not."""
        return self.observation.wiring.updates

    def counts(self, call: AttentionCall) -> bool:
        """Whether `layers` and `start_layer` let a call in."""
        return call.index in self.active

    def state_after(self, call: AttentionCall) -> AttentionState:
        """The state that a call made."""
        return self.observation.wiring.after(call)

    def final_states(self) -> dict[str, State]:
        """The last version of every stream, by the stream's name."""
        return self.observation.wiring.final_states()

    def calls_into(self, last: Iterable[State] | None = None) -> list[AttentionState]:
        """The calls that count and went into the states `last` (default: into what is read)."""
        states = ancestry(list(self.weights if last is None else last))
        return [s for s in states if isinstance(s, AttentionState) and self.counts(s.call)]

    def last_calls(self, state: State) -> list[AttentionState]:
        """The last call within the stream of a state, and the last one to every other stream."""
        calls = [s for s in self.calls_into([state]) if s.stream == state.stream]
        return list(
            {s.key_state.stream if is_cross_attention(s) else s.stream: s for s in calls}.values()
        )

    @property
    def is_within_streams(self) -> bool:
        """Whether every call that counts reads the stream that it updates, and no other."""
        return all(map(is_self_attention, self.calls_into()))

    @property
    def has_cross_attention(self) -> bool:
        """Whether a call that counts reads other streams alone."""
        return any(map(is_cross_attention, self.calls_into()))

    # ------------------------------------------------------------------------ maps and gradients
    def attention_gradient(self, block: Block) -> Tensor:
        """d objective / d A, (B, F, H, q', k'); zeros where the objective does not depend on A."""
        gradient = self.backward.gradients.get(block.call)
        if gradient is not None:
            return block.map_gradient(gradient)
        call = block.call
        shape = (self.batch, call.windows, call.heads, block.n_q, block.n_k)
        return torch.zeros(shape, dtype=self.like.dtype, device=call.q.device)

    def attention_relevance(self, block: Block) -> Tensor:
        """R_A, the relevance of A, (B, F, H, q', k'); zeros where none arrives at the call.

        R_A = c A ∘ (sd(R_O, A V) V^T) with R_O what arrives at the call's output, c = 1/2, or 1
        where A or V is no activation.
        """
        call, attention = block.call, block.attention()
        arriving = self.backward.relevances.get(call)
        if arriving is None:
            return torch.zeros_like(attention)
        values, operators = block.values(), self.observation.operators
        assert operators is not None
        scored = operators.is_activation(call.q) or operators.is_activation(call.k)
        share = 0.5 if scored and operators.is_activation(call.v) else 1.0
        outputs = quotient(block.output_rows(arriving), attention @ values)
        return (outputs @ values.mT).mul_(attention).mul_(share)

    def has_gradient(self, call: AttentionCall) -> bool:
        """Whether the objective depends on a call at all."""
        return self.backward.gradients.get(call) is not None

    def gradient_at(self, edge: GradientEdge | None) -> Tensor | None:
        """d objective / d the tensor at a place in the graph, of methods with `keeps_graph`."""
        return self.gradients_at([edge])[0]

    def gradients_at(self, edges: Sequence[GradientEdge | None]) -> list[Tensor | None]:
        """`gradient_at` of several places, from one backward pass."""
        return self.backward.gradients_at(edges)

    @property
    def queries_per_block(self) -> QueriesPerBlock:
        """How many queries of a call are in a block."""
        return queries_per_block(self.batch, self.options.block_size)

    def blocks(self, call: AttentionCall) -> Iterator[Block]:
        """All queries of a call, block by block."""
        return iter(all_blocks(call, self.queries_per_block))

    def full_rule(self, call: AttentionCall, rule: Rule) -> LinearRule:
        """A rule for all queries of a call, formed block by block."""
        # the matrices of R stay where the first layer is
        return full_rule(call, rule, self.queries_per_block).to(self.like.device)

    def full_map(self, call: AttentionCall, form: Callable[[Block], Tensor]) -> Tensor:
        """`form` of every block of a call, (B, F, q', k'), put together: (B, F, q, k)."""
        read = self.full_rule(call, lambda block: LinearRule(0.0, form(block))).read
        assert read is not None
        return read

    # ------------------------------------------------------------------------ the matrix form
    def out_of_reach(self, step: Step) -> BlockRow:
        """R, from before a call, for the sources that the call does not bring, nor ever could.

        A cross-attention to a stream could have brought whatever that stream reads at some time.
        """
        read = {
            source.key_state.stream
            for source in self.attention_states
            if is_cross_attention(step.state) and source.stream == step.state.key_state.stream
        }
        return {
            source: rows
            for source, rows in step.before.items()
            if source not in step.brought and source.name not in read
        }

    def mask_later_rows(self, state: State, after: BlockRow, before: BlockRow) -> BlockRow:
        """R of `state` after a call, but as before it in rows behind the one that is read."""
        last_rows = self.backward.last_rows
        if state.stream not in last_rows:
            return after
        behind = torch.arange(state.n, device=self.like.device) > last_rows[state.stream]
        return {
            source: torch.where(behind[..., None], before.get(source, torch.zeros_like(rows)), rows)
            for source, rows in after.items()
        }

    # ------------------------------------------------------------------------ several targets
    def cached(self, key: Any, make: Callable[[], Made]) -> Made:
        """What no target changes: made once for all of them, and not kept for a single one."""
        if self.shared is None:
            return make()
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What all blocks of this target have in common: made with the first that asks for it."""
        if key not in self.notes:
            self.notes[key] = make()
        return self.notes[key]

    def share(self) -> None:
        """Makes the run one of several: A of the fused calls is formed once, if it fits."""
        self.shared, left = {}, KEPT_MAPS
        for call in (s.call for s in self.attention_states if self.counts(s.call)):
            dtype = working_dtype(call.q.dtype)
            size = math.prod(call.lead) * call.n_q * call.n_k * dtype.itemsize
            if call.weights is None and size <= left:
                q, k = call.q.detach().to(dtype), call.k.detach().to(dtype)
                mask = None if call.mask is None else call.mask.detach()
                call.weights = attention_map(q, k, mask, call.is_causal, call.scale)
                left -= size
