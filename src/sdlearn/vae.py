"""image <-> latents: the variational autoencoder. Chapter 05.
Exported from book/05_vae.ipynb by `make export`; edit it there.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.blocks import AttentionBlock, Downsample, ResBlock, Upsample


class DiagonalGaussian:
    """A normal distribution for every latent number.

    moments: (B, 2C, h, w), means and logarithms of variances.

    Kingma & Welling 2014, section 3 and appendix B.
    """

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise.

        The noise is drawn on the CPU, so a seed means the same on every device.
        """
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def scaled(self, factor: float) -> "DiagonalGaussian":
        """The distribution of `factor` times these numbers."""
        logvar = self.logvar + 2 * math.log(factor)
        return DiagonalGaussian(torch.cat([factor * self.mean, logvar], dim=1))

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal: (B,), in nats."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(
            dim=(1, 2, 3)
        )


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of a VAE; the defaults are Stable Diffusion 1.5's."""

    # one entry a level; the picture is halved between levels
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2  # ResBlocks a level in the encoder; the decoder has one more
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215  # 1 / std: what the U-Net sees has a spread of one
    upcast: bool = False  # it overflows in float16: compute it in float32


class Level(nn.Module):
    """The ResBlocks of one resolution, then a change of resolution (or none)."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        blocks: int,
        groups: int,
        resample: nn.Module,
    ):
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.resnets = nn.ModuleList(
            ResBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return self.resample(x)


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(channels, channels, groups) for _ in range(2)
        )
        self.attention = AttentionBlock(channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attention(self.resnets[0](x)))


class Encoder(nn.Module):
    """image (B, 3, H, W) -> mean and log-variance of the latents, (B, 8, H/8, W/8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(channels):
            last = i == len(channels) - 1
            resample = nn.Identity() if last else Downsample(width, asymmetric=True)
            self.levels.append(
                Level(channels[max(i - 1, 0)], width, config.blocks, groups, resample)
            )
        self.middle = Middle(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(
            channels[-1], 2 * config.latent_channels, 3, padding=1
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """latents (B, 4, H/8, W/8) -> image (B, 3, H, W).

    The encoder backwards, with one ResBlock a level more.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.channels[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.middle = Middle(channels[0], groups)
        self.levels = nn.ModuleList()
        for i, width in enumerate(channels):
            resample = nn.Identity() if i == len(channels) - 1 else Upsample(width)
            self.levels.append(
                Level(
                    channels[max(i - 1, 0)], width, config.blocks + 1, groups, resample
                )
            )
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(latents))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """image (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8), std near one.

    Rombach et al. 2022, section 3.1 and appendix G.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        latent, moments = config.latent_channels, 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """The distribution of the latents; `decode` is its inverse."""
        return self.unscaled(image).scaled(self.config.scale)

    def unscaled(self, image: Tensor) -> DiagonalGaussian:
        """The distribution before it is scaled, as training sees it."""
        factor = 2 ** (len(self.config.channels) - 1)
        channels, height, width = image.shape[-3:]
        if channels != 3:
            raise ValueError(
                f"image has {channels} channels, but red, green and blue are wanted: "
                "convert it to RGB"
            )
        if height % factor or width % factor:
            raise ValueError(
                f"image is {width}x{height}: both must be multiples of {factor}, "
                "so crop or resize it"
            )
        return DiagonalGaussian(self.quant_conv(self.encoder(image)))

    def decode(self, latents: Tensor) -> Tensor:
        """latents -> image in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.config.scale))
