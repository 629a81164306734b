"""What is asked about a prediction: a class by its name or number, or the next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_attn._checks import finite
from captum_attn.errors import TargetError
from captum_attn.evaluation.loaded import Loaded
from captum_attn.metrics.shared import tensor_of

__all__ = ["Explained", "ask"]

SHOWN = 3  # likeliest classes that are printed
LISTED = 12  # names in an error


@dataclass(frozen=True)
class Explained:
    """What is explained, and what the model says.

    Args:
        target (int or tuple): a Captum target: the class, or (position, token) of the next token.
        name (str): of the class or token.
        probability (float): what the model gives it.
        likely (tuple of (str, float)): the likeliest, with their probabilities.
        about (str): the token whose class it is, of a model that gives each of them one.
    """

    target: int | tuple[int, int]
    name: str
    probability: float
    likely: tuple[tuple[str, float], ...]
    about: str = ""

    @property
    def question(self) -> str:
        """``"why sport (0.97)?"``, of a tag ``"why is 'Paris' LOC (0.97)?"``."""
        of_token = f"is {self.about!r} " if self.about else ""
        return f"why {of_token}{self.name} ({self.probability:.2f})?"

    @property
    def prediction(self) -> str:
        """``"sport 0.97, music 0.01, travel 0.01"``."""
        return ", ".join(f"{name} {probability:.2f}" for name, probability in self.likely)


def ask(
    loaded: Loaded,
    inputs: Tensor | Mapping[str, Any],
    given: str = "predicted",
    token: str | None = None,
) -> Explained:
    """Runs the model on one input and finds what is asked about it.

    Args:
        loaded (Loaded): the model.
        inputs (Tensor or Mapping): a batch of one.
        given (str): "predicted", the name of a class, or its number; of a language model, a token
            as text, or its number. A name goes before a number.
        token (str, optional): of a model that gives every token a class, the word that is asked
            about, or the number of its token.

    Returns:
        Explained: the target and its name.

    Raises:
        TargetError: where the model has no such class or token, or the text no such word.

    Examples::

        >>> loaded = load("topics", [])
        >>> ask(loaded, loaded.tokenizer("a goal", return_tensors="pt"), "music").target
        7
    """
    with torch.no_grad():
        output = loaded.model(**inputs) if isinstance(inputs, Mapping) else loaded.model(inputs)
    logits = tensor_of(output)
    logits = finite("the model's output", logits, "look at its weights and at the input")
    place = _tagged(loaded, inputs, logits[0], token) if loaded.tags else -1
    logits = logits[0, place] if loaded.next_token or loaded.tags else logits[0]
    likely = logits.double().sigmoid() if loaded.independent else logits.double().softmax(-1)
    best = likely.topk(min(SHOWN, len(likely))).indices.tolist()
    number = best[0] if given == "predicted" else _number(loaded, given, len(likely))
    at: int | tuple[int, int] = number
    if loaded.next_token or loaded.tags:
        assert isinstance(inputs, Mapping)
        at = (place % inputs["input_ids"].shape[1], number)
    return Explained(
        at,
        _name(loaded, number),
        float(likely[number]),
        tuple((_name(loaded, i), float(likely[i])) for i in best),
        token_texts(loaded, inputs)[place] if loaded.tags else "",
    )


def token_texts(loaded: Loaded, inputs: Any) -> list[str]:
    """The tokens of a text as it has them, special ones included."""
    return [loaded.tokenizer.decode([i]).strip() for i in inputs["input_ids"][0].tolist()]


def _tagged(loaded: Loaded, inputs: Any, logits: Tensor, token: str | None) -> int:
    """The position that is asked about: of a number, or of a word's first token."""
    tokens = token_texts(loaded, inputs)
    special = [i in loaded.tokenizer.all_special_ids for i in inputs["input_ids"][0].tolist()]
    if token is not None:
        if token.isdecimal() and len(token) < 10 and int(token) < len(tokens):
            return int(token)
        ids = loaded.tokenizer.encode(token, add_special_tokens=False)
        wanted = loaded.tokenizer.decode(ids[:1]).strip().casefold() if ids else ""
        for position, text in enumerate(tokens):
            if not special[position] and text.casefold() == wanted:
                return position
    pairs = zip(tokens, logits.argmax(-1).tolist(), special, strict=True)
    tags = " ".join(f"{t}/{_name(loaded, tag)}" for t, tag, apart in pairs if not apart)
    said = "gives every token a class" if token is None else f"sees no {token!r}"
    raise TargetError(
        f"--token: the model {said}; expected one of its tokens, or a number below {len(tokens)}: "
        f"{tags[:400]}"
    )


def _name(loaded: Loaded, number: int) -> str:
    if loaded.next_token:
        return repr(loaded.tokenizer.decode([number]))  # spaces and line ends are seen
    return loaded.labels.get(number, str(number))


def _number(loaded: Loaded, given: str, count: int) -> int:
    """The class or token of a name or number."""
    found = _token(loaded, given) if loaded.next_token else _class(loaded, given)
    if found is not None:
        return found
    if given.isdecimal():
        if len(given) < 20 and int(given) < count:
            return int(given)
        raise TargetError(f"--target: the model has {count} outputs, 0 to {count - 1}; got {given}")
    if loaded.next_token:
        ids = loaded.tokenizer.encode(given, add_special_tokens=False)
        raise TargetError(
            f"--target: {given!r} is {len(ids)} tokens of this model "
            f"({', '.join(_name(loaded, i) for i in ids)}); expected one"
        )
    names = list(dict.fromkeys(loaded.labels.values()))
    more = f", ... {len(names)} in all" if len(names) > LISTED else ""
    known = f"one of {', '.join(names[:LISTED])}{more}; or " if names else ""
    raise TargetError(
        f"--target: the model has no class {given!r}: expected predicted, {known}a number below "
        f"{count}"
    )


def _class(loaded: Loaded, given: str) -> int | None:
    """By the whole name, or by one of the names that a comma separates ("tabby, tabby cat")."""
    wanted = given.strip().casefold()
    for number, name in loaded.labels.items():
        if name.strip().casefold() == wanted:
            return number
    for number, name in loaded.labels.items():
        if wanted in (part.strip().casefold() for part in name.split(",")):
            return number
    return None


def _token(loaded: Loaded, given: str) -> int | None:
    """The one token of a text, as it stands or behind a space; None where it is several."""
    for text in (given, f" {given}"):
        ids = loaded.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != loaded.tokenizer.unk_token_id:
            return ids[0]
    return None
