"""The chapters' words -> remarks about them: whether to follow one is for the writer to say, so none of them fails.

    python tools/prose.py

A word of the glossary that a chapter uses before the one that introduces it, or that is not linked where the glossary
says; a name that a chapter exports and never speaks of.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from export import DEFINITIONS, defined_names
from spelling import prose

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
EVERYDAY = {  # words of the glossary that say what they say in any book
    "caption", "diffusers", "level", "pipeline", "recipe", "score", "strength",
}  # fmt: skip
WORD = re.compile(r'([^,<>]+?) <a id="(term-[\w-]+)"></a>')


def glossary() -> dict[str, tuple[list[tuple[str, str]], str]]:
    """The first word of each entry -> its words with their anchors, and the chapter that introduces it."""
    found = {}
    for entry in (BOOK / "glossary.md").read_text("utf-8").split("\n## ")[1:]:
        heading, _, text = entry.partition("\n")
        words = [(word.removeprefix(", "), anchor) for word, anchor in WORD.findall(heading)]
        if words and (chapter := re.search(r"\[Chapter\s+(\d\d)\]", text)):
            found[words[0][0]] = words, chapter[1]
    return found


def plain(text: str) -> str:
    """Prose without what explains itself: links, code, formulas."""
    text = "\n".join(line for _, line in prose(text))
    for pattern in (r"`[^`\n]*`", r"\$[^$]*\$", r"\[[^\]]*\]\([^)]*\)"):
        text = re.sub(pattern, " ", text)
    return text


def says(text: str, word: str) -> bool:
    pattern = rf"(?<![\w-]){re.escape(word)}(?:s|es)?(?![\w-])"
    return bool(re.search(pattern, text, re.IGNORECASE * word.islower()))


def about_words(texts: dict[str, str]) -> Iterator[str]:
    first, *_ = texts.values()
    for word, (words, home) in glossary().items():
        linked = [n for n, text in texts.items() if any(f"(glossary.md#{anchor})" in text for _, anchor in words)]
        if linked[:1] != [home]:
            yield f"chapter {home} introduces {word!r}; the first chapter that links it: {(linked or ['none'])[0]}"
        if word in EVERYDAY or says(plain(first), word):
            continue
        for n, text in texts.items():
            if n < home and says(plain(text), word):
                yield f"chapter {n} says {word!r}, which chapter {home} introduces"


def about_names(notebook: nbformat.NotebookNode, text: str) -> Iterator[str]:
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    modules = {a or b for a, b in re.findall(r"^#\| ?default_exp ([\w.]+)|^#\| ?export ([\w.]+)", code, re.MULTILINE)}
    said = {word for _, span in re.findall(r"(`+)(.+?)\1", text) for word in re.findall(r"\w+", span)}
    for module in sorted(modules):
        path = ROOT / "src" / "sdlearn" / f"{module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text("utf-8")) if path.exists() else ast.parse("")
        names = [name for node in tree.body if isinstance(node, DEFINITIONS) for name in defined_names(node)]
        yield from (f"exports {name} and never speaks of it" for name in names if name[0] != "_" and name not in said)


def main() -> int:
    notebooks = {path.name[:2]: nbformat.read(path, 4) for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))}
    texts = {
        n: "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        for n, notebook in notebooks.items()
    }
    print(*about_words(texts), sep="\n")
    for n, notebook in notebooks.items():
        print(*(f"chapter {n} {remark}" for remark in about_names(notebook, texts[n])), sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
