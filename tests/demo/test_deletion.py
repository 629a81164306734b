"""The deletion score against values worked out by hand."""

import pytest
import torch

from captum_attn.demo.deletion import (
    deletion_curve,
    deletion_score,
    keep_patches,
    random_deletion_score,
)

WEIGHTS = torch.tensor([1.0, 5.0, 0.0, 2.0])


def additive(keep):
    return (keep * WEIGHTS).sum(1)


def test_curve_removes_the_most_relevant_first():
    curve = deletion_curve(additive, relevance=torch.tensor([0.1, 0.9, -3.0, 0.2]))
    assert curve.tolist() == [8.0, 3.0, 1.0, 0.0, 0.0]


def test_score_is_the_trapezoid_area():
    # (8 + 3) / 2 + (3 + 1) / 2 + (1 + 0) / 2 + 0 over four steps
    assert deletion_score(additive, WEIGHTS) == pytest.approx((5.5 + 2 + 0.5) / 4)


def test_true_order_is_best_and_reversed_order_worst():
    orders = [torch.tensor(p, dtype=torch.float32) for p in ((1, 3, 0, 2), (2, 0, 3, 1))]
    best, worst = (deletion_score(additive, order) for order in orders)
    assert best < random_deletion_score(additive, n=4, orders=200) < worst


def test_fewer_steps_remove_equal_shares():
    curve = deletion_curve(additive, WEIGHTS, steps=2)
    assert curve.tolist() == [8.0, 1.0, 0.0]


def test_equal_relevance_keeps_the_order():
    assert deletion_curve(additive, torch.zeros(4)).tolist() == [8.0, 7.0, 2.0, 2.0, 0.0]


def test_random_orders_are_seeded_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = (random_deletion_score(additive, 4, seed=3) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(), (0,), (1, 4)])
def test_relevance_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"relevance must be \(n,\)"):
        deletion_curve(additive, torch.zeros(shape))


def test_kept_patches_show_the_image_and_removed_ones_the_fill():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    kept = keep_patches(torch.tensor([[True, False, False, True]]), image, patch=2, fill=-1.0)
    assert kept[0, 0].tolist() == [
        [0.0, 1.0, -1.0, -1.0],
        [4.0, 5.0, -1.0, -1.0],
        [-1.0, -1.0, 10.0, 11.0],
        [-1.0, -1.0, 14.0, 15.0],
    ]
