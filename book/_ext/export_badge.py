"""Sphinx extension: in the pages, a code cell's `#|` lines become a badge that names the module it goes to."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def read_directives(source: str) -> tuple[dict[str, str], str]:
    """Split a cell into its `#|` lines, as {"export": "vae"}, and the code below them."""
    lines = source.split("\n")
    words = [line[2:].split() for line in lines if line.startswith("#|")]
    code = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
    return {word[0]: " ".join(word[1:]) for word in words if word}, code


def badge(module: str) -> nodes.paragraph:
    path = f"src/sdlearn/{module}.py"
    return nodes.paragraph("", "", nodes.inline("", f"→ {path}", classes=["export-badge"]), classes=["export-line"])


def dress_cells(app: Sphinx, doctree: nodes.document) -> None:
    """Go through a page's code cells in order; the first `default_exp` names the module of the plain exports."""
    default = ""
    for block in list(doctree.findall(nodes.literal_block)):
        box = block.parent
        if "cell_input" not in box.get("classes", []) or "#|" not in block.astext():
            continue
        words, code = read_directives(block.astext())
        if not words:
            continue
        default = words.get("default_exp") or default
        module = words.get("export") or default
        if not code:
            cell = box.parent
            cell.remove(box)
            if not cell.children:
                cell.parent.remove(cell)
            continue
        block.rawsource = code
        block[:] = [nodes.Text(code)]
        if module:
            box.insert(0, badge(module))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", dress_cells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
