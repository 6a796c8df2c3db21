"""Latent consistency: the sampler, the guidance that is told, published files; against diffusers."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelImg2ImgPipeline, LatentConsistencyModelPipeline, LCMScheduler
from PIL import Image
from random_model import SMALL_UNET, random_parts, save_random_model
from safetensors.torch import load_file, save_file
from torch import nn

from sdlearn.checkpoint.configs import schedule_from_json
from sdlearn.checkpoint.files import read_tensors
from sdlearn.checkpoint.inspect import inspect
from sdlearn.checkpoint.load import Sizes, load, plan, save
from sdlearn.cli import main
from sdlearn.lcm import advice, guidance_embedding, huber, levels_at, segment_end, slide, told_guidance
from sdlearn.lora import load_lora, save_lora, with_lora
from sdlearn.pipeline import StableDiffusion
from sdlearn.prediction import PREDICTIONS
from sdlearn.request import Request
from sdlearn.samplers import SAMPLERS, Denoiser, boundary, lcm_levels, sample
from sdlearn.schedule import CLEAN, Schedule, add_noise
from sdlearn.tiny.consistency import TARGETS
from sdlearn.unet import UNet, UNetConfig

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = Schedule()
TOLD = replace(SMALL_UNET, guidance_width=16)


def network(x, t):
    """A smooth answer that depends on all that a network is told."""
    t = torch.as_tensor(t, dtype=torch.float64).float() / 1000
    return 0.7 * torch.tanh(x + 0.3 * x.roll(1, -1)) + 0.25 * torch.sin(2 * x + 3 * t)


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.5, 0.13])
def test_its_times_are_those_of_diffusers(strength):
    scheduler, most = LCMScheduler(**SD), int(50 * strength)
    for n in range(1, most + 1):
        scheduler.set_timesteps(n, strength=strength)
        *visited, end = lcm_levels(SCHEDULE, n, strength)
        assert [level.t for level in visited] == scheduler.timesteps.tolist() and end == CLEAN
    with pytest.raises(ValueError, match=f"{most + 1} steps of the sampler lcm at strength .*up to {most}"):
        lcm_levels(SCHEDULE, most + 1, strength)


def test_times_that_nobody_can_go():
    for n in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="whole number"):
            lcm_levels(SCHEDULE, n)
    with pytest.raises(ValueError, match=r"at strength 0.01: .*a larger strength"):
        lcm_levels(SCHEDULE, 1, 0.01)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("n", "strength"), [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (50, 1.0), (4, 0.5), (3, 0.1)])
def test_whole_walks_are_those_of_diffusers(n, strength, prediction):
    theirs, shape = LCMScheduler(**SD, prediction_type=prediction), (2, 3, 6, 5)
    theirs.set_timesteps(n, strength=strength)
    dice = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=dice)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t), t, x, generator=dice).prev_sample
    dice = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=dice)
    denoise = Denoiser(network, SCHEDULE, PREDICTIONS[prediction])
    *_, last = sample(denoise, start, lcm_levels(SCHEDULE, n, strength), "lcm", dice)
    assert (last.latents - x).abs().max() <= 5e-6 * max(1, x.abs().max().item())


@pytest.mark.parametrize(("n", "total", "mean"), [(1, 18.7097, 0.0244), (10, 197.7616, 0.2575)])
def test_published_sums(n, total, mean):
    """diffusers' own expected values, tests/schedulers/test_scheduler_lcm.py."""
    x = torch.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4) / (4 * 3 * 8 * 8)
    dice = torch.Generator().manual_seed(0)
    denoise = Denoiser(lambda x, t: x * t / (t + 1), SCHEDULE)
    *_, last = sample(denoise, x.permute(3, 0, 1, 2), lcm_levels(SCHEDULE, n), "lcm", dice)
    assert abs(last.latents.abs().sum().item() - total) < 1e-2
    assert abs(last.latents.abs().mean().item() - mean) < 1e-3


def test_at_the_picture_it_is_the_picture():
    """The boundary condition: at t = 0 nothing of the guess comes in; at the times that are visited, nearly all."""
    assert boundary(0) == (1.0, 0.0)
    stays, comes = boundary(19)
    assert stays < 1e-4 and abs(comes - 1) < 1e-4
    scheduler = LCMScheduler(**SD)
    for t in (0, 1, 5, 19, 999):
        assert np.allclose(boundary(t), scheduler.get_scalings_for_boundary_condition_discrete(t))


def test_eta_says_how_much_of_the_noise_is_fresh():
    """With none it is DDIM to the clean end (but for the boundary), with all the old noise has no say."""
    levels, start = lcm_levels(SCHEDULE, 5), torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    denoise = Denoiser(network, SCHEDULE)

    def end(sampler, eta, seed=1):
        *_, last = sample(denoise, start, levels, sampler, torch.Generator().manual_seed(seed), eta)
        return last.latents

    assert torch.allclose(end("lcm", 0.0), end("euler", 0.0), atol=1e-4)
    assert torch.equal(end("lcm", None), end("lcm", 1.0))
    assert (end("lcm", 1.0) - end("lcm", 1.0, seed=2)).abs().max() > 0.1
    for eta in (0.0, 0.3, 1.0):
        leg = SAMPLERS["lcm"].leg(3.0, 1.5, eta)
        assert math.isclose(leg.down**2 + leg.up**2, leg.end**2) and leg.up == eta * 1.5


def test_a_network_that_sees_the_end_draws_as_much_as_there_is():
    """Numbers of mean .4 and deviation .5: the exact end of every line is known, and from the mean of all ends that a
    plain network sees, the same walk makes numbers that are too much alike."""

    def drawn(sees_the_end):
        def network(xt, t):
            level = SCHEDULE.at(float(t))
            width = math.hypot(0.5 * level.alpha, level.sigma)
            share = 0.5 / width if sees_the_end else level.alpha * 0.25 / width**2
            return 0.4 + share * (xt - 0.4 * level.alpha)

        dice = torch.Generator().manual_seed(0)
        start = torch.randn(40, 4, 8, 8, generator=dice)
        denoise = Denoiser(network, SCHEDULE, PREDICTIONS["sample"])
        *_, last = sample(denoise, start, lcm_levels(SCHEDULE, 4), "lcm", dice)
        return last.latents

    right, plain = drawn(True), drawn(False)
    assert abs(right.mean() - 0.4) < 0.02 and abs(right.std() / 0.5 - 1) < 0.03
    assert plain.std() < 0.4


def test_guidance_embedding_is_that_of_diffusers():
    scales = torch.tensor([1.0, 2.5, 7.5, 14.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, 256)
    assert (guidance_embedding(scales) - theirs).abs().max() < 1e-4
    assert told_guidance(UNetConfig(), 7.5) == {}
    assert told_guidance(UNetConfig(guidance_width=256), 7.5)["guidance"].shape == (1, 256)


def test_published_sizes():
    """LCM_Dreamshaper_v7: SD 1.5 and one matrix more."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(guidance_width=256))
    state = unet.state_dict()
    assert len(state) == 687 and sum(x.numel() for x in state.values()) == 859_602_884
    assert state["time_embedding.cond_proj.weight"].shape == (320, 256)


def test_a_network_that_is_told_needs_it_and_others_take_none():
    x, t, context = torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 77, 32)
    with pytest.raises(ValueError, match="needs guidance as an input"):
        UNet(TOLD)(x, t, context)
    with pytest.raises(ValueError, match="takes no guidance as an input"):
        UNet(SMALL_UNET)(x, t, context, guidance=torch.zeros(1, 16))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as LCM_Dreamshaper_v7's, small and of random weights."""
    folder = tmp_path_factory.mktemp("lcm")
    save_random_model(folder, unet=TOLD)
    return folder


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_published_model_draws_what_diffusers_draws(published, scale):
    prompts = ["a red apple", "a cat above a yellow star"]
    pipeline = LatentConsistencyModelPipeline.from_pretrained(published)
    pipeline.set_progress_bar_config(disable=True)
    dice = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    theirs = pipeline(prompts, 32, 32, 4, guidance_scale=scale, generator=dice, output_type="np").images
    ours = StableDiffusion.load(published).txt2img(prompts, steps=4, sampler="lcm", seed=7, cfg_scale=scale)
    for mine, picture in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(mine) / 255 - picture).max() < 1 / 255


def test_it_hears_its_guidance(published):
    sd = StableDiffusion.load(published)
    one, other = (sd.txt2img("a cat", steps=2, sampler="lcm", seed=1, cfg_scale=x)[0] for x in (2.0, 9.0))
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 2
    calls = []
    sd.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    sd.txt2img("a cat", steps=3, sampler="lcm", seed=1, cfg_scale=7.5)
    assert calls == [1, 1, 1]  # one look a step, and no second half


def test_a_folder_and_a_file_come_back(published, tmp_path):
    parts = load(published)
    assert parts.networks["unet"].config == TOLD
    index = json.loads((published / "model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    report = inspect(published)
    assert ", LCM, " in report.description and report.can
    scheduler = json.loads((published / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler" and scheduler["original_inference_steps"] == 50


@pytest.mark.parametrize(("key", "value"), [("original_inference_steps", 100), ("timestep_scaling", 1.0)])
def test_other_times_are_another_model(published, tmp_path, key, value):
    content = json.loads((published / "scheduler" / "scheduler_config.json").read_text())
    with pytest.raises(ValueError, match=f"LCM scheduler config: {key} is {value}"):
        schedule_from_json(content | {key: value})


def test_image_to_image_is_that_of_diffusers(published):
    """diffusers draws the VAE's noise and the picture's from one generator, as we do."""
    sd = StableDiffusion.load(published)
    image = sd.txt2img("a fox", steps=2, sampler="lcm", seed=3)[0]
    theirs = LatentConsistencyModelImg2ImgPipeline.from_pretrained(published)
    theirs.set_progress_bar_config(disable=True)
    dice = torch.Generator().manual_seed(7)
    found = theirs("a red apple", image, num_inference_steps=4, strength=0.6, guidance_scale=7.5, generator=dice,
                   output_type="np").images[0]  # fmt: skip
    mine = sd.img2img("a red apple", image, steps=4, strength=0.6, sampler="lcm", seed=7)[0]
    assert np.abs(np.asarray(mine) / 255 - found).max() < 1.5 / 255


def test_segments_end_where_they_should():
    t = torch.tensor([1, 249, 250, 499, 500, 749, 750, 999])
    assert segment_end(t, 4).tolist() == [-1, -1, 249, 249, 499, 499, 749, 749]
    assert segment_end(torch.tensor([333, 334, 667, 668, 999]), 3).tolist() == [
        -1,
        333,
        333,
        667,
        667,
    ]  # never a fourth
    assert segment_end(t, 2).tolist() == [-1] * 4 + [499] * 4 and segment_end(t, 1).tolist() == [-1] * 8


def test_sliding_is_ddims_step():
    """To a level, and to the picture itself; and who slides nowhere stays."""
    torch.manual_seed(0)
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([999, 600, 20])
    start = levels_at(SCHEDULE, t)
    xt = add_noise(x0, noise, start)
    end = levels_at(SCHEDULE, torch.tensor([749, -1, 20]))
    wanted = torch.stack([add_noise(x0[0], noise[0], SCHEDULE.at(749.0)), x0[1], xt[2]])
    assert torch.allclose(slide(xt, x0, start, end), wanted, atol=1e-5)


def test_huber_counts_the_size_of_an_error():
    wanted = torch.zeros(3, 2, 2, 2)
    found = wanted + torch.tensor([0.0, 1e-5, 2.0]).view(3, 1, 1, 1)
    zero, small, large = huber(found, wanted).tolist()
    assert zero == 0 and math.isclose(small, 1e-10 / 0.002, rel_tol=0.02) and math.isclose(large, 1.999, rel_tol=1e-3)


def test_all_steps_are_gone_whatever_the_strength():
    sd = StableDiffusion(random_parts()[0].networks, SCHEDULE, size=(32, 32))
    image = sd.txt2img("a fox", steps=1, sampler="lcm", seed=3)[0]
    ways = {x: sd.levels(Request("a", image=image, strength=x, steps=4, sampler="lcm")) for x in (0.3, 0.6, 1.0)}
    assert [len(way) for way in ways.values()] == [5, 5, 5]
    assert [way[0].t for way in ways.values()] == [299, 599, 999]
    own = sd.levels(Request("a", steps=4, sampler="lcm", spacing="trailing"))
    assert [level.t for level in own] == [999, 749, 499, 249, 0]  # a spacing that was asked for


def test_advice():
    """sampler, scale, negative prompt, told its guidance, a LoRA -> what is said."""
    cases = {
        ("lcm", 1.0, False, False, True): [],
        ("ddpm", 7.5, True, False, False): [],
        ("lcm", 7.5, False, True, False): [],
        ("lcm", 1.0, False, False, False): ["with plain weights"],
        ("lcm", 7.5, False, False, False): ["with plain weights"],
        ("lcm", 1.0, True, False, True): ["a scale of 1 is no guidance, so the negative prompt is never used"],
        ("ddpm", 7.5, True, False, True): [],
        ("ddpm", 7.5, True, False, True, True): ["by its name this is an LCM-LoRA, and ddpm does not go its way"],
        ("lcm", 1.0, False, False, True, True): [],
        ("lcm", 7.5, False, False, True): ["a scale of 7.5 guides it once more"],
        ("lcm", 7.5, True, True, False): ["the negative prompt is never used"],
        ("ddim", 7.5, True, True, False): ["ddim does not go its way", "the negative prompt is never used"],
    }
    for case, wanted in cases.items():
        said = advice(*case)
        assert len(said) == len(wanted) and all(x in y for x, y in zip(wanted, said, strict=True)), case


def drawn(folder, capsys, *words):
    """(exit code, what stderr says, the settings in the PNG) of `sdlearn txt2img`."""
    code = main(["txt2img", "a cat", "--model", str(folder), "--seed", "1", "-o", str(folder / "out.png"), *words])
    said = capsys.readouterr().err
    text = Image.open(folder / "out.png").text["parameters"] if code == 0 else ""
    return code, said, text


def test_on_the_command_line(published, tmp_path, capsys):
    save_random_model(tmp_path / "plain")
    code, said, text = drawn(tmp_path / "plain", capsys, "--sampler", "lcm")
    assert code == 0 and "with plain weights: one step draws a blur" in said
    assert "Steps: 4, Sampler: LCM, CFG scale: 1.0" in text
    code, said, text = drawn(published, capsys, "--sampler", "lcm")
    assert code == 0 and "sdlearn: " not in said and "Steps: 4, Sampler: LCM, CFG scale: 7.5" in text
    code, said, text = drawn(published, capsys, "--steps", "2", "--negative-prompt", "a dog")
    assert code == 0 and "draw with the sampler lcm, in 4 steps" in said and "hear" not in text
    assert "so the negative prompt is never used" in said and "Steps: 2, Sampler: DDPM, CFG scale: 7.5" in text
    code, said, _ = drawn(published, capsys, "--sampler", "lcm", "--steps", "51")
    assert code == 2 and "51 steps of the sampler lcm" in said and "up to 50" in said


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory):
    """A LoRA in the form of lcm-lora-sdv1-5: kohya's names, convolutions and feed-forward among its layers."""
    path, parts = tmp_path_factory.mktemp("lora") / "lcm.safetensors", random_parts()[0]
    lora = with_lora({"unet": parts.networks["unet"]}, 3, targets=TARGETS)
    for pair in lora.pairs:
        nn.init.normal_(pair.up, std=0.1)
    save_lora(path, lora)
    return path


def test_an_lcm_lora_is_loaded_with_its_convolutions(small_lora, tmp_path, capsys):
    save_random_model(tmp_path)
    sd = StableDiffusion.load(tmp_path)
    lora = load_lora(small_lora, sd.networks())
    kinds = ("attn1.to_q", "ff.net.0.proj", "proj_in", "resnets.0.conv1", "downsamplers.0.conv", "time_emb_proj")
    assert all(any(kind in name for name in lora.layers) for kind in kinds)
    assert not any("conv_in" in name or "conv_out" in name or ".time_embedding." in name for name in lora.layers)
    report = inspect(small_lora)
    assert report.can.endswith("--sampler lcm")
    code, said, text = drawn(tmp_path, capsys, "--sampler", "lcm", "--lora", str(small_lora))
    assert code == 0 and "sdlearn: " not in said and "CFG scale: 1.0" in text
    code, said, _ = drawn(tmp_path, capsys, "--sampler", "lcm", "--lora", str(small_lora), "--cfg-scale", "7.5")
    assert code == 0 and "a scale of 7.5 guides it once more: take 1 to 2" in said
    code, said, _ = drawn(tmp_path, capsys, "--steps", "2", "--lora", str(small_lora))
    assert code == 0 and "by its name this is an LCM-LoRA, and ddpm does not go its way" in said


def test_an_lcm_lora_for_another_family_is_refused(tmp_path, capsys):
    """lcm-lora-sdxl on a small SD 1, by the width of the context that its layers read."""
    save_random_model(tmp_path / "model")
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 2048), f"{name}.lora_up.weight": torch.zeros(640, 4)}
    save_file(tensors, tmp_path / "lcm-lora-sdxl.safetensors")
    code, said, _ = drawn(tmp_path / "model", capsys, "--sampler", "lcm",
                          "--lora", str(tmp_path / "lcm-lora-sdxl.safetensors"))  # fmt: skip
    assert code == 2 and "is a LoRA for SDXL, but this model is" in said


def test_a_single_file_of_a_latent_consistency_model(published, tmp_path):
    """LDM's names, with time_embed.cond_proj; its sizes are given here, since it is small."""
    parts, path = load(published), tmp_path / "lcm.safetensors"
    save(path, parts, torch.float32)
    names = read_tensors(path).entries
    assert "model.diffusion_model.time_embed.cond_proj.weight" in names
    text, vae = (parts.networks[x].config for x in ("text_encoder", "vae"))
    found = plan(path, sizes=Sizes(text, vae, SMALL_UNET)).networks["unet"].model
    assert found.config == TOLD
    broken = {name: tensor for name, tensor in load_file(path).items() if "cond_proj" not in name}
    save_file(broken | {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no part of the model takes, .*cond_proj"):
        plan(path, sizes=Sizes(text, vae, SMALL_UNET))
