"""The tiny model's inpainting twin: it begins as the base, learns a difference of low rank, and is measured fairly."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import save_random_model
from torch.nn.utils import parametrize

from sdlearn.checkpoint.load import load_unet
from sdlearn.cli import main
from sdlearn.inpaint import to_mask
from sdlearn.tiny import inpainting
from sdlearn.tiny.difference import FILE, layers, low_rank, save_difference
from sdlearn.tiny.inpainting import (
    NEW,
    InpaintTask,
    Swap,
    load_inpainting,
    random_mask,
    random_swap,
    seam,
    swaps,
    tried,
    widen,
)
from sdlearn.tiny.scenes import SIZE, parse, random_scene, split_of
from sdlearn.tiny.tasks import DenoiseTask, to_tensor
from sdlearn.training import generators


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_random_model(folder, size=SIZE)
    return folder


def questions(channels=9):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, 16, 16, generator=g), torch.tensor([500]), torch.randn(2, 77, 32, generator=g)


@torch.no_grad()
def test_a_widened_network_begins_as_the_base(base):
    narrow, (x, t, context) = load_unet(base), questions()
    wide = low_rank(widen(narrow), NEW)
    assert wide.config.in_channels == 9 and torch.equal(wide(x, t, context), narrow(x[:, :4], t, context))
    wide.conv_in.weight[:, 4:] += 1
    assert not torch.allclose(wide(x, t, context), narrow(x[:, :4], t, context), atol=0.1)


def test_only_the_first_convolution_and_a_change_of_low_rank_learn(base):
    unet = low_rank(widen(load_unet(base)), NEW, rank=3)
    learned = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert learned >= {"conv_in.weight", "conv_in.bias"}
    assert all(name.endswith((".up", ".down")) for name in learned - {"conv_in.weight", "conv_in.bias"})
    count = 0
    for _, layer in layers(unet, NEW):
        (change,) = layer.parametrizations["weight"]
        assert change.up.shape[1] == change.down.shape[0] == 3 and not change.up.any() and change.down.any()
        count += 1
    assert len(learned) == 2 + 2 * count and count > 20
    assert all(parametrize.is_parametrized(layer) for _, layer in layers(unet, NEW))


def shaken(base):
    """A twin that has learned something."""
    unet = low_rank(widen(load_unet(base)), NEW)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    return unet


@torch.no_grad()
def test_a_difference_is_saved_and_added_to_the_base(base, tmp_path):
    unet = shaken(base)
    save_difference(unet, NEW, base, tmp_path)
    assert (tmp_path / FILE).stat().st_size < 0.5 * (base / "unet").stat().st_size + 10**6
    sd, (x, t, context) = load_inpainting(base, tmp_path), questions()
    right, before = unet(x, t, context), load_unet(base)(x[:, :4], t, context)
    assert (sd.unet(x, t, context) - right).abs().max() < 0.02 * (right - before).abs().max()


@pytest.mark.parametrize("part, name", [
    ("unet", "conv_in.weight"),
    ("unet", "conv_out.bias"),
    ("vae", "encoder.conv_out.weight"),
    ("text_encoder", "final_layer_norm.weight"),
])  # fmt: skip
def test_a_difference_to_other_weights_is_refused(base, tmp_path, part, name):
    """Whichever network has learned on: all of them were there when the difference was made."""
    save_difference(shaken(base), NEW, base, tmp_path)
    sd = inpainting.StableDiffusion.load(base)
    sd.save(tmp_path / "moved", None)
    assert load_inpainting(tmp_path / "moved", tmp_path).unet.config.in_channels == 9  # the same in another place
    with torch.no_grad():
        sd.networks()[part].get_parameter(name).add_(0.1)
    sd.save(tmp_path / "other", None)
    with pytest.raises(ValueError, match="difference to other weights.*train it again"):
        load_inpainting(tmp_path / "other", tmp_path)


def test_masks_are_of_many_kinds():
    shares = []
    for i in range(60):
        rng = random.Random(i)
        mask = random_mask(random_scene(rng), rng)
        assert mask.shape == (1, SIZE, SIZE) and {*mask.unique().tolist()} <= {0.0, 1.0} and mask.any()
        shares.append(mask.mean().item())
    whole = np.mean(np.array(shares) == 1)
    assert 0.02 < whole < 0.25 and 0.25 < np.mean(shares) < 0.55 and min(shares) < 0.1


def test_at_step_0_its_loss_is_that_of_the_base(base, tmp_path, monkeypatch):
    monkeypatch.setattr(inpainting, "BANK", 4)
    task = inpainting.make_task(base, tmp_path)
    others = task.text_encoder, task.tokenizer, task.latents, task.schedule
    plain = DenoiseTask(load_unet(base), *others)
    batch = task.examples(generators(inpainting.RECIPE, 0)[:4])
    assert batch["image"].shape == (4, 3, SIZE, SIZE)
    assert not (batch["image"] * batch["mask"]).any()  # the hole is mid-gray
    mine, theirs = task(batch), plain(batch)
    assert torch.allclose(mine["loss"], theirs["loss"], rtol=1e-4)
    mine["loss"].backward()
    assert task.unet.conv_in.weight.grad[:, 4:].abs().max() > 0  # and the new channels begin to learn
    assert isinstance(task, InpaintTask) and all(p.grad is None for p in task.vae.parameters())


def test_a_swap_leaves_the_second_thing_alone():
    for swap in swaps(8):
        (old, other), (new, same) = swap.scene.things, swap.wanted.things
        assert same == other and new.name not in (old.name, other.name) and split_of(swap.wanted) == "train"
        before, after, mask = swap.scene.render(), swap.wanted.render(), np.asarray(swap.mask)
        assert (before[mask == 0] == after[mask == 0]).all()  # all that differs lies under the mask
        left, top, right, bottom = other.box
        assert not mask[max(top, 0) : bottom, max(left, 0) : right].any()
    assert random_swap(swap.scene, random.Random(1)) != random_swap(swap.scene, random.Random(2))


def test_a_seam_is_measured_along_the_edge():
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    image = torch.zeros(3, 8, 8)
    image[:, :, 4:] = 20 / 127.5
    assert abs(seam(image, mask) - 20) < 1e-4
    image[:, :, 6:] = 1  # not at the edge
    assert abs(seam(image, mask) - 20) < 1e-4


class Wizard:
    """Paints the wanted picture, or leaves the old one."""

    def __init__(self, swap, works):
        self.swap, self.works = swap, works

    def inpaint(self, prompt, image, mask, **how):
        assert prompt == self.swap.wanted.sentence()
        return [self.swap.wanted.image() if self.works else image]


@pytest.mark.parametrize("works", [True, False])
def test_exchanges_are_judged(works):
    from sdlearn.tiny.judge import load_judge

    scene = parse("a cat to the left of a red apple on a blue background")
    swap = Swap(scene, *(lambda x: (x.wanted, x.mask))(random_swap(scene, random.Random(0))))
    found = tried(Wizard(swap, works), load_judge(inpainting.BASE), [swap])
    assert found["new thing"] == found["all right"] == [float(works)]
    assert found["beside the mask unchanged"] == [1.0]
    assert found["seam"] == (found["seam, true"] if works else found["seam"])


@pytest.mark.slow
def test_training_and_its_help(base, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["train", "inpainting", "--help"])
    assert "minutes" in capsys.readouterr().out
    monkeypatch.setattr(inpainting, "BANK", 4)
    monkeypatch.setattr(inpainting, "RECIPE", inpainting.replace(inpainting.RECIPE, batch=2))
    words = ["--model", str(base), "--to", str(tmp_path / "to"), "--runs", str(tmp_path / "runs")]
    for steps in ("1", "2", "2"):  # begun, gone on, and nothing left to do
        assert main(["train", "inpainting", *words, "--steps", steps, "--precision", "no"]) == 0
    sd = inpainting.StableDiffusion.load(base)
    with torch.no_grad():
        sd.unet.conv_out.bias += 0.1
    sd.save(tmp_path / "moved", None)
    before = (tmp_path / "to" / FILE).read_bytes()
    moved = ["--model", str(tmp_path / "moved"), *words[2:], "--steps", "2", "--precision", "no"]
    assert main(["train", "inpainting", *moved]) == 2  # else the old difference would be stamped with the new base
    assert "differs in model" in capsys.readouterr().err and (tmp_path / "to" / FILE).read_bytes() == before
    image, mask = Image.new("RGB", (SIZE, SIZE), "red"), Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, 64, 128))
    sd = load_inpainting(base, tmp_path / "to")
    (drawn,) = sd.inpaint("a cat", image, mask, steps=1, seed=0)
    assert to_mask(mask, SIZE, SIZE).mean() == 0.5
    assert torch.equal(to_tensor(np.array(drawn))[:, :, 64:], to_tensor(np.array(image))[:, :, 64:])
