"""Checkpoints <-> models: each format of Stable Diffusion 1, strictly. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.

`plan` decides what we can draw with; `load` reads the numbers that it finds.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdlearn.checkpoint.configs import (
    clip_from_json,
    clip_to_json,
    sample_size,
    schedule_from_json,
    schedule_to_json,
    text_from_json,
    text_to_json,
    unet_from_json,
    unet_to_json,
    vae_from_json,
    vae_to_json,
)
from sdlearn.checkpoint.dialects import (
    CHANNELS,
    CLIP_RULES,
    PREFIXES,
    VAE_RULES,
    Rules,
    averaged_name,
    called,
    clip_name,
    ldm_unet_rules,
    ldm_vae_rules,
    recognise,
    rename,
    spell_all,
    unet_rules,
    variant,
    why_ignored,
)
from sdlearn.checkpoint.files import (
    OPTIONAL,
    Tensors,
    clean,
    find_parts,
    human,
    json_writer,
    read_index,
    read_tensors,
    read_weights,
    tensor_writer,
    text_writer,
)
from sdlearn.checkpoint.hub import find_model, model_name
from sdlearn.clip import CLIP, CLIPTextConfig, CLIPTextEncoder
from sdlearn.disk import read_json, write_files
from sdlearn.prediction import EPSILON, Prediction
from sdlearn.schedule import Schedule
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig


class SkipInitialisation(TorchFunctionMode):
    """Numbers that are overwritten at once need not be drawn: on the meta device that
    would import half a compiler."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if function.__name__ in ("normal_", "uniform_", "mul"):
            return args[0] if args else kwargs["tensor"]
        function = torch.empty if function is torch.randn else function
        return function(*args, **(kwargs or {}))


def empty(make: Callable[..., Any], *config: object) -> Any:
    """A model without memory behind its tensors: only their shapes."""
    with torch.device("meta"), SkipInitialisation():
        return make(*config)


class Network(NamedTuple):
    """A network before its numbers are read: each of its tensors has its place."""

    model: Any  # an nn.Module on the meta device, with its config
    tensors: Mapping[str, Tensor]
    names: dict[str, str]  # ours -> the file's
    source: str | Path


def match(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    names: dict[str, str],
    source: str | Path,
) -> Network:
    """Strict: nothing is missing, nothing left over, each shape is right.

    names: our name -> theirs. Raises a ValueError that names the first misfit.
    """
    shapes = {names[ours]: x.shape for ours, x in model.state_dict().items()}
    extra = "has a tensor that no part of the model takes,"
    for which, left in {
        "lacks the tensor": [name for name in shapes if name not in tensors],
        extra: sorted(tensors.keys() - shapes.keys()),
    }.items():
        if left:
            more = f" and {len(left) - 1} more" if left[1:] else ""
            raise ValueError(
                f"{source} {which} {clean(left[0], 120)}{more}: the file belongs to "
                "another model, or is damaged"
            )
    for name, shape in shapes.items():
        dtype, found = entry(tensors, name)
        if found not in (shape, (*shape, 1, 1)) or "float" not in dtype:
            raise ValueError(
                f"{source}: {clean(name, 120)} is {tuple(found)} of {dtype}, but the "
                f"configuration wants floats in {tuple(shape)}"
            )
    return Network(model, tensors, names, source)


def entry(tensors: Mapping[str, Tensor], name: str) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a tensor, of which no number is read."""
    if isinstance(tensors, Tensors):
        return tensors.entries[name]
    return str(tensors[name].dtype).removeprefix("torch."), tuple(tensors[name].shape)


def fit(
    network: Network,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: torch.memory_format = torch.preserve_format,
) -> Any:
    """Read a network's numbers, one tensor after the other, the largest first.

    dtype None keeps what the file has. layout: that of convolutions, such as
    torch.channels_last. No more is in memory than the model and a bit of the file.
    """
    model, tensors, names, source = network
    kinds = {x: dtype or getattr(torch, entry(tensors, names[x])[0]) for x in names}
    places = sorted(model.state_dict().items(), key=lambda place: -place[1].numel())
    need = sum(place.numel() * kinds[ours].itemsize for ours, place in places)
    check_memory(need, device, source)
    state = {}
    for ours, place in places:
        theirs = tensors[names[ours]]
        format = layout if place.ndim == 4 else torch.preserve_format
        shaped = theirs.reshape(place.shape)
        mine = shaped.to(kinds[ours], memory_format=format, copy=True)
        check_numbers(theirs, mine, f"{source}: {clean(names[ours], 120)}")
        state[ours] = mine.to(device)
        del theirs, shaped  # with them goes the view of the file
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def check_numbers(tensor: Tensor, converted: Tensor, what: str) -> None:
    """No NaN and no infinity, neither from the file nor from the conversion."""

    def finite(x: Tensor) -> bool:
        moved = x.ndim == 4 and not x.is_contiguous()  # in memory's own order
        x = x.movedim(1, -1) if moved else x
        x = x if x.itemsize > 1 else x.float()
        return not x.numel() or all(map(math.isfinite, torch.aminmax(x)))

    if not finite(converted):
        if finite(tensor):
            kind = str(converted.dtype).removeprefix("torch.")
            raise ValueError(
                f"{what} has numbers too large for {kind}: take another --dtype"
            )
        raise ValueError(
            f"{what} holds NaN or infinite numbers: the file is spoiled, take another "
            "copy"
        )


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that are free there; None where nobody can tell."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind != "cpu" or not Path("/proc/meminfo").exists():
        return None
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else None


def check_memory(need: int, device: torch.device | str, source: str | Path) -> None:
    """Say it before the machine stands still."""
    free = free_memory(device)
    if free is not None and need > free:
        raise ValueError(
            f"{source} needs {human(need)} of memory, but only {human(free)} are free: "
            "close other programs, or take a smaller precision, such as --dtype bf16"
        )


Config = UNetConfig | VAEConfig | CLIPTextConfig
MAKE: dict[str, tuple[type[nn.Module], Callable[..., Config]]] = {
    "text_encoder": (CLIPTextEncoder, text_from_json),
    "vae": (VAE, vae_from_json),
    "unet": (UNet, unet_from_json),
}  # a part's name -> its class, and how its config.json is read


def rules(config: Config, ldm: bool = False) -> Rules:
    """Our names -> diffusers', or CompVis' (ldm)."""
    if isinstance(config, CLIPTextConfig):
        return CLIP_RULES
    if isinstance(config, VAEConfig):
        return ldm_vae_rules(len(config.channels)) if ldm else VAE_RULES
    if ldm:
        return ldm_unet_rules(config.blocks, config.attention)
    return unet_rules(config.blocks)


def refuse_foreign(tensors: Tensors) -> None:
    """A pickle that names more than tensors is described, but not trusted."""
    if tensors.foreign:
        more = f" and {len(tensors.foreign) - 1} more" if tensors.foreign[1:] else ""
        raise ValueError(
            f"{tensors.path} holds more than tensors (its pickle names "
            f"{clean(tensors.foreign[0])}{more}): take the .safetensors file"
        )


def prepare(part: str, config: Config, tensors: Tensors, source: Path) -> Network:
    """An empty network, and its tensors under whichever names this file has."""
    refuse_foreign(tensors)
    if isinstance(config, CLIPTextConfig):
        layers = config.layers
    else:
        layers = len(config.channels) * config.blocks
    if layers > len(tensors):  # before a million layers are built
        raise ValueError(
            f"{source} has {len(tensors)} tensors, but its configuration wants "
            f"{layers} layers: take both from one model"
        )
    try:
        model = empty(MAKE[part][0], config)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source} has an impossible configuration: {error}") from None
    ldm = any(re.search(r"(^|\.)(mid|input_blocks)\.", name) for name in tensors)
    names = spell_all(model.state_dict(), rules(config, ldm), part, tensors)
    return match(model, tensors.only(lambda name: not why_ignored(name)), names, source)


def prepare_part(here: Path, part: str) -> Network:
    """The folder of one part: its config.json and its weights."""
    if not here.is_dir():
        raise ValueError(
            f"{here.parent} has no folder {here.name}: give a whole model in "
            "diffusers' layout"
        )
    tensors = read_weights(here)
    config = MAKE[part][1](read_json(here / "config.json"))
    return prepare(part, config, tensors, tensors.path)


def load_part(
    folder: str | Path, part: str, dtype: torch.dtype | None = torch.float32, **how: Any
) -> Any:
    """One network of a model's folder. how: device and layout, as `fit` takes them."""
    return fit(prepare_part(Path(folder) / part, part), dtype, **how)


def load_text_encoder(folder: str | Path, **how: Any) -> CLIPTextEncoder:
    """`folder`/text_encoder -> our text encoder. how: dtype, device, layout."""
    return load_part(folder, "text_encoder", **how)


def load_unet(folder: str | Path, **how: Any) -> UNet:
    """`folder`/unet -> our U-Net. how: dtype, device, layout, as `fit` takes them."""
    return load_part(folder, "unet", **how)


def load_vae(folder: str | Path, **how: Any) -> VAE:
    """`folder`/vae -> our VAE. how: dtype, device, layout, as `fit` takes them."""
    return load_part(folder, "vae", **how)


def load_clip(
    folder: str | Path, dtype: torch.dtype | None = torch.float32
) -> tuple[Tokenizer, CLIP]:
    """`folder`/tokenizer and `folder`/clip, as transformers' CLIPModel saves them."""
    here = Path(folder) / "clip"
    model = empty(CLIP, *clip_from_json(read_json(here / "config.json")))
    names = {name: clip_name(name) for name in model.state_dict()}
    tensors = read_weights(here).only(lambda name: not why_ignored(name))
    network = match(model, tensors, names, tensors.path)
    return Tokenizer.load(Path(folder) / "tokenizer"), fit(network, dtype)


class Plan(NamedTuple):
    """A whole model before its numbers are read; size: (height, width) in pixels."""

    tokenizer: Tokenizer | None  # None: CLIP's own
    networks: dict[str, Network]  # text_encoder, vae, unet
    schedule: Schedule
    prediction: Prediction
    size: tuple[int, int]


class Sizes(NamedTuple):
    """The networks of a single file, which says nothing of them; SD 1.5's if unsaid."""

    text_encoder: CLIPTextConfig = CLIPTextConfig()
    vae: VAEConfig = VAEConfig()
    unet: UNetConfig = UNetConfig()


def plan(
    path: str | Path,
    ema: bool = False,
    vae: str | Path | None = None,
    sizes: Sizes | None = None,
) -> Plan:
    """What would be loaded, or a ValueError that says why not.

    The one place where it is decided what we can draw with: `load` reads the numbers
    that this finds, and `inspect` promises what this does not refuse.
    """
    path = Path(path)
    if path.is_dir():
        if ema:
            raise ValueError(
                f"{path} is a folder, which holds one copy of the U-Net: load it "
                "without ema"
            )
        return check_fit(plan_folder(path, vae), path)
    found = plan_file(path, ema, vae, sizes or Sizes())
    return found if sizes else check_fit(found, path)


def plan_folder(folder: Path, vae: str | Path | None) -> Plan:
    """A model in diffusers' layout."""
    index = read_index(folder)
    kind = str(index.get("_class_name"))
    find_parts(folder, index)  # complains if one is missing
    if not kind.startswith("StableDiffusion") or "XL" in kind or "3" in kind:
        raise ValueError(
            f"{folder} is a {clean(kind)}, but a StableDiffusionPipeline (SD 1) is "
            "wanted"
        )
    height, width = sample_size(read_json(folder / "unet" / "config.json"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    networks = {}
    for part in MAKE:
        if part == "vae" and vae is not None:
            own = folder / "vae" / "config.json"
            known = vae_from_json(read_json(own)) if own.exists() else VAEConfig()
            networks[part] = plan_vae(vae, known)
        else:
            networks[part] = prepare_part(folder / part, part)
    factor = 2 ** (len(networks["vae"].model.config.channels) - 1)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    pixels = factor * height, factor * width
    return Plan(tokenizer, networks, *schedule_from_json(scheduler), pixels)


def plan_vae(path: str | Path, config: VAEConfig) -> Network:
    """A VAE that stands alone: a file, or a folder with its config.json."""
    path = Path(path)
    if path.is_dir():
        return prepare_part(path / "vae" if (path / "vae").is_dir() else path, "vae")
    tensors = read_tensors(path)
    kind = recognise(tensors)
    if not kind.startswith("VAE"):
        raise ValueError(
            f"{path} is {called(kind)}, but a VAE alone is wanted: give its file, or a "
            "folder with a config.json"
        )
    return prepare("vae", config, tensors, path)


def plan_file(path: Path, ema: bool, vae: str | Path | None, sizes: Sizes) -> Plan:
    """A Stable Diffusion 1 in one file, as CompVis' code saved it."""
    tensors = read_tensors(path)
    refuse_foreign(tensors)
    kind, special = recognise(tensors), variant(tensors.entries)
    if kind != "SD 1" or special not in ("", "inpainting"):
        what = called(kind) + (f" for {special}" if special else "")
        raise ValueError(f"{path} is {what}, but a whole SD 1 checkpoint is wanted")
    heads = {part: PREFIXES[part][part == "text_encoder"] for part in MAKE}
    if vae is None and not any(name.startswith(heads["vae"]) for name in tensors):
        raise ValueError(f"{path} has no VAE: name the file of one with --vae")
    for name in sorted(tensors):
        if not why_ignored(name) and not name.startswith(tuple(heads.values())):
            raise ValueError(
                f"{path} has a tensor that no part takes, {clean(name)}: it is not a "
                "plain SD 1 checkpoint"
            )
    if special:  # a U-Net that also sees a mask and the rest of the picture
        channels = 2 * sizes.vae.latent_channels + 1
        sizes = sizes._replace(unet=replace(sizes.unet, in_channels=channels))
    networks = {}
    for part, config in sizes._asdict().items():
        if part == "vae" and vae is not None:
            networks[part] = plan_vae(vae, config)
        else:
            mine = tensors.only(re.compile(re.escape(heads[part])).match)
            networks[part] = prepare(part, config, mine, path)
    if ema:
        networks["unet"] = averages(networks["unet"], tensors)
    return Plan(None, networks, Schedule(), EPSILON, (512, 512))


def averages(unet: Network, tensors: Tensors) -> Network:
    """The averaged copy of the U-Net, without its two counters."""
    sign = re.compile(r"model_ema\.(?!decay$|num_updates$)")
    found = tensors.only(sign.match)
    if not found:
        raise ValueError(
            f"{tensors.path} has no averaged copy of its U-Net (EMA): load it without "
            "ema"
        )
    names = {ours: averaged_name(theirs) for ours, theirs in unet.names.items()}
    return match(unet.model, found, names, tensors.path)


def check_fit(found: Plan, path: Path) -> Plan:
    """Do the parts speak the same widths?"""
    text, vae, unet = (found.networks[part].model.config for part in MAKE)
    words, positions = 49408, 77
    if found.tokenizer is not None:
        words, positions = len(found.tokenizer), found.tokenizer.positions
    channels = vae.latent_channels
    fits = unet.in_channels in (channels, 2 * channels + 1)  # plain, or inpainting
    if not fits and (special := CHANNELS.get(unet.in_channels)):
        raise ValueError(
            f"{path} is made for {special}, its U-Net takes {unet.in_channels} "
            "channels: take a plain model"
        )
    if not fits or unet.out_channels != channels:
        raise ValueError(
            f"{path}: the U-Net takes {unet.in_channels} channels and answers "
            f"{unet.out_channels}, but the VAE makes {channels}: take another model"
        )
    if unet.context_width != text.width or words > text.vocab:
        raise ValueError(
            f"{path}: a tokenizer of {words} tokens, a text encoder of {text.vocab} "
            f"and width {text.width}, and a U-Net that reads a width of "
            f"{unet.context_width} do not fit: take all from one model"
        )
    if positions > text.positions:
        raise ValueError(
            f"{path}: the tokenizer fills {positions} positions, but the text encoder "
            f"has {text.positions}: take both from one model"
        )
    return found


class Parts(NamedTuple):
    """What a Stable Diffusion is made of; size: (height, width) in training."""

    networks: dict[str, Any]  # tokenizer, text_encoder, vae, unet
    schedule: Schedule
    prediction: Prediction = EPSILON
    size: tuple[int, int] = (512, 512)
    name: str = ""


def load(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    layout: torch.memory_format = torch.preserve_format,
    ema: bool = False,
    vae: str | Path | None = None,
) -> Parts:
    """A Stable Diffusion from a diffusers folder, a file, or OWNER/NAME on the hub.

    dtype None: as in the file. layout: of convolutions. ema: the averaged copy of the
    U-Net, if a file has both. vae: a file or folder with another VAE in the place of
    the model's own. Raises a ValueError, one sentence, for what cannot be drawn with.
    """
    found = find_model(path)
    return build(plan(found, ema, vae), model_name(found), dtype, device, layout)


def build(
    found: Plan, name: str = "", dtype: torch.dtype | None = torch.float32, *how: Any
) -> Parts:
    """Read the numbers of a plan. how: device and layout, as `fit` takes them."""
    networks = {"tokenizer": found.tokenizer or Tokenizer.clip()}
    networks |= {part: fit(found.networks[part], dtype, *how) for part in MAKE}
    return Parts(networks, found.schedule, found.prediction, found.size, name)


def named(model: Any, ldm: bool = False) -> dict[str, Tensor]:
    """A network's tensors under diffusers' names, or CompVis' (ldm)."""
    part = next(part for part, (make, _) in MAKE.items() if isinstance(model, make))
    head = PREFIXES[part][0] if ldm else "text_model." * (part == "text_encoder")
    theirs, tensors = rules(model.config, ldm), {}
    for ours, tensor in model.state_dict().items():
        name = head + rename(ours, theirs)
        conv = ".mid.attn_1." in name and tensor.ndim == 2  # theirs is 1x1
        tensors[name] = tensor[:, :, None, None] if conv else tensor
    return tensors


def save(
    path: str | Path, parts: Parts, dtype: torch.dtype | None = torch.float16
) -> None:
    """One file with CompVis' names if the path ends in .safetensors or .ckpt, else a
    folder in diffusers' layout. All of it is written, or nothing.

    A single file holds neither tokenizer nor schedule: its readers take those of SD 1.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".bin", ".pt", ".pth", ".sft", ".onnx", ".gguf"):
        raise ValueError(
            f"{path} does not say its format: give a name that ends in .safetensors or "
            ".ckpt, or the name of a folder"
        )
    if suffix not in (".safetensors", ".ckpt"):
        return write_files(folder_writers(path, parts, dtype))
    tokenizers = (x for x in parts.networks.values() if isinstance(x, Tokenizer))
    if words := [word for x in tokenizers for word in x.added.values()]:
        raise ValueError(
            f"{path}: a single file cannot say that this model has learned the word "
            f"{clean(words[0])}: save it as a folder"
        )
    usual = torch.equal(parts.schedule.betas, Schedule().betas)
    if parts.prediction.name != "epsilon" or not usual:
        raise ValueError(
            f"{path}: a single file cannot say that this model has another schedule or "
            "prediction than SD 1: save it as a folder"
        )
    tensors: dict[str, Tensor] = {}
    for part in MAKE:
        tensors |= named(parts.networks[part], ldm=True)
    return write_files({path: tensor_writer(tensors, dtype, suffix == ".ckpt")})


INDEX = {  # model_index.json: who reads which part, for diffusers
    "_diffusers_version": "0.6.0",  # the form of these files; its inpainting asks
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "vae": ["diffusers", "AutoencoderKL"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    **dict.fromkeys(OPTIONAL, [None, None]),
    "requires_safety_checker": False,
}


def folder_writers(
    folder: Path, parts: Parts, dtype: torch.dtype | None = None
) -> dict[Path, Callable[[Path], object]]:
    """All files of diffusers' layout, for `write_files`."""
    tokenizer, text, vae, unet = (parts.networks[part] for part in ("tokenizer", *MAKE))
    factor = 2 ** (len(vae.config.channels) - 1)
    height, width = (side // factor for side in parts.size)
    size = height if height == width else [height, width]
    schedule = schedule_to_json(parts.schedule, parts.prediction)
    ids = {f"{x}_token_id": getattr(tokenizer, x) for x in ("bos", "eos", "pad")}
    plain = unet.config.in_channels == vae.config.latent_channels
    kind = "StableDiffusionPipeline" if plain else "StableDiffusionInpaintPipeline"
    contents = {
        "text_encoder/config": text_to_json(text.config) | ids,
        "vae/config": vae_to_json(vae.config, max(parts.size)),
        "unet/config": unet_to_json(unet.config, size),
        "scheduler/scheduler_config": schedule,
        "model_index": {"_class_name": kind} | INDEX,
    }
    texts = tokenizer.files().items()
    writers = {f"tokenizer/{name}": text_writer(content) for name, content in texts}
    writers |= {f"{name}.json": json_writer(x) for name, x in contents.items()}
    for part in MAKE:
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        tensors = named(parts.networks[part])
        writers[f"{part}/{stem}.safetensors"] = tensor_writer(tensors, dtype)
    return {folder / name: write for name, write in writers.items()}


def save_clip(
    folder: str | Path, clip: CLIP, dtype: torch.dtype | None = torch.float16
) -> None:
    """Write both towers into `folder`/clip, for transformers' CLIPModel."""
    image, here = clip.image_encoder.config, Path(folder) / "clip"
    projection = clip.text_projection.out_features
    config = clip_to_json(clip.text_encoder.config, image, projection)
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": image.size},
        "crop_size": {"height": image.size, "width": image.size},
    }
    tensors = {clip_name(name): x for name, x in clip.state_dict().items()}
    files = {
        "config.json": json_writer(config),
        "preprocessor_config.json": json_writer(pixels),
        "model.safetensors": tensor_writer(tensors, dtype),
    }
    write_files({here / name: write for name, write in files.items()})
