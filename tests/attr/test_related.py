"""The methods that the papers compare with, against plain rewrites and the authors' numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from captum_attn import AttCAT, AttentionGradCam, GradSam, TransitionAttention
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
def test_attention_gradcam_of_every_row(weights):
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


# ------------------------------------------------------------ TAM
def along(x, target, n_steps, start=0.0):
    """The gradients of the last map at every step, n_steps of (B, H, n, n)."""
    steps = torch.linspace(0, 1, n_steps, dtype=torch.float64)
    return [by_hand(start + a * (x - start), target)[2][-1] for a in steps]


TAM_VIT = Path(__file__).parent.parent / "goldens" / "tam_vit"
STARTS = [("tam_start0", {}), ("tam_start1", {"start_layer": 1}),
          ("tam_start2", {"start_layer": 2}), ("tam_start3", {"start_layer": 3}),
          ("tam_start0_steps5", {"n_steps": 5}),
          ("tam_start0_no_integral", {"n_steps": 1})]  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "fused"])
def tam_vit(request):
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**json.loads((TAM_VIT / "config.json").read_text())["timm"])
    for block in model.blocks:
        block.attn.fused_attn = request.param
    model.load_state_dict(load_file(TAM_VIT / "weights.safetensors"))
    x = load_file(TAM_VIT / "inputs.safetensors")["pixel_values"].double()
    return model.double().eval(), x, load_file(TAM_VIT / "expected.safetensors")


@pytest.mark.parametrize(("name", "options"), STARTS)
def test_tam_on_vit(tam_vit, name, options):
    model, x, expected = tam_vit
    method = TransitionAttention(model)
    for k, target in enumerate((1, 3)):
        found = method.attribute_tokens(x, target, **options)["x"]
        close(found[:, 1:], expected[name][:, k])
    targets = expected["argmax"]
    close(method.attribute_tokens(x, targets)["x"][:, 1:], expected["tam_argmax_start0_batch2"])


@pytest.mark.parametrize("plain_options", [{}, {"normalize": True}, {"start_layer": 1}])
def test_tam_of_several_rows(plain_options):
    """Every row that is read has a state and a feedback of its own."""
    x = inputs()
    model, maps, _ = by_hand(x, 1)
    steps = along(x, 1, 4, 0.5)
    method = TransitionAttention(model)
    readout = torch.full(x.shape[:2], 1 / x.shape[1], dtype=torch.float64)
    options = {**plain_options, "n_steps": 4, "baselines": 0.5}
    (found,) = method.attribute_tokens(x, 1, readout=readout, **options).values()
    (one_row,) = method.attribute_tokens(x, 1, readout=2, **options).values()
    (R,) = method.relevance_maps(x, 1, **options).values()
    for i in range(3):
        one = [A[i] for A in maps], [G[i] for G in steps]
        rows = [plain.tam(*one, row, **plain_options) for row in range(R.shape[1])]
        close(R[i], torch.stack(rows))
        close(found[i], sum(rows) / len(rows))
        close(one_row[i], rows[2])


def test_baselines_that_do_not_fit_are_refused():
    x = inputs()
    model = by_hand(x, 1)[0]
    with pytest.raises(OptionError, match="baselines: expected a number, or a tensor that fits"):
        TransitionAttention(model).attribute(x, 1, baselines=torch.zeros(2, 2, 2))
    with pytest.raises(OptionError, match="n_steps: expected an int >= 1"):
        TransitionAttention(model).attribute(x, 1, n_steps=0)
