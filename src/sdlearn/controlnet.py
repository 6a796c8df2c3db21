"""hint -> residuals: a copy of the way down that a picture steers. Chapter 16.
Exported from book/16_controlnet.ipynb by `make export`; edit it there.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn

from sdlearn.blocks import Downsample
from sdlearn.checkpoint.configs import numbers, unet_from_json, unet_to_json
from sdlearn.checkpoint.dialects import (
    Rules,
    called,
    ldm_unet_rules,
    recognise,
    rename,
    unet_rules,
)
from sdlearn.checkpoint.files import (
    clean,
    json_writer,
    read_tensors,
    read_weights,
    tensor_writer,
)
from sdlearn.checkpoint.inspect import family_of
from sdlearn.checkpoint.load import Network, empty, fit, match, refuse_foreign
from sdlearn.disk import read_json, write_files
from sdlearn.pictures import to_image, to_tensor, upright
from sdlearn.request import Setup, number, one_of, picture, yes_or_no
from sdlearn.schedule import Level
from sdlearn.timestep import TimeEmbedding
from sdlearn.unet import Middle, Stage, UNet, UNetConfig


def zero(layer: nn.Module) -> nn.Module:
    """The layer, answering nothing yet."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class HintPyramid(nn.Module):
    """hint (B, 3, 8h, 8w) in [0, 1] -> (B, width, h, w), at first all zero.

    Zhang et al. 2023, section 3.2: eight convolutions, three of them of stride 2.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(channels):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
        self.conv_out = zero(nn.Conv2d(channels[-1], width, 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:
        x = F.silu(self.conv_in(hint))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """The sizes of a ControlNet: those of its U-Net, and of the hint's pyramid."""

    hint_channels: tuple[int, ...] = (16, 32, 96, 256)  # halved between them


class ControlNet(nn.Module):
    """(xt, t, context, hint) -> what a U-Net adds to its skips and its middle.

    Zhang et al. 2023, section 3. A copy of the U-Net's way down and middle; zero
    convolutions lead out of it, so that at first it adds nothing.
    """

    def __init__(self, config: ControlNetConfig, name: str = ""):
        super().__init__()
        self.config, self.name = config, name
        channels, levels = config.channels, len(config.channels)
        self.time_embedding = TimeEmbedding(channels[0], config.time_width)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.hint = HintPyramid(config.hint_channels, channels[0])
        self.down = nn.ModuleList()
        skips = [channels[0]]
        for level, width in enumerate(channels):
            for _ in range(config.blocks):
                self.down.append(Stage(skips[-1], level, config))
                skips.append(width)
            if level < levels - 1:
                self.down.append(Downsample(width))
                skips.append(width)
        self.middle = Middle(config)
        self.zero_convs = nn.ModuleList(zero(nn.Conv2d(n, n, 1)) for n in skips)
        self.zero_middle = zero(nn.Conv2d(channels[-1], channels[-1], 1))

    @classmethod
    def of(cls, unet: UNet, hint_channels: Sequence[int] = (16, 32, 96, 256)) -> Self:
        """A new ControlNet, whose copy has the weights of this U-Net."""
        sizes = {x.name: getattr(unet.config, x.name) for x in fields(UNetConfig)}
        net = cls(ControlNetConfig(**sizes, hint_channels=tuple(hint_channels)))
        for part in ("time_embedding", "conv_in", "down", "middle"):
            getattr(net, part).load_state_dict(getattr(unet, part).state_dict())
        return net

    def forward(
        self, latents: Tensor, t: Tensor, context: Tensor, hint: Tensor
    ) -> list[Tensor]:
        """latents (B,4,h,w), t (B,), context (B,S,D), hint (B or 1, 3, 8h, 8w) in
        [0, 1] -> one map for each skip of the U-Net, and one for its middle."""
        t = torch.as_tensor(t, device=latents.device).expand(len(latents))
        time = self.time_embedding(t)
        x = self.conv_in(latents) + self.hint(hint)
        maps = [x]
        for part in self.down:
            x = part(x, time, context) if isinstance(part, Stage) else part(x)
            maps.append(x)
        x = self.middle(x, time, context)
        aside = (conv(x) for conv, x in zip(self.zero_convs, maps, strict=True))
        return [*aside, self.zero_middle(x)]

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype | None = torch.float32, **how: Any
    ) -> Self:
        """From diffusers' folder, or a file of either form, also inside a whole model.

        dtype None: as in the file. how: device and layout, as `fit` takes them.
        """
        net = fit(plan(path), dtype, **how)
        path = Path(path).absolute()  # a folder's name may have a point in it
        net.name = path.name if path.is_dir() else path.stem
        return net

    def save(self, path: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
        """One file with CompVis' names if the path ends in .safetensors or .ckpt, else
        a folder that diffusers loads."""
        path = Path(path)
        ldm = path.suffix in (".safetensors", ".ckpt")
        rules, head = control_rules(self.config, ldm), LDM_HEAD if ldm else ""
        named = {head + rename(n, rules): x for n, x in self.state_dict().items()}
        if ldm:
            file = tensor_writer(named, dtype, pickled=path.suffix == ".ckpt")
            return write_files({path: file})
        write_files(
            {
                path / "config.json": json_writer(control_to_json(self.config)),
                path / "diffusion_pytorch_model.safetensors": tensor_writer(
                    named, dtype
                ),
            }
        )

    def control(
        self,
        hint: Image.Image | str | Path,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        guess: bool = False,
    ) -> "Control":
        """What joins a drawing: this network, with what it looks at."""
        return Control(self, hint, scale, start, end, guess)


def rgb(image: Image.Image) -> Image.Image:
    """A picture of any kind in three colours, upright; transparent becomes white."""
    image = upright(image)
    return to_image(to_tensor(image, *image.size)[0])


def edges(image: Image.Image, least: float = 0.25) -> Image.Image:
    """White where two neighbouring pixels differ by more than `least`, else black."""
    grey = np.asarray(rgb(image)).mean(axis=2) / 255
    jump = np.zeros(grey.shape)
    jump[:, 1:] = abs(np.diff(grey, axis=1))
    jump[1:] = np.maximum(jump[1:], abs(np.diff(grey, axis=0)))
    return Image.fromarray(np.uint8(255 * (jump > least))).convert("RGB")


def scribble(image: Image.Image, strokes: int = 64) -> Image.Image:
    """Its edges as if drawn by hand: thick and round, without the small things.

    strokes: how many of them, side by side, would fill the longer side.
    """
    image = rgb(image)
    small = image.copy()
    small.thumbnail((strokes, strokes), Image.Resampling.BOX)
    thick = edges(small).resize(image.size, Image.Resampling.BICUBIC)
    soft = thick.filter(ImageFilter.GaussianBlur(max(image.size) / strokes / 2))
    return soft.point(lambda value: 255 * (value > 96))


BOXES = ("red", "blue", "lime", "yellow", "magenta", "cyan")  # the first named is red


def draw_boxes(
    boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]
) -> Image.Image:
    """Boxes (left, top, right, bottom) -> filled with colours, on black.

    In the order in which a prompt names what belongs into them. size: width, height.
    """
    hint = Image.new("RGB", size)
    pen = ImageDraw.Draw(hint)
    for (left, top, right, bottom), colour in zip(boxes, BOXES, strict=False):
        pen.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    return hint


def layout(image: Image.Image, least: float = 0.1, cells: int = 32) -> Image.Image:
    """A box around each thing on a plain ground, from left to right.

    The ground is the most frequent colour along the edge. A thing is a patch of others,
    of more than a hundredth of the picture.
    """
    image = rgb(image)
    small = image.resize((cells, cells), Image.Resampling.BOX)
    found = np.asarray(small) / 255
    rim = np.concatenate([found[0], found[-1], found[:, 0], found[:, -1]])
    shades, counts = np.unique(rim.round(1), axis=0, return_counts=True)
    things = abs(found - shades[counts.argmax()]).max(axis=2) > least
    patches = [patch for patch in patches_of(things) if len(patch) > cells**2 / 100]
    width, height = image.width / cells, image.height / cells
    boxes = sorted(
        (
            int(patch[:, 1].min() * width),
            int(patch[:, 0].min() * height),
            int((patch[:, 1].max() + 1) * width),
            int((patch[:, 0].max() + 1) * height),
        )
        for patch in map(np.array, patches)
    )
    if len(boxes) > len(BOXES):
        warnings.warn(
            f"a layout has room for {len(BOXES)} things, but the picture has "
            f"{len(boxes)}: those farthest right are left out",
            stacklevel=2,
        )
    return draw_boxes(boxes, image.size)


GAP = (-2, -1, 0, 1, 2)  # one place between two belongs to both


def patches_of(there: np.ndarray) -> list[list[tuple[int, int]]]:
    """The places (row, column) of each connected patch of a map of yes and no."""
    left, patches = set(zip(*there.nonzero(), strict=True)), []
    while left:
        patch = [left.pop()]
        for row, column in patch:  # it grows while we walk it
            near = {(row + i, column + j) for i in GAP for j in GAP}
            patch += near & left
            left -= near
        patches.append(patch)
    return patches


PREPROCESSORS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "edges": edges,
    "scribble": scribble,
    "layout": layout,
}


def preprocess(image: Image.Image, how: str) -> Image.Image:
    """A picture -> a hint; how: a name in PREPROCESSORS."""
    hint = PREPROCESSORS[one_of(PREPROCESSORS)("preprocess", how)](image)
    if hint is not image:
        hint.info["preprocess"] = how  # for the PNG
    return hint


def control_rules(config: ControlNetConfig, ldm: bool = False) -> Rules:
    """Our names -> diffusers', or CompVis' (ldm); the copy's are those of its U-Net."""
    if not ldm:
        return (
            (r"^hint\.", "controlnet_cond_embedding."),
            (r"^zero_convs\.", "controlnet_down_blocks."),
            (r"^zero_middle\.", "controlnet_mid_block."),
            *unet_rules(config.blocks),
        )
    last = 4 * len(config.hint_channels) - 2  # SiLUs are counted there, too
    return (
        (r"^hint\.conv_in", "input_hint_block.0"),
        (r"^hint\.blocks\.(\d+)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}"),
        (r"^hint\.conv_out", f"input_hint_block.{last}"),
        (r"^zero_convs\.(\d+)", r"zero_convs.\1.0"),
        (r"^zero_middle", "middle_block_out.0"),
        *ldm_unet_rules(config.blocks, config.attention),
    )


# What a ControlNet's config.json says beside what a U-Net's says, and we always do.
ALWAYS = {
    "conditioning_channels": 3,
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
PYRAMID = "conditioning_embedding_out_channels"
UNSAID = (  # what a U-Net's says and a ControlNet's does not
    "sample_size out_channels up_block_types attention_type time_cond_proj_dim "
    "mid_block_only_cross_attention cross_attention_norm dual_cross_attention "
    "time_embedding_dim time_embedding_type time_embedding_act_fn timestep_post_act "
    "center_input_sample conv_in_kernel conv_out_kernel resnet_skip_time_act "
    "resnet_out_scale_factor"
)


def control_from_json(content: Mapping) -> ControlNetConfig:
    """A ControlNet's `config.json` -> ours."""
    for key, value in ALWAYS.items():
        if content.get(key, value) != value:
            raise ValueError(
                f"controlnet config: {key} is {clean(content[key])}, but sdlearn knows "
                f"only {value!r} here: take another ControlNet"
            )
    given = PYRAMID in content
    hint = numbers(content, PYRAMID, "controlnet") if given else (16, 32, 96, 256)
    sides = {"out_channels": content.get("in_channels"), "up_block_types": None}
    unet = unet_from_json({**content, **sides})
    return ControlNetConfig(**vars(unet), hint_channels=hint)


def control_to_json(config: ControlNetConfig) -> dict:
    """Ours -> `config.json`, for diffusers."""
    told = unet_to_json(config, 64).items()
    unet = {key: value for key, value in told if key not in UNSAID.split()}
    own = {"_class_name": "ControlNetModel", PYRAMID: list(config.hint_channels)}
    return unet | ALWAYS | own


LDM_HEAD = "control_model."


def plan(path: str | Path) -> Network:
    """What would be loaded, or a ValueError that says why not.

    path: a folder in diffusers' layout, or a file, bare or inside a whole model.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no ControlNet at {path}: give its file or folder")
    tensors = read_weights(path) if path.is_dir() else read_tensors(path)
    refuse_foreign(tensors)
    kind = recognise(tensors)
    if not kind.startswith("ControlNet"):
        raise ValueError(
            f"{path} is {called(kind)}, but a ControlNet is wanted: give its file or "
            "folder"
        )
    family = family_of(tensors.entries, tensors.metadata)
    if family.startswith(("SD 2", "SDXL")):
        raise ValueError(
            f"{path} is a ControlNet for {family}, but those of SD 1 are wanted: take "
            "the one for SD 1.5"
        )
    config = ControlNetConfig()
    if path.is_dir():
        config = control_from_json(read_json(path / "config.json"))
    head = LDM_HEAD if any(name.startswith(LDM_HEAD) for name in tensors) else ""
    tensors = tensors.only(lambda name: name.startswith(head))
    net = empty(ControlNet, config)
    rules = control_rules(config, kind.endswith("LDM names"))
    names = {name: head + rename(name, rules) for name in net.state_dict()}
    return match(net, tensors, names, tensors.path)


WEIGHT = "a finite number, such as 1.0"
PART = "a number from 0 (the first step) to 1 (the last)"


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet in a drawing, an extra of a `Request`.

    hint: a picture or its file, fitted to the drawing's size as img2img fits one.
    scale: how much it counts. start, end: in which part of the steps, 0 to 1. guess:
    it works on the half with the prompt alone, and the less the finer the map.
    """

    net: ControlNet
    hint: Any  # checked, it is a PIL picture
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        checks = {
            "hint": picture,
            "scale": number(-1e6, 1e6, WEIGHT),
            "start": number(0, 1, PART),
            "end": number(0, 1, PART),
            "guess": yes_or_no,
        }
        for name, check in checks.items():
            value = check(f"control {name}", getattr(self, name))
            object.__setattr__(self, name, value)
        if self.start >= self.end:
            raise ValueError(
                f"control begins at {self.start} and ends at {self.end} of the steps: "
                "give a start below the end"
            )

    def said(self) -> dict[str, object]:
        """For the PNG, in the words of A1111's extension."""
        words = {
            "Module": self.hint.info.get("preprocess"),
            "Model": self.net.name or "unnamed",
            "Weight": self.scale,
            "Guidance Start": self.start,
            "Guidance End": self.end,
            "Control Mode": "My prompt is more important" if self.guess else None,
        }
        told = (f"{name}: {x}" for name, x in words.items() if x is not None)
        return {f"ControlNet {self.net.name}".strip(): ", ".join(told)}

    def works_at(self, t: float, levels: Sequence[Level]) -> bool:
        """Is the step that looks at t within start and end?

        Steps are told apart by their times: a sampler that looks twice in a step looks
        between two of them, and on a way that rises a time comes again.
        """
        times = sorted({float(level.t) for level in levels[:-1]}, reverse=True)
        i = max(sum(time >= t - 1e-3 for time in times) - 1, 0)
        return i / len(times) >= self.start and (i + 1) / len(times) <= self.end

    def weights(self, count: int) -> list[float]:
        """How much each residual counts: alike, or in guess mode from 1/10 to 1."""
        rise = torch.logspace(-1, 0, count).tolist() if self.guess else [1.0] * count
        return [self.scale * x for x in rise]

    def __call__(self, sd: Any, setup: Setup) -> Setup:
        """The set-up with a network that hears the hint, too."""
        check_family(self.net, sd)
        if self.guess and setup.request.two_passes:
            raise ValueError(
                "guess mode needs both halves of guidance in one pass: leave "
                "two_passes out"
            )
        height, width = (side * sd.factor for side in setup.shape[2:])
        hint = (to_tensor(self.hint, width, height) + 1) / 2
        hint = hint.to(sd.device, sd.dtype)
        pictures, weights = setup.shape[0], self.weights(len(self.net.zero_convs) + 1)

        @torch.no_grad()
        def residuals(latents: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
            first = len(latents) - pictures if self.guess else 0  # then the prompts'
            some = latents[first:].to(sd.dtype), t[first:], context[first:]
            net = at_work(sd, self.net)
            maps = net(*some, hint)
            if sd.offload:
                net.to("cpu")
            maps = [w * x for w, x in zip(weights, maps, strict=True)]
            silent = [x.new_zeros(first, *x.shape[1:]) for x in maps]
            return [torch.cat(pair) for pair in zip(silent, maps, strict=True)]

        def network(latents: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
            others = conditioning.pop("residuals", None)
            if not self.works_at(float(t.max()), setup.levels):
                return setup.network(latents, t, residuals=others, **conditioning)
            mine = residuals(latents, t, conditioning["context"])
            if others is not None:
                mine = [a + b for a, b in zip(others, mine, strict=True)]
            return setup.network(latents, t, residuals=mine, **conditioning)

        return replace(setup, network=network)


def at_work(sd: Any, net: nn.Module) -> nn.Module:
    """The network where it computes; with offload, nothing else stays there."""
    if sd.offload:
        for other in sd.networks().values():
            other.to("cpu")
    return net.to(sd.device, sd.dtype)


def check_family(net: ControlNet, sd: Any) -> None:
    """Was it made for such a model?"""
    mine, unet = net.config, sd.unet.config
    for name in ("channels", "blocks", "context_width"):
        have, want = getattr(mine, name), getattr(unet, name)
        if have != want:
            raise ValueError(
                f"this ControlNet was made for a U-Net whose {name} are {have}, but "
                f"the model's are {want}: take both of one family"
            )
    factor, channels = 2 ** (len(mine.hint_channels) - 1), mine.in_channels
    if (factor, channels) != (sd.factor, sd.vae.config.latent_channels):
        raise ValueError(
            f"this ControlNet looks at {channels} channels of latents and makes a "
            f"hint {factor} times smaller, other than the model's VAE: take both of "
            "one family"
        )
