"""a model that draws in 50 steps -> one that draws in 4, 2 or 1. See chapter 18.

Consistency in segments: first every line of the flow is cut in four, and the student
learns to see the end of each quarter from anywhere on it; then halves, with that student
as the teacher; then the whole line. The first teacher is the model itself, guided, so
that the student needs no guidance. What learns is a LoRA, or with --whole all weights,
with the scale of the guidance as an input.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdlearn.checkpoint.load import load_text_encoder, load_unet, load_vae
from sdlearn.disk import check_writable
from sdlearn.guidance import guide
from sdlearn.lcm import guidance_embedding, huber, levels_at, segment_end, slide
from sdlearn.lora import merge, save_lora, with_lora
from sdlearn.prediction import EPSILON
from sdlearn.schedule import add_noise
from sdlearn.tiny.recipe import (
    SCHEDULE,
    add_run_arguments,
    channels_last,
    tell,
    train_task,
)
from sdlearn.tiny.tasks import latent_bank, normal, numbered_scene
from sdlearn.tokenizer import Tokenizer
from sdlearn.training import Recipe, Task, averaged_weights
from sdlearn.unet import UNet

# What lcm-lora-sdv1-5 changes: all but the first and last layers and the time's.
TARGETS = (
    r"attn\d\.to_|ff\.net|proj_(in|out)|conv\d|conv_shortcut|samplers|time_emb_proj"
)
RANK = 12
SEGMENTS = (4, 2, 1)
STEPS = (100, 100, 200)
RECIPE = Recipe(steps=100, batch=16, lr=2e-3, warmup=10, ema=0.95, decay=0.0)
SCALE = 7.5  # of the first teacher's guidance
SKIP = 50  # times, the length of its steps
NOISE = 0.3  # share of examples that begin in pure noise
BANK = 2_048  # training scenes whose latents are computed once


class ConsistencyTask(Task):
    """From two places on one line of the flow, see the same end.

    Luo et al. 2023, algorithm 1; in segments: Heek et al. 2024, algorithm 1.

    unet: the student. teacher: it goes from the first place to the second one: the model
    that is to be imitated, by `skip` times with guidance; or, where `skip` is None, a
    student of twice as many segments, to the end of one of these.
    scales: from where to where the guidance is drawn; told to a student that can hear it.
    """

    def __init__(
        self,
        unet: UNet,
        teacher: UNet,
        encode: Callable[[Sequence[str]], Tensor],
        latents: Tensor,
        segments: int,
        skip: int | None = None,
        scales: tuple[float, float] = (SCALE, SCALE),
    ):
        super().__init__()
        self.unet, self.teacher = unet, teacher.requires_grad_(False)
        self.encode, self.latents = encode, latents
        self.segments, self.skip, self.scales = segments, skip, scales

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        numbers = [rng.randrange(len(self.latents)) for rng in rngs]
        captions = [
            numbered_scene(n).caption(rng) for n, rng in zip(numbers, rngs, strict=True)
        ]
        last = SCHEDULE.steps - 1
        t = [last if rng.random() < NOISE else rng.randint(1, last) for rng in rngs]
        level, noise = SCHEDULE.at(torch.tensor(t)), normal(rngs, *self.latents.shape[1:])
        xt = add_noise(self.latents[numbers].float(), noise, level)
        pure = (level.t == last).view(-1, 1, 1, 1)  # drawing begins in noise alone
        return {
            "xt": torch.where(pure, noise, xt),
            "t": level.t,
            "context": self.encode(captions),
            "scale": torch.tensor([rng.uniform(*self.scales) for rng in rngs]),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        xt, t = batch["xt"], batch["t"]
        told = {name: batch[name] for name in ("context", "scale")}
        end = segment_end(t, self.segments)
        with torch.no_grad():
            near = self.near(t, end)
            x0 = self.guided(xt, t, **told) if self.skip else self.guess(
                self.teacher, xt, t, **told
            )
            there = slide(xt, x0, levels_at(SCHEDULE, t), levels_at(SCHEDULE, near))
            wanted = self.end(there, near, end, told)
        loss = huber(self.end(xt, t, end, told), wanted)
        return {"loss": loss.mean()}

    def near(self, t: Tensor, end: Tensor) -> Tensor:
        """Where the teacher goes to."""
        if self.skip is None:
            return segment_end(t, 2 * self.segments)
        return torch.maximum(t - self.skip, end)

    def end(self, xt: Tensor, t: Tensor, end: Tensor, told: dict[str, Tensor]) -> Tensor:
        """What the student sees at the end of the segment; who is there sees it."""
        start, there = levels_at(SCHEDULE, t), (t == end).view(-1, 1, 1, 1)
        seen = self.guess(self.unet, xt, t.clamp(min=0), **told)
        return torch.where(there, xt, slide(xt, seen, start, levels_at(SCHEDULE, end)))

    def guess(
        self, unet: UNet, xt: Tensor, t: Tensor, context: Tensor, scale: Tensor
    ) -> Tensor:
        """The picture that a network sees in xt."""
        hears = unet.config.guidance_width
        more = {"guidance": guidance_embedding(scale, hears)} if hears else {}
        xt = xt.contiguous(memory_format=torch.channels_last)
        return EPSILON.split(xt, unet(xt, t, context, **more), SCHEDULE.at(t))[0]

    def guided(self, xt: Tensor, t: Tensor, context: Tensor, scale: Tensor) -> Tensor:
        """The picture that the guided teacher sees in xt."""
        empty = self.encode([""]).to(context).expand_as(context)
        told, untold = (
            self.guess(self.teacher, xt, t, words, scale) for words in (context, empty)
        )
        return guide(untold, told, scale.view(-1, 1, 1, 1))


def make_task(base: Path, runs: Path, segments: int) -> ConsistencyTask:
    """A student with a LoRA, and its teacher: the model, or the student before."""
    vae, text_encoder = load_vae(base), load_text_encoder(base).requires_grad_(False)
    tokenizer = Tokenizer.load(base / "tokenizer")
    latents = latent_bank(vae, BANK, runs / "latents.pt") * vae.config.scale
    teacher, unet = (channels_last(load_unet(base)) for _ in range(2))
    lora = with_lora({"unet": unet}, RANK, targets=TARGETS)
    task = ConsistencyTask(
        unet, teacher, lambda texts: text_encoder(tokenizer(texts)), latents, segments
    )
    task.lora = lora
    if segments == SEGMENTS[0]:
        task.skip = SKIP
    else:
        before = runs / str(2 * segments) / "state.pt"
        task.load_state_dict(averaged_weights(before), strict=False)
        merge({"unet": teacher}, (lora, 1.0))
    return task


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """`sdlearn train lcm`."""
    add = parser.add_argument
    add("--model", type=Path, default=Path("checkpoints/tiny"), metavar="FOLDER")
    add("--to", type=Path, metavar="FILE")
    add("--steps", type=int, nargs="+", default=STEPS, metavar="N")
    add_run_arguments(add)
    parser.set_defaults(precision="no")


def main(args: argparse.Namespace) -> None:
    """Train, or go on, and write the LoRA."""
    runs, to = args.runs / "lcm", args.to or args.model / "lora" / "lcm.safetensors"
    check_writable(to)
    for segments, steps in zip(SEGMENTS, args.steps):
        recipe = replace(RECIPE, steps=steps, cooldown=steps // 2)
        make, folder = partial(make_task, args.model, runs, segments), runs / str(segments)
        train_task(f"lcm, segments {segments}", make, recipe, folder, args.precision)
    task = make()
    task.load_state_dict(averaged_weights(folder / "state.pt"), strict=False)
    save_lora(to, task.lora)
    tell(f"{to}: written")
