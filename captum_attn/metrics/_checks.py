"""What an option or an input has to be: each check refuses early, and says what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import AttnError, InputError, OptionError

GAE_STEPS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def positive_int(name: str, value: Any, least: int = 1) -> int:
    """An option that is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return value


def number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, above: bool = False
) -> float:
    """An option that is a finite number from `least` (or above it) to `most`."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not least <= value <= most or (above and value == least):
        low = "" if least == -math.inf else f" above {least:g}" if above else f" from {least:g}"
        high = "" if most == math.inf else f" up to {most:g}"
        raise OptionError(f"{name}: expected a number{low}{high}, got {value!r}")
    return float(value)


def choice(name: str, value: Any, known: Collection[str], also: str = "") -> str:
    """An option that is one of some names."""
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name}: expected one of {list(known)}{also}, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """An option that is True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}: expected True or False, got {value!r}")
    return value


def a_callable(name: str, value: Any) -> Callable:
    """Something to call; a class is refused, because a call of it would only make an object."""
    if isinstance(value, type) or not callable(value):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise OptionError(f"{name}: expected a callable, got {got}")
    return value


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Says in an error of somebody else's what was being done."""
    try:
        yield
    except AttnError:
        raise
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError,
        OverflowError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = str(error).split("\n")[0][:300]
        raise InputError(f"{what}: {type(error).__name__}: {said}") from error


def known_options(given: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Refuses options that there are not."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise OptionError(f"{what} has no option {unknown[0]!r}: expected some of {sorted(known)}")


def a_tensor(name: str, value: Any) -> Tensor:
    """A dense tensor of real numbers that are there."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_complex() or value.is_quantized or value.layout != torch.strided or value.is_meta:
        raise InputError(
            f"{name}: expected a dense tensor of real numbers, got {value.dtype} on "
            f"{value.device} as {value.layout}: convert it first"
        )
    return value


def marks(name: str, value: Any) -> Tensor:
    """A tensor of marks or of a mask; NaN is no mark."""
    value = a_tensor(name, value)
    if value.is_floating_point() and not value.isfinite().all():
        raise InputError(f"{name}: expected finite marks, got NaN or infinity")
    return value


def attended(name: Any, mask: Tensor) -> Tensor:
    """An attention mask of 1 and 0, not of what is added to the scores."""
    mask = marks(f"attention mask {name!r}", mask)
    if mask.dtype != torch.bool and (mask < 0).any():
        raise InputError(
            f"attention mask {name!r}: expected 1 for tokens that are attended to and 0 for the "
            f"others, got {mask.min().item():g}: pass mask >= 0 where it is added to the scores"
        )
    return mask


def size(name: str, value: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    sides = list(value) if isinstance(value, (tuple, list, torch.Size)) else []
    if len(sides) != 2 or not all(
        isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides
    ):
        raise InputError(f"{name}: expected (height, width) in pixels, got {value!r}")
    return sides[0], sides[1]


def fractions_of(steps: int | Sequence[float] | str) -> Tensor:
    """The fractions removed, float64 (L,): `steps` equal steps from 0 to 1, or as they are."""
    if isinstance(steps, str) and steps == "gae":
        return torch.tensor(GAE_STEPS, dtype=torch.float64, device="cpu")
    if isinstance(steps, int):
        return (
            torch.arange(positive_int("steps", steps) + 1, dtype=torch.float64, device="cpu")
            / steps
        )
    try:
        levels = torch.as_tensor(steps, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        levels = torch.zeros(0, device="cpu")
    rising = levels.ndim == 1 and len(levels) and bool((levels[1:] > levels[:-1]).all())
    if not rising or not 0 <= float(levels[0]) <= float(levels[-1]) <= 1:
        raise OptionError(
            "steps: expected a number of steps, rising fractions from 0 to 1, or 'gae', got "
            f"{steps!r}"
        )
    return levels.cpu()
