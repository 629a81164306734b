"""The packaged digit detector: its weights, its boxes, and what the library says about it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from captum_attn import GenericAttention, HeterogenousAttention
from captum_attn.errors import InputError
from captum_attn.toy.digit_detr import (
    WEIGHTS,
    build_digit_detr,
    digit_boxes,
    load_digit_detr,
    save_digit_detr,
)
from captum_attn.toy.scenes import SceneBatch, scenes
from tests import plain
from tests.benchmarks.detector_share import attributed, detect, shares
from tutorials.training.train_detector import average_precision


@pytest.fixture(scope="module")
def batch() -> SceneBatch:
    return scenes(300, split="test", seed=7)


@pytest.fixture(scope="module")
def model():
    return load_digit_detr()


def test_packaged_weights_find_the_digits(model, batch: SceneBatch) -> None:
    assert not model.training and model.dtype == torch.float32
    held_out = average_precision(model, batch)
    assert held_out.at_50 > 0.99
    assert held_out.coco > 0.9


def test_packaged_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000


def test_weights_survive_a_round_trip_in_half_precision(tmp_path) -> None:
    model = build_digit_detr().eval()
    path = tmp_path / "weights.safetensors"
    save_digit_detr(model, path)
    loaded = load_digit_detr(path)
    # Names of transformers 4 and of 5: the same in the file, whichever version wrote it.
    stored = load_file(path)
    assert stored.keys() == load_file(WEIGHTS).keys()
    assert {w.dtype for w in stored.values()} == {torch.float16}
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float()), name


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_weights_of_another_model_are_refused(tmp_path, change: str) -> None:
    weights = load_file(WEIGHTS)
    tensor = weights.pop("class_labels_classifier.weight")
    if change == "unknown":
        weights |= {"class_labels_classifier.weight": tensor, "one_too_many.weight": tensor.clone()}
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="classifier.weight|one_too_many.weight"):
        load_digit_detr(tmp_path / "weights.safetensors")


def test_every_parameter_is_trained(batch: SceneBatch) -> None:
    """The class freezes a ResNet; this one starts from nothing."""
    model = build_digit_detr().train()
    truth = [
        {"class_labels": digits, "boxes": boxes}
        for digits, boxes in zip(batch.labels[:4], digit_boxes(batch.masks[:4]), strict=True)
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first layer's self-attention sees equal queries in the first step
        optimizer.zero_grad()
        model(batch.images[:4], labels=truth).loss.backward()
        optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    # Queries start from zeros: no key or query of the first self-attention weighs anything yet.
    assert all(".decoder.layers.0." in name for name in still), still
    assert len(still) < 12


def test_boxes_are_the_extent_of_the_ink(batch: SceneBatch) -> None:
    for masks, boxes in zip(batch.masks[:20], digit_boxes(batch.masks)[:20], strict=True):
        for mask, (x, y, width, height) in zip(masks, boxes.double() * 64, strict=True):
            inked = [(r, c) for r in range(64) for c in range(64) if mask[r, c]]
            top, bottom = min(r for r, _ in inked), max(r for r, _ in inked) + 1
            left, right = min(c for _, c in inked), max(c for _, c in inked) + 1
            assert (x, y) == ((left + right) / 2, (top + bottom) / 2)
            assert (width, height) == (right - left, bottom - top)


# ------------------------------------------------------------ explained


def maps_and_gradients(model, image, target):
    """(A, G) of encoder layers, decoder self-attentions and cross-attentions, by transformers."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    output = model(image[None], output_attentions=True)
    kinds = output.encoder_attentions, output.decoder_attentions, output.cross_attentions
    flat = [A for kind in kinds for A in kind]
    found = torch.autograd.grad(output.logits[0][target], flat, allow_unused=True)
    pairs = [
        (A[0].detach(), torch.zeros_like(A[0]) if g is None else g[0])
        for A, g in zip(flat, found, strict=True)
    ]
    return pairs[:2], pairs[2:4], pairs[4:]


def plain_relevance(model, image, target, weigh, across, within, link=lambda R, s: R):
    """R[queries, image] of a detector of two and two layers, row by row of the papers."""
    encoder, own, cross = maps_and_gradients(model, image, target)
    R = plain.identity_blocks({"q": 8, "i": 64}, absent=[("i", "q")])
    for A, G in encoder:
        R = within(R, "i", weigh(A, G))
    R = link(R, "i")
    for (A, G), (B, H) in zip(own, cross, strict=True):
        R = within(R, "q", weigh(A, G))
        R = across(R, "q", "i", weigh(B, H))
    return R["q", "i"][target[0]]


def within_heterogenous(R, s, A_bar):
    return plain.heterogenous(R, s, s, A_bar)


CASES = {
    "GAE": (GenericAttention, {}),
    "positive": (HeterogenousAttention, {"correction": "positive"}),
    "absolute": (HeterogenousAttention, {"correction": "absolute"}),
    "full": (HeterogenousAttention, {"correction": "full"}),
    "positive, linked": (HeterogenousAttention, {"correction": "positive", "noise_link": True}),
    "absolute, linked": (HeterogenousAttention, {"correction": "absolute", "noise_link": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_relevance_of_a_detection_is_the_papers(batch: SceneBatch, case: str) -> None:
    model, (method, options) = load_digit_detr().double(), CASES[case]
    images = batch.images[:2].double()
    best = model(images).logits.flatten(1).argmax(1)
    targets = [(int(b) // 10, int(b) % 10) for b in best]
    found = method(model).attribute_tokens({"pixel_values": images}, target=targets, **options)
    for i, target in enumerate(targets):
        if method is GenericAttention:
            rules = plain.gae_map, plain.gae_across, plain.gae_within
        else:
            rules = (
                lambda A, G: plain.heterogenous_map(A, G, options["correction"]),
                plain.heterogenous,
                within_heterogenous,
                plain.noise_link if options.get("noise_link") else lambda R, s: R,
            )
        expected = plain_relevance(model, images[i], target, *rules)
        # transformers makes the sine positions in float32 for a float64 model too.
        plain.close(found["pixel_values"][i], expected, 1e-6)


@pytest.fixture(scope="module")
def methods(model) -> dict:
    """One object per class, so that the model is observed once for all of its options."""
    return {method: method(model) for method, _ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_relevance_lies_on_the_detected_digit(model, methods, batch: SceneBatch, case: str) -> None:
    """Evenly spread relevance would have 7 % on it, and either digit ahead in half the cases."""
    method, options = CASES[case]
    few = SceneBatch(*(values[:12] for values in batch))
    found = detect(model, few)
    assert len(found.scene) >= 22 and found.astray <= 1
    on = shares(attributed(methods[method], options, few, found), found.regions)
    assert on[:, 0].mean() > 0.25
    assert (on[:, 0] > on[:, 1]).float().mean() > 0.95
