"""Metrics as an evaluation takes them: what is kept of every example, and what it amounts to.

A mean over the data set is one thing that it may amount to. Others, such as the mean IoU of the
classes, are functions of several means: of intersections and unions, whose ratio is taken at the
end. So what is kept of an example never depends on its batch, and nothing is averaged early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from captum_attn import metrics
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation.batches import Batch
from captum_attn.evaluation.methods import Method

__all__ = ["METRICS", "Column", "Metric", "Situation", "metrics_of"]

Means = Mapping[str, np.ndarray]  # name -> (R, ...), the means over a data set, R data sets
HIGHER, LOWER = "higher", "lower"


class Situation(NamedTuple):
    """What a metric may look at.

    Attributes:
        model (callable): the model.
        batch (Batch): the examples.
        target (any): what is explained, and followed by the metrics that perturb.
        method (Method): what explained them.
        attributions (any): the explanation.
        perturbation (Mapping): options that all metrics share that perturb.
    """

    model: Callable
    batch: Batch
    target: Any
    method: Method
    attributions: Any
    perturbation: Mapping[str, Any]


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

    def better(self, column: str) -> str | None:
        """Which way is better; the least relevant first, or inserting, turns it round."""
        way = self.columns[column].better
        turned = (self.options.get("order") == "least") != bool(self.options.get("insert"))
        if not self.perturbs or not turned or way is None:
            return way
        return LOWER if way == HIGHER else HIGHER

    def found(self, situation: Situation) -> Any:
        """What the function returns."""
        if self.truth is not None:
            return self._against_truth(situation)
        batch, shared = situation.batch, {}
        if self.perturbs:
            shared = {**situation.perturbation, **batch.options}
        return self.function(
            situation.model, batch.inputs, situation.attributions, situation.target,
            batch.additional_forward_args, **{**shared, **self.options},
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
        counted = batch.truth.get("rationale_mask")
        if counted is None and isinstance(batch.inputs, Mapping):
            counted = batch.inputs.get("attention_mask")
        return self.function(attributions, truth, counted, **self.options)

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


class _Randomization(Metric):
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


def _one(better: str) -> dict[str, Column]:
    return {"value": Column("value", better)}


def _perturbing(function: Callable, better: str, **options: Any) -> Metric:
    return Metric(function, _one(better), options=options, perturbs=True)


def _mean_iou(means: Means) -> np.ndarray:
    inside, union = means["intersection"], means["union"]  # (R, classes)
    # As in `Segmentation`: a class that is nowhere was predicted without a fault.
    return np.divide(inside, union, out=np.ones_like(union), where=union > 0).mean(-1)


_SEGMENTATION = {
    "pixel_accuracy": Column(lambda means: means["correct"] / means["labelled"], HIGHER),
    "mIoU": Column(_mean_iou, HIGHER),
    "mAP": Column("precision", HIGHER),
}

METRICS: dict[str, Metric] = {
    # the first of a function is its plain form
    "positive_auc": _perturbing(metrics.perturbation_auc, LOWER),
    "negative_auc": _perturbing(metrics.perturbation_auc, LOWER, order="least"),
    "perturbation_auc": _perturbing(metrics.perturbation_auc, LOWER),
    "token_removal_auc": _perturbing(metrics.token_removal_auc, LOWER),
    "aopc": _perturbing(metrics.aopc, HIGHER),
    "log_odds": _perturbing(metrics.log_odds, LOWER),
    "abpc": _perturbing(metrics.abpc, HIGHER),
    "deletion": _perturbing(metrics.deletion, LOWER),
    "insertion": _perturbing(metrics.insertion, HIGHER),
    "saco": _perturbing(metrics.saco, HIGHER),
    "comprehensiveness": _perturbing(metrics.comprehensiveness, HIGHER),
    "sufficiency": _perturbing(metrics.sufficiency, LOWER),
    "segmentation": Metric(metrics.segmentation, _SEGMENTATION, truth="masks"),
    "pointing_game": Metric(metrics.pointing_game, _one(HIGHER), truth="masks"),
    "energy_inside": Metric(metrics.energy_inside, _one(HIGHER), truth="masks"),
    "rationale_f1": Metric(metrics.rationale_f1, _one(HIGHER), truth="rationales"),
    "rationale_iou_f1": Metric(metrics.rationale_iou_f1, _one(HIGHER), truth="rationales"),
    "rationale_auprc": Metric(metrics.rationale_auprc, _one(HIGHER), truth="rationales"),
    "parameter_randomization": _Randomization(metrics.parameter_randomization, _one(LOWER)),
}


def metrics_of(given: Any) -> dict[str, Metric]:
    """The metrics by the names that the table gives them.

    Args:
        given (str, callable, Metric, a pair of one and its options; a sequence or a Mapping of
            them): strings are names of `METRICS`.
    """
    if isinstance(given, (str, Metric)) or callable(given):
        given = [given]
    named: dict[str, Metric] = {}
    items = given.items() if isinstance(given, Mapping) else [(None, spec) for spec in given]
    for name, spec in items:
        found = _metric(spec)
        kind = spec[0] if isinstance(spec, tuple) else spec
        name = name or (kind if isinstance(kind, str) else getattr(found.function, "__name__", ""))
        if not name or name in named:
            raise OptionError(
                f"metrics: there are two named {name!r}; give them names: {{'name': metric, ...}}"
            )
        named[name] = found
    if not named:
        raise OptionError(f"metrics: expected at least one of {list(METRICS)}")
    return named


def _metric(spec: Any) -> Metric:
    if isinstance(spec, tuple):
        if len(spec) != 2 or not isinstance(spec[1], Mapping):
            raise OptionError(f"metrics: expected (metric, options), got {spec!r}")
        plain = _metric(spec[0])
        return replace(plain, options={**plain.options, **spec[1]})
    if isinstance(spec, Metric):
        return spec
    if isinstance(spec, str):
        if spec not in METRICS:
            raise OptionError(f"metrics: expected some of {list(METRICS)}, got {spec!r}")
        return METRICS[spec]
    if not callable(spec):
        raise OptionError(
            f"metrics: expected a name, a function or a Metric, got {type(spec).__name__}"
        )
    known = (m for m in METRICS.values() if m.function is spec and not m.options)
    return next(known, Metric(spec))
