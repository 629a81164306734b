"""Methods that run the model on masked copies of the inputs, and read off what is explained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_attn import objectives
from captum_attn._checks import whole
from captum_attn.attr._base import AttentionAttribution, Relevance, Run
from captum_attn.attr._blocks import UNCHANGED
from captum_attn.attr._inputs import Inputs
from captum_attn.attr._progress import with_progress
from captum_attn.attr._propagate import initial_block, relevance_rows
from captum_attn.errors import OptionError, TargetError
from captum_attn.objectives import Objective
from captum_attn.observe.streams.states import Source, State


class MaskingMethod(AttentionAttribution):
    """Base of these methods: what is explained is a class's probability."""

    @dataclass(frozen=True, kw_only=True)
    class Options(AttentionAttribution.Options):
        perturbations_per_eval: int = 1
        show_progress: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            whole("perturbations_per_eval", self.perturbations_per_eval, least=1)

    needs_gradient = False

    def default_objective(self) -> Objective:
        return probability

    def measured(
        self,
        run: Run[Any],
        count: int,
        copy: Callable[[int, int], tuple[Inputs, AbstractContextManager | None]],
        size: int,
    ) -> Tensor:
        """What is explained on `count` masked copies of the batch, (B, count).

        Args:
            copy (callable): (first, last) -> the copies in this range, one after the other, and
                what is done to the model meanwhile.
            size (int): how many copies run at a time.
        """
        values = [run.like.new_zeros(0, run.batch)]  # without a mask there is nothing to run
        for first in with_progress(range(0, count, size), self.get_name(), run.options):
            last = min(first + size, count)
            inputs, during = copy(first, last)
            values.append(run.value_on(inputs, last - first, during).view(last - first, run.batch))
        return torch.cat(values).mT.to(run.like)

    def relevance_maps(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the model is a black box behind the masks."""
        raise OptionError(
            f"{self.get_name()} measures the output, so that it has no matrices of tokens by "
            "tokens: expected a call of `attribute` or `attribute_tokens`"
        )

    def layer_maps(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the model is a black box behind the masks."""
        raise OptionError(
            f"{self.get_name()} makes nothing of the attention maps: expected a call of "
            "`attribute` or `attribute_tokens`"
        )


def probability(output: Tensor, target: Any = None) -> Tensor:
    """`objectives.probability`, where there is more than one class."""
    if output.ndim < 2 or output.shape[-1] == 1:
        raise TargetError(
            f"the probability of one output among {tuple(output.shape)} is always 1: expected "
            "scores of several classes; pass objective=objectives.logit for a single score"
        )
    return objectives.probability(output, target)


def of_source(run: Run[Any], state: State, source: Source, rows: Tensor) -> Tensor:
    """Vectors of a later state's tokens, (B, n, D), on the source's tokens that are in them."""
    held = initial_block(state, run.like)
    if held is None or source.name != state.stream:
        return rows.new_zeros(len(rows), source.n, rows.shape[-1])
    whole = held.sum(1)[..., None]
    return (held.mT.to(rows) @ rows) / torch.where(whole == 0, 1, whole).to(rows)


def tokens_of(run: Run[Any], rows: dict[State, Tensor]) -> Relevance:
    """Rows (B, n) of later states, on the sources' tokens, as without attention."""
    return relevance_rows(rows, lambda block: UNCHANGED, run.queries_per_block)


def generators(seed: int, count: int) -> Iterator[torch.Generator]:
    """One for each example, alike, so that an example has the same numbers in a batch and alone."""
    return (torch.Generator().manual_seed(seed) for _ in range(count))


def rows_of(
    given: Mapping[str, Any], axes: Mapping[str, int], part: slice, batch: int
) -> Mapping[str, Any]:
    """Options, with the rows of some examples of those that have a row for each.

    Args:
        axes (Mapping): name of an option -> its number of axes where it has one.
    """
    found = dict(given)
    for name, count in axes.items():
        value = given.get(name)
        if isinstance(value, Tensor) and value.ndim == count and len(value) == batch:
            found[name] = value[part]
    return found
