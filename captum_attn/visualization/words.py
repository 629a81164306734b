"""Word pieces joined into words, whatever marks of a tokenizer they carry."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from captum_attn._checks import flag, listed, shown, whole
from captum_attn._checks import text as checked_text
from captum_attn.errors import InputError
from captum_attn.visualization._arrays import array

EXPECTED = "str for each example (or a BatchEncoding), as tokenizer.convert_ids_to_tokens gives it"
PADDING = re.compile(r"\[PAD\]|<pad>|<\|pad\|>")
SPECIAL = re.compile(r"\[(CLS|SEP|BOS|EOS)\]|</?s>|<(bos|eos)>|<\|[^|<>]+\|>|<(start|end)_of_\w+>")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
STAND_IN = "\ufffd"
WORDPIECE, SENTENCE, BYTES, END, NONE = "##", "▁", "Ġ", "</w>", ""
# Scripts that are written without blanks between words.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
NO_BLANK_BEFORE, NO_BLANK_AFTER = re.compile(r"[.,;:!?%)\]}»”’'…]"), re.compile(r"[(\[{«“‘']")


class Word(NamedTuple):
    """A word as it is drawn.

    Attributes:
        text (str): the word.
        relevance (float): the sum over its pieces.
        gap (bool): whether a blank stands before it.
        special (bool): whether it is no part of the text: [CLS], </s>.
        positions (tuple of int): of its tokens.
        left_out (bool): whether its relevance was taken away, that of all its tokens.
        sentence (int): of a pair of texts, 0 for the first and 1 for the second.
    """

    text: str
    relevance: float
    gap: bool = True
    special: bool = False
    positions: tuple[int, ...] = ()
    left_out: bool = False
    sentence: int = 0

    def joined(self, text: str, relevance: float, position: int) -> Word:
        """With one piece more."""
        positions = (*self.positions, position)
        return self._replace(text=text, relevance=self.relevance + relevance, positions=positions)


def _byte_table() -> dict[str, int]:
    """The letters in which byte-level tokenizers (GPT-2, Llama 3) write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_table()


def _marks(tokens: Sequence[str]) -> str:
    """Which marks the tokens carry."""
    if any(token.startswith(WORDPIECE) and len(token) > 2 for token in tokens):
        return WORDPIECE
    if any(token.endswith(END) for token in tokens):
        return END
    if any("▁" in token for token in tokens):
        return SENTENCE
    if any("Ġ" in token or "Ċ" in token for token in tokens):
        return BYTES
    # Without a blank only what the bytes spell tells: letters beyond ASCII, or a mistake.
    letters = "".join(token for token in tokens if not SPECIAL.fullmatch(token))
    if letters.isascii() or not all(letter in BYTE_OF for letter in letters):
        return NONE
    return BYTES if _whole(bytes(BYTE_OF[letter] for letter in letters)) else NONE


def _bytes(token: str, marks: str) -> bytes:
    """What a piece writes; a blank in front of it where the tokenizer tells."""
    if marks == WORDPIECE:
        return token.removeprefix(WORDPIECE).encode()
    if marks == END:
        return token.removesuffix(END).encode()
    if marks == SENTENCE:
        byte = BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SENTENCE, " ").encode()
    if marks == BYTES and all(letter in BYTE_OF for letter in token):
        return bytes(BYTE_OF[letter] for letter in token)
    return token.encode()


def _decoded(piece: bytes) -> tuple[str, bytes]:
    """What bytes spell, with a stand-in for a letter that is not complete, and its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(piece)
    rest = decoder.getstate()[0]
    return text + STAND_IN * bool(rest), rest


def _whole(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _mark_only(text: str) -> bool:
    """Punctuation and symbols, which stand for themselves."""
    return bool(text) and all(unicodedata.category(letter)[0] in "PS" for letter in text)


def _continues(before: str, token: str, text: str, marks: str, ended: bool) -> bool:
    """Whether a piece goes on with the word that ends with `before`."""
    if marks in (WORDPIECE, NONE):
        return marks == WORDPIECE and token.startswith(WORDPIECE) and len(token) > 2
    if marks == END:
        return not ended
    if text == STAND_IN:  # as the letter before it, until it is known
        return not UNSPACED.match(before[-1:])
    if not text or text[0].isspace() or before[-1:].isspace():
        return not text
    at_ends = UNSPACED.match(before[-1:]) or UNSPACED.match(text[0])
    return not (at_ends or _mark_only(text) or _mark_only(before))


def words_of(
    tokens: Sequence[str],
    relevance: Sequence[float],
    *,
    special: Sequence[bool] | None = None,
    spans: Sequence[tuple[int, int] | None] | None = None,
    text: str | None = None,
    merge: bool = True,
) -> list[Word]:
    """The words of a tokenized text, the relevance of their pieces added up.

    Marks of WordPiece (##), SentencePiece (▁, <0x..>), byte-level (Ġ) and CLIP's (</w>) tokenizers
    are told apart by themselves. Punctuation, and pieces in scripts that are written without
    blanks, stay apart; the bytes of one letter never do.

    Args:
        tokens (sequence of str): as the tokenizer writes them.
        relevance (sequence of float): of every token.
        special (sequence of bool, optional): which tokens are no part of the text. Default: as
            their form tells.
        spans (sequence, optional): (start, end) of every token in `text`, None for special ones.
        text (str, optional): with `spans`: the words are shown as they stand here.
        merge (bool): whether pieces are joined. Default: True.

    Returns:
        list of Word: in reading order, without padding.

    Examples::

        >>> [word.text for word in words_of(["goal", "##keeper", "##s", "dive"], [1, 2, 3, 4])]
        ['goalkeepers', 'dive']
    """
    tokens = tokens_of("tokens", tokens)
    relevance = _one_each("relevance", array(relevance, "relevance"), len(tokens)).tolist()
    if special is not None:
        special = (_one_each("special", array(special, "special"), len(tokens)) > 0.5).tolist()
    spans = None if spans is None else _spans(spans, len(tokens))
    text = None if text is None else checked_text("text", text)
    merge = flag("merge", merge)
    marks = _marks(tokens)
    words: list[Word] = []
    ends: list[tuple[int, int] | None] = []  # of every word, in the text
    pending = b""  # bytes of a letter that is not complete
    ended = True
    for i, (token, value) in enumerate(zip(tokens, relevance, strict=True)):
        if PADDING.fullmatch(token):
            continue
        apart = bool(SPECIAL.fullmatch(token)) if special is None else bool(special[i])
        if apart:
            words.append(Word(token, float(value), True, True, (i,)))
            ends.append(None)
            pending, ended = b"", True
            continue
        unfinished = bool(pending)
        shown, pending = _decoded(pending + _bytes(token, marks))
        span = spans[i] if spans is not None else None
        inside = bool(words) and not words[-1].special
        before = words[-1].text if inside else ""
        if unfinished and inside:
            # The letter's first bytes were shown as a stand-in; now it is known.
            joined = words[-1].joined(before[:-1] + shown.strip(), value, i)
        elif merge and inside and _continues(before, token, shown, marks, ended):
            joined = words[-1].joined(before + shown.strip(), value, i)
        else:
            gap = _gap(shown, before, marks)
            words.append(Word(_visible(shown), float(value), gap, positions=(i,)))
            ends.append(span)
            ended = token.endswith(END)
            continue
        words[-1] = joined
        ended = token.endswith(END)
        if span is not None and ends[-1] is not None:
            ends[-1] = (ends[-1][0], span[1])
    return words if text is None or spans is None else _as_written(words, ends, text)


def tokens_of(name: str, tokens: Any) -> list[str]:
    """The tokens of one text."""
    found = listed(name, tokens, EXPECTED)
    if not found:
        raise InputError(f"{name}: expected at least one token for each example, got none")
    return [checked_text(f"{name}[{i}]", token) for i, token in enumerate(found)]


def _one_each(name: str, values: np.ndarray, count: int) -> np.ndarray:
    if values.shape != (count,):
        raise InputError(f"{name}: expected one for each token ({count}), got {values.shape}")
    return values


def _spans(given: Any, count: int) -> list[tuple[int, int] | None]:
    """(start, end) of each token."""
    spans = listed("spans", given, "(start, end), or None")
    if len(spans) != count:
        raise InputError(f"spans: expected one for each token ({count}), got {len(spans)}")
    for i, span in enumerate(spans):
        if span is not None and not (isinstance(span, (tuple, list)) and len(span) == 2):
            raise InputError(f"spans[{i}]: expected (start, end) or None, got {shown(span)}")
    starts_ends = [None if s is None else tuple(whole("spans", at, 0) for at in s) for s in spans]
    return cast("list[tuple[int, int] | None]", starts_ends)


def _visible(text: str) -> str:
    return text.strip() or ("↵" if "\n" in text else "␣")


def _gap(shown: str, before: str, marks: str) -> bool:
    if marks in (SENTENCE, BYTES):
        return shown[:1].isspace()
    unspaced = UNSPACED.match(shown[:1]) and UNSPACED.match(before[-1:])
    return not (unspaced or NO_BLANK_BEFORE.match(shown) or NO_BLANK_AFTER.fullmatch(before))


def _as_written(words: list[Word], ends: Sequence[tuple[int, int] | None], text: str) -> list[Word]:
    written: list[Word] = []
    last = 0
    for word, span in zip(words, ends, strict=True):
        if span is not None and span[1] > span[0]:
            start = span[0] + len(text[slice(*span)]) - len(text[slice(*span)].lstrip())
            shown = text[start : span[1]].strip()
            after_special = bool(written) and written[-1].special
            word = word._replace(text=shown or word.text, gap=start > last or after_special)
            last = span[1]
        written.append(word)
    return written
