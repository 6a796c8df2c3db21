"""What to draw: one record that is checked once. Chapter 12.
Exported from book/12_pipeline.ipynb by `make export`; edit it there.
"""

import numbers
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from PIL import Image
from torch import Tensor

from sdlearn.pictures import describe, open_image
from sdlearn.samplers import SAMPLERS, After, check_eta
from sdlearn.schedule import SPACINGS, Level

LARGEST = 4096  # pixels a side of a picture that we draw
SEEDS = 2**32  # PyTorch's CPU generator takes 32 bits: larger seeds repeat smaller ones
Check = Callable[[str, Any], Any]  # name, value -> the value, or a ValueError


def shown(value: object) -> str:
    """A value in a sentence: on one line, and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def whole_number(least: int, most: int, unit: str = "") -> Check:
    """An integer of Python's or NumPy's kind, from `least` to `most`."""

    def check(name: str, value: Any) -> int:
        fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            raise ValueError(
                f"{name} is {shown(value)}; "
                f"give a whole number {unit}from {least} to {most}"
            )
        return int(value)

    return check


def number(least: float, most: float, wanted: str) -> Check:
    """A number of Python's or NumPy's kind; `wanted` says which."""

    def check(name: str, value: Any) -> float:
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not fits or not least <= value <= most:  # NaN fails here too
            raise ValueError(f"{name} is {shown(value)}; give {wanted}")
        return float(value)

    return check


def optional(check: Check) -> Check:
    """None is a value too."""
    return lambda name, value: None if value is None else check(name, value)


def one_of(known: Collection[str]) -> Check:
    """One of these names."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ValueError(
                f"{name} {shown(value)} is unknown; choose one of {', '.join(known)}"
            )
        return value

    return check


def texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several."""
    found = [value] if isinstance(value, str) else value
    good = isinstance(found, list | tuple) and all(isinstance(x, str) for x in found)
    if not good or not found:
        raise ValueError(f"{name} is {shown(value)}; give a text, or a list of texts")
    if any("\ud800" <= c <= "\udfff" for text in found for c in text):
        raise ValueError(f"{name} holds bytes that are no text; give it in UTF-8")
    return tuple(found)


def picture(name: str, value: Any) -> Image.Image:
    """A picture, or the one in a file."""
    if isinstance(value, str | Path):
        return open_image(value)
    if not isinstance(value, Image.Image):
        raise ValueError(
            f"{name} is of type {type(value).__name__}; give a PIL picture, or the "
            "path of one (Image.fromarray makes a picture of an array)"
        )
    return value


def four_dimensional(name: str, value: Any) -> Tensor:
    """A tensor of latents."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        raise ValueError(
            f"{name} are of type {type(value).__name__}; give a tensor (B, 4, h, w)"
        )
    return value


def times(name: str, value: Any) -> tuple[int, int]:
    """Where guidance works: from the first training time to below the second."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    whole = pair and all(isinstance(x, numbers.Integral) for x in value)
    if not whole or not 0 <= value[0] < value[1]:
        raise ValueError(
            f"{name} are {shown(value)}; give two whole numbers, the lower first, of "
            "the training times 0 to 1000, such as (200, 800)"
        )
    return int(value[0]), int(value[1])


def yes_or_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; give True or False")
    return value


def extras(name: str, value: Any) -> tuple["Extra", ...]:
    """What joins the drawing."""
    given = isinstance(value, list | tuple)
    if not given or not all(callable(x) and hasattr(x, "said") for x in value):
        raise ValueError(
            f"{name} are {shown(value)}; give a list of what joins the drawing, "
            "such as Inpaint(mask)"
        )
    return tuple(value)


def controls(name: str, value: Any) -> tuple["Extra", ...]:
    """(net, hint, scale, start, end), the last three as wished -> an extra for each."""
    if isinstance(value, list | tuple) and all(hasattr(x, "said") for x in value):
        return tuple(value)  # they are made already
    for x in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(x, list | tuple) or not hasattr(next(iter(x), 0), "control"):
            raise ValueError(
                f"{name} is {shown(value)}; give a list of (net, hint) or "
                "(net, hint, scale, start, end), each net a ControlNet"
            )
        if not 2 <= len(x) <= 5:
            raise ValueError(
                f"{name} has an entry of {len(x)} parts; give a net and a hint, then "
                "scale, start and end as wished"
            )
    return tuple(net.control(*how) for net, *how in value)


def one_seed_each(seed: Any, count: int) -> tuple[int, ...]:
    """seed, seed + 1 ..., or those that were given, or random ones."""
    if seed is None:
        seed = random.SystemRandom().randrange(SEEDS - count)
    if isinstance(seed, numbers.Integral):
        first = whole_number(0, SEEDS - count)("seed", seed)
        return tuple(range(first, first + count))
    if not isinstance(seed, list | tuple) or len(seed) != count:
        raise ValueError(
            f"seed is {shown(seed)}; "
            f"give a whole number, or a list of {count}, one a picture"
        )
    return tuple(whole_number(0, SEEDS - 1)("seed", x) for x in seed)


SCALE = "a finite number, 0 or more (up to 1 is no guidance)"
STRENGTH = "a number above 0 (keep the picture) up to 1 (forget it)"
SHARE = "a number from 0 (off) to 1 (full)"
ETA = "a number from 0 (no fresh noise) to 1 (as much as DDPM)"
CHECKS: dict[str, Check] = {
    "prompt": texts,
    "negative_prompt": texts,
    "image": optional(picture),
    "strength": number(1e-9, 1, STRENGTH),
    "steps": whole_number(1, 10**6),
    "cfg_scale": number(0, 1e6, SCALE),
    "sampler": one_of(SAMPLERS),
    "spacing": optional(one_of(SPACINGS)),
    "eta": optional(number(0, 1, ETA)),
    "width": optional(whole_number(1, LARGEST, "of pixels ")),
    "height": optional(whole_number(1, LARGEST, "of pixels ")),
    "n": whole_number(1, 1000, "of pictures "),
    "latents": optional(four_dimensional),
    "rescale": number(0, 1, SHARE),
    "clip_skip": whole_number(0, 100),
    "guided_times": times,
    "two_passes": yes_or_no,
    "control": controls,
    "extras": extras,
}


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
    rescale, guided_times, two_passes: of guidance. clip_skip: text layers to leave out.
    control: (net, hint, scale, start, end) of each ControlNet. extras: what else joins.
    Raises ValueError, one sentence, for each field that cannot be meant.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    image: Any = None  # checked, it is a PIL picture
    strength: float = 0.8
    steps: int = 50
    cfg_scale: float = 7.5
    sampler: str = "ddpm"
    spacing: str | None = None
    eta: float | None = None
    seed: Any = None  # checked, it is a tuple, one for each picture
    width: int | None = None
    height: int | None = None
    n: int = 1
    latents: Tensor | None = None
    rescale: float = 0.0
    clip_skip: int = 0
    guided_times: tuple[int, int] = (0, 1000)
    two_passes: bool = False
    control: Any = ()  # checked, it is a tuple of extras
    extras: Sequence["Extra"] = ()

    def __post_init__(self) -> None:
        fields = {k: check(k, getattr(self, k)) for k, check in CHECKS.items()}
        prompts, negatives = len(fields["prompt"]), len(fields["negative_prompt"])
        fields["seed"] = one_seed_each(self.seed, prompts * fields["n"])
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if negatives not in (1, prompts):
            raise ValueError(
                f"{negatives} negative prompts for {prompts} prompts; "
                "give one, or one for each"
            )
        if self.latents is not None and self.image is not None:
            raise ValueError("latents and an image are given; leave one of them out")
        check_eta(SAMPLERS[self.sampler], self.eta)

    @property
    def count(self) -> int:
        """How many pictures there will be."""
        return self.n * len(self.prompt)

    def parameters(self, i: int, width: int, height: int, model: str) -> str:
        """What the PNG of picture i says of it, as other SD programs write it."""
        negative = self.negative_prompt[i // self.n % len(self.negative_prompt)]
        said = settings_of(self, i) | {"Size": f"{width}x{height}", "Model": model}
        return describe(self.prompt[i // self.n], negative, said)


def settings_of(request: Request, i: int) -> dict[str, object]:
    """How picture i is drawn, in other programs' words."""
    spacing = SPACINGS[request.spacing].label if request.spacing else None
    said = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].label,
        "Schedule type": spacing,
        "CFG scale": request.cfg_scale,
        "Seed": request.seed[i],
        "Denoising strength": request.strength if request.image is not None else None,
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,  # from 1
        "Eta": request.eta,
        "CFG Rescale phi": request.rescale or None,
    }
    for extra in (*request.extras, *request.control):
        for name, value in extra.said().items():  # two of a kind are numbered
            count = 1 + sum(known.startswith(name) for known in said)
            said[f"{name} {count}" if count > 1 else name] = value
    return {name: value for name, value in said.items() if value is not None}


@dataclass
class Setup:
    """How a request is about to be drawn; its extras may change all of it.

    shape: (B, C, h, w). network: (latents, t, **conditioning) -> the U-Net's answer.
    noise, x0: under the noise lies the picture, if there is one. start: the latents to
    begin with, levels: where they pass, after: what is done to them after each step.
    told: what the network is told, for the prompts and for the negative ones.
    """

    request: Request
    shape: tuple[int, ...]
    levels: list[Level]
    dice: list[torch.Generator]
    network: Callable[..., Tensor]
    noise: Tensor
    x0: Tensor | None
    start: Tensor
    decode: Callable[[Tensor], list[Image.Image]]
    after: After | None = None
    told: tuple[dict[str, Tensor], dict[str, Tensor] | None] | None = None


class Extra(Protocol):
    """What joins a drawing, such as a mask: it changes the set-up, and the PNG says so.

    sd: the `StableDiffusion` that draws.
    """

    def __call__(self, sd: Any, setup: Setup) -> Setup: ...

    def said(self) -> dict[str, object]: ...


class Settings(TypedDict, total=False):
    """The fields of a `Request` beside its prompt, as keyword arguments."""

    negative_prompt: str | Sequence[str]
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
    control: Sequence[tuple]
    extras: Sequence[Extra]
