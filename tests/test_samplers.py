"""DDPM and DDIM against diffusers, the pictures from before the seam, and laws that hold for every sampler."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionImg2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from sdlearn.pipeline import StableDiffusion
from sdlearn.prediction import EPSILON, PREDICTIONS
from sdlearn.samplers import (
    SAMPLERS,
    Denoiser,
    Leg,
    Noise,
    Point,
    Sampler,
    check_eta,
    draw_noise,
    euler,
    find_sampler,
    go,
    keep,
    sample,
)
from sdlearn.schedule import CLEAN, SPACINGS, Schedule, add_noise, scaled_linear, zero_terminal_snr

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = [1, 2, 10, 27, 50, 999, 1000]
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULE = Schedule()


def stand_in(prediction=EPSILON, schedule=SCHEDULE):
    """A network that guesses some picture in [-1, 1], and answers accordingly."""

    def network(xt, t):
        level = schedule.at(t)
        x0 = torch.tanh(xt + 0.001 * t).roll(1, -1)
        return prediction.target(x0, (xt - level.alpha * x0) / level.sigma, level)

    return network


def denoiser(prediction=EPSILON, schedule=SCHEDULE):
    return Denoiser(stand_in(prediction, schedule), schedule, prediction)


def largest_difference(n, theirs, name, prediction=EPSILON, schedule=SCHEDULE, **eta):
    """Both libraries walk n steps from the same latents with the same noise; the worst of all steps."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mine, other = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    denoise, levels = denoiser(prediction, schedule), schedule.levels(n, clean=SAMPLERS[name].clean)
    theirs.set_timesteps(n)
    worst, xt = 0.0, latents
    steps = list(sample(denoise, latents, levels, name, mine, **eta))
    assert [step.index for step in steps] == list(range(n))
    for step, their_t in zip(steps, theirs.timesteps[:n], strict=True):
        result = theirs.step(denoise.network(xt, int(their_t)), their_t, xt, generator=other, **eta)
        assert step.t == their_t
        xt = result.prev_sample
        for ours, expected in ((step.latents, xt), (step.x0, result.pred_original_sample)):
            worst = max(worst, (ours - expected).abs().max().item())
    return worst


def offset(n):
    return 0 if n == 1000 else 1  # with an offset of 1, diffusers' thousand steps begin at t = 1000 and fail


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", NUMBERS)
def test_ddpm_equals_diffusers(n, spacing):
    theirs = DDPMScheduler(**SD15, timestep_spacing=spacing, steps_offset=offset(n))
    assert largest_difference(n, theirs, "ddpm", schedule=Schedule(spacing=spacing)) <= 5e-5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", NUMBERS)
def test_ddim_equals_diffusers(n, eta):
    theirs = DDIMScheduler(**SD15, set_alpha_to_one=False, steps_offset=offset(n))
    assert largest_difference(n, theirs, "ddim", eta=eta) <= 5e-5


@pytest.mark.parametrize("n", [1, 2, 10, 50, 1000])  # where diffusers' t - 1000 // n is the next entry of the list
def test_ddim_equals_diffusers_in_trailing_spacing_and_with_a_clean_end(n):
    theirs = DDIMScheduler(**SD15, set_alpha_to_one=False, timestep_spacing="trailing")
    assert largest_difference(n, theirs, "ddim", schedule=Schedule(spacing="trailing")) <= 5e-5
    theirs = DDIMScheduler(**SD15, set_alpha_to_one=True, timestep_spacing="trailing")
    assert largest_difference(n, theirs, "ddim", schedule=Schedule(spacing="trailing", ends_clean=True)) <= 5e-5


@pytest.mark.parametrize("name", PREDICTIONS)
def test_other_predictions_equal_diffusers(name):
    for theirs, sampler in ((DDPMScheduler, "ddpm"), (DDIMScheduler, "ddim")):
        theirs = theirs(**SD15, prediction_type=name, steps_offset=1)
        if sampler == "ddim":
            theirs.register_to_config(set_alpha_to_one=False)
            theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
        assert largest_difference(27, theirs, sampler, PREDICTIONS[name]) <= 5e-5


def test_zero_terminal_snr_equals_diffusers():
    schedule = Schedule(zero_terminal_snr(scaled_linear()), spacing="trailing")
    settings = SD15 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = DDIMScheduler(**settings, prediction_type="v_prediction", set_alpha_to_one=False)
    theirs.alphas_cumprod[-1] = 2.0**-24  # 0 there; diffusers' Euler and DPM++ put this in its place, as we do
    assert largest_difference(25, theirs, "ddim", PREDICTIONS["v_prediction"], schedule) <= 5e-5


# Nothing that was drawn before the seam draws another picture.

PROMPT = "a red apple on a blue background"
BEFORE = load_file(ROOT / "tests" / "data" / "latents_before_the_seam.safetensors")


@pytest.fixture(scope="module")
def tiny():
    sd = StableDiffusion.load(ROOT / "checkpoints" / "tiny", device="cpu")
    sd.schedule = replace(sd.schedule, noise_offset=0.0)  # their first noise had none
    return sd


@pytest.fixture(scope="module")
def photo():
    down, right = np.arange(128)[:, None] * 2, np.arange(128)[None] * 2
    channels = np.broadcast_arrays(down, right, np.full((128, 128), 90))
    return Image.fromarray(np.dstack(channels).astype(np.uint8))


def test_all_twelve_are_kept():
    assert len(BEFORE) == 12


@pytest.mark.parametrize("name", BEFORE)
def test_the_picture_from_before_the_seam_is_drawn_again(tiny, photo, name):
    task, sampler, spacing = name.split("/")
    what = {"image": photo, "strength": 0.6} if task == "img2img" else {}
    *_, drawing = tiny.steps(PROMPT, sampler=sampler, spacing=spacing, steps=10, seed=7, **what)
    (ours,), (theirs,) = drawing.images(), tiny.decode(BEFORE[name])
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    assert np.asarray(ours).std() > 20  # a picture, not a plain square


# Image-to-image.


@pytest.mark.parametrize("strength", [0.02, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n", [50, 999])
def test_image_to_image_starts_where_diffusers_starts(n, strength):
    theirs = DDPMScheduler(**SD15, steps_offset=1)
    theirs.set_timesteps(n)
    pipeline = SimpleNamespace(scheduler=theirs)
    expected, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, n, strength, "cpu")
    *visited, end = keep(SCHEDULE.levels(n), strength)
    assert [level.t for level in visited] == expected.tolist() and end == CLEAN
    x0, noise = torch.randn(2, 2, 4, 8, 8)
    assert torch.allclose(add_noise(x0, noise, visited[0]), theirs.add_noise(x0, noise, expected[:1]), atol=1e-6)


@given(st.integers(1, 1000), st.floats(0.0, 1.0, exclude_min=True))
@settings(deadline=None, max_examples=200)
def test_strength_keeps_the_last_steps_or_says_how_much_is_needed(n, strength):
    levels = [SCHEDULE.at(0)] * (n + 1)  # their number counts
    levels[n - 1] = SCHEDULE.at(1)
    kept = min(int(n * strength), n)
    if kept:
        assert keep(levels, strength) == levels[n - kept :] and len(keep(levels, strength)) == kept + 1
        return
    with pytest.raises(ValueError, match="leaves no step to run") as error:
        keep(levels, strength)
    advice = float(str(error.value).split("at least ")[1].split(",")[0])
    assert len(keep(levels, advice)) >= 2


@pytest.mark.parametrize("strength", [float("nan"), 0, 1.5, -0.1, float("inf"), "0.5", None, True])
def test_bad_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength is"):
        keep(SCHEDULE.levels(50), strength)


# The line.


@given(st.floats(1e-3, 100), st.just(0) | st.floats(1e-6, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_a_leg_ends_with_the_noise_that_its_end_wants(start, share, eta):
    leg = Leg.of(start, share * start, eta)
    assert leg.down**2 + leg.up**2 == pytest.approx(leg.end**2, rel=1e-9)
    assert 0 <= leg.up <= leg.end * (1 + 1e-12) and 0 <= leg.down <= leg.end * (1 + 1e-12)
    if share and eta == 1:  # Ho et al. 2020, eq. 7
        assert leg.down == pytest.approx(leg.end**2 / start, abs=1e-6 * start)


def test_a_point_knows_its_noise_and_where_a_noise_would_lead():
    level = SCHEDULE.at(600)
    x0, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    point = Point(level, add_noise(x0, noise, level), x0)
    assert torch.allclose(point.eps, noise) and torch.allclose(point.aim(noise), x0)
    assert torch.allclose(point.aim(point.towards(x0 + 1)), x0 + 1)


def test_two_looks_see_parts_of_one_random_path():
    like, generator = torch.zeros(200_000), torch.Generator().manual_seed(0)
    noise = Noise(like, generator)
    part, whole = noise(Leg(4.0, 3.0, 3.0, 1.0)), noise(Leg(4.0, 0.0, 0.0, 1.0))
    assert part.std() == pytest.approx(1, abs=0.01) and whole.std() == pytest.approx(1, abs=0.01)
    assert (part * whole).mean() == pytest.approx((1 / 4) ** 0.5, abs=0.01)  # a quarter of the path is shared


def test_go_draws_noise_only_where_it_is_used():
    def no_noise(leg):
        raise AssertionError("noise was drawn")

    level = SCHEDULE.at(600)
    point = Point(level, torch.randn(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    assert torch.equal(go(point, point.x0, Leg.of(level.ratio, 0.0, eta=1.0), CLEAN, no_noise), point.x0)
    with pytest.raises(AssertionError, match="noise was drawn"):
        go(point, point.x0, Leg.of(level.ratio, 1.0, eta=1.0), SCHEDULE.at_ratio(1.0), no_noise)


# Laws of every sampler, those that later chapters add included.


def walk_all(name, seeds, n=5, spacing=None, shared=False, **eta):
    """The latents after every step, (n, B, 4, 8, 8)."""
    dice = torch.Generator().manual_seed(seeds[0]) if shared else [torch.Generator().manual_seed(s) for s in seeds]
    latents = draw_noise((len(seeds), 4, 8, 8), dice)
    levels = SCHEDULE.levels(n, spacing, SAMPLERS[name].clean)
    return torch.stack([step.latents for step in sample(denoiser(), latents, levels, name, dice, **eta)])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_means_one_picture(name):
    torch.manual_seed(123)  # the global generator plays no part
    assert torch.equal(walk_all(name, [7, 7], shared=True), walk_all(name, [7, 7], shared=True))
    assert not torch.equal(walk_all(name, [7]), walk_all(name, [8]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(name):
    assert torch.allclose(walk_all(name, [3, 4, 5])[:, 1], walk_all(name, [4])[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_follow_the_dtype_of_the_latents(name):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        latents = torch.randn(1, 4, 4, 4).to(dtype)
        *_, last = sample(denoiser(), latents, SCHEDULE.levels(5, clean=SAMPLERS[name].clean), name)
        assert last.latents.dtype == last.x0.dtype == dtype and last.latents.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_walks_every_spacing_with_any_number_of_steps(name):
    for spacing, n in product(SPACINGS, (1, 2, 3, 10)):
        latents = walk_all(name, [1], n, spacing)
        assert len(latents) == n and latents.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_eta_is_a_number_or_refused(name):
    if SAMPLERS[name].eta is None:
        assert check_eta(SAMPLERS[name], None) == check_eta(SAMPLERS[name], 0) == 0
        with pytest.raises(ValueError, match="adds no fresh noise"):
            walk_all(name, [1], eta=0.5)
        return
    still, noisy = walk_all(name, [1], eta=0), walk_all(name, [1], eta=np.float32(1))
    assert not torch.allclose(still[0], noisy[0])
    assert torch.equal(walk_all(name, [1]), walk_all(name, [1], eta=SAMPLERS[name].eta))


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_eta_no_noise_is_drawn(name):
    dice = torch.Generator().manual_seed(0)
    before = dice.get_state()
    list(sample(denoiser(), torch.randn(1, 4, 4, 4), SCHEDULE.levels(5), name, dice, eta=0))
    assert torch.equal(dice.get_state(), before)


def test_ddpm_draws_noise_for_each_step_but_the_last():
    dice, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    list(sample(denoiser(), torch.randn(1, 4, 4, 4), SCHEDULE.levels(5), "ddpm", dice))
    for _ in range(4):
        torch.randn(1, 4, 4, 4, generator=other)
    assert torch.equal(dice.get_state(), other.get_state())


def test_ddpm_ends_at_its_guess_and_ddim_at_the_first_level():
    latents = torch.randn(1, 4, 4, 4)
    *_, last = sample(denoiser(), latents, SCHEDULE.levels(5), "ddpm")
    assert torch.equal(last.latents, last.x0)
    *_, before, last = sample(denoiser(), latents, SCHEDULE.levels(5, clean=False), "ddim")
    start, end = SCHEDULE.at(1), SCHEDULE.at(0)
    eps = (before.latents - start.alpha * last.x0) / start.sigma
    assert torch.allclose(last.latents, end.alpha * last.x0 + end.sigma * eps, atol=1e-6)


def test_a_step_of_no_length_leads_nowhere():
    *_, before, last = sample(denoiser(), torch.randn(1, 4, 4, 4), SCHEDULE.levels(5, "linspace", clean=False), "ddim")
    assert last.index == 4 and torch.allclose(last.latents, before.latents, atol=1e-6)


def test_x0_is_not_clipped():
    latents = 50 * torch.ones(1, 4, 2, 2)
    denoise = Denoiser(lambda xt, t: torch.zeros_like(xt), SCHEDULE)
    (step,) = sample(denoise, latents, SCHEDULE.levels(1))
    assert step.x0.min() > 49 and step.latents.min() > 49


def test_a_sampler_of_ones_own_needs_no_name():
    still = Sampler(euler, "Own", "as DDIM, to the end")
    latents = torch.randn(1, 4, 4, 4)
    *_, ours = sample(denoiser(), latents, SCHEDULE.levels(5), still)
    *_, ddim = sample(denoiser(), latents, SCHEDULE.levels(5), "ddim")
    assert torch.equal(ours.latents, ddim.latents)


def test_gradients_are_kept():
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    *_, last = sample(denoiser(), latents, SCHEDULE.levels(3), "ddim")
    (slope,) = torch.autograd.grad(last.latents.sum(), latents)
    assert slope.abs().max() > 0


# Refusals, before the first step.


@pytest.mark.parametrize("name", ["none", "DDPM", "", None, 3, ["ddpm"]])
def test_an_unknown_sampler_gets_the_list(name):
    with pytest.raises(ValueError, match="is unknown; choose one of ddpm, ddim"):
        find_sampler(name)
    with pytest.raises(ValueError, match="is unknown; choose one of ddpm, ddim"):
        sample(denoiser(), torch.zeros(1, 4, 2, 2), SCHEDULE.levels(5), name)


@pytest.mark.parametrize("times", [[], [1], [1, 21], [21, 21, 1], [41, 21, 31]])
def test_levels_that_do_not_descend_are_refused(times):
    with pytest.raises(ValueError, match="levels have to descend, two or more of them"):
        sample(denoiser(), torch.zeros(1, 4, 2, 2), [SCHEDULE.at(t) for t in times])


def test_levels_that_rise_add_fresh_noise_and_forget():
    """A staircase down, up, down: the climb adds variance as the schedule says, and the step after it starts anew."""
    levels = [SCHEDULE.at(t) for t in (801, 601, 801, 601)]
    x = torch.zeros(4000, 1, 1, 1)
    steps = [*sample(Denoiser(lambda xt, t: torch.zeros_like(xt), SCHEDULE), x, levels, "dpmpp_2m", torch.Generator())]
    assert [step.index for step in steps] == [0, 1, 2] and steps[0].latents.abs().max() == 0
    more = levels[2].alpha * math.sqrt(levels[2].ratio ** 2 - levels[1].ratio ** 2)
    assert steps[1].latents.std().item() == pytest.approx(more, rel=0.03)
    assert torch.allclose(steps[2].latents, levels[3].alpha / levels[2].alpha * steps[1].latents)
    with pytest.raises(ValueError, match="have to descend"):
        sample(denoiser(), x, [SCHEDULE.at(t) for t in (601, 801, 601)])


def test_after_changes_the_latents_of_every_step_down():
    seen = []
    levels = SCHEDULE.levels(3, clean=False)

    def after(xt, level):
        seen.append(level)
        return 0 * xt + 7

    steps = [*sample(denoiser(), torch.zeros(1, 4, 2, 2), levels, "ddim", after=after)]
    assert seen == levels[1:] and all((step.latents == 7).all() for step in steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), math.inf, "0.5", True, [0.5]])
def test_bad_eta_is_refused(eta):
    with pytest.raises(ValueError, match="eta is .*; give a number from 0"):
        sample(denoiser(), torch.zeros(1, 4, 2, 2), SCHEDULE.levels(5), "ddim", eta=eta)


def test_noise_is_drawn_in_float32_and_then_moved():
    def draw(**arguments):
        return draw_noise((2, 4, 8, 8), torch.Generator().manual_seed(0), **arguments)

    assert torch.equal(draw(dtype=torch.float16), draw().half())
    assert draw(device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="2 generators for 3 pictures; give one for each, or a single one"):
        draw_noise((3, 4, 8, 8), [torch.Generator(), torch.Generator()])
