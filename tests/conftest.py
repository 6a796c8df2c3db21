"""Every test runs offline, on one thread, from the same seed."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import random  # noqa: E402

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """A test may draw random numbers, and draws the same ones alone and in company."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in diffusers' layout, for whoever only reads it."""
    from random_model import save_random_model

    folder = tmp_path_factory.mktemp("small")
    save_random_model(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_full_size_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two models of full size beside each other may not fit into memory: the second file waits for the first."""
    if "full_size" not in request.path.name or sys.platform == "win32":
        yield
        return
    import fcntl

    with open(Path(tempfile.gettempdir()) / f"sdlearn-full-size-{os.getuid()}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if threading.current_thread() is threading.main_thread():
    # Jobs that a shell puts into the background ignore Ctrl-C, and so would the processes that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first. Windows has no fork, no such signals, pipes without names."""
    items.sort(key=lambda item: "full_size" not in item.path.name)
    for item in items:
        if sys.platform == "win32" and item.get_closest_marker("posix"):
            item.add_marker(pytest.mark.skip(reason="Windows has other processes, signals and pipes"))


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
