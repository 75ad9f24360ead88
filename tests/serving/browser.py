"""A real browser for tests of the app: Chromium, driven by playwright."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
MISSING = "no browser: pip install playwright && apt-get install chromium (or set CHROMIUM to its path)"


@contextlib.contextmanager
def chromium() -> Iterator:
    """A running Chromium. Skips the test where playwright or the browser is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason=MISSING)
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(MISSING)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def keep_screenshot(page, name: str) -> None:
    """Keep a screenshot of the whole page under build/screenshots."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
