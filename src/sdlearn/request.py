"""What to draw: one record that is checked once. Chapter 12.
Exported from book/12_pipeline.ipynb by `make export`; edit it there.
"""

import numbers
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from PIL import Image
from torch import Tensor

from sdlearn.pictures import describe, open_image
from sdlearn.samplers import SAMPLERS, check_eta, find_sampler
from sdlearn.schedule import SPACINGS

__all__ = [
    "SCALE",
    "STRENGTH",
    "SHARE",
    "ETA",
    "LARGEST",
    "SEEDS",
    "whole",
    "real",
    "texts",
    "seeds",
    "side",
    "times",
    "picture",
    "check_latents",
    "Settings",
    "Request",
]

SCALE = "a finite number, 0 or more (up to 1 is no guidance)"


STRENGTH = "a number above 0 (keep the picture) up to 1 (forget it)"


SHARE = "a number from 0 (off) to 1 (full)"


ETA = "a number from 0 (no fresh noise) to 1 (as much as DDPM)"


LARGEST = 4096  # pixels a side of a picture that we draw


SEEDS = 2**32  # PyTorch's CPU generator takes 32 bits: larger seeds repeat smaller ones


def whole(name: str, value: object, least: int, most: int, unit: str = "") -> int:
    """A whole number in a range, of Python's or NumPy's kind."""
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not fits or not least <= value <= most:
        raise ValueError(
            f"{name} is {value!r}; give a whole number {unit}from {least} to {most}"
        )
    return int(value)


def real(name: str, value: object, least: float, most: float, why: str) -> float:
    """A number in a range, of Python's or NumPy's kind."""
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not fits or not least <= value <= most:  # NaN fails here too
        raise ValueError(f"{name} is {value!r}; give {why}")
    return float(value)


def texts(name: str, value: object) -> tuple[str, ...]:
    """One text or several."""
    found = [value] if isinstance(value, str) else value
    good = isinstance(found, list | tuple) and all(isinstance(x, str) for x in found)
    if not good or not found:
        raise ValueError(f"{name} is {value!r}; give a text, or a list of texts")
    return tuple(found)


def seeds(seed: object, count: int) -> tuple[int, ...]:
    """One seed for each picture: seed, seed + 1 ..., or those that were given."""
    if seed is None:
        seed = random.SystemRandom().randrange(SEEDS - count)
    if isinstance(seed, numbers.Integral) and not isinstance(seed, bool):
        first = whole("seed", seed, 0, SEEDS - count)
        return tuple(range(first, first + count))
    if not isinstance(seed, list | tuple) or len(seed) != count:
        raise ValueError(
            f"seed is {seed!r}; give a whole number, or a list of {count}, one a picture"
        )
    return tuple(whole("seed", x, 0, SEEDS - 1) for x in seed)


def side(name: str, value: object) -> int | None:
    """Pixels; the model asks for a multiple of its own."""
    return None if value is None else whole(name, value, 1, LARGEST, "of pixels ")


def times(value: object) -> tuple[int, int]:
    """Where guidance works: from the first training time to below the second."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    whole_ones = pair and all(isinstance(x, numbers.Integral) for x in value)
    if not whole_ones or not 0 <= value[0] < value[1]:
        raise ValueError(
            f"guided_times are {value!r}; give two whole numbers, the lower first, of "
            "the training times 0 to 1000, such as (200, 800)"
        )
    return int(value[0]), int(value[1])


def picture(value: object) -> Image.Image:
    """A picture, or the one in a file."""
    if isinstance(value, str | Path):
        return open_image(value)
    if not isinstance(value, Image.Image):
        raise ValueError(
            f"image is of type {type(value).__name__}; give a PIL picture or the path of "
            "one (Image.fromarray makes a picture of an array)"
        )
    return value


def check_latents(latents: object, image: object) -> None:
    if not isinstance(latents, Tensor) or latents.ndim != 4:
        raise ValueError(
            f"latents are of type {type(latents).__name__}; give a tensor (B, 4, h, w)"
        )
    if image is not None:
        raise ValueError("latents and an image are given; leave one of them out")


class Settings(TypedDict, total=False):
    """The fields of a `Request` beside its prompt, as keyword arguments."""

    negative_prompt: str | Sequence[str]
    image: Image.Image | str | Path | None
    strength: float
    steps: int
    cfg_scale: float
    sampler: str
    spacing: str | None
    eta: float | None
    seed: int | Sequence[int] | None
    width: int | None
    height: int | None
    n: int
    latents: Tensor | None
    rescale: float
    clip_skip: int
    guided_times: tuple[int, int]
    two_passes: bool


@dataclass(frozen=True, eq=False)
class Request:
    """What to draw; the command line, a PNG's settings and a notebook all speak it.

    prompt, negative_prompt: a text or several, n pictures for each prompt.
    image, strength: for image-to-image; the share of the steps that is run, from above
    0 (keep the picture) to 1 (forget it).
    sampler, spacing, eta: names in SAMPLERS and SPACINGS, and how much fresh noise;
    None is the schedule's own spacing and the sampler's own eta.
    seed: picture i is drawn from seed + i, whatever the batch or the device; or one for
    each picture; None picks one. latents: (B,C,h,w) to start from instead of noise.
    width, height: in pixels; None is what the model was trained on.
    rescale: of guidance. clip_skip: last layers of the text encoder to leave out.
    guided_times, two_passes: where guidance works, and whether its two halves run one
    after the other (chapter 19).
    Raises ValueError, one sentence, for each field that cannot be meant.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    image: Image.Image | str | Path | None = None
    strength: float = 0.8
    steps: int = 50
    cfg_scale: float = 7.5
    sampler: str = "ddpm"
    spacing: str | None = None
    eta: float | None = None
    seed: int | Sequence[int] | None = None
    width: int | None = None
    height: int | None = None
    n: int = 1
    latents: Tensor | None = None
    rescale: float = 0.0
    clip_skip: int = 0
    guided_times: tuple[int, int] = (0, 1000)
    two_passes: bool = False

    def __post_init__(self):
        prompts = texts("prompt", self.prompt)
        n = whole("n", self.n, 1, 1000, "of pictures ")
        checked = {
            "prompt": prompts,
            "negative_prompt": texts("negative_prompt", self.negative_prompt),
            "n": n,
            "steps": whole("steps", self.steps, 1, 10**6),
            "cfg_scale": real("cfg_scale", self.cfg_scale, 0, 1e6, SCALE),
            "strength": real("strength", self.strength, 1e-9, 1, STRENGTH),
            "rescale": real("rescale", self.rescale, 0, 1, SHARE),
            "clip_skip": whole("clip_skip", self.clip_skip, 0, 100),
            "eta": None if self.eta is None else real("eta", self.eta, 0, 1, ETA),
            "seed": seeds(self.seed, n * len(prompts)),
            "width": side("width", self.width),
            "height": side("height", self.height),
            "guided_times": times(self.guided_times),
            "image": None if self.image is None else picture(self.image),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if len(self.negative_prompt) not in (1, len(prompts)):
            raise ValueError(
                f"{len(self.negative_prompt)} negative prompts for {len(prompts)} "
                "prompts; give one, or one for each"
            )
        if self.spacing is not None and self.spacing not in list(SPACINGS):
            raise ValueError(
                f"spacing {self.spacing!r} is unknown; choose one of {', '.join(SPACINGS)}"
            )
        if not isinstance(self.two_passes, bool):
            raise ValueError(f"two_passes is {self.two_passes!r}; give True or False")
        if self.latents is not None:
            check_latents(self.latents, self.image)
        check_eta(find_sampler(self.sampler), self.eta)

    @property
    def count(self) -> int:
        """How many pictures there will be."""
        return self.n * len(self.prompt)

    def settings(
        self, i: int, width: int, height: int, model: str
    ) -> dict[str, object]:
        """What the PNG of picture i says of it, in other programs' words."""
        sampler = SAMPLERS[self.sampler]
        said: dict[str, object] = {"Steps": self.steps, "Sampler": sampler.label}
        if self.spacing:
            said["Schedule type"] = SPACINGS[self.spacing].label
        said |= {"CFG scale": self.cfg_scale, "Seed": self.seed[i]}
        said |= {"Size": f"{width}x{height}", "Model": model}
        if self.image is not None:
            said["Denoising strength"] = self.strength
        if self.clip_skip:
            said["Clip skip"] = self.clip_skip + 1  # other programs count from 1
        if self.eta is not None:
            said["Eta"] = self.eta
        if self.rescale:
            said["CFG Rescale phi"] = self.rescale
        return said

    def parameters(self, i: int, width: int, height: int, model: str) -> str:
        """`settings` as the text that SD programs keep in a PNG."""
        negative = self.negative_prompt[i // self.n % len(self.negative_prompt)]
        said = self.settings(i, width, height, model)
        return describe(self.prompt[i // self.n], negative, said)
