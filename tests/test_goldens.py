"""The library against the original authors' numbers on a ViT: its timm and transformers weights.

``goldens/vit/README.md`` says what is stored. transformers' eager attention computes the softmax
in float32 also for a float64 model: 1e-6 there, 1e-10 elsewhere, relative to the largest entry.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from captum_attn import AttentionRollout, GenericAttention, RawAttention
from tests import older_names
from tests.plain import close, raw_attention

VIT = Path(__file__).parent / "goldens" / "vit"
MODELS = ["timm", "timm-fused", "transformers-eager", "transformers-sdpa"]
CASES = ["in0", "in1"]
TARGETS = ["t0", "t1"]


def build(kind):
    """-> the model in float64, the name of its stream, the tolerance."""
    config = json.loads((VIT / "config.json").read_text())
    if kind.startswith("timm"):
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(**config["timm"])
        for block in model.blocks:
            block.attn.fused_attn = kind == "timm-fused"
        model.load_state_dict(load_file(VIT / "weights.safetensors"))
        return model.double().eval(), "x", 1e-10

    from transformers import ViTConfig, ViTForImageClassification

    settings = ViTConfig(**config["hf"])
    settings._attn_implementation = kind.removeprefix("transformers-")
    model = ViTForImageClassification(settings)
    older_names.load(model, load_file(VIT / "weights_hf.safetensors"), "vit")
    return model.double().eval(), "pixel_values", 1e-6 if kind.endswith("eager") else 1e-10


@pytest.fixture(scope="module", params=MODELS)
def vit(request):
    return build(request.param)


@pytest.fixture(scope="module")
def expected():
    return load_file(VIT / "expected.safetensors")


@pytest.fixture(scope="module")
def images():
    inputs = load_file(VIT / "inputs.safetensors")
    return {case: inputs[f"{case}.pixel_values"].double() for case in CASES}


def stacked(expected, names):
    return torch.stack([expected[name] for name in names])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_gae(vit, expected, images, case, target):
    model, stream, tolerance = vit
    method, index = GenericAttention(model), int(expected[f"{case}.{target}.target"])
    relevance = expected[f"{case}.{target}.gae.relevance"]

    tokens = method.attribute_tokens(images[case], target=index)
    assert set(tokens) == {stream}
    close(tokens[stream][0, 1:], relevance, tolerance)

    maps = method.relevance_maps(images[case], target=index)
    assert set(maps) == {(stream, stream)}
    R = expected[f"{case}.{target}.gae.R"]
    close(maps[stream, stream][0], R, tolerance)
    # the class token's own entry is kept, unless it is asked to be left out
    close(tokens[stream][0], R[0], tolerance)
    discarded = method.attribute_tokens(images[case], target=index, discard_self=True)
    close(discarded[stream][0], torch.cat([R.new_zeros(1), relevance]), tolerance)


def test_gae_of_a_batch_with_a_target_each(vit, expected, images):
    """Two images, two targets each, in one call of batch four."""
    model, stream, tolerance = vit
    pairs = [(case, target) for case in CASES for target in TARGETS]
    batch = torch.cat([images[case] for case, _ in pairs])
    indices = torch.stack([expected[f"{case}.{target}.target"] for case, target in pairs])
    tokens = GenericAttention(model).attribute_tokens(batch, target=indices)[stream]
    names = [f"{case}.{target}.gae.relevance" for case, target in pairs]
    close(tokens[:, 1:], stacked(expected, names), tolerance)


@pytest.mark.parametrize("target", TARGETS)
def test_gae_laid_on_the_image(vit, expected, images, target):
    """`nearest`: attr.sum(1) is constant on each 4x4 patch and is that patch's relevance."""
    model, _, tolerance = vit
    batch = torch.cat([images[case] for case in CASES])
    indices = torch.stack([expected[f"{case}.{target}.target"] for case in CASES])
    attributions = GenericAttention(model).attribute(batch, indices, interpolation="nearest")
    assert attributions.shape == batch.shape
    relevance = stacked(expected, [f"{case}.{target}.gae.relevance" for case in CASES])
    on_pixels = relevance.reshape(2, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    close(attributions.sum(1), on_pixels, tolerance)
    for channel in range(3):
        close(attributions[:, channel] * 3, on_pixels, tolerance)


def test_bilinear_is_the_default_and_smooth(vit, expected, images):
    model, _, tolerance = vit
    index = expected["in0.t0.target"]
    attributions = GenericAttention(model).attribute(images["in0"], int(index))
    grid = expected["in0.t0.gae.relevance"].reshape(1, 1, 4, 4)
    smooth = torch.nn.functional.interpolate(
        grid, size=(16, 16), mode="bilinear", align_corners=False
    )
    close(attributions.sum(1), smooth[:, 0], tolerance)


@pytest.mark.parametrize("case", CASES)
def test_layer_maps_hold_the_stored_maps_and_gradients(vit, expected, images, case):
    model, _, tolerance = vit
    raw = RawAttention(model).layer_maps(images[case], target=0)
    assert len(raw) == 3
    for layer, (_, A) in enumerate(raw):
        close(A[0], expected[f"{case}.attn.{layer}"], tolerance)
    for target in TARGETS:
        index = int(expected[f"{case}.{target}.target"])
        weighted = GenericAttention(model).layer_maps(images[case], target=index)
        assert len(weighted) == 3
        for layer, (_, A_bar) in enumerate(weighted):
            A, G = (expected[f"{case}.{name}.{layer}"] for name in ("attn", f"{target}.grad"))
            close(A_bar[0], (A * G).clamp(min=0), tolerance)


@pytest.mark.parametrize("start", [0, 1])
def test_rollout(vit, expected, images, start):
    model, stream, tolerance = vit
    batch = torch.cat([images[case] for case in CASES])
    names = [f"{case}.rollout.start{start}" for case in CASES]
    for target in (None, 3):  # only the readout is looked for with it
        tokens = AttentionRollout(model).attribute_tokens(batch, target, start_layer=start)
        close(tokens[stream][:, 1:], stacked(expected, names), tolerance)
    attributions = AttentionRollout(model).attribute(
        batch, start_layer=start, interpolation="nearest"
    )
    close(attributions.sum(1)[:, ::4, ::4].reshape(2, 16), stacked(expected, names), tolerance)


@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_raw_attention(vit, expected, images, layer):
    model, stream, tolerance = vit
    options = {} if layer is None else {"layer": layer}
    stored = expected[f"in1.attn.{2 if layer is None else layer}"]
    tokens = RawAttention(model).attribute_tokens(images["in1"], target=0, **options)
    close(tokens[stream][0], raw_attention(stored)[0], tolerance)


def test_the_outputs_are_the_reference_models_own(vit, expected, images):
    """Guards the comparison: the weights were loaded as they were meant."""
    model, _, _ = vit
    for case in CASES:
        with torch.no_grad():
            output = model(images[case])
        logits = getattr(output, "logits", output)
        close(logits, expected[f"{case}.logits"], 1e-6)
