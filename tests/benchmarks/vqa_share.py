"""Which region and which word carried a "yes"? Held-out scenes, one question each.

    python -m tests.benchmarks.vqa_share            # 2,000 scenes, about 1,000 of them explained
    python -m tests.benchmarks.vqa_share --scenes 200 --methods GenericAttention
    python -m tests.benchmarks.vqa_share --picture tutorials/vqa_logical_inspection.png

The answers are measured on all scenes, the methods where the right answer is yes and the model
says so: then one region shows the digit that the question names, and one word names it. Where k
regions (or words) are equally the most relevant, each of them counts 1 / k. Words are those of the
question, without [CLS] and [SEP].
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import captum_attn
from captum_attn import objectives
from captum_attn.toy.digit_vqa import (
    NO,
    YES,
    Questions,
    Regions,
    load_digit_vqa,
    questions,
    regions,
)
from captum_attn.toy.scenes import scenes
from captum_attn.toy.vocabulary import SIDES, SPECIAL, VOCABULARY, tokenize
from tests.benchmarks.digit_share import mean_and_error
from tutorials.training.train_vqa import DIGIT_WORDS, accuracy

YES_RATHER_THAN_NO = objectives.logit_difference(YES, NO)
# The name of a row, the class, the options of `attribute`.
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("RawAttention", "RawAttention", {}),
    ("AttentionRollout", "AttentionRollout", {}),
    ("GenericAttention", "GenericAttention", {}),
    ("HeterogenousAttention, positive", "HeterogenousAttention", {"correction": "positive"}),
    ("HeterogenousAttention, absolute", "HeterogenousAttention", {"correction": "absolute"}),
    ("HeterogenousAttention, full", "HeterogenousAttention", {"correction": "full"}),
    (
        "HeterogenousAttention, full, yes − no",
        "HeterogenousAttention",
        {"correction": "full", "objective": YES_RATHER_THAN_NO},
    ),
    ("VTranM", "VTranM", {}),
)
SIDE_WORDS = [VOCABULARY[word] for pair in SIDES for word in pair]
BATCH = 50


class Share(NamedTuple):
    """One score per question, in [0, 1].

    Attributes:
        region (Tensor): the asked digit's region is the most relevant of the six.
        ahead (Tensor): it has more relevance than the other digit's region.
        word (Tensor): the word for the digit is the most relevant word.
        named (Tensor): the most relevant word names the digit or the side.
    """

    region: Tensor
    ahead: Tensor
    word: Tensor
    named: Tensor


def most_relevant(relevance: Tensor, right: Tensor) -> Tensor:
    """Share of the right ones (B, n) among the most relevant; -inf stands for no candidate."""
    top = relevance == relevance.amax(1, keepdim=True)
    return (top & right).sum(1) / top.sum(1)


def score(regions_: Tensor, words: Tensor, ids: Tensor, found: Regions, digits: Tensor) -> Share:
    """Scores relevance of regions (B, 6) and of words (B, n)."""
    asked = found.digits == digits[:, None]
    other = (found.digits >= 0) & ~asked
    on_digits = regions_.masked_fill(~(asked | other), -torch.inf)
    words = words.masked_fill(ids < len(SPECIAL), -torch.inf)
    digit_word = torch.isin(ids, torch.tensor(DIGIT_WORDS))
    side_word = torch.isin(ids, torch.tensor(SIDE_WORDS))
    return Share(
        most_relevant(regions_, asked),
        most_relevant(on_digits, asked),
        most_relevant(words, digit_word),
        most_relevant(words, digit_word | side_word),
    )


def evaluate(attribute: Any, found: Regions, asked: Questions) -> Share:
    """Scores a method on all questions; `attribute` takes the model's inputs."""
    words = tokenize(asked.texts)
    parts = []
    for rows in torch.arange(len(asked.texts)).split(BATCH):
        some = Regions(*(x[rows] for x in found))
        inputs = {name: x[rows] for name, x in words.items()} | some.inputs
        relevance = attribute(inputs)
        on_regions = relevance["visual_feats"].detach().sum(-1)
        on_words = relevance["input_ids"].detach()
        parts.append(score(on_regions, on_words, inputs["input_ids"], some, asked.digits[rows]))
    return Share(*(torch.cat(part).double() for part in zip(*parts, strict=True)))


def all_alike(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same relevance everywhere: scored, it is what a guess is right in."""
    return {name: torch.ones_like(x, dtype=torch.float32) for name, x in inputs.items()}


def answered_yes(
    model: torch.nn.Module, found: Regions, asked: Questions
) -> tuple[Regions, Questions]:
    """The scenes whose right answer is yes and whose question the model answers so."""
    with torch.no_grad():
        logits = model(**tokenize(asked.texts), **found.inputs).question_answering_score
    rows = ((asked.answers == YES) & (logits.argmax(1) == YES)).nonzero()[:, 0]
    texts, sides = ([x[i] for i in rows] for x in (asked.texts, asked.sides))
    return Regions(*(x[rows] for x in found)), Questions(
        texts, asked.digits[rows], sides, asked.answers[rows]
    )


def print_table(title: str, shares: dict[str, Share]) -> None:
    print(f"| {title} | asked region first | ahead of the other digit | digit word first |", end="")
    print(" digit or side word first |\n|---|---|---|---|---|")
    for name, share in shares.items():
        cells = (f"{100 * m:.1f} ± {100 * e:.1f} %" for m, e in map(mean_and_error, share))
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = [row for row in ROWS if hasattr(captum_attn, row[1])]
    parser.add_argument(
        "--methods", nargs="+", default=sorted({row[1] for row in rows}), metavar="NAME"
    )
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write it, and nothing else")
    options = parser.parse_args(arguments)

    model = load_digit_vqa()
    if options.picture:
        from captum_attn.demo.pictures import draw_inspections
        from captum_attn.demo.vqa import explain_examples

        draw_inspections(list(explain_examples(model))).save(options.picture)
        return 0
    found = regions(scenes(options.scenes, split="test", seed=options.seed), options.seed)
    asked = questions(found, options.seed)
    right = accuracy(model, found, asked)._asdict()
    print(f"{options.scenes} held-out scenes; right answers:", end=" ")
    print(", ".join(f"{name} {share:.1%}" for name, share in right.items()))
    found, asked = answered_yes(model, found, asked)
    print(f"{len(asked.texts)} scenes explained, about a side in {sum(map(bool, asked.sides))}\n")

    shares = {"chance": evaluate(all_alike, found, asked)}
    for name, method, chosen in rows:
        if method in options.methods:
            attribution = getattr(captum_attn, method)(model)
            shares[name] = evaluate(
                partial(attribution.attribute, target=YES, **chosen), found, asked
            )
    side = torch.tensor([bool(side) for side in asked.sides])
    for title, kind in (
        ("all questions", torch.ones_like(side)),
        ("is it there?", ~side),
        ("on that side?", side),
    ):
        print_table(title, {n: Share(*(x[kind] for x in share)) for n, share in shares.items()})
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
