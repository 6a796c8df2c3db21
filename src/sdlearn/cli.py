"""The command `sdlearn`: draw pictures, train and measure networks, look into files, download.

It only uses what the chapters built.

Exit codes: 0 done, 2 wrong input (one sentence on stderr says what), 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdlearn import __version__

if (
    TYPE_CHECKING
):  # torch takes seconds to import: `sdlearn --help` should not wait for it
    from PIL.Image import Image

    from sdlearn.pipeline import StableDiffusion

# Modules with add_arguments() and main()
ELSEWHERE = {
    "train": "sdlearn.tiny.recipe",
    "evaluate": "sdlearn.tiny.evaluate",
    "bench": "sdlearn.bench",
}
DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
MODEL, OUTPUT, DOWNLOADS = "checkpoints/tiny", "outputs", "checkpoints"


class Parser(argparse.ArgumentParser):
    """Complains in one sentence."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """What txt2img and img2img have in common; the names are those of StableDiffusion.txt2img."""
    parser.add_argument(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="what the picture should not show",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=50,
        metavar="N",
        help="denoising steps (default: 50)",
    )
    parser.add_argument(
        "--cfg-scale",
        type=float,
        default=7.5,
        metavar="S",
        help="how much the prompt counts (7.5)",
    )
    parser.add_argument(
        "--sampler", default="ddpm", metavar="NAME", help="ddpm (the default), ddim ..."
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed draws the same picture (default: random)",
    )
    parser.add_argument(
        "--width",
        type=int,
        metavar="PX",
        help="pixels (default: the size the model was trained on)",
    )
    parser.add_argument(
        "--height", type=int, metavar="PX", help="pixels (default: the same)"
    )
    parser.add_argument(
        "-n",
        type=int,
        default=1,
        metavar="N",
        help="pictures for each prompt, seed, seed + 1 ... (1)",
    )
    parser.add_argument(
        "--rescale",
        type=float,
        default=0.0,
        metavar="PHI",
        help="guidance rescale, 0 to 1 (0: off)",
    )
    parser.add_argument(
        "--clip-skip",
        type=int,
        default=0,
        metavar="N",
        help="text encoder layers to leave out (0)",
    )
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=MODEL,
        metavar="PATH",
        help=f"diffusers folder or SD 1 file ({MODEL})",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="cuda, mps or cpu (default: the first that is there)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="TYPE",
        help="float32, float16 or bfloat16 (by device)",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep only the network at work on the device",
    )
    parser.add_argument(
        "--tiled",
        action="store_true",
        help="let the VAE work in tiles: large pictures, little memory",
    )
    parser.add_argument(
        "--fast", action="store_true", help="attention in its fast form (chapter 19)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the U-Net: minutes first, then faster steps",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="a file's averaged U-Net instead of the plain one",
    )
    parser.add_argument("--vae", metavar="PATH", help="another VAE, a file or a folder")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(OUTPUT),
        metavar="PATH",
        help=f"folder, or a file name that ends in .png ({OUTPUT}/)",
    )


def make_parser(command: str | None) -> Parser:
    """The parser; the arguments of `train` and `evaluate` are filled in when one of them is the command."""
    parser = Parser(
        prog="sdlearn", description="Stable Diffusion, built from an empty file."
    )
    parser.add_argument("--version", action="version", version=f"sdlearn {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )

    txt2img = commands.add_parser("txt2img", help="text -> pictures")
    txt2img.add_argument(
        "prompt",
        nargs="+",
        help="one or more prompts, each in quotes; '' draws anything",
    )
    add_drawing_arguments(txt2img)

    img2img = commands.add_parser("img2img", help="text and a picture -> pictures")
    img2img.add_argument(
        "prompt", nargs="+", help="one or more prompts, each in quotes"
    )
    img2img.add_argument(
        "--image",
        "-i",
        required=True,
        type=Path,
        metavar="FILE",
        help="the picture to begin with",
    )
    img2img.add_argument(
        "--strength",
        type=float,
        default=0.8,
        metavar="S",
        help="how much of it is forgotten: above 0, up to 1 (default: 0.8)",
    )
    add_drawing_arguments(img2img)

    demo = commands.add_parser("demo", help="a few pictures, of both kinds, with times")
    add_model_arguments(demo)

    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint file or folder is; reads no weights, runs nothing",
    )
    inspect.add_argument(
        "path",
        metavar="FILE_OR_FOLDER",
        help=".safetensors, .ckpt, or a folder in diffusers' layout",
    )
    inspect.add_argument("--json", action="store_true", help="for programs")

    download = commands.add_parser(
        "download", help="a model from the Hugging Face hub -> checkpoints/"
    )
    download.add_argument(
        "model",
        metavar="MODEL",
        help="sd15, OWNER/NAME, OWNER/NAME/FILE or a hub address",
    )
    download.add_argument(
        "-o", "--output", default=DOWNLOADS, metavar="FOLDER", help=f"({DOWNLOADS}/)"
    )
    others = {
        "train": "teach the tiny model",
        "evaluate": "measure a model",
        "bench": "our times beside diffusers'",
    }
    for name, what in others.items():
        other = commands.add_parser(name, help=what)
        if command == name:
            importlib.import_module(ELSEWHERE[name]).add_arguments(other)
    return parser


def find_model(path: str) -> Path:
    """A path as given, or from the repository that this file stands in."""
    here, there = Path(path), Path(__file__).resolve().parents[2] / path
    return there if path and not here.exists() and there.exists() else here


def load_model(args: argparse.Namespace) -> StableDiffusion:
    import torch

    from sdlearn.pipeline import StableDiffusion

    if not args.model:
        raise ValueError(
            "--model is empty: give a diffusers folder, or a .safetensors or .ckpt file"
        )
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    vae = find_model(args.vae) if args.vae else None
    return StableDiffusion.load(
        find_model(args.model),
        args.device,
        dtype,
        args.offload,
        args.ema,
        vae,
        args.tiled,
        args.fast,
        args.compile,
    )


def draw(
    model: StableDiffusion, args: argparse.Namespace, label: str, **more: object
) -> tuple[list[Image], list[str]]:
    """Pictures and their settings, with a progress bar on stderr. Everything is checked before the first step."""
    from tqdm import tqdm

    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    drawings = model.steps(
        args.prompt,
        args.negative_prompt,
        args.steps,
        args.cfg_scale,
        args.sampler,
        seed,
        args.width,
        args.height,
        args.n,
        rescale=args.rescale,
        clip_skip=args.clip_skip,
        **more,
    )
    check_output(args.output, args.n * len(args.prompt))
    with tqdm(desc=label, unit="step", dynamic_ncols=True, mininterval=0.3) as bar:
        for drawing in drawings:
            bar.total = drawing.total
            bar.update()
        pictures = drawing.images()
    return pictures, [
        settings_of(model, args, seed, i, picture) for i, picture in enumerate(pictures)
    ]


def settings_of(
    model: StableDiffusion, args: argparse.Namespace, seed: int, i: int, picture: Image
) -> str:
    """The text for the PNG of picture i."""
    from sdlearn.pictures import describe

    settings = {
        "Steps": args.steps,
        "Sampler": args.sampler.upper(),
        "CFG_scale": args.cfg_scale,
        "Seed": seed + i,
        "Size": f"{picture.width}x{picture.height}",
        "Model": model.name,
    }
    if "strength" in args:
        settings["Denoising_strength"] = args.strength
    if args.clip_skip:
        settings["Clip_skip"] = args.clip_skip + 1  # other tools count from 1
    if args.rescale:
        settings["CFG_Rescale_phi"] = args.rescale
    return describe(args.prompt[i // args.n], args.negative_prompt, **settings)


def is_file(output: Path) -> bool:
    """Is -o a file name, or a folder?"""
    return bool(output.suffix) and not output.is_dir()


def check_output(output: Path, count: int) -> None:
    """Find out before the work, not after it, whether pictures can be written."""
    one = is_file(output)
    if one and output.suffix.lower() != ".png":
        raise ValueError(
            f"output {output} ends in {output.suffix}, but pictures are written as .png"
        )
    if one and count > 1:
        raise ValueError(
            f"output {output} is one file, but {count} pictures come: give a folder"
        )
    folder = output.parent if one else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"pictures cannot be written into {folder}: {error.strerror}"
        ) from None


def save_all(
    pictures: Sequence[Image], settings: Sequence[str], output: Path, stem: str
) -> list[Path]:
    """Write PNGs under the next free numbers (stem-0001.png), or under the one name that was given."""
    from sdlearn.pictures import save_png

    taken = [
        int(path.stem.rpartition("-")[2])
        for path in output.glob(f"{stem}-[0-9]*.png")
        if path.stem.rpartition("-")[2].isdecimal()
    ]
    first = max(taken, default=0) + 1
    paths = (
        [output]
        if is_file(output)
        else [output / f"{stem}-{first + i:04d}.png" for i in range(len(pictures))]
    )
    for picture, text, path in zip(pictures, settings, paths, strict=True):
        save_png(picture, path, text)
    return paths


def run_drawing(args: argparse.Namespace) -> None:
    """`sdlearn txt2img` and `sdlearn img2img`."""
    from sdlearn.pictures import open_image

    more = {}
    if args.command == "img2img":
        more = {"image": open_image(args.image), "strength": args.strength}
    model = load_model(args)
    pictures, settings = draw(model, args, args.command, **more)
    for path in save_all(pictures, settings, args.output, args.command):
        print(path)


DEMO = [
    "a red apple on a blue background",
    "a fox and a green umbrella on a white background",
    "a yellow star above a cat",
    "a purple rocket to the left of a tree on a pink background",
]
REPAINT = "a green apple on a yellow background"


def run_demo(args: argparse.Namespace) -> None:
    """`sdlearn demo`, which is `make run`: the loop of Stable Diffusion in 50 steps, then quick ones, then img2img."""
    written: list[Path] = []

    @contextlib.contextmanager
    def stage(what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        print(f"{what:<58} {time.perf_counter() - start:5.1f} s", flush=True)

    def draw_stage(
        name: str,
        prompts: list[str],
        steps: int,
        sampler: str,
        seed: int,
        **more: object,
    ) -> list[Image]:
        common = {
            "negative_prompt": "",
            "cfg_scale": 7.5,
            "width": None,
            "height": None,
            "n": 1,
            "rescale": 0.0,
        }
        settings = argparse.Namespace(
            prompt=prompts,
            steps=steps,
            sampler=sampler,
            seed=seed,
            clip_skip=0,
            output=args.output,
            **common,
        )
        if "strength" in more:
            settings.strength = more["strength"]
        pictures, texts = draw(model, settings, name.partition("-")[0], **more)
        written.extend(save_all(pictures, texts, args.output, name))
        return pictures

    if is_file(args.output):
        raise ValueError(
            f"output {args.output} is a file name, but the demo writes several pictures: give a folder"
        )
    with stage("loading the model, with PyTorch"):
        model = load_model(args)
    with stage(f"txt2img, one picture, 50 steps of DDPM, on {model.device.type}"):
        first = draw_stage("txt2img-ddpm", DEMO[:1], 50, "ddpm", seed=1)[0]
    with stage("txt2img, three prompts at once, 20 steps of DDIM"):
        draw_stage("txt2img-ddim", DEMO[1:], 20, "ddim", seed=2)
    with stage("img2img from the first picture, 15 of 25 steps of DDIM"):
        draw_stage(
            "img2img-ddim", [REPAINT], 25, "ddim", seed=3, image=first, strength=0.6
        )
    print("written:", *written, sep="\n  ")


def run_inspect(args: argparse.Namespace) -> None:
    """`sdlearn inspect`: without torch, so that the answer comes at once."""
    from sdlearn.inspection import inspect, to_json, to_text

    if not args.path:
        raise ValueError(
            "the path is empty: give a .safetensors or .ckpt file, or a diffusers folder"
        )
    print((to_json if args.json else to_text)(inspect(find_model(args.path))))


def run_download(args: argparse.Namespace) -> None:
    """`sdlearn download`."""
    from sdlearn.hub import download

    path = download(args.model, find_model(args.output or "."))
    print(path)
    print(f"next: sdlearn inspect {path}", file=sys.stderr)


RUN = {
    "txt2img": run_drawing,
    "img2img": run_drawing,
    "demo": run_demo,
    "inspect": run_inspect,
    "download": run_download,
}


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of ours as one line on stderr; those of libraries stay silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="a prompt is cut")
        warnings.showwarning = lambda message, *_, **__: print(
            f"sdlearn: {message}", file=sys.stderr
        )
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = make_parser(argv[0] if argv else None).parse_args(argv)
        if args.command in ELSEWHERE:
            importlib.import_module(ELSEWHERE[args.command]).main(args)
        else:
            with plain_warnings():
                RUN[args.command](args)
    except KeyboardInterrupt:
        print("\nsdlearn: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"sdlearn: {error.name} is not installed: pip install -r requirements.txt",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        about = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"sdlearn: {about}", file=sys.stderr)
        return 2
    except (ValueError, MemoryError) as error:
        print(
            "sdlearn:",
            " ".join(str(error).split()) or "not enough memory",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error) and "not enough memory" not in str(error):
            raise
        print(
            "sdlearn: not enough memory; try --offload, fewer pictures (-n) or a smaller size",
            file=sys.stderr,
        )
        return 2
    return 0
