"""SD 1.5 inpainting at full size: one file of nine channels, what sdlearn draws with it and what diffusers draws."""

import gc

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from full_model import full_checkpoint
from PIL import Image, ImageDraw

from sdlearn.checkpoint.files import read_tensors
from sdlearn.checkpoint.inspect import inspect
from sdlearn.pipeline import StableDiffusion

pytestmark = pytest.mark.slow
PROMPT, SIZE = "a fox to the left of a green umbrella", 256
DRAWINGS = {"guided": {"steps": 2, "cfg_scale": 7.5, "strength": 1.0, "seed": 3},
            "half the way": {"steps": 4, "cfg_scale": 1.0, "strength": 0.5, "seed": 4}}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def picture():
    y, x = np.mgrid[:SIZE, :SIZE]
    return Image.fromarray(np.stack([x, y, 255 * ((x // 32 + y // 32) % 2)], -1).astype("uint8"))


def mask():
    found = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(found).ellipse((40, 20, 180, 200), fill=255)
    return found


def question():
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, 9, 32, 32, generator=g), torch.tensor([501]), torch.randn(1, 77, 768, generator=g)


@torch.no_grad()
def ours(path):
    sd = StableDiffusion.load(path, "cpu", torch.float32)
    eps, pictures = sd.unet(*question()), {}
    for name, how in DRAWINGS.items():
        how = how | {"sampler": "ddim", "width": SIZE, "height": SIZE, "paste": False}
        pictures[name] = np.asarray(sd.inpaint(PROMPT, picture(), mask(), **how)[0]).astype(int)
    return eps, pictures


@torch.no_grad()
def theirs(path, configs):
    pipe = StableDiffusionInpaintPipeline.from_single_file(
        str(path), config=str(configs), local_files_only=True, torch_dtype=torch.float32, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    xt, t, context = question()
    eps, pictures = pipe.unet(xt, t, context).sample, {}
    for name, how in DRAWINGS.items():
        told = {"num_inference_steps": how["steps"], "guidance_scale": how["cfg_scale"], "strength": how["strength"]}
        told |= {"generator": torch.Generator().manual_seed(how["seed"]), "width": SIZE, "height": SIZE}
        drawn = pipe(PROMPT, image=picture(), mask_image=mask(), **told).images[0]
        pictures[name] = np.asarray(drawn).astype(int)
    return eps, pictures


def test_the_file_is_a_whole_inpainting_model():
    path, configs = full_checkpoint(9)
    tensors = read_tensors(path)
    unet = [x for name, x in tensors.items() if name.startswith("model.diffusion_model.")]
    assert len(unet) == 686 and sum(x.numel() for x in unet) == 859_535_364
    report = inspect(path)
    assert report.description.startswith("Stable Diffusion 1.x, inpainting") and "sdlearn inpaint" in report.can
    assert "StableDiffusionInpaintPipeline" in (configs / "model_index.json").read_text()


def test_answers_and_pictures_are_theirs():
    path, configs = full_checkpoint(9)
    mine = ours(path)
    gc.collect()
    other = theirs(path, configs)
    far = (mine[0] - other[0]).abs().max().item()
    print(f"U-Net of nine channels: {far:.1e}")
    assert far < 1e-4 and mine[0].std() > 0.1
    for name, drawn in mine[1].items():
        assert drawn.std() > 5, f"{name}: a grey square proves nothing"
        assert abs(drawn - other[1][name]).max() <= 1, name
