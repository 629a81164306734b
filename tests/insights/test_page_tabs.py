"""The tabs of the detector and of the language model in a browser."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from captum_attn.insights.detected import DetectionSession
from captum_attn.insights.features import Batch, ImageFeature
from captum_attn.insights.pictures import drawn_boxes
from captum_attn.insights.tab import Absent
from captum_attn.insights.visualizer import serve
from captum_attn.insights.writing import WritingSession
from tests.insights.browser import MARKS, chromium, click_that_asks, opened, skip_without
from tests.insights.models import TinyDetector, TinyTokenizer, TinyWriter, images, made

pytestmark = MARKS
PROMPT, OTHER = "the old man", "the sea"
SHOWN = "visible=true"
HOW = "not installed: pip install <it>"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple]:
    """One page with three tabs, and what they compute."""
    there = importlib.util.find_spec("gradio") is not None
    skip_without("gradio", there, 'the dashboard needs pip install "captum_attn[insights]"')
    skip_without("chromium", chromium() is not None, "no Chromium with Playwright to drive it")
    names = {0: "cat", 1: "<b>dog</b>"}
    asked = {"activation": "sigmoid", "threshold": 0.0, "id2label": names}
    photo = ImageFeature("Photo")
    tabs = {
        "find": DetectionSession(made(TinyDetector), photo, [Batch(images(2))], **asked),
        "write": WritingSession(made(TinyWriter), TinyTokenizer(), [PROMPT, OTHER]),
        "absent": Absent(HOW),
    }
    blocks, port = serve(tabs)
    try:
        with opened(f"http://127.0.0.1:{port}/", str(tmp_path_factory.mktemp("profile"))) as page:
            yield page, f"http://127.0.0.1:{port}/", tabs
    finally:
        blocks.close(verbose=False)


def fresh(served: tuple, tab: str) -> tuple:
    page, url, tabs = served
    page.goto(url, wait_until="networkidle")
    page.get_by_role("tab", name=tab).click()
    if tab != "absent":
        page.locator(".panel-two .ca-card").locator(SHOWN).wait_for()
    return page, tabs[tab]


def shows(page, selector: str, png: str) -> None:
    seen = "([s, end]) => [...document.querySelectorAll(s)].some(e => e.src === end)"
    page.wait_for_function(seen, arg=[selector, f"data:image/png;base64,{png}"])


def choices(page) -> list[str]:
    return page.locator(".ca-choice label").locator(SHOWN).all_inner_texts()


def test_a_detection_is_chosen_by_keyboard_and_has_its_own_map(served):
    page, session = fresh(served, "find")
    example = session.examples[0]
    found = session.detect("TinyDetector", example)
    scores = [f"({float(score):.2f})" for score in found.scores]
    expected = [f"{i + 1}. {found.names[i]} {score}" for i, score in enumerate(scores)]
    assert choices(page) == expected
    maps = set()
    for place in (0, 1):
        if place:
            page.locator(".ca-choice input").locator(SHOWN).first.focus()
            page.keyboard.press("Tab")
            page.keyboard.press("Space")
        query = int(found.queries[place])
        why = session.explain("TinyDetector", example, query, "GAE")
        picture = drawn_boxes(session.shown(example), why.boxes, heat=why.maps[0])
        shows(page, ".panel-one img", picture)
        boxes = drawn_boxes(session.shown(example), found.boxes, chosen=place)
        shows(page, ".predictions img", boxes)
        maps.add(picture)
    assert len(maps) == 2
    assert page.locator(".panel-one b").count() == 0  # a name brings no HTML
    assert page.elsewhere == []


def test_nothing_above_the_threshold_says_so(served):
    page, _ = fresh(served, "find")
    page.locator("input[type=number]").locator(SHOWN).first.fill("1")
    click_that_asks(page, "button.explain >> visible=true", "**/queue/join*")
    page.get_by_text("Nothing is detected above the threshold").wait_for()
    assert choices(page) == [] and page.locator(".panel-one img").locator(SHOWN).count() == 0


def test_a_next_token_is_chosen_and_appended(served):
    page, session = fresh(served, "write")
    likely = session.next_tokens(PROMPT)
    assert choices(page) == [f"{token.text} {token.probability:.3f}" for token in likely]
    page.locator(".ca-choice label").locator(SHOWN).nth(2).click()
    key = page.locator(".panel-one .ca-key").locator(SHOWN)
    key.get_by_text(f"for {likely[2].text}").wait_for()
    words = page.locator(".panel-one .ca-text").locator(SHOWN).inner_text().split()
    assert words == PROMPT.split()
    click_that_asks(page, "button.append", "**/queue/join*")
    longer = session.with_token(PROMPT, likely[2].token)
    prompt = page.get_by_label("Prompt")
    page.wait_for_function(
        "longer => [...document.querySelectorAll('textarea')].some(e => e.value === longer)",
        arg=longer,
    )
    assert prompt.input_value() == longer
    page.get_by_text(f"explained: {session.next_tokens(longer)[0].text}").wait_for()


def test_every_token_that_is_written_has_a_map(served):
    page, session = fresh(served, "write")
    page.get_by_label("Tokens to write").fill("2")
    click_that_asks(page, "button.write", "**/queue/join*")
    page.locator(".ca-written li").nth(1).wait_for()
    written = list(session.write(PROMPT, 2, "GAE"))
    found = page.locator(".ca-written b").all_inner_texts()
    assert found == [one.token.text for one in written]
    maps = page.locator(".ca-written .ca-text").all_inner_texts()
    assert len(maps) == 2 and all(PROMPT in words for words in maps)
    page.get_by_label("Prompt").fill("  ")
    click_that_asks(page, "button.write", "**/queue/join*")
    page.locator(".written .ca-message").get_by_text("the prompt is empty").wait_for()


def test_a_tab_without_its_model_says_how_to_get_it(served):
    page, _ = fresh(served, "absent")
    page.locator(".ca-message").locator(SHOWN).get_by_text(HOW).wait_for()


@pytest.mark.parametrize("tab", ["find", "write"])
def test_narrow_screens_hold_the_tabs(served, tab):
    page, _ = fresh(served, tab)
    try:
        for width in (400, 768):
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_function(f"innerWidth === {width}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            box = page.locator("button.explain").locator(SHOWN).bounding_box()
            assert box["y"] + box["height"] < 800  # above the fold
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})
