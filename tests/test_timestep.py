"""The time embedding: against diffusers, and the properties of a clock."""

import math

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.timestep import TimeEmbedding, timestep_embedding


@pytest.mark.parametrize("width", [2, 96, 320])
def test_sinusoids_equal_diffusers(width):
    t = torch.arange(1000)
    reference = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(t)
    assert (timestep_embedding(t, width) - reference).abs().max() <= 1e-4


@pytest.mark.parametrize("flip, shift", [(False, 0), (True, 1)])
def test_the_comparison_sees_the_classical_slips(flip, shift):
    t = torch.arange(1000)
    reference = Timesteps(320, flip_sin_to_cos=flip, downscale_freq_shift=shift)(t)
    assert (timestep_embedding(t, 320) - reference).abs().max() > 1


@pytest.mark.parametrize("width, time_width", [(320, 1280), (96, 384)])
def test_module_equals_diffusers(width, time_width):
    ours, theirs = TimeEmbedding(width, time_width), TimestepEmbedding(width, time_width)
    ours.load_state_dict(theirs.state_dict())
    t = torch.tensor([0, 1, 499, 999])
    reference = theirs(Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(t))
    assert (ours(t) - reference).abs().max() <= 1e-4


def test_parameters_of_stable_diffusion():
    assert sum(p.numel() for p in TimeEmbedding(320, 1280).parameters()) == 2_050_560


def test_by_hand():
    expected = torch.tensor([[math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]])
    assert torch.allclose(timestep_embedding(torch.tensor([3]), 4, max_period=100), expected, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(t=st.floats(0, 1000, width=32), shift=st.floats(0, 500, width=32), half=st.integers(1, 200))
def test_a_clock(t, shift, half):
    """All rows have the same length, and how alike two times are depends on their distance alone."""
    a, b, zero, distance = timestep_embedding(torch.tensor([t, t + shift, 0.0, shift]), 2 * half)
    assert torch.isclose(a @ a, torch.tensor(float(half)), rtol=1e-4)
    assert abs(a @ b - zero @ distance) <= 1e-3 * half


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float16])
def test_any_number_type_gives_float32(dtype):
    result = timestep_embedding(torch.tensor([7, 512], dtype=dtype), 32)
    assert result.dtype == torch.float32
    assert torch.equal(result, timestep_embedding(torch.tensor([7.0, 512.0]), 32))


def test_half_precision_weights_still_tell_neighbours_apart():
    module = TimeEmbedding(320, 1280).to(torch.bfloat16)
    a, b = module(torch.tensor([998, 999]))
    assert a.dtype == torch.bfloat16
    assert not torch.equal(a, b)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="width 321 is odd"):
        timestep_embedding(torch.tensor([1]), 321)
