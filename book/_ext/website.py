"""Sphinx extension: what a page tells the world (share cards, download, launch and edit buttons), and nothing online.

`repository: {url: ...}` in _config.yml is the one switch for the buttons that need a public address; without it they
are off, and everything else works from a folder without a network.
"""

from __future__ import annotations

import re
import struct
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

CARD = Path(__file__).parent.parent / "_static" / "cover.png"
CARD_TEXT = "Small pictures of emoji scenes, each drawn from the sentence below it by the model of this book"
NEEDS_ADDRESS = ("use_repository_button", "use_edit_page_button", "use_issues_button")


def set_buttons(app: Sphinx, config: Config) -> None:
    """Launch, edit, issue and repository buttons: all with a repository address, none without."""
    options = config.html_theme_options
    address = options.get("repository_url")
    for button in NEEDS_ADDRESS:
        options[button] = bool(address)
    if not address:
        options["launch_buttons"] = {}


def drop_thebe(app: Sphinx, config: Config) -> None:
    """Jupyter Book always loads sphinx-thebe, whose script names an address on the network; we do not use it."""
    for name, listeners in app.events.listeners.items():
        for listener in list(listeners):
            if listener.handler.__module__ == "sphinx_thebe":
                app.events.listeners[name].remove(listener)
    app.registry.css_files[:] = [css for css in app.registry.css_files if "thebe" not in css[0]]


def name_download(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """In a chapter the download button says what one gets."""
    if not context.get("sourcename", "").endswith(".ipynb"):
        return
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("label") == "download-source-button":
                button.update(text="This notebook (.ipynb)", tooltip="Download this notebook, with its outputs")


def describe(doctree: nodes.document, length: int = 200) -> str:
    """The first real paragraph of a page, in plain words, cut at a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = re.sub(r"\s+", " ", paragraph.astext()).strip()
        if len(text) < 60 or "\\" in text or not isinstance(paragraph.parent, nodes.section | nodes.document):
            continue
        return text if len(text) <= length else text[:length].rsplit(" ", 1)[0].rstrip(",;:") + " ..."
    return ""


def add_card(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Open Graph tags. Addresses are absolute when html.baseurl is known, else relative to the page."""
    if doctree is None:
        return
    base = app.config.html_baseurl.rstrip("/")
    width, height = struct.unpack(">II", CARD.read_bytes()[16:24])
    title = re.sub(r"<[^>]+>", "", context.get("title", ""))  # the theme gives it as HTML, entities and all
    image = f"{base}/_static/{CARD.name}" if base else context["pathto"](f"_static/{CARD.name}", 1)
    tags = [
        ("name", "description", escape(describe(doctree))),
        ("property", "og:title", title.replace('"', "&quot;")),
        ("property", "og:description", escape(describe(doctree))),
        ("property", "og:type", "website" if page == app.config.root_doc else "article"),
        ("property", "og:site_name", escape(app.config.html_title)),
        ("property", "og:image", image),
        ("property", "og:image:alt", CARD_TEXT),
        ("property", "og:image:width", str(width)),
        ("property", "og:image:height", str(height)),
        ("name", "twitter:card", "summary_large_image"),
    ]
    if base:
        tags.append(("property", "og:url", f"{base}/{page}.html"))
    lines = [f'<meta {kind}="{name}" content="{value}" />' for kind, name, value in tags if value]
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines])


def mend_body(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Two things that the writers of HTML leave: docutils calls the bibliography a list and its entries something
    else, so that a screen reader counts none; and a long name in code font may break at its dots and underscores."""
    body = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')
    context["body"] = re.sub(
        r'(?<=<span class="pre">)[^<]{12,}(?=</span>)',
        lambda name: re.sub(r"([\w)}])([._/]+)(?=\w|\{)", r"\1\2<wbr>", name[0]),
        body,
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", set_buttons)
    app.connect("config-inited", drop_thebe)
    app.connect("html-page-context", name_download, priority=900)
    app.connect("html-page-context", add_card)
    app.connect("html-page-context", mend_body)
    app.add_js_file("book.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
