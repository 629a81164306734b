"""The library's two-stream rules (Eq. 5-12) against the original authors' numbers: LXMERT and DETR.

The main method is the paper's, ``ours.lrp0_norm1_self101``; the others are its ablations.
Conventions of the stored values: ``goldens/*/README.md``. Two of them matter below: the reference
sets the class token's own entry to 0 at the end, and in DETR it has no Eq. 11, as an encoder never
reads its decoder. The latter matters without aggregation: R[queries, queries] is not replaced by 0
there, whereas LXMERT's R[text, text] is.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from captum_attn import AttentionRollout, GenericAttention, RawAttention
from tests import older_names, plain
from tests.plain import close

GOLDENS = Path(__file__).parent / "goldens"
CASES = ["in0", "in1"]
TARGETS = ["t0", "t1"]
ABLATIONS = {
    "ours.lrp0_norm1_self101": {},
    "ours.lrp0_norm1_self100": {"self_in_rule_10": False},
    "ours.lrp0_norm0_self101": {"normalize": False},
    "ours.lrp0_norm0_self100": {"normalize": False, "self_in_rule_10": False},
    "ours_no_agg.lrp0_norm0": {"normalize": False, "aggregate": False},
}


def stored(case, file):
    return load_file(GOLDENS / case / f"{file}.safetensors")


def with_own_entry_0(R):
    out = R.clone()
    out[0, 0] = 0
    return out


# ------------------------------------------------------------ LXMERT


@pytest.fixture(scope="module")
def lxmert():
    from transformers import LxmertConfig, LxmertForQuestionAnswering

    config = LxmertConfig(**json.loads((GOLDENS / "lxmert_vqa/config.json").read_text()))
    model = LxmertForQuestionAnswering(config)
    model.load_state_dict(stored("lxmert_vqa", "weights"))
    return model.double().eval()


def lxmert_inputs(case):
    given = stored("lxmert_vqa", "inputs")
    return {
        name.removeprefix(f"{case}."): tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in given.items()
        if name.startswith(case)
    }


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_lxmert(lxmert, case, target, name):
    expected, prefix = stored("lxmert_vqa", "expected"), f"{case}.{target}.{name}"
    R = GenericAttention(lxmert).relevance_maps(
        lxmert_inputs(case), int(expected[f"{case}.{target}.target"]), **ABLATIONS[name]
    )
    text, image = "input_ids", "visual_feats"
    assert {(text, text), (text, image), (image, image), (image, text)} <= set(R)
    close(with_own_entry_0(R[text, text][0]), expected[f"{prefix}.R_t_t"])
    close(R[text, image][0], expected[f"{prefix}.R_t_i"])
    if name == "ours.lrp0_norm1_self101":
        close(R[image, image][0], expected[f"{prefix}.R_i_i"])
        close(R[image, text][0], expected[f"{prefix}.R_i_t"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_lxmert_attributions(lxmert, case, target):
    """The answer is read from the first text token: its two rows, laid on the inputs."""
    expected, inputs = stored("lxmert_vqa", "expected"), lxmert_inputs(case)
    prefix = f"{case}.{target}.ours.lrp0_norm1_self101"
    index = int(expected[f"{case}.{target}.target"])
    method = GenericAttention(lxmert)
    tokens = method.attribute_tokens(inputs, index, discard_self=True)
    close(tokens["input_ids"][0], expected[f"{prefix}.R_t_t"][0])
    close(tokens["visual_feats"][0], expected[f"{prefix}.R_t_i"][0])

    attributions = method.attribute(inputs, index, discard_self=True)
    # masks feed no stream; boxes and segments enter where another input already names the stream
    assert set(attributions) == {"input_ids", "visual_feats"}
    close(attributions["input_ids"], expected[f"{prefix}.R_t_t"][:1])
    assert attributions["visual_feats"].shape == inputs["visual_feats"].shape
    close(attributions["visual_feats"].sum(-1), expected[f"{prefix}.R_t_i"][:1])
    kept = method.attribute_tokens(inputs, index)["input_ids"][0]
    assert kept[0] >= 1  # the identity is still in it
    close(kept[1:], expected[f"{prefix}.R_t_t"][0, 1:])


def test_lxmert_batch(lxmert):
    expected = stored("lxmert_vqa", "expected")
    one, two = (lxmert_inputs(case) for case in CASES)
    both = {name: torch.cat([one[name], two[name]]) for name in one}
    targets = torch.stack([expected[f"{case}.t1.target"] for case in CASES])
    R = GenericAttention(lxmert).relevance_maps(both, targets)
    for row, case in enumerate(CASES):
        prefix = f"{case}.t1.ours.lrp0_norm1_self101"
        close(R["input_ids", "visual_feats"][row], expected[f"{prefix}.R_t_i"])
        close(with_own_entry_0(R["input_ids", "input_ids"][row]), expected[f"{prefix}.R_t_t"])


@pytest.mark.parametrize("case", CASES)
def test_lxmert_class_agnostic(lxmert, case):
    expected, inputs = stored("lxmert_vqa", "expected"), lxmert_inputs(case)
    R = AttentionRollout(lxmert).relevance_maps(inputs, 0)
    close(with_own_entry_0(R["input_ids", "input_ids"][0]), expected[f"{case}.rollout.R_t_t"])
    close(R["input_ids", "visual_feats"][0], expected[f"{case}.rollout.R_t_i"])
    raw = RawAttention(lxmert).attribute_tokens(inputs, 0)
    close(raw["input_ids"][0, 1:], expected[f"{case}.raw_attn.R_t_t"][0, 1:])
    close(raw["visual_feats"][0], expected[f"{case}.raw_attn.R_t_i"][0])


# ------------------------------------------------------------ DETR


@pytest.fixture(scope="module", params=["eager", "default"])
def detr(request):
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    settings = json.loads((GOLDENS / "detr_dec2/config.json").read_text())
    backbone = {k: v for k, v in settings["backbone_config"].items() if k != "model_type"}
    settings |= {"backbone_config": ResNetConfig(**backbone), "use_pretrained_backbone": False}
    config = DetrConfig(**settings)
    if request.param == "eager":
        config._attn_implementation = "eager"
    model = DetrForObjectDetection(config)
    older_names.load(model, stored("detr_dec2", "weights"), "detr")
    return model.double().eval()


def detr_image(case):
    return stored("detr_dec2", "inputs")[f"{case}.pixel_values"].double()


def close_to(detr, actual, expected):
    """transformers 4.48 makes DETR's sine positions in float32 for a float64 model too."""
    close(actual, expected, 1e-10 if hasattr(detr.model, "position_embedding") else 1e-6)


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_detr(detr, case, target, name):
    expected, prefix = stored("detr_dec2", "expected"), f"{case}.{target}.{name}"
    query, label = (int(expected[f"{case}.{target}.{key}"]) for key in ("query", "target"))
    R = GenericAttention(detr).relevance_maps(detr_image(case), (query, label), **ABLATIONS[name])
    close_to(detr, R["queries", "pixel_values"][0, query], expected[f"{prefix}.R_q_i"])
    if name == "ours.lrp0_norm1_self101":
        close_to(detr, R["queries", "pixel_values"][0], expected[f"{prefix}.R_q_i_all"])
        close_to(detr, R["queries", "queries"][0], expected[f"{prefix}.R_q_q"])
        close_to(detr, R["pixel_values", "pixel_values"][0], expected[f"{prefix}.R_i_i"])


# Here a query's row of R - I is 0 before a cross-attention: the reference divides 0 by 0 and drops
# the whole addition of Eq. 10, the library keeps that row's identity.
ZERO_ROWS = {("in1", 1), ("in1", 4)}


@pytest.mark.parametrize("case", CASES)
def test_detr_every_query(detr, case):
    """One image, each query's own class: the readout finds the query."""
    expected, image = stored("detr_dec2", "expected"), detr_image(case)
    targets = [(query, int(expected[f"{case}.q{query}.target"])) for query in range(5)]
    method, images = GenericAttention(detr), image.expand(5, -1, -1, -1)
    tokens = method.attribute_tokens(images, targets)
    maps = [m.mean(1) for _, m in method.layer_maps(images, targets)]
    for query in range(5):
        golden = expected[f"{case}.q{query}.ours.lrp0_norm1_self101.R_q_i"]
        if (case, query) in ZERO_ROWS:
            encoder, decoder = [m[query] for m in maps[:2]], [m[query] for m in maps[2:]]
            assert any((m.sum(1) == 0).any() for m in decoder[::2])
            golden = plain_detr(encoder, decoder)[query]
        close_to(detr, tokens["pixel_values"][query], golden)


def plain_detr(encoder, decoder):
    """R[queries, pixel_values] of plain Eq. 5-11, from the maps of every layer."""
    R = plain.identity_blocks({"q": 5, "i": len(encoder[0])})
    for bar in encoder:
        R = plain.gae_within(R, "i", bar)
    for i, bar in enumerate(decoder):
        R = plain.gae_across(R, "q", "i", bar) if i % 2 else plain.gae_within(R, "q", bar)
    return R["q", "i"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_detr_class_agnostic(detr, case, target):
    expected, prefix = stored("detr_dec2", "expected"), f"{case}.{target}"
    pair = tuple(int(expected[f"{prefix}.{key}"]) for key in ("query", "target"))
    rolled = AttentionRollout(detr).attribute_tokens(detr_image(case), pair)
    close_to(detr, rolled["pixel_values"][0], expected[f"{prefix}.rollout.R_q_i"])
    raw = RawAttention(detr).attribute_tokens(detr_image(case), pair)
    close_to(detr, raw["pixel_values"][0], expected[f"{prefix}.raw_attn.R_q_i"])
