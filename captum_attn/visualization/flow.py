"""How relevance flows: what each attention layer carried, and which of its heads."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize

from captum_attn._checks import listed, shown, text, texts
from captum_attn.errors import InputError, OptionError
from captum_attn.visualization._arrays import array, check_counts, image_list
from captum_attn.visualization._fonts import finished
from captum_attn.visualization._matrix import cells_of, draw_matrix
from captum_attn.visualization._options import checked_options
from captum_attn.visualization._panels import bare, colour_bar, title
from captum_attn.visualization._regions import ALPHA, draw_shares, grid_of, over_image
from captum_attn.visualization._style import (
    BARS,
    of_sign,
    resolved_sign,
    scale_limit,
    shares_of,
)
from captum_attn.visualization.matrices import visualize_matrix
from captum_attn.visualization.picture import Picture

__all__ = ["visualize_heads", "visualize_layers"]


@checked_options()
def visualize_layers(
    layer_maps: Sequence[tuple[Any, Any]],
    images: Any = None,
    *,
    tokens: Sequence[Any] | None = None,
    row: int | None = None,
    grid: tuple[int, int] | None = None,
    examples: int | None = None,
    interpolation: str = "nearest",
    sign: str = "auto",
    outlier_perc: float = 2,
    cmap: str | Colormap | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 6,
    panel_size: float = 1.8,
) -> Picture:
    """Draws what each attention layer carried, layer by layer, on one scale for each example.

    With `images` a map of the patches for each layer, with `tokens` a matrix layers by tokens, with
    neither the matrices of attention themselves, rows asking. Always the mean over the heads.

    Args:
        layer_maps (sequence of (call, Tensor)): as `layer_maps` of a method returns them, each
            (B, H, q, k). The call names its layer by `call.module`, or is a str. Where several
            streams attend to each other, pass the calls between two of them only.
        images (optional): as for `visualize_image`, B of them.
        tokens (sequence of str, or one such for each example, optional): the k tokens.
        row (int, optional): the query that is drawn: 0 for [CLS], -1 for the last token. Default:
            the mean over all queries.
        grid (int, int, optional): rows and columns of the patches, the last of the k tokens.
            Default: the largest square.
        examples (int, optional): B, where windows are folded into the first axis. Default: the
            least size of that axis. Of windows the mean is drawn.
        interpolation (str): "nearest", patch-exact, or "bilinear", smooth. Default: "nearest".
        sign, outlier_perc, cmap: as for `visualize_image`.
        titles (sequence of str, optional): one for each example.
        columns (int): layers beside each other. Default: 6.
        panel_size (float): width of a panel in inches. Default: 1.8.

    Returns:
        Picture: a figure with a panel for each layer of each example.

    Raises:
        InputError: if maps, images and tokens do not fit, or are not finite.
        OptionError: for an unknown option.

    Examples::

        >>> maps = GenericAttention(vit).layer_maps(images, target=3)
        >>> visualize_layers(maps, images, row=0).save("flow.png")
    """
    if images is not None and tokens is not None:
        raise OptionError("expected `images` or `tokens`, got both")
    names, maps = checked_layers(layer_maps, examples)
    means = [one.mean((1, 2)) for one in maps]  # (B, q, k)
    batch = len(means[0])
    check_counts(batch, {"titles": titles})
    if tokens is not None:
        options: dict[str, Any] = {"sign": sign, "outlier_perc": outlier_perc, "cmap": cmap}
        rows = _same_keys([_row(one, row) for one in means], names)
        return _by_tokens(rows, names, tokens, titles=titles, **options)
    pictures = None
    shown = means
    if images is not None:
        pictures, _ = image_list(images)
        check_counts(batch, {"images": pictures})
        rows = _same_keys([_row(one, row) for one in means], names)
        cells = _patches(rows[0].shape[1], grid)
        shown = [one[:, -cells[0] * cells[1] :] for one in rows]
    elif row is not None:
        raise OptionError("row: expected with `images` or `tokens`; without them all are drawn")
    sign = resolved_sign(sign, shown)
    across = min(columns, len(shown))
    down = math.ceil(len(shown) / across)
    tall = 1.0 if pictures is None else max(p.shape[0] / p.shape[1] for p in pictures)
    figure = Picture(
        alt="; ".join(titles) if titles else "relevance layer by layer",
        figsize=(
            panel_size * across,
            batch * (down * (panel_size * tall + 0.3) + 0.4 + 0.25 * (titles is not None)),
        ),
        layout="constrained",
    )
    parts = figure.subfigures(batch, 1, squeeze=False)[:, 0]
    for i, part in enumerate(parts):
        limit = scale_limit(of_sign(np.concatenate([one[i].ravel() for one in shown]), sign),
                            outlier_perc)  # fmt: skip
        if limit == 0:
            warnings.warn(f"the maps of example {i} are zero: drawn as empty", stacklevel=2)
        panels = part.subplots(down, across, squeeze=False).ravel()
        for ax in panels[len(shown) :]:
            ax.axis("off")
        drawn: ScalarMappable | None = None
        for ax, name, values in zip(panels, names, shown, strict=False):
            if pictures is None:
                labels = [""] * values.shape[1], [""] * values.shape[2]
                drawn = draw_matrix(ax, values[i], *labels, sign, limit, cmap)
                bare(ax)
                ax.set_aspect("equal")
            else:
                shares = shares_of(values[i], sign, limit)
                shares = np.abs(shares) if sign != "all" else shares
                laid = over_image(shares, cells, pictures[i], interpolation)
                draw_shares(ax, pictures[i], laid, sign, ALPHA, cmap)
            title(ax, name, panel_size, fontsize=9)
        drawn = drawn or _scale(sign, cmap)
        colour_bar(part, list(panels), drawn, limit, sign, aspect=50, shrink=0.4)
        if titles is not None:
            part.suptitle(titles[i], fontsize=11, fontweight="bold", x=0.01, ha="left")
    finished(figure)
    return figure


@checked_options()
def visualize_heads(
    layer_maps: Sequence[tuple[Any, Any]],
    *,
    row: int | None = None,
    examples: int | None = None,
    sign: str = "absolute_value",
    cmap: str | Colormap | None = None,
    titles: Sequence[str] | None = None,
) -> Picture:
    """Draws which heads carried the relevance: layers by heads, in per cent of their sum.

    Args:
        layer_maps (sequence of (call, Tensor)): as for `visualize_layers`, of any streams.
        row (int, optional): the query that is counted: 0 for [CLS], -1 for the last token. Default:
            all of them.
        examples (int, optional): as for `visualize_layers`; windows are added up.
        sign (str): what is counted: "absolute_value", "positive", "negative", or "all", where one
            sign makes up for the other. Default: "absolute_value".
        cmap, titles: as for `visualize_layers`.

    Returns:
        Picture: a figure with a matrix for each example, beside each other.

    Raises:
        InputError: if the maps do not fit, or are not finite.
        OptionError: for an unknown option.

    Examples::

        >>> visualize_heads(GenericAttention(vit).layer_maps(images, target=3), row=0)
    """
    names, maps = checked_layers(layer_maps, examples)
    sign = resolved_sign(sign, maps)
    batch, most = len(maps[0]), max(one.shape[2] for one in maps)
    check_counts(batch, {"titles": titles})
    carried = np.zeros((batch, len(maps), most))
    absent = np.ones((len(maps), most), dtype=bool)
    for i, one in enumerate(maps):
        chosen = one if row is None else one[..., [_index(row, one.shape[3])], :]
        carried[:, i, : one.shape[2]] = of_sign(chosen, sign).sum((1, 3, 4))
        absent[i, : one.shape[2]] = False
    cells = cells_of(absent.shape)
    heads = [str(head) for head in range(most)]
    size = cells.size(absent, names, heads)
    figure = Picture(
        alt="; ".join(titles) if titles else "relevance of each head",
        figsize=(max(2.6, size[0]) * batch, max(1.2, size[1]) + 1.2),
        layout="constrained",
    )
    for i, ax in enumerate(figure.subplots(1, batch, squeeze=False)[0]):
        total = np.abs(carried[i]).sum()
        if total == 0:
            warnings.warn(f"the heads of example {i} carried nothing: drawn as empty", stacklevel=2)
        percent = 100 * carried[i] / (total or 1.0)
        limit = float(np.abs(percent).max())
        drawn = draw_matrix(ax, percent, names, heads, sign, limit, cmap, absent, cells)
        ax.tick_params(axis="x", rotation=0)
        ax.set_xlabel("head", fontsize=9)
        ax.xaxis.set_label_position("top")
        if titles is not None:
            title(ax, titles[i], max(2.6, size[0]), fontweight="bold")
        colour_bar(figure, ax, drawn, limit, sign, aspect=18, label="% of the relevance")
    finished(figure)
    return figure


def checked_layers(
    layer_maps: Sequence[tuple[Any, Any]], examples: int | None
) -> tuple[list[str], list[np.ndarray]]:
    """Names of the layers, and their maps (B, F, H, q, k)."""
    pairs = listed("layer_maps", layer_maps, "(call, map), as `layer_maps` of a method returns")
    if not pairs or not all(isinstance(e, (tuple, list)) and len(e) == 2 for e in pairs):
        raise InputError(
            "layer_maps: expected at least one pair (call, map), as `layer_maps` of a method "
            f"returns them; got {shown(layer_maps)}"
        )
    layer_maps = pairs
    calls = [_name_of(call, f"layer_maps[{i}]") for i, (call, _) in enumerate(layer_maps)]
    maps = [array(values, f"layer_maps[{i}]") for i, (_, values) in enumerate(layer_maps)]
    for i, one in enumerate(maps):
        if one.ndim != 4 or 0 in one.shape:
            raise InputError(f"layer_maps[{i}]: expected (B, H, q, k), got {one.shape}")
    batch = min(len(one) for one in maps) if examples is None else examples
    for i, one in enumerate(maps):
        if batch < 1 or len(one) % batch:
            raise InputError(
                f"layer_maps[{i}]: expected a multiple of {batch} examples, got {len(one)}; pass "
                "`examples=`"
            )
    folded = [one.reshape(batch, -1, *one.shape[1:]) for one in maps]
    return _short(calls), folded


def _scale(sign: str, cmap: str | Colormap | None) -> ScalarMappable:
    """The colours of maps that are laid over images."""
    return ScalarMappable(Normalize(-1 if sign == "all" else 0, 1), cmap or BARS[sign])


def _by_tokens(rows: list[np.ndarray], names: list[str], tokens: Any, **options: Any) -> Picture:
    """A matrix layers by tokens for each example."""
    stacked = np.stack(rows, 1)  # (B, L, k)
    each = _tokens(tokens, len(stacked), stacked.shape[2])
    return visualize_matrix(stacked, names, each, **options)


def _tokens(tokens: Any, batch: int, count: int) -> list[list[str]]:
    """The tokens of each example."""
    given = listed("tokens", tokens, "str, or of such a list for each example")
    each = [given] * batch if given and isinstance(given[0], str) else given
    check_counts(batch, {"tokens": each})
    return [texts("tokens", one, count, "token") for one in each]


def _name_of(call: Any, name: str) -> str:
    """The layer of a call."""
    module = call if isinstance(call, str) else getattr(call, "module", None)
    if module is None:
        raise InputError(f"{name}: expected a call with a `module`, or a str, got {shown(call)}")
    return text(name, str(module))


def _short(names: list[str]) -> list[str]:
    """Names of modules without what they all begin and end with."""
    if len(set(names)) < 2:
        return [f"{i} {name}".strip() for i, name in enumerate(names)]
    parts = [name.split(".") for name in names]
    begin = len(os.path.commonprefix(parts))
    end = len(os.path.commonprefix([part[begin:][::-1] for part in parts]))
    short = [
        ".".join(part[begin : len(part) - end]) or name
        for part, name in zip(parts, names, strict=True)
    ]
    return [f"layer {name}" if name.isdigit() else name for name in short]


def _index(row: int, count: int) -> int:
    if not -count <= row < count:
        raise OptionError(f"row: expected one of {count} queries, got {row}")
    return row


def _row(means: np.ndarray, row: int | None) -> np.ndarray:
    """(B, k): of one query, or the mean."""
    return means.mean(1) if row is None else means[:, _index(row, means.shape[1])]


def _same_keys(rows: list[np.ndarray], names: list[str]) -> list[np.ndarray]:
    for name, one in zip(names, rows, strict=True):
        if one.shape != rows[0].shape:
            raise InputError(
                f"layer_maps: {names[0]} looks at {rows[0].shape[1]} tokens, {name} at "
                f"{one.shape[1]}; pass the calls between two streams only"
            )
    return rows


def _patches(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the patches among so many tokens; [CLS] and registers are before them."""
    if grid is None:
        side = math.isqrt(tokens)
        return side, side
    if grid[0] * grid[1] > tokens:
        raise OptionError(f"grid: expected at most {tokens} patches, got {grid}")
    return grid_of(grid[0] * grid[1], grid)
