"""Texts with their words coloured, as a figure and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum.attr.visualization import VisualizationDataRecord  # noqa: F401

from captum_attn.visualization.picture import Picture

__all__ = ["text_records", "visualize_text"]


def text_records(
    attributions: Any,
    tokens: Any,
    *,
    merge_pieces: bool = True,
    show_special: bool = False,
    pred_class: Any = "",
    pred_prob: Any = None,
    true_class: Any = "",
    attr_class: Any = "",
) -> list[Any]:
    """Captum's `VisualizationDataRecord` of each example, with word pieces merged into words.

    Args:
        attributions (Tensor or array): (n,) or (B, n), relevance of the tokens.
        tokens (BatchEncoding, sequence of str, or sequence of these): a fast tokenizer's output, or
            the tokens as its `convert_ids_to_tokens` gives them.
        merge_pieces (bool): whether pieces are joined into words, and their relevance added.
        show_special (bool): whether [CLS], </s> and the like are shown. Padding never is.
        pred_class, pred_prob, true_class, attr_class: what Captum's record has, for all examples or
            a list with one for each.

    Returns:
        list of VisualizationDataRecord
    """
    raise NotImplementedError


def visualize_text(
    attributions: Any,
    tokens: Any = None,
    *,
    sign: str = "auto",
    outlier_perc: float = 0,
    merge_pieces: bool = True,
    show_special: bool = False,
    titles: Sequence[str] | None = None,
    captions: Any = None,
    legend: bool = True,
    width: float = 9.0,
    max_lines: int = 40,
) -> Picture:
    """Texts with each word on the colour of its relevance; `.html()` is the text itself.

    Args:
        attributions (Tensor, array, records, or Mapping of label to such): (n,) or (B, n), relevance
            of the tokens, or what `text_records` returned. A Mapping has a row for each label:
            several methods or targets.
        tokens: as for `text_records`; None with records.
        sign, outlier_perc: as in Captum's pictures of images, see `visualize_image`.
        merge_pieces, show_special: as for `text_records`.
        titles (sequence of str, optional): one for each example.
        captions (Mapping, optional): label -> what is said beside its row, one for each example.
        legend (bool): whether the colours are explained.
        width (float): of the figure, in inches.
        max_lines (int): of a longer text the figure shows its most relevant lines, and says where
            others are left out; the HTML has all of it.

    Returns:
        Picture: a figure, whose HTML form is text.
    """
    raise NotImplementedError
