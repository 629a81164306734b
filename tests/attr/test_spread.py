"""A map that is no more than what the output reads is told of, once; others are not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from captum_attn import AttentionRollout, GenericAttention

SAID = "the output reads all tokens of 'x'"


class Pooled(nn.Module):
    """One attention call whose strength is set; the mean over tokens, or the first."""

    def __init__(self, strength: float, pooled: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.strength, self.pooled = strength, pooled

    def forward(self, x):
        x = x + self.strength * self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1) if self.pooled else x[:, 0])


def told(model: nn.Module, method: type = GenericAttention, n: int = 6, **options) -> list[str]:
    x = torch.randn(2, n, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method(model).attribute(x, target=1, **options)
        method(model).attribute_tokens(x, target=1, **options)
    return [str(w.message) for w in caught]


def test_a_flat_map_of_a_mean_says_so_and_shows_the_way():
    model = Pooled(0.01, pooled=True).eval()
    said = told(model)
    assert len(said) == 2 and all(one.startswith(SAID) for one in said)
    assert "discard_self=True" in said[0]
    assert not told(model, discard_self=True)


@pytest.mark.parametrize(
    ("strength", "pooled", "n"), [(0.01, False, 6), (300.0, True, 6), (0.01, True, 3)]
)
def test_other_maps_are_left_in_peace(strength, pooled, n):
    """The first token alone is read; attention carries most; of three tokens it may be true."""
    assert not told(Pooled(strength, pooled).eval(), n=n)


def test_it_is_said_once():
    model, x = Pooled(0.01, pooled=True).eval(), torch.randn(1, 6, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            GenericAttention(model).attribute(x, target=1)
    assert len(caught) == 1


def test_rollout_is_told_of_too_where_it_is_flat():
    model = Pooled(0.01, pooled=True).eval()
    with torch.no_grad():
        model.attention.in_proj_weight.mul_(0)  # every token attends to all of them alike
    assert told(model, AttentionRollout)
