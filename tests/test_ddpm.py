"""The samplers against diffusers, step by step, and image-to-image against its pipeline."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionImg2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.ddpm import SAMPLERS, ddim_step, ddpm_step, draw_noise, kept_timesteps, posterior, sample
from sdlearn.schedule import Schedule, add_noise

NUMBERS = [1, 2, 10, 27, 50, 999, 1000]
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def network(xt, t):
    """Stands for a U-Net: any function of both arguments whose answers are about as large as noise."""
    return torch.tanh(xt + 0.001 * t).roll(1, -1) + 0.1


def largest_difference(n, theirs, sampler, schedule, **arguments):
    """Both libraries walk n steps from the same latents with the same noise; the worst of all steps."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = sample(network, latents, schedule, schedule.timesteps(n), sampler, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    theirs.set_timesteps(n)
    worst, xt, steps = 0.0, latents, 0
    for (index, t, x_prev, x0), their_t in zip(ours, theirs.timesteps, strict=True):
        result = theirs.step(network(xt, int(their_t)), their_t, xt, generator=generator, **arguments)
        xt, steps = result.prev_sample, steps + 1
        assert (index, t) == (steps - 1, their_t.item())
        worst = max(worst, (x_prev - xt).abs().max().item(), (x0 - result.pred_original_sample).abs().max().item())
    assert steps == n
    return worst


def offset(n):
    return 0 if n == 1000 else 1  # with an offset of 1, diffusers' thousand steps begin at t = 1000 and fail


@pytest.mark.parametrize("n", NUMBERS)
def test_ddpm_equals_diffusers(n):
    assert largest_difference(n, DDPMScheduler(**SD15, steps_offset=offset(n)), "ddpm", Schedule()) <= 1e-4


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("n", NUMBERS)
def test_ddpm_equals_diffusers_in_other_spacings(n, spacing):
    theirs = DDPMScheduler(**SD15, timestep_spacing=spacing)
    assert largest_difference(n, theirs, "ddpm", Schedule(spacing=spacing)) <= 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", NUMBERS)
def test_ddim_equals_diffusers(n, eta):
    theirs = DDIMScheduler(**SD15, set_alpha_to_one=False, steps_offset=offset(n))
    assert largest_difference(n, theirs, partial(ddim_step, eta=eta), Schedule(), eta=eta) <= 1e-4


@pytest.mark.parametrize("n", [1, 2, 10, 50, 1000])  # where diffusers' t - 1000 // n is the next entry of the list
def test_ddim_equals_diffusers_in_trailing_spacing(n):
    theirs = DDIMScheduler(**SD15, set_alpha_to_one=False, timestep_spacing="trailing")
    assert largest_difference(n, theirs, "ddim", Schedule(spacing="trailing")) <= 1e-4


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_equal_diffusers(prediction):
    schedule, settings = Schedule(prediction=prediction), {**SD15, "prediction_type": prediction, "steps_offset": 1}
    assert largest_difference(27, DDPMScheduler(**settings), "ddpm", schedule) <= 1e-4
    assert largest_difference(27, DDIMScheduler(**settings, set_alpha_to_one=False), "ddim", schedule) <= 1e-4


@pytest.mark.parametrize("strength", [0.02, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n", [50, 999])
def test_image_to_image_starts_where_diffusers_starts(n, strength):
    theirs = DDPMScheduler(**SD15, steps_offset=1)
    theirs.set_timesteps(n)
    pipeline = SimpleNamespace(scheduler=theirs)
    expected, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, n, strength, "cpu")
    times = kept_timesteps(Schedule(), n, strength)
    assert torch.equal(times, expected)
    x0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    start = add_noise(Schedule(), x0, noise, int(times[0]))
    assert torch.allclose(start, theirs.add_noise(x0, noise, expected[:1]), atol=1e-6)


@given(st.integers(1, 1000), st.floats(0.0, 1.0, exclude_min=True))
@settings(deadline=None, max_examples=200)
def test_strength_keeps_the_last_steps_or_says_how_much_is_needed(n, strength):
    kept = min(int(n * strength), n)
    if kept:
        assert torch.equal(kept_timesteps(Schedule(), n, strength), Schedule().timesteps(n)[n - kept :])
        return
    with pytest.raises(ValueError, match="leaves no step to run") as error:
        kept_timesteps(Schedule(), n, strength)
    advice = float(str(error.value).split("at least ")[1].split(",")[0])
    assert len(kept_timesteps(Schedule(), n, advice)) >= 1


@pytest.mark.parametrize("strength", [float("nan"), 0, 1.5, -0.1, float("inf"), "0.5", None])
def test_bad_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength is"):
        kept_timesteps(Schedule(), 50, strength)


def test_posterior_mixes_to_the_marginal():
    """q(x_prev | xt, x0) averaged over q(xt | x0) has to be q(x_prev | x0): both mean and variance."""
    schedule, t, t_prev = Schedule(), 601, 581
    a, b = schedule.alpha_bar[t].double(), schedule.alpha_bar[t_prev].double()
    from_x0, from_xt, variance = (value.double() for value in posterior(schedule, t, t_prev))
    assert abs(from_x0 + from_xt * a.sqrt() - b.sqrt()) < 1e-5
    assert abs(from_xt**2 * (1 - a) + variance - (1 - b)) < 1e-5


def test_last_step_is_x0_without_noise_and_variance_never_zero():
    schedule = Schedule()
    xt, eps, noise = torch.randn(3, 1, 4, 4)
    last = ddpm_step(schedule, xt, eps, 1, -1, noise)
    assert torch.equal(last, ddpm_step(schedule, xt, eps, 1, -1, noise * 100))
    assert torch.allclose(last, (xt - (1 - schedule.alpha_bar[1]).sqrt() * eps) / schedule.alpha_bar[1].sqrt())
    assert posterior(schedule, 1, -1)[2] == pytest.approx(1e-20)


def test_ddim_ends_at_the_first_alpha_bar():
    schedule = Schedule()
    xt, eps = torch.randn(2, 1, 4, 4)
    last, at_zero = ddim_step(schedule, xt, eps, 21, -1), ddim_step(schedule, xt, eps, 21, 0)
    assert torch.equal(last, at_zero)


def test_x0_is_not_clipped():
    latents = 50 * torch.ones(1, 4, 2, 2)
    (step,) = sample(lambda xt, t: torch.zeros_like(xt), latents, Schedule(), [1])
    assert step.x0.min() > 49 and step.latents.min() > 49


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta_is_refused(eta):
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="eta is"):
        ddim_step(Schedule(), x, x, 21, 1, eta=eta, noise=x)


def test_eta_without_noise_is_refused():
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="pass noise"):
        ddim_step(Schedule(), x, x, 21, 1, eta=1.0)


def test_unknown_samplers_and_rising_times_are_refused_at_once():
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="'euler' is unknown; choose one of ddpm, ddim"):
        sample(network, x, Schedule(), [1], "euler")
    for times in ([], [1, 21], [21, 21]):
        with pytest.raises(ValueError, match="descend"):
            sample(network, x, Schedule(), times)
    with pytest.raises(ValueError, match="from 0 to 999"):
        next(sample(network, x, Schedule(), [1000, 1]))


def run(sampler, seed, n=10):
    generator = torch.Generator().manual_seed(seed)
    latents = draw_noise((2, 4, 8, 8), generator)
    *_, last = sample(network, latents, Schedule(), Schedule().timesteps(n), sampler, generator)
    return last.latents


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_means_one_picture(sampler):
    torch.manual_seed(123)  # the global generator plays no part
    assert torch.equal(run(sampler, 7), run(sampler, 7))
    assert not torch.equal(run(sampler, 7), run(sampler, 8))


def test_each_picture_may_have_its_own_generator():
    def pictures(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = draw_noise((len(seeds), 4, 8, 8), generators)
        *_, last = sample(network, latents, Schedule(), Schedule().timesteps(5), generator=generators)
        return last.latents

    assert torch.equal(pictures([3, 4, 5])[1], pictures([4])[0])
    with pytest.raises(ValueError, match="2 generators for 3 pictures"):
        draw_noise((3, 4, 8, 8), [torch.Generator(), torch.Generator()])


def test_noise_is_drawn_in_float32_and_then_moved():
    def draw(**arguments):
        return draw_noise((2, 4, 8, 8), torch.Generator().manual_seed(0), **arguments)

    assert torch.equal(draw(dtype=torch.float16), draw().half())
    assert draw(device="meta").device.type == "meta"


def test_the_samplers_follow_the_dtype_of_the_latents():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        latents = torch.randn(1, 4, 4, 4, dtype=dtype)
        for sampler in SAMPLERS:
            *_, last = sample(network, latents, Schedule(), Schedule().timesteps(3), sampler)
            assert last.latents.dtype == last.x0.dtype == dtype and last.latents.isfinite().all()
