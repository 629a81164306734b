"""The examples of a data set, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_attn._checks import finite, listed, scalar, shown, texts, whole
from captum_attn.errors import InputError
from captum_attn.metrics.shared import rows_of

__all__ = ["Example", "examples_of"]


class Example(NamedTuple):
    """One example.

    Attributes:
        inputs (tuple of Tensor): (1, ...), one for each feature, before its transforms.
        additional (tuple): further positional arguments of the model.
        label (int, optional): the right class.
        name (str): what it is called in the list. Default: its words, and its label.
    """

    inputs: tuple[Tensor, ...]
    additional: tuple[Any, ...]
    label: int | None
    name: str = ""


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
    try:
        batches = iter(dataset)
    except TypeError as problem:
        raise InputError(
            f"dataset: expected an iterable of Batch(inputs, labels), got {shown(dataset)}"
        ) from problem
    for batch in batches:
        inputs = getattr(batch, "inputs", None)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if not all(isinstance(value, Tensor) and value.ndim for value in inputs):
            raise InputError(
                "dataset: expected batches, Batch(inputs, labels) with tensors; got "
                f"{type(batch).__name__}"
            )
        for value in inputs:
            if value.layout != torch.strided or value.is_complex() or value.is_meta:
                raise InputError(f"dataset: expected dense real numbers, got {shown(value)}")
            if value.is_quantized:
                raise InputError(f"dataset: expected plain numbers, got {shown(value)}")
            finite("dataset: inputs", value, "look at what is read")
        if len(inputs) != count:
            raise InputError(
                f"dataset: expected {count} inputs in each batch, one for each feature, got "
                f"{len(inputs)}"
            )
        sizes = {len(value) for value in inputs}
        labels = getattr(batch, "labels", None)
        if labels is not None:
            labels = [_label(one) for one in listed("dataset: labels", labels, "whole numbers")]
        if len(sizes) > 1 or (labels is not None and {len(labels)} != sizes):
            raise InputError(
                "dataset: expected inputs and labels of as many examples, got inputs of "
                f"{[len(value) for value in inputs]} and "
                f"{'no' if labels is None else len(labels)} labels"
            )
        names = getattr(batch, "names", None)
        names = texts("dataset: names", names or [""] * len(inputs[0]), len(inputs[0]))
        more = getattr(batch, "additional_args", None)
        more = more if isinstance(more, tuple) else () if more is None else (more,)
        for i in range(len(inputs[0])):
            row, size = torch.tensor([i]), len(inputs[0])
            yield Example(
                tuple(value[i : i + 1] for value in inputs),
                tuple(rows_of(value, row, size) for value in more),
                None if labels is None else labels[i],
                names[i],
            )


def _label(value: Any) -> int:
    """A class; data sets give whole numbers as floats, too."""
    value = scalar(value)
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return whole("dataset: a label", value, -(2**63), error=InputError)
