"""The review in a browser: keys, decisions that stay, files of several people, and what a page must not do."""

import csv
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ntdne_kernels.audit import LabelAudit, audit_bank, feature_bank
from ntdne_kernels.experiments.auditing import Source
from ntdne_kernels.experiments.reviewing import read_decisions, review
from ntdne_kernels.labels import encode_labels
from tests.experiments.browser import (
    BROKEN_PICTURES,
    OVERFLOWING,
    complaints,
    needs_browser,
    open_page,
    start_browser,
)

webdriver = pytest.importorskip("selenium.webdriver")
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys
pytestmark = needs_browser

CLASSES = ['<b onclick="x">a, "b"</b>', "line\nbreak", "עברית 🌲", "=1+1"]  # names may be anything
COLUMNS = ["image", "given", "verdict", "decided", "when", "archive"]
COPIES = (0, 1, 2)  # images with the same features; the last one's label is another
UNLABELLED = (58, 59)
DECIDED = {"k": "keep", "a": "relabel", "t": "unsure", "x": "exclude"}


@dataclass
class Made:
    """A review of 60 images in a folder, and what it is of."""

    page: Path
    paths: list[str]
    labels: list[str | None]
    index: dict[str, Any]

    def said(self, place: int, verdict: str, decided: str = "") -> list[str]:
        """The row of decisions.csv but for its time."""
        row = self.index["rows"][place]
        return [self.paths[row], self.labels[row] or "", verdict, decided, self.index["archive"]]

    def suggested(self, place: int) -> str:
        return self.index["classes"][self.index["suggested"][place]]

    def given(self, place: int) -> str:
        return self.labels[self.index["rows"][place]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    source = np.random.default_rng(0)
    codes = np.repeat(np.arange(4), 15)
    features = np.eye(4, 12)[codes] + 0.15 * source.standard_normal((60, 12))
    labels: list[str | None] = [CLASSES[code] for code in codes]
    for image in (3, 4, 5, 6, 20, 40):
        labels[image] = CLASSES[(codes[image] + 1) % 4]
    features[list(COPIES)] = features[0]
    labels[COPIES[-1]] = CLASSES[1]
    for image in UNLABELLED:
        labels[image] = None
    paths = [f'a "folder", of <i>names</i>/{i}.png' for i in range(60)]
    picture = Image.fromarray(source.integers(256, size=(64, 64, 3), dtype=np.uint8))
    found = Source("<b>made</b>", features, labels, paths, lambda _: picture.copy())
    folder = tmp_path_factory.mktemp("review")
    codes, classes = encode_labels(labels)
    bank = feature_bank(features, codes)
    audit = audit_bank(bank, sigma=0.1, classes=classes)
    page = review.write_review(audit, bank, found, folder, method="rate", count=None, neighbours=5)
    return Made(page, paths, labels, data_of(folder / "review" / "data" / "index.js"))


def data_of(file: Path) -> dict[str, Any]:
    return json.loads(re.fullmatch(r'receive\("[\w-]+",(.*)\);\n', file.read_text(), re.DOTALL)[1])


@pytest.fixture(scope="module")
def only_browser() -> Iterator[Any]:
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture
def browser(only_browser: Any, made: Made, tmp_path: Path) -> Any:
    """The review, opened with an empty storage; what is saved lies in `tmp_path`."""
    only_browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    open_review(only_browser, made.page)
    only_browser.execute_script("localStorage.clear()")
    refresh(only_browser)
    complaints(only_browser)  # those of the test before
    return only_browser


def open_review(browser: Any, page: Path, width: int = 1280) -> None:
    open_page(browser, page, width)
    wait_until_started(browser)


def refresh(browser: Any) -> None:
    browser.refresh()
    wait_until_started(browser)


def wait_until_started(browser: Any) -> None:
    """A browser says that a page is loaded before the page has read its own files and listens to keys."""
    wait_for(lambda: text_of(browser, "#progress"))


def press(browser: Any, *keys: str) -> None:
    """Press keys as a keyboard does: whatever has the focus gets them."""
    ActionChains(browser).send_keys(*keys).perform()


def open_finder(browser: Any) -> None:
    press(browser, "c")
    wait_for(lambda: browser.find_element("id", "finder").is_displayed())


def go(browser: Any, place: int) -> None:
    browser.execute_script("go(arguments[0])", place)


def wait_for(condition: Callable[[], Any]) -> Any:
    until = time.monotonic() + 60  # a busy machine takes seconds for what an idle one does in 20 ms
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)
    return found


def text_of(browser: Any, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def shown_name(browser: Any) -> str:
    return text_of(browser, "#one .path")


def saved(browser: Any, folder: Path) -> Path:
    file = folder / "decisions.csv"
    file.unlink(missing_ok=True)
    press(browser, "s")
    wait_for(lambda: file.exists() and file.stat().st_size)
    return file


def rows_of(file: Path) -> list[list[str]]:
    """The rows of decisions.csv but for their times, which are checked."""
    with file.open(encoding="utf-8", newline="") as lines:
        header, *rows = csv.reader(lines, strict=True)
    assert header == COLUMNS
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row[4]) for row in rows)
    return sorted([*row[:4], row[5]] for row in rows)


def write_decisions(file: Path, rows: list[list[str]], when: str = "2026-01-31T12:34:56.789Z") -> Path:
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([COLUMNS, *([*row[:4], when, row[4]] for row in rows)])
    return file


def read_in(browser: Any, *files: Path) -> str:
    """Read files of decisions; gives what the page says of them."""
    browser.execute_script("document.getElementById('notice').hidden = true")
    browser.find_element("id", "files").send_keys("\n".join(map(str, files)))
    wait_for(lambda: browser.find_element("id", "notice").is_displayed())
    return text_of(browser, "#notice p")


# Decisions


def test_thirty_decisions_by_keyboard_are_saved_as_decided(made, tmp_path):
    browser = start_browser(tmp_path / "profile")
    open_review(browser, made.page)
    expected = []
    for place in range(30):
        assert wait_for(lambda row=made.index["rows"][place]: shown_name(browser) == made.paths[row])
        key = "kactx"[place % 5]
        if key == "c":
            open_finder(browser)
            wanted = ['new, "class"', "בע", "1+", "BREAK", "<b"][place // 5 % 5]
            press(browser, wanted, Keys.ENTER)
            decided = next((name for name in CLASSES if wanted.lower() in name.lower()), wanted)
        else:
            press(browser, key)
            decided = {"k": made.given(place), "a": made.suggested(place)}.get(key, "")
        verdict = DECIDED.get(key, "relabel")
        if verdict == "relabel" and decided == made.given(place):
            verdict = "keep"
        expected.append(made.said(place, verdict, decided))
    press(browser, "u", "u", "u")
    assert text_of(browser, "#progress") == f"27 of {len(made.index['rows'])} decided"
    assert wait_for(lambda: shown_name(browser) == made.paths[made.index["rows"][27]])
    browser.quit()  # the tab is closed

    browser = start_browser(tmp_path / "profile")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    open_review(browser, made.page)
    assert text_of(browser, "#progress") == f"27 of {len(made.index['rows'])} decided"
    assert wait_for(lambda: shown_name(browser) == made.paths[made.index["rows"][27]])
    press(browser, "u")
    file = saved(browser, tmp_path)
    browser.quit()
    assert rows_of(file) == sorted(expected[:26])
    decisions = read_decisions(file, made.paths, made.labels)
    assert len(decisions) == 26
    assert sum(decisions.counts().values()) == 26
    assert decisions.counts()["exclude"] == 5


def test_a_key_right_after_the_choice_of_a_class_counts(browser, made):
    open_finder(browser)
    browser.execute_script(
        "finder.take({name: review.classes[0]});"
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 't', bubbles: true}))"
    )
    assert text_of(browser, "#progress").startswith("2 of")


def test_undo_takes_back_step_by_step_and_leaves_no_row(browser, made, tmp_path):
    press(browser, "k", "x", "t", Keys.ARROW_LEFT, "x")
    assert rows_of(saved(browser, tmp_path)) == sorted(
        [made.said(0, "keep", made.given(0)), made.said(1, "exclude"), made.said(2, "exclude")]
    )
    press(browser, "u")
    assert made.said(2, "unsure") in rows_of(saved(browser, tmp_path))
    browser.switch_to.active_element.send_keys(Keys.CONTROL, "z")
    press(browser, "u")
    assert rows_of(saved(browser, tmp_path)) == [made.said(0, "keep", made.given(0))]
    press(browser, "u", "u")
    assert text_of(browser, "#status") == "There is nothing to undo."
    assert browser.execute_script("return Object.keys(localStorage).length") == 0


def test_a_group_is_decided_at_once_and_undone_as_one(browser, made, tmp_path):
    pairs = list(zip(made.index["given"], made.index["suggested"], strict=True))
    place = next(place for place, pair in enumerate(pairs) if pairs.count(pair) > 2 and pair[0] != pair[1])
    group = [each for each, pair in enumerate(pairs) if pair == pairs[place]]
    go(browser, group[1])
    press(browser, "t")
    go(browser, place)
    press(browser, "2")
    assert f"→ all {len(group) - 1}: " in text_of(browser, "#accept")
    assert wait_for(lambda: len(browser.find_elements("css selector", ".strip img")) == len(group) - 1)
    press(browser, "a")
    expected = [made.said(each, "relabel", made.suggested(each)) for each in group]
    expected[1] = made.said(group[1], "unsure")  # it was decided before
    assert rows_of(saved(browser, tmp_path)) == sorted(expected)
    press(browser, "u")
    assert rows_of(saved(browser, tmp_path)) == [made.said(group[1], "unsure")]


def test_copies_get_the_class_that_is_kept(browser, made, tmp_path):
    places = [made.index["rows"].index(image) for image in COPIES]
    assert sorted(places) in made.index["copies"]
    go(browser, places[0])
    press(browser, "3", "k")
    expected = [made.said(place, "keep", CLASSES[0]) for place in places[:2]]
    expected.append(made.said(places[2], "relabel", CLASSES[0]))
    assert rows_of(saved(browser, tmp_path)) == sorted(expected)


def test_an_unlabelled_image_has_nothing_to_keep_but_a_suggestion(browser, made, tmp_path):
    place = made.index["rows"].index(UNLABELLED[0])
    assert place >= len(made.index["rows"]) - 2
    go(browser, place)
    press(browser, "k")
    assert "no label to keep" in text_of(browser, "#status")
    press(browser, "a")
    assert rows_of(saved(browser, tmp_path)) == [made.said(place, "relabel", CLASSES[3])]


def test_the_yield_says_when_to_stop(browser, made):
    rate = "[review.noise_rate, review.judged] = [0.2, 250]; show()"  # 50 wrong labels are expected
    assert text_of(browser, "#yield") == ""
    press(browser, "x" * 10)
    assert text_of(browser, "#yield") == "10 of the 10 labels decided on were wrong."
    press(browser, "k" * 40)
    assert text_of(browser, "#yield") == "10 of the last 50 labels were wrong. Go on."
    browser.execute_script(rate)
    random = "of 50 picked at random about 10 would be"  # 50·(50 − 10)/(250 − 50)
    assert text_of(browser, "#yield") == f"10 of the last 50 labels were wrong; {random}: a good place to stop."
    press(browser, "u", "x")
    assert text_of(browser, "#yield") == f"11 of the last 50 labels were wrong; {random}. Go on."
    press(browser, "u", "k")
    refresh(browser)
    press(browser, "k" * 7)
    assert text_of(browser, "#yield") == "3 of the last 50 labels were wrong. Go on."
    press(browser, "t")
    assert text_of(browser, "#yield") == "2 of the last 50 labels were wrong, 1 in 25 or fewer: a good place to stop."


# Several people


def test_files_of_people_are_merged_and_conflicts_stay_open(browser, made, tmp_path):
    agreed = made.said(0, "keep", made.given(0))
    alice = [agreed, made.said(1, "exclude"), made.said(2, "relabel", "new"), made.said(3, "unsure")]
    bob = [agreed, made.said(1, "unsure"), made.said(2, "relabel", CLASSES[3]), made.said(4, "exclude")]
    files = [write_decisions(tmp_path / f"{name}.csv", rows) for name, rows in (("alice", alice), ("bob", bob))]
    said = read_in(browser, *files)
    assert "3 new decisions, 0 that were here already, 2 conflicts" in said
    assert rows_of(saved(browser, tmp_path)) == sorted([agreed, alice[3], bob[3]])

    refresh(browser)
    state = browser.find_element("id", "state")
    browser.execute_script(
        "arguments[0].value = 'conflict'; arguments[0].dispatchEvent(new Event('change', {bubbles: true}))", state
    )
    assert wait_for(lambda: shown_name(browser) == alice[1][0])
    assert "bob.csv: ? cannot tell" in text_of(browser, ".said")
    press(browser, "x")
    assert wait_for(lambda: shown_name(browser) == alice[2][0])
    press(browser, "x")
    assert browser.find_element("id", "end").is_displayed()
    expected = sorted([agreed, alice[1], made.said(2, "exclude"), alice[3], bob[3]])
    assert rows_of(saved(browser, tmp_path)) == expected
    press(browser, "u", "u")
    assert rows_of(saved(browser, tmp_path)) == sorted([agreed, alice[3], bob[3]])


def test_undo_of_a_page_opened_anew_leaves_what_others_decided(browser, made, tmp_path):
    press(browser, "x")
    others = [made.said(5, "exclude"), made.said(6, "unsure")]
    file = write_decisions(tmp_path / "others.csv", others, when="2999-01-31T12:34:56.789Z")
    assert "2 new decisions" in read_in(browser, file)
    press(browser, "u")
    assert text_of(browser, "#status") == "Undone: what was read from files, 2 images"
    assert rows_of(saved(browser, tmp_path)) == [made.said(0, "exclude")]
    assert "2 new decisions" in read_in(browser, file)
    browser.execute_script("byId('state').value = 'all'; select()")
    for place, key in ((1, "t"), (6, "x")):
        go(browser, place)
        press(browser, key)
    refresh(browser)
    press(browser, "u")
    assert rows_of(saved(browser, tmp_path)) == sorted([others[0], made.said(0, "exclude"), made.said(1, "unsure")])
    press(browser, "u", "u")
    assert rows_of(saved(browser, tmp_path)) == [others[0]]
    assert not browser.find_element("id", "undo").is_enabled()
    press(browser, "u")
    assert text_of(browser, "#status") == "There is nothing to undo."
    refresh(browser)
    assert rows_of(saved(browser, tmp_path)) == [others[0]]


def test_of_two_rows_of_one_file_the_later_counts(browser, made, tmp_path):
    file = tmp_path / "twice.csv"
    times = ("2026-01-31T12:34:56.790Z", "2026-01-31T12:34:56.789Z")
    parts = []
    for when, row in zip(times, (made.said(0, "exclude"), made.said(0, "unsure")), strict=True):
        parts.append(write_decisions(file, [row], when).read_text(encoding="utf-8"))
    file.write_text(parts[0] + parts[1].partition("\r\n")[2], encoding="utf-8", newline="")
    assert "1 new decisions" in read_in(browser, file)
    assert rows_of(saved(browser, tmp_path)) == [made.said(0, "exclude")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: [*row[:4], "0123456789abcdef"], "line 2: of another archive: 0123456789abcdef"),
        (lambda row: ["no such.png", *row[1:4], ""], "line 2: of another archive: there is no image no such.png"),
        (lambda row: [row[0], "oak", "exclude", "", ""], "and not “oak”"),
        (lambda row: [*row[:2], "delete", "", row[4]], "verdict: expected keep, relabel, unsure or exclude"),
        (lambda row: [*row[:2], "keep", "oak", row[4]], "decided: expected the given label"),
    ],
)
def test_a_wrong_file_is_refused_and_nothing_is_read(browser, made, tmp_path, change, said):
    good = write_decisions(tmp_path / "good.csv", [made.said(1, "exclude")])
    bad = write_decisions(tmp_path / "bad.csv", [change(made.said(0, "keep", made.given(0)))])
    found = read_in(browser, good, bad)
    assert found.startswith("Nothing was read: bad.csv: ")
    assert said in found
    assert browser.execute_script("return Object.keys(localStorage).length") == 0


def test_what_is_no_file_of_decisions_is_refused(browser, tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert "expected columns image,given" in read_in(browser, tmp_path / "other.csv")
    (tmp_path / "other.csv").write_text('a,"b\n1,2\n')
    assert "line 1: a quote is out of place" in read_in(browser, tmp_path / "other.csv")


# Where decisions are kept


def test_two_tabs_do_not_overwrite_each_other(browser, made, tmp_path):
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    open_review(browser, made.page)
    press(browser, Keys.ARROW_RIGHT, "t")
    second = browser.current_window_handle
    browser.switch_to.window(first)
    wait_for(lambda: text_of(browser, "#progress").startswith("1 of"))
    press(browser, "x")
    browser.switch_to.window(second)
    wait_for(lambda: text_of(browser, "#progress").startswith("2 of"))
    press(browser, "u")
    browser.close()
    browser.switch_to.window(first)
    wait_for(lambda: text_of(browser, "#progress").startswith("1 of"))
    assert rows_of(saved(browser, tmp_path)) == [made.said(0, "exclude")]


LEAVING = """
const leaving = new Event("beforeunload", {cancelable: true});
dispatchEvent(leaving);
return leaving.defaultPrevented;
"""


def test_a_full_storage_is_said_and_nothing_is_lost(browser, made, tmp_path):
    browser.execute_script(
        "let text = 'x'.repeat(1 << 20);"
        "while (text) try { localStorage.setItem('other' + localStorage.length, text); }"
        "catch { text = text.slice(text.length >> 1 || 1); }"
    )
    press(browser, "x", "t")
    assert "storage is full, and 2 decisions are in this tab alone" in text_of(browser, "#storage")
    assert browser.find_element("id", "storage").is_displayed()
    assert browser.execute_script(LEAVING)
    assert rows_of(saved(browser, tmp_path)) == sorted([made.said(0, "exclude"), made.said(1, "unsure")])
    assert not browser.execute_script(LEAVING)


def test_a_blocked_storage_is_said_and_leaving_is_warned_of(browser, made, tmp_path):
    blocked = (
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": blocked})
    try:
        refresh(browser)
        assert "keeps nothing for this page" in text_of(browser, "#storage")
        assert not browser.execute_script(LEAVING)
        press(browser, "x")
        assert "1 decision is in this tab alone" in text_of(browser, "#storage")
        assert browser.execute_script(LEAVING)
        assert rows_of(saved(browser, tmp_path)) == [made.said(0, "exclude")]
        assert not browser.execute_script(LEAVING)
    finally:  # the next test has the same browser
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


# The page


def test_names_are_text_and_no_request_leaves_the_page(browser, made):
    press(browser, "g")
    wait_for(lambda: len(browser.find_elements("css selector", ".cell img")) >= 30)
    press(browser, "g")
    open_finder(browser)
    press(browser, "b")
    options = [each.get_property("textContent") for each in browser.find_elements("css selector", "#found li")]
    assert options == [CLASSES[0], CLASSES[1], "new class: b"]
    press(browser, Keys.ESCAPE)
    assert (
        browser.execute_script(
            "return document.querySelectorAll('main b, main i, header b, footer b, [onclick]').length"
        )
        == 0
    )
    assert text_of(browser, "h1") == "Review of <b>made</b>"
    assert browser.execute_script(BROKEN_PICTURES) == []
    assert complaints(browser) == []
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in entries if each["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 30
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}


@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_the_screen(browser, made, width):
    open_review(browser, made.page, width)
    for keys in ("2", "g", "?", [Keys.ESCAPE], [Keys.ESCAPE, "g", Keys.ARROW_RIGHT * 60]):
        press(browser, *keys)
        if keys == [Keys.ESCAPE]:
            open_finder(browser)
        wait_for(lambda: browser.execute_script("return document.readyState") == "complete")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OVERFLOWING) == []
    assert browser.find_element("id", "end").is_displayed()


def test_everything_that_is_used_has_a_name_and_a_visible_focus(browser, made):
    press(browser, "2")
    unnamed = """return [...document.querySelectorAll("button, select, input, dialog, section, img")].filter((each) =>
      !(each.textContent.trim() || each.getAttribute("aria-label") || each.labels?.length || each.alt
        || each.hasAttribute("aria-labelledby"))).map((each) => each.outerHTML)"""
    assert browser.execute_script(unnamed) == []
    press(browser, Keys.TAB)
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_filters_choose_by_class_confusion_and_state(browser, made):
    def choose(name: str, value: str) -> int:
        browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change', {bubbles: true}))",
            browser.find_element("id", name),
            value,
        )
        return browser.execute_script("return view.places.length")

    given, suggested = made.index["given"], made.index["suggested"]
    assert choose("given", "2") == given.count(2)
    pair = (given[0], suggested[0])
    assert choose("given", "any") == len(given)
    assert choose("confusion", f"{pair[0]} {pair[1]}") == list(zip(given, suggested, strict=True)).count(pair)
    choose("confusion", "any")
    press(browser, "x", "t")
    assert choose("state", "exclude") == 1
    assert choose("state", "undecided") == len(given) - 2
    assert choose("state", "all") == len(given)
    assert choose("state", "relabel") == 0
    assert browser.find_element("id", "end").is_displayed()


def test_a_hundred_thousand_images_keep_the_page_small(only_browser, tmp_path, monkeypatch):
    N, C, made = 100_000, 30, torch.Generator().manual_seed(0)
    labels, top = torch.randint(C, (N,), generator=made), torch.randint(C, (N, 2), generator=made)
    shares = torch.rand(N, 2, generator=made, dtype=torch.float64)
    log = -torch.rand(N, generator=made)
    none, nobody = torch.full((N,), -1), torch.zeros(N, dtype=torch.bool)
    audit = LabelAudit(
        classes=tuple(f"class {c}" for c in range(C)),
        labels=labels,
        decided=labels,
        checked=nobody,
        unsure=nobody,
        sigma=0.1,
        ridge=False,
        log_score=log,
        log_ratio=log,
        top_classes=top,
        top_shares=shares,
        log_density=log,
        duplicate_of=none,
        copy_group=none,
        sample=none[:0],
        neighbour_labels=top[:0],
    )
    found = torch.randint(N, (N, 5), generator=made), torch.rand(N, 5, generator=made)
    monkeypatch.setattr(review, "nearest_neighbours", lambda *rest: found)
    source = Source("many", None, labels, [f"folder/image-{row}.png" for row in range(N)], None)
    page = review.write_review(audit, None, source, tmp_path, method=None, count=N, neighbours=5)
    open_review(only_browser, page)
    only_browser.execute_script("localStorage.clear()")
    assert text_of(only_browser, "#progress") == "0 of 100,000 decided"
    wait_for(lambda: shown_name(only_browser).startswith("folder/image-"))
    assert only_browser.execute_script("return Object.keys(received).length") <= 15  # files of data/
    press(only_browser, "g")
    only_browser.execute_script("window.scrollTo(0, document.documentElement.scrollHeight / 2)")
    middle = (
        "return Math.min(...[...document.querySelectorAll('.cell')].slice(1).map((cell) => Number(cell.dataset.at)))"
    )
    wait_for(lambda: 40_000 < only_browser.execute_script(middle) < 60_000)
    wait_for(lambda: "folder/image-" in text_of(only_browser, ".cell:last-child"))
    assert only_browser.execute_script("return document.querySelectorAll('*').length") < 2500
    assert only_browser.execute_script("return document.querySelectorAll('.cell').length") < 200
