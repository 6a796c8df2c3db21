"""Checkpoints <-> models: each format of Stable Diffusion, strictly. Chapter 11.
Exported from book/11_weights.ipynb and book/17_sdxl.ipynb
by `make export`; edit it there.

`plan` decides what we can draw with; `load` reads the numbers that it finds.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdlearn.checkpoint.configs import (
    LCM_ALWAYS,
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
    OPEN_CLIP_RULES,
    PREFIXES,
    TEXTS,
    VAE_RULES,
    Rules,
    averaged_name,
    called,
    clip_name,
    guidance_width,
    ldm_unet_rules,
    ldm_vae_rules,
    placed,
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
    unfused,
)
from sdlearn.checkpoint.hub import find_model, model_name
from sdlearn.clip import CLIP, CLIPTextConfig, CLIPTextEncoder
from sdlearn.disk import read_json, write_files
from sdlearn.prediction import EPSILON, Prediction, V
from sdlearn.schedule import Schedule, zero_terminal_snr
from sdlearn.tokenizer import EOS, Tokenizer
from sdlearn.unet import AddedEmbedding, UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig


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
    kinds = types_of(network, dtype)
    places = sorted(model.state_dict().items(), key=lambda place: -place[1].numel())
    check_memory(memory_of(network, dtype), device, source)
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


Config = UNetConfig | VAEConfig | CLIPTextConfig
MAKE: dict[str, tuple[type[nn.Module], Callable[..., Config]]] = {
    "text_encoder": (CLIPTextEncoder, text_from_json),
    "vae": (VAE, vae_from_json),
    "unet": (UNet, unet_from_json),
    "text_encoder_2": (CLIPTextEncoder, text_from_json),
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


def is_ldm(names: Iterable[str]) -> bool:
    """Are these CompVis' names of a VAE or a U-Net?"""
    return any(re.search(r"(^|\.)(mid|input_blocks)\.", name) for name in names)


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
    theirs = rules(config, is_ldm(tensors))
    if any(".resblocks." in name for name in tensors):
        tensors, theirs = unfused(tensors), OPEN_CLIP_RULES
    names = spell_all(model.state_dict(), theirs, part, tensors)
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

    tokenizers: dict[str, Tokenizer | str]  # a text: CLIP's own, padded with it
    networks: dict[str, Network]  # text_encoder, vae, unet; SDXL: text_encoder_2
    schedule: Schedule
    prediction: (
        Prediction | None
    )  # None: the file does not say, the U-Net has to be asked
    size: tuple[int, int]


class Sizes(NamedTuple):
    """The networks of a single file, which says nothing of them; SD 1.5's if unsaid."""

    text_encoder: CLIPTextConfig | None = CLIPTextConfig()
    vae: VAEConfig = VAEConfig()
    unet: UNetConfig = UNetConfig()
    text_encoder_2: CLIPTextConfig | None = None
    side: int = 512  # pixels


SIZES = {"SD 1": Sizes()}  # by what a file is


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
    found = plan_file(path, ema, vae, sizes)
    return found if sizes else check_fit(found, path)


def plan_folder(folder: Path, vae: str | Path | None) -> Plan:
    """A model in diffusers' layout."""
    index = read_index(folder)
    kind = str(index.get("_class_name"))
    find_parts(folder, index)  # complains if one is missing
    good = kind.startswith(("StableDiffusion", "LatentConsistency"))
    if not good or "3" in kind:
        raise ValueError(
            f"{folder} is a {clean(kind)}, but a StableDiffusionPipeline or a "
            "StableDiffusionXLPipeline is wanted"
        )
    xl = "XL" in kind
    height, width = sample_size(read_json(folder / "unet" / "config.json"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    networks = {}
    for part in MAKE:
        if part.startswith("text_encoder") and not has_part(index, part, xl):
            continue
        if part == "vae" and vae is not None:
            own = folder / "vae" / "config.json"
            known = vae_from_json(read_json(own)) if own.exists() else VAEConfig()
            networks[part] = plan_vae(vae, known)
        else:
            networks[part] = prepare_part(folder / part, part)
    factor = 2 ** (len(networks["vae"].model.config.channels) - 1)
    texts = [name for name in networks if name.startswith("text_encoder")]
    names = [name.replace("text_encoder", "tokenizer") for name in texts]
    tokenizers: dict[str, Tokenizer | str] = {}
    tokenizers |= {name: Tokenizer.load(folder / name) for name in names}
    pixels = factor * height, factor * width
    unet = networks["unet"].model
    zeros = xl and index.get("force_zeros_for_empty_prompt", True) is True
    unet.config = replace(unet.config, zeros=zeros)
    return Plan(tokenizers, networks, *schedule_from_json(scheduler), pixels)


def has_part(index: Mapping[str, Any], part: str, xl: bool) -> bool:
    """Is a text encoder to be expected? A refiner of SDXL lacks the first one."""
    return index.get(part) != [None, None] and (xl or part == "text_encoder")


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


def plan_file(
    path: Path, ema: bool, vae: str | Path | None, sizes: Sizes | None
) -> Plan:
    """A Stable Diffusion in one file, as its makers' code saved it."""
    tensors = read_tensors(path)
    refuse_foreign(tensors)
    kind, special = recognise(tensors), variant(tensors.entries)
    hears = guidance_width(tensors.entries)
    if kind not in SIZES or special not in ("", "inpainting") and not hears:
        what = called(kind) + (f" for {special}" if special else "")
        raise ValueError(
            f"{path} is {what}, but a whole checkpoint of SD 1, SD 2 or SDXL is wanted"
        )
    heads = TEXTS[kind] | {part: PREFIXES[part][0] for part in ("vae", "unet")}
    absent = [
        part
        for part, head in heads.items()
        if not any(name.startswith(head) for name in tensors)
    ]
    if vae is None and "vae" in absent:
        raise ValueError(f"{path} has no VAE: name the file of one with --vae")
    if absent and absent != ["vae"]:
        raise ValueError(f"{path} has no {absent[0]}: take a whole checkpoint")
    for name in sorted(tensors):
        if not why_ignored(name) and not name.startswith(tuple(heads.values())):
            raise ValueError(
                f"{path} has a tensor that no part takes, {clean(name)}: it is not a "
                f"plain {kind} checkpoint"
            )
    sizes = sizes or SIZES[kind]
    if hears:  # a latent consistency model
        sizes = sizes._replace(unet=replace(sizes.unet, guidance_width=hears))
    elif special:  # a U-Net that also sees a mask and the rest of the picture
        channels = 2 * sizes.vae.latent_channels + 1
        sizes = sizes._replace(unet=replace(sizes.unet, in_channels=channels))
    networks = {}
    for part in heads:
        config = getattr(sizes, part)
        if part == "vae" and vae is not None:
            networks[part] = plan_vae(vae, config)
        else:
            mine = tensors.only(re.compile(re.escape(heads[part])).match)
            networks[part] = prepare(part, config, mine, path)
    if ema:
        networks["unet"] = averages(networks["unet"], tensors)
    old = TEXTS["SD 1"]["text_encoder"], TEXTS["SDXL"]["text_encoder"]
    tokenizers: dict[str, Tokenizer | str] = {  # CLIP pads with its end, OpenCLIP "!"
        part.replace("text_encoder", "tokenizer"): EOS if root in old else "!"
        for part, root in TEXTS[kind].items()
    }
    betas = Schedule().betas
    schedule = Schedule(zero_terminal_snr(betas) if "ztsnr" in tensors else betas)
    said = said_prediction(kind, tensors)
    side = 768 if kind == "SD 2" and said is V else sizes.side
    return Plan(tokenizers, networks, schedule, said, (side, side))


def said_prediction(kind: str, tensors: Tensors) -> Prediction | None:
    """What the U-Net of a single file answers, as far as the file says so."""
    said = tensors.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in tensors or said in ("v", "v_prediction"):
        return V
    return None if kind == "SD 2" and said not in ("epsilon", "eps") else EPSILON


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
    configs = {part: network.model.config for part, network in found.networks.items()}
    vae, unet = configs["vae"], configs["unet"]
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
    try:
        check_texts(configs | found.tokenizers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def check_texts(parts: Mapping[str, Any]) -> None:
    """Do tokenizers, text encoders (or their configs) and U-Net fit each other?"""
    unet = parts["unet"]
    texts = {name: x for name, x in parts.items() if name.startswith("text_encoder")}
    width = sum(text.width for text in texts.values())
    for name, text in texts.items():
        tokenizer = parts[name.replace("text_encoder", "tokenizer")]
        own = isinstance(tokenizer, str)  # CLIP's own
        words, positions = (49408, 77) if own else (len(tokenizer), tokenizer.positions)
        if unet.context_width != width and not unet.added or words > text.vocab:
            raise ValueError(
                f"a tokenizer of {words} tokens, a text encoder of {text.vocab} and "
                f"width {text.width}, and a U-Net that reads a width of "
                f"{unet.context_width} do not fit: take all from one model"
            )
        if positions > text.positions:
            raise ValueError(
                f"the tokenizer fills {positions} positions, but the text encoder has "
                f"{text.positions}: take both from one model"
            )
    pooled = texts["text_encoder_2"].projection if "text_encoder_2" in texts else 0
    ids, rest = divmod(unet.added - pooled, AddedEmbedding.waves)
    beside = not rest and ids in (5, 6) if unet.added else not pooled
    if not texts or unet.context_width != width or not beside:
        raise ValueError(
            f"there is {', '.join(texts) or 'no text encoder'}, with a pooled text of "
            f"width {pooled}, but the U-Net reads {unet.context_width} for words and "
            f"{unet.added} beside them: take all from one model"
        )


class Parts(NamedTuple):
    """What a Stable Diffusion is made of; size: (height, width) in training."""

    networks: dict[str, Any]  # tokenizer, text_encoder, vae, unet; SDXL: two of each
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
    networks: dict[str, Any] = {
        name: Tokenizer.clip(pad=x) if isinstance(x, str) else x
        for name, x in found.tokenizers.items()
    }
    types = {part: kept(x.model, dtype) for part, x in found.networks.items()}
    need = sum(memory_of(x, types[part]) for part, x in found.networks.items())
    check_memory(need, how[0] if how else "cpu", name or "the model")
    for part, network in found.networks.items():
        networks[part] = fit(network, types[part], *how)
    prediction, size = found.prediction, found.size
    if prediction is None:
        prediction = asked_prediction(networks["unet"])
        size = (768, 768) if prediction is V else size
    return Parts(networks, found.schedule, prediction, size, name)


def kept(model: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a network computes in: a VAE that overflows in 16 bits takes 32."""
    fragile = getattr(getattr(model, "config", None), "upcast", False)
    return torch.float32 if fragile and dtype is torch.float16 else dtype


@torch.no_grad()
def asked_prediction(unet: UNet) -> Prediction:
    """Does it answer the noise, or v? It is shown noise alone, at the last time.

    A network that predicts noise then answers what it saw; v is there minus the
    picture.
    """
    dice, config = torch.Generator().manual_seed(0), unet.config
    weight = unet.conv_in.weight
    noise = torch.randn(1, config.out_channels, 32, 32, generator=dice).to(weight)
    more = noise.new_zeros(1, config.in_channels - config.out_channels, 32, 32)
    words = torch.zeros(1, 77, config.context_width).to(weight)
    answer = unet(torch.cat([noise, more], dim=1), torch.tensor([999]), words)
    alike = torch.cosine_similarity(answer.flatten(), noise.flatten(), dim=0)
    return EPSILON if alike > 0.5 else V


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


def types_of(network: Network, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The type that each tensor will have; dtype None: that of the file."""
    _, tensors, names, _ = network
    return {x: dtype or getattr(torch, entry(tensors, names[x])[0]) for x in names}


def memory_of(network: Network, dtype: torch.dtype | None) -> int:
    """How many bytes it will take."""
    kinds, places = types_of(network, dtype), network.model.state_dict()
    return sum(x.numel() * kinds[name].itemsize for name, x in places.items())


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that are free there; None where it cannot be told."""
    kind = torch.device(device).type
    if kind == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if kind != "cpu" or not Path("/proc/meminfo").exists():
        return None
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else None


def check_memory(need: int, device: torch.device | str, source: str | Path) -> None:
    """Say it before the machine stands still."""
    free, there = free_memory(device), torch.device(device).type
    if free is not None and need > free:
        advice = "" if there == "cpu" else "add --offload, "
        raise ValueError(
            f"{source} needs {human(need)} of memory, but only {human(free)} are free: "
            f"{advice}close other programs, or take a smaller precision, such as "
            "--dtype bf16"
        )


def named(model: Any, ldm: bool = False) -> dict[str, Tensor]:
    """A network's tensors under diffusers' names, or CompVis' (ldm)."""
    part = next(part for part, (make, _) in MAKE.items() if isinstance(model, make))
    head = PREFIXES[part][0] if ldm else "text_model." * (part == "text_encoder")
    theirs, tensors = rules(model.config, ldm), {}
    for ours, tensor in model.state_dict().items():
        name = placed(head, rename(ours, theirs))
        conv = ".mid.attn_1." in name and tensor.ndim == 2  # theirs is 1x1
        tensors[name] = tensor[:, :, None, None] if conv else tensor
    return tensors


def fused(encoder: nn.Module) -> dict[str, Tensor]:
    """A text encoder's tensors under OpenCLIP's names: what `unfused` takes apart."""
    found = {rename(x, OPEN_CLIP_RULES): y for x, y in encoder.state_dict().items()}
    for name in [name for name in found if ".q_proj." in name]:
        three = [found.pop(name.replace(".q_", f".{x}_")) for x in "qkv"]
        found[name.replace(".q_proj.", ".in_proj_")] = torch.cat(three)
    if "text_projection.weight" in found:
        found["text_projection"] = found.pop("text_projection.weight").T
    return found


def kind_of(parts: Parts) -> str:
    """As what its parts go into a single file: a key of SIZES, or nothing."""

    def signs(part: str, config: Any) -> tuple:
        if part == "unet":
            return config.linear, config.zeros, config.added > 0
        return (config.exact_gelu,)

    mine = {name: x.config for name, x in parts.networks.items() if name in MAKE}
    del mine["vae"]
    for kind, sizes in SIZES.items():
        theirs = {part: getattr(sizes, part) for part in (*TEXTS[kind], "unet")}
        alike = (signs(x, mine[x]) == signs(x, theirs[x]) for x in mine)
        if mine.keys() == theirs.keys() and all(alike):
            return kind
    return ""


def save(
    path: str | Path, parts: Parts, dtype: torch.dtype | None = torch.float16
) -> None:
    """One file with CompVis' names if the path ends in .safetensors or .ckpt, else a
    folder in diffusers' layout. All of it is written, or nothing.

    A single file holds neither tokenizer nor schedule: its readers take those of the
    kind that it is.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".bin", ".pt", ".pth", ".sft", ".onnx", ".gguf"):
        raise ValueError(
            f"{path} does not say its format: give a name that ends in .safetensors or "
            ".ckpt, or the name of a folder"
        )
    networks = [x for x in parts.networks.values() if isinstance(x, nn.Module)]
    if any(torch.int8 in {y.dtype for y in x.state_dict().values()} for x in networks):
        raise ValueError(
            f"{path}: weights in 8 bits are for drawing alone, no file holds them: "
            "save the model before its weights are changed"
        )
    if suffix not in (".safetensors", ".ckpt"):
        return write_files(folder_writers(path, parts, dtype))
    tokenizers = (x for x in parts.networks.values() if isinstance(x, Tokenizer))
    if words := [word for x in tokenizers for word in x.added.values()]:
        raise ValueError(
            f"{path}: a single file cannot say that this model has learned the word "
            f"{clean(words[0])}: save it as a folder"
        )
    kind, betas, usual = kind_of(parts), parts.schedule.betas, Schedule().betas
    if not kind:
        raise ValueError(
            f"{path}: a single file holds an SD 1, SD 2 or SDXL, but this model has "
            "other parts: save it as a folder"
        )
    zero = torch.equal(betas, zero_terminal_snr(usual))
    said = {"v_pred": parts.prediction is V, "ztsnr": zero}  # as two empty tensors
    known = parts.prediction in (EPSILON, V) and (zero or torch.equal(betas, usual))
    known = known and not parts.schedule.noise_offset
    if not known or kind == "SD 1" and any(said.values()):
        raise ValueError(
            f"{path}: a single file of {kind} cannot say that this model has another "
            "schedule or prediction than usual: save it as a folder"
        )
    tensors = {name: torch.zeros(0) for name, x in said.items() if x}
    for part in ("vae", "unet"):
        tensors |= named(parts.networks[part], ldm=True)
    for part, root in TEXTS[kind].items():
        text = parts.networks[part]
        theirs = named(text) if root.endswith("transformer.") else fused(text)
        tensors |= {root + name: tensor for name, tensor in theirs.items()}
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


def index_of(parts: Parts) -> dict[str, Any]:
    """The content of model_index.json."""
    unet, vae = parts.networks["unet"].config, parts.networks["vae"].config
    plain = unet.in_channels == vae.latent_channels
    refiner = "text_encoder" not in parts.networks
    use = ("Img2Img" if refiner else "") if plain else "Inpaint"
    name = f"StableDiffusion{'XL' if unet.added else ''}{use}Pipeline"
    found: dict[str, Any] = {"_class_name": name} | INDEX
    if unet.guidance_width:  # a latent consistency model
        found["scheduler"] = ["diffusers", "LCMScheduler"]
        if not unet.added:
            found["_class_name"] = "LatentConsistencyModelPipeline"
    if not unet.added:
        return found
    found = {name: x for name, x in found.items() if "safety" not in name}
    found |= {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": INDEX["tokenizer"],
        "force_zeros_for_empty_prompt": unet.zeros,
    }
    if refiner:
        found["requires_aesthetics_score"] = True
    absent = [name for name in found if name.startswith(("text_enc", "tokenizer"))]
    absent = [name for name in absent if name not in parts.networks]
    return found | dict.fromkeys(absent, [None, None])


def folder_writers(
    folder: Path, parts: Parts, dtype: torch.dtype | None = None
) -> dict[Path, Callable[[Path], object]]:
    """All files of diffusers' layout, for `write_files`."""
    vae, unet = parts.networks["vae"], parts.networks["unet"]
    factor = 2 ** (len(vae.config.channels) - 1)
    height, width = (side // factor for side in parts.size)
    size = height if height == width else [height, width]
    schedule = schedule_to_json(parts.schedule, parts.prediction)
    if unet.config.guidance_width:
        schedule |= {"_class_name": "LCMScheduler"} | LCM_ALWAYS
    contents = {
        "vae/config": vae_to_json(vae.config, max(parts.size)),
        "unet/config": unet_to_json(unet.config, size),
        "scheduler/scheduler_config": schedule,
        "model_index": index_of(parts),
    }
    writers: dict[str, Callable[[Path], object]] = {}
    for name, part in parts.networks.items():
        if isinstance(part, Tokenizer):
            files = part.files().items()
            writers |= {f"{name}/{file}": text_writer(text) for file, text in files}
            continue
        if text := name.startswith("text_encoder"):
            tokenizer = parts.networks[name.replace("text_encoder", "tokenizer")]
            ids = {
                f"{x}_token_id": getattr(tokenizer, x) for x in ("bos", "eos", "pad")
            }
            contents[f"{name}/config"] = text_to_json(part.config) | ids
        stem = "model" if text else "diffusion_pytorch_model"
        writers[f"{name}/{stem}.safetensors"] = tensor_writer(named(part), dtype)
    writers |= {f"{name}.json": json_writer(x) for name, x in contents.items()}
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


OPEN_CLIP_H = CLIPTextConfig(width=1024, layers=23, heads=16, exact_gelu=True)
OPEN_CLIP_G = CLIPTextConfig(
    width=1280, layers=32, heads=20, exact_gelu=True, projection=1280
)
SD2_UNET = UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear=True)
XL_VAE = VAEConfig(scale=0.13025, upcast=True)
XL_UNET = UNetConfig(
    channels=(320, 640, 1280),
    attention=(False, True, True),
    heads=(5, 10, 20),
    depth=(1, 2, 10),
    context_width=768 + 1280,
    linear=True,
    added=1280 + 6 * AddedEmbedding.waves,
    zeros=True,
)
REFINER_UNET = UNetConfig(
    channels=(384, 768, 1536, 1536),
    attention=(False, True, True, False),
    heads=(6, 12, 24, 24),
    depth=(4, 4, 4, 4),
    context_width=1280,
    linear=True,
    added=1280 + 5 * AddedEmbedding.waves,
)
SIZES |= {
    "SD 2": Sizes(OPEN_CLIP_H, unet=SD2_UNET),
    "SDXL": Sizes(CLIPTextConfig(), XL_VAE, XL_UNET, OPEN_CLIP_G, side=1024),
    "SDXL refiner": Sizes(None, XL_VAE, REFINER_UNET, OPEN_CLIP_G, side=1024),
}


def is_fast(schedule: Schedule, prediction: Prediction) -> bool:
    """Made for a few steps without guidance, as SDXL-Turbo? A folder shows it: its
    steps begin at the very last time, though its U-Net answers noise."""
    noisy = schedule.alpha_bar[-1] > 1e-6  # no zero terminal SNR
    return schedule.spacing == "trailing" and prediction is EPSILON and bool(noisy)
