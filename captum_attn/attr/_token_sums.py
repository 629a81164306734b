"""Methods that credit the tokens at every attention call, and multiply nothing over the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_attn.attr._base import AttentionAttribution, Relevance, Run
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._propagate import relevance_rows
from captum_attn.errors import OptionError
from captum_attn.observe.streams.states import State


class TokenSums(AttentionAttribution):
    """Base of these methods: a token of a later layer stands for the same token of the input."""

    def credits(self, run: Run[Any]) -> Mapping[State, Tensor]:
        """What is credited to the tokens of states, (B, n)."""
        raise NotImplementedError

    def relevance(self, run: Run[Any]) -> Relevance:
        return relevance_rows(self.credits(run), lambda block: UNCHANGED, run.queries_per_block)

    def relevance_maps(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: tokens are credited for the output, not for other tokens."""
        raise OptionError(
            f"{self.get_name()} credits the tokens of all layers for the output, so that it has no "
            "matrices of tokens by tokens: expected a call of `attribute`, `attribute_tokens` or "
            "`layer_maps`"
        )
