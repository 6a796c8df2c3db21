"""the parts of a U-Net, as traced -> its figure, to scale. It knows no model."""

from typing import Any

from IPython.display import HTML

from sdlearn.book.show import COLOURS

BLUE, _, GREEN, PURPLE, GOLD, _, GREY, _ = COLOURS
LOOK = {  # colour, anchor of the section that builds it, name in the key
    "res": (BLUE, "resblock", "ResBlock; dot: time enters"),
    "text": (GREEN, "transformer", "transformer; triangle: words enter"),
    "skip": (PURPLE, "skips", "skip connection, a map from the way down"),
    "size": (GOLD, "resample", "downsampling, upsampling"),
    "conv": (GREY, "forward", "first and last convolution"),
}
PIECES = {"Conv2d": ["conv"], "Middle": ["res", "text", "res"]}
PIECES |= {"Downsample": ["size"], "Upsample": ["size"]}


Row = tuple[str, Any, int, int, int, int]  # name, part, channels in, out, side in, out
Groups = dict[tuple[int, str], list[tuple[str, int, str]]]


def layout(rows: list[Row]) -> tuple[Groups, dict[int, list[str]]]:
    """What stands where, and the sums at each level's way up.

    {(level, "down", "middle" or "up"): [(kind, channels, hint), ...]}
    """
    groups: Groups = {}
    sums: dict[int, list[str]] = {}
    came, side = 0, rows[0][-1]
    for name, part, c_in, c_out, side_in, side_out in rows:
        way, level = name.split(".")[0], (side // side_out).bit_length() - 1
        way = {"conv_in": "down", "conv_out": "up"}.get(way, way)
        pieces = PIECES.get(type(part).__name__)
        pieces = pieces or ["res", "text"][: 1 + (part.attention is not None)]
        hint = f"{name}: {c_in}×{side_in}×{side_in} → {c_out}×{side_out}×{side_out}"
        # what came by the skip, beside what came from below
        if way == "up" and type(part).__name__ == "Stage":
            groups.setdefault((level, way), []).append(("skip", c_in - came, hint))
            sums.setdefault(level, []).append(f"{came}+{c_in - came}")
        boxes = [(piece, c_out, hint) for piece in pieces]
        groups.setdefault((level, way), []).extend(boxes)
        came = c_out
    return groups, sums


class Drawing:
    """A U-Net to scale, as SVG: `zoom` units a position, `wide` units a channel."""

    def __init__(self, rows: list[Row], zoom: float, wide: float, span: int = 384):
        self.wide, self.span, top = wide, span, 62.0
        self.svg: list[str] = []
        self.skips: list[float] = []
        groups, sums = layout(rows)
        for level in sorted(sums):
            size = rows[0][-1] // 2**level
            width = groups[level, "up"][-1][1]
            ways = [way for way in ("down", "up", "middle") if (level, way) in groups]
            # the free room between the way down and the way up
            self.skips, self.free = [], [6.0, span - 6.0]
            for way in ways:
                self.row(groups[level, way], way, top, size * zoom)
            top += size * zoom + 13
            self.write(
                6, top, f"{width}×{size}×{size} {'→' if 'middle' in ways else '↓'}"
            )
            self.write(span - 6, top, f"in {', '.join(sums[level])} ↑", "end")
            top += 33
        self.height = top - 26

    def row(
        self, group: list[tuple[str, int, str]], way: str, top: float, height: float
    ) -> None:
        """The boxes of one level: left, right or between; skips are arcs above them."""
        widths = [
            5 if kind in ("conv", "size") else channels * self.wide
            for kind, channels, _ in group
        ]
        gaps = [
            3 * (k > 0 and hint != group[k - 1][2])
            for k, (_, _, hint) in enumerate(group)
        ]
        total = sum(widths) + sum(gaps)
        x = {
            "down": self.free[0],
            "middle": (sum(self.free) - total) / 2,
            "up": self.free[1] - total,
        }[way]
        for k, (kind, _, hint) in enumerate(group):
            x += gaps[k]
            middle = x + widths[k] / 2
            self.box(kind, x, top, widths[k], height, hint)
            if kind == "skip":
                start = self.skips.pop()
                rise = top - 5 - 5 * sum(other[0] == "skip" for other in group[:k])
                self.line(
                    f"M{start:.1f} {top:.1f}V{rise:.1f}H{middle:.1f}V{top:.1f}", PURPLE
                )
            x += widths[k]
            if way == "down" and (k + 1 == len(group) or gaps[k + 1]):
                self.skips.append(middle)
        if way == "middle":
            self.line(
                f"M{self.free[0]:.1f} {top + height / 2:.1f}H{self.free[1]:.1f}", GREY
            )
        self.free = {
            "down": [x, self.free[1]],
            "up": [self.free[0], x - total],
            "middle": self.free,
        }[way]

    def box(
        self, kind: str, x: float, y: float, width: float, height: float, hint: str
    ) -> None:
        colour, anchor, _ = LOOK[kind]
        place = (
            f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{colour}"'
        )
        middle, mark = x + width / 2, ""
        if kind == "res":
            mark = f'<circle cx="{middle:.1f}" cy="{y + 4:.1f}" r="2" fill="#fff"/>'
        if kind == "text":
            mark = (
                f'<path d="M{middle - 2.5:.1f} {y + height - 2:.1f}h5l-2.5 -5z" '
                'fill="#fff"/>'
            )
        self.svg.append(
            f'<a href="#{anchor}" tabindex="-1"><title>{hint}</title><rect '
            f"{place}/>{mark}</a>"
        )

    def line(self, path: str, colour: str) -> None:
        self.svg.insert(
            0, f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.2"/>'
        )

    def write(
        self, x: float, y: float, text: str, anchor: str = "start", size: int = 11
    ) -> None:
        self.svg.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
            f'font-size="{size}">{text}</text>'
        )


def draw_unet(rows: list[Row], title: str, zoom: float, wide: float) -> HTML:
    """The drawing with its title and, as links, its key."""
    drawing = Drawing(rows, zoom, wide)
    channels, side = rows[0][2], rows[0][-1]
    drawing.write(6, 16, title, size=13)
    drawing.write(6, 36, f"latents {channels}×{side}×{side} ↓")
    drawing.write(drawing.span - 6, 36, f"↑ noise {rows[-1][3]}×{side}×{side}", "end")
    look = "display:inline-block;width:0.7em;height:0.7em;background:{}"
    dot = f'<span style="{look}"></span>'
    key = " &ensp; ".join(
        f'<a href="#{anchor}" '
        f'style="color:#222;white-space:nowrap">{dot.format(colour)} {name}</a>'
        for colour, anchor, name in LOOK.values()
    )
    box = (
        f'viewBox="0 0 {drawing.span} {drawing.height:.0f}" style="width:100%" '
        'fill="#222" role="group"'
    )
    label = (
        f'aria-label="{title}: the U-Net to scale, one row for each size of the map"'
    )
    svg = f"<svg {box} {label}>{''.join(drawing.svg)}</svg>"
    style = "background:#fff;max-width:620px;padding:4px;font:12px/1.6 sans-serif"
    return HTML(f'<div style="{style}">{svg}<div>{key}</div></div>')
