"""Predicted noise -> a cleaner picture, step after step: DDPM and DDIM. Chapter 08.
Exported from book/08_ddpm.ipynb by `make export`; edit it there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdlearn.schedule import Schedule, predict_x0, split_prediction

__all__ = [
    "posterior",
    "ddpm_step",
    "ddim_step",
    "kept_timesteps",
    "draw_noise",
    "SAMPLERS",
    "Step",
    "sample",
]


def posterior(schedule: Schedule, t: int, t_prev: int) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_prev | xt, x0): coefficient of x0, coefficient of xt, variance (Ho et al. 2020, eq. 7; t_prev -1 is x0)."""
    a = schedule.alpha_bar[t]
    a_prev = schedule.alpha_bar[t_prev] if t_prev >= 0 else torch.ones_like(a)
    alpha = a / a_prev
    beta = 1 - alpha
    from_x0 = a_prev.sqrt() * beta / (1 - a)
    from_xt = alpha.sqrt() * (1 - a_prev) / (1 - a)
    variance = ((1 - a_prev) / (1 - a) * beta).clamp(min=1e-20)
    return from_x0, from_xt, variance


def ddpm_step(
    schedule: Schedule, xt: Tensor, eps: Tensor, t: int, t_prev: int, noise: Tensor
) -> Tensor:
    """One ancestral step from t to t_prev (Ho et al. 2020, algorithm 2). t_prev -1 is the last step: no noise then."""
    x0 = predict_x0(schedule, xt, eps, t)
    from_x0, from_xt, variance = posterior(schedule, t, t_prev)
    mean = from_x0 * x0 + from_xt * xt
    return mean if t_prev < 0 else mean + variance.sqrt() * noise


def ddim_step(
    schedule: Schedule,
    xt: Tensor,
    eps: Tensor,
    t: int,
    t_prev: int,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One step from t to t_prev (Song et al. 2021, eqs. 12 and 16): eta 0 adds no noise, eta 1 as much as DDPM.

    After the last step (t_prev -1) Stable Diffusion's alpha_bar is alpha_bar[0], not 1 (set_alpha_to_one=False).
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta is {eta}; give a number from 0 (no noise) to 1 (the noise of DDPM)"
        )
    if eta > 0 and noise is None:
        raise ValueError(
            f"eta {eta} adds noise; pass noise in the shape of xt, or eta=0"
        )
    x0, eps = split_prediction(schedule, xt, eps, t)
    a, a_prev = schedule.alpha_bar[t], schedule.alpha_bar[max(t_prev, 0)]
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    x_prev = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * eps
    return x_prev + sigma * noise if eta > 0 else x_prev


def kept_timesteps(schedule: Schedule, n: int, strength: float) -> Tensor:
    """The last min(int(n * strength), n) of n times: where image-to-image starts; noise is added at the first one."""
    times = schedule.timesteps(n)
    if (
        not isinstance(strength, int | float) or not 0 < strength <= 1
    ):  # NaN fails here too
        raise ValueError(
            f"strength is {strength!r}; give a number above 0 (keep the picture) up to 1 (forget it)"
        )
    kept = min(int(n * strength), n)
    if kept == 0:
        least = math.ceil(1000 / n) / 1000
        raise ValueError(
            f"strength {strength} of {n} steps leaves no step to run; "
            f"give a strength of at least {least}, or more steps"
        )
    return times[n - kept :]


def draw_noise(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise, drawn on the CPU and then moved, so that a seed means the same picture on every device.

    With a sequence of generators, one for each picture, a picture does not depend on its neighbours in the batch.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)
    if len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators for {shape[0]} pictures; give one for each, or a single one"
        )
    noise = [torch.randn(*shape[1:], generator=g) for g in generator]
    return torch.stack(noise).to(device=device, dtype=dtype)


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm_step, "ddim": ddim_step}


class Step(NamedTuple):
    """What a sampler shows after each step: its index, the time it left, the new latents, and x0 as guessed at t."""

    index: int
    t: int
    latents: Tensor
    x0: Tensor


def _walk(
    denoise, xt: Tensor, schedule: Schedule, times: list[int], step, generator
) -> Iterator[Step]:
    for index, (t, t_prev) in enumerate(zip(times, [*times[1:], -1], strict=True)):
        output = denoise(xt, t)
        x0 = predict_x0(schedule, xt, output, t)
        noise = draw_noise(xt.shape, generator, xt.device, xt.dtype)
        xt = step(schedule, xt, output, t, t_prev, noise=noise)
        yield Step(index, t, xt, x0)


def sample(
    denoise: Callable[[Tensor, int], Tensor],
    latents: Tensor,
    schedule: Schedule,
    timesteps: Tensor | Sequence[int],
    sampler: str | Callable[..., Tensor] = "ddpm",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[Step]:
    """Walks latents (B,C,H,W) down the timesteps with denoise(xt, t) -> eps, and yields a `Step` after every one.

    timesteps: descending, of `schedule.timesteps(n)` or `kept_timesteps(schedule, n, strength)`.
    sampler: a name in SAMPLERS, or a step function such as `functools.partial(ddim_step, eta=0.5)`.
    It keeps gradients; call it under `torch.inference_mode()` to draw pictures.
    """
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise ValueError(
            f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}"
        )
    step = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    times = [int(t) for t in timesteps]
    if not times or sorted(set(times), reverse=True) != times:
        raise ValueError(
            f"timesteps {times} have to descend, at least one of them; take schedule.timesteps(n)"
        )
    return _walk(denoise, latents, schedule, times, step, generator)
