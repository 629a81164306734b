"""`evaluate`: every method, every metric, every batch, once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from captum._utils.progress import NullProgress, progress
from torch import Tensor, nn

from captum_attn._checks import FAILURES, callable_of, flag, number, shown, shown_error, whole
from captum_attn.errors import AttnError, InputError, OptionError, TargetError
from captum_attn.evaluation.batches import Batch, BatchSource
from captum_attn.evaluation.fingerprint import Describer
from captum_attn.evaluation.log import Log, finished_batches, only_writer
from captum_attn.evaluation.measures import Metric, Situation, metrics_of
from captum_attn.evaluation.methods import Method, methods_of, own_randomness
from captum_attn.evaluation.processes import Processes, processes
from captum_attn.evaluation.results import Results, gathered
from captum_attn.evaluation.settings import versions
from captum_attn.metrics.shared import Model, checked_target, predicted
from captum_attn.objectives import logit

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
    callable_of("model", model, "a model or a callable that runs one")
    if isinstance(model, nn.Module) and model.training:
        raise OptionError("the model is in train mode, so its outputs are random: call .eval()")
    flag("resume", resume), flag("show_progress", show_progress)
    if resume and out is None:
        raise OptionError("resume: there is nothing to go on with unless out= names a directory")
    if isinstance(target, str) and target not in ("label", "predicted"):
        raise OptionError(
            f"target: expected 'label', 'predicted' or a Captum target, got {shown(target)}"
        )
    seed, resamples = whole("seed", seed, 0, 2**63 - 1), whole("resamples", resamples)
    number("confidence", confidence, 0, 1, open_ends="()")
    folder = None if out is None else _folder(out)
    source = BatchSource(dataset, batch_size, collate_fn, limit)
    explained = methods_of(methods, model)
    measured = metrics_of(metrics, perturbation)
    work = _Work(model, explained, measured, target, perturbation or {}, seed)
    settings = _settings(work, source, warn=folder is not None)
    with processes() as own, ExitStack() as held:
        done = _finished(own, settings, folder, resume, source.count, held)
        visible = show_progress and not own.rank
        records = _records(work, source, settings, own, folder, done, visible)
        if not records:
            raise InputError("the data set is empty: expected at least one example")
        names = [method.name for method in explained]
        kept, groups = gathered(records, names, list(measured))
        results = Results(
            names, measured, kept, groups, settings, confidence, resamples, seed
        )  # fmt: skip
        if folder is not None and own.rank == 0:
            results.write(folder)
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
        where = f"batch {number}, whose example 0 is example {first} of the data set"
        with _naming(where):
            if isinstance(self.model, nn.Module):
                place = next(self.model.parameters(), torch.zeros(0))
                batch = batch.to(place.device)
            target = _target(self.model, batch, self.target, first)
        kept: dict[str, dict[str, Any]] = {}
        for method in self.methods:
            with _naming(f"{method.name}, {where}"), own_randomness(self.seed, number, method.name):
                attributions = method.explain(batch, target, first)
            situation = Situation(self.model, batch, target, method, attributions)
            kept[method.name] = {}
            for name, metric in self.metrics.items():
                of = f"{method.name}, {name}, {where}"
                with _naming(of), own_randomness(self.seed, number, method.name, name):
                    found = metric.kept(situation)
                kept[method.name][name] = {k: v.tolist() for k, v in found.items()}
        groups = None if batch.groups is None else [str(g) for g in batch.groups]
        return {"batch": number, "first": first, "size": len(batch), "groups": groups,
                "data": batch.fingerprint(), "kept": kept}  # fmt: skip


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says in an error where it came up; what others raise becomes an error of ours."""
    try:
        yield
    except AttnError as error:
        raise type(error)(f"{where}: {error}") from error
    except FAILURES as error:  # of a method, a metric or a model that is not of this package
        raise InputError(
            f"{where}: {shown_error(error)}; look at its options and at what it is given"
        ) from error


def _target(model: Callable, batch: Batch, target: Any, first: int) -> Any:
    """What is explained of a batch; refuses labels that the model has no output for."""
    with torch.no_grad():
        known = Model.of(model, batch.inputs, batch.additional_forward_args)
        output = known(torch.arange(len(batch)), {}, {})
    if not output.isfinite().all():
        bad = (~output.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise InputError(f"the model's output of example {first + bad[0]} has NaN or infinity")
    if isinstance(target, str):
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
    checked_target(target, len(batch))
    if target is not None and not isinstance(target, Tensor):
        logit(output, target)  # refused before the first method
    return target


def _check_classes(labels: Tensor, classes: int, first: int) -> None:
    bad = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if labels.is_floating_point() or bad:
        got = f"{labels[bad[0]].item()} for example {first + bad[0]}" if bad else labels.dtype
        raise TargetError(
            f"labels: expected whole numbers from 0 to {classes - 1}, as the model has {classes} "
            f"classes, got {got}"
        )


def _settings(work: _Work, source: BatchSource, warn: bool) -> dict[str, Any]:
    """What has to be the same for a run to be gone on with; warns of what cannot be compared."""
    describe, first = Describer(), source.first()
    settings = {
        "model": describe(work.model, "model"),
        "dataset": {
            "class": type(source.dataset).__name__,
            "examples": source.examples,
            "first": None if first is None else first.fingerprint(),
        },
        "methods": {m.name: describe([m.source, m.options], m.name) for m in work.methods},
        "metrics": {n: describe(vars(m), n) for n, m in work.metrics.items()},
        "target": describe(work.target, "target"),
        "perturbation": describe(work.perturbation, "perturbation"),
        "batch_size": source.batch_size,
        "limit": source.limit,
        "seed": work.seed,
        "versions": versions(),
    }
    if warn and describe.unknown:
        named = ", ".join(f"{where} ({kind})" for where, kind in describe.unknown.items())
        warnings.warn(
            f"resume cannot tell whether these are the same in another run: {named}; see to it "
            "yourself, or make them of numbers, tensors and functions",
            stacklevel=3,
        )
    return json.loads(json.dumps(settings))


def _folder(out: Any) -> Path:
    if not isinstance(out, (str, PathLike)) or not str(out) or "\0" in str(out):
        raise OptionError(f"out: expected a directory as str or Path, got {shown(out)}")
    return Path(out)


def _records(
    work: _Work,
    source: BatchSource,
    settings: Mapping[str, Any],
    own: Processes,
    folder: Path | None,
    done: dict[int, dict[str, Any]],
    show_progress: bool,
) -> dict[int, dict[str, Any]]:
    """Batch number -> record, of all processes; what was finished before is not done again."""
    log = None if folder is None else Log(folder, own.rank, settings)
    left = None if source.count is None else [b for b in range(source.count) if b not in done]
    mine = None if left is None else set(left[own.rank :: own.size])

    def wanted(number: int) -> bool:
        return number % own.size == own.rank if mine is None else number in mine

    if mine is not None:  # before anything is added to them
        share = sorted(done)[own.rank :: own.size]
        for number, first, batch in source.batches(share.__contains__):
            _compare(done[number], batch, first)
    total = None if mine is None else len(mine)
    bar = progress(desc="Evaluation", total=total) if show_progress else NullProgress()
    found = {}
    with bar:
        for number, first, batch in source.batches(wanted):
            if number in done:
                _compare(done[number], batch, first)
                continue
            found[number] = work.record(number, first, batch)
            if log is not None:
                log.append(found[number])
            bar.update(1)
    return done | {k: v for part in own.gather(found) for k, v in part.items()}


def _compare(record: Mapping[str, Any], batch: Batch, first: int) -> None:
    """Refuses a finished batch of other examples, labels or another order."""
    if record["data"] != batch.fingerprint():
        raise OptionError(
            f"batch {record['batch']} (from example {first} on) was made of other data: its "
            "examples, labels, masks or groups have changed, or their order, or they are drawn at "
            "random; take the data set that it was made of, or give another directory"
        )


def _finished(
    own: Processes,
    settings: Mapping[str, Any],
    folder: Path | None,
    resume: bool,
    batches: int | None,
    held: ExitStack,
) -> dict[int, dict[str, Any]]:
    """What earlier runs finished; where one process cannot go on, none does.

    The first process holds the folder until `held` is closed.
    """
    found: dict[int, dict[str, Any]] = {}
    problem: AttnError | None = None
    try:
        if folder is not None and own.rank == 0:
            held.enter_context(only_writer(folder))
        if folder is not None:
            found = finished_batches(folder, settings, resume, batches)
    except AttnError as error:
        problem = error
    everywhere = own.gather((found, problem))
    problem = problem or next((error for _, error in everywhere if error is not None), None)
    if problem is not None:
        raise problem
    return {number: record for part, _ in everywhere for number, record in part.items()}
