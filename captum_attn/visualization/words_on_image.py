"""For every word of a text, where in the image it is at home."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from captum_attn._checks import shown
from captum_attn._checks import text as text_rule
from captum_attn.errors import InputError
from captum_attn.visualization._arrays import array, one_image
from captum_attn.visualization._examples import examples_of, token_lists
from captum_attn.visualization._fonts import finished
from captum_attn.visualization._options import checked_options, optional
from captum_attn.visualization._panels import colour_bar, title
from captum_attn.visualization._regions import (
    ALPHA,
    checked_boxes,
    draw_regions,
    draw_shares,
    grid_of,
    over_image,
)
from captum_attn.visualization._style import (
    BARS,
    of_sign,
    resolved_sign,
    scale_limit,
    shares_of,
)
from captum_attn.visualization.picture import Picture

__all__ = ["visualize_words_on_image"]


@checked_options(text=optional(text_rule))
def visualize_words_on_image(
    relevance: Any,
    tokens: Any,
    image: Any,
    *,
    boxes: Any = None,
    grid: tuple[int, int] | None = None,
    text: str | None = None,
    merge_pieces: bool = True,
    show_special: bool = False,
    sign: str = "auto",
    outlier_perc: float = 2,
    interpolation: str = "nearest",
    max_words: int = 24,
    columns: int = 6,
    panel_size: float = 1.7,
) -> Picture:
    """Draws for every word of one text the regions or patches that go with it, word by word.

    Args:
        relevance (Tensor or array): (n, R), of n tokens and R regions or patches, such as one
            example of `relevance_maps(...)["input_ids", "visual_feats"]`.
        tokens: as for `text_records`, of this one text.
        image: one image, as for `visualize_image`.
        boxes (Tensor or array, optional): (R, 4), the regions in pixels, as for
            `visualize_image_text`. Default: patches in reading order.
        grid (int, int, optional): rows and columns of the patches. Default: as square as R.
        text, merge_pieces, show_special: as for `text_records`; of a word's pieces the mean is
            drawn.
        sign, outlier_perc: as for `visualize_image`; one scale for all words.
        interpolation (str): "nearest", patch-exact, or "bilinear", smooth. Default: "nearest".
        max_words (int): at most so many words, those of the largest relevance. Default: 24.
        columns (int): words beside each other. Default: 6.
        panel_size (float): width of a panel in inches. Default: 1.7.

    Returns:
        Picture: a figure with a panel for each word.

    Raises:
        InputError: if relevance, tokens, boxes and grid do not fit, or are not finite.

    Examples::

        >>> maps = gae.relevance_maps(inputs, target=answer)
        >>> of_words = maps["input_ids", "visual_feats"][0]
        >>> visualize_words_on_image(of_words, tokens, image, boxes=boxes)
    """
    values = array(relevance, "relevance")
    if values.ndim != 2:
        raise InputError(f"relevance: expected (n, R) of one example, got {values.shape}")
    picture = one_image(image, "image")
    if len(token_lists(tokens)) != 1:
        raise InputError(f"tokens: expected those of one text, got {shown(tokens)}")
    frame = None if boxes is None else checked_boxes(boxes, [picture])[0]
    if frame is not None and len(frame) != values.shape[1]:
        raise InputError(
            f"boxes: expected one for each of {values.shape[1]} regions, got {len(frame)}"
        )
    cells = grid_of(values.shape[1], grid) if frame is None else (0, 0)
    (words,) = examples_of(np.zeros(len(values)), tokens, text, merge_pieces)
    means = np.stack([values[list(word.positions)].mean(0) for word in words])
    chosen = [i for i, word in enumerate(words) if show_special or not word.special]
    if not chosen:
        raise InputError("tokens: expected at least one word; pass show_special=True")
    chosen = sorted(sorted(chosen, key=lambda i: -np.abs(means[i]).sum())[:max_words])
    sign = resolved_sign(sign, [means])
    limit = scale_limit(of_sign(means[chosen], sign), outlier_perc)
    if limit == 0:
        warnings.warn("relevance has nothing of that sign: drawn as empty", stacklevel=2)
    across = min(columns, len(chosen))
    down = math.ceil(len(chosen) / across)
    tall = picture.shape[0] / picture.shape[1]
    figure = Picture(
        alt=" ".join(words[i].text for i in chosen),
        figsize=(panel_size * across, (panel_size * tall + 0.3) * down + 0.5),
        layout="constrained",
    )
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for ax in panels[len(chosen) :]:
        ax.axis("off")
    for ax, i in zip(panels, chosen, strict=False):
        shares = shares_of(means[i], sign, limit)
        if frame is None:
            shares = over_image(shares, cells, picture, interpolation)
            draw_shares(ax, picture, np.abs(shares) if sign != "all" else shares, sign, ALPHA)
        else:
            draw_regions(ax, picture, frame, shares)
        title(ax, words[i].text, panel_size)
    if limit:
        norm = Normalize(-1 if sign == "all" else 0, 1)
        bar = ScalarMappable(norm, BARS[sign])
        colour_bar(figure, list(panels), bar, limit, sign, aspect=40, shrink=0.4)
    finished(figure)
    return figure
