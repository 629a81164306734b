"""Axes are asked for, never guessed from sizes; what was not seen, or got nothing, is named.

A batch must be explained as its examples are one by one, and a model as its twin in another layout.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_attn import (
    AttentionRollout,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    VTranM,
)
from captum_attn.errors import InputError, WiringError
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.capture.tensor_notes import axes_after
from captum_attn.observe.streams.readout import _token_orders

METHODS = (RawAttention, AttentionRollout, GenericAttention, HeterogenousAttention)


def off(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------ as many examples as tokens
class LengthFirst(nn.Module):
    """`nn.TransformerEncoder` as it comes, (n, B, D)."""

    def __init__(self, pool):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.pool = nn.Linear(3, 8), nn.Linear(8, 4), pool
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)

    def forward(self, x):
        position = torch.linspace(-1, 1, x.shape[1])[:, None, None]
        rows = self.encoder(self.embed(x).transpose(0, 1) + position)
        pooled = {"mean": rows.mean(0), "max": rows.amax(0), "last": rows[-1]}
        return self.head(pooled[self.pool])


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_as_many_examples_as_tokens(pool, n, method):
    model = LengthFirst(pool).eval()
    x = torch.randn(n, n, 3, generator=torch.Generator().manual_seed(n))
    alone = torch.cat([method(model).attribute(x[i : i + 1], target=1) for i in range(n)])
    assert off(method(model).attribute(x, target=1), alone) < 1e-4


class ChannelsFirst(nn.Module):
    def __init__(self, n, adaptive):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(n, 4, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(n, 3)
        self.adaptive = adaptive

    def forward(self, x):
        rows = self.encoder(x)
        if self.adaptive:
            return self.head(F.adaptive_avg_pool1d(rows.transpose(1, 2), 1)[..., 0])
        return self.head(rows.mean(1))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_as_many_tokens_as_channels(batch):
    found, expected = ChannelsFirst(16, True).eval(), ChannelsFirst(16, False).eval()
    x = torch.randn(batch, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = GenericAttention(found).attribute_tokens(x, target=1)["x"]
    assert off(tokens, GenericAttention(expected).attribute_tokens(x, target=1)["x"]) < 1e-5


def test_orders_that_sizes_allow():
    assert _token_orders((2, 5, 7), 2, 5) == [(0, 1, 2)]
    assert _token_orders((5, 2, 7), 2, 5) == [(1, 0, 2)]
    assert _token_orders((4, 4, 4), 4, 4) == [
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0),
    ]  # fmt: skip
    assert _token_orders((2, 7, 3, 4), 2, 12) == [(0, 2, 3, 1)]
    assert _token_orders((6, 4, 7), 2, 12) == [(0, 1, 2)]
    assert _token_orders((2, 12), 2, 12) == []


# ------------------------------------------------------------ along which axis of an image
class Convolutional(nn.Module):
    """A stem down to 2 x 2 cells, each of which sees the whole image."""

    def __init__(self, turned, seed):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3, 2, 1)]
        for _ in range(3):
            layers += [nn.GELU(), nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 5, 1, 2)]
        self.stem, self.head, self.turned = nn.Sequential(*layers), nn.Linear(16, 3), turned
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x):
        cells = self.stem(x)
        cells = cells.transpose(2, 3) if self.turned else cells
        return self.head(self.encoder(cells.flatten(2).mT)[:, 1])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_image_whose_tokens_see_all_of_it(turned, seed):
    model = Convolutional(turned, seed).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    found = GenericAttention(model).attribute(x, target=1, interpolation="nearest")
    cells = GenericAttention(model).attribute_tokens(x, target=1)["x"].view(2, 2, 2)
    cells = cells.mT if turned else cells
    expected = cells.repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert off(found.sum(1), expected) < 1e-5
    assert torch.equal(found[:, 0], found[:, 2])


# ------------------------------------------------------------ windows, heads, examples
class Conformer(nn.Module):
    """Heads behind a convolution: every token enters every head, and learned biases do too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.qkv, self.out = nn.Conv1d(8, 8, 3, padding=1), *self._linear()
        self.bias, self.head = nn.Parameter(torch.randn(2, 4)), nn.Linear(8, 3)

    def _linear(self):
        return nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        x = self.mix(x.mT).mT
        q, k, v = (t.unflatten(-1, (2, 4)) for t in self.qkv(x).chunk(3, -1))
        q = (q + self.bias).transpose(1, 2)
        a = (q @ k.transpose(1, 2).mT).softmax(-1) @ v.transpose(1, 2)
        return self.head((x + self.out(a.transpose(1, 2).flatten(2)))[:, 0])


def test_heads_behind_a_convolution_are_no_windows():
    x = torch.randn(2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ((call, weights),) = GenericAttention(Conformer().eval()).layer_maps(x, target=1)
    assert (call.windows, call.heads, weights.shape) == (1, 2, (2, 2, 5, 5))


class WindowsTimesHeads(nn.Module):
    """Windows in the batch of `nn.MultiheadAttention`: examples, windows and heads on one axis."""

    def __init__(self, windows, heads, seed):
        super().__init__()
        torch.manual_seed(seed)
        layers = (nn.MultiheadAttention(8, heads, batch_first=True) for _ in range(2))
        self.layers, self.head, self.windows = nn.ModuleList(layers), nn.Linear(8, 3), windows

    def forward(self, x):
        for layer in self.layers:
            inside = x.unflatten(1, (self.windows, -1)).flatten(0, 1)
            x = x + layer(inside, inside, inside, need_weights=True)[0].reshape(x.shape)
        return self.head(x.mean(1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("windows, heads", [(3, 4), (5, 4), (6, 2), (6, 4)])
def test_windows_and_heads_on_one_axis(windows, heads, seed):
    """By chance one code tells several heads no more apart than several windows."""
    model = WindowsTimesHeads(windows, heads, seed).eval()
    maps = AttentionRollout(model).layer_maps(torch.randn(2, 3 * windows, 8))
    assert [(call.windows, call.heads) for call, _ in maps] == [(windows, heads)] * 2


class Decoder(nn.Module):
    """Learned queries that attend to each other first, batch and heads on one axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.head = nn.Parameter(torch.randn(3, 1, 8)), nn.Linear(8, 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)

    def forward(self, x):
        queries = self.queries.expand(-1, len(x), -1)
        return self.head(self.decoder(queries, x.transpose(0, 1))[0])


@pytest.mark.parametrize("method", METHODS)
def test_learned_queries_and_as_many_examples_as_heads(method):
    model, x = Decoder().eval(), torch.randn(2, 6, 8)
    alone = torch.cat([method(model).attribute(x[i : i + 1], target=1) for i in range(2)])
    assert off(method(model).attribute(x, target=1), alone) < 1e-4


def test_examples_of_the_output_count():
    """One image and k texts in a row of scores are one example; the reverse is refused."""

    class Scores(nn.Module):
        def __init__(self, of_texts=False):
            super().__init__()
            torch.manual_seed(0)
            layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
            self.words, self.patches = nn.Embedding(20, 8), nn.Linear(4, 8)
            self.text, self.image = (nn.TransformerEncoderLayer(**layer) for _ in range(2))
            self.of_texts = of_texts

        def forward(self, image, input_ids):
            one = self.image(self.patches(image)).mean(1)
            scores = one @ self.text(self.words(input_ids))[:, -1].T
            return scores.T if self.of_texts else scores

    image, ids = torch.randn(1, 5, 4), torch.randint(20, (3, 4))
    found = GenericAttention(Scores().eval()).attribute({"image": image, "input_ids": ids}, 2)
    alone = GenericAttention(Scores().eval()).attribute({"image": image, "input_ids": ids[2:]}, 0)
    assert found["input_ids"].shape == (3, 4)
    assert not found["input_ids"][:2].any()
    assert off(found["input_ids"][2:], alone["input_ids"]) < 1e-5
    assert off(found["image"], alone["image"]) < 1e-5
    with pytest.raises(InputError, match=r"'image' has 1 .*'input_ids': 3"):
        GenericAttention(Scores(True).eval()).attribute({"image": image, "input_ids": ids}, 0)


# ------------------------------------------------------------ what was not seen
@torch.no_grad()
def test_scores_are_followed_through_views():
    scores = torch.randn(2, 3, 6, 4)
    axes = ((-2,), (-1,))

    def after(func, before, now, *args):
        return axes_after(func, (before, *args), {}, before, now, axes)

    split = scores.view(2, 3, 6, 2, 2)
    assert after(torch.Tensor.view, scores, split) == ((-3,), (-2, -1))
    merged = split.view(6, 6, 4)
    assert axes_after(torch.Tensor.view, (split,), {}, split, merged, ((-3,), (-2, -1))) == axes
    assert after(torch.Tensor.view, scores, scores.view(2, 3, 2, 3, 2, 2)) == ((-4, -3), (-2, -1))
    assert after(torch.Tensor.view, scores, scores.view(2, 18, 4)) is None  # heads and queries
    assert after(torch.Tensor.mean, scores, scores.mean(1)) == axes


@pytest.mark.parametrize("kinds", [("raw", "seen"), ("seen", "raw"), ("seen", "raw", "seen")])
def test_attention_that_was_not_seen_is_named(kinds):
    class Layer(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.qkv, self.norm, self.kind = nn.Linear(8, 24), nn.LayerNorm(8), kind

        def forward(self, x):
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            if self.kind == "raw":
                y = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
            else:
                y = F.scaled_dot_product_attention(q, k, v)
            return x + y.transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(kind) for kind in kinds)).eval()

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = model, nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layers(x)[:, 0])

    with pytest.warns(UserWarning, match=r"could not be seen.*'layers\.\d'"):
        GenericAttention(First().eval()).attribute(torch.randn(2, 5, 8), target=1)


# ------------------------------------------------------------ what got nothing
class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head, self.condition = nn.Linear(8, 3), nn.Linear(4, 3)

    def forward(self, x, condition):
        return self.head(self.encoder(x).mean(1)) + self.condition(condition)


@pytest.mark.parametrize("method", [*METHODS, VTranM])
@pytest.mark.parametrize("mapping", [False, True])
def test_an_input_that_attention_does_not_read_is_named(method, mapping):
    x, condition = torch.randn(2, 5, 8), torch.randn(2, 4)
    inputs = {"x": x, "condition": condition} if mapping else (x, condition)
    with pytest.warns(UserWarning, match="'condition' got no relevance"):
        method(Conditioned().eval()).attribute(inputs, target=1)


def test_nothing_at_all_is_named():
    """A: one head, values that are alike: no gradient of A is positive anywhere."""

    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.ones(1, 2))

        def forward(self, x):
            rows = F.scaled_dot_product_attention(self.queries.expand(len(x), -1, -1), x, x)
            return rows[:, 0]

    x = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    with pytest.warns(UserWarning, match="'x' got no relevance.*counts against the target"):
        assert not GenericAttention(Latents()).attribute(x, target=1).any()
    assert GenericAttention(Latents()).attribute(x, target=0).sum() > 0


# ------------------------------------------------------------ derivatives
def test_batch_norm_of_one_example_before_attention():
    """Tokens' gradients arrive with the channels last: one example as a batch of two."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 16, 16)

    def gradient(images):
        images = images.clone().requires_grad_()
        with Tap():
            rows = stem(images).flatten(2).mT
        (found,) = torch.autograd.grad(rows, images, weights[: len(images)])
        return found

    weights = torch.randn(2, 16, 8)
    assert off(gradient(x[:1]), gradient(x)[:1]) < 1e-6


def test_operators_without_a_derivative_are_named():
    if not [e for e in torch.backends.quantized.supported_engines if e != "none"]:
        pytest.skip("this torch has no quantised layers")
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), layer, nn.Flatten(), nn.Linear(40, 3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[0] = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(3, 8)), {nn.Linear}, dtype=torch.qint8
        )
    with pytest.raises(WiringError, match=r"'0\.0'.*has no derivative"):
        GenericAttention(model).attribute(torch.randn(2, 5, 3), target=1)


class NoGradient(nn.Linear):
    """As int8 kernels of activations: what comes out hangs in no graph, and nothing is detached."""

    def forward(self, x):
        with torch.no_grad():
            return torch.tensor((x.detach() @ self.weight.T + self.bias).tolist())


@pytest.mark.parametrize("method", [AttentionRollout, GenericAttention, VTranM])
def test_a_model_that_hangs_in_no_graph_says_what_has_no_derivative(method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = NoGradient(8, 24), NoGradient(8, 3)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.head(read[:, 0])

    with pytest.raises(WiringError, match=r"no derivative.*before it was quantised"):
        method(Model().eval()).attribute(torch.randn(2, 5, 8), target=1)


def test_feed_forward_branches_of_functions_of_their_own():
    """VTranM finds a branch by where it is added: a projection may be called anything."""

    class Strange(torch.autograd.Function):
        @staticmethod
        def forward(context, x, weight, bias):
            context.save_for_backward(weight)
            return x @ weight.T + bias

        @staticmethod
        def backward(context, gradient):
            return gradient @ context.saved_tensors[0], None, None

    class Linear(nn.Linear):
        strange = False

        def forward(self, x):
            return Strange.apply(x, self.weight, self.bias) if self.strange else super().forward(x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
            self.qkv, self.out, self.up, self.down = (
                Linear(8, 24), Linear(8, 8), Linear(8, 16), Linear(16, 8),
            )  # fmt: skip

        def forward(self, x):
            q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            return x + self.down(torch.relu(self.up(self.second(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.blocks(x)[:, 0])

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 5, 8)
    expected = VTranM(model).attribute(x, target=1)
    for name in ("qkv", "out", "up", "down"):
        for block in model.blocks:
            getattr(block, name).strange = True
        assert off(VTranM(model).attribute(x, target=1), expected) < 1e-5
