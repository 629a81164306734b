"""Quantus runs with our methods; its numbers are those of the attributions themselves."""

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from torch import nn

from captum_attn.errors import OptionError
from captum_attn.metrics import RandomAttribution, quantus_explain_func


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 3))


@pytest.fixture
def batch():
    return np.random.default_rng(0).random((4, 1, 8, 8), np.float32), np.array([0, 1, 2, 0])


def test_it_returns_the_methods_attributions(model, batch):
    x, y = batch
    found = quantus_explain_func(model, x, y, method=InputXGradient)
    expected = InputXGradient(model).attribute(torch.tensor(x), target=torch.tensor(y))
    np.testing.assert_allclose(found, expected.detach().numpy())
    rgb = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    images = np.random.default_rng(1).random((2, 3, 8, 8))  # float64, as Quantus may pass
    summed = quantus_explain_func(rgb, images, y[:2], method=InputXGradient, sum_channels=True)
    whole = quantus_explain_func(rgb, images, y[:2], method=InputXGradient)
    assert summed.shape == (2, 1, 8, 8)
    np.testing.assert_allclose(summed[:, 0], whole.sum(1), rtol=1e-5)


def test_an_instance_is_refused(model, batch):
    with pytest.raises(OptionError, match="expected a class"):
        quantus_explain_func(model, *batch, method=InputXGradient(model))


def test_quantus_metrics_run(model, batch):
    quantus = pytest.importorskip("quantus")
    x, y = batch
    expected = InputXGradient(model).attribute(torch.tensor(x), target=torch.tensor(y))
    options = {"normalise": False, "display_progressbar": False, "disable_warnings": True}
    sparse = quantus.Sparseness(**options)
    by_func = sparse(
        model=model, x_batch=x, y_batch=y, explain_func=quantus_explain_func,
        explain_func_kwargs={"method": InputXGradient},
    )  # fmt: skip
    by_hand = sparse(model=model, x_batch=x, y_batch=y, a_batch=expected.detach().numpy())
    np.testing.assert_allclose(by_func, by_hand)


def test_quantus_randomises_the_model_and_our_method_notices(batch):
    quantus = pytest.importorskip("quantus")
    timm = pytest.importorskip("timm")
    from captum_attn import GenericAttention

    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2
    ).eval()
    x, y = batch
    pixels = quantus.PixelFlipping(
        features_in_step=16,
        display_progressbar=False,
        disable_warnings=True,
        perturb_baseline="black",
    )
    options = {"explain_func": quantus_explain_func}
    found = pixels(
        model=vit, x_batch=x, y_batch=y, **options, explain_func_kwargs={"method": GenericAttention}
    )
    assert np.array(found).shape == (4, 4) and np.isfinite(found).all()
    mprt = quantus.MPRT(
        similarity_func=quantus.similarity_func.correlation_spearman, layer_order="bottom_up",
        display_progressbar=False, disable_warnings=True, normalise=False,
        return_average_correlation=True,
    )  # fmt: skip
    noticed, blind = (
        np.mean(mprt(model=vit, x_batch=x, y_batch=y, **options, explain_func_kwargs={"method": m}))
        for m in (InputXGradient, RandomAttribution)
    )
    assert blind == pytest.approx(1.0) and noticed < 0.9
