"""A folder of your own pictures -> pictures with captions, as LoRA and its neighbours
learn from them; and what a run learned from, so that no other goes on with it.

A caption stands in NAME.txt beside NAME.png, or the folder has one captions.jsonl or
metadata.jsonl for all, as the image folders on the hub have: a JSON object a line, with
"file_name" and "text".
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from sdlearn.disk import read_json, read_text, write_files
from sdlearn.pictures import open_image
from sdlearn.tiny.recipe import add_run_arguments, is_first, text_writer
from sdlearn.training import Recipe, Task

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp")
TABLES = ("metadata.jsonl", "captions.jsonl")
TEXTS = ("text", "caption", "prompt")  # what the caption is called in such a table


def read_folder(path: str | Path, prompt: str = "") -> list[tuple[Image.Image, str]]:
    """The pictures of a folder, in the order of their names, each with its caption.

    prompt: the caption of those that have none. Raises ValueError, one sentence, for
    whatever is missing or not readable.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder: give one with pictures, and NAME.txt with a "
            "caption beside each NAME.png"
        )
    files = sorted(x for x in folder.iterdir() if x.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"{folder} holds no pictures: put some there that end in "
            f"{', '.join(SUFFIXES)}"
        )
    table = read_table(folder)
    if missing := sorted(table.keys() - {x.name for x in files}):
        raise ValueError(
            f"{folder} has a caption for {missing[0]}, but no such picture: add it, or "
            "take out its line"
        )
    return [(open_image(file), caption_of(file, table, prompt)) for file in files]


def caption_of(file: Path, table: dict[str, str], prompt: str) -> str:
    """What stands beside the picture, or in the table, or else the prompt for all."""
    beside = file.with_suffix(".txt")
    if beside.exists():
        caption = read_text(beside, largest=2**16)
    else:
        caption = table.get(file.name, prompt)
    if not (caption := " ".join(caption.split())):
        raise ValueError(
            f"{file} has no caption: write one into {beside.name}, or into a line of "
            f"{TABLES[0]}"
        )
    return caption


def read_table(folder: Path) -> dict[str, str]:
    """File name -> caption, from the one table of the folder; {} if it has none."""
    table: dict[str, str] = {}
    for file in (folder / name for name in TABLES if (folder / name).exists()):
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if line.strip():
                name, caption = read_line(line, f"{file}, line {number},")
                table[name] = caption
    return table


def read_line(line: str, where: str) -> tuple[str, str]:
    """One line of a table: the name of a picture, and its caption."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    row = row if isinstance(row, dict) else {}
    caption = next((row[key] for key in TEXTS if key in row), None)
    if not isinstance(row.get("file_name"), str) or not isinstance(caption, str):
        raise ValueError(
            f'{where} is not {{"file_name": "NAME.png", "text": "a caption"}}: '
            "write it so"
        )
    return row["file_name"], caption


def check_learner(networks: Mapping[str, Any]) -> None:
    """Is it a model that can be taught here: one text encoder, four channels?"""
    unet, vae = networks["unet"].config, networks["vae"].config
    if unet.added:
        raise ValueError(
            "this model is an SDXL, but sdlearn trains on SD 1 and SD 2: take one of "
            "those (--model)"
        )
    if unet.in_channels != vae.latent_channels:
        raise ValueError(
            f"this model's U-Net takes {unet.in_channels} channels, for a mask or "
            "another picture: train on the plain model that it was made from (--model)"
        )


def mark_of(module: nn.Module, frozen: bool = False) -> str:
    """A short hash of a module's first numbers, layer by layer. frozen: of what does
    not learn."""
    found = hashlib.sha256()
    for name, x in module.named_parameters():
        if not (frozen and x.requires_grad):
            found.update(name.encode())
            found.update(x.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def mark_of_pictures(pictures: Sequence[tuple[Image.Image, str]]) -> str:
    """A short hash of pictures and their captions."""
    found = hashlib.sha256()
    for image, caption in pictures:
        found.update(f"{caption} {image.mode} {image.size} ".encode())
        found.update(image.tobytes())
    return found.hexdigest()[:16]


ABOUT = "about.json"  # in the folder of a run


def only_again(make: Callable[[], Task], folder: Path, **told: Any) -> Callable:
    """`make`, which refuses a folder where something else was learned.

    A state holds what was learned, and nothing of what lay beneath: the frozen weights,
    and what `told` names, such as the pictures. Without a look at these, a finished run
    would be written out again under a new name, or go on with other pictures.
    """

    def made() -> Task:
        task = make()
        now = {"model": mark_of(task, frozen=True)} | told
        check_same(folder, **now)
        return task

    return made


def check_same(folder: Path, **told: Any) -> None:
    """Is the run in `folder`, if there is one, of what is told? A new one notes it."""
    now = {name: str(value) for name, value in told.items()}
    path = folder / ABOUT
    if any(folder.rglob("state.pt")):
        before = read_json(path) if path.exists() else {}
        if other := sorted(x for x in now if before.get(x) != now[x]):
            raise ValueError(
                f"{folder} holds a run that differs in {', '.join(other)}: remove it, "
                "or give another folder with --runs"
            )
    elif is_first():
        text = json.dumps(now, indent=1) + "\n"
        write_files({path: text_writer(text)})


def add_picture_arguments(
    parser: argparse.ArgumentParser, sets: Collection[str], recipe: Recipe, usual: str
) -> None:
    """What all trainings on a few pictures take; a choice of these is required.

    usual: the learning rate for SD 1.5.
    """
    which, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    which.add_argument("--pictures", type=Path, metavar="FOLDER",
        help="your own: NAME.txt with a caption beside each NAME.png, or one "
        "metadata.jsonl for all")  # fmt: skip
    which.add_argument("--set", choices=sets, help="one of ours")
    add("--model", default="checkpoints/tiny", metavar="PATH",
        help="the model that learns (checkpoints/tiny)")  # fmt: skip
    add("--steps", type=int, metavar="N",
        help=f"training steps ({recipe.steps})")  # fmt: skip
    add("--lr", type=float, metavar="RATE",
        help=f"learning rate ({recipe.lr}; {usual} for SD 1.5)")  # fmt: skip
    add("--batch", type=int, metavar="B",
        help=f"of these pictures, examples a step ({recipe.batch})")  # fmt: skip
    add("--device", metavar="NAME", help="cuda, mps or cpu (the first that is there)")
    add_run_arguments(add)


def asked(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with the steps, rate and batch that the arguments name; it cools down
    for the same share of its length."""
    given = {name: getattr(args, name) for name in ("steps", "lr", "batch")}
    told = {name: value for name, value in given.items() if value is not None}
    cooldown = told.get("steps", recipe.steps) * recipe.cooldown // recipe.steps
    return replace(recipe, cooldown=cooldown, **told)
