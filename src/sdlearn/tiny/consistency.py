"""a model that draws in 50 steps -> one that draws in 4, 2 or 1. See chapter 18.

Consistency in segments: every line of the flow is cut in four, and the student learns
to see the end of each quarter from anywhere in it; then the end of each half, with that
student as the teacher; then the end of the line. The first teacher is the model itself,
guided, so that the student needs no guidance. What learns is a LoRA; or, with --whole,
the whole U-Net, which is also told the scale of the guidance.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdlearn.checkpoint.load import load, load_unet, save
from sdlearn.disk import check_writable, write_files
from sdlearn.lcm import guidance_embedding, huber, levels_at, segment_end, slide
from sdlearn.lora import LoRA, load_lora, merge, save_lora, with_lora
from sdlearn.pipeline import StableDiffusion
from sdlearn.prediction import EPSILON
from sdlearn.schedule import add_noise
from sdlearn.tiny.difference import fingerprint
from sdlearn.tiny.evaluate import PARTS, draw, fresh_scenes, judged, share
from sdlearn.tiny.judge import load_judge
from sdlearn.tiny.own import check_same
from sdlearn.tiny.recipe import (
    SCHEDULE,
    add_run_arguments,
    channels_last,
    tell,
    train_task,
    trained,
)
from sdlearn.tiny.scenes import Scene
from sdlearn.tiny.tasks import latent_bank, normal, numbered_scene, to_tensor
from sdlearn.training import Recipe, Task
from sdlearn.unet import UNet

BASE = Path("checkpoints/tiny")
# What lcm-lora-sdv1-5 changes, too: all but the first and last layers and the time's.
TARGETS = (
    r"attn\d\.to_|\.ff\.net|proj_(in|out)|conv\d|conv_shortcut|samplers|time_emb_proj"
)
RANK = 12
SCALE = 7.5  # of the guidance that a LoRA learns
SCALES = (2.0, 10.0)  # that a whole model is told
HEARS = 256  # numbers that tell it
SKIP = 50  # times that the first teacher goes at once
PURE = 0.3  # share of examples that are noise alone, as drawing begins
OFFSET = 0.2  # of the noise's channels; a little more than drawing has
BANK = 2_048  # training scenes whose latents are computed once
STEPS = {4: 300, 2: 450, 1: 1_100}  # segments -> training steps
RECIPE = Recipe(steps=1, batch=16, lr=2e-3, warmup=10, ema=0.95, decay=0.0)
WHOLE = replace(RECIPE, lr=4e-4)


class ConsistencyTask(Task):
    """From two places on one line of the flow, see the same end.

    Luo et al. 2023, algorithm 1; in segments: Heek et al. 2024, section 3.

    unet: the student. teacher: it goes from the first place to the second: the model
    that is imitated, guided, by `skip` times; or, with skip 0, a student of twice as
    many segments, to the end of one. encode: captions -> context. scales: the least and
    the largest guidance.
    """

    lora: LoRA

    def __init__(
        self,
        unet: UNet,
        teacher: UNet,
        encode: Callable[[Sequence[str]], Tensor],
        latents: Tensor,
        segments: int,
        skip: int = 0,
        scales: tuple[float, float] = (SCALE, SCALE),
    ):
        super().__init__()
        self.unet, self.teacher = unet, teacher.requires_grad_(False)
        self.encode, self.latents = encode, latents
        self.segments, self.skip, self.scales = segments, skip, scales

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        numbers = [rng.randrange(len(self.latents)) for rng in rngs]
        scenes = zip(map(numbered_scene, numbers), rngs, strict=True)
        captions = [scene.caption(rng) for scene, rng in scenes]
        last = SCHEDULE.steps - 1
        t = [last if rng.random() < PURE else rng.randint(1, last) for rng in rngs]
        level, channels = SCHEDULE.at(torch.tensor(t)), self.latents.shape[1]
        noise = normal(rngs, *self.latents.shape[1:])  # as drawing starts
        noise += OFFSET * normal(rngs, channels, 1, 1)
        noisy = add_noise(self.latents[numbers].float(), noise, level)
        return {
            "xt": torch.where((level.t == last).view(-1, 1, 1, 1), noise, noisy),
            "t": level.t,
            "context": self.encode(captions),
            "scale": torch.tensor([rng.uniform(*self.scales) for rng in rngs]),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        xt, t, context, scale = (batch[x] for x in ("xt", "t", "context", "scale"))
        end = segment_end(t, self.segments)
        with torch.no_grad():
            if self.skip:
                nearer = torch.maximum(t - self.skip, end)
                x0 = self.guided(xt, t, context, scale)
            else:
                nearer = segment_end(t, 2 * self.segments)
                x0 = self.guess(self.teacher, xt, t, context, scale)
            start, there = levels_at(SCHEDULE, t), levels_at(SCHEDULE, nearer)
            near = slide(xt, x0, start, there)
            wanted = self.end(near, nearer, end, context, scale)
        loss = huber(self.end(xt, t, end, context, scale), wanted)
        return {"loss": loss.mean()}

    def end(
        self, xt: Tensor, t: Tensor, end: Tensor, context: Tensor, scale: Tensor
    ) -> Tensor:
        """What the student sees at the end; who is there sees what is there."""
        seen = self.guess(self.unet, xt, t.clamp(min=0), context, scale)
        ahead = slide(xt, seen, levels_at(SCHEDULE, t), levels_at(SCHEDULE, end))
        return torch.where((t == end).view(-1, 1, 1, 1), xt, ahead)

    def guess(
        self, unet: UNet, xt: Tensor, t: Tensor, context: Tensor, scale: Tensor
    ) -> Tensor:
        """The picture that a network sees in xt."""
        hears = unet.config.guidance_width
        told = {"guidance": guidance_embedding(scale, hears)} if hears else {}
        xt = xt.contiguous(memory_format=torch.channels_last)
        return EPSILON.split(xt, unet(xt, t, context, **told).float(), SCHEDULE.at(t))[
            0
        ]

    def guided(self, xt: Tensor, t: Tensor, context: Tensor, scale: Tensor) -> Tensor:
        """The picture that the model sees in xt, guided."""
        empty = self.encode([""]).to(context).expand_as(context)
        told, untold = (
            self.guess(self.teacher, xt, t, words, scale) for words in (context, empty)
        )
        return untold + scale.view(-1, 1, 1, 1) * (told - untold)


def hearing(unet: UNet, width: int = HEARS) -> UNet:
    """The same U-Net with an ear for guidance, to which it is deaf as yet."""
    other = UNet(replace(unet.config, guidance_width=width))
    missing = other.load_state_dict(unet.state_dict(), strict=False).missing_keys
    assert missing == ["time_embedding.cond_proj.weight"]
    nn.init.zeros_(other.get_parameter(missing[0]))
    return other


def make_task(
    base: Path, runs: Path, segments: int, whole: bool = False
) -> ConsistencyTask:
    """A student, and its teacher: the model, or a student of twice as many segments."""
    parts = load(base)
    tokenizer, text_encoder, vae, unet = (
        parts.networks[name] for name in ("tokenizer", "text_encoder", "vae", "unet")
    )
    latents = latent_bank(vae, BANK, runs / "latents.pt") * vae.config.scale
    text_encoder.requires_grad_(False)

    def encode(captions: Sequence[str]) -> Tensor:
        return text_encoder(tokenizer(captions))

    teacher, first = load_unet(base), segments == max(STEPS)
    if whole:
        unet, teacher = hearing(unet), teacher if first else hearing(teacher)
    lora = LoRA({}) if whole else with_lora({"unet": unet}, RANK, targets=TARGETS)
    scales = SCALES if whole else (SCALE, SCALE)
    unet, teacher = channels_last(unet), channels_last(teacher)
    how = segments, SKIP if first else 0, scales
    task = ConsistencyTask(unet, teacher, encode, latents, *how)
    task.lora = lora
    if not first:
        trained(task, runs, str(2 * segments)).train()
        if whole:
            teacher.load_state_dict(unet.state_dict())
        else:
            merge({"unet": teacher}, (lora, 1.0))
    return task


def measure(base: Path, lora: Path, count: int) -> dict[str, Any]:
    """How often the judge finds all right in fresh scenes, half of them pairs, and the
    seconds a picture: with the LoRA in 4, 2 and 1 steps; and without it in those, and,
    an eighth of the scenes, in 50 steps of DDPM."""
    sd, judge = StableDiffusion.load(base), load_judge(base)
    half = -(-count // 2)
    scenes = [x for n in (1, 2) for x in fresh_scenes(half, 18, "train", n)]
    found: dict[str, dict[str, float]] = {}

    def try_out(way: str, some: Sequence[Scene], *how: Any) -> None:
        steps, sampler, scale = how
        began = time.perf_counter()
        drawn = draw(sd, some, steps, sampler, scale, seed=18)
        seconds = (time.perf_counter() - began) / len(some)
        verdicts = judged(judge, some, [to_tensor(np.array(x)) for x in drawn])
        parts = {part: round(share(verdicts, part), 4) for part in PARTS}
        found[way] = parts | {"seconds": round(seconds, 4), "pictures": len(some)}

    try_out("ddpm 50", scenes[::8], 50, "ddpm", 7.5)
    for weights in ("plain", "lcm"):
        for n in STEPS:
            try_out(f"{weights} {n}", scenes, n, "lcm", 1.0)
        merge(sd.networks(), (load_lora(lora, sd.networks()), 1.0))
    return found


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """`sdlearn train lcm`."""
    stages = ", ".join(f"{n} steps with {s} segments" for s, n in STEPS.items())
    parser.description = (
        "Distils the tiny model into a LoRA that draws in 4, 2 or 1 steps without "
        f"guidance: {stages}, each of {RECIPE.batch} scenes; about an hour of one "
        "quiet core. Needs a checkpoint, and the drawings of the scenes: "
        "pip install 'sdlearn[train,tiny]'."
    )
    add = parser.add_argument
    add("--model", type=Path, default=BASE, metavar="FOLDER",
        help=f"the model that is imitated ({BASE})")  # fmt: skip
    add("--to", type=Path, metavar="PATH",
        help="where the LoRA is written (lora/lcm.safetensors in the model); with "
        "--whole a folder")  # fmt: skip
    add("--whole", action="store_true",
        help="train the whole U-Net, which is then told its guidance")  # fmt: skip
    add("--steps", type=int, nargs=len(STEPS), default=[*STEPS.values()], metavar="N",
        help="training steps with 4, 2 and 1 segments")  # fmt: skip
    add("--measure", type=int, default=0, metavar="N",
        help="then draw N scenes in each way, and judge; the figures are written into "
        "the model's history, or with --to beside the LoRA (0)")  # fmt: skip
    add_run_arguments(add)
    parser.set_defaults(precision="no")  # 16 bits are too coarse at the last times


def main(args: argparse.Namespace) -> None:
    """Train, or go on, and write the LoRA, or the whole model."""
    to = args.to or args.model / "lora" / "lcm.safetensors"
    if (to.suffix == ".safetensors") == args.whole or args.whole and args.to is None:
        wanted = "the name of a folder" if args.whole else "a name like my.safetensors"
        raise ValueError(f"--to is {args.to}; give {wanted} for what is written")
    if args.whole and args.measure > 0:
        raise ValueError("--measure is for a LoRA: leave it out, or leave out --whole")
    check_writable(to / "model_index.json" if args.whole else to)
    runs = args.runs / ("lcm-whole" if args.whole else "lcm")
    usual = WHOLE if args.whole else RECIPE
    recipes = [replace(usual, steps=n, cooldown=n // 2) for n in args.steps]
    check_same(runs, model=fingerprint(args.model))
    for segments, recipe in zip(STEPS, recipes, strict=True):
        make = partial(make_task, args.model, runs, segments, args.whole)
        folder, label = runs / str(segments), f"lcm, segments: {segments}"
        train_task(label, make, recipe, folder, args.precision)
    task = trained(make(), runs, "1")
    if args.whole:
        parts = load(args.model)
        networks = parts.networks | {"unet": task.unet}
        save(to, parts._replace(networks=networks))
        tell(f"{to}: written; draw with --model {to} --sampler lcm")
        return
    save_lora(to, task.lora)
    tell(f"{to}: written; draw with --lora {to} --sampler lcm")
    if args.measure > 0:
        text = json.dumps(measure(args.model, to, args.measure), indent=1) + "\n"
        figures = args.model / "history" / "lcm.json"  # of the one that is shipped
        figures = figures if args.to is None else to.with_suffix(".json")
        write_files({figures: lambda part: part.write_text(text, "utf-8")})
        tell(f"{figures}: written")
