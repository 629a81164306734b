"""The examples of a data set, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.metrics.shared import rows_of

__all__ = ["Example", "examples_of"]


class Example(NamedTuple):
    """One example.

    Attributes:
        inputs (tuple of Tensor): (1, ...), one for each feature, before its transforms.
        additional (tuple): further positional arguments of the model.
        label (int, optional): the right class.
    """

    inputs: tuple[Tensor, ...]
    additional: tuple[Any, ...]
    label: int | None


def examples_of(dataset: Iterable[Any], count: int) -> Iterator[Example]:
    """The examples of batches, computed one by one: a data set may be endless.

    Args:
        dataset (iterable of Batch): batches of this package or of Captum Insights.
        count (int): inputs that each has to have, one for each feature.

    Returns:
        iterator of Example

    Raises:
        InputError: for what is no batch, or does not fit the features.

    Examples::

        >>> next(examples_of([Batch(images, labels)], count=1)).inputs[0].shape
        torch.Size([1, 3, 224, 224])
    """
    for batch in dataset:
        inputs = getattr(batch, "inputs", None)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if not all(isinstance(value, Tensor) and value.ndim for value in inputs):
            raise InputError(
                "dataset: expected batches, Batch(inputs, labels) with tensors; got "
                f"{type(batch).__name__}"
            )
        if len(inputs) != count:
            raise InputError(
                f"dataset: expected {count} inputs in each batch, one for each feature, got "
                f"{len(inputs)}"
            )
        sizes = {len(value) for value in inputs}
        labels = batch.labels
        if len(sizes) > 1 or (labels is not None and {len(labels)} != sizes):
            raise InputError(
                "dataset: expected inputs and labels of as many examples, got inputs of "
                f"{[len(value) for value in inputs]} and "
                f"{'no' if labels is None else len(labels)} labels"
            )
        more = batch.additional_args
        more = more if isinstance(more, tuple) else () if more is None else (more,)
        for i in range(len(inputs[0])):
            row, size = torch.tensor([i]), len(inputs[0])
            yield Example(
                tuple(value[i : i + 1] for value in inputs),
                tuple(rows_of(value, row, size) for value in more),
                None if labels is None else int(labels[i]),
            )
