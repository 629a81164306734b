"""The tracer: what is likely is believed only where it is so."""

import pytest
import torch

from captum_attn.observe.tracing.token_map import TokenMap, Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer


def probed(order, likely, batch=2, places=12, features=4):
    """The map of tokens that were put into `order`, with `likely` tried first."""
    x = torch.randn(batch, places, features, dtype=torch.double, requires_grad=True)
    rows = torch.tanh(x)[:, order]
    upstream = Upstream(x, lambda gradient: gradient)
    counted = []

    def seen(gradient):
        counted.append(None)
        return gradient

    (found,) = TokenTracer().maps(rows, [Upstream(upstream.edge, seen)], likely)
    return found, len(counted)


def permutation(places=12):
    return torch.randperm(places, generator=torch.Generator().manual_seed(3))


def test_a_likely_map_is_confirmed_in_few_passes():
    order = permutation(places=300)
    to = order.argsort()[None]
    found, passes = probed(order, [[TokenMap(to)]], places=300)
    plain, passes_before = probed(order, [], places=300)
    assert torch.equal(found.to.expand(2, -1), to.expand(2, -1))
    assert torch.equal(plain.to, to.expand(2, -1))
    assert passes == 4 < passes_before


@pytest.mark.parametrize("wrong", ["other", "swapped", "nowhere", "shorter", "identity", "mixed"])
def test_an_unlikely_map_is_not_believed(wrong):
    order = permutation()
    to = order.argsort()[None]
    swapped = to.clone()
    swapped[0, :6] = to[0, :6].flip(0)
    likely = {
        "other": TokenMap(to.flip(1)),
        "swapped": TokenMap(swapped),
        "nowhere": TokenMap(torch.where(to == 5, -1, to)),
        "shorter": TokenMap(to[:, :-1]),
        "identity": TokenMap(),
        "mixed": TokenMap(to, mixed=True),
    }[wrong]
    found, _ = probed(order, [[likely]])
    assert torch.equal(found.to, to.expand(2, -1)) and not found.mixed


def test_the_first_likely_map_that_holds_is_taken():
    order = permutation()
    wrong, right = TokenMap(order.argsort().flip(0)[None]), TokenMap(order.argsort()[None])
    found, _ = probed(order, [[wrong], [right]])
    assert found is right
