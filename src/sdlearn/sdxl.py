"""SDXL's settings: sizes and crops that it is told of, and the refiner. Chapter 17.
Exported from book/17_sdxl.ipynb by `make export`; edit it there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sdlearn.blocks import AttentionBlock, ResBlock, Upsample
from sdlearn.request import Setup, number, shown
from sdlearn.samplers import draw_noise
from sdlearn.schedule import Level
from sdlearn.vae import VAE


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Two whole numbers, each `least` or more."""
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or any(type(x) is not int or not least <= x <= 2**16 for x in value):
        raise ValueError(
            f"{name} is {shown(value)}; give two whole numbers from {least} to "
            f"{2**16}, the vertical one first"
        )
    return value[0], value[1]


@dataclass(frozen=True)
class MicroConditioning:
    """What SDXL is told of a picture's past, in `extras` of a request.

    original: (height, width) before it was scaled; crop: (top, left), what was cut off;
    target: (height, width) as it is; None is the size that is drawn. score and
    negative_score: of beauty, for a refiner. Podell et al. 2024, section 2.2.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    score: float = 6.0
    negative_score: float = 2.5

    def __post_init__(self) -> None:
        pair("crop", self.crop, 0)
        for name in ("original", "target"):
            if getattr(self, name) is not None:
                pair(name, getattr(self, name), 1)
        for name in ("score", "negative_score"):
            number(0, 10, "a number from 0 to 10")(name, getattr(self, name))

    def __call__(self, sd: Any, setup: Setup) -> Setup:
        if not sd.unet.config.added:
            raise ValueError(
                "this model is told no sizes; leave MicroConditioning out, or take an "
                "SDXL model"
            )
        height, width = (side * sd.factor for side in setup.shape[2:])
        original = self.original or (height, width)
        target = self.target or (height, width)
        scores = self.score, self.negative_score
        assert setup.told is not None  # set_up says it
        told = sd.with_ids(setup.told, original, self.crop, target, scores)
        return replace(setup, told=told)

    def said(self) -> dict[str, object]:
        original = self.original and "{1}x{0}".format(*self.original)
        crop = "{},{}".format(*self.crop) if any(self.crop) else None
        return {"Original size": original, "Crop top left": crop}


@dataclass(frozen=True)
class PartOfTheWay:
    """Draw from one share of the way to another only, in `extras` of a request.

    begin, end: 0 is pure noise, 1 the picture. Who begins later goes on with the
    latents of who ended there, and adds no noise: an SDXL model, and then its refiner.
    The dice go on, too: a sampler that rolls them once a step draws as in one piece.
    """

    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            number(0, 1, "a number from 0 to 1")(name, getattr(self, name))
        if not self.begin < self.end:
            raise ValueError(
                f"a part of the way from {self.begin} to {self.end} has no length; "
                "begin before the end"
            )

    def numbers(self, levels: Sequence[Level], steps: int) -> tuple[int, int]:
        """Which of the levels is its first, and which its end. steps: of training."""
        *visited, _ = levels
        first, stop = (
            sum(level.t >= round(steps - share * steps) for level in visited)
            for share in (self.begin, self.end)
        )
        first = first if self.begin else 0
        if first >= stop:
            raise ValueError(
                f"none of the {len(visited)} steps lies between {self.begin} and "
                f"{self.end} of the way; take more steps, or a longer part"
            )
        return first, stop

    def __call__(self, sd: Any, setup: Setup) -> Setup:
        if self.begin and setup.request.latents is None:
            raise ValueError(
                f"the part of the way begins at {self.begin}, but there are no latents "
                "to go on with; give those that another model ended with"
            )
        first, stop = self.numbers(setup.levels, sd.schedule.steps)
        if self.begin:  # what was rolled before is not rolled again
            sd.first_noise(setup.shape, setup.dice)
            for _ in range(first):
                draw_noise(setup.shape, setup.dice)
        return replace(setup, levels=setup.levels[first : stop + 1])

    def said(self) -> dict[str, object]:
        return {"Refiner switch at": self.begin or self.end}


@torch.no_grad()
def scale_decoder(vae: VAE, factor: float) -> VAE:
    """The same decoder with `factor` times the numbers on its way from block to block.

    Whatever writes to the way is multiplied; whatever reads from it begins with a
    GroupNorm, which divides the factor out again. A power of two rounds nothing.
    """
    written = [*vae.decoder.conv_in.parameters()]
    for part in vae.decoder.modules():
        if isinstance(part, ResBlock):
            written += part.conv2.parameters()
            # of a shortcut, which reads the way without a norm, the bias alone
            written += [*part.conv_shortcut.parameters()][1:]
        elif isinstance(part, AttentionBlock):
            written += part.attention.to_out.parameters()
        elif isinstance(part, Upsample):  # which does so, too
            written += [*part.conv.parameters()][1:]
    for parameter in written:
        parameter.mul_(factor)
    return vae
