"""The metrics that `evaluate` knows by name, and how a caller's own are told apart from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from captum_attn import metrics
from captum_attn._checks import shown
from captum_attn.errors import OptionError
from captum_attn.evaluation.metric import (
    HIGHER,
    LOWER,
    TURNING,
    Alone,
    Column,
    Means,
    Metric,
    Randomization,
    Situation,
    SpansMetric,
)
from captum_attn.metrics.shared import OPTIONS, known_options

__all__ = ["METRICS", "Column", "Metric", "Situation", "metrics_of"]


def _one(better: str) -> dict[str, Column]:
    return {"value": Column("value", better)}


def _perturbing(function: Callable, better: str, **options: Any) -> Metric:
    return Metric(function, _one(better), options=options, perturbs=True)


def _mean_iou(means: Means) -> np.ndarray:
    inside, union = means["intersection"], means["union"]  # (R, classes)
    # As in `Segmentation`: a class that is nowhere was predicted without a fault.
    return np.divide(inside, union, out=np.ones_like(union), where=union > 0).mean(-1)


def _f1_of_means(means: Means) -> np.ndarray:
    precision, recall = means["precision"], means["recall"]
    both = precision + recall
    return np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)


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
    "sensitivity_n": _perturbing(metrics.sensitivity_n, HIGHER),
    "segmentation": Metric(metrics.segmentation, _SEGMENTATION, truth="masks"),
    "pointing_game": Metric(metrics.pointing_game, _one(HIGHER), truth="masks"),
    "energy_inside": Metric(metrics.energy_inside, _one(HIGHER), truth="masks"),
    "top_k_intersection": Metric(metrics.top_k_intersection, _one(HIGHER), truth="masks"),
    "relevance_rank": Metric(metrics.relevance_rank, _one(HIGHER), truth="masks"),
    "sparseness": Alone(metrics.sparseness, _one(HIGHER)),
    "rationale_f1": Metric(metrics.rationale_f1, _one(HIGHER), truth="rationales"),
    "rationale_iou_f1": SpansMetric(
        metrics.rationale_iou_f1, {"value": Column(_f1_of_means, HIGHER)}, truth="rationales"
    ),
    "rationale_auprc": Metric(metrics.rationale_auprc, _one(HIGHER), truth="rationales"),
    "place_hit": Metric(metrics.place_hit, _one(HIGHER), truth="rationales"),
    "place_rank": Metric(metrics.place_rank, _one(LOWER), truth="rationales"),
    "place_share": Metric(metrics.place_share, _one(HIGHER), truth="rationales"),
    "parameter_randomization": Randomization(metrics.parameter_randomization, _one(LOWER)),
}


CURVES = (metrics.aopc, metrics.deletion, metrics.insertion, metrics.log_odds,
          metrics.perturbation_auc, metrics.token_removal_auc)  # fmt: skip


def metrics_of(given: Any, perturbation: Mapping[str, Any] | None = None) -> dict[str, Metric]:
    """The metrics by the names that the table gives them.

    Args:
        given (str, callable, Metric, a pair of one and its options; a sequence or a Mapping of
            them): strings are names of `METRICS`.
        perturbation (Mapping, optional): options of all of them that perturb.
    """
    shared = {} if perturbation is None else perturbation
    if not isinstance(shared, Mapping) or not all(isinstance(name, str) for name in shared):
        raise OptionError(
            f"perturbation: expected options by their names, got {shown(perturbation)}"
        )
    if isinstance(given, (str, Metric)) or callable(given) or _is_pair(given):
        given = [given]
    if not isinstance(given, (Mapping, list, tuple, set)):
        raise OptionError(f"metrics: expected some of {list(METRICS)}, got {type(given).__name__}")
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
        named[name] = replace(found, shared=shared) if found.perturbs else found
    if not named:
        raise OptionError(f"metrics: expected at least one of {list(METRICS)}")
    _check_shared(shared, named)
    return named


def _check_shared(shared: Mapping[str, Any], named: Mapping[str, Metric]) -> None:
    """Refuses a shared option that no metric that perturbs has, also where there is none."""
    known = {*OPTIONS, *TURNING, "steps"}
    for metric in named.values():
        if metric.perturbs:
            own = inspect.signature(metric.function).parameters.values()
            known |= {p.name for p in own if p.kind is p.KEYWORD_ONLY}
    known_options(shared, known, "perturbation")


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)


def _metric(spec: Any) -> Metric:
    if isinstance(spec, tuple):
        if len(spec) != 2 or not isinstance(spec[1], Mapping):
            raise OptionError(f"metrics: expected (metric, options), got {spec!r}")
        plain = _metric(spec[0])
        _check_options(plain, spec[1])
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


def _check_options(metric: Metric, options: Mapping[str, Any]) -> None:
    """Refuses options that a metric of the package does not have, before the work."""
    if metric.function not in {known.function for known in METRICS.values()}:
        return
    own = inspect.signature(metric.function).parameters.values()
    known = {p.name for p in own if p.kind is p.KEYWORD_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in own):
        known |= set(OPTIONS)
        if metric.function in CURVES:
            known |= {*TURNING, "steps"}
    known_options(options, known, metric.function.__name__)
