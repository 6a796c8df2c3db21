"""the tiny model -> its inpainting twin: a U-Net of nine channels. See chapter 14.

Five zero channels are added to the first convolution, so that the first step answers as
before. Then that convolution and a low-rank change of all other weights learn to look
through them. What is shipped is the difference: a twentieth of the U-Net's size.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from sdlearn.checkpoint.load import load_text_encoder, load_unet, load_vae
from sdlearn.disk import check_writable, write_files
from sdlearn.inpaint import to_mask
from sdlearn.pipeline import StableDiffusion
from sdlearn.schedule import add_noise
from sdlearn.tiny.difference import FILE, add_difference, low_rank, save_difference
from sdlearn.tiny.evaluate import fresh_scenes
from sdlearn.tiny.judge import Judge, load_judge, look, verdict
from sdlearn.tiny.own import check_learner, only_again
from sdlearn.tiny.recipe import (
    SCHEDULE,
    add_run_arguments,
    channels_last,
    tell,
    train_task,
)
from sdlearn.tiny.scenes import SIZE, Scene, random_thing, split_of
from sdlearn.tiny.tasks import DenoiseTask, latent_bank, numbered_scene, to_tensor
from sdlearn.tokenizer import Tokenizer
from sdlearn.training import Recipe, averaged_weights
from sdlearn.unet import UNet

RECIPE = Recipe(
    steps=800, batch=16, lr=2e-3, warmup=50, cooldown=500, ema=0.99, decay=0.0
)
NEW = "conv_in"  # the layer that is another
BANK = 3_072  # training scenes whose latents are computed once
BASE, FIGURES = Path("checkpoints/tiny"), "figures.json"


def widen(unet: UNet, channels: int = 9) -> UNet:
    """The same U-Net with more channels to look at, to which it is blind as yet."""
    wide = UNet(replace(unet.config, in_channels=channels))
    state, more = unet.state_dict(), channels - unet.config.in_channels
    state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, more))
    wide.load_state_dict(state)
    return wide


def box(rng: random.Random, least: int, most: int) -> tuple[int, int, int, int]:
    width, height = rng.randint(least, most), rng.randint(least, most)
    left, top = rng.randint(0, SIZE - width), rng.randint(0, SIZE - height)
    return left, top, left + width, top + height


def random_mask(scene: Scene, rng: random.Random) -> Tensor:
    """What is to be painted, 1 in (1, 128, 128): a thing, a box, a side, strokes, or
    all of the picture."""
    mask = Image.new("L", (SIZE, SIZE))
    draw, kind = ImageDraw.Draw(mask), rng.random()
    if kind < 0.3:
        left, top, right, bottom = rng.choice(scene.things).box
        margin = rng.randint(2, 12)
        place = left - margin, top - margin, right + margin, bottom + margin
        draw.rectangle(place, fill=255)
    elif kind < 0.5:
        draw.rectangle(box(rng, 24, 96), fill=255)
    elif kind < 0.7:
        depth, turns = rng.randint(24, 96), rng.randrange(4)
        draw.rectangle((0, 0, SIZE, depth), fill=255)
        mask = mask.rotate(90 * turns)
    elif kind < 0.9:
        for _ in range(rng.randint(1, 3)):
            ends = [(rng.randrange(SIZE), rng.randrange(SIZE)) for _ in range(3)]
            draw.line(ends, fill=255, width=rng.randint(12, 32), joint="curve")
    else:
        mask = Image.new("L", (SIZE, SIZE), 255)
    return torch.from_numpy(np.array(mask))[None] / 255


class InpaintTask(DenoiseTask):
    """DenoiseTask that also shows where to paint, and the rest of the picture.

    Rombach et al. 2022, section 4.5: [xt, mask, latents of the picture with its hole].
    """

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        batch = super().examples(rngs)
        scenes = [numbered_scene(n) for n in batch["number"].tolist()]
        pairs = zip(scenes, rngs, strict=True)
        batch["mask"] = torch.stack([random_mask(scene, rng) for scene, rng in pairs])
        images = torch.stack([to_tensor(scene.render()) for scene in scenes])
        return batch | {"image": images * (1 - batch["mask"])}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        level = self.schedule.at(t)
        with torch.no_grad():
            masked = self.vae.encode(batch["image"]).mean  # type: ignore[union-attr]
        hole = F.interpolate(batch["mask"], x0.shape[-2:])
        xt = torch.cat([add_noise(x0, noise, level), hole, masked], dim=1)
        xt = xt.contiguous(memory_format=torch.channels_last)
        answer = self.unet(xt, t, self.text_encoder(batch["tokens"])).float()
        return self.losses(answer, self.prediction.target(x0, noise, level), t)


def make_task(base: Path, runs: Path) -> InpaintTask:
    """The twin of a checkpoint, ready to learn."""
    vae, plain = load_vae(base), load_unet(base)
    check_learner({"vae": vae, "unet": plain})
    unet = low_rank(widen(plain), NEW)
    latents = latent_bank(vae, BANK, runs / "latents.pt") * vae.config.scale
    others = load_text_encoder(base), Tokenizer.load(base / "tokenizer"), latents
    return InpaintTask(channels_last(unet), *others, SCHEDULE, vae=channels_last(vae))


def load_inpainting(
    base: str | Path = BASE, folder: str | Path | None = None
) -> StableDiffusion:
    """The tiny model with nine channels: a checkpoint, and the difference to it.

    folder: where the difference lies; None is `base`/inpainting.
    """
    base = Path(base)
    sd = StableDiffusion.load(base)
    place = base, Path(folder or base / "inpainting"), "inpainting"
    unet = add_difference(widen(sd.unet), NEW, *place)
    sd.unet = channels_last(unet.to(sd.device, sd.dtype).eval())
    return sd


@dataclass(frozen=True)
class Swap:
    """A scene of two things, and the same with another first one; mask (128, 128) is
    white where the exchange takes place, and leaves the second thing alone."""

    scene: Scene
    wanted: Scene
    mask: Image.Image


def random_swap(scene: Scene, rng: random.Random, margin: int = 6) -> Swap:
    """An exchange whose outcome might have stood in training, too."""
    old, other = scene.things
    while True:
        new = replace(random_thing(rng), x=old.x, y=old.y, size=old.size)
        wanted = replace(scene, things=(new, other))
        different = new.name not in (old.name, other.name)
        if different and split_of(wanted) == "train":
            break
    mask = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in (old.box, new.box):
        place = left - margin, top - margin, right + margin, bottom + margin
        draw.rectangle(place, fill=255)
    draw.rectangle(other.box, fill=0)
    return Swap(scene, wanted, mask)


def swaps(count: int, seed: int = 0) -> list[Swap]:
    """Exchanges in fresh scenes."""
    rng = random.Random(f"swaps {seed}")
    return [random_swap(x, rng) for x in fresh_scenes(count, seed, "train", 2)]


def seam(image: Tensor, mask: Tensor) -> float:
    """How much neighbours on both sides of the mask's edge differ, of 255, on average.

    image (3, H, W) in [-1, 1]; mask (1, H, W) of 0 and 1.
    """
    steps = []
    for dim in (-1, -2):
        edge = mask[0].diff(dim=dim) != 0
        steps.append(image.diff(dim=dim).abs().mean(dim=0)[edge])
    return 127.5 * torch.cat(steps).mean().item()


def tried(
    sd: StableDiffusion, judge: Judge, tries: Sequence[Swap], seed: int = 0, **how: Any
) -> dict[str, list[float]]:
    """How each exchange comes out, 1 or 0: the new thing is there, and in its colour;
    all is right; no pixel beside the mask has changed. And its seam, beside that of the
    true picture."""
    found: dict[str, list[float]] = {}
    for i, swap in enumerate(tries):
        image, mask = swap.scene.image(), to_mask(swap.mask, SIZE, SIZE)[0]
        words = swap.wanted.sentence()
        picture = sd.inpaint(words, image, swap.mask, seed=seed + i, **how)[0]
        drawn = to_tensor(np.array(picture))
        finding, new = look(judge, drawn[None])[0], swap.wanted.things[0]
        colour = finding.things.get(new.name, ("",))[0]
        known = to_tensor(swap.scene.render())[:, mask[0] == 0]
        row = {
            "new thing": new.name in finding.things,
            "and its colour": colour == (new.colour or "own"),
            "all right": verdict(finding, swap.wanted)["all"],
            "beside the mask unchanged": torch.equal(drawn[:, mask[0] == 0], known),
            "seam": seam(drawn, mask),
            "seam, true": seam(to_tensor(swap.wanted.render()), mask),
        }
        for name, value in row.items():
            found.setdefault(name, []).append(round(float(value), 2))
    return found


WAYS: dict[str, dict[str, Any]] = {"masking": {}, "resampling": {"resample": 4}}
DRAW: dict[str, Any] = {"steps": 25, "sampler": "ddpm", "cfg_scale": 5.0}


def measure(base: Path, folder: Path, count: int) -> dict[str, Any]:
    """The exchanges by masking, by resampling, and with nine channels."""
    plain, judge, tries = StableDiffusion.load(base), load_judge(base), swaps(count)
    ways = {way: tried(plain, judge, tries, **DRAW | x) for way, x in WAYS.items()}
    nine = load_inpainting(base, folder)
    ways["nine channels"] = tried(nine, judge, tries, **DRAW)
    return {"exchanges": count, "settings": DRAW, "ways": ways}


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """`sdlearn train inpainting`."""
    parser.description = (
        "Teaches the tiny U-Net five more channels: the mask, and the picture with its "
        f"hole. {RECIPE.steps} steps of {RECIPE.batch} scenes, drawn on the fly; about "
        "20 minutes of one core. Needs a checkpoint to begin with, and the drawings "
        "of the scenes: pip install 'sdlearn[train,tiny]'."
    )
    add = parser.add_argument
    add("--model", type=Path, default=BASE, metavar="FOLDER",
        help=f"the model to begin with ({BASE})")  # fmt: skip
    add("--to", type=Path, metavar="FOLDER",
        help="where the difference is written (inpainting/ in the model)")  # fmt: skip
    add("--steps", type=int, default=RECIPE.steps, metavar="N",
        help=f"train up to this step ({RECIPE.steps})")  # fmt: skip
    add("--measure", type=int, default=0, metavar="N",
        help="then exchange N things in each of three ways, and judge (0)")  # fmt: skip
    add_run_arguments(add)


def main(args: argparse.Namespace) -> None:
    """Train, or go on, and write the difference."""
    runs, to = args.runs / "inpainting", args.to or args.model / "inpainting"
    check_writable(to / FILE)
    recipe = replace(RECIPE, steps=args.steps)
    make = only_again(partial(make_task, args.model, runs), runs)
    train_task("inpainting", make, recipe, runs, args.precision)
    task = make()
    task.load_state_dict(averaged_weights(runs / "state.pt"), strict=False)
    save_difference(task.unet, NEW, args.model, to)
    tell(f"{to / FILE}: written")
    if args.measure > 0:
        text = json.dumps(measure(args.model, to, args.measure)) + "\n"
        write_files({to / FIGURES: lambda part: part.write_text(text, "utf-8")})
        tell(f"{to / FIGURES}: written")
