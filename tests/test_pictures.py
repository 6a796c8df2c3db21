"""Picture files of every kind, damaged and hostile ones, and the settings that PNGs carry."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from sdlearn.pictures import describe, open_image, read_parameters, save_png, to_image, to_tensor

RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))


def kinds():
    """name -> a picture that shows RAMP, and how it is saved."""
    deep = RAMP.astype(np.uint16) * 257
    return {
        "rgb.png": Image.fromarray(RAMP).convert("RGB"),
        "palette.png": Image.fromarray(RAMP).convert("P"),
        "sixteen.png": Image.fromarray(deep),
        "sixteen.tiff": Image.fromarray(deep),
        "int.tiff": Image.fromarray(deep.astype(np.int32)),
        "float.tiff": Image.fromarray(RAMP.astype(np.float32) / 255),
        "cmyk.jpg": Image.fromarray(RAMP).convert("CMYK"),
        "alpha.webp": Image.fromarray(RAMP).convert("RGBA"),
    }


@pytest.mark.parametrize("name", kinds())
def test_every_kind_of_picture_becomes_the_same_tensor(tmp_path, name):
    kinds()[name].save(tmp_path / name, quality=95)
    found = to_tensor(open_image(tmp_path / name), 32, 32)
    want = to_tensor(Image.fromarray(RAMP), 32, 32)
    assert found.shape == (1, 3, 32, 32) and found.dtype == torch.float32 and (found - want).abs().max() < 0.1


@pytest.mark.parametrize("name, mode", [("x.png", np.uint16), ("x.tiff", np.float32)])
def test_a_dark_picture_stays_dark(tmp_path, name, mode):
    dark = np.full((8, 8), 0.1 if mode is np.float32 else 6554, mode)  # a tenth of white in both
    Image.fromarray(dark).save(tmp_path / name)
    assert (to_tensor(open_image(tmp_path / name), 8, 8) + 0.8).abs().max() < 0.01


def test_floats_beyond_black_and_white_are_refused():
    for wrong in (255.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="0 .black. to 1"):
            to_tensor(Image.fromarray(np.full((8, 8), wrong, np.float32)), 8, 8)


def test_transparent_becomes_white(tmp_path):
    deep = Image.fromarray(np.full((8, 8), 1000, np.uint16))
    deep.save(tmp_path / "deep.png", transparency=1000)  # this shade is clear
    half = Image.fromarray(np.where(np.arange(64).reshape(8, 8) < 32, 1000, 0).astype(np.uint16))
    half.save(tmp_path / "half.png", transparency=1000)
    for image in (Image.new("LA", (8, 8), (0, 0)), open_image(tmp_path / "deep.png")):
        assert (to_tensor(image, 8, 8) == 1).all()
    found = to_tensor(open_image(tmp_path / "half.png"), 8, 8)
    assert (found[..., :4, :] == 1).all() and (found[..., 4:, :] == -1).all()


def test_a_turned_photo_is_put_upright_once(tmp_path):
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 32, 32))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes up
    image.save(tmp_path / "photo.png", exif=exif)
    tensor = to_tensor(open_image(tmp_path / "photo.png"), 32, 64)
    assert tensor[0, :, :28].max() < -0.9 and tensor[0, :, 36:].min() > 0.9


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.jpg"])
@pytest.mark.parametrize(
    "exif", [b"garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9]
)
def test_garbage_for_exif_is_left_alone(tmp_path, name, exif):
    Image.new("RGB", (8, 4), "red").save(tmp_path / name, exif=exif)
    image = open_image(tmp_path / name)
    assert image.size == (8, 4) and to_tensor(image, 8, 8).shape == (1, 3, 8, 8)


def test_no_program_is_started(tmp_path, monkeypatch):
    """An EPS that is called .png would make Pillow call Ghostscript."""
    import subprocess

    from PIL import EpsImagePlugin

    started = []

    def start(*args, **kwargs):
        started.append(args)
        raise OSError("no program here")

    for module, name in ((subprocess, "Popen"), (os, "system"), (EpsImagePlugin, "Ghostscript")):
        monkeypatch.setattr(module, name, start)
    header = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "e.png").write_text(header)
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        open_image(tmp_path / "e.png")
    assert not started


def test_damaged_files_are_one_sentence(tmp_path):
    image, refused = Image.effect_noise((64, 64), 80), 0
    for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp", "ppm", "avif", "blp"):
        path = tmp_path / f"x.{kind}"
        try:
            (image.convert("P") if kind == "blp" else image).save(path)
        except (KeyError, ValueError, OSError):  # this Pillow cannot write it
            continue
        whole = path.read_bytes()
        for spoiled in (whole[: len(whole) // 2], whole[:20], whole[:12] + b"\xff" * (len(whole) - 12), b""):
            path.write_bytes(spoiled)
            try:
                to_tensor(open_image(path), 8, 8)
            except ValueError as error:
                assert "cannot be read as a picture" in str(error) and "\n" not in str(error)
                refused += 1
    assert refused > 20


@pytest.mark.parametrize("name, words", [("pipe", "pipe or a device"), ("/dev/zero", "pipe or a device"),
                                         (".", "is a folder"), ("nowhere.png", "there is no picture")])  # fmt: skip
def test_what_is_no_plain_file_is_not_waited_for(tmp_path, name, words):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=words):
        open_image(tmp_path / name)


def test_sizes_are_looked_at_before_pixels(tmp_path):
    Image.new("1", (50_000, 1)).save(tmp_path / "wide.png")
    Image.new("1", (16_000, 16_000)).save(tmp_path / "bomb.png")
    for name, words in (("wide.png", "50000x1"), ("bomb.png", "cannot be read")):
        with pytest.raises(ValueError, match=words):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match="20000x1"):
        to_tensor(Image.new("1", (20_000, 1)), 8, 8)


def test_not_a_number_is_told():
    with pytest.raises(ValueError, match="float32"):
        to_image(torch.full((3, 8, 8), float("nan")))


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40).filter(
    lambda text: "Negative prompt: " not in text
)


@settings(max_examples=40, deadline=None)
@given(words, words, st.sampled_from(["tiny", 'SD, v1.5: "pruned"', "C:\\models\\x", "model:a"]))
def test_settings_come_back_from_a_png(tmp_path_factory, prompt, negative, model):
    path = tmp_path_factory.getbasetemp() / "settings.png"
    said = {"Steps": 50, "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": 7.5, "Model": model}
    save_png(Image.new("RGB", (4, 4)), path, describe(prompt, negative, said))
    found = read_parameters(path)
    assert found == {"prompt": prompt, "negative_prompt": negative} | {name: str(x) for name, x in said.items()}


@pytest.mark.parametrize(
    "text, found",
    [
        ("", {}),
        ("a cat, no settings", {"prompt": "a cat, no settings", "negative_prompt": ""}),
        ("two\nlines", {"prompt": "two\nlines", "negative_prompt": ""}),
        ("note: this, is no: setting", {"prompt": "note: this, is no: setting", "negative_prompt": ""}),
        (
            'a\nNegative prompt: b\nSteps: 20, Model path: "C:\\models\\x", Seed: 1',
            {"prompt": "a", "negative_prompt": "b", "Steps": "20", "Model path": "C:\\models\\x", "Seed": "1"},
        ),
        (
            'Negative prompt: b\nSteps: 20, Sampler: DPM++ 2M, Lora hashes: "x: 1, y: 2"',
            {"prompt": "", "negative_prompt": "b", "Steps": "20", "Sampler": "DPM++ 2M", "Lora hashes": "x: 1, y: 2"},
        ),
        (
            'a\nSteps: 1, A: "open, Seed: 2, C: 3',
            {"prompt": "a", "negative_prompt": "", "Steps": "1", "A": "open", "Seed": "2", "C": "3"},
        ),  # fmt: skip
    ],
)
def test_what_other_programs_write_is_read(tmp_path, text, found):
    info = PngInfo()
    if text:
        info.add_text("parameters", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    assert read_parameters(tmp_path / "x.png") == found


def test_only_png_and_only_text_is_read(tmp_path):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    Image.new("RGB", (4, 4)).save(tmp_path / "x.tiff", tiffinfo=info)
    assert read_parameters(tmp_path / "x.tiff") == {}
