"""What the detector's tables count, by hand."""

from __future__ import annotations

import pytest
import torch

from captum_attn import GenericAttention
from captum_attn.detection import explain_detections
from captum_attn.metrics import RandomAttribution, coco_average_precision, coco_results
from captum_attn.toy.digit_detr import load_digit_detr
from captum_attn.toy.scenes import scenes
from tests.benchmarks import detr_tables
from tests.benchmarks.detr_tables import Found

BATCH = scenes(4, split="test", seed=0)


@pytest.mark.parametrize("kind", detr_tables.TRUTHS)
def test_the_objects_themselves_are_found_without_a_fault(kind):
    masks = detr_tables.truth_of(BATCH, kind)
    truth = detr_tables.annotations(masks, BATCH.labels)
    found = [
        one
        for image, (own, labels) in enumerate(zip(masks, BATCH.labels, strict=True))
        for one in coco_results(image, own, labels, [0.9, 0.8])
    ]
    assert coco_average_precision(truth, found)["AP"] == pytest.approx(1.0)
    assert coco_average_precision(truth, found[1:])["AR"] < 0.95


def test_a_token_becomes_the_square_that_upsampling_reaches():
    map_ = torch.zeros(1, 8, 8)
    map_[0, 3, 4] = 1.0
    (made,) = detr_tables.results([Found(torch.tensor([7]), torch.tensor([0.9]), map_)], "otsu")
    square = torch.zeros(1, 64, 64, dtype=torch.bool)
    square[0, 3 * 8 - 4 : 4 * 8 + 4, 4 * 8 - 4 : 5 * 8 + 4] = True
    assert made == coco_results(0, square, [7], [0.9])[0] | {"score": pytest.approx(0.9)}


def test_maps_are_the_tokens_relevance_or_the_mean_of_their_pixels():
    model = load_digit_detr()
    ours = detr_tables.explained(GenericAttention(model), {}, BATCH.images)
    known = explain_detections(GenericAttention(model), BATCH.images)
    for one, other in zip(ours, known, strict=True):
        assert torch.equal(one.maps, other.grid) and torch.equal(one.labels, other.labels)
        assert len(one.labels) == 2
    chance = detr_tables.explained(RandomAttribution(model), {}, BATCH.images)
    pixels = RandomAttribution(model).attribute(BATCH.images)
    expected = pixels[2, 0].reshape(8, 8, 8, 8).mean((1, 3))
    torch.testing.assert_close(chance[2].maps[0], expected.clamp(min=0))


def test_ink_is_the_detected_digits_own():
    found = [Found(labels.flip(0), torch.ones(2), torch.empty(0)) for labels in BATCH.labels]
    for one, masks in zip(detr_tables.ink_per_token(found, BATCH), BATCH.masks, strict=True):
        ink = masks.double().reshape(2, 8, 8, 8, 8).mean((2, 4))
        torch.testing.assert_close(one.maps, ink.flip(0))


def test_the_script_prints_its_tables(capsys):
    methods = ["GenericAttention", "RandomAttribution"]
    arguments = ["--scenes", "6", "--resamples", "5", "--methods", *methods]
    assert detr_tables.main(arguments) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("6 held-out scenes, 1")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if " ± " in line]
    table = [row for row in rows if len(row) == 5]
    assert [row[0] for row in table] == [*methods, "ink per token"] * 2
    for k in (0, 3):
        ours, chance, best = (float(row[1].split()[0]) for row in table[k : k + 3])
        assert chance < ours < best
    assert sum(line.startswith("- RandomAttribution: -") for line in lines) == 2
