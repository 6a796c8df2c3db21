"""What a network answers: target and split undo each other, and v is that of diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.prediction import EPSILON, PREDICTIONS, SAMPLE, V
from sdlearn.schedule import Schedule, add_noise, scaled_linear, zero_terminal_snr

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULES = [Schedule(), Schedule(zero_terminal_snr(scaled_linear()))]


@given(
    st.sampled_from(list(PREDICTIONS.values())), st.sampled_from(SCHEDULES), st.floats(0, 999), st.integers(0, 2**31)
)
@settings(deadline=None, max_examples=100)
def test_the_right_answer_gives_back_x0_and_the_noise_at_every_level(prediction, schedule, t, seed):
    x0, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    level = schedule.at(t)
    xt = add_noise(x0, noise, level)
    found = prediction.split(xt, prediction.target(x0, noise, level), level)
    assert torch.allclose(found[0], x0, atol=1e-10) and torch.allclose(found[1], noise, atol=1e-10)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_any_answer_is_read_as_a_picture_and_a_noise_that_make_xt(name):
    xt, output = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    for t in (0, 1, 500, 999):
        level = Schedule().at(t)
        x0, eps = PREDICTIONS[name].split(xt, output, level)
        assert torch.allclose(add_noise(x0, eps, level), xt, atol=1e-9)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_answers_are_read_as_diffusers_reads_them(name):
    xt, output = torch.randn(2, 1, 4, 8, 8)
    theirs = DDIMScheduler(**SD15, prediction_type=name)
    theirs.set_timesteps(1000)
    for t in (0, 1, 500, 999):
        expected = theirs.step(output, t, xt).pred_original_sample
        found = PREDICTIONS[name].split(xt, output, Schedule().at(t))[0]
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_targets_of_a_batch_of_times():
    x0, noise = torch.randn(2, 4, 4, 8, 8)
    t = torch.tensor([0, 1, 500, 999])
    level = Schedule().at(t)
    assert EPSILON.target(x0, noise, level) is noise and SAMPLE.target(x0, noise, level) is x0
    velocity = DDIMScheduler(**SD15).get_velocity(x0, noise, t)
    assert torch.allclose(V.target(x0, noise, level), velocity, atol=1e-6)
    found = V.split(add_noise(x0, noise, level), velocity, level)
    assert torch.allclose(found[0], x0, atol=1e-5) and torch.allclose(found[1], noise, atol=1e-5)


def test_the_names_are_those_of_model_folders():
    assert {name: prediction.name for name, prediction in PREDICTIONS.items()} == {
        name: name for name in ("epsilon", "sample", "v_prediction")
    }
