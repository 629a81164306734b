"""Photographs of clothing, pairs cut together of two, and the packaged clothing ViT."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from captum_attn import GenericAttention
from captum_attn.errors import InputError
from captum_attn.toy.clothing import (
    CLOTHES,
    DEBIAN,
    PATCH,
    PICTURES,
    SIDE,
    Clothing,
    clothing,
    clothing_pairs,
    packaged_clothing,
)
from captum_attn.toy.clothing_vit import WEIGHTS, load_clothing_vit
from tests.benchmarks.digit_share import evaluate as share_of
from tutorials.training.train_clothing import CUT, SHIFT, accuracy, drawn


def test_the_packaged_pictures_are_few_and_of_all_classes() -> None:
    images, labels = packaged_clothing()
    assert images.shape == (500, 1, SIDE, SIDE) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1
    assert labels.bincount(minlength=len(CLOTHES)).min() > 35
    assert PICTURES.stat().st_size < 1_000_000 and WEIGHTS.stat().st_size < 2_000_000


def written(folder: Path, kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two files of a split in the set's own form."""
    pixels = torch.arange(n * SIDE * SIDE).remainder(251).to(torch.uint8)
    labels = torch.arange(n).remainder(10).to(torch.uint8)
    for name, head, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        with gzip.open(folder / f"{kind}-{name}-ubyte.gz", "wb") as file:
            file.write(b"\0" * head + values.numpy().tobytes())
    return pixels.view(n, 1, SIDE, SIDE), labels


def test_the_sets_own_files_are_read(tmp_path: Path) -> None:
    for split, kind in (("train", "train"), ("test", "t10k")):
        pixels, labels = written(tmp_path, kind, 7)
        found = clothing(split, tmp_path)
        assert torch.equal(found.images, pixels.float() / 255)
        assert torch.equal(found.labels, labels.long())


def test_what_is_not_there_is_said_with_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        clothing("test", tmp_path)
    with pytest.raises(InputError, match="expected 'train' or 'test', got 'val'"):
        clothing("val")  # type: ignore[arg-type]


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_the_packaged_pictures_are_the_first_of_the_test_set() -> None:
    whole, some = clothing("test"), packaged_clothing()
    assert len(whole.labels) == 10_000 and len(clothing("train").labels) == 60_000
    assert torch.equal(whole.images[:500], some.images)
    assert torch.equal(whole.labels[:500], some.labels)


# ---------------------------------------------------------------------------------- pairs
def test_either_part_of_a_pair_is_of_its_piece_in_whole_patches() -> None:
    pairs, again = clothing_pairs(200, seed=3), clothing_pairs(200, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(pairs, again, strict=True))
    assert bool((pairs.labels[:, 0] != pairs.labels[:, 1]).all())
    first, second = pairs.masks.unbind(1)
    assert torch.equal(first, ~second)
    patches = first.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3)
    assert torch.equal(patches.all(-1), patches.any(-1))
    assert set((49 * first.float().mean((1, 2))).round().int().tolist()) == {21, 28}
    left, top = first[:, -1, 0], first[:, 0, -1]
    assert torch.equal(left, ~top) and 60 < int(left.sum()) < 140
    known = packaged_clothing()
    for image, labels, masks in zip(pairs.images[:20], pairs.labels, pairs.masks, strict=False):
        for label, mask in zip(labels, masks, strict=True):
            alike = (known.images[:, 0] == image[0]) | ~mask
            assert label in known.labels[alike.flatten(1).all(1)]


def test_pairs_are_cut_of_the_pictures_that_are_given() -> None:
    two = Clothing(torch.stack([torch.zeros(1, SIDE, SIDE), torch.ones(1, SIDE, SIDE)]),
                   torch.tensor([4, 7]))  # fmt: skip
    pairs = clothing_pairs(10, of=two)
    for image, labels, masks in zip(*pairs, strict=True):
        assert torch.equal(image[0], masks[int(labels[1] == 7)].float())


# ---------------------------------------------------------------------------------- training
def test_training_pictures_are_mirrored_shifted_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    dot = torch.zeros(1, 1, SIDE, SIDE)
    dot[..., 10, 5] = 1.0
    one = Clothing(dot, torch.tensor([3]))
    monkeypatch.setattr("tutorials.training.train_clothing.clothing", lambda split: one)
    batch = drawn(400, "train", 0, "cpu")
    whole = batch.images[400 // CUT :, 0]
    assert bool((whole.sum((1, 2)) == 1).all())
    rows, columns = {int(i) for i in whole.nonzero()[:, 1]}, {int(i) for i in whole.nonzero()[:, 2]}
    about = range(-SHIFT, SHIFT + 1)
    assert rows == {10 + step for step in about}
    assert columns == {at + step for at in (5, SIDE - 1 - 5) for step in about}
    assert torch.equal(batch.shares.sum(1), torch.ones(400))


def test_shares_of_a_cut_picture_are_those_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.tensor([0.25, 0.75])[:, None, None, None].expand(2, 1, SIDE, SIDE)
    monkeypatch.setattr("tutorials.training.train_clothing.SHIFT", 0)
    monkeypatch.setattr(
        "tutorials.training.train_clothing.clothing", lambda split: Clothing(plain, torch.arange(2))
    )
    batch = drawn(64, "train", 0, "cpu")
    bright = (batch.images > 0.5).float().mean((1, 2, 3))
    torch.testing.assert_close(batch.shares[:, 1], bright)
    assert 0 < int(((bright > 0) & (bright < 1)).sum()) <= 64 // CUT


# ---------------------------------------------------------------------------------- the model
def test_the_packaged_model_names_clothing() -> None:
    assert accuracy(load_clothing_vit(), packaged_clothing()) > 0.78


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_the_packaged_model_names_as_many_test_pictures_as_is_said() -> None:
    assert accuracy(load_clothing_vit(), clothing("test")) == pytest.approx(0.817, abs=0.002)


def test_its_map_follows_the_question() -> None:
    share = share_of(GenericAttention, load_clothing_vit(), clothing_pairs(60))
    assert share.right[0] > 0.6  # 0.5: by chance
