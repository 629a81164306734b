"""Sensitivity-n: a model that adds up, a plain loop, and Quantus."""

import numpy as np
import pytest
import torch
from torch import nn

from captum_attn.errors import OptionError
from captum_attn.metrics import RandomAttribution, sensitivity_n
from captum_attn.metrics._engine import prepare
from captum_attn.metrics.sensitivity import correlations


class Net(nn.Module):
    """(B, 1, 4, 4) -> (B, 3), not linear."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weights = torch.randn(16, 3, generator=rng, dtype=torch.float64)

    def forward(self, x):
        return (x.flatten(1).double() @ self.weights).tanh()


@pytest.fixture
def x():
    return torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_what_each_unit_adds_is_perfect(x):
    weights = torch.randn(16, dtype=torch.float64).view(1, 1, 4, 4)

    def linear(images):
        return (images * weights).flatten(1).sum(1)

    assert sensitivity_n(linear, x, x * weights).tolist() == pytest.approx([1.0] * 3)
    assert sensitivity_n(linear, x, -x * weights).tolist() == pytest.approx([-1.0] * 3)
    assert sensitivity_n(linear, x, torch.ones_like(x)).tolist() == [0.0] * 3  # never varies
    chance = sensitivity_n(linear, x, RandomAttribution(None).attribute(x), subsets=400)
    assert chance.abs().max() < 0.75 and not (chance == 0).any()


def test_it_is_the_plain_loop(x):
    maps = torch.randn(3, 4, 4, dtype=torch.float64)
    found = sensitivity_n(Net(), x, maps, 1, sizes=(0.25, 0.5), subsets=20, seed=5)
    rng = torch.Generator().manual_seed(5)
    orders = [torch.rand(1, 16, generator=rng, dtype=torch.float64)[0] for _ in range(20)]
    for i in range(3):
        each = []
        for n in (4, 8):
            sums, drops = [], []
            for order in orders:
                gone = order.argsort(descending=True)[:n]
                without = x[i : i + 1].clone().view(1, 16)
                without[0, gone] = 0
                out = [Net()(v.view(1, 1, 4, 4))[0, 1] for v in (x[i], without)]
                sums.append(float(maps[i].view(16)[gone].sum()))
                drops.append(float(out[0] - out[1]))
            each.append(np.corrcoef(sums, drops)[0, 1])
        assert float(found[i]) == pytest.approx(np.mean(each))


def test_the_batch_does_not_count(x):
    maps = torch.randn(3, 4, 4)
    whole = sensitivity_n(Net(), x, maps, [0, 1, 2], subsets=10, perturbations_per_eval=3)
    alone = [sensitivity_n(Net(), x[i : i + 1], maps[i : i + 1], i, subsets=10) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone))
    other = sensitivity_n(Net(), x, maps, [0, 1, 2], subsets=10, seed=1)
    assert (other != whole).all()


def test_for_one_n_it_is_quantus_faithfulness_correlation(x):
    """With the sets that Quantus draws."""
    quantus = pytest.importorskip("quantus")
    maps = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    metric = quantus.FaithfulnessCorrelation(
        nr_runs=30, subset_size=5, perturb_baseline=0.0, normalise=False, abs=False,
        return_aggregate=False, disable_warnings=True,
    )  # fmt: skip
    drawn, choose = [], np.random.choice

    def remembered(*arguments, **options):
        drawn.append(choose(*arguments, **options))
        return drawn[-1]

    np.random.seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "choice", remembered)
        theirs = metric(
            model=Net().eval(), x_batch=x.numpy(), y_batch=np.array([0, 1, 2]),
            a_batch=maps.numpy(), softmax=False, channel_first=True,
        )  # fmt: skip
    assert len(drawn) == 90
    for i in range(3):
        sets = drawn[i::3]  # run by run, example by example
        orders = (torch.zeros(1, 16).index_fill(1, torch.as_tensor(s), 1.0) for s in sets)
        ready = prepare(
            Net(), x[i : i + 1], maps[i : i + 1], i, measure="logit", reduce="sum"
        )  # fmt: skip
        assert float(correlations(ready, torch.tensor([[5]]), orders)) == pytest.approx(theirs[i])


def test_bad_options(x):
    for options, message in (
        ({"subsets": 1}, "subsets"), ({"seed": -1}, "seed"), ({"sizes": 5}, "sizes"),
        ({"sizes": (0.5, 0.1)}, "steps"), ({"order": "least"}, "no option 'order'"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            sensitivity_n(Net(), x, x, 1, **options)
