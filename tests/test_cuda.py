"""On a GPU: the numbers of the CPU, half precision, long sequences, and models on two devices."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from captum_attn import AttentionRollout, GenericAttention, HeterogenousAttention, VTranM
from tests.zoo import timm_vit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
METHODS = [AttentionRollout, GenericAttention, HeterogenousAttention, VTranM]


def llama(tokens, layers=2, width=64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("method", METHODS)
def test_as_on_the_cpu(method):
    model, images = timm_vit().double(), torch.randn(3, 3, 16, 16).double()
    expected = method(model).attribute(images, target=1)
    found = method(copy.deepcopy(model).cuda()).attribute(images.cuda(), target=1)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
    ids = torch.randint(100, (1, 200))
    model = llama(200)
    options = {"target": (199, 3)}
    expected = method(model).attribute({"input_ids": ids}, **options)["input_ids"][0]
    half = copy.deepcopy(model).cuda().bfloat16()
    found = method(half).attribute({"input_ids": ids.cuda()}, **options)["input_ids"][0].cpu()
    assert torch.isfinite(found).all()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9


def test_32k_tokens_without_a_matrix():
    tokens = 32768
    model = llama(tokens, layers=4, width=512).cuda().bfloat16()
    ids = torch.randint(100, (1, tokens), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    found = GenericAttention(model).attribute({"input_ids": ids}, target=(tokens - 1, 3))
    assert torch.isfinite(found["input_ids"]).all() and float(found["input_ids"].sum()) > 1
    assert torch.cuda.max_memory_allocated() < 8 * tokens**2  # one map of 8 heads has 16 n^2 bytes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("method", METHODS)
def test_layers_on_two_devices(method):
    model = llama(20).double()
    ids = torch.randint(100, (2, 20))
    expected = method(model).attribute({"input_ids": ids}, target=(19, 3))["input_ids"]
    maps = method(model).relevance_maps({"input_ids": ids}, target=(19, 3))

    from accelerate import dispatch_model

    where = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    spread = dispatch_model(copy.deepcopy(model), {**where, "model.rotary_emb": 0, "lm_head": 1})
    inputs = {"input_ids": ids.to("cuda:0")}
    found = method(spread).attribute(inputs, target=(19, 3))["input_ids"]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-10)
    for pair, block in method(spread).relevance_maps(inputs, target=(19, 3)).items():
        torch.testing.assert_close(block.cpu(), maps[pair], rtol=1e-8, atol=1e-10)
