"""Pairs, tags, next tokens one by one, models beside each other, numbers beside the picture."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch

from captum_attn import GenericAttention
from captum_attn.cli.app import run
from captum_attn.evaluation.models import load
from captum_attn.explain.ranking import encoded, words_in
from captum_attn.generation import explain_generation
from tests.explain.command import printed, rows


def test_a_pair_of_texts_with_a_bar_between_them(bert, tmp_path, capsys):
    said = printed(capsys, "explain-text", "A fine film.", "--text2", "Was it fine?", "--model",
                   bert, "--target", "bad", "--out", "why.html", "--out", "why.json")  # fmt: skip
    loaded = load(str(bert))
    pair = loaded.tokenizer("A fine film.", "Was it fine?", return_tensors="pt")
    expected = GenericAttention(loaded.model).attribute(pair, target=1, discard_self=True)
    (why,) = json.loads((tmp_path / "why.json").read_text())["explanations"]
    words = why["methods"]["GenericAttention"]["words"]
    of_text = [w for w in words if not w["special"]]
    assert [w["word"] for w in of_text] == ["A", "fine", "film", ".", "Was", "it", "fine", "?"]
    assert [w["sentence"] for w in of_text] == [0] * 4 + [1] * 4
    for word in words:
        total = float(expected["input_ids"][0, word["tokens"]].sum())
        assert word["relevance"] == pytest.approx(total, rel=1e-4)
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert page.count("│") == 1 and page.index("film") < page.index("│") < page.index("Was")
    assert "│" not in said


def test_the_tag_of_one_word(tagger, capsys):
    said = printed(capsys, "explain-text", "goalkeepers in Paris", "--model", tagger,
                   "--token", "Paris", "--target", "LOC")  # fmt: skip
    assert "why is 'paris' LOC (0." in said
    loaded = load(str(tagger))
    inputs = encoded(loaded, "goalkeepers in Paris")
    place = inputs.tokens().index("paris")
    expected = GenericAttention(loaded.model).attribute(
        inputs, target=(place, 1), discard_self=True
    )
    first = float(expected["input_ids"][0, 1:3].sum())  # goalkeeper ##s
    words = {w.text: w.relevance for w in words_in(loaded, inputs, expected["input_ids"][0])}
    assert words["goalkeepers"] == pytest.approx(first)
    by_number = printed(capsys, "explain-text", "goalkeepers in Paris", "--model", tagger,
                        "--token", place, "--target", "LOC")  # fmt: skip
    assert by_number == said


@pytest.mark.parametrize("token", [[], ["--token", "London"]])
def test_a_tagger_says_what_it_tags(token, tagger, capsys):
    assert run(["explain-text", "in Paris", "--model", str(tagger), *token]) == 2
    assert re.search(r"--token: the model .*: in/\w+ paris/\w+$", capsys.readouterr().err)


def test_the_next_tokens_one_by_one(llama, tmp_path, capsys):
    said = printed(capsys, "explain-text", "The tower is in the city of", "--model", llama,
                   "--generate", 3, "--out", "why.json", "--out", "why.png")  # fmt: skip
    loaded = load(str(llama))
    inputs = encoded(loaded, "The tower is in the city of")
    n = inputs["input_ids"].shape[1]
    expected = explain_generation(
        GenericAttention(loaded.model), inputs, max_new_tokens=3, discard_self=True
    )
    answers = json.loads((tmp_path / "why.json").read_text())["explanations"]
    assert [a["number"] for a in answers] == [
        [n - 1 + t, int(token)] for t, token in enumerate(expected.tokens[0])
    ]
    for t, answer in enumerate(answers):
        words = answer["methods"]["GenericAttention"]["words"]
        total = float(expected.relevance["input_ids"][0, t].sum())
        assert sum(w["relevance"] for w in words) == pytest.approx(total, rel=1e-4)
        assert max(i for w in words for i in w["tokens"]) == n - 1 + t
        with torch.no_grad():
            ids = torch.cat([inputs["input_ids"], expected.tokens[:, :t]], 1)
            likely = loaded.model(input_ids=ids).logits[0, -1].softmax(-1)
        assert answer["probability"] == pytest.approx(float(likely[answer["number"][1]]), rel=1e-3)
        assert answer["target"] in said
    assert (tmp_path / "why.png").stat().st_size > 2000


def test_two_models_one_below_the_other(bert, tmp_path, capsys):
    said = printed(capsys, "explain-text", "a fine film", "--model", "topics", "--model", bert,
                   "--method", "GAE, rollout", "--out", "why.csv", "--out", "why.html")  # fmt: skip
    assert said.startswith("topics\npredicted: ") and f"\n\n{bert}\npredicted: " in said
    with open(tmp_path / "why.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["model"], line["method"]) for line in lines} == {
        (model, method) for model in ("topics", str(bert)) for method in ("GAE", "rollout")
    }
    loaded = load("topics", [])
    inputs = encoded(loaded, "a fine film")
    target = loaded.classes[lines[0]["target"]]
    gae = GenericAttention(loaded.model).attribute(inputs, target=target, discard_self=True)
    of_gae = [line for line in lines if line["model"] == "topics" and line["method"] == "GAE"]
    found = [float(line["relevance"]) for line in of_gae]
    assert found == pytest.approx(gae["input_ids"][0].tolist(), rel=1e-4)
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert page.count("why ") >= 2 and "topics: why" in page
    assert re.search(r'title="[\d.e-]+"', page)  # numbers on hover


def test_two_models_of_a_picture_and_its_numbers(scene, tmp_path, capsys):
    said = printed(capsys, "explain-image", scene, "--model", "digit-vit", "--model",
                   "texture-vit", "--out", "why.png", "--out", "why.json")  # fmt: skip
    assert "digit-vit\npredicted: 5" in said and "\ntexture-vit\npredicted: " in said
    first, second = json.loads((tmp_path / "why.json").read_text())["explanations"]
    assert (first["model"], second["model"]) == ("digit-vit", "texture-vit")
    loaded = load("digit-vit")
    pixels = loaded.read(scene)[None]
    expected = GenericAttention(loaded.model).attribute(pixels, target=5)[0].sum(0)
    found = torch.tensor(first["methods"]["GenericAttention"]["map"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_relevance_to_itself_is_left_out_whatever_the_method_is_called(capsys):
    by_alias, by_class, with_self = (
        printed(capsys, "explain-text", "The band sang.", "--model", "topics", "--method", name)
        for name in ("gae", "GenericAttention", "GAE(discard_self=False)")
    )
    assert rows(by_alias) == rows(by_class)
    assert max(rows(by_alias).values())[0] < 0.5 * max(rows(with_self).values())[0]


def test_special_tokens_are_shown_where_they_hold_most(capsys):
    text = "The band toured Europe by train and played in small villages."
    plain = printed(capsys, "explain-text", text, "--model", "topics")
    assert "[CLS]" not in rows(plain)
    most = printed(capsys, "explain-text", text, "--model", "topics", "--method", "rollout")
    assert next(iter(rows(most))) == "[CLS]" and "because they hold most of the relevance" in most


def test_a_flat_map_is_noted_on_the_command_line(capsys):
    assert run(["explain-text", "The band sang.", "--model", "topics", "--method",
                "GAE(discard_self=False)"]) == 0  # fmt: skip
    told = capsys.readouterr().err
    assert told.startswith("note: the output reads all tokens") and told.count("\n") == 1
    assert run(["explain-text", "The band sang.", "--model", "topics"]) == 0
    assert not capsys.readouterr().err


def test_a_page_of_layers_and_heads(bert, scene, tmp_path, capsys):
    asked = ["explain-text", "A fine film.", "--model", bert, "--attention", "page.html"]
    assert "written to page.html" in printed(capsys, *asked)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [one["text"] for one in data["keys"]] == ["[CLS]", "a", "fine", "film", ".", "[SEP]"]
    assert [layer["final"] for layer in data["layers"]] == [True, False]
    printed(capsys, "explain-image", scene, "--model", "digit-vit", "--attention", "see.html",
            "--out", "why.json")  # fmt: skip
    assert '"grid":[8,8]' in (tmp_path / "see.html").read_text(encoding="utf-8")
    for more, said in [
        (["--method", "GAE, VTranM"], "one method on one model"),
        (["--method", "Attn-LRP"], "--attention: AttnLRP"),
        (["--attention", "page.png"], "ending in .html"),
    ]:
        assert run([str(a) for a in [*asked, *more]]) == 2
        assert said in capsys.readouterr().err
