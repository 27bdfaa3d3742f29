"""Look at every page of the built site in a headless Chromium, as a phone and as a desk shows it.

python tests/support/site/run.py SITE SCREENSHOTS

A page must not scroll sideways, lack an image, or print an error; a search must find something.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, Response, sync_playwright

WIDTHS = {"phone": 400, "desk": 1400}
PICTURED = ("index.html", "guide/measured.html", "api/attention.html", "benchmarks.html")
NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
# Tables and code scroll by themselves; on a desk tables fit.
CUT_TABLES = (
    "[...document.querySelectorAll('.md-typeset__scrollwrap')]"
    ".filter(t => t.scrollWidth > t.clientWidth + 1).map(t => t.innerText.slice(0, 40))"
)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve without a line for each request."""

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve the folder on this machine alone: a search does not work from file://."""
    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def faults(page: Page, url: str, errors: list[str], width: int) -> list[str]:
    """Open a page and return what is wrong with it."""
    errors.clear()
    page.goto(url, wait_until="networkidle")
    found = [*errors, *(f"no image {source}" for source in page.evaluate(MISSING))]
    needed = page.evaluate("document.documentElement.scrollWidth")
    if needed > width:
        found.append(f"scrolls sideways: {needed} pixels on {width}")
    if width == WIDTHS["desk"]:
        found += [f"a table is cut: {table!r}" for table in page.evaluate(CUT_TABLES)]
    return found


def search_fault(page: Page, url: str) -> list[str]:
    """Search from the start page and return what is wrong."""
    page.goto(url, wait_until="networkidle")
    page.keyboard.press("/")  # opens the search
    page.keyboard.type("rope_attention_with_kvcache")
    first = page.locator(".md-search-result__link").first
    first.wait_for(state="attached", timeout=20_000)
    return [] if "api/attention" in first.get_attribute("href") else ["the search finds no API"]


def look(browser: Browser, site: Path, base: str, screenshots: Path) -> list[str]:
    """Return what is wrong with the site, a line each; leave a screenshot of four pages."""
    found = []
    for kind, width in WIDTHS.items():
        page = browser.new_page(viewport={"width": width, "height": 900})
        errors: list[str] = []

        def on_message(message: ConsoleMessage, errors: list[str] = errors) -> None:
            if message.type == "error":
                errors.append(message.text)

        def on_response(response: Response, errors: list[str] = errors) -> None:
            if response.status >= 400:
                errors.append(f"{response.status} {response.url}")

        page.on("console", on_message)
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.on("response", on_response)
        for path in sorted(site.rglob("*.html")):
            name = path.relative_to(site).as_posix()
            found += [f"{name}, {kind}: {x}" for x in faults(page, base + name, errors, width)]
            if name in PICTURED:
                picture = f"{path.stem}-{kind}.png"
                page.screenshot(path=screenshots / picture)
        found += [f"{kind}: {fault}" for fault in search_fault(page, base)]
        page.close()
    return found


def main(site: Path, screenshots: Path) -> int:
    screenshots.mkdir(parents=True, exist_ok=True)
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        print(f"site: needs one of {', '.join(NAMES)} on PATH: apt-get install chromium")
        return 2
    with served(site) as base, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        found = look(browser, site, base, screenshots)
    print("\n".join(found) or f"nothing wrong; screenshots in {screenshots}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
