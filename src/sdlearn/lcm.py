"""the same end, seen from everywhere on the line: latent consistency (LCM).
Exported from book/18_lcm.ipynb by `make export`; edit it there.
"""

import math

import torch
from torch import Tensor

from sdlearn.guidance import Conditioning
from sdlearn.schedule import Level, Schedule
from sdlearn.unet import UNetConfig


def segment_end(t: Tensor, segments: int, steps: int = 1000) -> Tensor:
    """Where the segment of each time ends, (B,); -1 is the picture itself.

    Four segments of 1000 times end at 749, 499, 249 and -1.
    """
    length = -(-steps // segments)
    return t // length * length - 1


def levels_at(schedule: Schedule, t: Tensor) -> Level:
    """`schedule.at` for times (B,) of which some are -1, the picture itself."""
    level, clean = schedule.at(t.clamp(min=0)), (t < 0).view(-1, 1, 1, 1)
    alpha, sigma = level.alpha.masked_fill(clean, 1), level.sigma.masked_fill(clean, 0)
    return Level(t, alpha, sigma)


def slide(xt: Tensor, x0: Tensor, start: Level, end: Level) -> Tensor:
    """Along the straight line from xt to x0, down to the end: DDIM's step."""
    eps = (xt - start.alpha * x0) / start.sigma
    return end.alpha * x0 + end.sigma * eps


def huber(found: Tensor, wanted: Tensor, c: float = 0.001) -> Tensor:
    """sqrt(d^2 + c^2) - c, the mean of each example, (B,): an error's size, not its
    square, so that few large ones do not drown the rest (Song & Dhariwal 2024, eq. 8).
    """
    d = (found - wanted).flatten(1)
    return ((d**2 + c**2).sqrt() - c).mean(dim=1)


def guidance_embedding(scale: Tensor, width: int = 256) -> Tensor:
    """Guidance scales (B,) -> (B, width), for a network that is told them.

    Like the time's, of 1000 (scale - 1), but sines first, and the slowest frequency is
    1 / 10,000 (diffusers' get_guidance_scale_embedding; Meng et al. 2023, section 3.1).
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=scale.device)
    frequencies = torch.exp(-math.log(10_000) / (half - 1) * i)
    angles = 1000 * (scale.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def told_guidance(
    config: UNetConfig, scale: float, device: torch.device | str = "cpu"
) -> Conditioning:
    """What a U-Net hears of a guidance scale: nothing, if it is guided from outside."""
    if not config.guidance_width:
        return {}
    scales = torch.tensor([scale], device=device)
    return {"guidance": guidance_embedding(scales, config.guidance_width)}


def advice(
    sampler: str,
    scale: float,
    negative: bool,
    hears: bool,
    changed: bool,
    named: bool = False,
) -> list[str]:
    """What to expect of few steps; nothing where all goes together.

    scale: of the guidance. negative: is there a negative prompt? hears: is the U-Net
    told its guidance? changed: is there a LoRA in its weights? named: is one of them an
    LCM-LoRA by its name?
    """
    said = []
    if hears and sampler != "lcm":
        said.append(
            f"this is a latent consistency model, and {sampler} does not go its way: "
            "draw with the sampler lcm, in 4 steps"
        )
    if named and not hears and sampler != "lcm":
        said.append(
            f"by its name this is an LCM-LoRA, and {sampler} does not go its way: draw "
            "with the sampler lcm, in 4 steps"
        )
    if negative and not hears and scale <= 1:
        said.append(
            f"a scale of {scale:g} is no guidance, so the negative prompt is never "
            "used: say what you want in the prompt"
        )
    if hears and negative:
        said.append(
            "this model is told its guidance, so the negative prompt is never used: "
            "say what you want in the prompt"
        )
    if sampler == "lcm" and not hears and not changed:
        said.append(
            "the sampler lcm with plain weights: one step draws a blur, four draw soft "
            "pictures; add an LCM-LoRA, or take another sampler and more steps"
        )
    if sampler == "lcm" and not hears and changed and scale > 2:
        said.append(
            f"an LCM-LoRA has its guidance inside, and a scale of {scale:g} guides it "
            "once more: take 1 to 2"
        )
    return said
