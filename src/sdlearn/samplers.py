"""Noise -> picture, level after level: one loop, and what each sampler aims at.
Exported from book/08_ddpm.ipynb, book/13_samplers.ipynb and book/18_lcm.ipynb
by `make export`; edit it there.

Chapters 08 and 13.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdlearn.prediction import EPSILON, Prediction
from sdlearn.schedule import CLEAN, Level, Schedule, is_whole


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
    leg: start, end, eta -> how much of the noise it keeps, how much is fresh.
    levels: schedule, n, strength -> levels of its own, where it needs them.
    """

    better: Better
    label: str
    about: str
    eta: float | None = 0.0
    clean: bool = True
    correct: Callable[[list[Point]], Tensor] | None = None
    leg: Callable[[float, float, float], Leg] = Leg.of
    levels: Callable[[Schedule, int, float], list[Level]] | None = None


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


Dice = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: Sequence[int],
    generator: Dice = None,
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

    def __init__(self, like: Tensor, generator: Dice):
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

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    t: float
    latents: Tensor
    x0: Tensor


After = Callable[[Tensor, Level], Tensor]  # latents at a level -> changed ones


def climb(xt: Tensor, start: Level, end: Level, generator: Dice) -> Tensor:
    """Back to a noisier level: fresh noise, as much as there is less at the start."""
    noise = draw_noise(xt.shape, generator, xt.device, xt.dtype)
    more = math.sqrt(end.ratio**2 - start.ratio**2)
    return end.alpha * (xt / start.alpha + more * noise)


def go(here: Point, x0: Tensor, leg: Leg, end: Level, noise: Noise) -> Tensor:
    """From `here` along the straight line to x0, as far as the leg; then its noise."""
    ahead = x0 + leg.down * here.towards(x0)
    return end.alpha * (ahead + leg.up * noise(leg) if leg.up else ahead)


def walk(
    denoise: Denoiser,
    xt: Tensor,
    levels: Sequence[Level],
    sampler: Sampler,
    generator: Dice,
    eta: float,
    after: After | None = None,
) -> Iterator[Step]:
    """`sample`, after its checks."""
    past: list[Point] = []
    guess = xt
    for index, (start, end) in enumerate(pairwise(levels)):
        if end.ratio > start.ratio:
            xt, past = climb(xt, start, end, generator), []
            yield Step(index, start.t, xt, guess)
            continue
        noise, seen = Noise(xt, generator), Point(start, xt, denoise(xt, start))
        past, guess = [seen, *past[:3]], seen.x0
        if sampler.correct:
            past[0] = seen._replace(xt=sampler.correct(past))

        def look(
            x0: Tensor, leg: Leg, here: Point = past[0], noise: Noise = noise
        ) -> Point:
            level = denoise.schedule.at_ratio(leg.end)
            there = go(here, x0, leg, level, noise)
            return Point(level, there, denoise(there, level))

        leg = sampler.leg(start.ratio, end.ratio, eta)
        x0 = sampler.better(past, leg, look) if leg.end < leg.start else guess
        xt = go(past[0], x0, leg, end, noise)
        xt = after(xt, end) if after else xt
        yield Step(index, start.t, xt, guess)


def sample(
    denoise: Denoiser,
    latents: Tensor,
    levels: Sequence[Level],
    sampler: str | Sampler = "ddpm",
    generator: Dice = None,
    eta: float | None = None,
    after: After | None = None,
) -> Iterator[Step]:
    """Walk latents (B,...) down the levels; yields a `Step` after each.

    levels: of `schedule.levels(n)`, or the last of them for image-to-image (`keep`).
    Where they rise on the way, fresh noise lifts the latents, and what was seen is
    forgotten. eta: None is the sampler's own. after: may change the latents after each
    step down. It keeps gradients; draw pictures under
    `torch.inference_mode()`.
    """
    sampler = sampler if isinstance(sampler, Sampler) else find_sampler(sampler)
    *visited, last = [level.ratio for level in levels] or [0]
    moving = all(a != b for a, b in pairwise(visited))
    if not visited or not moving or last > min(visited) or visited[0] < max(visited):
        raise ValueError(
            "levels have to descend, two or more of them; take schedule.levels(n)"
        )
    eta = check_eta(sampler, eta)
    return walk(denoise, latents, levels, sampler, generator, eta, after)


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


def half_way(past: list[Point], leg: Leg, look: Look) -> Point:
    """What is seen on the line to x0, half way down the leg in log ratio."""
    return look(past[0].x0, Leg.of(leg.start, math.sqrt(leg.start * leg.down)))


def dpm2(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """Borrow the noise from half way (Lu et al. 2022a, algorithm 1)."""
    if leg.down == 0:
        return past[0].x0
    return past[0].aim(half_way(past, leg, look).eps)


def dpmpp_2s(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """Borrow the x0 from half way (Lu et al. 2022b, algorithm 1)."""
    return past[0].x0 if leg.down == 0 else half_way(past, leg, look).x0


def heun(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """The mean of the noise here and at the end (Karras et al. 2022, algorithm 1)."""
    if leg.down == 0:
        return past[0].x0
    end = look(past[0].x0, Leg.of(leg.start, leg.down))
    return past[0].aim((past[0].eps + end.eps) / 2)


def dpmpp_2m(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """The line through the last two x0, over log ratio, read half way down the leg
    (Lu et al. 2022b, algorithm 2)."""
    now, *before = past
    if not before or leg.end == 0:
        return now.x0
    q = math.log(before[0].level.ratio / leg.start) / math.log(leg.start / leg.end)
    return now.x0 + (now.x0 - before[0].x0) / (2 * q)


def dpmpp_3m(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """The parabola through the last three x0, with half its curve, as in the authors'
    code; with noise as in k-diffusion's dpmpp_3m_sde."""
    if len(past) < 3 or leg.end == 0:
        return dpmpp_2m(past, leg, look)
    now, one, two = past[:3]
    steps = [math.log(b.level.ratio / a.level.ratio) for a, b in pairwise(past[:3])]
    q0, q1 = (step / math.log(leg.start / leg.end) for step in steps)
    a, b = (now.x0 - one.x0) / q0, (one.x0 - two.x0) / q1
    slope, curve = a + q0 / (q0 + q1) * (a - b), (a - b) / (q0 + q1)
    h = math.log(leg.start / leg.down)
    part = -1 / math.expm1(-h) - 1 / h  # the mean share of the leg, even in 1 / ratio
    square = part + (1 - 2 * part) / h  # the mean of its square
    return now.x0 + part * slope + square / 2 * curve


def shares(
    knots: Sequence[float],
    leg: Leg,
    by: Callable = lambda ratio: ratio,
    evenly: Callable = lambda ratio: ratio,
) -> list[float]:
    """How much the value at each knot counts in a mean over the leg.

    Through the values at the knots (ratios) goes a polynomial in by(ratio); its mean is
    taken evenly in ratio, or in 1 / ratio: `evenly` has to be its own inverse.
    """
    nodes, weights = np.polynomial.legendre.leggauss(32)
    ratios = evenly(np.interp(nodes, [-1, 1], [evenly(leg.start), evenly(leg.end)]))
    found = []
    for a in knots:
        others = [by(b) for b in knots if b != a]
        basis = np.prod([(by(ratios) - b) / (by(a) - b) for b in others], axis=0)
        found.append(float((weights * basis).sum() / 2))
    return found


def weighted(parts: Sequence[float], tensors: list[Tensor]) -> Tensor:
    """Their sum, each times its part."""
    first, *rest = (part * x for part, x in zip(parts, tensors, strict=True))
    return sum(rest, first)


def lms(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """The mean over the leg of the cubic through the last four eps: Adams-Bashforth
    for uneven steps, as in k-diffusion."""
    parts = shares([point.level.ratio for point in past], leg)
    return past[0].aim(weighted(parts, [point.eps for point in past]))


def deis(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """As lms, of the parabola over log ratio (Zhang & Chen 2023, tAB-DEIS)."""
    if leg.end == 0:
        return past[0].x0
    parts = shares([point.level.ratio for point in past[:3]], leg, by=np.log)
    return past[0].aim(weighted(parts, [point.eps for point in past[:3]]))


ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
         (55 / 24, -59 / 24, 37 / 24, -9 / 24))  # fmt: skip


def plms(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """As lms, with the weights of even steps; the first step is Heun's
    (Liu et al. 2022, section 3)."""
    if len(past) == 1:
        return heun(past, leg, look)
    parts = ADAMS[len(past) - 1]
    return past[0].aim(weighted(parts, [point.eps for point in past]))


def unipc(past: list[Point]) -> Tensor:
    """Go the last leg again, now that its end was seen: xt there (Zhao et al. 2023,
    section 3)."""
    now, *before = past
    if not before:
        return now.xt
    last = before[0]
    better = (now.x0 + last.x0) / 2
    if len(before) > 1:
        leg = Leg.of(last.level.ratio, now.level.ratio)
        knots = [point.level.ratio for point in past[:3]]
        parts = shares(knots, leg, by=np.log, evenly=np.reciprocal)
        better = weighted(parts, [point.x0 for point in past[:3]])
    return now.level.alpha * (better + now.level.ratio * last.towards(better))


def dpmpp_sde(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """The x0 from half way to the end, where the walk arrives with noise of its own
    (k-diffusion's dpmpp_sde)."""
    if leg.end == 0:
        return past[0].x0
    eta = leg.up / Leg.of(leg.start, leg.end, 1.0).up
    half = Leg.of(leg.start, math.sqrt(leg.start * leg.end), eta)
    return look(past[0].x0, half).x0


SAMPLERS |= {
    "euler": Sampler(euler, "Euler", "straight to the guess; as DDIM, to the end"),
    "euler_a": Sampler(euler, "Euler a", "DDPM by its other name", eta=1.0),
    "heun": Sampler(heun, "Heun", "looks twice: here and at the end", eta=None),
    "dpm2": Sampler(dpm2, "DPM2", "looks twice: noise from half way"),
    "dpm2_a": Sampler(dpm2, "DPM2 a", "the same with fresh noise", eta=1.0),
    "dpmpp_2s_a": Sampler(
        dpmpp_2s, "DPM++ 2S a", "looks twice: the picture from half way", eta=1.0
    ),
    "dpmpp_2m": Sampler(dpmpp_2m, "DPM++ 2M", "a line through the last two guesses"),
    "dpmpp_2m_sde": Sampler(
        dpmpp_2m, "DPM++ 2M SDE", "the same with fresh noise", eta=1.0
    ),
    "dpmpp_3m": Sampler(dpmpp_3m, "DPM++ 3M", "a curve through the last three"),
    "dpmpp_3m_sde": Sampler(
        dpmpp_3m, "DPM++ 3M SDE", "the same with fresh noise", eta=1.0
    ),
    "dpmpp_sde": Sampler(
        dpmpp_sde, "DPM++ SDE", "looks twice, with fresh noise in between", eta=1.0
    ),
    "lms": Sampler(lms, "LMS", "a curve through the noise of four looks", eta=None),
    "plms": Sampler(plms, "PLMS", "the first fast one; for even steps", None, False),
    "deis": Sampler(deis, "DEIS", "three looks, in log noise", eta=None),
    "unipc": Sampler(
        dpmpp_2m, "UniPC", "2M that corrects its last step", eta=None, correct=unipc
    ),
}


def boundary(t: float) -> tuple[float, float]:
    """How much of xt stays at a time, and how much of the guess comes in.

    (0, 1) but for the last few times; (1, 0) at t = 0, where xt is the picture itself
    (Luo et al. 2023, section 4.1; they scale the time by 10, and data have 0.5).
    """
    scaled = 10 * t
    return 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)


def lcm(past: list[Point], leg: Leg, look: Look) -> Tensor:
    """Aim at the end of the line, which a consistency model sees from everywhere."""
    stays, comes = boundary(past[0].level.t)
    return stays * past[0].xt + comes * past[0].x0


def afresh(start: float, end: float, eta: float) -> Leg:
    """A leg that leaves the old noise behind: with eta 1 all noise is fresh, with 0
    none is (Song et al. 2023, algorithm 1)."""
    return Leg(start, end, end * math.sqrt(1 - eta**2), end * eta)


LCM_TIMES = 50  # that LCMs are trained at: 999, 979 ... 19


def lcm_levels(schedule: Schedule, n: int, strength: float = 1.0) -> list[Level]:
    """n of the 50 times of training, spread evenly, noisiest first; and the picture.

    Below strength 1 they are of the last of the 50: all n are visited, from less noise.
    """
    times = np.arange(1, int(LCM_TIMES * strength) + 1)
    times = times * (schedule.steps // LCM_TIMES) - 1
    if not is_whole(n, 1, len(times)):
        of = f"up to {len(times)}" if len(times) else "with a larger strength"
        raise ValueError(
            f"{n!r} steps of the sampler lcm at strength {strength:g}: take a whole "
            f"number, {of}; 4 are usual"
        )
    chosen = np.linspace(0, len(times), int(n), endpoint=False).astype(int)
    return [*(schedule.at(float(t)) for t in times[::-1][chosen]), CLEAN]


SAMPLERS |= {
    "lcm": Sampler(
        lcm,
        "LCM",
        "1 to 8 steps, for models made for it; without guidance",
        eta=1.0,
        leg=afresh,
        levels=lcm_levels,
    )
}
