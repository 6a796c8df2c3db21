"""On small random models: our ControlNet and diffusers' answer and draw the same, in each way that they can be used."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from full_model import fill
from PIL import Image
from random_model import SMALL_UNET, save_random_model

from sdlearn.controlnet import ControlNet
from sdlearn.pipeline import StableDiffusion

pytestmark = pytest.mark.slow

PROMPT, NEGATIVE = "a fox to the left of a green umbrella", "a cat"
SIZE, STEPS = 64, 4


def page(seed: int) -> Image.Image:
    """White lines on black, as a hint."""
    rng = np.random.default_rng(seed)
    lines = np.zeros((SIZE, SIZE, 3), np.uint8)
    lines[rng.integers(0, SIZE, 3)] = 255
    lines[:, rng.integers(0, SIZE, 3)] = 255
    return Image.fromarray(lines)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours, diffusers', and two ControlNets of both."""
    folder = tmp_path_factory.mktemp("models")
    save_random_model(folder / "sd", size=SIZE)
    ours = StableDiffusion.load(folder / "sd", device="cpu")
    nets = []
    for i in range(2):
        net = ControlNet.of(ours.unet, (4, 8, 8, 8))
        fill(net, torch.Generator().manual_seed(i), torch.float32)
        net.save(folder / f"net{i}", torch.float32)
        nets.append(net)
    theirs = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None, dtype=torch.float32)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    parts = dict(theirs.components)
    copies = [ControlNetModel.from_pretrained(folder / f"net{i}") for i in range(2)]
    return ours, nets, parts, copies


def differs(a: Image.Image, b: Image.Image) -> int:
    return int(abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def test_residuals(models):
    ours, nets, _, copies = models
    g = torch.Generator().manual_seed(0)
    xt, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 32, generator=g)
    hint, t = torch.rand(2, 3, SIZE, SIZE, generator=g), torch.tensor([981, 1])
    with torch.no_grad():
        mine = nets[0](xt, t, context, hint)
        down, middle = copies[0](xt, t, context, hint, return_dict=False)
    assert len(mine) == len(down) + 1
    assert max((a - b).abs().max() for a, b in zip(mine, [*down, middle], strict=True)) <= 1e-5
    assert min(x.abs().max() for x in mine) > 0.1


WAYS = {  # a name -> our scale, start, end, guess; what diffusers calls it
    "plain": (0.7, 0.0, 1.0, False),
    "first half": (1.0, 0.0, 0.5, False),
    "last half": (1.0, 0.5, 1.0, False),
    "guess": (1.0, 0.0, 1.0, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_txt2img(models, way):
    (ours, nets, parts, copies), (scale, start, end, guess) = models, WAYS[way]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = {"negative_prompt": NEGATIVE, "steps": STEPS, "sampler": "ddim", "latents": latents}
    control = nets[0].control(page(0), scale, start, end, guess)
    mine = ours.txt2img(PROMPT, **settings, extras=[control])[0]
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=copies[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPT, page(0), SIZE, SIZE, STEPS, negative_prompt=NEGATIVE, latents=latents, guidance_scale=7.5,
                  controlnet_conditioning_scale=scale, control_guidance_start=start, control_guidance_end=end,
                  guess_mode=guess).images[0]  # fmt: skip
    assert differs(mine, theirs) <= 1
    assert differs(mine, ours.txt2img(PROMPT, **settings)[0]) > 5  # the hint was heard


def test_several_at_once(models):
    ours, nets, parts, copies = models
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    control = [(nets[0], page(0), 0.5), (nets[1], page(1), 0.8)]
    mine = ours.txt2img(PROMPT, steps=STEPS, sampler="ddim", latents=latents, control=control)[0]
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=copies, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPT, [page(0), page(1)], SIZE, SIZE, STEPS, latents=latents, guidance_scale=7.5,
                  controlnet_conditioning_scale=[0.5, 0.8]).images[0]  # fmt: skip
    assert differs(mine, theirs) <= 1


@pytest.mark.parametrize("end", [1.0, 0.5])
def test_img2img(models, end):
    ours, nets, parts, copies = models
    start = Image.fromarray(np.random.default_rng(5).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    settings = {"steps": 8, "sampler": "ddim", "seed": 3, "strength": 0.5}
    mine = ours.img2img(PROMPT, start, **settings, control=[(nets[0], page(0), 1.0, 0.0, end)])[0]
    pipe = StableDiffusionControlNetImg2ImgPipeline(**parts, controlnet=copies[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPT, start, page(0), SIZE, SIZE, 0.5, 8, guidance_scale=7.5, control_guidance_end=end,
                  generator=torch.Generator().manual_seed(3), controlnet_conditioning_scale=1.0).images[0]  # fmt: skip
    assert differs(mine, theirs) <= 1
    assert differs(mine, ours.img2img(PROMPT, start, **settings)[0]) > 5


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """A model that sees a mask; its ControlNets look at four channels as all do."""
    folder = tmp_path_factory.mktemp("nine")
    save_random_model(folder, unet=replace(SMALL_UNET, in_channels=9), size=SIZE)
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    return StableDiffusion.load(folder, device="cpu"), dict(theirs.components)


@pytest.mark.parametrize("way", ["first half", "guess"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(models, nine, channels, strength, way):
    (ours, nets, parts, copies), (scale, begin, end, guess) = models, WAYS[way]
    ours, parts = (ours, parts) if channels == 4 else nine
    start = Image.fromarray(np.random.default_rng(5).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (24, 0, 64, 40))  # in a place that is not symmetric
    how = {"steps": 5, "sampler": "ddim", "seed": 3, "strength": strength, "cfg_scale": 5.0, "paste": False}
    mine = ours.inpaint(PROMPT, start, mask, **how, extras=[nets[0].control(page(0), scale, begin, end, guess)])[0]
    pipe = StableDiffusionControlNetInpaintPipeline(**parts, controlnet=copies[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPT, start, mask, page(0), SIZE, SIZE, strength=strength, num_inference_steps=5,
                  guidance_scale=5.0, generator=torch.Generator().manual_seed(3), guess_mode=guess,
                  controlnet_conditioning_scale=scale, control_guidance_start=begin,
                  control_guidance_end=end).images[0]  # fmt: skip
    assert differs(mine, theirs) <= 1
    assert differs(mine, ours.inpaint(PROMPT, start, mask, **how)[0]) > 5  # the hint was heard
