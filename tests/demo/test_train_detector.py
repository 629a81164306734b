"""The script that trained the digit detector, and the average precision that it reports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from captum_attn.toy.digit_detr import digit_boxes, load_digit_detr, save_digit_detr
from captum_attn.toy.scenes import SceneBatch, scenes
from tutorials.training.train_detector import average_precision, train


class Answers(nn.Module):
    """A detector that gives one query to either digit, with the given boxes and labels."""

    def __init__(self, boxes: Tensor, labels: Tensor, logit: float | Tensor = 5.0) -> None:
        super().__init__()
        own = torch.as_tensor(logit).expand(labels.shape)[..., None]
        logits = torch.full((*labels.shape, 10), -20.0).scatter(-1, labels[..., None], own)
        self.rows, self.left = (logits, boxes), 0

    def forward(self, images: Tensor) -> SimpleNamespace:
        assert not self.training
        part = slice(self.left, self.left + len(images))
        self.left += len(images)
        return SimpleNamespace(logits=self.rows[0][part], pred_boxes=self.rows[1][part])


@pytest.fixture(scope="module")
def batch() -> SceneBatch:
    return scenes(260, split="test", seed=3)  # in two parts


def test_perfect_answers_have_an_average_precision_of_one(batch: SceneBatch) -> None:
    model = Answers(digit_boxes(batch.masks), batch.labels).train()
    assert average_precision(model, batch) == pytest.approx((1.0, 1.0))
    assert model.training


def test_an_overlap_of_062_counts_at_three_of_ten_thresholds(batch: SceneBatch) -> None:
    """0.5, 0.55 and 0.6: the left 0.62 of the box."""
    boxes = digit_boxes(batch.masks)
    left = boxes * torch.tensor([1, 1, 0.62, 1])
    left[..., 0] -= 0.19 * boxes[..., 2]
    assert average_precision(Answers(left, batch.labels), batch) == pytest.approx((1.0, 0.3))


def test_wrong_digits_have_an_average_precision_of_nearly_zero(batch: SceneBatch) -> None:
    """Not zero, since every query counts for every digit, if with a probability of 2e-9."""
    wrong = (batch.labels.sum(1, keepdim=True) - batch.labels + 1) % 10
    mistaken = average_precision(Answers(digit_boxes(batch.masks), wrong), batch)
    assert mistaken.at_50 < 0.15


def test_digits_missed_in_every_other_scene(batch: SceneBatch) -> None:
    """Precision 1 up to the share found, and 0 beyond, at COCO's recalls 0, 0.01, ..., 1."""
    boxes, logit = digit_boxes(batch.masks), torch.full((260, 2), 5.0)
    boxes[::2], logit[::2] = torch.tensor([0.5, 0.5, 0.01, 0.01]), 4.0
    expected = []
    for digit in range(10):
        there = (batch.labels == digit).any(1)
        found = int(there[1::2].sum()) / int(there.sum())
        expected.append(sum(recall <= 100 * found for recall in range(101)) / 101)
    half = average_precision(Answers(boxes, batch.labels, logit), batch)
    # A recall may be one of COCO's to the last bit: one of 101 points of one of ten digits.
    assert half == pytest.approx((sum(expected) / 10,) * 2, abs=1.1 / 1010)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
def test_training_reproduces_itself(tmp_path: Path) -> None:
    def weights_after_a_few_steps(seed: int) -> bytes:
        state = torch.get_rng_state()
        runs = list(train(epochs=2, scenes_per_epoch=24, batch_size=8, seed=seed, held_out=8))
        assert torch.equal(state, torch.get_rng_state())
        path = tmp_path / "weights.safetensors"
        save_digit_detr(runs[-1][0], path)
        assert load_digit_detr(path)(torch.zeros(1, 1, 64, 64)).logits.isfinite().all()
        return path.read_bytes()

    first = weights_after_a_few_steps(seed=0)
    assert first == weights_after_a_few_steps(seed=0)
    assert first != weights_after_a_few_steps(seed=1)
