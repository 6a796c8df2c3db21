"""t -> vector: sinusoidal time embeddings. Chapter 06.
Exported from book/06_time.ipynb by `make export`; edit it there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Timesteps t (B,) -> [cos(t f), sin(t f)] (B, width), float32.

    The frequencies are f_i = max_period^(-i / (width / 2)).

    Vaswani et al. 2017, section 3.5; but cosines first, as in CompVis/stable-diffusion
    `ldm/modules/diffusionmodules/util.py`.
    """
    if width % 2:
        raise ValueError(
            f"width {width} is odd: half of it are cosines, half sines, "
            "so choose an even width"
        )
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * i / half)
    angles = t.float()[:, None] * frequencies  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids: (B,) -> (B, time_width).

    In SD 1.5 the widths are 320 and 1280. A model that is told its guidance (chapter
    18) adds a vector of guidance_width to the sinusoids.
    """

    def __init__(self, width: int, time_width: int, guidance_width: int = 0):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)
        self.cond_proj: nn.Linear | None = None
        if guidance_width:
            self.cond_proj = nn.Linear(guidance_width, width, bias=False)

    def forward(self, t: Tensor, guidance: Tensor | None = None) -> Tensor:
        sinusoids = timestep_embedding(t, self.width).to(self.linear_1.weight.dtype)
        if (guidance is None) != (self.cond_proj is None):
            what = "needs" if guidance is None else "takes no"
            raise ValueError(
                f"this U-Net {what} guidance as an input: a latent consistency model "
                "is told it, others are guided from outside"
            )
        if self.cond_proj is not None and guidance is not None:  # (B, guidance_width)
            sinusoids = sinusoids + self.cond_proj(guidance.to(sinusoids))
        return self.linear_2(F.silu(self.linear_1(sinusoids)))  # (B, E)
