"""What stands where something was removed."""

import pytest
import torch
from scipy.ndimage import gaussian_filter

from captum_attn.errors import OptionError
from captum_attn.metrics import (
    Blur,
    Constant,
    Mean,
    NoisyLinear,
    deletion,
    insertion,
    perturbation_curve,
)
from tests.metrics import plain


def close(a, b, **tolerance):
    torch.testing.assert_close(
        torch.as_tensor(a).double(), torch.as_tensor(b).double(), **tolerance
    )


def copies(fill, images, removed):
    """The images without the pixels in `removed` (B, 1, H, W)."""
    rows = torch.arange(len(images))
    return fill.prepare(images)(rows, removed)


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 12, dtype=torch.float64)


@pytest.fixture
def removed(images):
    return torch.rand(2, 1, 16, 12) < 0.4


def test_what_is_kept_is_kept(images, removed):
    for fill in (Constant(7.0), Mean(), Blur(5, 1.0), NoisyLinear()):
        found = copies(fill, images, removed)
        assert torch.equal(found.masked_select(~removed), images.masked_select(~removed))
        assert not torch.equal(found, images)


def test_constants_and_tensors(images, removed):
    close(copies(Constant(7.0), images, removed).masked_select(removed), 7.0 * torch.ones(
        3 * int(removed.sum())))  # fmt: skip
    colour = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    found = copies(Constant(colour), images, removed)
    for c in range(3):
        assert (found[:, c][removed[:, 0]] == c + 1).all()


def test_the_mean_is_each_channels_and_each_examples(images, removed):
    found = copies(Mean(), images, removed)
    for i in range(2):
        for c in range(3):
            gone = found[i, c][removed[i, 0]]
            close(gone, images[i, c].mean().expand(len(gone)))
    tokens = torch.rand(2, 5, 3)
    close(Mean().baseline(tokens)[:, 0], tokens.mean(1))
    table = torch.rand(2, 5)
    close(Mean().baseline(table)[:, 0], table.mean(1))


def test_blur_is_scipys_gaussian(images):
    found = Blur(kernel_size=9, sigma=1.0).baseline(images)
    for i in range(2):
        for c in range(3):
            # 4 standard deviations to each side, mirrored at the border without its pixel
            expected = gaussian_filter(images[i, c].numpy(), 1.0, mode="mirror", truncate=4.0)
            close(found[i, c], expected, rtol=1e-6, atol=1e-9)


def test_noisy_linear_without_noise_is_the_dense_system(images, removed):
    removed[0, 0, 0, :4] = True  # a corner too
    found = copies(NoisyLinear(noise=0.0), images, removed)
    for i in range(2):
        for c in range(3):
            close(found[i, c], plain.linear_imputation(images[i, c], removed[i, 0]))


def test_a_pixel_alone_becomes_the_weighted_mean_of_its_neighbours():
    image = torch.arange(9.0).view(1, 1, 3, 3).double() ** 2
    removed = torch.zeros(1, 1, 3, 3).bool()
    removed[..., 1, 1] = True
    direct, diagonal = (1 + 9 + 25 + 49) / 6, (0 + 4 + 36 + 64) / 12
    close(copies(NoisyLinear(noise=0.0), image, removed)[0, 0, 1, 1], direct + diagonal)


def test_an_image_removed_altogether_becomes_its_mean(images):
    found = copies(NoisyLinear(noise=0.0), images, torch.ones(2, 1, 16, 12).bool())
    close(found, images.mean((2, 3), keepdim=True).expand_as(images))


def test_the_noise_has_its_size_and_depends_on_no_batch(images, removed):
    fill, clean = (NoisyLinear(noise=n) for n in (0.1, 0.0))
    noise = copies(fill, images, removed) - copies(clean, images, removed)
    assert (noise.masked_select(~removed) == 0).all()
    assert float(noise.masked_select(removed).std()) == pytest.approx(0.1, rel=0.15)
    alone = copies(fill, images[1:], removed[1:])
    close(alone[0], copies(fill, images, removed)[1])
    other = copies(NoisyLinear(noise=0.1, seed=1), images, removed)
    assert not torch.allclose(other, copies(fill, images, removed))


def test_the_global_generator_is_left_alone(images, removed):
    before = torch.get_rng_state()
    copies(NoisyLinear(), images, removed)
    assert torch.equal(torch.get_rng_state(), before)


def test_fills_by_name(images):
    maps = torch.rand_like(images)

    def model(x):
        return (x**2).flatten(1).sum(1)

    options = {"measure": "logit", "patch_size": 4, "steps": 3}
    named = {"zero": 0.0, "mean": Mean(), "blur": Blur(), "noisy_linear": NoisyLinear()}
    for name, fill in named.items():
        one, other = (
            perturbation_curve(model, images, maps, fill=f, **options).values for f in (name, fill)
        )
        close(one, other)
    assert len({float(deletion(model, images, maps, fill=n, **options)[0]) for n in named}) == 4
    close(
        insertion(model, images, maps, **options),
        insertion(model, images, maps, fill="blur", **options),
    )


@pytest.mark.parametrize(
    "fill", [Blur(kernel_size=4), Blur(sigma=0.0), Blur(kernel_size=51), NoisyLinear(noise=-1.0)]
)
def test_settings_that_mean_nothing(fill, images):
    with pytest.raises(OptionError, match="fill"):
        fill.prepare(images)


@pytest.mark.parametrize("fill", [Blur(), NoisyLinear()])
def test_image_fills_want_images(fill):
    with pytest.raises(OptionError, match="images"):
        fill.prepare(torch.rand(2, 5, 3))


def test_noisy_linear_wants_whole_pixels(images):
    removed = torch.zeros_like(images).bool()
    removed[:, 0] = True
    with pytest.raises(OptionError, match="all their channels"):
        copies(NoisyLinear(), images, removed)
