"""A LoRA of each dialect at the full size of SD 1.5: the same answers and the same picture as diffusers with PEFT.

One model is in memory at a time: ours answers all questions first, then theirs.
"""

import gc
import os

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from full_model import full_checkpoint
from lora_files import ALL, DIALECTS, metadata, random_lora
from safetensors.torch import save_file

from sdlearn.lora import load_lora, merge, save_lora, unmerge
from sdlearn.pipeline import StableDiffusion

pytestmark = pytest.mark.slow
PROMPT, SCALE, TIMES = "a fox to the left of a green umbrella", 0.7, (981, 401)
WRITTEN = ("ours, kohya", "ours, diffusers")


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    yield
    torch.set_num_threads(1)


def questions():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 32, 32, generator=g), torch.randn(1, 4, 32, 32, generator=g)


def write(name, networks, path):
    """A file of this dialect."""
    targets, says_alpha, tensors = DIALECTS.get(name, (ALL, True, None))
    lora = random_lora(networks, 4, 3.0 if says_alpha else None, targets)
    if tensors is None:
        save_lora(path, lora, name.removeprefix("ours, "))
    else:
        header = metadata(lora) if "header" in name else {"format": "pt"}
        save_file({k: v.half().contiguous() for k, v in tensors(lora).items()}, path, header)


@torch.no_grad()
def ask_ours(path, folder):
    sd = StableDiffusion.load(path, "cpu", torch.float32)
    networks, (noisy, start) = sd.networks(), questions()
    tokens, t, answers = sd.tokenizer([PROMPT, ""]), torch.tensor(TIMES), {}
    answers["without"] = sd.unet(noisy, t, sd.text_encoder(tokens))
    for name in (*DIALECTS, *WRITTEN):
        file = folder / f"{name}.safetensors"
        write(name, networks, file)
        merge(networks, (load_lora(file, networks), SCALE))
        answers[name] = sd.unet(noisy, t, sd.text_encoder(tokens))
        if name == "kohya":
            answers["picture"] = sd.txt2img(PROMPT, steps=2, sampler="ddim", cfg_scale=1.0, latents=start)[0]
    unmerge(networks)
    assert torch.equal(sd.unet(noisy, t, sd.text_encoder(tokens)), answers["without"])
    return answers


@torch.no_grad()
def ask_theirs(path, configs, folder):
    how = {"config": str(configs), "safety_checker": None, "torch_dtype": torch.float32, "local_files_only": True}
    pipe = StableDiffusionPipeline.from_single_file(str(path), **how)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    (noisy, start), t, answers = questions(), torch.tensor(TIMES), {}
    ids = pipe.tokenizer([PROMPT, ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    for name in (*DIALECTS, *WRITTEN):
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name="x")
        pipe.set_adapters(["x"], [SCALE])
        answers[name] = pipe.unet(noisy, t, pipe.text_encoder(ids).last_hidden_state).sample
        if name == "kohya":
            picture = pipe(PROMPT, num_inference_steps=2, guidance_scale=1.0, latents=start, height=256, width=256)
            answers["picture"] = picture.images[0]
        pipe.unload_lora_weights()
    return answers


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path, configs = full_checkpoint()
    folder = tmp_path_factory.mktemp("loras")
    mine = ask_ours(path, folder)
    gc.collect()
    return mine, ask_theirs(path, configs, folder)


@pytest.mark.parametrize("name", [*DIALECTS, *WRITTEN])
def test_the_same_noise_is_predicted(both, name):
    mine, theirs = both
    assert (mine[name] - theirs[name]).abs().max() <= 1e-4
    assert (mine[name] - mine["without"]).abs().max() > 0.01


def test_the_same_picture(both):
    mine, theirs = (np.asarray(x["picture"]).astype(int) for x in both)
    assert abs(mine - theirs).max() <= 1
