"""Every sampler against the one that bears its name in diffusers: whole walks, the same noise, the same levels."""

import importlib
import math
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from sdlearn.prediction import PREDICTIONS
from sdlearn.samplers import SAMPLERS, Denoiser, Leg, Point, Sampler, dpmpp_2s, sample
from sdlearn.schedule import CLEAN, Level, Schedule, linear

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 6, 5)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, in diffusers


def network(x, t):
    """A smooth answer that depends on all that a network is told."""
    t = torch.as_tensor(t, dtype=torch.float64).float() / 1000
    return 0.7 * torch.tanh(x + 0.3 * x.roll(1, -1)) + 0.25 * torch.sin(2 * x + 3 * t)


# diffusers' schedulers that want other libraries, without these.


def lms_scheduler(**settings):
    """LMSDiscreteScheduler; instead of scipy's integral, Gauss's rule, which is exact for cubics."""
    module = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")

    def quad(f, a, b, epsrel):
        nodes, weights = np.polynomial.legendre.leggauss(4)
        return [
            sum(w * float(f(a + (b - a) * (x + 1) / 2)) for x, w in zip(nodes, weights, strict=True)) * float(b - a) / 2
        ]

    module.integrate = SimpleNamespace(quad=quad)
    return module.LMSDiscreteScheduler(**settings)


def sde_scheduler(**settings):
    """DPMSolverSDEScheduler; torchsde is only its source of noise, which `Path` below replaces."""
    there = sys.modules.get("torchsde")
    sys.modules["torchsde"] = there or ModuleType("torchsde")
    try:
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    finally:
        if there is None:
            del sys.modules["torchsde"]
    return module.DPMSolverSDEScheduler(**settings)


class Path:
    """A Brownian path over sigma, drawn as it is asked for: (from, to) -> its increment, with variance 1."""

    def __init__(self, shape, generator):
        self.shape, self.generator, self.known = shape, generator, {}

    def __call__(self, start, end):
        start, end = float(start), float(end)
        lowest = min(self.known, default=start)
        here = self.known.setdefault(lowest, torch.zeros(self.shape))
        self.known[end] = here + torch.randn(self.shape, generator=self.generator) * math.sqrt(lowest - end)
        return (self.known[end] - self.known[start]) / math.sqrt(start - end)


class Told(Schedule):
    """A schedule whose levels half way have the times that a diffusers scheduler names, one after the other."""

    def __init__(self, times):
        super().__init__()
        object.__setattr__(self, "times", iter(times))

    def at_ratio(self, ratio):
        return level(ratio, next(self.times))


def level(sigma, t):
    alpha = 1 / math.sqrt(1 + sigma**2)
    return Level(float(t), alpha, sigma * alpha) if sigma else CLEAN


def their_walk(scheduler, n):
    """diffusers' walk: the noise that it began with, as xt, and where it ended."""
    dice = torch.Generator().manual_seed(3)
    noise = torch.randn(SHAPE, generator=dice)
    x = noise * scheduler.init_noise_sigma
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = Path(SHAPE, dice)
    if type(scheduler).__name__ == "DEISMultistepScheduler":
        scheduler.sigmas = scheduler.sigmas.double()  # its coefficients lose four digits in float32
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        how = {"generator": dice} if "generator" in scheduler.step.__code__.co_varnames else {}
        x = scheduler.step(output, t, x, **how).prev_sample
    return x


def levels_of(scheduler, looks):
    """(the levels that a diffusers scheduler visits, the times at which it looks half way)."""
    if not hasattr(scheduler, "sigmas"):  # DDPM, DDIM, PLMS count in times alone
        clean, schedule = getattr(scheduler.config, "set_alpha_to_one", True), Schedule()
        times = list(dict.fromkeys(scheduler.timesteps.tolist()))
        return [*map(schedule.at, times), CLEAN if clean else schedule.at(0)], times[1:2]
    sigmas = list(dict.fromkeys(scheduler.sigmas.tolist()))
    times = scheduler.timesteps.tolist()
    return [level(s, t) for s, t in zip(sigmas, [*times[::looks], 0], strict=True)], times[1::looks] * (looks > 1)


def difference(sampler, scheduler, n, prediction, looks=1):
    """Largest difference of the two walks' ends, and how large these are."""
    scheduler.set_timesteps(n)
    return compare(sampler, scheduler, n, prediction, *levels_of(scheduler, looks))


def compare(sampler, scheduler, n, prediction, levels, half_way=()):
    dice = torch.Generator().manual_seed(3)
    start = torch.randn(SHAPE, generator=dice)
    scaled = not torch.equal(scheduler.scale_model_input(start, scheduler.timesteps[0]), start)
    theirs = their_walk(scheduler, n)
    if scaled:  # its x is y, the latents divided by the signal
        start, theirs = start * scheduler.init_noise_sigma * levels[0].alpha, theirs * levels[-1].alpha
    denoise = Denoiser(network, Told(half_way), PREDICTIONS[prediction])
    *_, last = sample(denoise, start, levels, sampler, dice)
    return (last.latents - theirs).abs().max().item(), max(1, theirs.abs().max().item())


def of(name, **settings):
    """Makes a diffusers scheduler for a kind of prediction."""

    def make(prediction):
        kind = getattr(diffusers, name, None) if isinstance(name, str) else name
        return kind(**SD | {"prediction_type": prediction} | settings)

    return make


DPM = {"lower_order_final": False}
BOTH, ALL = ("epsilon", "v_prediction"), ("epsilon", "v_prediction", "sample")
PAIRS = {  # our name, and what else: diffusers' scheduler, looks a step, predictions that it knows
    "ddpm": (of("DDPMScheduler", timestep_spacing="leading", steps_offset=1, clip_sample=False), 1, ALL),
    "ddim": (of("DDIMScheduler", set_alpha_to_one=False, steps_offset=1, clip_sample=False), 1, ALL),
    "euler": (of("EulerDiscreteScheduler"), 1, ALL),
    "euler, karras": (of("EulerDiscreteScheduler", use_karras_sigmas=True), 1, ALL),
    "euler_a": (of("EulerAncestralDiscreteScheduler", timestep_spacing="trailing"), 1, BOTH),
    "heun": (of("HeunDiscreteScheduler"), 2, BOTH),
    "heun, karras": (of("HeunDiscreteScheduler", use_karras_sigmas=True), 2, BOTH),
    "dpm2": (of("KDPM2DiscreteScheduler"), 2, BOTH),
    "dpm2_a": (of("KDPM2AncestralDiscreteScheduler"), 2, BOTH),
    "dpmpp_2m": (of("DPMSolverMultistepScheduler"), 1, ALL),
    "dpmpp_2m, karras": (of("DPMSolverMultistepScheduler", use_karras_sigmas=True), 1, ALL),
    "dpmpp_2m, sigma_min": (of("DPMSolverMultistepScheduler", final_sigmas_type="sigma_min", **DPM), 1, ALL),
    "dpmpp_2m_sde": (of("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"), 1, ALL),
    "dpmpp_3m": (of("DPMSolverMultistepScheduler", solver_order=3, **DPM), 1, ALL),
    "dpmpp_sde": (of(sde_scheduler), 2, BOTH),
    "lms": (of(lms_scheduler), 1, ALL),
    "lms, karras": (of(lms_scheduler, use_karras_sigmas=True), 1, ALL),
    "plms": (of("PNDMScheduler", skip_prk_steps=True, steps_offset=1), 1, ("epsilon",)),
    "deis": (of("DEISMultistepScheduler", solver_order=3, **DPM), 1, ALL),
    "unipc": (of("UniPCMultistepScheduler"), 1, ALL),
    "unipc, karras": (of("UniPCMultistepScheduler", use_karras_sigmas=True), 1, ALL),
}
CASES = [(name, prediction) for name, (_, _, known) in PAIRS.items() for prediction in known]


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_a_walk_ends_where_diffusers_ends(name, prediction):
    make, looks, _ = PAIRS[name]
    for n in (5, 12, 25):
        far, size = difference(name.partition(",")[0], make(prediction), n, prediction, looks)
        assert far <= 1e-5 * size, n


@pytest.mark.parametrize("n", [5, 12, 25])
@pytest.mark.parametrize("prediction", BOTH)
def test_2s_ends_where_diffusers_singlestep_ends(prediction, n):
    """Its solver of one step visits the schedule's levels in pairs: give it ours, and those half way between."""
    main = Schedule().levels(n, "karras")
    middles = [Schedule().at_ratio(math.sqrt(a.ratio * b.ratio)) for a, b in pairwise(main[:-1])]
    both = [one for pair in zip(main[:-2], middles, strict=True) for one in pair] + main[-2:]
    scheduler = of("DPMSolverSinglestepScheduler")(prediction)
    scheduler.set_timesteps(2 * n - 1)
    scheduler.sigmas = torch.tensor([one.ratio for one in both], dtype=torch.float64)
    scheduler.timesteps = torch.tensor([one.t for one in both[:-1]], dtype=torch.float64)
    quiet = Sampler(dpmpp_2s, "DPM++ 2S", "without its noise")
    far, size = compare(quiet, scheduler, n, prediction, main, [one.t for one in middles])
    assert far <= 1e-5 * size


# What k-diffusion has and diffusers has not, or has otherwise; written as there, with exp(-h) - 1, in float64.


def k_walk(name, ratios, x, x0_of, noise):
    """dpmpp_2s_ancestral and dpmpp_3m_sde of k-diffusion's sampling.py: x is y; the last ratio is 0."""
    before = []
    for s, end in pairwise(ratios):
        x0 = x0_of(x, s)
        if end == 0:
            return x0
        up = min(end, math.sqrt(end**2 * (s**2 - end**2) / s**2))
        h = math.log(s / math.sqrt(end**2 - up**2))
        if name == "dpmpp_2s_a":
            half = math.exp(-h / 2) * x - math.expm1(-h / 2) * x0
            x = math.exp(-h) * x - math.expm1(-h) * x0_of(half, s * math.exp(-h / 2))
        else:
            x = math.exp(-h) * x - math.expm1(-h) * x0
            lengths = [math.log(a / b) for b, a in pairwise([end, s, *(ratio for ratio, _ in before)])]
            phi_2, values = math.expm1(-h) / h + 1, [x0, *(value for _, value in before)]
            if len(before) == 1:
                x = x - math.expm1(-h) / 2 * (values[0] - values[1]) * lengths[0] / lengths[1]
            elif before:
                r0, r1 = lengths[1] / lengths[0], lengths[2] / lengths[0]
                a, b = (values[0] - values[1]) / r0, (values[1] - values[2]) / r1
                d1, d2 = a + (a - b) * r0 / (r0 + r1), (a - b) / (r0 + r1)
                x = x + phi_2 * d1 - (phi_2 / h - 0.5) * d2
        before = [(s, x0), *before[:1]]
        x = x + up * noise()


@pytest.mark.parametrize("n", [5, 12, 25])
@pytest.mark.parametrize("name", ["dpmpp_2s_a", "dpmpp_3m_sde"])
def test_a_walk_ends_where_k_diffusion_ends(name, n):
    """But for one thing: in the second step of 3M SDE we take 2M's line, as diffusers does."""
    levels, schedule = Schedule().levels(n, "karras"), Schedule()
    denoise, dice = Denoiser(network, schedule), torch.Generator().manual_seed(3)
    start = torch.randn(SHAPE, generator=dice)
    noises = torch.Generator().set_state(dice.get_state())
    *_, last = sample(denoise, start.double(), levels, name, dice)
    theirs = k_walk(
        name, [one.ratio for one in levels], start.double() / levels[0].alpha,
        lambda x, s: denoise(x * schedule.at_ratio(s).alpha, schedule.at_ratio(s)),
        lambda: torch.randn(SHAPE, generator=noises),
    )  # fmt: skip
    assert (last.latents - theirs).abs().max() < 1e-6 * max(1, theirs.abs().max())


# Where we differ from diffusers on purpose.


def test_diffusers_noisy_third_order_has_a_half_with_the_wrong_sign():
    """Its coefficient of the parabola's curve, ((1 - e^-2h) - 2h) / (2h)^2 - 1/2, has to end in + 1/2. Taken away from
    our X, that difference gives its walk exactly."""
    ours = SAMPLERS["dpmpp_3m_sde"].better

    def wrong(past, leg, look):
        x0 = ours(past, leg, look)
        if len(past) < 3 or leg.end == 0:
            return x0
        s0, s1, s2 = (point.level.ratio for point in past[:3])
        h, h0, h1 = math.log(leg.start / leg.end), math.log(s1 / s0), math.log(s2 / s1)
        a, b = (past[0].x0 - past[1].x0) * h / h0, (past[1].x0 - past[2].x0) * h / h1
        return x0 + (a - b) / (h0 / h + h1 / h) / math.expm1(-2 * h)

    make = of("DPMSolverMultistepScheduler", solver_order=3, algorithm_type="sde-dpmsolver++", **DPM)
    far, size = difference(Sampler(wrong, "theirs", "", 1.0), make("sample"), 12, "sample")
    assert far <= 1e-5 * size
    far, size = difference("dpmpp_3m_sde", make("sample"), 12, "sample")
    assert far > 0.1 * size


def test_diffusers_plms_averages_what_the_network_answers_and_we_average_noise():
    """The same for a network that predicts noise; for v the averages of four levels are of four different things."""
    make = PAIRS["plms"][0]
    far, size = difference("plms", make("v_prediction"), 12, "v_prediction")
    assert far > 0.05 * size


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_steps_to_the_next_level_where_diffusers_steps_by_1000_over_n(spacing):
    scheduler = of("DDIMScheduler", set_alpha_to_one=False, timestep_spacing=spacing, clip_sample=False)("epsilon")
    scheduler.set_timesteps(12)
    levels, _ = levels_of(scheduler, 1)
    levels = levels if spacing == "trailing" else levels[:-1]  # linspace visits t = 0, where SD's DDIM ends
    assert compare("ddim", scheduler, 12, "epsilon", levels)[0] > 1e-3


# The sums that diffusers' own tests expect (tests/schedulers/test_scheduler_*.py): x = 0 ... 767 / 768,
# network(x, t) = x t / (t + 1), linear betas, ten steps.

X = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def scaling_network(x, t):
    return x * t / (t + 1)


def scaled_twice(name, prediction, spacing):
    """The end of a walk as their tests walk it in y: they overwrite y by the network's input, y / sqrt(1 + ratio^2), at
    every look. A right walk has other sums: 233.29 for Euler a, 191.19 for LMS."""
    schedule, sampler = Schedule(linear(1100)), SAMPLERS[name]
    ratios = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt().double().numpy()
    times = np.linspace(0, 1099, 10)[::-1]  # between training times they interpolate the ratio, not its logarithm
    levels = [level(float(np.interp(t, np.arange(1100), ratios)), t) for t in times] + [CLEAN]
    if spacing == "karras":
        levels = schedule.levels(10, "karras")
    y, past, dice = X.double() * levels[0].ratio, [], torch.Generator().manual_seed(0)

    def seen(y, at):
        y = at.alpha * y
        xt, output = at.alpha * y, scaling_network(y, at.t)
        return Point(at, xt, PREDICTIONS[prediction].split(xt, output, at)[0])

    for start, end in pairwise(levels):
        here = seen(y, start)
        past, leg = [here, *past[:3]], Leg.of(start.ratio, end.ratio, sampler.eta or 0)

        def look(x0, leg, here=here):
            return seen(x0 + leg.down * here.towards(x0), schedule.at_ratio(leg.end))

        aim = sampler.better(past, leg, look)
        y = aim + leg.down * here.towards(aim)
        if leg.up:
            y = y + leg.up * torch.randn(X.shape, generator=dice)
    return y


@pytest.mark.parametrize(
    ("name", "prediction", "spacing", "total"),
    [
        ("euler", "epsilon", "", 10.0807), ("euler", "epsilon", "karras", 124.5230),
        ("euler", "v_prediction", "", 0.0002),
        ("euler_a", "epsilon", "", 152.3192), ("euler_a", "v_prediction", "", 108.4439),
        ("heun", "epsilon", "", 0.1233), ("heun", "epsilon", "karras", 0.00015),
        ("dpm2", "epsilon", "", 20.4125), ("dpm2_a", "epsilon", "", 13979.9433),
        ("dpm2_a", "v_prediction", "", 331.8133),
        ("lms", "epsilon", "", 1006.388), ("lms", "epsilon", "karras", 3812.9927),
    ],
)  # fmt: skip
def test_published_sums_of_walks_in_y(name, prediction, spacing, total):
    found = scaled_twice(name, prediction, spacing).abs().sum().item()
    assert abs(found - total) < max(2e-4, 5e-6 * total)


def rounded(n=10):
    """DPM-Solver's linspace: n + 1 times, rounded, the last left out; it ends at time 0."""
    schedule = Schedule(linear())
    return [schedule.at(t) for t in np.linspace(0, 999, n + 1).round()[:0:-1]] + [schedule.at(0)]


def karras_rounded(n=10):
    return [one._replace(t=round(one.t)) for one in Schedule(linear()).levels(n, "karras", clean=False)]


def hundreds(schedule, end):
    return [schedule.at(t) for t in range(900, 0 if end.ratio else -1, -100)] + [end]


NARROW = Schedule(linear(start=0.01))


@pytest.mark.parametrize(
    ("name", "prediction", "schedule", "levels", "order", "mean"),
    [
        ("dpmpp_2m", "epsilon", Schedule(linear()), rounded(), 2, 0.3301),
        ("dpmpp_2m", "v_prediction", Schedule(linear()), rounded(), 2, 0.2251),
        ("dpmpp_2m", "v_prediction", Schedule(linear()), karras_rounded(), 2, 0.2096),
        ("unipc", "epsilon", Schedule(linear()), rounded(), 1, 0.2464),
        ("unipc", "v_prediction", Schedule(linear()), rounded(), 1, 0.1014),
        ("deis", "epsilon", Schedule(linear()), rounded(), 1, 0.23916),
        ("deis", "v_prediction", Schedule(linear()), rounded(), 1, 0.091),
        ("ddim", "epsilon", Schedule(linear()), hundreds(Schedule(linear()), CLEAN), 1, 172.0067 / 768),
        ("ddim", "v_prediction", Schedule(linear()), hundreds(Schedule(linear()), CLEAN), 1, 52.5302 / 768),
        ("ddim", "epsilon", NARROW, hundreds(NARROW, NARROW.at(0)), 1, 149.0784 / 768),
    ],
)  # fmt: skip
def test_published_means_of_walks_in_xt(name, prediction, schedule, levels, order, mean):
    """order 1: they fall back to the first order in the last step of a short walk. DEIS there has order 2."""
    ours = SAMPLERS[name]

    def better(past, leg, look):
        if order == 1 and leg.end == levels[-1].ratio:
            return past[0].x0
        return ours.better(past[:2] if name == "deis" else past, leg, look)

    denoise = Denoiser(scaling_network, schedule, PREDICTIONS[prediction])
    *_, last = sample(denoise, X, levels, replace(ours, better=better))
    assert abs(last.latents.abs().mean().item() - mean) < 1e-3


# The spacings.


@pytest.mark.parametrize("n", [1, 2, 5, 12, 25])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_spacings_equal_diffusers(spacing, n):
    scheduler = of("EulerDiscreteScheduler", **{f"use_{spacing}_sigmas": True})("epsilon")
    scheduler.set_timesteps(max(n, 2))
    levels = Schedule().levels(n, spacing)
    assert len(levels) == n + 1 and levels[-1] == CLEAN
    for ours, sigma, t in zip(levels[:n], scheduler.sigmas.tolist(), scheduler.timesteps.tolist(), strict=False):
        assert abs(ours.ratio / sigma - 1) < 1e-4 and abs(ours.t - t) < 0.02


def test_align_your_steps_has_the_published_ratios_and_times():
    from diffusers.schedulers.scheduling_utils import AysSchedules

    levels = Schedule().levels(10, "ays")
    published = AysSchedules["StableDiffusionSigmas"]
    assert [round(one.ratio, 3) for one in levels] == published
    near = [abs(one.t - t) for one, t in zip(levels, AysSchedules["StableDiffusionTimesteps"], strict=False)]
    assert max(near) < 4  # published as whole numbers that they had been rounded from
    logs = np.log([one.ratio for one in Schedule().levels(5, "ays")[:-1]])
    assert np.allclose(logs, np.log(published[:-1:2]), atol=1e-6)  # every second one
    logs = np.log([one.ratio for one in Schedule().levels(20, "ays")[:-1]])
    assert np.allclose(logs[1:-2:2], (logs[:-2:2] + logs[2::2]) / 2) and len(logs) == 20
