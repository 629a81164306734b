"""Sinks and self are left out as they are observed, and said to be."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn import (
    AttentionRollout,
    AttnLRP,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    VTranM,
)
from captum_attn.attr import AttentionAttribution
from captum_attn.errors import OptionError
from tests.attr.test_options import OWN

SINK, WIDTH = 7, 8  # the id of the token that all heads look at


class Layer(nn.Module):
    """Attention of two heads and the skip around it."""

    def __init__(self, pull: float, causal: bool, value: nn.Linear) -> None:
        super().__init__()
        self.pull, self.causal, self.value = pull, causal, value

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.cat([x[..., :4], x[..., :4]], -1)
        q, k, v = (
            y.view(*x.shape[:2], 2, -1).transpose(1, 2) for y in (x, keys, self.value(x))
        )  # (B, 2, n, 4)
        q = q + self.pull * torch.eye(4)[0]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + out.transpose(1, 2).reshape(x.shape)


class WithSink(nn.Module):
    """Two layers of two heads; whatever asks, key `SINK` has the largest score where it is seen.

    Queries share the constant direction e_0 with weight `pull`, and only the sink's embedding has a
    component along it, which keys keep and values leave out.
    """

    def __init__(self, pull: float = 4.0, causal: bool = False, mean: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(12, WIDTH)
        self.words.weight.data = 0.3 * torch.randn(12, WIDTH, generator=draw)
        self.words.weight.data[:, 0] = 0
        self.words.weight.data[SINK, 0] = 3.0
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value.weight.data = 0.3 * torch.randn(WIDTH, WIDTH, generator=draw)
        self.value.weight.data[:, 0] = 0
        self.value.weight.data[0] = 0
        self.head = nn.Linear(WIDTH, 3)
        self.head.weight.data = torch.randn(3, WIDTH, generator=draw)
        self.mean = mean

        self.layers = nn.ModuleList([Layer(pull, causal, self.value) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1) if self.mean else x[:, -1])


IDS = torch.tensor([[1, 2, SINK, 3, 4], [SINK, 5, 6, 8, 9], [1, 2, 3, 4, 5]])
AT = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
LAST = torch.tensor([[0, 0, 0, 0, 1]] * 3).bool()


@pytest.mark.parametrize("block_size", [None, 2])
def test_a_sink_is_seen_wherever_it_stands_and_nowhere_else(block_size: int | None) -> None:
    method = GenericAttention(WithSink())
    options = {"leave_out": ("sink",), "block_size": block_size}
    assert torch.equal(method.left_out(IDS, 0, **options), AT)
    assert not GenericAttention(WithSink(pull=0.0)).left_out(IDS[2:], 0, **options).any()


def test_in_a_causal_model_only_the_questions_behind_it_are_asked() -> None:
    """In the middle it is seen by two of four questions, and both look at it."""
    found = RawAttention(WithSink(causal=True)).left_out(IDS[:2], 0, leave_out=("sink",))
    assert torch.equal(found, AT[:2])


def test_a_question_that_sees_one_other_token_has_no_choice_and_does_not_count() -> None:
    """The second token of a causal model can look at the first alone."""
    method = RawAttention(WithSink(pull=0.0, causal=True))
    assert not method.left_out(torch.tensor([[1, 2]]), 0, leave_out=("sink",)).any()


def test_it_takes_most_heads() -> None:
    """Without a pull in one of the two heads, no more than half of them look at it."""

    class OneHead(WithSink):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            k = v = x.view(*ids.shape, 2, -1).transpose(1, 2)
            q = torch.zeros_like(k)
            q[:, 0, :, 0] = 4.0
            q[:, 1, torch.arange(5), 1 + torch.arange(5) % 3] = 4.0
            out = F.scaled_dot_product_attention(q, k, v)
            return self.head((x + out.transpose(1, 2).reshape(x.shape))[:, -1])

    assert not RawAttention(OneHead()).left_out(IDS, 0, leave_out=("sink",)).any()


def test_self_is_the_token_that_is_read_out_and_nothing_under_a_mean() -> None:
    found = GenericAttention(WithSink()).left_out(IDS, 0, leave_out=("self",))
    assert torch.equal(found, LAST)
    first = GenericAttention(WithSink()).left_out(IDS, 0, readout=1, leave_out=("self",))
    assert torch.equal(first, LAST.roll(2, 1))
    assert not GenericAttention(WithSink(mean=True)).left_out(IDS, 0, leave_out=("self",)).any()


@pytest.mark.parametrize("method", OWN, ids=lambda method: method.__name__)
def test_every_method_leaves_out_just_these_and_is_otherwise_as_before(method: type) -> None:
    made: AttentionAttribution = method(WithSink())
    plain, options = made.attribute(IDS, 0), {"leave_out": ("sink", "self")}
    found = made.attribute(IDS, 0, **options)
    torch.testing.assert_close(found, plain.masked_fill(AT | LAST, 0))
    tokens = made.attribute_tokens(IDS, 0)["ids"].masked_fill(AT | LAST, 0)
    torch.testing.assert_close(made.attribute_tokens(IDS, 0, **options)["ids"], tokens)
    (each,) = made.attribute_each(IDS, [0], **options)
    torch.testing.assert_close(each, found)
    assert torch.equal(made.left_out(IDS, 0, **options), AT | LAST)


@pytest.mark.parametrize("method", [VTranM, AttnLRP])
def test_nothing_is_left_out_unless_asked(method: type) -> None:
    method = method(WithSink())
    found = method.left_out(IDS, 0)
    assert found.shape == IDS.shape and found.dtype == torch.bool and not found.any()
    assert "left out" not in str(method.describe(IDS, 0))
    assert bool((method.attribute(IDS, 0)[AT | LAST] != 0).any())


@pytest.mark.parametrize("method", [HeterogenousAttention, AttnLRP])
def test_describe_says_what_was_left_out(method: type) -> None:
    told = str(method(WithSink()).describe(IDS, 0, leave_out=("sink", "self")))
    assert told.splitlines()[-2:] == ["left out as sink: 2 of ids", "left out as self: 4 of ids"]
    told = str(method(WithSink(mean=True)).describe(IDS[2:], 0, leave_out=("self",)))
    assert told.splitlines()[-1] == "left out as self: nothing"


def test_leaving_out_everything_is_refused() -> None:
    with pytest.raises(OptionError, match=r"leaves nothing of example 0: expected more tokens"):
        AttentionRollout(WithSink()).attribute(IDS[:, :1], 0, leave_out=("self",))


def test_matrices_have_no_row_that_is_read() -> None:
    for call in ("relevance_maps", "layer_maps"):
        with pytest.raises(OptionError, match=r"expected \(\) for matrices"):
            getattr(GenericAttention(WithSink()), call)(IDS, 0, leave_out=("sink",))


def test_patches_of_an_image_are_left_out_with_all_their_pixels() -> None:
    """One of 2 x 2 patches is white, and looked at by all."""

    class Patches(WithSink):
        def forward(self, images: Tensor) -> Tensor:
            patches = images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(1, 3).flatten(2)  # (B, 4, 4)
            x = torch.cat([patches.mean(-1, keepdim=True) * 8, patches, patches[..., :3]], -1)
            k, q = x, torch.eye(WIDTH)[0].expand_as(x) * 3
            values = self.value(x)
            out = F.scaled_dot_product_attention(q[:, None], k[:, None], values[:, None])[:, 0]
            return self.head((x + out)[:, -1])

    images = 0.1 * torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[..., :2, 2:] = 1.0
    mask = GenericAttention(Patches()).left_out(images, 0, leave_out=("sink",))
    expected = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    expected[..., :2, 2:] = True
    assert torch.equal(mask, expected)
    found = GenericAttention(Patches()).attribute(
        images, 0, leave_out=("sink",), interpolation="nearest"
    )
    assert not found[mask].any() and math.isclose(float(found.sum()), float(found[~mask].sum()))
