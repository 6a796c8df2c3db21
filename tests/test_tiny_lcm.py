"""How the tiny model is distilled, and what its shipped LCM-LoRA draws."""

import json
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_model import SMALL_UNET, random_parts, save_random_model

from sdlearn.checkpoint.load import load, load_unet, save
from sdlearn.cli import main
from sdlearn.lcm import levels_at
from sdlearn.lora import load_lora, merge
from sdlearn.pipeline import StableDiffusion
from sdlearn.tiny import consistency
from sdlearn.tiny.consistency import SCALE, ConsistencyTask, hearing, make_task
from sdlearn.tiny.evaluate import draw, fresh_scenes, judged, share
from sdlearn.tiny.finder import fits
from sdlearn.tiny.judge import load_judge
from sdlearn.tiny.lora import english, unicorn_scene
from sdlearn.tiny.recipe import SCHEDULE
from sdlearn.tiny.tasks import to_tensor

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
LCM = TINY / "lora" / "lcm.safetensors"


class Exact(torch.nn.Module):
    """Numbers of mean .4 and deviation .5: an answer that is known, of the mean of all ends, or of the end itself."""

    def __init__(self, end=None):
        super().__init__()
        self.end, self.config, self.calls = end, SMALL_UNET, []

    def forward(self, xt, t, context):
        self.calls.append((t.clone(), context.clone()))
        level = levels_at(SCHEDULE, t)
        width = torch.hypot(0.5 * level.alpha, level.sigma)
        if self.end is None:
            x0 = 0.4 + level.alpha * 0.25 / width**2 * (xt - 0.4 * level.alpha)
        else:  # aims so that the line leads to the end of its segment
            end = levels_at(SCHEDULE, self.end(t))
            there = 0.4 * end.alpha + torch.hypot(0.5 * end.alpha, end.sigma) / width * (xt - 0.4 * level.alpha)
            part = end.sigma / level.sigma
            x0 = (there - part * xt) / (end.alpha - part * level.alpha)
        return (xt - level.alpha * x0) / level.sigma


def encode(captions):
    """A context that only says whether there are words."""
    return torch.tensor([bool(text) for text in captions]).float().view(-1, 1, 1)


def numbers(task, count=64, seed=0):
    """A batch, its latents from the cloud of numbers."""
    return task.examples([random.Random(f"{seed} {i}") for i in range(count)])


def cloud(count=256):
    return 0.4 + 0.5 * torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))


# --- what is learned
@pytest.mark.parametrize("segments", [4, 2, 1])
def test_who_sees_the_ends_has_nothing_to_learn(segments):
    """Where the teacher's steps are short, they leave the line by nothing; a plain network disagrees with itself."""
    losses = {}
    for name, student in {
        "exact": Exact(partial(consistency.segment_end, segments=segments)),
        "plain": Exact(),
    }.items():
        task = ConsistencyTask(student, Exact(), encode, cloud(), segments, skip=5)
        losses[name] = task(numbers(task))["loss"].item()
    assert losses["exact"] < 1e-6 < losses["plain"] / 300


def test_students_teach_students():
    """The second teacher goes to the end of one of its own segments; an exact one leaves nothing to learn."""
    fine, coarse = (partial(consistency.segment_end, segments=n) for n in (4, 2))
    task = ConsistencyTask(Exact(coarse), Exact(fine), encode, cloud(), segments=2)
    assert task(numbers(task))["loss"] < 1e-4
    task = ConsistencyTask(Exact(), Exact(fine), encode, cloud(), segments=2)
    assert task(numbers(task))["loss"] > 0.01


def test_only_the_student_gets_gradients_and_only_the_first_teacher_is_guided():
    class Learning(Exact):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, *inputs):
            return self.weight * super().forward(*inputs)

    for skip, calls in ((50, [1, 0]), (0, [1])):
        student, teacher = Learning(), Learning()
        task = ConsistencyTask(student, teacher, encode, cloud(), 4, skip)
        task(numbers(task, 8))["loss"].backward()
        assert student.weight.grad is not None and teacher.weight.grad is None
        assert [context.mean().item() for _, context in teacher.calls] == calls  # with words, then without
        assert all(context.mean() == 1 for _, context in student.calls) and len(student.calls) == 2


def test_guidance_is_that_of_chapter_10():
    """One step of the guided teacher is one step of DDIM with that scale."""

    class Worded(Exact):
        def forward(self, xt, t, context):
            return super().forward(xt, t, context) + 0.1 * context.view(-1, 1, 1, 1)

    task = ConsistencyTask(Exact(), Worded(), encode, cloud(), 4, 50)
    batch = numbers(task, 4)
    x0 = task.guided(batch["xt"], batch["t"], batch["context"], batch["scale"])
    assert batch["scale"].tolist() == [SCALE] * 4
    level = levels_at(SCHEDULE, batch["t"])
    eps = Exact()(batch["xt"], batch["t"], batch["context"]) + 0.1 * SCALE
    assert torch.allclose(x0, (batch["xt"] - level.sigma * eps) / level.alpha, rtol=1e-3, atol=1e-3)


def test_examples_begin_in_noise_as_drawing_does():
    task = ConsistencyTask(Exact(), Exact(), encode, torch.full((8, 4, 4, 4), 1000.0), 1)
    batch = numbers(task, 200)
    pure = batch["t"] == 999
    assert 0.2 < pure.float().mean() < 0.4 and batch["t"].min() >= 1
    assert batch["xt"][pure].abs().max() < 6 and batch["xt"][~pure].mean() > 60
    again = numbers(task, 200)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_a_whole_model_is_told_and_begins_as_it_was():
    torch.manual_seed(0)
    plain = random_parts()[0].networks["unet"]
    told = hearing(plain, 16)
    x, t, context = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.randn(2, 77, 32)
    assert torch.equal(told(x, t, context, guidance=torch.randn(2, 16)), plain(x, t, context))
    task = ConsistencyTask(told, plain, lambda texts: torch.zeros(len(texts), 77, 32), cloud(8), 4, 50, (2.0, 10.0))
    batch = numbers(task, 8)
    assert batch["scale"].min() < 4 and batch["scale"].max() > 8
    task(batch)["loss"].backward()
    assert told.time_embedding.cond_proj.weight.grad.abs().max() > 0


# --- how it is trained
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of random weights for pictures of 128 pixels."""
    folder = tmp_path_factory.mktemp("small")
    save_random_model(folder, size=128)
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(consistency, "BANK", 8)


def train(small, tmp_path, *words):
    return main(["train", "lcm", "--model", str(small), "--runs", str(tmp_path / "runs"), *map(str, words)])


@pytest.mark.slow
def test_training_and_going_on(small, tmp_path, capsys):
    to = tmp_path / "my.safetensors"
    assert train(small, tmp_path, "--to", to, "--steps", 2, 1, 1) == 0
    said = capsys.readouterr().err
    assert "lcm, segments: 4: learns in 2 steps" in said and f"--lora {to} --sampler lcm" in said
    sd = StableDiffusion.load(small)
    before = {name: x.clone() for name, x in sd.unet.state_dict().items()}
    merge(sd.networks(), (load_lora(to, sd.networks()), 1.0))
    changed = [name for name, x in sd.unet.state_dict().items() if not torch.equal(x, before[name])]
    assert len(changed) > 20 and not any("conv_in" in x or "conv_out" in x or "time_embedding" in x for x in changed)
    assert train(small, tmp_path, "--to", to, "--steps", 2, 1, 2) == 0
    said = capsys.readouterr().err
    assert "lcm, segments: 4: its 2 steps are done" in said and "segments: 1: goes on after step 1 of 2" in said


def test_a_run_belongs_to_the_weights_that_it_began_with(tmp_path, capsys, monkeypatch):
    """Else a second model would be given, without a word, the LoRA that was trained for the first."""
    done = []

    def trains(label, make, recipe, folder, *how):
        folder.mkdir(exist_ok=True)
        (folder / "state.pt").touch()
        done.append(label)

    monkeypatch.setattr(consistency, "train_task", trains)
    monkeypatch.setattr(consistency, "make_task", lambda *how: None)
    monkeypatch.setattr(consistency, "trained", lambda *how: SimpleNamespace(lora=None))
    monkeypatch.setattr(consistency, "save_lora", lambda to, lora: None)
    save_random_model(tmp_path / "a")
    parts = load(tmp_path / "a")
    parts.networks["unet"].conv_in.bias.data += 1
    save(tmp_path / "b", parts, torch.float32)
    assert train(tmp_path / "a", tmp_path) == 0 and train(tmp_path / "a", tmp_path) == 0 and len(done) == 6
    assert train(tmp_path / "b", tmp_path) == 2
    assert "lcm holds a run that differs in model: remove it" in capsys.readouterr().err and len(done) == 6


def test_figures_stand_beside_a_lora_of_ones_own(small, tmp_path, capsys, monkeypatch):
    """Those of the shipped one stay as they are. An odd number of scenes is one more."""
    monkeypatch.setattr(consistency, "train_task", lambda *how: None)
    monkeypatch.setattr(consistency, "make_task", lambda *how: None)
    monkeypatch.setattr(consistency, "trained", lambda *how: SimpleNamespace(lora=None))
    monkeypatch.setattr(consistency, "save_lora", lambda to, lora: None)
    monkeypatch.setattr(consistency, "measure", lambda *how: {"ddpm 50": {}})
    to = tmp_path / "my.safetensors"
    assert train(small, tmp_path, "--to", to, "--measure", 1) == 0
    assert json.loads(to.with_suffix(".json").read_text()) == {"ddpm 50": {}}
    assert not (small / "history").exists()


@pytest.mark.slow
def test_a_student_begins_where_its_teacher_ended(small, tmp_path):
    train(small, tmp_path, "--to", tmp_path / "a.safetensors", "--steps", 3, 1, 1)
    task = make_task(small, tmp_path / "runs" / "lcm", 2)
    first = make_task(small, tmp_path / "runs" / "lcm", 4)
    assert first.skip and not task.skip
    assert all(not pair.up.any() for pair in first.lora.pairs) and any(pair.up.any() for pair in task.lora.pairs)
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([600]), torch.randn(1, 77, 32)
    with torch.no_grad():
        student, teacher = task.unet(x, t, context), task.teacher(x, t, context)
    assert torch.allclose(student, teacher, atol=1e-4) and not torch.equal(student, first.teacher(x, t, context))


@pytest.mark.slow
def test_a_whole_model_is_written(small, tmp_path, capsys):
    to = tmp_path / "whole"
    assert train(small, tmp_path, "--whole", "--to", to, "--steps", 1, 1, 1) == 0
    assert f"--model {to} --sampler lcm" in capsys.readouterr().err
    assert load(to).networks["unet"].config.guidance_width == consistency.HEARS
    sd = StableDiffusion.load(to)
    assert len(sd.txt2img("a cat", steps=2, sampler="lcm", seed=1)) == 1
    assert load_unet(small).config.guidance_width == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "a.pt"], "--to is a.pt; give a name like my.safetensors"),
        (["--whole", "--to", "a", "--measure", "8"], "--measure is for a LoRA"),
        (["--whole"], "--to is None; give the name of a folder"),
        (["--whole", "--to", "a.safetensors"], "--to is a.safetensors; give the name of a folder"),
        (["--steps", "0", "1", "1", "--to", "a.safetensors"], "steps is 0"),
        (["--model", "nowhere", "--to", "a.safetensors"], "nowhere"),
    ],
)
def test_what_cannot_be_trained(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "lcm", "--runs", str(tmp_path / "runs"), *words]) == 2
    assert said in capsys.readouterr().err


def test_the_help_tells_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        main(["train", "lcm", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "into a LoRA that draws in 4, 2 or 1 steps" in said and "Needs a checkpoint" in said


# --- what the shipped one can do
needs_it = pytest.mark.skipif(not LCM.exists(), reason="no LCM-LoRA is shipped")


@needs_it
def test_the_shipped_lora_is_small():
    assert LCM.stat().st_size < 3_000_000


@needs_it
@pytest.mark.slow
def test_the_shipped_lora_draws_in_few_steps():
    """What was measured with 160 pictures stands in history/lcm.json; here fewer, and so a wider margin."""
    measured = json.loads((TINY / "history" / "lcm.json").read_text())
    sd, judge = StableDiffusion.load(TINY), load_judge(TINY)
    scenes = [x for n in (1, 2) for x in fresh_scenes(16, 7, "train", n)]

    def right(steps):
        pictures = draw(sd, scenes, steps, "lcm", 1.0, seed=3)
        return share(judged(judge, scenes, [to_tensor(np.array(x)) for x in pictures]), "all")

    plain = right(2)
    merge(sd.networks(), (load_lora(LCM, sd.networks()), 1.0))
    for steps in (4, 2, 1):
        assert right(steps) > measured[f"lcm {steps}"]["all"] - 0.15
    assert plain < measured["lcm 2"]["all"] - 0.3


@needs_it
@pytest.mark.slow
def test_the_shipped_lora_stacks_on_another():
    """Unicorns in four steps: of 24 alone 24 were measured, of 24 pairs 11 (12 with the unicorn's LoRA only)."""
    sd, rng = StableDiffusion.load(TINY), random.Random(5)
    loras = [(load_lora(LCM.parent / f"{name}.safetensors", sd.networks()), 1.0) for name in ("unicorn", "lcm")]
    scenes = [unicorn_scene(rng, pair=False, shown=False) for _ in range(8)]
    merge(sd.networks(), *loras)
    asked = [english(scene.sentence()) for scene in scenes]
    pictures = sd.txt2img(asked, steps=4, sampler="lcm", cfg_scale=1.0, seed=0)
    best = [fits(to_tensor(np.array(x)), scene, ("unicorn",)) for x, scene in zip(pictures, scenes, strict=True)]
    assert sum(found.name == "unicorn" for (found,) in best) >= 7
