"""book/*.ipynb -> one line for each thing that keeps a notebook from being committed.

    python tools/check_notebooks.py                    check all chapters
    python tools/check_notebooks.py --fix [notebook]   first give stable ids and clean metadata (tags stay)

Wanted: executed from top to bottom (counts 1..n), ids cell-000, cell-001 ..., no widgets, no errors, no path of this
machine, no object address in an output that nbval compares, short code cells, less than 1 MB.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp|mnt|opt|usr|var|private)/[\w.~-]+|\b[A-Z]:\\{1,2}Users\b")
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}\b")
PICTURE = re.compile(r"base64,[A-Za-z0-9+/=\s]+")
LINES = {"exported": 100, "folded": 90, "open": 30}  # about 25 is what one takes in at once; drawings are folded
BYTES = 1_000_000


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy with stable ids, whole streams of text, and without what changes from machine to machine."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(copy.deepcopy(notebook), {})
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:03d}"
        kept = {k: v for k, v in cell.metadata.items() if k in ("tags", "mystnb") and v}
        cell.metadata = nbformat.from_dict(kept | folds(cell))
    return notebook


def folds(cell: nbformat.NotebookNode) -> dict:
    """What a code cell's tags mean in a notebook: `hide-input` hides its code, `solution` its outputs, too.

    `jupyter` and `collapsed` are read by JupyterLab and VS Code, `cellView` by Colab.
    """
    tags = cell.metadata.get("tags", [])
    if cell.cell_type != "code" or not {"hide-input", "solution"} & set(tags):
        return {}
    folded = {"jupyter": {"source_hidden": True}, "cellView": "form"}
    if "solution" in tags:
        folded |= {"jupyter": {"outputs_hidden": True, "source_hidden": True}, "collapsed": True}
    return folded


def output_text(output: nbformat.NotebookNode) -> str:
    """All that one output shows as text, without embedded pictures."""
    data = [v for k, v in output.get("data", {}).items() if isinstance(v, str) and k not in ("image/png", "image/jpeg")]
    return PICTURE.sub("base64,", "\n".join([output.get("text", ""), *data, *output.get("traceback", [])]))


def code_findings(cell: nbformat.NotebookNode) -> Iterator[str]:
    """What is wrong with one code cell."""
    tags = cell.metadata.get("tags", [])
    lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
    exported = re.search(r"^#\| ?export", cell.source, re.MULTILINE)
    kind = "exported" if exported else "folded" if {"hide-input", "solution"} & set(tags) else "open"
    if len(lines) > LINES[kind]:
        yield f"has {len(lines)} lines of code; at most {LINES[kind]} in a cell that is {kind}, so split it"
    if kind == "folded" and not re.match(r"#|def |class |[\w, ]+=|with |for |[\w.]+\(", cell.source):
        yield f"is folded and shows {cell.source[:30]!r}; begin it with a comment that says what it holds"
    for output in cell.outputs:
        if output.output_type == "error" and "raises-exception" not in tags:
            yield f"ends in {output.ename}; mend it, or tag it raises-exception"
        if WIDGET in output.get("data", {}):
            yield "shows a widget, which is empty in the book; use plain output"
        text = output_text(output)
        if found := PATH.search(text):
            yield f"prints a path of this machine, {found[0]}"
        if "nbval-ignore-output" not in tags and (found := ADDRESS.search(text)):
            yield f"prints an address, {found[0]}, that differs on every run"


def findings(path: Path) -> Iterator[str]:
    """One line for each thing that is wrong with a notebook."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:
        yield f"is not a readable notebook ({type(error).__name__})"
        return
    if notebook != normalise(notebook):
        yield "has transient ids or metadata; run `python tools/check_notebooks.py --fix`"
    if (size := path.stat().st_size) >= BYTES:
        yield f"is {size / 1e6:.1f} MB; less than 1 MB is wanted (smaller figures, lower dpi)"
    counts = [
        (i, c.execution_count) for i, c in enumerate(notebook.cells) if c.cell_type == "code" and c.source.strip()
    ]
    for wanted, (i, count) in enumerate(counts, start=1):
        if count != wanted:
            yield f"cell-{i:03d} has execution count {count}, not {wanted}; run the notebook from top to bottom"
            break
    for i, cell in enumerate(notebook.cells):
        problems = list(code_findings(cell)) if cell.cell_type == "code" else []
        if not cell.source.strip():
            problems.append("is empty")
        if found := PATH.search(PICTURE.sub("base64,", cell.source)):
            problems.append(f"names a path of this machine, {found[0]}")
        yield from (f"cell-{i:03d} {problem}" for problem in problems)


def fix(path: Path) -> None:
    """Write the normalised notebook in one step."""
    fresh = path.with_suffix(".new")
    nbformat.write(normalise(nbformat.read(path, as_version=4)), fresh)
    os.replace(fresh, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all chapters of book/")
    parser.add_argument("--fix", action="store_true", help="give stable ids and clean metadata before checking")
    options = parser.parse_args()
    count = 0
    for path in options.notebooks or sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb")):
        if not path.is_file():
            parser.error(f"there is no notebook {path}")
        if options.fix:
            fix(path)
        for finding in findings(path):
            print(f"{path.name}: {finding}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
