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

from sdlearn.ddpm import kept_timesteps, sample
from sdlearn.guidance import Guided, guide, rescale
from sdlearn.schedule import Schedule, add_noise

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


class Counting:
    """A stand-in for the U-Net that remembers what it was asked; its answer depends on all three arguments."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, t, context):
        self.calls.append((len(latents), t.tolist(), len(context)))
        return latents + 0.01 * t.view(-1, 1, 1, 1) + context.mean((1, 2)).view(-1, 1, 1, 1)


def tensors(batch=2):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(batch, *shape, generator=g) for shape in [(4, 8, 8), (77, 16), (77, 16)])


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


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_guided_runs_both_halves_in_one_batch(phi):
    latents, context, negative = tensors()
    unet = Counting()
    eps = Guided(unet, context, negative, 7.5, phi)(latents, 981)
    assert unet.calls == [(4, [981] * 4, 4)]
    times = torch.tensor([981, 981])
    uncond, cond = unet(latents, times, negative), unet(latents, times, context)
    expected = guide(uncond, cond, 7.5)
    expected = rescale(expected, cond, phi) if phi else expected
    assert torch.allclose(eps, expected, atol=1e-5)


@pytest.mark.parametrize("scale", [0, 0.5, 1, 1.0])
def test_a_scale_up_to_one_costs_half(scale):
    latents, context, negative = tensors()
    for other in (negative, None):
        unet = Counting()
        eps = Guided(unet, context, other, scale, rescale=0.7)(latents, 981)
        assert unet.calls == [(2, [981] * 2, 2)]
        assert torch.equal(eps, unet(latents, torch.tensor([981, 981]), context))


def test_one_negative_serves_the_batch():
    latents, context, negative = tensors(3)
    one = Guided(Counting(), context, negative[:1], 5.0)(latents, 1)
    three = Guided(Counting(), context, negative[:1].repeat(3, 1, 1), 5.0)(latents, 1)
    assert torch.equal(one, three)


def test_each_picture_may_be_at_its_own_time():
    latents, context, negative = tensors()
    unet = Counting()
    Guided(unet, context, negative, 5.0)(latents, torch.tensor([3, 8]))
    assert unet.calls == [(4, [3, 8, 3, 8], 4)]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_bad_scales_are_refused(scale):
    _, context, negative = tensors()
    with pytest.raises(ValueError, match="guidance scale is"):
        Guided(Counting(), context, negative, scale)


@pytest.mark.parametrize("phi", [float("nan"), -0.1, 1.1])
def test_bad_rescales_are_refused(phi):
    _, context, negative = tensors()
    with pytest.raises(ValueError, match="guidance rescale is"):
        Guided(Counting(), context, negative, 7.5, phi)


def test_contexts_that_do_not_fit_are_refused():
    latents, context, negative = tensors(3)
    with pytest.raises(ValueError, match="needs a negative"):
        Guided(Counting(), context, None, 7.5)
    for wrong in (negative[:2], negative[:, :70], negative[..., :8]):
        with pytest.raises(ValueError, match="negative context is"):
            Guided(Counting(), context, wrong, 7.5)
    for scale in (1.0, 7.5):
        with pytest.raises(ValueError, match="2 latents but 3 contexts"):
            Guided(Counting(), context, negative, scale)(latents[:2], 1)


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


def ours(unet, context, negative, scale, phi):
    return Guided(lambda x, t, c: unet(x, t, encoder_hidden_states=c).sample, context, negative, scale, phi)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(("scale", "phi"), [(1.0, 0.0), (7.5, 0.0), (7.5, 0.7)])
def test_text_to_image_equals_diffusers(unet, sampler, scale, phi):
    latents, context, negative = tensors()
    scheduler = (
        DDPMScheduler(**SD15, steps_offset=1)
        if sampler == "ddpm"
        else DDIMScheduler(**SD15, steps_offset=1, set_alpha_to_one=False)
    )
    expected = pipeline(StableDiffusionPipeline, unet, scheduler)(
        prompt_embeds=context,
        negative_prompt_embeds=negative,
        latents=latents,
        num_inference_steps=10,
        guidance_scale=scale,
        guidance_rescale=phi,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    schedule, generator = Schedule(), torch.Generator().manual_seed(3)
    with torch.inference_mode():
        denoise = ours(unet, context, negative, scale, phi)
        *_, last = sample(denoise, latents, schedule, schedule.timesteps(10), sampler, generator)
    assert (last.latents - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8, 1.0])
def test_image_to_image_equals_diffusers(unet, strength):
    picture, context, negative = tensors()
    expected = pipeline(StableDiffusionImg2ImgPipeline, unet, DDPMScheduler(**SD15, steps_offset=1))(
        prompt_embeds=context,
        negative_prompt_embeds=negative,
        image=picture,  # four channels: diffusers takes them for latents
        strength=strength,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    schedule, generator = Schedule(), torch.Generator().manual_seed(3)
    times = kept_timesteps(schedule, 10, strength)
    with torch.inference_mode():
        start = add_noise(schedule, picture, torch.randn(picture.shape, generator=generator), int(times[0]))
        denoise = ours(unet, context, negative, 7.5, 0.0)
        *_, last = sample(denoise, start, schedule, times, "ddpm", generator)
    assert (last.latents - expected).abs().max() <= 1e-4
