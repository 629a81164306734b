"""A data set as numbered batches, the same whoever reads them and wherever one goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from captum_attn._checks import FAILURES, callable_of, shown, shown_error, whole
from captum_attn.errors import AttnError, InputError, OptionError
from captum_attn.evaluation.fingerprint import digest

__all__ = ["Batch", "BatchSource", "batch_of"]

MOST = 2**63 - 1
LABELS = ("labels", "label")
TRUTH = ("masks", "rationales", "rationale_mask")
OPTIONS = ("removable", "feature_mask")
GROUPS = "groups"
FORMS = (
    "expected inputs, (inputs, labels), (inputs, labels, masks) or a Mapping with an entry "
    "'labels'; for everything else a collate_fn that returns a captum_attn.evaluation.Batch"
)


@dataclass(frozen=True)
class Batch:
    """A batch as methods and metrics take it.

    Args:
        inputs (Tensor, tuple of Tensor, or Mapping of str to Tensor): the model's inputs.
        target (any, optional): the labels, in every form that Captum takes per example.
        additional_forward_args (any, optional): further positional arguments of the model.
        truth (Mapping): what people marked: "masks" (B, H, W), "rationales" (B, n) and
            "rationale_mask" (B, n), the tokens that count.
        options (Mapping): of this batch, for the metrics that perturb: "removable" (B, units),
            "feature_mask".
        groups (sequence, optional): B names of what is not independent, such as the image that
            two questions are about; whole groups are resampled. Default: every example is one.
    """

    inputs: Any
    target: Any = None
    additional_forward_args: Any = None
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[Any] | None = None

    def __len__(self) -> int:
        values = self.inputs
        if isinstance(values, Mapping):
            values = tuple(values.values())
        values = values if isinstance(values, tuple) else (values,)
        sizes = [len(v) for v in values if isinstance(v, Tensor) and v.ndim]
        if not sizes:
            raise InputError(f"a batch has no tensors as inputs: {FORMS}")
        return sizes[0]

    def fingerprint(self) -> str:
        """Equal for equal examples, labels, marks, options and groups in the same order."""
        return digest([vars(self)[name] for name in sorted(vars(self))])

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        return replace(self, **{name: _moved(v, device) for name, v in vars(self).items()})


def batch_of(raw: Any) -> Batch:
    """What a data set's collation gives, as a `Batch`."""
    if isinstance(raw, Batch):
        return _checked(raw)
    if isinstance(raw, Mapping):
        rest = dict(raw)
        found = [rest.pop(name) for name in LABELS if name in rest]
        marked = {name: rest.pop(name) for name in (*TRUTH, *OPTIONS, GROUPS) if name in rest}
        return _with(rest, found[0] if found else None, marked)
    if isinstance(raw, Tensor):
        return _with(raw, None, {})
    if not isinstance(raw, (tuple, list)) or not 1 <= len(raw) <= 3:
        raise InputError(f"a batch is {_named(raw)}: {FORMS}")
    inputs, target, marked = (*raw, None, None, None)[:3]
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    marked = {"masks": marked} if isinstance(marked, Tensor) else dict(marked or {})
    unknown = [name for name in marked if name not in (*TRUTH, *OPTIONS, GROUPS)]
    if unknown:
        raise InputError(f"a batch's third part has {unknown}: {FORMS}")
    return _with(inputs, target, marked)


def _with(inputs: Any, target: Any, marked: dict[str, Any]) -> Batch:
    if isinstance(target, list) and target and all(isinstance(t, Tensor) for t in target):
        # default_collate turns tuples of indices into one tensor per axis.
        target = list(zip(*(t.tolist() for t in target), strict=True))
    groups = marked.get(GROUPS)
    return _checked(
        Batch(
            inputs,
            target,
            truth={k: marked[k] for k in TRUTH if k in marked},
            options={k: marked[k] for k in OPTIONS if k in marked},
            groups=groups.tolist() if isinstance(groups, Tensor) else groups,
        )
    )


def _checked(batch: Batch) -> Batch:
    parts = {"labels": batch.target, **batch.truth, GROUPS: batch.groups}
    for name, value in parts.items():
        if isinstance(value, (Tensor, list)) and (not _sized(value) or len(value) != len(batch)):
            got = tuple(value.shape) if isinstance(value, Tensor) else len(value)
            raise InputError(f"{name}: expected one per example ({len(batch)}), got {got}")
    return batch


def _sized(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.ndim > 0


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    return tuple(_moved(v, device) for v in value) if isinstance(value, tuple) else value


def _named(value: Any) -> str:
    size = f" of {len(value)} parts" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{size}"


class BatchSource:
    """Numbered batches of a data set: batch b holds the examples from b * batch_size on.

    Args:
        dataset (Dataset, DataLoader, or sequence): a loader brings its batch size, its collation
            and its workers; the order is the data set's, whether it shuffles or not.
        batch_size (int, optional): Default: 8.
        collate_fn (callable, optional): Default: the data set's own `collate_fn`, else torch's.
        limit (int, optional): the first examples only.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = None,
        collate_fn: Callable | None = None,
        limit: int | None = None,
    ) -> None:
        self.workers, self.indices = 0, None
        drop_last = False
        if isinstance(dataset, DataLoader):
            if batch_size is not None or collate_fn is not None:
                raise OptionError(
                    "batch_size and collate_fn are the DataLoader's own: leave them out, or pass "
                    "its data set"
                )
            loader, dataset = dataset, dataset.dataset
            batch_size, collate_fn = loader.batch_size, loader.collate_fn
            self.workers, drop_last = loader.num_workers, loader.drop_last
            self.indices = _order(loader)
        for name, value in {"batch_size": batch_size, "limit": limit}.items():
            if value is not None:
                whole(name, value, 1, MOST)
        if collate_fn is not None:
            callable_of("collate_fn", collate_fn, "a callable: list of examples -> batch")
        self.dataset = dataset
        own = getattr(dataset, "collate_fn", None)
        self.collate_fn: Callable = collate_fn or own or default_collate
        self.batch_size, self.limit = batch_size or 8, limit
        self.streamed = isinstance(dataset, IterableDataset)
        known = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        known = known and not isinstance(dataset, (str, bytes, Mapping, type))
        if isinstance(dataset, Tensor):  # of examples, on its first axis
            known = dataset.ndim > 0 and not dataset.is_meta
        if not self.streamed and not known:
            raise InputError(
                "dataset: expected a torch Dataset, a DataLoader or a sequence of examples, got "
                f"{shown(dataset)}"
            )
        self.examples = None if self.streamed else self._size(drop_last)

    def _size(self, drop_last: bool) -> int:
        self.indices = range(len(self.dataset)) if self.indices is None else self.indices
        size = min(len(self.indices), self.limit or len(self.indices))
        size -= size % self.batch_size if drop_last else 0
        if not size:
            raise InputError("the data set is empty: expected at least one example")
        return size

    @property
    def count(self) -> int | None:
        """The number of batches; None for a data set without a length."""
        return None if self.examples is None else -(-self.examples // self.batch_size)

    def batches(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, Batch]]:
        """(number, first example, batch) of the batches that are wanted."""
        rng = torch.Generator()  # a loader's workers would be seeded by the global state
        if self.count is None:
            first = _First(self.dataset, self.limit)
            loader = DataLoader(first, self.batch_size, collate_fn=self.collate_fn, generator=rng)
            numbers: Iterable[int] = range(2**63)
        else:
            assert self.indices is not None and self.examples is not None
            numbers = [b for b in range(self.count) if wanted(b)]
            ends = [(b * self.batch_size, (b + 1) * self.batch_size) for b in numbers]
            rows = [[self.indices[i] for i in range(a, min(z, self.examples))] for a, z in ends]
            loader = DataLoader(
                self.dataset, batch_sampler=rows, collate_fn=self.collate_fn,
                num_workers=self.workers, generator=rng,
            )  # fmt: skip
        found = iter(loader)
        for number in numbers:
            start = number * self.batch_size
            try:
                raw = next(found)
            except StopIteration:
                return
            except (*FAILURES, OSError) as error:
                if isinstance(error, AttnError):
                    raise
                last = start + self.batch_size - 1
                last = last if self.examples is None else min(last, self.examples - 1)
                raise InputError(
                    f"examples {start} to {last} cannot be read, or do not make a batch: "
                    f"{shown_error(error)}"
                ) from error
            if wanted(number):
                yield number, start, batch_of(raw)

    def first(self) -> Batch | None:
        """The first example alone, by which a data set is told from another of its length."""
        if self.streamed or self.indices is None:
            return None
        try:
            return batch_of(self.collate_fn([self.dataset[self.indices[0]]]))
        except AttnError:
            raise
        except (*FAILURES, OSError) as error:
            raise InputError(f"example 0 cannot be read: {shown_error(error)}") from error


class _First(IterableDataset):
    """The first examples of a stream."""

    def __init__(self, stream: IterableDataset, limit: int | None) -> None:
        self.stream, self.limit = stream, limit

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.stream), self.limit)


def _order(loader: DataLoader) -> Sequence[int] | None:
    """The examples of a loader that picks some; None for all of them, in the data set's order."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise OptionError(
            "the DataLoader makes its batches by a sampler of its own, so they cannot be numbered "
            "and shared out: pass its data set, with batch_size= and collate_fn="
        )
    sampler = loader.sampler
    if isinstance(sampler, torch.utils.data.distributed.DistributedSampler):
        raise OptionError(
            "the DataLoader gives this process its share already, which evaluate does itself: "
            "leave the DistributedSampler out"
        )
    whole = isinstance(sampler, (RandomSampler, SequentialSampler))
    return None if whole else sorted(set(sampler))
