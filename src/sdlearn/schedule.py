"""Where between picture and noise we are: schedules, levels, the jump. Chapter 08.
Exported from book/08_ddpm.ipynb by `make export`; edit it there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Level",
    "CLEAN",
    "scaled_linear",
    "linear",
    "cosine",
    "zero_terminal_snr",
    "Schedule",
    "Spacing",
    "leading",
    "trailing",
    "linspace",
    "SPACINGS",
    "add_noise",
]


class Level(NamedTuple):
    """A place between picture and noise: xt = alpha x0 + sigma noise.

    t is the time that the network is told, in training steps; it may lie between two.
    alpha, sigma: numbers, or for a batch of times tensors (B, 1, 1, 1).
    """

    t: float | Tensor
    alpha: float | Tensor
    sigma: float | Tensor

    @property
    def ratio(self) -> float | Tensor:
        """Noise over signal, what Karras et al. 2022 call sigma."""
        return self.sigma / self.alpha


CLEAN = Level(0.0, 1.0, 0.0)  # the picture itself


def scaled_linear(
    steps: int = 1000, start: float = 0.00085, end: float = 0.012
) -> Tensor:
    """Betas (steps,) whose square roots grow evenly: Stable Diffusion's."""
    return linear(steps, start**0.5, end**0.5) ** 2


def linear(steps: int = 1000, start: float = 0.0001, end: float = 0.02) -> Tensor:
    """Betas (steps,) that grow evenly: those of Ho et al. 2020, section 4."""
    return torch.linspace(start, end, steps, dtype=torch.float32)


def cosine(steps: int = 1000) -> Tensor:
    """Betas (steps,) of a squared cosine (Nichol & Dhariwal 2021, eq. 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    kept = ((t + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999).float()


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas that end in pure noise (Lin et al. 2023, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise there is at each time; the defaults are Stable Diffusion 1.5's.

    betas: (T,) float32, the variance of the noise that each training step mixes in.
    spacing: which levels a sampler visits, a name in SPACINGS; offset is added to
    "leading" times. ends_clean: where drawing ends for the samplers that leave it to
    the schedule (DDIM): at the clean picture, or, as in SD, at the first level.
    """

    betas: Tensor = field(default_factory=scaled_linear, repr=False)
    spacing: str = "leading"
    offset: int = 1
    ends_clean: bool = False

    def __post_init__(self):
        betas = self.betas
        whole = isinstance(betas, Tensor) and betas.ndim == 1 and len(betas) >= 2
        if not whole or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                "betas have to be a tensor of two or more numbers above 0 and up to 1, "
                "each the share of noise that one step mixes in; take scaled_linear()"
            )
        if self.spacing not in SPACINGS:
            known = ", ".join(SPACINGS)
            raise ValueError(
                f"spacing {self.spacing!r} is unknown; choose one of {known}"
            )
        if type(self.offset) is not int or self.offset < 0:
            raise ValueError(
                f"offset is {self.offset!r}; give a whole number, 0 or more"
            )

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
        """(T,) float64, falling: log(alpha_bar / (1 - alpha_bar)).

        A schedule that ends in pure noise has 2**-24 in the place of its last alpha_bar,
        as in diffusers: then every level has a signal that one can divide by.
        """
        kept = self.alpha_bar.double().clamp(min=2.0**-24)
        return kept.logit().numpy()

    def at(self, t: float | Tensor) -> Level:
        """The level at a time from 0 to T - 1, or at a batch of times (B,).

        Between two training times, log SNR is interpolated.
        """
        times = np.asarray(t.cpu() if isinstance(t, Tensor) else t, dtype=np.float64)
        if not ((times >= 0) & (times <= self.steps - 1)).all():
            worst = times.flat[np.abs(times - self.steps / 2).argmax()]
            raise ValueError(f"t is {worst:g}; times go from 0 to {self.steps - 1}")
        kept = 1 / (1 + np.exp(-np.interp(times, np.arange(self.steps), self.log_snr)))
        alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
        if times.ndim == 0:
            return Level(float(times), float(alpha), float(sigma))
        alpha, sigma = (
            torch.from_numpy(x).float().to(t.device).view(-1, 1, 1, 1)
            for x in (alpha, sigma)
        )
        return Level(t, alpha, sigma)

    def at_ratio(self, ratio: float) -> Level:
        """The level whose noise is `ratio` times its signal: `at`, read backwards."""
        kept = 1 / (1 + ratio**2)
        log_snr = -2 * np.log(ratio)
        t = np.interp(-log_snr, -self.log_snr, np.arange(self.steps))
        return Level(float(t), kept**0.5, ratio * kept**0.5)

    def levels(
        self, n: int, spacing: str | None = None, clean: bool = True
    ) -> list[Level]:
        """The n levels that a sampler visits, noisiest first, and the one where it ends.

        spacing None: the schedule's own. clean: end at the clean picture, else where
        the schedule says.
        """
        if type(n) is not int or not 1 <= n <= self.steps:
            raise ValueError(
                f"{n!r} sampling steps: give a whole number from 1 to {self.steps}"
            )
        spacing = spacing or self.spacing
        if spacing not in SPACINGS:
            known = ", ".join(SPACINGS)
            raise ValueError(f"spacing {spacing!r} is unknown; choose one of {known}")
        end = CLEAN if clean or self.ends_clean else self.at(0)
        visited = SPACINGS[spacing].levels(self, n)
        return [*(level for level in visited if level.ratio > end.ratio), end]


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
    stride = -schedule.steps / n
    times = np.round(schedule.steps + np.arange(n) * stride) - 1
    return [schedule.at(t) for t in times]


def linspace(schedule: Schedule, n: int) -> list[Level]:
    """From the last time to the first, both included; halves are rounded to even."""
    times = np.round(np.arange(n) * ((schedule.steps - 1) / max(n - 1, 1)))
    return [schedule.at(t) for t in times[::-1]]


SPACINGS: dict[str, Spacing] = {
    "leading": Spacing("DDIM", leading),
    "trailing": Spacing("SGM Uniform", trailing),
    "linspace": Spacing("Uniform", linspace),
}


def add_noise(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """The forward process in one jump (Ho et al. 2020, eq. 4): x0 (B,...) -> xt."""
    if x0.shape != noise.shape:
        raise ValueError(
            f"x0 is {tuple(x0.shape)} but noise is {tuple(noise.shape)}; "
            "draw noise in the shape of x0"
        )
    return level.alpha * x0 + level.sigma * noise
