"""Inpainting against diffusers' pipeline: the same small random model, the same noise, whole pictures."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw
from random_model import SMALL_UNET, save_random_model

from sdlearn.pipeline import StableDiffusion
from sdlearn.unet import UNetConfig

PROMPT, SIZE = "a red apple on a blue background", 64
NINE = UNetConfig(**{**SMALL_UNET.__dict__, "in_channels": 9})
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, in diffusers
SCHEDULERS = {  # ours -> theirs, and what they have to be told
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for channels, unet in ((4, SMALL_UNET), (9, NINE)):
        found[channels] = tmp_path_factory.mktemp(f"channels{channels}")
        save_random_model(found[channels], unet=unet, size=SIZE)
    return found


@pytest.fixture(scope="module")
def both(folders):
    """{channels: (ours, theirs)}, loaded from one folder."""
    pairs = {}
    for channels, folder in folders.items():
        pipe = StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pairs[channels] = StableDiffusion.load(folder, "cpu"), pipe
    return pairs


def picture(width=SIZE, height=SIZE):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([3 * x, 3 * y, 255 * ((x // 8 + y // 8) % 2)], -1).astype("uint8"))


def mask(width=SIZE, height=SIZE):
    """A soft-edged ellipse, so that the threshold matters, in a place that is not symmetric."""
    found = Image.new("L", (width, height), 40)
    ImageDraw.Draw(found).ellipse((width // 4, height // 8, width - 5, height * 3 // 4), fill=255, outline=130, width=3)
    return found


def theirs(pipe, sampler, strength=1.0, scale=5.0, seed=3, steps=5, **more):
    name, told = SCHEDULERS[sampler]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **told)
    how = {"num_inference_steps": steps, "guidance_scale": scale, "strength": strength, "negative_prompt": "a cat"}
    if pipe.unet.config.in_channels == 4:  # which never looks at it: then no noise is drawn for it either
        how["masked_image_latents"] = torch.zeros(1, 4, SIZE // 8, SIZE // 8)
    how = {"generator": torch.Generator().manual_seed(seed), "height": SIZE, "width": SIZE} | how | more
    return np.asarray(pipe(PROMPT, image=picture(), mask_image=mask(), **how).images[0]).astype(int)


def ours(sd, sampler, strength=1.0, scale=5.0, seed=3, steps=5):
    how = {"sampler": sampler, "cfg_scale": scale, "strength": strength, "seed": seed, "negative_prompt": "a cat"}
    how |= {"spacing": SCHEDULERS[sampler][1].get("timestep_spacing")}
    drawn = sd.inpaint(PROMPT, picture(), mask(), steps=steps, paste=False, **how)
    return np.asarray(drawn[0]).astype(int)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("channels", [4, 9])
def test_a_picture_is_theirs(both, channels, sampler, strength):
    sd, pipe = both[channels]
    drawn, reference = ours(sd, sampler, strength), theirs(pipe, sampler, strength)
    assert reference.std() > 5
    assert abs(drawn - reference).max() <= 1
