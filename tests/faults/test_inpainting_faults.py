"""Wrong masks on the command line: one sentence, exit code 2, nothing lost."""

import pytest
from PIL import Image, ImageDraw
from test_bad_input import model, refused  # noqa: F401


@pytest.fixture
def files(tmp_path):
    """A picture and masks, good and bad."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "picture.png")
    sizes = {"good": (32, 32), "wide": (64, 32), "thin": (32, 32)}
    for name, size in sizes.items():
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((3, 3, 5, 5) if name == "thin" else (0, 0, 15, 31), fill=255)
        mask.save(tmp_path / f"{name}.png")
    Image.new("L", (32, 32)).save(tmp_path / "empty.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "full.png")
    content = (tmp_path / "picture.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("no picture")


@pytest.mark.parametrize("words, sentence", [
    (["--mask", "empty.png"], "black all over"),
    (["--mask", "full.png"], "white all over"),
    (["--mask", "wide.png"], "64x32 pixels and the picture 32x32"),
    (["--mask", "thin.png"], "too thin"),
    (["--mask", "cut.png"], "cut.png cannot be read as a picture"),
    (["--mask", "text.png"], "text.png cannot be read as a picture"),
    (["--mask", "nowhere.png"], "no picture at nowhere.png"),
    (["--mask", "."], "."),
    ([], "--mask FILE, or --expand"),
    (["--mask", "good.png", "--expand", "left=8"], "one of the two"),
    (["--expand", "left"], "--expand is 'left'"),
    (["--expand", "left=0"], "to which side"),
    (["--expand", "left=99999"], "expand left is 99999"),
    (["--expand", "left=3"], "width is 35; give a multiple of 8"),
    (["--mask", "good.png", "--resample", "0"], "resample is 0"),
    (["--mask", "good.png", "--resample", "x"], "--resample"),
    (["--mask", "good.png", "--soft", "nan"], "soft is nan"),
    (["--mask", "good.png", "--strength", "0"], "strength is 0"),
    (["--mask", "good.png", "--strength", "nan"], "strength is nan"),
    (["--mask", "good.png", "--image", "cut.png"], "cut.png cannot be read"),
    (["--mask", "good.png", "--steps", "10", "--strength", "0.01"], "leaves no step"),
])  # fmt: skip
def test_masks(refused, model, files, words, sentence):  # noqa: F811
    image = [] if "--image" in words else ["--image", "picture.png"]
    assert sentence in refused("inpaint", "a cat", *image, *words, "--model", model)


def test_a_command_without_a_picture(refused, model):  # noqa: F811
    assert "-i/--image" in refused("inpaint", "a cat", "--mask", "m.png", "--model", model)
