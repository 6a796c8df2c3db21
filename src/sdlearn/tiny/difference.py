"""a U-Net that goes on learning -> the little that it differs in from its base.

One layer, which is new or has grown, learns as it is, and so does a change of low rank
of all other weights. The difference is a tenth of the U-Net's size. Chapters 14 and 17.
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sdlearn.checkpoint.files import read_tensors, read_weights
from sdlearn.disk import write_files
from sdlearn.unet import UNet

RANK, FILE = 8, "difference.safetensors"


class LowRank(nn.Module):
    """weight -> weight + up @ down, no change at first: Hu et al. 2022, section 4.1."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.empty(rank, columns))
        nn.init.uniform_(self.down, -(columns**-0.5), columns**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def layers(unet: UNet, new: str) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """All that has a matrix or a kernel for a weight, outside of the new layer."""
    for name, layer in unet.named_modules():
        inside = name == new or name.startswith(f"{new}.")
        if isinstance(layer, nn.Linear | nn.Conv2d) and not inside:
            yield name, layer


def low_rank(unet: UNet, new: str, rank: int = RANK) -> UNet:
    """From now on only the new layer learns, and a change of low rank elsewhere."""
    unet.requires_grad_(False).get_submodule(new).requires_grad_(True)
    for _, layer in list(layers(unet, new)):
        change = LowRank(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", change)
    return unet


def fingerprint(base: Path) -> str:
    """Which weights a difference belongs to: a hash of every number of all three
    networks, and of their names. Whoever trains one of them further needs another."""
    found = hashlib.sha256()
    for part in ("text_encoder", "vae", "unet"):
        tensors = read_weights(base / part)
        for name in sorted(tensors):
            found.update(f"{part}.{name}".encode())
            found.update(tensors[name].float().numpy().tobytes())
    return found.hexdigest()


def save_difference(unet: UNet, new: str, base: Path, folder: Path) -> None:
    """What a trained `low_rank` U-Net has that the base lacks, in 16 bits."""
    learned = unet.get_submodule(new).named_parameters(prefix=new)
    tensors: dict[str, Tensor] = dict(learned)
    for name, layer in layers(unet, new):
        places: Any = layer.parametrizations
        (change,) = places["weight"]
        tensors |= {f"{name}.up": change.up, f"{name}.down": change.down}
    half = {name: x.detach().half().contiguous() for name, x in tensors.items()}
    told = {"base": fingerprint(base)}
    write_files({folder / FILE: partial(save_file, half, metadata=told)})


@torch.no_grad()
def add_difference(unet: UNet, new: str, base: Path, folder: Path, task: str) -> UNet:
    """A U-Net with the base's weights -> the one that was saved, in place.

    task: how to train it again, if it belongs to other weights than those of `base`.
    """
    path = folder / FILE
    tensors = read_tensors(path)
    if tensors.metadata.get("base") != fingerprint(base):
        raise ValueError(
            f"{path} is a difference to other weights than those of {base}: train it "
            f"again (sdlearn train {task})"
        )
    for name, parameter in unet.get_submodule(new).named_parameters(prefix=new):
        parameter.copy_(tensors[name])
    for name, layer in layers(unet, new):
        change = tensors[f"{name}.up"].float() @ tensors[f"{name}.down"].float()
        layer.weight += change.view_as(layer.weight)
    return unet
