"""Chromium for tests of pages, where it is installed (Debian: chromium, chromium-driver); else they are skipped."""

import shutil
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs Chromium and its driver")

# What lies in .wide may be wider: it scrolls there. Text does not belong into it.
OVERFLOWING = """
const across = document.documentElement.clientWidth + 1;
return [...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  const scrolls = element.closest(".wide") !== null && !element.matches(".wide, p, caption, h1, h2, h3, li");
  const cut = element.matches("p, li, h1, h2, h3, figcaption, summary, label")
    && element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display !== "inline";
  return box.width > 0 && ((!scrolls && box.right > across) || cut);
}).map((element) => element.outerHTML.slice(0, 200));
"""
BROKEN_PICTURES = """
return [...document.images].filter((image) => !image.complete || image.naturalWidth === 0).map((image) => image.alt);
"""


def start_browser(profile: Path | None = None) -> Any:
    """A browser without a window that notes every request; with a profile, what that has stored is there again."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    for argument in arguments + ([] if profile is None else [f"--user-data-dir={profile}"]):
        options.add_argument(argument)
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


def open_page(browser: Any, page: Path, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    assert browser.execute_script("return window.innerWidth") == width


def complaints(browser: Any) -> list[str]:
    """The errors that the browser's console has."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
