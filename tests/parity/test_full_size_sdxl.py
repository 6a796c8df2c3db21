"""SDXL's U-Net at its real size: one step of ours and of diffusers', with the same weights, in two gigabytes.

Weights are windows of a few long rows of random numbers, one for each number of inputs, so 2.57 billion parameters
take the room of some hundred million. Windows begin at different places, so layers differ.
"""

import math
import os
from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdlearn.checkpoint.configs import unet_to_json
from sdlearn.checkpoint.dialects import rename
from sdlearn.checkpoint.load import SIZES, empty, rules
from sdlearn.unet import UNet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    yield
    torch.set_num_threads(1)


def windows(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Random weights that keep activations near one."""
    dice, step, rows = torch.Generator().manual_seed(0), 101, {}
    for name, shape in shapes.items():
        inputs = math.prod(shape[1:]) if len(shape) > 1 else name.endswith("weight")
        rows.setdefault(inputs, []).append(name)
    weights = {}
    for inputs, names in rows.items():
        longest = max(math.prod(shapes[name]) for name in names) + step * len(names)
        row = torch.empty(longest).uniform_(-1.2, 1.2, generator=dice)
        row = row / math.sqrt(inputs) if inputs > 1 else 0.05 * row + float(inputs)
        for i, name in enumerate(names):
            weights[name] = row[i * step : i * step + math.prod(shapes[name])].view(shapes[name])
    return weights


@pytest.mark.parametrize("kind", ["SDXL", "SDXL refiner"])
@torch.no_grad()
def test_one_step_at_the_real_size(kind):
    config = SIZES[kind].unet
    ours = empty(UNet, config)
    weights = windows({name: x.shape for name, x in ours.state_dict().items()})
    rows = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in weights.values()}
    assert sum(rows.values()) < 2e9
    ours.load_state_dict(weights, assign=True)
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet_to_json(config, 128))
    theirs.load_state_dict({rename(name, rules(config)): x for name, x in weights.items()}, assign=True)
    dice = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(1, *shape, generator=dice) for shape in ((4, 16, 16), (77, config.context_width)))
    pooled, ids = torch.randn(1, 1280, generator=dice), torch.tensor([[1024.0, 768, 0, 64, 1024, 1000]])
    ids = ids[:, : (config.added - 1280) // 256]
    mine = ours(latents, 500, context, pooled=pooled, ids=ids)
    del ours
    other = theirs(latents, 500, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    assert other.isfinite().all() and other.std() > 0.1
    assert (mine - other).abs().max() <= 1e-4 * max(1, other.abs().max())
