"""What every chapter of the book has: its sections, exercises with solutions that ran, a quiz, words for its names."""

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from myst_parser.mdit_to_docutils.base import default_slugify
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
CHAPTERS = [path for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))]
TEXTS = sorted([*BOOK.glob("*.ipynb"), *BOOK.glob("*.md"), *ROOT.glob("*.md")])
SECTIONS = (
    "Where we are", "What you will have at the end", "The idea", "By hand", "Build it", "The class", "Check it",
    "See it", "Break it", "Exercises", "Quiz", "Summary", "Read next",
)  # fmt: skip
NOT_RUN = {"skip-execution", "nbval-skip", "remove-cell", "raises-exception"}
EXERCISE = re.compile(r"^(`{3,})\{exercise\} *([^\n]*)\n:label: *(\S+)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
SOLUTION = re.compile(r"^`{3,}\{solution-(start|end)\} *(\S*)(.*?)^`{3,}$", re.MULTILINE | re.DOTALL)
QUESTION = re.compile(r"^\*\*Question \d+\.\*\*", re.MULTILINE)
ANSWER = re.compile(r"^:::\{admonition\} Answer\n:class: dropdown quiz\n(.*?)^:::$", re.MULTILINE | re.DOTALL)


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SPELLING = tool("spelling")


def markdown(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def prose(text: str) -> str:
    return "\n".join(line for _, line in SPELLING.prose(text))


def headings(text: str, level: str = "#+") -> list[str]:
    return re.findall(rf"^(?:{level}) +(.+?) *$", prose(text), re.MULTILINE)


# One function for each demand; it yields a line for each place where a chapter falls short.


def about_sections(notebook: NotebookNode) -> Iterator[str]:
    found = headings(markdown(notebook), "##")
    if found != list(SECTIONS):
        missing = [name for name in SECTIONS if name not in found]
        yield f"has not the thirteen sections in their order; missing: {missing}; there: {found}"


def about_exercises(notebook: NotebookNode) -> Iterator[str]:
    exercises = {m[3]: f"{m[2]}\n{m[4]}" for m in EXERCISE.finditer(markdown(notebook))}
    if len(exercises) < 4:
        yield f"has {len(exercises)} exercises; at least four are wanted"
    if not any(re.search(r"predict|before (you|running)", text, re.IGNORECASE) for text in exercises.values()):
        yield "has no exercise that says: predict, then run"
    yield from (f"exercise {label} says nothing" for label, text in exercises.items() if len(text.split()) < 8)
    solutions: dict[str, list[NotebookNode]] = {}
    inside = ""
    for cell in notebook.cells:
        marks = list(SOLUTION.finditer(cell.source)) if cell.cell_type == "markdown" else []
        if inside and not marks:
            solutions[inside].append(cell)
        for kind, label, options in (mark.groups() for mark in marks):
            if (kind == "start") == bool(inside):
                yield f"solution {label or inside} begins or ends inside another"
            if kind == "start" and label in solutions:
                yield f"exercise {label} has two solutions"
            if kind == "start" and ":class: dropdown" not in options:
                yield f"solution {label} is not folded"
            inside = label if kind == "start" else ""
            if inside:
                solutions[inside] = []
    if inside:
        yield f"solution {inside} does not end"
    for label in sorted(exercises.keys() ^ solutions.keys()):
        yield f"exercise {label} has no solution" if label in exercises else f"solution {label} has no exercise"
    for label, cells in solutions.items():
        code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
        words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
        if not code and words < 20:
            yield f"solution {label} holds neither code nor an answer"
        for cell in code:
            if cell.execution_count is None or NOT_RUN & set(cell.metadata.get("tags", [])):
                yield f"solution {label} has a cell that is not run: {cell.source.splitlines()[0]}"


def about_quiz(notebook: NotebookNode) -> Iterator[str]:
    questions = QUESTION.split(markdown(notebook))[1:]
    if len(questions) < 3:
        yield f"has {len(questions)} quiz questions; three are wanted"
    for i, text in enumerate(questions, start=1):
        choices = re.findall(r"^- \*\*([a-e])\)\*\* \S", text, re.MULTILINE)
        answers = ANSWER.findall(text)
        if len(choices) < 3 or choices != sorted(set(choices)):
            yield f"question {i} has the choices {choices}; three or more are wanted"
        right = re.match(r"\*\*([a-e])\)\.\*\* \S", answers[0]) if len(answers) == 1 else None
        if not right or right[1] not in choices:
            yield f"question {i} has no folded answer that begins with the right choice"
        elif silent := [c for c in choices if c != right[1] and not re.search(rf"\b{c}\)", answers[0])]:
            yield f"question {i} does not say why {silent} is wrong"


def exported(notebook: NotebookNode) -> list[str]:
    """The names that the modules of a chapter export."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    modules = re.findall(r"^#\| ?default_exp ([\w.]+)|^#\| ?export ([\w.]+)", code, re.MULTILINE)
    names = []
    for module in sorted({a or b for a, b in modules}):
        tree = ast.parse((ROOT / "src" / "sdlearn" / f"{module.replace('.', '/')}.py").read_text("utf-8"))
        lists = [node.value for node in tree.body if ast.unparse(node).startswith("__all__ =")]
        names += [name for one in lists for name in ast.literal_eval(one)]
    return names


def about_names(notebook: NotebookNode) -> Iterator[str]:
    spans = re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", prose(markdown(notebook)), re.DOTALL)
    said = {word for _, span in spans for word in re.findall(r"\w+", span)}
    yield from (f"exports {name} and never speaks of it" for name in exported(notebook) if name not in said)


def about_pictures(notebook: NotebookNode) -> Iterator[str]:
    text = prose(markdown(notebook))
    alts = [(m[2], m[1]) for m in re.finditer(r"!\[([^\]]*)\]\(([^)\s]+)", text)]
    for m in re.finditer(r"^`{3,}\{(?:image|figure)\} *(\S+)(.*?)^`{3,}", text, re.MULTILINE | re.DOTALL):
        alts.append((m[1], "".join(re.findall(r"^:alt: *(.*)", m[2], re.MULTILINE))))
    for m in re.finditer(r"<img\b[^>]*>", text):
        alts.append((m[0][:60], "".join(re.findall(r'alt="([^"]*)"', m[0]))))
    yield from (f"shows {name} without words for those who cannot see it" for name, alt in alts if len(alt.split()) < 3)


def about_formulas(notebook: NotebookNode) -> Iterator[str]:
    roles = re.findall(r"\{\w+\}`[^`]*\$[^`]*`", prose(markdown(notebook)))
    yield from (f"has a formula in a role, where it is not rendered: {role}" for role in roles)


DEMANDS: list[Callable[[NotebookNode], Iterator[str]]] = [
    about_sections, about_exercises, about_quiz, about_names, about_pictures, about_formulas,
]  # fmt: skip


@pytest.mark.parametrize("demand", DEMANDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_has_what_it_needs(path, demand):
    assert list(demand(nbformat.read(path, 4))) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_is_small(path):
    assert path.stat().st_size < 1_000_000


def test_all_chapters_are_looked_at():
    assert [path.name[:2] for path in CHAPTERS] == [*(f"{i:02d}" for i in range(13)), "19"]


# Links between the pages, and from README and CONTRIBUTING.


def text_of(path: Path) -> str:
    return markdown(nbformat.read(path, 4)) if path.suffix == ".ipynb" else path.read_text("utf-8")


def anchors(text: str) -> set[str]:
    """What a link may point to in a page: its headings, as MyST spells them, and its (labels)=."""
    found = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE)) | set(
        re.findall(r"^:label: *(\S+)", text, re.MULTILINE)
    )
    return found | {default_slugify(re.sub(r"[`*$]", "", heading)) for heading in headings(text)}


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


# The demands can fail: a sound chapter, and one fault after the other.


def sound() -> NotebookNode:
    new = nbformat.v4
    cells = [new.new_markdown_cell("# 99 A sound chapter")]
    for name in SECTIONS:
        cells.append(
            new.new_markdown_cell(
                f"## {name}\n\nThe word `guide` and `rescale`, and `Guided(unet)`. ![a red apple](a.png)"
            )
        )
        for k in range(4 * (name == "Exercises")):
            text = "Predict the shape, then run the cell and compare it."
            cells += [
                new.new_markdown_cell(f"```{{exercise}} Number {k}\n:label: ch99-ex{k}\n{text}\n```"),
                new.new_markdown_cell(f"```{{solution-start}} ch99-ex{k}\n:class: dropdown\n```"),
                new.new_code_cell("print(1)", execution_count=k + 1),
                new.new_markdown_cell("```{solution-end}\n```"),
            ]
        for k in range(1, 1 + 3 * (name == "Quiz")):
            question = f"\n\n**Question {k}.** Which one?\n\n- **a)** This.\n- **b)** That.\n- **c)** None.\n\n"
            answer = ":::{admonition} Answer\n:class: dropdown quiz\n**b).** It is so. Not a): no. Not c): no.\n:::"
            cells[-1].source += question + answer
    cells.append(new.new_code_cell("#| default_exp guidance\n#| export\nimport torch", execution_count=9))
    return new.new_notebook(cells=cells)


def replace(old: str, by: str) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        cell = next(cell for cell in notebook.cells if old in cell.source)
        cell.source = cell.source.replace(old, by)

    return change


def replace_all(old: str, by: str) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, by)

    return change


def forget_to_run(notebook: NotebookNode) -> None:
    next(cell for cell in notebook.cells if cell.cell_type == "code").execution_count = None


def tag_away(notebook: NotebookNode) -> None:
    next(cell for cell in notebook.cells if cell.cell_type == "code").metadata["tags"] = ["skip-execution"]


def drop_code(notebook: NotebookNode) -> None:
    notebook.cells.remove(next(cell for cell in notebook.cells if cell.cell_type == "code"))


FAULTS = [
    (about_sections, "missing: ['Break it']", replace("## Break it", "### Break it")),
    (about_sections, "in their order", replace("## See it", "## Look at it")),
    (about_exercises, "has 3 exercises", replace("```{exercise} Number 1\n", "```{note}\n")),
    (about_exercises, "solution ch99-ex1 has no exercise", replace("```{exercise} Number 1\n", "```{note}\n")),
    (about_exercises, "exercise ch99-ex2 has no solution", replace("start} ch99-ex2", "start} ch99-ex9")),
    (about_exercises, "predict, then run", replace_all("Predict the shape, then", "Now just go on and")),
    (about_exercises, "is not folded", replace("ch99-ex3\n:class: dropdown", "ch99-ex3")),
    (about_exercises, "begins or ends inside", replace("```{solution-end}\n```", "Well.")),
    (about_exercises, "is not run", forget_to_run),
    (about_exercises, "is not run", tag_away),
    (about_exercises, "neither code nor an answer", drop_code),
    (about_exercises, "says nothing", replace("Predict the shape, then run the cell and compare it.", "Go.")),
    (about_quiz, "has 2 quiz questions", replace("**Question 2.**", "Question 2.")),
    (about_quiz, "question 1 has the choices ['a', 'b']", replace("- **c)** None.\n", "\n")),
    (about_quiz, "no folded answer", replace(":class: dropdown quiz", ":class: note")),
    (about_quiz, "begins with the right choice", replace("**b).** It is so.", "It is b.")),
    (about_quiz, "why ['c'] is wrong", replace("Not c): no.", "And so on.")),
    (about_names, "exports rescale", replace_all("`rescale`", "rescale")),
    (about_names, "exports Guided", replace_all("`Guided(unet)`", "guided")),
    (about_pictures, "a.png", replace("![a red apple]", "![]")),
    (about_formulas, "{term}`so $x$", replace("The word", "{term}`so $x$ <x>` and")),
]  # fmt: skip


@pytest.mark.parametrize(("demand", "finding", "fault"), FAULTS)
def test_a_fault_is_found(demand, finding, fault):
    notebook = sound()
    assert [line for each in DEMANDS for line in each(notebook)] == []
    fault(notebook)
    assert any(finding in line for line in demand(notebook)), list(demand(notebook))


def test_a_broken_link_is_found():
    here, link = BOOK / "index.md", "[a](00_journey.ipynb#{})"
    assert broken_links(here, f"{link.format('the-idea')} [c](https://example.org/x) `[d](e)`") == []
    assert broken_links(here, f"[a](13_none.ipynb) {link.format('no')}") == ["13_none.ipynb", "00_journey.ipynb#no"]
    assert broken_links(CHAPTERS[0], "[a](#nowhere)") == ["#nowhere"]
    assert anchors("## A heading, `code` & more\n\n(label)=\n```\n# no heading\n```") == {
        "a-heading-code--more",
        "label",
    }


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


# No chapter uses a term before it is introduced.

EVERYDAY = {  # words of the glossary that say what they say in any book
    "caption", "diffusers", "level", "pipeline", "recipe", "score", "strength",
}  # fmt: skip
EARLY = {  # used before their chapter, in passing, where the sentence says enough
    ("attention", "01"), ("checkpoint", "03"), ("plateau", "03"), ("latent diffusion", "04"), ("beta", "05"),
    ("bfloat16", "05"), ("noise schedule", "05"), ("image-to-image", "07"), ("offset noise", "08"),
    ("guidance scale", "09"),
}  # fmt: skip


def introduced() -> dict[str, str]:
    """Each term of the glossary -> the number of the chapter that introduces it."""
    text = (BOOK / "glossary.md").read_text("utf-8")
    blocks = text[text.index("```{glossary}") :].split("\n\n")
    terms = {}
    for block in blocks:
        head, _, rest = block.removeprefix("```{glossary}\n").partition("\n")
        if chapter := re.search(r"\[Chapter\s+(\d\d)\]", rest):
            terms[head.strip()] = chapter[1]
    return terms


def said_plainly(text: str) -> str:
    """Prose without what explains itself: links, roles, code, formulas; in exercises, without their titles' marks."""
    for pattern in (r"\{\w+\}`[^`]*`", r"`[^`\n]*`", r"\$[^$]*\$", r"\[[^\]]*\]\([^)]*\)"):
        text = re.sub(pattern, " ", text)
    return text


def premature(text: str, chapter: str, terms: dict[str, str], known: str) -> list[str]:
    """Terms that a chapter uses before the one that introduces them; what `known` says already does not count."""
    plain, early = said_plainly(text), []
    for term, home in terms.items():
        word = re.compile(rf"(?<![\w-]){re.escape(term)}(?:s|es)?(?![\w-])", re.IGNORECASE * term.islower())
        if home > chapter and word.search(plain) and not word.search(known):
            early.append(term)
    return early


def test_no_chapter_uses_a_term_before_it_is_introduced():
    """Chapter 00 shows the whole way, and names the networks and what goes between them: these names are known."""
    journey, *others = CHAPTERS
    known, terms = text_of(journey), introduced()
    assert len(terms) > 100
    early = ((path.name[:2], premature(prose(text_of(path)), path.name[:2], terms, known)) for path in others)
    found = {(term, chapter) for chapter, names in early for term in names if term not in EVERYDAY}
    assert found <= EARLY, found - EARLY
    assert found >= EARLY, f"no longer needed: {EARLY - found}"


def test_a_premature_term_is_found():
    terms = {"offset noise": "09", "LoRA": "15"}
    text = "With offset noises and a LoRA; a lora, `offset noise`, [offset noise](09.ipynb), {term}`LoRA`."
    assert premature(text, "08", terms, "") == ["offset noise", "LoRA"]
    assert premature(text, "09", terms, "") == ["LoRA"] and premature(text, "08", terms, "a LoRA") == ["offset noise"]
    assert premature(text.partition(";")[2], "08", terms, "") == []
