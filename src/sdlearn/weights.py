"""Checkpoint files <-> models: every format of Stable Diffusion 1, read strictly. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdlearn.clip import CLIP, CLIPTextConfig, CLIPTextEncoder
from sdlearn.config import (
    clip_from_json,
    clip_to_json,
    read_json,
    schedule_from_json,
    text_from_json,
    unet_from_json,
    vae_from_json,
)
from sdlearn.files import Tensors, json_writer, read_tensors, tensor_writer, write_files
from sdlearn.fitting import empty, fit
from sdlearn.hub import find_on_hub, is_hub_id
from sdlearn.names import (
    CLIP_RULES,
    LDM_PREFIXES,
    OLD_VAE_RULES,
    VAE_RULES,
    averaged_name,
    clip_name,
    ldm_unet_rules,
    ldm_vae_rules,
    recognise,
    rename,
    unet_rules,
    why_ignored,
)
from sdlearn.prediction import EPSILON, Prediction
from sdlearn.saving import named, save_pipeline, save_single_file
from sdlearn.schedule import Schedule
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

__all__ = [
    "FILES",
    "read_part",
    "load_text_encoder",
    "fit_text",
    "load_unet",
    "load_vae",
    "fit_vae",
    "load_clip",
    "Parts",
    "load_folder",
    "load_other_vae",
    "load_single_file",
    "averages",
    "fit_ldm_unet",
    "load",
    "save",
    "save_clip",
]

FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "pytorch_model.fp16.bin",
    "diffusion_pytorch_model.fp16.bin",
)


def read_part(folder: str | Path, part: str) -> tuple[dict, Tensors, Path]:
    """The config, the tensors and the file of one part (`unet`, `vae` ...) of a model folder."""
    here = Path(folder) / part
    if not here.is_dir():
        raise ValueError(
            f"{folder} has no folder {part}: give a whole model in diffusers' layout"
        )
    config = read_json(here / "config.json")
    path = next((here / name for name in FILES if (here / name).is_file()), None)
    if path is None:
        raise ValueError(f"{here} holds no weights: {' or '.join(FILES[:2])} is wanted")
    return config, read_tensors(path).only(lambda name: not why_ignored(name)), path


def load_text_encoder(
    folder: str | Path, dtype: torch.dtype | None = torch.float32, **how: object
) -> CLIPTextEncoder:
    """`folder`/text_encoder -> our text encoder. how: device and layout, as `fit` takes them."""
    config, tensors, path = read_part(folder, "text_encoder")
    return fit_text(text_from_json(config), tensors, path, dtype=dtype, **how)


def fit_text(
    config: CLIPTextConfig, tensors: Tensors, path: Path, **how: object
) -> CLIPTextEncoder:
    """A text encoder under transformers' names, with CompVis' prefix or without, with `text_model.` or without."""
    prefix = ""
    for more in (LDM_PREFIXES["text"], "text_model."):
        prefix += (
            more if any(name.startswith(prefix + more) for name in tensors) else ""
        )
    model = empty(CLIPTextEncoder, config)
    names = {name: prefix + rename(name, CLIP_RULES) for name in model.state_dict()}
    return fit(model, tensors, names, path, **how)


def load_unet(
    folder: str | Path, dtype: torch.dtype | None = torch.float32, **how: object
) -> UNet:
    """`folder`/unet -> our U-Net."""
    config, tensors, path = read_part(folder, "unet")
    model = empty(UNet, unet_from_json(config))
    rules = unet_rules(model.config)
    return fit(
        model,
        tensors,
        {name: rename(name, rules) for name in model.state_dict()},
        path,
        dtype,
        **how,
    )


def load_vae(
    folder: str | Path, dtype: torch.dtype | None = torch.float32, **how: object
) -> VAE:
    """`folder`/vae -> our VAE."""
    config, tensors, path = read_part(folder, "vae")
    return fit_vae(vae_from_json(config), tensors, path, dtype=dtype, **how)


def fit_vae(config: VAEConfig, tensors: Tensors, path: Path, **how: object) -> VAE:
    """A VAE under any of its names: CompVis', with or without a prefix, diffusers', and diffusers' old ones."""
    prefix = next(
        (
            p
            for p in ("first_stage_model.", "vae.")
            if any(name.startswith(p) for name in tensors)
        ),
        "",
    )
    old = any(name.endswith(".query.weight") for name in tensors)
    ldm = any(".mid." in name for name in tensors)
    rules = ldm_vae_rules(config) if ldm else OLD_VAE_RULES if old else VAE_RULES
    model = empty(VAE, config)
    return fit(
        model,
        tensors,
        {name: prefix + rename(name, rules) for name in model.state_dict()},
        path,
        **how,
    )


def load_clip(
    folder: str | Path, dtype: torch.dtype | None = torch.float32
) -> tuple[Tokenizer, CLIP]:
    """`folder`/tokenizer and `folder`/clip, both towers as transformers' CLIPModel saves them."""
    config, tensors, path = read_part(folder, "clip")
    model = empty(CLIP, *clip_from_json(config))
    names = {name: clip_name(name) for name in model.state_dict()}
    return Tokenizer.load(Path(folder) / "tokenizer"), fit(
        model, tensors, names, path, dtype
    )


class Parts(NamedTuple):
    """What a Stable Diffusion is made of; size is (height, width), in pixels, of the
    pictures that it was trained on."""

    networks: dict[str, Any]  # tokenizer, text_encoder, vae, unet
    schedule: Schedule
    prediction: Prediction = EPSILON
    size: tuple[int, int] = (512, 512)
    name: str = ""


def load_folder(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    vae: str | Path | None = None,
    **how: object,
) -> Parts:
    """A model in diffusers' folder layout. vae: another VAE in the place of its own."""
    folder = Path(folder)
    kind = read_json(folder / "model_index.json").get("_class_name", "")
    if not str(kind).startswith("StableDiffusion") or "XL" in kind or "3" in kind:
        raise ValueError(
            f"{folder} is a {kind}, but a StableDiffusionPipeline (SD 1) is wanted"
        )
    schedule, prediction = schedule_from_json(
        read_json(folder / "scheduler" / "scheduler_config.json")
    )
    unet = load_unet(folder, dtype, **how)
    own = (
        None
        if vae is None
        else vae_from_json(read_json(folder / "vae" / "config.json"))
    )
    decoder = (
        load_vae(folder, dtype, **how)
        if vae is None
        else load_other_vae(vae, own, dtype=dtype, **how)
    )
    side = read_json(folder / "unet" / "config.json").get("sample_size") or 64
    factor = 2 ** (len(decoder.config.channels) - 1)
    size = tuple(factor * s for s in ((side, side) if isinstance(side, int) else side))
    text_encoder = load_text_encoder(folder, dtype, **how)
    networks = {
        "tokenizer": Tokenizer.load(folder / "tokenizer"),
        "text_encoder": text_encoder,
        "vae": decoder,
        "unet": unet,
    }
    return Parts(networks, schedule, prediction, size, folder.name)


def load_other_vae(
    path: str | Path, config: VAEConfig | None = None, **how: object
) -> VAE:
    """A VAE that stands alone: a file with CompVis' or diffusers' names, or a folder with its config.json."""
    path = Path(path)
    if path.is_dir():
        part = "vae" if (path / "vae").is_dir() else "."
        read, tensors, file = read_part(path, part)
        return fit_vae(vae_from_json(read), tensors, file, **how)
    tensors = read_tensors(path)
    if (kind := recognise(tensors)) != "a VAE alone":
        raise ValueError(
            f"{path} is {kind}, but a VAE alone is wanted: give its file, or a folder with a config.json"
        )
    return fit_vae(
        config or VAEConfig(),
        tensors.only(lambda name: not why_ignored(name)),
        path,
        **how,
    )


def load_single_file(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    text: CLIPTextConfig | None = None,
    vae: VAEConfig | None = None,
    unet: UNetConfig | None = None,
    ema: bool = False,
    other_vae: str | Path | None = None,
    **how: object,
) -> Parts:
    """An SD 1 checkpoint in one file, as CompVis' code saved it. Without configs, the sizes are those of SD 1.5.

    ema: the averaged copy of the U-Net instead of the plain one. other_vae: a VAE in the place of the file's own.
    """
    tensors, path = read_tensors(path), Path(path)
    if (kind := recognise(tensors)) != "SD 1":
        raise ValueError(f"{path} is {kind}, but a whole SD 1 checkpoint is wanted")
    left = [
        name
        for name in tensors
        if not why_ignored(name) and not name.startswith(tuple(LDM_PREFIXES.values()))
    ]
    if left:
        raise ValueError(
            f"{path} has a tensor that no part takes, {min(left)}: it is not a plain SD 1 checkpoint"
        )
    parts = {
        part: tensors.only(
            lambda name, prefix=prefix: (
                name.startswith(prefix) and not why_ignored(name)
            )
        )
        for part, prefix in LDM_PREFIXES.items()
    }
    how |= {"dtype": dtype}
    net = fit_ldm_unet(
        unet or UNetConfig(),
        parts["unet"] if not ema else averages(tensors, path),
        path,
        ema,
        **how,
    )
    words = fit_text(text or CLIPTextConfig(), parts["text"], path, **how)
    own = vae or VAEConfig()
    decoder = (
        fit_vae(own, parts["vae"], path, **how)
        if other_vae is None
        else load_other_vae(other_vae, own, **how)
    )
    networks = {
        "tokenizer": Tokenizer.clip(),
        "text_encoder": words,
        "vae": decoder,
        "unet": net,
    }
    return Parts(networks, Schedule(), name=path.stem)


def averages(tensors: Tensors, path: Path) -> Tensors:
    """The averaged copy of the U-Net, without its two counters."""
    found = tensors.only(
        lambda name: re.match(r"model_ema\.(?!decay$|num_updates$)", name)
    )
    if not found:
        raise ValueError(
            f"{path} has no averaged copy of its U-Net (EMA): load it without ema"
        )
    return found


def fit_ldm_unet(
    config: UNetConfig, tensors: Tensors, path: Path, ema: bool, **how: object
) -> UNet:
    """The U-Net of a single file, or its averaged copy."""
    model, rules = empty(UNet, config), ldm_unet_rules(config)
    names = {
        name: LDM_PREFIXES["unet"] + rename(name, rules) for name in model.state_dict()
    }
    if ema:
        names = {ours: averaged_name(theirs) for ours, theirs in names.items()}
    return fit(model, tensors, names, path, **how)


def load(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    layout: torch.memory_format = torch.preserve_format,
    ema: bool = False,
    vae: str | Path | None = None,
) -> Parts:
    """A Stable Diffusion from a folder in diffusers' layout, a .safetensors or .ckpt file, or OWNER/NAME on the hub.

    dtype None: as in the file. layout: of convolutions. ema: the averaged copy of the U-Net, if a file has both.
    vae: a file or folder with another VAE in the place of the model's own.
    """
    path = Path(path)
    if not path.exists() and not is_hub_id(str(path)):
        raise ValueError(
            f"there is no model at {path}: give a diffusers folder, a .safetensors or .ckpt file, or OWNER/NAME of one "
            "on the Hugging Face hub"
        )
    path = path if path.exists() else find_on_hub(str(path))
    if path.is_dir() and ema:
        raise ValueError(
            f"{path} is a folder, which holds one copy of the U-Net: load it without ema"
        )
    if path.is_dir():
        return load_folder(path, dtype, vae, device=device, layout=layout)
    return load_single_file(
        path, dtype, ema=ema, other_vae=vae, device=device, layout=layout
    )


def save(
    path: str | Path, parts: Parts, dtype: torch.dtype | None = torch.float16
) -> None:
    """One file with CompVis' names if the path ends in .safetensors or .ckpt, else a folder in diffusers' layout."""
    if Path(path).suffix in (".safetensors", ".ckpt"):
        _, text_encoder, vae, unet = parts.networks.values()
        save_single_file(path, text_encoder, vae, unet, dtype)
    else:
        save_pipeline(path, parts, dtype)


def save_clip(
    folder: str | Path, clip: CLIP, dtype: torch.dtype | None = torch.float16
) -> None:
    """Write both towers into `folder`/clip, so that transformers' CLIPModel.from_pretrained reads them."""
    here = Path(folder) / "clip"
    image = clip.image_encoder.config
    config = clip_to_json(
        clip.text_encoder.config, image, clip.text_projection.out_features
    )
    pixels = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": image.size},
        "crop_size": {"height": image.size, "width": image.size},
    }
    write_files(
        {
            here / "config.json": json_writer(config),
            here / "preprocessor_config.json": json_writer(
                {"image_processor_type": "CLIPImageProcessor"} | pixels
            ),
            here / "model.safetensors": tensor_writer(named(clip, clip_name), dtype),
        }
    )
