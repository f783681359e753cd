"""The HTML report in headless Chromium: it loads nothing, complains of nothing, and can be used without a mouse."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from svdq_cli.evaluation.page import render_page
from tests.evaluation.page_sample import HOSTILE, image_store_of, page_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with driver.sync_playwright() as playwright:
        found = CHROMIUM or (path if Path(path := playwright.chromium.executable_path).exists() else None)
        if found is None:
            pytest.skip("needs Chromium: playwright install chromium, or the system's package")
        # its sandbox wants privileges that containers lack; the page is our own
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a page's own, 100 %")
    path = folder / "report.html"
    path.write_text(render_page(page_of(image_store_of(folder, 3), HOSTILE, count=3)), encoding="utf-8")
    return path


def opened(browser: Any, path: Path, complaints: list[str], **context: Any) -> Any:
    """The page, with everything that it complains about or asks the network for."""
    tab = browser.new_context(**context).new_page()
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append("a script of a prompt ran"))
    tab.on("request", lambda request: asked(request.url, path, complaints))
    tab.goto(path.as_uri())
    return tab


def asked(url: str, path: Path, complaints: list[str]) -> None:
    if url != path.as_uri() and not url.startswith("data:"):
        complaints.append(f"asked for {url}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 900}, PHONE])
def test_the_page_opens_quietly_and_fits_its_window(
    browser: Any, page_file: Path, scheme: str, viewport: dict[str, int]
):
    complaints: list[str] = []
    tab = opened(browser, page_file, complaints, color_scheme=scheme, viewport=viewport)
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert tab.evaluate("[...document.images].every(picture => picture.complete && picture.naturalWidth > 0)")
    ink, paper = (
        tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    assert contrast(ink, paper) > 7  # WCAG 2.2, AAA
    soft = tab.evaluate("getComputedStyle(document.querySelector('.note')).color")
    assert contrast(soft, paper) > 4.5  # AA
    assert complaints == []


def test_the_divider_follows_the_arrow_keys(browser: Any, page_file: Path):
    complaints: list[str] = []
    tab = opened(browser, page_file, complaints)
    slider = tab.locator(".pair input[type=range]").first
    slider.focus()
    for _ in range(10):
        tab.keyboard.press("ArrowRight")
    assert tab.locator(".view").first.evaluate("view => view.style.getPropertyValue('--split')") == "60%"
    assert complaints == []


def test_the_divider_follows_a_finger(browser: Any, page_file: Path):
    tab = opened(browser, page_file, [], viewport=PHONE, has_touch=True)
    view = tab.locator(".view").first
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    tab.touchscreen.tap(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    split = view.evaluate("view => parseFloat(view.style.getPropertyValue('--split'))")
    assert 70 <= split <= 90


def test_the_choices_change_what_is_shown(browser: Any, page_file: Path):
    tab = opened(browser, page_file, [])

    def shown() -> list[tuple[str, str]]:
        script = "images => images.filter(i => !i.hidden).map(i => [i.dataset.way, i.dataset.kind])"
        return [
            tuple(pair) for pair in tab.locator("#one .pair:first-child [data-kind]").evaluate_all(script)
        ]

    assert shown() == [("converted", "images")]
    tab.locator("#one input[value=rtn]").check()
    assert shown() == [("rtn", "images")]
    tab.locator("#one input[value=differences]").check()
    assert shown() == [("rtn", "differences")]
    assert not tab.locator("#one .exact").first.is_visible()
    assert tab.locator("#two .exact").first.is_visible()  # the other chapter has choices of its own


def test_the_panes_say_what_they_are(browser: Any, page_file: Path):
    tab = opened(browser, page_file, [])
    labels = tab.locator("#one .pair").first.locator(".label")
    assert visible_texts(labels) == ["16-bit", "SVDQuant int4"]
    tab.locator("#one input[value=rtn]").check()
    assert visible_texts(labels) == ["16-bit", "naive 4-bit"]
    tab.locator("#one input[value=differences]").check()
    assert visible_texts(labels) == ["naive 4-bit"]


def test_an_image_is_shown_at_its_own_size_and_larger(browser: Any, page_file: Path):
    tab = opened(browser, page_file, [])
    image = tab.locator("#one .exact").first
    width = "image => image.getBoundingClientRect().width"
    fitted = image.evaluate(width)
    assert fitted > 100
    tab.locator("#one [data-choice=size][value='1']").check()
    assert image.evaluate(width) == 24
    tab.locator("#one [data-choice=size][value='3']").check()
    assert image.evaluate(width) == 72
    tab.locator("#one [data-choice=size][value=fit]").check()
    assert image.evaluate(width) == fitted


def test_the_links_lead_to_the_whole_images(browser: Any, page_file: Path):
    tab = opened(browser, page_file, [])
    links = tab.locator("#one .pair").first.locator("figcaption a")
    files = [Path(unquote(urlsplit(link).path)) for link in links.evaluate_all("all => all.map(a => a.href)")]
    assert [file.parent.name for file in files] == ["16bit", "converted", "rtn"]
    assert all(file.is_file() for file in files)


def test_a_white_image_has_an_edge_on_white_paper(browser: Any, page_file: Path):
    tab = opened(browser, page_file, [], color_scheme="light")
    edge, paper = (
        tab.evaluate(f"getComputedStyle(document.querySelector('{where}')).{name}")
        for where, name in ((".view", "borderTopColor"), ("body", "backgroundColor"))
    )
    assert contrast(edge, paper) > 1.3
    assert tab.evaluate("getComputedStyle(document.querySelector('.view')).borderTopWidth") == "1px"


def test_what_is_cut_off_on_a_phone_says_that_it_scrolls(browser: Any, page_file: Path):
    tab = opened(browser, page_file, [], viewport=PHONE)
    cut = "box => box.scrollWidth > box.clientWidth + 1"
    boxes = tab.locator(".wide")
    told = boxes.evaluate_all(f"all => all.map(box => [({cut})(box), box.classList.contains('scrolls')])")
    assert [True, True] in told
    assert all(is_cut == says for is_cut, says in told)
    tab.set_viewport_size({"width": 1600, "height": 900})
    assert not tab.locator(".wide.plot").first.evaluate("box => box.classList.contains('scrolls')")


def visible_texts(found: Any) -> list[str]:
    return [each.inner_text() for each in found.all() if each.is_visible()]


def contrast(first: str, second: str) -> float:
    """Of two CSS colors rgb(r, g, b), by WCAG 2.2's definition."""
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
