"""SaCo against Algorithm 1 written plainly, and where its value is known."""

import pytest
import torch
from torch import nn

from captum_attn.errors import OptionError
from captum_attn.metrics import RandomAttribution, saco
from tests.metrics import plain

WEIGHTS = torch.linspace(-1, 2, 20, dtype=torch.float64)
OPTIONS = {"measure": "logit", "fill": "zero"}


def linear(x):
    return x @ WEIGHTS


@pytest.fixture
def x():
    return torch.rand(3, 20, dtype=torch.float64)


def test_a_linear_model_is_explained_by_its_terms(x):
    assert saco(linear, x, x * WEIGHTS, **OPTIONS).tolist() == [1.0] * 3
    assert saco(linear, x, -x * WEIGHTS, **OPTIONS).tolist() == [-1.0] * 3


def test_one_wrong_pair_of_bins():
    # Bins of relevance 3, 2, 1 and drops 1, 2, 0: the first pair is wrong.
    model = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    maps = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    found = saco(lambda x: x @ model, torch.ones(1, 3).double(), maps, bins=3, **OPTIONS)
    assert found.item() == pytest.approx((-1 + 2 + 1) / 4)


@pytest.mark.parametrize("bins", [2, 5, 10])
def test_saco_is_that_of_the_plain_rewrite(bins):
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, maps = torch.randn(4, 20).double(), torch.randn(4, 20).double()
    predicted = model(x).argmax(1)
    found = saco(model, x, maps, bins=bins, perturbations_per_eval=4)

    def remove(x, units):
        mean, x = x.mean(), x.clone()
        x[units] = mean
        return x

    for i in range(4):

        def p(x, c=predicted[i]):
            return model(x[None])[0].softmax(-1)[c]

        assert float(found[i]) == pytest.approx(plain.saco(p, x[i], maps[i], remove, bins))


def test_scale_and_shift_do_not_count(x):
    maps = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(
        saco(linear, x, maps, **OPTIONS), saco(linear, x, 3.5 * maps + 2, **OPTIONS)
    )


def test_a_constant_map_says_nothing(x):
    for bins in (3, 7, 10):  # 3 and 7 leave bins of unequal size, whose means round apart
        for value in (0.0, 0.1, -0.3, 0.7):
            found = saco(linear, x, torch.full_like(x, value), bins=bins, **OPTIONS)
            assert found.tolist() == [0.0] * 3


def test_only_what_is_removable_counts(x):
    removable = torch.ones(3, 20, dtype=torch.bool)
    removable[:, 10:] = False
    maps = torch.randn(3, 20, dtype=torch.float64)
    found = saco(linear, x, maps, bins=5, removable=removable, **OPTIONS)
    alone = saco(lambda x: x @ WEIGHTS[:10], x[:, :10], maps[:, :10], bins=5, **OPTIONS)
    torch.testing.assert_close(found, alone)


def test_random_attributions_score_as_chance():
    x = torch.rand(400, 20, dtype=torch.float64)
    found = saco(linear, x, RandomAttribution(linear).attribute(x), **OPTIONS)
    assert abs(float(found.mean())) < 4 * float(found.std() / 20)


def test_bad_bins(x):
    with pytest.raises(OptionError, match="bins: example 0 has 20 units for 21 bins"):
        saco(linear, x, x, bins=21, **OPTIONS)
    with pytest.raises(OptionError, match="bins: expected"):
        saco(linear, x, x, bins=1, **OPTIONS)
