"""Checks the built site in headless Chromium, at two widths and in both color schemes.

    python tools/check_site.py [--pages PATTERN] [--screenshots FOLDER] [SITE]

Needs `pip install playwright` and a Chromium: the one that `playwright install chromium` puts in
place, or a `chromium` on the path. Nothing outside the site is loaded, so that every page must work
without a network. Finds, on every page:

- requests that fail or leave the site, and errors in the console;
- a page wider than the window, and code or tables that are cut at 1400 pixels;
- pictures without alternative text, and pictures that do not load;
- mathematics that is not rendered.

It also types the words of `SEARCHES` into the site's search and requires a page among the results.
"""

import argparse
import contextlib
import fnmatch
import functools
import http.server
import importlib
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

SITE = pathlib.Path(__file__).parent.parent / "docs" / "_build" / "html"
WIDTHS = (1400, 420)
SCHEMES = ("light", "dark")
SEARCHES = {"PTQ": "guides/", "install": "install.html", "int4": "", "save": "guides/"}

_MEASURE = """() => {
  const faults = [];
  const name = e => (e.textContent || e.alt || e.src || '').trim().slice(0, 60)
    .replace(/\\s+/g, ' ');
  const wide = document.documentElement.scrollWidth;
  if (wide > window.innerWidth) {
    faults.push(`the page is ${wide} pixels wide`);
    for (const e of document.querySelectorAll('article *'))
      if (e.getBoundingClientRect().right > window.innerWidth + 1) {
        faults.push(`  because of <${e.localName}> ${name(e)}`);
        break;
      }
  }
  const visible = e => e.offsetParent !== null;
  if (window.innerWidth > 1000)
    for (const e of document.querySelectorAll('article pre, article .table-wrapper, .cell_output'))
      if (visible(e) && e.scrollWidth > e.clientWidth + 1)
        faults.push(`<${e.localName}> is cut by ${e.scrollWidth - e.clientWidth}: ${name(e)}`);
  for (const e of document.querySelectorAll('img')) {
    if (!e.alt.trim() || /\\.(png|svg)$/.test(e.alt))
      faults.push(`a picture has no alternative text: ${e.getAttribute('src')}`);
    if (visible(e) && e.complete && !e.naturalWidth)
      faults.push(`a picture does not load: ${e.getAttribute('src')}`);
  }
  for (const e of document.querySelectorAll('.math'))
    if (!e.querySelector('math') || e.querySelector('merror'))
      faults.push(`mathematics is not rendered: ${name(e)}`);
  return faults;
}"""


class Finding(NamedTuple):
    """A fault of a page; `where` is the width and the color scheme, or ""."""

    page: str
    where: str
    fault: str


@contextlib.contextmanager
def served(site: pathlib.Path) -> Iterator[str]:
    """Serves a folder on a free port of this machine, and yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            # A tab that closes early breaks its connections; failed requests are findings anyway.
            del request, client_address

    handler = functools.partial(Quiet, directory=str(site))
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def pages_of(site: pathlib.Path, pattern: str) -> list[str]:
    """Returns the pages of a site whose names match a pattern, without listings of source code."""
    names = (path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")))
    return [
        name
        for name in names
        if not name.startswith(("_modules/", "_static/")) and fnmatch.fnmatch(name, pattern)
    ]


def listen(tab: Any, address: str, faults: list[str]) -> None:
    """Records failed requests and errors of the console; blocks requests that leave the site."""

    def route(route: Any) -> None:
        url = route.request.url
        if url.startswith((address, "data:")):
            route.continue_()
        else:
            faults.append(f"requests {url}")
            route.abort()

    def respond(response: Any) -> None:
        if response.status >= 400:
            faults.append(f"{response.url} returns {response.status}")

    def log(message: Any) -> None:
        if message.type == "error":
            faults.append(f"the console shows: {message.text}")

    tab.route("**/*", route)
    tab.on("response", respond)
    tab.on("console", log)
    tab.on("pageerror", lambda error: faults.append(f"a script fails: {error}"))


def check(
    browser: Any, address: str, pages: Sequence[str], shots: pathlib.Path | None
) -> list[Finding]:
    """Returns the faults of pages in both color schemes and at all widths."""
    findings: dict[Finding, None] = {}
    for scheme in SCHEMES:
        tab = browser.new_page(color_scheme=scheme)
        faults: list[str] = []
        listen(tab, address, faults)
        for page in pages:
            tab.set_viewport_size({"width": WIDTHS[0], "height": 1000})
            tab.goto(address + page)
            for width in WIDTHS:
                tab.set_viewport_size({"width": width, "height": 1000})
                for fault in tab.evaluate(_MEASURE):
                    findings[Finding(page, f"{width} {scheme}", fault)] = None
                if shots is not None:
                    name = f"{page.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                    tab.screenshot(path=shots / name, full_page=True)
            findings |= dict.fromkeys(Finding(page, "", fault) for fault in faults)
            faults.clear()
        tab.close()
    return list(findings)


def search(browser: Any, address: str) -> list[Finding]:
    """Returns a fault for each of `SEARCHES` that does not find its page."""
    findings = []
    for words, wanted in SEARCHES.items():
        tab = browser.new_page()
        tab.goto(f"{address}search.html?q={words}")
        with contextlib.suppress(Exception):  # The search shows nothing: reported below.
            tab.wait_for_selector("ul.search li", timeout=5000)
            tab.wait_for_timeout(300)
        links = tab.eval_on_selector_all("ul.search li a", "all => all.map(a => a.href)")
        if not any(wanted in link for link in links[:10]):
            findings.append(Finding("search.html", "", f"{words!r} finds only {links[:10]}"))
        tab.close()
    return findings


def main() -> int:
    """Prints all faults, and returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", nargs="?", type=pathlib.Path, default=SITE)
    parser.add_argument("--pages", default="*", help="a pattern of pages, such as 'course/*'")
    parser.add_argument("--screenshots", type=pathlib.Path, help="a folder for pictures of pages")
    options = parser.parse_args()
    try:
        playwright = importlib.import_module("playwright.sync_api")  # Not a dependency of jaxq.
    except ImportError:
        sys.exit("check_site.py needs playwright: pip install playwright")
    pages = pages_of(options.site, options.pages)
    if not pages:
        sys.exit(
            f"{options.site} has no pages that match {options.pages!r}. Run `make docs` first."
        )
    if options.screenshots is not None:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with served(options.site) as address, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        findings = check(browser, address, pages, options.screenshots)
        if options.pages == "*":
            findings += search(browser, address)
        browser.close()
    for page, where, fault in findings:
        print(f"{page} [{where}]: {fault}" if where else f"{page}: {fault}")
    print(f"{len(pages)} pages, {len(findings)} faults")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
