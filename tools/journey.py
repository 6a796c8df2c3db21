"""The journey of a prompt as a figure: book/_static/journey-NN.svg, with the stage of chapter NN lit.

python tools/journey.py            write the figures
python tools/journey.py --check    write nothing; exit 1 if one differs
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "book" / "_static"
STAGES = [  # chapters, words, x, y, width
    (("01",), "Tokenizer", 108, 84, 96),
    (("02", "03"), "Text encoder", 262, 84, 112),
    (("06",), "Time", 446, 18, 72),
    (("07",), "U-Net", 446, 84, 72),
    (("10",), "Guidance", 546, 84, 86),
    (("08",), "Sampler", 546, 150, 86),
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
    """The figure of one chapter; 00 and 12 light all of it."""
    whole = chapter in ("00", "12")
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


def main() -> int:
    stale = []
    for number in range(13):
        path, text = FOLDER / f"journey-{number:02d}.svg", journey(f"{number:02d}")
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text, "utf-8")
    if "--check" in sys.argv and stale:
        print("stale; run tools/journey.py:", ", ".join(stale))
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
