"""The training loop: the same weights whatever interrupts, resumes or shares the work; averages; rates."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from toy_task import Toy

from sdlearn.training import Average, Recipe, averaged_weights, fastest_precision, generators, progress, train

RECIPE = Recipe(steps=6, batch=4, lr=1e-2, warmup=2, ema=0.9)


def weights_after(folder, *recipes):
    """Train in as many goes as there are recipes, each with a new task, as after a restart."""
    for recipe in recipes:
        task = Toy()
        train(task, recipe, folder, save_every=100, log_every=100)
    return {name: value.clone() for name, value in task.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_ends_with_exactly_the_weights_of_an_unbroken_one(tmp_path, precision):
    recipe = replace(RECIPE, precision=precision)
    unbroken = weights_after(tmp_path / "a", recipe)
    resumed = weights_after(tmp_path / "b", replace(recipe, steps=3), recipe)
    assert same(unbroken, resumed)
    a, b = (torch.load(tmp_path / x / "state.pt", weights_only=True) for x in "ab")
    assert a["step"] == b["step"] == 6
    assert same(a["weights"], b["weights"]) and same(a["average"], b["average"])
    assert not same(a["weights"], a["average"])  # the task holds the averages at the end, the file has both
    assert same(a["average"], unbroken)


def test_precision_and_seed_matter(tmp_path):
    """Else the test above would pass for the wrong reason."""
    results = [weights_after(tmp_path / str(i), recipe) for i, recipe in enumerate(
        [RECIPE, replace(RECIPE, precision="bf16"), replace(RECIPE, seed=1)])]  # fmt: skip
    assert not same(results[0], results[1]) and not same(results[0], results[2])


def test_a_finished_run_stays_as_it_is(tmp_path):
    first = weights_after(tmp_path, RECIPE)
    before = (tmp_path / "state.pt").read_bytes()
    assert same(first, weights_after(tmp_path, RECIPE))
    assert (tmp_path / "state.pt").read_bytes() == before


def test_it_learns_reports_and_shows(tmp_path):
    reports, shown = [], []
    train(Toy(), replace(RECIPE, steps=60, batch=16), tmp_path, log_every=20, save_every=30, preview_every=30,
          report=lambda step, scalars: reports.append((step, scalars)),
          show=lambda step, pictures: shown.append((step, tuple(pictures.shape))))  # fmt: skip
    assert [step for step, _ in reports] == [20, 40, 60]
    assert set(reports[0][1]) == {"loss", "norm", "lr", "examples_per_second"}
    assert reports[-1][1]["loss"] < 0.5 * reports[0][1]["loss"]
    assert shown == [(30, (2, 3, 8, 8)), (60, (2, 3, 8, 8))]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_frozen_weights_are_neither_changed_nor_saved(tmp_path):
    task = Toy()
    task.net[0].requires_grad_(False)
    before = task.net[0].weight.clone()
    train(task, RECIPE, tmp_path)
    assert torch.equal(task.net[0].weight, before)
    assert set(averaged_weights(tmp_path / "state.pt")) == {"net.2.weight", "net.2.bias"}


def test_what_a_step_sees_follows_from_its_number():
    def draws(step):
        return [rng.random() for rng in generators(RECIPE, step)]

    assert draws(3) == draws(3) and len(draws(3)) == RECIPE.batch
    assert len({*draws(3), *draws(4)}) == 2 * RECIPE.batch


@settings(deadline=None, max_examples=20)
@given(st.floats(0.0, 0.95), st.integers(1, 6))
def test_average_equals_torchs_at_a_constant_decay(decay, updates):
    """Far from the start our decay is constant, and torch.optim.swa_utils computes the same."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    mine, theirs = Average(model, decay), [p.detach().clone() for p in model.parameters()]
    update = get_ema_multi_avg_fn(decay)
    for _ in range(updates):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        mine.update(model, step=10_000)
        update(theirs, [p.detach() for p in model.parameters()], None)
    for a, b in zip(mine.weights.values(), theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_average_forgets_the_start_faster_early_on():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(model, 0.999)
    nn.init.ones_(model.weight)
    average.update(model, step=0)  # decay (1 + 0) / (10 + 0): nine tenths are new
    assert average.weights["weight"].item() == pytest.approx(0.9)


def test_swapping_twice_changes_nothing():
    model = nn.Linear(3, 2)
    average = Average(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    new, old = model.weight.detach().clone(), average.weights["weight"].clone()
    average.swap(model)
    assert torch.equal(model.weight, old) and torch.equal(average.weights["weight"], new)
    average.swap(model)
    assert torch.equal(model.weight, new) and torch.equal(average.weights["weight"], old)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5000), st.integers(0, 500), st.integers(0, 500), st.floats(1e-6, 1.0))
def test_the_rate_rises_stays_and_falls(steps, warmup, cooldown, lr):
    recipe = Recipe(steps=steps, batch=1, lr=lr, warmup=warmup, cooldown=cooldown)
    rates = [recipe.rate(step) for step in range(steps)]
    assert all(0 < rate <= lr for rate in rates)
    later = replace(recipe, steps=steps + 70, begun=70)  # a new beginning warms up anew
    assert [later.rate(70 + step) for step in range(steps)] == pytest.approx(rates)
    before_cooldown, after_warmup = rates[: max(0, steps - cooldown)], rates[warmup:]
    assert before_cooldown == sorted(before_cooldown)
    assert after_warmup == sorted(after_warmup, reverse=True)
    if warmup + cooldown < steps:
        assert recipe.rate(warmup) == lr  # full speed in between
        assert recipe.rate(0) == pytest.approx(lr / max(warmup, 1))
        if cooldown:
            assert recipe.rate(steps - 1) == pytest.approx(lr / cooldown)
            falling = rates[steps - cooldown :]
            assert all(a > b for a, b in zip(falling, falling[1:], strict=False))


@pytest.mark.parametrize(("wrong", "says"), [
    ({"steps": 0}, "steps is 0"), ({"batch": 0}, "batch is 0"), ({"ema": 1.0}, "ema is 1.0"),
    ({"precision": "fp8"}, "'fp8' is unknown: use no, bf16 or fp16"),
])  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(RECIPE, **wrong)


def test_what_is_saved_can_be_read_back(tmp_path):
    with pytest.raises(ValueError, match="train that stage first .sdlearn train vae."):
        averaged_weights(tmp_path / "vae" / "state.pt")
    assert progress(tmp_path / "state.pt") == (0, {})
    trained = weights_after(tmp_path, RECIPE)
    assert same(averaged_weights(tmp_path / "state.pt"), trained)
    done, recipe = progress(tmp_path / "state.pt")
    assert done == RECIPE.steps and recipe["lr"] == RECIPE.lr


def test_fastest_precision_leaves_no_gradients():
    task = Toy()
    assert fastest_precision(task) in ("no", "bf16", "fp16")
    assert all(p.grad is None for p in task.parameters())


SCRIPT = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch
from test_training import RECIPE
from toy_task import Toy
from sdlearn.training import train
torch.set_num_threads(1)
class Watched(Toy):
    def examples(self, rngs):
        with open(f"{sys.argv[1]}.{os.getpid()}", "a") as file:
            print(len(rngs), file=file)
        return super().examples(rngs)

try:
    train(Watched(), replace(RECIPE, batch=int(sys.argv[2])), Path(sys.argv[1]))
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


def launch(tmp_path, batch):
    """Two processes on this CPU; they talk through gloo. (`accelerate launch --cpu` would start only one.)"""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    return subprocess.run(
        [sys.executable, *torchrun, str(script), str(tmp_path / "two"), str(batch)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_the_whole_batch(tmp_path):
    one = weights_after(tmp_path / "one", RECIPE)
    done = launch(tmp_path, RECIPE.batch)
    assert done.returncode == 0, done.stderr[-2000:]
    drawn = [path.read_text().split() for path in tmp_path.glob("two.*") if path.suffix != ".py"]
    assert drawn == [["2"] * RECIPE.steps] * 2  # each process drew its half of every batch
    two = averaged_weights(tmp_path / "two" / "state.pt")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    done = launch(tmp_path, 3)
    assert done.returncode != 0 and "refused: a batch of 3 does not divide among 2 processes" in done.stderr
