"""Picture files <-> tensors, with the settings that a PNG carries. Chapter 12.
Exported from book/12_pipeline.ipynb by `make export`; edit it there.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdlearn.weights import write_files

__all__ = [
    "LARGEST_INPUT",
    "check_input_size",
    "open_image",
    "to_tensor",
    "to_image",
    "describe",
    "save_png",
    "read_parameters",
]

LARGEST_INPUT = 16384  # pixels a side of a picture that we are given


def check_input_size(image: Image.Image) -> None:
    """Refuse what would fill the memory, before it is unpacked."""
    if max(image.size) > LARGEST_INPUT:
        size = "x".join(map(str, image.size))
        raise ValueError(
            f"the picture is {size} pixels; at most {LARGEST_INPUT} a side are read, so make it smaller"
        )


def open_image(path: str | Path) -> Image.Image:
    """A picture file, read to its end; every way to fail is one sentence."""
    try:
        with Image.open(path) as image:
            check_input_size(image)
            image.load()
            return image
    except FileNotFoundError:
        raise ValueError(f"there is no picture at {path}") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not a picture that can be read: give a PNG or a JPEG, say"
        ) from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


def to_tensor(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture of any kind -> (1, 3, height, width) in [-1, 1]: upright, on white, scaled, cropped at its centre."""
    check_input_size(image)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith(
        "I;16"
    ):  # grey in more than 8 bits
        grey = np.asarray(image, dtype=np.float32)
        image = Image.fromarray(
            (grey / (257 if grey.max() > 255 else 1)).clip(0, 255).astype(np.uint8)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(
        image.convert("RGB"), (width, height), Image.Resampling.LANCZOS
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a picture."""
    if not image.isfinite().all():
        raise ValueError(
            "the picture came out as not-a-number, an overflow of 16 bits: load with dtype=torch.float32"
        )
    pixels = (
        (image.float() * 127.5 + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    )
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def describe(prompt: str, negative_prompt: str = "", **settings: object) -> str:
    """The text that SD tools keep in a PNG under "parameters": prompt, negative prompt, `Name: value` pairs.

    An underscore in a name stands for a space: CFG_scale=7.5.
    """
    pairs = []
    for name, value in settings.items():
        text = str(value)
        text = (
            json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text
        )
        pairs.append(f"{name.replace('_', ' ')}: {text}")
    negative = [f"Negative prompt: {negative_prompt}"] if negative_prompt else []
    return "\n".join([prompt, *negative, ", ".join(pairs)])


def save_png(image: Image.Image, path: str | Path, parameters: str = "") -> None:
    """Write a PNG with its settings inside; it appears whole or not at all."""
    info = PngInfo()
    if parameters:
        info.add_text("parameters", parameters)
    write_files({Path(path): lambda part: image.save(part, "PNG", pnginfo=info)})


def read_parameters(path: str | Path) -> dict[str, str]:
    """The settings inside a PNG, as {"prompt": ..., "negative_prompt": ..., "Steps": ...}; {} if there are none."""
    text = open_image(path).info.get("parameters", "")
    *lines, settings = text.split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    found = {"prompt": prompt, "negative_prompt": negative}
    for match in re.finditer(
        r'([\w ][\w /-]*): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)', settings
    ):
        found[match[1].strip()] = (
            json.loads(match[2]) if match[2].startswith('"') else match[2]
        )
    return found if text else {}
