"""Relevance of tokens and the tokens, in the forms that users have, as words of each example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from captum_attn._checks import listed
from captum_attn.errors import InputError
from captum_attn.visualization._arrays import array
from captum_attn.visualization.words import EXPECTED, Word, tokens_of, words_of


class Tokens(NamedTuple):
    """The tokens of one example.

    Attributes:
        tokens (list of str): as the tokenizer writes them, without padding.
        real (ndarray): (n,), bool: which of the relevance's positions they have.
        special (list of bool or None): which are no part of the text.
        spans (list of (int, int) or None): where they stand in it.
        sentences (list of int or None): in which text of a pair they are.
    """

    tokens: list[str]
    real: np.ndarray
    special: list[bool] | None = None
    spans: list[tuple[int, int] | None] | None = None
    sentences: list[int] | None = None


def token_lists(tokens: Any) -> list[Tokens]:
    """The tokens of each example, of a BatchEncoding or of lists."""
    if hasattr(tokens, "encodings"):
        if tokens.encodings is None:
            raise InputError(
                "tokens: this tokenizer gives no positions (it is not a fast one); pass "
                "tokenizer.convert_ids_to_tokens(ids) for each example"
            )
        found = [_of_encoding(encoding) for encoding in tokens.encodings]
    else:
        items = listed("tokens", tokens, EXPECTED)
        lists = [items] if items and isinstance(items[0], str) else items
        found = [_of_list(one, "tokens" if lists[0] is items else f"tokens[{i}]")
                 for i, one in enumerate(lists)]  # fmt: skip
    if not found or not all(one.tokens for one in found):
        raise InputError("tokens: expected at least one token for each example, got none")
    return found


def _of_list(tokens: Any, name: str) -> Tokens:
    strs = tokens_of(name, tokens)
    return Tokens(strs, np.ones(len(strs), dtype=bool))


def _of_encoding(encoding: Any) -> Tokens:
    real = np.array(encoding.attention_mask, dtype=bool)
    kept = real.nonzero()[0].tolist()
    return Tokens(
        [encoding.tokens[i] for i in kept],
        real,
        [bool(encoding.special_tokens_mask[i]) for i in kept],
        [encoding.offsets[i] for i in kept],
        [encoding.sequence_ids[i] or 0 for i in kept],
    )


def examples_of(
    attributions: Any,
    tokens: Any,
    written: str | Sequence[str] | None = None,
    merge: bool = True,
    name: str = "attributions",
) -> list[list[Word]]:
    """The words of each example: of (n,), (B, n) or (B, n, D) relevance, and its tokens."""
    lists = token_lists(tokens)
    whole = written is None or isinstance(written, str)
    texts = [written] * len(lists) if whole else listed("text", written, "str")
    rows = _rows(attributions, name)
    for what, count in ((name, len(rows)), ("text", len(texts))):
        if count != len(lists):
            raise InputError(
                f"{what}: expected one for each of the {len(lists)} examples of `tokens`, got "
                f"{count}"
            )
    found = []
    for row, one, its_text in zip(rows, lists, texts, strict=True):
        if row.shape != one.real.shape:
            raise InputError(
                f"{name}: expected the relevance of {len(one.real)} tokens, got {len(row)}; pass "
                "one number for each token, special tokens and padding included"
            )
        more: dict[str, Any] = {"special": one.special, "spans": one.spans, "text": its_text}
        words = words_of(one.tokens, row[one.real].tolist(), merge=merge, **more)
        if not words:
            raise InputError(f"tokens: expected at least one word, got padding alone: {one.tokens}")
        places, of_text = one.real.nonzero()[0].tolist(), one.sentences or [0] * len(one.tokens)
        found.append([
            w._replace(
                positions=tuple(places[i] for i in w.positions), sentence=of_text[w.positions[0]]
            )
            for w in words
        ])  # fmt: skip
    return found


def word_lists(values: Any) -> list[list[Word]] | None:
    """Lists of words, where that is what was given: of one example or of several."""
    if not isinstance(values, (list, tuple)) or not values:
        return None
    if all(isinstance(value, Word) for value in values):
        return [list(values)]
    lists = [value for value in values if isinstance(value, (list, tuple)) and value]
    if len(lists) == len(values) and all(isinstance(w, Word) for words in lists for w in words):
        return [list(words) for words in lists]
    return None


def _rows(attributions: Any, name: str) -> list[np.ndarray]:
    """(n,) of each example; embeddings' attributions (B, n, D) are summed."""
    listed = isinstance(attributions, (list, tuple)) and len(attributions) > 0
    if listed and not isinstance(attributions[0], (int, float)):
        return [row for one in attributions for row in _rows(one, name)]
    values = array(attributions, name)
    if values.ndim not in (1, 2, 3) or 0 in values.shape:
        raise InputError(f"{name}: expected (n,), (B, n) or (B, n, D), got {values.shape}")
    values = values.sum(-1) if values.ndim == 3 else values
    return [values] if values.ndim == 1 else list(values)
