"""`evaluate`: every method, every metric, every batch, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captum._utils.progress import NullProgress, progress
from torch import Tensor, nn

from captum_attn.errors import AttnError, InputError, OptionError, TargetError
from captum_attn.evaluation.batches import Batch, Source
from captum_attn.evaluation.log import Log, finished_batches
from captum_attn.evaluation.measures import Metric, Situation, metrics_of
from captum_attn.evaluation.methods import Method, methods_of, own_randomness
from captum_attn.evaluation.processes import Processes, processes
from captum_attn.evaluation.results import Results, gathered
from captum_attn.evaluation.settings import described, digest, versions
from captum_attn.metrics.shared import Model, predicted

__all__ = ["evaluate"]


def evaluate(
    model: Callable,
    dataset: Any,
    methods: Any,
    metrics: Any,
    *,
    target: Any = "label",
    perturbation: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    collate_fn: Callable | None = None,
    limit: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    confidence: float = 0.95,
    resamples: int = 10_000,
    show_progress: bool = True,
) -> Results:
    r"""Methods side by side over a data set: every metric with its error, and which differ.

    With `out` every finished batch is appended to a file at once, so that a run that was killed
    goes on with `resume=True`. Under `torchrun` or `accelerate launch` (or in a process group of
    the caller's) every process takes its share of the batches, and all of them return the same
    results, which are those of one process: batches are the same, and what was kept of every
    example is put together before anything is averaged.

    Args:
        model (Module or callable): what is explained, in eval mode, as in Captum.
        dataset (Dataset, DataLoader, or sequence): of inputs, (inputs, label), (inputs, label,
            masks) or Mappings with an entry "labels" (and "masks", "rationales", "removable",
            "groups"; see `Batch`). `ImageFolder` and `TextFile` read files.
        methods (sequence or Mapping of names): Captum `Attribution` classes, objects with an
            `attribute`, functions (inputs, target, additional_forward_args) -> attributions, or
            pairs of one of them and its options. Classes are made with the model.
        metrics (sequence or Mapping of names): names of `METRICS`, functions in Captum's style
            that return a tensor per example, a `Metric`, or pairs of one of them and its options.
        target ("label", "predicted" or any): what is explained and followed: the data set's
            labels, the class that the model predicts, or one Captum target for all. Default:
            "label".
        perturbation (Mapping, optional): options that all metrics share that perturb, such as
            {"patch_size": 16, "perturbations_per_eval": 11}; see
            `captum_attn.metrics.perturbation_curve`. A metric's own go first.
        batch_size, collate_fn (optional): as of a DataLoader, which brings its own. Default: 8,
            torch's.
        limit (int, optional): the first examples only.
        seed (int): of methods that draw random numbers, and of the bootstrap. Default: 0.
        out (str or Path, optional): a directory for the batches and the results: results.json,
            results.csv, differences.csv, table.md.
        resume (bool): go on with what `out` has. Default: False, which refuses it.
        confidence (float): of the intervals. Default: 0.95.
        resamples (int): of the bootstrap. Default: 10,000.
        show_progress (bool): Default: True; in the first process only.

    Returns:
        Results: `print` shows the table.

    Raises:
        AttnError: one of its subclasses, naming the method, the metric and the examples; finished
            batches are kept.

    Examples::

        >>> results = captum_attn.evaluate(
        ...     model, dataset, [GenericAttention, RandomAttribution], ["aopc", "segmentation"],
        ...     out="results",
        ... )
        >>> print(results)
    """
    if isinstance(model, nn.Module) and model.training:
        raise OptionError("the model is in train mode, so its outputs are random: call .eval()")
    if resume and out is None:
        raise OptionError("resume: there is nothing to go on with unless out= names a directory")
    if not 0 < confidence < 1:
        raise OptionError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    source = Source(dataset, batch_size, collate_fn, limit)
    explained = methods_of(methods, model)
    measured = metrics_of(metrics)
    work = _Work(model, explained, measured, target, perturbation or {}, seed)
    settings = _settings(work, source)
    with processes() as own:
        records = _records(work, source, settings, own, out, resume, show_progress and not own.rank)
        if not records:
            raise InputError("the data set is empty: expected at least one example")
        names = [method.name for method in explained]
        kept, groups = gathered(records, names, list(measured))
        results = Results(
            names, measured, kept, groups, settings, confidence, resamples, seed
        )  # fmt: skip
        if out is not None and own.rank == 0:
            results.write(out)
    return results


@dataclass(frozen=True)
class _Work:
    """What is done to a batch; the arguments are those of `evaluate`."""

    model: Callable
    methods: list[Method]
    metrics: Mapping[str, Metric]
    target: Any
    perturbation: Mapping[str, Any]
    seed: int

    def record(self, number: int, first: int, batch: Batch) -> dict[str, Any]:
        """Everything that is kept of a batch, as JSON takes it."""
        if isinstance(self.model, nn.Module):
            place = next(self.model.parameters(), torch.zeros(0))
            batch = batch.to(place.device)
        where = f"batch {number}, whose example 0 is example {first} of the data set"
        target = _target(self.model, batch, self.target, first)
        kept: dict[str, dict[str, Any]] = {}
        for method in self.methods:
            with _naming(f"{method.name}, {where}"), own_randomness(self.seed, number, method.name):
                attributions = method.explain(batch, target, first)
            situation = Situation(
                self.model, batch, target, method, attributions, self.perturbation
            )
            kept[method.name] = {}
            for name, metric in self.metrics.items():
                of = f"{method.name}, {name}, {where}"
                with _naming(of), own_randomness(self.seed, number, method.name, name):
                    found = metric.kept(situation)
                kept[method.name][name] = {k: v.tolist() for k, v in found.items()}
        groups = None if batch.groups is None else [str(g) for g in batch.groups]
        return {"batch": number, "first": first, "size": len(batch), "groups": groups, "kept": kept}


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says in an error where it came up."""
    try:
        yield
    except AttnError as error:
        raise type(error)(f"{where}: {error}") from error


def _target(model: Callable, batch: Batch, target: Any, first: int) -> Any:
    """What is explained of a batch; refuses labels that the model has no output for."""
    with torch.no_grad():
        known = Model.of(model, batch.inputs, batch.additional_forward_args)
        output = known(torch.arange(len(batch)), {}, {})
    if not output.isfinite().all():
        bad = (~output.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise InputError(f"the model's output of example {first + bad[0]} has NaN or infinity")
    if isinstance(target, str):
        if target not in ("label", "predicted"):
            raise OptionError(
                f"target: expected 'label', 'predicted' or a Captum target, got {target!r}"
            )
        if target == "predicted":
            return predicted(output)
        target = batch.target
        if target is None:
            raise TargetError(
                "the data set has no labels: its examples are (inputs, label), or pass "
                "target='predicted', or one target for all"
            )
    if isinstance(target, Tensor) and target.ndim == 1 and output.ndim == 2:
        _check_classes(target, output.shape[1], first)
    return target


def _check_classes(labels: Tensor, classes: int, first: int) -> None:
    bad = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if labels.is_floating_point() or bad:
        got = f"{labels[bad[0]].item()} for example {first + bad[0]}" if bad else labels.dtype
        raise TargetError(
            f"labels: expected whole numbers from 0 to {classes - 1}, as the model has {classes} "
            f"classes, got {got}"
        )


def _settings(work: _Work, source: Source) -> dict[str, Any]:
    """What has to be the same for a run to be gone on with."""
    first = source.first()
    settings = {
        "model": described(work.model),
        "dataset": {
            "class": type(source.dataset).__name__,
            "examples": source.examples,
            "first": None if first is None else digest([first.inputs, dict(first.truth)]),
        },
        "methods": {m.name: described([m.source, m.options]) for m in work.methods},
        "metrics": {n: described([m.function, m.options]) for n, m in work.metrics.items()},
        "target": described(work.target),
        "perturbation": described(work.perturbation),
        "batch_size": source.batch_size,
        "limit": source.limit,
        "seed": work.seed,
        "versions": versions(),
    }
    return json.loads(json.dumps(settings))


def _records(
    work: _Work,
    source: Source,
    settings: Mapping[str, Any],
    own: Processes,
    out: str | Path | None,
    resume: bool,
    show_progress: bool,
) -> dict[int, dict[str, Any]]:
    """Batch number -> record, of all processes; what was finished before is not done again."""
    done = _finished(own, settings, out, resume)
    log = None if out is None else Log(Path(out), own.rank, settings)
    left = None if source.count is None else [b for b in range(source.count) if b not in done]
    mine = None if left is None else set(left[own.rank :: own.size])

    def wanted(number: int) -> bool:
        share = number % own.size == own.rank if mine is None else number in mine
        return share and number not in done

    total = None if mine is None else len(mine)
    bar = progress(desc="Evaluation", total=total) if show_progress else NullProgress()
    found = {}
    with bar:
        for number, first, batch in source.batches(wanted):
            found[number] = work.record(number, first, batch)
            if log is not None:
                log.append(found[number])
            bar.update(1)
    return done | {k: v for part in own.gather(found) for k, v in part.items()}


def _finished(
    own: Processes, settings: Mapping[str, Any], out: str | Path | None, resume: bool
) -> dict[int, dict[str, Any]]:
    """What earlier runs finished; where one process cannot go on, none does."""
    found: dict[int, dict[str, Any]] = {}
    problem: AttnError | None = None
    try:
        found = {} if out is None else finished_batches(Path(out), settings, resume)
    except AttnError as error:
        problem = error
    everywhere = own.gather((found, problem))
    problem = problem or next((error for _, error in everywhere if error is not None), None)
    if problem is not None:
        raise problem
    return {number: record for part, _ in everywhere for number, record in part.items()}
