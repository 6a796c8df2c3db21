"""Sphinx extension: chapters and pages in plain Markdown -> the MyST directives that the website is made of.

The chapters are read in JupyterLab, VS Code, Colab and GitHub's preview, which know no MyST. So the source is plain,
and only the website, which can be programmed, translates. The conventions, one way for each thing:

exercise    a Markdown cell tagged `exercise`: `### Exercise 3.1. A title <a id="ch03-ex1"></a>`, then its text
solution    the cells below it tagged `solution`: text in <details>, which folds everywhere; code and outputs hidden by
            the cell's metadata (tools/check_notebooks.py writes it from the tag), first line `# Solution 3.1`, which
            is what remains to be seen. A collapsed heading would fold all of it, but in JupyterLab alone.
answer      `<details><summary>Answer</summary>`, blank line, text, blank line, `</details>`
citation    `[Ho et al. 2020](https://arxiv.org/abs/2006.11239)`, in a sentence or in parentheses: the address is that
            of an entry of references.bib; offline, too, the words say which paper is meant
word        `[guidance scale](glossary.md#term-guidance-scale)`: the glossary has `<a id=...>`, the one kind of anchor
            that JupyterLab, GitHub and VS Code all find
figure      a picture, then a paragraph in italics: its caption (below a code cell, figures.py makes it one)
note        a quotation that begins `> **Note.**` (or Tip, Hint, Warning, Important)

Sphinx hands every source to `source-read` before it is parsed; nothing is written to disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1 *$|(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)
ANCHOR = r'<a id="([\w-]+)"></a>'
EXERCISE = re.compile(rf"### Exercise (\d+)\.(\d+)\. (.+?) {ANCHOR}\n+(.*)", re.DOTALL)
DETAILS = re.compile(r"^<details><summary>(.+?)</summary>\n\n(.*?)\n\n</details>$", re.MULTILINE | re.DOTALL)
SOLUTION = re.compile(r"# Solution \d+\.\d+\n")  # the line that a folded cell shows; on the website the box says it
LINK = r"\[([^\[\]]+)\]\((https?://[^\s()]+)\)"
CITED = re.compile(rf"\({LINK}(?:[;,]\s+{LINK})*\)|{LINK}")
TERM = re.compile(r"\[([^\[\]]+)\]\((?:glossary\.md)?#(term-[\w-]+)\)")
TO_EXERCISE = re.compile(r"\[([^\[\]]+)\]\((?:\w+\.ipynb)?#(ch\d\d-ex\d+)\)")
FIGURE = re.compile(
    r"^(\[)?!\[([^\]]+)\]\(([^)\s]+)\)(?(1)\]\(([^)\s]+)\))\n\n\*(?!\*)((?:[^*\n]|\n(?!\n))+)\*$", re.MULTILINE
)
NOTE = re.compile(r"^> \*\*(Note|Tip|Hint|Warning|Important)\.\*\* ?(.*(?:\n>.*)*)", re.MULTILINE)
MAP = re.compile(r"^!\[[^\]]+\]\(_static/journey-00\.svg\)$", re.MULTILINE)


@dataclass(frozen=True)
class Names:
    """What links mean: the address of a paper -> its key, the anchor of a word -> the word."""

    papers: dict[str, str]
    terms: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> Names:
        entries = re.findall(
            r"^@\w+\{([^,]+),(.*?)^\}", (folder / "references.bib").read_text("utf-8"), re.MULTILINE | re.DOTALL
        )
        addresses = ((re.search(r"\burl *= *\{([^}]+)\}", text), key) for key, text in entries)
        return cls(
            {found[1]: key for found, key in addresses if found},
            {anchor: word for word, anchor in terms((folder / "glossary.md").read_text("utf-8"))},
        )


def terms(glossary: str) -> Iterator[tuple[str, str]]:
    """The words of the glossary's headings, `## byte-pair encoding <a ...>, BPE <a ...>`, and their anchors."""
    for heading in re.findall(r"^## (.+)$", glossary, re.MULTILINE):
        yield from re.findall(rf"(?:, )?([^,<>]+?) {ANCHOR}", heading)


def outside_code(change: Callable[[str], str], text: str) -> str:
    """The text with everything changed but its blocks and spans of code."""
    end, parts = 0, []
    for code in CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def fenced(head: str, body: str) -> str:
    """A directive, from its head `note}`, whose fence is longer than any in its body."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"^`{3,}", body, re.MULTILINE)), default=0))
    return f"{fence}{{{head}\n{body}\n{fence}"


def linked(text: str, names: Names) -> str:
    """Links to papers, to words and to exercises become roles; all others stay links."""

    def cite(found: re.Match) -> str:
        links = re.findall(LINK, found[0])
        keys = [names.papers.get(address) for words, address in links if re.search(r"\b\d{4}$", words)]
        if not keys or None in keys or len(keys) < len(links):
            return found[0]
        return f"{{cite:{'p' if found[0][0] == '(' else 't'}}}`{','.join(keys)}`"

    def term(found: re.Match) -> str:
        return f"{{term}}`{found[1]} <{names.terms[found[2]]}>`" if found[2] in names.terms else found[0]

    def change(part: str) -> str:
        return TO_EXERCISE.sub(r"{ref}`\1 <\2>`", TERM.sub(term, CITED.sub(cite, part)))

    return outside_code(change, text)


def blocks(text: str) -> str:
    """Folded answers, notes and figures become directives."""
    text = DETAILS.sub(lambda m: f"::::::{{admonition}} {m[1]}\n:class: dropdown quiz\n\n{m[2]}\n::::::", text)
    text = NOTE.sub(lambda m: fenced(f"{m[1].lower()}}}", re.sub(r"^> ?", "", m[2], flags=re.MULTILINE)), text)

    def figure(found: re.Match) -> str:
        target = f":target: ../{found[4]}\n" if found[4] else ""
        return fenced(f"figure}} {found[3]}\n:alt: {found[2]}\n:width: 100%\n{target}", found[5])

    return FIGURE.sub(figure, text)


def page(text: str, name: str, names: Names) -> str:
    """A Markdown page; the glossary, the bibliography and the map of the first page are made here."""
    if name == "glossary":
        head, *entries = re.split(r"^## (?=.+<a id=)", text, flags=re.MULTILINE)
        items = []
        for entry in entries:
            heading, _, body = entry.partition("\n")
            lines = [word for word, _ in re.findall(rf"(?:, )?([^,<>]+?) {ANCHOR}", heading)]
            lines += [f"  {line}".rstrip() for line in linked(body.strip(), names).splitlines()]
            items.append("\n".join(lines))
        return f"{linked(head, names)}```{{glossary}}\n" + "\n\n".join(items) + "\n```\n"
    text = MAP.sub("```{raw} html\n:file: _static/map.html\n```", text)
    text = linked(blocks(text), names)
    return text + "\n```{bibliography}\n:all:\n```\n" * (name == "references")


def chapter(cells: list[dict], names: Names) -> list[dict]:
    """The cells of a chapter; exercises and their solutions become boxes, the solutions folded."""

    def markdown(source: str, tags: list[str] | None = None) -> dict:
        return {"cell_type": "markdown", "metadata": {"tags": tags or []}, "source": source}

    made, label, inside = [], "", False
    for cell in cells:
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if inside != ("solution" in tags):
            inside = not inside
            opening = f"```{{solution-start}} {label}\n:class: dropdown\n```"
            made.append(markdown(opening if inside else "```{solution-end}\n```"))
        if cell["cell_type"] != "markdown":
            made.append(cell | {"source": SOLUTION.sub("", source, count=1)} if inside else cell)
        elif "exercise" in tags and (found := EXERCISE.fullmatch(source.strip())):
            label = found[4]
            body = linked(blocks(found[5]), names)
            made.append(markdown(fenced(f"exercise}} {found[3]}\n:label: {label}\n", body)))
        elif not inside:
            made.append(markdown(linked(blocks(source), names)))
        else:
            made.append(markdown(linked(DETAILS.sub(r"\2", source), names)))
    return [*made, markdown("```{solution-end}\n```")] if inside else made


def translate(app: Sphinx, name: str, content: list[str]) -> None:
    path = Path(app.env.doc2path(name))
    names = Names.of(path.parent)
    if path.suffix == ".md":
        content[0] = page(content[0], path.stem, names)
    elif path.suffix == ".ipynb":
        notebook = json.loads(content[0])
        notebook["cells"] = chapter(notebook["cells"], names)
        for i, cell in enumerate(notebook["cells"]):
            cell["id"] = f"cell-{i:03d}"
        content[0] = json.dumps(notebook)


def number_exercises(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Exercise 3.1 bears on the website the number that it bears in the notebook, not one that counts from page one."""
    for numbers in env.toc_fignumbers.values():
        for label in numbers.get("exercise", {}):
            if found := re.fullmatch(r"ch(\d\d)-ex(\d+)", label):
                numbers["exercise"][label] = (int(found[1]), int(found[2]))
    return []


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", translate)
    app.connect("env-get-updated", number_exercises, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
