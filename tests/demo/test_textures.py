"""The textured objects, the packaged texture ViT, and the script that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from captum_attn.toy.texture_vit import WEIGHTS, load_texture_vit, save_texture_vit
from captum_attn.toy.textures import TEXTURES, TextureBatch, textured_objects
from tutorials.training.train_textures import accuracy, train


@pytest.fixture(scope="module")
def batch() -> TextureBatch:
    return textured_objects(500, split="test", seed=7)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        textured_objects(1, split="val")


def test_a_seed_means_one_set_of_images(batch: TextureBatch) -> None:
    state = torch.get_rng_state()
    again = textured_objects(500, split="test", seed=7)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_images_do_not_follow_the_default_dtype(batch: TextureBatch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        again = textured_objects(500, split="test", seed=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_no_seed_gives_a_training_image_to_the_test_split() -> None:
    drawn = [
        textured_objects(2, split=split, seed=seed).images.flatten(1)
        for split in ("train", "test")
        for seed in range(6)
    ]
    images = torch.cat(drawn)
    assert len(images.unique(dim=0)) == len(images)


def test_every_texture_as_often(batch: TextureBatch) -> None:
    assert batch.labels.bincount(minlength=len(TEXTURES)).min() > 25  # 50 expected, deviation 7


def test_objects_cover_15_to_40_percent_and_lie_inside(batch: TextureBatch) -> None:
    share = batch.masks.float().mean((1, 2))
    assert share.min() > 0.14 and share.max() < 0.41
    assert share.std() > 0.05
    centre = batch.masks.any(1).float().argmax(1), batch.masks.any(2).float().argmax(1)
    assert all(corner.float().std() > 4 for corner in centre)  # they move about


def test_the_object_has_two_colours_and_the_ground_is_as_bright(batch: TextureBatch) -> None:
    on, off = (batch.images.movedim(1, -1)[m] for m in (batch.masks, ~batch.masks))
    assert (on.mean(0) - off.mean(0)).abs().max() < 0.03
    for image, mask in zip(batch.images[:200], batch.masks[:200], strict=True):
        colours = image[:, mask].T  # (pixels, 3)
        far = colours[(colours - colours[0]).norm(dim=1).argmax()]
        first = (colours - colours[0]).norm(dim=1) < (colours - far).norm(dim=1)
        two = colours[first].median(0).values, colours[~first].median(0).values
        assert (two[0] - two[1]).square().mean().sqrt() > 0.25
        assert 0.2 < first.float().mean() < 0.8
        own = torch.where(first[:, None], *two)
        assert (colours - own).abs().mean() < 0.07  # what remains is pixel noise


@pytest.mark.parametrize(
    ("name", "along"), [("horizontal stripes", (0, 1)), ("rising stripes", (-1, 1))]
)
def test_stripes_run_as_they_are_called(name: str, along: tuple[int, int]) -> None:
    """Neighbours along a stripe (rows, columns) are alike, neighbours across are not."""
    batch = textured_objects(300, seed=3)
    label = [texture.name for texture in TEXTURES].index(name)
    mask = batch.masks[batch.labels == label]
    image = batch.images[batch.labels == label]

    def change(step: tuple[int, int]) -> float:
        moved, on = (x.roll((-2 * step[0], -2 * step[1]), (-2, -1)) for x in (image, mask))
        difference = (image - moved).abs().mean(1)
        return float(difference[mask & on].mean())

    down, right = along
    assert change(along) < 0.5 * change((right, -down))


def test_the_class_is_on_the_object(batch: TextureBatch) -> None:
    """Other noise around the object leaves the answer alone; without the texture there is none."""
    model = load_texture_vit()
    rng = torch.Generator().manual_seed(0)
    clouds = torch.rand(500, 3, 9, 9, generator=rng)
    noise = F.interpolate(clouds, 64, mode="bicubic") + 0.15 * torch.randn(64, 64, generator=rng)
    mask = batch.masks[:, None]
    moved = torch.where(mask, batch.images, noise.clamp(0, 1))
    assert accuracy(model, batch._replace(images=moved)) > 0.9
    plain = torch.where(mask, batch.images[:, :, 32:33, 32:33], batch.images)
    assert accuracy(model, batch._replace(images=plain)) < 0.25


def test_packaged_weights_name_the_texture(batch: TextureBatch) -> None:
    assert accuracy(load_texture_vit(), batch) > 0.97


def test_packaged_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 1_400_000


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
def test_training_reproduces_itself(tmp_path: Path) -> None:
    def weights_after_a_few_steps(seed: int) -> bytes:
        state = torch.get_rng_state()
        runs = list(train(epochs=2, images_per_epoch=24, batch_size=8, seed=seed, held_out=8))
        assert torch.equal(state, torch.get_rng_state())
        path = tmp_path / "weights.safetensors"
        save_texture_vit(runs[-1][0], path)
        assert load_texture_vit(path)(torch.zeros(1, 3, 64, 64)).isfinite().all()
        return path.read_bytes()

    first = weights_after_a_few_steps(seed=0)
    assert first == weights_after_a_few_steps(seed=0)
    assert first != weights_after_a_few_steps(seed=1)
