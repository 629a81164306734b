"""Relevance of one target, and the ways to lay it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from captum._utils.common import _format_output, _format_tensor_into_tuples
from torch import Tensor

from captum_attn.attr._inputs import Inputs
from captum_attn.attr._leave_out import together
from captum_attn.attr._propagate import BlockRow, Relevance
from captum_attn.attr._run import Run
from captum_attn.attr._silence import check_heard, name_others
from captum_attn.attr._spread import check_spread
from captum_attn.errors import AttnError, InputError
from captum_attn.observe.streams.states import Source, State
from captum_attn.observe.streams.to_inputs import in_order, input_order, to_input


@dataclass
class Result:
    """Relevance of one target: of tokens, or of the inputs' own elements.

    Args:
        run (Run): the run.
        of_tokens (dict, optional): source -> relevance of its tokens, (B, n); None for a method
            that has none.
        of_elements (dict): name of an input -> relevance of its elements, of the input's shape; the
            inputs without an entry get that of their tokens.
        shows_calls (bool): whether single attention calls are shown, which may read no input.
        left_out (Mapping): reason ("sink", "self") -> source -> (B, n) bool, the tokens whose
            relevance was set to 0 (`leave_out`).
    """

    run: Run
    of_tokens: Relevance | None
    of_elements: Mapping[str, Tensor] = field(default_factory=dict)
    shows_calls: bool = False
    left_out: Mapping[str, Relevance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses relevance that overflowed on the way instead of handing out NaN."""
        named = {source.name: rows for source, rows in (self.of_tokens or {}).items()}
        for name, relevance in {**named, **self.of_elements}.items():
            if not bool(torch.isfinite(relevance).all()):
                raise AttnError(
                    f"the relevance of {name!r} has NaN or inf: expected gradients and maps that "
                    "are finite; run the model in float32 or float64 instead of half precision"
                )

    @property
    def sources(self) -> list[Source]:
        """The sources of relevance."""
        return self.run.observation.wiring.sources

    def rows_of(self, source: Source) -> Tensor:
        """(B, n), zeros for a source that nothing was read from."""
        rows = None if self.of_tokens is None else self.of_tokens.get(source)
        return self.run.like.new_zeros(self.run.batch, source.n) if rows is None else rows

    def tokens(self, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Stream name -> (B, n), in the order of the inputs.

        Args:
            inputs: as the user gave them; with them it is told which of them got nothing.
        """
        if self.of_tokens is None:
            raise AttnError(
                "the method gives relevance of the inputs' elements, not of tokens: expected a "
                "call of `attribute`; sum its attributions over the elements of a token"
            )
        batch = self.run.batch
        if inputs is not None:
            names = self.run.observation.names
            found = {name: self._of_its_tokens(name) for name in names}
            check_heard(self.run, found, inputs, self.shows_calls)
            check_spread(self.run, self.of_tokens)
        return {s.name: in_order(self.rows_of(s), input_order(s, batch)) for s in self.sources}

    def marks(self, inputs: Inputs) -> Any:
        """Where tokens were left out, bool, in the container and the shapes of the inputs."""
        masks = {s: mask.to(self.run.like) for s, mask in together(self.left_out).items()}
        of = Result(self.run, masks)
        if not masks:  # a method that explains elements may know no sources
            nowhere = {name: values * 0 for name, values in self.of_elements.items()}
            of = Result(self.run, None if self.of_tokens is None else {}, nowhere)
        found = {name: of._attribution(name, "nearest") for name in self.run.observation.names}
        if isinstance(inputs, Mapping):
            return {name: laid > 0 for name, laid in found.items() if laid is not None}
        laid = tuple(
            torch.zeros(x.shape, dtype=torch.bool, device=x.device) if r is None else r > 0
            for x, r in zip(_format_tensor_into_tuples(inputs), found.values(), strict=True)
        )
        return _format_output(isinstance(inputs, tuple), laid)

    def _of_its_tokens(self, name: str) -> Tensor | None:
        """The relevance of an input's tokens, (B, n of all its sources)."""
        sources = [s for s in self.sources if any(e.leaf.name == name for e in s.entries)]
        return torch.cat([self.rows_of(source) for source in sources], 1) if sources else None

    def attributions(self, inputs: Inputs, interpolation: str) -> Any:
        """Attributions in the container of the inputs, as `attribute` returns them."""
        names = self.run.observation.names
        found = {name: self._attribution(name, interpolation) for name in names}
        if all(laid is None for laid in found.values()):
            raise InputError(
                f"none of the inputs {list(found)} enters a token stream: expected at least one "
                "whose embedding or patches the attention reads; where the model cuts them off (a "
                "`detach`, `no_grad` or rounding in front of the first attention call), explain "
                "what it makes of them, as an input of the part behind it"
            )
        check_heard(self.run, found, inputs, self.shows_calls)
        name_others(inputs)
        check_spread(self.run, self.of_tokens)
        if isinstance(inputs, Mapping):
            return {name: laid for name, laid in found.items() if laid is not None}
        laid = tuple(
            torch.zeros(x.shape, dtype=self.run.like.dtype, device=x.device) if r is None else r
            for x, r in zip(_format_tensor_into_tuples(inputs), found.values(), strict=True)
        )
        return _format_output(isinstance(inputs, tuple), laid)

    def _attribution(self, name: str, interpolation: str) -> Tensor | None:
        """Attribution of the input `name`; None if it enters no token stream."""
        if name in self.of_elements or self.of_tokens is None:
            return self.of_elements.get(name)
        total = None
        for source in self.sources:
            for entry in source.entries:
                if entry.leaf.name == name and entry.of_input:
                    laid = to_input(entry, self.rows_of(source), interpolation)
                    total = laid if total is None else total + laid
        return total


def matrices_by_name(
    run: Run, last: Mapping[str, State], maps: Mapping[State, BlockRow]
) -> dict[tuple[str, str], Tensor]:
    """The matrices of streams, their tokens in the order of the inputs along both axes.

    Args:
        last (Mapping): stream name -> state.
        maps (Mapping): state -> R.

    Returns:
        dict: (row stream, source stream) -> (B, n_row, n_source).
    """
    orders = {s.name: input_order(s, run.batch) for s in run.observation.wiring.sources}
    return {
        (stream, source.name): in_order(
            in_order(block, orders[source.name]).mT, orders.get(stream)
        ).mT
        for stream, state in last.items()
        for source, block in maps[state].items()
    }
