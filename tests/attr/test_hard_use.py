"""No raw error, no number that is none and no model left otherwise, whatever a call is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_attn import (
    AttentionRollout,
    AttnLRP,
    BeyondIntuition,
    GenericAttention,
    TransformerInputSampling,
    TransitionAttention,
    VitCX,
    VTranM,
    objectives,
)
from captum_attn.errors import AttnError, InputError, OptionError, ReadoutError, TargetError
from tests.attr import hard
from tests.test_bad_input import Normalised
from tests.zoo import ZOO

# Methods for a kind of model or input, which refuse the others by name.
MEANT = ("Odam", "TransformerInputSampling", "VitCX")
CALLS, WRONG = hard.calls(), hard.wrong_values()


@pytest.fixture
def pictures() -> tuple[nn.Module, Tensor]:
    model, images, _ = hard.CASES["pictures"]
    return model, images


@pytest.mark.parametrize("case", hard.CASES)
def test_the_right_calls_are_right(case):
    for name, (function, arguments) in CALLS.items():
        if name.endswith(f" of {case}"):
            kind, text = hard.outcome(name, lambda f=function, a=arguments: f(**a))
            has_none = "_maps of" in name and "matrices of tokens by tokens" in text
            meant = name.startswith(MEANT) and kind == "refused"
            assert kind == "fine" or has_none or meant, (name, text)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_wrong_values_are_refused(data):
    name = data.draw(st.sampled_from(sorted(CALLS)))
    function, arguments = CALLS[name]
    names = st.sampled_from(hard.arguments_of(function))
    chosen = data.draw(st.lists(names, min_size=1, max_size=3, unique=True))
    labels = {argument: data.draw(st.sampled_from(sorted(WRONG))) for argument in chosen}
    wrong = {argument: WRONG[label] for argument, label in labels.items()}
    kind, text = hard.outcome(name, lambda: function(**{**arguments, **wrong}))
    assert kind in ("fine", "refused", "model"), (name, labels, kind, text)


@pytest.mark.slow
def test_one_wrong_value_after_the_other():
    found = list(hard.tried(every=23))
    assert len(found) > 4000
    assert [case for case in found if case[3] in ("raw", "nan", "left")] == []


# ------------------------------------------------------------------ targets counted from the end
@pytest.mark.parametrize(
    "target",
    [torch.tensor([0, -1]), [0, -1], torch.tensor([-3, -1]), torch.tensor([2, -2]).short()],
    ids=str,
)
@pytest.mark.parametrize("size", [None, 1, 2])
def test_targets_counted_from_the_end(target, size, pictures):
    """With and without `internal_batch_size`, as a single int is taken."""
    model, images = pictures
    found = GenericAttention(model).attribute(images, target, internal_batch_size=size)
    for i, one in enumerate(target):
        alone = GenericAttention(model).attribute(images[i : i + 1], int(one) % 3)
        torch.testing.assert_close(found[i : i + 1], alone)


@pytest.mark.parametrize(
    "target", [torch.tensor([0, -4]), [0, 3], torch.tensor([[0], [1]]), torch.tensor([True, False]),
               torch.tensor([0.0, 1.0])], ids=str
)  # fmt: skip
@pytest.mark.parametrize("size", [None, 1, 2])
def test_targets_that_are_none(target, size, pictures):
    model, images = pictures
    with pytest.raises(TargetError):
        GenericAttention(model).attribute(images, target, internal_batch_size=size)


@pytest.mark.parametrize(
    "target",
    [torch.zeros(2, dtype=torch.long, device="meta"),
     [torch.zeros((), dtype=torch.long, device="meta")] * 2],
    ids=["a tensor", "a list"],
)  # fmt: skip
@pytest.mark.parametrize("method", [GenericAttention, AttnLRP, AttentionRollout])
def test_classes_without_values(method, target, pictures):
    """torch reads whatever the memory holds at their places."""
    model, images = pictures
    with pytest.raises(TargetError, match="target: .* holds no values"):
        method(model).attribute(images, target)


# ------------------------------------------------------------------ options
@pytest.mark.parametrize("option", [{"readout": 0}, {"start_layer": 1}], ids=str)
@pytest.mark.parametrize("entry", ["attribute_each", "attribute_tokens_each"])
def test_what_starts_from_the_output_reads_no_row(entry, option, pictures):
    model, images = pictures
    with pytest.raises(OptionError, match=f"{next(iter(option))}: .*starts from the explained"):
        list(getattr(AttnLRP(model), entry)(images, [0, 1], **option))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"readout": None}, ReadoutError, "readout: expected 'auto', an int"),
        ({"readout": 2**70}, ReadoutError, r"readout: .* in \[-4, 4\)"),
        ({"readout": torch.tensor([True, False])}, ReadoutError, "readout: .* of torch.bool"),
        ({"readout": torch.zeros(2, device="meta")}, ReadoutError, "'meta', which has none"),
        ({"objective": "x"}, TargetError, "objective: expected a callable"),
        ({"objective": lambda output, target: 1 / 0}, TargetError, "objective: failed on an outpu"),
        ({"objective": lambda output, target: torch.zeros(2, requires_grad=True)}, TargetError,
         "zero at every attention call"),
        ({"objective": lambda output, target: output[:, 0] * 0}, TargetError,
         "zero at every attention call"),
        ({"start_layer": 1.0}, OptionError, "start_layer: expected a whole number"),
        ({"interpolation": torch.ones(2)}, OptionError, "interpolation: expected one of"),
        ({"block_size": 2**70}, OptionError, "block_size: expected an int"),
    ],
)  # fmt: skip
def test_a_wrong_option(options, error, words, pictures):
    model, images = pictures
    with pytest.raises(error, match=words):
        GenericAttention(model).attribute(images, 1, **options)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (VitCX, {"noise": torch.zeros(1, 3, 8, 8, device="meta")}, "noise: .* on 'meta'"),
        (VitCX, {"masks": torch.ones(1, 8, 8).to_sparse()}, "masks: .* of layout torch.sparse"),
        (TransformerInputSampling, {"centroids": torch.ones(2, 4, device="meta")}, "centroids: "),
        (TransformerInputSampling, {"keep": []}, "keep: expected a share or several"),
    ],
)  # fmt: skip
def test_tensors_and_lists_of_options(method, options, words, pictures):
    with pytest.raises(OptionError, match=words):
        method(pictures[0]).attribute(pictures[1], 1, **options)


def test_an_image_whose_patches_are_all_alike_makes_no_mask(pictures):
    model, images = pictures
    both = torch.stack([images[0], torch.ones_like(images[0])])
    with pytest.warns(UserWarning, match="make no mask and its map is zero"):
        found = VitCX(model).attribute(both, 1)
    with pytest.warns(UserWarning, match="make no mask and its map is zero"):
        assert not VitCX(model).attribute(both[1:], 1).any()
    assert not found[1].any()
    torch.testing.assert_close(found[:1], VitCX(model).attribute(both[:1], 1))
    assert found[0].any()


@pytest.mark.parametrize("entry", hard.ENTRIES)
@pytest.mark.parametrize("method", [BeyondIntuition, TransitionAttention])
@pytest.mark.parametrize(
    ("case", "baselines"),
    [("pictures", torch.ones(3, 3, 8, 8)), ("pictures", {"imagess": 0.0}), ("pictures", (0.0, 0.0)),
     ("pictures", float("nan")), ("pictures", {"images": torch.full((8,), torch.inf)}),
     ("texts", torch.ones(3, 5, 8)), ("texts", {"input_ids": 0}), ("texts", float("nan"))],
)  # fmt: skip
def test_baselines_that_do_not_fit(entry, method, case, baselines):
    """Calls that do not walk the path refuse them as well."""
    call, arguments = CALLS[f"{method.__name__}.{entry} of {case}"]
    with pytest.raises(OptionError, match="^baselines: expected"):
        call(**arguments, baselines=baselines)


@pytest.mark.parametrize("layers", [3, [3], b"x", torch.ones(2), {"a": 1}, [None]], ids=repr)
def test_layers_that_are_none(layers, pictures):
    with pytest.raises(OptionError, match="layers: expected a module, a pattern"):
        GenericAttention(pictures[0], layers=layers)


def test_a_class_is_no_model():
    with pytest.raises(OptionError, match="got the class Pictures: pass an object of it"):
        GenericAttention(hard.Pictures)


@pytest.mark.parametrize(
    ("targets", "words"),
    [(3, "several targets"), ({"a": 1}, "several targets"), (b"x", "several targets"),
     (lambda output: 1 / 0, "failed on the model's output"), (lambda output: 1, "several targets")],
)  # fmt: skip
def test_targets_of_many_that_are_none(targets, words, pictures):
    model, images = pictures
    with pytest.raises(TargetError, match=words):
        GenericAttention(model).attribute_each(images, targets)


def test_arguments_that_the_model_does_not_take(pictures):
    model, images = pictures
    with pytest.raises(InputError, match=r"called with the inputs \['pixels'\].*takes \(images"):
        GenericAttention(model).attribute({"pixels": images}, 1)
    with pytest.raises(InputError, match="called with 2 inputs in order"):
        GenericAttention(model).attribute(images, 1, images)


def test_a_type_error_of_the_model_keeps_its_words(pictures):
    def broken(images: Tensor) -> Tensor:
        pictures[0](images)
        raise TypeError("mine")

    with pytest.raises(TypeError, match="^mine$") as error:
        GenericAttention(broken).attribute(pictures[1], 1)
    assert not isinstance(error.value, AttnError)


# ------------------------------------------------------------------ outputs
OUTPUTS: dict[str, Any] = {
    "classes": lambda output: output.argmax(1), "flags": lambda output: output > 0,
    "complex": lambda output: output.to(torch.complex64), "one number": lambda output: output.sum(),
    "no rows": lambda output: output[:0], "no columns": lambda output: output[:, :0],
    "a row more": lambda output: torch.cat([output, output[:1]]), "none": lambda output: None,
    "sparse": lambda output: output.to_sparse(), "meta": lambda output: output.to("meta"),
    "nan": lambda output: output * float("nan"), "a str": lambda output: "x",
    "detached": lambda output: output.detach(), "nothing": lambda output: (),
    "a constant": lambda output: torch.ones(2, 3, requires_grad=True),
    "an array": lambda output: output.detach().numpy(),
}  # fmt: skip


@pytest.mark.parametrize("made", OUTPUTS)
@pytest.mark.parametrize("method", hard.METHODS.values(), ids=lambda method: method.__name__)
def test_outputs_that_cannot_be_explained(method, made, pictures):
    model, images = pictures
    change = OUTPUTS[made]
    explain = method(lambda x: change(model(x)))
    entries = ["attribute", "attribute_tokens"]
    if method.needs_gradient or made not in ("classes", "flags", "detached", "a constant"):
        entries += ["relevance_maps", "layer_maps"]  # without a gradient, these have no output
    for entry in entries:
        for target in (1, None):
            with pytest.raises(AttnError):
                getattr(explain, entry)(images, target)


# ------------------------------------------------------------------ batch statistics
@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("method", [GenericAttention, VTranM, AttentionRollout])
def test_many_targets_with_batch_norm_in_train_mode(method, left_as_found):
    """The second target's backward pass finds the statistics as the forward pass left them."""
    model, inputs = Normalised(first=True).eval(), ZOO["by_matmul"].sample().inputs
    model.norm.train()
    alone = [method(model).attribute(inputs, target) for target in range(3)]
    with left_as_found(model, inputs):
        found = list(method(model).attribute_each(inputs, range(3)))
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)


class Rebinding(nn.Module):
    """Puts another tensor in place of a buffer: of another size, and of the same numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("alike", torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        self.table, self.alike = torch.linspace(0, 1, 4), self.alike.clone()
        return self.model(images) + self.table[0]


@pytest.mark.parametrize("method", [GenericAttention, AttnLRP])
def test_buffers_that_the_forward_binds_anew(method, pictures, left_as_found):
    model, images = Rebinding(pictures[0]), pictures[1]
    with left_as_found(model, images):
        found = method(model).attribute(images, 1)
    torch.testing.assert_close(found, method(pictures[0]).attribute(images, 1))


def test_an_objective_that_is_saturated_is_no_zero_map(pictures):
    """A probability of exactly 1 has no gradient: its maps would be zero."""
    model, images = pictures

    def certain(x: Tensor) -> Tensor:
        return 1e4 * model(x)

    likely: Any = model(images).argmax(1)
    with pytest.raises(TargetError, match="saturated"):
        GenericAttention(certain).attribute(images, likely, objective=objectives.probability)


# ------------------------------------------------------------------ code that is recorded
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [GenericAttention, AttnLRP])
def test_explaining_inside_compiled_code(method, pictures, left_as_found):
    model, images = pictures
    explain = method(model)
    expected = explain.attribute(images, 1)
    compiled = torch.compile(lambda x: explain.attribute(x, 1), backend="eager")
    apart = torch.compiler.disable(explain.attribute)
    with left_as_found(model, images), pytest.raises(AttnError, match="part of compiled code"):
        compiled(images)
    beside = torch.compile(lambda x: apart(x, 1) + 1, backend="eager")
    torch.testing.assert_close(beside(images), expected + 1)
    torch.testing.assert_close(explain.attribute(images, 1), expected)


@pytest.mark.filterwarnings("ignore")
def test_explaining_inside_compiled_code_without_breaks(pictures):
    """torch raises an error of its own then, which quotes the package's."""
    model, images = pictures
    explain = GenericAttention(model)
    for call in (explain.attribute, lambda x, _: GenericAttention(model).attribute(x, 1)):
        compiled = torch.compile(lambda x, f=call: f(x, 1), backend="eager", fullgraph=True)
        with pytest.raises(RuntimeError, match="AttnError.*explaining cannot be part of compiled"):
            compiled(images)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [GenericAttention, VTranM, AttnLRP])
def test_models_compiled_without_breaks(method, pictures):
    model, images = pictures
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(images)
    torch.testing.assert_close(
        method(compiled).attribute(images, 1), method(model).attribute(images, 1)
    )
    assert torch.equal(compiled(images), plain)


# ------------------------------------------------------------------ a default device
class Places(nn.Module):
    """Reads where tensors are made that name no device."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, set[str]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.add(torch.zeros(1).device.type)
        return self.model(images)


@pytest.mark.parametrize(
    "method",
    [m for m in hard.METHODS.values() if m.__name__ not in MEANT],
    ids=lambda m: m.__name__,
)
def test_a_default_device_is_the_models_alone(method, pictures):
    """On "meta" every tensor of the package's that names no device would have no numbers."""
    model, images = Places(pictures[0]), pictures[1]

    def objective(output: Tensor, target: Any) -> Tensor:
        model.seen.add(torch.zeros(1).device.type)
        return output[:, 1]

    expected = method(model).attribute(images, objective=objective)
    assert model.seen == {"cpu"}
    model.seen.clear()
    with torch.device("meta"):
        found = method(model).attribute(images, objective=objective)
        described = str(method(model).describe(images, 1))
        assert torch.zeros(1).is_meta
    torch.testing.assert_close(found, expected)
    assert model.seen == {"meta"}
    assert described == str(method(model).describe(images, 1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [GenericAttention, AttnLRP])
def test_explaining_inside_a_traced_function(method, pictures, left_as_found):
    model, images = pictures
    explain = method(model)
    with left_as_found(model, images), pytest.raises(AttnError, match=r"what `torch.jit.trace` re"):
        torch.jit.trace(lambda x: explain.attribute(x, 1), (images,))
