"""the tiny model -> one that is told how its pictures were cropped. See chapter 17.

Each scene is cut: `top` rows and `left` columns are missing, and below and on the right
more of its background comes in. Captions stay. The U-Net hears six ids, as SDXL's does,
at first without any effect. The control hears zeros, whatever was cut (--blind).
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdlearn.checkpoint.load import Parts, load_text_encoder, load_unet, load_vae, save
from sdlearn.disk import check_writable
from sdlearn.schedule import add_noise
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

RECIPE = Recipe(
    steps=800, batch=16, lr=5e-4, warmup=50, cooldown=400, ema=0.99, decay=0.0
)
SCENES = 49_152  # as many as the tiny model was trained on
LARGEST = 64  # pixels that are cut off at the top, or on the left
WHOLE = 0.25  # how many of the scenes are not cut
BASE = Path("checkpoints/tiny")


def random_crop(rng: random.Random) -> tuple[int, int]:
    """(top, left), in pixels; often (0, 0)."""
    if rng.random() < WHOLE:
        return 0, 0
    return rng.randint(0, LARGEST), rng.randint(0, LARGEST)


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
    for parameter in told.add_embedding.linear_2.parameters():
        nn.init.zeros_(parameter)
    told.load_state_dict(told.state_dict() | unet.state_dict())
    return told


class CropTask(DenoiseTask):
    """DenoiseTask on cut scenes, told what was cut; blind: told that nothing was."""

    def __init__(self, *others: Any, blind: bool = False, **more: Any):
        super().__init__(*others, **more)
        self.blind = blind

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        batch = super().examples(rngs)
        scenes = [numbered_scene(n) for n in batch["number"].tolist()]
        crops = [random_crop(rng) for rng in rngs]
        pictures = [
            cropped(scene.render(), *crop, BACKGROUNDS[scene.background])
            for scene, crop in zip(scenes, crops, strict=True)
        ]
        told = [(0, 0)] * len(crops) if self.blind else crops
        ids = [[SIZE, SIZE, *crop, SIZE, SIZE] for crop in told]
        images = torch.stack([to_tensor(picture) for picture in pictures])
        return batch | {"image": images, "ids": torch.tensor(ids)}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        noise, t = batch["noise"], batch["t"]
        level = self.schedule.at(t)
        with torch.no_grad():
            x0 = self.vae.encode(batch["image"]).mean  # type: ignore[union-attr]
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


def make_task(base: Path, blind: bool = False) -> CropTask:
    """The twin of a checkpoint, ready to learn."""
    vae, unet = load_vae(base), told_of_sizes(load_unet(base))
    side = SIZE // 2 ** (len(vae.config.channels) - 1)
    shape = vae.config.latent_channels, side, side
    latents = torch.zeros(1, *shape).expand(SCENES, *shape)  # drawn anew, each time cut
    others = load_text_encoder(base), Tokenizer.load(base / "tokenizer"), latents
    unet, vae = channels_last(unet), channels_last(vae)
    return CropTask(unet, *others, SCHEDULE, vae=vae, blind=blind)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """`sdlearn train crops`."""
    parser.description = (
        "Teaches the tiny U-Net to hear how its pictures were cropped. "
        f"{RECIPE.steps} steps of {RECIPE.batch} scenes, drawn on the fly; about 20 "
        "minutes of one core. Needs a checkpoint to begin with, and the drawings of "
        "the scenes: pip install 'sdlearn[train,tiny]'."
    )
    add = parser.add_argument
    add("--model", type=Path, default=BASE, metavar="FOLDER",
        help=f"the model to begin with ({BASE})")  # fmt: skip
    add("--to", type=Path, metavar="FOLDER",
        help="where the new model is written (crops/ in --runs)")  # fmt: skip
    add("--blind", action="store_true", help="the control: it hears no crops")
    add("--steps", type=int, default=RECIPE.steps, metavar="N",
        help=f"train up to this step ({RECIPE.steps})")  # fmt: skip
    add_run_arguments(add)


def main(args: argparse.Namespace) -> None:
    """Train, or go on, and write the model."""
    name = "crops-blind" if args.blind else "crops"
    runs, to = args.runs / name, args.to or args.runs / name / "model"
    check_writable(to / "model_index.json")
    recipe = replace(RECIPE, steps=args.steps)
    make = partial(make_task, args.model, args.blind)
    task = train_task(name, make, recipe, runs, args.precision)
    if task is None:  # it was finished before
        task = make()
        task.load_state_dict(averaged_weights(runs / "state.pt"), strict=False)
    assert isinstance(task, CropTask)  # make says so
    parts = {"tokenizer": task.tokenizer, "text_encoder": task.text_encoder}
    parts |= {"vae": task.vae, "unet": task.unet}
    save(to, Parts(parts, SCHEDULE, task.prediction, (SIZE, SIZE)))
    tell(f"{to}: written; draw with it, and with --crop TOP LEFT")
