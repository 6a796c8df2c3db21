"""A chapter in plain JupyterLab, as requirements.txt installs it: read, run, moved, unfolded."""

import os
import secrets
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from repository import ROOT

CHAPTER = "05_vae.ipynb"
CELLS = ".jp-Notebook .jp-Cell"
pytestmark = [pytest.mark.web, pytest.mark.slow]


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """The address of a JupyterLab over a reader's own copy of the book, whose repository has the tiny model."""
    top = tmp_path_factory.mktemp("clone")
    (top / "checkpoints").symlink_to(ROOT / "checkpoints")
    state = {f"JUPYTER_{name}_DIR": str(top / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | state | {"JUPYTERLAB_SETTINGS_DIR": str(top / "settings"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(ROOT / "src")
    copy = "import lab, pathlib, sys; lab.copy(*map(pathlib.Path, sys.argv[1:]), [])"
    command = [sys.executable, "-c", copy, str(ROOT / "book"), str(top / "my")]
    subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT / "tools")}, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, token = free.getsockname()[1], secrets.token_hex(16)
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", f"--IdentityProvider.token={token}"]
    command = [sys.executable, "-m", "jupyter", "lab", str(top / "my"), *options]
    with open(top / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urlopen(f"http://127.0.0.1:{port}/api?token={token}")
                break
            except (URLError, ConnectionError):
                assert server.poll() is None, (top / "lab.log").read_text()
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


def scroll_to(page, selector: str, text: str = ""):
    """JupyterLab renders what is near the window: scroll until it is there."""
    found = page.locator(selector, has_text=text) if text else page.locator(selector)
    panel = page.locator(".jp-WindowedPanel-outer").first
    panel.evaluate("box => box.scrollTo(0, 0)")
    for _ in range(300):
        if found.count() and found.first.is_visible():
            found.first.scroll_into_view_if_needed()
            return found.first
        panel.evaluate("box => box.scrollBy(0, 500)")
        page.wait_for_timeout(100)
    raise AssertionError(f"{selector} {text!r} is not in the notebook")


def test_a_chapter_is_read_and_run_in_jupyterlab(browser, lab):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(lab.format(CHAPTER))
    page.locator(CELLS).first.wait_for()

    # As it is opened: set-up is folded, the result is seen, nothing is raw, and a trusted figure moves.
    assert scroll_to(page, ".jp-CodeCell .jp-InputPlaceholder", "# Set-up")
    figure = scroll_to(page, ".jp-OutputArea figure.moving")
    slider = figure.locator("input[type=range]")
    slider.wait_for()
    before = figure.locator("output").inner_text()
    width = slider.bounding_box()["width"]
    slider.click(position={"x": 0.95 * width, "y": 5})
    assert figure.locator("output").inner_text() != before, "the slider moves nothing"

    # A solution is closed, opens with a click, and its code is folded to the line that names it.
    assert scroll_to(page, ".jp-MarkdownCell h3", "Exercise 5.1.")
    details = scroll_to(page, ".jp-MarkdownCell details", "What it shows")
    inside = details.locator("p").first
    assert not inside.is_visible()
    details.locator("summary").click()
    assert inside.is_visible()
    folded = scroll_to(page, ".jp-CodeCell .jp-InputPlaceholder", "# Solution 5.")
    folded.click()
    page.locator(".jp-CodeCell:not(.jp-mod-inputHidden) .cm-content", has_text="# Solution 5.").first.wait_for()
    shown = page.locator(".jp-MarkdownCell .jp-RenderedMarkdown").all_inner_texts()
    assert shown and not [text for text in shown if "{term}" in text or "{cite}" in text or ":label:" in text]

    # Run all: every cell ends without an error, and the figure is a widget that draws with the model.
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=busy]").first.wait_for(state="attached")
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(state="attached", timeout=600_000)
    widget = scroll_to(page, ".jp-OutputArea .widget-slider, .jp-OutputArea .widget-hslider")
    said = widget.locator(".widget-readout").inner_text()
    widget.locator(".noUi-base").click(position={"x": 5, "y": 2})
    page.wait_for_function(
        "([box, said]) => box.innerText !== said", arg=[widget.locator(".widget-readout").element_handle(), said]
    )
    page.close()


def test_a_word_leads_to_its_place_in_the_glossary(browser, lab):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(lab.format(CHAPTER))
    page.locator(CELLS).first.wait_for()
    scroll_to(page, ".jp-MarkdownCell a", "latents").click()
    heading = page.locator(".jp-MarkdownViewer h2", has_text="latents").first
    heading.wait_for()
    page.wait_for_timeout(500)
    assert -20 <= heading.bounding_box()["y"] <= 900
    page.close()
