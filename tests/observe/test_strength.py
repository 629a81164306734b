"""Inputs that enter tokens by strength, mixed packed tokens, and maps that would be zero."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_attn import AttentionRollout, GenericAttention, HeterogenousAttention
from captum_attn.errors import OptionError, WiringError

METHODS = (AttentionRollout, GenericAttention, HeterogenousAttention)


class KeyPoints(nn.Module):
    """Tokens are a blurred picture at a few points that lie on no grid."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def tokens(self, x):
        points = x.new_tensor([[-0.8, -0.6], [0.1, 0.4], [0.7, 0.75]])
        at = points.expand(len(x), 1, 3, 2)
        return F.grid_sample(self.stem(x), at, align_corners=False)[:, :, 0].mT

    def forward(self, x):
        rows = self.tokens(x)
        return self.head((rows + self.attention(rows, rows, rows)[0])[:, 0])


@pytest.mark.parametrize("method", METHODS)
def test_tokens_at_points_get_the_pixels_by_the_exact_jacobian(method):
    """sum_i w_i T[i, j], T[i, j] = |dt_i/du_j|^2 / sum_j' |dt_i/du_j'|^2, t the queries."""
    model = KeyPoints().eval().double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="every element of 'x' enters several of the 3 tokens"):
        found = method(model).attribute(x, target=1)
    weights = method(model).attribute_tokens(x, target=1)["x"]
    W = model.attention.in_proj_weight[:6]
    for b in range(2):
        J = torch.autograd.functional.jacobian(lambda u: model.tokens(u[None])[0] @ W.mT, x[b])
        T = J.square().sum((1, 2))  # (3, 6, 6), of the queries' six channels
        expected = (weights[b][:, None, None] * T / T.sum((1, 2), keepdim=True)).sum(0)
        assert float((found[b, 0] - expected).abs().sum() / expected.sum()) < 0.05
        assert math.isclose(float(found[b].sum()), float(weights[b].sum()), rel_tol=1e-6)


def test_a_batch_of_key_points_equals_its_examples():
    model, x = KeyPoints().eval(), torch.randn(2, 1, 6, 6)
    found = GenericAttention(model).attribute(x, target=1)
    for b in range(2):
        alone = GenericAttention(model).attribute(x[b : b + 1], target=1)
        assert torch.allclose(found[b], alone[0], atol=1e-5 * float(alone.max()))


class Deformable(KeyPoints):
    """The places are computed from a pixel: deformable attention."""

    def tokens(self, x):
        at = torch.tanh(x[:, :1, :1, :1] + torch.rand(1, 1, 3, 2))
        return F.grid_sample(self.stem(x), at, align_corners=False)[:, :, 0].mT


def test_places_that_are_computed_are_refused_by_name():
    with pytest.raises(WiringError, match="deformable attention.*only way to them"):
        GenericAttention(Deformable().eval()).attribute(torch.randn(1, 1, 6, 6), target=1)


class SideWay(nn.Module):
    """A positional convolution beside the tokens, one cell longer, cut: as in wav2vec."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Conv1d(1, 8, 4, 4)
        self.position = nn.Conv1d(8, 8, 4, padding=2, groups=8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.position.weight[..., 1:] = 0  # each of its cells sees one token alone

    def forward(self, x):
        rows = self.front(x[:, None])
        rows = rows + F.gelu(self.position(rows)[..., :-1])
        return self.head(self.layer(rows.mT).mean(1))


def test_a_map_on_one_of_two_ways_is_not_that_of_the_tokens():
    model, x = SideWay().eval(), torch.randn(2, 20)
    method = GenericAttention(model)
    found, tokens = method.attribute(x, target=1), method.attribute_tokens(x, target=1)["x"]
    assert torch.allclose(found, tokens.repeat_interleave(4, 1), atol=1e-6)
    alone = GenericAttention(model).attribute(x[:1], target=1)
    assert torch.allclose(found[:1], alone, atol=1e-5)


class Packed(nn.Module):
    """Images as rows of patches, positions in their own grids; `mixed`: a convolution behind."""

    def __init__(self, mixed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Linear(3, 8), nn.Embedding(16, 8)
        self.see, self.read = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.mix = nn.Conv1d(8, 8, 3, padding=1) if mixed else None

    def forward(self, input_ids, patches, grid):
        sizes = [int(n) for n in grid.prod(1)]
        places = torch.cat([torch.arange(h * w) // w for h, w in grid.tolist()])
        places = places + torch.repeat_interleave(grid[:, 0], grid.prod(1))
        rows = self.embed(patches) + self.places(places)
        seen = [r[None] + self.see(*(r[None],) * 3)[0] for r in rows.split(sizes)]
        text = self.words(input_ids)
        rows = torch.cat([torch.cat(seen), text], 1)
        if self.mix is not None:
            rows = rows + self.mix(rows.mT).mT
        return self.head((rows + self.read(rows, rows, rows)[0])[:, -1])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_packed_patches_beside_their_grids(method, mixed):
    model = Packed(mixed).eval()
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        "patches": torch.randn(8, 3),
        "grid": torch.tensor([[2, 2], [2, 2]]),
    }
    found = method(model).attribute(inputs, target=1)
    assert found["patches"].shape == (8, 3)
    for b in range(2):
        rows = slice(4 * b, 4 * b + 4)
        one = {n: v[rows if n == "patches" else slice(b, b + 1)] for n, v in inputs.items()}
        alone = method(model).attribute(one, target=1)
        close = 0.05 * float(alone["patches"].max()) if mixed else 1e-5  # T is estimated
        assert torch.allclose(found["patches"][rows], alone["patches"], atol=close)
        close = 0.05 * float(alone["input_ids"].max()) if mixed else 1e-5
        assert torch.allclose(found["input_ids"][b], alone["input_ids"][0], atol=close)
        assert bool(alone["patches"].any())


class Twice(nn.Module):
    """Two pictures of each example behind each other, batch by batch: (2 B heads) leads a map."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, 3)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x, y):
        rows = self.embed(torch.cat([x, y]))  # (2 B, n, 8)
        q, k, v = self.qkv(rows).view(*rows.shape[:2], 3, 4, 2).permute(2, 0, 3, 1, 4)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (2 B heads, n, 2)
        seen = ((q @ k.mT).softmax(-1) @ v).view(len(rows), 4, -1, 2).transpose(1, 2).flatten(2)
        one, other = (rows + seen).chunk(2)
        return self.out(torch.cat([one, other], 1).mean(1))


@pytest.mark.parametrize("method", METHODS)
def test_examples_between_two_inputs_and_heads(method):
    model, x, y = Twice().eval(), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    found = method(model).attribute((x, y), target=1)
    for b in range(2):
        alone = method(model).attribute((x[b : b + 1], y[b : b + 1]), target=1)
        for one, other in zip(found, alone, strict=True):
            assert torch.allclose(one[b], other[0], atol=1e-5) and bool(other.any())


def test_weights_near_zero_are_read_all_the_same():
    """Gradients of 1e-25, whose squares float32 cannot hold."""
    model = Twice().eval()
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    expected = AttentionRollout(model).attribute((x, y), target=1)
    with torch.no_grad():
        model.embed.weight *= 1e-25
        model.embed.bias.zero_()
    found = AttentionRollout(model).attribute((x * 1e25, y * 1e25), target=1)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and bool(one.any())


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.layer(x)
        return self.head(self.pool(self.query.expand(len(x), -1, -1), x, x)[0][:, 0])


@pytest.mark.parametrize("method", METHODS)
def test_layers_without_the_only_way_to_the_input_are_refused(method):
    x = torch.randn(2, 5, 8)
    with pytest.raises(OptionError, match="leave out 'pool', by which alone"):
        method(Pooled().eval(), layers="layer*").attribute(x, target=1)
    assert bool(method(Pooled().eval(), layers="pool*").attribute(x, target=1).any())


@pytest.mark.parametrize("kind", ["list", "array", "dict"])
def test_what_is_no_tensor_is_named(kind):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x, ids, scale=1.0):
            ids = torch.as_tensor(ids["ids"] if isinstance(ids, dict) else ids)
            return self.head(self.layer(torch.cat([x, self.words(ids)], 1)).mean(1)) * scale

    ids = [[1, 2], [3, 4]]
    given = {"list": ids, "array": np.array(ids), "dict": {"ids": torch.tensor(ids)}}[kind]
    inputs = {"x": torch.randn(2, 3, 8), "ids": given, "scale": 2.0}
    with pytest.warns(UserWarning, match="'ids': what holds numbers in another form"):
        assert set(GenericAttention(Words().eval()).attribute(inputs, target=1)) == {"x"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the output reads all tokens")
        inputs["ids"] = torch.tensor(ids)
        found = GenericAttention(Words().eval()).attribute(inputs, target=1)
    assert set(found) == {"x", "ids"}
