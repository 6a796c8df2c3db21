"""Schedules and levels against diffusers, and their own laws."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.schedule import (
    CLEAN,
    SPACINGS,
    Level,
    Schedule,
    Spacing,
    add_noise,
    cosine,
    linear,
    scaled_linear,
    zero_terminal_snr,
)

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = {
    "scaled_linear": (scaled_linear(), SD15),
    "linear": (linear(), {"beta_schedule": "linear"}),
    "cosine": (cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "zero terminal SNR": (zero_terminal_snr(scaled_linear()), SD15 | {"rescale_betas_zero_snr": True}),
}
OURS = ("leading", "trailing", "linspace")  # the spacings that diffusers has, too


@pytest.mark.parametrize("name", BETAS)
def test_betas_are_those_of_diffusers(name):
    ours, theirs = BETAS[name][0], DDPMScheduler(**BETAS[name][1])
    schedule = Schedule(ours)
    assert ours.dtype == schedule.alpha_bar.dtype == torch.float32
    assert torch.allclose(ours, theirs.betas, rtol=0, atol=1e-6)
    assert torch.allclose(schedule.alpha_bar, theirs.alphas_cumprod, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BETAS)
def test_every_level_is_the_signal_and_noise_of_diffusers(name):
    schedule, theirs = Schedule(BETAS[name][0]), DDPMScheduler(**BETAS[name][1])
    kept = theirs.alphas_cumprod.tolist()
    for t in range(1000):
        level = schedule.at(t)
        assert level.t == t and level.alpha > 0
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12)
        assert level.alpha == pytest.approx(max(kept[t], 2.0**-24) ** 0.5, rel=1e-5, abs=2e-5)


def test_pure_noise_has_the_signal_that_diffusers_gives_it():
    theirs = EulerDiscreteScheduler(**SD15, rescale_betas_zero_snr=True)
    level = Schedule(zero_terminal_snr(scaled_linear())).at(999)
    assert level.alpha == pytest.approx(theirs.alphas_cumprod[-1].item() ** 0.5) == pytest.approx(2.0**-12)
    assert level.ratio == pytest.approx(theirs.sigmas[0].item())


@given(st.floats(0, 999), st.sampled_from(list(BETAS)))
@settings(deadline=None, max_examples=200)
def test_between_two_times_log_snr_is_straight_and_at_ratio_leads_back(t, name):
    schedule = Schedule(BETAS[name][0])
    level, below, above = schedule.at(t), schedule.at(math.floor(t)), schedule.at(math.ceil(t))
    share = t - math.floor(t)
    mixed = (1 - share) * math.log(below.ratio) + share * math.log(above.ratio)
    assert math.log(level.ratio) == pytest.approx(mixed, abs=1e-9)
    back = schedule.at_ratio(level.ratio)
    assert back.t == pytest.approx(t, abs=1e-6)
    assert (back.alpha, back.sigma) == pytest.approx((level.alpha, level.sigma), abs=1e-12)


def test_at_ratio_stays_inside_the_schedule():
    schedule = Schedule()
    assert schedule.at_ratio(0) == CLEAN
    assert schedule.at_ratio(0.001).t == 0 and schedule.at_ratio(0.001).ratio == pytest.approx(0.001)
    assert schedule.at_ratio(100).t == 999 and schedule.at_ratio(100).ratio == pytest.approx(100)


def test_a_batch_of_times_is_those_times_one_by_one():
    times = torch.tensor([0, 1, 500, 999])
    batch = Schedule().at(times)
    assert batch.t is times and batch.alpha.shape == batch.sigma.shape == batch.ratio.shape == (4, 1, 1, 1)
    for i, t in enumerate(times.tolist()):
        one = Schedule().at(t)
        assert (batch.alpha[i].item(), batch.sigma[i].item()) == pytest.approx((one.alpha, one.sigma), abs=1e-7)
    assert Schedule().at(torch.tensor(500)) == Schedule().at(np.int64(500)) == Schedule().at(500)


@pytest.mark.parametrize("spacing", OURS)
def test_levels_are_at_the_times_of_diffusers(spacing):
    schedule = Schedule(spacing=spacing)
    theirs = DDPMScheduler(**SD15, timestep_spacing=spacing, steps_offset=1)
    for n in [*range(1, 101), *range(112, 1000, 16), 999, 1000]:
        *visited, end = schedule.levels(n)
        times = [level.t for level in visited]
        assert end == CLEAN and len(times) == n and times[0] <= 999 and times[-1] >= 0
        assert all(a > b for a, b in zip(times, times[1:], strict=False))
        if n == 1000:  # here an offset of 1 would lead to t = 1000, which no schedule of 1000 steps has
            assert times == list(range(999, -1, -1))
        else:  # for some n, diffusers' trailing times have a superfluous last entry, -1: 62 of them for n = 61
            theirs.set_timesteps(n)
            assert times == theirs.timesteps[:n].tolist(), n


@given(st.integers(2, 400), st.integers(0, 5), st.sampled_from(OURS), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_levels_of_any_schedule_descend_inside_it(steps, offset, spacing, share):
    n = max(1, round(share * steps))
    *visited, end = Schedule(scaled_linear(steps), spacing, offset).levels(n)
    assert len(visited) == n and end == CLEAN and all(0 <= level.t < steps for level in visited)
    assert all(a.ratio > b.ratio for a, b in zip(visited, [*visited[1:], end], strict=True))


def test_the_end_of_the_road_is_data():
    schedule = Schedule()
    assert schedule.levels(50)[-1] == CLEAN
    assert schedule.levels(50, clean=False)[-2:] == [schedule.at(1), schedule.at(0)]
    assert Schedule(ends_clean=True).levels(50, clean=False)[-1] == CLEAN
    assert schedule.levels(4, "trailing")[:-1] == [schedule.at(t) for t in (999, 749, 499, 249)]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_n_steps_are_n_steps_even_where_the_last_level_is_the_end(spacing):
    levels = Schedule(offset=0).levels(10, spacing, clean=False)
    assert len(levels) == 11 and levels[-1].ratio <= levels[-2].ratio


def test_a_spacing_may_end_below_the_schedule(monkeypatch):
    nearly_clean = Level(0.0, 1.0, 1e-6)
    monkeypatch.setitem(SPACINGS, "own", Spacing("Own", lambda schedule, n: [schedule.at(999), nearly_clean]))
    assert Schedule().levels(2, "own", clean=False)[1:] == [nearly_clean, nearly_clean]


@pytest.mark.parametrize("n", [0, -1, 1001, 2.5, 50.0, "50", None, True, float("nan")])
def test_bad_numbers_of_steps_are_refused(n):
    with pytest.raises(ValueError, match="sampling steps: give a whole number from 1 to 1000"):
        Schedule().levels(n)


@pytest.mark.parametrize("name", ["karos", "", None, ["leading"]])
def test_an_unknown_spacing_gets_the_list(name):
    with pytest.raises(ValueError, match="is unknown; choose one of leading, trailing, linspace"):
        Schedule(spacing=name)
    if name:
        with pytest.raises(ValueError, match="is unknown; choose one of leading, trailing, linspace"):
            Schedule().levels(10, name)


@pytest.mark.parametrize(
    "betas",
    [None, 1000, [0.1, 0.2], torch.tensor([0.1]), torch.zeros(10), torch.tensor([0.1, 1.1]), torch.full((2, 2), 0.1)]
    + [torch.tensor([0.1, float("nan")])],
)
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas have to be a tensor of two or more numbers above 0 and up to 1"):
        Schedule(betas)


@pytest.mark.parametrize("offset", [-1, 1.0, "1", None, True])
def test_impossible_offsets_are_refused(offset):
    with pytest.raises(ValueError, match="give a whole number, 0 or more"):
        Schedule(offset=offset)


def test_numbers_of_numpy_are_numbers():
    assert Schedule(offset=np.int64(1)).levels(np.int32(50)) == Schedule().levels(50)


@pytest.mark.parametrize("t", [-1, 1000, -0.5, 999.5, float("nan"), float("inf")])
def test_times_outside_the_schedule_are_refused_alone_and_in_a_batch(t):
    for times in (t, torch.tensor(t), torch.tensor([5.0, t, 500.0])):
        with pytest.raises(ValueError, match=rf"t is {t:g}; times go from 0 to 999"):
            Schedule().at(times)


def test_a_schedule_is_frozen_and_replaceable():
    schedule = Schedule()
    assert schedule.alpha_bar is schedule.alpha_bar  # computed once
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.offset = 10
    # a replaced schedule does not keep what was computed for the old one
    assert dataclasses.replace(schedule, betas=scaled_linear(10)).alpha_bar.shape == (10,)


def test_add_noise_equals_diffusers():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=g)
    t = torch.tensor([0, 1, 500, 999])
    expected = DDPMScheduler(**SD15).add_noise(x0, noise, t)
    assert torch.allclose(add_noise(x0, noise, Schedule().at(t)), expected, atol=1e-6)
    for i in range(4):
        one = add_noise(x0[i : i + 1], noise[i : i + 1], Schedule().at(int(t[i])))
        assert torch.allclose(one, expected[i : i + 1], atol=1e-6)
    with pytest.raises(ValueError, match="draw noise in the shape of x0"):
        add_noise(x0, noise[:1], Schedule().at(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_level_keeps_the_dtype_of_the_picture(dtype):
    x0, noise = torch.randn(2, 2, 3, 4, 4, dtype=dtype)
    assert add_noise(x0, noise, Schedule().at(300)).dtype == dtype
