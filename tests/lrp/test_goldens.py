"""Relevance propagation against the original authors' numbers.

``goldens/lrp/*/README.md`` say what is stored. 1e-10 where the model runs in float64 throughout;
transformers' eager Llama computes its softmax in float32, and SDPA does not: 1e-6 there. Chefer's
code loses relevance at its forks by a factor X / (X + 1e-9), which is left out here: their bounds
are those of that factor.
"""

from __future__ import annotations

import pytest
import torch

from captum_attn import (
    CPLRP,
    AttnLRP,
    ConservativeLRP,
    PartialLRP,
    TransformerAttribution,
    TransformerLRP,
)
from tests.lrp.goldens import each, error, hugging_face, read, timm_vit

LXT = [
    ("lxt_attnlrp_gpt2", "eager", AttnLRP, 1e-10),
    ("lxt_attnlrp_gpt2", "sdpa", AttnLRP, 1e-10),
    ("lxt_cplrp_llama", "eager", CPLRP, 1e-10),
    ("lxt_cplrp_llama", "sdpa", CPLRP, 1e-6),
]


@pytest.mark.parametrize(("case", "attention", "method", "tolerance"), LXT)
def test_lxt(case, attention, method, tolerance):
    inputs, expected = read(case)
    model, ids = hugging_face(case, attention), inputs["input_ids"]
    last = ids.shape[1] - 1
    targets = [(last, int(target)) for target in inputs["targets"]]
    found = each(method(model), ids, targets, tokens=False, eps=1e-10)
    assert error(found, expected["relevance"]) < tolerance
    exact = each(method(model), ids, targets, tokens=False)
    assert error(exact, expected["relevance"]) < max(2e-9, tolerance)
    plain = each(method(model), ids, targets, tokens=False, rules="gradient")
    assert error(plain, expected["plain_gradient_x_input"]) < 2 * tolerance
    assert error(plain, expected["relevance"]) > 1e-2
    best = method(model).attribute(
        ids, [(last, int(target)) for target in expected["argmax"]], eps=1e-10
    )
    assert error(best, expected["relevance_argmax"]) < tolerance


def test_lxt_gradients_at_the_embeddings():
    """Before they are multiplied: a model that is given embeddings."""
    inputs, expected = read("lxt_attnlrp_gpt2")
    model = hugging_face("lxt_attnlrp_gpt2", "sdpa")
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    found = AttnLRP(lambda inputs_embeds: model(inputs_embeds=inputs_embeds)).attribute(
        embedded, (8, 5), eps=1e-10
    )
    assert error(found, embedded * expected["input_embeds_grad"][:, 0]) < 1e-10


def test_lxt_conserves_without_biases():
    """CP-LRP on a Llama: the relevance of all tokens is the logit."""
    inputs, expected = read("lxt_cplrp_llama")
    model = hugging_face("lxt_cplrp_llama", "sdpa")
    found = CPLRP(model).attribute(inputs["input_ids"], (8, 5))
    assert error(found.sum(1), expected["logits"][:, 5]) < 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("tensor", "options"),
    [
        ("R_gi", {"rules": "gradient"}),
        ("R_detach_KQ", {"rules": {"norm": None, "statistic": None}}),
        ("R_detach_KQ_LNorm", {"norm": "mean_std"}),
        ("R_detach_KQ_LNorm_Norm", {}),
    ],
)
def test_ali(attention, tensor, options):
    inputs, expected = read("ali_conservative_bert")
    model = hugging_face("ali_conservative_bert", attention)
    targets = inputs["targets"].tolist()
    found = each(ConservativeLRP(model), inputs["input_ids"], targets, tokens=True, **options)
    assert error(found, expected[tensor]) < 1e-10


@pytest.fixture(scope="module", params=[False, True], ids=["inline", "fused"])
def vit(request):
    return timm_vit(request.param)


@pytest.fixture(scope="module")
def chefer():
    inputs, expected = read("chefer_vit_grid4")
    return inputs["pixel_values"].double(), expected


TARGETS = [1, 3]
OLDER = {"renorm": False, "joint": False}
MAPS = [
    ("transformer_attribution_start0", TransformerAttribution, {}, 1.1e-6),
    ("transformer_attribution_start1", TransformerAttribution, {"start_layer": 1}, 1.1e-6),
    ("orig_transformer_attribution_start0", TransformerAttribution, OLDER, 1.5e-6),
    ("last_layer", PartialLRP, {}, 1e-8),
    ("second_layer", PartialLRP, {"layer": 1}, 1e-6),
    ("orig_last_layer", PartialLRP, OLDER, 1e-8),
    # Of one layer alone R = I + A_bar: behind the class token's own column it is the map.
    ("last_layer_ablation", TransformerAttribution, {"start_layer": 2}, 1e-6),
    ("orig_last_layer_ablation", TransformerAttribution, OLDER | {"start_layer": 2}, 1e-6),
]


@pytest.mark.parametrize(("tensor", "method", "options", "tolerance"), MAPS)
def test_chefer_maps(vit, chefer, tensor, method, options, tolerance):
    images, expected = chefer
    found = each(method(vit), images, TARGETS, tokens=True, **options)
    assert error(found[..., 1:], expected[tensor]) < tolerance


@pytest.mark.parametrize(("tensor", "options"), [("full", {}), ("orig_full", OLDER)])
def test_chefer_pixels(vit, chefer, tensor, options):
    images, expected = chefer
    found = each(TransformerLRP(vit), images, TARGETS, tokens=False, **options)
    assert found.shape == (2, 2, 3, 32, 32)
    assert error(found.sum(2), expected[tensor].double()) < 2e-6


def test_chefer_relevance_of_the_maps(vit, chefer):
    images, expected = chefer
    found = PartialLRP(vit).layer_maps(images[:1], 3)
    for layer, (_, positive) in enumerate(found):
        assert error(positive[0], expected["attn_cam"][layer].clamp(min=0)) < 1e-6
    weighed = TransformerAttribution(vit).layer_maps(images[:1], 3)
    for layer, (_, map_) in enumerate(weighed):
        product = expected["attn_cam"][layer] * expected["attn_grad"][layer]
        assert error(map_[0], product.clamp(min=0)) < 1e-6


def test_chefer_map_of_one_layer_weighed_by_its_gradient(vit, chefer):
    images, expected = chefer
    method = TransformerAttribution(vit, layers="blocks.1.*")
    found = each(method, images, TARGETS, tokens=True)
    assert error(found[..., 1:], expected["second_layer_ablation"]) < 1e-6


@pytest.mark.parametrize("start", [0, 1])
def test_chefer_rollout_of_relevance(vit, chefer, start):
    images, expected = chefer
    for k, target in enumerate(TARGETS):
        product = torch.eye(17, dtype=torch.float64)
        for _, positive in PartialLRP(vit).layer_maps(images, target)[start:]:
            product = (torch.eye(17) + positive.mean(1)) @ product
        assert error(product[:, 0, 1:], expected[f"rollout_cam_start{start}"][:, k]) < 1e-6


def test_chefer_relevance_of_the_tokens(vit, chefer):
    images, expected = chefer
    found = TransformerLRP(vit).attribute_tokens(images[:1], 3)["x"]
    assert error(found[0], expected["block_relevance"][0].sum(-1)) < 1e-6


def test_outputs_are_the_references(vit, chefer):
    images, expected = chefer
    with torch.no_grad():
        assert error(vit(images), expected["logits"]) < 1e-10


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("start_layer", [0, 1])
def test_transformer_attribution_is_the_product_of_its_layers(normalize, start_layer):
    """R = (I + A_bar) R, in whole matrices; BERT's with rows of I + A_bar that sum to 1."""
    inputs, _ = read("ali_conservative_bert")
    model, ids = hugging_face("ali_conservative_bert", "sdpa"), inputs["input_ids"]
    method, options = TransformerAttribution(model), {"normalize": normalize}
    (found,) = method.attribute_tokens(ids, 1, start_layer=start_layer, **options).values()
    product = torch.eye(ids.shape[1], dtype=torch.float64)
    for _, heads in method.layer_maps(ids, 1)[start_layer:]:
        step = torch.eye(ids.shape[1], dtype=torch.float64) + heads.mean(1)
        if normalize:
            step = step / step.sum(-1, keepdim=True)
        product = step @ product
    torch.testing.assert_close(found, product[:, 0], atol=1e-12, rtol=1e-9)
