"""Perturbation by hidden keys: tokens are removed from models that take no mask."""

from __future__ import annotations

import pytest
import torch

from captum_attn.errors import InputError, WiringError
from captum_attn.intervene import ObservedModel
from captum_attn.metrics import Hide, aopc, deletion, perturbation_curve
from tests.plain import close
from tests.zoo import ZOO, set_weights, timm_vit
from tests.zoo_streams import STREAMS

STEPS = [0.0, 0.25, 0.5, 0.75]


def test_patches_are_hidden_like_patches_that_are_taken_out():
    model = timm_vit()
    set_weights(model)
    model = model.double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    scores = torch.randn(2, 16, dtype=torch.float64)
    maps = scores.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    options = {"patch_size": 4, "steps": STEPS, "measure": "logit", "fill": "hide"}
    for per_eval in (1, 3):
        curve = perturbation_curve(
            model, x, maps, 2, perturbations_per_eval=per_eval, **options
        )  # fmt: skip
        for i in range(2):
            order = scores[i].argsort(descending=True)
            for step, fraction in enumerate(STEPS):
                gone = order[: int(fraction * 16)]
                stay = [0, *(t + 1 for t in range(16) if t not in gone)]
                hook = model.blocks[0].register_forward_pre_hook(
                    lambda m, args, stay=stay: (args[0][:, stay],)
                )
                with torch.no_grad():
                    expected = model(x[i : i + 1])[0, 2]
                hook.remove()
                close(curve.values[i, step], expected)


@pytest.mark.parametrize("name", ["bert", "bert_eager", "roberta"])
def test_words_are_hidden_like_masked_ones(name):
    case = ZOO[name]
    model, given = case.model(), dict(case.sample().inputs)
    scores = {"input_ids": torch.randn(given["input_ids"].shape)}
    some = torch.rand(given["input_ids"].shape) < 0.7
    some[:, 0] = False
    options = {"steps": STEPS, "removable": some, "perturbations_per_eval": 2}
    hidden = perturbation_curve(model, given, scores, 1, fill=Hide(), **options)
    masked = perturbation_curve(model, given, scores, 1, fill="remove", **options)
    close(hidden.values, masked.values, 1e-5)
    assert not torch.allclose(hidden.values[:, 1:], hidden.values[:, :1].expand(-1, 3))


def test_a_text_without_a_mask_and_words_that_are_all_hidden():
    case = ZOO["gpt2_right"]
    ids = case.raw(1)[0][None]
    scores = torch.randn(ids.shape)
    at = (ids.shape[1] - 1, 3)
    found = deletion(case.model(), ids, scores, at, steps=4, fill="hide", measure="logit")
    assert found.isfinite().all()
    areas = aopc(case.model(), ids, scores, at, fill="hide", measure="logit")
    assert areas.isfinite().all()


def test_tokens_of_pixels():
    case = STREAMS["vilt"]
    sample = case.sample().one(1)
    torch.manual_seed(0)
    seen = ObservedModel(case.model(), sample.inputs)
    (stream,) = seen.tokens
    pixels = torch.zeros(sample.inputs["pixel_values"].shape, dtype=torch.bool)
    pixels[..., :4, :4] = True  # the first patch
    words = torch.zeros(sample.inputs["input_ids"].shape, dtype=torch.bool)
    words[:, 2] = True
    found = seen.tokens_of({"pixel_values": pixels, "input_ids": words})[stream]
    n = sample.inputs["input_ids"].shape[1]
    expected = torch.zeros(1, seen.tokens[stream], dtype=torch.bool)
    expected[:, [2, n + 1]] = True  # [CLS] of the image comes first
    assert torch.equal(found, expected)
    pixels[..., 2:4, :4] = False  # half of it
    assert not seen.tokens_of({"pixel_values": pixels})[stream].any()
    with pytest.raises(InputError, match="enter no token stream"):
        seen.tokens_of({"labels": words})


def test_a_model_without_attention_says_so():
    from captum_attn.errors import NoAttentionFoundError

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises((NoAttentionFoundError, WiringError)):
        perturbation_curve(model, x, torch.randn(2, 1, 4, 4), 0, fill="hide", steps=2)
