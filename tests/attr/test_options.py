"""Options: typed, refused early, shown by `inspect.signature` and `help`; and the open base."""

from __future__ import annotations

import inspect
import pydoc
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from captum_attn import (
    CPLRP,
    AttCAT,
    AttentionGradCam,
    AttentionRollout,
    AttnLRP,
    BeyondIntuition,
    ConservativeLRP,
    DeepIntegratedExplanations,
    GenericAttention,
    GradEclip,
    GradSam,
    HeterogenousAttention,
    PartialLRP,
    RawAttention,
    TransformerAttribution,
    TransformerLRP,
    TransitionAttention,
    VTranM,
)
from captum_attn.attr import AttentionAttribution, Block, Result, Run
from captum_attn.errors import AttnError, OptionError
from tests.zoo import ZOO
from tests.zoo_streams import STREAMS

OWN = {
    RawAttention: {"layer": -1},
    AttentionRollout: {"head_fusion": "mean"},
    GenericAttention: {
        "normalize": True, "self_in_rule_10": True, "aggregate": True, "discard_self": False,
        "relevance": "attention",
    },
    HeterogenousAttention: {"correction": "positive", "noise_link": False, "part": "all"},
    AttnLRP: {"rules": None, "eps": 0.0, "gamma": None, "gamma_attention": True},
    CPLRP: {"rules": None, "eps": 0.0, "gamma": None, "gamma_attention": True},
    ConservativeLRP: {"rules": None, "norm": "mean"},
    TransformerLRP: {"rules": None, "renorm": True, "joint": True},
    PartialLRP: {"layer": -1, "renorm": True, "joint": True, "rules": None},
    TransformerAttribution: {
        "normalize": False, "renorm": True, "joint": True, "rules": None,
    },
    VTranM: {"length": True, "direction": True, "aggregate": True},
    AttentionGradCam: {"weights": "map"},
    GradSam: {"axis": "key"},
    AttCAT: {},
    GradEclip: {"layers_explained": 1, "similarity": True},
    BeyondIntuition: {
        "n_steps": 20, "baselines": None, "show_progress": False, "perception": "head",
    },
    TransitionAttention: {
        "n_steps": 20, "baselines": None, "show_progress": False, "normalize": False,
    },
    DeepIntegratedExplanations: {
        "n_steps": 10, "layers_integrated": (-1, -2), "show_progress": False,
    },
}  # fmt: skip
CALLS = (
    "attribute", "attribute_tokens", "attribute_each", "attribute_tokens_each", "relevance_maps",
    "layer_maps", "describe",
)  # fmt: skip
every_method = pytest.mark.parametrize("method", OWN, ids=lambda method: method.__name__)


def case() -> tuple[nn.Module, Tensor]:
    return ZOO["vit_cls"].model(), ZOO["vit_cls"].sample().inputs


# ------------------------------------------------------------------ what is shown
@every_method
@pytest.mark.parametrize("call", CALLS)
def test_signatures_show_the_options_keyword_only(method: type, call: str) -> None:
    for of in (getattr(method, call), getattr(method(case()[0]), call)):
        parameters = inspect.signature(of).parameters
        expected = {**OWN[method], "block_size": None, "mixing_draws": None, "leave_out": ()}
        if call.endswith("_each"):  # where the bar is over the targets
            expected.pop("show_progress", None)
        assert list(parameters)[-len(expected) :] == list(expected)
        for name, default in expected.items():
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters[name].default == default
        assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_the_rest_of_the_signature_is_as_it_was_and_help_shows_it() -> None:
    shown = inspect.signature(GenericAttention.attribute).parameters
    plain = inspect.signature(AttentionAttribution.attribute).parameters
    assert list(plain)[:-1] == list(shown)[: len(plain) - 1] and list(plain)[-1] == "options"
    text = pydoc.render_doc(HeterogenousAttention.attribute, renderer=pydoc.plaintext)
    assert "correction: Literal['positive', 'full', 'absolute'] = 'positive'" in text
    assert "Relevance of every element of the inputs" in text


def test_a_method_of_a_method_shows_both_options() -> None:
    class Child(GenericAttention):
        @dataclass(frozen=True)
        class Options(GenericAttention.Options):
            power: float = 1.0

    names = list(inspect.signature(Child.attribute).parameters)
    expected = [*OWN[GenericAttention], "power", "block_size", "mixing_draws", "leave_out"]
    assert names[-len(expected) :] == expected
    assert "power" not in inspect.signature(GenericAttention.attribute).parameters
    model, inputs = case()
    found = Child(model).attribute(inputs, 1, power=2)
    torch.testing.assert_close(found, GenericAttention(model).attribute(inputs, 1))


def test_an_override_may_call_the_one_above() -> None:
    class Doubled(RawAttention):
        def attribute(self, inputs: Any, target: Any = None, **options: Any) -> Any:
            """Twice as much."""
            return 2 * super().attribute(inputs, target, **options)

    model, inputs = case()
    assert "layer" in inspect.signature(Doubled.attribute).parameters
    assert Doubled.attribute.__doc__ == "Twice as much."
    torch.testing.assert_close(
        Doubled(model).attribute(inputs, layer=0),
        2 * RawAttention(model).attribute(inputs, layer=0),
    )


# ------------------------------------------------------------------ what is refused
REFUSED = [
    (GenericAttention, {"power": 2}, "unknown option 'power'; Generic Attention .* has: normalize"),
    (GenericAttention, {"normalize": 1}, r"normalize: expected one of \(True, False\), got 1"),
    (GenericAttention, {"aggregate": None}, r"aggregate: expected one of \(True, False\)"),
    (HeterogenousAttention, {"correction": "none"}, r"correction: expected one of \('positive', "),
    (HeterogenousAttention, {"part": True}, "part: expected one of"),
    (HeterogenousAttention, {"correction": "full", "noise_link": True}, "noise_link: expected Fal"),
    (AttentionRollout, {"head_fusion": "sum"}, r"head_fusion: expected one of \('mean', 'max'"),
    (RawAttention, {"layer": 1.5}, "layer: expected an int or a str or a Module, got 1.5"),
    (RawAttention, {"layer": True}, "layer: expected an int"),
    (VTranM, {"block_size": True}, "block_size: expected an int >= 1 or None, got True"),
    (VTranM, {"block_size": "8"}, "block_size: expected an int >= 1 or None, got '8'"),
    (VTranM, {"leave_out": "sink"}, r"leave_out: expected some of \('sink', 'self'\) in a tuple, "),
    (VTranM, {"leave_out": ("first",)}, r"leave_out: expected some of \('sink', 'self'\)"),
    (VTranM, {"leave_out": (["sink"],)}, r"leave_out: expected some of \('sink', 'self'\)"),
]


@pytest.mark.parametrize(("method", "options", "message"), REFUSED)
def test_bad_options_are_refused_before_the_model_runs(
    method: type, options: dict, message: str
) -> None:
    def never(images: Tensor) -> Tensor:
        raise AssertionError("the model ran")

    with pytest.raises(OptionError, match=message):
        method(never).attribute(torch.zeros(1, 3, 8, 8), **options)


def test_a_stream_of_which_no_call_is_left_is_refused() -> None:
    """One of CLIP's two towers is left out: nothing can be shown for it."""
    case = STREAMS["clip"]
    sample = case.sample()
    explain = RawAttention(case.function(case.model()), layers="text_model*")
    with pytest.raises(OptionError, match="no attention call of 'pixel_values' is left"):
        explain.attribute(sample.inputs, case.target_of(sample), objective=case.objective)


def test_options_are_frozen_and_check_themselves() -> None:
    options = GenericAttention.Options(normalize=False)
    assert (options.normalize, options.aggregate, options.block_size) == (False, True, None)
    with pytest.raises(FrozenInstanceError):
        options.normalize = True  # type: ignore[misc]
    with pytest.raises(OptionError, match="normalize"):
        GenericAttention.Options(normalize="no")  # type: ignore[arg-type]
    assert HeterogenousAttention.Options.choices("part") == ("all", "homogenous")
    assert HeterogenousAttention.Options.choices("noise_link") == ()


@dataclass(frozen=True)
class Many(AttentionAttribution.Options):
    power: float = 1.0
    steps: int | None = None
    name: Literal["a", "b", 1] = "a"


@pytest.mark.parametrize("options", [{"power": 2}, {"steps": 3}, {"steps": None}, {"name": 1}])
def test_values_that_fit_their_types(options: dict) -> None:
    assert vars(Many(**options)) == vars(Many()) | options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": True}, "power: expected a number, got True"),
        ({"power": "2"}, "power: expected a number, got '2'"),
        ({"steps": 1.0}, "steps: expected an int or None, got 1.0"),
        ({"name": True}, "name: expected one of"),
        ({"name": torch.zeros(2)}, "name: expected one of"),
    ],
)
def test_values_that_do_not(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Many(**options)


# ------------------------------------------------------------------ the open base
class FromElements(AttentionAttribution):
    """Relevance of the input's own elements: the sum of Q, K and V of every call, as a number."""

    def explain(self, run: Run) -> Result:
        total = run.like.new_zeros(run.batch)
        for state in run.attention_states:
            block = Block(state.call)
            for operand in (block.queries(), block.keys(), block.values()):
                total = total + operand.flatten(1).sum(1)
        return Result(run, None, {"x": total[:, None, None, None].expand(-1, 3, 24, 40)})


def test_relevance_of_elements_is_laid_out_as_it_is() -> None:
    model, inputs = case()
    seen: list[Tensor] = []

    class Elements(FromElements):
        def explain(self, run: Run) -> Result:
            value = torch.arange(inputs.numel(), dtype=torch.float32).view(inputs.shape)
            seen.append(value)
            return Result(run, None, {run.observation.names[0]: value})

    found = Elements(model).attribute(inputs, 1)
    assert torch.equal(found, seen[0])
    with pytest.raises(AttnError, match="relevance of the inputs' elements, not of tokens"):
        Elements(model).attribute_tokens(inputs, 1)


@pytest.mark.parametrize("name", ["vit_cls", "llama_right_eager", "grouped_sdpa"])
def test_blocks_hand_out_q_k_and_v_of_their_rows(name: str) -> None:
    """A from Q and K, and the output's gradient through V, as `Block` forms them itself."""
    sample = ZOO[name].sample()
    checked = []

    class Looks(GenericAttention):
        def weigh_heads(self, run: Run, block: Block) -> Tensor:
            some = Block(block.call, torch.tensor([1, 3]))
            q, k, v = some.queries(), some.keys(), some.values()
            shape = (run.batch, block.call.windows, block.call.heads)
            assert q.shape[:4] == (*shape, 2) and k.shape[:4] == (*shape, some.n_k)
            assert v.shape[:4] == (*shape, some.n_k)
            if block.call.mask is None and block.call.weights is None and not block.call.is_causal:
                scale = q.shape[-1] ** -0.5 if block.call.scale is None else block.call.scale
                torch.testing.assert_close((q @ k.mT * scale).softmax(-1), some.attention())
            gradient = run.backward.gradients[block.call]
            rows = block.call.output_rows(gradient)[..., [1, 3], :]
            torch.testing.assert_close(rows @ v.mT, run.attention_gradient(some))
            checked.append(block)
            return super().weigh_heads(run, block)

    explain = Looks(ZOO[name].function(ZOO[name].model()))
    explain.attribute(sample.inputs, ZOO[name].target_of(sample), sample.extra, block_size=100)
    assert checked


def test_a_gradient_that_does_not_exist_is_zeros() -> None:
    """The second class of a head that reads no attention but the first layer's."""
    model, inputs = case()
    found = []

    class Looks(GenericAttention):
        def weigh_heads(self, run: Run, block: Block) -> Tensor:
            run.backward.gradients[block.call] = None
            gradient = run.attention_gradient(block)
            assert gradient.shape == block.attention().shape
            assert gradient.dtype == block.attention().dtype
            found.append(gradient)
            return super().weigh_heads(run, block)

    maps = Looks(model).layer_maps(inputs, 1)
    assert found and all(not gradient.any() for gradient in found)
    assert all(not weighed.any() for _, weighed in maps)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_method_may_run_the_model_again(scale: float) -> None:
    """The mean of A ⊙ ∇A over the input and a scaled one, as two separate calls give it."""
    model, inputs = case()

    class Mean(GenericAttention):
        def relevance(self, run: Run) -> dict:
            again = run.rerun(inputs * scale)
            assert not torch.is_grad_enabled()
            one, other = super().relevance(run), super().relevance(again)
            by_name = {source.name: rows for source, rows in other.items()}
            return {x: (rows + by_name[x.name]) / 2 for x, rows in one.items()}

    explain = GenericAttention(model)
    for target in (1, [0, 2, 1]):
        found = Mean(model).attribute_tokens(inputs, target)["x"]
        one, other = (explain.attribute_tokens(x, target)["x"] for x in (inputs, inputs * scale))
        torch.testing.assert_close(found, (one + other) / 2)
    each = Mean(model).attribute_tokens_each(inputs, [1, 2])
    for found, target in zip(each, [1, 2], strict=True):
        expected = Mean(model).attribute_tokens(inputs, target)["x"]
        torch.testing.assert_close(found["x"], expected)


def test_a_rule_cannot_write_into_what_is_read() -> None:
    model, inputs = case()

    class Writes(GenericAttention):
        def relevance(self, run: Run) -> dict:
            run.weights.clear()  # type: ignore[attr-defined]
            return {}

    with pytest.raises(AttributeError):
        Writes(model).attribute(inputs, 1)
