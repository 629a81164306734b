"""Word pieces of every kind of tokenizer become words; letters of every script find their font."""

from __future__ import annotations

import matplotlib
import pytest
import torch

from captum_attn.visualization import _fonts as fonts
from captum_attn.visualization import text_records, words_of
from captum_attn.visualization.words import BYTE_OF

LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}


def byte_level(text: str) -> str:
    return "".join(LETTER_OF[byte] for byte in text.encode())


def shown(tokens, **options):
    words = words_of(tokens, list(range(1, len(tokens) + 1)), **options)
    return [(word.text, word.relevance) for word in words]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["[CLS]", "un", "##believ", "##able", ".", "[SEP]", "[PAD]"],
         [("[CLS]", 1), ("unbelievable", 9), (".", 5), ("[SEP]", 6)]),
        (["<s>", "▁A", "▁gor", "geous", "▁mov", "ie", ".", "</s>", "<pad>"],
         [("<s>", 1), ("A", 2), ("gorgeous", 7), ("movie", 11), (".", 7), ("</s>", 8)]),
        (["The", "Ġband", "ed", "Ġdon", "'t", "Ċ", "Hi"],
         [("The", 1), ("banded", 5), ("don't", 9), ("↵", 6), ("Hi", 7)]),
        (["a</w>", "pho", "to</w>", "<|eot|>"], [("a", 1), ("photo", 5), ("<|eot|>", 4)]),
        (["plain", "words"], [("plain", 1), ("words", 2)]),
        (["▁今日", "は", "良い"], [("今日", 1), ("は", 2), ("良い", 3)]),
        (["▁안녕", "하세요", "▁세계"], [("안녕하세요", 3), ("세계", 3)]),
        (["<0xE4>", "<0xBD>", "<0xA0>", "▁hi"], [("你", 6), ("hi", 4)]),
    ],
)  # fmt: skip
def test_pieces_become_words(tokens, expected):
    assert shown(tokens) == expected


def test_bytes_of_one_letter_never_come_apart():
    hebrew = byte_level("של")
    assert shown([hebrew[:1], hebrew[1:3], hebrew[3:]]) == [("של", 6)]
    assert shown([hebrew[:1], hebrew[1:2], hebrew[2:]], merge=False) == [("ש", 3), ("ל", 3)]
    assert [text for text, _ in shown(["caf", "é"])] == ["caf", "é"]  # Latin letters, no bytes


def test_unmerged_pieces_keep_their_places():
    words = words_of(["un", "##able", "x"], [1, 2, 3], merge=False)
    assert [(w.text, w.positions) for w in words] == [("un", (0,)), ("able", (1,)), ("x", (2,))]


def test_relevance_is_kept_whole():
    tokens = ["[CLS]", "un", "##able", ",", "x", "##y", "[SEP]"]
    values = torch.rand(7).tolist()
    words = words_of(tokens, values)
    assert sum(w.relevance for w in words) == pytest.approx(sum(values))
    assert [p for w in words for p in w.positions] == list(range(7))
    assert [w.special for w in words] == [True, False, False, False, True]


def test_words_are_shown_as_they_stand_in_the_text():
    text = "Gar\u00e7on, xyz!"
    tokens = ["[CLS]", "gar", "##con", ",", "[UNK]", "!", "[SEP]"]
    spans = [(0, 0), (0, 3), (3, 6), (6, 7), (8, 11), (11, 12), (0, 0)]
    special = [True, False, False, False, False, False, True]
    words = words_of(tokens, [1.0] * 7, special=special, spans=spans, text=text)[1:-1]
    assert [(w.text, w.gap) for w in words] == [
        ("Garçon", True), (",", False), ("xyz", True), ("!", False)
    ]  # fmt: skip


def test_records_are_captums_and_hold_words():
    from captum.attr import visualization

    (record,) = text_records(
        torch.tensor([9.0, 1.0, -3.0, 9.0]), ["[CLS]", "un", "##able", "[SEP]"],
        pred_class="yes", pred_prob=0.9, true_class="no", attr_class="yes",
    )  # fmt: skip
    assert isinstance(record, visualization.VisualizationDataRecord)
    assert record.raw_input_ids == ["unable"]
    assert record.word_attributions.tolist() == [-1.0]
    assert record.attr_score == pytest.approx(-2.0)
    assert "unable" in visualization.format_word_importances(
        record.raw_input_ids, record.word_attributions
    )


def test_each_example_has_its_own_class():
    records = text_records(torch.ones(2, 1), [["a"], ["b"]], pred_class=["x", "y"], pred_prob=0.5)
    assert [(r.pred_class, r.pred_prob) for r in records] == [("x", 0.5), ("y", 0.5)]


def test_a_letter_without_a_font_is_named(monkeypatch):
    only = [f for f in fonts.font_manager.fontManager.ttflist if f.name == "DejaVu Sans"]
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", only)
    with pytest.warns(UserWarning, match=r"no installed font has the letters 今 日 \(CJK\).*HTML"):
        assert fonts.families(["今日 and more"]) == list(matplotlib.rcParams["font.family"])


def test_a_font_is_found_for_letters_that_the_first_one_lacks(recwarn):
    # STIX, which matplotlib brings along, has this letter and DejaVu Sans does not.
    letter = next(
        chr(code)
        for code in sorted(fonts._letters(_path("STIXGeneral")))
        if code not in fonts._letters(_path("DejaVu Sans")) and fonts._is_drawn(chr(code))
    )
    found = fonts.families([letter])
    assert len(found) == 1 + len(matplotlib.rcParams["font.family"])
    assert ord(letter) in fonts._letters(_path(found[-1])) and not recwarn.list


def _path(name: str) -> str:
    manager = fonts.font_manager
    return manager.findfont(manager.FontProperties(family=name))


def test_words_of_a_line_in_the_order_in_which_they_are_seen():
    ways = [1, 1, -1, -1, 1]
    assert fonts.in_sight("ab12c", ways, 1) == list("ab21c")
    assert fonts.in_sight("אבxyג", [-1, -1, 1, 1, -1], -1) == list("גxyבא")
    assert fonts.in_sight("א.ב", [-1, 0, -1], -1) == list("ב.א")
    assert [fonts.direction(text) for text in ("abc", "שלום", "12", "«مرحبا»")] == [1, -1, 0, -1]


def test_older_matplotlib_is_given_the_letters_in_order(monkeypatch):
    monkeypatch.setattr(fonts, "SHAPES", False)
    assert fonts.shaped("של") == "לש" and fonts.shaped("abc") == "abc"
    with pytest.warns(UserWarning, match="does not join the letters"):
        fonts.shaped("مرحبا")
