"""Models -> checkpoint files: diffusers' folders and CompVis' single file. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sdlearn.clip import CLIPTextEncoder
from sdlearn.config import schedule_to_json, text_to_json, unet_to_json, vae_to_json
from sdlearn.files import json_writer, tensor_writer, write_files
from sdlearn.names import (
    CLIP_RULES,
    LDM_PREFIXES,
    VAE_RULES,
    ldm_unet_rules,
    ldm_vae_rules,
    rename,
    unet_rules,
)
from sdlearn.prediction import Prediction
from sdlearn.schedule import Schedule
from sdlearn.unet import UNet
from sdlearn.vae import VAE

__all__ = ["named", "config_writers", "save_pipeline", "save_single_file"]


def named(model: nn.Module, name: Callable[[str], str]) -> dict[str, Tensor]:
    """A model's tensors under their names."""
    return {name(ours): tensor for ours, tensor in model.state_dict().items()}


def config_writers(
    folder: str | Path,
    text_encoder: CLIPTextEncoder,
    vae: VAE,
    unet: UNet,
    schedule: Schedule,
    prediction: Prediction,
    size: int,
) -> dict[Path, Callable[[Path], object]]:
    """All JSON files of diffusers' layout, for `write_files`."""
    folder, factor = Path(folder), 2 ** (len(vae.config.channels) - 1)
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
    return {
        folder / "text_encoder" / "config.json": json_writer(
            text_to_json(text_encoder.config)
        ),
        folder / "vae" / "config.json": json_writer(vae_to_json(vae.config, size)),
        folder / "unet" / "config.json": json_writer(
            unet_to_json(unet.config, size // factor)
        ),
        folder / "scheduler" / "scheduler_config.json": json_writer(
            schedule_to_json(schedule, prediction)
        ),
        folder / "model_index.json": json_writer(index),
    }


def save_pipeline(
    folder: str | Path, parts: tuple, dtype: torch.dtype | None = torch.float16
) -> None:
    """Write a model in diffusers' layout."""
    networks, schedule, prediction, size, _ = parts
    tokenizer, text_encoder, vae, unet = networks.values()
    folder, rules = Path(folder), unet_rules(unet.config)
    weights = {
        "text_encoder/model": named(
            text_encoder, lambda name: "text_model." + rename(name, CLIP_RULES)
        ),
        "vae/diffusion_pytorch_model": named(vae, lambda name: rename(name, VAE_RULES)),
        "unet/diffusion_pytorch_model": named(unet, lambda name: rename(name, rules)),
    }
    writers = {
        folder / f"{part}.safetensors": tensor_writer(tensors, dtype)
        for part, tensors in weights.items()
    }
    tokenizer.save(folder / "tokenizer")
    write_files(
        writers
        | config_writers(
            folder, text_encoder, vae, unet, schedule, prediction, max(size)
        )
    )


def save_single_file(
    path: str | Path,
    text_encoder: CLIPTextEncoder,
    vae: VAE,
    unet: UNet,
    dtype: torch.dtype | None = torch.float16,
) -> None:
    """Write an SD 1 checkpoint in one file (.safetensors or .ckpt) under CompVis' names, for all programs that read it.

    The tokenizer and the schedule are not in it: its readers take those of SD 1.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(
            f"{path} does not say its format: give a name that ends in .safetensors or .ckpt"
        )
    rules = {
        "unet": ldm_unet_rules(unet.config),
        "vae": ldm_vae_rules(vae.config),
        "text": CLIP_RULES,
    }
    tensors = {}
    for part, model in {"unet": unet, "vae": vae, "text": text_encoder}.items():
        prefix = LDM_PREFIXES[part] + ("text_model." if part == "text" else "")
        for name, tensor in named(
            model, lambda name: prefix + rename(name, rules[part])
        ).items():  # noqa: B023
            is_conv = (
                ".mid.attn_1." in name and tensor.ndim == 2
            )  # theirs is a 1x1 convolution
            tensors[name] = tensor[:, :, None, None] if is_conv else tensor
    write_files({path: tensor_writer(tensors, dtype)})
