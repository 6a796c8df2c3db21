"""picture + mask + prompt -> pictures: only what the mask shows is painted anew.
Exported from book/14_inpainting.ipynb by `make export`; edit it there.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from sdlearn.pictures import check_input_size, eight_bits, to_image, to_tensor, upright
from sdlearn.request import LARGEST, Setup, number, picture, whole_number, yes_or_no
from sdlearn.samplers import After
from sdlearn.schedule import Level, add_noise


def grey(mask: Image.Image) -> Image.Image:
    """A mask of any kind as grey, upright; what is transparent counts as black."""
    check_input_size(mask)
    mask = eight_bits(upright(mask))
    if mask.has_transparency_data:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    return mask.convert("L")


def lay_over(mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask in the picture's size; both need one shape, so that one crop fits."""
    image = upright(image)
    ratio = mask.width * image.height / (mask.height * image.width)
    if not 0.98 < ratio < 1.02:
        raise ValueError(
            f"the mask is {mask.width}x{mask.height} pixels and the picture "
            f"{image.width}x{image.height}: give a mask of the picture's shape, in any "
            "size"
        )
    return mask if mask.size == image.size else mask.resize(image.size)


def to_mask(mask: Image.Image, width: int, height: int) -> Tensor:
    """A grey picture -> (1, 1, height, width), cropped as pictures are: 1, to be
    painted, where it is at least half white, else 0."""
    return (to_tensor(mask, width, height)[:, :1] >= 0).float()


def to_cells(mask: Tensor, factor: int) -> Tensor:
    """mask (1,1,H,W) -> (1,1,h,w): of each cell's pixels the first one decides."""
    hole = mask[:, :, ::factor, ::factor]
    if not hole.any():
        raise ValueError(
            f"the mask is too thin: at {mask.shape[3]}x{mask.shape[2]} no cell of "
            f"{factor}x{factor} pixels is white; paint a larger area"
        )
    return hole


def rail(x0: Tensor, noise: Callable[[], Tensor], hole: Tensor, end: Level) -> After:
    """After each step the known part is put where it belongs: under the noise of the
    level that was reached, and at the end clean. hole (1,1,h,w): 1 is left alone."""

    def after(xt: Tensor, level: Level) -> Tensor:
        known = x0 if level == end else add_noise(x0, noise(), level)
        return (1 - hole) * known + hole * xt

    return after


def stairs(levels: list[Level], times: int, jump: int = 5) -> list[Level]:
    """levels, but each stretch of `jump` steps is walked `times` times.

    Lugmayr et al. 2022, section 4.2, as in the authors' code: from every jump-th level,
    counted from the last noisy one, up again by as many.
    """
    last = len(levels) - 2
    jump = max(1, min(jump, last))
    left = dict.fromkeys(range(last, jump - 1, -jump), times - 1)
    way, i = [levels[0]], 0
    while i <= last:
        i += 1
        way.append(levels[i])
        if left.get(i):
            left[i] -= 1
            i -= jump
            way.append(levels[i])
    return way


def seen_through(network: Callable[..., Tensor], more: Tensor) -> Callable[..., Tensor]:
    """A network of nine channels, as one of four: it sees `more` (B,5,h,w) as well, in
    both halves of guidance."""

    def answer(latents: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        seen = more.repeat(len(latents) // len(more), 1, 1, 1)
        return network(torch.cat([latents, seen], dim=1), t, **conditioning)

    return answer


Decode = Callable[[Tensor], list[Image.Image]]


def pasting(decode: Decode, image: Tensor, mask: Tensor, soft: float) -> Decode:
    """Decode, then put the known pixels of image (1,3,H,W) back.

    soft: the hole's edge fades over about so many pixels, inside the hole.
    """
    original = to_image(image[0])
    shown = to_image((2 * mask[0] - 1).expand(3, -1, -1)).convert("L")
    if soft:
        blurred = shown.filter(ImageFilter.GaussianBlur(soft / 2))
        faded = blurred.point([max(0, 2 * x - 255) for x in range(256)])
        shown = ImageChops.darker(shown, faded)  # never beyond the mask

    def paste(latents: Tensor) -> list[Image.Image]:
        return [Image.composite(x, original, shown) for x in decode(latents)]

    return paste


OVERLAP = 8  # pixels of the old picture that are painted again: the width of a cell


def expand(
    image: Image.Image, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """A picture -> a larger canvas with it, and the mask of what is to be painted: the
    new strips, and `OVERLAP` pixels of the old picture beside each."""
    given = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, pixels in given.items():
        whole_number(0, LARGEST, "of pixels ")(f"expand {name}", pixels)
    if not any(given.values()):
        raise ValueError("expand to which side? give left, right, top or bottom")
    image = upright(image)
    image = to_image(to_tensor(image, *image.size)[0])
    edges = (top, bottom), (left, right)
    canvas = np.pad(np.asarray(image), (*edges, (0, 0)), mode="edge")
    mask = np.full(canvas.shape[:2], 255, np.uint8)
    rows, columns = (
        slice(before and before + OVERLAP, side - (after and after + OVERLAP))
        for (before, after), side in zip(edges, canvas.shape, strict=False)
    )
    mask[rows, columns] = 0
    return Image.fromarray(canvas), Image.fromarray(mask)


def read_expansion(text: str) -> dict[str, int]:
    """left=64,right=32 -> {"left": 64, "right": 32}."""
    sides = re.findall(r"(\w+)=(\d+)", text)
    form = r"((left|right|top|bottom)=\d{1,5}(,(?!$)|$))+"
    if not re.fullmatch(form, text) or len(dict(sides)) < len(sides):
        raise ValueError(
            f"--expand is {text!r}; give sides and pixels, such as left=64,bottom=32"
        )
    return {side: int(pixels) for side, pixels in sides}


@dataclass(frozen=True, eq=False)
class Inpaint:
    """What a request needs to paint only a part of its picture anew.

    mask: a picture, or the path of one, of the picture's shape; white is painted.
    resample: how often each stretch is walked (RePaint); 1 is once.
    paste: known pixels stay as they are, to the bit. soft: pixels over which the edge
    fades. Raises ValueError, one sentence, for what cannot be meant.
    """

    mask: Any
    resample: int = 1
    paste: bool = True
    soft: float = 0.0

    def __post_init__(self) -> None:
        mask = grey(picture("mask", self.mask))
        shades = np.asarray(mask)
        if shades.max() < 128:
            raise ValueError(
                "the mask is black all over: paint white what is to be drawn anew"
            )
        if shades.min() >= 128:
            raise ValueError(
                "the mask is white all over, so nothing of the picture would be kept: "
                "use txt2img, or paint black what is to stay"
            )
        wanted = "a number of pixels from 0 (a hard edge) to 100"
        fields = {
            "mask": mask,
            "resample": whole_number(1, 100, "of times ")("resample", self.resample),
            "paste": yes_or_no("paste", self.paste),
            "soft": number(0, 100, wanted)("soft", self.soft),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __call__(self, sd: Any, setup: Setup) -> Setup:
        """The set-up of a plain drawing -> that of one with a hole."""
        given = setup.request.image
        if given is None:
            raise ValueError(
                "there is a mask, but no picture: give the one that it belongs to"
            )
        height, width = (side * sd.factor for side in setup.shape[2:])
        image = to_tensor(given, width, height)
        mask = to_mask(lay_over(self.mask, given), width, height)
        hole = to_cells(mask, sd.factor).to(sd.device)
        if sd.unet.config.in_channels == setup.shape[1]:
            setup = self.on_rails(sd, setup, hole)
        else:
            setup = self.with_eyes(sd, setup, hole, image * (mask < 0.5))
        if self.paste:
            decode = pasting(setup.decode, image, mask, self.soft)
            setup = replace(setup, decode=decode)
        return setup

    def on_rails(self, sd: Any, setup: Setup, hole: Tensor) -> Setup:
        """For a plain model: the known part is held where it belongs."""
        x0, noise, levels = setup.x0, setup.noise, setup.levels
        assert x0 is not None  # there is a picture

        def again() -> Tensor:
            return sd.first_noise(setup.shape, setup.dice)

        kept = (lambda: noise) if self.resample == 1 else again
        return replace(
            setup,
            start=noise if setup.request.strength == 1 else setup.start,
            levels=stairs(levels, self.resample),
            after=rail(x0, kept, hole, levels[-1]),
        )

    def with_eyes(self, sd: Any, setup: Setup, hole: Tensor, masked: Tensor) -> Setup:
        """For a model of nine channels: it sees the mask, and the masked picture."""
        if self.resample > 1:
            raise ValueError(
                f"resample is {self.resample}, but this model sees the picture itself: "
                "leave it at 1"
            )
        if setup.request.strength == 1:  # the picture under the hole is never asked for
            dice = [torch.Generator().manual_seed(seed) for seed in setup.request.seed]
            noise = sd.first_noise(setup.shape, dice)
            setup = replace(setup, dice=dice, noise=noise, start=noise)
        masked = sd.encode_image(masked, setup.dice)  # (B,4,h,w)
        more = torch.cat([hole.expand(len(masked), -1, -1, -1), masked], dim=1)
        return replace(setup, network=seen_through(setup.network, more))

    def said(self) -> dict[str, object]:
        """What the PNG says of it."""
        share = np.mean(np.asarray(self.mask) >= 128)
        return {
            "Masked": f"{share:.0%}",
            "Resample": self.resample if self.resample > 1 else None,
            "Mask blur": self.soft or None,
        }
