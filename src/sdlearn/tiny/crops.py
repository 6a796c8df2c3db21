"""the tiny model -> one that is told how its pictures were cropped. See chapter 17.

Each scene is cut: `top` rows or `left` columns are missing, and below or on the right
more of its background comes in. Captions stay. The U-Net hears six ids, as SDXL's does,
at first without any effect; in a part of the examples they are all zero, so that the
same network also knows what to draw if nobody tells it. What is saved is the difference
to the tiny model.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdlearn.checkpoint.load import load_text_encoder, load_unet, load_vae
from sdlearn.disk import check_writable, write_files
from sdlearn.pipeline import StableDiffusion
from sdlearn.request import Setup
from sdlearn.schedule import add_noise
from sdlearn.tiny.difference import (
    FILE,
    add_difference,
    fingerprint,
    low_rank,
    save_difference,
)
from sdlearn.tiny.own import check_same
from sdlearn.tiny.recipe import (
    SCHEDULE,
    add_run_arguments,
    channels_last,
    tell,
    train_task,
)
from sdlearn.tiny.scenes import BACKGROUNDS, SIZE
from sdlearn.tiny.tasks import DenoiseTask, numbered_scene, to_tensor
from sdlearn.tokenizer import Tokenizer
from sdlearn.training import Recipe, averaged_weights
from sdlearn.unet import AddedEmbedding, UNet
from sdlearn.vae import VAE

RECIPE = Recipe(
    steps=1_000, batch=16, lr=2e-3, warmup=50, cooldown=500, ema=0.99, decay=0.0
)
BANK = 2_048  # training scenes, each cut once, whose latents are computed once
SMALLEST, LARGEST = 16, 64  # pixels that are cut off at the top, or on the left
WHOLE = 0.2  # how many of the scenes are not cut
UNTOLD = 0.3  # how many of the examples come without ids
BASE, NEW = Path("checkpoints/tiny"), "add_embedding"


def random_crop(rng: random.Random) -> tuple[int, int]:
    """(top, left), in pixels: one of them, or (0, 0)."""
    cut = rng.randint(SMALLEST, LARGEST)
    return (0, 0) if rng.random() < WHOLE else rng.choice([(cut, 0), (0, cut)])


def cropped(picture: np.ndarray, top: int, left: int, ground: Any) -> np.ndarray:
    """The picture (H, W, 3) without its first rows and columns, in the same size."""
    height, width = picture.shape[:2]
    cut = np.empty_like(picture)
    cut[:] = ground
    cut[: height - top, : width - left] = picture[top:, left:]
    return cut


def told_of_sizes(unet: UNet) -> UNet:
    """The same U-Net with an input for six ids, to which it does not listen as yet."""
    told = UNet(replace(unet.config, added=6 * AddedEmbedding.waves))
    first, second = told.add_embedding.linear_1, told.add_embedding.linear_2
    nn.init.normal_(first.weight, std=0.15)  # near crops are to differ from the start
    for parameter in second.parameters():
        nn.init.zeros_(parameter)
    told.load_state_dict(told.state_dict() | unet.state_dict())
    return told


@dataclass(frozen=True)
class Untold:
    """In `extras` of a request: all ids are zero, which stands for "not told"."""

    def __call__(self, sd: Any, setup: Setup) -> Setup:
        assert setup.told is not None  # set_up says it
        nothing = (0, 0), (0, 0), (0, 0)
        return replace(setup, told=sd.with_ids(setup.told, *nothing))

    def said(self) -> dict[str, object]:
        return {}


def load_crops(
    base: str | Path = BASE, folder: str | Path | None = None
) -> StableDiffusion:
    """The tiny model that is told of crops: a checkpoint, and the difference to it.

    folder: where the difference lies; None is `base`/crops.
    """
    base = Path(base)
    sd = StableDiffusion.load(base)
    place = base, Path(folder or base / "crops"), "crops"
    unet = add_difference(told_of_sizes(sd.unet), NEW, *place)
    sd.unet = channels_last(unet.to(sd.device, sd.dtype).eval())
    return sd


def crop_of(number: int) -> tuple[int, int]:
    """How a numbered scene is cut: the same for everyone."""
    return random_crop(random.Random(f"crop {number}"))


def cut_scene(number: int) -> np.ndarray:
    """A numbered scene as the training sees it, (128, 128, 3)."""
    scene = numbered_scene(number)
    ground = BACKGROUNDS[scene.background]
    return cropped(scene.render(), *crop_of(number), ground)


@torch.no_grad()
def cut_latents(vae: VAE, count: int, path: Path, batch: int = 32) -> Tensor:
    """Latents (N, 4, 16, 16) of cut scenes, kept in a file."""
    if not path.exists():
        chunks = torch.arange(count).split(batch)
        pictures = (
            torch.stack([to_tensor(cut_scene(n)) for n in chunk.tolist()])
            for chunk in chunks
        )
        latents = torch.cat([vae.encode(x).mean for x in pictures])
        write_files({path: partial(torch.save, latents)})
    return torch.load(path, weights_only=True)


class CropTask(DenoiseTask):
    """DenoiseTask on cut scenes, told what was cut, or, by zeros, nothing at all."""

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        batch = super().examples(rngs)
        crops = [crop_of(number) for number in batch["number"].tolist()]
        rows = [
            [0] * 6 if rng.random() < UNTOLD else [SIZE, SIZE, *crop, SIZE, SIZE]
            for rng, crop in zip(rngs, crops, strict=True)
        ]
        return batch | {"ids": torch.tensor(rows)}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        level = self.schedule.at(t)
        xt = add_noise(x0, noise, level).contiguous(memory_format=torch.channels_last)
        told = {"pooled": x0.new_zeros(len(x0), 0), "ids": batch["ids"]}
        answer = self.unet(xt, t, self.text_encoder(batch["tokens"]), **told).float()
        return self.losses(answer, self.prediction.target(x0, noise, level), t)


def touches_the_edge(picture: Image.Image | np.ndarray) -> bool:
    """Is a thing cut off? Then the outermost pixels have more than one colour."""
    pixels = np.asarray(picture).astype(int)
    sides = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
    frame = np.concatenate([side.reshape(-1, 3) for side in sides])
    away = abs(frame - np.median(frame, axis=0)).max(axis=1)
    return bool((away > 60).mean() > 0.02)


def make_task(base: Path, runs: Path) -> CropTask:
    """The twin of a checkpoint, ready to learn."""
    vae, unet = load_vae(base), low_rank(told_of_sizes(load_unet(base)), NEW)
    latents = cut_latents(vae, BANK, runs / "latents.pt")
    others = load_text_encoder(base), Tokenizer.load(base / "tokenizer"), latents
    unet, vae = channels_last(unet), channels_last(vae)
    return CropTask(unet, *others, SCHEDULE, vae=vae)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """`sdlearn train crops`."""
    parser.description = (
        "Teaches the tiny U-Net to hear how its pictures were cropped. "
        f"{RECIPE.steps} steps of {RECIPE.batch} scenes; about 15 "
        "minutes of one core. Needs a checkpoint to begin with, and the drawings of "
        "the scenes: pip install 'sdlearn[train,tiny]'."
    )
    add = parser.add_argument
    add("--model", type=Path, default=BASE, metavar="FOLDER",
        help=f"the model to begin with ({BASE})")  # fmt: skip
    add("--to", type=Path, metavar="FOLDER",
        help="where the difference is written (crops/ in the model)")  # fmt: skip
    add("--steps", type=int, default=RECIPE.steps, metavar="N",
        help=f"train up to this step ({RECIPE.steps})")  # fmt: skip
    add_run_arguments(add)


def main(args: argparse.Namespace) -> None:
    """Train, or go on, and write the difference."""
    runs, to = args.runs / "crops", args.to or args.model / "crops"
    check_writable(to / FILE)
    recipe = replace(RECIPE, steps=args.steps)
    check_same(runs, model=fingerprint(args.model))
    make = partial(make_task, args.model, runs)
    train_task("crops", make, recipe, runs, args.precision)
    task = make()
    task.load_state_dict(averaged_weights(runs / "state.pt"), strict=False)
    save_difference(task.unet, NEW, args.model, to)
    tell(f"{to / FILE}: written")
