"""The words of the demo's questions, one token each; unknown ones are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_attn.errors import InputError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FIGURES = tuple(map(str, range(len(DIGITS))))
SIDES = (("left", "right"), ("top", "bottom"))  # by axis, x and y
WORDS = (
    *"is there a the in picture do you see can digit does show on at ?".split(),
    *SIDES[0],
    *SIDES[1],
    *DIGITS,
    *FIGURES,
)
# "an eight" would give the digit away to whoever reads only the article.
ALIASES = {"an": "a"}
PAD, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # the last for training only
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
MAX_TOKENS = 16
WORD = re.compile(r"\w+|[^\w\s]")


def tokenize(texts: str | Sequence[str]) -> dict[str, Tensor]:
    """Questions as the model reads them: [CLS], one token per word, [SEP], padded to the longest.

    Args:
        texts (str or sequence of str): the questions.

    Returns:
        dict: ``input_ids`` and ``attention_mask`` (1 where a token is not padding), both
        ``(B, n)``, int64.

    Raises:
        InputError: as :func:`split_words`, or where there is no question.

    Examples::

        >>> tokenize(["is there a 3 ?", "do you see a 3 ?"])["attention_mask"].sum(1)
        tensor([7, 8])
    """
    rows = [
        [VOCABULARY[token] for token in (CLS, *words, SEP)]
        for words in map(split_words, [texts] if isinstance(texts, str) else texts)
    ]
    if not rows:
        raise InputError("no question was given; give at least one, such as 'is there a 3 ?'")
    longest = max(map(len, rows))
    ids = torch.tensor([row + [VOCABULARY[PAD]] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != VOCABULARY[PAD]).long()}


def split_words(text: str) -> list[str]:
    """The words of a question, as they stand in the vocabulary.

    Args:
        text (str): a question. Capitals do not matter, and "an" is "a".

    Returns:
        list of str: its words; the question mark is one of them.

    Raises:
        InputError: where the question has no word, too many, or one that is not in ``WORDS``.

    Examples::

        >>> split_words("Is there an 8?")
        ['is', 'there', 'a', '8', '?']
    """
    words = [ALIASES.get(word, word) for word in WORD.findall(text.lower())]
    unknown = [word for word in dict.fromkeys(words) if word not in WORDS]
    if unknown:
        raise InputError(
            f"the question {text!r} has unknown words: {', '.join(map(repr, unknown))}; use only "
            f"{', '.join(WORDS)}"
        )
    if not words or len(words) > MAX_TOKENS - 2:
        raise InputError(
            f"the question {text!r} has {len(words)} words; give it 1 to {MAX_TOKENS - 2}, such as "
            "'is there a 3 ?'"
        )
    return words
