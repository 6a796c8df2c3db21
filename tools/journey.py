"""book/chapters.toml -> all that lists the chapters: the journey of a prompt as a figure, book/_static/journey-NN.svg,
with the stage of chapter NN lit; the map to click on the first page, book/_static/map.html, one drawing for wide
screens and one for phones; the tables of README.md and book/index.md; _toc.yml. And the first code of README.md,
from src/sdlearn/minimal.py.

python tools/journey.py            write them
python tools/journey.py --check    write nothing; exit 1 if one differs
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"


@dataclass(frozen=True)
class Chapter:
    """A row of chapters.toml."""

    file: str
    title: str
    maps: str
    builds: str
    modules: list[str]
    minutes: int
    part: str = ""
    stage: str = ""
    about: str = ""
    short: str = ""

    @property
    def number(self) -> str:
        return self.file[:2]


def read_chapters(book: Path = BOOK) -> list[Chapter]:
    """The chapters whose notebooks are there, in order."""
    rows = tomllib.loads((book / "chapters.toml").read_text("utf-8"))["chapter"]
    return [Chapter(**row) for row in rows if (book / f"{row['file']}.ipynb").exists()]


CHAPTERS = read_chapters()
STAGES = [  # words, x, y, width
    ("Tokenizer", 108, 84, 96),
    ("Text encoder", 262, 84, 112),
    ("Time", 446, 18, 72),
    ("U-Net", 446, 84, 72),
    ("Guidance", 546, 84, 86),
    ("Sampler", 546, 150, 86),
    ("VAE decoder", 714, 84, 104),
    ("Scenes", 108, 226, 96),
    ("Training", 262, 226, 112),
    ("Weights", 446, 226, 72),
]
THINGS = [
    ("“a red apple”", 43, 108),
    ("tokens", 233, 98),
    ("context", 410, 98),
    ("latents", 676, 98),
    ("picture", 872, 108),
]
ARROWS = [  # from x, y to x, y
    (88, 104, 106, 104), (204, 104, 260, 104), (374, 104, 444, 104), (482, 58, 482, 82), (518, 104, 544, 104),
    (589, 124, 589, 148), (632, 104, 712, 104), (818, 104, 840, 104), (204, 246, 260, 246), (374, 246, 444, 246),
]  # fmt: skip
DEFS = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z" fill="#4a4a4a"/></marker></defs>'
)


def stage(words: str, x: int, y: int, width: int, chapter: Chapter) -> str:
    lit = chapter.stage in ("", words)
    fill, ink, line = ("#d2612f", "#ffffff", "#a8481d") if lit else ("#eef2f5", "#33404a", "#9fb0bc")
    middle = x + width / 2
    numbers = ", ".join(c.number for c in CHAPTERS if c.stage == words)
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="40" rx="8" fill="{fill}" stroke="{line}" stroke-width="1.5"/>'
        f'<text x="{middle}" y="{y + 18}" text-anchor="middle" font-weight="600" fill="{ink}">{words}</text>'
        f'<text x="{middle}" y="{y + 33}" text-anchor="middle" font-size="10.5" fill="{ink}">{numbers}</text>'
    )


def journey(chapter: Chapter) -> str:
    """The figure of one chapter; a chapter without a stage lights all of it."""
    parts = [stage(*place, chapter) for place in STAGES]
    parts += [
        f'<text x="{x}" y="{y}" text-anchor="middle" font-style="italic">{words}</text>' for words, x, y in THINGS
    ]
    line = 'stroke="#4a4a4a" stroke-width="1.5" fill="none" marker-end="url(#head)"'
    parts += [f'<path d="M{a} {b} L{c} {d}" {line}/>' for a, b, c, d in ARROWS]
    dashed = line.replace("fill", 'stroke-dasharray="4 4" fill')
    parts += [
        f'<path d="M546 170 L482 170 L482 126" {line}/>',  # the loop
        '<rect x="432" y="8" width="214" height="200" rx="12" fill="none" stroke="#9fb0bc" stroke-dasharray="5 4"/>',
        '<text x="640" y="26" text-anchor="end" fill="#5d6b75">50 times</text>',
        '<text x="442" y="203" font-style="italic">noise, less each time</text>',
        f'<path d="M482 224 L482 211" {dashed}/>',
        f'<path d="M464 224 L464 214 L318 214 L318 128" {dashed}/>',
        f'<path d="M500 224 L500 214 L766 214 L766 128" {dashed}/>',
        '<circle cx="872" cy="80" r="13" fill="#ea5a47" stroke="#222" stroke-width="2"/>'
        '<path d="M872 68 q1 -7 7 -8" stroke="#222" stroke-width="2" fill="none"/>',
    ]
    body = "".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 280" '
        'font-family="system-ui, sans-serif" font-size="13">'
        f"<title>The journey of a prompt</title>{DEFS}"
        f'<rect width="920" height="280" rx="10" fill="#ffffff"/>{body}</svg>\n'
    )


# --- the map to click
FURTHER = "V. Going further"  # the part whose boxes stand in rows below the map
WIDE = {
    "size": (760, 386),
    "row": 4,
    "boxes": {  # chapter: x, y, width
        "00": (10, 8, 740), "01": (124, 74, 88), "02": (268, 74, 84), "03": (358, 74, 72), "06": (246, 166, 80),
        "07": (344, 166, 86), "10": (448, 166, 96), "08": (562, 166, 84), "04": (10, 278, 88), "09": (122, 278, 92),
        "11": (238, 278, 92), "05": (562, 278, 84), "12": (10, 342, 740),
    },
    "arrows": ["M106 96H122", "M212 96H266", "M394 118V164", "M326 188H342", "M430 188H446", "M544 188H560",
               "M604 210V224H387V212", "M206 188H234", "M628 246V276", "M646 300H690", "M98 300H120", "M214 300H236"],
    "dashed": ["M284 278V248", "M330 300H560"],
    "frame": (236, 156, 424, 90),
    "things": {"“a red apple”": (53, 101), "tokens": (238, 89), "context": (426, 146), "noise": (182, 192),
               "noise, less each time": (496, 239), "50 times": (628, 148), "latents": (660, 266)},
    "apple": (712, 302),
}  # fmt: skip
TALL = {
    "size": (360, 754),
    "row": 2,
    "boxes": {
        "00": (10, 8, 340), "01": (100, 98, 160), "02": (20, 180, 155), "03": (185, 180, 155), "06": (24, 280, 150),
        "07": (186, 280, 150), "10": (24, 352, 150), "08": (186, 352, 150), "05": (100, 476, 160), "12": (10, 614, 340),
        "04": (10, 706, 104), "09": (128, 706, 104), "11": (246, 706, 104),
    },
    "arrows": ["M180 86V96", "M180 142V178", "M261 224V278", "M174 302H184", "M246 324V338H140V350", "M174 374H184",
               "M300 352V326", "M180 432V474", "M180 520V544", "M114 728H126", "M232 728H244"],
    "dashed": [],
    "frame": (10, 262, 340, 170),
    "things": {"“a red apple”": (180, 80), "tokens": (214, 166), "context": (296, 256), "noise": (46, 256),
               "noise, less each time": (180, 420), "50 times": (150, 256), "latents": (216, 458),
               "how the three networks learn:": (180, 692)},
    "apple": (180, 572),
}  # fmt: skip
STYLE = """
.journey-map { width: 100%; height: auto; margin: 0 auto 1.5rem; font: 14px system-ui, sans-serif; fill: #33404a }
.journey-map .box { fill: #eef2f5; stroke: #7d909e; stroke-width: 1.5 }
.journey-map .wire { fill: none; stroke: #5d6b75; stroke-width: 1.5 }
.journey-map .tip { fill: #5d6b75 }
.journey-map .name { font-weight: 600 }
.journey-map .thing { font-style: italic }
.journey-map a { text-decoration: none }
.journey-map a:hover .box { fill: #fbe3d6; stroke: #a8481d }
.journey-map a:focus-visible { outline: none }
.journey-map a:focus-visible .box { stroke: #a8481d; stroke-width: 4 }
html[data-theme="dark"] .journey-map { fill: #e3e9ee }
html[data-theme="dark"] .journey-map .box { fill: #2b343b; stroke: #8fa3b1 }
html[data-theme="dark"] .journey-map .wire { stroke: #a9b7c1 }
html[data-theme="dark"] .journey-map .tip { fill: #a9b7c1 }
html[data-theme="dark"] .journey-map a:hover .box { fill: #5a3320; stroke: #ef9467 }
html[data-theme="dark"] .journey-map a:focus-visible .box { stroke: #ef9467 }
.journey-tall { display: none; max-width: 26rem }
@media (max-width: 600px) { .journey-wide { display: none } .journey-tall { display: block } }
"""


def box_to_click(chapter: Chapter, x: int, y: int, width: int) -> str:
    name, middle = chapter.short or chapter.title, x + width / 2
    spoken = chapter.about or chapter.title
    if width > 300:  # one line
        words = f'<tspan class="name">{chapter.number}</tspan> {spoken}'
        label = f'<text x="{middle:g}" y="{y + 27}" text-anchor="middle">{words}</text>'
    else:
        label = (
            f'<text class="name" x="{middle:g}" y="{y + 19}" text-anchor="middle">{name}</text>'
            f'<text x="{middle:g}" y="{y + 37}" text-anchor="middle">{chapter.number}</text>'
        )
    box = f'<rect class="box" x="{x}" y="{y}" width="{width}" height="44" rx="8"/>'
    return f'<a href="{chapter.file}.html" aria-label="Chapter {chapter.number}: {spoken}">{box}{label}</a>'


def places_of(plan: dict) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Chapter -> x, y, width of its box: drawn by hand, or, in the last part, in rows; and the height of it all."""
    width, height = plan["size"]
    further = [c.number for c in CHAPTERS if c.part == FURTHER]
    row = min(plan["row"], max(len(further), 1))
    each = (width - 20 - 8 * (row - 1)) // row
    places = {n: (10 + i % row * (each + 8), height + 10 + i // row * 52, each) for i, n in enumerate(further)}
    return plan["boxes"] | places, height + (4 - len(further) // -row * 52 if further else 0)


def thing(words: str, x: int, y: int) -> str:
    return f'<text class="thing" x="{x}" y="{y}" text-anchor="middle">{words}</text>'


def map_of(plan: dict, kind: str) -> str:
    """One drawing, as an inline SVG whose boxes are links."""
    width, (boxes, height) = plan["size"][0], places_of(plan)
    x, y, w, h = plan["frame"]
    tip = f'<marker id="tip-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    wire = f'class="wire" marker-end="url(#tip-{kind})"'
    cx, cy = plan["apple"]
    parts = [
        f'<defs>{tip}<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
        f'<rect class="wire" x="{x}" y="{y}" width="{w}" height="{h}" rx="12" stroke-dasharray="5 4"/>',
        *(f'<path d="{path}" {wire}/>' for path in plan["arrows"]),
        *(f'<path d="{path}" {wire} stroke-dasharray="4 4"/>' for path in plan["dashed"]),
        *(thing(words, *place) for words, place in plan["things"].items()),
        f'<circle cx="{cx}" cy="{cy}" r="16" fill="#ea5a47" stroke="#222" stroke-width="2"/>',
        f'<path d="M{cx} {cy - 15}q1 -8 9 -9" class="wire"/>',
        *(box_to_click(c, *boxes[c.number]) for c in CHAPTERS),
    ]
    title = "The journey of a prompt: a map of the chapters"
    head = f'<svg class="journey-map journey-{kind}" viewBox="0 0 {width} {height}" role="group" aria-label="{title}">'
    return f"{head}{''.join(parts)}</svg>"


def map_page() -> str:
    return f"<style>{STYLE}</style>\n{map_of(WIDE, 'wide')}\n{map_of(TALL, 'tall')}\n"


# --- tables and contents


def parts() -> list[tuple[str, list[Chapter]]]:
    """The parts of the book with their chapters; the first one has no name."""
    found: list[tuple[str, list[Chapter]]] = []
    for chapter in CHAPTERS:
        if not found or chapter.part not in ("", found[-1][0]):
            found.append((chapter.part, []))
        found[-1][1].append(chapter)
    return found


def module_file(module: str) -> str:
    room = (ROOT / "src" / "sdlearn" / module).is_dir()
    return f"`{module}/`" if room else f"`{module.replace('.', '/')}.py`"


def table(head: str, cells, folder: str) -> str:
    """A table of the chapters: cells(chapter) follow its link."""
    columns = head.count("|") - 1
    lines = [head, "|---" * columns + "|"]
    for part, chapters in parts():
        if part:
            lines.append(f"| **{part}** |" + " |" * (columns - 1))
        for c in chapters:
            lines.append(" | ".join([f"| [{c.number} {c.title}]({folder}{c.file}.ipynb)", *cells(c)]) + " |")
    return "\n".join(lines).replace("  |", " |")


def readme_table() -> str:
    return table(
        "| Chapter | What it builds | Module | Time |",
        lambda c: (c.maps, ", ".join(map(module_file, c.modules)), f"{c.minutes} min"),
        "book/",
    )


def index_table() -> str:
    return table("| Chapter | You build | Reading |", lambda c: (c.builds, f"{c.minutes} min"), "")


def contents() -> str:
    """_toc.yml: the parts, then the pages beside the chapters."""
    pages = "draw troubleshooting notation glossary rosetta teaching references".split()
    groups = [(part or "Begin", [c.file for c in chapters]) for part, chapters in parts()]
    groups.append(("Beside the chapters", [page for page in pages if (BOOK / f"{page}.md").exists()]))
    lines = ["# written by tools/journey.py from book/chapters.toml", "format: jb-book", "root: book/index", "parts:"]
    for part, files in groups:
        lines += [f"  - caption: {part}", "    chapters:", *(f"      - file: book/{file}" for file in files)]
    return "\n".join(lines) + "\n"


def minimal() -> str:
    """The code of minimal.py without its docstring: the first that README shows."""
    text = (ROOT / "src" / "sdlearn" / "minimal.py").read_text("utf-8")
    code = text.partition('"""\n\n')[2]
    return f"```python\n{code.strip()}\n```".replace("\n\n\n\n", "\n\n")


def filled(path: Path, **blocks: str) -> str:
    """A page with fresh text between the marks of each block: <!-- name --> ... <!-- name end -->."""
    page = path.read_text("utf-8")
    for name, fresh in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- {name} end -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            sys.exit(f"{path.name} has no {begin.strip()} ... {end}, where tools/journey.py writes")
        page = f"{before}{begin}\n{fresh}\n\n{end}{after}"
    return page


def texts() -> dict[Path, str]:
    """All that is written."""
    figures = {BOOK / "_static" / f"journey-{c.number}.svg": journey(c) for c in CHAPTERS}
    return figures | {
        BOOK / "_static" / "map.html": map_page(),
        ROOT / "_toc.yml": contents(),
        ROOT / "README.md": filled(ROOT / "README.md", chapters=readme_table(), minimal=minimal()),
        BOOK / "index.md": filled(BOOK / "index.md", chapters=index_table()),
    }


def main() -> int:
    wanted = texts()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv:
        if stale:
            print("not as book/chapters.toml says; run `make export`:", ", ".join(path.name for path in stale))
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path], "utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
