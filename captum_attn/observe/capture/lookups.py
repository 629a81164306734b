"""Rows of a table taken by ids: the ways beside `F.embedding` in which ids become vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SELECT = frozenset({torch.index_select, Tensor.index_select})
GATHER = frozenset({torch.gather, Tensor.gather, torch.take_along_dim, Tensor.take_along_dim})
SCATTER = frozenset({torch.scatter, Tensor.scatter, Tensor.scatter_})  # they make a one-hot
LOOKUPS = SELECT | GATHER | SCATTER | {Tensor.__getitem__}
IN_PLACE = frozenset(
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__".split()
)
_NODES = 64


def table_and_index(
    func: Callable, args: tuple, kwargs: dict
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The table and the ids of one of `LOOKUPS`; None where there is no table of floats."""
    table = args[0] if args else kwargs.get("input")
    if not isinstance(table, Tensor) or not table.is_floating_point():
        return None, None
    if func is Tensor.__getitem__:
        key = args[1] if isinstance(args[1], tuple) else (args[1],)
        found = [k for k in key if isinstance(k, Tensor) and k.dtype != torch.bool]
    else:
        given = [*args[1:], *kwargs.values()]
        found = [k for k in given if isinstance(k, Tensor) and not k.is_floating_point()]
    return (table, found[0]) if len(found) == 1 else (None, None)


def is_looked_up(out: Tensor, ids: Tensor) -> bool:
    """Whether a vector (or a number) was taken for each of the ids, in their order."""
    shape = ids.shape[:-1] if ids.shape[-1:] == (1,) and out.ndim == ids.ndim else ids.shape
    return out.shape[: len(shape)] == shape


def one_for_each_row(
    out: Tensor, ids: Tensor, origin: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The ids, one for each vector, where each was repeated along the vector's axis (`gather`)."""
    if ids.ndim < out.ndim or ids.ndim < 2 or origin is None:
        return ids, origin
    own = origin.view(ids.shape)
    if bool((own == own[..., :1]).all()):
        return ids[..., 0], own[..., 0].flatten()
    return ids, origin


def bag_of(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The ids and the table of `F.embedding_bag`, and what makes bags, (bags, D), of their rows."""
    ids = input.flatten()
    if input.ndim == 2:
        bags, number = torch.arange(len(input), device=ids.device), len(input)
        bags = bags.repeat_interleave(input.shape[1])
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        number = len(starts)
        places = torch.arange(len(ids), device=ids.device)
        bags = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    keep = torch.ones_like(ids, dtype=torch.bool) if padding_idx is None else ids != padding_idx

    def together(rows: Tensor) -> Tensor:
        rows = rows.reshape(len(ids), -1)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.flatten()[:, None]
        reduce = {"sum": "sum", "mean": "mean", "max": "amax"}[mode]
        made = rows.new_zeros(number, rows.shape[1])
        index = bags[keep][:, None].expand(-1, rows.shape[1])
        return made.scatter_reduce(0, index, rows[keep], reduce, include_self=False)

    return input, weight, together


def stems_from(tensor: Tensor, leaves: set[int]) -> bool:
    """Whether these leaves alone, and constants, went into a tensor, by a short way."""
    seen, queue = {tensor.grad_fn}, [tensor.grad_fn]
    for node in queue:
        variable = getattr(node, "variable", None)
        if (variable is not None and id(variable) not in leaves) or len(queue) > _NODES:
            return False
        for before, _ in node.next_functions if node is not None else ():
            if before is not None and before not in seen:
                seen.add(before)
                queue.append(before)
    return True
