"""Texts with their words coloured, as a figure and as a page."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from captum.attr._utils.visualization import VisualizationDataRecord
from torch import Tensor

from captum_attn._checks import flag, number, plain
from captum_attn.errors import InputError
from captum_attn.visualization._arrays import array, by_label, check_counts
from captum_attn.visualization._examples import examples_of, word_lists
from captum_attn.visualization._options import checked_options
from captum_attn.visualization._style import (
    EMPTY,
    LEFT_OUT,
    of_sign,
    resolved_sign,
    scale_limit,
    shares_of,
)
from captum_attn.visualization._text_figure import Line, TextPicture
from captum_attn.visualization.picture import Picture
from captum_attn.visualization.words import Word

__all__ = ["text_records", "visualize_text"]


BOUNDARY = "│"  # between the texts of a pair
MOST = 0.5  # share of the relevance from which on special tokens are shown


def _special(name: str, value: Any) -> bool | str:
    return value if isinstance(value, str) and value == "auto" else flag(name, value)


@checked_options()
def text_records(
    attributions: Any,
    tokens: Any,
    *,
    text: str | Sequence[str] | None = None,
    merge_pieces: bool = True,
    show_special: bool = False,
    pred_class: Any = "",
    pred_prob: Any = float("nan"),
    true_class: Any = "",
    attr_class: Any = "",
    attr_score: Any = None,
    convergence_score: Any = float("nan"),
) -> list[VisualizationDataRecord]:
    """Captum's records of texts, for `captum.attr.visualization.visualize_text` and for this one.

    Args:
        attributions (Tensor or array): (n,) or (B, n), relevance of the tokens; (B, n, D) of
            embeddings is summed.
        tokens (BatchEncoding, sequence of str, or sequence of these): a fast tokenizer's output, or
            the tokens as its `convert_ids_to_tokens` gives them, padding included.
        text (str or sequence of str, optional): what was encoded. With a BatchEncoding the words
            are shown as they stand in it, also where the tokenizer changes or does not know them.
        merge_pieces (bool): whether word pieces are joined, their relevance added. Default: True.
        show_special (bool): whether [CLS], </s> and the like are shown. Padding never is.
            Default: False.
        pred_class, pred_prob, true_class, attr_class, attr_score, convergence_score: what Captum's
            record has, for all examples or a list with one for each. Default of `attr_score`: the
            sum of the relevance that is shown.

    Returns:
        list of VisualizationDataRecord: one for each example, `raw_input_ids` its words and
        `word_attributions` their relevance divided by the largest magnitude.

    Raises:
        InputError: if relevance and tokens do not fit, or are not finite.

    Examples::

        >>> inputs = tokenizer("A gorgeous movie.", return_tensors="pt")
        >>> relevance = gae.attribute(inputs, target=1)["input_ids"]
        >>> (record,) = text_records(relevance, inputs, pred_class="positive", pred_prob=0.98)
        >>> record.raw_input_ids
        ['a', 'gorgeous', 'movie', '.']
    """
    examples = examples_of(attributions, tokens, text, merge_pieces)
    records = []
    for i, words in enumerate(examples):
        shown = _shown(words, show_special)
        relevance = [word.relevance for word in shown]
        values = torch.tensor(relevance, dtype=torch.float64, device="cpu")
        largest = float(values.abs().max()) if len(values) else 0.0
        given = {
            "pred_prob": pred_prob,
            "pred_class": pred_class,
            "true_class": true_class,
            "attr_class": attr_class,
            "attr_score": float(values.sum()) if attr_score is None else attr_score,
            "convergence_score": convergence_score,
        }
        for name, value in given.items():
            if isinstance(value, (list, tuple)):
                check_counts(len(examples), {name: value})
                given[name] = value[i]
            given[name] = _checked_part(name, given[name])
        records.append(
            VisualizationDataRecord(
                word_attributions=values / (largest or 1.0),
                raw_input_ids=[word.text for word in shown],
                **given,
            )
        )
    return records


@checked_options(show_special=_special)
def visualize_text(
    attributions: Any,
    tokens: Any = None,
    *,
    text: str | Sequence[str] | None = None,
    sign: str = "auto",
    outlier_perc: float = 0,
    merge_pieces: bool = True,
    show_special: bool | str = "auto",
    titles: Sequence[str] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    legend: bool = True,
    width: float = 9.0,
    max_lines: int = 40,
    left_out: Any = None,
) -> Picture:
    """Draws texts with each word on the colour of its relevance; `.html()` is text, too.

    The largest magnitude of a text, among the words that are shown, has the full colour.

    Args:
        attributions (Tensor, array, records, or Mapping of label to such): (n,) or (B, n),
            relevance of the tokens, or records, `text_records`' or Captum's own. A Mapping has a
            row for each label: several methods or targets.
        tokens: as for `text_records`; None with records, and where the attributions are lists of
            `Word`.
        text, merge_pieces: as for `text_records`.
        show_special (bool or "auto"): whether [CLS], </s> and the like are shown; "auto": where
            they hold more than half of the relevance. Where they are hidden, a note says which
            share they have. Default: "auto".
        sign (str): as for `visualize_image`. Default: "auto".
        outlier_perc (float): as for `visualize_image`. Default: 0.
        titles (sequence of str, optional): one for each example. Default: what records say.
        captions (Mapping, optional): label -> what is said behind its texts, one for each example.
        legend (bool): whether the colours are explained. Default: True.
        width (float): of the figure, in inches. Default: 9.
        max_lines (int): of a longer text the figure shows the lines with the most relevant words,
            and says where others are left out; the HTML has all of it. Default: 40.
        left_out (Tensor, array, or Mapping of label to such, optional): (n,) or (B, n) bool, as a
            method's `left_out` returns it: the tokens whose relevance was taken away have a dashed
            frame, also where special tokens are hidden. Default: none.

    Returns:
        Picture: a figure whose HTML form is text, too.

    Raises:
        InputError: if relevance and tokens do not fit, or are not finite.
        OptionError: for an unknown option.

    Examples::

        >>> both = {"GAE": gae.attribute(inputs, target=1)["input_ids"],
        ...         "rollout": rollout.attribute(inputs)["input_ids"]}
        >>> visualize_text(both, inputs, titles=["positive (0.98)"]).save("why.html")
    """
    labelled = {
        label: _examples(values, tokens, text, merge_pieces, label)
        for label, values in by_label(attributions).items()
    }
    headings = next(iter(labelled.values()))[1]
    marks = {} if left_out is None else by_label(left_out)
    if unknown := set(marks) - {""} - set(labelled):
        raise InputError(f"left_out: expected some of {list(labelled)}, got {sorted(unknown)}")
    columns = {
        label: _marked(examples, marks.get(label, marks.get("")))
        for label, (examples, _) in labelled.items()
    }
    count = len(headings)
    check_counts(count, {f"attributions[{k!r}]": v for k, v in columns.items()})
    check_counts(count, {"titles": titles})
    check_counts(count, {f"captions[{k!r}]": v for k, v in (captions or {}).items()})
    blocks = []
    signs = {
        label: resolved_sign(sign, [np.array([w.relevance for w in words]) for words in examples])
        for label, examples in columns.items()
    }
    for i in range(count):
        lines = [
            _line(
                label,
                examples[i],
                signs[label],
                outlier_perc,
                show_special,
                (captions or {}).get(label, [""] * count)[i],
            )
            for label, examples in columns.items()
        ]
        blocks.append((headings[i] if titles is None else titles[i], lines))
    named = set(signs.values()) if legend else set()
    if any(word.left_out for examples in columns.values() for words in examples for word in words):
        named |= {LEFT_OUT} if legend else set()
    return TextPicture(blocks, width=width, max_lines=max_lines, signs=named)


def _checked_part(name: str, value: Any) -> Any:
    """A probability or a score, NaN where it is not known; or the name of a class."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if name.endswith("class"):
        return plain(name, value)
    unknown = value is None or (isinstance(value, Real) and math.isnan(value))
    return value if unknown else number(name, value)


def _examples(
    values: Any, tokens: Any, text: Any, merge: bool, label: str
) -> tuple[list[list[Word]], list[str]]:
    """The words and the heading of each example."""
    records = [values] if isinstance(values, VisualizationDataRecord) else values
    name = f"attributions[{label!r}]" if label else "attributions"
    listed = isinstance(records, (list, tuple)) and len(records) > 0
    if listed and all(isinstance(record, VisualizationDataRecord) for record in records):
        of_records = [
            examples_of(r.word_attributions, r.raw_input_ids, None, merge, name) for r in records
        ]
        return [one for (one,) in of_records], [_heading(record) for record in records]
    if (words := word_lists(values)) is not None:
        return words, [""] * len(words)
    if tokens is None:
        raise InputError(
            f"{name}: expected `tokens` beside relevance, or records of `text_records` or Captum"
        )
    found = examples_of(values, tokens, text, merge, name)
    return found, [""] * len(found)


def _heading(record: VisualizationDataRecord) -> str:
    """What a record says, as Captum's table has it."""
    probability = record.pred_prob
    known = probability is not None and probability == probability
    said = {
        "predicted": f"{record.pred_class} ({probability:.2f})" if known else record.pred_class,
        "true": record.true_class,
        "explained": record.attr_class,
    }
    return ", ".join(f"{name} {value}" for name, value in said.items() if str(value))


def _marked(examples: list[list[Word]], left_out: Any) -> list[list[Word]]:
    """The words of each example, those marked of which all tokens were left out."""
    if left_out is None:
        return examples
    rows = np.atleast_2d(array(left_out, "left_out")) != 0
    last = [max(place for word in words for place in word.positions) for words in examples]
    if rows.ndim != 2 or len(rows) != len(examples) or rows.shape[1] <= max(last):
        raise InputError(
            f"left_out: expected (B, n) for {len(examples)} examples of up to {max(last) + 1} "
            f"tokens, got {rows.shape}"
        )
    return [
        [word._replace(left_out=bool(row[list(word.positions)].all())) for word in words]
        for words, row in zip(examples, rows, strict=True)
    ]


def _with_boundary(words: list[Word]) -> list[Word]:
    """With a bar where the second text of a pair begins."""
    found: list[Word] = []
    for before, word in zip([None, *words], words, strict=False):
        if before is not None and word.sentence > before.sentence:
            found.append(Word(BOUNDARY, 0.0))
        found.append(word)
    return found


def _shown(words: list[Word], show_special: bool) -> list[Word]:
    return [word for word in words if show_special or not word.special or word.left_out]


def _line(
    label: str, words: list[Word], sign: str, outlier_perc: float, special: bool | str, caption: str
) -> Line:
    auto = special == "auto"
    if auto:
        total = sum(abs(word.relevance) for word in words)
        special = sum(abs(word.relevance) for word in words if word.special) > MOST * total
    shown = _with_boundary(_shown(words, bool(special)))
    values = np.array([word.relevance for word in shown])
    limit = scale_limit(of_sign(values, sign), outlier_perc)
    notes = [caption] if caption else []
    if limit == 0:
        warnings.warn(
            f"{label or 'the text'} has no relevance to show: drawn as empty", stacklevel=3
        )
        notes.append(EMPTY)
    hidden = sum(abs(word.relevance) for word in words if word.special and (auto or not special))
    if hidden:
        share = hidden / sum(abs(word.relevance) for word in words)
        notes.append(f"special tokens {share:.0%}" if share >= 0.005 else "")
    shares = shares_of(values, sign, limit).tolist()
    return Line(label, shown, shares, ", ".join(filter(None, notes)))
