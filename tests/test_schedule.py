"""The noise schedule against diffusers, and its own laws."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.schedule import Schedule, add_noise, predict_x0, split_prediction, training_target

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_betas_and_alpha_bar_are_those_of_diffusers(kind):
    ours, theirs = Schedule(kind=kind), DDPMScheduler(**SD15 | {"beta_schedule": kind})
    assert ours.betas.dtype == ours.alpha_bar.dtype == torch.float32
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alpha_bar, theirs.alphas_cumprod)


def test_scaled_linear_is_linear_in_the_root():
    roots = Schedule().betas.double().sqrt()
    assert roots[0].item() ** 2 == pytest.approx(0.00085, rel=1e-5)
    assert roots[-1].item() ** 2 == pytest.approx(0.012, rel=1e-5)
    assert roots.diff().std() < 1e-6


def test_fifty_leading_steps_are_those_of_stable_diffusion():
    assert Schedule().timesteps(50).tolist() == list(range(981, 0, -20))
    assert Schedule().timesteps(1).tolist() == [1]
    assert Schedule(spacing="trailing").timesteps(4).tolist() == [999, 749, 499, 249]
    assert Schedule(spacing="linspace").timesteps(4).tolist() == [999, 666, 333, 0]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_equal_diffusers_for_every_n(spacing):
    schedule, theirs = Schedule(spacing=spacing), DDPMScheduler(**SD15, timestep_spacing=spacing, steps_offset=1)
    for n in range(1, 1001):
        ours = schedule.timesteps(n)
        assert ours.dtype == torch.int64 and len(ours) == n
        assert ours.min() >= 0 and ours.max() < 1000 and (ours.diff() < 0).all()
        if n == 1000:  # here an offset of 1 would lead to t = 1000, which no schedule of 1000 steps has
            assert ours.tolist() == list(range(999, -1, -1))
        else:  # for some n, diffusers' trailing times have a superfluous last entry, -1: 62 of them for n = 61
            theirs.set_timesteps(n)
            assert torch.equal(ours, theirs.timesteps[:n]), n


@given(
    st.integers(1, 400), st.integers(0, 5), st.sampled_from(["leading", "trailing", "linspace"]), st.floats(0.0, 1.0)
)
@settings(deadline=None, max_examples=100)
def test_timesteps_of_any_schedule_descend_inside_it(steps, offset, spacing, share):
    n = max(1, round(share * steps))
    times = Schedule(steps=steps, offset=offset, spacing=spacing).timesteps(n)
    assert len(times) == n and times.min() >= 0 and times.max() < steps and (times.diff() < 0).all()


@pytest.mark.parametrize("n", [0, -1, 1001, 2.5, 50.0, "50", None, True, float("nan")])
def test_bad_numbers_of_steps_are_refused(n):
    with pytest.raises(ValueError, match="whole number from 1 to 1000"):
        Schedule().timesteps(n)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"kind": "cosine"}, "kind 'cosine' is unknown; choose one of scaled_linear, linear"),
        ({"prediction": "v"}, "epsilon, v_prediction, sample"),
        ({"spacing": "karras"}, "leading, trailing, linspace"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10.0}, "steps is 10.0"),
        ({"offset": -1}, "offset is -1"),
        ({"beta_start": 0.0}, "0 < beta_start"),
        ({"beta_end": float("nan")}, "0 < beta_start"),
        ({"beta_start": 0.02}, "0 < beta_start"),
    ],
)
def test_impossible_schedules_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Schedule(**wrong)


def test_a_schedule_is_frozen_hashable_and_replaceable():
    schedule = Schedule()
    assert schedule.betas is schedule.betas  # cached
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.steps = 10
    assert {schedule: 1}[Schedule()] == 1
    assert len(dataclasses.replace(schedule, steps=10).betas) == 10  # a replaced schedule does not keep the old cache


def test_add_noise_and_target_equal_diffusers():
    theirs = DDPMScheduler(**SD15)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g)
    t = torch.tensor([0, 1, 500, 999])
    assert torch.allclose(add_noise(Schedule(), x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-6)
    v = training_target(Schedule(prediction="v_prediction"), x0, noise, t)
    assert torch.allclose(v, theirs.get_velocity(x0, noise, t), atol=1e-6)
    assert training_target(Schedule(), x0, noise, t) is noise
    assert training_target(Schedule(prediction="sample"), x0, noise, t) is x0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_time_or_one_for_each_picture_give_the_same_and_keep_the_dtype(dtype):
    x0, noise = torch.randn(2, 3, 4, 4, dtype=dtype), torch.randn(2, 3, 4, 4, dtype=dtype)
    one = add_noise(Schedule(), x0, noise, 300)
    many = add_noise(Schedule(), x0, noise, torch.tensor([300, 300]))
    assert one.dtype == many.dtype == dtype
    assert torch.allclose(one.float(), many.float(), atol=2e-2 if dtype.itemsize == 2 else 1e-6)
    assert torch.equal(add_noise(Schedule(), x0, noise, torch.tensor(300)), one)


@given(st.sampled_from(PREDICTIONS), st.integers(0, 999), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_the_right_answer_gives_back_x0_and_the_noise(prediction, t, seed):
    schedule, g = Schedule(prediction=prediction), torch.Generator().manual_seed(seed)
    x0 = torch.randn(2, 4, 3, 3, generator=g).double()
    noise = torch.randn(2, 4, 3, 3, generator=g).double()
    xt, target = add_noise(schedule, x0, noise, t), training_target(schedule, x0, noise, t)
    found_x0, found_noise = split_prediction(schedule, xt, target, t)
    # float32 coefficients: their rounding (6e-8) is magnified by the noise-to-signal ratio and its inverse
    a = schedule.alpha_bar[t].double()
    worst = 3e-6 * max(((1 - a) / a).sqrt(), (a / (1 - a)).sqrt(), 1) ** 2
    assert (found_x0 - x0).abs().max() < worst
    assert (found_noise - noise).abs().max() < worst
    assert torch.equal(predict_x0(schedule, xt, target, t), found_x0)


def test_wrong_times_and_shapes_are_refused():
    x = torch.zeros(2, 3, 4, 4)
    for t in (-1, 1000, torch.tensor(1000)):
        with pytest.raises(ValueError, match="from 0 to 999"):
            add_noise(Schedule(), x, x, t)
    with pytest.raises(ValueError, match="draw noise in the shape of x0"):
        add_noise(Schedule(), x, x[:1], 5)
