"""VTranM against a slow, plain rewrite of Eq. 8-20."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from captum_attn import VTranM
from tests import plain_vtranm as plain
from tests.plain import close
from tests.zoo import (
    BERT_SIZE,
    LLAMA_SIZE,
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
