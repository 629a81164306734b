"""The page of layers and heads: its numbers are the maps', texts stay texts, and it is clicked."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch

from captum_attn.errors import InputError, OptionError
from captum_attn.visualization import attention_page
from tests.insights.browser import MARKS, opened

HOSTILE = ["[CLS]", "</script><script>alert(1)</script>", "play", "##ing", '"><img src=x>&amp;']
NAMES = ["encoder.0.attention", "encoder.1.attention"]


def maps(tokens=5, heads=3, batch=2, signed=True):
    generator = torch.Generator().manual_seed(0)
    made = torch.rand if not signed else torch.randn
    size = (batch, heads, tokens, tokens)
    return [(name, made(size, generator=generator, dtype=torch.float64)) for name in NAMES]


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.page(), re.S)[1])


def values_of(one, count):
    levels = np.frombuffer(base64.b64decode(one["values"]), np.int8).reshape(-1, count)
    return levels * np.array(one["steps"])[:, None]


def test_the_numbers_are_those_of_the_maps():
    given, final = maps(), torch.randn(2, 5, 5).double()
    page = attention_page(given, {("x", "x"): final}, tokens=[HOSTILE] * 2, example=1)
    data = data_of(page)
    relevance, *layers = data["layers"]
    assert [layer["name"] for layer in layers] == ["layer 0", "layer 1"]
    expected = [(relevance["maps"][0], final[1])]
    for layer, (_, values) in zip(layers, given, strict=True):
        assert [one["name"] for one in layer["maps"]] == ["mean", "0", "1", "2"]
        expected.append((layer["maps"][0], values[1].mean(0)))
        expected += list(zip(layer["maps"][1:], values[1], strict=True))
        total = sum(v[1].abs().sum() for _, v in given)
        shares = [float(head.abs().sum() / total) for head in values[1]]
        assert [one["share"] for one in layer["maps"][1:]] == pytest.approx(shares, abs=1e-6)
    for one, values in expected:
        error = np.abs(values_of(one, 5) - values.numpy())
        assert (error <= values.abs().amax(1, keepdim=True).numpy() / 253).all()


def test_texts_stay_texts_and_nothing_is_loaded():
    page = attention_page(maps(), tokens=[HOSTILE] * 2, title="why <b>&x?").page()
    assert "<script>alert" not in page and "<img src=x>" not in page and "<b>" not in page
    assert page.count("</script>") == 2 and "why &lt;b&gt;&amp;x?" in page
    assert not re.search(r"https?://|@import|url\(", page)
    keys = data_of(attention_page(maps(), tokens=[HOSTILE] * 2))["keys"]
    assert [one["text"] for one in keys] == ["[CLS]", HOSTILE[1], "play", "ing", HOSTILE[4]]
    assert [one["gap"] for one in keys][2:4] == [True, False] and keys[0]["special"]


def test_the_token_that_is_chosen_first():
    causal = [(name, values.abs().tril()) for name, values in maps()]
    tokens = [HOSTILE] * 2
    assert data_of(attention_page(causal, tokens=tokens))["start"]["row"] == 4
    assert data_of(attention_page(maps(), tokens=tokens))["start"]["row"] == 0
    assert data_of(attention_page(maps(), tokens=tokens, row=-2))["start"]["row"] == 3


def test_a_picture_and_its_patches():
    page = attention_page(maps(7), images=torch.rand(2, 3, 16, 24))
    data = data_of(page)
    assert data["grid"] == [2, 3] and data["picture"].startswith("data:image/png;base64,")
    assert [one["text"] for one in data["keys"]][:2] == ["[CLS]", "patch in row 1, column 1"]
    with pytest.raises(InputError, match="grid: how 35 tokens"):
        attention_page(maps(35), images=torch.rand(2, 3, 16, 16))


def test_what_is_too_large_keeps_the_strongest_heads():
    given = [(name, values * torch.tensor([1.0, 9.0, 2.0])[:, None, None])
             for name, values in maps(40)]  # fmt: skip
    with pytest.warns(UserWarning, match="the 1 strongest heads"):
        page = attention_page(given, tokens=["a"] * 40, max_megabytes=0.012, example=0)
    data = data_of(page)
    assert [[one["name"] for one in layer["maps"]] for layer in data["layers"]] == [
        ["mean", "1"]
    ] * 2
    assert "1 strongest" in data["note"]
    assert len(page.page()) < 40_000
    with pytest.raises(InputError, match="more than max_megabytes=0.001"):
        attention_page(given, tokens=["a"] * 40, max_megabytes=0.001)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"tokens": ["a"]}, InputError, "tokens: expected those of example 0, 5"),
        ({"tokens": None}, InputError, "expected `tokens` or `images`"),
        ({"relevance": torch.rand(2, 4, 5)}, InputError, r"relevance: expected \(B, 5, 5\)"),
        ({"layer_maps": [*maps(), ("x", torch.rand(2, 3, 5, 4))]}, InputError, "between two"),
        ({"layer_maps": [*maps(), ("x", torch.rand(4, 3, 5, 5))]}, InputError, "windows"),
        ({"example": 2}, OptionError, "example"),
        ({"row": 5}, OptionError, "row"),
        ({"max_megabytes": 0}, OptionError, "max_megabytes"),
        ({"title": 3}, InputError, "title"),
    ],
)
def test_what_does_not_fit_is_refused(changed, error, said):
    options = {"layer_maps": maps(), "tokens": [HOSTILE] * 2} | changed
    with pytest.raises(error, match=said):
        attention_page(**options)


def test_it_is_saved_as_html_only(tmp_path):
    page = attention_page(maps(), tokens=[HOSTILE] * 2)
    assert page.save(tmp_path / "a.html").read_text(encoding="utf-8") == page.page()
    assert page._repr_html_().startswith("<iframe")
    with pytest.raises(OptionError, match="html"):
        page.save(tmp_path / "a.png")
    with pytest.raises(InputError, match="cannot write"):
        page.save(tmp_path / "none" / "a.html")


@pytest.mark.browser
@MARKS[1]
def test_clicks_and_keys_draw_what_the_maps_say(tmp_path):
    given = maps(signed=False)
    path = attention_page(given, tokens=[HOSTILE] * 2, title="why?").save(tmp_path / "page.html")
    with opened(path.as_uri(), str(tmp_path / "profile")) as page:
        page.click("[data-layer='1'][data-head='3']")  # its first map is the mean
        page.click(".token >> nth=2")
        assert page.inner_text("#said") == "layer 1, head 2: what “play” looks at"
        row = given[1][1][0, 2, 2]
        assert strongest(page) == int(row.argmax())
        first = page.inner_text("#list li >> nth=0").split(": ")[-1]
        assert float(first.split(" ")[0]) == pytest.approx(float(row.max()), abs=5e-3)
        page.click("text=what looks at it")
        assert strongest(page) == int(given[1][1][0, 2, :, 2].argmax())
        page.focus("[data-layer='1'][data-head='3']")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        assert page.inner_text("#said") == "layer 0, head 1: what “play” is looked at by"
        assert page.elsewhere == [path.as_uri()]
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def strongest(page):
    """The place of the token with the fullest colour."""
    return page.evaluate("""() => {
      const alpha = (b) => +(b.style.background.match(/rgb\\(/) ? 1 :
        (b.style.background.match(/, ([\\d.]+)\\)$/) || [0, 0])[1]);
      const all = [...document.querySelectorAll(".token")].map(alpha);
      return all.indexOf(Math.max(...all));
    }""")
