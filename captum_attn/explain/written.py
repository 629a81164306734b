"""What was explained as numbers: JSON with all of it, CSV with a line for each word or pixel."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.explain.explained import Explained
from captum_attn.visualization import Word

__all__ = ["Answer", "write"]

DIGITS = 6  # significant ones of a number


@dataclass(frozen=True)
class Answer:
    """Why a model said something, by one method or several.

    Args:
        model (str): its name on the command line.
        asked (Explained): the question.
        words (dict): method -> list of Word, of a text.
        maps (dict): method -> (H, W), of a picture as the model takes it.
    """

    model: str
    asked: Explained
    words: dict[str, list[Word]] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)


def write(path: Path, answers: Sequence[Answer], about: dict[str, Any]) -> Path:
    """Writes a .json or a .csv.

    Args:
        path (Path): the file.
        answers (sequence of Answer): one for each model, or generated token.
        about (dict): what was explained, such as {"text": "a goal"}.

    Returns:
        Path: the file.

    Raises:
        InputError: where it cannot be written.
    """
    made = _json(answers, about) if path.suffix.lower() == ".json" else _csv(answers)
    try:
        path.write_text(made, encoding="utf-8", newline="")
    except OSError as problem:
        raise InputError(f"cannot write to '{path}' ({problem.strerror})") from problem
    return path


def _json(answers: Sequence[Answer], about: dict[str, Any]) -> str:
    found = [
        {
            "model": answer.model,
            "target": answer.asked.name,
            "number": answer.asked.target,
            "token": answer.asked.about or None,
            "probability": _plain(answer.asked.probability),
            "likely": {name: _plain(p) for name, p in answer.asked.likely},
            "methods": {
                **{name: {"words": [_word(w) for w in words]}
                   for name, words in answer.words.items()},
                **{name: {"map": [[_plain(v) for v in row] for row in values.tolist()]}
                   for name, values in answer.maps.items()},
            },
        }
        for answer in answers
    ]  # fmt: skip
    return json.dumps({**about, "explanations": found}, ensure_ascii=False, indent=1) + "\n"


def _word(word: Word) -> dict[str, Any]:
    return {
        "word": word.text, "relevance": _plain(word.relevance), "special": word.special,
        "sentence": word.sentence, "tokens": list(word.positions),
    }  # fmt: skip


def _csv(answers: Sequence[Answer]) -> str:
    lines = io.StringIO()
    of_text = any(answer.words for answer in answers)
    place = ["position", "word", "special"] if of_text else ["y", "x"]
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["model", "target", "probability", "method", *place, "relevance"])
    for answer in answers:
        asked = answer.asked
        first = [answer.model, asked.name, _plain(asked.probability)]
        table.writerows([*first, *row] for row in _rows(answer))
    return lines.getvalue()


def _rows(answer: Answer) -> Iterator[list[Any]]:
    for name, words in answer.words.items():
        for i, word in enumerate(words):
            yield [name, i, word.text, int(word.special), _plain(word.relevance)]
    for name, values in answer.maps.items():
        for y, x in torch.ones_like(values).nonzero().tolist():
            yield [name, y, x, _plain(float(values[y, x]))]


def _plain(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
