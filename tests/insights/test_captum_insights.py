"""Captum Insights of captum 0.8 with registered methods: its own page, in a browser."""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from captum_attn import AttentionGradCam, GenericAttention, TransformerInputSampling
from captum_attn.insights.methods import METHODS, OF_WORDS, Method
from tests.insights import captum_app
from tests.insights.browser import (
    MARKS,
    assert_same_picture,
    chromium,
    has_captum_insights,
    opened,
    skip_without,
)

pytestmark = MARKS
ROOT = Path(__file__).parents[2]
NAMES = [method.get_name() for method in METHODS]
# Captum's page cannot draw a map of zeros, which Grad-CAM gives for one of the pictures.
NOT_DRAWN = {AttentionGradCam}


@pytest.fixture
def page(request, tmp_path) -> Iterator:
    reason = "this captum has no captum.insights (0.8 has)"
    skip_without("captum.insights", has_captum_insights(), reason)
    skip_without("chromium", chromium() is not None, "no Chromium with Playwright to drive it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.insights.captum_app", request.param, str(port)]
    app = subprocess.Popen(command, cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for(url, app)
        with opened(url, str(tmp_path / "profile")) as page:
            yield page
    finally:
        app.kill()
        app.wait()


def wait_for(url: str, app: subprocess.Popen) -> None:
    for _ in range(600):  # importing takes its time on a busy machine
        assert app.poll() is None, "the app has ended"
        try:
            urlopen(url).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the app did not start")


def fetch(page, name: str, **options: str) -> None:
    """Picks a method, sets its options, presses Fetch and waits until the answer is drawn."""
    page.select_option("select[name=selected_method]", name)
    for option, value in options.items():
        page.select_option(f"select[name={option}]", value)
    with page.expect_response("**/fetch") as answer:
        page.click("button:has-text('Fetch')")
    assert answer.value.status == 200
    page.wait_for_selector("div[class*=panel__column__title] >> text=Predicted")


def attributed(kind: str, method: Method, **options) -> torch.Tensor:
    """The method called directly, one example at a time as Captum does: (4, ...)."""
    app = captum_app.KINDS[kind]()
    model, found = app["models"][0], []
    for one in app["batch"][0].split(1):
        with torch.no_grad():
            target = int(model(one).argmax())
        explain = method(model).attribute
        given = {"baselines": captum_app.zeros(one)}  # where Captum begins a path
        given = {k: v for k, v in given.items() if k in inspect.signature(explain).parameters}
        found.append(explain(one, target=target, **given, **options).detach())
    return torch.cat(found)


@pytest.mark.parametrize("page", ["images", "grey"], indirect=True)
def test_every_method_draws_images(page, request):
    kind = request.node.callspec.params["page"]
    app = captum_app.KINDS[kind]()
    offered = page.locator("select[name=selected_method] option").all_inner_texts()
    assert set(NAMES) <= set(offered)
    seen = set()
    methods = [m for m in METHODS if m not in NOT_DRAWN] if kind == "images" else METHODS[:1]
    for method in methods:
        fetch(page, method.get_name())
        drawn = [
            img.get_attribute("src") for img in page.query_selector_all("img[alt=attribution]")
        ]
        assert len(drawn) == captum_app.COUNT
        values = attributed(kind, method)
        for i in (0, captum_app.COUNT - 1):
            one = slice(i, i + 1)
            expected = app["features"][0].visualize(values[one], app["batch"][0][one], 1)
            assert_same_picture(drawn[i], expected.modified)
        seen.add(drawn[0])
    # With one stream the heterogenous rule is GAE's, up to rounding; the others differ.
    assert len(seen) >= len(methods) - 1 and len(seen) >= 1


@pytest.mark.parametrize("page", ["texts"], indirect=True)
def test_every_method_colours_words_and_takes_its_options(page):
    for method in OF_WORDS:
        if method is TransformerInputSampling:  # refuses a mean over the tokens, which this reads
            continue
        fetch(page, method.get_name())
        assert colours(page) == expected_colours(attributed("texts", method))
    chosen = {"discard_self": "True"}
    fetch(page, GenericAttention.get_name(), **chosen)
    expected = expected_colours(attributed("texts", GenericAttention, discard_self=True))
    assert colours(page) == expected
    assert expected != expected_colours(attributed("texts", GenericAttention))


def colours(page) -> list[str]:
    """The colour behind every word of the page."""
    words = page.query_selector_all("span[class*=text-feature-word]")
    return [word.evaluate("e => getComputedStyle(e).backgroundColor") for word in words]


def expected_colours(values: torch.Tensor) -> list[str]:
    """Captum's colour of every token: frontend/src/utils/color.ts, as a browser writes it."""
    scaled = values / values.abs().amax(1, keepdim=True)
    return [_colour(value) for value in scaled.flatten().tolist()]


def _colour(share: float) -> str:
    import colorsys

    hue, saturation, light = (220, 100, 80) if share > 0 else (10, 100, 67)
    size = abs(share)
    if size < 0.02:
        hue, saturation, light = 0, 40, 90
    else:
        saturation, light = (saturation - 40) * size + 40, (light - 90) * size + 90
    rgb = colorsys.hls_to_rgb(hue / 360, light / 100, saturation / 100)
    return "rgb({}, {}, {})".format(*(round(255 * part) for part in rgb))
