"""RawAttention, AttentionRollout and GenericAttention against the plain rewrites, to 1e-10.

Random tiny pre-norm transformers in float64; their attention is written out or fused, with the same
weights. The library explains a batch at once, the rewrites one example after another.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_attn import AttentionRollout, GenericAttention, RawAttention
from tests import plain
from tests.plain import close

CLASSES, HEAD_DIM = 3, 4
STREAM = "tokens"


@dataclass(frozen=True)
class Setting:
    depth: int
    heads: int
    length: int
    batch: int
    causal: bool
    class_token: bool
    ids: bool
    readout: str
    seed: int


def transformers(**fixed):
    drawn = {
        "depth": st.integers(1, 4),
        "heads": st.integers(1, 3),
        "length": st.integers(1, 7),
        "batch": st.integers(1, 3),
        "causal": st.booleans(),
        "class_token": st.booleans(),
        "ids": st.booleans(),
        "readout": st.sampled_from(["first", "last", "mean"]),
        "seed": st.integers(0, 2**20),
    }
    return st.builds(Setting, **{**drawn, **fixed})


check = settings(max_examples=12, deadline=None)


class Attention(nn.Module):
    def __init__(self, dim, heads, causal, maps):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.heads, self.causal, self.maps, self.form = heads, causal, maps, "inline"

    def forward(self, x):
        split = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        q, k, v = split  # (B, H, n, d)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.form == "inline":
            scores = q @ k.mT / HEAD_DIM**0.5
            if self.causal:
                scores = scores.masked_fill(hidden, float("-inf"))
            z = self.maps.add(scores.softmax(-1)) @ v
        else:
            attend = nn.functional.scaled_dot_product_attention
            if not self.causal:
                z = attend(q, k, v)
            elif self.form == "sdpa":
                z = attend(q, k, v, is_causal=True)
            else:
                mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, float("-inf"))
                z = attend(q, k, v, attn_mask=mask)
        return self.out(z.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dim, heads, causal, maps):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, causal, maps)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, setting):
        super().__init__()
        dim, self.setting, self.maps = setting.heads * HEAD_DIM, setting, plain.Maps()
        self.embed = nn.Embedding(11, dim) if setting.ids else nn.Linear(5, dim)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim)) if setting.class_token else None
        shape = (setting.heads, setting.causal, self.maps)
        self.blocks = nn.ModuleList([Block(dim, *shape) for _ in range(setting.depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        pooled = {"first": x[:, 0], "last": x[:, -1], "mean": x.mean(1)}[self.setting.readout]
        return self.head(pooled)

    def fused(self, form):
        twin = copy.deepcopy(self)
        for block in twin.blocks:
            block.attn.form = form
        return twin


def make(setting):
    """-> the forms of one model, its inputs, a target for each example."""
    generator = torch.Generator().manual_seed(setting.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model = Transformer(setting).double().eval()
    for parameter in model.parameters():  # wide enough for maps far from uniform
        parameter.data.mul_(2)
    shape = (setting.batch, setting.length)
    if setting.ids:
        inputs = torch.randint(11, shape, generator=generator)
    else:
        inputs = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (setting.batch,), generator=generator)
    forms = [model, model.fused("sdpa")] + [model.fused("masked")] * setting.causal
    return forms, inputs, targets


def observed(model, inputs, targets):
    """Every example's maps and gradients, one example after another."""
    for example, target in zip(inputs, targets, strict=True):
        yield plain.maps_and_gradients(model, lambda out, c=target: out[0, c], example[None])


def readout_weights(setting):
    n = setting.length + setting.class_token
    if setting.readout == "mean":
        return torch.full((n,), 1 / n, dtype=torch.float64)
    return plain.eye(n)[0 if setting.readout == "first" else -1]


def agree(method, inputs, targets, expected, weights, **options):
    """Final matrices, and the rows that are read."""
    maps = method.relevance_maps(inputs, targets, **options)
    assert set(maps) == {(STREAM, STREAM)}
    close(maps[STREAM, STREAM], expected)
    tokens = method.attribute_tokens(inputs, targets, **options)
    assert set(tokens) == {STREAM}
    close(tokens[STREAM], torch.einsum("i,bij->bj", weights, expected))


@check
@given(transformers(), st.data())
def test_generic_attention(setting, data):
    forms, inputs, targets = make(setting)
    start, aggregate = data.draw(st.integers(0, setting.depth - 1)), True
    if start == 0:
        aggregate = data.draw(st.booleans())
    expected = torch.stack(
        [plain.gae(A, G, start, aggregate) for A, G in observed(forms[0], inputs, targets)]
    )
    options = {"start_layer": start, "aggregate": aggregate}
    for model in forms:
        method = GenericAttention(model)
        agree(method, inputs, targets, expected, readout_weights(setting), **options)


@check
@given(transformers(), st.sampled_from(["mean", "max", "min"]), st.data())
def test_rollout(setting, head_fusion, data):
    forms, inputs, targets = make(setting)
    start = data.draw(st.integers(0, setting.depth - 1))
    expected = torch.stack(
        [plain.rollout(A, head_fusion, start) for A, _ in observed(forms[0], inputs, targets)]
    )
    options = {"head_fusion": head_fusion, "start_layer": start}
    for model in forms:
        method = AttentionRollout(model)
        agree(method, inputs, targets, expected, readout_weights(setting), **options)


@check
@given(transformers(), st.data())
def test_raw_attention(setting, data):
    forms, inputs, targets = make(setting)
    layer = data.draw(st.none() | st.integers(0, setting.depth - 1))
    chosen = setting.depth - 1 if layer is None else layer
    expected = torch.stack(
        [plain.raw_attention(A[chosen]) for A, _ in observed(forms[0], inputs, targets)]
    )
    options = {} if layer is None else {"layer": layer}
    for model in forms:
        method = RawAttention(model)
        agree(method, inputs, targets, expected, readout_weights(setting), **options)


@check
@given(transformers())
def test_class_agnostic_methods_need_no_target(setting):
    """Whatever stands in for the target, the rows read are the head's."""
    forms, inputs, targets = make(setting)
    for method in (RawAttention(forms[1]), AttentionRollout(forms[1])):
        with_target = method.attribute_tokens(inputs, targets)[STREAM]
        close(method.attribute_tokens(inputs)[STREAM], with_target)


@check
@given(transformers())
def test_layer_maps(setting):
    forms, inputs, targets = make(setting)
    seen = list(observed(forms[0], inputs, targets))
    for model in forms:
        weighted = GenericAttention(model).layer_maps(inputs, targets)
        raw = RawAttention(model).layer_maps(inputs, targets)
        assert len(weighted) == len(raw) == setting.depth
        for layer in range(setting.depth):
            for b, (A, G) in enumerate(seen):
                close(weighted[layer][1][b], (G[layer] * A[layer]).clamp(min=0))
                close(raw[layer][1][b], A[layer])


@check
@given(transformers(readout=st.sampled_from(["first", "last"])))
def test_discard_self(setting):
    """The readout token's own entry, and nothing else, becomes 0."""
    forms, inputs, targets = make(setting)
    own = 0 if setting.readout == "first" else setting.length + setting.class_token - 1
    rows = [plain.gae(A, G)[own] for A, G in observed(forms[0], inputs, targets)]
    for row in rows:
        assert row[own] >= 1
        row[own] = 0
    tokens = GenericAttention(forms[1]).attribute_tokens(inputs, targets, discard_self=True)
    # the length-1 answer is 0 altogether, so that `close` asks for exactly 0
    close(tokens[STREAM], torch.stack(rows))


@check
@given(transformers(depth=st.integers(2, 4)), st.data())
def test_layers_confine_the_calls(setting, data):
    """Calls left out stay wired, with A_bar = 0. Modules, and patterns over their names."""
    forms, inputs, targets = make(setting)
    kept = data.draw(st.lists(st.integers(0, setting.depth - 1), min_size=1, unique=True))
    gae, rolled = [], []
    for A, G in observed(forms[0], inputs, targets):
        maps = [A[layer] for layer in sorted(kept)]
        gae.append(plain.gae(maps, [G[layer] for layer in sorted(kept)]))
        rolled.append(plain.rollout(maps))
    model, weights = forms[1], readout_weights(setting)
    modules = [model.blocks[layer] for layer in kept]
    patterns = [f"blocks.{layer}.*" for layer in kept]
    for layers in (modules, patterns):
        agree(GenericAttention(model, layers), inputs, targets, torch.stack(gae), weights)
        agree(AttentionRollout(model, layers), inputs, targets, torch.stack(rolled), weights)


@check
@given(transformers(length=st.integers(2, 6)), st.data())
def test_a_readout_of_ones_own(setting, data):
    forms, inputs, targets = make(setting)
    n = setting.length + setting.class_token
    R = torch.stack([plain.gae(A, G) for A, G in observed(forms[0], inputs, targets)])
    method = GenericAttention(forms[1])

    def read(readout):
        return method.attribute_tokens(inputs, targets, readout=readout)[STREAM]

    row = data.draw(st.integers(-n, n - 1))
    close(read(row), R[:, row])
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=len(R), max_size=len(R)))
    close(read(torch.tensor(rows)), R[torch.arange(len(R)), rows])
    weights = torch.rand(len(R), n, dtype=torch.float64) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    close(read(weights), torch.einsum("bi,bij->bj", weights, R))


@check
@given(transformers())
def test_attribute_has_the_inputs_shape_and_the_tokens_sum(setting):
    forms, inputs, targets = make(setting)
    weights = readout_weights(setting)
    expected = torch.stack(
        [weights @ plain.gae(A, G) for A, G in observed(forms[0], inputs, targets)]
    )[:, int(setting.class_token) :]
    for model in forms:
        attributions = GenericAttention(model).attribute(inputs, targets)
        assert attributions.shape == inputs.shape
        assert attributions.is_floating_point()
        if setting.ids:
            close(attributions.double(), expected, 1e-10)
        else:
            close(attributions.sum(-1), expected)
            close(attributions * 5, expected[..., None].expand(-1, -1, 5))


def test_the_forms_are_one_model():
    """Guards the comparison: written out, fused and masked attention give one output."""
    setting = Setting(3, 2, 6, 2, True, True, False, "mean", 4)
    forms, inputs, _ = make(setting)
    outputs = [model(inputs) for model in forms]
    assert len(outputs) == 3
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-12, atol=1e-12)
    A, G = plain.maps_and_gradients(forms[0], lambda out: out[0, 1], inputs[:1])
    assert [a.shape for a in A] == [(2, 7, 7)] * 3
    assert all(g.abs().max() > 1e-4 for g in G)
    with pytest.raises(AssertionError):
        close(plain.gae(A, G), plain.gae(A, G) * (1 + 1e-8))
