"""The built book in a real browser: Debian's chromium, driven by Playwright; nothing is downloaded.

CHROMIUM       the browser to use, where it is not on the PATH as chromium, chromium-browser or google-chrome
BOOK_HTML      a folder with the built book; without it the tests build their own into a temporary folder
WEB_REQUIRED   where it is set, a missing browser is a failure; else the tests are skipped
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


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
