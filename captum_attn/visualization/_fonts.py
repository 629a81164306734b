"""Letters of every script: which installed font has them, in which direction they run."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import matplotlib
from matplotlib import font_manager, ft2font
from matplotlib.figure import Figure
from matplotlib.text import Text

# Since 3.11 matplotlib orders and joins the letters of right-to-left scripts by itself.
SHAPES = hasattr(ft2font, "__libraqm_version__")
UNUSABLE = ("Last Resort", "LastResort", "Color Emoji")  # stand-ins, and bitmaps
LIKELY = ("Noto", "CJK", "Gothic", "Hei", "Song", "Unicode", "PingFang", "Hiragino")
T = TypeVar("T")


@cache
def _letters(path: str) -> frozenset[int]:
    try:
        return frozenset(ft2font.FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def families(texts: Iterable[str]) -> list[str]:
    """The font families that draw these texts: matplotlib's own, then those with what it lacks.

    A letter that no installed font has is drawn as a box; a warning says which and what to do.
    """
    own = list(matplotlib.rcParams["font.family"])
    path = font_manager.findfont(font_manager.FontProperties(family=own))
    letters = {ord(letter) for text in texts for letter in text if _is_drawn(letter)}
    missing = letters - _letters(path)
    found: list[str] = []
    if missing:
        fonts = [f for f in font_manager.fontManager.ttflist if not f.name.startswith(UNUSABLE)]
        fonts = [font for font in fonts if not any(name in font.name for name in UNUSABLE)]
        region = _region(missing)
        fonts.sort(
            key=lambda f: (
                not any(name in f.name for name in LIKELY),
                not f.name.endswith(region),
                f.weight != 400,
                f.name,
            )
        )
        for font in fonts:
            if not missing:
                break
            if missing & _letters(font.fname):
                found.append(font.name)
                missing -= _letters(font.fname)
    if missing:
        shown = " ".join(chr(code) for code in sorted(missing)[:8])
        scripts = sorted({_script(chr(code)) for code in missing})
        warnings.warn(
            f"no installed font has the letters {shown} ({', '.join(scripts)}), so that the "
            "picture shows boxes in their place: install a font such as Noto Sans for this script, "
            "or save as HTML",
            stacklevel=2,
        )
    return [*own, *found]


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Without matplotlib's warning for each letter that no font has: `families` gives one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
        yield


def _region(letters: set[int]) -> str:
    """The ending of Noto's fonts whose forms of Chinese characters fit these letters."""
    if any(0x3040 <= letter <= 0x30FF for letter in letters):
        return "JP"
    return "KR" if any(0xAC00 <= letter <= 0xD7A3 for letter in letters) else "SC"


def _is_drawn(letter: str) -> bool:
    # Private and unassigned letters (Co, Cn) are drawn, as boxes.
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn")


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def direction(text: str) -> int:
    """1 if the first letter with a direction runs to the right, -1 to the left, 0 without one."""
    for letter in text:
        kind = unicodedata.bidirectional(letter)
        if kind in ("R", "AL"):
            return -1
        if kind == "L":
            return 1
    return 0


def in_sight(items: Sequence[T], ways: Sequence[int], base: int) -> list[T]:
    """Items of one line from left to right, as they are read with that base direction."""
    runs: list[tuple[int, list[T]]] = []
    for item, way in zip(items, ways, strict=True):
        way = way or (runs[-1][0] if runs else base)
        if runs and runs[-1][0] == way:
            runs[-1][1].append(item)
        else:
            runs.append((way, [item]))
    ordered = runs if base > 0 else runs[::-1]
    return [item for way, run in ordered for item in (run if way > 0 else run[::-1])]


def shaped(text: str) -> str:
    """A text as matplotlib has to be given it, for it to be read in its own direction."""
    if SHAPES or direction(text) >= 0:
        return text
    if any(unicodedata.bidirectional(letter) == "AL" for letter in text):
        warnings.warn(
            f"matplotlib {matplotlib.__version__} does not join the letters of this script: use "
            "matplotlib 3.11 or newer, or save as HTML",
            stacklevel=2,
        )
    return text[::-1]


def finished(figure: Figure) -> None:
    """Every text of the figure in a font that has its letters, and none read as a formula."""
    texts: list[Text] = figure.findobj(Text)
    for ax in figure.axes:
        texts += [*ax.get_xticklabels(), *ax.get_yticklabels()]
    names = families(text.get_text() for text in texts)
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(names)
        if not SHAPES:
            text.set_text("\n".join(shaped(line) for line in text.get_text().split("\n")))
