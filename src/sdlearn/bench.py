"""our networks and others' -> their times, side by side. Chapter 19 explains."""

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
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
from typing import Any, TypeVar, cast

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
OPENVINO = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
FLAGS = "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"
COMPILED = "diffusers, compiled"
PAIRS = (
    ("{}", "ours", "diffusers"),
    ("{}", "ours", "OpenVINO"),
    ("{}, compiled", "compiled", COMPILED),
    ("{}, compiled", "compiled", "OpenVINO"),
)
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
OUR_TINY = """
from sdlearn.cli import main
words = ["txt2img", {prompt!r}, "--model", {path!r}, "-o", {folder!r} + "/ours.png"]
assert main([*words, "--device", {device!r}, "--dtype", "float32"]) == 0
"""
THEIR_TINY = """
from diffusers import DDPMScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(
    {path!r}, dtype=torch.float32, safety_checker=None
).to({device!r})
pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
done = pipe({prompt!r}, num_inference_steps=50, width=128, height=128)
done.images[0].save({folder!r} + "/theirs.png")
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
gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0
print(seconds, time.process_time(), gpu / 2**30 or most / 2**20)
"""


@dataclass(frozen=True)
class Row:
    """Medians of one comparison, in seconds, or in GiB for memory."""

    name: str
    ours: float
    theirs: float
    rival: str = "diffusers"

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def alternate(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list]:
    """What each gives, in turns: whatever else the machine does meets all of them.

    One round before does not count.
    """
    rounds = [
        {name: work() for name, work in works.items()} for _ in range(repeats + 1)
    ]
    return {name: [found[name] for found in rounds[1:]] for name in works}


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
    works: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
) -> list[Row]:
    """Ours beside every rival, and what is compiled beside what is compiled."""
    timers = {who: timer(work, device) for who, work in works.items()}
    times = alternate(timers, repeats)
    medians = {who: statistics.median(found) for who, found in times.items()}
    return [
        Row(title.format(name), medians[mine], medians[other], other)
        for title, mine, other in PAIRS
        if mine in medians and other in medians
    ]


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
        works: dict[str, Callable[[], object]] = {
            "ours": lambda: sd.unet(xt, t, context),
            "diffusers": lambda: pipe.unet(xt, 500, context).sample,
        }
        if compiled:  # on a CPU weights become constants, laid out for the kernels
            torch._inductor.config.freezing = device.type == "cpu"
            mine = compile_unet(copy.deepcopy(sd.unet))
            other = torch.compile(pipe.unet)
            works["compiled"] = lambda: mine(xt, t, context)
            works[COMPILED] = lambda: other(xt, 500, context).sample
        if device.type == "cpu" and importlib.util.find_spec("openvino"):
            works["OpenVINO"] = openvino_step(pipe.unet, xt, t, context)
        rows += compare("U-Net step, two halves", works, device, repeats)
    if "vae" in parts:
        works = {
            "ours": lambda: sd.vae.decode(latents),
            "diffusers": lambda: pipe.vae.decode(latents / scale).sample,
        }
        rows += compare("VAE decode", works, device, repeats)
    if "text" in parts:
        works = {
            "ours": lambda: sd.text_encoder(tokens),
            "diffusers": lambda: pipe.text_encoder(tokens).last_hidden_state,
        }
        often = max(repeats, 20)  # it takes milliseconds
        rows += compare("text encoder, two prompts", works, device, often)
    return rows


def openvino_step(
    unet: nn.Module, xt: Tensor, t: Tensor, context: Tensor
) -> Callable[[], object]:
    """A step of diffusers' U-Net, written anew by Intel's compiler for processors."""
    openvino = importlib.import_module("openvino")

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            x, context = x.to(xt.dtype), context.to(xt.dtype)
            return self.unet(x, t, context, return_dict=False)[0].float()

    inputs = xt.float().contiguous(), t, context.float()
    with torch.inference_mode():
        model = openvino.convert_model(Plain(), example_input=inputs)
    how = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": OPENVINO[xt.dtype],
    }
    program = openvino.compile_model(model, "CPU", how)
    arrays = [x.numpy() for x in inputs]
    return lambda: program(arrays)


def in_a_process(script: str, threads: int) -> list[float]:
    """Seconds, seconds of processor time, and the most memory in GiB, of a fresh
    Python that runs the script. Where others use the processors too, the second is the
    fair one: it counts only the time in which this process had one.
    """
    code = MEASURED.format(script=script, threads=threads)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    if done.returncode:  # who is killed says nothing
        silent = f"it ended with {done.returncode}, perhaps for want of memory"
        said = (done.stderr.strip().splitlines() or [silent])[-1]
        raise ValueError(f"a process of the benchmark failed: {said}")
    return [float(x) for x in done.stdout.split()[-3:]]


def whole_processes(
    name: str,
    scripts: tuple[str, str],
    words: dict[str, object],
    repeats: int,
    threads: int,
) -> list[Row]:
    """Times and peak memory of two scripts, each in a fresh Python."""
    ours, theirs = (script.format(**words) for script in scripts)
    works = {
        "ours": lambda: in_a_process(ours, threads),
        "theirs": lambda: in_a_process(theirs, threads),
    }
    found = alternate(works, repeats)
    names = name, "  its processor time", "  its peak memory, GiB"
    return [
        Row(name, *(statistics.median(x[i] for x in side) for side in found.values()))
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
    name = f"single file to first step, {file.stat().st_size / 1e9:.1f} GB"
    return whole_processes(name, (OURS, THEIRS), words, repeats, threads)


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
    name = f"tiled decode, {4 * size} pixels"
    return whole_processes(name, (OUR_TILES, THEIR_TILES), words, 1, threads)


def tiny_process(
    model: Path, device: torch.device, repeats: int, threads: int
) -> list[Row]:
    """One picture of 50 steps by the tiny model, from the command to the file."""
    with tempfile.TemporaryDirectory() as folder:
        words: dict[str, object] = {"path": str(model), "prompt": PROMPT}
        words |= {"device": str(device), "folder": folder}
        name, scripts = "tiny model, whole process", (OUR_TINY, THEIR_TINY)
        return whole_processes(name, scripts, words, repeats, threads)


def processor() -> str:
    """What this processor can do that matters here, as Linux names it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text("utf-8") if cpuinfo.exists() else ""
    told = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    flags = {name.strip(): value.split() for name, value in told.items()}.get(
        "flags", []
    )
    found = [flag for flag in FLAGS if flag in flags]
    return " ".join([platform.machine(), *found])


def table_of(rows: list[Row], about: dict[str, str]) -> str:
    """The rows as text, with what they were measured on."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items())]
    lines.append(f"{'seconds (medians)':36}{'ours':>9}{'theirs':>9}{'ratio':>7}")
    return "\n".join(
        lines
        + [
            f"{r.name:36}{r.ours:9.3f}{r.theirs:9.3f}{r.ratio:7.2f}  {r.rival}"
            for r in rows
        ]
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
    every = [part for part in PARTS if not (args.small and part == "load")]
    parts, device = args.parts or every, pick_device(args.device)
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
    libraries = ["torch", "diffusers", "transformers"]
    libraries += ["openvino"] * bool(importlib.util.find_spec("openvino"))
    about = {name: importlib.metadata.version(name) for name in libraries}
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    about |= {
        "device": f"{device} ({name})",
        "threads": str(args.threads),
        "dtype": args.dtype,
        "size": str(args.size),
    }
    if hasattr(os, "getloadavg"):
        about["load"] = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
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
        rows += tiny_process(args.model, device, args.repeats, args.threads)
    print(table_of(rows, about))
    if args.json:
        figures = {"about": about, "rows": [asdict(row) for row in rows]}
        text = json.dumps(figures, indent=1) + "\n"
        write_files({args.json: lambda part: part.write_text(text, "utf-8")})
