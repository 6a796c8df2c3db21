"""A disk that gets full: what was there stays whole, one sentence says why, and the command can be repeated."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from toy_task import Toy  # noqa: E402

from sdlearn.cli import main  # noqa: E402
from sdlearn.tiny import recipe  # noqa: E402
from sdlearn.training import Recipe  # noqa: E402

TINY = Path(__file__).resolve().parent.parent.parent / "checkpoints" / "tiny"
MEGABYTE = 2**20

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real disk of 80 MB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be made here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def left(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def fill(folder: Path, room: int) -> Path:
    """Leave so much room."""
    filler = folder / "filler"
    with open(filler, "wb") as file:
        for _ in range((left(folder) - room) // MEGABYTE):
            file.write(bytes(MEGABYTE))
    return filler


def refused(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert "make room" in told[-1] and not any("Traceback" in line for line in told), "\n".join(told)
    return told[-1]


def test_begin_begins_all_stages_or_none(small_disk, capsys):
    runs = small_disk / "runs"
    filler = fill(small_disk, 30 * MEGABYTE)  # enough for some of the stages
    refused(capsys, "train", "begin", "--runs", runs, "--to", TINY)
    assert not list(runs.glob("*/state.pt")) and not list(runs.glob("*/.*.part"))
    assert left(small_disk) > 29 * MEGABYTE
    filler.unlink()
    refused(capsys, "train", "begin", "--runs", runs, "--to", TINY)  # 80 MB are not enough either


def test_export_leaves_the_checkpoint_as_it_was_and_can_be_repeated(small_disk, tmp_path, capsys):
    runs, folder = tmp_path / "runs", small_disk / "tiny"
    assert main(["train", "begin", "--runs", str(runs), "--to", str(TINY)]) == 0
    assert main(["train", "vae", "--runs", str(runs), "--steps", "1", "--to", str(TINY)]) == 0  # has more already
    latents = torch.randn(2048, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    torch.save(latents, runs / "latents.pt")  # else they are computed, for minutes
    filler = fill(small_disk, 25 * MEGABYTE)
    refused(capsys, "train", "export", "--runs", runs, "--to", folder)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    filler.unlink()
    assert main(["train", "export", "--runs", str(runs), "--to", str(folder)]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in folder.iterdir()} >= {"unet", "vae", "text_encoder", "clip", "judge", "history"}
    fill(small_disk, 2 * MEGABYTE)
    refused(capsys, "train", "export", "--runs", runs, "--to", folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (
        json.loads((folder / "history" / "unet.jsonl").read_text().splitlines()[-1])["step"]
        == recipe.STAGES["unet"].steps
    )


def test_training_stops_with_a_sentence_and_its_last_state(small_disk, monkeypatch, capsys):
    monkeypatch.setitem(recipe.MAKE, "vae", lambda runs: Toy(10_000))  # half a megabyte a state
    monkeypatch.setitem(recipe.STAGES, "vae", Recipe(steps=400, batch=2))
    monkeypatch.setattr(recipe, "SAVE_EVERY", 100)
    assert main(["train", "vae", "--runs", str(small_disk), "--steps", "100"]) == 0
    state = (small_disk / "vae" / "state.pt").read_bytes()
    fill(small_disk, 1)
    with open(small_disk / "rest", "wb") as file, pytest.raises(OSError):
        file.write(bytes(MEGABYTE))
    refused(capsys, "train", "vae", "--runs", small_disk)
    assert (small_disk / "vae" / "state.pt").read_bytes() == state
    assert not list((small_disk / "vae").glob(".*.part"))
