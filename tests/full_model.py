"""A Stable Diffusion 1.5 of random weights at full size, as one file with LDM's names."""

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from sdlearn.checkpoint.load import Parts, empty, folder_writers, save
from sdlearn.clip import CLIPTextConfig, CLIPTextEncoder
from sdlearn.disk import write_files
from sdlearn.schedule import Schedule
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

VERSION = 1  # of the weights; another number makes another file


def fill(model: nn.Module, generator: torch.Generator, dtype: torch.dtype = torch.float16) -> nn.Module:
    """Random weights that keep activations near one; biases and norms differ from 0 and 1, so that each one matters."""

    def numbers(name: str, like: Tensor) -> Tensor:
        if like.ndim < 2:
            return float(name.endswith("weight")) + 0.05 * torch.randn(like.shape, generator=generator)
        inputs = 2500 if name.endswith("_embedding.weight") else math.prod(like.shape[1:])
        return torch.empty(like.shape).uniform_(-1.2, 1.2, generator=generator) / math.sqrt(inputs)

    state = {name: numbers(name, like).to(dtype) for name, like in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def full_checkpoint(channels: int = 4) -> tuple[Path, Path]:
    """The file (float16, 2.1 GB, made once and kept in the temporary folder), and a folder with diffusers' configs.

    channels: that the U-Net takes in; 9 is an inpainting model.
    """
    name = f"sd15-random-{VERSION}" + (f"-channels-{channels}" if channels != 4 else "")
    folder = Path(tempfile.gettempdir()) / f"sdlearn-tests-{os.getuid()}" / name
    path, configs = folder / "model.safetensors", folder / "configs"
    if not path.is_file():
        generator = torch.Generator().manual_seed(VERSION)
        text, vae, unet = CLIPTextConfig(), VAEConfig(), UNetConfig(in_channels=channels)
        sizes = {CLIPTextEncoder: text, VAE: vae, UNet: unet}
        parts = [fill(empty(make, config), generator) for make, config in sizes.items()]
        networks = dict(zip(("tokenizer", "text_encoder", "vae", "unet"), (Tokenizer.clip(), *parts), strict=True))
        whole = Parts(networks, Schedule())
        writers = folder_writers(configs, whole)
        write_files({target: write for target, write in writers.items() if target.suffix != ".safetensors"})
        save(path, whole, dtype=None)
    return path, configs


@torch.no_grad()
def reverse_inside(model: nn.Module) -> None:
    """The same function with its inner channels in reverse order: only the order of its sums changes."""

    def flip(layer: nn.Module | None, dims: tuple[int, ...] = (0,), halves: int = 1) -> None:
        for parameter in layer.parameters() if layer is not None else ():
            over = tuple(dim for dim in dims if dim < parameter.ndim)
            parts = parameter.chunk(halves, 0)
            parameter.copy_(torch.cat([part.flip(over) for part in parts]))

    for part in model.modules():
        if hasattr(part, "conv2"):  # a ResBlock; groups of a norm stay together
            for layer in (part.conv1, part.time_emb_proj, part.norm2):
                flip(layer)
            part.conv2.weight.copy_(part.conv2.weight.flip(1))
        elif hasattr(part, "fc2"):  # a layer of CLIP
            flip(part.fc1)
            part.fc2.weight.copy_(part.fc2.weight.flip(1))
        elif type(part).__name__ == "GEGLU":
            flip(part.proj, halves=2)
            part.out.weight.copy_(part.out.weight.flip(1))
