"""The tiny model's twin that is told of crops: it begins as the tiny model, sees cut scenes, is saved and read."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_model import save_random_model
from repository import ROOT

from sdlearn.checkpoint.load import load
from sdlearn.cli import main
from sdlearn.pipeline import StableDiffusion
from sdlearn.request import Request
from sdlearn.sdxl import MicroConditioning
from sdlearn.tiny import crops
from sdlearn.tiny.difference import FILE, save_difference
from sdlearn.tiny.evaluate import fresh_scenes
from sdlearn.tiny.scenes import BACKGROUNDS, SIZE
from sdlearn.tiny.tasks import numbered_scene, to_tensor

BASE = ROOT / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the latents of eight cut scenes are."""
    folder = tmp_path_factory.mktemp("runs")
    crops.cut_latents(crops.load_vae(BASE), 8, folder / "latents.pt")
    return folder


def dice(count):
    return [random.Random(i) for i in range(count)]


def test_a_cut_picture():
    picture = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    cut = crops.cropped(picture, 1, 2, (9, 9, 9))
    assert np.array_equal(cut[:2, :2], picture[1:, 2:]) and (cut[2] == 9).all() and (cut[:, 2:] == 9).all()
    assert np.array_equal(crops.cropped(picture, 0, 0, 0), picture)


def test_an_edge_is_touched_where_a_thing_is_cut():
    scenes = [numbered_scene(n) for n in range(40)]
    assert not any(crops.touches_the_edge(scene.render()) for scene in scenes)
    cut = [crops.cropped(scene.render(), 0, scene.things[0].x, BACKGROUNDS[scene.background]) for scene in scenes]
    assert sum(map(crops.touches_the_edge, cut)) >= 36


def test_crops_are_sometimes_none_and_of_one_side():
    found = [crops.random_crop(rng) for rng in dice(400)]
    tops, lefts = ([cut for cut in side if cut] for side in zip(*found, strict=True))
    assert 50 < found.count((0, 0)) < 120 and len(tops) + len(lefts) + found.count((0, 0)) == 400
    assert min(len(tops), len(lefts)) > 110
    for cuts in (tops, lefts):
        assert min(cuts) >= crops.SMALLEST and max(cuts) <= crops.LARGEST and len(set(cuts)) > 30


@torch.no_grad()
def test_it_begins_as_the_tiny_model_and_hears_the_ids_after_one_step(runs):
    task = crops.make_task(BASE, runs)
    base, batch = load(BASE).networks["unet"], task.examples(dice(2))
    xt, t, context = batch["noise"], torch.tensor([900, 300]), task.text_encoder(batch["tokens"])
    told = {"pooled": torch.zeros(2, 0), "ids": batch["ids"]}
    torch.testing.assert_close(task.unet(xt, t, context, **told), base(xt, t, context), atol=1e-4, rtol=1e-4)
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(task.unet.parameters(), lr=1e-3)
        task(batch)["loss"].backward()
        optimizer.step()
    moved = [task.unet(xt, t, context, **told | {"ids": batch["ids"] + add}) for add in (0, 32)]
    assert (moved[0] - moved[1]).abs().max() > 1e-5


def test_examples(runs):
    task = crops.make_task(BASE, runs)
    batch = task.examples(dice(40))
    assert batch["latents"].shape == (40, 4, 16, 16) and batch["ids"].shape == (40, 6)
    untold = ~batch["ids"].any(dim=1)
    assert 2 < untold.sum() < 16 and batch["ids"][~untold][:, [0, 1, 4, 5]].eq(SIZE).all()
    told = (batch[name][~untold][:3].tolist() for name in ("number", "ids"))
    rows = zip(*told, batch["latents"][~untold][:3], strict=True)
    for number, (_, _, top, left, _, _), latents in rows:
        scene = numbered_scene(number)
        cut = crops.cropped(scene.render(), top, left, BACKGROUNDS[scene.background])
        with torch.no_grad():
            assert torch.allclose(task.vae.encode(to_tensor(cut)[None]).mean[0], latents, atol=1e-3)
    with torch.no_grad():
        assert 0 < task({name: x[:4] for name, x in batch.items()})["loss"] < 1


def test_it_is_saved_read_and_told(tmp_path, runs):
    unet = crops.make_task(BASE, runs).unet
    with torch.no_grad():
        unet.add_embedding.linear_2.weight += 0.1 * torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    save_difference(unet, crops.NEW, BASE, tmp_path)
    assert (tmp_path / FILE).stat().st_size < 3.5e6
    sd = crops.load_crops(BASE, tmp_path)
    assert "text_encoder_2" not in sd.parts and not sd.is_refiner() and sd.unet.config == unet.config
    xt, (cond, _) = torch.randn(1, 4, 16, 16), sd.told(Request("a cat", seed=0))
    cut = cond | {"ids": torch.tensor([[SIZE, SIZE, 0, 64, SIZE, SIZE]])}
    with torch.no_grad():
        mine, other = (sd.unet(xt, 500, **told) for told in (cond, cut))
        assert sd.set_up(Request("a cat", seed=0, extras=[crops.Untold()])).told[0]["ids"].eq(0).all()
        assert (mine - unet(xt, 500, **cond)).abs().max() < 0.05 * (mine - other).abs().max()
        sd.save(tmp_path / "whole", torch.float32)  # the whole model is a folder like any other
        again = StableDiffusion.load(tmp_path / "whole", "cpu", torch.float32)
        assert torch.allclose(again.unet(xt, 500, **again.told(Request("a cat", seed=0))[0]), mine, atol=1e-4)


def test_a_run_belongs_to_the_weights_that_it_began_with(tmp_path, capsys, monkeypatch):
    """Else the difference to one model would be written as that to another."""
    written, task = [], SimpleNamespace(unet=None, load_state_dict=lambda *how, **more: None)
    monkeypatch.setattr(crops, "train_task", lambda *how: (tmp_path / "crops/state.pt").touch())
    monkeypatch.setattr(crops, "make_task", lambda *how: task)
    monkeypatch.setattr(crops, "averaged_weights", lambda path: {})
    monkeypatch.setattr(crops, "save_difference", lambda *how: written.append(how))
    words = ["train", "crops", "--runs", str(tmp_path), "--to", str(tmp_path / "to"), "--model"]
    save_random_model(tmp_path / "other")
    assert main([*words, str(BASE)]) == main([*words, str(BASE)]) == 0 and len(written) == 2
    assert main([*words, str(tmp_path / "other")]) == 2 and len(written) == 2
    assert "crops holds a run that differs in model: remove" in capsys.readouterr().err


# --- what the shipped one can do
@pytest.mark.slow
def test_the_shipped_one_cuts_when_it_is_told_to():
    sd, sentences = crops.load_crops(BASE), [scene.sentence() for scene in fresh_scenes(8, 0, "train", 1)]
    cut = {}
    for crop in ((0, 0), (0, 64), (64, 0)):
        how = {"steps": 12, "sampler": "ddim", "cfg_scale": 5.0, "seed": 0, "extras": [MicroConditioning(crop=crop)]}
        cut[crop] = sum(map(crops.touches_the_edge, sd.txt2img(sentences, **how)))
    assert cut[0, 0] <= 2 and min(cut[0, 64], cut[64, 0]) >= 6
