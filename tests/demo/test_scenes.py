"""The demo's scenes, its packaged digit ViT, and the script that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from captum_attn.toy.digit_vit import WEIGHTS, load_digit_vit, save_digit_vit
from captum_attn.toy.scenes import SceneBatch, digit_split, scenes
from tutorials.training.train_digits import accuracy, train


@pytest.fixture(scope="module")
def batch() -> SceneBatch:
    return scenes(500, split="test", seed=7)


def test_no_digit_is_in_both_splits() -> None:
    train_digits, test_digits = (set(digit_split(s).indices.tolist()) for s in ("train", "test"))
    assert not train_digits & test_digits
    assert train_digits | test_digits == set(range(1797))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_holds_only_its_own_digits(split: str) -> None:
    digits = digit_split(split)
    targets = torch.as_tensor(load_digits().target)[digits.indices]
    assert torch.equal(targets, torch.arange(10).repeat_interleave(digits.counts))
    assert torch.equal(digits.starts, torch.searchsorted(targets, torch.arange(10)))


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        scenes(1, split="val")


def test_a_seed_means_one_set_of_scenes(batch: SceneBatch) -> None:
    state = torch.get_rng_state()
    again = scenes(500, split="test", seed=7)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not torch.equal(batch.images, scenes(500, split="test", seed=8).images)
    assert torch.equal(state, torch.get_rng_state())


def test_scenes_do_not_follow_the_default_dtype(batch: SceneBatch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        again = scenes(500, split="test", seed=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_two_different_digits_and_every_class_as_often(batch: SceneBatch) -> None:
    assert (batch.labels[:, 0] != batch.labels[:, 1]).all()
    shown = torch.nn.functional.one_hot(batch.labels, 10).sum(1)
    assert torch.equal(batch.multi_hot, shown.float())
    assert shown.sum(0).min() > 60  # 100 expected, standard deviation 9


def test_masks_are_apart_and_hold_the_ink(batch: SceneBatch) -> None:
    assert not batch.masks.all(1).any()
    assert batch.images.min() >= 0 and batch.images.max() <= 1
    pixels = batch.images.expand(-1, 2, -1, -1)
    ink = (pixels * batch.masks).sum((2, 3)) / batch.masks.sum((2, 3))
    ground = (pixels[:, :1] * ~batch.masks.any(1, keepdim=True)).sum((2, 3))
    ground = ground / (~batch.masks.any(1, keepdim=True)).sum((2, 3))
    assert (ink > 0.4).all() and (ink > ground + 0.2).all()


def test_each_mask_shows_the_digit_of_its_label(batch: SceneBatch) -> None:
    """Erasing a mask's pixels takes away that digit's logit, far more than the other's."""
    model = load_digit_vit()
    with torch.no_grad():
        before = model(batch.images).gather(1, batch.labels)
        for shown in (0, 1):
            erased = batch.images.masked_fill(batch.masks[:, shown, None], 0.1)
            fall = before - model(erased).gather(1, batch.labels)
            assert (fall[:, shown] > fall[:, 1 - shown]).float().mean() > 0.95


def test_digits_fill_patches_of_their_own(batch: SceneBatch) -> None:
    """Maps per patch can tell the digits apart: few patches hold ink of both."""
    patches = torch.nn.functional.avg_pool2d(batch.masks.float(), 8).flatten(2)  # (B, 2, 64)
    own = (patches - patches.flip(1)).clamp(min=0).sum(2) / patches.sum(2)
    assert own.min() > 0.6 and own.mean() > 0.95


def test_packaged_weights_name_both_digits(batch: SceneBatch) -> None:
    held_out = accuracy(load_digit_vit(), batch)
    assert held_out.top2 > 0.93
    assert held_out.exact > 0.91


def test_packaged_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
def test_training_reproduces_itself(tmp_path: Path) -> None:
    def weights_after_a_few_steps(seed: int) -> bytes:
        state = torch.get_rng_state()
        runs = list(train(epochs=2, scenes_per_epoch=24, batch_size=8, seed=seed, held_out=8))
        assert torch.equal(state, torch.get_rng_state())
        path = tmp_path / "weights.safetensors"
        save_digit_vit(runs[-1][0], path)
        assert load_digit_vit(path)(torch.zeros(1, 1, 64, 64)).isfinite().all()
        return path.read_bytes()

    first = weights_after_a_few_steps(seed=0)
    assert first == weights_after_a_few_steps(seed=0)
    assert first != weights_after_a_few_steps(seed=1)
