"""checkpoint -> figures: how good the tiny Stable Diffusion is. Chapter 09 explains."""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdlearn.arguments import DTYPES, add_device
from sdlearn.checkpoint.load import load_clip
from sdlearn.disk import check_writable, write_files
from sdlearn.pipeline import StableDiffusion
from sdlearn.request import Request
from sdlearn.schedule import add_noise
from sdlearn.tiny.judge import Judge, load_judge, look, verdict
from sdlearn.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    RECOLOURED,
    Scene,
    random_scene,
)
from sdlearn.tiny.tasks import to_tensor
from sdlearn.tiny.unsaid import impurity, openness
from sdlearn.unet import attention_maps, record_attention

ROWS = {  # name of a row: the split of its scenes, and how many things they have
    "seen, one thing": ("train", 1),
    "seen, two things": ("train", 2),
    "held-out colour, one thing": ("colour", 1),
    "held-out colour, two things": ("colour", 2),
    "held-out pair": ("pair", 2),
}
PARTS = ("objects", "colours", "background", "relation", "all")
CEILINGS = ("true pictures", "through the VAE")
ELSE = {  # other ways to draw: name -> what differs
    "guidance 1": {"cfg_scale": 1.0},
    "guidance 3": {"cfg_scale": 3.0},
    "guidance 7.5": {"cfg_scale": 7.5},
    "DDIM, 10 steps": {"sampler": "ddim", "steps": 10},
    "DDIM, 15 steps": {"sampler": "ddim", "steps": 15},
    "DDIM, 20 steps": {"sampler": "ddim", "steps": 20},
}


def fresh_scenes(
    count: int, seed: int, split: str = "train", things: int | None = None
) -> list[Scene]:
    """Scenes drawn with a seed that training never uses."""
    rng = random.Random(f"evaluate {seed} {split} {things}")
    return [random_scene(rng, split, things) for _ in range(count)]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [-1, 1]: (B,)."""
    return 10 * (4 / (a - b).square().mean(dim=(1, 2, 3))).log10()


@torch.inference_mode()
def remade(
    model: StableDiffusion, scenes: Sequence[Scene], batch: int = 20
) -> tuple[Tensor, Tensor]:
    """Pictures of scenes, and what the VAE makes of them: each (B, 3, H, W).

    The latter have 8 bits, as they would be saved.
    """
    images = torch.stack([to_tensor(scene.render()) for scene in scenes])
    latents = (
        model.vae.encode(x.to(model.device, model.dtype)).mean
        for x in images.split(batch)
    )
    back = torch.cat([model.vae.decode(x).float().cpu() for x in latents])
    return images, ((back.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def vae_psnr(model: StableDiffusion, count: int = 200, seed: int = 0) -> float:
    """Mean PSNR in dB of fresh scenes after encoding and decoding."""
    return psnr(*remade(model, fresh_scenes(count, seed))).mean().item()


@torch.inference_mode()
def clip_retrieval(folder: Path, count: int = 200, seed: int = 0) -> dict[str, float]:
    """How often the right one of `count` sentences, or pictures, is found."""
    tokenizer, clip = load_clip(folder)
    scenes = fresh_scenes(count, seed)
    images = clip.embed_image(
        torch.stack([to_tensor(scene.render()) for scene in scenes])
    )
    texts = clip.embed_text(tokenizer([scene.sentence() for scene in scenes]))
    found = torch.arange(count)
    pairs = [i for i, scene in enumerate(scenes) if len(scene.things) == 2]
    swapped = clip.embed_text(
        tokenizer([scenes[i].mirrored().sentence() for i in pairs])
    )
    right = (images[pairs] * texts[pairs]).sum(1) > (images[pairs] * swapped).sum(1)
    scores = images @ texts.T
    return {
        "picture finds sentence": (scores.argmax(1) == found).float().mean().item(),
        "sentence finds picture": (scores.argmax(0) == found).float().mean().item(),
        "tells sides apart": right.float().mean().item(),
    }


def draw(
    model: StableDiffusion,
    scenes: Sequence[Scene],
    steps: int,
    sampler: str,
    cfg_scale: float,
    seed: int,
    batch: int = 20,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Image.Image]:
    """One picture for the full caption of each scene."""
    pictures = []
    for start in range(0, len(scenes), batch):
        prompts = [scene.sentence() for scene in scenes[start : start + batch]]
        pictures += model.txt2img(
            prompts,
            steps=steps,
            sampler=sampler,
            cfg_scale=cfg_scale,
            seed=seed + start,
        )
        advance(len(prompts))
    return pictures


def shares(
    scenes: Sequence[Scene], verdicts: Sequence[dict[str, bool]]
) -> dict[str, float]:
    """{part: how often it is right}.

    "relation" counts only pictures of two things whose objects are right: a single
    thing has no relation to get wrong.
    """
    told = zip(scenes, verdicts, strict=True)
    pairs = [verdict for scene, verdict in told if len(scene.things) == 2]
    found = {part: share(verdicts, part) for part in PARTS}
    return found | {"relation": share(pairs, "relation", "objects")}


def share(
    verdicts: Sequence[dict[str, bool]], part: str, given: str | None = None
) -> float:
    """How often a part is right, among the pictures in which `given` is."""
    chosen = [v[part] for v in verdicts if given is None or v[given]]
    return float(np.mean(chosen)) if chosen else float("nan")


def prompt_following(
    model: StableDiffusion,
    judge: Judge,
    count: int = 500,
    steps: int = 50,
    sampler: str = "ddpm",
    cfg_scale: float = 7.5,
    seed: int = 1,
) -> dict[str, dict[str, float]]:
    """Draw `count` fresh prompts, a fifth for each row, and let the judge look at them.

    Returns {row: {part: share}}, with the parts of `shares`; "true pictures" is how
    often the judge calls the true picture of the same prompts all right, and "through
    the VAE" the same after encoding and decoding: nothing drawn can score higher,
    except by luck.
    """
    table = {}
    with tqdm(
        total=count, desc="drawing", unit="picture", dynamic_ncols=True, leave=False
    ) as bar:
        for row, (split, things) in ROWS.items():
            scenes = fresh_scenes(count // len(ROWS), seed, split, things)
            drawn = draw(
                model, scenes, steps, sampler, cfg_scale, seed, advance=bar.update
            )
            verdicts = judged(
                judge, scenes, [to_tensor(np.array(picture)) for picture in drawn]
            )
            table[row] = shares(scenes, verdicts)
            for name, pictures in zip(CEILINGS, remade(model, scenes), strict=True):
                table[row][name] = share(judged(judge, scenes, pictures), "all")
    return table


def otherwise(
    model: StableDiffusion, judge: Judge, count: int = 100, **settings: Any
) -> dict[str, dict[str, float]]:
    """Scenes of all kinds, `count` of them, drawn in each of the other ways of ELSE:
    {way: {part: share}}, as `prompt_following`."""
    each = count // len(ROWS)
    scenes = [s for kind in ROWS.values() for s in fresh_scenes(each, 2, *kind)]
    table = {}
    for way, changes in tqdm(ELSE.items(), desc="otherwise", leave=False):
        drawn = draw(model, scenes, **(settings | changes))
        pictures = [to_tensor(np.array(picture)) for picture in drawn]
        table[way] = shares(scenes, judged(judge, scenes, pictures))
    return table


def unsaid(
    model: StableDiffusion,
    judge: Judge,
    count: int = 8,
    throws: int = 24,
    scales: Sequence[float] = (1.0, 7.5),
    **settings: Any,
) -> dict[str, dict[str, float]]:
    """{scale: what `openness` says} for `count` fresh sentences, half of them pairs."""
    scenes = [s for n in (1, 2) for s in fresh_scenes(count // 2, 3, "train", n)]
    table = {}
    for scale in tqdm(scales, desc="unsaid", leave=False):
        seed = settings["seed"]

        def pictures(sentences: list[str], scale: float = scale) -> list[Image.Image]:
            nonlocal seed
            seed += len(sentences)
            how = settings | {"cfg_scale": scale, "seed": seed}
            return model.txt2img(sentences, **how)

        table[f"guidance {scale:g}"] = openness(pictures, judge, scenes, throws)
    return table


def fills(model: StableDiffusion, count: int = 40, **settings: Any) -> dict[str, float]:
    """`impurity` of what is drawn, and of true pictures after the VAE."""
    scenes = fresh_scenes(4 * count, 4, "train", 1)
    scenes = [scene for scene in scenes if scene.things[0].colour][:count]
    back = ((remade(model, scenes)[1] + 1) * 127.5).round().byte()
    through = [x.permute(1, 2, 0).numpy() for x in back]
    drawn = [np.array(picture) for picture in draw(model, scenes, **settings)]
    return {
        "drawn": impurity(scenes, drawn),
        "true pictures through the VAE": impurity(scenes, through),
    }


def judged(
    judge: Judge, scenes: Sequence[Scene], pictures: Tensor | Sequence[Tensor]
) -> list[dict[str, bool]]:
    """The judge's verdict on each picture (3, H, W) in [-1, 1]."""
    findings = look(judge, torch.stack([*pictures]))
    return [
        verdict(finding, scene) for finding, scene in zip(findings, scenes, strict=True)
    ]


@torch.inference_mode()
def attention_overlap(
    model: StableDiffusion, count: int = 60, t: int = 500, seed: int = 0
) -> dict[str, float]:
    """Where the U-Net looks for each object word, on noisy latents of known scenes.

    "inside": the share of a word's attention that falls into its object's box; "area":
    the box's share of the picture, which blind attention would reach; "points": how
    often the strongest position lies in the box. Tang et al. 2023 (DAAM).
    """
    inside, area, points = [], [], []
    generator = torch.Generator().manual_seed(seed)
    for scene in fresh_scenes(count, seed):
        image = to_tensor(scene.render())[None].to(model.device, model.dtype)
        x0 = model.vae.encode(image).mean
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        words = model.tokenizer.split(scene.sentence())
        context = model.text_encoder(model.tokenizer(scene.sentence()).to(model.device))
        with record_attention(model.unet) as record:
            model.unet(
                add_noise(x0, noise, model.schedule.at(t)),
                torch.tensor([t], device=x0.device),
                context,
            )
        maps = (
            attention_maps(record, tuple(x0.shape[-2:]))[0].float().cpu()
        )  # (S, h, w)
        for thing in scene.things:
            place = words.index(thing.name + "</w>") + 1  # after the start token
            mask = inside_of(thing.box, maps[place], model.factor)
            inside.append((maps[place] * mask).sum() / maps[place].sum())
            area.append(mask.mean())
            points.append(mask.flatten()[maps[place].argmax()])
    return {
        name: torch.stack(x).mean().item()
        for name, x in (("inside", inside), ("area", area), ("points", points))
    }


def inside_of(box: tuple[int, int, int, int], grid: Tensor, factor: int) -> Tensor:
    """1 where the middle of a position lies in the box, given in pixels; else 0."""
    left, top, right, bottom = box
    y, x = ((torch.arange(n) + 0.5) * factor for n in grid.shape)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return (rows[:, None] & columns).to(grid)


def changed(scene: Scene, rng: random.Random) -> dict[str, str]:
    """Sentences that are wrong in one thing each, for a scene of two things.

    "colours" is among them where the first thing has a colour.
    """
    first, second = scene.things
    names = {thing.name for thing in scene.things}
    other = rng.choice(
        [
            name
            for name in OBJECTS
            if name not in names and (name in RECOLOURED) == bool(first.colour)
        ]
    )
    ground = rng.choice([name for name in BACKGROUNDS if name != scene.background])
    wrong = {
        "background": replace(scene, background=ground),
        "objects": replace(scene, things=(replace(first, name=other), second)),
        "relation": scene.mirrored(),
    }
    if first.colour:
        colour = rng.choice([name for name in COLOURS if name != first.colour])
        wrong["colours"] = replace(
            scene, things=(replace(first, colour=colour), second)
        )
    return {part: found.sentence() for part, found in wrong.items()}


@torch.inference_mode()
def words_heard(
    model: StableDiffusion, count: int = 64, t: int = 800, seed: int = 0
) -> dict[str, float]:
    """How often the true sentence explains noisy latents better than a wrong one.

    Wrong in its background, object ...; the deaf reach 0.5. No picture is drawn: the
    error of the answer tells. Li et al. 2023 (arXiv:2303.16203) classify in this way.
    """
    scenes, rng = fresh_scenes(count, seed, things=2), random.Random(seed)
    images = torch.stack([to_tensor(scene.render()) for scene in scenes])
    x0 = model.vae.encode(images.to(model.device, model.dtype)).mean.float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    level, times = model.schedule.at(t), torch.full((count,), t, device=x0.device)
    xt, unet = add_noise(x0, noise, level), model.network(Request(""))

    def error(sentences: Sequence[str]) -> Tensor:
        answer = unet(xt, times, **model.encode(sentences))
        eps = model.prediction.split(xt, answer, level)[1]
        return (eps - noise).square().mean(dim=(1, 2, 3))

    true, wrong = (
        error([scene.sentence() for scene in scenes]),
        [changed(scene, rng) for scene in scenes],
    )
    heard = {}
    for part in PARTS[:4]:
        told = torch.tensor(
            [part in sentences for sentences in wrong], device=x0.device
        )
        other = error([sentences.get(part, "") for sentences in wrong])
        heard[part] = (true < other)[told].float().mean().item()
    return heard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("checkpoints/tiny"),
        help="a checkpoint folder with a judge",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=500,
        help="pictures in the five rows (500); a fourth for each other way to draw",
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--cfg-scale", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=1)
    add_device(parser)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def main(args: argparse.Namespace) -> None:
    """`sdlearn evaluate`: every figure, printed as tables."""
    if args.prompts < len(ROWS):
        raise ValueError(
            f"--prompts {args.prompts} is too few: give at least {len(ROWS)}, "
            "one for each kind of scene"
        )
    if args.json:
        check_writable(args.json)
    settings = {
        "steps": args.steps,
        "sampler": args.sampler,
        "cfg_scale": args.cfg_scale,
        "seed": args.seed,
    }
    Request("", n=1000, **settings)  # what is wrong is told before the work
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    model = StableDiffusion.load(args.model, args.device, dtype)
    judge = load_judge(args.model)
    following = prompt_following(model, judge, args.prompts, **settings)
    figures = {
        "pictures in a row": args.prompts // len(ROWS),
        "settings": settings,
        "VAE PSNR, dB": vae_psnr(model),
        "CLIP retrieval": clip_retrieval(args.model),
        "attention overlap": attention_overlap(model),
        "words heard": words_heard(model),
        "prompt following": following,
        "otherwise": otherwise(model, judge, max(args.prompts // 4, 5), **settings),
        "unsaid": unsaid(model, judge, **settings),
        "fills": fills(model, **settings),
    }
    print(table_of(figures))
    if args.json:
        text = json.dumps(without_nan(figures), indent=1) + "\n"
        write_files({args.json: lambda part: part.write_text(text, "utf-8")})


def without_nan(figures: dict) -> dict:
    """JSON knows no "not a number": what could not be measured becomes null."""
    return {
        name: without_nan(x)
        if isinstance(x, dict)
        else None
        if isinstance(x, float) and math.isnan(x)
        else x
        for name, x in figures.items()
    }


def table_of(figures: dict) -> str:
    """The figures as text."""
    settings = " ".join(f"{name} {x}" for name, x in figures["settings"].items())
    lines = [f"VAE PSNR on fresh scenes: {figures['VAE PSNR, dB']:.1f} dB"]
    for name in ("CLIP retrieval", "attention overlap", "words heard"):
        values = (f"{key} {value:.2f}" for key, value in figures[name].items())
        lines.append(f"{name}: " + ", ".join(values))
    count = figures["pictures in a row"]
    lines.append(
        f"{count} pictures in each row; {settings}; "
        f"a share of 0.90 has a standard error of {(0.9 * 0.1 / count) ** 0.5:.2f}"
    )
    columns = {column: max(11, 2 + len(column)) for column in (*PARTS, *CEILINGS)}
    lines.append(
        f"{'prompt following':28}"
        + "".join(f"{column:>{width}}" for column, width in columns.items())
    )

    def line(name: str, values: dict[str, float]) -> str:
        cells = [
            ("-" if np.isnan(values[c]) else f"{values[c]:.2f}").rjust(width)
            for c, width in columns.items()
            if c in values
        ]
        return f"{name:28}" + "".join(cells)

    lines += [line(*row) for row in figures["prompt following"].items()]
    lines.append("otherwise drawn, all kinds")
    lines += [line(*row) for row in figures["otherwise"].items()]
    for way, values in figures["unsaid"].items():
        found = ", ".join(
            f"{name} {values[name]:.2f} ± {values[f'{name}, standard error']:.2f}"
            for name in ("backgrounds", "sides")
        )
        lines.append(f"left open, {way} (1: as a fair die): {found}")
    found = ", ".join(f"{name} {x:.1f}" for name, x in figures["fills"].items())
    lines.append(f"main fill, distance from its colour in RGB: {found}")
    return "\n".join(lines)
