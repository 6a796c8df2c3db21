"""recipes -> checkpoints/tiny: the sizes of the tiny Stable Diffusion and the stages of its training."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from sdlearn.clip import CLIP, CLIPImageConfig, CLIPTextConfig
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
    save_atomically,
    train,
)
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig
from sdlearn.weights import (
    Parts,
    load_clip,
    load_text_encoder,
    load_unet,
    load_vae,
    save,
    save_clip,
)

SCHEDULE = Schedule()
VAE_SIZES = VAEConfig(
    channels=(16, 48, 96, 192), blocks=1, groups=8, scale=1.0
)  # the scale is measured when training ends
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
PREVIEW_EVERY = 500  # steps of the U-Net
BANK = 49_152  # training scenes whose latents are computed once


def channels_last(model: nn.Module) -> nn.Module:
    """Convolutions are faster when the channels of a pixel lie side by side in memory."""
    return model.to(memory_format=torch.channels_last)


def trained(task: Task, runs: Path, stage: str) -> Task:
    """The task with the averaged weights of a finished (or interrupted) stage."""
    weights = averaged_weights(runs / stage / "state.pt")
    task.load_state_dict(weights, strict=False)
    return task.eval()


def make_clip(runs: Path | None = None) -> CLIPTask:
    tokenizer = scene_tokenizer()
    task = CLIPTask(CLIP(text_sizes(tokenizer), IMAGE_SIZES, projection=128), tokenizer)
    return trained(task, runs, "clip") if runs else task


def make_vae(runs: Path | None = None, crop: int | None = 64) -> VAETask:
    task = VAETask(channels_last(VAE(VAE_SIZES)), crop)
    return trained(task, runs, "vae") if runs else task


def make_decoder(runs: Path) -> DecoderTask:
    """The trained VAE, its encoder fixed: latents keep their meaning while pictures become sharper and truer."""
    return DecoderTask(make_vae(runs).vae)


def best_vae(runs: Path) -> VAE:
    """The trained VAE, with the better decoder if that stage has run, and its scale measured: 1 / std."""
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


def make_unet(
    runs: Path, bank: int = BANK, kind: type[HintedTask] = HintedTask
) -> HintedTask:
    """The U-Net, on a VAE and a text encoder that stay as they are: CLIP's, after it has learned what lies where."""
    vae, clip = best_vae(runs), make_clip(runs)
    if (runs / "places" / "state.pt").exists():
        trained(PlacesTask(clip.clip.text_encoder, clip.tokenizer), runs, "places")
    latents = latent_bank(vae, bank, runs / "latents.pt") * vae.config.scale
    unet = channels_last(UNet(UNET_SIZES))
    return kind(
        unet, clip.clip.text_encoder, clip.tokenizer, latents, SCHEDULE, vae=vae
    )


def make_guided(runs: Path) -> GuidedTask:
    """The trained U-Net, for the steps that make guidance of 7.5 harmless at weak noise."""
    return trained(make_unet(runs, kind=GuidedTask), runs, "unet")


def best_unet(runs: Path) -> HintedTask:
    """The trained U-Net. After the guided stage: the mean of the weights before it and after.

    What was learned last is there, and less of what was known before is lost; Wortsman et al. 2022, section 3.
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
    """Write what was trained, as a checkpoint that this package and diffusers load, with its judge and its history."""
    clip, unet = make_clip(runs), best_unet(runs)
    networks = {
        "tokenizer": clip.tokenizer,
        "text_encoder": unet.text_encoder,
        "vae": best_vae(runs),
        "unet": unet.unet,
    }
    save(folder, Parts(networks, SCHEDULE, unet.prediction, (SIZE, SIZE)))
    save_clip(folder, clip.clip)
    judge = {
        name: x.half().contiguous()
        for name, x in make_judge(runs).judge.state_dict().items()
    }
    save_atomically(
        lambda part: save_file(judge, part), folder / "judge" / "model.safetensors"
    )
    for stage in STAGES:
        if (runs / stage / "log.jsonl").exists():
            history = thinned(
                (runs / stage / "log.jsonl").read_text("utf-8").splitlines()
            )
            save_atomically(
                lambda part, text=history: part.write_text(text, "utf-8"),
                folder / "history" / f"{stage}.jsonl",
            )
    keep_previews(runs / "unet", folder / "history")


def keep_previews(source: Path, target: Path, most: int = 8) -> None:
    """The U-Net's previews, as JPEG; of many, `most`: early ones close together, the first and the last among them."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("preview-*"):
        old.unlink()
    left = {int(path.stem.split("-")[1]): path for path in source.glob("preview-*.*")}
    first, last = min(left, default=1), max(left, default=1)
    wanted = [first * (last / first) ** (i / (most - 1)) for i in range(most)]
    for moment in (
        wanted[-1:] + wanted[:-1]
    ):  # the last one must not be taken for another
        if left:
            preview = left.pop(
                min(left, key=lambda step, moment=moment: abs(step - moment))
            )
            if preview.suffix == ".jpg":  # kept before: not compressed twice
                shutil.copyfile(preview, target / preview.name)
            else:
                with Image.open(preview) as picture:
                    picture.save(target / f"{preview.stem}.jpg", quality=90)


def begin(runs: Path, folder: Path) -> None:
    """The other way: put a checkpoint's weights into `runs` for training to go on from them; optimizers start anew."""
    parts = {
        "clip": {"clip": load_clip(folder)[1]},
        "vae": {"vae": load_vae(folder)},
        "judge": {"judge": load_judge(folder)},
    }
    parts |= {
        "places": {"text_encoder": load_text_encoder(folder)},
        "unet": {"unet": load_unet(folder)},
    }
    for stage, networks in parts.items():
        path = runs / stage / "state.pt"
        if path.exists():
            raise ValueError(
                f"{path} is there already: remove it, or give another folder with --runs"
            )
        weights = {
            f"{name}.{n}": p.detach()
            for name, network in networks.items()
            for n, p in network.named_parameters()
        }
        history = (folder / "history" / f"{stage}.jsonl").read_text("utf-8")
        step = json.loads(history.splitlines()[-1])["step"]
        recipe = asdict(STAGES[stage]) | {
            "precision": "",
            "begun": step,
        }  # measured anew
        state = {
            "step": step,
            "recipe": recipe,
            "average": weights,
            "weights": weights,
            "optimizer": {},
        }
        save_atomically(lambda part, state=state: torch.save(state, part), path)
        (runs / stage / "log.jsonl").write_text(history, "utf-8")
    for preview in (folder / "history").glob("preview-*.jpg"):
        shutil.copyfile(preview, runs / "unet" / preview.name)


def thinned(lines: list[str], most: int = 200) -> str:
    """At most about `most` of the lines, evenly spaced, the last one among them."""
    return "\n".join(lines[::-1][:: -(-len(lines) // most)][::-1]) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage",
        choices=[*STAGES, "all", "export", "begin"],
        help="what to train; all: every stage, then export; export: runs -> checkpoint; begin: checkpoint -> runs",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="where training keeps its state (default: runs)",
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("checkpoints/tiny"),
        help="the checkpoint of export and begin",
    )
    parser.add_argument(
        "--steps", type=int, help="train up to this step instead of the recipe's"
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "no", "bf16", "fp16"],
        default="auto",
        help="auto: measured here",
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the U-Net's blocks first: minutes, then faster",
    )


def main(args: argparse.Namespace) -> None:
    """`sdlearn train STAGE`: train, or go on with, one stage or all of them."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stage == "begin":
        begin(args.runs, args.to)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage in STAGES:
            train_stage(stage, args.runs, args.steps, args.precision, args.compile)
    if args.stage in ("all", "export"):
        export(args.runs, args.to)


def compile_unet(task: DenoiseTask) -> None:
    """Compile the U-Net for training; previews, whose batches have another size, stay as they were."""
    compile_unet(task.unet, whole=False)
    preview = task.preview

    def as_before() -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return preview()

    task.preview = as_before


def train_stage(
    stage: str, runs: Path, steps: int | None, precision: str, compile: bool = False
) -> None:
    recipe = STAGES[stage]
    torch.manual_seed(recipe.seed)
    task = MAKE[stage](runs)
    if compile and stage in ("unet", "guided"):
        compile_unet(task)
    steps = recipe.steps if steps is None else steps
    done, saved = progress(runs / stage / "state.pt")
    if precision == "auto":  # an interrupted run goes on in its own precision
        precision = saved.get("precision") or fastest_precision(task)
    recipe = replace(
        recipe, steps=steps, precision=precision, begun=saved.get("begun", 0)
    )
    silent = (
        os.environ.get("RANK", "0") != "0"
    )  # of several processes, the first one reports
    bar = tqdm(
        total=steps,
        initial=done,
        desc=stage,
        unit="step",
        dynamic_ncols=True,
        disable=silent,
    )
    with bar, log_file(runs / stage) as log:

        def report(step: int, scalars: dict[str, float]) -> None:
            if silent:
                return
            bar.update(step - bar.n)
            bar.set_postfix(
                {
                    name: f"{scalars[name]:.3g}"
                    for name in scalars
                    if name not in ("lr", "norm")
                }
            )
            log.write(
                json.dumps(
                    {"step": step} | {name: round(x, 6) for name, x in scalars.items()}
                )
                + "\n"
            )
            log.flush()

        def show(step: int, pictures: Tensor) -> None:
            film = torch.cat(list(pictures), dim=-1)
            to_image(film).save(runs / stage / f"preview-{step:06d}.png")

        train(
            task,
            recipe,
            runs / stage,
            report=report,
            show=show,
            preview_every=PREVIEW_EVERY if stage == "unet" else 0,
        )


def log_file(folder: Path) -> TextIO:
    """Every figure that the loop reports, one JSON object a line; a resumed run goes on at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / "log.jsonl", "a", encoding="utf-8")
