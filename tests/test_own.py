"""A folder of pictures and captions: what is read, and what is refused; what a run learned from."""

import json
import re
from dataclasses import replace

import pytest
import torch
from family import SIZES, shallow
from PIL import Image
from random_model import SMALL_UNET, SMALL_VAE
from torch import nn
from toy_task import Toy

from sdlearn.tiny.own import ABOUT, check_learner, mark_of, mark_of_pictures, only_again, read_folder
from sdlearn.unet import UNet
from sdlearn.vae import VAE


@pytest.fixture
def folder(tmp_path):
    for name, colour in {"b.png": "red", "a.jpg": "blue"}.items():
        Image.new("RGB", (20, 30), colour).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("not a picture")
    return tmp_path


def test_captions_beside_the_pictures(folder):
    (folder / "a.txt").write_text("\ufeffa blue\n thing \n", encoding="utf-8")
    (folder / "b.txt").write_text("a red thing")
    (picture, first), (_, second) = read_folder(folder)
    assert (first, second) == ("a blue thing", "a red thing")
    assert picture.size == (20, 30) and picture.getpixel((5, 5))[2] > 200


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_in_a_table(folder, name, key):
    rows = [{"file_name": "b.png", key: "a red thing", "more": 1}, {"file_name": "a.jpg", key: "blue"}]
    (folder / name).write_text("\n\n".join(map(json.dumps, rows)))
    assert [caption for _, caption in read_folder(folder)] == ["blue", "a red thing"]


def test_a_caption_beside_wins_and_a_prompt_fills_in(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "from the table"}')
    (folder / "a.txt").write_text("from beside")
    captions = [caption for _, caption in read_folder(folder, prompt="for the others")]
    assert captions == ["from beside", "for the others"]


def refused(folder, words):
    with pytest.raises(ValueError, match=words):
        read_folder(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    refused(folder, r"a\.jpg has no caption: write one into a\.txt")
    (folder / "a.txt").write_text(" \n")
    refused(folder, r"a\.jpg has no caption")
    (empty := tmp_path / "empty").mkdir()
    refused(empty, "holds no pictures")
    refused(tmp_path / "nowhere", "is no folder")
    refused(folder / "b.png", "is no folder")


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"file_name": "a.jpg"}', '{"text": "x"}', '{"file_name": 1, "text": 2}']
)
def test_a_line_of_another_form(folder, line):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n' + line)
    refused(folder, "metadata.jsonl, line 2, is not")


def test_a_caption_without_its_picture(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "x"}')
    refused(folder, "a caption for c.png, but no such picture")


def test_a_broken_picture(folder):
    (folder / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as a picture"):
        read_folder(folder, prompt="a thing")


# --- what a run learned from
def toy(shift=0.0):
    """A task with a layer that learns and one that does not."""
    task = Toy()
    task.below = nn.Linear(2, 2).requires_grad_(False)
    with torch.no_grad():
        task.below.weight.fill_(1 + shift)
        task.below.bias.zero_()
    return task


def test_a_run_goes_on_only_with_what_it_learned_from(tmp_path):
    only_again(toy, tmp_path, alpha=1.0, pictures="a")()
    only_again(toy, tmp_path, alpha=2.0, pictures="a")()  # nothing was learned yet
    (tmp_path / "state.pt").write_bytes(b"learned")
    before = (tmp_path / ABOUT).read_bytes()
    assert only_again(toy, tmp_path, alpha=2.0, pictures="a")().below.weight.mean() == 1
    other = {
        "differs in alpha:": only_again(toy, tmp_path, alpha=1.0, pictures="a"),
        "differs in alpha, pictures:": only_again(toy, tmp_path, alpha=1.0, pictures="b"),
        "differs in model:": only_again(lambda: toy(0.1), tmp_path, alpha=2.0, pictures="a"),
    }
    for words, make in other.items():
        with pytest.raises(ValueError, match=f"holds a run that {words} remove it, or give"):
            make()
    assert (tmp_path / ABOUT).read_bytes() == before
    (tmp_path / ABOUT).unlink()  # a run that does not say what it learned from
    with pytest.raises(ValueError, match="differs in alpha, model, pictures"):
        only_again(toy, tmp_path, alpha=2.0, pictures="a")()


def test_marks_see_every_layer_every_picture_and_every_word():
    task = toy()
    whole, frozen = mark_of(task), mark_of(task, frozen=True)
    with torch.no_grad():
        task.net[2].bias += 1
    assert mark_of(task) != whole and mark_of(task, frozen=True) == frozen == mark_of(toy(), frozen=True)
    assert mark_of(toy(0.1), frozen=True) != frozen
    pictures = [(Image.new("RGB", (4, 2), "red"), "a"), (Image.new("RGB", (4, 2), "blue"), "b")]
    marks = {mark_of_pictures(x) for x in (pictures, pictures[:1], pictures[::-1], [])}
    marks |= {mark_of_pictures([(Image.new("RGB", size, "red"), "a")]) for size in ((2, 4), (8, 1))}
    assert len(marks) == 6 and mark_of_pictures(list(pictures)) in marks


@pytest.mark.parametrize("kind", ["SDXL", "SDXL refiner", "nine channels", "SD 2", "SD 1"])
def test_which_models_can_be_taught(kind):
    unet = {"nine channels": replace(SMALL_UNET, in_channels=9), "SD 1": SMALL_UNET}.get(kind)
    unet = unet or shallow(SIZES[kind]).unet
    with torch.device("meta"):
        networks = {"unet": UNet(unet), "vae": VAE(SMALL_VAE)}
    if kind in ("SD 1", "SD 2"):
        return check_learner(networks)
    said = "U-Net takes 9 channels, for a mask or" if kind == "nine channels" else "is an SDXL, but sdlearn trains on"
    with pytest.raises(ValueError, match=re.escape(said)):
        check_learner(networks)
