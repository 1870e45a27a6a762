"""Pages in a real browser: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser; the test is skipped, and says so, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; CHROMIUM names one elsewhere")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


WIDTHS = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
OUTSIDE = """() => [...document.querySelectorAll('body *')]
    .filter(e => e.getClientRects().length && !e.closest('svg, [aria-hidden]'))
    .filter(e => e.getBoundingClientRect().right > innerWidth
        || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline')
    .map(e => e.outerHTML.slice(0, 200))"""


def check_fits(page: Any, width: int) -> None:
    """Nothing is wider than a screen of so many pixels: neither the page nor what is in it."""
    page.set_viewport_size({"width": width, "height": 900})
    scrolled, seen = page.evaluate(WIDTHS)
    assert scrolled <= seen == width
    assert page.evaluate(OUTSIDE) == []
