"""Attention maps in blocks of queries: the same numbers whatever the size of the blocks."""

import pytest
import torch

from captum_attn import (
    AttentionRollout,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    VTranM,
)
from captum_attn.errors import OptionError
from captum_attn.observe.capture.attention_call import Block
from tests.plain import close
from tests.test_goldens_two_streams import detr as detr
from tests.test_goldens_two_streams import detr_image, lxmert_inputs
from tests.test_goldens_two_streams import lxmert as lxmert
from tests.zoo import ZOO

METHODS = {
    "raw": (RawAttention, {}),
    "rollout": (AttentionRollout, {"head_fusion": "max"}),
    "gae": (GenericAttention, {}),
    "gae_replaced": (GenericAttention, {"aggregate": False}),
    "full": (HeterogenousAttention, {"correction": "full"}),
    "linked": (HeterogenousAttention, {"noise_link": True}),
    "vtranm": (VTranM, {}),
}
every_method = pytest.mark.parametrize("name", METHODS)


def alike(found, expected):
    assert set(found) == set(expected)
    for key in expected:
        close(found[key], expected[key], 1e-5 if expected[key].dtype == torch.float32 else 1e-12)


@every_method
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "case", ["vit_cls", "bert", "bert_eager", "llama_left", "grouped_sdpa", "patchtst"]
)
def test_single_streams(case, size, name):
    """Padding, causality, grouped heads, windows; fused and written out."""
    case, (method, options) = ZOO[case], METHODS[name]
    sample, explain = case.sample(), method(case.function(case.model()))
    arguments = sample.inputs, case.target_of(sample), sample.extra
    expected = explain.attribute_tokens(*arguments, **options)
    alike(explain.attribute_tokens(*arguments, block_size=size, **options), expected)
    expected = explain.relevance_maps(*arguments, **options)
    alike(explain.relevance_maps(*arguments, block_size=size, **options), expected)


@every_method
def test_two_streams(lxmert, detr, name):
    method, options = METHODS[name]
    for model, inputs, target in (
        (lxmert, lxmert_inputs("in0"), 1), (detr, detr_image("in0"), (2, 1)),
    ):  # fmt: skip
        explain = method(model)
        expected = explain.attribute_tokens(inputs, target, **options)
        alike(explain.attribute_tokens(inputs, target, block_size=2, **options), expected)


@pytest.mark.parametrize("size", [1, 4, None])
def test_no_block_is_larger(monkeypatch, size):
    """And the last layer forms the one row that is read."""
    formed = []
    whole = Block.attention

    def counted(block):
        formed.append(whole(block))
        return formed[-1]

    monkeypatch.setattr(Block, "attention", counted)
    case = ZOO["vit_cls"]
    GenericAttention(case.model()).attribute(case.sample().inputs, 1, block_size=size)
    rows = [tuple(A.shape[-2:]) for A in formed]
    n = case.tokens
    blocks = {1: [1] * n, 4: [4] * (n // 4) + [n % 4] * bool(n % 4), None: [n]}[size]
    assert rows == [(1, n), *((q, n) for q in blocks * (case.calls - 1))]


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "all"])
def test_sizes_that_are_none(size):
    case = ZOO["vit_cls"]
    with pytest.raises(OptionError, match="block_size: expected an int >= 1"):
        GenericAttention(case.model()).attribute(case.sample().inputs, 1, block_size=size)
