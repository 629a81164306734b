"""Metrics as an evaluation takes them: what is kept of every example, and what it amounts to.

A mean over the data set is one thing that it may amount to. Others, such as the mean IoU of the
classes, are functions of several means: of intersections and unions, whose ratio is taken at the
end. So what is kept of an example never depends on its batch, and nothing is averaged early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from captum_attn import metrics
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation.batches import Batch
from captum_attn.evaluation.methods import Method

__all__ = ["Alone", "Column", "Metric", "Randomization", "Situation", "SpansMetric"]

Means = Mapping[str, np.ndarray]  # name -> (R, ...), the means over a data set, R data sets
HIGHER, LOWER = "higher", "lower"
TURNING = ("order", "insert")  # options that turn round what is better


class Situation(NamedTuple):
    """What a metric may look at.

    Attributes:
        model (callable): the model.
        batch (Batch): the examples.
        target (any): what is explained, and followed by the metrics that perturb.
        method (Method): what explained them.
        attributions (any): the explanation.
    """

    model: Callable
    batch: Batch
    target: Any
    method: Method
    attributions: Any


class Column(NamedTuple):
    """One number of a data set.

    Attributes:
        of (str or callable): the name of what was kept, whose mean it is; or a function of the
            means of all that was kept: {name: (R, ...)} -> (R,).
        better ("higher", "lower" or None): which way is better.
    """

    of: str | Callable[[Means], np.ndarray]
    better: str | None = None

    def value(self, means: Means) -> np.ndarray:
        """The number for each of R data sets, (R,)."""
        found = means[self.of] if isinstance(self.of, str) else self.of(means)
        return np.asarray(found, dtype=np.float64).reshape(len(found))


@dataclass(frozen=True)
class Metric:
    """A measure of attributions.

    Args:
        function (callable): in Captum's style, (forward_func, inputs, attributions, target,
            additional_forward_args, **options), or with `truth` (attributions, truth, **options);
            it returns a tensor (B, ...), or several by name (a Mapping or a dataclass).
        columns (Mapping): name -> Column. Default: the mean of the one tensor.
        truth (str, optional): what it compares with: an entry of `Batch.truth`.
        options (Mapping): of the function.
        perturbs (bool): whether it takes the options of `perturbation_curve`.
        shared (Mapping): options of all metrics that perturb; `options` go first.
        entry (str or int, optional): which of several attributions `truth` is for.

    Examples::

        >>> Metric(energy_inside, {"value": Column("value", "higher")}, truth="masks")
    """

    function: Callable[..., Any]
    columns: Mapping[str, Column] = field(default_factory=lambda: {"value": Column("value")})
    truth: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    perturbs: bool = False
    entry: str | int | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)

    def better(self, column: str) -> str | None:
        """Which way is better; the least relevant first, or inserting, turns it round."""
        way, given = self.columns[column].better, {**self.shared, **self.options}
        turned = (given.get("order") == "least") != bool(given.get("insert"))
        if not self.perturbs or not turned or way is None:
            return way
        return LOWER if way == HIGHER else HIGHER

    def found(self, situation: Situation) -> Any:
        """What the function returns."""
        if self.truth is not None:
            return self._against_truth(situation)
        batch, options = situation.batch, dict(self.options)
        if self.perturbs:
            turning = [name for name in TURNING if name in batch.options]
            if turning:
                raise InputError(
                    f"a batch has the option {turning[0]!r}, which turns round what is better, so "
                    "it cannot be of some batches only: give it to the metric, or as perturbation="
                )
            options = {**self.shared, **batch.options, **self.options}
        return self.function(
            situation.model, batch.inputs, situation.attributions, situation.target,
            batch.additional_forward_args, **options,
        )  # fmt: skip

    def _against_truth(self, situation: Situation) -> Any:
        batch, attributions = situation.batch, situation.attributions
        truth = batch.truth.get(self.truth or "")
        if truth is None:
            raise InputError(
                f"the data set has no {self.truth!r}: its examples are (inputs, label, "
                f"{self.truth}), or Mappings with an entry {self.truth!r}"
            )
        if self.entry is not None:
            attributions = attributions[self.entry]
        if self.truth != "rationales":
            return self.function(attributions, truth, **self.options)
        return self.function(attributions, truth, _counted(batch), **self.options)

    def kept(self, situation: Situation) -> dict[str, np.ndarray]:
        """What is kept of every example, {name: (B, ...)}; refuses what is not finite."""
        found = self.found(situation)
        if isinstance(found, Tensor):
            found = {"value": found}
        elif not isinstance(found, Mapping):
            found = getattr(found, "__dict__", {})
        kept = {k: v.detach().cpu().numpy() for k, v in found.items() if isinstance(v, Tensor)}
        size = len(situation.batch)
        for name, values in kept.items():
            if not values.ndim or len(values) != size:
                raise InputError(
                    f"expected {name!r} for each of {size} examples, got the shape {values.shape}"
                )
            bad = np.flatnonzero(~np.isfinite(values.reshape(size, -1)).all(1))
            if bad.size:
                raise InputError(f"example {bad[0]} got NaN or infinity as its {name!r}")
        needed = {column.of for column in self.columns.values() if isinstance(column.of, str)}
        if not kept or needed - set(kept):
            raise InputError(
                f"expected a tensor with one value per example, or a Mapping of them with "
                f"{sorted(needed)}, got {list(found) or type(found).__name__}"
            )
        return kept


def _counted(batch: Batch) -> Any:
    """Which tokens count, (B, n), if the data set or the tokenizer says so."""
    counted = batch.truth.get("rationale_mask")
    if counted is None and isinstance(batch.inputs, Mapping):
        counted = batch.inputs.get("attention_mask")
    return counted


class Alone(Metric):
    """A measure of the attributions alone, of tokens that count."""

    def found(self, situation: Situation) -> Any:
        attributions = situation.attributions
        if self.entry is not None:
            attributions = attributions[self.entry]
        (only, *_) = attributions.values() if isinstance(attributions, Mapping) else [attributions]
        counted = _counted(situation.batch)
        tokens = isinstance(counted, Tensor) and isinstance(only, Tensor)
        fits = tokens and only.ndim < 4 and only.shape[:2] == counted.shape
        return self.function(attributions, *([counted] if fits else []), **self.options)


class SpansMetric(Metric):
    """Precision and recall of spans, as ERASER's number of a data set is made of their means."""

    def found(self, situation: Situation) -> Any:
        return Metric(
            metrics.rationale_spans, truth=self.truth, options=self.options, entry=self.entry
        ).found(situation)  # fmt: skip


class Randomization(Metric):
    """Likeness of the attributions to those of a model without what it learned."""

    def found(self, situation: Situation) -> Tensor:
        batch, method = situation.batch, situation.method
        if not hasattr(method.source, "attribute"):
            raise OptionError("parameter_randomization needs a method with an `attribute`")
        return self.function(
            method.source, batch.inputs, situation.target, batch.additional_forward_args,
            attributions=situation.attributions, model=situation.model,
            **{**method.options, **self.options},
        ).similarity.mean(1)  # fmt: skip
