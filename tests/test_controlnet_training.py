"""What a ControlNet learns from, and `sdlearn train controlnet` on a small random model."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import random_parts
from safetensors.torch import load_file

from sdlearn import cli
from sdlearn.checkpoint.load import save
from sdlearn.controlnet import ControlNet, edges
from sdlearn.tiny import controlnet as tiny
from sdlearn.tiny.evaluate import fresh_scenes
from sdlearn.tiny.scenes import Scene, Thing
from sdlearn.tiny.tasks import encode_scenes

PAIR = Scene((Thing("sun", None, 32, 64, 50), Thing("sunflower", None, 96, 64, 50)), "blue")


def test_boxes_follow_the_words():
    seen = set()
    for seed in range(12):
        caption, hint = tiny.boxes(PAIR, random.Random(seed))
        left, right = (tuple(int(x) for x in hint[:, 64, x]) for x in (32, 96))
        first = caption.split()[1]
        assert {"sun": left, "sunflower": right}[first] == (1, 0, 0)  # red is named first
        assert {left, right} == {(1, 0, 0), (0, 0, 1)}
        seen.add((first, " and " in caption))
    assert len(seen) == 4  # either first, with and without the relation


def test_outlines_often_stand_alone():
    told = [tiny.HINTS["edges"](PAIR, random.Random(seed)) for seed in range(40)]
    assert 10 < sum(caption == "" for caption, _ in told) < 30
    assert all(torch.equal(hint, told[0][1]) for _, hint in told)


def test_awake():
    torch.manual_seed(0)
    pyramid = ControlNet.of(random_parts()[0].networks["unet"], (8, 16, 16, 32)).hint
    hints = torch.stack([tiny.to_hint(edges(scene.image())) for scene in fresh_scenes(4, 0)])

    def spreads() -> list[tuple[float, float]]:
        """How much each answer varies, in all and from place to place."""
        found, x = [], hints
        for conv in (pyramid.conv_in, *pyramid.blocks):
            x = conv(x)
            found.append((x.std().item(), x.std(dim=(2, 3)).mean().item()))
            x = torch.nn.functional.silu(x)
        return found

    with torch.no_grad():
        assert spreads()[-1][1] < 0.02
        tiny.wake(pyramid, hints)
        assert [whole for whole, _ in spreads()] == pytest.approx([1] * 7, rel=1e-3)
        assert min(places for _, places in spreads()) > 0.3
    assert not pyramid.conv_out.weight.any()


def test_how_well_outlines_are_followed():
    picture = PAIR.image()
    hint = edges(picture)
    assert tiny.followed(picture, hint) == (1, 1)
    assert tiny.followed(Image.new("RGB", picture.size), hint)[0] == 0
    half = Image.new("RGB", picture.size, "white")
    half.paste(picture.crop((0, 0, 64, 128)))
    recall, precision = tiny.followed(half, hint)
    assert 0.3 < recall < 0.7 and precision > 0.7
    moved = Image.fromarray(np.roll(np.array(picture), 2, axis=1))
    assert tiny.followed(moved, hint)[0] > 0.95 > tiny.followed(Image.fromarray(np.roll(picture, 9, 1)), hint)[0]


@pytest.fixture(scope="module")
def parts():
    return random_parts(size=128)[0]


def test_only_the_copy_learns(parts):
    latents = encode_scenes(parts.networks["vae"], range(4)).float()
    net = ControlNet.of(parts.networks["unet"], (4, 8, 8, 8))
    shown = [tiny.scene_shown(scene, "edges") for scene in fresh_scenes(2, 0)]
    told = lambda n, rng: tiny.HINTS["edges"](PAIR, rng)  # noqa: E731
    task = tiny.ControlTask(net, parts, latents, told, shown)
    learned = {name for name, p in task.named_parameters() if p.requires_grad}
    assert learned == {f"net.{name}" for name, _ in net.named_parameters()}
    batch = task.examples([random.Random(i) for i in range(4)])
    losses = task(batch)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"]) and net.zero_middle.weight.grad.any()
    again = task.examples([random.Random(i) for i in range(4)])
    assert all(torch.equal(x, again[name]) for name, x in batch.items())
    assert task.preview(steps=2).shape == (2, 3, 128, 128)


@pytest.fixture
def run(parts, tmp_path, monkeypatch):
    """Train for two steps of two pictures."""
    save(tmp_path / "model", parts, torch.float32)
    monkeypatch.setattr(tiny, "RECIPE", replace(tiny.RECIPE, batch=2, steps=2))
    monkeypatch.setattr(tiny, "SCENES", 4)
    monkeypatch.setattr(tiny, "PREVIEW_EVERY", 2)
    monkeypatch.chdir(tmp_path)

    def go(*words: str) -> int:
        return cli.main(["train", "controlnet", "--model", "model", "--precision", "no", "--threads", "1", *words])

    return go


@pytest.mark.slow
def test_trained_from_the_command_line(run, tmp_path, capsys):
    assert run("--hint", "layout", "--to", "net", "--curve", "curve.jsonl") == 0
    net = ControlNet.load("net")
    assert any(x.any() for name, x in net.state_dict().items() if name.startswith("zero"))
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "recall" in row] == [2]
    before = load_file(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    assert run("--hint", "layout", "--to", "again") == 0  # its steps are done: only saved
    after = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert "its 2 steps are done" in capsys.readouterr().err


@pytest.mark.slow
def test_trained_on_own_pictures(run, tmp_path):
    for i, scene in enumerate(fresh_scenes(3, 0)):
        scene.image().resize((150 + i, 140)).save(tmp_path / f"mine{i}.png")
        (tmp_path / f"mine{i}.txt").write_text(scene.sentence())
    assert run("--hint", "scribble", "--pictures", ".", "--to", "net") == 0
    assert ControlNet.load("net").config.hint_channels == (16, 32, 64, 128)


def test_what_cannot_be_trained(run, tmp_path, capsys, monkeypatch):
    assert run("--entrance", "unshuffle", "--to", "net") == 2
    assert "an unshuffled hint has no file format: leave --to out" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("--pictures", "empty", "--to", "net") == 2
    assert "empty holds no pictures" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the scenes have 128 pixels a side, but the model draws 32x32"):
        tiny.scenes_lesson(random_parts(size=32)[0], "edges", tmp_path)
