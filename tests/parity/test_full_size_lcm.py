"""A latent consistency model at the full size of LCM_Dreamshaper_v7: the same answers and pictures as diffusers.

The weights are those of the random SD 1.5, with an ear for guidance; both libraries share them in memory.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from full_model import full_checkpoint

from sdlearn.checkpoint.configs import unet_to_json
from sdlearn.checkpoint.load import empty, named
from sdlearn.lcm import told_guidance
from sdlearn.pipeline import StableDiffusion
from sdlearn.unet import UNet

pytestmark = pytest.mark.slow
PROMPT, SIZE, SCALES = "a fox to the left of a green umbrella", 256, (1.0, 8.5)


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def question():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 32, 32, generator=g), torch.tensor([999, 259]), torch.randn(2, 77, 768, generator=g)


def with_ear(unet):
    """The same weights, and a matrix that hears the guidance."""
    told = empty(UNet, replace(unet.config, guidance_width=256))
    g = torch.Generator().manual_seed(1)
    ear = {"time_embedding.cond_proj.weight": 0.1 * torch.randn(320, 256, generator=g)}
    told.load_state_dict(unet.state_dict() | ear, assign=True)
    return told.eval()


@pytest.fixture(scope="module")
def both():
    path, configs = full_checkpoint()
    with torch.no_grad():
        sd = StableDiffusion.load(path, "cpu", torch.float32)
        sd.unet = with_ear(sd.unet)
        x, t, context = question()
        mine = {scale: sd.unet(x, t, context, **told_guidance(sd.unet.config, scale)) for scale in SCALES}
        how = {"steps": 2, "sampler": "lcm", "cfg_scale": SCALES[1], "width": SIZE, "height": SIZE}
        mine["picture"] = sd.txt2img(PROMPT, seed=3, **how)[0]
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_to_json(sd.unet.config, 64))
        unet.load_state_dict(named(sd.unet), assign=True)
        del sd
        kept = {"config": str(configs), "safety_checker": None, "local_files_only": True, "unet": unet}
        pipe = StableDiffusionPipeline.from_single_file(str(path), torch_dtype=torch.float32, **kept)
        scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe = LatentConsistencyModelPipeline(**pipe.components | {"scheduler": scheduler},
                                              requires_safety_checker=False)  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        told = {s: pipe.get_guidance_scale_embedding(torch.tensor([s - 1.0] * 2), 256) for s in SCALES}
        theirs = {s: unet(x, t, context, timestep_cond=embedded).sample for s, embedded in told.items()}
        dice = torch.Generator().manual_seed(3)
        drawn = pipe(PROMPT, SIZE, SIZE, 2, guidance_scale=SCALES[1], generator=dice, output_type="np")
        theirs["picture"] = drawn.images[0]
        return mine, theirs, sum(x.numel() for x in unet.parameters())


def test_its_size_is_the_published_one(both):
    assert both[2] == 859_602_884


@pytest.mark.parametrize("scale", SCALES)
def test_the_same_answer(both, scale):
    mine, theirs, _ = both
    assert (mine[scale] - theirs[scale]).abs().max() < 1e-4
    assert (mine[SCALES[0]] - mine[SCALES[1]]).abs().max() > 1e-2  # it hears the scale


def test_the_same_picture(both):
    mine, theirs, _ = both
    picture = np.asarray(mine["picture"]) / 255
    assert np.abs(picture - theirs["picture"]).max() <= 1 / 255
    assert picture.std() > 0.05
