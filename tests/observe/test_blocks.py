"""Blocks of queries: the same A and the same gradient as the whole call's."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import get_gradient_edge

from captum_attn.observe.capture.attention_call import BATCH, HEAD, AttentionCall, Block
from tests.plain import close


@st.composite
def calls(draw):
    """A random fused attention call, with the gradient at its output, and some of its queries."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, heads, n_q = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.integers(1, 9)),
    )
    causal, grouped = draw(st.booleans()), draw(st.booleans())
    n_k = n_q if causal else draw(st.integers(1, 9))
    double = torch.double
    kv_heads = 1 if grouped else heads
    q = torch.randn(batch, heads, n_q, 3, dtype=double, requires_grad=True)
    k, v = (
        torch.randn(batch, kv_heads, n_k, 3, dtype=double).repeat_interleave(heads // kv_heads, 1)
        for _ in "kv"
    )
    kind = draw(st.sampled_from(["none", "bool", "float", "broadcast"]))
    mask = (
        {
            "none": None,
            "bool": torch.rand(batch, 1, n_q, n_k) > 0.3,
            "float": torch.randn(batch, 1, n_q, n_k, dtype=double),
            "broadcast": torch.rand(batch, 1, 1, n_k) > 0.3,
        }[kind]
        if not causal
        else None
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    call = AttentionCall(
        0, "m", q, k, v, (batch, heads), get_gradient_edge(out), mask=mask, is_causal=causal
    )
    call.roles = ((BATCH, batch), (HEAD, heads))
    rows = draw(st.lists(st.integers(0, n_q - 1), min_size=1, unique=True).map(sorted))
    return call, torch.randn_like(out), torch.tensor(rows)


@settings(max_examples=60, deadline=None)
@given(calls())
def test_a_block_holds_the_rows_of_the_whole(drawn):
    call, gradient, rows = drawn
    block = Block(call, rows)
    scores = call.q.detach() @ call.k.mT / math.sqrt(3)
    if call.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    if call.mask is not None and call.mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.mask, -math.inf)
    elif call.mask is not None:
        scores = scores + call.mask
    whole = scores.softmax(-1).nan_to_num(0.0)[:, None, :, rows]
    close(block.attention(), whole[..., : block.n_k], 1e-12)
    assert not bool(whole[..., block.n_k :].any())
    expected = (gradient @ call.v.mT)[:, None, :, rows, : block.n_k]
    close(block.map_gradient(gradient), expected, 1e-12)
