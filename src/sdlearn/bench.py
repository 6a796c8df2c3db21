"""our networks and diffusers' -> their times, side by side. Chapter 19 explains."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from sdlearn.arguments import DTYPES, add_device, thread_count
from sdlearn.checkpoint.load import Parts, empty, save
from sdlearn.clip import CLIPTextConfig, CLIPTextEncoder
from sdlearn.disk import check_writable, write_files
from sdlearn.pipeline import StableDiffusion, pick_device
from sdlearn.schedule import Schedule
from sdlearn.speed import compile_unet, speed_up
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

Network = TypeVar("Network", bound=nn.Module)
PARTS = ("unet", "vae", "text", "load", "tiles", "tiny")
FULL = (CLIPTextConfig(), VAEConfig(), UNetConfig())
SMALL = (  # the same layers, for a quick look
    CLIPTextConfig(width=64, layers=2, heads=4),
    VAEConfig((32, 32, 64, 64), blocks=1),
    UNetConfig((32, 64, 64, 64), blocks=1, context_width=64),
)
PROMPT = "a red apple on a blue background"
OURS = """
from sdlearn.pipeline import StableDiffusion
from sdlearn.speed import speed_up
sd = StableDiffusion.load({path!r}, {device!r}, torch.{dtype})
speed_up(sd, fast=True)
next(sd.steps({prompt!r}, steps=2, sampler="ddim", seed=0, width={size}, height={size}))
"""
THEIRS = """
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_single_file(
    {path!r}, config={config!r}, dtype=torch.{dtype},
    local_files_only=True, safety_checker=None,
).to({device!r})
pipe.set_progress_bar_config(disable=True)
pipe(
    {prompt!r}, num_inference_steps=1, output_type="latent",
    width={size}, height={size},
)
"""
OUR_TILES = """
from sdlearn.speed import TiledVAE
from sdlearn.checkpoint.load import load_vae
how = dict(device={device!r}, layout=torch.channels_last)
vae = load_vae({path!r}, dtype=torch.{dtype}, **how)
latents = torch.zeros(1, 4, {side}, {side}, dtype=torch.{dtype}, device={device!r})
with torch.inference_mode():
    TiledVAE(vae).decode(latents)
"""
THEIR_TILES = """
from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained({path!r}, subfolder="vae", dtype=torch.{dtype})
vae = vae.to({device!r}, memory_format=torch.channels_last)
vae.enable_tiling()
latents = torch.zeros(1, 4, {side}, {side}, dtype=torch.{dtype}, device={device!r})
with torch.inference_mode():
    vae.decode(latents)
"""
TINY = """
from diffusers import DDPMScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(
    {path!r}, dtype=torch.float32, safety_checker=None
)
pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
done = pipe({prompt!r}, num_inference_steps=50, width=128, height=128)
done.images[0].save({output!r})
"""
MEASURED = """
import resource, time
from pathlib import Path
started = time.perf_counter()
import torch
torch.set_num_threads({threads})
{script}
seconds, status = time.perf_counter() - started, Path("/proc/self/status")
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if status.exists():  # Linux: there, ru_maxrss remembers the process that started us
    told = dict(line.split(":", 1) for line in status.read_text().splitlines())
    most = int(told["VmHWM"].split()[0])
print(seconds, most / 2**20)
"""


@dataclass(frozen=True)
class Row:
    """Medians of one comparison, in seconds, or in GiB for memory."""

    name: str
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> tuple[list, list]:
    """What both give, in turns: whatever else the machine does meets both.

    One round before does not count.
    """
    found = [(ours(), theirs()) for _ in range(repeats + 1)][1:]
    return [a for a, _ in found], [b for _, b in found]


def timer(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Seconds of one call, with everything that it started on the device finished."""

    def wait() -> None:
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()

    @torch.inference_mode()
    def timed() -> float:
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    return timed


def compare(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    device: torch.device,
    repeats: int,
) -> Row:
    mine, other = alternate(timer(ours, device), timer(theirs, device), repeats)
    return Row(name, statistics.median(mine), statistics.median(other))


def random_model(make: type[Network], config: object, dtype: torch.dtype) -> Network:
    """A network of random weights that keep activations near one."""
    model = cast(Network, empty(make, config).to_empty(device="cpu").to(dtype))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, min(0.02, p[0].numel() ** -0.5))
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
    return model.eval()


def write_models(folder: Path, sizes: tuple, dtype: torch.dtype, size: int) -> Path:
    """The same random weights as a diffusers folder, and as a 32-bit single file.

    Returns the path of the file.
    """
    text = random_model(CLIPTextEncoder, sizes[0], dtype)
    vae = random_model(VAE, sizes[1], dtype)
    unet = random_model(UNet, sizes[2], dtype)
    networks = {"tokenizer": Tokenizer.clip(), "text_encoder": text}
    parts = Parts(networks | {"vae": vae, "unet": unet}, Schedule(), size=(size, size))
    save(folder, parts, dtype)
    save(folder / "model.safetensors", parts, torch.float32)
    return folder / "model.safetensors"


def networks(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    parts: list[str],
    repeats: int,
    compiled: bool,
) -> list[Row]:
    """One call of each network, eager and, if wanted, compiled."""
    import transformers
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    sd = speed_up(StableDiffusion.load(folder, device, dtype), fast=True)
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, dtype=dtype, safety_checker=None
    ).to(device)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    side = size // sd.factor
    xt, context, latents = (
        noise(2, 4, side, side),
        noise(2, 77, sd.text_encoder.config.width),
        noise(1, 4, side, side),
    )
    tokens, t = (
        sd.tokenizer([PROMPT, ""]).to(device),
        torch.tensor([500, 500], device=device),
    )
    scale = sd.vae.config.scale
    rows = []
    if "unet" in parts:
        ours, theirs = (
            lambda: sd.unet(xt, t, context),
            lambda: pipe.unet(xt, 500, context).sample,
        )
        rows.append(compare("U-Net step, two halves", ours, theirs, device, repeats))
        if compiled:
            torch._inductor.config.freezing = (
                device.type == "cpu"
            )  # weights become constants, laid out for the kernels
            compile_unet(sd.unet)
            other, plain = torch.compile(pipe.unet), theirs
            theirs = lambda: other(xt, 500, context).sample  # noqa: E731
            rows.append(
                compare("U-Net step, both compiled", ours, theirs, device, repeats)
            )
            rows.append(
                compare("U-Net step, compiled, to eager", ours, plain, device, repeats)
            )
    if "vae" in parts:
        ours, theirs = (
            lambda: sd.vae.decode(latents),
            lambda: pipe.vae.decode(latents / scale).sample,
        )
        rows.append(compare("VAE decode", ours, theirs, device, repeats))
    if "text" in parts:
        ours, theirs = (
            lambda: sd.text_encoder(tokens),
            lambda: pipe.text_encoder(tokens).last_hidden_state,
        )
        rows.append(compare("text encoder, two prompts", ours, theirs, device, repeats))
    return rows


def in_a_process(script: str, threads: int) -> tuple[float, float]:
    """Seconds, and the most memory in GiB, of a fresh Python that runs the script."""
    code = MEASURED.format(script=script, threads=threads)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(
            f"a process of the benchmark failed: {done.stderr.strip().splitlines()[-1]}"
        )
    seconds, memory = map(float, done.stdout.split()[-2:])
    return seconds, memory


def whole_processes(
    names: tuple[str, str],
    scripts: tuple[str, str],
    words: dict[str, object],
    repeats: int,
    threads: int,
) -> list[Row]:
    """Seconds and peak memory of two scripts, each in a fresh Python."""
    ours, theirs = (
        lambda script=script: in_a_process(script.format(**words), threads)
        for script in scripts
    )
    both = alternate(ours, theirs, repeats)
    return [
        Row(name, *(statistics.median(x[i] for x in side) for side in both))
        for i, name in enumerate(names)
    ]


def loading(
    file: Path,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    repeats: int,
    threads: int,
) -> list[Row]:
    """From nothing to the first step."""
    words = {
        "path": str(file),
        "config": str(file.parent),
        "device": str(device),
        "prompt": PROMPT,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    names = (
        f"single file to first step, {file.stat().st_size / 1e9:.1f} GB",
        "  its peak memory, GiB",
    )
    return whole_processes(names, (OURS, THEIRS), words, repeats, threads)


def tiles(
    folder: Path, device: torch.device, dtype: torch.dtype, size: int, threads: int
) -> list[Row]:
    """A picture with four times the side, decoded in tiles; once, as it takes long."""
    words = {
        "path": str(folder),
        "device": str(device),
        "side": size // 2,
        "dtype": str(dtype).removeprefix("torch."),
    }
    names = f"tiled decode, {4 * size} pixels", "  its peak memory, GiB"
    return whole_processes(names, (OUR_TILES, THEIR_TILES), words, 1, threads)


def tiny_process(model: Path, repeats: int, threads: int) -> Row:
    """One picture of 50 steps by the tiny model, from the command to the file."""
    with tempfile.TemporaryDirectory() as folder:
        mine, other = Path(folder) / "ours.png", Path(folder) / "theirs.png"
        command = [
            "txt2img",
            PROMPT,
            "--model",
            str(model),
            "-o",
            str(mine),
            "--device",
            "cpu",
        ]
        ours = f"from sdlearn.cli import main\nassert main({command!r}) == 0"
        theirs = TINY.format(path=str(model), prompt=PROMPT, output=str(other))
        both = alternate(
            lambda: in_a_process(ours, threads),
            lambda: in_a_process(theirs, threads),
            repeats,
        )
    return Row(
        "tiny model, whole process",
        *(statistics.median(x[0] for x in side) for side in both),
    )


def table_of(rows: list[Row], about: dict[str, str]) -> str:
    """The rows as text, with what they were measured on."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items())]
    lines.append(f"{'seconds (medians)':34}{'ours':>9}{'diffusers':>11}{'ratio':>8}")
    return "\n".join(
        lines
        + [f"{r.name:34}{r.ours:9.3f}{r.theirs:11.3f}{r.ratio:8.2f}" for r in rows]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--size", type=int, default=512, metavar="PX", help="side of the picture (512)"
    )
    add_device(parser, default="bf16")
    parser.add_argument(
        "--threads",
        type=thread_count,
        default=torch.get_num_threads(),
        metavar="N",
        help="of a CPU",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="measurements of each, medians count (3)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also compile both U-Nets (minutes)"
    )
    parser.add_argument(
        "--small", action="store_true", help="small networks: does it run?"
    )
    parser.add_argument(
        "--model", type=Path, default=Path("checkpoints/tiny"), help="the tiny model"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to this file"
    )


def main(args: argparse.Namespace) -> None:
    """`sdlearn bench`: the table."""
    if unknown := set(args.parts) - set(PARTS):
        raise ValueError(
            f"part {min(unknown)!r} is unknown: choose from {', '.join(PARTS)}"
        )
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: give at least 1")
    if args.size < 64 or args.size % 64:
        raise ValueError(f"--size {args.size}: give a multiple of 64 pixels")
    parts, device = args.parts or list(PARTS), pick_device(args.device)
    dtype = getattr(torch, DTYPES[args.dtype])
    if args.small and "load" in parts:
        raise ValueError(
            "a single file has Stable Diffusion's sizes: leave out --small, or load"
        )
    if "tiny" in parts and not args.model.exists():
        raise ValueError(
            f"there is no model at {args.model}: give one with --model, "
            "or name the parts without tiny"
        )
    if args.json:
        check_writable(args.json)
    torch.set_num_threads(args.threads)
    # what libraries tell would stand in the table's way
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    about = {
        name: importlib.metadata.version(name)
        for name in ("torch", "diffusers", "transformers")
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    about |= {
        "device": f"{device} ({name})",
        "threads": str(args.threads),
        "dtype": args.dtype,
        "size": str(args.size),
    }
    rows = []
    if set(parts) - {"tiny"}:
        with tempfile.TemporaryDirectory() as folder:
            file = write_models(
                Path(folder), SMALL if args.small else FULL, dtype, args.size
            )
            if set(parts) & {"unet", "vae", "text"}:
                rows += networks(
                    Path(folder),
                    device,
                    dtype,
                    args.size,
                    parts,
                    args.repeats,
                    args.compile,
                )
            if "load" in parts:
                rows += loading(
                    file, device, dtype, args.size, args.repeats, args.threads
                )
            if "tiles" in parts:
                rows += tiles(Path(folder), device, dtype, args.size, args.threads)
    if "tiny" in parts:
        rows.append(tiny_process(args.model, args.repeats, args.threads))
    print(table_of(rows, about))
    if args.json:
        figures = {"about": about, "rows": [asdict(row) for row in rows]}
        text = json.dumps(figures, indent=1) + "\n"
        write_files({args.json: lambda part: part.write_text(text, "utf-8")})
