"""``captum-attn explain-text``: the package's model, and folders."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from captum_attn import GenericAttention
from captum_attn.cli.app import run
from captum_attn.errors import InputError, TargetError
from captum_attn.evaluation.models import load
from captum_attn.explain.explained import ask
from captum_attn.explain.ranking import encoded
from tests.explain.command import printed, rows

TEXT = "The band toured Europe by train and played in small villages."


def test_the_words_of_the_predicted_topic_and_of_another(tmp_path, capsys):
    said = printed(capsys, "explain-text", TEXT, "--model", "topics", "--out", "why.html")
    assert re.search(r"^predicted: music 0\.\d\d, travel 0\.\d\d, ", said)
    assert "why music (0." in said and "written to why.html" in said
    found = rows(said)
    assert next(iter(found)) == "band"  # the most relevant first
    values = [value for (value,) in found.values()]
    assert values == sorted(values, reverse=True) and len(values) == 10
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert "villages" in page and "why music" in page

    said = printed(capsys, "explain-text", TEXT, "--model", "topics", "--target", "Travel",
                   "--top", 2)  # fmt: skip
    assert "why travel (0." in said and list(rows(said)) == ["toured", "band"]
    assert "... 12 words in all" in said and "written" not in said


def test_several_methods_stand_side_by_side(capsys):
    methods = ["--method", "AttentionRollout, GenericAttention(discard_self=True)"]
    methods += ["--method", "IntegratedGradients(n_steps=5)"]
    said = printed(capsys, "explain-text", TEXT, "--model", "topics", *methods, "--top", 12)
    names = ["AttentionRollout", "GenericAttention(discard_self=True)"]
    assert re.search(r" +".join(map(re.escape, [*names, "IntegratedGradients(n_steps=5)"])), said)
    found = rows(said)
    loaded = load("topics", [])
    inputs = loaded.tokenizer(TEXT, return_tensors="pt")
    target = loaded.classes["music"]
    gae = GenericAttention(loaded.model).attribute(inputs, target=target, discard_self=True)
    band = inputs.tokens().index("band")
    assert found["band"][1] == pytest.approx(float(gae["input_ids"][0, band]), abs=6e-4)
    assert min(found["Europe"]) < 0 < found["Europe"][0]  # only Integrated Gradients has a sign


def test_pieces_of_a_word_are_added_up(capsys):
    said = printed(capsys, "explain-text", "Goalkeepers!", "--model", "topics")
    loaded = load("topics", [])
    inputs = loaded.tokenizer("Goalkeepers!", return_tensors="pt")
    asked = ask(loaded, inputs)
    gae = GenericAttention(loaded.model).attribute(inputs, target=asked.target, discard_self=True)
    assert inputs.tokens() == ["[CLS]", "goalkeeper", "##s", "!", "[SEP]"]
    expected = float(gae["input_ids"][0, 1:3].sum())
    assert rows(said)["Goalkeepers"] == [pytest.approx(expected, abs=6e-4)]


def test_own_topics(capsys):
    said = printed(capsys, "explain-text", "The soprano sang.", "--model", "topics",
                   "--labels", "football, opera")  # fmt: skip
    assert said.startswith("predicted: opera 1.00, football 0.00\n") and "why opera" in said


def test_a_classifier_from_a_folder(bert, capsys):
    said = printed(capsys, "explain-text", "a fine film", "--model", bert, "--target", "BAD",
                   "--method", "GenericAttention, RawAttention", "--out", "why.png")  # fmt: skip
    assert re.search(r"^predicted: (1|bad) 0\.\d\d, (1|bad) 0\.\d\d$", said, re.M)
    assert "why bad (0." in said and set(rows(said)) == {"a", "fine", "film"}
    with Image.open("why.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5


def test_a_name_goes_before_a_number(bert):
    loaded = load(str(bert))
    inputs = encoded(loaded, "a fine film")
    assert ask(loaded, inputs, "1").target == 0  # the class that is called "1"
    assert ask(loaded, inputs, "0").target == 0
    with pytest.raises(TargetError, match="has 2 outputs, 0 to 1; got 2"):
        ask(loaded, inputs, "2")


def test_the_next_token_of_a_language_model(llama, capsys):
    said = printed(capsys, "explain-text", "The tower is in the city of", "--model", llama,
                   "--target", "Paris", "--method", "GenericAttention",
                   "--method", "IntegratedGradients(n_steps=3)")  # fmt: skip
    assert "why ' Paris' (0." in said  # behind a blank, as it would go on
    assert all(values[1] != 0 for values in rows(said).values())
    assert set(rows(said)) == {"The", "tower", "is", "in", "the", "city", "of"}
    loaded = load(str(llama))
    inputs = encoded(loaded, "The tower is in the city of")
    asked = ask(loaded, inputs, "Paris")
    position, token = asked.target
    assert position == inputs["input_ids"].shape[1] - 1
    assert loaded.tokenizer.decode([token]) == " Paris"
    with torch.no_grad():
        logits = loaded.model(**inputs).logits[0, -1]
    assert asked.probability == pytest.approx(float(logits.softmax(-1)[token]), rel=1e-4)
    assert ask(loaded, inputs).target == (position, int(logits.argmax()))
    with pytest.raises(TargetError, match="'Lyon' is .* tokens of this model"):
        ask(loaded, inputs, "Lyon")


def test_what_is_left_out_of_the_next_token_is_framed_in_the_picture(llama, tmp_path, capsys):
    out = tmp_path / "why.html"
    method = "GenericAttention(leave_out=('self',)), GenericAttention(discard_self=False)"
    said = printed(capsys, "explain-text", "The tower is in the city of", "--model", llama,
                   "--method", method, "--out", out)  # fmt: skip
    assert rows(said)["of"][0] == 0 != rows(said)["of"][1]
    assert out.read_text().count('title="left out"') == 1


def test_a_text_is_not_cut(llama):
    with pytest.raises(InputError, match="has 40 tokens, the model reads 32"):
        encoded(load(str(llama)), "x" * 40)


def test_an_encoder_decoder_is_refused(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=16, num_layers=1, d_ff=16, d_kv=8, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert run(["explain-text", "goal", "--model", "t5"]) == 2
    assert "'t5' is a T5ForConditionalGeneration: expected one for" in capsys.readouterr().err


def test_a_language_model_is_no_classifier_to_evaluate(llama, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("The city\n")
    assert run(["evaluate", "--model", str(llama), "--data", "t.txt", "--out", "out"]) == 2
    assert "is a language model: give --data known-answers" in capsys.readouterr().err
