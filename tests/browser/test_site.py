"""The documentation's site as a reader meets it: pages, links, search, light, dark, a phone."""

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

from tests.browser.reading import DESK, PHONE, assert_contrast, open_page

pytestmark = pytest.mark.browser

SITE = Path(__file__).resolve().parents[2] / "build" / "docs"
# pages of Sphinx itself
INDEXES = ("genindex.html", "py-modindex.html", "search.html", "index.html")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a line for every request."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the built site."""
    if not (SITE / "index.html").exists():
        missing = f"no {SITE}: make docs builds it"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    handler = functools.partial(_Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def pages() -> list[str]:
    every = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
    return [page for page in every if page not in INDEXES and not page.startswith("_")]


def test_every_page_can_be_read_on_a_phone_and_every_link_holds(browser: Any, site: str) -> None:
    ids: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    assert len(pages()) > 30
    for name in pages():
        page, complaints = open_page(browser, f"{site}/{name}", PHONE, "light")
        assert complaints == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], name
        assert page.locator("h1").count() == 1, name
        assert page.locator("article").inner_text().count(" ") > 20, f"{name}: hardly any text"
        ids[name] = set(page.evaluate("[...document.querySelectorAll('[id]')].map(n => n.id)"))
        links[name] = set(
            page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
        )
        page.close()
    inside = {link for each in links.values() for link in each if link.startswith(site)}
    assert len(inside) > 300
    assert not [link for link in sorted(inside) if not _leads_somewhere(link, site, ids)]


def _leads_somewhere(link: str, site: str, ids: dict[str, set[str]]) -> bool:
    address, anchor = urldefrag(link)
    name = unquote(address.removeprefix(site).lstrip("/"))
    if not (SITE / name).is_file():
        return False
    return not anchor or name not in ids or unquote(anchor) in ids[name]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["docs/index", "docs/configuration", "docs/methods/flexlora"])
def test_a_page_has_contrast_in_both_themes(
    browser: Any, site: str, name: str, scheme: str
) -> None:
    page, complaints = open_page(browser, f"{site}/{name}.html", DESK, scheme)
    assert_contrast(page, 40)
    assert complaints == []
    page.close()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("cohort", "docs/glossary.html"),
        ("learning_rate", "docs/configuration.html#confval-training.learning_rate"),
        ("raflora", "docs/methods/raflora.html"),
        ("load_run", "docs/api.html#fedllm.load_run"),
        ("preemption", "slurm/ADMIN.html"),
    ],
)
def test_the_search_finds(browser: Any, site: str, words: str, found: str) -> None:
    page, complaints = open_page(browser, f"{site}/search.html?q={words}", DESK, "light")
    page.wait_for_selector("#search-results p.search-summary:has-text('found')")
    targets = page.evaluate("[...document.querySelectorAll('ul.search a')].map(a => a.href)")
    assert any(target.removeprefix(f"{site}/").startswith(found) for target in targets), targets
    # Sphinx's search takes the dot of a name for a class: such a result comes without an excerpt
    assert not [each for each in complaints if not each.startswith("Anchored content block")]
    page.close()


def test_the_sites_folder_leads_to_its_first_page(browser: Any, site: str) -> None:
    page, _ = open_page(browser, f"{site}/", DESK, "light")
    page.wait_for_url(f"{site}/docs/index.html")
    page.close()
