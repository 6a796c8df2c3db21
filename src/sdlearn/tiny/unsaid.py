"""checkpoint -> figures: does what a sentence leaves open stay open, are fills clean?

A sentence that names no background fits eight pictures, and "a cat and a key" four ways
to lie. A model that has learned the distribution draws all of them; one that guidance,
or a short training, has narrowed draws a favourite.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image

from sdlearn.tiny.judge import Judge, look, relation_of
from sdlearn.tiny.scenes import BACKGROUNDS, COLOURS, RELATIONS, Scene
from sdlearn.tiny.tasks import to_tensor

INK = 70  # pixels whose channels are all darker than this belong to outlines
FAR = 40  # pixels whose channels differ from the ground by less belong to it


def entropy(seen: Iterable[Hashable]) -> float:
    """Of the shares in which different things were seen, in nats."""
    counts = np.array([*Counter(seen).values()], float)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def fair_entropy(sides: int, throws: int) -> float:
    """The mean entropy of the shares that so many throws of a fair die show.

    Below log(sides): a few throws never show every side equally often.
    """
    p, total = 1 / sides, 0.0
    for k in range(1, throws + 1):
        chance = math.comb(throws, k) * p**k * (1 - p) ** (throws - k)
        total -= sides * chance * (k / throws) * math.log(k / throws)
    return total


def openness(
    draw: Callable[[list[str]], list[Image.Image]],
    judge: Judge,
    scenes: Sequence[Scene],
    throws: int = 24,
) -> dict[str, float]:
    """{"backgrounds": of sentences without one, "sides": of pairs joined by "and"}, and
    the standard error of each.

    Each sentence is drawn `throws` times; the entropy of what the judge sees is
    divided by that of a fair die thrown as often, and the mean over sentences is given.
    `draw` takes sentences and gives a picture for each, from noise of its own. Pictures
    whose background the judge does not know say nothing of backgrounds, and those in
    which it does not find both things nothing of sides; a sentence counts if more than
    half of its pictures say something.
    """
    ratios: dict[str, list[float]] = {"backgrounds": [], "sides": []}

    def note(name: str, seen: list[str], sides: int) -> None:
        if len(seen) > throws / 2:
            ratios[name].append(entropy(seen) / fair_entropy(sides, len(seen)))

    for scene in scenes:
        pair = len(scene.things) == 2
        pictures = draw([scene.sentence("and" if pair else None, False)] * throws)
        images = torch.stack([to_tensor(np.array(picture)) for picture in pictures])
        findings = look(judge, images)
        grounds = [f.background for f in findings if f.background in BACKGROUNDS]
        note("backgrounds", grounds, len(BACKGROUNDS))
        if pair:
            names = {thing.name for thing in scene.things}
            sides = [relation_of(f, scene) for f in findings if names <= set(f.things)]
            note("sides", sides, len(RELATIONS))
    means = {name: float(np.mean(x)) if x else math.nan for name, x in ratios.items()}
    return means | {
        f"{name}, standard error": float(np.std(x, ddof=1) / len(x) ** 0.5)
        if len(x) > 1
        else math.nan
        for name, x in ratios.items()
    }


def main_fill(picture: np.ndarray, clear: float = 1.0) -> np.ndarray | None:
    """The colour of most pixels that are neither ground nor outline; None without any.

    picture: (H, W, 3) uint8. The ground is the median along the edge. clear: None, too,
    unless it has so many times the pixels of any other fill.
    """
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    pixels = picture.reshape(-1, 3).astype(int)
    away = abs(pixels - np.median(rim, axis=0)).max(axis=1) > FAR
    pixels = pixels[away & (pixels.max(axis=1) > INK)]
    fills: list[tuple[int, list[float]]] = []  # how many pixels, their mean colour
    while len(pixels) and len(fills) < 4:  # the largest fill, then what is left
        bins, counts = np.unique(pixels // 16, axis=0, return_counts=True)
        middle = 16 * bins[counts.argmax()] + 8
        near = abs(pixels - middle).max(axis=1) <= FAR / 2
        fills.append((int(near.sum()), pixels[near].mean(axis=0).tolist()))
        pixels = pixels[~near]
    (size, fill), (second, _), *_ = sorted(fills, reverse=True) + [(0, None)] * 2
    return np.array(fill) if size > 0 and size >= clear * second else None


def shades(scene: Scene) -> list[np.ndarray]:
    """The light and the dark RGB of the first thing's colour; [] if it has its own."""
    pair = COLOURS[scene.things[0].colour] if scene.things[0].colour else ()
    return [np.array([int(shade[i : i + 2], 16) for i in (1, 3, 5)]) for shade in pair]


def distance(fill: np.ndarray | None, palette: Iterable[np.ndarray]) -> float:
    """From a fill to the nearest shade; infinite without either."""
    if fill is None:
        return math.inf
    return min(
        (float(np.linalg.norm(fill - shade)) for shade in palette), default=math.inf
    )


def impurity(scenes: Sequence[Scene], pictures: Iterable[np.ndarray]) -> float:
    """How far main fills are from the nearer shade of their colour: the mean distance
    in RGB, each from 0 to 255.

    Of scenes of one thing whose true picture is clearly filled with such a shade (a
    house is mainly wall). Where nothing is drawn the distance is that to the ground.
    """
    distances = []
    for scene, picture in zip(scenes, pictures, strict=True):
        palette = shades(scene)
        if distance(main_fill(scene.render(), clear=1.5), palette) > 10:
            continue
        fill = main_fill(picture)
        fill = picture[0, 0].astype(float) if fill is None else fill
        distances.append(distance(fill, palette))
    return float(np.mean(distances)) if distances else math.nan
