"""The plain rewrites of ``tests/plain.py`` against the numbers of the original authors' code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import plain
from tests.plain import close

GOLDENS = Path(__file__).parent / "goldens"
ALL_OPTIONS = [(True, True), (True, False), (False, True), (False, False)]


def golden(case, file="expected"):
    return load_file(GOLDENS / case / f"{file}.safetensors")


def blocks(**named):
    return {tuple(name.split("_")): matrix for name, matrix in named.items()}


# ------------------------------------------------------------ rules_unit


def test_eq_5():
    given, expected = golden("rules_unit", "inputs"), golden("rules_unit")
    close(plain.gae_map(given["A"][0], given["G"][0]), expected["avg_heads"])


def test_eq_6_and_7():
    given, expected = golden("rules_unit", "inputs"), golden("rules_unit")
    R = blocks(s_s=given["R_ss"], s_q=given["R_sq"], q_s=given["R_qs"], q_q=given["R_qq"])
    new = plain.gae_within(R, "s", given["cam_ss"])
    close(new["s", "s"] - R["s", "s"], expected["self_rule.R_ss_add"])
    close(new["s", "q"] - R["s", "q"], expected["self_rule.R_sq_add"])
    close(new["q", "q"], R["q", "q"])
    replaced = plain.gae_within(R, "s", given["cam_ss"], aggregate=False)
    close(replaced["s", "s"], expected["self_rule.R_ss_add"])


def test_eq_8_and_9():
    given, expected = golden("rules_unit", "inputs"), golden("rules_unit")
    close(plain.residual_normalised(given["R_ss"]), expected["handle_residual.R_ss"])


@pytest.mark.parametrize(("normalize", "self_in_rule_10"), ALL_OPTIONS)
def test_eq_10_and_11(normalize, self_in_rule_10):
    given, expected = golden("rules_unit", "inputs"), golden("rules_unit")
    R = blocks(s_s=given["R_ss"], s_q=given["R_sq"], q_s=given["R_qs"], q_q=given["R_qq"])
    options = {"normalize": normalize, "self_in_rule_10": self_in_rule_10}
    new = plain.gae_across(R, "s", "q", given["cam_sq"], **options)
    name = f"norm{normalize:d}_self10{self_in_rule_10:d}"
    close(new["s", "q"] - R["s", "q"], expected[f"lxmert_mm.{name}.R_sq_add"])
    close(new["s", "q"] - R["s", "q"], expected[f"detr_mm.{name}.R_sq_add"])
    close(new["s", "s"] - R["s", "s"], expected[f"lxmert_mm.{name}.R_ss_add"])
    close(new["q", "s"], R["q", "s"])


def test_a_zero_row_keeps_its_identity_where_the_reference_gets_nan():
    given, expected = golden("rules_unit", "inputs"), golden("rules_unit")
    ours, reference = (
        plain.residual_normalised(given["R_ss_zero_row"]),
        expected["zero_row.handle_residual"],
    )
    assert reference[2].isnan().all()
    close(ours[2], plain.eye(5)[2])
    others = [0, 1, 3, 4]
    close(ours[others], reference[others])

    R = blocks(s_s=given["R_ss_zero_row"], s_q=given["R_sq"], q_s=given["R_qs"], q_q=given["R_qq"])
    new = plain.gae_across(R, "s", "q", given["cam_sq"])
    assert expected["zero_row.lxmert_mm.R_sq_add"].isnan().all()
    right = given["cam_sq"] @ plain.residual_normalised(given["R_qq"])
    by_hand = sum(torch.outer(reference[i], right[i]) for i in others)
    by_hand[2] += right[2]
    close(new["s", "q"] - R["s", "q"], by_hand)


@pytest.mark.parametrize("start", [0, 1])
def test_rollout_rule(start):
    given, expected = golden("rules_unit", "inputs"), golden("rules_unit")
    R = plain.rollout([given[f"attn{layer}"][None] for layer in range(3)], start_layer=start)
    close(R, expected[f"rollout.vit.start{start}"])
    close(R, expected[f"rollout.lxmert_detr.start{start}"])


def test_head_fusion():
    A = torch.tensor([[[0.1, 0.9]], [[0.5, 0.5]], [[0.6, 0.4]]], dtype=torch.float64)
    close(plain.fuse_heads(A, "mean"), torch.tensor([[0.4, 0.6]], dtype=torch.float64))
    close(plain.fuse_heads(A, "max"), torch.tensor([[0.6, 0.9]], dtype=torch.float64))
    close(plain.fuse_heads(A, "min"), torch.tensor([[0.1, 0.4]], dtype=torch.float64))


# ------------------------------------------------------------ vit


@pytest.mark.parametrize("case", ["in0", "in1"])
def test_vit(case):
    expected = golden("vit")
    maps = [expected[f"{case}.attn.{layer}"] for layer in range(3)]
    for start in (0, 1):
        R = plain.rollout(maps, start_layer=start)
        close(R[0, 1:], expected[f"{case}.rollout.start{start}"])
    for target in ("t0", "t1"):
        gradients = [expected[f"{case}.{target}.grad.{layer}"] for layer in range(3)]
        R = plain.gae(maps, gradients)
        close(R, expected[f"{case}.{target}.gae.R"])
        close(R[0, 1:], expected[f"{case}.{target}.gae.relevance"])


# ------------------------------------------------------------ lxmert_vqa


def lxmert_sites(case, target):
    """site -> (A, G); without a stored gradient the answer does not depend on the site."""
    expected, prefix = golden("lxmert_vqa"), f"{case}.attn."
    sites = {}
    for name, A in expected.items():
        if name.startswith(prefix):
            G = expected.get(f"{case}.{target}.grad.{name[len(prefix) :]}")
            sites[name[len(prefix) :]] = (A, torch.zeros_like(A) if G is None else G)
    assert len(sites) == 12
    return sites


def lxmert(sites, weigh, within, across):
    """The wiring of LXMERT: both directions of a cross layer read the states before it."""
    bar = {name: weigh(A, G) for name, (A, G) in sites.items()}
    R = plain.identity_blocks({"t": 6, "i": 5})
    for layer in range(2):
        R = within(R, "t", bar[f"lang{layer}"])
    for layer in range(2):
        R = within(R, "i", bar[f"vis{layer}"])
    for layer in range(2):
        text = across(R, "t", "i", bar[f"x{layer}.cross_t_i"])
        image = across(R, "i", "t", bar[f"x{layer}.cross_i_t"])
        R = {key: (text if key[0] == "t" else image)[key] for key in R}
        R = within(R, "t", bar[f"x{layer}.self_t"])
        if layer == 0:  # after the last cross layer nobody reads the image stream
            R = within(R, "i", bar[f"x{layer}.self_i"])
    return R


def without_corner(R):
    """The reference sets the class token's own entry to 0 before display."""
    out = R.clone()
    out[0, 0] = 0
    return out


@pytest.mark.parametrize(("normalize", "self_in_rule_10"), ALL_OPTIONS)
@pytest.mark.parametrize("target", ["t0", "t1"])
@pytest.mark.parametrize("case", ["in0", "in1"])
def test_lxmert(case, target, normalize, self_in_rule_10):
    expected = golden("lxmert_vqa")

    def across(R, s, q, A_bar):
        return plain.gae_across(
            R, s, q, A_bar, normalize=normalize, self_in_rule_10=self_in_rule_10
        )

    R = lxmert(lxmert_sites(case, target), plain.gae_map, plain.gae_within, across)
    name = f"{case}.{target}.ours.lrp0_norm{normalize:d}_self10{self_in_rule_10:d}"
    close(without_corner(R["t", "t"]), expected[f"{name}.R_t_t"])
    close(R["t", "i"], expected[f"{name}.R_t_i"])
    if normalize and self_in_rule_10:
        close(R["i", "i"], expected[f"{name}.R_i_i"])
        close(R["i", "t"], expected[f"{name}.R_i_t"])


@pytest.mark.parametrize("target", ["t0", "t1"])
@pytest.mark.parametrize("case", ["in0", "in1"])
def test_lxmert_without_aggregation(case, target):
    expected = golden("lxmert_vqa")

    def within(R, s, A_bar):
        return plain.gae_within(R, s, A_bar, aggregate=False)

    def across(R, s, q, A_bar):
        return plain.gae_across(R, s, q, A_bar, normalize=False, aggregate=False)

    R = lxmert(lxmert_sites(case, target), plain.gae_map, within, across)
    name = f"{case}.{target}.ours_no_agg.lrp0_norm0"
    close(without_corner(R["t", "t"]), expected[f"{name}.R_t_t"])
    close(R["t", "i"], expected[f"{name}.R_t_i"])


@pytest.mark.parametrize("case", ["in0", "in1"])
def test_lxmert_class_agnostic(case):
    expected, sites = golden("lxmert_vqa"), lxmert_sites(case, "t0")
    A = {name: pair[0] for name, pair in sites.items()}
    close(without_corner(plain.raw_attention(A["x1.self_t"])), expected[f"{case}.raw_attn.R_t_t"])
    close(plain.raw_attention(A["x1.cross_t_i"]), expected[f"{case}.raw_attn.R_t_i"])

    # the cross rule reads the versions before the last cross-attention call
    before = plain.rollout([A["lang0"], A["lang1"], A["x0.self_t"]])
    image = plain.rollout([A["vis0"], A["vis1"], A["x0.self_i"]])
    text = plain.rollout([A["lang0"], A["lang1"], A["x0.self_t"], A["x1.self_t"]])
    close(without_corner(text), expected[f"{case}.rollout.R_t_t"])
    close(image, expected[f"{case}.rollout.R_i_i"])
    across = plain.rollout_across(before, A["x1.cross_t_i"], image)
    close(across, expected[f"{case}.rollout.R_t_i"])


# ------------------------------------------------------------ detr_dec2


def detr_sites(case, target):
    expected = golden("detr_dec2")
    names = ["enc0", "enc1", "dec0.self", "dec0.cross", "dec1.self", "dec1.cross"]
    return {
        name: (expected[f"{case}.attn.{name}"], expected[f"{case}.{target}.grad.{name}"])
        for name in names
    }


def detr(sites, weigh, within, across):
    bar = {name: weigh(A, G) for name, (A, G) in sites.items()}
    R = plain.identity_blocks({"i": len(bar["enc0"]), "q": 5}, absent=[("i", "q")])
    for layer in range(2):
        R = within(R, "i", bar[f"enc{layer}"])
    for layer in range(2):
        R = within(R, "q", bar[f"dec{layer}.self"])
        R = across(R, "q", "i", bar[f"dec{layer}.cross"])
    return R


@pytest.mark.parametrize(("normalize", "self_in_rule_10"), ALL_OPTIONS)
@pytest.mark.parametrize("target", ["t0", "t1"])
@pytest.mark.parametrize("case", ["in0", "in1"])
def test_detr(case, target, normalize, self_in_rule_10):
    expected = golden("detr_dec2")

    def across(R, s, q, A_bar):
        return plain.gae_across(
            R, s, q, A_bar, normalize=normalize, self_in_rule_10=self_in_rule_10
        )

    R = detr(detr_sites(case, target), plain.gae_map, plain.gae_within, across)
    name = f"{case}.{target}.ours.lrp0_norm{normalize:d}_self10{self_in_rule_10:d}"
    query = int(expected[f"{case}.{target}.query"])
    close(R["q", "i"][query], expected[f"{name}.R_q_i"])
    if normalize and self_in_rule_10:
        close(R["q", "i"], expected[f"{name}.R_q_i_all"])
        close(R["i", "i"], expected[f"{name}.R_i_i"])
        close(R["q", "q"], expected[f"{name}.R_q_q"])


@pytest.mark.parametrize("target", ["t0", "t1"])
@pytest.mark.parametrize("case", ["in0", "in1"])
def test_detr_without_aggregation(case, target):
    expected = golden("detr_dec2")

    def within(R, s, A_bar):
        return plain.gae_within(R, s, A_bar, aggregate=False)

    def across(R, s, q, A_bar):
        return plain.gae_across(R, s, q, A_bar, normalize=False, aggregate=False)

    R = detr(detr_sites(case, target), plain.gae_map, within, across)
    query = int(expected[f"{case}.{target}.query"])
    close(R["q", "i"][query], expected[f"{case}.{target}.ours_no_agg.lrp0_norm0.R_q_i"])


@pytest.mark.parametrize("target", ["t0", "t1"])
@pytest.mark.parametrize("case", ["in0", "in1"])
def test_detr_class_agnostic(case, target):
    expected = golden("detr_dec2")
    A = {name: pair[0] for name, pair in detr_sites(case, target).items()}
    query = int(expected[f"{case}.{target}.query"])
    raw = plain.raw_attention(A["dec1.cross"])
    close(raw[query], expected[f"{case}.{target}.raw_attn.R_q_i"])
    queries = plain.rollout([A["dec0.self"], A["dec1.self"]])
    image = plain.rollout([A["enc0"], A["enc1"]])
    across = plain.rollout_across(queries, A["dec1.cross"], image)
    close(across[query], expected[f"{case}.{target}.rollout.R_q_i"])


# ------------------------------------------------------------ heterogenous attention


def test_the_three_corrections():
    A = torch.tensor([[[0.2, 0.8]], [[0.5, 0.5]]], dtype=torch.float64)
    G = torch.tensor([[[1.0, -2.0]], [[-4.0, 6.0]]], dtype=torch.float64)
    by_hand = {"positive": [[0.1, 1.5]], "full": [[-0.9, 0.7]], "absolute": [[1.1, 2.3]]}
    for correction, numbers in by_hand.items():
        expected = torch.tensor(numbers, dtype=torch.float64)
        close(plain.heterogenous_map(A, G, correction), expected)


@pytest.mark.parametrize("correction", ["positive", "full", "absolute"])
@pytest.mark.parametrize("case", ["in0", "in1"])
def test_heterogenous_is_one_product_of_joint_matrices(case, correction):
    """HG Eq. 4-7 on all sources at once: R <- (I + the call's block in the joint matrix) R."""
    sites = lxmert_sites(case, "t0")
    bar = {name: plain.heterogenous_map(A, G, correction) for name, (A, G) in sites.items()}
    place = {"t": slice(0, 6), "i": slice(6, 11)}

    def joint(*named):
        matrix = plain.eye(11)
        for s, q, name in named:
            matrix[place[s], place[q]] += bar[name]
        return matrix

    expected = plain.eye(11)
    for layer in range(2):
        calls = joint(("t", "t", f"lang{layer}"), ("i", "i", f"vis{layer}"))
        expected = calls @ expected
    for x in ("x0", "x1"):
        both = joint(("t", "i", f"{x}.cross_t_i"), ("i", "t", f"{x}.cross_i_t"))
        text, image = joint(("t", "t", f"{x}.self_t")), joint(("i", "i", f"{x}.self_i"))
        expected = text @ both @ expected
        if x == "x0":
            expected = image @ expected

    def weigh(A, G):
        return plain.heterogenous_map(A, G, correction)

    def within(R, s, A_bar):
        return plain.heterogenous(R, s, s, A_bar)

    R = lxmert(sites, weigh, within, plain.heterogenous)
    assert R["t", "i"].abs().max() > 1e-6
    for (s, x), matrix in R.items():
        close(matrix, expected[place[s], place[x]])


def test_positive_correction_is_gae_with_eq_10_replaced():
    def across(R, s, q, A_bar):
        new = plain.gae_across(R, s, q, A_bar, normalize=False)
        return {**new, (s, q): R[s, q] + A_bar @ R[q, q]}

    def within(R, s, A_bar):
        return plain.heterogenous(R, s, s, A_bar)

    sites = lxmert_sites("in0", "t1")
    ours = lxmert(sites, plain.heterogenous_map, within, plain.heterogenous)
    theirs = lxmert(sites, plain.gae_map, plain.gae_within, across)
    for key in ours:
        close(ours[key], theirs[key])


def test_noise_link_is_eq_8_to_10_on_one_block():
    sites = detr_sites("in0", "t0")
    bar = {name: plain.heterogenous_map(A, G) for name, (A, G) in sites.items()}
    R = plain.identity_blocks({"i": 12, "q": 5})
    for layer in range(2):
        R = plain.heterogenous(R, "i", "i", bar[f"enc{layer}"])
    linked = plain.noise_link(R, "i")
    rest = linked["i", "i"] - plain.eye(12)
    close(rest.sum(1), torch.ones(12, dtype=torch.float64))
    raw = R["i", "i"] - plain.eye(12)
    close(rest * raw.sum(1, keepdim=True), raw)
    close(linked["q", "q"], R["q", "q"])
