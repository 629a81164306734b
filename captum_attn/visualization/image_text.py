"""An image and a text together: the words of a question, and where in the image it was answered."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from captum_attn._checks import texts
from captum_attn.errors import InputError
from captum_attn.visualization._arrays import (
    array,
    by_label,
    check_counts,
    fitted,
    image_list,
    is_list,
    map_list,
)
from captum_attn.visualization._examples import examples_of, word_lists
from captum_attn.visualization._options import (
    INTERPOLATIONS,
    WIDEST,
    checked_options,
    known,
    optional,
    pair_of_texts,
    within,
)
from captum_attn.visualization._page import BOLD, MARGIN, SMALL, STEP, TARGET, Page
from captum_attn.visualization._regions import (
    ALPHA,
    checked_boxes,
    draw_regions,
    draw_shares,
)
from captum_attn.visualization._style import (
    EMPTY,
    GREY,
    of_sign,
    resolved_sign,
    scale_limit,
    shares_of,
)
from captum_attn.visualization.picture import Picture
from captum_attn.visualization.words import Word

__all__ = ["visualize_image_text"]

SIDE = 115.0  # of an image, in points


class Row(NamedTuple):
    """One explanation of one example.

    Attributes:
        label (str): of the explanation.
        words (list of Word): of the text.
        seen (ndarray): of the image: (R,) of its regions, or (H, W).
    """

    label: str
    words: list[Word]
    seen: np.ndarray

    @property
    def of_words(self) -> np.ndarray:
        """(n,), relevance of the words."""
        return np.array([word.relevance for word in self.words])

    @property
    def values(self) -> np.ndarray:
        """Of words and image."""
        return np.append(self.of_words, self.seen)


@checked_options(
    captions=optional(texts),
    interpolation=optional(known(INTERPOLATIONS)),
    legend=pair_of_texts,
    width=within(5, WIDEST),
)
def visualize_image_text(
    attributions: Any,
    tokens: Any,
    images: Any,
    *,
    boxes: Any = None,
    text: str | Sequence[str] | None = None,
    sign: str = "auto",
    outlier_perc: float = 0,
    patch_size: int | tuple[int, int] | None = None,
    interpolation: str | None = None,
    merge_pieces: bool = True,
    show_special: bool = False,
    shared_scale: bool = True,
    titles: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    legend: tuple[str, str] = TARGET,
    width: float = 7.5,
) -> Picture:
    """Draws what a model made of an image and a text: each image, its words beside it.

    Args:
        attributions (pair, or Mapping of label to pairs): (of the text, of the image). Of the text
            (n,) or (B, n). Of the image, with `boxes`, (R,), (B, R) or (B, R, D), relevance of the
            regions; else a map as for `visualize_image`. A Mapping has a row for each label.
        tokens: as for `text_records`; None where the text's attributions are lists of `Word`.
        images: as for `visualize_image`.
        boxes (Tensor or array, optional): (R, 4) or (B, R, 4), x_min, y_min, x_max, y_max of the
            regions in pixels.
        text, merge_pieces, show_special: as for `text_records`.
        sign, outlier_perc, patch_size, interpolation: as for `visualize_image`.
        shared_scale (bool): whether words and image share a scale, so that colours can be compared
            between them; False: each has its own. Default: True.
        titles (sequence of str, optional): one for each example: the question.
        captions (sequence of str, optional): one for each example: the answer.
        legend (str, str): what orange and purple say. Default: for the target, against it.
        width (float): of the figure, in inches. Default: 7.5.

    Returns:
        Picture: a figure with a row for each label of each example.

    Raises:
        InputError: if relevance, tokens, images and boxes do not fit, or are not finite.
        OptionError: for an unknown option.

    Examples::

        >>> found = gae.attribute(inputs, target=answer)  # LXMERT
        >>> pair = found["input_ids"], found["visual_feats"]
        >>> visualize_image_text(pair, inputs_of_text, image, boxes=boxes, titles=["what is it?"])
    """
    pictures, batched = image_list(images)
    frames = None if boxes is None else checked_boxes(boxes, pictures)
    check_counts(len(pictures), {"titles": titles, "captions": captions})
    rows: list[list[Row]] = [[] for _ in pictures]
    for label, pair in by_label(attributions).items():
        name = f"attributions[{label!r}]" if label else "attributions"
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(
                f"{name}: expected a pair (of the text, of the image), got {type(pair).__name__}"
            )
        words = _words(pair[0], tokens, text, merge_pieces, f"{name}, text")
        seen = _seen(pair[1], pictures, batched, frames, patch_size, interpolation, name)
        check_counts(len(pictures), {f"{name}, text": words})
        for i, labelled in enumerate(rows):
            shown = [word for word in words[i] if show_special or not word.special]
            labelled.append(Row(label, shown, seen[i]))
    every = [row for labelled in rows for row in labelled]
    sign = resolved_sign(sign, [row.values for row in every])
    page = Page(width, (word.text for row in every for word in row.words), _alt(titles))
    y, panels = MARGIN, []
    for i, labelled in enumerate(rows):
        for row in labelled:
            said = (titles[i] if titles else "", captions[i] if captions else "")
            on_words, on_image = _scales(row, sign, outlier_perc, shared_scale)
            panels.append((i, row, on_image, y))
            y = _set_row(page, row, on_words, said, pictures[i], sign, y)
    note = "each row on a scale of its own" if len(every) > 1 else ""
    height = page.set_legend({sign}, y, legend, note) + MARGIN / 2
    page.close(height)
    for i, row, limit, top in panels:
        wide, high = _size(pictures[i])
        left, bottom = MARGIN / page.points, 1 - (top + high) / height
        ax = page.add_axes((left, bottom, wide / page.points, high / height))
        shares = shares_of(row.seen, sign, limit)
        if frames is None:
            draw_shares(ax, pictures[i], np.abs(shares) if sign != "all" else shares, sign, ALPHA)
        else:
            draw_regions(ax, pictures[i], frames[i], shares, row.seen)
    page.finish()
    return page


def _words(relevance: Any, tokens: Any, text: Any, merge: bool, name: str) -> list[list[Word]]:
    words = word_lists(relevance)
    if words is None and tokens is None:
        raise InputError(f"{name}: expected `tokens` beside relevance, or lists of Word")
    return words or examples_of(relevance, tokens, text, merge, name)


def _seen(
    relevance: Any,
    pictures: list[np.ndarray],
    batched: bool,
    frames: list[np.ndarray] | None,
    patch_size: Any,
    interpolation: str | None,
    name: str,
) -> list[np.ndarray]:
    """Of each image the relevance of its regions `(R,)`, or a map `(H, W)`."""
    name = f"{name}, image"
    if frames is None:
        maps = map_list(relevance, pictures, batched, name)
        return [
            fitted(one, picture.shape[:2], patch_size, interpolation, name)
            for one, picture in zip(maps, pictures, strict=True)
        ]
    if is_list(relevance):
        rows = [array(one, name) for one in relevance]
    else:
        values = array(relevance, name)
        rows = [values] if values.ndim == 1 else list(values)
    rows = [row.sum(-1) if row.ndim == 2 else row for row in rows]
    check_counts(len(pictures), {name: rows})
    for row, frame in zip(rows, frames, strict=True):
        if row.shape != (len(frame),):
            raise InputError(
                f"{name}: expected the relevance of {len(frame)} boxes, got {row.shape}"
            )
    return rows


def _scales(row: Row, sign: str, outlier_perc: float, shared: bool) -> tuple[float, float]:
    """Where the colours of words and of the image end."""
    on_words = scale_limit(of_sign(row.of_words, sign), outlier_perc)
    on_image = scale_limit(of_sign(row.seen, sign), outlier_perc)
    if on_words == on_image == 0:
        warnings.warn(
            f"{row.label or 'a row'} has no relevance to show: drawn as empty", stacklevel=3
        )
    largest = max(on_words, on_image)
    return (largest, largest) if shared else (on_words, on_image)


def _size(image: np.ndarray) -> tuple[float, float]:
    """Width and height of an image in points."""
    high, wide = image.shape[:2]
    scale = SIDE / max(high, wide)
    return scale * wide, scale * high


def _set_row(
    page: Page,
    row: Row,
    limit: float,
    said: tuple[str, str],
    image: np.ndarray,
    sign: str,
    y: float,
) -> float:
    """The question, the answer, the label and the words beside the image; where the row ends."""
    left, right = MARGIN + SIDE + 2 * MARGIN, page.points - MARGIN
    top, (question, answer) = y, said
    label = page.cut(row.label, (right - left) / 2, size=SMALL)
    page.say(right, y, label, color=GREY, ha="right")
    room = right - left - page.measure(label, size=SMALL) - MARGIN
    if question:
        page.say(
            left, y, page.cut(question, room, size=BOLD, weight="bold"), size=BOLD, weight="bold"
        )
    y += STEP * bool(question or label)
    if answer:
        page.say(left, y, page.cut(answer, right - left, size=SMALL))
        y += STEP
    shares = shares_of(row.of_words, sign, limit).tolist()
    y = page.set_words(row.words, shares, left, right, y + 0.3 * STEP, values=True)
    if limit == 0:
        page.say(left, y, EMPTY, color=GREY)
        y += STEP
    return max(y, top + _size(image)[1]) + MARGIN


def _alt(titles: Sequence[str] | None) -> str:
    return "; ".join(titles) if titles else "words and image coloured by their relevance"
