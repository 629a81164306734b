"""A text as the model reads it, and its words by their relevance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.evaluation.loaded import Loaded
from captum_attn.visualization import Word, words_of

__all__ = ["encoded", "ranking"]


def encoded(loaded: Loaded, text: str, device: str = "cpu") -> Any:
    """The tokenizer's output for one text, which is not cut.

    Args:
        loaded (Loaded): a text model.
        text (str): what is explained.
        device (str, optional): where the model is. Default: "cpu".

    Returns:
        BatchEncoding: tensors (1, n).

    Raises:
        InputError: where the text has no word, or more tokens than the model reads.

    Examples::

        >>> encoded(load("topics", []), "a goal")["input_ids"].shape
        torch.Size([1, 4])
    """
    inputs = loaded.tokenizer(text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    if not set(ids) - set(loaded.tokenizer.all_special_ids):
        raise InputError(f"the text {text!r} has no words; give it at least one")
    longest = _longest(loaded)
    if len(ids) > longest:
        raise InputError(
            f"the text has {len(ids)} tokens, the model reads {longest}; give it a shorter one"
        )
    return inputs.to(device)


def _longest(loaded: Loaded) -> int:
    """Of a text, in tokens; a tokenizer without a limit has a huge one."""
    config = getattr(loaded.model, "config", None)
    places = getattr(config, "max_position_embeddings", None) or loaded.tokenizer.model_max_length
    return min(loaded.max_length or places, places, loaded.tokenizer.model_max_length)


def ranking(loaded: Loaded, relevance: Mapping[str, Tensor], inputs: Any, top: int) -> str:
    """A table of the words, the most relevant by the first method first.

    Args:
        loaded (Loaded): the model.
        relevance (Mapping): name of a method -> (n,).
        inputs (BatchEncoding): what was explained.
        top (int): how many words.

    Returns:
        str: a line for each word, a column for each method.

    Examples::

        >>> print(ranking(loaded, {"GAE": torch.tensor([0.0, 0.1, 0.7, 0.0])}, inputs, 2))
                GAE
          goal  0.7
          a     0.1
    """
    words = {name: _words(loaded, inputs, values) for name, values in relevance.items()}
    first = next(iter(words.values()))
    order = sorted(range(len(first)), key=lambda i: -abs(first[i].relevance))[:top]
    wide = max(len(first[i].text) for i in order)
    lines = ["  ".join([" " * wide, *words])]
    for i in order:
        values = (f"{column[i].relevance:{len(name)}.3g}" for name, column in words.items())
        lines.append("  ".join([f"{first[i].text:<{wide}}", *values]))
    if len(first) > len(order):
        lines.append(f"... {len(first)} words in all, see --top")
    return "\n".join(f"  {line}" for line in lines)


def _words(loaded: Loaded, inputs: Any, relevance: Tensor) -> list[Word]:
    """The words of the text, without special tokens."""
    ids = inputs["input_ids"][0].tolist()
    special = [token in loaded.tokenizer.all_special_ids for token in ids]
    tokens = loaded.tokenizer.convert_ids_to_tokens(ids)
    found = words_of(tokens, relevance.tolist(), special=special)
    return [word for word in found if not word.special]
