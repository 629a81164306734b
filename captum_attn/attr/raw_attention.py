"""RawAttention: the attention map itself, the baseline of every paper in the field."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from captum_attn.attr._base import AttentionAttribution, Block, Run
from captum_attn.attr._layers import calls_of_layer
from captum_attn.attr._results import Result
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.streams.states import AttentionState, State


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

    @dataclass(frozen=True)
    class Options(AttentionAttribution.Options):
        layer: int | str | nn.Module = -1

    needs_gradient = False

    @classmethod
    def get_name(cls) -> str:
        return "Raw Attention"

    def weigh_heads(self, run: Run[Options], block: Block) -> Tensor:
        return block.attention()

    def shown_calls(self, run: Run[Options], state: State) -> list[AttentionState]:
        return calls_of_layer(run, state, run.options.layer, modules_of(self.forward_func))

    def explain(self, run: Run[Options]) -> Result:
        return Result(run, self.relevance(run), shows_calls=True)
