"""The report page as a reader meets it: in a browser, from a file, light and dark, on a phone."""

from pathlib import Path
from typing import Any

import pytest

from tests.browser.reading import DESK, PHONE, assert_contrast, open_page
from tests.cli.commands import in_process
from tests.reporting.sweeps import sweep_of

pytestmark = pytest.mark.browser

WIDE = (1600, 900)

# per chart: title, size, number of marks and texts, texts outside, the smallest letters in pixels
CHARTS = """() => [...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const scale = box.width / svg.viewBox.baseVal.width;
  const texts = [...svg.querySelectorAll('text')];
  const marks = [...svg.querySelectorAll('path, use, rect')].filter(n => {
    const b = n.getBoundingClientRect(); return b.width + b.height > 0;
  });
  const outside = texts.filter(n => {
    const b = n.getBoundingClientRect();
    return b.left < box.left - 2 || b.right > box.right + 2;
  }).map(n => n.textContent);
  const letters = texts.map(n => scale * parseFloat(getComputedStyle(n).fontSize));
  return [svg.querySelector('title').textContent, box.width, box.height, marks.length,
          texts.length, outside, Math.min(...letters)];
})"""


@pytest.fixture(scope="module")
def page_file(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished run, in a folder of its own."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    done = in_process("report", finished, "--out", path)
    assert done.returncode == 0, done.stderr
    return path


def opened(browser: Any, path: Path, size: tuple[int, int], scheme: str) -> tuple[Any, list[str]]:
    """Open the page from its file; what the browser complains of comes with it."""
    return open_page(browser, path.as_uri(), size, scheme)


def assert_readable(page: Any, width: int, num_charts: int) -> None:
    """Check contrast, that nothing scrolls sideways, and that every chart is drawn in its place."""
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert_contrast(page, 100)
    charts = page.evaluate(CHARTS)
    assert len(charts) == num_charts
    for title, chart_width, height, marks, texts, outside, smallest in charts:
        assert min(chart_width, height) > 100, title
        assert marks > 5, title
        assert texts > 4, title
        assert not outside, f"{title}: {outside}"
        assert smallest >= 9.5, f"{title}: letters of {smallest} px"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK, WIDE], ids=["phone", "desk", "wide"])
def test_the_page_of_a_run_can_be_read(
    browser: Any, page_file: Path, size: tuple[int, int], scheme: str
) -> None:
    page, complaints = opened(browser, page_file, size, scheme)
    assert_readable(page, size[0], 19)
    assert complaints == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_an_unfinished_sweep_can_be_read(
    browser: Any, tmp_path: Path, scheme: str
) -> None:
    sweep_of(tmp_path, {"a": [1.0, 2.0], "a longer name of an arm": [3.0, 5.0], "c": [4.0, None]})
    assert in_process("report", tmp_path).returncode == 0
    page, complaints = opened(browser, tmp_path / "report.html", PHONE, scheme)
    assert page.locator("p.notice").inner_text().startswith("This sweep is not finished")
    assert_readable(page, PHONE[0], 5)
    assert complaints == []
    page.close()


def test_every_arm_of_a_large_sweep_is_named_in_its_charts(browser: Any, tmp_path: Path) -> None:
    names = ["keep", "flexlora", "factor mean smallest", "product mean smallest", "hetlora"]
    names += ["equal parameters", "raflora", "only the largest", "local only", "A-A"]
    sweep_of(tmp_path, {name: [1.0 + place, 2.0] for place, name in enumerate(names)})
    assert in_process("report", tmp_path).returncode == 0
    page, complaints = opened(browser, tmp_path / "report.html", PHONE, "light")
    assert_readable(page, PHONE[0], 5)
    for svg in page.locator("figure svg").all():
        words = " ".join(svg.locator("text").all_text_contents())
        assert [name for name in names if name not in words] == []
    assert complaints == []
    page.close()


def test_the_theme_follows_the_reader(browser: Any, page_file: Path) -> None:
    page, _ = opened(browser, page_file, DESK, "light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) != light
    # paper is white, whatever the reader's theme
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(paper) == light
    page.close()


def test_links_and_tables_work_by_keyboard(browser: Any, page_file: Path) -> None:
    page, _ = opened(browser, page_file, DESK, "light")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    with page.expect_download() as download:
        page.evaluate("document.querySelector('a.csv').click()")
    assert download.value.suggested_filename == "scores.csv"
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => h.localName)")
    assert headings[0] == "h1"
    assert set(headings[1:]) == {"h2"}
    assert page.evaluate("document.documentElement.lang") == "en"
    page.close()
