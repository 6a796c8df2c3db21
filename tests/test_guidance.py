"""Guidance against diffusers: the formula, the rescaling, and whole runs of its pipelines on one small random U-Net."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.guidance import Guided, guide, rescale
from sdlearn.samplers import Denoiser, keep, sample
from sdlearn.schedule import Schedule, add_noise

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


class Counting:
    """A stand-in for the U-Net that remembers what it was asked; its answer depends on all that it is told."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, t, context, size=None):
        self.calls.append((len(latents), t.tolist(), len(context)))
        extra = 0 if size is None else size.view(-1, 1, 1, 1)
        return latents + 0.01 * t.view(-1, 1, 1, 1) + context.mean((1, 2)).view(-1, 1, 1, 1) + extra


def tensors(batch=2):
    g = torch.Generator().manual_seed(0)
    latents, context, negative = (torch.randn(batch, *shape, generator=g) for shape in [(4, 8, 8), (77, 16), (77, 16)])
    return latents, {"context": context}, {"context": negative}


@given(st.floats(0, 30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_guide_is_a_line_through_both(scale, seed):
    uncond, cond = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.allclose(guide(uncond, cond, scale), (1 - scale) * uncond + scale * cond)
    assert torch.equal(guide(uncond, cond, 0), uncond)
    assert torch.allclose(guide(uncond, cond, 1), cond)
    assert torch.allclose(guide(cond, cond, scale), cond)


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_rescale_equals_diffusers(phi):
    guided, cond = 5 * torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    assert torch.allclose(rescale(guided, cond, phi), rescale_noise_cfg(guided, cond, phi), atol=1e-6)


def test_rescale_measures_each_picture_alone():
    guided, cond = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    guided[1] *= 100
    full = rescale(guided, cond, 1.0)
    assert torch.allclose(full.std((1, 2, 3)), cond.std((1, 2, 3)), atol=1e-5)
    assert torch.allclose(full[:1], rescale(guided[:1], cond[:1], 1.0), atol=1e-6)


@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_whatever_the_network_is_told_is_doubled(phi, two_passes):
    latents, cond, uncond = tensors()
    cond["size"], uncond["size"] = torch.tensor([1.0, 2.0]), torch.tensor([0.5])  # one negative serves both
    network, times = Counting(), torch.tensor([981, 981])
    output = Guided(network, cond, uncond, 7.5, phi, two_passes=two_passes)(latents, 981)
    assert network.calls == ([(2, [981] * 2, 2)] * 2 if two_passes else [(4, [981] * 4, 4)])
    u, c = network(latents, times, **uncond), network(latents, times, **cond)
    expected = guide(u, c, 7.5)
    assert torch.allclose(output, rescale(expected, c, phi) if phi else expected, atol=1e-5)


@pytest.mark.parametrize("scale", [0, 0.5, 1, 1.0])
def test_a_scale_up_to_one_costs_half(scale):
    latents, cond, uncond = tensors()
    for other in (uncond, None):
        network = Counting()
        output = Guided(network, cond, other, scale, rescale=0.7)(latents, 981)
        assert network.calls == [(2, [981] * 2, 2)]
        assert torch.equal(output, network(latents, torch.tensor([981, 981]), **cond))


def test_guidance_works_in_its_times_only():
    latents, cond, uncond = tensors()
    for times, t, size in (((300, 700), 300, 4), ((300, 700), 700, 2), ((300, 700), 299.5, 2), ((0, 1000), 1000.0, 4)):
        network = Counting()
        Guided(network, cond, uncond, times=times)(latents, t)
        assert network.calls[0][0] == size, (times, t)


def test_each_picture_may_be_at_its_own_time():
    latents, cond, uncond = tensors()
    network = Counting()
    Guided(network, cond, uncond, 5.0)(latents, torch.tensor([3, 8]))
    assert network.calls == [(4, [3, 8, 3, 8], 4)]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"scale": float("nan")}, "guidance scale is nan"),
        ({"scale": float("inf")}, "guidance scale is inf"),
        ({"scale": -1.0}, "guidance scale is -1"),
        ({"rescale": float("nan")}, "guidance rescale is nan"),
        ({"rescale": 1.1}, "guidance rescale is 1.1"),
        ({"times": (500, 500)}, "guidance times are"),
        ({"uncond": None}, "needs a negative side"),
        ({"uncond": {}}, "context is on one side"),
        ({"uncond": {"context": torch.zeros(2, 77, 16)}}, "negative context is"),
        ({"uncond": {"context": torch.zeros(3, 70, 16)}}, "negative context is"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong, sentence):
    _, cond, uncond = tensors(3)
    with pytest.raises(ValueError, match=sentence):
        Guided(Counting(), **({"cond": cond, "uncond": uncond} | wrong))


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_one_prompt_for_each_picture(scale):
    latents, cond, uncond = tensors(3)
    with pytest.raises(ValueError, match="2 latents but conditioning for 3"):
        Guided(Counting(), cond, uncond, scale)(latents[:2], 1)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()


def pipeline(kind, unet, scheduler):
    nothing = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    made = kind(unet=unet, scheduler=scheduler, requires_safety_checker=False, **nothing)
    made.set_progress_bar_config(disable=True)
    return made


def ours(unet, cond, uncond, scale, phi):
    def network(x, t, context):
        return unet(x, t, encoder_hidden_states=context).sample

    return Denoiser(Guided(network, cond, uncond, scale, phi), Schedule())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(("scale", "phi"), [(1.0, 0.0), (7.5, 0.0), (7.5, 0.7)])
def test_text_to_image_equals_diffusers(unet, sampler, scale, phi):
    latents, cond, uncond = tensors()
    scheduler = (
        DDPMScheduler(**SD15, steps_offset=1)
        if sampler == "ddpm"
        else DDIMScheduler(**SD15, steps_offset=1, set_alpha_to_one=False)
    )
    expected = pipeline(StableDiffusionPipeline, unet, scheduler)(
        prompt_embeds=cond["context"],
        negative_prompt_embeds=uncond["context"],
        latents=latents,
        num_inference_steps=10,
        guidance_scale=scale,
        guidance_rescale=phi,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    levels, generator = Schedule().levels(10, clean=sampler == "ddpm"), torch.Generator().manual_seed(3)
    with torch.inference_mode():
        *_, last = sample(ours(unet, cond, uncond, scale, phi), latents, levels, sampler, generator)
    assert (last.latents - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8, 1.0])
def test_image_to_image_equals_diffusers(unet, strength):
    picture, cond, uncond = tensors()
    expected = pipeline(StableDiffusionImg2ImgPipeline, unet, DDPMScheduler(**SD15, steps_offset=1))(
        prompt_embeds=cond["context"],
        negative_prompt_embeds=uncond["context"],
        image=picture,  # four channels: diffusers takes them for latents
        strength=strength,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    levels, generator = keep(Schedule().levels(10), strength), torch.Generator().manual_seed(3)
    with torch.inference_mode():
        start = add_noise(picture, torch.randn(picture.shape, generator=generator), levels[0])
        *_, last = sample(ours(unet, cond, uncond, 7.5, 0.0), start, levels, "ddpm", generator)
    assert (last.latents - expected).abs().max() <= 1e-4
