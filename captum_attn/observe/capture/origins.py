"""Where numbers come from: which element of a given integer input is each id that is looked up?

Models shift, trim, window, offset, pad or prefix ids before they look them up. A *twin* of the
integer input, of the same values in float64 and with a gradient, goes wherever the ids go; autograd
then tells of every looked-up id the element that it was. Nothing is compared by value, so equal ids
are told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from captum_attn.observe.capture.tensor_notes import mapped, tensors

# These change values step by step, each in its place: their derivative says nothing.
STEPS = frozenset(
    "clamp clamp_ clip clip_ clamp_min clamp_max round floor ceil trunc div floor_divide "
    "__floordiv__ __rfloordiv__ __ifloordiv__ minimum maximum bitwise_and bitwise_or".split()
)
# The results of these are no elements of what they are made of, though they may have as many.
_OTHERS = (
    *("rand", "multinomial", "bernoulli", "arg", "unique", "bincount", "nonzero"),
    *("arange", "linspace", "full", "zeros", "ones", "empty", "eye"),
)
# These put something else in the place of some elements.
REPLACES = frozenset({"where", "masked_fill", "masked_fill_", "__setitem__"})
_EXACT = 1e-9


class Origins:
    """Follows integer inputs to where they are looked up."""

    def __init__(self) -> None:
        self._twins = WeakTensorKeyDictionary()
        self._first: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._first)

    def enter(self, name: str, given: Tensor) -> None:
        """Begins to follow an integer input."""
        with torch.inference_mode(False), torch.enable_grad():
            self._first[name] = given.detach().to(torch.float64).requires_grad_()
            self._twins[given] = self._first[name].clone()  # the model may write into its ids

    def followed(self, tensor: Tensor) -> bool:
        return self._twins.get(tensor) is not None

    def note(self, tensor: Tensor, like: Tensor) -> None:
        """`tensor` has the elements of `like`, each in its place."""
        self._twins[tensor] = self._twins.get(like)

    def follow(
        self, func: Callable, args: tuple, kwargs: dict, out: Any, by_value: bool = False
    ) -> None:
        """Does to the twins of the arguments what `func` has made `out` of.

        Args:
            by_value (bool): whether a condition among the arguments looks at the ids: an id that is
                replaced for its value (one out of the vocabulary) is still that id.
        """
        name = getattr(func, "__name__", "")
        made = [m for m in (out if isinstance(out, (tuple, list)) else (out,)) if _holds_ids(m)]
        known = [t for t in tensors((*args, *kwargs.values())) if self.followed(t)]
        if not made or not known or "out" in kwargs or any(word in name for word in _OTHERS):
            return
        if isinstance(args[0] if args else None, Tensor) and any(m is args[0] for m in made):
            self._twin_of_target(args[0])  # it is written into
        alone = len({id(t) for t in known}) == 1 and known[0].shape == made[0].shape
        if by_value and name in REPLACES and alone:
            self._twins[made[0]] = self._twins.get(known[0])
            return
        with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunction():
            again = self._again(func, args, kwargs, made)
        if isinstance(again, Tensor) or again is None:
            again = [again] * len(made)
        for one, twin in zip(made, again, strict=False):
            of_floats = isinstance(twin, Tensor) and twin.is_floating_point()
            if of_floats and twin.shape == one.shape and twin.requires_grad:
                self._twins[one] = twin

    def origin(self, ids: Tensor, name: str) -> Tensor | None:
        """The element of the input `name`, counted in order, that each of `ids` was.

        Returns:
            Tensor or None: (numel,), -1 for an id that was none (a prefix, padding) or is made of
            several; None if no id was one.
        """
        twin, first = self._twins.get(ids), self._first.get(name)
        if twin is None or first is None or not twin.requires_grad:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            # J t for an id's row of the Jacobian J, from v^T J: the gradient is linear in v.
            vector = torch.zeros_like(twin).requires_grad_()
            try:
                (pulled,) = torch.autograd.grad(twin, first, vector, True, True, allow_unused=True)
            except RuntimeError:  # a step without a derivative, or written over
                return None
            if pulled is None or not pulled.requires_grad:
                return None
            index = torch.arange(first.numel(), dtype=first.dtype, device=first.device) + 1
            share, sum_, squares = (
                torch.autograd.grad(pulled, vector, power.view_as(first), retain_graph=True)[0]
                for power in (torch.ones_like(index), index, index.square())
            )
        # One element i of weight w: J 1 = w, J i = w i, J i² = w i².
        alone = (squares * share - sum_.square()).abs() <= _EXACT * sum_.square()
        element = (sum_ / torch.where(share == 0, 1, share)).round().long() - 1
        element = torch.where(alone & (share != 0), element, -1).flatten()
        return element if bool((element >= 0).any()) else None

    def _again(self, func: Callable, args: tuple, kwargs: dict, made: list[Tensor]) -> Any:
        """`func` of the twins; where floats cannot do it, the twin of what stays in its place."""
        name = getattr(func, "__name__", "")
        known = [t for t in tensors((*args, *kwargs.values())) if self.followed(t)]
        first = self._twins.get(known[0])
        writes = name == "__setitem__" or any(args and out is args[0] for out in made)
        for replaced in () if name in STEPS else (known, known[:1]):
            try:
                again = self._of_twins(func, args, kwargs, replaced, copied=not writes)
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                continue
            if name == "__setitem__":
                return self._twins.get(args[0])
            integer = isinstance(again, Tensor) and not again.is_floating_point()
            if integer and again.shape == first.shape and torch.equal(again.to(first), first):
                return first  # a cast
            return again
        return first  # `ids // 2`, `table[ids]`: each stays in its place

    def _of_twins(
        self, func: Callable, args: tuple, kwargs: dict, replaced: list[Tensor], copied: bool
    ) -> Any:
        """`func` of the twins of some arguments.

        Of copies, because what the graph holds must not be written into later; of the twins
        themselves where the result is a view, through which ids may be written.
        """
        twins = {id(t): self._twins.get(t) for t in replaced}
        used = {key: twin.clone() for key, twin in twins.items()} if copied else twins

        def twin(value: Any) -> Any:
            return used.get(id(value), value)

        again = func(*mapped(twin, args), **{n: mapped(twin, v) for n, v in kwargs.items()})
        made = again if isinstance(again, (tuple, list)) else (again,)
        if copied and any(isinstance(m, Tensor) and m._is_view() for m in made):
            return self._of_twins(func, args, kwargs, replaced, copied=False)
        return again

    def _twin_of_target(self, target: Tensor) -> None:
        """Makes sure that there is a twin of what ids are written into, a view or not."""
        if self.followed(target):
            return
        base = target._base if target._is_view() else None
        if base is None or not base.is_contiguous() or target.dtype != base.dtype:
            self._twins[target] = target.detach().to(torch.float64)
            return
        if not self.followed(base):
            self._twins[base] = base.detach().to(torch.float64)
        size, stride = target.size(), target.stride()
        self._twins[target] = self._twins.get(base).as_strided(
            size, stride, target.storage_offset() - base.storage_offset()
        )


def _holds_ids(made: Any) -> bool:
    return (
        isinstance(made, Tensor)
        and not made.is_floating_point()
        and not made.is_complex()
        and made.dtype != torch.bool
    )
