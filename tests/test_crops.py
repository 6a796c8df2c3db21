"""The tiny model's twin that is told of crops: it begins as the tiny model, sees cut scenes, is saved and read."""

import random

import numpy as np
import pytest
import torch
from repository import ROOT

from sdlearn.checkpoint.load import Parts, load, save
from sdlearn.pipeline import StableDiffusion
from sdlearn.sdxl import MicroConditioning
from sdlearn.tiny import crops
from sdlearn.tiny.recipe import SCHEDULE
from sdlearn.tiny.scenes import BACKGROUNDS, SIZE
from sdlearn.tiny.tasks import numbered_scene

BASE = ROOT / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def task():
    return crops.make_task(BASE).eval()


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


def test_crops_are_often_none_and_never_too_large():
    found = [crops.random_crop(rng) for rng in dice(400)]
    assert 60 < found.count((0, 0)) < 140 and max(map(max, found)) <= crops.LARGEST and min(map(min, found)) == 0
    assert len({top for top, _ in found}) > 40


@torch.no_grad()
def test_it_begins_as_the_tiny_model_and_hears_the_ids_after_one_step():
    task = crops.make_task(BASE)
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


def test_examples(task):
    batch, blind = (crops.make_task(BASE, blind).examples(dice(8)) for blind in (False, True))
    assert batch["image"].shape == (8, 3, SIZE, SIZE) and batch["ids"].shape == (8, 6)
    assert torch.equal(batch["image"], blind["image"]) and torch.equal(batch["tokens"], blind["tokens"])
    assert batch["ids"][:, [0, 1, 4, 5]].eq(SIZE).all() and not blind["ids"][:, 2:4].any()
    for number, image, (_, _, top, left, _, _) in zip(
        batch["number"].tolist(), batch["image"], batch["ids"].tolist(), strict=True
    ):
        scene = numbered_scene(number)
        cut = crops.cropped(scene.render(), top, left, BACKGROUNDS[scene.background])
        assert np.array_equal(((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy(), cut)
    with torch.no_grad():
        assert 0 < task(batch)["loss"] < 1


def test_it_is_saved_read_and_told(tmp_path, task):
    parts = {"tokenizer": task.tokenizer, "text_encoder": task.text_encoder, "vae": task.vae, "unet": task.unet}
    save(tmp_path, Parts(parts, SCHEDULE, size=(SIZE, SIZE)))
    sd = StableDiffusion.load(tmp_path, "cpu", torch.float32)
    assert sd.unet.config == task.unet.config and "text_encoder_2" not in sd.parts and not sd.is_refiner()
    how = {"steps": 2, "sampler": "ddim", "seed": 0}
    tiny = StableDiffusion.load(BASE, "cpu", torch.float32).txt2img("a cat", **how)[0]
    mine = sd.txt2img("a cat", extras=[MicroConditioning(crop=(0, 64))], **how)[0]
    assert abs(np.asarray(tiny).astype(int) - np.asarray(mine)).max() <= 8  # it has learned nothing; saved in 16 bits
