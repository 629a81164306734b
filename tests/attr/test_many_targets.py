"""Many targets of one forward pass: the same numbers as one call each, for less."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_attn import (
    AttentionRollout,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    objectives,
)
from captum_attn.attr import _run
from captum_attn.errors import OptionError, TargetError
from captum_attn.observe.capture import attention_call as observed_call
from tests.conftest import state_of
from tests.test_goldens_two_streams import detr as detr
from tests.test_goldens_two_streams import detr_image, lxmert_inputs
from tests.test_goldens_two_streams import lxmert as lxmert
from tests.zoo import ZOO, last_real

METHODS = [RawAttention, AttentionRollout, GenericAttention, HeterogenousAttention]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def same(found: Any, expected: Any) -> None:
    """Equal but for the order of sums: some rows of A are not summed like all of them."""
    if isinstance(expected, Mapping):
        assert list(found) == list(expected)
        for name in expected:
            same(found[name], expected[name])
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        scale = float(expected.abs().max())
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(found, expected, atol=100 * eps * scale, rtol=0)


def check(explain: Any, inputs: Any, targets: list, extra: Any = None, **options: Any) -> list:
    """Both forms against a call for every target, with the same random numbers."""

    def seeded(call: Callable[[], Any]) -> Any:
        torch.manual_seed(3)
        return call()

    each = seeded(lambda: list(explain.attribute_each(inputs, targets, extra, **options)))
    tokens = seeded(lambda: list(explain.attribute_tokens_each(inputs, targets, extra, **options)))
    assert len(each) == len(tokens) == len(targets)
    for laid, rows, target in zip(each, tokens, targets, strict=True):
        same(laid, seeded(lambda: explain.attribute(inputs, target, extra, **options)))  # noqa: B023
        same(rows, seeded(lambda: explain.attribute_tokens(inputs, target, extra, **options)))  # noqa: B023
    return tokens


# ------------------------------------------------------------------ equal to separate calls
@every_method
@pytest.mark.parametrize(
    "name", ["vit_cls", "vit_cls_unfused", "deit_distilled", "dinov2_registers", "bert", "vilt",
             "bert_embeddings", "encoder_mean", "talking_heads", "grouped_sdpa", "patchtst"],
)  # fmt: skip
def test_classifiers(name: str, method: type) -> None:
    """Batches of three, one target for all and one for each; ViLT draws its patches anew."""
    case = ZOO[name]
    sample = case.sample()
    explain = method(case.function(case.model()))
    last = 3 if name != "patchtst" else 2
    rows = check(
        explain, sample.inputs, [1, [0, 2, 1], last, torch.tensor([1, 1, 0])], sample.extra
    )
    if explain.needs_gradient:
        assert not torch.equal(rows[0][case.stream], rows[2][case.stream])


@every_method
@pytest.mark.parametrize("name", ["gpt2_right", "gpt2_left", "llama_right_eager"])
def test_language_models(name: str, method: type) -> None:
    """Every target has a position of its own, so that other rows are read out."""
    case = ZOO[name]
    sample = case.sample()
    last = last_real(sample)
    targets = [[(int(i) - back, 20 + b) for b, i in enumerate(last)] for back in (0, 1, 2)]
    rows = check(method(case.model()), sample.inputs, targets)
    assert not torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])


@every_method
def test_two_streams(lxmert: nn.Module, method: type) -> None:
    one, two = lxmert_inputs("in0"), lxmert_inputs("in1")
    inputs = {name: torch.cat([one[name], two[name]]) for name in one}
    check(method(lxmert), inputs, [0, torch.tensor([2, 1]), 3])


@every_method
def test_object_queries(detr: nn.Module, method: type) -> None:
    images = torch.cat([detr_image("in0"), detr_image("in0").flip(3)])
    check(method(detr), images, [(2, 1), [(0, 3), (4, 2)], (1, 1)])


def test_options_reach_every_target(lxmert: nn.Module) -> None:
    inputs = lxmert_inputs("in0")
    explain = HeterogenousAttention(lxmert, layers="lxmert.encoder.*")
    check(explain, inputs, [0, 1], correction="full", start_layer=1)
    check(explain, inputs, [0, 1], correction="absolute", noise_link=True)
    check(GenericAttention(lxmert), inputs, [0, 1], discard_self=True, normalize=False)
    check(
        GenericAttention(ZOO["vit_cls"].model()), ZOO["vit_cls"].sample().inputs, [0, 1], readout=3
    )
    check(AttentionRollout(lxmert), inputs, [0, 1], head_fusion="max")


def test_a_tuple_and_interpolation() -> None:
    case = ZOO["vit_cls"]
    inputs = (case.sample().inputs,)
    explain = GenericAttention(case.model())
    (found,) = explain.attribute_each(inputs, [2], interpolation="nearest")
    same(found, explain.attribute(inputs, 2, interpolation="nearest"))
    assert type(found) is tuple


# ------------------------------------------------------------------ which targets
def test_targets_by_the_model_s_output() -> None:
    case = ZOO["hf_vit_eager"]
    inputs, explain = case.sample().inputs, GenericAttention(case.model())
    given: list[Any] = []

    def likeliest(output: Any) -> Tensor:
        given.append(output)
        return output.logits.topk(2).indices.T  # (2, B)

    found = list(explain.attribute_each(inputs, likeliest))
    assert len(given) == 1 and type(given[0]).__name__ == "ImageClassifierOutput"
    for laid, target in zip(found, given[0].logits.topk(2).indices.T, strict=True):
        same(laid, explain.attribute(inputs, target))


def test_an_objective_for_each() -> None:
    case = ZOO["vit_cls"]
    inputs, explain = case.sample().inputs, GenericAttention(case.model())
    why = [objectives.logit_difference(3, 1), objectives.probability, None]
    found = explain.attribute_each(inputs, [None, 2, 1], objective=why)
    same(next(found), explain.attribute(inputs, objective=why[0]))
    same(next(found), explain.attribute(inputs, 2, objective=objectives.probability))
    same(next(found), explain.attribute(inputs, 1))
    one = explain.attribute_each(inputs, [2, 3], objective=objectives.probability)
    for laid, target in zip(one, [2, 3], strict=True):
        same(laid, explain.attribute(inputs, target, objective=objectives.probability))


def test_no_targets() -> None:
    case = ZOO["vit_cls"]
    assert list(GenericAttention(case.model()).attribute_each(case.sample().inputs, [])) == []


@pytest.mark.parametrize("targets", [3, "all", torch.tensor(3), None, 1.5])
def test_a_single_target_is_refused(targets: Any) -> None:
    case = ZOO["vit_cls"]
    with pytest.raises(TargetError, match="several targets.*use `attribute`"):
        GenericAttention(case.model()).attribute_each(case.sample().inputs, targets)


def test_bad_targets_are_refused_before_the_first_backward_pass(passes: Passes) -> None:
    case = ZOO["vit_cls"]
    explain = GenericAttention(passes.of(case.model()))
    with pytest.raises(TargetError, match="target 99 does not fit"):
        explain.attribute_each(case.sample().inputs, [1, 99])
    assert passes.backward == 0
    with pytest.raises(TargetError, match="one for each of the 2 targets; got 1"):
        explain.attribute_each(case.sample().inputs, [1, 2], objective=[objectives.logit])
    with pytest.raises(OptionError, match="unknown option 'power'"):
        explain.attribute_each(case.sample().inputs, [1, 2], power=2)
    with pytest.raises(OptionError, match="interpolation"):
        explain.attribute_each(case.sample().inputs, [1, 2], interpolation="cubic")


# ------------------------------------------------------------------ what is computed once
class Passes:
    """Counts a model's forward passes, and the backward passes that go through its output."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.output: Any = None

    def of(self, model: nn.Module) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = model(*args, **kwargs)
            logits = output if isinstance(output, Tensor) else output.logits
            self.forward += 1
            self.output = weakref.ref(logits)
            if logits.requires_grad:
                logits.register_hook(self._arrived)
            return output

        return run

    def _arrived(self, gradient: Tensor) -> None:
        self.backward += 1


@pytest.fixture
def passes() -> Passes:
    return Passes()


@every_method
@pytest.mark.parametrize("name", ["vit_cls", "gpt2_right", "detr"])
def test_one_forward_and_one_backward_each(
    name: str, method: type, passes: Passes, detr: nn.Module
) -> None:
    model = detr if name == "detr" else ZOO[name].model()
    inputs: Any = detr_image("in0") if name == "detr" else ZOO[name].sample(1).inputs
    targets = [0, 1, 2, 3] if name == "vit_cls" else [(i, 5) for i in range(4)]
    explain = method(passes.of(model))
    explain.attribute_tokens(inputs, targets[0])  # the first call also observes the readout
    passes.forward = passes.backward = 0
    assert len(list(explain.attribute_tokens_each(inputs, targets))) == 4
    assert (passes.forward, passes.backward) == (1, 4)
    for target in targets:
        explain.attribute_tokens(inputs, target)
    assert (passes.forward, passes.backward) == (5, 8)


@pytest.mark.parametrize(
    ("limit", "formed"), [(2**30, 3), (3 * 17 * 17 * 4 * 2, 1 + 3 * 2), (0, 9)]
)
def test_attention_maps_are_formed_once_where_they_fit(
    limit: int, formed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 calls, 3 targets; with 2 heads a map of the batch has 3 x 2 x 17 x 17 floats."""
    case, count = ZOO["vit_cls"], []
    inputs, explain = case.sample().inputs, GenericAttention(case.model())
    expected = [explain.attribute(inputs, target) for target in range(3)]
    heads = explain.layer_maps(inputs, 0)[0][1].shape[1]
    plain = observed_call.attention_map

    def counted(*args: Any) -> Tensor:
        count.append(1)
        return plain(*args)

    monkeypatch.setattr(observed_call, "attention_map", counted)
    monkeypatch.setattr(_run, "attention_map", counted)
    monkeypatch.setattr(_run, "KEPT_MAPS", limit * heads // 2)
    same(tuple(explain.attribute_each(inputs, range(3), block_size=100)), tuple(expected))
    assert len(count) == formed


@pytest.mark.parametrize("name", ["vit_cls", "lxmert"])
def test_class_agnostic_maps_are_made_once(name: str, lxmert: nn.Module) -> None:
    class Counting(AttentionRollout):
        formed = 0

        def weigh_heads(self, run: Any, block: Any) -> Tensor:
            self.formed += 1
            return super().weigh_heads(run, block)

    model = lxmert if name == "lxmert" else ZOO[name].model()
    inputs = lxmert_inputs("in0") if name == "lxmert" else ZOO[name].sample().inputs
    explain = Counting(model)
    explain.attribute(inputs, 0, block_size=100)
    once, explain.formed = explain.formed, 0
    check_each = list(explain.attribute_each(inputs, [0, 1, 2], block_size=100))
    assert explain.formed == once > 0
    same(check_each[1], explain.attribute(inputs, 1))


# ------------------------------------------------------------------ a guest in the user's program
def test_the_model_is_as_found_between_the_steps(in_use: Callable) -> None:
    case = ZOO["bert"]
    model, inputs = case.fresh(), dict(case.sample().inputs)
    with in_use(model):
        before = state_of(model, inputs)
        each = GenericAttention(model).attribute_each(inputs, [0, 1, 2])
        for _ in range(3):
            assert state_of(model, inputs) == before
            next(each)
        assert state_of(model, inputs) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around(mode: Callable) -> None:
    case = ZOO["vit_cls"]
    inputs, explain = case.sample().inputs, GenericAttention(case.model())
    expected = [explain.attribute(inputs, target) for target in (1, 2)]
    with mode():
        found = list(explain.attribute_each(inputs, [1, 2]))
    same(tuple(found), tuple(expected))
    assert not any(laid.requires_grad or laid.is_inference() for laid in found)


def test_the_model_may_be_used_between_the_steps() -> None:
    case = ZOO["vit_cls"]
    model, inputs = case.fresh(), case.sample().inputs
    explain = GenericAttention(model)
    each = explain.attribute_each(inputs, [1, 2])
    other = list(explain.attribute_each(inputs, [3]))  # of the same object, in between
    model(inputs).sum().backward()
    same(next(each), explain.attribute(inputs, 1))
    model.zero_grad()
    same(next(each), explain.attribute(inputs, 2))
    same(other[0], explain.attribute(inputs, 3))


@pytest.mark.parametrize("to_the_end", [True, False])
def test_the_graph_is_freed(to_the_end: bool, passes: Passes) -> None:
    case = ZOO["vit_cls"]
    each = GenericAttention(passes.of(case.model())).attribute_each(case.sample().inputs, [1, 2])
    next(each)
    gc.collect()
    assert passes.output() is not None
    if to_the_end:
        assert len(list(each)) == 1
    else:
        del each
    gc.collect()
    assert passes.output() is None


@pytest.mark.parametrize("shown", [True, False])
def test_progress(shown: bool, capsys: pytest.CaptureFixture) -> None:
    case = ZOO["vit_cls"]
    explain = AttentionRollout(case.model())
    each = explain.attribute_tokens_each(case.sample().inputs, [0, 1], show_progress=shown)
    assert len(list(each)) == 2
    text = capsys.readouterr().err
    assert ("Attention Rollout attribution" in text and "2/2" in text) if shown else not text
