"""Checkpoint files <-> models: load strictly, save whole. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdlearn.clip import CLIP, CLIPTextConfig, CLIPTextEncoder
from sdlearn.config import (
    clip_from_json,
    clip_to_json,
    read_json,
    schedule_from_json,
    schedule_to_json,
    text_from_json,
    text_to_json,
    unet_from_json,
    unet_to_json,
    vae_from_json,
    vae_to_json,
)
from sdlearn.names import (
    CLIP_RULES,
    LDM_IGNORED,
    LDM_PREFIXES,
    VAE_RULES,
    clip_name,
    ldm_unet_rules,
    ldm_vae_rules,
    recognise,
    rename,
    unet_rules,
)
from sdlearn.schedule import Schedule
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

__all__ = [
    "fit",
    "SkipInitialisation",
    "empty",
    "read_tensors",
    "FILES",
    "read_part",
    "load_text_encoder",
    "OLD_VAE",
    "load_vae",
    "load_unet",
    "load_clip",
    "Parts",
    "load_folder",
    "load_single_file",
    "load",
    "write_files",
    "json_writer",
    "tensor_writer",
    "save_pipeline",
    "save_clip",
]


def fit(model: nn.Module, tensors: dict[str, Tensor], names: dict[str, str], source: str | Path,
        dtype: torch.dtype | None = None) -> nn.Module:  # fmt: skip
    """Put tensors under their names into a model on the meta device. Strict: the first misfit is named.

    names: our name -> theirs, for all of the model's tensors. dtype None keeps what the file has.
    """
    wanted = {names[ours]: (ours, value.shape) for ours, value in model.state_dict().items()}
    missing = [theirs for theirs in wanted if theirs not in tensors]
    extra = [theirs for theirs in tensors if theirs not in wanted]
    for which, left in {"lacks the tensor": missing, "has a tensor that no part of the model takes,": extra}.items():
        if left:
            more = f" and {len(left) - 1} more" if left[1:] else ""
            raise ValueError(f"{source} {which} {left[0]}{more}: the file belongs to another model, or is damaged")
    state = {}
    for theirs, (ours, shape) in wanted.items():
        tensor = tensors[theirs]
        same = tensor.shape == shape or (tensor.ndim == 4 and tensor.shape == (*shape, 1, 1))  # a 1x1 convolution
        if not same or not tensor.is_floating_point():
            kind = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
            raise ValueError(f"{source}: {theirs} is {kind}, but the configuration wants floats in {tuple(shape)}")
        state[ours] = tensor.reshape(shape).to(dtype or tensor.dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


class SkipInitialisation(TorchFunctionMode):
    """Numbers that are overwritten at once need not be drawn; on the meta device that would import half a compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "uniform_", "mul"):
            return args[0] if args else kwargs["tensor"]
        function = torch.empty if function is torch.randn else function
        return function(*args, **(kwargs or {}))


def empty(make: Callable[..., nn.Module], *config: object) -> nn.Module:
    """A model without memory behind its tensors: only their shapes."""
    with torch.device("meta"), SkipInitialisation():
        return make(*config)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or of a pickle (.ckpt, .bin, .pt), of which nothing is ever executed."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors, or is damaged; take the .safetensors file instead") from None
    except Exception as error:  # damaged bytes fail in many ways
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint ({reason})") from None
    for _ in range(9):  # a table may even hold itself
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but named tensors are wanted")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "model.fp16.safetensors",
         "diffusion_pytorch_model.fp16.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin")  # fmt: skip


def read_part(folder: str | Path, part: str) -> tuple[dict, dict[str, Tensor], Path]:
    """The config, the tensors and the file of one part (`unet`, `vae` ...) of a model folder."""
    here = Path(folder) / part
    if not here.is_dir():
        raise ValueError(f"{folder} has no folder {part}: give a whole model in diffusers' layout")
    config = read_json(here / "config.json")
    path = next((here / name for name in FILES if (here / name).is_file()), None)
    if path is None:
        raise ValueError(f"{here} holds no weights: {' or '.join(FILES[:2])} is wanted")
    return config, {k: v for k, v in read_tensors(path).items() if not k.endswith("position_ids")}, path


def load_text_encoder(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> CLIPTextEncoder:
    """`folder`/text_encoder -> our text encoder, on the CPU."""
    config, tensors, path = read_part(folder, "text_encoder")
    tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}  # transformers 5 drops it
    model = empty(CLIPTextEncoder, text_from_json(config))
    return fit(model, tensors, {name: rename(name, CLIP_RULES) for name in model.state_dict()}, path, dtype)


OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_vae(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> VAE:
    """`folder`/vae -> our VAE, on the CPU."""
    config, tensors, path = read_part(folder, "vae")
    old = ((rf"(attentions\.0)\.({'|'.join(OLD_VAE)})\.", lambda match: f"{match[1]}.{OLD_VAE[match[2]]}."),)
    model = empty(VAE, vae_from_json(config))
    names = {name: rename(name, VAE_RULES) for name in model.state_dict()}
    return fit(model, {rename(name, old): value for name, value in tensors.items()}, names, path, dtype)


def load_unet(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> UNet:
    """`folder`/unet -> our U-Net, on the CPU."""
    config, tensors, path = read_part(folder, "unet")
    model = empty(UNet, unet_from_json(config))
    rules = unet_rules(model.config)
    return fit(model, tensors, {name: rename(name, rules) for name in model.state_dict()}, path, dtype)


def load_clip(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[Tokenizer, CLIP]:
    """`folder`/tokenizer and `folder`/clip, both towers as transformers' CLIPModel saves them."""
    config, tensors, path = read_part(folder, "clip")
    model = empty(CLIP, *clip_from_json(config))
    names = {name: clip_name(name) for name in model.state_dict()}
    return Tokenizer.load(Path(folder) / "tokenizer"), fit(model, tensors, names, path, dtype)


class Parts(NamedTuple):
    """What a Stable Diffusion is made of; size is the side, in pixels, of the pictures that it was trained on."""

    tokenizer: Tokenizer
    text_encoder: CLIPTextEncoder
    vae: VAE
    unet: UNet
    schedule: Schedule
    size: int = 512


def load_folder(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> Parts:
    """A model in diffusers' folder layout."""
    folder = Path(folder)
    kind = read_json(folder / "model_index.json").get("_class_name", "")
    if not str(kind).startswith("StableDiffusion") or "XL" in kind or "3" in kind:
        raise ValueError(f"{folder} is a {kind}, but a StableDiffusionPipeline (SD 1) is wanted")
    schedule = schedule_from_json(read_json(folder / "scheduler" / "scheduler_config.json"))
    unet, vae = load_unet(folder, dtype), load_vae(folder, dtype)
    side = read_json(folder / "unet" / "config.json").get("sample_size") or 64
    factor = 2 ** (len(vae.config.channels) - 1)
    size = factor * (side if isinstance(side, int) else max(side))
    return Parts(Tokenizer.load(folder / "tokenizer"), load_text_encoder(folder, dtype), vae, unet, schedule, size)


def load_single_file(path: str | Path, dtype: torch.dtype | None = torch.float32, text: CLIPTextConfig | None = None,
                     vae: VAEConfig | None = None, unet: UNetConfig | None = None) -> Parts:  # fmt: skip
    """An SD 1 checkpoint in one file, as CompVis' code saved it. Without configs, the sizes are those of SD 1.5."""
    tensors = read_tensors(path)
    if (kind := recognise(tensors)) != "SD 1":
        raise ValueError(f"{path} is {kind}, but a whole SD 1 checkpoint is wanted")
    tensors = {name: value for name, value in tensors.items() if not LDM_IGNORED.match(name)}
    parts = {part: {k: tensors.pop(k) for k in [*tensors] if k.startswith(p)} for part, p in LDM_PREFIXES.items()}
    if tensors:
        raise ValueError(f"{path} has a tensor that no part takes, {min(tensors)}: it is not a plain SD 1 checkpoint")
    text, vae, unet = text or CLIPTextConfig(), vae or VAEConfig(), unet or UNetConfig()
    inner = "text_model." if any(".text_model." in name for name in parts["text"]) else ""
    built = {}
    for part, make, config, rules, prefix in (
        ("unet", UNet, unet, ldm_unet_rules(unet), ""),
        ("vae", VAE, vae, ldm_vae_rules(vae), ""),
        ("text", CLIPTextEncoder, text, CLIP_RULES, inner),
    ):
        model = empty(make, config)
        names = {name: LDM_PREFIXES[part] + prefix + rename(name, rules) for name in model.state_dict()}
        built[part] = fit(model, parts[part], names, path, dtype)
    return Parts(Tokenizer.clip(), built["text"], built["vae"], built["unet"], Schedule())


def load(path: str | Path, dtype: torch.dtype | None = torch.float32) -> Parts:
    """A Stable Diffusion from a folder (diffusers' layout) or from one file (.safetensors, .ckpt)."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no model at {path}: give a diffusers folder, or a .safetensors or .ckpt file")
    return load_folder(path, dtype) if path.is_dir() else load_single_file(path, dtype)


def write_files(files: dict[Path, Callable[[Path], object]]) -> None:
    """Write every file beside its target first, then rename them all: a full disk or an interruption spoils nothing."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].touch()
            mode = parts[path].stat().st_mode  # what a new file has here; some writers would make it private
            write(parts[path])
            os.chmod(parts[path], mode)
            with open(parts[path], "rb+") as file:
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def json_writer(content: dict) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tensor_writer(model: nn.Module, name: Callable[[str], str], dtype: torch.dtype | None) -> Callable[[Path], object]:
    tensors = {name(ours): x.detach().to("cpu", dtype).contiguous() for ours, x in model.state_dict().items()}
    return lambda path: save_file(tensors, path, metadata={"format": "pt"})


def save_pipeline(folder: str | Path, tokenizer: Tokenizer, text_encoder: CLIPTextEncoder, vae: VAE, unet: UNet,
                  schedule: Schedule, dtype: torch.dtype | None = torch.float16, size: int = 128) -> None:  # fmt: skip
    """Write a model in diffusers' layout, so that its StableDiffusionPipeline.from_pretrained(folder) reads it.

    size: the side, in pixels, of the pictures that it was trained on.
    """
    folder, factor = Path(folder), 2 ** (len(vae.config.channels) - 1)
    rules = unet_rules(unet.config)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    tokenizer.save(folder / "tokenizer")
    write_files(
        {
            folder / "text_encoder" / "config.json": json_writer(text_to_json(text_encoder.config)),
            folder / "text_encoder" / "model.safetensors": tensor_writer(
                text_encoder, lambda name: "text_model." + rename(name, CLIP_RULES), dtype
            ),
            folder / "vae" / "config.json": json_writer(vae_to_json(vae.config, size)),
            folder / "vae" / "diffusion_pytorch_model.safetensors": tensor_writer(
                vae, lambda name: rename(name, VAE_RULES), dtype
            ),
            folder / "unet" / "config.json": json_writer(unet_to_json(unet.config, size // factor)),
            folder / "unet" / "diffusion_pytorch_model.safetensors": tensor_writer(
                unet, lambda name: rename(name, rules), dtype
            ),
            folder / "scheduler" / "scheduler_config.json": json_writer(schedule_to_json(schedule)),
            folder / "model_index.json": json_writer(index),
        }
    )


def save_clip(folder: str | Path, clip: CLIP, dtype: torch.dtype | None = torch.float16) -> None:
    """Write both towers into `folder`/clip, so that transformers' CLIPModel.from_pretrained reads them."""
    here = Path(folder) / "clip"
    image = clip.image_encoder.config
    config = clip_to_json(clip.text_encoder.config, image, clip.text_projection.out_features)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": image.size},
              "crop_size": {"height": image.size, "width": image.size}}  # fmt: skip
    write_files(
        {
            here / "config.json": json_writer(config),
            here / "preprocessor_config.json": json_writer({"image_processor_type": "CLIPImageProcessor"} | pixels),
            here / "model.safetensors": tensor_writer(clip, clip_name, dtype),
        }
    )
