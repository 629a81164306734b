"""The contract table for the methods that the papers compare with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_attn import (
    AttCAT,
    AttentionFlow,
    AttentionGradCam,
    BeyondIntuition,
    DeepIntegratedExplanations,
    GradEclip,
    GradSam,
    Odam,
    TransformerInputSampling,
    TransitionAttention,
    VitCX,
)
from captum_attn.errors import AttnError, InputError, TargetError, WiringError
from tests.conftest import pairs
from tests.test_contract import NAMES, PADDED, arguments, close
from tests.zoo import TWINS, ZOO, Case, Sample, output_tensor

METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "gradcam": (AttentionGradCam, {}),
    "gradcam_row": (AttentionGradCam, {"weights": "row"}),
    "gradsam": (GradSam, {}),
    "gradsam_query": (GradSam, {"axis": "query"}),
    "attcat": (AttCAT, {}),
    "bi_head": (BeyondIntuition, {"n_steps": 2}),
    "bi_token": (BeyondIntuition, {"n_steps": 2, "perception": "token"}),
    "eclip": (GradEclip, {}),
    "eclip_all": (GradEclip, {"layers_explained": 9}),
    "tam": (TransitionAttention, {"n_steps": 2}),
    "dix": (DeepIntegratedExplanations, {"n_steps": 2}),
    "flow": (AttentionFlow, {}),
    "tis": (TransformerInputSampling, {"perturbations_per_eval": 48}),
}
# Where the mean over heads is negative everywhere, Grad-CAM's clamp leaves nothing.
CLAMPED = {("dinov2_registers", "gradcam"), ("distilbert", "gradcam")}
every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("name", NAMES)


def tokens_of(case: Case, method: str, sample: Sample, target: Any = None) -> Tensor:
    kind, options = METHODS[method]
    target = case.target_of(sample) if target is None else target
    explain = kind(case.function(case.model()))
    torch.manual_seed(0)
    found = explain.attribute_tokens(sample.inputs, target, sample.extra, **options)
    assert set(found) == {case.stream}
    return found[case.stream]


@cache
def explained(name: str, method: str) -> Tensor:
    return tokens_of(ZOO[name], method, ZOO[name].sample())


def scale_of(tokens: Tensor) -> float:
    return float(tokens.abs().max()) or 1.0


def skip_refused(name: str, method: str) -> None:
    """TIS cannot hide what is read: a mean over the tokens."""
    case = ZOO[name]
    readout = case.readout_of(case.model(), case.sample())
    several = isinstance(readout, Tensor) and bool(((readout != 0).sum(1) > 2).any())
    if method == "tis" and several:
        with pytest.raises(WiringError, match="reads a token such as"):
            tokens_of(case, method, case.sample())
        pytest.skip("refused, as it should be")


def one_of(case: Case, sample: Sample, i: int) -> Any:
    target = case.target_of(sample)
    return target[i : i + 1] if isinstance(target, list) else target


@pairs(NAMES, METHODS)
def test_result_is_that_of_each_example_alone(name: str, method: str) -> None:
    skip_refused(name, method)
    case = ZOO[name]
    sample, tokens = case.sample(), explained(name, method)
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    assert tokens.isfinite().all()
    assert bool(tokens.any()) == ((name, method) not in CLAMPED)
    scale = scale_of(tokens)
    for i in range(3):
        alone = tokens_of(case, method, sample.one(i), one_of(case, sample, i))
        close(alone / scale, tokens[i : i + 1] / scale, 1e-4)


@pairs(PADDED, METHODS)
def test_padding_changes_nothing(name: str, method: str) -> None:
    skip_refused(name, method)
    case = ZOO[name]
    sample, tokens = case.sample(), explained(name, method)
    scale = scale_of(tokens)
    for i, example in enumerate(case.raw()):
        trimmed = case.collate([example])
        target = case.target_of(trimmed)
        if isinstance(target, list):  # the same token, at its place in the shorter text
            target = [(target[0][0], case.target_of(sample)[i][1])]
        alone = tokens_of(case, method, trimmed, target)[0]
        close(tokens[i][sample.real[i]] / scale, alone / scale, 1e-4)
        assert (tokens[i][~sample.real[i]] == 0).all()


@every_method
@pytest.mark.parametrize("twin", TWINS)
def test_twins_are_explained_alike(twin: str, method: str) -> None:
    skip_refused(TWINS[twin][0], method)
    first, *others = (explained(name, method) for name in TWINS[twin])
    scale = scale_of(first)
    for tokens in others:
        close(tokens / scale, first / scale, 1e-4)


@every_method
@pytest.mark.parametrize("name", ["vit_cls", "bert", "gpt2_left", "encoder_mean"])
def test_model_is_observed_and_left_alone(
    name: str, method: str, left_as_found: Any, in_use: Any
) -> None:
    skip_refused(name, method)
    case = ZOO[name]
    model, sample = case.model(), case.sample()
    kind, options = METHODS[method]
    with torch.no_grad():
        before = output_tensor(sample.run(case.function(model)))
    with in_use(model), left_as_found(model, sample.inputs, sample.extra):
        kind(case.function(model)).attribute(*arguments(case, sample), **options)
    with torch.no_grad():
        assert torch.equal(output_tensor(sample.run(case.function(model))), before)


@every_method
@pytest.mark.parametrize("name", ["vit_cls", "bert", "gpt2_left"])
def test_blocks_of_two_queries_change_nothing(name: str, method: str) -> None:
    case = ZOO[name]
    sample = case.sample()
    kind, options = METHODS[method]
    found = kind(case.function(case.model())).attribute_tokens(
        *arguments(case, sample), block_size=2, **options
    )[case.stream]
    close(found, explained(name, method))


# ------------------------------------------------------------------ pixels, and detectors
PIXELS: dict[str, Any] = {"noise": 0.05, "perturbations_per_eval": 24}


def pixels_of(case: Case, sample: Sample) -> Tensor:
    explain = VitCX(case.function(case.model()))
    torch.manual_seed(0)
    found = explain.attribute(*arguments(case, sample), **PIXELS)
    return found[image_of(case)] if isinstance(found, Mapping) else case.content_of(found)


@every_model
def test_vit_cx_of_a_batch_is_that_of_each_example_alone(
    name: str, left_as_found: Any, in_use: Any
) -> None:
    case, sample = ZOO[name], ZOO[name].sample()
    model = case.model()
    image = sample.inputs
    image = image[image_of(case)] if isinstance(image, Mapping) else case.content_of(image)
    if not is_image(image):
        with pytest.raises(InputError, match="meant for an image"):
            pixels_of(case, sample)
        return
    torch.manual_seed(0)  # as `pixels_of` does
    with in_use(model), left_as_found(model, sample.inputs, sample.extra):
        together = pixels_of(case, sample)
    assert together.shape == image.shape
    assert together.isfinite().all() and together.flatten(1).any(1).all()
    scale = scale_of(together)
    for i in range(3):
        close(pixels_of(case, sample.one(i)) / scale, together[i : i + 1] / scale, 1e-4)


@every_model
def test_odam_refuses_what_is_no_detector(name: str) -> None:
    case = ZOO[name]
    with pytest.raises(TargetError, match="meant for detectors"):
        Odam(case.function(case.model())).attribute(*arguments(case, case.sample()))


@every_method
def test_nothing_but_errors_of_ours(method: str) -> None:
    """Options and targets that do not fit are refused in our own words."""
    kind, options = METHODS[method]
    case = ZOO["vit_cls"]
    explain = kind(case.model())
    for wrong in ({"target": 99}, {"nope": 1}, {"start_layer": 9}, {"internal_batch_size": 0}):
        with pytest.raises(AttnError):
            explain.attribute(case.sample().inputs, **{"target": 1, **options, **wrong})


def image_of(case: Case) -> str:
    return "pixel_values" if case.name == "vilt" else str(case.content)


def is_image(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim == 4
