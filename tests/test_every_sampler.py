"""What holds for each sampler: where the best network is known, with every kind of network, alone and in company."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from sdlearn.pipeline import StableDiffusion
from sdlearn.prediction import PREDICTIONS, SAMPLE
from sdlearn.samplers import SAMPLERS, Denoiser, Leg, Noise, Sampler, dpmpp_2s, keep, sample, shares
from sdlearn.schedule import SPACINGS, Schedule, add_noise

SCHEDULE = Schedule()
NOISY = [name for name, sampler in SAMPLERS.items() if sampler.eta is not None]
MEAN, SPREAD = 0.4, 0.5


def cloud(kind):
    """The best network for numbers of mean .4 and standard deviation .5, which answers in one of three ways."""

    def network(xt, t):
        level = SCHEDULE.at(float(t))
        variance = (level.alpha * SPREAD) ** 2 + level.sigma**2
        x0 = MEAN + level.alpha * SPREAD**2 / variance * (xt - level.alpha * MEAN)
        return PREDICTIONS[kind].target(x0, (xt - level.alpha * x0) / level.sigma, level)

    return Denoiser(network, SCHEDULE, PREDICTIONS[kind])


def walk(name, kind="epsilon", n=12, spacing="karras", shape=(4, 2, 4, 4), seed=0, strength=None, **how):
    """All steps of a walk from noise, or from a picture of the cloud under noise."""
    dice = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
    levels = SCHEDULE.levels(n, spacing, SAMPLERS[name].clean)
    start = torch.stack([torch.randn(shape[1:], generator=one) for one in dice])
    if strength:
        levels = keep(levels, strength)
        start = add_noise(MEAN + SPREAD * start.roll(1, -1), start, levels[0])
    return list(sample(cloud(kind), start, levels, name, dice, **how))


def exact_end(start, levels):
    """Where a number ends without fresh noise: it keeps its place in the cloud."""
    a, b = levels[0], levels[-1]
    wide, narrow = (math.hypot(one.alpha * SPREAD, one.sigma) for one in (a, b))
    return b.alpha * MEAN + narrow / wide * (start - a.alpha * MEAN)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(name):
    batch = walk(name, shape=(3, 2, 4, 4), seed=5)[-1].latents
    for i in range(3):
        alone = walk(name, shape=(1, 2, 4, 4), seed=5 + i)[-1].latents
        assert torch.allclose(batch[i : i + 1], alone, atol=1e-6)


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("name", SAMPLERS)
def test_three_kinds_of_networks_draw_one_picture(name, strength):
    """From noise and from a picture; what each step shows as a preview comes to be what is drawn."""
    walks = [walk(name, kind, strength=strength) for kind in PREDICTIONS]
    for steps in walks:
        assert torch.allclose(steps[-1].latents, walks[0][-1].latents, atol=2e-4)
        far = [(step.x0 - steps[-1].latents).abs().mean() for step in steps]
        assert far[-1] < 0.1 and far[-1] < far[0]
        assert len(steps) == len(walks[0]) > 5


@pytest.mark.parametrize("name", SAMPLERS)
def test_few_steps_end_somewhere(name):
    """Those that carry noise forward overshoot in one long leg, as they do elsewhere; none divides by nothing."""
    carries_noise = name in ("heun", "dpm2", "dpm2_a", "plms", "lms", "deis")
    for spacing, n in product(SPACINGS, (1, 2, 3)):
        latents = walk(name, n=n, spacing=spacing)[-1].latents
        assert latents.isfinite().all()
        assert (latents - MEAN).abs().max() < (50 if carries_noise else 6), (spacing, n)


@pytest.mark.parametrize("name", [name for name in NOISY if name != "lcm"])
def test_noise_leaves_the_pictures_as_different_as_they_are(name):
    """Twice the noise, or none where it is needed, would show in the spread. lcm is for networks that see the end of
    the line, and not, as this one does, the mean of all ends."""
    drawn = walk(name, n=60, spacing="exponential", shape=(40, 4, 8, 8), eta=1.0)[-1].latents
    assert abs(drawn.mean() - MEAN) < 0.02
    assert abs(drawn.std() / SPREAD - 1) < 0.06


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_noise_every_sampler_ends_near_the_exact_flow(name):
    sampler = SAMPLERS[name]
    levels = SCHEDULE.levels(40, "exponential", sampler.clean)
    start = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    *_, last = sample(cloud("epsilon"), start, levels, name, eta=0.0)
    far = (last.latents - exact_end(start, levels)).abs().max()
    assert far < (0.06 if sampler.better.__name__ in ("euler", "lcm") else 0.006)


@pytest.mark.parametrize("name", SAMPLERS)
def test_eta(name):
    if name not in NOISY:
        with pytest.raises(ValueError, match="adds no fresh noise"):
            walk(name, eta=0.5)
        return
    ends = [walk(name, eta=eta)[-1].latents for eta in (0.0, 0.5, 1.0)]
    assert torch.equal(walk(name)[-1].latents, ends[2 if SAMPLERS[name].eta else 0])
    assert (ends[0] - ends[1]).abs().max() > 0.05 and (ends[1] - ends[2]).abs().max() > 0.05


def test_one_walk_has_several_names():
    def end(name, **how):
        return walk(name, spacing="trailing", **how)[-1].latents

    assert torch.equal(end("ddpm"), end("euler_a")) and torch.equal(end("euler", eta=1.0), end("ddpm"))
    assert torch.equal(end("dpmpp_2m_sde", eta=0.0), end("dpmpp_2m"))
    assert torch.equal(end("dpmpp_sde", eta=0.0), end("dpmpp_2s_a", eta=0.0))
    assert (end("ddpm") - end("ddim", eta=1.0)).abs().max() > 1e-4  # SD's DDIM ends at time 0
    schedule = Schedule(ends_clean=True)
    assert schedule.levels(12, clean=False) == SCHEDULE.levels(12)  # and with another schedule it would not


# Orders of convergence, on the world of -1 and +1.


def two_points(schedule=SCHEDULE):
    def network(xt, t):
        level = schedule.at(float(t))
        return torch.tanh(xt / level.alpha / level.ratio**2)

    return Denoiser(network, schedule, SAMPLE)


def errors(sampler, counts):
    """The mean error at ratio 1/2 of walks down from pure noise, even in the log of the ratio."""
    start = torch.linspace(-2.5, 2.5, 81, dtype=torch.float64).view(-1, 1, 1, 1)

    def end(sampler, n):
        levels = [SCHEDULE.at_ratio(float(ratio)) for ratio in np.geomspace(14.6, 0.5, n + 1)]
        *_, last = sample(two_points(), start, levels, sampler)
        return last.latents

    best = end("dpm2", 3000)
    return [(end(sampler, n) - best).abs().mean().item() for n in counts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("euler", 0.9, 1.1), ("heun", 1.9, 2.2), ("dpm2", 1.9, 2.2), ("dpmpp_2s", 1.9, 2.1), ("dpmpp_2m", 1.9, 2.2),
        ("dpmpp_3m", 1.9, 2.3), ("deis", 2.6, 3.1), ("lms", 2.5, 3.5), ("unipc", 2.9, 3.3), ("plms", 1.9, 2.2),
    ],
)  # fmt: skip
def test_orders(name, least, most):
    """3M has order 2, for it takes half of the parabola's curve. PLMS believes that its steps are even."""
    sampler = Sampler(dpmpp_2s, "DPM++ 2S", "") if name == "dpmpp_2s" else name
    a, b = errors(sampler, (48, 192))
    assert least < math.log2(a / b) / 2 < most


def test_shares_are_those_of_adams_and_bashforth():
    even = Leg.of(4.0, 3.0)
    assert np.allclose(shares([4, 5], even), [3 / 2, -1 / 2])
    assert np.allclose(shares([4, 5, 6], even), [23 / 12, -16 / 12, 5 / 12])
    assert np.allclose(shares([4, 5, 6, 7], even), [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    # A line over log ratio, even in 1 / ratio: its mean lies -1/(e^-h - 1) - 1/h of the way down.
    part, h = shares([4.0, 3.0], even, np.log, np.reciprocal)[1], math.log(4 / 3)
    assert abs(part - (-1 / math.expm1(-h) - 1 / h)) < 1e-12


def test_a_look_half_way_and_its_step_see_one_random_path():
    like = torch.zeros(20000)
    noise = Noise(like, torch.Generator().manual_seed(0))
    half, whole = noise(Leg(4.0, 3.0, 0, 1)), noise(Leg(4.0, 1.0, 0, 1))
    assert abs(half.std() - 1) < 0.02 and abs(whole.std() - 1) < 0.02
    assert abs((half * whole).mean() - math.sqrt(1 / 3)) < 0.02


# In the pipeline.


@pytest.fixture(scope="module")
def pipelines():
    """The tiny model; what it answers is also read as v and as x0, which draws nonsense, but draws."""
    parts = StableDiffusion.load(Path(__file__).parents[1] / "checkpoints" / "tiny", "cpu").parts
    return {kind: StableDiffusion(parts, SCHEDULE, PREDICTIONS[kind], (32, 32), "", "cpu") for kind in PREDICTIONS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_in_the_pipeline(pipelines, name, kind):
    sd, how = pipelines[kind], {"sampler": name, "spacing": "karras", "steps": 4, "seed": [3, 4], "n": 2}
    *_, last = sd.steps("a cat", **how)
    first, second = last.images()
    assert first.size == last.preview()[0].size == (32, 32)
    alone = sd.txt2img("a cat", **how | {"seed": 4, "n": 1})[0]
    assert np.abs(np.asarray(alone, int) - np.asarray(second, int)).max() <= 1
    again = sd.img2img("a fox", first, strength=0.5, **how)
    assert len(again) == 2 and np.asarray(again[0]).std() > 0
