"""Full size: what our ControlNet answers and draws, and what diffusers' does, from random weights with no zeros.

One model is in memory at a time: ours answers first, then theirs, and then the answers are compared.
"""

import gc
import os

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from full_model import fill, full_checkpoint
from PIL import Image
from safetensors import safe_open

from sdlearn.checkpoint.load import empty
from sdlearn.controlnet import ControlNet, ControlNetConfig
from sdlearn.pipeline import StableDiffusion

pytestmark = pytest.mark.slow
PROMPT, SIZE = "a fox to the left of a green umbrella", 256
LIMIT = 1e-4  # largest difference of a residual in float32; residuals are about one


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same ControlNet in diffusers' folder and in one file inside a whole model's names, in float16."""
    folder = tmp_path_factory.mktemp("control")
    net = fill(empty(ControlNet, ControlNetConfig()), torch.Generator().manual_seed(1))
    net.save(folder / "net", dtype=None)
    net.save(folder / "net.safetensors", dtype=None)
    return folder


def hint() -> Image.Image:
    """White lines on black."""
    y, x = np.mgrid[:SIZE, :SIZE]
    lines = ((x - 128) ** 2 + (y - 128) ** 2 > 90**2) ^ ((x + y) % 64 < 4)
    return Image.fromarray(np.uint8(255 * lines)).convert("RGB")


def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    xt, context = torch.randn(2, 4, 32, 32, generator=g), torch.randn(2, 77, 768, generator=g)
    picture = torch.from_numpy(np.array(hint())).permute(2, 0, 1)[None].float() / 255
    return xt, torch.tensor([981, 21]), context, picture.expand(2, -1, -1, -1)


def latents() -> torch.Tensor:
    return torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(3))


def test_both_files_have_the_published_size(files):
    for path in (files / "net" / "diffusion_pytorch_model.safetensors", files / "net.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            numbers = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in names)
        assert (len(names), numbers) == (340, 361_279_120)


def test_residuals_and_picture(files):
    path, configs = full_checkpoint()
    net = ControlNet.load(files / "net.safetensors")
    with torch.no_grad():
        mine = net(*inputs())
    sd = StableDiffusion.load(path, device="cpu")
    how = {"steps": 2, "sampler": "ddim", "cfg_scale": 1.0, "width": SIZE, "height": SIZE, "latents": latents()}
    ours = np.array(sd.txt2img(PROMPT, control=[(net, hint(), 0.8)], **how)[0]).astype(int)
    free = np.array(sd.txt2img(PROMPT, **how)[0]).astype(int)
    del net, sd
    gc.collect()

    copy = ControlNetModel.from_pretrained(files / "net", torch_dtype=torch.float32)
    with torch.no_grad():
        down, middle = copy(*inputs(), return_dict=False)
    assert len(mine) == len(down) + 1 == 13
    assert max((a - b).abs().max().item() for a, b in zip(mine, [*down, middle], strict=True)) <= LIMIT
    assert min(x.std().item() for x in mine) > 0.1  # each of them says something

    pipe = StableDiffusionControlNetPipeline.from_single_file(
        str(path), config=str(configs), local_files_only=True, controlnet=copy, safety_checker=None,
        torch_dtype=torch.float32,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    how = {"latents": latents(), "guidance_scale": 1.0, "controlnet_conditioning_scale": 0.8}
    theirs = pipe(PROMPT, hint(), SIZE, SIZE, 2, **how).images[0]
    assert abs(ours - np.array(theirs).astype(int)).max() <= 1
    assert abs(ours - free).max() > 5 and ours.std() > 5  # it was heard, and a picture came out
