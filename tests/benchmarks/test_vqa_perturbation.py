"""The LXMERT's perturbation tests against plain loops, and the script that prints them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from captum_attn.toy.digit_vqa import YES, load_digit_vqa
from captum_attn.toy.vocabulary import PAD, SPECIAL, VOCABULARY
from tests.benchmarks import vqa_perturbation as script

BATCH = script.collated(script.asked_about(6, seed=5))
MODEL = load_digit_vqa()
WORDS = BATCH.inputs["input_ids"] >= len(SPECIAL)


def relevance() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    ids, features = BATCH.inputs["input_ids"], BATCH.inputs["visual_feats"]
    return {
        "input_ids": torch.rand(ids.shape, generator=rng),
        "visual_feats": torch.rand(features.shape, generator=rng),
    }


def plain(kind: str, order: str) -> list[float]:
    """Example by example and step by step."""
    areas = []
    for i in range(6):
        alone = {name: x[i : i + 1] for name, x in BATCH.inputs.items()}
        if kind == "words":
            name, units = "attention_mask", WORDS[i].nonzero().flatten().tolist()
            scores = relevance()["input_ids"][i]
            levels = [round(step / 10 * len(units)) for step in range(11)]
        else:
            name, units = "visual_attention_mask", list(range(6))
            alone[name] = torch.ones(1, 6, dtype=torch.long)
            scores, levels = relevance()["visual_feats"][i].sum(-1), list(range(6))
        units.sort(key=lambda u, s=scores: float(s[u]), reverse=order == "most")
        right = []
        for level in levels:
            mask = alone[name].clone()
            mask[0, units[:level]] = 0
            with torch.no_grad():
                logits = MODEL(**{**alone, name: mask}).question_answering_score
            right.append(float(logits[0].argmax() == BATCH.target[i]))
        areas.append(
            sum((a + b) / 2 for a, b in zip(right, right[1:], strict=False)) / (len(right) - 1)
        )
    return areas


@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize(
    "kind, function", [("words", script.of_words), ("regions", script.of_regions)]
)
def test_areas_are_those_of_plain_loops(kind, function, order) -> None:
    found = function(MODEL, BATCH.inputs, relevance(), BATCH.target, order=order)
    assert found.tolist() == pytest.approx(plain(kind, order))
    assert 0 < float(found.mean()) < 1


def test_integrated_gradients_add_up_over_words_and_regions() -> None:
    alone = {name: x[:1] for name, x in BATCH.inputs.items()}
    answer, words = BATCH.target[:1], WORDS[:1]
    found = script.WordsAndRegions(MODEL, n_steps=1000).attribute(alone, answer)
    blank = alone | {
        "input_ids": alone["input_ids"].masked_fill(words, VOCABULARY[PAD]),
        "visual_feats": torch.zeros_like(alone["visual_feats"]),
    }
    with torch.no_grad():
        here, there = (MODEL(**x).question_answering_score[0, answer] for x in (alone, blank))
    total = found["input_ids"].sum(1) + found["visual_feats"].sum(1)
    torch.testing.assert_close(total, here - there, rtol=0.01, atol=0.01)
    assert not found["input_ids"][~words].any() and float(total.abs()) > 1


def test_the_script_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["GenericAttention", "RandomAttribution"]
    assert script.main(["--scenes", "24", "--methods", *names]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) +\| (.*) \|$", printed, re.MULTILINE)
    everything, of_yes = rows[1:3], rows[4:]
    assert [name for name, _ in everything] == names == [name for name, _ in of_yes]
    numbers = [[float(x) for x in re.findall(r"([\d.]+) ±", cells)] for _, cells in everything]
    assert numbers[0][0] < numbers[1][0] and numbers[0][3] > numbers[1][3]
    yes = sum(answer == YES for *_, answer in script.asked_about(24, 0))
    assert "over 24 examples" in printed and f"over {yes} examples" in printed
