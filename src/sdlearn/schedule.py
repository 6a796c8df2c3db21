"""Where between picture and noise we are: schedules, levels, the jump. Chapter 08.
Exported from book/08_ddpm.ipynb and book/13_samplers.ipynb
by `make export`; edit it there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Level(NamedTuple):
    """A place between picture and noise: xt = alpha x0 + sigma noise.

    t is the time that the network is told, in training steps; it may lie between two.
    alpha, sigma: numbers, or for a batch of times tensors (B, 1, 1, 1).
    """

    t: Any
    alpha: Any
    sigma: Any

    @property
    def ratio(self) -> Any:
        """Noise over signal, what Karras et al. 2022 call sigma."""
        return self.sigma / self.alpha


CLEAN = Level(0.0, 1.0, 0.0)  # the picture itself


def linear(steps: int = 1000, start: float = 0.0001, end: float = 0.02) -> Tensor:
    """Betas (steps,) that grow evenly: those of Ho et al. 2020, section 4."""
    return torch.linspace(start, end, steps, dtype=torch.float32)


def scaled_linear(
    steps: int = 1000, start: float = 0.00085, end: float = 0.012
) -> Tensor:
    """Betas (steps,) whose square roots grow evenly: Stable Diffusion's."""
    return linear(steps, start**0.5, end**0.5) ** 2


def cosine(steps: int = 1000) -> Tensor:
    """Betas (steps,) of a squared cosine (Nichol & Dhariwal 2021, eq. 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    kept = ((t + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999).float()


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas that end in pure noise (Lin et al. 2024, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])


def is_whole(value: object, least: int, most: float) -> bool:
    """A whole number in a range, of Python's or NumPy's kind?"""
    return (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and least <= int(value) <= most
    )


def check_betas(betas: object) -> None:
    """Refuse what cannot be the betas of a schedule."""
    if (
        not isinstance(betas, Tensor)
        or betas.ndim != 1
        or len(betas) < 2
        or not ((betas > 0) & (betas <= 1)).all()
    ):
        raise ValueError(
            "betas have to be a tensor of two or more numbers above 0 and up to 1, "
            "each the share of noise that one step mixes in; take scaled_linear()"
        )


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise there is at each time; the defaults are Stable Diffusion 1.5's.

    betas: (T,) float32, the variance of the noise that each training step mixes in.
    spacing: which levels a sampler visits, a name in SPACINGS; offset is added to
    "leading" times. ends_clean: where drawing ends for the samplers that leave it to
    the schedule (DDIM): at the clean picture, or, as in SD, at the first level.
    noise_offset: how far the first noise of each channel is moved, in standard
    deviations; above 0 for a network that was trained with offset noise (chapter 09).
    """

    betas: Tensor = field(default_factory=scaled_linear, repr=False)
    spacing: str = "leading"
    offset: int = 1
    ends_clean: bool = False
    noise_offset: float = 0.0

    def __post_init__(self) -> None:
        check_betas(self.betas)
        find_spacing(self.spacing)
        if not is_whole(self.offset, 0, np.inf):
            raise ValueError(f"offset {self.offset!r}: give a whole number, 0 or more")

    @property
    def steps(self) -> int:
        """T, the number of training steps."""
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(T,) float32 on the CPU: how much of x0's variance is left at each time."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def log_snr(self) -> np.ndarray:
        """(T,) float64, falling. An alpha_bar of 0 counts as 2**-24, as in diffusers:
        every level then has a signal that one can divide by."""
        return self.alpha_bar.double().clamp(min=2.0**-24).logit().numpy()

    def at(self, t: float | Tensor) -> Level:
        """The level at a time from 0 to T - 1, or at a batch of times (B,)."""
        return level_at(self.log_snr, t)

    def at_ratio(self, ratio: float) -> Level:
        """The level whose noise is `ratio` times its signal: `at`, read backwards."""
        log_snr = -2 * np.log(ratio) if ratio else np.inf
        t = np.interp(-log_snr, -self.log_snr, np.arange(self.steps))
        alpha = (1 + ratio**2) ** -0.5
        return Level(float(t), alpha, ratio * alpha)

    def levels(
        self, n: int, spacing: str | None = None, clean: bool = True
    ) -> list[Level]:
        """The n levels to visit, noisiest first, and the one where drawing ends: at the
        clean picture, or else where the schedule says. spacing None: its own."""
        if not is_whole(n, 1, self.steps):
            raise ValueError(
                f"{n!r} sampling steps: give a whole number from 1 to {self.steps}"
            )
        visited = find_spacing(spacing or self.spacing).levels(self, int(n))
        end = CLEAN if clean or self.ends_clean else self.at(0)
        return [*visited, min(visited[-1], end, key=lambda level: level.ratio)]


def level_at(log_snr: np.ndarray, t: float | Tensor) -> Level:
    """What `Schedule.at` answers, from a table of log SNR (T,)."""
    times = np.asarray(t.cpu() if isinstance(t, Tensor) else t, dtype=np.float64)
    last = len(log_snr) - 1
    outside = ~((times >= 0) & (times <= last))  # NaN is outside, too
    if outside.any():
        raise ValueError(f"t is {times[outside][0]:g}; times go from 0 to {last}")
    found = np.interp(times, np.arange(last + 1), log_snr)
    alpha, sigma = (1 + np.exp(-found)) ** -0.5, (1 + np.exp(found)) ** -0.5
    if not isinstance(t, Tensor) or t.ndim == 0:
        return Level(float(times), float(alpha), float(sigma))
    pair = torch.from_numpy(np.stack([alpha, sigma])).float().to(t.device)
    return Level(t, *pair.view(2, -1, 1, 1, 1))


class Spacing(NamedTuple):
    """A way to choose n levels. label: the name in other programs' pictures."""

    label: str
    levels: Callable[[Schedule, int], list[Level]]


def leading(schedule: Schedule, n: int) -> list[Level]:
    """Every T // n-th time, counted from 0, plus the offset: 50 are 981, 961 ... 1."""
    stride = schedule.steps // n
    offset = min(schedule.offset, schedule.steps - 1 - (n - 1) * stride)
    return [schedule.at(i * stride + offset) for i in reversed(range(n))]


def trailing(schedule: Schedule, n: int) -> list[Level]:
    """Counted down from the last time: 50 are 999, 979 ... 19."""
    last = schedule.steps
    stride = (last - last / n) - last  # rounded as in numpy.arange: ties fall alike
    return [schedule.at(t) for t in np.round(last + np.arange(n) * stride) - 1]


def linspace(schedule: Schedule, n: int) -> list[Level]:
    """From the last time to the first, both included; halves are rounded to even."""
    times = np.round(np.arange(n) * ((schedule.steps - 1) / max(n - 1, 1)))
    return [schedule.at(t) for t in times[::-1]]


SPACINGS: dict[str, Spacing] = {
    "leading": Spacing("DDIM", leading),
    "trailing": Spacing("SGM Uniform", trailing),
    "linspace": Spacing("Uniform", linspace),
}


def find_spacing(name: object) -> Spacing:
    """A spacing by its name; an unknown name gets the list."""
    if not isinstance(name, str) or name not in SPACINGS:
        known = ", ".join(SPACINGS)
        raise ValueError(f"spacing {name!r} is unknown; choose one of {known}")
    return SPACINGS[name]


def add_noise(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """The forward process in one jump (Ho et al. 2020, eq. 4): x0 (B,...) -> xt."""
    if x0.shape != noise.shape:
        raise ValueError(
            f"x0 is {tuple(x0.shape)} but noise is {tuple(noise.shape)}; "
            "draw noise in the shape of x0"
        )
    return level.alpha * x0 + level.sigma * noise


def through(schedule: Schedule, ratios: np.ndarray) -> list[Level]:
    """Levels of these ratios; the first and the last are those of training."""
    middle = [schedule.at_ratio(float(ratio)) for ratio in ratios[1:-1]]
    return [schedule.at(schedule.steps - 1), *middle, schedule.at(0)][: len(ratios)]


def karras(schedule: Schedule, n: int, rho: float = 7.0) -> list[Level]:
    """Even in the rho-th root of the ratio (Karras et al. 2022, eq. 5)."""
    top, bottom = (schedule.at(t).ratio ** (1 / rho) for t in (schedule.steps - 1, 0))
    return through(schedule, np.linspace(top, bottom, n) ** rho)


def exponential(schedule: Schedule, n: int) -> list[Level]:
    """Even in the log of the ratio."""
    top, bottom = (schedule.at(t).ratio for t in (schedule.steps - 1, 0))
    return through(schedule, np.geomspace(top, bottom, n))


AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def align_your_steps(schedule: Schedule, n: int) -> list[Level]:
    """Ratios that were tuned for ten steps of SD 1 (Sabour et al. 2024); for another n,
    read between them in log ratio."""
    table = np.interp(np.linspace(0, len(AYS) - 1, n + 1), range(len(AYS)), np.log(AYS))
    return [schedule.at_ratio(float(ratio)) for ratio in np.exp(table[:-1])]


SPACINGS |= {
    "karras": Spacing("Karras", karras),
    "exponential": Spacing("Exponential", exponential),
    "ays": Spacing("Align Your Steps", align_your_steps),
}
