"""A headless Chromium for the tests of the dashboards, and when they may be skipped."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# In the project's own CI nothing that it has installed may be found missing: a space-separated
# list of "chromium", "gradio" and "captum.insights".
REQUIRED = os.environ.get("CAPTUM_ATTN_REQUIRED", "").split()
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
TIMEOUT = 60_000  # ms; a page that answers at all answers much sooner
PATIENCE = 10_000  # ms, before something is done again
# A browser on a busy machine is not always in time; what is wrong is wrong three times.
MARKS = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]


def chromium() -> str | None:
    """The path of a Chromium that Playwright can drive."""
    if importlib.util.find_spec("playwright") is None:
        return None
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


def has_captum_insights() -> bool:
    return importlib.util.find_spec("captum.insights") is not None


def skip_without(what: str, there: bool, reason: str) -> None:
    """Skips, or fails where it is required."""
    if there:
        return
    if what in REQUIRED:
        pytest.fail(f"{reason}, but CAPTUM_ATTN_REQUIRED names it")
    pytest.skip(reason)


@contextmanager
def opened(url: str, profile: str) -> Iterator[Any]:
    """A page of a fresh browser; `page.elsewhere` is what it asked other hosts for."""
    skip_without("chromium", chromium() is not None, "no Chromium with Playwright to drive it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium(), args=FLAGS, viewport={"width": 1280, "height": 900}
        )
        try:
            page = browser.pages[0]
            page.set_default_timeout(TIMEOUT)
            page.elsewhere = []
            page.on("request", lambda r: None if local(r.url) else page.elsewhere.append(r.url))
            page.goto(url)
            yield page
        finally:
            browser.close()


def click_that_asks(page: Any, selector: str, url: str) -> Any:
    """Clicks until a request goes out: a page that is still moving lets a click go by.

    Returns:
        Request: what the page sent.
    """

    def click() -> Any:
        with page.expect_request(url, timeout=PATIENCE) as sent:
            page.click(selector)
        return sent.value

    return again(click)


def upload(page: Any, path: Path) -> None:
    """Gives the page a file until it names it: a page that is not yet alive takes none."""

    def give() -> None:
        page.set_input_files("input[type=file]", str(path))
        page.wait_for_selector(f"text={path.name}", timeout=PATIENCE)

    again(give)


def again(act: Callable[[], Any], tries: int = 6) -> Any:
    """Does what a page on a busy machine may not have taken, until it has."""
    from playwright.sync_api import TimeoutError

    for _ in range(tries - 1):
        try:
            return act()
        except TimeoutError:
            continue
    return act()


def local(url: str) -> bool:
    return url.startswith(("data:", "blob:", "http://127.0.0.1:", "http://localhost:"))


def pixels(png: str) -> np.ndarray:
    """A PNG, in base64 or as a data URL, as (H, W, 3) in 0 to 255."""
    from PIL import Image

    data = base64.b64decode(png.rpartition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def assert_same_picture(found: str, expected: str) -> None:
    """One picture of the same figure, drawn twice."""
    first, second = pixels(found), pixels(expected)
    assert first.shape == second.shape
    assert np.abs(first - second).max() <= 2
