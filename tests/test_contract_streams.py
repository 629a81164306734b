"""The contract table, part two: what every method owes to every model of several streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn import AttentionRollout, GenericAttention, HeterogenousAttention, RawAttention
from captum_attn.errors import AttnError
from tests import plain
from tests.conftest import skip_unless_double_runs
from tests.test_contract import close
from tests.zoo import Sample, output_tensor
from tests.zoo_streams import CASES, IMAGE, STREAMS, Streams

METHODS = {
    method.__name__: method
    for method in (RawAttention, AttentionRollout, GenericAttention, HeterogenousAttention)
}
NAMES = list(STREAMS)
every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("name", NAMES)


@cache
def explainer(name: str, method: str) -> Any:
    """One attribution object per method and model, which remembers the model's structure."""
    return METHODS[method](STREAMS[name].model())


def asked(case: Streams, sample: Sample) -> dict[str, Any]:
    """The arguments that every entry point takes."""
    return {
        "inputs": sample.inputs, "target": case.target_of(sample), "objective": case.objective
    }  # fmt: skip


def single(case: Streams, sample: Sample, i: int) -> tuple[Sample, dict[str, Any]]:
    """The i-th example with its padding, and how it is asked for alone."""
    one = sample.one(i)
    target = case.target_of(sample)
    target = target[i : i + 1] if isinstance(target, list) else target
    return one, {"inputs": one.inputs, "target": target, "objective": case.objective}


@cache
def explained(name: str, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> attributions with `interpolation="nearest"`, token relevance; of the batch of three."""
    case = STREAMS[name]
    arguments = asked(case, case.sample())
    explain = explainer(name, method)
    torch.manual_seed(0)
    attributions = explain.attribute(**arguments, interpolation="nearest")
    torch.manual_seed(0)
    return attributions, explain.attribute_tokens(**arguments)


# ------------------------------------------------------------------ the table itself
@every_model
def test_wiring(name: str) -> None:
    """Which stream asks and which answers in every call, how long they are, what is read."""
    case = STREAMS[name]
    sample = case.sample()
    table = explainer(name, "GenericAttention").describe(**asked(case, sample))
    assert [(row.query_stream, row.key_streams) for row in table.calls] == case.calls()
    assert dict(table.streams) == case.streams
    weights = case.weights(case.model(), sample)
    assert {read.stream for read in table.readout} == set(weights)
    for read in table.readout:
        found = torch.zeros(case.streams[read.stream], dtype=torch.double)
        for row, weight in read.rows:
            found[row] = weight
        close(found, weights[read.stream][0])
    for stream, real in (sample.real or {}).items():
        assert real.shape[1] == case.streams[stream]


# ------------------------------------------------------------------ results
@every_method
@every_model
def test_result(name: str, method: str) -> None:
    """Container, shapes, dtype, finite; relevance for each example and from attention."""
    case = STREAMS[name]
    sample = case.sample()
    attributions, tokens = explained(name, method)
    assert type(attributions) is dict
    assert set(attributions) == set(case.entries)
    assert {stream: values.shape for stream, values in tokens.items()} == {
        stream: (3, n) for stream, n in case.streams.items()
    }
    for given, attribution in attributions.items():
        assert attribution.shape == sample.inputs[given].shape
    for values in (*attributions.values(), *tokens.values()):
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert values.isfinite().all()
    reached = (
        case.seen_raw if method == "RawAttention" and case.seen_raw is not None else case.entries
    )
    for given, attribution in attributions.items():
        some = (attribution.flatten(1).abs().amax(1) > 0).all()
        assert bool(some) == (given in reached)
    # GAE and rollout start from the identity: without attention the readout weights come out
    weights = case.weights(case.model(), sample)
    for entry in (case.entries[given] for given in reached):
        values = tokens[entry.stream]
        start = weights.get(entry.stream, torch.zeros_like(values))
        brought = (values - start).abs().amax(1)
        assert (brought > 1e-4 * values.abs().amax(1)).all()


@every_method
@every_model
def test_relevance_lies_where_the_tokens_are(name: str, method: str) -> None:
    case = STREAMS[name]
    sample = case.sample()
    attributions, tokens = explained(name, method)
    for given, entry in case.entries.items():
        attribution, own = attributions[given], tokens[entry.stream][:, entry.first : entry.last]
        total = attribution if entry.channel is None else attribution.sum(entry.channel)
        assert entry.grid is not None
        expected = entry.grid(own, attribution.shape)
        if entry.also is not None and sample.real is not None:
            stream, lies = entry.also
            expected = expected + lies(tokens[stream], sample.real[given])
        close(total, expected, 1e-6)
        if entry.channel is not None:  # in equal shares
            share = total / attribution.shape[entry.channel]
            close(attribution, share.unsqueeze(entry.channel).expand_as(attribution), 1e-6)
    for stream, real in (sample.real or {}).items():
        assert (tokens[stream][~real] == 0).all()
    if "input_ids" in attributions:
        assert (attributions["input_ids"][sample.inputs["input_ids"] == IMAGE] == 0).all()


@every_method
@every_model
def test_batch_equals_one_by_one(name: str, method: str) -> None:
    case = STREAMS[name]
    sample = case.sample()
    attributions, _ = explained(name, method)
    for i in (1, 2):
        _, arguments = single(case, sample, i)
        torch.manual_seed(0)
        alone = explainer(name, method).attribute(**arguments, interpolation="nearest")
        for given, attribution in attributions.items():
            close(alone[given], attribution[i : i + 1])


@every_method
@pytest.mark.parametrize("name", [case.name for case in CASES if case.padded and case.alone])
def test_padding_changes_nothing(name: str, method: str) -> None:
    """A padded example is explained as it is alone."""
    case = STREAMS[name]
    sample = case.sample()
    _, tokens = explained(name, method)
    assert sample.real is not None
    assert not all(real[1].all() for real in sample.real.values())
    trimmed = case.collate(case.raw()[1:2])
    target = case.target_of(sample)
    if isinstance(target, list):  # the same token, at its place in the shorter text
        target = [(case.target_of(trimmed)[0][0], target[1][1])]
    torch.manual_seed(0)
    alone = explainer(name, method).attribute_tokens(
        trimmed.inputs, target, objective=case.objective
    )
    for stream, values in tokens.items():
        real = sample.real.get(stream)
        close(values[1] if real is None else values[1][real[1]], alone[stream][0])


# ------------------------------------------------------------------ values
@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """Every softmax of a model's eager form, which is its attention, in double where it is not."""
    found: list[Tensor] = []

    def recording(scores: Tensor, dim: int = -1, dtype: Any = None, **_: Any) -> Tensor:
        dtype = None if scores.dtype == torch.float64 else dtype
        found.append(scores.softmax(dim, dtype))
        return found[-1]

    with mock.patch.object(F, "softmax", recording), mock.patch.object(torch, "softmax", recording):
        yield found


def maps_of(
    case: Streams, model: nn.Module, one: Sample, target: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """A and d output / d A of every call, (H, q, k), for one example."""
    torch.manual_seed(0)
    with torch.enable_grad(), recorded() as record:
        output = output_tensor(one.run(model))[0]
        index = 0 if target is None else target[0] if isinstance(target, list) else target
        gradients = torch.autograd.grad(output[index], record, allow_unused=True)
    calls = [call for step in case.wiring_of(model, one) for call in plain.calls_of(step)]
    folded = [  # images that the model holds as sequences of their own
        case.streams[s] // a.shape[-2] if rows == slice(None) else 1
        for a, (s, _, rows, _) in zip(record, calls, strict=True)
    ]
    A = [beside_each_other(a.detach(), n) for a, n in zip(record, folded, strict=True)]
    G = [
        torch.zeros_like(a) if g is None else beside_each_other(g, n)
        for a, g, n in zip(A, gradients, folded, strict=True)
    ]
    return A, G


def beside_each_other(maps: Tensor, images: int) -> Tensor:
    """(images, H, q, k) or (images H, q, k) -> (H, images q, images k) in double."""
    apart = maps.double().view(images, -1, *maps.shape[-2:])
    return torch.stack([torch.block_diag(*apart[:, h]) for h in range(apart.shape[1])])


def reported(output: Any, name: str = "") -> Iterator[Tensor]:
    """The attention maps in an output of transformers."""
    if isinstance(output, Tensor):
        if name.endswith("attentions"):
            yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from reported(item, name)
    elif isinstance(output, Mapping):
        for key, item in output.items():
            yield from reported(item, key)


@every_model
def test_the_recorded_maps_are_those_of_transformers(name: str) -> None:
    """What the values below rest on, against `output_attentions`."""
    case = STREAMS[name]
    model, one = case.fresh("eager"), case.sample().one(1)
    torch.manual_seed(0)
    with torch.no_grad(), recorded() as record:
        maps = list(reported(model(**one.inputs, output_attentions=True)))
    assert len(maps) > 1
    assert len(record) == len(case.calls())
    for A in maps:
        rows = A.reshape(-1, *A.shape[-2:])
        alike = [a.reshape(rows.shape) for a in record if a.numel() == rows.numel()
                 and a.shape[-2:] == A.shape[-2:]]  # fmt: skip
        assert any(torch.allclose(rows, a) for a in alike)


Rule = Callable[[list, dict, list[Tensor], list[Tensor], dict[str, Tensor]], dict]


def weighted(weigh: Callable, rule: Callable) -> Rule:
    return lambda wiring, R, A, G, real: rule(
        wiring, R, [weigh(a, g) for a, g in zip(A, G, strict=True)]
    )


def rollout(wiring: list, R: dict, A: list[Tensor], G: Any, real: dict, how: str = "mean") -> dict:
    return plain.follow_rollout(wiring, R, A, real, how)


HETEROGENOUS = partial(plain.follow, rule=plain.heterogenous_rule)
RULES: dict[str, tuple[str, dict[str, Any], Rule]] = {  # method, options, equations
    "rollout": ("AttentionRollout", {}, rollout),
    "rollout_max": ("AttentionRollout", {"head_fusion": "max"}, partial(rollout, how="max")),
    "gae": ("GenericAttention", {},
            weighted(plain.gae_map, partial(plain.follow, rule=plain.gae_rule))),
    "gae_bare": ("GenericAttention", {"normalize": False},
                 weighted(plain.gae_map, partial(
                     plain.follow, rule=partial(plain.gae_rule, normalize=False)))),
    **{f"heterogenous_{correction}": (
        "HeterogenousAttention", {"correction": correction},
        weighted(partial(plain.heterogenous_map, correction=correction), HETEROGENOUS))
       for correction in ("positive", "full", "absolute")},
    "noise_link": ("HeterogenousAttention", {"noise_link": True},
                   weighted(plain.heterogenous_map, plain.with_noise_link)),
}  # fmt: skip


@cache
def in_double(name: str) -> tuple[nn.Module, Sample, list[tuple]]:
    """-> the model in its own form, the batch, and of two examples: number, wiring, A, G, rows."""
    case = STREAMS[name]
    model, eager = case.fresh().double(), case.fresh("eager").double()
    sample = case.sample().to(torch.float64)
    skip_unless_double_runs(lambda: (sample.run(model), sample.run(eager)))
    weights = case.weights(model, sample)
    examples = []
    for i in (0, 1):
        one, arguments = single(case, sample, i)
        A, G = maps_of(case, eager, one, arguments["target"])
        read = {stream: rows[i] for stream, rows in weights.items()}
        order = case.order(eager, one) if case.order else {}
        examples.append((i, case.wiring_of(eager, one), A, G, read, order))
    return model, sample, examples


@cache
def explainer_in_double(name: str, method: str) -> Any:
    return METHODS[method](in_double(name)[0])


def ordered(block: Tensor, s: str, x: str, order: dict[str, Tensor]) -> Tensor:
    rows, columns = (order.get(stream, slice(None)) for stream in (s, x))
    return block[rows][:, columns]


SLOW = ("rollout_max", "gae_bare")


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[pytest.mark.slow] * (rule in SLOW)) for rule in RULES]
)
@every_model
def test_values(name: str, rule: str) -> None:
    """Against the equations, on the maps of the model's own eager form and the table's wiring."""
    case = STREAMS[name]
    method, options, equations = RULES[rule]
    _, sample, examples = in_double(name)
    explain = explainer_in_double(name, method)
    torch.manual_seed(0)
    tokens = explain.attribute_tokens(**asked(case, sample), **options)
    torch.manual_seed(0)
    blocks = explain.relevance_maps(**asked(case, sample), **options)
    assert set(tokens) == set(case.streams) == {s for s, x in blocks if s == x}
    for i, wiring, A, G, read, order in examples:
        real = {s: there[i] for s, there in (sample.real or {}).items()}
        R = equations(wiring, plain.identity_blocks(case.streams), A, G, real)
        for s, x in blocks:  # what padding asks is the attention form's own affair
            kept = real.get(s, slice(None))
            found, expected = blocks[s, x][i], ordered(R[s, x], s, x, order)
            plain.close(found[kept], expected[kept], case.tolerance)
        for x in case.streams:
            expected = sum(rows @ R[s, x] for s, rows in read.items())
            expected = expected[order.get(x, slice(None))]
            plain.close(tokens[x][i], expected, case.tolerance)


@every_model
def test_values_of_raw_attention(name: str) -> None:
    case = STREAMS[name]
    _, sample, examples = in_double(name)
    torch.manual_seed(0)
    tokens = explainer_in_double(name, "RawAttention").attribute_tokens(**asked(case, sample))
    for i, wiring, A, _, read, order in examples:
        expected = plain.follow_raw(wiring, plain.identity_blocks(case.streams), A, read)
        for x, n in case.streams.items():
            row = expected.get(x, torch.zeros(n, dtype=torch.double))
            plain.close(tokens[x][i], row[order.get(x, slice(None))], case.tolerance)


# ------------------------------------------------------------------ the model
@every_method
@every_model
def test_model_is_left_alone(name: str, method: str, left_as_found: Any, in_use: Any) -> None:
    """Whoever is in the middle of something, and under `no_grad`."""
    case = STREAMS[name]
    model, sample = case.model(), case.sample()
    with torch.no_grad(), in_use(model), left_as_found(model, sample.inputs):
        found = explainer(name, method).attribute_tokens(**asked(case, sample))
    for stream, values in explained(name, method)[1].items():
        assert not found[stream].requires_grad
        if not case.random:
            close(found[stream], values)


class Failure(Exception):
    """Raised inside the model."""


@every_model
def test_failure_leaves_no_trace(name: str, left_as_found: Any, in_use: Any) -> None:
    """In the model's last module, and at a target that there is not."""
    case = STREAMS[name]
    model, sample, explain = case.model(), case.sample(), explainer(name, "GenericAttention")
    ran: list[nn.Module] = []
    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_pre_hook(lambda m, _: ran.append(m)) for leaf in leaves]
    sample.run(model)
    for hook in hooks:
        hook.remove()

    def fail(module: nn.Module, args: tuple) -> None:
        raise Failure

    with in_use(model), left_as_found(model, sample.inputs):
        hook = ran[-1].register_forward_pre_hook(fail)
        try:
            with pytest.raises(Failure):
                explain.attribute(**asked(case, sample))
        finally:
            hook.remove()
        for target in out_of_range(case, sample):
            with pytest.raises(AttnError, match="(?s)target.*shape"):
                explain.attribute(sample.inputs, target)
    torch.manual_seed(0)
    found = explain.attribute_tokens(**asked(case, sample))
    for stream, values in explained(name, "GenericAttention")[1].items():
        close(found[stream], values)


def out_of_range(case: Streams, sample: Sample) -> list:
    """A class that there is not; of a query, position or class each one that there is not."""
    target = case.target_of(sample)
    target = target[0] if isinstance(target, list) else target
    if isinstance(target, tuple):
        return [(10**6, target[1]), (target[0], 10**6), (-(10**6), target[1]), target[0]]
    return [10**6, -(10**6), (0, 0)]


@every_model
def test_half_precision_models_are_explained_in_single(name: str) -> None:
    case = STREAMS[name]
    model = case.fresh().to(torch.bfloat16)
    sample = case.sample().to(torch.bfloat16)
    try:
        sample.run(model)
    except RuntimeError as error:
        if "must have the same dtype" not in str(error):
            raise
        pytest.skip("this version of transformers cannot run the model in bfloat16")
    torch.manual_seed(0)
    found = GenericAttention(model).attribute_tokens(**asked(case, sample))
    for stream, expected in explained(name, "GenericAttention")[1].items():
        values = found[stream]
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        alike = F.cosine_similarity(values.flatten(), expected.flatten(), 0)
        assert alike > 0.9, alike
