"""The methods that the papers compare with, against plain rewrites and the authors' numbers."""

from __future__ import annotations

import pytest

from captum_attn import AttCAT, AttentionGradCam, GradSam
from captum_attn.errors import OptionError
from tests import plain_related as plain
from tests.attr.related import by_hand, inputs
from tests.plain import close
from tests.test_goldens import build
from tests.test_goldens_two_streams import detr, detr_image, lxmert, lxmert_inputs  # noqa: F401
from tests.test_goldens_two_streams import stored as golden

VIT = "vit"


# ------------------------------------------------------------ Grad-CAM
@pytest.mark.parametrize("weights", ["map", "row"])
def test_attention_gradcam_on_a_model_that_reads_all_tokens(weights):
    """Several rows are read, each with its own weight: the mean of the clamped rows."""
    x = inputs()
    model, maps, gradients = by_hand(x, 1)
    (R,) = AttentionGradCam(model).relevance_maps(x, 1, weights=weights).values()
    for i in range(3):
        close(R[i], plain.attention_gradcam(maps[-1][i], gradients[-1][i], weights))


@pytest.mark.parametrize("kind", ["timm-fused", "transformers-sdpa"])
@pytest.mark.parametrize("target", ["t0", "t1"])
def test_attention_gradcam_on_vit(kind, target):
    """The authors average over the row, and show it between 0 and 1."""
    expected, given = golden(VIT, "expected"), golden(VIT, "inputs")
    model, stream, tolerance = build(kind)
    for case in ("in0", "in1"):
        found = AttentionGradCam(model).attribute_tokens(
            given[f"{case}.pixel_values"].double(),
            int(expected[f"{case}.{target}.target"]),
            weights="row",
        )[stream][0, 1:]
        shown = (found - found.min()) / (found.max() - found.min())
        close(shown, expected[f"{case}.{target}.gradcam.cam"].flatten(), tolerance)


@pytest.mark.parametrize("target", ["t0", "t1"])
@pytest.mark.parametrize("case", ["in0", "in1"])
def test_attention_gradcam_on_lxmert(lxmert, case, target):  # noqa: F811
    expected, prefix = golden("lxmert_vqa", "expected"), f"{case}.{target}.attn_gradcam"
    index = int(expected[f"{case}.{target}.target"])
    method = AttentionGradCam(lxmert)
    R = method.relevance_maps(lxmert_inputs(case), index)
    close(R["input_ids", "visual_feats"][0], expected[f"{prefix}.R_t_i"])
    close(R["input_ids", "input_ids"][0, 1:], expected[f"{prefix}.R_t_t"][1:])
    tokens = method.attribute_tokens(lxmert_inputs(case), index)
    close(tokens["visual_feats"][0], expected[f"{prefix}.R_t_i"][0])
    close(tokens["input_ids"][0, 1:], expected[f"{prefix}.R_t_t"][0, 1:])


@pytest.mark.parametrize("target", ["t0", "t1"])
@pytest.mark.parametrize("case", ["in0", "in1"])
def test_attention_gradcam_on_detr(detr, case, target):  # noqa: F811
    expected = golden("detr_dec2", "expected")
    query, label = (int(expected[f"{case}.{target}.{key}"]) for key in ("query", "target"))
    tokens = AttentionGradCam(detr).attribute_tokens(detr_image(case), (query, label))
    close(tokens["pixel_values"][0], expected[f"{case}.{target}.attn_gradcam.R_q_i"])


# ------------------------------------------------------------ Grad-SAM
@pytest.mark.parametrize("axis", ["key", "query"])
def test_grad_sam(axis):
    x = inputs()
    model, maps, gradients = by_hand(x, 1)
    (found,) = GradSam(model).attribute_tokens(x, 1, axis=axis).values()
    for i in range(3):
        one = [A[i] for A in maps], [G[i] for G in gradients]
        close(found[i], plain.grad_sam(*one, axis))


# ------------------------------------------------------------ AttCAT
def test_attcat():
    x = inputs()
    model, maps, _ = by_hand(x, 1)
    entering = []

    def enter(module, args):
        args[0].retain_grad()
        entering.append(args[0])

    hooks = [block.register_forward_pre_hook(enter) for block in model.blocks]
    model(x.clone().requires_grad_())[:, 1].sum().backward()
    for hook in hooks:
        hook.remove()
    (found,) = AttCAT(model).attribute_tokens(x, 1).values()
    for i in range(3):
        maps_, vectors = [A[i] for A in maps], [h.detach()[i] for h in entering]
        close(found[i], plain.attcat(maps_, vectors, [h.grad[i] for h in entering]))


@pytest.mark.parametrize("method", [GradSam, AttCAT])
def test_what_has_no_matrices_says_so(method):
    x = inputs()
    with pytest.raises(OptionError, match="no matrices of tokens by tokens"):
        method(by_hand(x, 1)[0]).relevance_maps(x, 1)
