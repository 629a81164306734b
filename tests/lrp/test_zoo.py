"""Relevance propagation on every model of the test zoo, with one stream and with several."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from captum_attn import (
    CPLRP,
    AttnLRP,
    ConservativeLRP,
    GenericAttention,
    PartialLRP,
    TransformerAttribution,
    TransformerLRP,
)
from captum_attn.attr._ruled import ruled_pass
from captum_attn.attr.rules import RULE_SETS
from captum_attn.objectives import logit
from captum_attn.observe.capture.restore import left_as_found, modules_of
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.observation import watched
from tests.conftest import pairs, skip_unless_double_runs
from tests.lrp.conservation import Counting
from tests.zoo import CASES, TWINS, ZOO, output_tensor

NAMES = [case.name for case in CASES]
INPUT_METHODS = {m.__name__: m for m in (AttnLRP, CPLRP, ConservativeLRP, TransformerLRP)}
every_model = pytest.mark.parametrize("name", NAMES)


def of(case, dtype=torch.float64):
    """(function, model, arguments) of a case in float64."""
    model = case.fresh().to(dtype)
    sample = case.sample().to(dtype)
    function = case.function(model)
    skip_unless_double_runs(lambda: sample.run(function))
    return function, model, (sample.inputs, case.target_of(sample), sample.extra)


def tensors(found):
    values = found.values() if isinstance(found, Mapping) else found
    return [found] if isinstance(found, torch.Tensor) else list(values)


@every_model
@pytest.mark.parametrize("table", ["attn_lrp", "cp_lrp"])
def test_every_operation_hands_on_what_arrives(name, table, monkeypatch):
    case = ZOO[name]
    function, model, (inputs, target, extra) = of(case)
    made = []

    def counting(*args):
        made.append(Counting(*args))
        return made[-1]

    monkeypatch.setattr("captum_attn.observe.observation.Operators", counting)
    roots = modules_of(function)
    with left_as_found(roots):
        given = inputs if isinstance(inputs, (tuple, Mapping)) else (inputs,)
        run = watched(function, given, extra, roots, Tap, (RULE_SETS[table],))
        value = logit(run.output, target)
        leaves = [leaf.tensor for leaf in run.tap.leaves if leaf.name]
        ruled_pass(run, value, leaves, RULE_SETS[table], again=True)
    records = list({id(record): record for record in made[-1].records}.values())
    assert len(records) > 10
    missing = {f"{r.name} in {r.module}": r.missing for r in records if abs(r.missing) > 0}
    share = sum(map(abs, missing.values())) / max(float(value.detach().abs().sum()), 1e-3)
    worst = sorted(missing.items(), key=lambda pair: -abs(pair[1]))[:3]
    assert share < (1e-6 if all_double(run) else 1e-4), worst


def all_double(run):
    """Whether the model computes in float64 throughout, as transformers' softmax may not."""
    return run.output.dtype == torch.float64


@every_model
@pytest.mark.parametrize("method", INPUT_METHODS)
def test_shapes_and_numbers(name, method):
    case = ZOO[name]
    function, model, (inputs, target, extra) = of(case)
    found = INPUT_METHODS[method](function).attribute(inputs, target, extra)
    if isinstance(inputs, Mapping):
        assert all(found[key].shape == inputs[key].shape for key in found)
        assert case.content in found
    else:
        shapes = [x.shape for x in tensors(inputs)]
        assert [x.shape for x in tensors(found)] == shapes
    assert all(bool(torch.isfinite(x).all()) for x in tensors(found))
    assert sum(float(x.abs().sum()) for x in tensors(found)) > 0


@pairs(NAMES, ["AttnLRP", "TransformerLRP", "TransformerAttribution"])
def test_an_example_alone_is_explained_as_in_the_batch(name, method):
    case = ZOO[name]
    if case.random:
        pytest.skip("the model draws random numbers")
    function, model, (inputs, target, extra) = of(case)
    explain = {**INPUT_METHODS, "TransformerAttribution": TransformerAttribution}[method](function)
    together = tensors(explain.attribute(inputs, target, extra))
    apart = tensors(explain.attribute(inputs, target, extra, internal_batch_size=1))
    for one, other in zip(together, apart, strict=True):
        scale = float(one.abs().max())
        assert float((one - other).abs().max()) <= 1e-6 * scale + 1e-12


@pytest.mark.parametrize("names", TWINS.values() if isinstance(TWINS, dict) else TWINS)
@pytest.mark.parametrize("method", [AttnLRP, CPLRP, TransformerAttribution])
def test_twins_are_explained_alike(names, method):
    """The same computation, written in different ways."""
    found = []
    for name in names:
        function, model, arguments = of(ZOO[name])
        found += [tensors(method(function).attribute(*arguments))[0]]
    scale = float(found[0].abs().max())
    for name, other in zip(names[1:], found[1:], strict=True):
        error = float((other - found[0]).abs().max()) / scale
        # transformers' eager softmax is in float32, and z+ and sums of relevance ill-conditioned
        assert error <= (1e-6 if method is not TransformerAttribution else 2e-5), (name, error)


@every_model
@pytest.mark.parametrize("method", [PartialLRP, TransformerAttribution])
def test_methods_that_weigh_maps(name, method):
    case = ZOO[name]
    function, model, arguments = of(case)
    tokens = method(function).attribute_tokens(*arguments)[case.stream]
    assert bool(torch.isfinite(tokens).all()) and float(tokens.abs().sum()) > 0
    assert float(tokens.min()) >= 0


@pytest.mark.parametrize("name", NAMES[:6])
def test_gae_of_relevance_is_linear_gae_with_other_maps(name):
    case = ZOO[name]
    function, model, arguments = of(case)
    gae = GenericAttention(function)
    plain = gae.attribute_tokens(*arguments)[case.stream]
    by_lrp = gae.attribute_tokens(*arguments, relevance="lrp")[case.stream]
    assert by_lrp.shape == plain.shape and not torch.allclose(by_lrp, plain)
    maps = gae.layer_maps(*arguments, relevance="lrp")
    weighed = TransformerAttribution(function).layer_maps(*arguments)
    for (_, one), (_, other) in zip(maps, weighed, strict=True):
        torch.testing.assert_close(one, other)  # (∇A ∘ R_A)^+ in both


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_what_it_computes(name):
    case = ZOO[name]
    function, model, (inputs, target, extra) = of(case)
    sample = case.sample().to(torch.float64)
    roots = modules_of(function)
    with left_as_found(roots):
        state = torch.get_rng_state()
        given = inputs if isinstance(inputs, (tuple, Mapping)) else (inputs,)
        without = watched(function, given, extra, roots, Tap).output
        torch.set_rng_state(state)
        tables = (RULE_SETS["attn_lrp"], RULE_SETS["transformer_lrp"])
        run = watched(function, given, extra, roots, Tap, tables)
        torch.set_rng_state(state)
        plain = output_tensor(sample.run(function))
    if case.random:  # it permutes its tokens, and sums them in that order
        torch.testing.assert_close(run.output, without, atol=1e-12, rtol=1e-9)
    else:
        assert torch.equal(run.output, without)
    # torch multiplies in another order where weights require a gradient
    torch.testing.assert_close(run.output, plain, atol=1e-12, rtol=1e-9)
