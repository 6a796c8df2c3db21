"""What may happen to a training run: it is killed, the disk is full, Ctrl-C, another recipe. Nothing may be lost."""

import errno
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

from sdlearn.training import Recipe, averaged_weights, save_atomically, train  # noqa: E402

RECIPE = Recipe(steps=30, batch=2, lr=1e-2, warmup=2, ema=0.9)
ROOT = Path(__file__).parent.parent.parent


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


def test_a_full_disk_leaves_the_last_good_file_and_no_litter(tmp_path):
    path = tmp_path / "state.pt"
    save_atomically(lambda part: torch.save({"step": 1}, part), path)

    def breaks_off(part):
        with open(part, "wb") as file:
            file.write(b"half of a file")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_atomically(breaks_off, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["state.pt"]


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
except Exception as error:
    print("stopped:", type(error).__name__)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no limit of file size")
def test_a_real_write_that_fails_midway_leaves_the_last_good_state(tmp_path):
    process = python(FULL_DISK, tmp_path, cwd=Path(__file__).parent)
    out, err = process.communicate(timeout=300)
    assert "stopped:" in out, err
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    assert not list(tmp_path.glob(".*.part"))


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "state.pt"
    save_atomically(lambda part: part.write_text("old"), path)
    seen = []

    def write(part):
        part.write_text("new")
        seen.append((path.read_text(), part.parent == path.parent))

    save_atomically(write, path)
    assert seen == [("old", True)] and path.read_text() == "new"


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
tiny.train = lambda *args, train=tiny.train, **more: train(*args, **more, save_every=1, log_every=1)
sys.exit(cli.main(["train", "vae", "--runs", sys.argv[1]]))
"""


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
    assert torch.load(state, weights_only=True)["step"] >= 1
    assert not list(state.parent.glob(".*.part"))


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
