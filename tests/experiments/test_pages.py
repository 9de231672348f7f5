"""The audit's page and the report in a browser, where Chromium is installed (Debian: chromium, chromium-driver)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ntdne_kernels.experiments.auditing import AuditOptions, Source, write_audit
from ntdne_kernels.experiments.report import write_report
from tests.experiments.browser import (
    BROKEN_PICTURES,
    OVERFLOWING,
    complaints,
    needs_browser,
    open_page,
    start_browser,
)
from tests.experiments.helpers import write_run

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = start_browser()
    yield driver
    driver.quit()


def audited(folder: Path, *, bad: bool = False) -> Path:
    """The page of an audit of pictures with long names, in three classes, one label of the first wrong."""
    source = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    features = source.standard_normal((60, 8)) if bad else np.eye(3, 8)[labels] + 0.1 * source.standard_normal((60, 8))
    labels[3] = 1
    names = np.array(["airport", "bare land", "a_very_long_name_of_a_class_without_any_space_in_it"])
    picture = Image.fromarray(source.integers(256, size=(32, 32, 3), dtype=np.uint8))
    paths = [f"a_folder_of_a_long_name/{'and_a_file_of_a_very_long_name_' * 3}{i}.png" for i in range(60)]
    found = Source("a_source_of_a_rather_long_name_for_a_heading", features, names[labels], paths, lambda _: picture)
    return write_audit(found, folder, AuditOptions())[1][0]


@pytest.fixture(scope="module")
def pages(report: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pages")
    write_run(folder / "one", "NTDNE")
    return {
        "audit": audited(folder / "audit"),
        "audit in doubt": audited(folder / "doubt", bad=True),
        "report": report[0] / "report.html",
        "report of one run": write_report(folder / "one", folder / "one" / "report")[0],
    }


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("name", ["audit", "audit in doubt", "report", "report of one run"])
def test_nothing_overflows_and_every_picture_loads(browser, pages, name, width):
    open_page(browser, pages[name], width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(OVERFLOWING) == []
    assert browser.execute_script("return document.images.length") > 2
    assert browser.execute_script(BROKEN_PICTURES) == []
    assert complaints(browser) == []


def seen(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector) if element.is_displayed()]


def test_the_filters_show_what_they_say(browser, pages):
    open_page(browser, pages["audit"], 1280)
    assert len(seen(browser, ".class h3")) == 3
    items = len(seen(browser, ".class .item"))
    name = browser.find_element("id", "named")
    name.send_keys("AIR")
    assert seen(browser, ".class h3") == ["airport"]
    name.clear()
    name.send_keys("no such class")
    assert seen(browser, ".class h3") == []
    name.clear()
    name.send_keys(" ")
    assert len(seen(browser, ".class h3")) == 3
    only = browser.find_element("id", "suspects-only")
    only.click()
    assert seen(browser, ".class h3") == ["bare land"]  # the label given to the wrong one
    assert len(seen(browser, ".class .item")) == 1
    only.click()
    assert len(seen(browser, ".class .item")) == items


def test_the_report_of_one_run_leads_with_its_picture(browser, pages):
    open_page(browser, pages["report of one run"], 1280)
    assert "report of 1 run" in browser.title
    assert seen(browser, "h1") == ["Learning with wrong labels: report of 1 run"]
    assert seen(browser, "h2")[0] == "Scores of right and wrong labels"
    picture, table = (browser.find_element("css selector", tag) for tag in ("img", "table"))
    assert picture.location["y"] < 900 < table.location["y"]
    assert "Missing" not in seen(browser, "h2")
    open_page(browser, pages["report"], 1280)
    assert seen(browser, "h1") == ["Learning with wrong labels: report of 10 runs"]
    assert "Missing" in seen(browser, "h2")


def test_the_page_in_doubt_says_so_above_everything(browser, pages):
    open_page(browser, pages["audit in doubt"], 420)
    assert seen(browser, "p")[0].startswith("How many labels are wrong cannot be said from these features:")
    assert browser.find_elements("id", "suspects-only") == []
