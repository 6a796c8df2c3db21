"""The pages around the chapters: glossary, notation, names elsewhere, messages, bibliography, links, the map."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from itertools import product

import nbformat
import pytest
from diffusers import DDIMScheduler
from repository import ROOT, tool

from sdlearn.checkpoint.dialects import CLIP_RULES, VAE_RULES, rename
from sdlearn.checkpoint.load import empty
from sdlearn.checkpoint.load import rules as rules_of
from sdlearn.clip import CLIPTextConfig, CLIPTextEncoder
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from one_source import Names, terms  # noqa: E402
from one_source import page as translate

BOOK = ROOT / "book"
CHAPTERS = {path.name[:2]: path for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))}
PAGES = {path.name: path.read_text("utf-8") for path in sorted(BOOK.glob("*.md"))}
CELLS = {n: nbformat.read(path, as_version=4).cells for n, path in CHAPTERS.items()}
PROSE = {n: "\n\n".join(c.source for c in cells if c.cell_type == "markdown") for n, cells in CELLS.items()}
CODE = {n: [c.source for c in cells if c.cell_type == "code"] for n, cells in CELLS.items()}


# --- the glossary
def test_the_glossary_is_sorted_and_names_nothing_twice():
    headings = [
        [word for word, _ in terms(line)] for line in re.findall(r"^## .+$", PAGES["glossary.md"], re.MULTILINE)
    ]
    names = [entry for entry, *_ in headings]
    assert names == sorted(names, key=str.lower)
    every = [name.lower() for entry in headings for name in entry]
    assert len(every) == len(set(every)) >= 80 and all(headings)
    for entry in PAGES["glossary.md"].split("\n## ")[1:]:
        chapter = re.search(r"\[Chapter\s+(\d\d)\]\((\d\d)_\w+\.ipynb\)\.$", entry.strip())
        assert chapter and chapter[1] == chapter[2], f"not an entry that ends with its chapter: {entry!r}"


FIELD = """adversary, DDIM, ELBO, Euler's method, frozen, InfoNCE, maximum likelihood, output projection,
perceptual loss, posterior, posterior collapse, prior, probability flow, residual connection, residual stream, score,
self-attention, skip connection, temperature, upsampling, classifier-free guidance, epsilon prediction, v-prediction,
negative prompt, warm-up, weight tying, zero terminal SNR""".replace("\n", " ").split(", ")


def test_the_words_of_the_field_are_defined_and_linked_from_the_chapter_that_introduces_them():
    orphans, defined = [], set()
    for entry in PAGES["glossary.md"].split("\n## ")[1:]:
        found, chapter = [*terms("## " + entry)], re.search(r"\[Chapter\s+(\d\d)\]", entry)[1]
        defined |= {word for word, _ in found}
        if not any(f"(glossary.md#{anchor})" in PROSE[chapter] for _, anchor in found):
            orphans.append(found)
    assert orphans == [] and len(defined) > 190
    assert set(FIELD) - defined == set()


# --- the notation
def names_in(sources: list[str]) -> set[str]:
    """Every name that some code uses: variables, arguments, attributes, functions."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            for attribute in ("id", "arg", "attr", "name"):
                found.add(getattr(node, attribute, None))
    return found


def rows(text: str) -> list[list[str]]:
    """The body rows of all tables on a page, cell by cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    bodies = [line for i, line in enumerate(lines) if not set(line) <= set("|- ") and not _is_head(lines, i)]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in bodies]


def _is_head(lines: list[str], i: int) -> bool:
    return i + 1 < len(lines) and set(lines[i + 1]) <= set("|- ")


def test_the_names_of_the_notation_are_those_of_the_code():
    known, checked = {n: names_in(sources) for n, sources in CODE.items()}, 0
    for row in rows(PAGES["notation.md"]):
        chapter = re.search(r"\[(\d\d)\]\(\1_\w+\.ipynb\)", row[-1])
        assert chapter, f"a row of the notation names no chapter: {row}"
        for name in re.findall(r"`(\w+)`", row[0]):
            assert name in known[chapter[1]], f"the code of chapter {chapter[1]} has no {name!r}"
            checked += 1
    assert checked > 30


def test_the_sizes_of_the_notation_are_those_of_the_models():
    unet, text, page = UNetConfig(), CLIPTextConfig(), {row[0]: row for row in rows(PAGES["notation.md"])}
    widths = [c // n for c, n in zip(unet.channels, unet.heads, strict=True)]
    assert page["S"][2] == str(text.positions) and page["D"][2] == str(text.width) == str(unet.context_width)
    assert page["E"][2] == str(unet.time_width) and page["T"][2] == "4,096 at most"
    heads = f"{max(unet.heads)} in the U-Net, {text.heads} in the text encoder, 1 in the VAE"
    assert page["N"][2] == heads
    others = f"{text.width // text.heads} in the text encoder, {VAEConfig().channels[-1]} in the VAE"
    assert page["K"][2] == f"{min(widths)} to {max(widths)} in the U-Net, {others}"
    assert page["C"][2] == f"{min(unet.channels)} to {max(unet.channels)} in the U-Net"


# --- names elsewhere
def value_of(expression: str, i: int, j: int) -> int:
    """3i+j+2 at some i and j: a sum of multiples of i, of j and of a number."""
    total = 0
    for sign, digits, letter in re.findall(r"([+-]?)(\d*)([ij]?)", expression):
        if digits or letter:
            total += (-1 if sign == "-" else 1) * int(digits or 1) * {"i": i, "j": j, "": 1}[letter]
    return total


def expand(pattern: str, i: int, j: int) -> str:
    return re.sub(r"\{([^{}]+)\}", lambda match: str(value_of(match[1], i, j)), pattern)


def span(text: str, letter: str) -> range:
    found = re.search(letter + r" = (\d+)(?: to (\d+))?", text)
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(1)


def rosetta_triples(section: str) -> set[tuple[str, str, str]]:
    """All names that the tables of one network stand for, as the page says it."""
    head, *insides = section.split("\n### Inside ")
    parts = {text.split(" of ")[0]: rows(text) for text in insides}
    found = set()
    for ours, theirs, ldm, _ in rows(head):
        ours, _, about = ours.partition("<br>")  # what it is; the values of i; those of j
        what, _, spans = about.partition("; ")
        patterns = [name.strip("`") for name in (ours, theirs, ldm)]
        inner = parts[what] if patterns[0].endswith(".") else [["", "", ""]]
        for i, j, piece in product(span(spans, "i"), span(spans, "j"), inner):
            pieces = (cell.partition("<br>")[0].strip("`") for cell in piece[:3])
            names = (expand(p, i, j) + q for p, q in zip(patterns, pieces, strict=True))
            found.add(tuple(names))
    return found


def test_patterns_are_expanded_rightly():
    assert expand("up.{4i+j}.resnet.", 2, 1) == "up.9.resnet."
    assert [expand(p, 1, 0) for p in ("a.{3-i}", "a.{3i+2}", "a.{i}.0", "b.7")] == ["a.2", "a.5", "a.1.0", "b.7"]
    assert list(span("i = 1 to 3; j = 0 to 2", "i")) == [1, 2, 3] and list(span("", "j")) == [0]


UNET, VAE_SIZES = UNetConfig(), VAEConfig()
NETWORKS = {
    "The U-Net": (UNet, UNET, rules_of(UNET), rules_of(UNET, ldm=True)),
    "The VAE": (VAE, VAE_SIZES, VAE_RULES, rules_of(VAE_SIZES, ldm=True)),
    "The text encoder": (CLIPTextEncoder, CLIPTextConfig(), CLIP_RULES, CLIP_RULES),
}


@pytest.mark.parametrize("title", NETWORKS)
def test_the_page_of_names_covers_every_tensor(title):
    make, config, rules, ldm_rules = NETWORKS[title]
    section = PAGES["rosetta.md"].split(f"\n## {title}\n")[1].split("\n## ")[0]
    names = list(empty(make, config).state_dict())
    wanted = {
        tuple(theirs.rpartition(".")[0] for theirs in (name, rename(name, rules), rename(name, ldm_rules)))
        for name in names
    }
    found = rosetta_triples(section)
    assert wanted <= found, f"not on the page: {sorted(wanted - found)[:3]}"
    # What is not there is a shortcut of a ResBlock that keeps its width; the page says so.
    assert {ours.rpartition(".")[2] for ours, _, _ in found - wanted} <= {"conv_shortcut"}
    assert len(found) < len(section) / 10 or title != "The U-Net"  # patterns, not lists


def test_the_page_of_names_is_in_sync(monkeypatch, tmp_path, capsys):
    rosetta = tool("rosetta")
    monkeypatch.setattr(sys, "argv", ["rosetta.py", "--check"])
    assert rosetta.main() == 0
    stale = tmp_path / "rosetta.md"
    stale.write_text(PAGES["rosetta.md"].replace("`out.2`", "`out.3`"), "utf-8")
    monkeypatch.setattr(rosetta, "PAGE", stale)
    assert rosetta.main() == 1 and "stale" in capsys.readouterr().out


def resolve(path: str):
    """A dotted path, perhaps with arguments in parentheses, -> the object; fails if anything of it is not there."""
    owner, _, arguments = path.removesuffix(")").partition("(")
    words = owner.split(".")
    for cut in range(len(words), 0, -1):
        try:
            found, rest = importlib.import_module(".".join(words[:cut])), words[cut:]
            break
        except ModuleNotFoundError:
            continue
    for word in rest:
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[word] if word in fields else getattr(found, word)
    for argument in filter(None, arguments.split(", ")):
        assert argument in inspect.signature(found).parameters, f"{owner} takes no {argument}"
    return found


def test_our_words_on_the_page_of_names_exist():
    rosetta = tool("rosetta")
    for table in (rosetta.CLASSES, rosetta.SIZES):
        for ours, *_ in rosetta.rows_of(table):
            resolve(f"sdlearn.{ours}")
    fields = importlib.import_module("sdlearn.request").Request.__dataclass_fields__
    assert {ours for ours, *_ in rosetta.rows_of(rosetta.ARGUMENTS)} == fields.keys()
    with pytest.raises(AttributeError):
        resolve("sdlearn.unet.UNetConfig.colours")
    with pytest.raises(AssertionError):
        resolve("sdlearn.unet.UNet.forward(colour)")


def test_the_words_of_diffusers_on_the_page_of_names_exist():
    rosetta, config = tool("rosetta"), importlib.import_module("sdlearn.checkpoint.configs")
    for table in (rosetta.CLASSES, rosetta.ARGUMENTS):
        for _, theirs, *_ in rosetta.rows_of(table):
            if theirs and not theirs.endswith(".config"):
                resolve(theirs)
    keys = {
        "unet": config.unet_to_json(UNetConfig(), 64), "vae": config.vae_to_json(VAEConfig(), 512),
        "clip": config.text_to_json(CLIPTextConfig()), "schedule": DDIMScheduler().config,
        "prediction": DDIMScheduler().config,
    }  # fmt: skip
    for ours, theirs, *_ in rosetta.rows_of(rosetta.SIZES):
        assert not theirs or theirs in keys[ours.partition(".")[0]], f"diffusers has no {theirs} for {ours}"


def test_no_field_of_the_schedule_is_missing_on_the_page_of_names():
    schedule = importlib.import_module("sdlearn.schedule").Schedule
    told = {row[0].strip("`") for row in rows(PAGES["rosetta.md"])}
    assert {f"Schedule.{field.name}" for field in dataclasses.fields(schedule)} <= told


# --- the messages
GAP = "…"  # stands for a value in a message


def messages() -> dict[str, re.Pattern]:
    """Every ValueError of the modules that chapters own, and of the command line -> what a message of it looks like."""
    found = {}
    for path in sorted((ROOT / "src" / "sdlearn").rglob("*.py")):
        source = path.read_text("utf-8")
        if "\nExported from book/" not in source and path.stem not in ("cli", "evaluate", "disk"):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ValueError":
                (text,) = node.args
                values = text.values if isinstance(text, ast.JoinedStr) else [text]
                parts = [value.value if isinstance(value, ast.Constant) else None for value in values]
                pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
                found["".join(GAP if part is None else part for part in parts)] = re.compile(pattern)
    return found


def told_messages(page: str) -> list[str]:
    return [re.sub(r"^`+ ?|`+$", "", row[0]).strip() for row in rows(page.split("\n## Messages\n")[1])]


def test_every_message_is_explained_and_every_explained_one_exists():
    known, told = messages(), told_messages(PAGES["troubleshooting.md"])
    assert len(known) > 80 and len(told) == len(set(told))
    missing = [message for message, form in known.items() if not any(map(form.fullmatch, told))]
    assert not missing, f"add to book/troubleshooting.md: {missing}"
    strange = [text for text in told if not any(form.fullmatch(text) for form in known.values())]
    assert not strange, f"sdlearn says no such thing: {strange}"


# --- for teachers
def test_every_chapter_has_an_exercise_to_assign():
    told = set(re.findall(r"\(\d\d_\w+\.ipynb#ch(\d\d)-ex\d+\)", PAGES["teaching.md"]))
    assert told == CHAPTERS.keys(), f"the teacher's page assigns no exercise of {sorted(CHAPTERS.keys() - told)}"


# --- the first page
def test_the_map_leads_to_every_chapter():
    page = (BOOK / "_static" / "map.html").read_text("utf-8")
    assert "```{raw} html\n:file: _static/map.html\n```" in translate(PAGES["index.md"], "index", Names({}, {}))
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert re.findall(r'<a href="(\w+)\.html"', drawing) == [path.stem for path in CHAPTERS.values()]
        assert len(re.findall(r'aria-label="Chapter \d\d: ', drawing)) == len(CHAPTERS)
    assert page.count("<svg") == 2


def test_the_table_of_contents_has_every_page_and_the_first_page_names_them():
    contents = re.findall(r"file: book/(\S+)", (ROOT / "_toc.yml").read_text("utf-8"))
    assert sorted([*contents, "index"]) == sorted(path.stem for path in [*CHAPTERS.values(), *BOOK.glob("*.md")])
    for name in contents:
        assert re.search(rf"\]\({name}\.(ipynb|md)\)", PAGES["index.md"]), f"the first page does not link {name}"
