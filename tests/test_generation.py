"""The generation helper against one `attribute_tokens` per token, on the tokens before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from captum.attr import Saliency
from torch import Tensor, nn

from captum_attn import (
    AttentionRollout,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    objectives,
)
from captum_attn.errors import InputError, OptionError, TargetError
from captum_attn.generation import Generation, explain_generation
from tests.zoo import set_weights

METHODS = [RawAttention, AttentionRollout, GenericAttention, HeterogenousAttention]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)

PAD, EOS, START, IMAGE, VOCABULARY = 0, 59, 58, 57, 60
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 1}
DECODER = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
BOTH = {
    **DECODER, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_start_token_id": START, "forced_eos_token_id": None, "max_position_embeddings": 40,
}  # fmt: skip
SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
LLAMA = {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {**SIZE, "image_size": 16, "patch_size": 8}


def make(name: str, head: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SPECIAL | settings)
    return getattr(transformers, f"{name}{head}")(config)


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**LLAMA, **SPECIAL),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE, vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def trocr() -> nn.Module:
    decoder = make("TrOCR", "ForCausalLM", **DECODER, cross_attention_hidden_size=16)
    encoder = transformers.ViTModel(transformers.ViTConfig(**VISION))
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = START, PAD, EOS
    return model


BUILD: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: make("GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=40),
    "llama": lambda: make("Llama", "ForCausalLM", **LLAMA),
    "llava": llava,
    "git": lambda: make("Git", "ForCausalLM", vision_config=VISION, **SIZE),
    "bart": lambda: make("Bart", "ForConditionalGeneration", **BOTH),
    "marian": lambda: make("Marian", "MTModel", **BOTH),
    "t5": lambda: make(
        "T5", "ForConditionalGeneration", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=PAD,
    ),
    "whisper": lambda: make(
        "Whisper", "ForConditionalGeneration", **{**BOTH, "pad_token_id": EOS},
        max_source_positions=20, max_target_positions=40, num_mel_bins=8, suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "trocr": trocr,
}  # fmt: skip
DECODERS = ["gpt2", "llama", "llava", "git"]
ENCODERS = ["bart", "marian", "t5", "whisper", "trocr"]
SOURCE = {"whisper": "input_features", "trocr": "pixel_values"}


@cache
def model_of(name: str) -> nn.Module:
    """In float64 where this version of transformers can run it so."""
    model = BUILD[name]()
    set_weights(model)
    model = model.eval().double()
    try:
        with torch.no_grad():
            fed = {**prompt(name), **({"decoder_input_ids": text(2)} if name in ENCODERS else {})}
            model(**{k: v.double() if v.is_floating_point() else v for k, v in fed.items()})
    except RuntimeError as error:  # transformers 4.48, see `skip_unless_double_runs`
        if "without overflow" not in str(error):
            raise
        model.float()
    return model


def dtype_of(name: str) -> torch.dtype:
    return next(model_of(name).parameters()).dtype


def tolerance(name: str) -> float:
    return 1e-10 if dtype_of(name) == torch.float64 else 2e-5


def text(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(10, 50, (batch, length), generator=generator)


def prompt(name: str) -> dict[str, Tensor]:
    """A batch of two; text is padded in the second example, on the left."""
    generator = torch.Generator().manual_seed(7)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    images = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "trocr":
        return images
    ids, mask = text(6), torch.ones(2, 6, dtype=torch.long)
    if name == "git":
        return {"input_ids": ids, **images}
    if name == "llava":
        ids = torch.cat([ids[:, :1], torch.full((2, 4), IMAGE), ids[:, 1:]], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    ids[1, :2], mask[1, :2] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(name: str) -> dict[str, Tensor]:
    dtype = dtype_of(name)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in prompt(name).items()}


def start_of(name: str) -> Tensor:
    """(B, p), what the generated tokens stand behind."""
    if name in ENCODERS:
        return torch.full((2, 1), PAD if name == "t5" else START)
    return prompt(name)["input_ids"]


def before(name: str, new: Tensor, t: int) -> dict[str, Tensor]:
    """The model's inputs when it predicted the t-th new token."""
    inputs, fed = inputs_of(name), torch.cat([start_of(name), new[:, :t]], 1)
    if name in ENCODERS:
        return {**inputs, "decoder_input_ids": fed}
    inputs["input_ids"] = fed
    if "attention_mask" in inputs:
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, t, dtype=torch.long)], 1)
        inputs["attention_mask"] = mask
        if name != "llava":
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def one_by_one(
    method: Any, name: str, new: Tensor, valid: Tensor, found: Generation, **options: Any
) -> None:
    """Every row equals `attribute_tokens` on the tokens before it, and is 0 from there on."""
    for t in range(new.shape[1]):
        inputs = before(name, new, t)
        with torch.no_grad():
            last = method.forward_func(**inputs).logits.shape[1] - 1
        target = [(last, int(token)) for token in new[:, t]]
        rows = method.attribute_tokens(inputs, target, **options)
        assert set(rows) == set(found.relevance)
        for stream, row in rows.items():
            own, n = found.relevance[stream][:, t], row.shape[1]
            assert not own[:, n:].any()
            expected = row * valid[:, t, None]
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(
                own[:, :n], expected, atol=tolerance(name) * scale, rtol=tolerance(name)
            )
            assert own.isfinite().all()


# ------------------------------------------------------------------ equal to one call per token
@every_method
@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_each_token_is_explained_as_by_a_call_of_its_own(name: str, method: type) -> None:
    explain, new = method(model_of(name)), text(5, seed=1)
    generated = torch.cat([start_of(name), new], 1)
    inputs = inputs_of(name)
    found = explain_generation(explain, inputs, generated)
    one_by_one(explain, name, new, torch.ones_like(new), found)

    assert torch.equal(found.tokens, new) and found.valid.all()
    assert torch.equal(found.columns, generated[:, :-1])
    p = start_of(name).shape[1]
    real = torch.ones(2, p + 4, dtype=torch.bool)
    real[1, :2] = name not in ("gpt2", "llama")
    assert torch.equal(found.real, real)
    assert found.stream == ("decoder_input_ids" if name in ENCODERS else "input_ids")
    streams = list(found.relevance)
    sources = {SOURCE.get(name, "input_ids")} if name in ENCODERS else set()
    sources |= {"pixel_values"} if name in ("llava", "git") else set()
    assert set(streams) == {found.stream, *sources}
    ordered = [found.relevance[n] for n in (*sources, found.stream)]
    assert torch.equal(found.matrix, torch.cat(ordered, -1))
    for rows in found.relevance.values():  # every source counts, and no two rows are alike
        assert (rows.abs().amax(-1) > 0).all() or method is RawAttention
    assert not torch.equal(found.matrix[:, 1, :-4], found.matrix[:, 2, :-4])


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_options_reach_the_method(name: str) -> None:
    explain, new = HeterogenousAttention(model_of(name)), text(4)
    options = {"correction": "full", "start_layer": 1, "objective": objectives.probability}
    found = explain_generation(
        explain, inputs_of(name), torch.cat([start_of(name), new], 1), **options
    )
    one_by_one(explain, name, new, torch.ones_like(new), found, **options)
    assert any((rows < 0).any() for rows in found.relevance.values())
    with pytest.raises(OptionError, match="unknown option 'power'"):
        explain_generation(explain, inputs_of(name), start_of(name).repeat(1, 2), power=2)


@pytest.mark.parametrize("aggregate", [True, False])
@pytest.mark.parametrize("self_in_rule_10", [True, False])
def test_the_two_stream_rule_sees_no_later_token(aggregate: bool, self_in_rule_10: bool) -> None:
    """Eq. 10 multiplies with a transposed matrix, in which later rows could come back."""
    options = {"aggregate": aggregate, "self_in_rule_10": self_in_rule_10}
    explain, new = GenericAttention(model_of("t5")), text(4)
    found = explain_generation(
        explain, inputs_of("t5"), torch.cat([start_of("t5"), new], 1), **options
    )
    one_by_one(explain, "t5", new, torch.ones_like(new), found, **options)


# ------------------------------------------------------------------ letting the model generate
@pytest.mark.parametrize("name", [n for n in DECODERS + ENCODERS if n != "whisper"])
def test_the_model_generates_greedily(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    settings = {"bad_words_ids": [[IMAGE]]} if name == "llava" else {}
    found = explain_generation(
        GenericAttention(model), inputs, max_new_tokens=4, generate_kwargs=settings
    )
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=1, **settings)
    assert torch.equal(found.tokens, made[:, start_of(name).shape[1] :])
    for t in range(found.tokens.shape[1]):
        with torch.no_grad():
            logits = model(**before(name, found.tokens, t)).logits[:, -1]
        if settings:
            logits[:, IMAGE] = -torch.inf
        likeliest = logits.argmax(-1)
        assert torch.equal(found.tokens[:, t][found.valid[:, t]], likeliest[found.valid[:, t]])
    one_by_one(GenericAttention(model), name, found.tokens, found.valid.long(), found)


def test_further_arguments_of_generate() -> None:
    model, inputs = model_of("gpt2"), inputs_of("gpt2")
    plain = explain_generation(RawAttention(model), inputs, max_new_tokens=3)
    banned = [[int(token)] for token in plain.tokens[:, 0]]
    settings = {"bad_words_ids": banned, "return_dict_in_generate": True}
    found = explain_generation(
        RawAttention(model), inputs, max_new_tokens=3, generate_kwargs=settings
    )
    assert not torch.isin(found.tokens, plain.tokens[:, 0]).any()


def test_new_tokens_alone() -> None:
    """Whisper returns them so, and its decoder starts from several tokens."""
    explain, new = GenericAttention(model_of("whisper")), text(3)
    start = torch.tensor([[START, 3, 4]] * 2)
    inputs = {**inputs_of("whisper"), "decoder_input_ids": start}
    alone = explain_generation(explain, inputs, new, with_prompt=False)
    whole = explain_generation(explain, inputs, torch.cat([start, new], 1))
    assert torch.equal(alone.matrix, whole.matrix) and torch.equal(alone.columns, whole.columns)
    assert alone.relevance["decoder_input_ids"].shape == (2, 3, 5)
    gpt2, prompts = GenericAttention(model_of("gpt2")), inputs_of("gpt2")
    alone = explain_generation(gpt2, prompts, new, with_prompt=False)
    whole = explain_generation(gpt2, prompts, torch.cat([prompts["input_ids"], new], 1))
    assert torch.equal(alone.matrix, whole.matrix)


def test_a_tensor_and_a_callable() -> None:
    model, ids = model_of("gpt2"), text(5)
    generated = torch.cat([ids, text(3, seed=2)], 1)
    expected = explain_generation(GenericAttention(model), {"input_ids": ids}, generated)
    of_tensor = explain_generation(GenericAttention(model), ids, generated)
    assert torch.equal(of_tensor.matrix, expected.matrix)

    def logits(words: Tensor) -> Tensor:
        return model(words).logits

    of_callable = explain_generation(GenericAttention(logits), ids, generated)
    assert torch.equal(of_callable.relevance["words"], expected.matrix)


# ------------------------------------------------------------------ padding and ends
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_rows_behind_the_end_are_zero(name: str) -> None:
    """The first example ends after two tokens; the other one is explained as without it."""
    new = text(5, seed=3)
    new[0, 1], new[0, 2:] = EOS, PAD
    explain, inputs = GenericAttention(model_of(name)), inputs_of(name)
    generated = torch.cat([start_of(name), new], 1)
    found = explain_generation(explain, inputs, generated)
    assert found.valid.tolist() == [[True, True, False, False, False], [True] * 5]
    assert not found.matrix[0, 2:].any() and (found.matrix[0, :2].abs().amax(-1) > 0).all()
    p = start_of(name).shape[1]
    assert found.real[0, p:].tolist() == [True, True, False, False]
    for t in range(5):
        rows = explain.attribute_tokens(
            before(name, new, t), [(p + t - 1, int(token)) for token in new[:, t]]
        )
        for stream, row in rows.items():
            for b in range(2):
                if found.valid[b, t]:
                    own = found.relevance[stream][b, t, : row.shape[1]]
                    torch.testing.assert_close(own, row[b], atol=tolerance(name), rtol=1e-5)


def test_the_model_sees_a_mask_without_what_follows_the_end() -> None:
    model, inputs, new = model_of("llama"), inputs_of("llama"), text(5, seed=3)
    new[0, 1], new[0, 2:] = EOS, PAD
    seen: list[Tensor] = []

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(attention_mask)
        return model(input_ids=input_ids, attention_mask=attention_mask).logits

    found = explain_generation(RawAttention(run), inputs, new, with_prompt=False, eos_token_id=EOS)
    assert torch.equal(seen[0].bool(), found.real)
    assert found.real[0].tolist() == [True] * 8 + [False] * 2


def test_all_examples_may_end_early() -> None:
    new = text(6)
    new[:, 2], new[:, 3:] = EOS, PAD
    explain, inputs = GenericAttention(model_of("gpt2")), inputs_of("gpt2")
    found = explain_generation(explain, inputs, torch.cat([start_of("gpt2"), new], 1))
    assert found.matrix.shape == (2, 6, 11) and not found.matrix[:, 3:].any()
    short = explain_generation(explain, inputs, torch.cat([start_of("gpt2"), new[:, :3]], 1))
    torch.testing.assert_close(found.matrix[:, :3, :8], short.matrix, atol=1e-12, rtol=1e-5)


def test_what_ends_a_sequence() -> None:
    new = torch.tensor([[20, 30, 40], [30, EOS, 20]])
    generated = torch.cat([start_of("gpt2"), new], 1)

    def valid(eos: Any) -> list:
        found = explain_generation(
            RawAttention(model_of("gpt2")), inputs_of("gpt2"), generated, eos_token_id=eos
        )
        return found.valid.long().tolist()

    assert valid(None) == [[1, 1, 1], [1, 1, 0]]
    assert valid(()) == [[1, 1, 1], [1, 1, 1]]
    assert valid(30) == [[1, 1, 0], [1, 0, 0]]
    assert valid([40, EOS]) == [[1, 1, 1], [1, 1, 0]]
    assert valid(torch.tensor([20])) == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_padded_prompt_is_explained_as_without_padding(name: str) -> None:
    explain, inputs, new = GenericAttention(model_of(name)), inputs_of(name), text(3, seed=4)
    found = explain_generation(explain, inputs, new, with_prompt=False)
    ids = inputs["input_ids"][1:, 2:]
    alone = explain_generation(explain, ids, new[1:], with_prompt=False)
    # rotary positions are computed in float32
    torch.testing.assert_close(found.matrix[1:, :, 2:], alone.matrix, atol=1e-6, rtol=1e-5)
    assert not found.matrix[1, :, :2].any()


def test_types_of_tokens_are_continued() -> None:
    """As `generate` does: the last type goes on."""
    model, ids, new = model_of("gpt2"), text(5), text(3, seed=4)
    types = torch.tensor([[20, 20, 21, 21, 22]] * 2)
    seen: list[Tensor] = []

    def run(input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        seen.append(token_type_ids)
        return model(input_ids=input_ids, token_type_ids=token_type_ids).logits

    explain_generation(
        RawAttention(run), {"input_ids": ids, "token_type_ids": types}, new, with_prompt=False
    )
    assert seen[0].tolist() == [[20, 20, 21, 21, 22, 22, 22]] * 2


def test_given_positions_are_continued() -> None:
    explain, ids, new = GenericAttention(model_of("gpt2")), text(5), text(3, seed=4)
    places = torch.arange(3, 8).expand(2, -1)
    given = {"input_ids": ids, "position_ids": places}
    found = explain_generation(explain, given, new, with_prompt=False)
    fed = torch.cat([ids, new[:, :-1]], 1)
    whole = {"input_ids": fed, "position_ids": torch.arange(3, 10).expand(2, -1)}
    row = explain.attribute_tokens(whole, [(6, int(token)) for token in new[:, 2]])
    assert torch.equal(found.matrix[:, 2], row["input_ids"])


# ------------------------------------------------------------------ what it costs
@every_method
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_one_forward_and_one_backward_for_each_token(name: str, method: type) -> None:
    model, count = model_of(name), {"forward": 0, "backward": 0}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        count["forward"] += 1
        if output.logits.requires_grad:
            output.logits.register_hook(lambda g: count.update(backward=count["backward"] + 1))

    explain, new = method(model), text(6)
    generated = torch.cat([start_of(name), new], 1)
    with model.register_forward_hook(hook):
        explain_generation(explain, inputs_of(name), generated)  # also observes the readout
        count.update(forward=0, backward=0)
        explain_generation(explain, inputs_of(name), generated)
    assert count == {"forward": 1, "backward": 6}


def test_progress(capsys: pytest.CaptureFixture) -> None:
    explain, ids = GenericAttention(model_of("gpt2")), text(5)
    explain_generation(explain, ids, text(3), with_prompt=False, show_progress=True)
    text_ = capsys.readouterr().err
    assert "Generic Attention (GAE) attribution" in text_ and "3/3" in text_
    explain_generation(explain, ids, text(3), with_prompt=False)
    assert not capsys.readouterr().err


def test_the_model_is_left_as_found(left_as_found: Callable) -> None:
    model, inputs = model_of("bart"), inputs_of("bart")
    with left_as_found(model, inputs):
        explain_generation(GenericAttention(model), inputs, max_new_tokens=2)


# ------------------------------------------------------------------ what is refused
class Masked(nn.Module):
    """A language model whose tokens see later ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embed(ids)
        return self.head(tokens + self.attention(tokens, tokens, tokens)[0])


@every_method
def test_a_model_that_is_not_causal(method: type) -> None:
    with pytest.raises(InputError, match="see later ones.*expected a causal model"):
        explain_generation(method(Masked()), text(4), text(3), with_prompt=False)


def refused(message: str, inputs: Any, *args: Any, name: str = "gpt2", **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        explain_generation(RawAttention(model_of(name)), inputs, *args, **options)


def test_nothing_generated() -> None:
    ids = text(4)
    refused("at least one new token behind the prompt, got 0", ids, ids)
    refused("at least one new token", ids, text(0), with_prompt=False)
    refused("at least one new token", inputs_of("bart"), start_of("bart"), name="bart")


def test_generated_must_begin_with_the_prompt() -> None:
    ids = text(4)
    refused("begin with the 4 tokens of 'input_ids'.*with_prompt=False", ids, text(6, seed=5))
    refused("begin with the 4 tokens", ids, ids[:, :3])
    refused("begin with the 1 tokens of 'decoder", inputs_of("bart"), text(3), name="bart")
    # only the new ones, and nothing shows what the decoder started from
    refused(
        "expected `decoder_input_ids`", inputs_of("whisper"), text(3), name="whisper",
        with_prompt=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("generated", "message"),
    [
        (text(6, batch=3), "one sequence for each of the 2 prompts, got 3"),
        (text(6).float(), r"'generated': expected token ids \(B, n\), got .* torch.float32"),
        (text(6)[0], "'generated': expected token ids"),
        ([[1, 2]], "'generated': expected token ids"),
    ],
)
def test_generated_ids(generated: Any, message: str) -> None:
    refused(message, text(4), generated)


def test_prompts() -> None:
    ids = text(4)
    refused("either `generated` or `max_new_tokens`", ids)
    refused("either `generated` or `max_new_tokens`", ids, ids, max_new_tokens=2)
    refused("generate_kwargs: expected none", ids, ids, generate_kwargs={"min_length": 3})
    refused("max_new_tokens: expected a whole number of at least 1, got 0", ids, max_new_tokens=0)
    refused("max_new_tokens: expected a whole number", ids, max_new_tokens=True)
    refused("expected a prompt", [1, 2], text(6))
    refused("'input_ids': expected token ids", {"inputs_embeds": torch.zeros(2, 3, 16)}, text(6))
    refused("'input_ids': expected token ids", {"input_ids": ids.float()}, text(6))
    mask = torch.ones_like(ids)
    mask[1, 3] = 0
    refused("padded on the left", {"input_ids": ids, "attention_mask": mask}, text(6))
    short = {"input_ids": ids, "attention_mask": mask[:, :3]}
    refused(r"attention_mask: expected the shape of 'input_ids', \(2, 4\)", short, text(6))
    padded = inputs_of("gpt2")["input_ids"]
    refused("padding token 0, and there is no 'attention_mask'", padded, max_new_tokens=2)


def test_a_token_outside_of_the_vocabulary() -> None:
    new = torch.tensor([[99], [3]])
    with pytest.raises(TargetError, match="99.*does not fit the output"):
        explain_generation(RawAttention(model_of("gpt2")), text(4), new, with_prompt=False)
    refused("'generated': expected token ids >= 0, got -100", text(4), new - 103, with_prompt=False)


def test_models_that_do_not_fit() -> None:
    ids = text(4)
    with pytest.raises(OptionError, match="method of this library"):
        explain_generation(Saliency(model_of("gpt2")), ids, text(6))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a model with `generate`, got Masked"):
        explain_generation(RawAttention(Masked()), ids, max_new_tokens=2)

    def last_logits(ids: Tensor) -> Tensor:
        return model_of("gpt2")(ids).logits[:, -1:]

    with pytest.raises(InputError, match=r"expected logits \(B, 6, vocabulary\).*got \(2, 1, 60\)"):
        explain_generation(RawAttention(last_logits), ids, text(3), with_prompt=False)
