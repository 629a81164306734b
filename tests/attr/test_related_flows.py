"""Attention flow, DIX and ODAM against plain rewrites and the authors' numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from captum_attn import (
    AttentionFlow,
    AttentionRollout,
    DeepIntegratedExplanations,
    Odam,
    RawAttention,
)
from captum_attn.attr import attention_flow as flow
from captum_attn.errors import MissingExtraError, OptionError, TargetError
from tests import plain_related as plain
from tests.attr.related import by_hand, inputs
from tests.plain import close
from tests.test_goldens_two_streams import detr, detr_image  # noqa: F401
from tests.zoo import ZOO, scores_of
from tests.zoo_streams import STREAMS

FLOW = Path(__file__).parent.parent / "goldens" / "attention_flow"
ROUNDED = 1e-8  # capacities are whole numbers


# ------------------------------------------------------------ attention flow
def test_the_plain_flow_is_the_authors():
    given = load_file(FLOW / "inputs.safetensors")["synthetic_attentions"]
    expected = load_file(FLOW / "expected.safetensors")["synthetic_flow_raw"]
    for i in range(2):
        for layer in range(4):
            maps = list(given[i, : layer + 1].double())
            rows = torch.stack([plain.attention_flow(maps, r) for r in range(6)])
            close(rows, expected[i, layer].double(), 1e-12)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_flow_on_bert(kind):
    """Behind each layer, as the authors compute it, before they divide a row by its sum."""
    from transformers import BertConfig, BertForSequenceClassification

    settings = json.loads((FLOW / "config.json").read_text())["kwargs"]
    model = BertForSequenceClassification(BertConfig(**settings | {"attn_implementation": kind}))
    model.load_state_dict(load_file(FLOW / "weights.safetensors"))
    model = model.double().eval()
    ids = load_file(FLOW / "inputs.safetensors")["input_ids"].long()
    expected = load_file(FLOW / "expected.safetensors")["bert_flow_raw"].double()
    for layer in range(3):
        layers = [f"bert.encoder.layer.{i}" for i in range(layer + 1)]
        method = AttentionFlow(model, layers=layers)
        (found,) = method.relevance_maps({"input_ids": ids}).values()
        # transformers' eager softmax is in float32
        close(found, expected[:, layer], 1e-6 if kind == "eager" else ROUNDED * 10)
    (tokens,) = AttentionFlow(model).attribute_tokens({"input_ids": ids}).values()
    close(tokens, expected[:, 2, 0], 1e-6)
    shares = torch.full((2, 7), 1 / 7, dtype=torch.float64)
    (mean,) = AttentionFlow(model).attribute_tokens({"input_ids": ids}, readout=shares).values()
    close(mean, expected[:, 2].mean(1), 1e-6)


def test_attention_flow():
    x = inputs()
    model, maps, _ = by_hand(x, 1)
    (found,) = AttentionFlow(model).attribute_tokens(x, 1).values()
    (bound,) = AttentionFlow(model).attribute_tokens(x, start_layer=1).values()
    each = list(AttentionFlow(model).attribute_tokens_each(x, [0, 1]))
    for i in range(3):
        one = [A[i] for A in maps]
        close(found[i], plain.attention_flow(one, 0), ROUNDED)
        close(bound[i], plain.attention_flow(one[1:], 0), ROUNDED)
    for tokens in each:
        assert torch.equal(*tokens.values(), found)


def test_a_network_that_is_too_large_is_refused(monkeypatch):
    x = inputs()
    model = by_hand(x, 1)[0]
    monkeypatch.setattr(flow, "MOST_WORK", 6 * 144 - 1)
    with pytest.raises(OptionError, match="6 flows over"):
        AttentionFlow(model).attribute(x)


def test_attention_flow_without_scipy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse.csgraph", None)
    x = inputs()
    with pytest.raises(MissingExtraError, match="captum_attn\\[solvers\\]"):
        AttentionFlow(by_hand(x, 1)[0]).attribute(x)


# ------------------------------------------------------------ DIX
def along(x, target, block, n_steps):
    """For every fraction, the maps and their gradients, all layers, (B, H, n, n)."""
    steps = []
    for k in range(n_steps + 1):
        share = float(torch.tensor(k / n_steps, dtype=torch.float32))
        model = ZOO["by_matmul"].fresh().double()
        record = []

        def form(self, q, k, v, real, share=share, model=model, record=record):
            attention = scores_of(q, k).softmax(-1)
            if self is model.blocks[block].attention:
                attention = attention * share
            attention.retain_grad()
            record.append(attention)
            return attention @ v

        for layer in model.blocks:
            layer.attention.form = form
        model(x)[:, target].sum().backward()
        steps.append(([A.detach() for A in record], [A.grad for A in record]))
    return steps


@pytest.mark.parametrize("n_steps", [3, 10])
@pytest.mark.parametrize("name", ["by_matmul", "by_sdpa"])
def test_dix(name, n_steps):
    x = inputs()
    model = ZOO[name].fresh().double()
    method = DeepIntegratedExplanations(model)
    (found,) = method.attribute_tokens(x, 1, n_steps=n_steps).values()
    (last,) = method.attribute_tokens(x, 1, n_steps=n_steps, layers_integrated=-1).values()
    (R,) = method.relevance_maps(x, 1, n_steps=n_steps).values()
    readout = torch.full(x.shape[:2], 1 / x.shape[1], dtype=torch.float64)
    (mean,) = method.attribute_tokens(x, 1, readout=readout, n_steps=n_steps).values()
    blocks = [along(x, 1, b, n_steps) for b in (-1, -2)]
    for i in range(3):
        rows = []
        for steps in blocks:
            one = [([A[i] for A in maps], [G[i] for G in grads]) for maps, grads in steps]
            rows.append(torch.stack([plain.dix(one, r) for r in range(x.shape[1])]))
        close(last[i], rows[0][0])
        close(found[i], (rows[0] + rows[1])[0])
        close(R[i], rows[0] + rows[1])
        close(mean[i], (rows[0] + rows[1]).mean(0))


def test_dix_refuses_blocks_that_are_not_there():
    x = inputs()
    method = DeepIntegratedExplanations(by_hand(x, 1)[0])
    with pytest.raises(OptionError, match=r"expected ints in \[-2, 2\)"):
        method.attribute(x, 1, layers_integrated=(0, 2))
    for wrong in ((), (0, 0), (0.5,), "last", (True,)):
        with pytest.raises(OptionError, match="layers_integrated"):
            method.attribute(x, 1, layers_integrated=wrong)
    with pytest.raises(OptionError, match="n_steps"):
        method.attribute(x, 1, n_steps=0)


# ------------------------------------------------------------ ODAM
def features_of(model, module, image, query, label):
    """A module's output and the gradient of one class score of one query."""
    seen = []
    hook = module.register_forward_hook(
        lambda m, a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    y = model(image.clone().requires_grad_()).logits[0, query, label]
    hook.remove()
    (gradient,) = torch.autograd.grad(y, seen[:1])
    return seen[0].detach()[0], gradient[0]


@pytest.mark.parametrize("case", ["in0", "in1"])
def test_odam_on_detr(detr, case):  # noqa: F811
    """The encoder's tokens, (h w, C); and feature maps that a module gives, (C, h, w)."""
    image, target = detr_image(case), (2, 1)
    tokens = Odam(detr).attribute_tokens(image, target)["pixel_values"][0]
    F, g = features_of(detr, detr.model.encoder, image, *target)
    close(tokens, plain.odam(F.T, g.T))
    found = Odam(detr).attribute_tokens(image, target, layer="model.encoder")["pixel_values"][0]
    close(found, tokens)
    F, g = features_of(detr, detr.model.input_projection, image, *target)
    projected = Odam(detr).attribute(image, target, layer=detr.model.input_projection)
    expected = plain.odam(F, g)
    assert expected.numel() == len(tokens)
    large = torch.nn.functional.interpolate(expected[None, None], image.shape[2:], mode="bilinear")
    close(projected.sum(1)[0], large[0, 0])


@pytest.mark.parametrize("method", [AttentionFlow, AttentionRollout, RawAttention])
def test_targets_that_read_other_rows_of_one_run(method):
    """What does not depend on the class does depend on the query that is read."""
    case = STREAMS["detr"]
    sample, explain = case.sample(), method(case.model())
    targets = [(1, 2), (3, 0), (1, 1)]
    for found, target in zip(explain.attribute_each(sample.inputs, targets), targets, strict=True):
        expected = explain.attribute(sample.inputs, target)["pixel_values"]
        assert expected.any()
        torch.testing.assert_close(found["pixel_values"], expected)


def test_odam_of_many_detections_and_batches():
    case = STREAMS["detr"]
    sample, method = case.sample(), Odam(case.model())
    together = method.attribute(sample.inputs, (1, 2))["pixel_values"]
    assert (together >= 0).all() and together.any()
    each = list(method.attribute_each(sample.inputs, [(1, 2), (3, 0)]))
    torch.testing.assert_close(each[0]["pixel_values"], together)
    options = {"layer": "model.encoder", "internal_batch_size": 1}
    alone = method.attribute(sample.inputs, (1, 2), **options)["pixel_values"]
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-4)


def test_odam_on_detection_tokens():
    """YOLOS has no cross-attention: what the last block's values are projected from."""
    case = STREAMS["yolos"]
    model, sample = case.fresh().double(), case.sample().to(torch.float64)
    seen = []
    last = next(m for n, m in model.named_modules() if n.endswith("layer.1.layernorm_before"))
    hook = last.register_forward_hook(lambda m, a, out: seen.append(out))
    image = sample.inputs["pixel_values"]
    y = model(image.clone().requires_grad_()).logits[:, 1, 2].sum()
    (gradient,) = torch.autograd.grad(y, seen)
    hook.remove()
    found = Odam(model).attribute_tokens(sample.inputs, (1, 2))["pixel_values"]
    for i in range(len(image)):
        close(found[i], plain.odam(seen[0].detach()[i].T, gradient[i].T))


def test_odam_says_what_it_is_meant_for():
    for case in (ZOO["vit_cls"], ZOO["bert"], ZOO["gpt2_right"], STREAMS["llava_right"]):
        sample = case.sample()
        with pytest.raises(TargetError, match="meant for detectors"):
            Odam(case.model()).attribute(sample.inputs, case.target_of(sample), sample.extra)
    detr_ = STREAMS["detr"]
    for wrong in ("nope", torch.nn.Linear(1, 1)):
        with pytest.raises(OptionError, match="layer: expected a module"):
            Odam(detr_.model()).attribute(detr_.sample().inputs, (1, 2), layer=wrong)
    with pytest.raises(OptionError, match="layer: expected a module whose output"):
        Odam(detr_.model()).attribute(
            detr_.sample().inputs, (1, 2), layer="class_labels_classifier"
        )
