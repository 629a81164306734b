"""What bad input gets, and what unusual but valid models get: an error that says what to do, or the
stated behaviour; and the model as before in either case."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_attn import AttentionRollout, GenericAttention, HeterogenousAttention, RawAttention
from captum_attn.errors import (
    AttnError,
    InputError,
    NoAttentionFoundError,
    OptionError,
    ReadoutError,
    TargetError,
    WiringError,
)
from tests.zoo import ZOO, Attention, bert, by_sdpa, masked_fill, set_weights
from tests.zoo_streams import IMAGE, STREAMS, with_backbone

METHODS = [RawAttention, AttentionRollout, GenericAttention]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def vit() -> nn.Module:
    return ZOO["vit_cls"].model()


@pytest.fixture
def images() -> Tensor:
    return ZOO["vit_cls"].sample().inputs


def test_every_error_is_a_value_error() -> None:
    for error in (
        InputError, NoAttentionFoundError, OptionError, ReadoutError, TargetError, WiringError,
    ):  # fmt: skip
        assert issubclass(error, AttnError)
    assert issubclass(AttnError, ValueError)


# ------------------------------------------------------------------ targets
@pytest.mark.parametrize(
    "target",
    [5, -6, (1, 1), [0, 1], [0, 1, 9], torch.tensor([0, 1]), torch.tensor([[0], [1], [2]]), "cat",
     1.5, [0.5, 0.5, 0.5]],
    ids=str,
)  # fmt: skip
@every_method
def test_wrong_target(
    method: Any, target: Any, vit: nn.Module, images: Tensor, left_as_found: Any
) -> None:
    with (
        left_as_found(vit, images),
        pytest.raises((AttnError, AssertionError, IndexError)) as error,
    ):
        method(vit).attribute(images, target=target)
    message = str(error.value).lower()
    assert any(word in message for word in ("target", "bound", "range", "index"))


def test_missing_target(vit: nn.Module, images: Tensor, left_as_found: Any) -> None:
    with left_as_found(vit, images), pytest.raises((AttnError, AssertionError), match="(?i)target"):
        GenericAttention(vit).attribute(images)


@pytest.mark.parametrize(
    "objective",
    [lambda output, target: output, lambda output, target: output.sum(),
     lambda output, target: 3.0, lambda output, target: output[:, 1].detach()],
    ids=["matrix", "scalar", "number", "detached"],
)  # fmt: skip
def test_objective_that_is_no_scalar_per_example(
    objective: Callable, vit: nn.Module, images: Tensor, left_as_found: Any
) -> None:
    with left_as_found(vit, images), pytest.raises(AttnError, match="(?i)objective|gradient"):
        GenericAttention(vit).attribute(images, target=1, objective=objective)


# ------------------------------------------------------------------ inputs
@every_method
def test_empty_batch(method: Any, vit: nn.Module, images: Tensor, left_as_found: Any) -> None:
    with left_as_found(vit), pytest.raises(AttnError, match="(?i)empty|batch|example"):
        method(vit).attribute(images[:0], target=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a text", r'got str; pass tokenizer\(text, return_tensors="pt"\)'),
        (["a", "b"], 'return_tensors="pt"'),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, 'pass return_tensors="pt" to the'),
        ({"input_ids": np.ones((1, 2), int)}, 'pass return_tensors="pt" to the'),
        ([[1, 2]], r"torch.tensor\(\[ids\]\)"),
        ([torch.rand(1, 2)], "a tuple of them"),
        (np.ones((1, 2)), "torch.from_numpy"),
        (Image.new("RGB", (8, 8)), "processor"),
    ],
    ids=range(8),
)
def test_what_is_no_tensor_is_told_how_to_become_one(given: Any, said: str, vit: nn.Module) -> None:
    with pytest.raises(InputError, match=said):
        GenericAttention(vit).attribute(given, target=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@every_method
def test_not_a_number_in_the_inputs(
    method: Any, value: float, vit: nn.Module, images: Tensor, left_as_found: Any
) -> None:
    images = images.clone()
    images[1, 0, 3, 3] = value
    with left_as_found(vit, images), pytest.raises(AttnError, match="(?i)nan|inf|finite"):
        method(vit).attribute(images, target=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "blocks.2.mlp.fc1.bias", "head.bias"])
def test_not_a_number_in_the_weights(
    name: str, value: float, images: Tensor, left_as_found: Any
) -> None:
    model = ZOO["vit_cls"].fresh()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    target = 0  # the logit whose bias is broken
    with left_as_found(model, images), pytest.raises(AttnError, match="(?i)nan|inf|finite"):
        GenericAttention(model).attribute(images, target=target)


@pytest.mark.parametrize("inputs", ["a cat", ["a", "cat"], None, 3.5, (), {}], ids=repr)
@every_method
def test_not_a_tensor(method: Any, inputs: Any, vit: nn.Module, left_as_found: Any) -> None:
    with left_as_found(vit), pytest.raises((AttnError, AssertionError), match="(?i)tensor|empty"):
        method(vit).attribute(inputs, target=1)


def test_a_text_says_tokenizer_or_tensor(left_as_found: Any) -> None:
    model = ZOO["bert"].model()
    with left_as_found(model), pytest.raises(AttnError, match="(?i)tensor") as error:
        GenericAttention(model).attribute("a cat sat on the mat", target=1)
    assert "str" in str(error.value)


@every_method
def test_an_image_that_the_model_refuses(method: Any, vit: nn.Module, left_as_found: Any) -> None:
    """The model's own words come through: timm says which height it wants."""
    images = torch.randn(2, 3, 20, 16)
    with left_as_found(vit, images), pytest.raises(Exception, match="20.*16") as error:
        method(vit).attribute(images, target=1)
    assert isinstance(error.value, (AttnError, AssertionError))


def test_mapping_with_additional_forward_args(left_as_found: Any) -> None:
    model, inputs = ZOO["bert"].model(), ZOO["bert"].sample().inputs
    with left_as_found(model, inputs), pytest.raises(AttnError, match="additional_forward_args"):
        GenericAttention(model).attribute(
            {"input_ids": inputs["input_ids"]}, 1, inputs["attention_mask"]
        )


@every_method
def test_cached_keys_are_refused(method: Any, left_as_found: Any) -> None:
    model, inputs = ZOO["gpt2_left"].model(), ZOO["gpt2_left"].sample().inputs
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with left_as_found(model, inputs), pytest.raises(AttnError, match="past_key_values"):
        method(model).attribute({"input_ids": ids[:, 4:], "past_key_values": cache}, target=(0, 1))


MASKED = [
    *((name, "attention_mask") for name in (
        "bert", "gpt2_left", "lxmert", "visualbert", "vilt_retrieval", "clip", "blip",
        "blip2_matching", "bart", "t5", "perceiver_text", "llava_left", "idefics3")),
    ("lxmert", "visual_attention_mask"), ("visualbert", "visual_attention_mask"),
    ("qformer", "encoder_attention_mask"), ("bart", "decoder_attention_mask"),
    ("whisper", "decoder_attention_mask"),
]  # fmt: skip


@pytest.mark.parametrize("how", ["shorter", "longer", "fewer"])
@pytest.mark.parametrize(("name", "mask"), MASKED)
def test_a_mask_of_the_wrong_shape(name: str, mask: str, how: str, left_as_found: Any) -> None:
    case = STREAMS[name] if name in STREAMS else ZOO[name]
    model, sample = case.model(), case.sample()
    sample.run(model)  # some set up hooks of their own in their first run
    right = sample.inputs[mask]
    wrong = {
        "shorter": right[:, :-1], "longer": torch.cat([right, right[:, -1:]], 1),
        "fewer": right[:2],
    }[how]  # fmt: skip
    inputs = {**sample.inputs, mask: wrong}
    if how == "longer" and transformers.__version__ < "5":
        pytest.skip("some models of older versions cut it to length")
    objective = getattr(case, "objective", None)
    with left_as_found(model, inputs), pytest.raises(InputError) as error:
        GenericAttention(model).attribute(inputs, case.target_of(sample), objective=objective)
    assert f"{mask!r} has shape {tuple(wrong.shape)}" in str(error.value)
    assert f"{mask!r}: {tuple(right.shape)}" not in str(error.value)
    assert error.value.__cause__ is not None


def test_a_pixel_mask_for_fewer_images(left_as_found: Any) -> None:
    """One of another height or width is no fault to DETR, which resizes it."""
    case = STREAMS["detr"]
    model, inputs = case.model(), dict(case.sample().inputs)
    inputs["pixel_mask"] = inputs["pixel_mask"][:2]
    with left_as_found(model, inputs), pytest.raises(InputError, match="(?s)pixel_mask.*96, 128"):
        GenericAttention(model).attribute(inputs, target=(2, 1))


def test_a_positional_mask_of_the_wrong_shape(left_as_found: Any) -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
            return super().forward(x, key_mask)[:, 0]

    model, x = Masked(16, 4, masked_fill, 4).eval(), torch.randn(2, 6, 16)
    mask = torch.ones(2, 5, dtype=torch.bool)
    with left_as_found(model, x), pytest.raises(InputError, match=r"'key_mask' has shape \(2, 5\)"):
        GenericAttention(model).attribute(x, 1, mask)


def test_a_failure_that_is_not_the_mask_s_keeps_its_words(left_as_found: Any) -> None:
    model, inputs = ZOO["bert"].model(), ZOO["bert"].sample().inputs
    inputs = {**inputs, "token_type_ids": torch.zeros(3, 5, dtype=torch.long)}
    with left_as_found(model, inputs), pytest.raises(RuntimeError, match=r"size|expand") as error:
        GenericAttention(model).attribute(inputs, 1)
    assert not isinstance(error.value, AttnError)


@every_method
@pytest.mark.parametrize("name", ["bert", "bart"])
def test_ids_beyond_the_vocabulary(method: Any, name: str, left_as_found: Any) -> None:
    case = STREAMS[name] if name in STREAMS else ZOO[name]
    model, sample = case.model(), case.sample()
    inputs = {**sample.inputs, "input_ids": sample.inputs["input_ids"].clone()}
    inputs["input_ids"][1, 2] = 60
    with (
        left_as_found(model, inputs),
        pytest.raises(InputError, match=r"\[0, 60\).* to 60") as error,
    ):
        method(model).attribute(inputs, case.target_of(sample))
    assert "embed" in str(error.value) or "shared" in str(error.value)


# ------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("method", "options", "word"),
    [
        (RawAttention, {"interpolation": "spline"}, "interpolation"),
        (GenericAttention, {"interpolation": None}, "interpolation"),
        (AttentionRollout, {"head_fusion": "median"}, "head_fusion"),
        (RawAttention, {"layer": 3}, "layer"),
        (GenericAttention, {"start_layer": 3}, "start_layer"),
        (GenericAttention, {"start_layer": 99}, "start_layer"),
        (AttentionRollout, {"start_layer": 99}, "start_layer"),
        (RawAttention, {"start_layer": 99}, "start_layer"),
        (GenericAttention, {"start_layer": "last"}, "start_layer"),
        (GenericAttention, {"readout": 17}, "readout"),
        (RawAttention, {"readout": 999}, "readout"),
        (AttentionRollout, {"readout": -18}, "readout"),
        (GenericAttention, {"readout": "first"}, "readout"),
        (GenericAttention, {"readout": torch.tensor([0, 1])}, "readout"),
        (GenericAttention, {"readout": torch.tensor([0, 1, 17])}, "readout"),
        (GenericAttention, {"readout": torch.ones(3, 16)}, "readout"),
        (GenericAttention, {"readout": torch.full((3, 17), torch.nan)}, "readout"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:40],
)
def test_unknown_option_values(
    method: Any, options: dict, word: str, vit: nn.Module, images: Tensor, left_as_found: Any
) -> None:
    with left_as_found(vit, images), pytest.raises(AttnError, match=word):
        method(vit).attribute(images, target=1, **options)


@every_method
def test_unknown_option_name(method: Any, vit: nn.Module, images: Tensor) -> None:
    with pytest.raises((AttnError, TypeError), match="no_such_option"):
        method(vit).attribute(images, target=1, no_such_option=True)


@every_method
def test_layers_that_match_nothing(
    method: Any, vit: nn.Module, images: Tensor, left_as_found: Any
) -> None:
    with left_as_found(vit, images), pytest.raises(AttnError, match="(?s)no_such.*blocks.0.attn"):
        method(vit, layers=["no_such.*"]).attribute(images, target=1)


def test_a_model_is_asked_for() -> None:
    with pytest.raises((AttnError, TypeError, AssertionError), match="(?i)callable|model"):
        GenericAttention("bert-base-uncased").attribute(torch.zeros(1, 3), target=0)  # type: ignore


# ------------------------------------------------------------------ models without attention
def resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=30, hidden_size=16, state_size=4, num_hidden_layers=2)
    )


def gated() -> nn.Module:
    """Softmax and products, but none between tokens."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.head = nn.Linear(16, 4), nn.Linear(16, 5)
            self.values = nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.gate(x).softmax(-1) @ self.values).mean(1))

    return Gated()


@pytest.mark.parametrize(
    ("build", "inputs", "target"),
    [
        (resnet, torch.randn(2, 3, 32, 32), 1),
        (mamba, {"input_ids": torch.randint(30, (2, 6))}, (5, 3)),
        (gated, torch.randn(2, 6, 16), 1),
    ],
    ids=["resnet", "mamba", "gated"],
)
@every_method
def test_no_attention(
    method: Any, build: Callable, inputs: Any, target: Any, left_as_found: Any
) -> None:
    model = build().eval()
    with left_as_found(model, inputs), pytest.raises(NoAttentionFoundError, match="(?i)softmax"):
        method(model).attribute(inputs, target=target)


def detector(kind: str, **options: Any) -> nn.Module:
    model = with_backbone(kind, **options)()
    set_weights(model)
    return model.eval()


def rt_detr() -> nn.Module:
    from transformers import RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return detector(
        "RTDetr", backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 12, 16],
        encoder_ffn_dim=32, decoder_in_channels=[16] * 3, decoder_attention_heads=2,
        encoder_attention_heads=2, encoder_layers=1, num_denoising=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "word"),
    [
        # as many queries as an image has channels, and not so many
        (
            partial(detector, "DeformableDetr", d_model=32, num_feature_levels=1, num_queries=3),
            "deformable",
        ),
        (partial(detector, "DeformableDetr", d_model=32, num_feature_levels=1), "deformable"),
        (rt_detr, "model.encoder.*detach"),
    ],
    ids=["deformable_detr_3_queries", "deformable_detr", "rt_detr"],
)
def test_detectors_with_deformable_attention(
    build: Callable, word: str, left_as_found: Any
) -> None:
    """Their queries read the image through no softmax(QK^T)V: refused, not guessed."""
    model, images = build(), torch.randn(2, 3, 64, 64)
    model(images)  # some keep what they make in their first run
    for method in (*METHODS, HeterogenousAttention):
        with left_as_found(model, images), pytest.raises(WiringError, match=f"(?s){word}"):
            method(model).attribute(images, target=(2, 1))


@pytest.mark.parametrize("batch", [2, 3])
def test_unlike_numbers_of_images(batch: int, left_as_found: Any) -> None:
    """Folded into the batch they are no multiple of it: each is its example's all the same."""
    case = STREAMS["idefics3"]
    model, inputs = case.model(), dict(case.sample(batch=2).inputs)
    assert model.config.vision_config.num_attention_heads == 2  # not to be taken for 2 examples
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][1, 1] = 0  # how this model marks an image that there is not
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][1, (inputs["input_ids"][1] == IMAGE).nonzero()[4:, 0]] = 12
    inputs = {name: value[[0, 1, 1][:batch]] for name, value in inputs.items()}
    with left_as_found(model, inputs):
        found = GenericAttention(model).attribute(inputs, target=(10, 11))
    for b in range(batch):
        one = {name: value[b : b + 1] for name, value in inputs.items()}
        alone = GenericAttention(model).attribute(one, target=(10, 11))
        assert alone["pixel_values"][0, 0].any()
        assert bool(alone["pixel_values"][0, 1].any()) == (b == 0)
        for name, expected in alone.items():
            torch.testing.assert_close(found[name][b : b + 1], expected)


@pytest.mark.parametrize("method", [GenericAttention, HeterogenousAttention])
def test_a_padding_token_as_target(method: Any, left_as_found: Any) -> None:
    """Its embedding, which is the head's weight as well, is zero in a model of transformers."""
    case = STREAMS["bart"]
    model, inputs = case.fresh(), case.sample().inputs
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # type: ignore[union-attr, index, operator]
    with (
        left_as_found(model, inputs),
        pytest.raises(ReadoutError, match="padding.*target.*readout"),
    ):
        method(model).attribute(inputs, target=(2, 0))


class Mixed(nn.Module):
    """Attention, and around it convolutions over the tokens."""

    def __init__(self, mixers: int) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.token_mixers = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=1) for _ in range(mixers))
        self.blocks = nn.ModuleList(Attention(16, 2, by_sdpa, 2) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        x = self.first(x)
        x = x + self.blocks[0](x, real)
        for mixer in self.token_mixers:
            x = x + mixer(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.blocks[1](x, real)
        return self.head(x[:, 0])


def test_other_token_mixers_are_named_once() -> None:
    inputs = torch.randn(2, 6, 16)
    model = Mixed(2).eval()
    set_weights(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = GenericAttention(model).attribute(inputs, target=1)
    told = [str(warning.message) for warning in caught if "token_mixers" in str(warning.message)]
    assert len(told) == 1
    assert "token_mixers.0" in told[0]
    assert "token_mixers.1" in told[0]
    assert found.isfinite().all()

    plain = Mixed(0).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenericAttention(plain).attribute(inputs, target=1)


# ------------------------------------------------------------------ train mode
@pytest.mark.parametrize(
    "name", ["encoder_mean", "by_operator", "by_bmm", "by_sdpa", "bert", "mha"]
)
def test_train_mode_with_dropout(name: str, left_as_found: Any) -> None:
    case = ZOO[name]
    model, sample = case.fresh().train(), case.sample()
    for module in model.modules():  # enough for every draw to tell
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.3
        if isinstance(module, nn.Dropout):
            module.p = 0.3

    def explain(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with left_as_found(model, sample.inputs), pytest.warns(UserWarning, match="(?i)train"):
            explainer = GenericAttention(case.function(model))
            found = explainer.attribute_tokens(sample.inputs, 1, sample.extra)
        return found[case.stream]

    first, again, other = explain(0), explain(0), explain(1)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    assert first.isfinite().all()
    assert model.training


class Normalised(nn.Module):
    """A batch norm over channels before, or behind, a transformer."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.BatchNorm1d(16 if first else 5)
        self.model = ZOO["by_matmul"].fresh()

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return self.model(self.norm(x.transpose(1, 2)).transpose(1, 2))
        return self.norm(self.model(x))


@pytest.mark.parametrize("first", [False, True], ids=["behind", "before"])
def test_batch_norm_in_train_mode(first: bool, left_as_found: Any) -> None:
    """Running statistics are put back, and it is said that they would have changed."""
    model, inputs = Normalised(first).eval(), ZOO["by_matmul"].sample().inputs
    model.norm.train()
    with left_as_found(model, inputs), pytest.warns(UserWarning, match="(?i)batch"):
        found = GenericAttention(model).attribute_tokens(inputs, target=1)["x"]
    assert found.isfinite().all()
    assert (found[:, 1:] > 0).any(1).all()
    before = model.norm.running_mean.clone()
    with torch.no_grad():
        model(inputs)
    assert not torch.equal(before, model.norm.running_mean)  # the model itself does change them


# ------------------------------------------------------------------ threads
def test_two_threads_two_models(left_as_found: Any) -> None:
    """Both runs are inside their models at the same time, and neither sees the other's calls."""
    names = ["vit_cls", "gpt2_right"]
    models = {name: ZOO[name].fresh() for name in names}
    expected, found, errors = {}, {}, []
    for name in names:
        case, sample = ZOO[name], ZOO[name].sample()
        explain = GenericAttention(case.model())
        expected[name] = explain.attribute_tokens(sample.inputs, case.target_of(sample))
        expected[name] = (
            expected[name][case.stream],
            len(explain.layer_maps(sample.inputs, case.target_of(sample))),
        )
    met = threading.Barrier(2, timeout=30)

    def work(name: str) -> None:
        case, sample = ZOO[name], ZOO[name].sample()
        model = models[name]
        leaves = [m for m in model.modules() if not list(m.children())]
        waited = []

        def wait(module: nn.Module, args: tuple) -> None:
            if not waited:
                waited.append(True)
                met.wait()

        hook = leaves[len(leaves) // 2].register_forward_pre_hook(wait)
        try:
            explain = GenericAttention(model)
            target = case.target_of(sample)
            for _ in range(5):
                tokens = explain.attribute_tokens(sample.inputs, target)[case.stream]
            assert waited
            found[name] = tokens, len(explain.layer_maps(sample.inputs, target))
        except BaseException as error:  # re-raised in the main thread
            errors.append(error)
            met.abort()
        finally:
            hook.remove()

    with left_as_found(nn.ModuleDict(models)):
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    if errors:
        raise errors[0]
    for name in names:
        close(found[name][0], expected[name][0])
        assert found[name][1] == expected[name][1] == ZOO[name].calls


def test_two_threads_one_model() -> None:
    case, sample = ZOO["bert"], ZOO["bert"].sample()
    model = case.model()
    expected = [
        GenericAttention(model).attribute(sample.inputs, target=target)["input_ids"]
        for target in (0, 1)
    ]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(target: int) -> None:
        explain = GenericAttention(model)
        for _ in range(8):
            found[target].append(explain.attribute(sample.inputs, target=target)["input_ids"])

    threads = [threading.Thread(target=work, args=(target,)) for target in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for target in (0, 1):
        assert len(found[target]) == 8
        for result in found[target]:
            close(result, expected[target])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ wrapped and compiled models
def same_numbers(wrapped: Any, name: str, left_as_found: Any, model: nn.Module) -> None:
    case, sample = ZOO[name], ZOO[name].sample()
    for method in METHODS:
        plain = method(case.function(case.model()))
        expected = plain.attribute(sample.inputs, case.target_of(sample), sample.extra)
        with left_as_found(model, sample.inputs):
            found = method(wrapped).attribute(sample.inputs, case.target_of(sample), sample.extra)
        close(case.content_of(found), case.content_of(expected))


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", ["vit_cls", "bert", "by_matmul"])
def test_compiled_model(name: str, warm: bool, left_as_found: Any) -> None:
    case, sample = ZOO[name], ZOO[name].sample()
    model = case.fresh()
    compiled = torch.compile(model, backend="eager")
    if warm:
        sample.run(compiled)
    same_numbers(compiled, name, left_as_found, model)
    compiled_inside = case.fresh()
    compiled_inside.compile(backend="eager")
    same_numbers(compiled_inside, name, left_as_found, compiled_inside)


@pytest.mark.parametrize("name", ["bert", "vit_cls", "hf_vit_eager"])
def test_data_parallel(name: str, left_as_found: Any) -> None:
    model = ZOO[name].fresh()
    same_numbers(nn.DataParallel(model), name, left_as_found, model)


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}], ids=["default", "new"])
@pytest.mark.parametrize("name", ["bert", "hf_vit", "llama_left"])
def test_gradient_checkpointing_of_transformers(
    name: str, options: dict | None, left_as_found: Any
) -> None:
    """It is on in train mode only; without dropout the numbers are those of eval mode."""
    model = ZOO[name].fresh()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("dropout_prob", "attention_dropout", "dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()
    assert model.is_gradient_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of train mode
        same_numbers(model, name, left_as_found, model)
    assert model.is_gradient_checkpointing
    assert model.training


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("name", ["by_matmul", "by_sdpa", "mha"])
def test_gradient_checkpointing_of_torch(name: str, reentrant: bool, left_as_found: Any) -> None:
    """The reentrant form hides its graph: the right numbers, or an error that says so."""
    case = ZOO[name]
    model = case.fresh()
    for block in model.blocks:  # type: ignore[union-attr]
        run = block.forward
        block.forward = lambda x, real, run=run: checkpoint(run, x, real, use_reentrant=reentrant)
    try:
        same_numbers(model, name, left_as_found, model)
    except AttnError as error:
        assert reentrant
        assert "reentrant" in str(error)


def test_peft_lora(left_as_found: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = bert()
    set_weights(base)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(base.eval(), config).eval()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    inputs = ZOO["bert"].sample().inputs
    plain = GenericAttention(ZOO["bert"].model()).attribute(inputs, target=1)["input_ids"]
    for method in METHODS:
        expected = method(merged).attribute(inputs, target=1)["input_ids"]
        with left_as_found(wrapped, inputs):
            found = method(wrapped).attribute(inputs, target=1)
        assert set(found) == {"input_ids"}
        close(found["input_ids"], expected)
    assert (expected - plain).abs().max() > 1e-3  # the adapters do something


def test_a_model_within_a_model_s_wrapper() -> None:
    """A Sequential around it: the stream still grows from what was passed in."""
    inputs = ZOO["by_matmul"].sample().inputs
    model = ZOO["by_matmul"].model()
    expected = GenericAttention(model).attribute(inputs, target=1)
    found = GenericAttention(nn.Sequential(model)).attribute(inputs, target=1)
    close(found, expected)
