"""Texts: every word on the colour of its relevance, in the figure and in its HTML."""

from __future__ import annotations

import re
import warnings
from html.parser import HTMLParser

import pytest
import torch
from captum.attr import visualization as captum
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from captum_attn.visualization import Word, text_records, visualize_text
from captum_attn.visualization._fonts import shaped
from captum_attn.visualization._style import tint

TOKENS = ["[CLS]", "un", "##kind", "words", "<b>&", "[SEP]"]
VALUES = torch.tensor([8.0, 1.0, -3.0, 4.0, 0.0, 0.0])


def coloured(picture) -> dict[str, str]:
    """Each word and the colour behind it."""
    (ax,) = picture.axes
    boxes = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_height() > 10]
    found = {}
    for text in ax.texts:
        x, y = text.get_position()
        for box in boxes:
            left, top = box.get_xy()
            if left < x < left + box.get_width() and top < y < top + box.get_height():
                found[text.get_text()] = to_hex(box.get_facecolor())
    return found


class Spans(HTMLParser):
    """Words of a page with their styles and tooltips."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[tuple[str, str, str]] = []
        self.at: dict[str, str | None] = {}
        self.open: list[str] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.at = dict(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.at = {}

    def handle_data(self, data):
        if self.at.get("title") is not None:
            self.words.append((data, str(self.at["style"]), str(self.at["title"])))


def test_words_have_the_colour_of_their_relevance():
    picture = visualize_text(VALUES, TOKENS, show_special=False)
    assert coloured(picture) == {
        "unkind": to_hex(tint(-0.5)), "words": to_hex(tint(1.0)), "<b>&": to_hex(tint(0.0)),
    }  # fmt: skip
    said = {t.get_text() for t in picture.axes[0].texts}
    assert {"for the target", "neutral", "against it", "special tokens 57%"} <= said


def test_special_tokens_are_shown_where_asked_for():
    picture = visualize_text(VALUES, TOKENS, show_special=True, merge_pieces=False)
    found = coloured(picture)
    assert list(found) == ["[CLS]", "un", "kind", "words", "<b>&", "[SEP]"]
    assert found["[CLS]"] == to_hex(tint(1.0)) and found["words"] == to_hex(tint(0.5))


def test_special_tokens_are_shown_where_they_hold_most():
    """8 of 14 in [CLS]; with 4 in it they are hidden, and a note says their share."""
    assert list(coloured(visualize_text(VALUES, TOKENS)))[0] == "[CLS]"
    values = VALUES.clone()
    values[0] /= 2
    picture = visualize_text(values, TOKENS)
    assert "[CLS]" not in coloured(picture)
    assert "special tokens 40%" in {t.get_text() for t in picture.axes[0].texts}


@pytest.mark.parametrize(
    ("sign", "unkind", "words"),
    [("positive", 0.0, 1.0), ("negative", -1.0, 0.0), ("absolute_value", 0.5, 1.0)],
)
def test_captums_signs(sign, unkind, words):
    found = coloured(visualize_text(VALUES, TOKENS, sign=sign, show_special=False))
    assert found["unkind"] == to_hex(tint(unkind)) and found["words"] == to_hex(tint(words))


def test_outliers_have_the_ends_colour():
    values = torch.tensor([100.0, 10.0, 5.0])
    found = coloured(visualize_text(values, ["a", "b", "c"], outlier_perc=90))
    assert found == {"a": to_hex(tint(1)), "b": to_hex(tint(1)), "c": to_hex(tint(0.5))}


def test_the_html_is_text_with_everything_in_it():
    page = visualize_text(
        {"GAE <1>": VALUES}, TOKENS, titles=["a & b"], captions={"GAE <1>": ["x"]},
        show_special=False,
    )  # fmt: skip
    words = Spans(page.page()).words
    assert [(word, title) for word, _, title in words] == [
        ("unkind", "-2"), ("words", "4"), ("<b>&", "0")
    ]  # fmt: skip
    red, green, blue = (round(255 * part) for part in tint(1.0))
    assert f"background: rgb({red}, {green}, {blue})" in words[1][1]
    source = page.html()
    assert "GAE &lt;1&gt;" in source and "<b>a &amp; b</b>" in source and "<b>&" not in source
    assert 'dir="auto"' in source and "special tokens 57%" in source


def test_a_batch_with_several_methods():
    values = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    tokens = [["a", "b", "[PAD]"], ["c", "d", "e"]]
    picture = visualize_text({"m": values, "n": 3 * values}, tokens, titles=["first", "second"])
    words = [word for word, _, _ in Spans(picture.page()).words]
    assert words == ["a", "b"] * 2 + ["c", "d", "e"] * 2
    places = {t.get_text(): t.get_position()[1] for t in picture.axes[0].texts}
    assert places["first"] < places["a"] < places["second"] < places["c"] == places["e"]


def test_records_of_captum_are_drawn_with_what_they_say():
    record = captum.VisualizationDataRecord(
        torch.tensor([0.5, -1.0]), 0.25, "dog", "cat", "dog", -0.5, ["un", "##like"], 0.0
    )
    picture = visualize_text([record, record])
    said = [t.get_text() for t in picture.axes[0].texts]
    assert said.count("predicted dog (0.25), true cat, explained dog") == 2
    assert coloured(picture) == {"unlike": to_hex(tint(-1))}
    again = visualize_text(text_records(VALUES, TOKENS))
    assert coloured(again)["words"] == to_hex(tint(1.0))


def test_a_real_tokenizers_output_is_shown_as_the_text_stands():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cafe", "##s"])}
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    texts = ["Cafés xyz", "Cafe"]
    encoding = fast(texts, padding=True, return_tensors="pt")
    assert encoding["input_ids"].shape == (2, 5)
    values = torch.arange(10.0).view(2, 5)
    records = text_records(values, encoding, text=texts)
    assert [r.raw_input_ids for r in records] == [["Cafés", "xyz"], ["Cafe"]]
    assert records[0].attr_score == 1 + 2 + 3 and records[1].attr_score == 6
    assert text_records(values, encoding)[0].raw_input_ids == ["cafes", "[UNK]"]


def test_long_texts_are_folded_in_the_figure_only():
    values = torch.zeros(2000)
    values[700], values[1500] = 1.0, -0.5
    tokens = [f"word{i}" for i in range(2000)]
    picture = visualize_text(values, tokens, max_lines=2)
    found = coloured(picture)
    assert found["word700"] == to_hex(tint(1.0)) and found["word1500"] == to_hex(tint(-0.5))
    assert len(found) < 60
    notes = [t.get_text() for t in picture.axes[0].texts if "less relevance" in t.get_text()]
    assert len(notes) == 3 and all(re.match(r"… \d+ lines? with", note) for note in notes)
    assert picture.get_size_inches()[1] < 3
    assert len(Spans(picture.page()).words) == 2000


def test_no_word_leaves_the_figure():
    tokens = ["short", "a" * 300, *["middling"] * 30]
    picture = visualize_text(torch.rand(len(tokens)), tokens, width=5)
    (ax,) = picture.axes
    for box in ax.patches:
        assert box.get_x() >= 0 and box.get_x() + box.get_width() <= 5 * 72


def test_right_to_left_texts_run_from_the_right():
    picture = visualize_text(torch.tensor([1.0, 2.0, 3.0, 4.0]), ["שלום", "עולם", "and", "more"])
    at = {t.get_text(): t.get_position()[0] for t in picture.axes[0].texts}
    first, second = map(shaped, ["שלום", "עולם"])  # older matplotlib is given them reversed
    assert at[first] > at[second] > at["more"] > at["and"]


def test_words_of_scripts_without_blanks_touch():
    picture = visualize_text(torch.ones(3), ["天", "気", "x"], legend=False)
    first, second, third = (p for p in picture.axes[0].patches)
    assert second.get_x() == pytest.approx(first.get_x() + first.get_width())
    assert third.get_x() > second.get_x() + second.get_width() + 1


def test_words_can_be_given():
    words = [[Word("one", 1.0)], [Word("two", -1.0), Word(".", 0.0, gap=False)]]
    found = coloured(visualize_text({"m": words}))
    assert found["one"] == to_hex(tint(1)) and found["two"] == to_hex(tint(-1))


def test_zero_relevance_is_white_and_says_so():
    with pytest.warns(UserWarning, match="m has no relevance to show: drawn as empty"):
        picture = visualize_text({"m": torch.zeros(2)}, ["a", "b"])
    assert set(coloured(picture).values()) == {"#ffffff"}
    assert "all zero" in {t.get_text() for t in picture.axes[0].texts}


def test_tints_are_white_at_nothing_and_light_enough_for_black_letters():
    assert tint(0.0) == (1.0, 1.0, 1.0)
    for value in (-1.0, 1.0, 7.0):
        red, green, blue = (
            c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in tint(value)
        )
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert (luminance + 0.05) / 0.05 >= 4.5  # WCAG AA
    assert tint(1.0)[0] > tint(1.0)[2] and tint(-1.0)[2] > tint(-1.0)[0]


def test_a_letter_without_a_font_is_warned_of_once(tmp_path, monkeypatch):
    monkeypatch.setattr("captum_attn.visualization._fonts.font_manager.fontManager.ttflist", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        visualize_text(torch.ones(2), ["\u6c17", "ok"]).save(tmp_path / "why.png")
        said = [str(one.message) for one in caught]
    assert any("no installed font has the letters \u6c17" in one for one in said)
    assert not any("Glyph" in one for one in said)
