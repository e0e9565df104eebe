"""The report as a browser shows it: opened from the disk, nothing fetched, no fault, curves hidden and classes found.

pytest tests/vitdist/test_browser.py        # needs chromium, such as Debian's: apt-get install chromium
"""

import shutil
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.vitdist.test_report import make_run
from vitdist import rundir, scores
from vitdist.report import page as report

KINDS = ["tench", "Übergang", "<b>ray</b>", "a_long_name_without_a_place_to_break_it_" * 2]
CLASSES = [f"{i:03d} {KINDS[i % len(KINDS)]}" for i in range(100)]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
DRAWN = "[...document.querySelectorAll('.chart')].every((chart) => chart.querySelector('svg'))"

expect.set_options(timeout=30_000)  # of a machine that does much else
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is on PATH: apt-get install chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run with 100 classes, some of which are never mistaken."""
    run = make_run(tmp_path_factory.mktemp("browser"), CLASSES)
    labels = np.arange(1000) % len(CLASSES)
    predicted = np.where(np.arange(1000) // 100 >= labels % 9, labels, (labels + 1) % len(CLASSES))
    confusion = scores.confusion(labels, predicted, len(CLASSES))
    columns = zip(
        CLASSES, confusion.sum(1).tolist(), *(c.tolist() for c in scores.class_scores(confusion)), strict=True
    )
    names = ("name", "support", "precision", "recall", "f1")
    about = {
        "per_class": [
            dict(zip(names, column, strict=True)) | {"recall_interval": [0.123, 0.987]} for column in columns
        ],
        "metrics": {"top1": 0.9166, "auroc": 0.987, "loss": 0.5, "samples": 1000},
        "intervals": {"top1": [0.895, 0.934], "auroc": [0.981, 0.992]},
        "confusion": confusion.tolist(),
        "calibration": scores.calibration(np.linspace(0.1, 1, 1000), labels == predicted).bins(),
    }
    rundir.publish_json(run.evaluation, (rundir.read_json(run.evaluation) or {}) | about)
    return report.write(run).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox wants a user other than root.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def opened(browser: Browser, address: str) -> Iterator[tuple[Page, list[str], list[str]]]:
    """The page, what it asked for, and what the browser complained of."""
    page, asked, faults = browser.new_page(), list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    page.wait_for_function(DRAWN)
    yield page, asked, faults
    page.close()


def test_it_opens_from_the_disk_without_a_fault_and_asks_nobody(
    opened: tuple[Page, list[str], list[str]], address: str
) -> None:
    page, asked, faults = opened
    assert [url for url in asked if not url.startswith("data:image/")] == [address]
    assert faults == []
    pictures = page.locator("img").evaluate_all("(all) => all.map((one) => [one.alt, one.naturalWidth])")
    assert len(pictures) > 12
    assert all(alt and width for alt, width in pictures)
    charts = page.locator(".chart").evaluate_all("(all) => all.map((one) => [one.role, one.ariaLabel])")
    assert all(role == "graphics-document" and name for role, name in charts)


def test_a_curve_is_hidden_and_shown_with_the_keyboard(opened: tuple[Page, list[str], list[str]]) -> None:
    page, _, faults = opened
    figure = page.locator("figure", has=page.get_by_role("heading", name="Loss", exact=True))
    button = figure.get_by_role("button", name="validation")
    curves = figure.locator(".mark-line path")
    expect(curves).to_have_count(2)
    for pressed, count in (("false", 1), ("true", 2)):
        button.press("Enter")
        expect(button).to_have_attribute("aria-pressed", pressed)
        expect(curves).to_have_count(count)
    for name in ("training", "validation"):
        figure.get_by_role("button", name=name).click()
    expect(curves).to_have_count(0)
    figure.get_by_role("button", name="training").click()
    expect(curves).to_have_count(1)
    assert faults == []


def test_classes_are_found_and_sorted(opened: tuple[Page, list[str], list[str]]) -> None:
    page, _, faults = opened
    place = page.locator(".find")
    rows, said, field = (
        place.locator("tbody tr:visible"),
        place.get_by_role("status"),
        page.get_by_label("Find a class"),
    )
    expect(rows).to_have_count(16)
    field.fill("üBER")
    expect(said).to_have_text("25 of 100 classes")
    expect(rows).to_have_count(25)
    field.fill("nothing of that name")
    expect(said).to_have_text("0 of 100 classes")
    expect(rows).to_have_count(0)
    field.fill("")
    expect(said).to_have_text("")
    expect(rows).to_have_count(16)
    first = place.locator("table").first
    for order, name in (("ascending", "000 tench"), ("descending", "099 a_long")):
        first.get_by_role("button", name="class").press("Space")
        expect(first.locator("th").first).to_have_attribute("aria-sort", order)
        expect(rows.first).to_contain_text(name)
    first.get_by_role("button", name="recall").click()
    recalls = place.locator("tbody tr td:nth-child(4)").evaluate_all(
        "(all) => all.map((one) => parseFloat(one.textContent))"
    )
    assert len(set(recalls)) > 2
    assert recalls[:16] == sorted(recalls)[:16]
    assert faults == []


@pytest.mark.parametrize(("width", "media"), [(320, "screen"), (390, "screen"), (1280, "screen"), (718, "print")])
def test_nothing_is_wider_than_the_page(
    opened: tuple[Page, list[str], list[str]], width: int, media: Literal["screen", "print"]
) -> None:
    """On a small phone, a phone, a screen, and on A4 with margins of 10 mm."""
    page, _, faults = opened
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for scheme in SCHEMES:
        page.emulate_media(media=media, color_scheme=scheme)
        sizes = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert sizes[0] <= sizes[1], scheme
    page.emulate_media(media="screen", color_scheme="light")
    assert faults == []


def test_without_scripts_all_but_the_charts_is_there(browser: Browser, address: str) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(address)
    expect(page.locator(".find tbody tr:visible")).to_have_count(16)
    for left_out in (page.get_by_label("Find a class"), page.locator(".legend").first):
        expect(left_out).to_be_hidden()
    page.close()
