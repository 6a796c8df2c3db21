"""Noise -> picture, level after level: one loop, and what each sampler aims at.
Exported from book/08_ddpm.ipynb by `make export`; edit it there.

Chapters 08 and 13.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from sdlearn.prediction import EPSILON, Prediction
from sdlearn.schedule import Level, Schedule

__all__ = [
    "Denoiser",
    "Point",
    "Leg",
    "Look",
    "Better",
    "euler",
    "Sampler",
    "SAMPLERS",
    "find_sampler",
    "check_eta",
    "draw_noise",
    "Noise",
    "Step",
    "go",
    "walk",
    "sample",
    "keep",
]


@dataclass(frozen=True)
class Denoiser:
    """A network, with what it was trained on: (xt, level) -> its guess of x0.

    network: any callable (xt (B,...), t) -> output (B,...), `Guided` for example.
    """

    network: Callable[[Tensor, float], Tensor]
    schedule: Schedule
    prediction: Prediction = EPSILON

    def __call__(self, xt: Tensor, level: Level) -> Tensor:
        return self.prediction.split(xt, self.network(xt, level.t), level)[0]


class Point(NamedTuple):
    """What was seen at a level: the latents there, and the x0 guessed in them."""

    level: Level
    xt: Tensor
    x0: Tensor

    @property
    def eps(self) -> Tensor:
        """The noise in xt, if the guess is right."""
        return self.towards(self.x0)

    def towards(self, x0: Tensor) -> Tensor:
        """The noise in xt, if x0 were the picture."""
        return (self.xt - self.level.alpha * x0) / self.level.sigma

    def aim(self, eps: Tensor) -> Tensor:
        """The picture in xt, if eps were the noise."""
        return (self.xt - self.level.sigma * eps) / self.level.alpha


class Leg(NamedTuple):
    """The way from one level to the next, in ratios of noise to signal.

    With eta, the walk goes down to `down`, below the end, and fresh noise of strength
    `up` lifts it back: down**2 + up**2 = end**2 (Song et al. 2021, eq. 16).
    """

    start: float
    end: float
    down: float
    up: float

    @classmethod
    def of(cls, start: float, end: float, eta: float = 0.0) -> "Leg":
        up = eta * end * math.sqrt(max(1 - (end / start) ** 2, 0))
        return cls(start, end, math.sqrt(max(end**2 - up**2, 0)), up)


Look = Callable[[Tensor, Leg], Point]  # where one comes to, aiming at x0, by a leg
Better = Callable[[list[Point], Leg, Look], Tensor]  # past, the newest first -> x0


def euler(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """Aim at what the network sees (Song et al. 2021, eq. 12)."""
    return past[0].x0


@dataclass(frozen=True)
class Sampler:
    """What a sampler chooses; `sample` does the rest.

    better: past (newest first), leg, look -> X, the picture to go towards.
    eta: how much fresh noise, from 0 (none) to 1 (as much as DDPM); None: it cannot.
    clean: it ends at the clean picture, else where the schedule says.
    label: its name in other programs' pictures. about: one line for a list.
    correct: past -> the latents here, once more, now that it has seen this level.
    """

    better: Better
    label: str
    about: str
    eta: float | None = 0.0
    clean: bool = True
    correct: Callable[[list[Point]], Tensor] | None = None


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(euler, "DDPM", "the first: fresh noise in every step", eta=1.0),
    "ddim": Sampler(euler, "DDIM", "straight to the guess, no dice", clean=False),
}


def find_sampler(name: object) -> Sampler:
    """A sampler by its name; an unknown name gets the list."""
    if not isinstance(name, str) or name not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler {name!r} is unknown; choose one of {known}")
    return SAMPLERS[name]


def check_eta(sampler: Sampler, eta: float | None) -> float:
    """The eta to draw with; None is the sampler's own."""
    if eta is None:
        return sampler.eta or 0.0
    if not isinstance(eta, Real) or isinstance(eta, bool) or not 0 <= eta <= 1:
        raise ValueError(
            f"eta is {eta!r}; give a number from 0 (no fresh noise) to 1 (as DDPM)"
        )
    if eta and sampler.eta is None:
        raise ValueError(
            f"{sampler.label} adds no fresh noise: leave eta out, or give 0"
        )
    return float(eta)


def draw_noise(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise, drawn on the CPU and then moved: a seed means the same
    picture on every device.

    With a sequence of generators, one for each picture, a picture does not depend on
    its neighbours in the batch.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)
    if len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators for {shape[0]} pictures; "
            "give one for each, or a single one"
        )
    noise = [torch.randn(*shape[1:], generator=g) for g in generator]
    return torch.stack(noise).to(device=device, dtype=dtype)


class Noise:
    """The dice of one step. A second look on the way and the step itself see parts of
    one random path, as a Brownian motion would have it."""

    def __init__(self, like: Tensor, generator):
        self.like, self.generator = like, generator
        self.before: tuple[float, Tensor] | None = None

    def __call__(self, leg: Leg) -> Tensor:
        like, length = self.like, leg.start - leg.end
        noise = draw_noise(like.shape, self.generator, like.device, like.dtype)
        if self.before:
            part, first = self.before
            share = part / length
            noise = share**0.5 * first + (1 - share) ** 0.5 * noise
        self.before = length, noise
        return noise


class Step(NamedTuple):
    """What `sample` shows after each step: its index, the time that it left, the
    latents where it arrived, and x0 as it was guessed at t."""

    index: int
    t: float
    latents: Tensor
    x0: Tensor


def go(here: Point, x0: Tensor, leg: Leg, end: Level, noise: Noise) -> Tensor:
    """From `here` along the straight line to x0, as far as the leg; then its noise."""
    ahead = x0 + leg.down * here.towards(x0)
    return end.alpha * (ahead + leg.up * noise(leg) if leg.up else ahead)


def walk(
    denoise: Denoiser,
    xt: Tensor,
    levels: Sequence[Level],
    sampler: Sampler,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    eta: float,
) -> Iterator[Step]:
    """`sample`, after its checks."""
    past: list[Point] = []
    for index, (start, end) in enumerate(pairwise(levels)):
        noise, seen = Noise(xt, generator), Point(start, xt, denoise(xt, start))
        past = [seen, *past[:3]]
        if sampler.correct:
            past[0] = seen._replace(xt=sampler.correct(past))

        def look(x0: Tensor, leg: Leg, here=past[0], noise=noise) -> Point:
            level = denoise.schedule.at_ratio(leg.end)
            there = go(here, x0, leg, level, noise)
            return Point(level, there, denoise(there, level))

        leg = Leg.of(start.ratio, end.ratio, eta)
        x0 = sampler.better(past, leg, look) if leg.end < leg.start else seen.x0
        xt = go(past[0], x0, leg, end, noise)
        yield Step(index, start.t, xt, seen.x0)


def sample(
    denoise: Denoiser,
    latents: Tensor,
    levels: Sequence[Level],
    sampler: str | Sampler = "ddpm",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    eta: float | None = None,
) -> Iterator[Step]:
    """Walk latents (B,...) down the levels; yields a `Step` after each.

    levels: of `schedule.levels(n)`, or the last of them for image-to-image (`keep`).
    eta: None is the sampler's own. It keeps gradients; draw pictures under
    `torch.inference_mode()`.
    """
    sampler = sampler if isinstance(sampler, Sampler) else find_sampler(sampler)
    *visited, last = [level.ratio for level in levels] or [0]
    falling = visited and all(a > b for a, b in pairwise(visited))
    if not falling or last > visited[-1]:
        raise ValueError(
            "levels have to descend, two or more of them; take schedule.levels(n)"
        )
    return walk(denoise, latents, levels, sampler, generator, check_eta(sampler, eta))


def keep(levels: Sequence[Level], strength: float) -> list[Level]:
    """Where image-to-image begins: the last int(n strength) of n steps.

    Noise is added at the first level that is kept (Meng et al. 2022, section 3).
    """
    number = isinstance(strength, Real) and not isinstance(strength, bool)
    if not number or not 0 < strength <= 1:  # NaN fails here too
        raise ValueError(
            f"strength is {strength!r}; "
            "give a number above 0 (keep the picture) up to 1 (forget it)"
        )
    n = len(levels) - 1
    kept = min(int(n * strength), n)
    if kept == 0:
        least = math.ceil(1000 / n) / 1000
        raise ValueError(
            f"strength {strength} of {n} steps leaves no step to run; "
            f"give a strength of at least {least}, or more steps"
        )
    return list(levels[n - kept :])
