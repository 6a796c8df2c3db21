"""recipes -> checkpoints/tiny: the sizes of our model, the stages of its training."""

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from sdlearn.arguments import thread_count
from sdlearn.checkpoint.load import (
    Parts,
    load_clip,
    load_text_encoder,
    load_unet,
    load_vae,
    save,
    save_clip,
)
from sdlearn.clip import CLIP, CLIPImageConfig, CLIPTextConfig
from sdlearn.disk import check_writable, explained, locked, read_text, write_files
from sdlearn.pictures import to_image
from sdlearn.schedule import Schedule
from sdlearn.speed import compile_unet
from sdlearn.tiny.judge import Judge, JudgeTask, load_judge
from sdlearn.tiny.scenes import SIZE
from sdlearn.tiny.tasks import (
    CLIPTask,
    DecoderTask,
    DenoiseTask,
    GuidedTask,
    HintedTask,
    PlacesTask,
    VAETask,
    latent_bank,
    scene_tokenizer,
)
from sdlearn.tokenizer import Tokenizer
from sdlearn.training import (
    Recipe,
    Task,
    averaged_weights,
    fastest_precision,
    progress,
    train,
)
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

SCHEDULE = Schedule(noise_offset=0.15)  # unsaid backgrounds stay open with it
# The VAE's scale is measured when its training ends.
VAE_SIZES = VAEConfig(channels=(16, 48, 96, 192), blocks=1, groups=8, scale=1.0)
IMAGE_SIZES = CLIPImageConfig(size=128, patch=16, width=128, layers=4, heads=4)
UNET_SIZES = UNetConfig(
    (96, 192, 224),
    attention=(False, True, True),
    heads=(3, 6, 7),
    blocks=1,
    context_width=192,
)


def text_sizes(tokenizer: Tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(vocab=len(tokenizer), width=192, layers=4, heads=6)


STAGES = {  # in the order of training, as for Stable Diffusion itself
    "clip": Recipe(
        steps=1_000, batch=128, lr=1e-3, ema=0.998, decay=0.05, cooldown=250
    ),
    "vae": Recipe(steps=6_000, batch=8, lr=1e-3, ema=0.998, cooldown=1_000),
    "decoder": Recipe(steps=4_500, batch=8, lr=6e-4, ema=0.998, cooldown=3_500),
    "judge": Recipe(steps=6_000, batch=16, lr=1e-3, ema=0.998, cooldown=1_000),
    "places": Recipe(
        steps=1_500, batch=64, lr=1e-3, ema=0.99, warmup=100, cooldown=400
    ),
    "unet": Recipe(steps=20_000, batch=32, lr=8e-4, ema=0.999, cooldown=2_000),
    "guided": Recipe(steps=3_000, batch=32, lr=4e-4, ema=0.999, cooldown=2_800),
}
SAVE_EVERY, SAVE_MINUTES = 500, 5  # steps, minutes: whichever comes first
PREVIEW_EVERY = 500  # steps of the U-Net
BANK = 49_152  # training scenes whose latents are computed once


Network = TypeVar("Network", bound=nn.Module)
AnyTask = TypeVar("AnyTask", bound=Task)


def channels_last(model: Network) -> Network:
    """Convolutions are faster when the channels of a pixel lie side by side."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def trained(task: AnyTask, runs: Path, stage: str) -> AnyTask:
    """The task with the averaged weights of a finished (or interrupted) stage."""
    path = runs / stage / "state.pt"
    if not path.exists():
        raise ValueError(
            f"{path} is not there: train that stage first (sdlearn train {stage}), "
            "or begin with the weights of a checkpoint (sdlearn train begin)"
        )
    task.load_state_dict(averaged_weights(path), strict=False)
    return task.eval()


def make_clip(runs: Path | None = None) -> CLIPTask:
    tokenizer = scene_tokenizer()
    task = CLIPTask(CLIP(text_sizes(tokenizer), IMAGE_SIZES, projection=128), tokenizer)
    return trained(task, runs, "clip") if runs else task


def make_vae(runs: Path | None = None, crop: int | None = 64) -> VAETask:
    task = VAETask(channels_last(VAE(VAE_SIZES)), crop)
    return trained(task, runs, "vae") if runs else task


def make_decoder(runs: Path) -> DecoderTask:
    """The trained VAE, its encoder fixed: only pictures become sharper and truer."""
    return DecoderTask(make_vae(runs).vae)


def best_vae(runs: Path) -> VAE:
    """The trained VAE, with the better decoder if there is one; its scale measured."""
    task = make_decoder(runs)
    if (runs / "decoder" / "state.pt").exists():
        trained(task, runs, "decoder")
    latents = latent_bank(task.vae, 2048, runs / "latents.pt").float()
    task.vae.config = replace(VAE_SIZES, scale=round(1 / latents.std().item(), 5))
    return task.vae.eval()


def make_judge(runs: Path | None = None) -> JudgeTask:
    task = JudgeTask(channels_last(Judge()))
    return trained(task, runs, "judge") if runs else task


def make_places(runs: Path) -> PlacesTask:
    """CLIP's text encoder, which learns to say what lies where."""
    task = make_clip(runs)
    return PlacesTask(task.clip.text_encoder, task.tokenizer)


Hinted = TypeVar("Hinted", bound=HintedTask)


def unet_task(
    kind: type[Hinted], runs: Path, bank: int = BANK, sizes: UNetConfig = UNET_SIZES
) -> Hinted:
    """The U-Net, on a VAE and a text encoder that stay as they are.

    The text encoder is CLIP's, after it has learned what lies where.
    """
    vae, clip = best_vae(runs), make_clip(runs)
    if (runs / "places" / "state.pt").exists():
        trained(PlacesTask(clip.clip.text_encoder, clip.tokenizer), runs, "places")
    latents = latent_bank(vae, bank, runs / "latents.pt") * vae.config.scale
    unet = channels_last(UNet(sizes))
    return kind(
        unet, clip.clip.text_encoder, clip.tokenizer, latents, SCHEDULE, vae=vae
    )


def make_unet(runs: Path, bank: int = BANK) -> HintedTask:
    return unet_task(HintedTask, runs, bank)


def make_guided(runs: Path, bank: int = BANK) -> GuidedTask:
    """The trained U-Net, for steps that make a scale of 7.5 harmless at weak noise."""
    return trained(unet_task(GuidedTask, runs, bank), runs, "unet")


def best_unet(runs: Path) -> HintedTask:
    """The trained U-Net; after the guided stage, the mean of before and after.

    What was learned last is there, and less of what was known before is lost; Wortsman
    et al. 2022, section 3.
    """
    task = trained(make_unet(runs, bank=2048), runs, "unet")
    if (runs / "guided" / "state.pt").exists():
        after = averaged_weights(runs / "guided" / "state.pt")
        with torch.no_grad():
            for name, weight in task.unet.named_parameters(prefix="unet"):
                weight.lerp_(after[name], 0.5)
    return task


MAKE: dict[str, Callable[[Path], Task]] = {
    "clip": lambda runs: make_clip(),
    "vae": lambda runs: make_vae(),
    "decoder": make_decoder,
    "judge": lambda runs: make_judge(),
    "places": make_places,
    "unet": make_unet,
    "guided": make_guided,
}


def export(runs: Path, folder: Path) -> None:
    """Write what was trained, as a checkpoint that this package and diffusers load.

    With its judge and its history. All is written aside and moved when it is whole, so
    that a failure leaves the checkpoint as it was.
    """
    clip, unet, judge = make_clip(runs), best_unet(runs), make_judge(runs).judge
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        with explained(folder):
            parts = {
                "tokenizer": clip.tokenizer,
                "text_encoder": unet.text_encoder,
                "vae": best_vae(runs),
                "unet": unet.unet,
            }
            save(aside, Parts(parts, SCHEDULE, unet.prediction, (SIZE, SIZE)))
            save_clip(aside, clip.clip)
            half = {
                name: x.half().contiguous() for name, x in judge.state_dict().items()
            }
            judge_file = aside / "judge" / "model.safetensors"
            write_files({judge_file: partial(save_file, half)})
            keep_history(runs, aside / "history")
            for old in (folder / "history").glob("preview-*"):
                old.unlink()
            for path in [path for path in aside.rglob("*") if path.is_file()]:
                place = folder / path.relative_to(aside)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
            table = text_writer(stage_table(folder / "history"))
            write_files({folder / "history" / "stages.md": table})
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def keep_history(runs: Path, folder: Path) -> None:
    """The figures of all stages, thinned, and previews of the U-Net."""
    writers: dict[Path, Callable[[Path], object]] = {}
    for stage in STAGES:
        log = runs / stage / "log.jsonl"
        if log.exists():
            writers[folder / f"{stage}.jsonl"] = text_writer(thinned(lines_of(log)))
    write_files(writers)
    keep_previews(runs / "unet", folder)


def text_writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, "utf-8")


def bytes_writer(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


SIGNS = {  # the number in a stage's log that says best what it learned
    "clip": "texts_found",
    "vae": "psnr",
    "decoder": "psnr",
    "judge": "cells_right",
    "places": "sides",
    "unet": "weighted",
    "guided": "guided",
}


def stage_table(history: Path) -> str:
    """What the logs of the stages say, as a table in Markdown.

    The hours are those of the training loop, where it told its speed.
    """
    rows = ["| Stage | Steps | Samples | Hours | From its first report to its last |"]
    rows.append("|---|---|---|---|---|")
    for stage, sign in SIGNS.items():
        path = history / f"{stage}.jsonl"
        if not path.exists():
            continue
        log = [json.loads(line) for line in read_text(path).splitlines()]
        batch, spent, before = STAGES[stage].batch, 0.0, 0
        for line in log:
            count = batch * max(line["step"] - before, 0)
            spent += count / line.get("examples_per_second", math.nan)
            before = line["step"]
        hours = "not told" if math.isnan(spent) else f"{spent / 3600:.1f}"
        said = [f"{line[sign]:.3g}" for line in log if sign in line]
        signs = f"{sign} {said[0]} → {said[-1]}" if said else "not told"
        count = f"{before:,} | {batch * before:,}"
        rows.append(f"| `{stage}` | {count} | {hours} | {signs} |")
    return "\n".join(rows) + "\n"


def keep_previews(source: Path, target: Path, most: int = 8) -> None:
    """Previews of the U-Net, as JPEG: at most `most`, with the first and the last.

    Early ones lie close together, since pictures change most in the beginning.
    """
    left = {int(path.stem.split("-")[1]): path for path in source.glob("preview-*.*")}
    first, last = min(left, default=1), max(left, default=1)
    wanted = [first * (last / first) ** (i / (most - 1)) for i in range(most)]
    # the last one comes first: it must not be taken for another
    for moment in wanted[-1:] + wanted[:-1]:
        if left:
            _, nearest = min((abs(step - moment), step) for step in left)
            preview = left.pop(nearest)
            write_files(
                {target / f"{preview.stem}.jpg": bytes_writer(as_jpeg(preview))}
            )


def as_jpeg(path: Path) -> bytes:
    if path.suffix == ".jpg":  # kept before: not compressed twice
        return path.read_bytes()
    content = io.BytesIO()
    with Image.open(path, formats=["PNG"]) as picture:
        picture.save(content, "JPEG", quality=90)
    return content.getvalue()


def begin(runs: Path, folder: Path) -> None:
    """The other way: put a checkpoint's weights into `runs` for training to go on.

    Optimizers start anew. Either all stages begin, or none does.
    """
    parts: dict[str, dict[str, nn.Module]] = {
        "clip": {"clip": load_clip(folder)[1]},
        "vae": {"vae": load_vae(folder)},
        "judge": {"judge": load_judge(folder)},
        "places": {"text_encoder": load_text_encoder(folder)},
        "unet": {"unet": load_unet(folder)},
    }
    writers: dict[Path, Callable[[Path], object]] = {}
    for stage, networks in parts.items():
        path = runs / stage / "state.pt"
        if path.exists():
            raise ValueError(
                f"{path} is there already: remove it, "
                "or give another folder with --runs"
            )
        history = read_text(folder / "history" / f"{stage}.jsonl")
        step = json.loads(history.splitlines()[-1])["step"]
        state = beginning(networks, STAGES[stage], step)
        writers[path] = partial(torch.save, state)
        writers[runs / stage / "log.jsonl"] = text_writer(history)
    for preview in (folder / "history").glob("preview-*.jpg"):
        writers[runs / "unet" / preview.name] = bytes_writer(preview.read_bytes())
    with contextlib.ExitStack() as locks:
        for stage in parts:
            locks.enter_context(locked(runs / stage / "lock"))
        write_files(writers)


def beginning(networks: dict[str, nn.Module], recipe: Recipe, step: int) -> dict:
    """A training state that has weights and nothing else; any precision will do."""
    weights = {
        f"{name}.{n}": p.detach()
        for name, network in networks.items()
        for n, p in network.named_parameters()
    }
    return {
        "step": step,
        "recipe": asdict(recipe) | {"precision": "", "begun": step},
        "average": weights,
        "weights": weights,
        "optimizer": {},
    }


def thinned(lines: list[str], most: int = 200) -> str:
    """At most about `most` of the lines, evenly spaced, the last one among them."""
    return "\n".join(lines[::-1][:: -(-len(lines) // most)][::-1]) + "\n"


# What is trained on a finished model: name -> the module with its add_arguments(parser,
# name) and main(args), and what it teaches.
ADAPTERS: dict[str, tuple[str, str]] = {
    "inpainting": ("sdlearn.tiny.inpainting", "five more channels: the mask, the rest"),
    "lora": ("sdlearn.tiny.lora", "a LoRA: your own pictures, a word or a style"),
    "textual-inversion": ("sdlearn.tiny.inversion", "the vectors of a new word"),
    "dreambooth": ("sdlearn.tiny.inversion", "the U-Net: a few pictures, a rare word"),
    "controlnet": ("sdlearn.tiny.controlnet", "a ControlNet: edges, scribbles, boxes"),
    "crops": ("sdlearn.tiny.crops", "six ids: how a picture was cropped"),
    "lcm": ("sdlearn.tiny.consistency", "a LoRA: pictures in 4, 2 or 1 steps"),
}


STAGE_HELP = {
    "clip": "the text encoder and an image tower, contrastively",
    "vae": "the autoencoder, on crops",
    "decoder": "the VAE's decoder once more, on whole pictures",
    "judge": "the classifier that sdlearn evaluate asks",
    "places": "the text encoder once more: what lies where",
    "unet": "the U-Net: the noise in latents",
    "guided": "the U-Net once more: its guided answers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each stage and each adapter."""
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    whole = {
        "all": "every stage of the tiny model, one after the other, then export",
        "export": "runs -> checkpoint",
        "begin": "checkpoint -> runs, for training to go on",
    }
    about = STAGE_HELP | whole
    for stage, what in about.items():
        add = stages.add_parser(stage, help=what).add_argument
        add(
            "--to",
            type=Path,
            default=Path("checkpoints/tiny"),
            help="the checkpoint of export and begin (checkpoints/tiny)",
        )
        add("--steps", type=int, help="train up to this step, not to the recipe's last")
        add(
            "--compile",
            action="store_true",
            help="compile the U-Net's blocks first: minutes, then faster",
        )
        add_run_arguments(add)
    for name, (module, what) in ADAPTERS.items():
        other = stages.add_parser(name, help=what)
        importlib.import_module(module).add_arguments(other, name)


def add_run_arguments(add: Callable) -> None:
    """What all training needs to know of the machine."""
    add(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="where training keeps its state (runs)",
    )
    add(
        "--precision",
        choices=["auto", "no", "bf16", "fp16"],
        default="auto",
        help="auto: measured here",
    )
    add("--threads", type=thread_count, metavar="N", help="CPU threads")


def main(args: argparse.Namespace) -> None:
    """`sdlearn train STAGE`: train, or go on with, a stage, all, or an adapter."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stage in ADAPTERS:
        return importlib.import_module(ADAPTERS[args.stage][0]).main(args)
    if args.stage in ("all", "export"):
        check_writable(args.to / "model_index.json")
    if args.stage == "begin":
        begin(args.runs, args.to)
        tell(f"{args.runs}: every stage begins with the weights of {args.to}")
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage in STAGES:
            train_stage(stage, args.runs, args.steps, args.precision, args.compile)
    if args.stage in ("all", "export"):
        export(args.runs, args.to)
        tell(f"{args.to}: written")


def compile_task(task: DenoiseTask) -> None:
    """Compile the U-Net; previews, with batches of another size, stay as they were."""
    compile_unet(task.unet, whole=False)
    preview = task.preview

    def as_before(*words: Any) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return preview(*words)

    task.preview = as_before  # type: ignore[method-assign, assignment]


def is_first() -> bool:
    """Of several processes, the first one reports."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str) -> None:
    """One line on stderr, where the progress bar is."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def train_stage(
    stage: str, runs: Path, steps: int | None, precision: str, compile: bool = False
) -> None:
    """Train one stage of the tiny model, or go on with it."""
    recipe = STAGES[stage]
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    previews = PREVIEW_EVERY if stage == "unet" else 0
    make = partial(MAKE[stage], runs)
    train_task(stage, make, recipe, runs / stage, precision, previews, compile)


def train_task(
    name: str,
    make: Callable[[], Task],
    recipe: Recipe,
    folder: Path,
    precision: str = "auto",
    preview_every: int = 0,
    compile: bool = False,
) -> Task | None:
    """Train a task, or go on with it; say where, how, and what is saved.

    Returns the task with the averaged weights; None if all its steps were done before.
    """
    import accelerate

    with locked(folder / "lock") if is_first() else contextlib.nullcontext():
        done, saved = progress(folder / "state.pt")
        if done >= recipe.steps:
            tell(
                f"{name}: its {done:,} steps are done ({folder}); see --steps for more"
            )
            return None
        torch.manual_seed(recipe.seed)
        task = make()
        if compile and isinstance(task, DenoiseTask):
            compile_task(task)
        if precision == "auto":  # an interrupted run goes on in its own precision
            precision = saved.get("precision") or fastest_precision(task)
        recipe = replace(recipe, precision=precision, begun=saved.get("begun", 0))
        tell(opening(name, recipe, done, folder, accelerate.PartialState().device))
        diary = Diary(name, recipe.steps, done, folder)
        try:
            with explained(folder), diary.bar:
                train(
                    task,
                    recipe,
                    folder,
                    save_every=SAVE_EVERY,
                    save_minutes=SAVE_MINUTES,
                    preview_every=preview_every,
                    tick=diary.tick,
                    report=diary.report,
                    show=diary.show,
                )
        except KeyboardInterrupt:
            tell(closing(name, folder))
            raise
        return task


def opening(
    stage: str, recipe: Recipe, done: int, folder: Path, device: torch.device
) -> str:
    """What a run says first."""
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    going = f"goes on after step {done:,} of" if done else "learns in"
    return (
        f"{stage}: {going} {recipe.steps:,} steps of {recipe.batch} examples, "
        f"on {device} in {precision[recipe.precision]}; state and log are in {folder}, "
        f"saved every {SAVE_EVERY} steps or {SAVE_MINUTES} minutes"
    )


def closing(stage: str, folder: Path) -> str:
    """What an interrupted run says last."""
    done, _ = progress(folder / "state.pt")
    if not done:
        return f"\n{stage}: nothing was saved yet; the same command begins anew"
    return (
        f"\n{stage}: saved up to step {done:,} in {folder / 'state.pt'}; "
        "the same command goes on from there"
    )


class Diary:
    """What a run tells of itself: a bar on stderr, log.jsonl, previews of pictures."""

    def __init__(self, stage: str, steps: int, done: int, folder: Path):
        self.folder, self.log, self.told = folder, folder / "log.jsonl", 0.0
        if is_first():
            forget_after(self.log, done)
        self.bar = tqdm(
            total=steps,
            initial=done,
            desc=stage,
            unit="step",
            dynamic_ncols=True,
            disable=not is_first(),
        )

    def tick(self, step: int, losses: dict[str, Tensor]) -> None:
        if time.monotonic() - self.told > 2:  # seconds; reading a loss waits for a GPU
            self.told = time.monotonic()
            figures = {name: f"{x.item():.3g}" for name, x in losses.items()}
            self.bar.set_postfix(figures, refresh=False)
        self.bar.update(step - self.bar.n)

    def report(self, step: int, scalars: dict[str, float]) -> None:
        if is_first():
            figures = {name: round(x, 6) for name, x in scalars.items()}
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | figures) + "\n")

    def show(self, step: int, pictures: Tensor) -> None:
        film = to_image(torch.cat(list(pictures), dim=-1))
        path = self.folder / f"preview-{step:06d}.png"
        write_files({path: partial(film.save, format="PNG")})


def lines_of(log: Path) -> list[str]:
    """The whole lines of a log; a killed run may leave half of one at the end."""
    text = read_text(log) if log.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def forget_after(log: Path, done: int) -> None:
    """Drop what a log tells of steps that were lost with the run: they come again."""
    kept = [line for line in lines_of(log) if json.loads(line)["step"] <= done]
    write_files({log: text_writer("".join(line + "\n" for line in kept))})
