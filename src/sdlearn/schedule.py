"""x0, noise and t -> xt, and back: the noise schedule. Chapter 08.
Exported from book/08_ddpm.ipynb by `make export`; edit it there.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "CHOICES",
    "Schedule",
    "signal_and_noise",
    "add_noise",
    "training_target",
    "split_prediction",
    "predict_x0",
]

CHOICES = {
    "kind": ("scaled_linear", "linear"),
    "prediction": ("epsilon", "v_prediction", "sample"),
    "spacing": ("leading", "trailing", "linspace"),
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Schedule:
    """How much noise there is at each of `steps` times; the defaults are those of Stable Diffusion 1.5.

    kind: how beta grows, "linear" or "scaled_linear" (linear in sqrt(beta)).
    prediction: what the network answers, "epsilon", "v_prediction" or "sample".
    spacing, offset: which times a sampler visits, "leading", "trailing" or "linspace"
    (Lin et al. 2023, Table 2); the offset is added to "leading" times only.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    kind: str = "scaled_linear"
    prediction: str = "epsilon"
    spacing: str = "leading"
    offset: int = 1

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}"
                )
        for name, least in (("steps", 1), ("offset", 0)):
            if not _is_int(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; give a whole number, {least} or more"
                )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betas from {self.beta_start} to {self.beta_end}: give 0 < beta_start <= beta_end < 1, "
                "since each beta is the share of noise that one step mixes in"
            )

    @cached_property
    def betas(self) -> Tensor:
        """(steps,) float32 on the CPU: the variance of the noise that step t mixes in."""
        if self.kind == "linear":
            return torch.linspace(
                self.beta_start, self.beta_end, self.steps, dtype=torch.float32
            )
        return (
            torch.linspace(
                self.beta_start**0.5,
                self.beta_end**0.5,
                self.steps,
                dtype=torch.float32,
            )
            ** 2
        )

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(steps,) float32 on the CPU: how much of x0's variance is left at t."""
        return (1 - self.betas).cumprod(0)

    def timesteps(self, n: int) -> Tensor:
        """The n times that a sampler visits: (n,) int64, descending; "leading" 50 of 1000 is 981, 961 ... 1."""
        if not _is_int(n) or not 1 <= n <= self.steps:
            raise ValueError(
                f"{n!r} sampling steps: give a whole number from 1 to {self.steps}"
            )
        count = torch.arange(n, dtype=torch.float64)
        if self.spacing == "trailing":
            stride = (
                self.steps - self.steps / n
            ) - self.steps  # numpy.arange's own rounding, so that ties fall alike
            return (self.steps + count * stride).round().long() - 1
        if self.spacing == "linspace":
            return (count * ((self.steps - 1) / max(n - 1, 1))).round().long().flip(0)
        stride = self.steps // n
        offset = min(
            self.offset, self.steps - 1 - (n - 1) * stride
        )  # a thousand steps of 1000 leave no room for it
        return count.long().flip(0) * stride + offset


def signal_and_noise(
    schedule: Schedule, t: int | Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t, an int or a (B,) tensor, shaped so that they multiply `like`."""
    if isinstance(t, Tensor) and t.ndim:
        alpha_bar = schedule.alpha_bar.to(t.device)[t].view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)
    if not 0 <= t < schedule.steps:
        raise ValueError(f"t is {int(t)}; times go from 0 to {schedule.steps - 1}")
    alpha_bar = schedule.alpha_bar[
        int(t)
    ]  # without dimensions: it follows the other tensor's device and dtype
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
    """The forward process in one jump (Ho et al. 2020, eq. 4): x0, noise (B,...), t an int or (B,) -> xt (B,...)."""
    if x0.shape != noise.shape:
        raise ValueError(
            f"x0 is {tuple(x0.shape)} but noise is {tuple(noise.shape)}; draw noise in the shape of x0"
        )
    signal, sigma = signal_and_noise(schedule, t, x0)
    return signal * x0 + sigma * noise


def training_target(
    schedule: Schedule, x0: Tensor, noise: Tensor, t: int | Tensor
) -> Tensor:
    """What the network has to answer at xt = add_noise(schedule, x0, noise, t), after the schedule's `prediction`."""
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "sample":
        return x0
    signal, sigma = signal_and_noise(schedule, t, x0)
    return signal * noise - sigma * x0  # v (Salimans & Ho 2022, appendix D)


def split_prediction(
    schedule: Schedule, xt: Tensor, output: Tensor, t: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Reads the network's output at (xt, t), after the schedule's `prediction`, as the pair (x0, eps)."""
    signal, sigma = signal_and_noise(schedule, t, xt)
    if schedule.prediction == "epsilon":
        return (xt - sigma * output) / signal, output
    if schedule.prediction == "sample":
        return output, (xt - signal * output) / sigma
    return signal * xt - sigma * output, signal * output + sigma * xt


def predict_x0(
    schedule: Schedule, xt: Tensor, output: Tensor, t: int | Tensor
) -> Tensor:
    """The clean picture that the network's output (eps, unless the schedule says otherwise) means at (xt, t)."""
    return split_prediction(schedule, xt, output, t)[0]
