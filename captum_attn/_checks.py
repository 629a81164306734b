"""What a person gives, checked in one place: what was expected, what was got, what to do.

Every check takes the option's name and its value, returns the value as the code wants it, and
raises an `AttnError` that names the option.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from captum_attn.errors import AttnError, InputError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FAILURES", "callable_of", "finite", "flag", "is_file", "is_folder", "listed", "mapping_of",
    "names_of", "number", "one_of", "plain",
    "scalar", "shown", "shown_error", "size_of", "suggested", "text", "texts", "way_out", "whole",
    "writing_to",
]  # fmt: skip

LONGEST = 80  # letters of a value in an error
# What Python and torch raise at values of a wrong kind or shape.
FAILURES = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError,
    NotImplementedError, AssertionError, MemoryError, RecursionError,
)  # fmt: skip
Kind = type[AttnError]


def is_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a Tensor; where nobody has imported torch yet, nothing is.

    The command line checks names with these functions before it waits for torch.
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def shown(value: Any) -> str:
    """A value as an error shows it: in a few words, whatever its `repr` does."""
    if is_tensor(value) and value.is_nested:  # it has no shape
        return f"a nested tensor of {value.dtype}"
    if is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and {value.dtype}"
    try:
        words = " ".join(repr(value).split())
    except Exception:  # the caller's own class may raise anything
        words = ""
    if not words or len(words) > LONGEST or " at 0x" in words:
        return f"{type(value).__name__}{size_of(value)}"
    return words.encode(errors="backslashreplace").decode()


def shown_error(error: BaseException) -> str:
    """The kind of another's error and the beginning of what it says, on one line."""
    words = " ".join(str(error).split())
    words = words if len(words) <= 2 * LONGEST else f"{words[: 2 * LONGEST]} ..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def size_of(value: Any) -> str:
    """``" of 3"`` for what has a length."""
    try:
        return f" of {len(value)}"
    except Exception:
        return ""


def scalar(value: Any) -> Any:
    """What a tensor or an array without axes holds; anything else as it is."""
    if (is_tensor(value) or isinstance(value, np.ndarray)) and value.ndim == 0:
        try:
            return value.item()
        except FAILURES:  # on "meta", or quantised
            return value
    return value


def suggested(value: Any, known: Collection[Any]) -> str:
    """``"; did you mean 'sign'?"`` where one of the known words is close."""
    words = [str(word) for word in known]
    near = get_close_matches(str(value), words, 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def way_out(inputs: Any) -> str:
    """What to do with a text, lists of ids, arrays and pictures, which people give for tensors."""
    first = inputs
    if isinstance(first, Mapping):
        first = next(iter(first.values()), None)
        if isinstance(first, (list, tuple)) or hasattr(first, "__array__"):
            return '; pass return_tensors="pt" to the tokenizer or processor'
        return ""
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, str):
        return '; pass tokenizer(text, return_tensors="pt")'
    if is_tensor(first):
        return "; pass a tuple of them, or torch.stack(...) of a batch"
    if isinstance(first, int):
        return "; pass torch.tensor([ids]), with an axis for the examples"
    if hasattr(first, "getbands"):  # of Pillow
        return '; pass transform(image)[None], or processor(images=image, return_tensors="pt")'
    return "; pass torch.from_numpy(...) of it" if hasattr(first, "__array__") else ""


# ---------------------------------------------------------------------------- numbers
def whole(
    name: str, value: Any, least: int = 1, most: int | None = None, error: Kind = OptionError
) -> int:
    """A whole number in [least, most]; `True` is refused."""
    value = scalar(value)
    if not isinstance(value, Integral) or isinstance(value, (bool, np.bool_)):
        raise error(f"{name}: expected {_whole_from(least, most)}, got {shown(value)}")
    found = operator.index(value)
    if found < least or (most is not None and found > most):
        raise error(f"{name}: expected {_whole_from(least, most)}, got {shown(found)}")
    return found


def _whole_from(least: int, most: int | None) -> str:
    if most is not None:
        return f"a whole number from {least} to {most}"
    return "a whole number" if least < -(2**62) else f"a whole number of at least {least}"


def number(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    open_ends: str = "",
    error: Kind = OptionError,
) -> float:
    """A finite number in [least, most]; `True` is refused.

    Args:
        open_ends (str): "(" where it has to be above `least`, ")" where it has to be below `most`.
    """
    value = scalar(value)
    real = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
    fits = real and math.isfinite(value) and least <= value <= most
    if not fits or ("(" in open_ends and value == least) or (")" in open_ends and value == most):
        raise error(f"{name}: expected {_within(least, most, open_ends)}, got {shown(value)}")
    return float(value)


def _within(least: float, most: float, open_ends: str) -> str:
    if math.isinf(most):
        bound = "above" if "(" in open_ends else "of at least"
        return "a finite number" if math.isinf(least) else f"a finite number {bound} {least:g}"
    left, right = "(" if "(" in open_ends else "[", ")" if ")" in open_ends else "]"
    return f"a number in {left}{least:g}, {most:g}{right}"


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


# ---------------------------------------------------------------------------- words
def one_of(name: str, value: Any, known: Collection[str], error: Kind = OptionError) -> str:
    """One of the known words."""
    if not isinstance(value, str) or value not in known:
        raise error(
            f"{name}: expected one of {list(known)}, got {shown(value)}{suggested(value, known)}"
        )
    return value


def text(name: str, value: Any, error: Kind = InputError) -> str:
    """A str that can be written to a file."""
    if not isinstance(value, str):
        raise error(f"{name}: expected a str, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        raise error(
            f"{name}: expected text that UTF-8 can write, got {shown(value)} with half of a "
            "surrogate pair; decode it with errors='replace'"
        ) from problem
    return str(value)


def plain(name: str, value: Any) -> str:
    """A title: text, or a number such as a label."""
    value = scalar(value)
    if isinstance(value, (Real, np.bool_)):
        return str(value)
    return text(name, value)


def listed(name: str, value: Any, of: str = "values") -> list[Any]:
    """The items of a sequence; text, bytes, Mappings, sets and what runs out are none."""
    rows = (is_tensor(value) or isinstance(value, np.ndarray)) and value.ndim > 0
    if not rows and (isinstance(value, (str, bytes, bytearray)) or not _is_sequence(value)):
        more = "; pass list(...) of it" if isinstance(value, Iterable) else ""
        more = "; put it in a list" if isinstance(value, (str, bytes)) else more
        raise InputError(f"{name}: expected a list of {of}, got {shown(value)}{more}")
    try:
        return list(value)
    except FAILURES as problem:  # a tensor without rows of its own: sparse, quantised
        raise InputError(f"{name}: expected a list of {of}, got {shown(value)}") from problem


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (Sequence, range)):
        return True
    # Such as a column of pandas: it has a length and an order, but no base of Python's.
    ordered = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    array = is_tensor(value) or isinstance(value, np.ndarray)
    return (
        ordered
        and hasattr(value, "__iter__")
        and not (array or isinstance(value, Mapping) or hasattr(value, "keys"))
    )


def texts(name: str, value: Any, count: int | None = None, what: str = "example") -> list[str]:
    """A title for each of so many examples."""
    found = [plain(f"{name}[{i}]", one) for i, one in enumerate(listed(name, value, "str"))]
    if count is not None and len(found) != count:
        raise InputError(f"{name}: expected one for each {what} ({count}), got {len(found)}")
    return found


def names_of(name: str, given: Iterable[str], known: Collection[str], error: Kind) -> None:
    """Refuses unknown names, and lists the known ones."""
    for one in given:
        if one not in known:
            raise error(
                f"{name}: expected some of {list(known)}, got {shown(one)}{suggested(one, known)}"
            )


# ---------------------------------------------------------------------------- others
@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Says so where a file of the user's cannot be written."""
    try:
        yield
    except (OSError, ValueError) as problem:  # ValueError: a name with a null byte
        said = getattr(problem, "strerror", None) or problem
        raise InputError(
            f"path: cannot write to {shown(str(path))} ({said}); give a file in a folder of yours"
        ) from problem


def is_file(path: Any) -> bool:
    """Whether there is a file; False for a name that no file can have."""
    try:
        return Path(path).is_file()
    except (OSError, TypeError, ValueError):  # too long, with a null byte, below a file
        return False


def is_folder(path: Any) -> bool:
    """Whether there is a folder; False for a name that no folder can have."""
    try:
        return Path(path).is_dir()
    except (OSError, TypeError, ValueError):
        return False


def callable_of(name: str, value: Any, what: str = "a callable") -> Callable:
    """Something that can be called."""
    if not callable(value):
        raise OptionError(f"{name}: expected {what}, got {shown(value)}")
    return value


def mapping_of(name: str, value: Any, of: str, error: Kind = OptionError) -> Mapping[Any, Any]:
    """A Mapping of something to something."""
    if not isinstance(value, Mapping):
        raise error(f"{name}: expected a Mapping of {of}, got {shown(value)}")
    return value


def finite(name: str, values: Tensor, what: str, error: Kind = InputError) -> Tensor:
    """A tensor without NaN and infinity."""
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).sum())
        raise error(
            f"{name}: expected finite numbers, got {bad} of {values.numel()} NaN or infinite; "
            f"{what}"
        )
    return values
