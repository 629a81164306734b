"""VTranM on blocks written in many ways: what is a skip connection and what is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_attn import HeterogenousAttention, VTranM, objectives
from captum_attn.errors import AttnError, OptionError, TargetError, WiringError
from captum_attn.observe.vectors.output_projection import Branch
from tests import plain_vtranm as plain
from tests.plain import close
from tests.zoo import set_weights

D, HEADS, N = 8, 2, 5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.down, self.up = nn.Linear(D, 3, bias=False), nn.Linear(3, D, bias=False)
        self.gate, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.drop = nn.Dropout(0.5)

    def heads(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)  # (B, H, n, d)

    def merged(self, x):
        return self.heads(x).transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.out(self.merged(x))


class Block(nn.Module):
    """One block; `style` is how it adds."""

    def __init__(self, style):
        super().__init__()
        self.style, self.attention = style, Attention()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.other = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))
        self.convolution = nn.Conv1d(D, D, 3, padding=1, groups=D)
        self.scale = nn.Parameter(torch.ones(D))
        self.joint = nn.Linear(3 * D, D)

    def forward(self, x):
        return self.style(self, x)


class Model(nn.Module):
    def __init__(self, style, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(style) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def made(style, depth=2):
    model = Model(style, depth)
    set_weights(model)
    return model.double().eval().requires_grad_(False)


def vectors(batch=1):
    return torch.randn(batch, N, D, generator=torch.Generator().manual_seed(3)).double()


def maps(style, x=None, **options):
    found = VTranM(made(style)).relevance_maps(vectors() if x is None else x, 1, **options)
    return found["x", "x"]


# ---------------------------------------------------------------- the same block in other words
def standard(block, x):
    x = x + block.attention(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def in_place(block, x):
    x = x.clone()
    x += block.attention(block.norm1(x.clone()))  # a norm keeps its input for the backward pass
    x += block.mlp(block.norm2(x.clone()))
    return x


def in_place_on_the_branch(block, x):
    branch = block.attention(block.norm1(x))
    branch += x
    mlp = block.mlp(block.norm2(branch))
    return mlp.add_(branch)


def by_function(block, x):
    x = torch.add(input=block.attention(block.norm1(x)), other=x)
    return torch.add(x, block.mlp(block.norm2(x)))


def with_alpha(block, x):
    x = torch.add(x, 0.5 * block.attention(block.norm1(x)), alpha=2)
    return x.add(4 * block.mlp(block.norm2(x)), alpha=0.25)


def by_sum(block, x):
    x = sum([x, block.attention(block.norm1(x))])
    return sum([block.mlp(block.norm2(x)), x])


def length_first(block, x):
    a = block.attention(block.norm1(x)).transpose(0, 1)
    x = x.transpose(0, 1) + a
    return (x + block.mlp(block.norm2(x))).transpose(0, 1)


def channels_first(block, x):
    x = x.mT + block.attention(block.norm1(x)).mT
    return (x + block.mlp(block.norm2(x.mT)).mT).mT


def flat(block, x):
    a = block.attention(block.norm1(x)).flatten(0, 1)
    y = x.flatten(0, 1) + a
    return (y + block.mlp(block.norm2(y))).view(x.shape)


def by_convolution(block, x):
    out = block.attention.out
    a = F.conv1d(block.attention.merged(block.norm1(x)).mT, out.weight[..., None], out.bias).mT
    x = x + a
    return x + block.mlp(block.norm2(x))


def by_einsum(block, x):
    out = block.attention.out
    weight = out.weight.view(D, HEADS, D // HEADS)
    a = torch.einsum("bhnd,chd->bnc", block.attention.heads(block.norm1(x)), weight) + out.bias
    x = x + a
    return x + block.mlp(block.norm2(x))


def heads_last(block, x):
    """The projection's inputs in another order than head by head."""
    out = block.attention.out
    weight = out.weight.view(D, HEADS, D // HEADS).transpose(1, 2).flatten(1)
    merged = block.attention.heads(block.norm1(x)).permute(0, 2, 3, 1).flatten(2)
    x = x + F.linear(merged, weight, out.bias)
    return x + block.mlp(block.norm2(x))


def two_factors(block, x):
    """An output projection that is applied in two summands (LoRA)."""
    merged = block.attention.merged(block.norm1(x))
    low = block.attention.up(block.attention.down(merged))
    delta = block.attention.up.weight @ block.attention.down.weight
    out = block.attention.out
    x = x + (F.linear(merged, out.weight - delta, out.bias) + low)
    return x + block.mlp(block.norm2(x))


SAME = [
    in_place, in_place_on_the_branch, by_function, with_alpha, by_sum, length_first,
    channels_first, flat, by_convolution, by_einsum, heads_last, two_factors,
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, N])
@pytest.mark.parametrize("style", SAME, ids=lambda s: s.__name__)
def test_the_same_block_in_other_words(style, batch):
    x = vectors(batch)
    close(made(style)(x), made(standard)(x))
    close(maps(style, x), maps(standard, x))


# ---------------------------------------------------------------- blocks against the equations
def trace_of(style, walk):
    """Steps of the two blocks of a model; `walk`: (block, x, steps) -> x."""
    model, x = made(style), plain.in_graph(vectors()[0])
    steps = []
    for block in model.blocks:
        x = walk(block, x, steps)
    trace = plain.Trace(steps, model.head(model.norm(x[None])[:, 0]), plain.all_real(x))
    close(trace.output.detach(), model(vectors()))
    return trace


def attend(block, h):
    q, k, v = (plain.heads_of(p, HEADS) for p in block.attention.qkv(h).chunk(3, -1))
    A, out = plain.attend(q, k, v)
    return A, v, out


def attention_step(block, x, h, steps, scale=1.0, beside=()):
    A, v, out = attend(block, h)
    weight = block.attention.out.weight.T * scale
    steps.append(
        plain.AttentionStep(A, v, weight, x, [plain.FeedForwardStep(x, b) for b in beside], out)
    )
    return block.attention.out(out) * scale


def feed_forward_step(x, branch, steps):
    steps.append(plain.FeedForwardStep(x, branch))
    return x + branch


def walk_standard(block, x, steps):
    x = x + attention_step(block, x, block.norm1(x), steps)
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def post_norm(block, x):
    x = block.norm1(x + block.attention(x))
    return block.norm2(x + block.mlp(x))


def walk_post_norm(block, x, steps):
    x = block.norm1(x + attention_step(block, x, x, steps))
    return block.norm2(feed_forward_step(x, block.mlp(x), steps))


def scaled_skip(block, x):
    """DeepNorm: the skip connection is scaled, and its vectors are those that are added."""
    x = block.norm1(1.5 * x + block.attention(x))
    return block.norm2(1.5 * x + block.mlp(x))


def walk_scaled_skip(block, x, steps):
    x = block.norm1(1.5 * x + attention_step(block, 1.5 * x, x, steps))
    return block.norm2(feed_forward_step(1.5 * x, block.mlp(x), steps))


def macaron(block, x):
    """Half a feed-forward sub-layer in front of the attention, half of one behind it."""
    x = x + 0.5 * block.other(block.norm3(x))
    return standard(block, x)


def walk_macaron(block, x, steps):
    x = feed_forward_step(x, 0.5 * block.other(block.norm3(x)), steps)
    return walk_standard(block, x, steps)


def two_feed_forwards(block, x):
    x = standard(block, x)
    return x + block.other(block.norm3(x))


def walk_two_feed_forwards(block, x, steps):
    x = walk_standard(block, x, steps)
    return feed_forward_step(x, block.other(block.norm3(x)), steps)


def attention_only(block, x):
    return x + block.attention(block.norm1(x))


def walk_attention_only(block, x, steps):
    return x + attention_step(block, x, block.norm1(x), steps)


def adapter(block, x):
    """A skip connection inside a feed-forward branch is a part of the branch."""
    x = x + block.attention(block.norm1(x))
    branch = block.mlp(block.norm2(x))
    branch = branch + block.other(branch)
    return x + branch


def walk_adapter(block, x, steps):
    x = x + attention_step(block, x, block.norm1(x), steps)
    branch = block.mlp(block.norm2(x))
    return feed_forward_step(x, branch + block.other(branch), steps)


def convolved(block, x):
    """A convolution that is added mixes tokens: it is a mixing hop, no feed-forward sub-layer."""
    x = standard(block, x)
    return x + block.convolution(x.mT).mT


def walk_convolved(block, x, steps):
    """Between two blocks T of the tokens that are projected, by the attention's output before."""
    if steps:
        before = [step for step in steps if isinstance(step, plain.AttentionStep)][-1]
        steps.append(plain.MixingStep(plain.mixing_map(block.norm1(x), before.out)))
    x = walk_standard(block, x, steps)
    return x + block.convolution(x.T[None])[0].T


def turned(block, x):
    """Rotary-like sums, sums with constants, and sums of two norms are no sub-layers."""
    h = block.norm1(x)
    h = h * 0.8 + torch.roll(h, 1, -1) * 0.6
    h = block.norm3(h) + block.norm2(h)
    x = x + block.attention(h)
    x = x + torch.linspace(0, 1, N, dtype=x.dtype)[None, :, None].expand(x.shape)
    return x + block.mlp(block.norm2(x))


def walk_turned(block, x, steps):
    h = block.norm1(x)
    h = h * 0.8 + torch.roll(h, 1, -1) * 0.6
    x = x + attention_step(block, x, block.norm3(h) + block.norm2(h), steps)
    x = x + torch.linspace(0, 1, N, dtype=x.dtype)[:, None].expand(x.shape)
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def scaled(block, x):
    x = x + block.scale * block.attention(block.norm1(x)) / 2
    return x + block.scale * block.mlp(block.norm2(x))


def walk_scaled(block, x, steps):
    x = x + attention_step(block, x, block.norm1(x), steps, block.scale / 2)
    return feed_forward_step(x, block.scale * block.mlp(block.norm2(x)), steps)


def parallel(block, x):
    return x + block.attention(block.norm1(x)) + block.mlp(block.norm2(x))


def parallel_skip_last(block, x):
    return block.attention(block.norm1(x)) + block.mlp(block.norm2(x)) + x


def parallel_in_place(block, x):
    mlp = block.mlp(block.norm2(x))
    mlp += block.attention(block.norm1(x))
    return mlp + x


def walk_parallel(block, x, steps):
    branch = block.mlp(block.norm2(x))
    return x + attention_step(block, x, block.norm1(x), steps, beside=[branch]) + branch


def parallel_scaled(block, x):
    """One scale for both branches."""
    return x + block.scale * (block.attention(block.norm1(x)) + block.mlp(block.norm2(x)))


def walk_parallel_scaled(block, x, steps):
    branch = block.scale * block.mlp(block.norm2(x))
    attended = attention_step(block, x, block.norm1(x), steps, block.scale, [branch])
    return x + attended + branch


def joint_projection(block, x):
    """Both branches through one projection, whose bias counts with the feed-forward one."""
    merged = block.attention.merged(block.norm1(x))
    return x + block.joint(torch.cat([merged, F.gelu(block.mlp[0](block.norm2(x)))], -1))


def walk_joint_projection(block, x, steps):
    weight, bias = block.joint.weight, block.joint.bias
    A, v, out = attend(block, block.norm1(x))
    branch = F.linear(F.gelu(block.mlp[0](block.norm2(x))), weight[:, D:], bias)
    beside = [plain.FeedForwardStep(x, branch)]
    steps.append(plain.AttentionStep(A, v, weight.T[:D], x, beside))
    return x + out @ weight.T[:D] + branch


# A gate and the scale of a norm are held at what they were for the input.
def gated(block, x):
    """A gate that asks in front of the projection (Qwen3-Next): W_i = diag(g_i) W."""
    h = block.norm1(x)
    merged = block.attention.merged(h) * block.attention.gate(h).sigmoid()
    x = x + block.attention.out(merged)
    return x + block.mlp(block.norm2(x))


def walk_gated(block, x, steps, behind=1.0):
    h = block.norm1(x)
    x = x + held_step(block, x, h, steps, block.attention.gate(h).sigmoid(), behind)
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def held_step(block, x, h, steps, gains, behind=1.0):
    """An attention step with numbers of each query (n, H d), and a map behind the projection."""
    A, v, out = attend(block, h)
    weight = block.attention.out.weight.T * behind
    steps.append(plain.AttentionStep(A, v, weight, x, [], out, gains))
    return (block.attention.out(out * gains)) * behind


def gated_and_scaled(block, x):
    h = block.norm1(x)
    merged = block.attention.merged(h) * block.attention.gate(h).sigmoid()
    x = x + block.attention.out(merged) * block.scale
    return x + block.mlp(block.norm2(x))


def walk_gated_and_scaled(block, x, steps):
    return walk_gated(block, x, steps, block.scale)


def gated_convolution(block, x):
    """No weight tells the map: it is read row by row, by queries with gates of their own."""
    h, out = block.norm1(x), block.attention.out
    merged = block.attention.merged(h) * block.attention.gate(h).sigmoid()
    x = x + F.conv1d(merged.mT, out.weight[..., None], out.bias).mT
    return x + block.mlp(block.norm2(x))


def gated_heads(block, x):
    """One number for each head, which may be negative or 0."""
    h = block.norm1(x)
    gate = block.attention.gate(h)[..., :HEADS].relu() - 0.1
    heads = block.attention.heads(h) * gate.mT[..., None]
    x = x + block.attention.out(heads.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def walk_gated_heads(block, x, steps):
    h = block.norm1(x)
    gate = (block.attention.gate(h)[..., :HEADS].relu() - 0.1).repeat_interleave(D // HEADS, -1)
    x = x + held_step(block, x, h, steps, gate)
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def normed_branch(block, x):
    """A norm in front of the addition (sandwich norm, Swin V2): its scale belongs to the query."""
    x = x + block.norm3(block.attention(block.norm1(x)))
    return x + block.mlp(block.norm2(x))


def walk_normed_branch(block, x, steps):
    E, norm, out = x, block.norm3, block.attention.out
    A, v, attended = attend(block, block.norm1(x))
    y = out(attended)
    scale = (y.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    centred = torch.eye(D, dtype=x.dtype) - 1 / D
    weight = out.weight.T @ centred * norm.weight
    steps.append(plain.AttentionStep(A, v, weight, E, [], attended, scale.expand(-1, D)))
    x = x + norm(y)
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def rms_normed_branch(block, x):
    """The same of a root mean square that the model writes out (Gemma, OLMo)."""
    y = block.attention(block.norm1(x))
    x = x + block.scale * (y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())
    return x + block.mlp(block.norm2(x))


def walk_rms_normed_branch(block, x, steps):
    E, out = x, block.attention.out
    A, v, attended = attend(block, block.norm1(x))
    y = out(attended)
    scale = (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    weight = out.weight.T * block.scale
    steps.append(plain.AttentionStep(A, v, weight, E, [], attended, scale.expand(-1, D)))
    x = x + block.scale * (y * scale)
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def gated_output(block, x):
    """A gate behind the projection, a number for each channel of each token."""
    h = block.norm1(x)
    x = x + block.attention(h) * block.attention.gate(h).sigmoid()
    return x + block.mlp(block.norm2(x))


def walk_gated_output(block, x, steps):
    h = block.norm1(x)
    gate = block.attention.gate(h).sigmoid()
    branch = attention_step(block, x, h, steps) * gate
    steps[-1].behind = gate
    return feed_forward_step(x + branch, block.mlp(block.norm2(x + branch)), steps)


def highway(block, x):
    """One gate lets the skip connection through, the other what is left of the branch."""
    g = block.attention.gate(x).sigmoid()
    x = g * x + (1 - g) * block.attention(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def walk_highway(block, x, steps):
    g = block.attention.gate(x).sigmoid()
    x = g * x + (1 - g) * attention_step(block, g * x, block.norm1(x), steps)
    steps[-1].behind = 1 - g
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def gated_twice(block, x):
    h = block.norm1(x)
    merged = block.attention.merged(h) * block.attention.gate(h).sigmoid()
    x = x + block.attention.out(merged) * block.attention.gate(h).tanh()
    return x + block.mlp(block.norm2(x))


def walk_gated_twice(block, x, steps):
    h = block.norm1(x)
    gate = block.attention.gate(h)
    branch = held_step(block, x, h, steps, gate.sigmoid()) * gate.tanh()
    steps[-1].behind = gate.tanh()
    return feed_forward_step(x + branch, block.mlp(block.norm2(x + branch)), steps)


HELD = [
    (gated_output, walk_gated_output), (highway, walk_highway), (gated_twice, walk_gated_twice),
    (gated, walk_gated), (gated_and_scaled, walk_gated_and_scaled),
    (gated_convolution, walk_gated), (gated_heads, walk_gated_heads),
    (normed_branch, walk_normed_branch), (rms_normed_branch, walk_rms_normed_branch),
]  # fmt: skip


# Sub-layers whose skip connection is another one than the paper's, or none.
def projected_skip(block, x):
    """The skip connection is projected too (MaxViT's stages): E is what is added to."""
    x = block.attention.gate(x) + block.attention(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def walk_projected_skip(block, x, steps):
    E = block.attention.gate(x)
    x = E + attention_step(block, E, block.norm1(x), steps)
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def thought_over(block, x):
    """A feed-forward without a skip connection before the addition (Zamba): U = I for it."""
    return x + block.mlp(block.norm2(block.attention(block.norm1(x))))


def walk_thought_over(block, x, steps):
    return x + block.mlp(block.norm2(attention_step(block, x, block.norm1(x), steps)))


def without_skip(block, x):
    """No I in U, and E is what the values are projected from."""
    x = block.attention(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def nothing_but_attention(block, x):
    return block.attention(block.norm1(x))


def walk_without_skip(block, x, steps):
    x = walk_nothing_but_attention(block, x, steps)
    return feed_forward_step(x, block.mlp(block.norm2(x)), steps)


def walk_nothing_but_attention(block, x, steps):
    h = block.norm1(x)
    x = attention_step(block, h, h, steps)
    steps[-1].keeps = False
    return x


BLOCKS = [
    (projected_skip, walk_projected_skip), (thought_over, walk_thought_over),
    (without_skip, walk_without_skip), (nothing_but_attention, walk_nothing_but_attention),
    *HELD, (standard, walk_standard), (post_norm, walk_post_norm), (scaled_skip, walk_scaled_skip),
    (macaron, walk_macaron), (two_feed_forwards, walk_two_feed_forwards),
    (attention_only, walk_attention_only), (adapter, walk_adapter), (convolved, walk_convolved),
    (turned, walk_turned), (scaled, walk_scaled), (parallel, walk_parallel),
    (parallel_skip_last, walk_parallel), (parallel_in_place, walk_parallel),
    (parallel_scaled, walk_parallel_scaled), (joint_projection, walk_joint_projection),
]  # fmt: skip


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize(("style", "walk"), BLOCKS, ids=lambda s: s.__name__)
@pytest.mark.filterwarnings("ignore:attention is explained", "ignore:tokens are mixed")
def test_blocks_against_the_equations(style, walk, length):
    trace = trace_of(style, walk)
    C = plain.vtranm(trace, plain.probability(1), with_length=length)
    close(maps(style, length=length)[0], C)


@pytest.mark.parametrize(("style", "walk"), HELD, ids=lambda s: s.__name__)
def test_numbers_of_each_query_a_block_of_queries_and_an_example_at_a_time(style, walk):
    x = vectors(3)
    found = VTranM(made(style)).attribute_tokens(x, 1)["x"]
    close(VTranM(made(style)).attribute_tokens(x, 1, block_size=2)["x"], found)
    for i in range(3):
        close(VTranM(made(style)).attribute_tokens(x[i : i + 1], 1)["x"][0], found[i])


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize(
    ("style", "walk"),
    [(standard, walk_standard), (parallel, walk_parallel)],
    ids=lambda s: s.__name__,
)
def test_start_layer_leaves_out_whole_blocks(style, walk, start):
    model = made(style, 3)
    x, steps = plain.in_graph(vectors()[0]), []
    for block in model.blocks:
        x = walk(block, x, steps)
    trace = plain.Trace(steps, model.head(model.norm(x[None])[:, 0]), plain.all_real(x))
    C = plain.vtranm(trace, plain.probability(1), start=start)
    found = VTranM(model).relevance_maps(vectors(), 1, start_layer=start)["x", "x"]
    close(found[0], C)


def test_attentions_side_by_side():
    """x + a(x) + b(x): I + both updates; then a feed-forward sub-layer on their sum."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.rest = Block(standard), Block(standard), Block(standard)
            self.head = nn.Linear(D, 4)

        def forward(self, x):
            x = x + self.one.attention(self.one.norm1(x)) + self.two.attention(self.two.norm1(x))
            x = x + self.one.mlp(self.one.norm2(x))
            return self.head(self.rest(x)[:, 0])

    model = Two()
    set_weights(model)
    model = model.double().eval().requires_grad_(False)
    x, steps = plain.in_graph(vectors()[0]), []
    E = x
    one = attention_step(model.one, x, model.one.norm1(x), steps)
    two = attention_step(model.two, x, model.two.norm1(x), steps)
    x = feed_forward_step(E + one + two, model.one.mlp(model.one.norm2(E + one + two)), steps)
    x = walk_standard(model.rest, x, steps)
    output = model.head(x[None, 0])
    real = plain.all_real(x)
    attention = [step for step in steps if isinstance(step, plain.AttentionStep)]
    grads = torch.autograd.grad(output[0].softmax(-1)[1], [step.A for step in attention])
    grads = {id(step): g for step, g in zip(attention, grads, strict=True)}
    U = [plain.update_map(step, grads, real) for step in steps]
    eye = torch.eye(N, dtype=torch.float64)
    C = torch.diag(E.detach().norm(dim=-1))
    C = U[4] @ U[3] @ U[2] @ (U[0] + U[1] - eye) @ C
    close(VTranM(model).relevance_maps(vectors(), 1)["x", "x"][0], C)


# ---------------------------------------------------------------- what cannot be followed
def dropped(block, x):
    return x + block.attention.drop(block.attention(block.norm1(x)))


def mixed(block, x):
    """Tokens are mixed between the attention and the addition."""
    return x + block.convolution(block.attention(block.norm1(x)).mT).mT


def joined_to_its_input(block, x):
    """What asks goes by the attention in another way than by an addition."""
    return block.joint(torch.cat([block.attention(block.norm1(x)), x, x], -1))


def overwritten(block, x):
    x = x.clone()
    y = x + block.attention(block.norm1(x.clone()))
    x.mul_(2)
    return y + block.mlp(block.norm2(y))


@pytest.mark.parametrize(
    ("style", "module", "words"),
    [
        (mixed, "'blocks.1.attention'", "one linear map"),
        (joined_to_its_input, "'blocks.1.attention'", "skip connection"),
        (overwritten, "", "overwritten in place"),
    ],
    ids=lambda s: getattr(s, "__name__", None),
)
@pytest.mark.filterwarnings("ignore:attention is explained")
def test_a_block_that_cannot_be_followed_is_named(style, module, words):
    method = VTranM(made(style))
    with pytest.raises(WiringError) as error:
        method.attribute(vectors(), 1)
    assert module in str(error.value) and words in str(error.value)
    if module:
        assert "layers=" in str(error.value) and "length=False" in str(error.value)
        plainly = {"length": False, "direction": False}  # which asks for no vectors
        assert VTranM(made(style)).attribute(vectors(), 1, **plainly).abs().sum() > 0


def test_dropout_in_train_mode_is_held_as_a_gate():
    """What it multiplied in this run; nothing is dropped of a branch that is let through."""
    model = made(dropped).train()
    with pytest.warns(UserWarning, match="train mode"):
        found = VTranM(model).relevance_maps(vectors(), 1)["x", "x"]
    assert found.isfinite().all() and found.abs().sum() > 0
    for block in model.blocks:
        block.attention.drop.p = 0.0
    close(VTranM(model).relevance_maps(vectors(), 1)["x", "x"], maps(attention_only))


def test_a_left_out_block_need_not_be_followed():
    def only_the_second(block, x):
        return standard(block, x) if block.easy else mixed(block, x)

    model = made(only_the_second)
    model.blocks[0].easy, model.blocks[1].easy = False, True
    with pytest.raises(WiringError, match="blocks.0"):
        VTranM(model).attribute(vectors(), 1)
    found = VTranM(model, layers="blocks.1*").attribute(vectors(), 1, length=False)
    assert torch.equal(found, VTranM(model).attribute(vectors(), 1, length=False, start_layer=1))
    assert found.abs().sum() > 0


class OfChannels(nn.Module):
    """Channels attend to each other (XCiT): rows of no tensor that is added to."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 4, 1)
        y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v
        return self.head((x + self.out(y.permute(0, 3, 1, 2).flatten(2))).mean(1))


class OfPooledKeys(nn.Module):
    """Keys and values are pooled behind their projection (MViT)."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(D, 4)

    def forward(self, x):
        q, k, v = self.attention.qkv(x).chunk(3, -1)
        k, v = (F.avg_pool1d(t.mT, 2, ceil_mode=True).mT for t in (k, v))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.attention.out(y))[:, 0])


def ready(model):
    set_weights(model)
    return model.double().eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:the output reads all", "ignore:tokens are mixed")
@pytest.mark.filterwarnings("ignore:every element of")
def test_tokens_without_vectors():
    """Their lengths count as kept, their directions alike: w = 1/n, with a warning."""
    model, x = ready(OfChannels()), vectors(2)
    ((_, plainly),) = VTranM(model).layer_maps(x, 1, length=False, direction=False)
    with pytest.warns(UserWarning, match="no rows of what it is added to"):
        ((_, found),) = VTranM(model).layer_maps(x, 1)
    close(found, plainly / (D // HEADS))
    with pytest.warns(UserWarning, match="their lengths count as kept"):
        tokens = VTranM(model).attribute(x, 1)
    assert tokens.shape == x.shape and tokens.abs().sum() > 0


def test_a_pooled_key_is_the_mean_of_its_tokens():
    """Two tokens to a key, the last one alone: E is their mean, and each has half of the key."""
    model, x = ready(OfPooledKeys()), plain.in_graph(vectors()[0])
    pairs = torch.zeros(3, N, dtype=x.dtype)
    pairs[[0, 0, 1, 1, 2], range(N)] = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0], dtype=x.dtype)
    q, k, v = model.attention.qkv(x).chunk(3, -1)
    q, k, v = (plain.heads_of(t, HEADS) for t in (q, pairs @ k, pairs @ v))
    A, out = plain.attend(q, k, v)
    y = x + model.attention.out(out)
    close(model.head(y)[:1].detach(), model(vectors()))
    (gradient,) = torch.autograd.grad(model.head(y)[0].softmax(-1)[1], A)
    step = plain.AttentionStep(A, v, model.attention.out.weight.T, pairs @ x)
    U = torch.eye(N) + plain.weighted_map(step, gradient, torch.ones(3, dtype=bool)) @ pairs
    C = U @ torch.diag(x.detach().norm(dim=-1))
    close(VTranM(model).relevance_maps(vectors(), 1)["x", "x"][0], C.detach())


def test_a_feed_forward_on_other_tokens_too_is_left_out():
    """Tokens that join behind the attention go through the same branch: U = I, with a warning."""

    class Joined(Model):
        def __init__(self):
            super().__init__(standard, 1)
            self.others = nn.Parameter(torch.ones(1, 2, D))

        def forward(self, x):
            x = torch.cat([self.blocks[0](x), self.others.expand(len(x), -1, -1)], 1)
            x = x + self.blocks[0].other(x)
            return self.head(self.norm(x)[:, 0])

    model = ready(Joined())
    x, steps = plain.in_graph(vectors()[0]), []
    y = walk_standard(model.blocks[0], x, steps)
    output = model.head(model.norm((y + model.blocks[0].other(y))[None, 0]))
    C = plain.vtranm(plain.Trace(steps, output, plain.all_real(x)), plain.probability(1))
    with pytest.warns(UserWarning, match="which of the tokens that are followed"):
        found = VTranM(model).relevance_maps(vectors(), 1)["x", "x"]
    close(found[0], C)


@pytest.mark.filterwarnings("ignore:tokens are mixed")
def test_embeddings_that_are_mixed_with_another_stream_before_the_first_attention():
    """C0 of ids that no block holds as they are (a linear attention layer first): ‖their rows‖."""

    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.image = nn.Embedding(9, D), Block(standard)
            self.mixer, self.block = nn.Conv1d(D, D, 3, padding=1), Block(standard)
            self.head = nn.Linear(D, 4)

        def forward(self, ids, x):
            x = torch.cat([self.embed(ids), self.image(x)], 1)
            return self.head(self.block(x + self.mixer(x.mT).mT)[:, 0])

    class OnlyLengths(VTranM):
        def change_weights(self, run, change):
            return torch.ones_like(change.after)

    model, ids = ready(Hybrid()), torch.tensor([[1, 4, 4, 7], [2, 2, 0, 8]])
    inputs = {"ids": ids, "x": vectors(2)}
    found, plainly = (
        OnlyLengths(model).attribute_tokens(inputs, 1, length=length) for length in (True, False)
    )
    close(found["ids"], plainly["ids"] * model.embed(ids).norm(dim=-1))
    close(found["x"], plainly["x"] * inputs["x"].norm(dim=-1))
    assert (found["ids"] > 0).all() and (found["x"] > 0).all()


class PooledByAQuery(nn.Module):
    """A learned query looks at the tokens after a block; nothing is added to what it gets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.pool = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        return self.head(self.pool(self.query.expand(len(x), -1, -1), x, x)[0][:, 0])


def test_pooling_without_a_skip_connection():
    """x_j of the pool alone: E_h[(∇A ⊙ A)^+]_j ‖E⁰_j‖, without I and with w = 1."""
    model, x = PooledByAQuery().double().eval(), torch.randn(2, 5, 16).double()
    with pytest.warns(UserWarning, match="'pool' pools is added to no skip connection"):
        found = VTranM(model, layers="pool").attribute_tokens(x, target=1)["x"]
    for b in range(2):
        y = model.block(x[b : b + 1])[0]
        w, bias = model.pool.in_proj_weight, model.pool.in_proj_bias
        q, k, v = (
            (rows @ w[i * 16 : i * 16 + 16].T + bias[i * 16 : i * 16 + 16]).view(-1, 4, 4)
            for i, rows in enumerate((model.query[0], y, y))
        )
        attention = (torch.einsum("qhd,khd->hqk", q, k) / 2).softmax(-1).detach().requires_grad_()
        pooled = torch.einsum("hqk,khd->qhd", attention, v).reshape(1, 16)
        probability = model.head(model.pool.out_proj(pooled)).softmax(-1)[0, 1]
        (gradient,) = torch.autograd.grad(probability, attention)
        expected = (gradient * attention).clamp_min(0).mean(0)[0] * x[b].norm(dim=-1)
        torch.testing.assert_close(found[b], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": "yes"}, "length"), ({"direction": 1}, "direction"),
        ({"aggregate": None}, "aggregate"), ({"normalize": True}, "unknown option"),
    ],
)  # fmt: skip
def test_bad_options(options, words):
    with pytest.raises(OptionError, match=words):
        VTranM(made(standard)).attribute(vectors(), 1, **options)


def test_a_target_is_needed_where_there_are_classes():
    with pytest.raises(AttnError, match="target"):
        VTranM(made(standard)).attribute(vectors())


# ---------------------------------------------------------------- objectives and degenerate cases
def test_the_probability_is_explained_and_any_objective_may_be():
    model, x = made(standard), vectors()
    found = VTranM(model).attribute(x, 1)
    explicit = VTranM(model).attribute(x, 1, objective=objectives.probability)
    assert torch.equal(found, explicit)
    logit = VTranM(model).attribute(x, 1, objective=objectives.logit)
    assert (found - logit).abs().max() > 1e-3 * found.abs().max()


def test_a_single_output_is_explained_itself():
    """The softmax of one number is 1 and has no gradient."""
    model = made(standard)

    def one(x):
        return model(x)[:, 1:2]

    found = VTranM(one).attribute(vectors(), 0)
    close(found, VTranM(model).attribute(vectors(), 1, objective=objectives.logit))
    flat = VTranM(lambda x: model(x)[:, 1]).attribute(vectors())
    close(found, flat)


def test_a_saturated_probability_is_refused_and_its_logit_is_not():
    """No gradient at all is left, so that nothing could be said but which token is read."""
    model = made(standard)
    with torch.no_grad():
        model.head.bias += torch.tensor([0.0, 1e5, 0.0, 0.0])
    with pytest.raises(TargetError, match=r"saturated.*objective=objectives\.logit"):
        VTranM(model).attribute_tokens(vectors(), 1)
    found = VTranM(model).attribute(vectors(), 1, objective=objectives.logit)
    close(found, VTranM(made(standard)).attribute(vectors(), 1, objective=objectives.logit))


def test_a_token_of_no_length():
    """E = 0 has no direction, and nothing of it is kept: no NaN."""
    x = vectors()
    x[0, 2] = 0
    tokens = VTranM(made(standard)).attribute_tokens(x, 1)["x"]
    assert tokens.isfinite().all()
    assert tokens[0, 2] == 0
    assert tokens[0, 3] > 0


def test_dead_layer_scale():
    """A branch that is scaled by 0 adds nothing: U = I."""
    model = made(scaled)
    with torch.no_grad():
        for block in model.blocks:
            block.scale.zero_()
    x = vectors()
    C = VTranM(model).relevance_maps(x, 1)["x", "x"]
    close(C[0], torch.diag(x[0].norm(dim=-1)))


def test_the_weights_are_read_in_every_run():
    model, x = made(standard), vectors()
    method = VTranM(model)
    before = method.attribute(x, 1)
    with torch.no_grad():
        model.blocks[0].attention.out.weight.mul_(3)
        model.blocks[1].mlp[2].bias.add_(1)
    after = method.attribute(x, 1)
    assert (before - after).abs().max() > 1e-3
    assert torch.equal(after, VTranM(model).attribute(x, 1))


def test_gradients_are_those_of_other_methods():
    """Without lengths, directions and feed-forwards: (∇A)^+ ⊙ A, heterogenous attention."""
    model, x = made(attention_only), vectors(3)
    options = {"objective": objectives.probability}
    found = VTranM(model).relevance_maps(x, 1, length=False, direction=False)
    other = HeterogenousAttention(model).relevance_maps(x, 1, correction="positive", **options)
    close(found["x", "x"], other["x", "x"])


def test_vectors_of_another_width_have_no_angle():
    """Tokens become others of fewer channels: NECC = 1/n, with a warning; lengths count."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.small = Attention(), nn.Linear(D, 3)
            self.head = nn.Linear(3, 4)

        def forward(self, x):
            q, k, v = self.attention.qkv(x).unflatten(-1, (3, HEADS, D // HEADS)).unbind(2)
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            return self.head(torch.tanh(self.small(y.transpose(1, 2).flatten(2))))[:, 0]

    model, x = Pooled(), vectors()
    set_weights(model)
    model = model.double().eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="another width"):
        found = VTranM(model).attribute_tokens(x, 1)["x"]
    kept = VTranM(model).attribute_tokens(x, 1, direction=False)["x"]
    close(found, kept / N)
    assert kept.abs().sum() > 0


def test_layer_maps_and_describe():
    model, x = made(standard), vectors()
    method = VTranM(model)
    maps_of_calls = method.layer_maps(x, 1)
    assert [call.module for call, _ in maps_of_calls] == [
        "blocks.0.attention",
        "blocks.1.attention",
    ]
    trace = trace_of(standard, walk_standard)
    grads = torch.autograd.grad(trace.output[0].softmax(-1)[1], [s.A for s in trace.attention])
    for (_, found), step, gradient in zip(maps_of_calls, trace.attention, grads, strict=True):
        assert found.shape == (1, HEADS, N, N)
        close(found[0].mean(0), plain.weighted_map(step, gradient, trace.real))
    assert "blocks.1.attention" in str(method.describe(x, 1))
    assert method.get_name() == "VTranM"
    assert method.attribute(x, 1).shape == x.shape


@pytest.mark.parametrize(
    ("style", "reads"),
    [
        (standard, False), (scaled, False), (post_norm, False), (parallel_scaled, False),
        (length_first, False), (with_alpha, False), (gated, False), (rms_normed_branch, False),
        (by_convolution, True), (two_factors, True), (heads_last, True), (normed_branch, True),
    ],
    ids=lambda s: getattr(s, "__name__", None),
)  # fmt: skip
def test_the_map_is_read_row_by_row_only_where_no_weight_tells(style, reads, monkeypatch):
    """A weight that the graph holds costs nothing; reading has as many steps as channels."""
    read, rows = Branch._read, []
    monkeypatch.setattr(
        Branch, "_read", lambda self, *gains: rows.append(self) or read(self, *gains)
    )
    maps(style)
    assert bool(rows) == reads
