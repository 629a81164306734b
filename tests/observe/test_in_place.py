"""What is proven to stay in place does so, and what may move or mix tokens is never proven.

All axes are of size 4, so that nothing can be told by sizes.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge

from captum_attn import GenericAttention, VTranM
from captum_attn.errors import AttnError
from captum_attn.observe import observation
from captum_attn.observe.capture.leaf import Leaf
from captum_attn.observe.tracing.autograd_graph import Graph
from captum_attn.observe.tracing.in_place import InPlace, operand_rows, rows_of, viewed
from captum_attn.observe.tracing.token_map import Downstream, Upstream
from captum_attn.observe.tracing.token_tracer import TokenTracer
from tests.zoo import ZOO
from tests.zoo_streams import STREAMS

N = 4
W = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Clone(torch.autograd.Function):
    """Named as an operation of torch, but turns the tokens round."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(1)


def heads(x):
    return x.view(N, N, 2, 2).transpose(1, 2)  # (B, H, n, d)


def rotated(x):
    one, other = x.chunk(2, -1)
    return x * W[0] + torch.cat([-other, one], -1) * W[1]


STAY = {
    "mlp": lambda x: x + F.gelu(F.layer_norm(x, (N,)) @ W) @ W,
    "linear": lambda x: F.linear(x, W, W[0]),
    "rms norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "softmax of channels": lambda x: x.softmax(-1),
    "heads": lambda x: heads(x).transpose(1, 2).reshape(N, N, N),
    "rotary": rotated,
    "complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.view(N, N, 2, 2)) * (1 + 2j)
    ).flatten(2),
    "gate": lambda x: F.glu(torch.cat([x @ W, x], -1), -1),
    "unbound": lambda x: sum(torch.stack([x, x @ W], 0).unbind(0)),
    "split": lambda x: x.split([1, 3], -1)[1].repeat(1, 1, 2)[..., :N],
    "channels first": lambda x: (
        F.conv1d(x.mT, W[..., None]).mT + F.batch_norm(x.mT, W[0], W[1].abs()).mT
    ),
    "tokens first": lambda x: (x.transpose(0, 1) @ W).transpose(0, 1),
    "einsum": lambda x: torch.einsum("bnd,ed->bne", x, W),
    "grouped heads": lambda x: x.view(N, N, 2, 2)[:, :, :, None].expand(N, N, 2, 2, 2).flatten(2)[
        ..., ::2
    ],
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False) * 2,
    "rolled channels": lambda x: x.roll(1, -1).flip(-1),
    "scaled by padding": lambda x: x * (torch.arange(N) < 3)[:, None],
    "product from the left, channels first": lambda x: (W @ x.mT).mT,
    "all of the tokens": lambda x: x[:, 0:N],
}  # fmt: skip
NOT_CERTAIN = {
    "mean": lambda x: x + x.mean(1, keepdim=True),
    "mean of the examples": lambda x: x + x.mean(0, keepdim=True),
    "product from the left": lambda x: W @ x,
    "a permutation": lambda x: torch.eye(N, dtype=torch.float64)[[1, 0, 2, 3]] @ x,
    "rolled": lambda x: x.roll(1, 1),
    "flipped": lambda x: x.flip(1),
    "rolled all over": lambda x: x.roll(1),
    "tokens and channels change places": lambda x: x.mT,
    "tokens and examples change places": lambda x: x.transpose(0, 1),
    "viewed across": lambda x: x.view(N, 2, 2, N).transpose(1, 2).reshape(N, N, N),
    "indexed": lambda x: x[:, [1, 0, 2, 3]],
    "sorted": lambda x: x.sort(1).values,
    "softmax of tokens": lambda x: x.softmax(1),
    "normed together": lambda x: F.layer_norm(x, (N, N)),
    "group norm": lambda x: F.group_norm(x.mT, 2).mT,
    "batch norm in training": lambda x: F.batch_norm(x.mT, None, None, training=True).mT,
    "instance norm": lambda x: F.instance_norm(x.mT).mT,
    "convolution": lambda x: F.conv1d(x.mT, W[..., None].expand(N, N, 3), padding=1).mT,
    "strided": lambda x: F.conv1d(x.mT, W[..., None], stride=2).mT.repeat(1, 2, 1),
    "summed up": lambda x: x.cumsum(1),
    "one for all": lambda x: x[:, :1].expand(N, N, N),
    "joined": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1),
    "repeated": lambda x: x[:, :2].repeat(1, 2, 1),
    "the product of two": lambda x: x @ x.mT @ x,
    "the other way round": lambda x: x + x.mT,
    "of another's weight": lambda x: F.linear(torch.ones_like(x), x[0] @ W),
    "a layer norm's weight": lambda x: F.layer_norm(W, (N,), x[:, :, 0][0]).expand(N, N, N),
    "interpolated": lambda x: F.interpolate(x.mT, N).mT,
    "pooled": lambda x: F.avg_pool1d(x.mT, 3, 1, 1).mT,
    "padded": lambda x: F.pad(x, (0, 0, 1, 0))[:, :N],
    "a function of the model's own": Clone.apply,
    "written into": lambda x: x.clone().index_copy_(1, torch.tensor([0]), x[:, 1:2]),
    "half of it": lambda x: torch.cat([x[:, :2], W[:2].expand(N, 2, N)], 1),
    "unrelated": lambda x: W.expand(N, N, N) * 1,
}  # fmt: skip


def proven(function):
    """Whether it is proven that the rows of (B, n, D) stay in place in what a function makes."""
    x = torch.randn(N, N, N, dtype=torch.float64, requires_grad=True)
    leaf = Leaf("x", x, shape=(N, N, N))
    graph = Graph([], [leaf], N)
    rows = function(x.clone())
    if not rows.requires_grad:
        return False, x, rows
    upstream = Upstream.rows_of(leaf, N)
    edges = get_gradient_edge(rows), get_gradient_edge(x)
    return InPlace(graph).proves(edges[0], rows_of, edges[1], upstream.axes), x, rows


@pytest.mark.parametrize("name", STAY)
def test_what_stays_in_place_is_proven(name):
    certain, x, rows = proven(STAY[name])
    assert certain
    for b in range(N):
        for i in range(N):
            vector = torch.zeros_like(rows)
            vector[b, i] = torch.randn(N, dtype=rows.dtype)
            (gradient,) = torch.autograd.grad(rows, x, vector, retain_graph=True)
            elsewhere = gradient.abs().sum(-1)
            elsewhere[b, i] = 0
            assert not elsewhere.any()


@pytest.mark.parametrize("name", NOT_CERTAIN)
def test_what_may_move_or_mix_tokens_is_not(name):
    assert not proven(NOT_CERTAIN[name])[0]


def test_views_keep_examples_and_tokens_whole():
    axes = ((("batch", 2),), (("token", 6),), (("", 8),))
    assert viewed(axes, (2, 6, 2, 4)) == (*axes[:2], (("", 2),), (("", 4),))
    assert viewed(axes, (12, 8)) == ((("batch", 2), ("token", 6)), (("", 8),))
    assert viewed(viewed(axes, (12, 8)), (2, 6, 8)) == axes
    assert viewed(axes, (2, 3, 2, 8)) is None
    assert viewed(axes, (2, 48)) == ((("batch", 2),), (("token", 6), ("", 8)))
    assert viewed(axes, (4, 24)) is None


# ---------------------------------------------------------------------------- held to autograd
class Held(TokenTracer):
    """Asks autograd for everything that was proven, too."""

    proven = 0

    def maps(self, down, upstreams, likely=()):
        down = Downstream.rows(down) if isinstance(down, torch.Tensor) else down
        if upstreams and all(self.stays(down.edge, down.read, u) for u in upstreams):
            self.check(down, upstreams)
        return super().maps(down, upstreams, likely)

    def stays(self, end, read, upstream):
        certain = super().stays(end, read, upstream)
        if certain and isinstance(read, partial) and read.func is operand_rows:
            self.check(Downstream.rows(read.args[0].rows(end)), [upstream])
        return certain

    def check(self, down, upstreams):
        Held.proven += 1
        in_place, self._in_place = self._in_place, None
        try:
            found = super().maps(down, upstreams)
        finally:
            self._in_place = in_place
        for token_map in found:
            assert not token_map.mixed and not token_map.copies
            if token_map.to is not None:
                assert token_map.to.shape[1] == down.shape[1]
                places = torch.arange(token_map.to.shape[1])
                assert bool(((token_map.to == places) | (token_map.to < 0)).all())


FEW = ["bert", "llama_right", "vit_cls", "by_einsum_heads_inside"]
CASES = {**ZOO, **STREAMS}


def held(name, monkeypatch):
    monkeypatch.setattr(observation, "TokenTracer", Held)
    case, Held.proven = CASES[name], 0
    function, sample = case.function(case.fresh().double()), case.sample().to(torch.float64)
    for method in (GenericAttention, VTranM):
        try:
            method(function).attribute_tokens(sample.inputs, case.target_of(sample), sample.extra)
        except AttnError:  # what a method cannot explain, for reasons of its own
            continue
    return Held.proven


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_proven_of_the_zoo_is_what_autograd_says(name, monkeypatch):
    held(name, monkeypatch)


@pytest.mark.parametrize("name", FEW)
def test_what_is_proven_is_what_autograd_says(name, monkeypatch):
    assert held(name, monkeypatch) > 4  # hops, and the places of VTranM's sub-layers
