"""boxes, arrows, words -> a diagram, drawn as SVG in the style of the journey's map."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image

from sdlearn.book.show import to_array

INK, LINE, EDGE, FILL = "#33404a", "#4a4a4a", "#9fb0bc", "#eef2f5"
LIT = "#d2612f"
LOOKS = {
    "plain": "",
    "name": ' font-weight="600"',
    "small": ' font-size="11.5"',
    "thing": ' font-style="italic"',
}

Point = tuple[float, float]


class Box(NamedTuple):
    """A rectangle, and the middles of its sides, where arrows begin and end."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height


def pale(colour: str, share: float) -> str:
    """A colour, "#rrggbb", mixed with white: `share` of it is left."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in parts)


class Diagram:
    """What its methods draw, on a white card, so that it can be read in dark mode, too.

    x goes to the right and y down, in pixels. A notebook shows it as the last line of a
    cell. On a phone one of 400 pixels can be read at once; from 600 on it scrolls.
    """

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(
        self,
        place: tuple[float, float, float, float],
        text: str = "",
        colour: str | None = None,
        lit: bool = False,
        dashed: bool = False,
    ) -> Box:
        """A box at (x, y, width, height); its first line is bold, the others are small.

        colour: "#rrggbb" of its border, paler inside. lit: filled, as the map lights a
        stage. dashed: for what is frozen.
        """
        box = Box(*place)
        fill, edge, ink = FILL, EDGE, INK
        if colour is not None:
            fill, edge = pale(colour, 0.16), colour
        if lit:
            fill, edge, ink = LIT, "#a8481d", "#ffffff"
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" '
            f'height="{box.height:g}" rx="8" fill="{fill}" stroke="{edge}" '
            f'stroke-width="1.5"{dashes}/>'
        )
        lines = text.split("\n") if text else []
        y = box.left[1] - 8 * (len(lines) - 1) + 4.5
        for i, line in enumerate(lines):
            self.text((box.top[0], y + 16 * i), line, "small" if i else "name", ink=ink)
        return box

    def frame(self, place: tuple[float, float, float, float], text: str = "") -> Box:
        """A dashed frame around several boxes, empty inside, with words at its top."""
        box = Box(*place)
        self.parts.append(
            f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" '
            f'height="{box.height:g}" rx="12" fill="none" stroke="{EDGE}" '
            'stroke-width="1.5" stroke-dasharray="5 4"/>'
        )
        self.text((box.x + 10, box.y + 17), text, "small", "start")
        return box

    def sum(self, x: float, y: float, sign: str = "+") -> Box:
        """A circle with a sign in it: where two arrows meet and are added."""
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="#ffffff" stroke="{LINE}" '
            'stroke-width="1.5"/>'
        )
        self.text((x, y + 5), sign, "name")
        return Box(x - 9, y - 9, 18, 18)

    def arrow(
        self, *points: Point, dashed: bool = False, tip: bool = True, colour: str = LINE
    ) -> None:
        """A line through the points; a tip at its end."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"'
            f'{dashes}{end} stroke-linejoin="round"/>'
        )

    def text(
        self,
        place: Point,
        text: str,
        look: str = "plain",
        anchor: str = "middle",
        ink: str = INK,
    ) -> None:
        """A line of words that stands on `place`, a key of LOOKS for its look.

        anchor: which part of it is there, "start", "middle" or "end".
        """
        self.parts.append(
            f'<text x="{place[0]:g}" y="{place[1]:g}" text-anchor="{anchor}" '
            f'fill="{ink}"{LOOKS[look]}>{escape(text)}</text>'
        )

    def matrix(
        self,
        x: float,
        y: float,
        values: Sequence[Sequence[float]],
        side: float = 18,
        colour: str = LIT,
    ) -> Box:
        """A grid of squares, the darker the larger the value, from 0 to 1."""
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                self.parts.append(
                    f'<rect x="{x + j * side:g}" y="{y + i * side:g}" '
                    f'width="{side:g}" height="{side:g}" '
                    f'fill="{pale(colour, float(value))}" stroke="{EDGE}"/>'
                )
        return Box(x, y, side * len(values[0]), side * len(values))

    def picture(self, x: float, y: float, side: float, image: Any) -> Box:
        """A picture, as `show.images` takes it, as a square."""
        file = BytesIO()
        Image.fromarray(to_array(image)).save(file, "PNG")
        data = b64encode(file.getvalue()).decode()
        self.parts.append(
            f'<image x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" '
            f'href="data:image/png;base64,{data}"/>'
        )
        return Box(x, y, side, side)

    def __repr__(self) -> str:
        return f"Diagram({self.title!r})"

    def _repr_svg_(self) -> str:
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/>'
            "</marker>"
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" '
            f'height="{self.height}" viewBox="0 0 {self.width} {self.height}" '
            'font-family="system-ui, sans-serif" font-size="13" role="img">'
            f"<title>{escape(self.title)}</title><defs>{tip}</defs>"
            f'<rect width="{self.width}" height="{self.height}" rx="10" '
            f'fill="#ffffff"/>{"".join(self.parts)}</svg>\n'
        )
