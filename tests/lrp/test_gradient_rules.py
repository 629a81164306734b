"""Each gradient rule alone, against a plain rewrite in float64, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from captum_attn.attr._gradient_rules import attn_lrp, conservative, cp_lrp, with_gamma
from captum_attn.attr.rules import RULE_SETS
from tests.lrp.run import arriving, numbers

ATTN, CP, ALI = RULE_SETS["attn_lrp"], RULE_SETS["cp_lrp"], RULE_SETS["conservative"]
X, G = numbers(2, 3, 4), numbers(2, 3, 4, seed=1)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def quotients(f, x, g, at_zero=0.0):
    """g (f(x) - f(0)) / x, a number at a time."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        value = float(x.view(-1)[i])
        y = float(f(torch.tensor(value, dtype=torch.float64)))
        out.view(-1)[i] = float(g.view(-1)[i]) * (y - at_zero) / value if value else 0.0
    return out


NONLINEARITIES = {
    "relu": (F.relu, 0), "gelu": (F.gelu, 0), "silu": (F.silu, 0), "tanh": (torch.tanh, 0),
    "sigmoid": (torch.sigmoid, 0.5), "exp": (torch.exp, 1), "softplus": (F.softplus, math.log(2)),
    "cos": (torch.cos, 1), "square": (torch.square, 0), "cube": (lambda x: x**3, 0),
    "power of two": (lambda x: 2**x, 1), "elu": (F.elu, 0), "hardswish": (F.hardswish, 0),
    "mish": (F.mish, 0), "leaky": (lambda x: F.leaky_relu(x, 0.1), 0), "abs": (abs, 0),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), 0), "softsign": (F.softsign, 0),
    "threshold": (lambda x: F.threshold(x, 0.1, 0.3), 0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", NONLINEARITIES)
@pytest.mark.parametrize("rules", [ATTN, CP], ids=["attn", "cp"])
def test_identity(name, rules):
    f, at_zero = NONLINEARITIES[name]
    x = X.clone()
    x[0, 0, 0] = 0.0
    close(arriving(f, x, rules=rules, at_output=G)[0], quotients(f, x, G, at_zero))


def test_identity_near_zero_where_the_value_at_zero_is_not():
    """(f(x) - f(0)) / x loses all digits there; the derivative has them."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        x = torch.tensor([[1e-9, -1e-8, 3e-7, 1e-4, 5e-3]], dtype=dtype)
        (found,) = arriving(torch.sigmoid, x, rules=ATTN)
        expected = ((x.double() / 2).tanh() / 2 / x.double()).to(dtype)  # (σ(x) - ½) / x
        close(found, expected, tolerance)


def test_identity_as_the_authors_stabilise_it():
    (found,) = arriving(F.gelu, X, rules=attn_lrp(eps=1e-3), at_output=G)
    close(found, G * F.gelu(X) / (X + 1e-3))


def test_a_function_without_a_value_at_zero_keeps_its_gradient():
    x = X.abs() + 0.1
    close(arriving(torch.log, x, rules=ATTN, at_output=G)[0], G / x)


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3.0))))


COMPOSITES = {
    "new gelu": (new_gelu, 0), "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), 0),
    "x·x": (lambda x: x * x, 0), "swish, written": (lambda x: x / (1 + torch.exp(-x)), 0),
    "mish, written": (lambda x: x * torch.tanh(F.softplus(x)), 0),
    "not 0 at 0": (lambda x: torch.exp(x) * torch.cos(x), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("rules", [ATTN, CP], ids=["attn", "cp"])
def test_products_of_functions_of_one_tensor(name, rules):
    """No halving: the identity rule with respect to that tensor."""
    f, at_zero = COMPOSITES[name]
    close(arriving(f, X, rules=rules, at_output=G)[0], quotients(f, X, G, at_zero))


def test_a_chain_ends_where_the_tensor_is_written_into():
    def f(x):
        x = x.clone()
        y = torch.sigmoid(x)
        x.mul_(2.0)
        return x * y  # another x than the sigmoid's: a gate

    (found,) = arriving(f, X, rules=CP, at_output=G)
    close(found, 2 * G * torch.sigmoid(X))


def test_attention_halves_each_product():
    q, k, v = numbers(2, 5, 4), numbers(2, 5, 4, seed=1), numbers(2, 5, 3, seed=2)
    g = numbers(2, 5, 3, seed=3)

    def inline(q, k, v):
        return (q @ k.mT / 2).softmax(-1) @ v

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)

    plain = arriving(inline, q, k, v, rules={}, at_output=g)
    for form in (inline, fused):
        found = arriving(form, q, k, v, rules=ATTN, at_output=g)
        for one, other, share in zip(found, plain, (0.25, 0.25, 0.5), strict=True):
            close(one, share * other)
        for rules in (CP, ALI):
            found = arriving(form, q, k, v, rules=rules, at_output=g)
            for one, other, share in zip(found, plain, (0, 0, 1), strict=True):
                close(one, share * other)


def test_one_activation_alone_is_not_halved():
    """Learned queries: the map depends on the keys alone."""
    q, x, g = numbers(5, 4), numbers(2, 6, 4, seed=1), numbers(2, 5, 4, seed=2)

    def fused(x):
        return F.scaled_dot_product_attention(q.expand(2, 5, 4), x, x)

    def inline(x):
        return (q @ x.mT / 2).softmax(-1) @ x

    a = (q @ x.mT / 2).softmax(-1)
    da = g @ x.mT
    ds = a * (da - (da * a).sum(-1, keepdim=True))
    for form in (fused, inline):
        (found,) = arriving(form, x, rules=ATTN, at_output=g)
        close(found, 0.5 * a.mT @ g + 0.5 * ds.mT @ q.expand(2, 5, 4) / 2)


def test_a_mask_that_depends_on_the_input():
    x, g = numbers(2, 5, 4), numbers(2, 5, 4, seed=2)

    def fused(x, bias):
        return F.scaled_dot_product_attention(x.detach(), x.detach(), x, attn_mask=bias)

    bias = numbers(2, 5, 5, seed=5)
    plain = arriving(fused, x, bias, rules={}, at_output=g)
    close(arriving(fused, x, bias, rules=CP, at_output=g)[1], torch.zeros_like(bias))
    close(arriving(fused, x, bias, rules=ATTN, at_output=g)[1], 0.5 * plain[1])


GATED = {
    "gated unit": lambda x, y: F.silu(x) * y,
    "moved gate": lambda x, y: F.silu(x).transpose(1, 2).contiguous().transpose(1, 2) * y,
    "scaled gate": lambda x, y: (0.3 * torch.sigmoid(x)) * y,
    "second": lambda x, y: y * F.silu(x),
}


@pytest.mark.parametrize("name", GATED)
def test_gates(name):
    f, y = GATED[name], numbers(2, 3, 4, seed=4)
    value = f(X, torch.ones_like(X))
    gate = torch.sigmoid if name == "scaled gate" else F.silu
    at_zero = 0.5 if name == "scaled gate" else 0.0
    scale = 0.3 if name == "scaled gate" else 1.0
    g_gate = quotients(gate, X, G * y * scale, at_zero)
    found = arriving(f, X, y, rules=ATTN, at_output=G)
    close(found[0], 0.5 * g_gate)
    close(found[1], 0.5 * G * value)
    found = arriving(f, X, y, rules=CP, at_output=G)
    close(found[0], torch.zeros_like(X))
    close(found[1], G * value)


@pytest.mark.parametrize("form", ["solve", "solve_triangular"])
def test_the_solution_of_a_linear_system_is_a_quotient(form):
    """All to the right side, as to a numerator: what gated delta nets compute."""
    a = (numbers(2, 3, 3, seed=4) * 0.1).tril(-1) + torch.eye(3, dtype=X.dtype)
    settings = {"upper": False, "unitriangular": True} if form == "solve_triangular" else {}

    def f(b, a):
        return getattr(torch.linalg, form)(a, b, **settings)

    for rules in (ATTN, CP):
        found = arriving(f, X, a, rules=rules, at_output=G)
        for n in range(2):
            close(found[0][n], torch.linalg.inv(a[n]).mT @ G[n])
        close(found[1], torch.zeros_like(a))


def test_the_places_of_deformable_attention_are_constants():
    x, places, g = numbers(2, 3, 5, 5), numbers(2, 4, 4, 2, seed=1) / 3, numbers(2, 3, 4, 4, seed=2)

    def f(x, places):
        return F.grid_sample(x, places.tanh(), align_corners=False)

    plain = arriving(f, x, places, rules={}, at_output=g)
    for rules in (ATTN, CP):
        found = arriving(f, x, places, rules=rules, at_output=g)
        close(found[0], plain[0])  # linear in the image
        close((found[0] * x).sum(), (f(x, places) * g).sum())
        close(found[1], torch.zeros_like(places))
    close(arriving(f, x, places, rules=ALI, at_output=g)[1], plain[1])


def test_glu_is_a_gate():
    x, g = numbers(2, 3, 8), numbers(2, 3, 4, seed=1)
    a, b = x.chunk(2, -1)
    (found,) = arriving(F.glu, x, rules=ATTN, at_output=g)
    close(found[..., :4], 0.5 * g * torch.sigmoid(b))
    close(found[..., 4:], 0.5 * quotients(torch.sigmoid, b.contiguous(), g * a, 0.5))


def test_products_of_two_activations():
    y = numbers(2, 3, 4, seed=4)
    for rules in (ATTN, CP):
        found = arriving(lambda x, y: x * y, X, y, rules=rules, at_output=G)
        close(found[0], 0.5 * G * y)
        close(found[1], 0.5 * G * X)
        found = arriving(lambda x, y: x / y, X, y, rules=rules, at_output=G)
        close(found[0], G / y)
        close(found[1], torch.zeros_like(y))
    found = arriving(lambda x, y: x * y, X, y, rules=ALI, at_output=G)
    close(found[0], G * y)


@pytest.mark.parametrize("rules", [ATTN, CP, ALI], ids=["attn", "cp", "ali"])
def test_layer_norm(rules):
    w, b, eps = numbers(4, seed=5), numbers(4, seed=6), 0.1
    std = (X.var(-1, correction=0, keepdim=True) + eps).sqrt()
    h = G * w
    (found,) = arriving(lambda x: F.layer_norm(x, (4,), w, b, eps), X, rules=rules, at_output=G)
    close(found, (h - h.mean(-1, keepdim=True)) / std)


def test_layer_norm_with_the_mean_held_constant_too():
    rules = conservative("mean_std")
    std = (X.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    close(arriving(lambda x: F.layer_norm(x, (4,)), X, rules=rules, at_output=G)[0], G / std)


def test_other_norms():
    x, g, w = numbers(2, 4, 3, 3), numbers(2, 4, 3, 3, seed=1), numbers(4, seed=2)
    b = numbers(4, seed=3)

    def expected(groups):
        rows = x.reshape(2, groups, -1)
        h = (g * w.view(1, 4, 1, 1)).reshape(2, groups, -1)
        std = (rows.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return ((h - h.mean(-1, keepdim=True)) / std).reshape(x.shape)

    close(arriving(lambda x: F.group_norm(x, 2, w, b), x, rules=ATTN, at_output=g)[0], expected(2))
    close(
        arriving(lambda x: F.instance_norm(x, weight=w, bias=b), x, rules=ATTN, at_output=g)[0],
        expected(4),
    )
    rms = (X.square().mean(-1, keepdim=True) + 0.1).sqrt()
    v = numbers(4, seed=7)
    (found,) = arriving(lambda x: F.rms_norm(x, (4,), v, 0.1), X, rules=ATTN, at_output=G)
    close(found, G * v / rms)
    mean, var = numbers(4, seed=8), numbers(4, seed=9).abs()
    (found,) = arriving(
        lambda x: F.batch_norm(x, mean, var, w, b), x, rules=ATTN, at_output=g
    )  # linear, as it is
    close(found, g * w.view(1, 4, 1, 1) / (var.view(1, 4, 1, 1) + 1e-5).sqrt())


WRITTEN_NORMS = {
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
    "over a norm": lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "power": lambda x: x * (x.square().mean(-1, keepdim=True) + 0.1) ** -0.5,
    "standard": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1),
    "var_mean": lambda x: _by_var_mean(x),
}


def _by_var_mean(x):
    var, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 0.1)


@pytest.mark.parametrize("name", WRITTEN_NORMS)
def test_norms_written_by_hand(name):
    f = WRITTEN_NORMS[name]
    centred = name in ("standard", "var_mean")
    scale = {
        "rms": lambda x: (x.square().mean(-1, keepdim=True) + 0.1).rsqrt(),
        "over a norm": lambda x: 1 / (x.norm(dim=-1, keepdim=True) + 0.1),
        "normalize": lambda x: 1 / x.norm(dim=-1, keepdim=True),
        "power": lambda x: (x.square().mean(-1, keepdim=True) + 0.1).rsqrt(),
        "standard": lambda x: 1 / (x.std(-1, keepdim=True) + 0.1),
        "var_mean": lambda x: (x.var(-1, keepdim=True) + 0.1).rsqrt(),
    }[name](X)
    h = G - G.mean(-1, keepdim=True) if centred else G
    for rules in (ATTN, CP, ALI):
        close(arriving(f, X, rules=rules, at_output=G)[0], h * scale)


def test_cosine_similarity():
    y, g = numbers(2, 3, 4, seed=3), numbers(2, 3, seed=4)
    found = arriving(lambda a, b: F.cosine_similarity(a, b, dim=-1), X, y, rules=ATTN, at_output=g)
    n, m = X.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    close(found[0], 0.5 * g[..., None] * y / (n * m))
    close(found[1], 0.5 * g[..., None] * X / (n * m))


LINEAR = {
    "linear": lambda x: F.linear(x, numbers(5, 4, seed=2), numbers(5, seed=3)),
    "addmm": lambda x: torch.addmm(numbers(5, seed=3), x.reshape(6, 4), numbers(4, 5, seed=2)),
    "matmul": lambda x: x @ numbers(4, 5, seed=2),
    "sum": lambda x: x.sum(1) + x.mean(1) - x.amax(1),
    "softmax": lambda x: x.softmax(-1),
    "pool": lambda x: F.avg_pool1d(x, 2),
    "shift": lambda x: 3 * x + 1,
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("rules", [ATTN, CP, ALI], ids=["attn", "cp", "ali"])
def test_what_is_not_listed_keeps_its_gradient(name, rules):
    f = LINEAR[name]
    g = numbers(*f(X).shape, seed=9)
    close(arriving(f, X, rules=rules, at_output=g)[0], arriving(f, X, rules={}, at_output=g)[0])


def gamma_by_hand(x, w, b, g, value):
    """Montavon et al. 2019, generalised: one output at a time. x (D,), w (O, D), b (O,)."""

    def up(t):
        return t + value * t.clamp(min=0)

    def down(t):
        return t + value * t.clamp(max=0)

    y, total = w @ x + b, torch.zeros_like(x)
    for o in range(len(w)):
        one, other, bias = (up, down, up) if y[o] > 0 else (down, up, down)
        z = sum(float((one(w[o, i]) if x[i] > 0 else other(w[o, i])) * x[i]) for i in range(len(x)))
        z += float(bias(b[o]))
        z += 1e-6 if z >= 0 else -1e-6
        for i in range(len(x)):
            weight = one(w[o, i]) if x[i] > 0 else other(w[o, i])
            total[i] += x[i] * weight * g[o] * y[o] / z
    return total / (x + torch.where(x < 0, -1e-10, 1e-10))


@pytest.mark.parametrize("value", [0.05, 0.25, 100.0])
def test_gamma(value):
    w, b, g = numbers(5, 4, seed=2), numbers(5, seed=3), numbers(2, 3, 5, seed=4)
    rules = with_gamma(attn_lrp(), (0.0, value), True)
    (found,) = arriving(lambda x: F.linear(x, w, b), X, rules=rules, at_output=g)
    for i in range(2):
        for j in range(3):
            close(found[i, j], gamma_by_hand(X[i, j], w, b, g[i, j], value), 1e-9)


def test_gamma_of_a_convolution_is_that_of_the_linear_layer_on_its_patches():
    x, w, b = numbers(2, 3, 4, 4), numbers(5, 3, 2, 2, seed=2), numbers(5, seed=3)
    g = numbers(2, 5, 2, 2, seed=4)
    rules = with_gamma(cp_lrp(), (0.25, 0.0), True)
    (found,) = arriving(lambda x: F.conv2d(x, w, b, stride=2), x, rules=rules, at_output=g)
    for n in range(2):
        for i in range(2):
            for j in range(2):
                patch = x[n, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                by_hand = gamma_by_hand(patch.flatten(), w.flatten(1), b, g[n, :, i, j], 0.25)
                close(found[n, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(), by_hand, 1e-9)


def test_gamma_without_the_projections_of_attention():
    wq, wv, wo, wm = (numbers(4, 4, seed=s) for s in range(4))
    x = numbers(2, 5, 4)

    def block(x):
        a = F.scaled_dot_product_attention(F.linear(x, wq), F.linear(x, wq), F.linear(x, wv))
        return F.linear(x, wm) + F.linear(a, wo)

    def only_mlp(x):
        a = F.scaled_dot_product_attention(x @ wq.mT, x @ wq.mT, x @ wv.mT)
        return F.linear(x, wm) + a @ wo.mT

    some = with_gamma(attn_lrp(), (0.0, 0.3), False)
    every = with_gamma(attn_lrp(), (0.0, 0.3), True)
    (found,) = arriving(block, x, rules=some)

    def without(op, g):  # gamma for `linear` alone: here the projections are written as matmul
        return (op.vjp(g)[0],) if op.name == "matmul" else every["linear"](op, g)

    (expected,) = arriving(only_mlp, x, rules={**every, "linear": without})
    close(found, expected)
    assert not torch.allclose(found, arriving(block, x, rules=every)[0])
