"""The models of `scaling`, with random weights, and what is called on each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captum_attn import GenericAttention
from tests.benchmarks import matrix_form
from tests.benchmarks.benchmark import TARGET

Call = Callable[[], object]
PLAIN = {"P": matrix_form.authors_generic_attention, "M": matrix_form.generic_attention}


class Model(NamedTuple):
    """What is measured.

    Args:
        calls (callable): (tokens, tiny, kind) -> the call of kind "ours", "F", "P" or "M".
        tokens (tuple of int): the lengths of the sequences.
        kinds (tuple of str): what there is to measure.
        most_plain (int): the longest sequence for which P and M fit into memory.
        most_timed (int): the longest that is timed in turns; beyond it the first call has to do.
    """

    calls: Callable[[int, bool, str], Call]
    tokens: tuple[int, ...]
    kinds: tuple[str, ...] = ("ours", "F")
    most_plain: int = 0
    most_timed: int = 10**9


def vit_and_image(tokens: int, tiny: bool) -> tuple[nn.Module, Tensor]:
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = (32, 2, 2) if tiny else (384, 6, 6)
    side = round((tokens - 1) ** 0.5) * 16
    options = {"embed_dim": width, "depth": depth, "num_heads": heads, "num_classes": 10}
    model = frozen(VisionTransformer(img_size=side, patch_size=16, **options))
    return model, torch.randn(1, 3, side, side)


def vit(tokens: int, tiny: bool, kind: str) -> Call:
    model, x = vit_and_image(tokens, tiny)
    if kind in PLAIN:
        matrix_form.set_fused(model, False)
        model.requires_grad_(kind == "P")
        return lambda: PLAIN[kind](model, x, TARGET)
    if kind == "ours":
        method = GenericAttention(model)
        return lambda: method.attribute(x, target=TARGET)
    return lambda: backward(lambda image: model(image)[:, TARGET], x)


def llama(tokens: int, tiny: bool, kind: str) -> Call:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary = (32, 2, 50) if tiny else (512, 4, 32000)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=tokens, use_cache=False,
    )  # fmt: skip
    model = frozen(LlamaForCausalLM(config))
    ids = torch.randint(vocabulary, (1, tokens))
    if kind == "ours":
        method = GenericAttention(model)
        return lambda: method.attribute({"input_ids": ids}, target=(tokens - 1, TARGET))
    words = model.get_input_embeddings()(ids)
    return lambda: backward(lambda e: model(inputs_embeds=e).logits[:, -1, TARGET], words)


def lxmert(tokens: int, tiny: bool, kind: str) -> Call:
    from transformers import LxmertConfig, LxmertForQuestionAnswering

    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = LxmertConfig(**(small if tiny else {}))
    model = frozen(LxmertForQuestionAnswering(config))
    regions, boxes = torch.randn(1, 36, config.visual_feat_dim), torch.rand(1, 36, 4)
    given = {"visual_feats": regions, "visual_pos": boxes}
    ids = torch.randint(config.vocab_size, (1, tokens - 36))
    if kind == "ours":
        method = GenericAttention(model)
        return lambda: method.attribute({"input_ids": ids, **given}, target=TARGET)
    words = model.get_input_embeddings()(ids)

    def score(e: Tensor, v: Tensor) -> Tensor:
        answers = model(inputs_embeds=e, visual_feats=v, visual_pos=boxes).question_answering_score
        return answers[:, TARGET]

    return lambda: backward(score, words, regions)


def detr(tokens: int, tiny: bool, kind: str) -> Call:
    from transformers import DetrConfig, DetrForObjectDetection

    small = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5}
    config = DetrConfig(use_pretrained_backbone=False, **(small if tiny else {}))
    model = frozen(DetrForObjectDetection(config))
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bn3.weight"):  # zero as it is made, which would let pixels stay apart
            weight.fill_(0.3)
    image = torch.randn(1, 3, 64, 96) if tiny else torch.randn(1, 3, 800, 1066)
    if kind == "ours":
        method = GenericAttention(model)
        return lambda: method.attribute({"pixel_values": image}, target=(0, 1))
    return lambda: backward(lambda x: model(pixel_values=x).logits[:, 0, 1], image)


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def backward(score: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """F: one forward, one backward to the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(score(*leaves).sum(), leaves)


MODELS = {
    "vit": Model(vit, (1025, 2026, 4097, 8101), ("ours", "F", *PLAIN), most_plain=4097),
    "llama": Model(llama, (1024, 2048, 4096, 8192, 16384), most_timed=8192),
    "lxmert": Model(lxmert, (56,)),
    "detr": Model(detr, (850,)),
}
TINY = {"vit": (17, 50), "llama": (16, 32), "lxmert": (56,), "detr": (6,)}
