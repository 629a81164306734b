"""Each relevance rule alone, against a plain rewrite in float64, entry by entry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from captum_attn.attr._linear_form import where_reached
from captum_attn.attr._relevance_rules import transformer_lrp
from captum_attn.attr.rules import RULE_SETS
from tests.lrp.run import arriving, numbers

RULES = RULE_SETS["transformer_lrp"]
X, R = numbers(2, 3, 4), numbers(2, 3, 4, seed=1)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def sd(a, b):
    """One number over another."""
    return 0.0 if b == 0 else a / (b + 1e-9)


def z_plus_by_hand(x, w, r):
    """x (D,), w (O, D), r (O,) -> (D,)."""
    out = torch.zeros_like(x)
    for o in range(len(w)):
        same = [float(x[i] * w[o, i]) for i in range(len(x))]
        parts = [
            max(float(x[i]), 0) * max(float(w[o, i]), 0)
            + min(float(x[i]), 0) * min(float(w[o, i]), 0)
            for i in range(len(x))
        ]
        assert all(p == max(s, 0) for p, s in zip(parts, same, strict=True))
        for i, part in enumerate(parts):
            out[i] += part * sd(float(r[o]), sum(parts))
    return out


LINEAR = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "no bias": lambda x, w, b: F.linear(x, w),
    "matmul": lambda x, w, b: x @ w.mT,
    "einsum": lambda x, w, b: torch.einsum("bnd,od->bno", x, w),
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, 4), w.mT).view(2, 3, 5),
    "baddbmm": lambda x, w, b: torch.baddbmm(b.expand(2, 3, 5), x, w.mT.expand(2, 4, 5)),
    "weight first": lambda x, w, b: (w @ x.mT).mT,
}


@pytest.mark.parametrize("form", LINEAR)
def test_z_plus(form):
    w, b, r = numbers(5, 4, seed=2), numbers(5, seed=3), numbers(2, 3, 5, seed=4)
    (found,) = arriving(lambda x: LINEAR[form](x, w, b), X, rules=RULES, at_output=r)
    for i in range(2):
        for j in range(3):
            close(found[i, j], z_plus_by_hand(X[i, j], w, r[i, j]))


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_z_plus_where_little_relevance_arrives(joint, bias):
    """The head of a language model: one token, one word. Nothing is computed for the others."""
    w, b, r = numbers(5, 4, seed=2), numbers(5, seed=3), torch.zeros(2, 3, 5, dtype=X.dtype)
    r[0, 2, 1], r[1, 2, 1] = 0.7, -1.3
    rules, seen = transformer_lrp(renorm=joint, joint=joint), []
    dense = r + 1e-300  # relevance arrives everywhere, though next to none

    def head(x):
        return F.linear(x, w, b) if bias else F.linear(x, w)

    (found,) = arriving(head, X, rules=rules, at_output=r)
    (expected,) = arriving(head, X, rules=rules, at_output=dense)
    close(found, expected)
    if joint:
        close(found[0, 2], z_plus_by_hand(X[0, 2], w, r[0, 2]))
    assert not bool(found[:, :2].any())

    def spied(op, relevance):
        seen.append(tuple(relevance.shape))
        return [torch.zeros_like(x) for x in op.operands]

    arriving(head, X, rules={**rules, "linear": where_reached(spied)}, at_output=r)
    assert seen == [(2, 1)]


@pytest.mark.parametrize("padding", [0, 1])
def test_z_plus_of_a_convolution(padding):
    """That of the linear layer on each patch; the features of a hidden layer, not an image."""
    x, w, r = numbers(2, 3, 4, 4), numbers(5, 3, 2, 2, seed=2), None
    out = F.conv2d(x, w, stride=2, padding=padding)
    r = numbers(*out.shape, seed=4)
    rules = {kind: rule for kind, rule in RULES.items() if kind != "image"}
    (found,) = arriving(
        lambda x: F.conv2d(x, w, numbers(5), 2, padding, 1, 1), x, rules=rules, at_output=r
    )
    wide, expected = F.pad(x, [padding] * 4), torch.zeros_like(F.pad(x, [padding] * 4))
    for n in range(2):
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                where = (n, slice(None), slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
                patch = wide[where].flatten()
                shared = z_plus_by_hand(patch, w.flatten(1), r[n, :, i, j])
                expected[where] += shared.view(3, 2, 2)
    close(found, expected[..., padding : 4 + padding, padding : 4 + padding])


def test_z_b_of_the_convolution_that_reads_the_image():
    x, w, r = numbers(2, 3, 4, 4), numbers(5, 3, 2, 2, seed=2), numbers(2, 5, 2, 2, seed=4)
    (found,) = arriving(lambda x: F.conv2d(x, w, stride=2), x, rules=RULES, at_output=r)
    for n in range(2):
        low, high = float(x[n].min()), float(x[n].max())
        for i in range(2):
            for j in range(2):
                where = (n, slice(None), slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
                patch, expected = x[where].flatten(), torch.zeros(12, dtype=torch.float64)
                for o in range(5):
                    weights = w[o].flatten()
                    parts = patch * weights
                    parts = parts - low * weights.clamp(min=0) - high * weights.clamp(max=0)
                    expected += parts * r[n, o, i, j] / (parts.sum() + 1e-9)
                close(found[where].flatten(), expected)


def add_by_hand(terms, r, normalize=True):
    """One example: each summand's share of R, then its due of the whole."""
    total = sum(terms)
    parts = [torch.zeros_like(r) for _ in terms]
    for i in range(r.numel()):
        for part, term in zip(parts, terms, strict=True):
            part.view(-1)[i] = float(term.reshape(-1)[i]) * sd(
                float(r.reshape(-1)[i]), float(total.reshape(-1)[i])
            )
    if not normalize:
        return parts
    sums = [float(part.sum()) for part in parts]
    sizes = sum(map(abs, sums))
    return [
        part * sd(sd(abs(s), sizes) * float(r.sum()), s)
        for part, s in zip(parts, sums, strict=True)
    ]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_add(normalize, sign):
    y, rules = numbers(2, 3, 4, seed=2), transformer_lrp(renorm=normalize)
    found = arriving(lambda x, y: x + y if sign == 1 else x - y, X, y, rules=rules, at_output=R)
    for n in range(2):
        expected = add_by_hand([X[n], sign * y[n]], R[n], normalize)
        close(found[0][n], expected[0])
        close(found[1][n], expected[1])


def test_add_of_a_constant_takes_its_share():
    c = numbers(3, 4, seed=2)
    (found,) = arriving(lambda x: x + c, X, rules=RULES, at_output=R)
    for n in range(2):
        close(found[n], add_by_hand([X[n], c], R[n])[0])


@pytest.mark.parametrize("batch", [2, 3])
def test_add_where_the_batch_is_not_first(batch):
    """(n, B, D) with n a multiple of B: the sums are each example's, found or one at a time."""
    x, y, r = (numbers(batch, 2 * batch, batch, seed=s) for s in range(3))

    def length_first(x, y):
        return (x.transpose(0, 1) + y.transpose(0, 1)).transpose(0, 1)

    from captum_attn import TransformerLRP

    class Sum(torch.nn.Module):
        def forward(self, x, y):
            return (length_first(x, y) * r).sum((1, 2))

    found = TransformerLRP(Sum()).attribute((x, y))
    alone = [TransformerLRP(Sum2(r[n : n + 1])).attribute((x[n : n + 1], y[n : n + 1]))
             for n in range(batch)]  # fmt: skip
    for k in range(2):
        close(found[k], torch.cat([one[k] for one in alone]))


class Sum2(torch.nn.Module):
    def __init__(self, r):
        super().__init__()
        self.r = r

    def forward(self, x, y):
        return ((x + y) * self.r).sum((1, 2))


def test_products_of_two_activations():
    a, b, r = numbers(2, 3, 4), numbers(2, 4, 5, seed=1), numbers(2, 3, 5, seed=2)
    found = arriving(lambda a, b: a @ b, a, b, rules=RULES, at_output=r)
    expected = torch.zeros_like(a), torch.zeros_like(b)
    for n in range(2):
        for i in range(3):
            for j in range(5):
                z = float((a[n, i] * b[n, :, j]).sum())
                for k in range(4):
                    share = float(a[n, i, k] * b[n, k, j]) * sd(float(r[n, i, j]), z) / 2
                    expected[0][n, i, k] += share
                    expected[1][n, k, j] += share
    close(found[0], expected[0])
    close(found[1], expected[1])
    y = numbers(2, 3, 4, seed=5)
    found = arriving(lambda x, y: x * y, X, y, rules=RULES, at_output=R)
    close(found[0], R / 2, 1e-6)
    close(found[1], R / 2, 1e-6)


def test_the_solution_of_a_linear_system_is_a_quotient():
    a = (numbers(2, 3, 3, seed=4) * 0.1).tril(-1) + torch.eye(3, dtype=X.dtype)

    def solution(b, a):
        return torch.linalg.solve_triangular(a, b, upper=False)

    found = arriving(solution, X, a, rules=RULES, at_output=R)
    expected = torch.zeros_like(X)
    for n in range(2):
        inverse = torch.linalg.inv(a[n])
        for i in range(3):
            for j in range(4):
                parts = inverse[i] * X[n, :, j]
                expected[n, :, j] += parts * sd(float(R[n, i, j]), float(parts.sum()))
    close(found[0], expected)
    close(found[1], torch.zeros_like(a))


def test_places_that_an_image_is_read_at_get_nothing():
    x, places = numbers(2, 3, 5, 5), numbers(2, 4, 4, 2, seed=1) / 3

    def sampled(x, places):
        return F.grid_sample(x, places.tanh(), align_corners=False)

    found = arriving(sampled, x, places, rules=RULES)
    close(found[0].sum(), torch.tensor(2 * 3 * 4 * 4.0, dtype=x.dtype), 1e-6)
    close(found[1], torch.zeros_like(places))


@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_kernel_is_its_two_products(causal):
    q, k = numbers(2, 4, 5, 3), numbers(2, 2, 5, 3, seed=1)
    v, r = numbers(2, 2, 5, 6, seed=2), numbers(2, 4, 5, 6, seed=3)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def inline(q, k, v):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.mT / 3**0.5
        scores = scores.masked_fill(~mask, -torch.inf) if causal else scores
        return scores.softmax(-1) @ v

    found = arriving(fused, q, k, v, rules=RULES, at_output=r)
    for one, other in zip(found, arriving(inline, q, k, v, rules=RULES, at_output=r), strict=True):
        close(one, other)


PASSING = {
    "gelu": F.gelu, "softmax": lambda x: x.softmax(-1), "norm": lambda x: F.layer_norm(x, (4,)),
    "rms": lambda x: F.rms_norm(x, (4,)), "scale": lambda x: -3 * x, "neg": torch.neg,
    "shift": lambda x: x + 2, "composite": lambda x: x * torch.sigmoid(1.702 * x),
    "written rms": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "centre": lambda x: x - x.mean(-1, keepdim=True),
    "constant": lambda x: x * torch.arange(1.0, 5), "divided": lambda x: x / 3,
    "cast": lambda x: x.float().double(), "moved": lambda x: x.flip(1).flip(1),
    "dropout": lambda x: F.dropout(x, 0.0, True),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_relevance_on(name):
    tolerance = 1e-6 if name == "cast" else 1e-9
    close(arriving(PASSING[name], X, rules=RULES, at_output=R)[0], R, tolerance)


def test_a_mask_on_scores_passes_relevance_on_and_a_bias_elsewhere_does_not():
    q, r = numbers(2, 5, 4), numbers(2, 5, 5, seed=1)
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill_(torch.rand(5, 5) < 0.3, -torch.inf)

    def scores(q):
        return q @ q.detach().mT + mask

    def product(q):
        return q @ (q * 1).mT

    plain = arriving(product, q, rules=RULES, at_output=r)[0]
    close(arriving(lambda q: product(q) + mask, q, rules=RULES, at_output=r)[0], plain)


REDUCTIONS = {
    "mean": lambda x: x.mean(1), "sum": lambda x: x.sum(1),
    "pool": lambda x: F.avg_pool1d(x, 2), "cumsum": lambda x: x.cumsum(1),
    "interpolate": lambda x: F.interpolate(x, 7, mode="linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_share_in_proportion(name):
    f = REDUCTIONS[name]
    y = f(X)
    r = numbers(*y.shape, seed=4)
    rows = torch.autograd.functional.jacobian(f, X).reshape(y.numel(), X.numel())
    expected = torch.zeros(X.numel(), dtype=torch.float64)
    for o in range(len(rows)):
        expected += X.flatten() * rows[o] * sd(float(r.flatten()[o]), float(y.flatten()[o]))
    close(arriving(f, X, rules=RULES, at_output=r)[0].flatten(), expected)


def test_experts_that_meet_share_what_arrives():
    """index_add: two rows are added into one place."""
    index, r = torch.tensor([0, 1, 0]), numbers(2, 4, seed=3)
    x = numbers(3, 4)

    def combine(x):
        return torch.zeros(2, 4, dtype=x.dtype).index_add_(0, index, x)

    (found,) = arriving(combine, x, rules=RULES, at_output=r)
    for row, place in enumerate(index.tolist()):
        for d in range(4):
            y = sum(float(x[i, d]) for i in range(3) if index[i] == place)
            share = float(x[row, d]) * sd(float(r[place, d]), y)
            assert abs(float(found[row, d]) - share) < 1e-7


def test_the_older_baseline_divides_the_parts_of_z_apart():
    w, r = numbers(5, 4, seed=2), numbers(2, 3, 5, seed=4)
    rules = transformer_lrp(renorm=False, joint=False)
    (found,) = arriving(lambda x: F.linear(x, w), X, rules=rules, at_output=r)
    expected = torch.zeros_like(X)
    for n in range(2):
        for j in range(3):
            for sign in (1, -1):
                x = (sign * X[n, j]).clamp(min=0) * sign
                u = (sign * w).clamp(min=0) * sign
                for o in range(5):
                    z = float((x * u[o]).sum())
                    expected[n, j] += x * u[o] * sd(float(r[n, j, o]), z)
    close(found, expected)
