"""The methods that the papers compare with, against plain rewrites and the authors' numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from captum_attn import (
    AttCAT,
    AttentionGradCam,
    BeyondIntuition,
    DeepIntegratedExplanations,
    GradEclip,
    GradSam,
    TransitionAttention,
)
from captum_attn.attr import _backward
from captum_attn.errors import OptionError, WiringError
from captum_attn.observe.tracing.autograd_graph import gradients
from tests import plain_related as plain
from tests.attr.related import by_hand, inputs
from tests.plain import close
from tests.test_goldens import build
from tests.test_goldens_two_streams import detr, detr_image, lxmert, lxmert_inputs  # noqa: F401
from tests.test_goldens_two_streams import stored as golden
from tests.zoo import ZOO
from tests.zoo_streams import STREAMS

VIT = "vit"


@pytest.mark.parametrize(
    "method", [TransitionAttention, BeyondIntuition, DeepIntegratedExplanations]
)
def test_a_bar_over_the_runs(method, capsys):
    explain, x = method(ZOO["vit_cls"].model()), ZOO["vit_cls"].sample().inputs
    quiet = explain.attribute(x, 1, n_steps=3)
    assert capsys.readouterr().err == ""
    shown = explain.attribute(x, 1, n_steps=3, show_progress=True)
    assert f"{method.get_name()} attribution: 100%" in capsys.readouterr().err
    assert torch.equal(quiet, shown)


@pytest.mark.parametrize("method", [TransitionAttention, BeyondIntuition])
def test_baselines_of_ids_are_the_tokens_that_they_become(method):
    """As Captum gives them, and alike in a batch and alone."""
    model, inputs = ZOO["bert"].fresh(), dict(ZOO["bert"].sample().inputs)
    ids = torch.full_like(inputs["input_ids"], 7)
    seen = []
    with model.bert.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(**{**inputs, "input_ids": ids})
    explain, plain_ids = method(model), inputs["input_ids"]
    of_tokens = explain.attribute(inputs, 1, n_steps=4, baselines=seen[0].detach())["input_ids"]
    of_ids = explain.attribute(inputs, 1, n_steps=4, baselines={"input_ids": ids})["input_ids"]
    close(of_ids, of_tokens, 1e-6)
    zero = explain.attribute(inputs, 1, n_steps=4)["input_ids"]
    assert float((of_ids - zero).abs().max()) > 1e-3 * float(zero.abs().max())
    options = {"n_steps": 4, "internal_batch_size": 1}
    alone = explain.attribute(inputs, 1, baselines={"input_ids": ids}, **options)["input_ids"]
    close(alone, of_ids, 1e-6)
    together = explain.attribute(plain_ids, 1, n_steps=4, baselines=(ids,))
    assert torch.equal(together, explain.attribute(plain_ids, 1, n_steps=4, baselines=ids))
    for wrong in ({"input_ids": 0}, {"ids": ids}, {"input_ids": ids + 99999}):
        with pytest.raises(OptionError, match="baselines: "):
            explain.attribute(inputs, 1, baselines=wrong)
    for wrong in ((ids[:, :2],), (ids, ids)):
        with pytest.raises(OptionError, match="baselines: "):
            explain.attribute(plain_ids, 1, baselines=wrong)


def test_attcat_asks_for_all_layers_in_one_backward_pass(monkeypatch):
    passes = []

    def counted(*args, **kwargs):
        passes.append(args)
        return gradients(*args, **kwargs)

    monkeypatch.setattr(_backward, "gradients", counted)
    case = ZOO["bert"]
    AttCAT(case.model()).attribute(case.sample().inputs, 1)
    assert len(passes) == 2  # and one to the rows that are read


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
STARTS = [
    ("tam_start0", {}),
    ("tam_start1", {"start_layer": 1}),
    ("tam_start2", {"start_layer": 2}),
    ("tam_start3", {"start_layer": 3}),
    ("tam_start0_steps5", {"n_steps": 5}),
    ("tam_start0_no_integral", {"n_steps": 1}),
]


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
    with pytest.raises(OptionError, match="baselines: expected a finite number, or a tensor"):
        TransitionAttention(model).attribute(x, 1, baselines=torch.zeros(2, 2, 2))
    with pytest.raises(OptionError, match="n_steps: expected a whole number from 1"):
        TransitionAttention(model).attribute(x, 1, n_steps=0)


@pytest.mark.parametrize("method", [TransitionAttention, BeyondIntuition])
def test_baselines_are_those_of_the_examples_in_a_part_of_the_batch(method):
    """A row for each example, or one for all, also where that has as many rows as the batch."""
    x = inputs()
    model, options = by_hand(x, 1)[0], {"n_steps": 3}
    each, one = torch.randn_like(x), torch.randn(1, *x.shape[1:], dtype=torch.float64)
    positions = torch.randn(x.shape[1:], dtype=torch.float64)  # (n, D), of every example
    three = x[:, : len(x)]  # as many tokens as examples
    for given, baselines in ((x, each), (x, one), (x, positions), (three, positions[: len(x)])):
        explain = method(model).attribute
        whole = explain(given, 1, baselines=baselines, **options)
        parts = explain(given, 1, baselines=baselines, internal_batch_size=2, **options)
        close(parts, whole)
    alone = method(model).attribute(x[1:2], 1, baselines=each[1:2], **options)
    close(alone, method(model).attribute(x, 1, baselines=each, **options)[1:2])


def test_baselines_of_named_inputs_and_of_tokens_are_divided_too():
    case = ZOO["bert"]
    model, sample = case.fresh().double(), case.sample()
    n, name = sample.inputs["input_ids"].shape[1], case.stream
    tokens = torch.randn(3, n, 16, dtype=torch.float64)
    explain, options = TransitionAttention(model).attribute, {"n_steps": 2, "baselines": tokens}
    whole = explain(sample.inputs, 1, **options)[name]
    close(explain(sample.inputs, 1, internal_batch_size=2, **options)[name], whole)
    mapping = ZOO["bert_embeddings_mapping"]
    given = mapping.sample().to(torch.float64).inputs
    options["baselines"] = {"inputs_embeds": torch.randn_like(given["inputs_embeds"])}
    whole = explain(given, 1, **options)["inputs_embeds"]
    close(explain(given, 1, internal_batch_size=1, **options)["inputs_embeds"], whole)


@pytest.mark.parametrize("method", [TransitionAttention, BeyondIntuition])
def test_a_baseline_that_the_model_cannot_read_is_an_error_of_ours(method):
    """Idefics3 takes images that are all 0 for padding and leaves them out."""
    case = STREAMS["idefics3"]
    sample, explain = case.sample(), method(case.model()).attribute
    asked = {"objective": case.objective, "n_steps": 2}
    with pytest.raises(OptionError, match="baselines: the model cannot read its inputs at 0.00"):
        explain(sample.inputs, case.target_of(sample), **asked)
    found = explain(sample.inputs, case.target_of(sample), baselines=1.0, **asked)
    assert found["pixel_values"].any()


def test_ids_are_scaled_as_the_tokens_that_enter_the_first_block():
    """BERT: the output of the embeddings, positions and types included."""
    case = ZOO["bert_eager"]
    model, sample = case.fresh().double(), case.collate(case.raw(1))
    name = case.stream
    found = TransitionAttention(model).attribute_tokens(sample.inputs, 1, n_steps=3)[name][0]

    def gradient(alpha):
        def scale(module, args, kwargs):
            given = "hidden_states" in kwargs
            x = kwargs["hidden_states"] if given else args[0]
            if given:
                return args, {**kwargs, "hidden_states": alpha * x}
            return (alpha * x, *args[1:]), kwargs

        first = next(m for n, m in model.named_modules() if n.endswith("encoder.layer.0"))
        hook = first.register_forward_pre_hook(scale, with_kwargs=True)
        output = model(**sample.inputs, output_attentions=True)
        hook.remove()
        (last,) = torch.autograd.grad(output.logits[0, 1], [output.attentions[-1]])
        return [A.detach()[0].double() for A in output.attentions], last[0].double()

    maps = gradient(1.0)[0]
    steps = [gradient(alpha)[1] for alpha in (0.0, 0.5, 1.0)]
    close(found, plain.tam(maps, steps, 0), 1e-5)  # transformers' eager softmax is in float32


# ------------------------------------------------------------ BI
def recorded(model, x):
    """What the values are, and what enters each block: (B, n, D) for every layer."""
    values, entering, hooks = [], [], []
    for block in model.blocks:
        hooks.append(block.register_forward_pre_hook(lambda m, args: entering.append(args[0])))
        value = block.attention.value
        hooks.append(value.register_forward_hook(lambda m, args, out: values.append(out)))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return values, entering


@pytest.mark.parametrize("start_layer", [0, 1])
@pytest.mark.parametrize("perception", ["head", "token"])
def test_bi(perception, start_layer):
    x = inputs()
    model, maps, gradients = by_hand(x, 1)
    steps, (values, entering) = along(x, 1, 3), recorded(model, x)
    options = {"perception": perception, "n_steps": 3, "start_layer": start_layer}
    method = BeyondIntuition(model)
    readout = torch.full(x.shape[:2], 1 / x.shape[1], dtype=torch.float64)
    (found,) = method.attribute_tokens(x, 1, **options).values()
    (pooled,) = method.attribute_tokens(x, 1, readout=readout, **options).values()
    for i in range(3):
        if perception == "head":
            perceived = [
                plain.bi_head_map(A[i], G[i]) for A, G in zip(maps, gradients, strict=True)
            ]
        else:
            projections = [block.attention.out.weight.detach().T for block in model.blocks]
            perceived = [
                plain.bi_token_map(A[i], v[i], W, E[i])
                for A, v, W, E in zip(maps, values, projections, entering, strict=True)
            ]
        rows = plain.bi(perceived[start_layer:], [G[i] for G in steps])
        close(found[i], rows[0])
        close(pooled[i], rows.mean(0))


# ------------------------------------------------------------ Grad-ECLIP
CLIP = Path(__file__).parent.parent / "goldens" / "gradeclip_clip_4heads"


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**json.loads((CLIP / "config.json").read_text()))
    config._attn_implementation = "sdpa"
    model = CLIPModel(config)
    model.load_state_dict(load_file(CLIP / "weights.safetensors"), strict=False)
    return model.double().eval(), load_file(CLIP / "inputs.safetensors")


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("text", [0, 1])
def test_grad_eclip_on_clip(clip, image, text):
    """Both towers in one call; the stored maps are those of the cosine, texts cut and divided."""
    model, given = clip
    expected, scale = load_file(CLIP / "expected.safetensors"), model.logit_scale.exp().item()
    pair = {
        "input_ids": given["input_ids"][text : text + 1],
        "pixel_values": given["pixel_values"][image : image + 1].double(),
    }

    def tokens(**options):
        return GradEclip(model).attribute_tokens(pair, 0, **options)

    for n in (1, 3):
        found = tokens(layers_explained=n)["pixel_values"][0]
        close(found[1:].view(4, 4) / scale, expected[f"heads4_image_n{n}"][image, text])
        assert found[0] == 0  # no input enters [CLS]
    bare = tokens(similarity=False)["pixel_values"][0, 1:].view(4, 4) / scale
    close(bare, expected["heads4_image_noksim"][image, text])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("image", [0, 1])
def test_grad_eclip_on_the_text_of_clip(clip, image, n):
    """Text 0 has no position behind EOT, which the authors' smallest and largest cosine heed."""
    model, given = clip
    expected = load_file(CLIP / "expected.safetensors")
    pair = {"input_ids": given["input_ids"][:1],
            "pixel_values": given["pixel_values"][image : image + 1].double()}  # fmt: skip
    found = GradEclip(model).attribute_tokens(pair, 0, layers_explained=n)["input_ids"][0]
    words = found[1:-1]
    close(words / words.sum(), expected[f"heads4_text0_n{n}"][image])


@pytest.mark.parametrize("layers_explained", [1, 2])
@pytest.mark.parametrize("similarity", [True, False])
def test_grad_eclip(similarity, layers_explained):
    x = inputs()
    model, _, gradients = by_hand(x, 1)
    queries, keys, hooks = [], [], []
    for block in model.blocks:
        for module, seen in ((block.attention.query, queries), (block.attention.key, keys)):
            hooks.append(module.register_forward_hook(lambda m, a, out, s=seen: s.append(out)))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    options = {"similarity": similarity, "layers_explained": layers_explained}
    (found,) = GradEclip(model).attribute_tokens(x, 1, **options).values()
    (R,) = GradEclip(model).relevance_maps(x, 1, **options).values()
    close(R[:, 0], found)
    for i in range(3):
        layers = []
        for G, *operands in zip(gradients, queries, keys, strict=True):
            q, k = (y[i].unflatten(-1, (4, -1)).transpose(0, 1) for y in operands)
            layers.append(plain.grad_eclip(G[i], q, k, 0, similarity).clamp(min=0))
        close(found[i], sum(layers[-layers_explained:]))


def test_grad_eclip_says_what_it_is_meant_for(lxmert):  # noqa: F811
    with pytest.raises(WiringError, match="meant for the two towers of CLIP"):
        GradEclip(lxmert).attribute(lxmert_inputs("in0"), 1)
