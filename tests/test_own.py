"""A folder of pictures and captions: what is read, and what is refused."""

import json

import pytest
from PIL import Image

from sdlearn.tiny.own import read_folder


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
