"""RawAttention: the attention map itself, the baseline of every paper in the field."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from captum_attn.attr._base import AttentionAttribution
from captum_attn.attr._blocks import Weigh, Weighed
from captum_attn.attr._propagate import (
    BlockRow,
    MatrixRule,
    add,
    is_cross_attention,
    linear,
    relevance_matrices,
    relevance_rows,
)
from captum_attn.attr._run import Run
from captum_attn.attr._settings import matches
from captum_attn.errors import OptionError
from captum_attn.observe.capture.attention_call import Block
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.streams.states import AttentionState, Source, State


class RawAttention(AttentionAttribution):
    r"""E_h A of the last attention call in the stream that the output reads.

    Class-agnostic: `target` only serves to find the rows that the output reads. The other streams
    get the last cross-attention map to each of them; where none of these is an input (the decoder
    of a Perceiver), every input gets 0, with a warning.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        layer (int, str or Module): another call: its place among the stream's calls (-1: the
            last), or the module or pattern of module names that it runs in. Default: -1.

    Examples::

        >>> RawAttention(model).attribute(images, layer=0).sum(1)   # (B, H, W)
    """

    options = {"layer": -1}
    needs_gradient = False

    @classmethod
    def get_name(cls) -> str:
        return "Raw Attention"

    def weigh_heads(self, run: Run, block: Block) -> Tensor:
        return block.attention()

    def relevance(self, run: Run) -> dict[Source, Tensor]:
        relevance: dict[Source, Tensor] = {}
        for state, weights in run.weights.items():
            for call in self._chosen(run, state):
                found = relevance_rows({state: weights}, self._through(run, call), run.at_once)
                for source, rows in found.items():
                    add(relevance, source, rows)
        if not any(source.entries for source in relevance):
            read = ", ".join(repr(state.stream) for state in run.weights)
            warnings.warn(
                f"the attention call of {read} that is shown reads learned tokens alone, so that "
                "every input gets 0; AttentionRollout and GenericAttention follow the tokens "
                "further down",
                stacklevel=3,
            )
        return relevance

    def maps(self, run: Run, last: Iterable[State]) -> dict[State, BlockRow]:
        found: dict[State, BlockRow] = {state: {} for state in last}
        for state, rows in found.items():
            for call in self._chosen(run, state):
                blocks = relevance_matrices([state], self._matrix_form(run, call), run.like)
                for source, block in blocks[state].items():
                    add(rows, source, block)
        return found

    def _through(self, run: Run, call: AttentionState) -> Weigh:
        """Tokens stay where they are below and above the call, and pass through it by A."""

        def weigh(update: AttentionState, block: Block) -> Weighed | None:
            return (0.0, self.weigh_heads(run, block).mean(2)) if update is call else None

        return weigh

    def _matrix_form(self, run: Run, call: AttentionState) -> MatrixRule:
        weigh = self._through(run, call)
        return lambda update, maps: linear(update, run.whole(update, weigh), maps)

    def _chosen(self, run: Run, state: State) -> list[AttentionState]:
        """The last call within the stream, and the last one to every other stream."""
        calls = [u for u in run.updates([state]) if u.stream == state.stream]
        layer = run.options["layer"]
        if isinstance(layer, (str, nn.Module)):
            calls = [
                u for u in calls if matches(u.call.module, layer, modules_of(self.forward_func))
            ]
            if not calls:
                raise OptionError(f"layer={layer!r} matches no attention call of {state.stream!r}")
            return calls[-1:]
        if isinstance(layer, bool) or not isinstance(layer, int) or not calls:
            raise OptionError(f"layer: expected an int, a module or a name pattern, got {layer!r}")
        if layer == -1:
            return list({_answering(u): u for u in calls}.values())
        if not -len(calls) <= layer < len(calls):
            raise OptionError(
                f"layer: expected an int in [-{len(calls)}, {len(calls)}), got {layer}"
            )
        return [calls[layer]]


def _answering(update: AttentionState) -> str:
    return update.key_state.stream if is_cross_attention(update) else update.stream
