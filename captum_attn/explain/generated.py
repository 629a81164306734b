"""The next tokens of a prompt one by one, each with what it goes back to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_attn.errors import OptionError
from captum_attn.evaluation.loaded import Loaded
from captum_attn.explain.explained import Explained
from captum_attn.explain.ranking import words_in
from captum_attn.explain.written import Answer
from captum_attn.visualization import Picture, visualize_generation

__all__ = ["answers_of", "picture_of", "table_of"]

NAMED = 4  # words behind a generated token


def answers_of(
    name: str,
    loaded: Loaded,
    inputs: Any,
    methods: dict[str, tuple[Any, dict[str, Any]]],
    count: int,
) -> tuple[list[Answer], dict[str, Any]]:
    """Lets a language model go on, and explains each token that it wrote.

    Args:
        name (str): the model's.
        loaded (Loaded): a causal language model.
        inputs (BatchEncoding): the prompt.
        methods (dict): name -> (an attention method on the model, its options).
        count (int): tokens at most.

    Returns:
        tuple: an Answer for each token, and each method's `Generation`.

    Raises:
        OptionError: for a method that is not of captum_attn.
    """
    from captum_attn.attr import AttentionAttribution
    from captum_attn.generation import explain_generation

    written: dict[str, Any] = {}
    new: Tensor | None = None
    for method, (attribution, options) in methods.items():
        if not isinstance(attribution, AttentionAttribution):
            raise OptionError(f"--generate: expected methods of captum_attn, got {method}")
        given = (
            {"max_new_tokens": count} if new is None else {"generated": new, "with_prompt": False}
        )
        written[method] = explain_generation(attribution, inputs, **given, **options)
        new = written[method].tokens
    first = next(iter(written.values()))
    steps = [t for t in range(first.tokens.shape[1]) if bool(first.valid[0, t])]
    asked = _asked(loaded, first)
    return [
        Answer(name, asked[t], {method: _words(loaded, one, t) for method, one in written.items()})
        for t in steps
    ], written


def _asked(loaded: Loaded, written: Any) -> list[Explained]:
    """Each token's question: where it was written, and how likely it was."""
    with torch.no_grad():
        logits = loaded.model(input_ids=written.columns).logits[0].double()
    begin = written.columns.shape[1] - written.tokens.shape[1]
    found = []
    for t, number in enumerate(written.tokens[0].tolist()):
        likely = logits[begin + t].softmax(-1)
        best = likely.topk(min(3, len(likely))).indices.tolist()
        pairs = tuple((repr(loaded.tokenizer.decode([i])), float(likely[i])) for i in best)
        name = repr(loaded.tokenizer.decode([number]))
        found.append(Explained((begin + t, number), name, float(likely[number]), pairs))
    return found


def _words(loaded: Loaded, written: Any, t: int) -> list[Any]:
    """The prompt's words and those that were written before the t-th token."""
    length = written.columns.shape[1] - written.tokens.shape[1] + 1 + t
    relevance = written.relevance[written.stream][0, t]
    inputs = {"input_ids": written.columns[:, :length]}
    return words_in(loaded, inputs, relevance[-written.columns.shape[1] :][:length])


def table_of(answers: list[Answer]) -> str:
    """A line for each token: what it was, how likely, and the words behind it."""
    wide = max(len(a.asked.name) for a in answers)
    method = next(iter(answers[0].words))
    lines = [f"{'token':<{wide}}  p     by {method}"]
    for answer in answers:
        words = sorted(answer.words[method], key=lambda w: -abs(w.relevance))[:NAMED]
        total = sum(abs(w.relevance) for w in answer.words[method]) or 1.0
        said = ", ".join(f"{w.text} {w.relevance / total:.0%}" for w in words)
        lines.append(f"{answer.asked.name:<{wide}}  {answer.asked.probability:.2f}  {said}")
    return "\n".join(f"  {line}" for line in lines)


def picture_of(written: dict[str, Any], loaded: Loaded) -> Picture:
    """The matrix of one method."""
    if len(written) > 1:
        raise OptionError("--out: a picture of --generate shows one method; give one, or a .json")
    ((method, found),) = written.items()
    return visualize_generation(found, loaded.tokenizer, titles=[method])
