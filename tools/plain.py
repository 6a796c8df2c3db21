"""MyST notebooks and pages -> the plain form that book/_ext/one_source.py describes; what is plain stays as it is.

python tools/plain.py FILE...
"""

from __future__ import annotations

import re
import sys
import unicodedata
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from check_notebooks import normalise  # noqa: E402

FLAGS = re.MULTILINE | re.DOTALL
BIB = (ROOT / "book" / "references.bib").read_text("utf-8")
EXERCISE = re.compile(r"^(`{3,}|:{3,})\{exercise\} *([^\n]*)\n:label: *(\S+)\n\n*(.*?)\n\1$", FLAGS)
START = re.compile(r"^(`{3,})\{solution-start\} *(\S+).*?^\1$", FLAGS)
END = re.compile(r"^(`{3,})\{solution-end\}\s*^\1$", FLAGS)
ADMONITION = re.compile(r"^(:{3,}|`{3,})\{admonition\} ([^\n]+)\n:class: *([^\n]*)\n\n*(.*?)\n\1$", FLAGS)
NOTE = re.compile(r"^(:{3,}|`{3,})\{(note|tip|hint|warning|important)\} *\n(.*?)\n\1$", FLAGS)
FIGURE = re.compile(r"^(`{3,})\{figure\} (\S+)\n((?::[^\n]*\n)*)\n*(.*?)\n\1$", FLAGS)
ROLE = re.compile(r"\{(cite(?::\w+)?|term|ref|numref)\}`([^`]+)`")
BEFORE = set("of by from to and with as see than that for on like after or unlike".split())


def slug(term: str) -> str:
    return "term-" + re.sub(r"[^a-z0-9]+", "-", term.lower()).strip("-")


def authors_and_year(entry: str) -> str:
    authors = re.search(r"author *= *\{(.*?)\},?\n", entry, re.DOTALL)[1]
    names = [name.strip() for name in re.split(r"\s+and\s+", authors)]
    last = [
        re.sub(r"[{}]", "", n if n.startswith("{") else n.split(",")[0] if "," in n else n.split()[-1]) for n in names
    ]
    marks = {'"': "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303"}
    last = [re.sub(r"\\([\"'`^~])(\w)", lambda m: m[2] + marks[m[1]], n) for n in last]
    last = [unicodedata.normalize("NFC", n).replace("\\L", "Ł") for n in last]
    year = re.search(r"year *= *\{?(\d{4})", entry)[1]
    who = last[0] if len(last) == 1 else f"{last[0]} & {last[1]}" if len(last) == 2 else f"{last[0]} et al."
    if "others" in last:
        who = f"{last[0]} et al."
    return f"{who} {year}"


PAPERS = {}
for key, entry in re.findall(r"^@\w+\{([^,]+),(.*?)^\}", BIB, FLAGS):
    url = re.search(r"\burl *= *\{([^}]+)\}", entry)
    PAPERS[key] = (authors_and_year(entry), url[1] if url else None)


def roles(text: str, path: Path) -> str:
    """Citations, words and references as links."""

    def one(found: re.Match) -> str:
        kind, inside = found[1], re.sub(r"\s+", " ", found[2])
        if kind.startswith("cite"):
            links = [f"[{PAPERS[key.strip()][0]}]({PAPERS[key.strip()][1]})" for key in inside.split(",")]
            return ", ".join(links) if in_sentence(text, found) and not kind.endswith(":p") else f"({'; '.join(links)})"
        words, _, target = inside.partition(" <")
        target = target.rstrip(">") or words
        if kind == "term":
            return f"[{words}](glossary.md#{slug(target)})"
        number, file = re.fullmatch(r"ch0?(\d+)-ex(\d+)", target), ""
        if not path.name.startswith(target[2:4]):
            file = next((ROOT / "book").glob(f"{target[2:4]}_*.ipynb")).name
        words = f"exercise {number[1]}.{number[2]}" if words == target else words
        return f"[{words}]({file}#{target})"

    text = ROLE.sub(one, text)
    text = re.sub(r"([\w-]+) et al\.\s+\[\1 et al\. ", r"[\1 et al. ", text)
    text = re.sub(r"(\]\(http[^()\s]+)\)\) \(((?:section|appendix|eq|figure)[^()]*)\)", r"\1), \2)", text)
    return text


def in_sentence(text: str, found: re.Match) -> bool:
    """Is the citation a word of its sentence, not an aside?"""
    before, after = text[: found.start()].rstrip(), text[found.end() :]
    if text[: found.start()].endswith("("):
        return True
    line = before[before.rfind("\n") + 1 :]
    if not before or text[: found.start()].endswith("\n\n") or before[-1] in ".:;!?-|," or line.strip() in ("", "-"):
        return True
    if re.match(r"'s\b", after):
        return True
    return before.split()[-1].lower().strip("*(") in BEFORE


def markdown(text: str, path: Path) -> str:
    text = ADMONITION.sub(lambda m: f"<details><summary>{m[2]}</summary>\n\n{m[4].strip()}\n\n</details>", text)
    text = NOTE.sub(lambda m: f"> **{m[2].title()}.** " + "\n> ".join(m[3].strip().split("\n")), text)

    def figure(found: re.Match) -> str:
        alt = re.search(r":alt: *(.*)", found[3])[1]
        picture = f"![{alt}]({found[2]})"
        if ":target:" in found[3]:
            picture = f"[{picture}]({found[2]})"
        caption = re.sub(r"\*([^*]+)\*", r"_\1_", found[4].strip())
        return f"{picture}\n\n*{caption}*" if found[4].strip() else picture

    text = FIGURE.sub(figure, text)
    if EXERCISE.fullmatch(text.strip()):
        return text
    return outside_roles(text, path)


def outside_roles(text: str, path: Path) -> str:
    """Roles contain code spans of their own, so that fenced blocks alone are left out."""
    parts = re.split(r"(^`{3,}[^{\n]*\n.*?^`{3,} *$)", text, flags=FLAGS)
    return "".join(part if i % 2 else roles(part, path) for i, part in enumerate(parts))


def exercise(found: re.Match, path: Path) -> str:
    number = re.fullmatch(r"ch0?(\d+)-ex(\d+)", found[3])
    title, body = found[2].strip(), outside_roles(found[4].strip(), path)
    return f'### Exercise {number[1]}.{number[2]}. {title} <a id="{found[3]}"></a>\n\n{body}'


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text.strip()}\n\n</details>"


def convert(notebook: nbformat.NotebookNode, path: Path) -> nbformat.NotebookNode:
    cells, inside, told, label = [], False, False, ""

    def add(source: str, tag: str = "") -> None:
        if source.strip():
            cell = nbformat.v4.new_markdown_cell(source.strip())
            cell.metadata = nbformat.from_dict({"tags": [tag]} if tag else {})
            cells.append(cell)

    def put(cell, tag: str) -> None:
        if tag and tag not in (tags := cell.metadata.get("tags", [])):
            cell.metadata["tags"] = [*tags, tag]
        cells.append(cell)

    def text(part: str) -> None:
        nonlocal told
        part = part.strip()
        if not inside:
            return add(part)
        if part:
            add(folded("What it shows" if told else "Solution", part), "solution")
            told = True

    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            if inside:
                told = True
                if not cell.source.startswith("# Solution"):
                    cell.source = f"# Solution {label}\n{cell.source}"
            put(cell, "solution" if inside else "")
            continue
        tags = cell.metadata.get("tags", [])
        if {"exercise", "solution", "quiz"} & set(tags):
            cells.append(cell)
            continue
        source = markdown(cell.source, path)
        if "<summary>Answer</summary>" in source and not inside:
            for part in re.split(r"\n+(?=\*\*Question )", source):
                add(part, "quiz" if "**Question" in part else "")
            continue
        if not re.search(r"\{(exercise|solution-start|solution-end)\}", source):
            if inside:
                text(source)
            else:
                cell.source = source
                cells.append(cell)
            continue
        rest = source
        while rest:
            hits = [m for m in (EXERCISE.search(rest), START.search(rest), END.search(rest)) if m]
            if not hits:
                text(rest)
                break
            first = min(hits, key=lambda m: m.start())
            text(rest[: first.start()])
            if first.re is EXERCISE:
                add(exercise(first, path), "exercise")
            else:
                inside, told = first.re is START, False
                if inside:
                    number = re.fullmatch(r"ch0?(\d+)-ex(\d+)", first[2])
                    label = f"{number[1]}.{number[2]}"
            rest = rest[first.end() :]
    notebook.cells = cells
    return notebook


def glossary(text: str) -> str:
    if "```{glossary}" not in text:
        return text
    head, body = text.split("```{glossary}\n")
    made = []
    for block in body.split("\n```")[0].split("\n\n"):
        lines = block.splitlines()
        words = [line for line in lines if not line.startswith(" ")]
        title = ", ".join(f'{word} <a id="{slug(word)}"></a>' for word in words)
        made.append(f"## {title}\n\n" + "\n".join(line.strip() for line in lines[len(words) :]))
    return head + "\n\n".join(made) + "\n"


def renumber(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Exercises get the numbers of their order, everywhere: in the chapter, and in the pages that link them."""
    chapter, n, new = path.name[:2], 0, {}
    exercises = [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]
    for n, cell in enumerate(exercises, 1):
        new[re.search(r'<a id="ch\d\d-ex(\d+)">', cell.source)[1]] = str(n)
    if all(old == now for old, now in new.items()):
        return
    number = 0

    def link(m: re.Match) -> str:
        now = new.get(m[4], m[4])
        words = f"exercise {int(chapter)}.{now}" if re.fullmatch(r"exercise \d+\.\d+", m[1]) else m[1]
        return f"[{words}]({m[2]}#{m[3]}{now})"

    to = re.compile(rf"\[([^\]]*)\]\(((?:{path.name})?)#(ch{chapter}-ex)(\d+)\)")
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "exercise" in tags:
            number += 1
            cell.source = re.sub(
                r"### Exercise \d+\.\d+\. (.*?)<a id=\"ch\d\d-ex\d+\">",
                lambda m, number=number: f'### Exercise {int(chapter)}.{number}. {m[1]}<a id="ch{chapter}-ex{number}">',
                cell.source,
            )
        elif "solution" in tags and cell.cell_type == "code":
            cell.source = re.sub(r"^# Solution \d+\.\d+", f"# Solution {int(chapter)}.{number}", cell.source)
        if cell.cell_type == "markdown":
            cell.source = to.sub(link, cell.source)
    if path.parent.resolve() == ROOT / "book":
        for page in (ROOT / "book").glob("*.md"):
            text = page.read_text("utf-8")
            fresh = to.sub(lambda m: link(m) if m[2] else m[0], text)
            if fresh != text:
                page.write_text(fresh, "utf-8")


def main() -> int:
    for path in map(Path, sys.argv[1:]):
        if path.suffix == ".ipynb":
            notebook = convert(nbformat.read(path, 4), path)
            renumber(notebook, path)
            nbformat.write(normalise(notebook), path)
        else:
            path.write_text(markdown(glossary(path.read_text("utf-8")), path), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
