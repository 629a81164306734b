"""Hidden tokens and replaced attention maps, on every family of the zoo."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn import GenericAttention
from captum_attn.errors import AttnError, InputError, OptionError, WiringError
from captum_attn.intervene import ObservedModel, hide_tokens, replace_attention
from tests.test_contract import NAMES, close
from tests.zoo import (
    TWINS,
    ZOO,
    Attention,
    Case,
    Sample,
    hidden,
    output_tensor,
    scores_of,
    timm_vit,
)
from tests.zoo_streams import STREAMS

every_model = pytest.mark.parametrize("name", NAMES)
every_streams = pytest.mark.parametrize("name", list(STREAMS))


def run(case: Any, sample: Sample) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return output_tensor(sample.run(case.function(case.model())))


def seen_of(case: Any, sample: Sample) -> ObservedModel:
    torch.manual_seed(0)
    return ObservedModel(case.function(case.model()), sample.inputs, sample.extra)


def chosen(case: Case) -> Tensor:
    """Two tokens in the middle."""
    mask = torch.zeros(case.tokens, dtype=torch.bool)
    mask[[case.tokens // 2, case.tokens // 2 + 1]] = True
    return mask


# ------------------------------------------------------------ every family
@every_model
def test_a_hidden_token_is_no_key_of_any_query(name: str) -> None:
    """A is renormalised over the keys that are left, and the model is as it was afterwards."""
    case, sample = ZOO[name], ZOO[name].sample()
    before, seen, mask = run(case, sample), seen_of(case, sample), chosen(case)
    first = seen.calls[0].attention()  # (B, F, H, q, k)
    with seen.hide_tokens({case.stream: mask}):
        assert not torch.equal(run(case, sample), before)
        again = seen_of(case, sample)
    close(run(case, sample), before, 1e-6)
    if name in ("vilt", "talking_heads"):  # the keys are permuted; heads are mixed after softmax
        return
    windows = first.shape[1]  # the channels of a series, whose patches come one after the other
    gone = mask.view(-1, windows).mT.reshape(1, windows, 1, 1, -1) if windows > 1 else mask
    gone = F.pad(gone, (0, first.shape[-1] - gone.shape[-1]))  # learned keys
    for call in again.calls:
        assert (call.attention().masked_fill(~gone, 0) == 0).all()
    kept = first.masked_fill(gone, 0)
    if name == "sinks":  # its rows have a share that goes nowhere
        sink = 1 - first.sum(-1, keepdim=True)
        expected = kept / (kept.sum(-1, keepdim=True) + sink)
    else:
        expected = kept / kept.sum(-1, keepdim=True).clamp_min(1e-30)
    close(again.calls[0].attention(), expected, 1e-5)


@pytest.mark.parametrize("twin", TWINS)
def test_twins_with_hidden_tokens_are_alike(twin: str) -> None:
    """The fused kernel and every way to write the attention out."""
    outputs = []
    for name in TWINS[twin]:
        case, sample = ZOO[name], ZOO[name].sample()
        with seen_of(case, sample).hide_tokens({case.stream: chosen(case)}):
            outputs.append(run(case, sample))
    for output in outputs[1:]:
        close(output, outputs[0], 1e-5)


@every_model
def test_a_map_is_replaced(name: str) -> None:
    case, sample = ZOO[name], ZOO[name].sample()
    before, seen = run(case, sample), seen_of(case, sample)
    last = len(seen.calls) - 1
    own = seen.calls[last].attention().flatten(0, 1)  # (B F, H, q, k)
    with seen.replace_attention(-1, own):
        close(run(case, sample), before, 1e-5)
    other = own.roll(1, -1) * 0.7
    with seen.replace_attention(last, other):
        changed = run(case, sample)
        again = seen_of(case, sample)
    assert not torch.equal(changed, before)
    for i, call in enumerate(again.calls):
        found = call.attention().flatten(0, 1)
        close(found, other if i == last else seen.calls[i].attention().flatten(0, 1), 1e-5)
    with seen.replace_attention(-1, lambda A: A.roll(1, -1) * 0.7):
        close(run(case, sample), changed, 1e-5)
    close(run(case, sample), before, 1e-6)


@every_streams
def test_tokens_of_every_stream_are_hidden(name: str) -> None:
    """A stream whose tokens are keys somewhere: the model does not see them there."""
    case, sample = STREAMS[name], STREAMS[name].sample()
    before, seen = run(case, sample), seen_of(case, sample)
    for stream, n in seen.tokens.items():
        mask = torch.ones(n, dtype=torch.bool)
        with seen.hide_tokens({stream: mask}):
            changed = run(case, sample)
        assert changed.isfinite().all()
        keys = [s.key_state.stream for s in seen._seen.wiring.updates]
        assert torch.equal(changed, before) == (stream not in "+".join(keys).split("+")) or (
            "+" in stream
        )
    own = seen.calls[-1].attention().flatten(0, 1)
    with seen.replace_attention(-1, own):
        close(run(case, sample), before, 1e-4)
    close(run(case, sample), before, 1e-6)


# ------------------------------------------------------------ against models without the tokens
@pytest.mark.parametrize("name", ["bert", "bert_eager", "roberta", "distilbert", "albert",
                                  "encoder_first", "encoder_first_length_first"])  # fmt: skip
def test_hidden_tokens_are_like_masked_ones(name: str) -> None:
    case, sample = ZOO[name], ZOO[name].sample()
    mask = chosen(case)
    without = case.sample()
    if isinstance(without.inputs, dict) or hasattr(without.inputs, "keys"):
        without.inputs["attention_mask"][:, mask] = 0
    else:
        without.extra[0][:, mask] = False
    with hide_tokens(case.function(case.model()), sample.inputs, mask, sample.extra):
        found = run(case, sample)
    close(found, run(case, without), 1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_hidden_patches_are_like_patches_that_are_taken_out(fused: bool) -> None:
    model = timm_vit(fused=fused).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    mask = torch.zeros(17, dtype=torch.bool)
    mask[[2, 5, 6, 16]] = True

    def without(module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, ~mask],)

    hook = model.blocks[0].register_forward_pre_hook(without)
    with torch.no_grad():
        expected = model(x)
    hook.remove()
    with hide_tokens(model, x, mask), torch.no_grad():
        close(model(x), expected, 1e-12)


def test_a_replaced_map_is_computed_with_by_hand() -> None:
    model = ZOO["by_sdpa"].fresh().double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    given = torch.rand(4, 6, 6, dtype=torch.float64)  # one for all examples; rows do not sum to 1
    with replace_attention(model, x, "blocks.0.attention", given), torch.no_grad():
        found = model(x)

    def form(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        return given @ v

    model.blocks[0].attention.form = form
    with torch.no_grad():
        close(found, model(x), 1e-12)


def test_tokens_are_hidden_in_some_calls_only() -> None:
    model = ZOO["by_sdpa"].fresh().double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    mask = torch.tensor([False, True, False, False, True, False])
    with hide_tokens(model, x, mask, layers="blocks.1.*"), torch.no_grad():
        found = model(x)

    def form(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        return scores_of(q, k).masked_fill(hidden(~mask[None]), -torch.inf).softmax(-1) @ v

    model.blocks[1].attention.form = form
    with torch.no_grad():
        close(found, model(x), 1e-12)


def test_examples_hide_tokens_of_their_own_and_copies_of_the_batch_run_together() -> None:
    model = ZOO["by_matmul"].model()
    x = torch.randn(2, 6, 16)
    masks = torch.rand(3 * 2, 6) < 0.4  # three copies of the batch
    masks[:, 0] = False
    seen = ObservedModel(model, x)
    with seen.hide_tokens(masks), torch.no_grad():
        together = model(x.repeat(3, 1, 1))
    for i in range(3):
        with seen.hide_tokens(masks[2 * i : 2 * i + 2]), torch.no_grad():
            close(together[2 * i : 2 * i + 2], model(x))


@pytest.mark.parametrize("name", ["by_sdpa", "by_matmul", "causal_sdpa", "masked_sdpa_float"])
def test_a_query_without_keys_reads_nothing(name: str) -> None:
    """0, not NaN, and so are the gradients."""
    case, sample = ZOO[name], ZOO[name].sample()
    every = torch.ones(case.tokens, dtype=torch.bool)
    x = sample.inputs.clone().requires_grad_()
    extra = sample.extra or ()
    seen = seen_of(case, sample)
    with seen.hide_tokens(every):
        output = case.model()(x, *extra)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        calls = seen_of(case, sample).calls
    assert output.isfinite().all() and gradient.isfinite().all()
    assert all((call.attention() == 0).all() for call in calls)


# ------------------------------------------------------------ scope
@pytest.mark.parametrize("name", ["vit_cls", "bert", "gpt2_left", "encoder_mean", "albert"])
def test_all_is_undone_also_after_an_error(name: str, left_as_found: Any, in_use: Any) -> None:
    case, sample = ZOO[name], ZOO[name].sample()
    model, mask, before = case.model(), chosen(case), run(case, sample)
    with in_use(model), left_as_found(model, sample.inputs, sample.extra):
        seen = seen_of(case, sample)
        with seen.hide_tokens(mask):
            expected = run(case, sample)
        with pytest.raises(ZeroDivisionError), seen.hide_tokens(mask):
            1 / 0  # noqa: B018
        with seen.hide_tokens(mask):
            with pytest.raises(ZeroDivisionError):
                _fail_inside(case, sample)
            close(run(case, sample), expected)  # the calls are counted from the first again
    close(run(case, sample), before, 1e-6)


def _fail_inside(case: Case, sample: Sample) -> None:
    """A run that ends with an error behind its first attention."""
    ran: list[str] = []

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        ran.append("")
        if len(ran) == 2:
            raise ZeroDivisionError

    attention = ("attn", "attention", "self_attn")
    hooks = [m.register_forward_hook(fail) for n, m in case.model().named_modules()
             if n.split(".")[-1] in attention]  # fmt: skip
    try:
        run(case, sample)
    finally:
        for hook in hooks:
            hook.remove()


def test_threads_hide_their_own_tokens() -> None:
    case = ZOO["vit_cls"]
    model, sample = case.model(), case.sample()
    seen = ObservedModel(model, sample.inputs)
    masks = [torch.arange(17) == i for i in (3, 8)]
    alone = [run(case, sample)]
    for mask in masks:
        with seen.hide_tokens(mask):
            alone.append(run(case, sample))
    found: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    start = threading.Barrier(3)

    def work(i: int) -> None:
        start.wait()
        for _ in range(5):
            with torch.no_grad():
                if i == 0:
                    found[i].append(model(sample.inputs))
                else:
                    with seen.hide_tokens(masks[i - 1]):
                        found[i].append(model(sample.inputs))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, outputs in found.items():
        assert len(outputs) == 5
        for output in outputs:
            close(output, alone[i])


def test_another_model_in_the_block_runs_as_it_is() -> None:
    one, other = ZOO["vit_cls"].fresh(), ZOO["vit_cls"].fresh()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = other(x)
        with hide_tokens(one, x, torch.arange(17) == 4):
            assert torch.equal(other(x), before)
            assert not torch.equal(one(x), before)


@pytest.mark.parametrize("name", ["vit_cls", "vit_cls_unfused", "bert", "albert"])
def test_interventions_go_inside_each_other(name: str) -> None:
    case, sample = ZOO[name], ZOO[name].sample()
    seen = seen_of(case, sample)
    first, second = torch.arange(case.tokens) == 3, torch.arange(case.tokens) == 5
    with seen.hide_tokens(first | second):
        both = run(case, sample)
    with seen.hide_tokens(first), seen.hide_tokens(second):
        close(run(case, sample), both)
        for call in seen_of(case, sample).calls:
            assert (call.attention()[..., [3, 5]] == 0).all()
    half = seen.calls[-1].attention().flatten(0, 1) / 2
    with seen.replace_attention(-1, half):
        replaced = run(case, sample)
    only = [call for call in seen.calls if call is seen.calls[-1]]
    if len({call.module for call in seen.calls}) == len(seen.calls):
        with seen.hide_tokens(first, layers=only[0].module), seen.replace_attention(-1, half):
            close(run(case, sample), replaced)  # what is replaced, hides nothing


def test_a_method_explains_the_model_as_it_is_in_the_block() -> None:
    case = ZOO["vit_cls"]
    model, x = case.model(), case.sample().inputs
    mask = torch.arange(17) == 4
    for forward in (model, lambda images: model(images)):
        with hide_tokens(forward, x, mask):
            tokens = GenericAttention(forward).attribute_tokens(x, 1)
        (found,) = tokens.values()
        assert (found[:, 4] == 0).all() and (found[:, 3] != 0).any()


def test_gradients_flow_through_what_is_changed() -> None:
    model, x = ZOO["by_sdpa"].fresh().double(), torch.randn(2, 6, 16, dtype=torch.float64)
    x.requires_grad_()
    with hide_tokens(model, x, torch.arange(6) == 2):
        (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    assert (gradient[:, 2] == 0).all() and (gradient[:, 3] != 0).all()


# ------------------------------------------------------------ bad input
def test_mistakes_say_what_was_expected() -> None:
    model, x = ZOO["vit_cls"].model(), torch.randn(2, 3, 16, 16)
    seen = ObservedModel(model, x)
    mask = torch.zeros(17, dtype=torch.bool)
    assert seen.tokens == {"x": 17} and len(seen.calls) == 3
    for wrong in (mask.long(), mask[:5], mask[None].expand(3, -1), mask[None, None], "cls", None):
        with pytest.raises(OptionError, match="hidden: of 'x' expected"), seen.hide_tokens(wrong):
            pass
    with pytest.raises(OptionError, match="expected names among"), seen.hide_tokens({"y": mask}):
        pass
    with pytest.raises(OptionError, match="matches none"), seen.hide_tokens(mask, layers="nope"):
        pass
    for place in (7, "blocks.*", "nope", None, True):
        with (
            pytest.raises(OptionError, match="call: expected"),
            seen.replace_attention(place, mask),
        ):
            pass
    with pytest.raises(OptionError, match="attention: expected"), seen.replace_attention(0, "A"):
        pass
    wrong = torch.zeros(3, 5)
    with pytest.raises(OptionError, match="attention: expected"), seen.replace_attention(0, wrong):
        model(x)
    with pytest.raises(OptionError), hide_tokens("model", x, mask):
        pass
    with pytest.raises(InputError), hide_tokens(model, [1, 2], mask):
        pass
    clip = STREAMS["clip"]
    two = ObservedModel(clip.model(), clip.sample().inputs)
    with pytest.raises(OptionError, match="token streams"), two.hide_tokens(mask):
        pass


def test_a_run_that_is_another_one_is_refused() -> None:
    model = timm_vit(dynamic_img_size=True).eval()
    x = torch.randn(2, 3, 16, 16)
    mask = torch.arange(17) == 4
    with hide_tokens(model, x, mask):
        with pytest.raises(InputError, match="17 queries by 17 keys"):
            model(torch.randn(2, 3, 24, 24))
        with pytest.raises(AttnError, match="hidden for 2 examples, and the model runs on 6"):
            model(x.repeat(3, 1, 1, 1))
    flag = {"attends": True}

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ZOO["by_matmul"].fresh()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) if flag["attends"] else x.sum(1)

    sometimes, x = Sometimes(), torch.randn(2, 6, 16)
    with (
        pytest.raises(WiringError, match="did not run"),
        hide_tokens(sometimes, x, torch.arange(6) == 2),
    ):
        flag["attends"] = False
        sometimes(x)
