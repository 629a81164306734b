"""A page on which every layer, head and token can be chosen: one HTML file, without a server."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.image import imsave

from captum_attn._checks import shown, text, texts, whole, writing_to
from captum_attn.errors import InputError, OptionError
from captum_attn.visualization._arrays import array, image_list, pair_of
from captum_attn.visualization._examples import Tokens, token_lists
from captum_attn.visualization._hover import json_in_page
from captum_attn.visualization._options import checked_options, within
from captum_attn.visualization.flow import checked_layers
from captum_attn.visualization.words import PADDING, words_of

__all__ = ["AttentionPage", "attention_page"]

TEMPLATE = Path(__file__).with_suffix(".html")
LEVELS = 127  # of a map's values, on each side of zero
MAX_MEGABYTES = 12.0
PER_STEP = 12  # letters that the step of a row takes
LONG_SIDE = 512  # pixels of the picture
OUTSIDE = 8  # tokens beside the patches: [CLS], registers
MEAN = "mean"


class Shown(NamedTuple):
    """A token as the page shows it."""

    text: str
    gap: bool = True
    special: bool = False
    sentence: int = 0


class Layer(NamedTuple):
    """The maps (m, q, k) of a layer that are shown, their names, and their heads' shares."""

    name: str
    maps: np.ndarray
    heads: list[str]
    shares: list[float | None]
    final: bool = False


class AttentionPage:
    """A page that needs nothing beside it; a notebook shows it in a frame.

    Args:
        page (str): the HTML.

    Examples::

        >>> attention_page(maps, tokens=inputs).save("attention.html")
    """

    def __init__(self, page: str) -> None:
        self._page = page

    def page(self) -> str:
        """The whole page."""
        return self._page

    def save(self, path: str | Path) -> Path:
        """Writes the page.

        Args:
            path (str or Path): a file that ends in .html.

        Returns:
            Path: the file.

        Raises:
            OptionError: for another ending.
            InputError: where the file cannot be written.
        """
        if not isinstance(path, (str, PathLike)) or Path(path).suffix.lower() != ".html":
            raise OptionError(f"path: expected a file ending in .html, got {shown(path)}")
        with writing_to(Path(path)):
            Path(path).write_text(self._page, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        style = "width: 100%; height: 640px; border: 0"
        return f'<iframe style="{style}" srcdoc="{escape(self._page, quote=True)}"></iframe>'


@checked_options(title=text, max_megabytes=within(0, 1e3, "("))
def attention_page(
    layer_maps: Sequence[tuple[Any, Any]],
    relevance: Any = None,
    *,
    tokens: Any = None,
    images: Any = None,
    asking: Sequence[str] | None = None,
    example: int = 0,
    row: int | None = None,
    grid: tuple[int, int] | None = None,
    title: str = "What looks at what",
    max_megabytes: float = MAX_MEGABYTES,
) -> AttentionPage:
    """A page on which a layer, a head and a token are chosen by a click, or by keyboard.

    The chosen token's row of the chosen map is drawn on the text, or on the picture's patches, with
    its numbers; or its column: what looks at it. The page is one file that loads nothing. Values
    are rounded to 1/127 of the largest of their row.

    Args:
        layer_maps (sequence of (call, Tensor)): as `layer_maps` of a method returns them, each
            (B, H, q, k), of the calls between two streams.
        relevance (Tensor, or Mapping as `relevance_maps` returns it, optional): (B, q, k), the
            final map, which is shown first. Default: none.
        tokens (BatchEncoding, sequence of str, or one such for each example): the k tokens; as for
            `text_records`. Padding is left out.
        images: instead of tokens, as for `visualize_image`: the last of the k tokens are patches.
        asking (sequence of str, optional): names of the q tokens, where they are others than the k:
            a decoder's, or object queries. Default: the k tokens; else their numbers.
        example (int): which of the batch is shown. Default: 0.
        row (int, optional): the token that is chosen as the page opens. Default: the last where
            none looks at a later one, else the first.
        grid (int, int, optional): rows and columns of the patches. Default: the most that fit in
            the picture's proportions.
        title (str): the page's heading, such as the question.
        max_megabytes (float): of the maps in the page. Of what is larger the strongest heads of
            each layer are kept, beside the mean over all, and a note says so. Default: 12.

    Returns:
        AttentionPage: `save` writes it.

    Raises:
        InputError: if maps, tokens and images do not fit, are not finite, or have no room.
        OptionError: for an unknown option.

    Examples::

        >>> gae, asked = GenericAttention(bert), {"inputs": inputs, "target": 1}
        >>> page = attention_page(gae.layer_maps(**asked), gae.relevance_maps(**asked),
        ...                       tokens=inputs, title="why positive?")
        >>> page.save("attention.html")
    """
    if (tokens is None) == (images is None):
        raise InputError("expected `tokens` or `images`, and not both")
    names, folded = checked_layers(layer_maps, None)
    for name, one in zip(names, folded, strict=True):
        if one.shape[1] > 1:
            raise InputError(
                f"layer_maps: {name} looks at windows, {one.shape[1]} for each example, whose "
                "tokens lie elsewhere in each; use visualize_layers"
            )
    example = whole("example", example, 0, len(folded[0]) - 1)
    maps = [one[example, 0] for one in folded]  # (H, q, k)
    q, k = maps[0].shape[1:]
    for name, one in zip(names, maps, strict=True):
        if one.shape[1:] != (q, k):
            raise InputError(
                f"layer_maps: {names[0]} has {(q, k)} tokens that look and are looked at, {name} "
                f"{one.shape[1:]}; pass the calls between two streams only"
            )
    final = None if relevance is None else _final(relevance, (q, k), example)
    kept = np.ones(k, dtype=bool)
    about: dict[str, Any] = {"grid": None, "picture": None}
    if tokens is not None:
        keys, kept = _text(token_lists(tokens), k, example)
    else:
        keys, about = _patches(images, k, grid, example)
    others = None if asking is None and q == k else _asking(asking, q)
    rows = kept if others is None else np.ones(q, dtype=bool)
    layers, note = _layers(names, [m[:, rows][:, :, kept] for m in maps], max_megabytes)
    if final is not None:
        whole_map = final[None][:, rows][:, :, kept]
        layers = [Layer("relevance", whole_map, [MEAN], [None], final=True), *layers]
    data = {
        **about,
        "keys": [one._asdict() for one in keys],
        "asking": None if others is None else [one._asdict() for one in others],
        "layers": [_written(layer) for layer in layers],
        "note": note,
        "start": {"layer": 0, "head": 0, "row": _start(row, maps, rows)},
    }
    return AttentionPage(_filled(title, data))


def _filled(title: str, data: Mapping[str, Any]) -> str:
    """The page; what a text has in it stays text."""
    parts = {"title": escape(title), "data": json_in_page(data)}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda found: parts[found[1]], template)


# ---------------------------------------------------------------------------- tokens and patches
def _text(lists: list[Tokens], count: int, example: int) -> tuple[list[Shown], np.ndarray]:
    """The tokens of the example, and which of the k they are."""
    one = lists[min(example, len(lists) - 1)]
    if len(one.real) != count or example >= len(lists) > 1:
        raise InputError(
            f"tokens: expected those of example {example}, {count} as the maps have; got "
            f"{len(one.real)} of {len(lists)} examples"
        )
    return _tokens(one), one.real


def _tokens(one: Tokens) -> list[Shown]:
    """As they are read; the pieces of a word stand without a blank between them."""
    given: Any = {"tokens": one.tokens, "relevance": [0.0] * len(one.tokens)}
    pieces = words_of(**given, special=one.special, merge=False)
    found = [
        # Padding is no word, and the bytes within a letter are none.
        Shown(token, special=True) if PADDING.fullmatch(token) else Shown("·", gap=False)
        for token in one.tokens
    ]
    for piece in pieces:
        at = piece.positions[0]
        sentence = one.sentences[at] if one.sentences else 0
        found[at] = Shown(piece.text, False, piece.special, sentence)
    for word in words_of(**given, special=one.special):
        found[word.positions[0]] = found[word.positions[0]]._replace(gap=word.gap)
    return found


def _patches(
    images: Any, count: int, grid: Any, example: int
) -> tuple[list[Shown], dict[str, Any]]:
    """The tokens of a picture: those outside, then its patches; and the picture."""
    pictures, _ = image_list(images)
    if example >= len(pictures):
        raise InputError(f"images: expected one for example {example}, got {len(pictures)}")
    picture = pictures[example]
    down, across = _grid(picture.shape[:2], count, grid)
    outside = count - down * across
    first = ["[CLS]"] if outside == 1 else [f"token {i}" for i in range(outside)]
    keys = [Shown(name, special=True) for name in first]
    keys += [
        Shown(f"patch in row {i // across + 1}, column {i % across + 1}")
        for i in range(down * across)
    ]
    step = math.ceil(max(picture.shape[:2]) / LONG_SIDE)
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(picture[::step, ::step].clip(0, 1)), format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return keys, {"grid": [down, across], "picture": f"data:image/png;base64,{data}"}


def _grid(size: Sequence[int], count: int, grid: Any) -> tuple[int, int]:
    """Rows and columns of the patches among so many tokens."""
    if grid is not None:
        down, across = pair_of("grid", grid)
        if down * across > count:
            raise OptionError(f"grid: expected at most {count} patches, got {(down, across)}")
        return down, across
    part = math.gcd(*size)
    unit = (size[0] // part, size[1] // part)
    times = math.isqrt(count // (unit[0] * unit[1]))
    if not times or count - unit[0] * unit[1] * times**2 > OUTSIDE:
        raise InputError(
            f"grid: how {count} tokens lie on a picture of {tuple(size)} pixels could not be told; "
            "expected (rows, columns) of the patches, which are the last tokens"
        )
    return unit[0] * times, unit[1] * times


def _asking(given: Any, count: int) -> list[Shown]:
    if given is None:
        return [Shown(f"query {i}") for i in range(count)]
    names = texts("asking", given)
    if len(names) != count:
        raise InputError(f"asking: expected the names of {count} tokens, got {len(names)}")
    return _tokens(Tokens(names, np.ones(count, dtype=bool)))


def _start(row: Any, maps: list[np.ndarray], rows: np.ndarray) -> int:
    """The token that is chosen first, as the page counts them."""
    q = len(rows)
    if row is not None:
        at = whole("row", row, -q, q - 1) % q
        if not rows[at]:
            raise OptionError(f"row: expected a token of the text, got padding at {row}")
        return int(rows[:at].sum())
    square = all(one.shape[1] == one.shape[2] for one in maps)
    later = any(np.triu(np.abs(one).sum(0), 1).any() for one in maps)
    return int(rows.sum()) - 1 if square and not later else 0


# ---------------------------------------------------------------------------- maps
def _final(relevance: Any, size: tuple[int, int], example: int) -> np.ndarray:
    """The final map (q, k) of the example."""
    if isinstance(relevance, Mapping):
        fitting = [v for v in relevance.values() if tuple(np.shape(v)[1:]) == size]
        if len(fitting) != 1:
            raise InputError(
                f"relevance: expected one map (B, {size[0]}, {size[1]}) among {list(relevance)}, "
                f"got {len(fitting)}; pass the one that is meant"
            )
        (relevance,) = fitting
    found = array(relevance, "relevance")
    found = found[None] if found.ndim == 2 and example == 0 else found
    if found.ndim != 3 or found.shape[1:] != size or example >= len(found):
        raise InputError(f"relevance: expected (B, {size[0]}, {size[1]}), got {found.shape}")
    return found[example]


def _layers(
    names: Sequence[str], maps: list[np.ndarray], megabytes: float
) -> tuple[list[Layer], str]:
    """The mean and the heads of every layer, or as many as there is room for."""
    carried = [np.abs(one).sum((1, 2)) for one in maps]
    total = sum(float(one.sum()) for one in carried)
    q, k = maps[0].shape[1:]
    one_map = (q * k * 4 / 3 + q * PER_STEP) / 1e6
    most, heads = int(megabytes / one_map), max(len(one) for one in maps)
    room = heads
    while room and sum(min(room, len(one)) + 1 for one in maps) > most:
        room -= 1
    if most < len(maps):
        raise InputError(
            f"layer_maps: the means of {len(maps)} layers over {q} x {k} tokens take "
            f"{len(maps) * one_map:.0f} MB, more than max_megabytes={megabytes:g}; pass fewer "
            "layers, a shorter input, or a higher max_megabytes"
        )
    note = ""
    if room < heads:
        note = (
            f"Of {heads} heads in a layer the {room} strongest are here, beside the mean over all."
        )
        warnings.warn(
            f"the maps would take more than {megabytes:g} MB: of each layer the {room} strongest "
            "heads are kept, beside the mean over all",
            stacklevel=3,
        )
    found = []
    for name, one, shares in zip(names, maps, carried, strict=True):
        strongest = sorted(np.argsort(-shares, kind="stable")[:room].tolist())
        stacked = np.stack([one.mean(0), *one[strongest]])
        parts = [float(shares[head]) / (total or 1.0) for head in strongest]
        heads_of = [MEAN, *map(str, strongest)]
        found.append(Layer(name, stacked, heads_of, [None, *parts]))
    return found, note


def _written(layer: Layer) -> dict[str, Any]:
    """A layer in the page: whole numbers, each row times a step of its own."""
    maps = []
    for name, values, share in zip(layer.heads, layer.maps, layer.shares, strict=True):
        steps = np.abs(values).max(1) / LEVELS  # (q,)
        levels = np.rint(values / np.where(steps == 0, 1.0, steps)[:, None]).astype(np.int8)
        maps.append({
            "name": name,
            "share": None if share is None else round(share, 6),
            "steps": [float(f"{step:.5g}") for step in steps],
            "values": base64.b64encode(levels.tobytes()).decode("ascii"),
        })  # fmt: skip
    return {"name": layer.name, "final": layer.final, "maps": maps}
