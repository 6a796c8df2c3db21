"""What may happen to a training run: it is killed, the disk is full, Ctrl-C, another recipe. Nothing may be lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from toy_task import Toy  # noqa: E402

from sdlearn.pipeline import pick_device  # noqa: E402
from sdlearn.tiny import recipe as tiny  # noqa: E402
from sdlearn.training import Recipe, averaged_weights, train  # noqa: E402

RECIPE = Recipe(steps=30, batch=2, lr=1e-2, warmup=2, ema=0.9)
ROOT = Path(__file__).parent.parent.parent
DEVICE = pick_device(None)


def python(code, *words, **more):
    """A Python process that knows sdlearn and the toy task."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)  # fmt: skip


KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from test_training_faults import RECIPE
from toy_task import Toy
from sdlearn.training import train
torch.set_num_threads(1)
train(Toy(), RECIPE, Path(sys.argv[1]) / "warm")  # all imports, once for all children
state, rng, steps, saved = Path(sys.argv[1]) / "state.pt", random.Random(0), [], 0
while not steps or steps[-1] < RECIPE.steps:
    child = os.fork()
    if child == 0:
        train(Toy(256), RECIPE, state.parent, save_every=1, log_every=1, report=lambda *_: time.sleep(0.05))
        os._exit(0)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if len(steps) < 6 and state.exists() and state.stat().st_mtime_ns != saved:  # it got further: now, or soon
            time.sleep(rng.uniform(0, 0.08))  # a step takes 0.05 s and a little more
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.001)
    saved = state.stat().st_mtime_ns
    steps.append(torch.load(state, weights_only=True)["step"])  # it is always whole
print(*steps)
"""


@pytest.mark.posix
@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(tmp_path):
    train(Toy(256), RECIPE, tmp_path / "unbroken", save_every=1000)
    process = python(KILLED_AGAIN_AND_AGAIN, tmp_path / "killed", cwd=Path(__file__).parent)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    steps = [int(word) for word in out.split()]  # after each life
    assert len(steps) > 2, "it was hardly ever interrupted: the test shows nothing"
    assert steps == sorted(steps) and steps[-1] == RECIPE.steps
    wanted = averaged_weights(tmp_path / "unbroken" / "state.pt")
    for name, value in averaged_weights(tmp_path / "killed" / "state.pt").items():
        assert torch.equal(value, wanted[name])


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from test_training_faults import RECIPE
from toy_task import Toy
from sdlearn.training import train
from dataclasses import replace
folder = Path(sys.argv[1])
train(Toy(256), replace(RECIPE, steps=2), folder, save_every=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that grows beyond the limit is then an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    train(Toy(256), RECIPE, folder, save_every=1)
except ValueError as error:
    print("stopped:", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no limit of file size")
def test_a_real_write_that_fails_midway_leaves_the_last_good_state(tmp_path):
    process = python(FULL_DISK, tmp_path, cwd=Path(__file__).parent)
    out, err = process.communicate(timeout=300)
    assert f"stopped: {tmp_path / 'state.pt'} cannot be written" in out, err
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    assert not list(tmp_path.glob(".*.part"))


ENDLESS = """
import sys
from pathlib import Path
import torch
from test_training_faults import RECIPE
from toy_task import Toy
from dataclasses import replace
from sdlearn import cli
from sdlearn.tiny import recipe as tiny
tiny.MAKE["vae"] = lambda runs: Toy()
tiny.STAGES["vae"] = replace(RECIPE, steps=10**6)
tiny.fastest_precision = lambda task: "no"
tiny.SAVE_EVERY = 1
sys.exit(cli.main(["train", "vae", "--runs", sys.argv[1]]))
"""


@pytest.mark.posix
@pytest.mark.slow
def test_ctrl_c_ends_the_command_cleanly(tmp_path):
    process = python(ENDLESS, tmp_path, cwd=Path(__file__).parent)
    state, patience = tmp_path / "vae" / "state.pt", time.monotonic() + 200
    while not state.exists():
        assert process.poll() is None and time.monotonic() < patience, process.communicate()
        time.sleep(0.05)
    time.sleep(random.uniform(0, 0.2))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "Traceback" not in err and err.rstrip().endswith("sdlearn: interrupted")
    assert (step := torch.load(state, weights_only=True)["step"]) >= 1
    assert f"vae: saved up to step {step:,} in {state}; the same command goes on from there" in err
    assert (
        f"vae: learns in 1,000,000 steps of 2 examples, on {DEVICE} in float32; state and log are in {state.parent}"
        in err
    )
    assert "loss=" in err and "step/s" in err
    assert not list(state.parent.glob(".*.part"))


def toy_stage(monkeypatch, **more):
    monkeypatch.setitem(tiny.MAKE, "vae", lambda runs: Toy())
    monkeypatch.setitem(tiny.STAGES, "vae", Recipe(**{"steps": 200, "batch": 2} | more))


def test_who_stops_before_anything_is_saved_is_told(tmp_path, monkeypatch, capsys):
    def interrupted(*words, **more):
        raise KeyboardInterrupt

    toy_stage(monkeypatch)
    monkeypatch.setattr(tiny, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.train_stage("vae", tmp_path, None, "no")
    assert "vae: nothing was saved yet; the same command begins anew" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_training_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    toy_stage(monkeypatch)

    def meanwhile(*words, **more):
        command = [sys.executable, "-c", SECOND, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "another program is at work in" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1

    monkeypatch.setattr(tiny, "train", meanwhile)
    tiny.train_stage("vae", tmp_path, None, "no")
    monkeypatch.undo()
    toy_stage(monkeypatch)  # and the lock is open again
    tiny.train_stage("vae", tmp_path, 2, "no")


SECOND = """
import sys
from sdlearn.cli import main
sys.exit(main(["train", "vae", "--precision", "no", "--runs", sys.argv[1]]))
"""


def test_the_log_tells_every_step_once_after_a_kill(tmp_path, monkeypatch, capsys):
    toy_stage(monkeypatch)
    tiny.train_stage("vae", tmp_path, 100, "no")
    log = tmp_path / "vae" / "log.jsonl"
    with open(log, "a") as file:  # it went on to step 150, saved nothing, and was killed while it wrote
        file.write('{"step": 150, "loss": 1.0}\n{"step": 200, "lo')
    tiny.train_stage("vae", tmp_path, 200, "auto")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [50, 100, 150, 200]
    assert '"loss": 1.0,' not in log.read_text()
    assert "vae: goes on after step 100 of 200 steps of 2 examples" in capsys.readouterr().err
    tiny.train_stage("vae", tmp_path, None, "auto")
    assert "vae: its 200 steps are done" in capsys.readouterr().err


def test_slow_steps_are_saved_by_the_clock(tmp_path):
    path, seen = tmp_path / "state.pt", []

    def tick(step, losses):
        seen.append(torch.load(path, weights_only=True)["step"] if path.exists() else 0)

    train(Toy(), replace(RECIPE, steps=3), tmp_path, save_every=1000, save_minutes=0, tick=tick)
    assert seen == [0, 1, 2]


def test_another_recipe_is_refused_in_one_sentence(tmp_path):
    train(Toy(), replace(RECIPE, steps=2), tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError) as caught:
        train(Toy(), replace(RECIPE, lr=0.5, batch=4), tmp_path)
    says = str(caught.value)
    assert "\n" not in says and "made with another batch, lr" in says
    assert "use the same recipe or another folder" in says
    assert (tmp_path / "state.pt").read_bytes() == before


def test_more_steps_or_a_cooldown_may_be_added_to_a_run(tmp_path):
    train(Toy(), replace(RECIPE, steps=2), tmp_path)
    train(Toy(), replace(RECIPE, steps=4, cooldown=2), tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4


def test_a_state_of_another_network_is_refused_in_one_sentence(tmp_path):
    train(Toy(8), replace(RECIPE, steps=2), tmp_path)
    with pytest.raises(ValueError, match="was made by another network") as caught:
        train(Toy(16), replace(RECIPE, steps=4), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn"])
def test_a_damaged_state_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a readable training state") as caught:
        train(Toy(), RECIPE, tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "state.pt").read_bytes() == content
