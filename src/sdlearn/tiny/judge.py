"""picture -> what is in it: a classifier that may say "none of these". See chapter 09.

The judge sees only pixels, never latents or prompts. It labels every 8x8 cell of a
picture with an object and a colour, and the picture with a background. It learns from
scenes, and from spoiled scenes whose objects it has to call unknown.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.blocks import ResBlock
from sdlearn.checkpoint.files import read_tensors
from sdlearn.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    SIZE,
    Scene,
    paste,
    random_scene,
    random_thing,
    sprite,
)
from sdlearn.tiny.tasks import to_tensor
from sdlearn.training import Task

CELL = 8
EMPTY, UNKNOWN = "empty", "unknown"
OBJECT_LABELS = (*OBJECTS, EMPTY, UNKNOWN)
COLOUR_LABELS = (*COLOURS, "own", UNKNOWN)
BACKGROUND_LABELS = (*BACKGROUNDS, UNKNOWN)
IGNORE = -100  # cells that no loss looks at


class Judge(nn.Module):
    """image (B, 3, 128, 128) in [-1, 1] -> logits of objects, colours and background.

    Objects and colours are (B, labels, 16, 16), the background is (B, labels).
    """

    def __init__(self, width: int = 96):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, width, 4, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(
            *(ResBlock(width, width, groups=8) for _ in range(5))
        )
        self.cells = nn.Conv2d(width, len(OBJECT_LABELS) + len(COLOUR_LABELS), 1)
        self.background = nn.Linear(width, len(BACKGROUND_LABELS))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.silu(self.blocks(self.stem(image)))
        objects, colours = self.cells(x).split(
            [len(OBJECT_LABELS), len(COLOUR_LABELS)], dim=1
        )
        return objects, colours, self.background(x.mean(dim=(2, 3)))


def load_judge(folder: Path) -> Judge:
    """The judge of a checkpoint."""
    judge, path = Judge(), folder / "judge" / "model.safetensors"
    weights = {name: x.float() for name, x in read_tensors(path).items()}
    if {n: x.shape for n, x in weights.items()} != shapes_of(judge):
        raise ValueError(
            f"{path} judges another world: its labels are not those of the scenes now; "
            "train it again (sdlearn train judge, then export)"
        )
    judge.load_state_dict(weights)
    return judge.eval()


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in model.state_dict().items()}


@dataclass(frozen=True)
class Finding:
    """What the judge sees: {object: (colour, x, y)}, in pixels; the background."""

    things: dict[str, tuple[str, float, float]]
    background: str
    unknown: float  # cells it cannot name, as a share of all that are not empty


@torch.inference_mode()
def look(judge: Judge, images: Tensor, least: int = 6) -> list[Finding]:
    """Read pictures; an object counts as present if it fills at least `least` cells."""
    objects, colours, backgrounds = (x.float() for x in judge(images))
    findings = []
    for names, shades, ground in zip(
        objects.argmax(1).numpy(), colours, backgrounds.argmax(1).tolist(), strict=True
    ):
        counts = Counter(names.ravel().tolist())
        things = {}
        for label, count in counts.items():
            if OBJECT_LABELS[label] in (EMPTY, UNKNOWN) or count < least:
                continue
            rows, columns = np.nonzero(names == label)
            shade = COLOUR_LABELS[
                int(shades[:, rows, columns].log_softmax(0).sum(1).argmax())
            ]
            centre = [(where.mean() + 0.5) * CELL for where in (columns, rows)]
            things[OBJECT_LABELS[label]] = (shade, *centre)
        filled = names.size - counts[OBJECT_LABELS.index(EMPTY)]
        findings.append(
            Finding(
                things,
                BACKGROUND_LABELS[ground],
                counts[OBJECT_LABELS.index(UNKNOWN)] / max(filled, 1),
            )
        )
    return findings


def verdict(finding: Finding, scene: Scene) -> dict[str, bool]:
    """Which parts of a full caption the picture shows, and whether all of them."""
    names = {thing.name for thing in scene.things}
    objects = set(finding.things) == names and finding.unknown < 0.25
    colours = all(
        name in finding.things and finding.things[name][0] == (colour or "own")
        for name, colour in ((thing.name, thing.colour) for thing in scene.things)
    )
    background = finding.background == scene.background
    relation = True
    if len(names) == 2:
        relation = (
            names <= set(finding.things)
            and relation_of(finding, scene) == scene.relation()
        )
    return {
        "objects": objects,
        "colours": colours,
        "background": background,
        "relation": relation,
        "all": objects and colours and background and relation,
    }


def relation_of(finding: Finding, scene: Scene) -> str:
    """How the first thing of the scene lies to the second one in the picture."""
    (_, ax, ay), (_, bx, by) = (finding.things[thing.name] for thing in scene.things)
    if abs(ax - bx) >= abs(ay - by):
        return "to the left of" if ax < bx else "to the right of"
    return "above" if ay < by else "below"


def spoil(drawing: np.ndarray, rng: random.Random, other: np.ndarray) -> np.ndarray:
    """A drawing (h, w, 4) that is no longer any of our objects."""
    height, width = drawing.shape[:2]
    ys = np.arange(height) * other.shape[0] // height
    other = other[ys][:, np.arange(width) * other.shape[1] // width]
    kind = rng.randrange(5)
    if kind == 0:  # two drawings, mixed
        return ((drawing.astype(np.uint16) + other) // 2).astype(np.uint8)
    if kind == 1:  # half of each
        out = drawing.copy()
        out[:, width // 2 :] = other[:, width // 2 :]
        return out
    if kind == 2:  # top of one, bottom of the other
        out = drawing.copy()
        out[height // 2 :] = other[height // 2 :]
        return out
    if kind == 3:  # smeared
        n = rng.randint(7, 12)
        small = np.stack(
            [
                [
                    block.reshape(-1, 4).mean(0)
                    for block in np.array_split(row, n, axis=1)
                ]
                for row in np.array_split(drawing, n, axis=0)
            ]
        )
        return small.astype(np.uint8)[np.arange(height) * n // height][
            :, np.arange(width) * n // width
        ]
    tiles = [(i, j) for i in range(3) for j in range(3)]  # shuffled pieces
    h, w = height // 3, width // 3
    out = drawing.copy()
    for (i, j), (k, m) in zip(tiles, rng.sample(tiles, 9), strict=True):
        out[i * h : i * h + h, j * w : j * w + w] = drawing[
            k * h : k * h + h, m * w : m * w + w
        ]
    return out


def example(rng: random.Random) -> tuple[Tensor, Tensor, Tensor, int]:
    """A scene, or a spoiled one, slightly blurred and shaken, and its labels.

    Returns the image, the objects and the colours of its cells, and the background.
    """
    scene = random_scene(rng, rng.choice(["train", "train", "colour", "pair"]))
    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    known = rng.random() < 0.9
    picture[:] = (
        BACKGROUNDS[scene.background] if known else unlike(BACKGROUNDS.values(), rng)
    )
    cells = SIZE // CELL
    objects = np.full((cells, cells), OBJECT_LABELS.index(EMPTY))
    colours = np.full((cells, cells), IGNORE)
    middle = np.arange(cells) * CELL + CELL / 2
    for thing in scene.things:
        left, top, right, bottom = thing.box
        drawing, label, colour = (
            sprite(thing.name, thing.colour, thing.size),
            thing.name,
            thing.colour or "own",
        )
        if rng.random() < 0.3:
            other = random_thing(rng)
            drawing, label = (
                spoil(drawing, rng, sprite(other.name, other.colour, thing.size)),
                UNKNOWN,
            )
        elif thing.colour and rng.random() < 0.1:
            drawing, colour = tinted(drawing, rng), UNKNOWN
        paste(picture, drawing, left, top)
        inside = np.ix_(
            (middle > top) & (middle < bottom), (middle > left) & (middle < right)
        )
        objects[inside] = OBJECT_LABELS.index(label)
        if label != UNKNOWN:
            colours[inside] = COLOUR_LABELS.index(colour)
    image = to_tensor(picture)
    if rng.random() < 0.5:
        image = F.avg_pool2d(F.pad(image[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[
            0
        ].lerp(image, rng.random())
    image = image + rng.random() * 0.06 * torch.randn(
        image.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))
    )
    image = image + torch.tensor([rng.uniform(-0.05, 0.05) for _ in range(3)]).view(
        3, 1, 1
    )
    ground = BACKGROUND_LABELS.index(scene.background if known else UNKNOWN)
    return image, torch.from_numpy(objects), torch.from_numpy(colours), ground


def unlike(
    palette: Iterable[tuple[int, int, int]], rng: random.Random, least: int = 60
) -> tuple[int, int, int]:
    """A colour that is far from all of the palette."""
    palette = list(palette)
    while True:
        colour = rng.randrange(256), rng.randrange(256), rng.randrange(256)
        if all(
            sum(abs(a - b) for a, b in zip(colour, known, strict=True)) > least
            for known in palette
        ):
            return colour


def tinted(drawing: np.ndarray, rng: random.Random) -> np.ndarray:
    """The drawing in colours that have no name here: channels turned and inverted."""
    out = drawing.copy()
    bright = drawing[..., :3].max(-1) > 60  # outlines stay black
    shift = np.array([rng.choice((0, 90, 170)) for _ in range(3)]) + 40
    out[bright, :3] = (255 - drawing[bright, :3].astype(int) + shift) % 256
    return out


class JudgeTask(Task):
    """Name the object and the colour in every cell, and the background."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        images, objects, colours, grounds = zip(*map(example, rngs), strict=True)
        return {
            "image": torch.stack(images),
            "objects": torch.stack(objects),
            "colours": torch.stack(colours),
            "background": torch.tensor(grounds),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        objects, colours, background = self.judge(
            batch["image"].contiguous(memory_format=torch.channels_last)
        )
        loss_objects = F.cross_entropy(objects.float(), batch["objects"])
        loss_colours = F.cross_entropy(
            colours.float(), batch["colours"], ignore_index=IGNORE
        )
        loss_background = F.cross_entropy(background.float(), batch["background"])
        right = (objects.argmax(1) == batch["objects"]).float().mean()
        return {
            "loss": loss_objects + loss_colours + loss_background,
            "objects": loss_objects,
            "colours": loss_colours,
            "background": loss_background,
            "cells_right": right,
        }
