"""Sums per example, where the batch may be folded with other axes, or stand behind another."""

from __future__ import annotations

from torch import Tensor

from captum_attn.errors import AttnError


class AmbiguousBatchError(AttnError):
    """Which axis holds the examples cannot be read off; they have to be run one at a time."""


def sums_per_example(tensor: Tensor, batch: int) -> Tensor:
    """The sum over each example, in a shape that broadcasts with the tensor.

    Raises:
        AmbiguousBatchError: if more than one axis may hold the examples, or none.
    """
    if batch == 1 or tensor.ndim == 0:
        return tensor.sum()
    same = [axis for axis, size in enumerate(tensor.shape) if size == batch]
    if len(same) == 1:
        return tensor.sum([a for a in range(tensor.ndim) if a != same[0]], keepdim=True)
    if not same and tensor.shape[0] % batch == 0:  # folded: the examples' heads or windows
        folded = tensor.reshape(batch, -1).sum(1)
        folded = folded.repeat_interleave(tensor.shape[0] // batch)
        return folded.view(-1, *[1] * (tensor.ndim - 1))
    raise AmbiguousBatchError(
        f"which axis of {tuple(tensor.shape)} holds the {batch} examples cannot be read off its "
        "sizes; explain one example at a time (internal_batch_size=1)"
    )
