"""The Gradio dashboard in a browser: what it draws is what the session computes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from captum_attn import (
    AttentionRollout,
    AttnLRP,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    VTranM,
)
from captum_attn.insights import AttributionVisualizer, Batch, drawing
from captum_attn.insights.methods import METHODS
from captum_attn.insights.session import Session
from tests.insights.browser import (
    MARKS,
    chromium,
    click_that_asks,
    opened,
    skip_without,
    upload,
)
from tests.insights.models import (
    CLASSES,
    TEXT_BATCH,
    Broken,
    TinyText,
    TinyViT,
    images,
    made,
    photo,
    softmax,
    text,
)

pytestmark = MARKS
# One of each kind: the others take the same way to the page.
SHOWN = (GenericAttention, VTranM, HeterogenousAttention, AttnLRP, AttentionRollout, RawAttention)
NAMES = [method.get_name() for method in METHODS if method in SHOWN]
ERROR = ".panel-one .ca-message"


def visualizer(kind: str) -> AttributionVisualizer:
    if kind == "text":
        return AttributionVisualizer(made(TinyText), CLASSES, text(), [TEXT_BATCH], softmax)
    models = {"good": made(TinyViT), "broken": Broken()}
    batch = Batch(images(3), torch.tensor([0, 1, 2]))
    return AttributionVisualizer(models, CLASSES, photo(), [batch], softmax)


@pytest.fixture(scope="module")
def served(request, tmp_path_factory) -> Iterator[tuple]:
    """Both dashboards, each with a page of one browser."""
    there = importlib.util.find_spec("gradio") is not None
    skip_without("gradio", there, 'the dashboard needs pip install "captum_attn[insights]"')
    skip_without("chromium", chromium() is not None, "no Chromium with Playwright to drive it")
    found = {kind: visualizer(kind) for kind in ("image", "text")}
    ports = {kind: one.serve() for kind, one in found.items()}
    profile = str(tmp_path_factory.mktemp("profile"))
    try:
        with opened(f"http://127.0.0.1:{ports['image']}/", profile) as page:
            yield page, ports, found
    finally:
        for one in found.values():
            one.close()


def fresh(served: tuple, kind: str) -> tuple:
    page, ports, sessions = served
    # What shows is not yet alive: the parts of the page come one by one.
    page.goto(f"http://127.0.0.1:{ports[kind]}/", wait_until="networkidle")
    page.wait_for_selector("button.explain")
    return page, sessions[kind]


def pick(page, label: str, value: str, nth: int = 0) -> None:
    """Chooses from the dropdown of a label."""
    page.get_by_label(label, exact=True).locator("visible=true").nth(nth).click()
    page.get_by_role("option", name=value, exact=True).click()
    page.wait_for_function("!document.querySelector('[role=option]')")  # the list has closed


def shows(page, selector: str, png: str, nth: int = -1) -> None:
    """Waits until an image is this very picture; server and test draw in one process."""
    seen = "([selector, nth, end]) => [...document.querySelectorAll(selector)].at(nth)?.src === end"
    page.wait_for_function(seen, arg=[selector, nth, f"data:image/png;base64,{png}"])


def explain(page) -> list:
    """Asks; the values of the page's fields as the server gets them."""
    return click_that_asks(page, "button.explain", "**/queue/join*").post_data_json["data"]


def test_every_method_draws_its_own_map(served):
    page, session = fresh(served, "image")
    page.get_by_label("Deletion curve").uncheck()
    pick(page, "Beside it", "nothing")
    maps = set()
    for name in NAMES:
        if name != NAMES[0]:
            pick(page, "Method", name)
        explain(page)
        (drawn,) = session.explain("good", session.examples[0], name).outputs
        shows(page, ".panel-one img", drawn.modified)
        shows(page, ".panel-one img", drawn.base, nth=0)
        assert page.locator(".panel-one h3").inner_text() == name
        maps.add(drawn.modified)
    assert len(maps) == len(NAMES) - 1  # with one stream the heterogenous rule is GAE's
    assert page.locator(".panel-two img, .curves img").count() == 0
    assert page.elsewhere == []  # the page needs no other host


def test_two_methods_with_their_curves_beside_each_other(served):
    page, session = fresh(served, "image")
    pick(page, "Example", "2. (dog)")
    pick(page, "Explain", "bird")
    pick(page, "Method", "VTranM")
    pick(page, "Beside it", "Integrated Gradients")
    explain(page)
    example, curves = session.examples[1], {}
    for panel, name in (("one", "VTranM"), ("two", "Integrated Gradients")):
        why = session.explain("good", example, name, {}, target=2)
        shows(page, f".panel-{panel} img", why.outputs[0].modified)
        curves[name] = session.deletion("good", example, why.attributions, 2)
    html = drawing.curves(curves, session.chance("good", example, 2))
    shows(page, ".curves .ca-day img", re.search(r'base64,([^"]+)"', html)[1])
    said = page.locator(".predictions .ca-card").inner_text()
    assert "label: dog" in said and "explained: bird" in said
    scores = {p.label: f"{p.score:.3f}" for p in session.predict("good", example)}
    assert all(score in said for score in scores.values())


def test_the_first_example_is_explained_as_the_page_opens_and_another_as_it_is_chosen(served):
    page, session = fresh(served, "image")
    for number, target in ((0, None), (1, None), (1, 2)):
        if number and target is None:
            pick(page, "Example", "2. (dog)")
        elif target is not None:
            pick(page, "Explain", CLASSES[target])
        why = session.explain("good", session.examples[number], NAMES[0], {}, target)
        shows(page, ".panel-one img", why.outputs[0].modified)  # nobody pressed the button
    pick(page, "Method", "VTranM")
    why = session.explain("good", session.examples[1], "VTranM", {}, 2)
    shows(page, ".panel-one img", why.outputs[0].modified)
    assert f"for {CLASSES[2]}" in page.locator(".panel-one .ca-key").inner_text()
    assert page.locator(".ca-input").inner_text() == "2. (dog)"


def test_the_page_on_a_narrow_screen_and_by_night(served):
    page, _ = fresh(served, "image")
    try:
        for width, height in ((400, 800), (768, 768)):
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_selector(".panel-two img")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            box = page.locator("button.explain").bounding_box()
            assert box["y"] + box["height"] < height  # above the fold
            inside = """() => [...document.querySelectorAll('.ca-card')].every(card =>
                [...card.querySelectorAll('*')].every(e => e.getBoundingClientRect().right
                    <= card.getBoundingClientRect().right + 1))"""
            assert page.evaluate(inside)
            if width == 400:
                one, two = (page.locator(f".panel-{n} .ca-card").bounding_box()
                            for n in ("one", "two"))  # fmt: skip
                assert two["y"] >= one["y"] + one["height"]  # below each other
        page.wait_for_selector(".curves img", state="attached")
        assert page.locator(".ca-day").is_visible() and not page.locator(".ca-night").is_visible()
        page.evaluate("document.body.classList.add('dark')")
        assert page.locator(".ca-night").is_visible() and not page.locator(".ca-day").is_visible()
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})


def test_the_keyboard_alone_explains(served):
    page, session = fresh(served, "image")
    page.get_by_label("Deletion curve").uncheck()
    page.locator("button.explain").focus()
    with page.expect_request("**/queue/join*"):
        page.keyboard.press("Enter")
    (drawn,) = session.explain("good", session.examples[0], NAMES[0]).outputs
    shows(page, ".panel-one img", drawn.modified)


def test_options_have_a_line_of_help_and_those_without_effect_are_hidden(served):
    page, _ = fresh(served, "text")
    page.locator("button:visible", has_text="Options").first.click()
    page.get_by_text("every update replaces R instead of being added").first.wait_for()
    for name in ("interpolation", "self_in_rule_10"):
        assert page.get_by_label(name).locator("visible=true").count() == 0
    fresh(served, "image")
    page.locator("button:visible", has_text="Options").first.click()
    page.get_by_label("interpolation").locator("visible=true").first.wait_for()


def test_options_reach_the_method(served):
    page, session = fresh(served, "image")
    page.get_by_label("Deletion curve").uncheck()
    pick(page, "Beside it", "nothing")
    pick(page, "Method", "Heterogenous Attention")
    page.locator("button:visible", has_text="Options").first.click()
    pick(page, "correction", "full")
    pick(page, "interpolation", "nearest")
    explain(page)
    options = {"correction": "full", "interpolation": "nearest"}
    why = session.explain("good", session.examples[0], "Heterogenous Attention", options)
    plain = session.explain("good", session.examples[0], "Heterogenous Attention")
    assert why.outputs[0].modified != plain.outputs[0].modified
    shows(page, ".panel-one img", why.outputs[0].modified)


def test_a_picture_of_ones_own(served, tmp_path):
    page, session = fresh(served, "image")
    page.get_by_label("Deletion curve").uncheck()
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 40), (200, 0, 0)).save(path)
    upload(page, path)
    explain(page)
    own = session.own(session.examples[0], picture=str(path))
    why = session.explain("good", own, NAMES[0])
    shows(page, ".panel-one img", why.outputs[0].modified)
    assert "label" not in page.locator(".predictions .ca-card").inner_text()


def test_an_upload_that_is_no_picture_is_a_message_and_the_page_goes_on(served, tmp_path):
    page, _ = fresh(served, "image")
    path = tmp_path / "cat.png"
    path.write_bytes(b"<script>no picture</script>")
    upload(page, path)
    explain(page)
    page.get_by_text("'cat.png' is no picture that can be read").wait_for()
    page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
    explain(page)
    page.wait_for_selector(".panel-one img")


def test_a_model_that_fails_is_a_message_and_the_page_goes_on(served):
    page, _ = fresh(served, "image")
    pick(page, "Model", "broken")
    explain(page)
    page.wait_for_selector(".ca-message:text-is('RuntimeError: out of <luck>')")
    assert page.locator(".panel-one img").count() == 0
    pick(page, "Model", "good")
    explain(page)
    page.wait_for_selector(".panel-one img")


def test_a_method_that_fails_is_a_message_beside_the_other(served):
    page, _ = fresh(served, "image")
    page.locator("button:visible", has_text="Options").first.click()
    page.get_by_label("start_layer").locator("visible=true").first.fill("7")
    assert 7 in explain(page)
    page.wait_for_selector(ERROR)
    assert "start_layer: expected less than 2" in page.locator(ERROR).inner_text()
    page.wait_for_selector(".panel-two img")


def test_words_have_the_colours_of_their_relevance(served):
    page, session = fresh(served, "text")
    for name in NAMES:
        if name != NAMES[0]:
            pick(page, "Method", name)
        explain(page)
        page.wait_for_selector(f".panel-one h3:text-is('{name}')")
        coloured(page, expected_words(session, session.examples[0], name))


def test_a_typed_text_is_explained_and_cannot_bring_html(served):
    page, session = fresh(served, "text")
    page.get_by_label("or a text of yours").fill("the <b>bold</b> sea")
    explain(page)
    own = session.own(session.examples[0], text="the <b>bold</b> sea")
    expected = expected_words(session, own, NAMES[0])
    assert [word for word, _ in expected if word != "[CLS]"] == ["the", "<b>bold</b>", "sea"]
    coloured(page, expected)
    assert page.locator(".panel-one b").count() == 0


def coloured(page, expected: list[list[str]]) -> None:
    """Waits until the words have these colours behind them."""
    found = (
        "expected => JSON.stringify([...document.querySelectorAll('.panel-one .ca-text span')]"
        ".map(e => [e.innerText, getComputedStyle(e).backgroundColor])) == JSON.stringify(expected)"
    )
    page.wait_for_function(found, arg=expected)


def expected_words(session: Session, example, name: str) -> list[list[str]]:
    """Light to orange by the share of the largest relevance, pieces added up."""
    from captum_attn.visualization import text_records
    from captum_attn.visualization._style import tint

    why = session.explain("TinyText", example, name)
    relevance, tokens = why.attributions[0], why.outputs[0].base
    special = torch.tensor([token.startswith("[") for token in tokens])
    most = float(relevance[0, special].abs().sum() / relevance.abs().sum()) > 0.5
    (record,) = text_records(relevance, [tokens], show_special=most)
    shares = record.word_attributions.tolist()
    colours = ("rgb({}, {}, {})".format(*(round(255 * c) for c in tint(s))) for s in shares)
    return [list(pair) for pair in zip(record.raw_input_ids, colours, strict=True)]
