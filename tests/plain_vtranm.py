"""A slow, plain rewrite of VTranM, Eq. 8-20, and of models that show each of their steps.

One example at a time, float64, loops over heads and tokens, nothing shared with the library. The
walkers run a model's own modules (norms, projections, feed-forwards) one after another and write
down what a step needs: E, A, V and the output projection's slices, or E and a branch's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

# ------------------------------------------------------------ the equations


@dataclass
class FeedForwardStep:
    E: torch.Tensor  # (n, D), on the skip connection
    branch: torch.Tensor  # (n, D)


@dataclass
class AttentionStep:
    A: torch.Tensor  # (H, q, k)
    V: torch.Tensor  # (H, k, d)
    W: torch.Tensor  # (H d, D): the output projection's weight, and any scale that follows
    E: torch.Tensor  # (k, D), on the skip connection
    beside: list[FeedForwardStep] = field(default_factory=list)
    out: torch.Tensor | None = None  # (q, H d), A V of all heads
    gains: torch.Tensor | None = None  # (q, H d), what each query's output is multiplied with
    keeps: bool = True  # not so without a skip connection
    behind: torch.Tensor | None = None  # (q, D), what multiplies each query's projected output


@dataclass
class MixingStep:
    T: torch.Tensor  # (n, n), rows sum to 1


@dataclass
class Trace:
    steps: list
    output: torch.Tensor  # (1, ...), as the model's own
    real: torch.Tensor  # (n,) bool

    @property
    def attention(self):
        return [step for step in self.steps if isinstance(step, AttentionStep)]


def length(vector):
    return float(vector.detach().square().sum()) ** 0.5


def cosine(one, other):
    lengths = length(one) * length(other)
    return float((one * other).detach().sum()) / lengths if lengths else 0.0


def transformation_weights(before, after, real, with_length=True, with_direction=True):
    """Eq. 12, 13: one weight for every token."""
    n = len(before)
    tokens = [j for j in range(n) if real[j]]
    exponentials = [math.exp(cosine(before[j], after[j])) for j in range(n)]
    total = sum(exponentials[j] for j in tokens)
    weights = torch.zeros(n, dtype=torch.float64)
    for j in range(n):
        weight = 1.0
        if with_length:
            weight *= length(after[j]) / length(before[j]) if length(before[j]) else 0.0
        if with_direction:
            weight *= exponentials[j] / total if real[j] else 0.0
        weights[j] = weight
    return weights


def weighted_map(step, gradient, real, with_length=True, with_direction=True):
    """Eq. 8 and 14 without I: the mean over heads of grad A^+ * (A diag(w)); (q, k)."""
    heads, queries, keys = step.A.shape
    d = step.V.shape[-1]
    total = torch.zeros(queries, keys, dtype=torch.float64)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        for i in range(queries):
            values = step.V[h] if step.gains is None else step.V[h] * step.gains[i, own]
            after = values @ step.W[own]
            after = after if step.behind is None else after * step.behind[i]
            w = transformation_weights(step.E, after, real, with_length, with_direction)
            for j in range(keys):
                total[i, j] += max(float(gradient[h, i, j]), 0.0) * float(step.A[h, i, j]) * w[j]
    return total / heads


def mixing_map(t, u):
    """T[i, j] = ‖∂t_i/∂u_j‖² / Σ_j' ‖∂t_i/∂u_j'‖², one element of t after the other."""
    T = torch.zeros(len(t), len(u), dtype=torch.float64)
    for i in range(len(t)):
        for channel in range(t.shape[1]):
            (gradient,) = torch.autograd.grad(t[i, channel], u, retain_graph=True)
            T[i] += gradient.square().sum(-1)
    return T / T.sum(-1, keepdim=True)


def feed_forward_weights(step, real, with_length=True, with_direction=True):
    return transformation_weights(step.E, step.branch, real, with_length, with_direction)


def update_map(step, gradients, real, **options):
    """U of Eq. 14 or 16; of branches that are added in one step, the sum."""
    if isinstance(step, MixingStep):
        return step.T
    U = torch.eye(len(step.E), dtype=torch.float64)
    if isinstance(step, AttentionStep) and not step.keeps:
        U = U * 0
    if isinstance(step, FeedForwardStep):
        return U + torch.diag(feed_forward_weights(step, real, **options))
    for branch in step.beside:
        U = U + torch.diag(feed_forward_weights(branch, real, **options))
    return U + weighted_map(step, gradients[id(step)], real, **options)


def vtranm(trace, objective, with_length=True, with_direction=True, aggregate=True, start=0):
    """C of Eq. 19 (n, n); without aggregation Eq. 8 of the last layer."""
    options = {"with_length": with_length, "with_direction": with_direction}
    scalar = objective(trace.output)
    found = torch.autograd.grad(
        scalar, [step.A for step in trace.attention], retain_graph=True, allow_unused=True
    )
    gradients = {
        id(step): torch.zeros_like(step.A) if g is None else g
        for step, g in zip(trace.attention, found, strict=True)
    }
    if not aggregate:
        last = trace.attention[-1]
        return weighted_map(last, gradients[id(last)], trace.real, **options)
    lengths = [length(E) if with_length else 1.0 for E in trace.steps[0].E]
    C = torch.diag(torch.tensor(lengths, dtype=torch.float64))  # C0
    seen = 0
    for step in trace.steps:
        # a feed-forward step belongs to the attention before it, the first one to the first block
        block = seen if isinstance(step, AttentionStep) else max(seen - 1, 0)
        counts = block >= start
        if counts:
            C = update_map(step, gradients, trace.real, **options) @ C
        seen += isinstance(step, AttentionStep)
    return C


def probability(target):
    """The target's softmax probability; `target` indexes the output of one example."""
    return lambda output: output[0].softmax(-1)[target]


# ------------------------------------------------------------ what the walkers share


def heads_of(x, heads):
    """(n, H d) -> (H, n, d)."""
    n, width = x.shape
    return x.reshape(n, heads, width // heads).permute(1, 0, 2)


def attend(q, k, v, hidden=None, scale=None):
    """softmax(QK^T) V -> A, (n, H d); hidden: (q, k) bool."""
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    A = scores.softmax(-1)
    return A, (A @ v).permute(1, 0, 2).flatten(1)


def in_graph(x):
    """Something that requires grad, so that every A does."""
    return x.detach().requires_grad_()


def linear_weight(layer):
    """(in, out) of an `nn.Linear` or a transformers `Conv1D`."""
    return layer.weight.T if isinstance(layer, torch.nn.Linear) else layer.weight


def all_real(x):
    return torch.ones(x.shape[0], dtype=torch.bool)


def scale_of(layer):
    return getattr(layer, "gamma", getattr(layer, "lambda1", 1.0))


# ------------------------------------------------------------ timm


def timm_vit(model, image):
    """`timm` VisionTransformer and its distilled form: pre-norm, LayerScale, norms of q and k."""
    x = in_graph(model.norm_pre(model._pos_embed(model.patch_embed(image[None]))))[0]
    steps = []
    for block in model.blocks:
        attn, E = block.attn, x
        q, k, v = (heads_of(p, attn.num_heads) for p in attn.qkv(block.norm1(x)).chunk(3, -1))
        A, out = attend(attn.q_norm(q), attn.k_norm(k), v)
        scale = scale_of(block.ls1)
        x = x + attn.proj(out) * scale
        steps.append(AttentionStep(A, v, attn.proj.weight.T * scale, E))
        branch = block.mlp(block.norm2(x)) * scale_of(block.ls2)
        steps.append(FeedForwardStep(x, branch))
        x = x + branch
    return Trace(steps, model.forward_head(model.norm(x[None])), all_real(x))


def timm_parallel_scaling(model, image):
    """ViT-22B's block: attention and feed-forward side by side, separate or one projection."""
    x = in_graph(model.norm_pre(model._pos_embed(model.patch_embed(image[None]))))[0]
    steps = []
    for block in model.blocks:
        E = x
        width = x.shape[-1]
        y = F.linear(block.in_norm(x), block.in_proj.weight, block.in_proj.bias)
        mlp, q, k, v = y.split(block.in_split, -1)
        if block.mlp_bias is not None:
            mlp = mlp + block.mlp_bias
        q, k, v = (heads_of(p, block.num_heads) for p in (q, k, v))
        A, out = attend(block.q_norm(q), block.k_norm(k), v)
        mlp, scale = block.mlp_act(mlp), scale_of(block.ls)
        joined = getattr(block, "out_proj", None)
        if joined is None:
            attended, branch = block.attn_out_proj(out), block.mlp_out_proj(mlp)
            weight = block.attn_out_proj.weight.T
        else:  # its bias is all the branch's
            attended = out @ joined.weight.T[:width]
            branch = F.linear(mlp, joined.weight[:, width:], joined.bias)
            weight = joined.weight.T[:width]
        step = AttentionStep(A, v, weight * scale, E, [FeedForwardStep(E, branch * scale)])
        steps.append(step)
        x = x + (attended + branch) * scale
    return Trace(steps, model.forward_head(model.norm(x[None])), all_real(x))


# ------------------------------------------------------------ transformers


def hf_vit(model, image):
    vit = model.vit
    old = hasattr(vit, "encoder")  # transformers 4.48
    x = in_graph(vit.embeddings(image[None]))[0]
    steps = []
    for layer in vit.encoder.layer if old else vit.layers:
        att, E = layer.attention, x
        if old:
            inner, out_proj = att.attention, att.output.dense
            projections = (inner.query, inner.key, inner.value)
        else:
            out_proj, projections = att.o_proj, (att.q_proj, att.k_proj, att.v_proj)
        h, heads = layer.layernorm_before(x), model.config.num_attention_heads
        q, k, v = (heads_of(project(h), heads) for project in projections)
        A, out = attend(q, k, v)
        x = x + out_proj(out)
        steps.append(AttentionStep(A, v, out_proj.weight.T, E))
        h = layer.layernorm_after(x)
        branch = layer.output.dense(layer.intermediate(h)) if old else layer.mlp(h)
        steps.append(FeedForwardStep(x, branch))
        x = x + branch
    return Trace(steps, model.classifier(vit.layernorm(x[None])[:, 0]), all_real(x))


def bert(model, ids, real=None):
    """Post-norm: E is what enters the sub-layer, and the norm is behind the addition."""
    real = torch.ones(len(ids), dtype=torch.bool) if real is None else real
    x = in_graph(model.bert.embeddings(ids[None]))[0]
    hidden = ~real[None].expand(len(ids), -1)
    steps = []
    for layer in model.bert.encoder.layer:
        att, E = layer.attention.self, x
        heads = att.num_attention_heads
        q, k, v = (heads_of(project(x), heads) for project in (att.query, att.key, att.value))
        A, out = attend(q, k, v, hidden)
        projection = layer.attention.output
        x = projection.LayerNorm(projection.dense(out) + x)
        steps.append(AttentionStep(A, v, projection.dense.weight.T, E))
        branch = layer.output.dense(layer.intermediate(x))
        steps.append(FeedForwardStep(x, branch))
        x = layer.output.LayerNorm(branch + x)
    return Trace(steps, model.classifier(model.bert.pooler(x[None])), real)


def albert(model, ids):
    """One layer's weights, used several times; post-norm."""
    albert = model.albert
    (layer,) = albert.encoder.albert_layer_groups[0].albert_layers
    x = albert.encoder.embedding_hidden_mapping_in(albert.embeddings(ids[None]))
    x = in_graph(x)[0]
    steps = []
    for _ in range(model.config.num_hidden_layers):
        att, E = layer.attention, x
        heads = att.num_attention_heads
        q, k, v = (heads_of(project(x), heads) for project in (att.query, att.key, att.value))
        A, out = attend(q, k, v)
        x = att.LayerNorm(x + att.dense(out))
        steps.append(AttentionStep(A, v, att.dense.weight.T, E))
        branch = layer.ffn_output(layer.activation(layer.ffn(x)))
        steps.append(FeedForwardStep(x, branch))
        x = layer.full_layer_layer_norm(branch + x)
    pooled = albert.pooler_activation(albert.pooler(x[None, 0]))
    return Trace(steps, model.classifier(pooled), all_real(x))


def later(n):
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


def llama(model, ids):
    """Grouped queries and gated or mixture-of-experts feed-forwards; also Mixtral."""
    config = model.config
    x = in_graph(model.model.embed_tokens(ids[None]))[0]
    n, heads = len(x), config.num_attention_heads
    cos, sin = (t[0] for t in model.model.rotary_emb(x[None], torch.arange(n)[None]))
    steps = []
    for layer in model.model.layers:
        att, E, h = layer.self_attn, x, layer.input_layernorm(x)
        q = rotated(heads_of(att.q_proj(h), heads), cos, sin)
        k = rotated(heads_of(att.k_proj(h), config.num_key_value_heads), cos, sin)
        v = heads_of(att.v_proj(h), config.num_key_value_heads)
        k, v = (t.repeat_interleave(heads // len(t), 0) for t in (k, v))
        A, out = attend(q, k, v, later(n))
        x = x + att.o_proj(out)
        steps.append(AttentionStep(A, v, att.o_proj.weight.T, E))
        h = layer.post_attention_layernorm(x)
        if hasattr(layer, "mlp") and not hasattr(layer.mlp, "experts"):
            branch = layer.mlp(h)
        else:
            moe = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
            branch = moe(h[None])
            branch = (branch[0] if isinstance(branch, tuple) else branch)[0]
        steps.append(FeedForwardStep(x, branch))
        x = x + branch
    return Trace(steps, model.lm_head(model.model.norm(x[None])), all_real(x))


def gpt2(model, ids):
    gpt = model.transformer
    x = in_graph(gpt.wte(ids) + gpt.wpe(torch.arange(len(ids))))
    steps = []
    for block in gpt.h:
        att, E = block.attn, x
        q, k, v = (heads_of(p, att.num_heads) for p in att.c_attn(block.ln_1(x)).chunk(3, -1))
        A, out = attend(q, k, v, later(len(x)))
        x = x + att.c_proj(out)
        steps.append(AttentionStep(A, v, linear_weight(att.c_proj), E))
        branch = block.mlp(block.ln_2(x))
        steps.append(FeedForwardStep(x, branch))
        x = x + branch
    return Trace(steps, model.lm_head(gpt.ln_f(x[None])), all_real(x))


def gptj(model, ids):
    """Attention and feed-forward read the same norm and are added in one step."""
    gpt, config = model.transformer, model.config
    x = in_graph(gpt.wte(ids))
    n, turned = len(x), config.rotary_dim
    frequency = 10000.0 ** (-torch.arange(0, turned, 2).float() / turned)
    angle = torch.outer(torch.arange(n).float(), frequency).float()
    sin, cos = angle.sin().double(), angle.cos().double()

    def rotate(t):
        t = t.clone()
        even, odd = t[..., :turned:2].clone(), t[..., 1:turned:2].clone()
        t[..., :turned:2] = even * cos - odd * sin
        t[..., 1:turned:2] = odd * cos + even * sin
        return t

    steps = []
    for block in gpt.h:
        att, E, h = block.attn, x, block.ln_1(x)
        q, k, v = (
            heads_of(project(h), config.n_head) for project in (att.q_proj, att.k_proj, att.v_proj)
        )
        A, out = attend(rotate(q), rotate(k), v, later(n))
        branch = block.mlp(h)
        steps.append(AttentionStep(A, v, att.out_proj.weight.T, E, [FeedForwardStep(E, branch)]))
        x = x + att.out_proj(out) + branch
    return Trace(steps, model.lm_head(gpt.ln_f(x[None])), all_real(x))
