"""The options of the pictures, each checked in one place, as it means the same in all of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from matplotlib import colormaps
from matplotlib.colors import Colormap

from captum_attn._checks import (
    flag,
    listed,
    number,
    one_of,
    plain,
    shown,
    suggested,
    text,
    texts,
    whole,
)
from captum_attn.errors import InputError, OptionError
from captum_attn.visualization._arrays import pair_of, side_of
from captum_attn.visualization._panels import VIEWS
from captum_attn.visualization._style import SIGNS

P = ParamSpec("P")
T = TypeVar("T")
Rule = Callable[[str, Any], Any]

INTERPOLATIONS = ("nearest", "bilinear")  # patch-exact, smooth
WIDEST = 60.0  # inches, of a figure of text
LARGEST_PANEL = 40.0  # inches


def checked_options(**own: Rule | None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Checks a function's options by their names before it runs; refuses those it has not.

    Args:
        **own: rules of this function, in place of those of all; None for no rule.
    """

    def decorator(function: Callable[P, T]) -> Callable[P, T]:
        parameters = inspect.signature(function).parameters
        rules = {n: r for n, r in (RULES | own).items() if n in parameters and r is not None}

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name not in parameters:
                    raise OptionError(
                        f"{function.__name__} has no option {name!r}; it has {list(parameters)}"
                        f"{suggested(name, parameters)}"
                    )
            for name in rules.keys() & kwargs.keys():
                kwargs[name] = rules[name](name, kwargs[name])
            return function(*args, **kwargs)

        return checked

    return decorator


def optional(rule: Rule) -> Rule:
    """The rule for all but None."""
    return lambda name, value: None if value is None else rule(name, value)


def within(least: float, most: float, open_ends: str = "") -> Rule:
    """Numbers of a range."""
    return lambda name, value: number(name, value, least, most, open_ends=open_ends)


def known(words: tuple[str, ...]) -> Rule:
    """One of these words."""
    return lambda name, value: one_of(name, value, words)


def pair_of_texts(name: str, value: Any) -> tuple[str, str]:
    """What orange and what purple say."""
    found = texts(name, value)
    if len(found) != 2:
        raise InputError(f"{name}: expected two texts, for and against; got {shown(value)}")
    return found[0], found[1]


def _colour_map(name: str, value: Any) -> str | Colormap:
    if isinstance(value, Colormap):
        return value
    if not isinstance(value, str) or value not in colormaps:
        raise OptionError(
            f"{name}: expected the name of a colour map of matplotlib, such as 'viridis', or a "
            f"Colormap; got {shown(value)}{suggested(value, list(colormaps))}"
        )
    return value


def _views(name: str, value: Any) -> str | list[str]:
    if isinstance(value, str):
        return one_of(name, value, VIEWS)
    return [one_of(f"{name}[{i}]", one, VIEWS) for i, one in enumerate(listed(name, value, "str"))]


def _captions(name: str, value: Any) -> dict[str, list[str]]:
    if not isinstance(value, Mapping):
        raise InputError(
            f"{name}: expected a Mapping of label to a list of str, one for each example; got "
            f"{shown(value)}"
        )
    return {plain(name, k): texts(f"{name}[{k!r}]", said) for k, said in value.items()}


def _texts(name: str, value: Any) -> str | list[str]:
    return text(name, value) if isinstance(value, str) else texts(name, value)


RULES: dict[str, Rule] = {
    "sign": known(SIGNS),
    "outlier_perc": within(0, 100, ")"),
    "cmap": optional(_colour_map),
    "alpha_overlay": within(0, 1),
    "interpolation": known(INTERPOLATIONS),
    "method": _views,
    "patch_size": optional(lambda name, value: side_of(value)),
    "grid": optional(pair_of),
    "row": optional(lambda name, value: whole(name, value, -(2**63))),
    "examples": optional(whole),
    "titles": optional(texts),
    "captions": optional(_captions),
    "text": optional(_texts),
    "columns": whole,
    "max_words": whole,
    "max_lines": whole,
    "panel_size": within(0.2, LARGEST_PANEL),
    "width": within(4, WIDEST),
} | dict.fromkeys(
    ("show_original", "show_colorbar", "show_special", "merge_pieces", "shared_scale", "legend"),
    flag,
)
