"""The mode below the tap: what the model computes stays, and what the graph's nodes do."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_attn import (
    CPLRP,
    AttnLRP,
    ConservativeLRP,
    PartialLRP,
    TransformerAttribution,
    TransformerLRP,
)
from captum_attn.attr.rules import KINDS, RULE_SETS, Shares, add, epsilon, z_apart, z_plus
from captum_attn.attr.rules import gamma as gamma_rule
from captum_attn.errors import InputError, OptionError, ReadoutError, RuleError, TargetError
from captum_attn.objectives import pairwise
from captum_attn.observe.operators import kinds
from tests.lrp.run import arriving, numbers, ran
from tests.zoo import ZOO

ATTN, FULL = RULE_SETS["attn_lrp"], RULE_SETS["transformer_lrp"]
X, G = numbers(2, 3, 4), numbers(2, 3, 4, seed=1)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_one_forward_pass_serves_the_gradient_and_every_table():
    case = ZOO["vit_cls"]
    model, sample = case.fresh().double(), case.sample().to(torch.float64)
    x = sample.inputs.detach().requires_grad_()
    tables = [ATTN, RULE_SETS["cp_lrp"], RULE_SETS["conservative"], FULL]
    out, operators = ran(case.function(model), x, tables=tables)
    value = getattr(out, "logits", out)[:, 1].sum()
    plain = getattr(case.function(model)(x), "logits", case.function(model)(x))[:, 1].sum()
    close(torch.autograd.grad(value, x, retain_graph=True)[0], torch.autograd.grad(plain, x)[0])
    for rules in tables:
        alone, own = ran(case.function(model), x, tables=[rules])
        with operators.cell.following(rules):
            (together,) = torch.autograd.grad(value, x, retain_graph=True)
        with own.cell.following(rules):
            (apart,) = torch.autograd.grad(getattr(alone, "logits", alone)[:, 1].sum(), x)
        close(together, apart)


IN_PLACE = {
    "relu": (lambda x: F.relu(x.clone(), inplace=True), F.relu),
    "method": (lambda x: x.clone().sigmoid_(), torch.sigmoid),
    "residual": (lambda x: _added(x), lambda x: x + F.gelu(x)),
    "view": (lambda x: _first_column(x), lambda x: torch.cat([x[..., :1] * 2, x[..., 1:]], -1)),
    "gate": (
        lambda x: x.clone().mul_(torch.sigmoid(x)),
        lambda x: torch.clone(x) * torch.sigmoid(x),
    ),
    "silu, positional": (lambda x: F.silu(x.clone(), True), F.silu),
    "leaky": (lambda x: F.leaky_relu(x.clone(), 0.1, True), lambda x: F.leaky_relu(x, 0.1)),
    "setitem": (lambda x: _set(x), lambda x: torch.cat([F.gelu(x[:, :1]), x[:, 1:]], 1)),
}


def _added(x):
    y = x * 1
    y += F.gelu(x)
    return y


def _first_column(x):
    y = x * 1
    y[..., 0] *= 2
    return y


def _set(x):
    y = x * 1
    y[:, 0] = F.gelu(x[:, 0])
    return y


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("table", ["attn_lrp", "transformer_lrp"])
def test_in_place_operations_are_explained_as_their_twins(name, table):
    written, twin = IN_PLACE[name]
    rules = RULE_SETS[table]
    assert torch.equal(ran(written, X.clone().requires_grad_(), tables=[rules])[0], twin(X))
    close(
        arriving(written, X, rules=rules, at_output=G)[0],
        arriving(twin, X, rules=rules, at_output=G)[0],
    )


def test_values_that_a_rule_keeps_are_copied_before_they_are_overwritten():
    """As far as autograd lets a model: relu saves its result, gelu its operand."""

    def overwritten(x):
        h = x * 1
        y = F.relu(h)
        h.zero_()
        z = F.gelu(y - 0.1)
        u = z * 1
        z.fill_(3.0)
        return u

    def twin(x):
        return F.gelu(F.relu(x * 1) - 0.1) * 1

    for rules in (ATTN, FULL):
        expected = arriving(twin, X, rules=rules, at_output=G)[0]
        close(arriving(overwritten, X, rules=rules, at_output=G)[0], expected)


def test_softmax_in_front_of_an_inplace_dropout():
    """In eval mode it does nothing, and what softmax has saved must not count as written."""

    def attend(x):
        return F.dropout((x @ x.mT).softmax(-1), 0.1, False, True) @ x

    found = arriving(attend, X, rules=ATTN, at_output=G)[0]
    assert bool(torch.isfinite(found).all())


def test_learned_tokens_are_constants():
    """A parameter among the tokens must not halve a product (BEiT's bias, Swin's table)."""
    w = nn.Parameter(numbers(4, 4, seed=3))

    def f(x):
        table = torch.cat([w, w])[:4]  # the tap makes a leaf of it
        return x @ table

    (found,) = arriving(f, X, rules=ATTN, at_output=G)
    close(found, G @ w.detach().mT)

    def scaled(x):
        return x * torch.cat([v, v])[:4].expand_as(x)

    v = numbers(4, seed=3).requires_grad_()
    (found,) = arriving(scaled, X, rules=ATTN, at_output=G)  # the shape of x is all it takes of it
    close(found, G * v.detach())


def test_integers_and_constants_are_run_as_they_are():
    def f(x):
        steps = torch.arange(3).view(1, 3, 1)
        return x * (steps > 0) + F.one_hot(steps[..., 0], 4)

    out, operators = ran(f, X.clone().requires_grad_(), tables=[ATTN])
    assert torch.equal(out, f(X))
    assert not operators.unruled


def test_rounded_numbers_are_constants():
    """Their derivative is 0: what they multiply is linear in the other, and gets all."""

    def f(x):
        return x * (x + 5).floor() + (x - x.round())

    (found,) = arriving(f, X, rules=ATTN, at_output=G)
    close(found, G * ((X + 5).floor() + 1))
    (found,) = arriving(lambda x: x * (x + 5).floor(), X, rules=FULL, at_output=G)
    close(found, G)


def test_an_output_argument_is_refused():
    with pytest.raises(InputError, match="out="):
        ran(lambda x: torch.mul(x, 2, out=torch.empty_like(x)), X.clone().requires_grad_(),
            tables=[ATTN])  # fmt: skip


def test_every_kind_is_described_and_every_table_speaks_of_known_kinds():
    assert all(set(rules) <= set(KINDS) for rules in RULE_SETS.values())
    assert set(FULL) == set(KINDS) - {"other"}
    assert not kinds.CONSTANT & kinds.MOVING
    assert not kinds.ACTIVATIONS & (kinds.MOVING | kinds.CONSTANT | kinds.STATISTICS)


# ---------------------------------------------------------------------- what has no rule
class Projected(nn.Module):
    """Queries and keys by convolution and batch norm, as in LeViT and MobileNet v4's attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(3)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        q, k, v = (layer(x).flatten(2).mT for layer in (self.q, self.k, self.v))
        return self.head((q @ k.mT).softmax(-1) @ v).mean(1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", [CPLRP, ConservativeLRP, AttnLRP])
def test_rules_that_stop_a_gradient_in_front_of_a_batch_norm(method, batch):
    x = numbers(batch, 3, 4, 4)
    model = Projected().double().eval()
    found = method(model).attribute(x, 1)
    if method is not AttnLRP:  # the map is a constant: q and k give nothing
        twice = torch.cat([x, x])  # torch's own backward of a batch norm is wrong for one example
        q, k = (layer(twice).flatten(2).mT.detach() for layer in (model.q, model.k))
        leaf = twice.clone().requires_grad_()
        out = model.head((q @ k.mT).softmax(-1) @ model.v(leaf).flatten(2).mT).mean(1)
        close(found, x * torch.autograd.grad(out[:, 1].sum(), leaf)[0][:batch])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0].mean(1))


class Hiding(nn.Module):
    class Gelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.gelu(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(F.gelu(x), x, g)[0]

    def forward(self, x):
        return self.Gelu.apply(x * 2).sum((1, 2))


def test_a_recurrent_layer_is_named_and_keeps_its_gradient():
    model = Recurrent().double()
    described = str(AttnLRP(model).describe(X, 1))
    assert "without a rule: lstm in lstm (1)" in described
    found = AttnLRP(model).attribute(X, 1)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    close(found, X * gradient)  # nothing else in it has a rule that differs


def test_relevance_refuses_what_has_no_rule():
    with pytest.raises(RuleError, match="read by mean.*lstm in 'lstm'.*AttnLRP"):
        TransformerLRP(Recurrent().double()).attribute(X, 1)
    with pytest.raises(RuleError, match="GeluBackward"):
        TransformerLRP(Hiding()).attribute(X)


@pytest.mark.parametrize("joined", [True, False])
def test_a_learned_table_read_at_places_that_the_input_gives_is_a_constant(joined):
    """Positions of packed patches; beside them or added, relevance is not asked for at places."""

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Parameter(numbers(1, 4, 3, 3)), nn.Linear(4, 3).double()

        def forward(self, x, places):
            grid = places.view(1, -1, 1, 2)
            read = F.grid_sample(self.table, grid, align_corners=False)
            read = read[0, :, :, 0].T.view_as(x)
            tokens = torch.cat([x, read], 1) if joined else x + read
            return self.out(tokens).mean(1)

    model, places = Placed(), numbers(2, 3, 2, seed=1).tanh()
    for method in (AttnLRP, TransformerLRP):
        found = method(model).attribute((X, places), 1)
        assert bool(found[0].any()) and not bool(found[1].any())
    model.table.requires_grad_(False)
    close(TransformerLRP(model).attribute((X, places), 1)[0], found[0])


def test_a_rule_for_whatever_else():
    def keep(op, relevance):
        return [relevance / 3 for _ in op.operands]

    class Inverse(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x).sum((1, 2))

    x = numbers(2, 3, 3)
    with pytest.raises(RuleError, match="LinalgInv"):
        TransformerLRP(Inverse()).attribute(x)
    found = TransformerLRP(Inverse()).attribute(x, rules={"other": keep})
    inverse = torch.linalg.inv(x)
    close(found, inverse / inverse.sum((1, 2), keepdim=True) / 3, 1e-8)


def test_functions_of_the_models_own_are_warned_of():
    with pytest.warns(UserWarning, match="autograd Functions of its own .Gelu."):
        AttnLRP(Hiding()).attribute(X)
    assert "hidden in an autograd Function: Gelu" in str(AttnLRP(Hiding()).describe(X))


# ---------------------------------------------------------------------- rules as a table
def test_rules_can_be_changed_by_kind():
    case = ZOO["vit_cls"]
    model, sample = case.fresh().double(), case.sample().to(torch.float64)
    method, arguments = AttnLRP(case.function(model)), (sample.inputs, 1)
    own = method.attribute(*arguments)
    as_cp = {"map": RULE_SETS["cp_lrp"]["map"], "gate": Shares((0.0, 1.0))}
    close(method.attribute(*arguments, rules=as_cp), method.attribute(*arguments, rules="cp_lrp"))
    assert not torch.allclose(own, method.attribute(*arguments, rules="cp_lrp"))
    x = sample.inputs.clone().requires_grad_()
    out = case.function(model)(x)
    (gradient,) = torch.autograd.grad(getattr(out, "logits", out)[:, 1].sum(), x)
    close(method.attribute(*arguments, rules="gradient"), x.detach() * gradient)
    nothing = dict.fromkeys(ATTN)
    close(method.attribute(*arguments, rules=nothing), x.detach() * gradient)


@pytest.mark.parametrize(
    ("rules", "message"),
    [("zennit", "one of"), ({"dense": None}, "unknown kind 'dense'"), ({"linear": 3}, "expected"),
     ("transformer_lrp", "one of")],
)  # fmt: skip
def test_rules_that_are_none(rules, message):
    with pytest.raises(OptionError, match=message):
        AttnLRP(Recurrent().double()).attribute(X, 1, rules=rules)


@pytest.mark.parametrize(
    ("method", "rule", "message"),
    [(TransformerLRP, epsilon, "epsilon hands on a gradient, and .* hand on relevance"),
     (TransformerAttribution, partial(gamma_rule, value=0.25), "gamma hands on a gradient"),
     (CPLRP, z_plus, "z_plus hands on relevance, and .* hand on a gradient")],
)  # fmt: skip
def test_rules_of_the_other_form_are_refused(method, rule, message):
    """Taken for its own a method would give wrong numbers, and no error."""
    with pytest.raises(OptionError, match=message):
        method(Recurrent().double()).attribute(X, 1, rules={"linear": rule})


def test_methods_that_weigh_maps_take_rules_of_their_relevance_pass():
    case = ZOO["vit_cls"]
    model, sample = case.fresh().double(), case.sample().to(torch.float64)
    method, arguments = TransformerAttribution(case.function(model)), (sample.inputs, 1)
    apart = {"linear": z_apart, "add": partial(add, normalize=False)}
    older = method.attribute(*arguments, renorm=False, joint=False)
    close(method.attribute(*arguments, rules=apart), older)
    assert not torch.allclose(method.attribute(*arguments), older)
    (map_, *_) = PartialLRP(case.function(model)).layer_maps(*arguments, rules=apart)
    (expected, *_) = PartialLRP(case.function(model)).layer_maps(
        *arguments, renorm=False, joint=False
    )
    close(map_[1], expected[1])


@pytest.mark.parametrize("gamma", [1.0, (1.0,), (-1.0, 0.0), ("a", "b"), (True, 0.0)])
def test_gamma_that_is_none(gamma):
    with pytest.raises(OptionError, match="gamma"):
        AttnLRP(Recurrent().double()).attribute(X, 1, gamma=gamma)


def test_what_has_no_meaning_is_refused():
    model = Recurrent().double()
    with pytest.raises(OptionError, match="layers"):
        AttnLRP(model, layers="lstm")
    for options in ({"readout": 0}, {"start_layer": 1}):
        with pytest.raises(OptionError, match="follows"):
            AttnLRP(model).attribute(X, 1, **options)
    for call in ("relevance_maps", "layer_maps"):
        with pytest.raises(OptionError, match="not matrices"):
            getattr(TransformerLRP(model), call)(X, 1)


# ---------------------------------------------------------------------- captum's habits
class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3), nn.ReLU()
        self.pool2 = nn.AdaptiveAvgPool2d(1)
        self.linear1, self.tanh = nn.Linear(8, 7), nn.Tanh()
        self.linear2 = nn.Linear(7, 5)

    def forward(self, x):
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x))).flatten(1)
        return self.linear2(self.tanh(self.linear1(x)))


def epsilon(op, g, eps):
    """LRP-epsilon: R / (y + eps) instead of R / y."""
    y = op.output
    return op.vjp(g * y / (y + torch.where(y < 0, -eps, eps)))


def captums_gamma(op, g, gamma):
    """Captum's: the layer with w + gamma w+ in place of w."""
    from captum_attn.attr._linear_form import linear_form

    layer, (x,) = linear_form(op), op.operands
    raised = layer.weight + gamma * layer.weight.clamp(min=0)
    z = layer.forward(x, raised) + (0 if layer.bias is None else layer.bias)
    s = g * op.output / (z + torch.where(z < 0, -1e-9, 1e-9))
    return (layer.pull(s, x, raised),)


@pytest.mark.parametrize("kind", ["epsilon 1e-9", "epsilon 0.25", "gamma"])
def test_a_cnn_is_explained_as_captums_lrp_explains_it(kind):
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule

    model, images = Cnn().double().eval(), numbers(2, 3, 8, 8)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        layer.rule = {
            "epsilon 1e-9": EpsilonRule(1e-9), "epsilon 0.25": EpsilonRule(0.25),
            "gamma": GammaRule(0.25),
        }[kind]  # fmt: skip
    for pool in (model.pool1, model.pool2):
        pool.rule = EpsilonRule(1e-9)
    expected = LRP(model).attribute(images, target=2)
    rules = {
        "epsilon 1e-9": None,
        "epsilon 0.25": dict.fromkeys(
            ("linear", "convolution"), lambda op, g: epsilon(op, g, 0.25)
        ),
        "gamma": dict.fromkeys(("linear", "convolution"), lambda op, g: captums_gamma(op, g, 0.25)),
    }[kind]
    found = AttnLRP(model).attribute(images, target=2, rules=rules)
    scale = float(expected.detach().abs().max())
    # Captum divides relevance by inputs and outputs with 1e-9 added, also where rules are exact
    assert float((found - expected.detach()).abs().max()) < 2e-5 * scale


def test_models_without_attention_and_wiring():
    model = Cnn().double().eval()
    images = numbers(2, 3, 8, 8)
    for method in (AttnLRP, ConservativeLRP, TransformerLRP):
        found = method(model).attribute(images, target=2)
        assert found.shape == images.shape and bool(torch.isfinite(found).all())
        pair = list(method(model).attribute_each(images, [2, 3]))
        close(pair[0], found)
    conserved = AttnLRP(
        nn.Sequential(nn.Linear(4, 5, bias=False), nn.GELU(), nn.Linear(5, 2, bias=False)).double()
    )
    found = conserved.attribute(X, (0, 1))
    logits = conserved.forward_func(X)
    close(found.sum((1, 2)), logits[:, 0, 1])


# ---------------------------------------------------------------------- examples
class Scores(nn.Module):
    """Texts and images in one model; a head whose rows read each other."""

    def __init__(self, head, attends=True):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.attends = head, attends
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def pooled(self, x):
        if self.attends:
            x = x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return F.gelu(self.v(x)).mean(1)

    def forward(self, x, y):
        return self.head(self.pooled(x), self.pooled(y))


MEETING = {
    "scores of all pairs": lambda a, b: a @ b.mT,
    "einsum": lambda a, b: torch.einsum("id,jd->ij", a, b),
    "less the mean": lambda a, b: a * b - (a * b).mean(0),
    "another's": lambda a, b: a * b.roll(1, 0),
    "of the batch": lambda a, b: (a * b).softmax(0),
    "the first's": lambda a, b: a * b[:1],
}


@pytest.mark.parametrize("head", MEETING)
@pytest.mark.parametrize("attends", [True, False])
def test_outputs_that_read_other_examples_are_refused(head, attends):
    x, y = numbers(3, 5, 4), numbers(3, 6, 4, seed=1)
    model = Scores(MEETING[head], attends).double()
    for method in (AttnLRP, ConservativeLRP, TransformerLRP):
        for target in (0, 1, 2):
            with pytest.raises(ReadoutError, match="depends on another example"):
                method(model).attribute((x, y), target)
    with pytest.raises(ReadoutError, match="depends on another example"):
        list(AttnLRP(model).attribute_each((x, y), [0, 1]))
    if attends:
        with pytest.raises(ReadoutError):
            AttnLRP(model).attribute_tokens((x, y), 1)


@pytest.mark.parametrize("attends", [True, False])
def test_pairs_of_a_matrix_of_scores_are_each_others(attends):
    x, y = numbers(3, 5, 4), numbers(3, 6, 4, seed=1)
    model = Scores(MEETING["scores of all pairs"], attends).double()
    method = AttnLRP(model)
    found = method.attribute((x, y), objective=pairwise)
    for n in range(3):
        alone = method.attribute((x[n : n + 1], y[n : n + 1]), 0)
        for one, other in zip(found, alone, strict=True):
            close(one[n : n + 1], other)


@pytest.mark.parametrize("method", [AttnLRP, TransformerLRP, TransformerAttribution])
def test_the_model_is_left_as_found(method, left_as_found, in_use):
    case = ZOO["vit_cls"]
    model, sample = case.fresh(), case.sample()
    with in_use(model), left_as_found(model, sample.inputs):
        method(case.function(model)).attribute(sample.inputs, 1)
    with in_use(model), left_as_found(model, sample.inputs), pytest.raises(TargetError):
        method(case.function(model)).attribute(sample.inputs, 10**6)


def test_nothing_is_kept_of_a_run():
    case = ZOO["vit_cls"]
    model, sample = case.fresh(), case.sample()
    method = TransformerLRP(case.function(model))
    watched = []

    def forward(x):
        out = case.function(model)(x)
        out = getattr(out, "logits", out)
        watched.append(weakref.ref(out))
        return out

    method = TransformerLRP(forward)
    method.attribute(sample.inputs, 1)
    gc.collect()
    assert watched and watched[0]() is None


def test_half_precision_rules_are_finite():
    case = ZOO["vit_cls"]
    model, sample = case.fresh().bfloat16(), case.sample().to(torch.bfloat16)
    found = AttnLRP(case.function(model)).attribute(sample.inputs, 1)
    exact = AttnLRP(case.function(model.float())).attribute(sample.inputs.float(), 1)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())
