"""scenes, or your own pictures -> a ControlNet. Chapter 16 explains.

`sdlearn train controlnet` copies the way down of a U-Net, which itself stays as it is,
and teaches the copy to listen to a hint: edges, a scribble, or a layout of boxes.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from sdlearn.checkpoint.load import Parts, load
from sdlearn.controlnet import (
    ControlNet,
    HintPyramid,
    draw_boxes,
    edges,
    preprocess,
    scribble,
)
from sdlearn.disk import check_writable, write_files
from sdlearn.pictures import open_image, to_tensor
from sdlearn.samplers import SAMPLERS, Denoiser, sample
from sdlearn.schedule import add_noise
from sdlearn.tiny.evaluate import fresh_scenes
from sdlearn.tiny.own import check_learner, mark_of_pictures, only_again, read_folder
from sdlearn.tiny.recipe import (
    add_run_arguments,
    channels_last,
    lines_of,
    tell,
    text_writer,
    thinned,
    train_task,
)
from sdlearn.tiny.scenes import SIZE, Scene, Thing
from sdlearn.tiny.tasks import DenoiseTask, latent_bank, normal, numbered_scene
from sdlearn.training import Recipe, averaged_weights

Told = tuple[str, Tensor]  # a caption, and a hint (3, H, W) in [0, 1]


def to_hint(image: Image.Image) -> Tensor:
    """A picture -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def outlines(draw: Callable, scene: Scene, rng: random.Random) -> Told:
    """Lines, and in half of the cases no caption: then they have to say it all."""
    caption = scene.caption(rng) if rng.random() < 0.5 else ""
    return caption, to_hint(draw(scene.image()))


def in_order(scene: Scene, caption: str) -> list[Thing]:
    """The things of a scene as a caption names them."""
    words = caption.split()
    return sorted(scene.things, key=lambda thing: words.index(thing.name))


def boxes(scene: Scene, rng: random.Random) -> Told:
    """A box for each thing; half of the captions of two do not say what is where."""
    caption = scene.caption(rng)
    if len(scene.things) == 2 and rng.random() < 0.5:
        scene = scene.turned() if rng.random() < 0.5 else scene
        caption = scene.sentence("and", background=rng.random() >= 0.15)
    places = [thing.box for thing in in_order(scene, caption)]
    return caption, to_hint(draw_boxes(places, (SIZE, SIZE)))


HINTS: dict[str, Callable[[Scene, random.Random], Told]] = {
    "edges": partial(outlines, edges),
    "scribble": partial(outlines, scribble),
    "layout": boxes,
}


class Unshuffled(nn.Module):
    """Another entrance: 8x8 pixels become 64 channels at once, as in Mou et al. 2023.

    hint (B, 3, 8h, 8w) in [0, 1] -> (B, width, h, w).
    """

    def __init__(self, width: int, factor: int):
        super().__init__()
        self.factor = factor
        self.conv_in = nn.Conv2d(3 * factor**2, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hint: Tensor) -> Tensor:
        x = F.silu(self.conv_in(F.pixel_unshuffle(hint, self.factor)))
        return self.conv_out(x)


@torch.no_grad()
def wake(pyramid: HintPyramid, hints: Tensor) -> None:
    """Scale each convolution so that its answer to these hints varies by one.

    Mishkin & Matas 2016, algorithm 1, without the orthogonal start. As PyTorch draws
    them, each convolution halves what varies, and after seven of them a line is lost.
    The last convolution stays at zero.
    """
    x = hints
    for conv in (pyramid.conv_in, *pyramid.blocks):
        conv.bias.zero_()
        y = conv(x)
        conv.weight /= y.std()
        x = F.silu(y / y.std())


ENTRANCES = {
    "pyramid": "SD's eight convolutions, each scaled at the start",
    "asleep": "the same as they are drawn",
    "unshuffle": "8x8 pixels as channels; has no file format, only a curve",
}


class ControlTask(DenoiseTask):
    """Tell the noise, as a U-Net does that stays as it is, but with a hint.

    told: number of a picture, generator -> its caption and hint. shown: what previews
    are asked for.
    """

    def __init__(
        self,
        net: ControlNet,
        parts: Parts,
        latents: Tensor,
        told: Callable[[int, random.Random], Told],
        shown: Sequence[Told],
    ):
        part = parts.networks
        unet, vae = part["unet"].requires_grad_(False), part["vae"]
        text, tokenizer = part["text_encoder"], part["tokenizer"]
        about = {"vae": vae, "prediction": parts.prediction}
        super().__init__(unet, text, tokenizer, latents, parts.schedule, **about)
        self.net, self.told, self.shown, self.decoder = net, told, shown, vae

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        numbers = [rng.randrange(len(self.latents)) for rng in rngs]
        told = [self.told(n, rng) for n, rng in zip(numbers, rngs, strict=True)]
        captions, hints = zip(*told, strict=True)
        channels, *size = self.latents.shape[1:]
        return {
            "latents": self.latents[numbers].float(),
            "tokens": self.tokenizer(list(captions)),
            "t": self.times(rngs),
            "noise": normal(rngs, channels, *size)
            + self.offset * normal(rngs, channels, 1, 1),
            "hint": torch.stack(hints),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        level = self.schedule.at(t)
        xt = add_noise(x0, noise, level).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            context = self.text_encoder(batch["tokens"])
        residuals = self.net(xt, t, context, batch["hint"])
        answer = self.unet(xt, t, context, residuals=residuals).float()
        return self.losses(answer, self.prediction.target(x0, noise, level), t)

    @torch.inference_mode()
    def preview(self, steps: int = 12) -> Tensor:  # type: ignore[override]
        """What is drawn from the hints that are shown, unguided: (B, 3, H, W)."""
        device, captions = self.weights.device, [caption for caption, _ in self.shown]
        hint = torch.stack([hint for _, hint in self.shown]).to(device)
        context = self.text_encoder(self.tokenizer(captions).to(device))

        def network(xt: Tensor, t: float) -> Tensor:
            residuals = self.net(xt, torch.tensor([t]).to(device), context, hint)
            return self.unet(xt, torch.tensor([t]), context, residuals=residuals)

        dice = [random.Random(i) for i in range(len(captions))]
        noise = normal(dice, *self.latents.shape[1:]).to(device)
        denoise = Denoiser(network, self.schedule, self.prediction)
        levels = self.schedule.levels(steps, clean=SAMPLERS["ddim"].clean)
        *_, last = sample(denoise, noise, levels, "ddim")
        return self.decoder.decode(last.latents)


def followed(
    picture: Image.Image, hint: Image.Image, reach: int = 2
) -> tuple[float, float]:
    """Recall and precision of a picture's edges: the share of the hint's that are
    there, and the share of its own that the hint wanted, within `reach` pixels."""

    def lines(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        thin = image.convert("L")
        thick = thin.filter(ImageFilter.MaxFilter(2 * reach + 1))
        return np.array(thin) > 127, np.array(thick) > 127

    (mine, near_mine), (wanted, near_wanted) = lines(edges(picture)), lines(hint)
    recall = (wanted & near_mine).sum() / max(wanted.sum(), 1)
    return float(recall), float((mine & near_wanted).sum() / max(mine.sum(), 1))


SHOWN = 8  # scenes that no training sees
RECIPE = Recipe(steps=400, batch=16, lr=1e-3, warmup=20, ema=0.98)
FULL = 120  # steps at the full rate, however many come after them
SCENES = 4096  # whose latents are computed once
PREVIEW_EVERY = 25  # steps


class Lesson(NamedTuple):
    """What a ControlNet learns from: latents, what is told of each, what is shown."""

    latents: Tensor
    told: Callable[[int, random.Random], Told]
    shown: list[Told]


def scenes_lesson(parts: Parts, hint: str, runs: Path) -> Lesson:
    """The endless scenes, as many as are encoded."""
    vae, tell_of = parts.networks["vae"], HINTS[hint]
    if parts.size != (SIZE, SIZE):
        raise ValueError(
            f"the scenes have {SIZE} pixels a side, but the model draws "
            f"{parts.size[1]}x{parts.size[0]}: give pictures of your own (--pictures)"
        )
    latents = latent_bank(vae, SCENES, runs / "controlnet-latents.pt")
    asked = [scene_shown(scene, hint) for scene in fresh_scenes(SHOWN, seed=16)]
    scale = vae.config.scale
    return Lesson(
        scale * latents, lambda n, rng: tell_of(numbered_scene(n), rng), asked
    )


def scene_shown(scene: Scene, hint: str) -> Told:
    """What a preview is asked for: lines with no prompt, or boxes with one."""
    caption, drawn = HINTS[hint](scene, random.Random(0))
    return (caption if hint == "layout" else "", drawn)


def own_lesson(parts: Parts, hint: str, folder: Path) -> Lesson:
    """A reader's own pictures; the hints are made of them."""
    height, width = parts.size
    pairs = read_folder(folder)
    images = torch.cat([to_tensor(image, width, height) for image, _ in pairs])
    fitted = [Image.fromarray(pixels_of(image)) for image in images]
    hints = [to_hint(preprocess(image, hint)) for image in fitted]
    with torch.no_grad():
        encoded = [parts.networks["vae"].encode(image[None]).mean for image in images]

    def told(n: int, rng: random.Random) -> Told:
        return (pairs[n][1] if rng.random() < 0.5 else ""), hints[n]

    shown = [(pairs[n][1], hints[n]) for n in range(min(SHOWN, len(pairs)))]
    return Lesson(torch.cat(encoded), told, shown)


def pixels_of(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8."""
    return ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()


def make_task(args: argparse.Namespace) -> ControlTask:
    """A copy of the model's U-Net, with an entrance for hints, and what it learns."""
    parts = load(args.model)
    check_learner(parts.networks)
    unet = parts.networks["unet"]
    small = unet.config.channels[0] < 320
    net = ControlNet.of(unet, (16, 32, 64, 128) if small else (16, 32, 96, 256))
    if args.pictures:
        lesson = own_lesson(parts, args.hint, args.pictures)
    else:
        lesson = scenes_lesson(parts, args.hint, args.runs)
    if args.entrance == "unshuffle":
        net.hint = Unshuffled(unet.config.channels[0], 8)  # type: ignore[assignment]
    elif args.entrance == "pyramid":
        rng = random.Random(0)
        some = [lesson.told(n % len(lesson.latents), rng)[1] for n in range(32)]
        wake(net.hint, torch.stack(some))
    return ControlTask(channels_last(net), parts, *lesson)


def curve(folder: Path, hints: Sequence[Told]) -> list[dict]:
    """How well the previews of a run follow the lines of their hints, step by step."""
    found = []
    for path in sorted(folder.glob("preview-*.png")):
        film = open_image(path)
        width = film.width // len(hints)
        pairs = []
        for i, (_, hint) in enumerate(hints):
            picture = film.crop((i * width, 0, (i + 1) * width, film.height))
            wanted = Image.fromarray(pixels_of(2 * hint - 1))
            pairs.append(followed(picture, wanted))
        recall, precision = np.mean(pairs, axis=0).round(4).tolist()
        step = int(path.stem.split("-")[1])
        found.append({"step": step, "recall": recall, "precision": precision})
    return found


def keep_curve(task: ControlTask, folder: Path, path: Path) -> None:
    """The log of a run, thinned, with how well hints were followed."""
    lines = lines_of(folder / "log.jsonl")  # none of a run of less than 50 steps
    kept = thinned(lines).splitlines() if lines else []
    rows = [json.loads(line) for line in kept] + curve(folder, task.shown)
    rows.sort(key=lambda row: row["step"])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_files({path: text_writer(text)})


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("--hint", choices=HINTS, default="edges", help="what it listens to (edges)")
    add("--entrance", choices=ENTRANCES, default="pyramid",
        help="; ".join(f"{x}: {what}" for x, what in ENTRANCES.items()))  # fmt: skip
    add("--pictures", type=Path, metavar="FOLDER",
        help="your own pictures with captions, not the scenes")  # fmt: skip
    add("--model", default="checkpoints/tiny", metavar="PATH",
        help="whose U-Net is copied (checkpoints/tiny)")  # fmt: skip
    add("--steps", type=int, help=f"train up to this step ({RECIPE.steps})")
    add("--to", type=Path, metavar="FOLDER",
        help="where it is saved (checkpoints/tiny/controlnet-HINT)")  # fmt: skip
    add("--curve", type=Path, metavar="FILE",
        help="also write its log there, with how well edges are followed")  # fmt: skip
    add_run_arguments(add)


def main(args: argparse.Namespace) -> None:
    """`sdlearn train controlnet`: train one, or go on with it, and save it."""
    whole = args.entrance != "unshuffle"
    usual = "" if args.entrance == "pyramid" else f"-{args.entrance}"
    to = args.to or Path(f"checkpoints/tiny/controlnet-{args.hint}{usual}")
    if args.to and not whole:
        raise ValueError(
            "an unshuffled hint has no file format: leave --to out, or take another "
            "--entrance"
        )
    if whole:
        check_writable(to / "config.json")
    folder = args.runs / f"controlnet-{args.hint}-{args.entrance}"
    if args.pictures:
        folder = args.runs / f"controlnet-{args.hint}-{args.pictures.name}"
    recipe = replace(RECIPE, steps=args.steps or RECIPE.steps)
    recipe = replace(recipe, cooldown=max(recipe.steps - FULL, 0))
    own = mark_of_pictures(read_folder(args.pictures)) if args.pictures else None
    told = {"hint": args.hint, "entrance": args.entrance, "pictures": own}
    make = only_again(partial(make_task, args), folder, **told)
    how = recipe, folder, args.precision, PREVIEW_EVERY
    task = train_task(f"controlnet, {args.hint}", make, *how)
    if not isinstance(task, ControlTask):  # all its steps were done before
        task = make()
        task.load_state_dict(averaged_weights(folder / "state.pt"), strict=False)
    if args.curve:
        keep_curve(task, folder, args.curve)
        tell(f"{args.curve}: written")
    if whole:
        net: ControlNet = task.net
        net.save(to)
        tell(f"{to}: written")
