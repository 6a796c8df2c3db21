"""Full size, one file: what sdlearn computes with it, and what diffusers and transformers compute with it.

One model is in memory at a time: ours answers all questions first, then theirs, and then the answers are compared.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from full_model import fill, full_checkpoint, reverse_inside
from PIL import Image

from sdlearn.checkpoint.dialects import recognise
from sdlearn.checkpoint.files import read_tensors
from sdlearn.checkpoint.load import empty, load
from sdlearn.pictures import to_tensor
from sdlearn.pipeline import StableDiffusion
from sdlearn.unet import UNet, UNetConfig

pytestmark = pytest.mark.slow
PROMPT, NEGATIVE = "a fox to the left of a green umbrella", "blurry"
TIMES = (981, 501, 1)
DRAWINGS = {  # name -> sampler, steps, guidance (1: without, half the work), strength (None: from noise), seed, pixels
    "txt2img, DDIM": ("ddim", 2, 1.0, None, 3, 512),
    "txt2img, DDPM": ("ddpm", 2, 7.5, None, 4, 256),
    "img2img, DDIM": ("ddim", 2, 1.0, 0.5, 5, 256),
    "img2img, DDPM": ("ddpm", 4, 7.5, 0.5, 6, 256),
}
LIMITS = {"CLIP": 1e-5, "VAE": 4e-5, "U-Net": 2e-5}  # largest differences in float32; answers are about one
Answers = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """These tests work on large tensors, where a second thread pays even beside other tests."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def questions() -> Answers:
    g = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(1, 3, 256, 256, generator=g) * 2 - 1,
        "code": torch.randn(1, 4, 32, 32, generator=g),
        "noisy": torch.randn(len(TIMES), 4, 32, 32, generator=g),
    }


@pytest.fixture(scope="module")
def fewer(questions) -> Answers:
    """A corner of each question: rounding is measured with these, since 16 bits are slow on many processors."""
    return {name: x[..., : x.shape[-1] // 2, : x.shape[-1] // 2] for name, x in questions.items()}


def start_picture(size: int) -> Image.Image:
    """Something with edges and colours to begin from."""
    y, x = np.mgrid[:size, :size]
    return Image.fromarray(np.stack([x // 2, y // 2, 255 * ((x // 64 + y // 64) % 2)], -1).astype("uint8"))


@contextmanager
def freed() -> Iterator[None]:
    """Whatever was built inside is given back before the other library begins."""
    with torch.no_grad():
        yield
    gc.collect()


def ask_ours(sd: StableDiffusion, questions: Answers) -> Answers:
    tokens = sd.tokenizer([PROMPT, "", NEGATIVE])
    dtype = sd.unet.conv_in.weight.dtype
    image, code, noisy = (questions[name].to(dtype) for name in ("image", "code", "noisy"))
    states, context = sd.text_encoder.hidden_states(tokens), sd.text_encoder(tokens)
    moments = sd.vae.unscaled(image)
    answers = {f"CLIP, hidden state {i}": state for i, state in enumerate(states)}
    answers |= {"CLIP, context": context, "VAE, mean": moments.mean, "VAE, logvar": moments.logvar}
    answers["VAE, decoded"] = sd.vae.decode(code)
    answers["U-Net, eps"] = sd.unet(noisy, torch.tensor(TIMES), context)
    return {name: value.detach().float() for name, value in answers.items()}


def ask_theirs(pipe: StableDiffusionPipeline, questions: Answers) -> Answers:
    tokens = torch.tensor(pipe.tokenizer([PROMPT, "", NEGATIVE], padding="max_length").input_ids)
    dtype = pipe.unet.dtype
    image, code, noisy = (questions[name].to(dtype) for name in ("image", "code", "noisy"))
    text = pipe.text_encoder(tokens, output_hidden_states=True)
    moments = pipe.vae.encode(image).latent_dist
    answers = {f"CLIP, hidden state {i}": state for i, state in enumerate(text.hidden_states)}
    answers |= {"CLIP, context": text.last_hidden_state, "VAE, mean": moments.mean, "VAE, logvar": moments.logvar}
    answers["VAE, decoded"] = pipe.vae.decode(code / pipe.vae.config.scaling_factor).sample
    answers["U-Net, eps"] = pipe.unet(noisy, torch.tensor(TIMES), text.last_hidden_state).sample
    return {name: value.detach().float() for name, value in answers.items()}


def draw_ours(sd: StableDiffusion, name: str) -> np.ndarray:
    sampler, steps, scale, strength, seed, size = DRAWINGS[name]
    how = {"negative_prompt": NEGATIVE, "steps": steps, "cfg_scale": scale, "sampler": sampler, "seed": seed}
    how |= {"width": size, "height": size}
    if strength is None:
        return np.asarray(sd.txt2img(PROMPT, **how)[0])
    return np.asarray(sd.img2img(PROMPT, start_picture(size), strength=strength, **how)[0])


def draw_theirs(pipe: StableDiffusionPipeline, name: str) -> np.ndarray:
    sampler, steps, scale, strength, seed, size = DRAWINGS[name]
    pipe.scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampler].from_config(pipe.scheduler.config)
    how = {"negative_prompt": NEGATIVE, "num_inference_steps": steps, "guidance_scale": scale}
    how["generator"] = torch.Generator().manual_seed(seed)
    if strength is None:
        return np.asarray(pipe(PROMPT, width=size, height=size, **how).images[0])
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = (to_tensor(start_picture(size), size, size) + 1) / 2
    return np.asarray(other(PROMPT, image=image, strength=strength, **how).images[0])


@pytest.fixture(scope="module")
def ours(questions, fewer) -> tuple[Answers, dict[str, np.ndarray], tuple[Answers, Answers, Answers]]:
    """Our answers in float32; our pictures; and answers to fewer questions in float32, in bfloat16, in bfloat16 with
    all inner sums in another order."""
    with freed():
        sd = StableDiffusion(*load(full_checkpoint()[0], torch.float32), device="cpu", dtype=torch.float32)
        answers, pictures = ask_ours(sd, questions), {name: draw_ours(sd, name) for name in DRAWINGS}
        exact = ask_ours(sd, fewer)
        for network in (sd.text_encoder, sd.vae, sd.unet):
            network.bfloat16()
        rounded = ask_ours(sd, fewer)
        for network in (sd.text_encoder, sd.vae, sd.unet):
            reverse_inside(network)
        rest = exact, rounded, ask_ours(sd, fewer)
        del sd
    return answers, pictures, rest


@pytest.fixture(scope="module")
def theirs(questions, fewer, ours) -> tuple[Answers, dict[str, np.ndarray], Answers]:
    """Their answers in float32; their pictures; and answers to fewer questions in bfloat16."""
    path, configs = full_checkpoint()
    with freed():
        pipe = StableDiffusionPipeline.from_single_file(
            str(path), config=str(configs), local_files_only=True, torch_dtype=torch.float32, safety_checker=None
        )
        pipe.set_progress_bar_config(disable=True)
        answers, pictures = ask_theirs(pipe, questions), {name: draw_theirs(pipe, name) for name in DRAWINGS}
        pipe.to(torch.bfloat16)
        rounded = ask_theirs(pipe, fewer)
        del pipe
    return answers, pictures, rounded


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def spread(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def test_the_file_is_a_whole_stable_diffusion():
    tensors = read_tensors(full_checkpoint()[0])
    assert recognise(tensors) == "SD 1" and len(tensors) == 686 + 248 + 196
    assert sum(tensor.numel() for tensor in tensors.values()) == 859_520_964 + 83_653_863 + 123_060_480


def test_every_answer_is_equal_in_float32(ours, theirs):
    assert ours[0].keys() == theirs[0].keys() and len(ours[0]) == 13 + 5
    found = {name: far(answer, theirs[0][name]) for name, answer in ours[0].items()}
    print(found)
    assert all(distance <= LIMITS[name.split(",")[0]] for name, distance in found.items()), found
    assert all(0.01 < answer.std() < 50 for answer in ours[0].values()), "activations vanished or burst"


@torch.no_grad()
def test_the_limits_see_small_mistakes(monkeypatch):
    """Random weights hide a lot: a wrong form of GELU moves eps by less than 1e-4."""
    unet = fill(empty(UNet, UNetConfig()), torch.Generator().manual_seed(1), torch.float32)
    generator = torch.Generator().manual_seed(0)
    xt, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 768, generator=generator)
    right, gelu = unet(xt, torch.tensor([500]), context), torch.nn.functional.gelu
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))
        assert far(unet(xt, torch.tensor([500]), context), right) > 2 * LIMITS["U-Net"]
    for norm in unet.modules():
        if isinstance(norm, torch.nn.GroupNorm):
            norm.eps = 1e-6  # the VAE's
    assert far(unet(xt, torch.tensor([500]), context), right) > LIMITS["U-Net"]


def test_pictures_are_equal_in_float32(ours, theirs):
    for name, picture in ours[1].items():
        assert picture.shape == theirs[1][name].shape == (DRAWINGS[name][-1], DRAWINGS[name][-1], 3)
        assert picture.std() > 5, f"{name}: a grey square proves nothing"
        assert np.abs(picture.astype(int) - theirs[1][name].astype(int)).max() <= 1, name
    assert len({picture.tobytes() for picture in ours[1].values()}) == len(DRAWINGS)


def test_bfloat16_differs_as_two_orders_of_summation_do(ours, theirs):
    """The yardstick: our own network, whose inner channels were put in reverse order, which changes nothing else."""
    exact, rounded, reordered = ours[2]
    for name, answer in rounded.items():
        other = theirs[2][name]
        print(f"{name}: to theirs {spread(answer, other):.1e} (max {far(answer, other):.1e}), to another order "
              f"{spread(answer, reordered[name]):.1e} (max {far(answer, reordered[name]):.1e}), to float32 "
              f"{spread(answer, exact[name]):.1e}")  # fmt: skip
        assert spread(answer, other) <= 1.5 * spread(answer, reordered[name]), name
        assert far(answer, other) <= 2 * far(answer, reordered[name]), name
    for name in ("U-Net, eps", "VAE, decoded", "CLIP, context"):  # the yardstick measures rounding, nothing larger
        assert 0 < spread(rounded[name], reordered[name]) < 2 * spread(rounded[name], exact[name]), name
