"""Sphinx extension: figures that code draws get a caption, words for those who cannot see them, and room on a phone.

A caption is the paragraph in italics below a code cell, so that a notebook shows it, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx

WIDE = 600  # pixels; a picture at least this wide has writing that would be too small on a phone


def first_sentence(paragraph: nodes.Node) -> str:
    """Its first sentence in plain words; a formula is left to those who read on."""
    text = re.sub(r"\s+", " ", paragraph.astext()).strip()
    sentence = re.match(r".+?[.!?:](?= |$)", text)
    return "" if "\\" in text else (sentence[0] if sentence else text)


def texts_near(cell: nodes.Node) -> Iterator[str]:
    """The text below a code cell, then the text above it: one of them says what its figure shows."""
    siblings = cell.parent.children
    here = siblings.index(cell)
    for node in (siblings[here + 1 : here + 2], siblings[here - 1 : here] if here else []):
        if node and isinstance(node[0], nodes.paragraph):
            yield first_sentence(node[0])


def words_for(image: nodes.image) -> str:
    cell = image.parent
    while cell.parent is not None and "cell" not in cell.get("classes", []):
        cell = cell.parent
    said = next((text for text in texts_near(cell) if len(text) > 15), "") if cell.parent is not None else ""
    return f"Figure. {said}" if said else "Figure, explained in the text"


def is_wide(path: Path, width: str) -> bool:
    """By the width on the page, where it is given (figures for sharp screens have twice the pixels)."""
    if path.suffix == ".svg":
        return float(re.search(r'viewBox="\S+ \S+ (\S+)', path.read_text("utf-8"))[1]) >= WIDE
    if re.fullmatch(r"[\d.]+(px)?", width):
        return float(width.removesuffix("px")) >= WIDE
    with Image.open(path) as picture:
        return picture.width >= WIDE


def dress_images(app: Sphinx, doctree: nodes.document, page: str) -> None:
    for image in list(doctree.findall(nodes.image)):
        path = Path(app.srcdir) / image["uri"]
        name = Path(image["uri"]).name
        if image.get("alt", "") in ("", image["uri"]) or name in image.get("alt", ""):
            image["alt"] = words_for(image)
        image.attributes.pop("height", None)  # it follows from the width; given, it would not shrink on a phone
        if "fits" in image["classes"] or not path.is_file() or not is_wide(path, str(image.get("width", ""))):
            continue
        if isinstance(image.parent, nodes.container | nodes.figure):
            if isinstance(image.parent, nodes.figure):
                image.attributes.pop("width", None)  # it would not let the picture be wider than a phone
            box = nodes.container(classes=["wide-figure"])
            image.replace_self(box)
            box += image
        elif isinstance(image.parent, nodes.paragraph) and len(image.parent) == 1:
            image.parent["classes"].append("wide-figure")


class captioned(nodes.Element):
    """<figure>, without the number that Sphinx gives to its own."""


class figcaption(nodes.TextElement):
    pass


def begin(self: Any, node: nodes.Element) -> None:
    tag = {captioned: "figure", figcaption: "figcaption"}[type(node)]
    self.body.append(self.starttag(node, tag, ""))
    self.context.append(f"</{tag}>\n")


def end(self: Any, node: nodes.Element) -> None:
    self.body.append(self.context.pop())


def is_caption(node: nodes.Node) -> bool:
    """A paragraph that is in italics from end to end."""
    return isinstance(node, nodes.paragraph) and len(node) == 1 and isinstance(node[0], nodes.emphasis)


def add_captions(app: Sphinx, doctree: nodes.document, page: str) -> None:
    for paragraph in list(doctree.findall(is_caption)):
        siblings = paragraph.parent.children
        cell = siblings[max(0, siblings.index(paragraph) - 1)]
        if "cell" not in cell.get("classes", []):
            continue
        paragraph["classes"].append("figure-caption")
        drawn = [box for box in cell if "cell_output" in box["classes"]]
        images = [image for box in drawn for image in box.findall(nodes.image)]
        if not images:
            continue  # what is drawn in HTML keeps the paragraph
        image = images[-1]
        image = image.parent if "wide-figure" in image.parent["classes"] else image
        figure = captioned()
        image.parent.replace(image, figure)
        figure += image
        figure += figcaption("", "", *paragraph[0].children)
        paragraph.parent.remove(paragraph)


def setup(app: Sphinx) -> dict[str, Any]:
    for node in (captioned, figcaption):
        app.add_node(node, html=(begin, end), override=True)
    app.connect("doctree-resolved", dress_images, priority=900)
    app.connect("doctree-resolved", add_captions, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
