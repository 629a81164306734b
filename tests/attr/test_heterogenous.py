"""HeterogenousAttention against a slow plain rewrite of Eq. 1-7, and its relation to GAE."""

import pytest
import torch

from captum_attn import GenericAttention, HeterogenousAttention
from captum_attn.errors import OptionError
from tests import plain
from tests.plain import close
from tests.test_goldens_two_streams import CASES, close_to, detr_image, lxmert_inputs, stored
from tests.test_goldens_two_streams import detr as detr
from tests.test_goldens_two_streams import lxmert as lxmert
from tests.test_plain import detr_sites, lxmert_sites

CORRECTIONS = ["positive", "full", "absolute"]


def bar(site, correction):
    return plain.heterogenous_map(*site, correction)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_lxmert(lxmert, case, correction):
    sites = lxmert_sites(case, "t0")
    R = plain.identity_blocks({"t": 6, "i": 5})
    for layer in range(2):
        R = plain.heterogenous(R, "t", "t", bar(sites[f"lang{layer}"], correction))
        R = plain.heterogenous(R, "i", "i", bar(sites[f"vis{layer}"], correction))
    for layer in range(2):
        old = dict(R)  # both directions read the states before the layer
        R = plain.heterogenous(R, "t", "i", bar(sites[f"x{layer}.cross_t_i"], correction), read=old)
        R = plain.heterogenous(R, "i", "t", bar(sites[f"x{layer}.cross_i_t"], correction), read=old)
        R = plain.heterogenous(R, "t", "t", bar(sites[f"x{layer}.self_t"], correction))
        R = plain.heterogenous(R, "i", "i", bar(sites[f"x{layer}.self_i"], correction))
    target = int(stored("lxmert_vqa", "expected")[f"{case}.t0.target"])
    method = HeterogenousAttention(lxmert)
    tokens = method.attribute_tokens(lxmert_inputs(case), target, correction=correction)
    close(tokens["input_ids"][0], R["t", "t"][0])
    close(tokens["visual_feats"][0], R["t", "i"][0])
    maps = method.relevance_maps(lxmert_inputs(case), target, correction=correction)
    close(maps["input_ids", "visual_feats"][0], R["t", "i"])
    close(maps["visual_feats", "input_ids"][0], R["i", "t"])
    if correction == "full":
        laid = method.attribute(lxmert_inputs(case), target, correction="full")
        assert (maps["input_ids", "visual_feats"] < 0).any()
        close(laid["visual_feats"][0].sum(-1), R["t", "i"][0])


@pytest.mark.parametrize(
    ("correction", "linked"),
    [*((correction, False) for correction in CORRECTIONS), ("positive", True), ("absolute", True)],
)
def test_detr(detr, correction, linked):
    """With `noise_link` the encoder's normalised block serves all decoder layers."""
    sites = detr_sites("in0", "t1")
    expected = stored("detr_dec2", "expected")
    query, target = (int(expected[f"in0.t1.{name}"]) for name in ("query", "target"))
    R = plain.identity_blocks({"q": 5, "i": 12})
    for layer in range(2):
        R = plain.heterogenous(R, "i", "i", bar(sites[f"enc{layer}"], correction))
    if linked:
        R = plain.noise_link(R, "i")
    for layer in range(2):
        R = plain.heterogenous(R, "q", "q", bar(sites[f"dec{layer}.self"], correction))
        R = plain.heterogenous(R, "q", "i", bar(sites[f"dec{layer}.cross"], correction))
    tokens = HeterogenousAttention(detr).attribute_tokens(
        detr_image("in0"), (query, target), correction=correction, noise_link=linked
    )
    close_to(detr, tokens["pixel_values"][0], R["q", "i"][query])
    close_to(detr, tokens["queries"][0], R["q", "q"][query])


def test_positive_is_gae_with_rule_10_replaced(lxmert):
    """GAE with normalize=False, and R[s,q] += Ā R[q,q] instead of Eq. 10: one cross layer tells."""
    inputs = lxmert_inputs("in0")
    layers = ["lxmert.encoder.layer.*", "lxmert.encoder.r_layers.*"]  # no call across
    gae = GenericAttention(lxmert, layers=layers).relevance_maps(inputs, 1, normalize=False)
    ours = HeterogenousAttention(lxmert, layers=layers).relevance_maps(inputs, 1)
    for key in gae:
        close(ours[key], gae[key])
    layers.append("lxmert.encoder.x_layers.0.visual_attention*")
    gae_bar = {
        c.index: m.mean(1) for c, m in GenericAttention(lxmert, layers=layers).layer_maps(inputs, 1)
    }
    across = gae_bar[4]  # text asks first
    ours = HeterogenousAttention(lxmert, layers=layers).relevance_maps(inputs, 1)
    close(ours["input_ids", "visual_feats"], across @ gae["visual_feats", "visual_feats"])


def test_the_homogenous_part(lxmert):
    sites = lxmert_sites("in0", "t0")
    R = plain.identity_blocks({"t": 6, "i": 5})
    for name in ("lang0", "lang1", "x0.self_t", "x1.self_t"):
        R = plain.heterogenous(R, "t", "t", bar(sites[name], "absolute"))
    for name in ("vis0", "vis1", "x0.self_i", "x1.self_i"):
        R = plain.heterogenous(R, "i", "i", bar(sites[name], "absolute"))
    target = int(stored("lxmert_vqa", "expected")["in0.t0.target"])
    tokens = HeterogenousAttention(lxmert).attribute_tokens(
        lxmert_inputs("in0"), target, correction="absolute", part="homogenous"
    )
    close(tokens["input_ids"][0], R["t", "t"][0])
    close(tokens["visual_feats"][0], R["i", "i"].sum(0))


def test_bad_options(lxmert):
    method = HeterogenousAttention(lxmert)
    with pytest.raises(OptionError, match="noise_link"):
        method.attribute(lxmert_inputs("in0"), 1, noise_link=True, correction="full")
    with pytest.raises(OptionError, match="absolute"):
        method.attribute(lxmert_inputs("in0"), 1, correction="negative")
    assert method.get_name() == "Heterogenous Attention"
    assert torch.is_tensor(method.attribute(lxmert_inputs("in0"), 1)["input_ids"])
