"""What every chapter of the book has: its sections, exercises with solutions that ran, a quiz, and text that reads
well where nobody knows MyST; and the one checker of links."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from markdown_it import MarkdownIt
from myst_parser.mdit_to_docutils.base import default_slugify
from nbformat import NotebookNode
from repository import ROOT, tool

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from one_source import ANCHOR, DETAILS, EXERCISE, LINK, Names  # noqa: E402

BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))
PAGES = sorted(BOOK.glob("*.md"))
SECTIONS = (
    "Where we are", "What you will have at the end", "The idea", "By hand", "Build it", "The class", "Check it",
    "See it", "Break it", "Exercises", "Quiz", "Summary", "Read next",
)  # fmt: skip
NOT_RUN = {"skip-execution", "nbval-skip", "remove-cell", "raises-exception"}
PICTURES = {"image/png", "image/jpeg", "image/svg+xml", "text/html"}
SPELLING, CHECK = tool("spelling"), tool("check_notebooks")


def markdown(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def prose(text: str) -> str:
    return "\n".join(line for _, line in SPELLING.prose(text))


def headings(text: str, level: str = "#+") -> list[str]:
    return re.findall(rf"^(?:{level}) +(.+?) *$", prose(text), re.MULTILINE)


def tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


# One function for each demand; it yields a line for each place where a chapter falls short.


def about_sections(notebook: NotebookNode) -> Iterator[str]:
    found = headings(markdown(notebook), "##")
    if found != list(SECTIONS):
        missing = [name for name in SECTIONS if name not in found]
        yield f"has not the thirteen sections in their order; missing: {missing}; there: {found}"


def about_the_beginning(notebook: NotebookNode) -> Iterator[str]:
    """After "What you will have at the end" the reader meets the result, and no code before it."""
    cells = iter(notebook.cells)
    for cell in cells:
        if cell.cell_type == "code" and not tagged(cell, "hide-input"):
            yield f"shows code before the result: {cell.source[:40]!r}"
        if "## What you will have at the end" in cell.source:
            break
    for cell in cells:
        if cell.cell_type == "markdown":
            return (yield f"has text between the promise and its picture: {cell.source[:40]!r}")
        if not tagged(cell, "hide-input"):
            yield f"shows code before the result: {cell.source[:40]!r}"
        if any(PICTURES & output.get("data", {}).keys() for output in cell.outputs):
            return


def about_exercises(notebook: NotebookNode) -> Iterator[str]:
    chapter, count, unanswered = re.match(r"# (\d\d) ", notebook.cells[0].source)[1], 0, ""
    texts = []
    for cell in notebook.cells:
        if tagged(cell, "exercise"):
            count += 1
            if unanswered:
                yield f"exercise {unanswered} has no solution"
            found = EXERCISE.fullmatch(cell.source.strip())
            unanswered, wanted = f"{int(chapter)}.{count}", f"ch{chapter}-ex{count}"
            if not found or (f"{found[1]}.{found[2]}", found[4]) != (unanswered, wanted):
                yield f"does not call its exercise {unanswered}, with the anchor {wanted}: {cell.source[:60]!r}"
            elif len(found[5].split()) < 8:
                yield f"exercise {unanswered} says nothing"
            texts.append(cell.source)
        elif tagged(cell, "solution"):
            if not count:
                yield "has a solution before its first exercise"
            if cell.cell_type == "markdown" and not DETAILS.fullmatch(cell.source.strip()):
                yield f"shows a solution that is not folded: {cell.source[:60]!r}"
            if cell.cell_type == "code":
                if not cell.source.startswith(f"# Solution {int(chapter)}.{count}\n"):
                    yield f"has a folded cell that does not say: # Solution {int(chapter)}.{count}"
                if cell.execution_count is None or NOT_RUN & set(cell.metadata.tags):
                    yield f"has a solution that is not run: {cell.source[:60]!r}"
            unanswered = ""
        elif "### Exercise" in cell.source:
            yield f"has an exercise without its tag: {cell.source[:60]!r}"
    if unanswered:
        yield f"exercise {unanswered} has no solution"
    if count < 4:
        yield f"has {count} exercises; at least four are wanted"
    if not any(re.search(r"predict|before (you|running)", text, re.IGNORECASE) for text in texts):
        yield "has no exercise that says: predict, then run"


def about_quiz(notebook: NotebookNode) -> Iterator[str]:
    questions = [cell.source for cell in notebook.cells if tagged(cell, "quiz")]
    if len(questions) < 3:
        yield f"has {len(questions)} quiz questions; three are wanted"
    for i, text in enumerate(questions, start=1):
        choices = re.findall(r"^- \*\*([a-e])\)\*\* \S", text, re.MULTILINE)
        answers = [body for title, body in DETAILS.findall(text) if title == "Answer"]
        if len(choices) < 3 or choices != sorted(set(choices)) or not text.startswith(f"**Question {i}.**"):
            yield f"question {i} has the choices {choices}; three or more are wanted"
        right = re.match(r"\*\*([a-e])\)\.\*\* \S", answers[0]) if len(answers) == 1 else None
        if not right or right[1] not in choices:
            yield f"question {i} has no folded answer that begins with the right choice"
        elif silent := [c for c in choices if c != right[1] and not re.search(rf"\b{c}\)", answers[0])]:
            yield f"question {i} does not say why {silent} is wrong"


def about_pictures(notebook: NotebookNode) -> Iterator[str]:
    """Pictures in the text have words for those who cannot see them; pictures that code draws have a caption."""
    text = prose(markdown(notebook))
    alts = [(m[2], m[1]) for m in re.finditer(r"!\[([^\]]*)\]\(([^)\s]+)", text)]
    yield from (f"shows {name} without words for those who cannot see it" for name, alt in alts if len(alt.split()) < 3)
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type != "code" or tagged(cell, "solution"):
            continue
        drawn = any({"image/png", "image/jpeg"} & output.get("data", {}).keys() for output in cell.outputs)
        if drawn and not (after and re.match(r"\*(?!\*)[^*]{15,}\*(\n\n|$)", after.source)):
            yield f"has a figure without a caption in italics below it: {cell.source[:50]!r}"


def about_plain_text(notebook: NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield from raw(cell.source)


DEMANDS: list[Callable[[NotebookNode], Iterator[str]]] = [
    about_sections, about_the_beginning, about_exercises, about_quiz, about_pictures, about_plain_text,
]  # fmt: skip


def raw(text: str) -> Iterator[str]:
    """What a reader would see raw where Markdown is rendered without MyST, as JupyterLab renders it."""
    parser = MarkdownIt("commonmark").enable("table")
    if text.count("<details>") != len(DETAILS.findall(text)):
        yield f"has <details> without blank lines within: {text[:60]!r}"
    for token in parser.parse(text):
        if token.type == "fence" and token.info.startswith("{"):
            yield f"shows a directive as code: {token.info}"
        if token.type != "inline":
            continue
        shown = "".join("\0" if part.type == "code_inline" else part.content or "\n" for part in token.children)
        shown = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "", shown, flags=re.DOTALL)
        for mark in (r"\{[a-z][\w:-]*\}\0", r"^[:`]{3,}.*", r"^:[\w-]+:.*", r"^\([\w-]+\)=$", r"\]\(.*", r"\{\w+\}`.*"):
            yield from (f"shows {found.group().strip()!r}" for found in re.finditer(mark, shown, re.MULTILINE))


@pytest.mark.parametrize("demand", DEMANDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_has_what_it_needs(path, demand):
    assert list(demand(nbformat.read(path, 4))) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_a_page_reads_without_myst(path):
    assert list(raw(path.read_text("utf-8"))) == []


# Links between the pages, and from README and CONTRIBUTING; citations and words.

TEXTS = [*CHAPTERS, *PAGES, *sorted(ROOT.glob("*.md"))]


def text_of(path: Path) -> str:
    return markdown(nbformat.read(path, 4)) if path.suffix == ".ipynb" else path.read_text("utf-8")


def anchors(text: str) -> set[str]:
    """What a link may point to in a page: its headings, as MyST and GitHub spell them, its exercises and its terms.

    An `<a id="...">` of another name is none: the book does not find it from another page (`one_source.py`).
    """
    plain = (re.sub(r"[`*$]", "", re.sub(ANCHOR, "", heading)).strip() for heading in headings(text))
    return {*re.findall(ANCHOR.replace(r"[\w-]+", r"(?:ch\d\d-ex|term-)[\w-]+"), text), *map(default_slugify, plain)}


def broken_links(path: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"(?<!\\)\]\(<?([^)<>\s]+)>?[^)]*\)", re.sub(r"`[^`\n]+`", "", prose(text))):
        address, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", address):
            continue
        target = (path.parent / address).resolve() if address else path
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    assert broken_links(path, text_of(path)) == []


def test_a_broken_link_is_found():
    here, link = BOOK / "index.md", "[a](00_journey.ipynb#{})"
    assert broken_links(here, f"{link.format('the-idea')} [c](https://example.org/x) `[d](e)`") == []
    assert broken_links(here, f"[a](98_none.ipynb) {link.format('no')}") == ["98_none.ipynb", "00_journey.ipynb#no"]
    assert broken_links(CHAPTERS[0], "[a](#nowhere) [b](glossary.md#term-clip)") == ["#nowhere"]
    text = '## A heading, `code` & more <a id="ch01-ex1"></a>\n\n<a id="else"></a>\n\n```\n# no heading\n```'
    assert anchors(text) == {"a-heading-code--more", "ch01-ex1"}


def citations(text: str) -> set[str]:
    """The addresses of links that read like a citation, [Ho et al. 2020](...)."""
    return {address for words, address in re.findall(LINK, text) if re.search(r"\b[12]\d{3}$", words)}


def test_every_citation_is_in_the_bibliography_and_every_entry_is_cited():
    papers, cited = Names.of(BOOK).papers, {path.name: citations(text_of(path)) for path in [*CHAPTERS, *PAGES]}
    entries = re.findall(r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text("utf-8"), re.MULTILINE)
    assert sorted(papers.values()) == sorted(entries), "an entry without an address, or two with the same"
    unknown = {name: found - papers.keys() for name, found in cited.items() if found - papers.keys()}
    assert not unknown, f"not in references.bib: {unknown}"
    assert not (idle := papers.keys() - set().union(*cited.values())), f"nobody cites {sorted(idle)}"


# The demands can fail: a sound chapter, and one fault after the other.


def sound() -> NotebookNode:
    new = nbformat.v4
    drawn = new.new_output("display_data", {"image/png": ""})
    hidden = {"tags": ["hide-input"]}
    cells = [new.new_markdown_cell("# 09 A sound chapter"), new.new_code_cell("import this", metadata=hidden)]
    for name in SECTIONS:
        cells.append(new.new_markdown_cell(f"## {name}\n\nText. ![a red apple](a.png)"))
        if name == SECTIONS[1]:
            cells.append(new.new_code_cell("draw()", metadata=hidden, outputs=[drawn]))
            cells.append(new.new_markdown_cell("*An apple that nobody has ever seen.*"))
        for k in range(1, 1 + 4 * (name == "Exercises")):
            text = f'### Exercise 9.{k}. A title <a id="ch09-ex{k}"></a>\n\nPredict the shape, then run it and compare.'
            code = f"# Solution 9.{k}\nprint(1)"
            cells += [
                new.new_markdown_cell(text, metadata={"tags": ["exercise"]}),
                new.new_code_cell(code, execution_count=k, metadata={"tags": ["solution"]}),
            ]
        for k in range(1, 1 + 3 * (name == "Quiz")):
            text = f"**Question {k}.** Which one?\n\n- **a)** This.\n- **b)** That.\n- **c)** None.\n\n"
            text += "<details><summary>Answer</summary>\n\n**b).** It is so. Not a): no. Not c): no.\n\n</details>"
            cells.append(new.new_markdown_cell(text, metadata={"tags": ["quiz"]}))
    return new.new_notebook(cells=cells)


def replace(old: str, by: str, everywhere: bool = False) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        for cell in [cell for cell in notebook.cells if old in cell.source][: None if everywhere else 1]:
            cell.source = cell.source.replace(old, by)

    return change


def change_tags(text: str, tags: list[str]) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        next(cell for cell in notebook.cells if text in cell.source).metadata["tags"] = tags

    return change


def drop(text: str) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells.remove(next(cell for cell in notebook.cells if text in cell.source))


def forget_to_run(notebook: NotebookNode) -> None:
    next(cell for cell in notebook.cells if tagged(cell, "solution")).execution_count = None


FAULTS = [
    (about_sections, "missing: ['Break it']", replace("## Break it", "### Break it")),
    (about_sections, "in their order", replace("## See it", "## Look at it")),
    (about_the_beginning, "shows code", change_tags("import this", [])),
    (about_the_beginning, "shows code", change_tags("draw()", [])),
    (about_the_beginning, "text between", drop("draw()")),
    (about_exercises, "has 3 exercises", change_tags("Exercise 9.4", [])),
    (about_exercises, "without its tag", change_tags("Exercise 9.4", [])),
    (about_exercises, "exercise 9.2 has no solution", drop("# Solution 9.2")),
    (about_exercises, "the anchor ch09-ex2", replace("ch09-ex2", "ch09-ex7")),
    (about_exercises, "does not call its exercise 9.3", replace("Exercise 9.3.", "Exercise 9.4.")),
    (about_exercises, "predict, then run", replace("Predict the shape, then", "Now just go on and", everywhere=True)),
    (about_exercises, "does not say: # Solution 9.3", replace("# Solution 9.3\n", "")),
    (about_exercises, "is not run", forget_to_run),
    (about_exercises, "is not run", change_tags("# Solution 9.1", ["solution", "skip-execution"])),
    (about_exercises, "says nothing", replace("Predict the shape, then run it and compare.", "Go.")),
    (about_quiz, "has 2 quiz questions", change_tags("Question 3", [])),
    (about_quiz, "question 1 has the choices ['a', 'b']", replace("- **c)** None.\n", "\n")),
    (about_quiz, "no folded answer", replace("<summary>Answer", "<summary>Well")),
    (about_quiz, "begins with the right choice", replace("**b).** It is so.", "It is b.")),
    (about_quiz, "why ['c'] is wrong", replace("Not c): no.", "And so on.")),
    (about_pictures, "a.png", replace("![a red apple]", "![]")),
    (about_pictures, "without a caption", replace("*An apple that nobody has ever seen.*", "An apple.")),
    (about_plain_text, "a directive as code", replace("Text.", "```{note}\nso\n```\n")),
    (about_plain_text, "shows ':::{note}'", replace("Text.", ":::{note}\nso\n:::\n")),
    (about_plain_text, "shows ':label: x'", replace("Text.", ":label: x\n\n")),
    (about_plain_text, "shows '{term}", replace("Text.", "A {term}`word <w>`.")),
    (about_plain_text, "shows '(here)='", replace("Text.", "(here)=\n\n")),
    (about_plain_text, "without blank lines", replace("Answer</summary>\n", "Answer</summary>")),
]  # fmt: skip


@pytest.mark.parametrize(("demand", "finding", "fault"), FAULTS)
def test_a_fault_is_found(demand, finding, fault):
    notebook = sound()
    assert [line for each in DEMANDS for line in each(notebook)] == []
    fault(notebook)
    assert any(finding in line for line in demand(notebook)), list(demand(notebook))


def test_what_folds_follows_from_the_tags():
    """JupyterLab and VS Code read `jupyter` and `collapsed`, Colab `cellView`."""
    new = nbformat.v4
    cells = [new.new_code_cell("1", metadata={"tags": tags}) for tags in ([], ["hide-input"], ["solution"])]
    plain, hidden, solution = CHECK.normalise(new.new_notebook(cells=cells)).cells
    assert plain.metadata == {}
    assert hidden.metadata.jupyter == {"source_hidden": True} and hidden.metadata.cellView == "form"
    assert solution.metadata.jupyter == {"source_hidden": True, "outputs_hidden": True} and solution.metadata.collapsed


def test_what_is_prose():
    text = "one\n```python\ncode\n```\n````{note}\ntwo\n```\ncode\n```\nthree\n````\n:::{tip}\nfour\n:::\nfive"
    assert [line for line in prose(text).splitlines() if "{" not in line] == ["one", "two", "three", "four", "five"]


def test_spelling_is_checked(tmp_path, monkeypatch, capsys):
    page, chapter = tmp_path / "page.md", tmp_path / "chapter.ipynb"
    page.write_text("A behavior of `color`, teh grey.\n```\nteh color\n```\n[the center](teh.md)\n", "utf-8")
    code = '"""A gray day."""\n\ncolor = "gray teh"  # recieve it\n'
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), chapter)
    monkeypatch.setattr(sys, "argv", ["spelling.py", str(page), str(chapter)])
    assert SPELLING.main() == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "chapter.ipynb cell-000:1: gray ==> grey",
        "chapter.ipynb cell-000:3: recieve ==> receive",
        "chapter.ipynb cell-000:3: teh ==> the",
        "page.md:1: behavior ==> behaviour",
        "page.md:1: teh ==> the",
        "page.md:5: center ==> centre",
    ]
    page.write_text("The behaviour of colour in the centre.\n", "utf-8")
    monkeypatch.setattr(sys, "argv", ["spelling.py", str(page)])
    assert SPELLING.main() == 0 and capsys.readouterr().out == ""
