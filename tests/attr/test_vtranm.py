"""VTranM against a slow, plain rewrite of Eq. 8-20."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
import transformers

from captum_attn import VTranM
from captum_attn.attr._request import Request
from captum_attn.observe.vectors.vector_changes import VectorChanges
from tests import plain_vtranm as plain
from tests.plain import close
from tests.zoo import (
    BERT_SIZE,
    LLAMA_SIZE,
    VIT_SIZE,
    VOCABULARY,
    bert,
    gpt2,
    hf,
    llama,
    set_weights,
    timm_vit,
    vit,
)

VARIANTS = [  # Table 4: the names of our options, and the rewrite's
    {"length": length, "direction": direction, "aggregate": aggregate}
    for length in (True, False)
    for direction in (True, False)
    for aggregate in (True, False)
]
PLAIN_NAMES = {"length": "with_length", "direction": "with_direction", "aggregate": "aggregate"}
every_variant = pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda o: "-".join(k for k, on in o.items() if on) or "none"
)


def ready(model):
    set_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "lambda1")):  # LayerScale, away from 1 and uneven
                parameter.mul_(0.5).add_(torch.linspace(-0.3, 0.4, len(parameter)))
    if hasattr(getattr(model, "config", None), "_experts_implementation"):
        model.config._experts_implementation = "eager"  # the others have no float64
    return model.double().eval().requires_grad_(False)


def image(seed=0):
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


def ids(n=6):
    return torch.randint(10, VOCABULARY, (n,), generator=torch.Generator().manual_seed(1))


gptj = partial(
    hf, "GPTJ", "GPTJForCausalLM", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2,
    n_positions=16, rotary_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
mixtral = partial(
    hf, "Mixtral", "MixtralForCausalLM", **LLAMA_SIZE, num_local_experts=3, num_experts_per_tok=2
)
albert = partial(
    hf, "Albert", "AlbertForSequenceClassification", embedding_size=8,
    **BERT_SIZE | {"num_hidden_layers": 3},
)  # fmt: skip


def parallel_vit(**options):
    """ViT-22B's blocks: attention and feed-forward in parallel."""
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, num_classes=5,
        init_values=0.1, block_fn=partial(ParallelScalingBlock, **options),
    )  # fmt: skip


# name -> model, the plain walker, its input, the target, the rows that are read
MODELS = {
    "timm": (timm_vit, plain.timm_vit, image, 2, 0),
    "timm_layer_scale": (partial(timm_vit, init_values=0.1), plain.timm_vit, image, 2, 0),
    "timm_registers": (
        partial(timm_vit, reg_tokens=4, no_embed_class=True), plain.timm_vit, image, 1, 0,
    ),
    "timm_qk_norm": (partial(timm_vit, qk_norm=True), plain.timm_vit, image, 3, 0),
    "timm_drop_path": (
        partial(timm_vit, drop_path_rate=0.3, init_values=0.1, proj_drop_rate=0.1),
        plain.timm_vit, image, 2, 0,
    ),
    "timm_mean": (
        partial(timm_vit, class_token=False, global_pool="avg"), plain.timm_vit, image, 2,
        [1 / 16] * 16,
    ),
    "deit": (partial(timm_vit, distilled=True), plain.timm_vit, image, 2, None),
    "timm_parallel": (
        parallel_vit, plain.timm_parallel_scaling,
        image, 2, 0,
    ),
    "hf_vit": (vit, plain.hf_vit, image, 2, 0),
    "bert": (bert, plain.bert, ids, 2, 0),
    "albert": (albert, plain.albert, ids, 2, 0),
    "llama": (llama, plain.llama, ids, (5, 17), -1),
    "mixtral": (mixtral, plain.llama, ids, (5, 17), -1),
    "gpt2": (gpt2, plain.gpt2, ids, (5, 17), -1),
    "gptj": (gptj, plain.gptj, ids, (5, 17), -1),
}  # fmt: skip


IN_FLOAT32 = {"gptj"}  # which computes its scores in float32, also in a float64 model


def read(C, rows):
    if isinstance(rows, int):
        return C[rows]
    return torch.tensor(rows, dtype=torch.float64) @ C


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    build, walk, given, target, rows = MODELS[request.param]
    model = ready(build())
    x = given()
    trace = walk(model, x)
    with torch.no_grad():
        output = model(x[None])
    tolerance = 1e-6 if request.param in IN_FLOAT32 else 1e-10
    # the walker walks the model
    close(trace.output.detach(), getattr(output, "logits", output), tolerance)
    return VTranM(model), x, trace, target, rows, tolerance


@every_variant
def test_the_equations(case, options):
    method, x, trace, target, rows, tolerance = case
    named = {PLAIN_NAMES[name]: value for name, value in options.items()}
    C = plain.vtranm(trace, plain.probability(target), **named)
    ((_, found),) = method.relevance_maps(x[None], target, **options).items()
    close(found[0], C, tolerance)
    ((_, tokens),) = method.attribute_tokens(x[None], target, **options).items()
    if rows is not None:
        close(tokens[0], read(C, rows), tolerance)
    else:  # both heads of DeiT read a token
        assert (tokens > 0).any()


def test_padding_is_left_out_of_the_softmax():
    """Three texts in a batch, each against the equations with its own real tokens."""
    model = ready(bert())
    lengths = (6, 3, 5)
    batch, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for i, n in enumerate(lengths):
        batch[i, :n], mask[i, :n] = ids(n) + i, 1
    method = VTranM(model)
    found = method.attribute_tokens({"input_ids": batch, "attention_mask": mask}, 2)["input_ids"]
    for i, n in enumerate(lengths):
        padded = plain.bert(model, batch[i], mask[i].bool())
        close(found[i], plain.vtranm(padded, plain.probability(2))[0])
        alone = plain.vtranm(plain.bert(model, batch[i, :n]), plain.probability(2))[0]
        close(found[i, :n], alone)
        assert (found[i, n:] == 0).all()


@pytest.mark.parametrize(
    ("attention", "left", "dtype", "tolerance"),
    [
        ("sdpa", False, torch.float64, 1e-10),
        ("eager", False, torch.float64, 1e-6),  # its softmax is in float32
        ("sdpa", True, torch.float64, 1e-6),  # and so are rotary angles, at other positions
        ("eager", True, torch.float32, 1e-5),
    ],
)
def test_padding_of_causal_models(attention, left, dtype, tolerance):
    """On the left a padding token sees nothing, and what it then attends to must not count."""
    model = ready(llama(attention)).to(dtype)
    lengths = (6, 3)
    batch, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for i, n in enumerate(lengths):
        where = slice(6 - n, 6) if left else slice(0, n)
        batch[i, where], mask[i, where] = ids(n), 1
    targets = [(5, 17), (5 if left else 2, 17)]
    tokens = VTranM(model).attribute_tokens({"input_ids": batch, "attention_mask": mask}, targets)
    for i, n in enumerate(lengths):
        C = plain.vtranm(plain.llama(model.double(), ids(n)), plain.probability((n - 1, 17)))
        close(tokens["input_ids"][i][mask[i].bool()].double(), C[n - 1], tolerance)


def test_one_projection_for_both_branches():
    """timm's ViT-22B block with a fused output projection."""
    from timm.models.vision_transformer import ParallelScalingBlock

    if "fuse_out_proj" not in inspect.signature(ParallelScalingBlock).parameters:
        pytest.skip("this timm has no fused output projection")
    model = ready(parallel_vit(fuse_out_proj=True))
    trace = plain.timm_parallel_scaling(model, image())
    close(trace.output.detach(), model(image()[None]))
    C = plain.vtranm(trace, plain.probability(2))
    close(VTranM(model).attribute_tokens(image()[None], 2)["x"][0], C[0])


def test_a_batch_is_explained_as_its_examples():
    model = ready(timm_vit(init_values=0.1))
    images = torch.stack([image(seed) for seed in range(3)])
    method = VTranM(model)
    together = method.attribute(images, [0, 2, 4])
    for i, target in enumerate([0, 2, 4]):
        close(together[i], VTranM(model).attribute(images[i : i + 1], target)[0])
    grid = method.attribute(images, 2, interpolation="nearest").sum(1)
    tokens = method.attribute_tokens(images, 2)["x"]
    close(grid[:, ::4, ::4].flatten(1), tokens[:, 1:])


# ---------------------------------------------------------------- families, by what is found
def found_in(model, inputs, target):
    """-> attention calls, those with a skip connection found, feed-forwards behind and beside."""
    method = VTranM(model)
    with method._run(inputs, Request(target), {}) as run:
        transforms = VectorChanges(run.observation)
        residuals = transforms.layers.residuals
        beside = [change for u in run.attention_states for change in transforms.beside(u)]
        changes = [transforms.attention(u) for u in run.attention_states]
        assert all(change.after.isfinite().all() for change in changes)
        behind = sum(len(held) for held in transforms._by_state().values())
        return len(run.observation.tap.calls), len(residuals), behind, len(beside)


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
DECODERS = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 32,
}  # fmt: skip
SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_labels": 5,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
    "num_feat_extract_layers": 2,
}  # fmt: skip
FAMILIES = {
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", SMALL | {"intermediate_size": 32}, (2, 2, 0, 2)),
    "falcon": ("Falcon", "FalconForCausalLM", SMALL, (2, 2, 0, 2)),
    "phi": ("Phi", "PhiForCausalLM", SMALL | {"intermediate_size": 32}, (2, 2, 0, 2)),
    "cohere": ("Cohere", "CohereForCausalLM", LLAMA_SIZE, (2, 2, 0, 2)),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", LLAMA_SIZE | {"head_dim": 8}, (2, 2, 2, 0)),
    "granite": (
        "Granite", "GraniteForCausalLM", LLAMA_SIZE | {"residual_multiplier": 0.3}, (2, 2, 2, 0),
    ),
    "olmoe": (
        "Olmoe", "OlmoeForCausalLM", LLAMA_SIZE | {"num_experts": 4, "num_experts_per_tok": 2},
        (2, 2, 2, 0),
    ),
    "xlnet": (
        "XLNet", "XLNetForSequenceClassification",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32,
         "num_labels": 5}, (2, 2, 2, 0),
    ),
    "t5": (
        "T5", "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2,
         "num_heads": 2}, (6, 6, 4, 0),
    ),
    "bart": ("Bart", "BartForConditionalGeneration", DECODERS, (6, 6, 4, 0)),
    "swin": (
        "Swin", "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
         "window_size": 2, "num_labels": 5}, (4, 4, 4, 0),
    ),
    "siglip": ("Siglip", "SiglipForImageClassification", {"vision_config": VIT_SIZE}, (3, 3, 3, 0)),
    "perceiver": (
        "Perceiver", "PerceiverForSequenceClassification",
        {"vocab_size": VOCABULARY, "d_model": 16, "num_latents": 4, "d_latents": 16,
         "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 2,
         "num_cross_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 5},
        (4, 4, 4, 0),
    ),
    "conformer": (
        "Wav2Vec2Conformer", "Wav2Vec2ConformerForSequenceClassification", SPEECH, (2, 2, 4, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_what_is_found_in_families(family):
    kind, head, options, expected = FAMILIES[family]
    if not hasattr(transformers, head):
        pytest.skip(f"this transformers has no {head}")
    model = hf(kind, head, **options)
    set_weights(model)
    model.eval()
    side, target = (32 if family == "swin" else 16), 1
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.stack([ids(), ids() // 2 + 5])}
    if "Image" in head:
        inputs = {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}
    elif kind == "Wav2Vec2Conformer":
        inputs = {"input_values": torch.randn(2, 200, generator=generator)}
    elif "Conditional" in head:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if "LM" in head or "Conditional" in head:
        target = (5, 3)
    assert found_in(model, inputs, target) == expected
    for tokens in VTranM(model).attribute_tokens(inputs, target).values():
        assert tokens.isfinite().all()


@pytest.mark.parametrize("kind", ["Gemma2", "Olmo2"])
def test_norms_behind_the_projection_are_held(kind):
    """w_h[i, j] = s_i ‖v_j W γ‖ / ‖E_j‖ · NECC, s_i the scale of the norm of query i."""
    if not hasattr(transformers, f"{kind}ForCausalLM"):
        pytest.skip(f"this transformers has no {kind}")
    model = ready(hf(kind, f"{kind}ForCausalLM", **LLAMA_SIZE))
    layer, inputs, seen = model.model.layers[1], {"input_ids": ids()[None]}, {}
    norm, attention = layer.post_attention_layernorm, layer.self_attn
    kept = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(E=args[0][0])),
        norm.register_forward_pre_hook(lambda _, args: seen.update(y=args[0][0])),
        attention.v_proj.register_forward_hook(lambda *args: seen.update(v=args[2][0])),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in kept:
        handle.remove()
    method, bare = VTranM(model), {"length": False, "direction": False}
    measured, weighted = (
        method.layer_maps(inputs, (5, 17), **options)[1][1][0].double() for options in ({}, bare)
    )
    heads, d = len(measured), attention.head_dim
    values = seen["v"].double().unflatten(-1, (-1, d)).transpose(0, 1)
    values = values.repeat_interleave(heads // len(values), 0)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    scale = (seen["y"].double().square().mean(-1) + eps).rsqrt()  # s_i
    gamma = norm.weight.double() + (kind == "Gemma2")
    for h in range(heads):
        weight = attention.o_proj.weight.double()[:, h * d : (h + 1) * d].T * gamma
        after, real = values[h] @ weight, [True] * len(ids())
        w = plain.transformation_weights(seen["E"].double(), after, real)
        close(measured[h], weighted[h] * w * scale[:, None], 1e-5)  # its norms are in float32
