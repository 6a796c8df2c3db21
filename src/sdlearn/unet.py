"""noisy latents + t + context -> predicted noise: the U-Net. Chapter 07.
Exported from book/07_unet.ipynb by `make export`; edit it there.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.attention import Attention
from sdlearn.blocks import Downsample, ResBlock, Upsample
from sdlearn.timestep import TimeEmbedding, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a U-Net; the defaults are Stable Diffusion 1.5's."""

    # one entry a level; the map is halved between levels
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # levels with transformers
    heads: tuple[int, ...] = (8, 8, 8, 8)
    blocks: int = 2  # ResBlocks a level on the way down; one more on the way up
    context_width: int = 768
    in_channels: int = 4
    out_channels: int = 4
    groups: int = 32
    depth: tuple[int, ...] = ()  # blocks of a transformer, a level; (): one in each
    linear: bool = False  # SD 2: transformers begin and end with Linear
    added: int = 0  # SDXL: width of the pooled text and of the ids' waves together
    zeros: bool = False  # SDXL: trained with zeros, not with "", for no prompt
    guidance_width: int = 0  # LCM: of the vector that tells it its guidance

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", self.depth or (1,) * len(self.channels))
        lists = self.channels, self.attention, self.heads, self.depth
        lengths = tuple(map(len, lists))
        if len(set(lengths)) > 1:
            raise ValueError(
                f"channels, attention, heads, depth have {lengths} entries: "
                "give each of them one entry a level"
            )
        for width in self.channels:
            if width % self.groups:
                raise ValueError(
                    f"{width} channels do not split into {self.groups} groups: "
                    "choose a multiple of them"
                )

    @property
    def time_width(self) -> int:
        return 4 * self.channels[0]


class GEGLU(nn.Module):
    """A feed-forward layer with a gate: out(a * gelu(b)), [a, b] = proj(x).

    Shazeer 2020, equation 6.
    """

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the words, feed-forward.

    Each stands after a LayerNorm and has a residual connection around it.
    """

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = GEGLU(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Pointwise(nn.Linear):
    """A Linear at each position of a map, (B, C, H, W): what a 1x1 convolution is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SpatialTransformer(nn.Module):
    """A transformer over the positions of a feature map: (B, C, H, W) -> the same.

    Rombach et al. 2022, section 3.3.
    """

    def __init__(self, channels: int, heads: int, config: UNetConfig, depth: int = 1):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        make = Pointwise if config.linear else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = make(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, config.context_width)
            for _ in range(depth)
        )
        self.proj_out = make(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, T, C), T = H W
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Stage(nn.Module):
    """A ResBlock, then a SpatialTransformer where the level has them."""

    def __init__(self, channels: int, level: int, config: UNetConfig):
        super().__init__()
        width = config.channels[level]
        self.resnet = ResBlock(
            channels, width, config.groups, eps=1e-5, time_width=config.time_width
        )
        self.attention = None
        if config.attention[level]:
            heads, depth = config.heads[level], config.depth[level]
            self.attention = SpatialTransformer(width, heads, config, depth)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnet(x, time)
        return x if self.attention is None else self.attention(x, context)


class Middle(nn.Module):
    """ResBlock, SpatialTransformer, ResBlock at the lowest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width, groups = config.channels[-1], config.groups
        self.resnets = nn.ModuleList(
            ResBlock(width, width, groups, 1e-5, config.time_width) for _ in range(2)
        )
        heads, depth = config.heads[-1], config.depth[-1]
        self.attention = SpatialTransformer(width, heads, config, depth)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.resnets[1](self.attention(self.resnets[0](x, time), context), time)


class AddedEmbedding(nn.Module):
    """What SDXL knows beside t and the words, as a vector that is added to the time's.

    pooled (B, P), ids (B, N) -> (B, time_width), for P + 256 N = added: each id becomes
    256 waves, as a time does. Podell et al. 2024, section 2.2.
    """

    waves = 256

    def __init__(self, added: int, time_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(added, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, pooled: Tensor, ids: Tensor) -> Tensor:
        waves = timestep_embedding(ids.flatten(), self.waves).unflatten(0, ids.shape)
        told = torch.cat([pooled, waves.flatten(1).to(pooled)], dim=1)  # (B, added)
        return self.linear_2(F.silu(self.linear_1(told)))  # (B, E)


class UNet(nn.Module):
    """(xt, t, context) -> the noise in xt.

    Ronneberger et al. 2015; Rombach et al. 2022, section 3.2.

    Way down: `blocks` stages a level, then half the size. Way up: `blocks` + 1 stages a
    level, each of which first takes back one map from the way down, then twice the
    size.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, levels = config.channels, len(config.channels)
        self.time_embedding = TimeEmbedding(
            channels[0], config.time_width, config.guidance_width
        )
        if config.added:
            self.add_embedding = AddedEmbedding(config.added, config.time_width)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        widths, width = [channels[0]], channels[0]  # of the maps that are pushed
        for level in range(levels):
            for _ in range(config.blocks):
                self.down.append(Stage(width, level, config))
                width = channels[level]
                widths.append(width)
            if level < levels - 1:
                self.down.append(Downsample(width))
                widths.append(width)
        self.middle = Middle(config)
        for level in reversed(range(levels)):
            for _ in range(config.blocks + 1):
                self.up.append(Stage(width + widths.pop(), level, config))
                width = channels[level]
            if level > 0:
                self.up.append(Upsample(width))
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        context: Tensor,
        residuals: Sequence[Tensor] | None = None,
        pooled: Tensor | None = None,
        ids: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """latents (B, 4, h, w), t (B,) or one, context (B, S, D) -> (B, 4, h, w).

        residuals: what a second network adds, one map for each that is kept on the way
        down, in order, and one for the middle. pooled (B, P), ids (B, N): what SDXL is
        told beside the words. guidance (B, guidance_width): where it is told that.
        """
        self.check(latents, context, pooled, ids)
        t = torch.as_tensor(t, device=latents.device).expand(len(latents))
        time = self.time_embedding(t, guidance)  # (B, E)
        if pooled is not None and ids is not None:
            time = time + self.add_embedding(pooled, ids)
        x = self.conv_in(latents)
        skips = [x]
        for part in self.down:
            x = part(x, time, context) if isinstance(part, Stage) else part(x)
            skips.append(x)
        x = self.middle(x, time, context)
        if residuals is not None:
            *aside, middle = residuals
            skips = [x + more for x, more in zip(skips, aside, strict=True)]
            x = x + middle
        for part in self.up:
            if isinstance(part, Stage):
                x = part(torch.cat([x, skips.pop()], dim=1), time, context)
            else:
                # an odd side was halved upwards, so ask for the skip's size
                x = part(x, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def check(self, latents: Tensor, context: Tensor, *more: Tensor | None) -> None:
        """Say what is wrong with the inputs before a layer deep inside does."""
        if latents.shape[1] != self.config.in_channels:
            have, want = latents.shape[1], self.config.in_channels
            raise ValueError(
                f"latents have {have} channels, but this U-Net takes {want}: "
                "use its own VAE"
            )
        if context.shape[-1] != self.config.context_width:
            have, want = context.shape[-1], self.config.context_width
            raise ValueError(
                f"context is {have} wide, but this U-Net reads {want}: "
                "use its own text encoder"
            )
        told = [0 if x is None else x.shape[-1] for x in more]
        if told[0] + AddedEmbedding.waves * told[1] != self.config.added:
            raise ValueError(
                f"pooled is {told[0]} wide and there are {told[1]} ids, but this U-Net "
                f"reads {self.config.added} = pooled + {AddedEmbedding.waves} x ids: "
                "encode the prompt with its own text encoders"
            )


@contextmanager
def record_attention(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While open, note where the words are looked for.

    Yields {layer: probabilities (B, N, T, S)}, float32.

    Every call of the U-Net counts: the maps are the mean over all calls, which need the
    same shapes; open it anew for each step to see the steps apart. Forward hooks
    recompute softmax(q k^T / sqrt K); the U-Net's answer is unchanged.
    """
    maps: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    @torch.no_grad()
    def note(
        layer: str, attention: Attention, inputs: tuple[Tensor, Tensor], _: Tensor
    ) -> None:
        x, context = inputs
        q = attention.split_heads(attention.to_q(x))
        k = attention.split_heads(attention.to_k(context))
        scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        p = scores.softmax(dim=-1)  # (B, N, T, S)
        calls[layer] += 1
        maps[layer] = p if calls[layer] == 1 else maps[layer].lerp(p, 1 / calls[layer])

    layers = {name: x for name, x in unet.named_modules() if name.endswith("attn2")}
    hooks = [x.register_forward_hook(partial(note, name)) for name, x in layers.items()]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def attention_maps(maps: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Recorded probabilities -> one heat map a token: (B, S, h, w) for size (h, w).

    Tang et al. 2023, section 2.

    The mean over heads and layers, each resized to `size`: that of the latents, of the
    picture, or any other of that shape. At every place the tokens share 1 between them.
    Give a part of the record to see some layers alone.
    """
    if not maps:
        raise ValueError(
            "nothing was recorded: call the U-Net inside `with "
            "record_attention(unet) as maps`"
        )
    height, width = size
    resized = []
    for layer, p in maps.items():
        count = p.shape[2]
        rows = round(math.sqrt(count * height / width))
        fits = rows and count % rows == 0
        if not fits or abs(count / rows - rows * width / height) > 0.5:
            raise ValueError(
                f"{layer} has {count} places, not a {height}:{width} map: "
                "give the latents' size"
            )
        # (B, S, rows, columns)
        places = p.mean(dim=1).transpose(1, 2).unflatten(2, (rows, -1))
        resized.append(F.interpolate(places, (height, width), mode="bilinear"))
    return torch.stack(resized).mean(dim=0)
