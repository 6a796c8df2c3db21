"""picture -> which drawing it shows: a ruler for words that the judge never learned.

Every drawing, in every colour, is laid over the picture at several sizes and at every
place. Its misfit is what remains of the picture when the drawing is taken away, as a
share of the drawing itself: 0 if it lies there exactly, 1 or more if it does not.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdlearn.tiny.scenes import COLOURS, OBJECTS, RECOLOURED, Scene, sprite
from sdlearn.tiny.tasks import to_tensor

ALONE, PAIR = (80, 84, 88, 92, 96), (50, 54, 58)  # sizes in pixels, as in scenes
CLEAR = 0.5  # a misfit; true pictures after the VAE have at most .35


class Found(NamedTuple):
    """The drawing that fits best, its colour, and its misfit."""

    name: str
    colour: str | None
    misfit: float


def looks(extra: Sequence[str]) -> list[tuple[str, str | None]]:
    """All that can be drawn: objects in their colours, and new ones."""
    shades = {name: [*COLOURS] if name in RECOLOURED else [None] for name in OBJECTS}
    every = [(name, shade) for name in OBJECTS for shade in shades[name]]
    return every + [(name, None) for name in extra]


LARGE = 96  # pixels: drawn once in this size, then made smaller


@cache
def squares(extra: tuple[str, ...]) -> Tensor:
    """Every drawing in the middle of a square: (N, 4, 96, 96), colours times alpha in
    [-1, 1], and alpha."""
    found = []
    for name, colour in looks(extra):
        drawing = sprite(name, colour, LARGE)
        height, width = drawing.shape[:2]
        square = np.zeros((LARGE, LARGE, 4), np.uint8)
        top, left = (LARGE - height) // 2, (LARGE - width) // 2
        square[top : top + height, left : left + width] = drawing
        alpha = torch.from_numpy(square[..., 3] / 255).float()[None]
        found.append(torch.cat([to_tensor(square[..., :3]) * alpha, alpha]))
    return torch.stack(found)


@cache
def stencils(
    sizes: tuple[int, ...], extra: tuple[str, ...], factor: int
) -> list[tuple[Tensor, Tensor]]:
    """For each size, made smaller: colours (N, 3, h, h) and alpha (N, 1, h, h)."""
    sides = [size // factor for size in sizes]
    small = [F.adaptive_avg_pool2d(squares(extra), side) for side in sides]
    return [(x[:, :3], x[:, 3:]) for x in small]


@torch.no_grad()
def find(image: Tensor, sizes: tuple[int, ...], extra: tuple[str, ...] = ()) -> Found:
    """The drawing that a picture, or a part of one, shows: image (3, H, W) in [-1, 1].

    Its background is the middle value of its border.
    """
    factor = 4 if sizes == ALONE else 2  # a drawing is then about 25 pixels large
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    ground = border.median(dim=1).values.view(3, 1, 1)
    picture = F.avg_pool2d(image - ground, factor)[None]
    best = Found("nothing", None, 1.0)
    for colours, alphas in stencils(sizes, extra, factor):
        drawings = colours - ground * alphas  # how each one differs from the ground
        side = drawings.shape[-1]
        there = F.conv2d(
            picture.square().sum(1, keepdim=True), torch.ones(1, 1, side, side)
        )
        energy = drawings.square().sum(dim=(1, 2, 3)).view(-1, 1, 1)
        left = there[0] - 2 * F.conv2d(picture, drawings)[0] + energy  # (N, y, x)
        misfit, which = (left / energy).flatten(1).min(dim=1).values.min(dim=0)
        if misfit < best.misfit:
            best = Found(*looks(extra)[int(which)], misfit.item())
    return best


def halves(image: Tensor, relation: str) -> tuple[Tensor, Tensor]:
    """Where the first and the second thing of a scene lie."""
    sides = image.chunk(2, dim=2 if "to the" in relation else 1)
    first, second = sides if relation in ("to the left of", "above") else sides[::-1]
    return first, second


def fits(image: Tensor, scene: Scene, extra: tuple[str, ...]) -> list[Found]:
    """For each thing of a scene, what fits best on its side of a picture."""
    relation = scene.relation()
    parts = (image,) if relation is None else halves(image, relation)
    sizes = ALONE if relation is None else PAIR
    return [find(part, sizes, extra) for part in parts]


def shows(image: Tensor, scene: Scene, extra: tuple[str, ...]) -> bool:
    """Does a picture clearly show the things of a scene, each on its side? Colours are
    left to the judge: pink and purple differ too little here."""
    found = fits(image, scene, extra)
    clear = all(x.misfit < CLEAR for x in found)
    return clear and [x.name for x in found] == [thing.name for thing in scene.things]
