"""weights -> whole numbers of 8 bits, with a scale for each channel. Chapter 19.
Exported from book/19_speed.ipynb by `make export`; edit it there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.unet import Pointwise


def to_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, ...) -> whole numbers from -127 to 127, and a scale for each of O channels.

    numbers * scale is the weight again, in 32 bits wrong by half a scale at most.
    """
    each = -1, *(1,) * (weight.ndim - 1)
    largest = weight.float().flatten(1).abs().amax(dim=1).view(each)
    scale = (largest / 127).to(weight.dtype)  # rounded first, so that both fit
    numbers = (weight.float() / scale.float().clamp(min=1e-30)).round()
    return numbers.clamp(-127, 127).to(torch.int8), scale


class EightBits(nn.Module):
    """A linear layer or a convolution that keeps its weights in 8 bits."""

    numbers: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        weight = layer.weight.detach()
        if isinstance(layer, Pointwise):  # a 1x1 convolution by another name
            weight = weight[..., None, None]
        numbers, scale = to_eight_bits(weight)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        self.how: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            self.how = {"stride": layer.stride, "padding": layer.padding}
        elif isinstance(layer, Pointwise):
            self.how = {"stride": 1}

    @property
    def weight(self) -> Tensor:
        """As real numbers, of the kind that the layer computes in."""
        return self.numbers * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.how:
            return F.conv2d(x, self.weight, self.bias, **self.how)
        return F.linear(x, self.weight, self.bias)


def in_eight_bits(network: nn.Module) -> nn.Module:
    """Every linear layer and every convolution in 8 bits, in place.

    From then on the weights cannot be changed: merge a LoRA before.
    """
    for module in [*network.modules()]:
        for name, part in module.named_children():
            if isinstance(part, nn.Linear | nn.Conv2d):
                setattr(module, name, EightBits(part))
    return network
