"""Feature map -> feature map: the blocks that VAE and U-Net share. Chapter 05.
Exported from book/05_vae.ipynb by `make export`; edit it there.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.attention import Attention


class ResBlock(nn.Module):
    """Two convolutions and a shortcut: (B, C, H, W) -> (B, out_channels, H, W).

    With time_width, a time embedding (B, time_width) is added between them. He et al.
    2016; Ho et al. 2020, appendix B.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        groups: int = 32,
        eps: float = 1e-6,
        time_width: int | None = None,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels) if time_width else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(channels, out_channels, 1)
            if channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert time is not None  # whoever asked for a time_width has a time
            y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class AttentionBlock(nn.Module):
    """Every position looks at every position, one head: (B, C, H, W) -> the same."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.attention = Attention(channels, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, T, C), T = H W
        return x + self.attention(y).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Half the height and width, by a convolution of stride 2.

    The VAE pads only right and below (asymmetric=True), the U-Net on all sides.
    CompVis/stable-diffusion `ldm/modules/diffusionmodules/model.py` and
    `openaimodel.py`.
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(
            channels, channels, 3, stride=2, padding=0 if asymmetric else 1
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Twice the size, or the `size` wanted: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        size = size or tuple(2 * side for side in x.shape[-2:])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
