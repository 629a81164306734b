"""What the detector's benchmark counts, by hand."""

from types import SimpleNamespace

import pytest
import torch

from captum_attn.toy.digit_detr import digit_boxes
from captum_attn.toy.scenes import scenes
from tests.benchmarks import detector_share


def test_detections_find_their_digits():
    batch = scenes(4, split="test", seed=1)
    boxes = torch.cat([digit_boxes(batch.masks).flip(1), torch.full((4, 1, 4), 0.1)], 1)
    boxes[2, 0, :2] += 0.5 * boxes[2, 0, 2:]  # an overlap of 1/7
    logits = torch.full((4, 3, 10), -3.0)
    logits[:, :2].scatter_(-1, batch.labels.flip(1)[..., None], 3.0)
    logits[1, 1] = -1.0  # a probability below one half
    logits[3, 1, 4] = 5.0  # on its digit, under a name of its own

    found = detector_share.detect(
        lambda images: SimpleNamespace(logits=logits, pred_boxes=boxes), batch
    )

    assert found.scene.tolist() == [0, 0, 1, 2, 3, 3]
    assert found.query.tolist() == [0, 1, 0, 1, 0, 1]
    labels = batch.labels.tolist()
    asked = [labels[0][1], labels[0][0], labels[1][1], labels[2][0], labels[3][1], 4]
    assert found.label.tolist() == asked
    assert found.astray == 1
    for i, (scene, query) in enumerate(zip(found.scene, found.query, strict=True)):
        assert torch.equal(found.regions[i, :2], batch.masks[scene, [1 - query, query]])


def test_the_box_is_the_rectangle_around_the_ink():
    ink = torch.zeros(2, 5, 6, dtype=torch.bool)
    ink[0, 1, 4] = ink[0, 3, 2] = True
    ink[1, 0, 0] = True
    expected = torch.zeros_like(ink)
    expected[0, 1:4, 2:5] = True
    expected[1, 0, 0] = True
    assert torch.equal(detector_share.box_of(ink), expected)


def test_scenes_count_once_whatever_their_detections():
    values = torch.tensor([[1.0, 0.0], [3.0, 1.0], [8.0, 0.0]])
    means = detector_share.per_scene(values, torch.tensor([4, 4, 9]))
    assert means.tolist() == [[2.0, 0.5], [8.0, 0.0]]


def test_the_script_prints_its_table(capsys):
    arguments = ["--scenes", "6", "--ap-scenes", "20", "--methods", "GenericAttention"]
    assert detector_share.main(arguments) == 0
    head, _, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("AP on 20 held-out scenes: ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    shares = {name: values for name, *values in cells}
    assert list(shares) == ["chance", "ink per token", "GenericAttention"]
    ink = 100 * scenes(6, split="test", seed=0).masks.float().mean()
    assert float(shares["chance"][0].split()[0]) == pytest.approx(float(ink), abs=0.5)
    best, method = (float(shares[n][0].split()[0]) for n in ("ink per token", "GenericAttention"))
    assert float(ink) < method < best
