"""A text as the model reads it, and its words by their relevance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.evaluation.loaded import Loaded
from captum_attn.visualization import Word, words_of

__all__ = ["encoded", "ranking", "words_in"]

MOST = 0.5  # share of the relevance from which on special tokens are shown


def encoded(loaded: Loaded, text: str, device: str = "cpu", second: str | None = None) -> Any:
    """The tokenizer's output for one text, or a pair, which is not cut.

    Args:
        loaded (Loaded): a text model.
        text (str): what is explained.
        device (str, optional): where the model is. Default: "cpu".
        second (str, optional): the other text of a pair.

    Returns:
        BatchEncoding: tensors (1, n).

    Raises:
        InputError: where the text has no word, or more tokens than the model reads.

    Examples::

        >>> encoded(load("topics", []), "a goal")["input_ids"].shape
        torch.Size([1, 4])
    """
    for one in (text, second):
        ids = [] if one is None else loaded.tokenizer(one)["input_ids"]
        if one is not None and not set(ids) - set(loaded.tokenizer.all_special_ids):
            raise InputError(f"the text {one!r} has no words; give it at least one")
    pair = (text,) if second is None else (text, second)
    inputs = loaded.tokenizer(*pair, return_tensors="pt")
    count, longest = inputs["input_ids"].shape[1], _longest(loaded)
    if count > longest:
        raise InputError(
            f"the text has {count} tokens, the model reads {longest}; give it a shorter one"
        )
    return inputs.to(device)


def _longest(loaded: Loaded) -> int:
    """Of a text, in tokens; a tokenizer without a limit has a huge one."""
    config = getattr(loaded.model, "config", None)
    places = getattr(config, "max_position_embeddings", None) or loaded.tokenizer.model_max_length
    return min(loaded.max_length or places, places, loaded.tokenizer.model_max_length)


def words_in(
    loaded: Loaded, inputs: Any, relevance: Tensor, texts: Sequence[str] = ()
) -> list[Word]:
    """The words, as they stand in the text or the pair; special tokens are marked.

    Args:
        loaded (Loaded): the model.
        inputs (BatchEncoding): what was explained.
        relevance (Tensor): (n,).
        texts (sequence of str): what was encoded. Default: words as the tokenizer has them.

    Returns:
        list of Word: `sentence` says of which text of a pair.
    """
    ids = inputs["input_ids"][0].tolist()
    special = [token in loaded.tokenizer.all_special_ids for token in ids]
    tokens = loaded.tokenizer.convert_ids_to_tokens(ids)
    fast = getattr(inputs, "encodings", None)
    of_text = list(fast[0].sequence_ids) if fast else [0] * len(ids)
    more: dict[str, Any] = {}
    if fast and texts:
        # The second text begins behind the first, as one that both are read from.
        begins = [0, len(texts[0]) + 1]
        spans = [
            None if k is None else (begins[k] + start, begins[k] + end)
            for k, (start, end) in zip(of_text, fast[0].offsets, strict=True)
        ]
        more = {"spans": spans, "text": "\n".join(texts)}
    found = words_of(tokens, relevance.tolist(), special=special, **more)
    return [w._replace(sentence=of_text[w.positions[0]] or 0) for w in found]


def _most_is_special(words: Sequence[Word]) -> bool:
    total = sum(abs(word.relevance) for word in words)
    return sum(abs(word.relevance) for word in words if word.special) > MOST * total


def ranking(columns: Mapping[str, list[Word]], top: int) -> str:
    """A table of the words, the most relevant by the first method first.

    Special tokens are left out, unless they hold most of what one of the methods found; a line
    says so.

    Args:
        columns (Mapping): name of a method -> its words.
        top (int): how many words.

    Returns:
        str: a line for each word, a column for each method.

    Examples::

        >>> print(ranking({"GAE": words_in(loaded, inputs, torch.tensor([0.0, 0.1, 0.7, 0.0]))}, 2))
                GAE
          goal  0.70
          a     0.10
    """
    with_special = any(_most_is_special(words) for words in columns.values())
    words = {
        name: [w for w in found if with_special or not w.special] for name, found in columns.items()
    }
    first = next(iter(words.values()))
    order = sorted(range(len(first)), key=lambda i: -abs(first[i].relevance))[:top]
    cells = {name: _formatted([found[i].relevance for i in order])
             for name, found in words.items()}  # fmt: skip
    wide = max(len(first[i].text) for i in order)
    lines = ["  ".join([" " * wide, *words])]
    for row, i in enumerate(order):
        values = (f"{column[row]:>{len(name)}}" for name, column in cells.items())
        lines.append("  ".join([f"{first[i].text:<{wide}}", *values]))
    if len(first) > len(order):
        lines.append(f"... {len(first)} words in all, see --top")
    if with_special:
        lines.append("special tokens are shown, because they hold most of the relevance")
    if any(w.relevance < 0 for found in words.values() for w in found):
        lines.append("positive: for the answer, negative: against it")
    return "\n".join(f"  {line}" for line in lines)


def _formatted(values: Sequence[float]) -> list[str]:
    """One precision for a column; all with their signs where one is negative."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest and not 1e-3 <= largest < 1e4:
        made = [f"{value:.2e}" for value in values]
    else:
        digits = 3 if largest < 1 else 2 if largest < 10 else 1 if largest < 100 else 0
        made = [f"{value:.{digits}f}" for value in values]
    signs = any(value < 0 for value in values)
    return [f"+{one}" if signs and not one.startswith("-") else one for one in made]
