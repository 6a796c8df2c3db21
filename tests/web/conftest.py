"""The built book in a real browser: Debian's chromium, driven by Playwright; nothing is downloaded.

CHROMIUM       the browser to use, where it is not on the PATH as chromium, chromium-browser or google-chrome
BOOK_HTML      a folder with the built book; without it the tests build their own into a temporary folder
WEB_REQUIRED   where it is set, a missing browser is a failure; else the tests are skipped
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def absent(reason: str) -> None:
    if os.environ.get("WEB_REQUIRED"):
        pytest.fail(f"WEB_REQUIRED is set, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """One browser for all tests."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("Playwright is not installed: python -m pip install -r requirements.txt")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        absent("there is no browser: apt-get install chromium, or set CHROMIUM to the path of one")
    options = ["--no-sandbox", "--disable-gpu", "--disable-smooth-scrolling", "--force-prefers-reduced-motion"]
    options.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # there is no network
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def book(browser, tmp_path_factory) -> Path:
    """The folder of the built book. It asks for the browser first: without one nothing is built."""
    if given := os.environ.get("BOOK_HTML"):
        folder = Path(given).resolve()
        assert (folder / "book" / "index.html").is_file(), f"BOOK_HTML is {given}, and no book is there: make book"
        copies = [(path, folder / "_sources" / "book" / path.name) for path in (ROOT / "book").glob("*.[im][pd]*")]
        old = [path.name for path, copy in copies if not copy.exists() or copy.read_bytes() != path.read_bytes()]
        assert not old, f"the book in BOOK_HTML is older than {', '.join(old)}: make book"
        return folder
    target = tmp_path_factory.mktemp("website")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "--path-output", target]
    done = subprocess.run(
        [*command, "-W", "--keep-going", "--quiet"], cwd=ROOT, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, f"the book does not build:\n{(done.stdout + done.stderr)[-4000:]}"
    return target / "_build" / "html"
