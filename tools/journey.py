"""The journey of a prompt as a figure: book/_static/journey-NN.svg, with the stage of chapter NN lit; and as a map to
click, book/_static/map.html, which the first page includes: one drawing for wide screens, one for phones.

python tools/journey.py            write the figures
python tools/journey.py --check    write nothing; exit 1 if one differs
"""

from __future__ import annotations

import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent / "book"
FOLDER = BOOK / "_static"
STAGES = [  # chapters, words, x, y, width
    (("01",), "Tokenizer", 108, 84, 96),
    (("02", "03"), "Text encoder", 262, 84, 112),
    (("06",), "Time", 446, 18, 72),
    (("07",), "U-Net", 446, 84, 72),
    (("10",), "Guidance", 546, 84, 86),
    (("08", "13"), "Sampler", 546, 150, 86),
    (("05",), "VAE decoder", 714, 84, 104),
    (("04",), "Scenes", 108, 226, 96),
    (("09",), "Training", 262, 226, 112),
    (("11",), "Weights", 446, 226, 72),
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


def stage(chapters: tuple[str, ...], words: str, x: int, y: int, width: int, lit: bool) -> str:
    fill, ink, line = ("#d2612f", "#ffffff", "#a8481d") if lit else ("#eef2f5", "#33404a", "#9fb0bc")
    middle = x + width / 2
    numbers = ", ".join(chapters)
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="40" rx="8" fill="{fill}" stroke="{line}" stroke-width="1.5"/>'
        f'<text x="{middle}" y="{y + 18}" text-anchor="middle" font-weight="600" fill="{ink}">{words}</text>'
        f'<text x="{middle}" y="{y + 33}" text-anchor="middle" font-size="10.5" fill="{ink}">{numbers}</text>'
    )


def journey(chapter: str) -> str:
    """The figure of one chapter; 00, 12 and 19 light all of it."""
    whole = chapter in ("00", "12", "19")
    parts = [stage(*s, lit=whole or chapter in s[0]) for s in STAGES]
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
NAMES = {
    "00": "The journey", "01": "Tokenizer", "02": "Attention", "03": "CLIP", "04": "Scenes", "05": "VAE", "06": "Time",
    "07": "U-Net", "08": "Sampler", "09": "Training", "10": "Guidance", "11": "Weights", "12": "Pipeline",
    "13": "Samplers", "19": "Speed",
}  # fmt: skip
SPOKEN = {
    "00": "The journey: the whole way on one page", "12": "Pipeline: the whole way in one class",
    "13": "Samplers: fewer looks, the same picture", "19": "Speed and memory: the same for less",
}  # fmt: skip
WIDE = {
    "size": (760, 442),
    "boxes": {  # chapter: x, y, width
        "00": (10, 8, 740), "01": (124, 74, 88), "02": (268, 74, 84), "03": (358, 74, 72), "06": (246, 166, 80),
        "07": (344, 166, 86), "10": (448, 166, 96), "08": (562, 166, 84), "04": (10, 278, 88), "09": (122, 278, 92),
        "11": (238, 278, 92), "05": (562, 278, 84), "12": (10, 342, 740), "13": (10, 396, 365), "19": (385, 396, 365),
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
    "size": (360, 872),
    "boxes": {
        "00": (10, 8, 340), "01": (100, 98, 160), "02": (20, 180, 155), "03": (185, 180, 155), "06": (24, 280, 150),
        "07": (186, 280, 150), "10": (24, 352, 150), "08": (186, 352, 150), "05": (100, 476, 160), "12": (10, 614, 340),
        "04": (10, 706, 104), "09": (128, 706, 104), "11": (246, 706, 104), "13": (10, 764, 340),
        "19": (10, 818, 340),
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


def box_to_click(chapter: str, x: int, y: int, width: int) -> str:
    page = next(BOOK.glob(f"{chapter}_*.ipynb")).stem
    spoken, middle = SPOKEN.get(chapter, NAMES[chapter]), x + width / 2
    if width > 300:  # one line
        words = f'<tspan class="name">{chapter}</tspan> {spoken}'
        label = f'<text x="{middle:g}" y="{y + 27}" text-anchor="middle">{words}</text>'
    else:
        label = (
            f'<text class="name" x="{middle:g}" y="{y + 19}" text-anchor="middle">{NAMES[chapter]}</text>'
            f'<text x="{middle:g}" y="{y + 37}" text-anchor="middle">{chapter}</text>'
        )
    box = f'<rect class="box" x="{x}" y="{y}" width="{width}" height="44" rx="8"/>'
    return f'<a href="{page}.html" aria-label="Chapter {chapter}: {spoken}">{box}{label}</a>'


def thing(words: str, x: int, y: int) -> str:
    return f'<text class="thing" x="{x}" y="{y}" text-anchor="middle">{words}</text>'


def map_of(plan: dict, kind: str) -> str:
    """One drawing, as an inline SVG whose boxes are links."""
    width, height = plan["size"]
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
        *(box_to_click(chapter, *place) for chapter, place in sorted(plan["boxes"].items())),
    ]
    title = "The journey of a prompt: a map of the chapters"
    head = f'<svg class="journey-map journey-{kind}" viewBox="0 0 {width} {height}" role="group" aria-label="{title}">'
    return f"{head}{''.join(parts)}</svg>"


def map_page() -> str:
    return f"<style>{STYLE}</style>\n{map_of(WIDE, 'wide')}\n{map_of(TALL, 'tall')}\n"


def main() -> int:
    chapters = [f"{number:02d}" for number in (*range(14), 19)]
    texts = {f"journey-{chapter}.svg": journey(chapter) for chapter in chapters} | {"map.html": map_page()}
    there = {path.name: path.read_text("utf-8") for path in FOLDER.iterdir() if path.name in texts}
    stale = [name for name, text in texts.items() if there.get(name) != text]
    if "--check" in sys.argv:
        if stale:
            print("stale; run tools/journey.py:", ", ".join(stale))
        return int(bool(stale))
    for name in stale:
        (FOLDER / name).write_text(texts[name], "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
