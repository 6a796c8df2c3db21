"""Picture files <-> tensors, with the settings that a PNG carries. Chapter 12.
Exported from book/12_pipeline.ipynb by `make export`; edit it there.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdlearn.disk import check_plain, write_files

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
LARGEST_INPUT = 16384  # pixels a side of a picture that we are given
LARGEST_FILE = 2**30  # bytes


def check_input_size(image: Image.Image) -> None:
    """Refuse what is too large before it is unpacked."""
    if max(image.size) > LARGEST_INPUT or min(image.size) < 1:
        size = "x".join(map(str, image.size))
        raise ValueError(
            f"the picture is {size} pixels; 1 to {LARGEST_INPUT} a side are read: "
            "make it smaller"
        )


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; what says nothing sensible is left as it lies."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data
        return image


@contextlib.contextmanager
def damage_told(path: str | Path) -> Iterator[None]:
    """Foreign bytes fail in many ways; each is one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        why = str(error) if "cannot identify" not in str(error) else "another format"
        raise ValueError(
            f"{path} cannot be read as a picture ({why}): give a PNG or a JPEG, say"
        ) from None


def open_image(path: str | Path) -> Image.Image:
    """A picture file, read to its end, upright; every way to fail is one sentence.

    Only formats that are plain data: Pillow starts a program for some others (EPS).
    """
    if not Path(path).exists():
        raise ValueError(f"there is no picture at {path}")
    check_plain(path, LARGEST_FILE)
    with damage_told(path):
        image = Image.open(path, formats=FORMATS)
    with image:
        check_input_size(image)
        with damage_told(path):
            image.load()
            return upright(image)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey in more than 8 bits -> L or LA; what is white follows from the mode."""
    if image.mode == "F":
        grey = np.asarray(image)
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 1:
            raise ValueError(
                "the picture holds floating-point numbers beyond 0 (black) to 1 "
                "(white): scale them first"
            )
        return Image.fromarray((255 * grey).round().astype(np.uint8))
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    grey = np.asarray(image).astype(np.int64).clip(0, 65535)
    light = Image.fromarray((grey / 257).round().astype(np.uint8))
    hidden = image.info.get("transparency")  # one shade of grey is clear
    if isinstance(hidden, int):
        seen = np.where(grey == hidden, 0, 255).astype(np.uint8)
        light.putalpha(Image.fromarray(seen))
    return light


def to_tensor(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture of any kind -> (1, 3, height, width) in [-1, 1]: upright, on white,
    scaled, cropped at its centre."""
    check_input_size(image)
    image = eight_bits(upright(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    lanczos = Image.Resampling.LANCZOS
    image = ImageOps.fit(image.convert("RGB"), (width, height), lanczos)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a picture."""
    if not image.isfinite().all():
        raise ValueError(
            "the picture came out as not-a-number, an overflow of 16 bits: "
            "load with dtype=torch.float32"
        )
    pixels = (image.float() * 127.5 + 127.5).round().clamp(0, 255)
    return Image.fromarray(pixels.to("cpu", torch.uint8).permute(1, 2, 0).numpy())


def describe(
    prompt: str, negative_prompt: str = "", settings: dict[str, object] | None = None
) -> str:
    """The text that SD programs keep in a PNG under "parameters": prompt, negative
    prompt, and a last line of `Name: value` pairs."""
    pairs = []
    for name, value in (settings or {}).items():
        text = str(value)
        if set(text) & set(',:"\n'):
            text = json.dumps(text, ensure_ascii=False)
        pairs.append(f"{name}: {text}")
    negative = [f"Negative prompt: {negative_prompt}"] if negative_prompt else []
    return "\n".join([prompt, *negative, ", ".join(pairs)])


def save_png(image: Image.Image, path: str | Path, parameters: str = "") -> None:
    """Write a PNG with its settings inside; it appears whole or not at all."""
    info = PngInfo()
    if parameters:
        info.add_text("parameters", parameters)
    write_files({Path(path): lambda part: image.save(part, "PNG", pnginfo=info)})


PAIR = re.compile(r'\s*([\w ][\w /+-]*): ("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def read_parameters(path: str | Path) -> dict[str, str]:
    """The settings inside a PNG, ours or another program's, as {"prompt": ...,
    "negative_prompt": ..., "Steps": ...}; {} if there are none.

    As in A1111, the last line holds settings only if it has three pairs or more.
    """
    text = open_image(path).info.get("parameters", "")
    if not isinstance(text, str) or not text:
        return {}
    lines, pairs = text.split("\n"), PAIR.findall(text.split("\n")[-1])
    pairs = pairs if len(pairs) >= 3 else []
    words = "\n".join(["", *(lines[:-1] if pairs else lines)])
    prompt, _, negative = words.partition("\nNegative prompt: ")
    said = {name.strip(): unquoted(value) for name, value in pairs}
    return said | {"prompt": prompt[1:], "negative_prompt": negative}


def unquoted(value: str) -> str:
    """A quoted value as JSON means it, or as it stands."""
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value.strip('"')
