"""Mixing hops: tokens that something else than attention mixes, against exact Jacobians."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_attn import AttentionRollout, GenericAttention, HeterogenousAttention, VTranM
from captum_attn.attr._request import Request
from captum_attn.errors import OptionError
from captum_attn.observe.streams.states import MixedState
from tests.plain import close

pytestmark = pytest.mark.filterwarnings("ignore:tokens are mixed")


class Block(nn.Module):
    """Post-norm attention without a norm: x + attention(x); its input and output are kept."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in "qkv")

    def forward(self, x):
        self.tokens = x
        scores = self.q(x) @ self.k(x).mT / x.shape[-1] ** 0.5
        self.A = scores.softmax(-1)
        self.out = self.A @ self.v(x)
        return x + self.out


def local(x, kernel=5):
    """Each token becomes a weighted sum of its neighbours', alike for every channel."""
    weight = torch.arange(1.0, kernel + 1, dtype=x.dtype).expand(x.shape[-1], 1, kernel)
    return F.conv1d(x.mT, weight, padding=kernel // 2, groups=x.shape[-1]).mT


class Mixed(nn.Module):
    """ids -> mixing -> attention -> mixing -> attention -> the last token."""

    def __init__(self, kind="lstm", width=8):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.words = kind, nn.Embedding(20, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.rnn = nn.ModuleList([nn.LSTM(width, width, batch_first=True) for _ in range(2)])
        self.conv = nn.ModuleList([nn.Conv1d(width, width, 3, padding=1) for _ in range(2)])
        self.head = nn.Linear(width, 3)
        self.double()

    def mix(self, x, i):
        if self.kind == "lstm":
            return x + self.rnn[i](x)[0]
        if self.kind == "conv":
            return x + self.conv[i](x.mT).mT.tanh()
        if self.kind == "scan":  # linear attention: a state that is carried along
            state, rows = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                state = 0.7 * state + x[:, t]
                rows.append(state)
            return torch.stack(rows, 1)
        return local(x)

    def forward(self, ids):
        x = self.kept = self.words(ids)
        for i, block in enumerate(self.blocks):
            x = block(self.mix(x, i))
        return self.head(x[:, -1])


def jacobian(model, ids, i):
    """T of the hop in front of block i, for one example: (n, n), from every single derivative."""
    output = model(ids)
    t = model.blocks[i].tokens
    u = model.kept if i == 0 else model.blocks[i - 1].out
    assert output.requires_grad
    n, width = t.shape[1:]
    squares = torch.zeros(n, n, dtype=torch.double)
    for row in range(n):
        for channel in range(width):
            (g,) = torch.autograd.grad(t[0, row, channel], u, retain_graph=True)
            squares[row] += g[0].square().sum(-1)
    return squares / squares.sum(-1, keepdim=True)


def gae_by_hand(model, ids, target):
    """R <- (I + Abar) T R, hop after hop."""
    output = model(ids)
    maps = [block.A for block in model.blocks]
    gradients = torch.autograd.grad(output[0, target], maps, retain_graph=True)
    R = torch.eye(ids.shape[1], dtype=torch.double)
    for i, (A, G) in enumerate(zip(maps, gradients, strict=True)):
        R = jacobian(model, ids, i) @ R
        R = R + (A * G).clamp(min=0)[0].detach() @ R
    return R


IDS = torch.tensor([[3, 7, 1, 12, 5, 9], [2, 2, 14, 6, 0, 11]])


@pytest.mark.parametrize("kind", ["lstm", "conv", "scan", "local"])
def test_relevance_passes_through_the_exact_jacobian(kind):
    model = Mixed(kind).eval()
    found = GenericAttention(model).attribute(IDS, 1)
    assert found.shape == IDS.shape
    for b in range(2):
        R = gae_by_hand(model, IDS[b : b + 1], 1)
        close(found[b], R[-1], 1e-8)
    maps = GenericAttention(model).relevance_maps(IDS, 1)["ids", "ids"]
    close(maps[1], R, 1e-8)


@pytest.mark.parametrize("method", [GenericAttention, AttentionRollout, HeterogenousAttention])
@pytest.mark.parametrize("kind", ["lstm", "conv", "scan"])
def test_the_estimate_is_within_five_percent(method, kind):
    model = Mixed(kind, width=32).eval()
    ids = torch.randint(0, 20, (2, 40), generator=torch.Generator().manual_seed(0))
    exact = method(model).relevance_maps(ids, 1)["ids", "ids"][:, -1]
    readout = torch.full((2,), 39)
    found = method(model).attribute(ids, 1, readout=readout)
    assert (found - exact).abs().sum() < 0.05 * exact.abs().sum()
    if method is AttentionRollout:  # what is passed on is not estimated, only where it goes
        close(found.sum(1), exact.sum(1), 1e-8)


def test_signed_relevance_keeps_its_signs_apart():
    model = Mixed("conv", width=32).eval()
    ids = torch.randint(0, 20, (2, 40), generator=torch.Generator().manual_seed(0))
    method = HeterogenousAttention(model)
    exact = method.relevance_maps(ids, 1, correction="full")["ids", "ids"][:, -1]
    found = method.attribute(ids, 1, correction="full")
    assert (exact < 0).any()
    assert (found - exact).abs().sum() < 0.05 * exact.abs().sum()


@pytest.mark.parametrize("width", [8, 32])
def test_a_batch_equals_its_examples(width):
    model = Mixed("lstm", width).eval()
    ids = torch.randint(0, 20, (3, 30), generator=torch.Generator().manual_seed(0))
    method = GenericAttention(model)
    together = method.attribute(ids, 1)
    close(together, torch.cat([method.attribute(ids[b : b + 1], 1) for b in range(3)]), 1e-10)
    close(together, method.attribute(ids, 1), 1e-12)  # what is remembered changes nothing


def test_a_causal_hop_stays_causal_and_padding_behind_gets_nothing():
    model = Mixed("scan", 32).eval()
    ids = torch.randint(0, 20, (2, 30), generator=torch.Generator().manual_seed(0))

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            x = self.model.words(ids)
            for i, block in enumerate(self.model.blocks):
                causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
                y = self.model.mix(x, i)
                scores = (block.q(y) @ block.k(y).mT).masked_fill(~causal, -torch.inf)
                x = y + scores.softmax(-1) @ block.v(y)
            return self.model.head(x[:, 19])

    method = GenericAttention(Read())
    found = method.attribute(ids, 1)
    assert not found[:, 20:].any()
    close(found[:, :20], method.attribute(ids[:, :20], 1), 1e-8)


class Stages(nn.Module):
    """Patches, attention, an overlapping convolution that halves them, attention, the mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, 2, 1)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, image):
        x = self.stem(image)
        y = self.blocks[0](x.flatten(2).mT)
        y = self.down(y.mT.reshape(x.shape))
        return self.head(self.blocks[1](y.flatten(2).mT).mean(1))


def test_stages_that_merge_by_an_overlapping_convolution():
    model, image = Stages().eval(), torch.randn(1, 3, 8, 8, dtype=torch.double)
    tokens = GenericAttention(model).attribute_tokens(image, 1)["image"]
    output = model(image)
    first, second = model.blocks
    maps = [first.A, second.A]
    gradients = torch.autograd.grad(output[0, 1], maps, retain_graph=True)
    squares = torch.zeros(4, 16, dtype=torch.double)
    for row in range(4):
        for channel in range(8):
            (g,) = torch.autograd.grad(second.tokens[0, row, channel], first.out, retain_graph=True)
            squares[row] += g[0].square().sum(-1)
    T = squares / squares.sum(-1, keepdim=True)
    steps = [(A * G).clamp(min=0)[0].detach() for A, G in zip(maps, gradients, strict=True)]
    R = (torch.eye(4) + steps[1]) @ T @ (torch.eye(16) + steps[0])
    close(tokens[0], R.mean(0), 1e-8)


class Unfolded(nn.Module):
    """MobileViT's block: a convolution, then attention among the pixels at one place of a patch."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.local, self.join = (nn.Conv2d(n * width, width, 3, padding=1) for n in (1, 2))
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.heads = nn.Linear(width, width), heads

    def forward(self, x):
        y = self.local(x)
        batch, width, h, w = y.shape
        y = y.view(batch, width, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1)
        y = y.reshape(batch * 4, -1, width)
        self.tokens = self.norm(y)  # what Q, K and V are projected from
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.tokens).chunk(3, -1)
        )
        self.A = (q @ k.mT / 2).softmax(-1)
        self.heard = self.A @ v
        y = y + self.out(self.heard.transpose(1, 2).flatten(2))
        y = y.view(batch, 2, 2, h // 2, w // 2, width).permute(0, 5, 3, 1, 4, 2)
        return self.join(torch.cat([x, y.reshape(batch, width, h, w)], 1))


class MobileViT(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, 2, 1)
        self.blocks, self.head = nn.ModuleList([Unfolded(8), Unfolded(8)]), nn.Linear(8, 3)
        self.double()

    def forward(self, image):
        first, second = self.blocks
        return self.head(second(self.down(first(self.stem(image)))).mean((2, 3)))


@pytest.mark.parametrize("side", [8, 16])  # a window of one token, and of four, behind the halving
def test_windows_whose_tokens_a_convolution_has_mixed(side):
    model = MobileViT().eval()
    image = torch.randn(2, 3, side, side, dtype=torch.double, generator=torch.manual_seed(1))
    method = GenericAttention(model)
    roles = [(call.windows, call.heads) for call, _ in method.layer_maps(image, 1)]
    assert roles == [(4, 2), (4, 2)]
    found = method.relevance_maps(image, 1)["image", "image"]
    output, (first, second) = model(image[1:]), model.blocks
    gradients = torch.autograd.grad(output[0, 1], [first.A, second.A], retain_graph=True)
    t = second.tokens.flatten(0, 1)
    squares = []
    for row in range(len(t)):
        by_channel = [
            torch.autograd.grad(value, first.heard, retain_graph=True)[0] for value in t[row]
        ]
        squares.append(sum(g.square().sum((1, 3)).flatten() for g in by_channel))
    T = torch.stack(squares)
    T = T / T.sum(-1, keepdim=True)
    steps = [
        torch.eye(len(A) * A.shape[-1]) + torch.block_diag(*(A * G).clamp(min=0).mean(1))
        for A, G in zip((first.A, second.A), gradients, strict=True)
    ]
    R = (steps[1] @ T @ steps[0]).detach()
    cells = side // 4
    raster = torch.arange(4 * cells**2).view(cells, 2, cells, 2).permute(1, 3, 0, 2).flatten()
    close(found[1], R[:, raster.argsort()], 1e-8)


def test_it_is_said_once_what_mixes_and_how():
    method = GenericAttention(Mixed("conv", 32).eval())
    with pytest.warns(UserWarning, match="conv.0.*conv.1"):
        method.attribute(IDS, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.attribute(IDS, 1)
    table = method.describe(IDS.repeat(1, 5), 1)
    assert [row.tokens for row in table.mixing] == [30, 30]
    assert "by conv.1" in str(table) and "64 draws" in str(table)
    assert "exactly" in str(method.describe(IDS, 1))
    assert [row.draws for row in method.describe(IDS, 1, mixing_draws=3).mixing] == [3, 3]
    with pytest.raises(OptionError, match="mixing_draws"):
        method.attribute(IDS, 1, mixing_draws=0)


def test_an_index_map_pays_nothing():
    """Only where the tokens' positions cannot be told there is a mixing hop."""

    class Moved(Mixed):
        def mix(self, x, i):
            return torch.cat([x[:, 2:], x[:, :2]], 1)

    method = GenericAttention(Moved().eval())
    with method._run(IDS, Request(1, None, None, "auto", 0), {}) as run:
        assert not run.observation.wiring.mixed_states


def test_a_backward_pass_without_a_derivative_of_its_own_is_asked_row_by_row():
    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.cumsum(1)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g.flip(1).cumsum(1).flip(1)

    class Kernel(Mixed):
        def mix(self, x, i):
            return Scan.apply(x)

    class Plain(Mixed):
        def mix(self, x, i):
            return x.cumsum(1)

    ids = torch.randint(0, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    found = GenericAttention(Kernel(width=32).eval()).attribute(ids, 1)
    expected = GenericAttention(Plain(width=32).eval()).attribute(ids, 1)
    assert (found - expected).abs().sum() < 0.05 * expected.abs().sum()


class TwoScales(nn.Module):
    """The queries are pooled by a convolution, the keys and values by another one (MViT, CvT)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.q, self.kv = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, image):
        x = self.stem(image)
        q, (k, v) = self.q(x).flatten(2).mT, self.kv(x).flatten(2).mT.chunk(2, -1)
        return self.head((q + (q @ k.mT).softmax(-1) @ v).mean(1))


def test_queries_and_keys_at_two_scales_are_one_stream():
    tokens = GenericAttention(TwoScales().eval()).attribute_tokens(
        torch.randn(2, 3, 8, 8, dtype=torch.double), 1
    )
    assert {name: tuple(rows.shape) for name, rows in tokens.items()} == {"image": (2, 16)}


def test_versions_that_part_are_added_by_their_shares():
    """x, then a(x) and b(a'(x)): both are added before the next attention."""

    class Parted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Block(8) for _ in range(4)])
            self.head = nn.Linear(8, 3)
            self.double()

        def forward(self, x):
            first, a, b, last = self.blocks
            y = first(x)
            return self.head(last(2 * a(y).tanh() + b(local(y))).mean(1))

    method, x = GenericAttention(Parted().eval()), torch.randn(2, 5, 8, dtype=torch.double)
    with method._run(x, Request(1, None, None, "auto", 0), {}) as run:
        asked = run.attention_states[-1].query_state
        assert isinstance(asked, MixedState) and len(asked.parts) == 2
        rows = sum(asked.mixing.matrices())
        close(rows.sum(-1), torch.ones(2, 5).double(), 1e-10)
    assert method.attribute(x, 1).sum() > 0


def test_vtranm_on_a_hybrid():
    model = Mixed("conv", 16).eval()
    found = VTranM(model).attribute(IDS, 1)
    assert found.shape == IDS.shape and (found > 0).all()


def test_a_parameter_on_the_way_has_a_single_axis():
    """A norm's weight, cast on the way, is a node of the graph with one axis."""

    class Weighted(Mixed):
        def __init__(self):
            super().__init__("scan", 16)
            self.scale = nn.Parameter(torch.rand(16))

        def mix(self, x, i):
            return super().mix(x * self.scale.double().exp(), i)

    found = GenericAttention(Weighted().eval()).attribute(IDS, 1)
    assert found.shape == IDS.shape and (found > 0).any()
