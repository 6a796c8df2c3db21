"""The table of the chapters: every notebook has a row, and all that lists the chapters follows from it."""

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import journey  # noqa: E402


def test_every_notebook_has_a_row_and_rows_are_in_order():
    files = [chapter.file for chapter in journey.CHAPTERS]
    assert files == sorted(path.stem for path in (ROOT / "book").glob("[0-9][0-9]_*.ipynb"))


def test_what_follows_from_the_table_is_up_to_date():
    assert [path.name for path, text in journey.texts().items() if path.read_text("utf-8") != text] == []


def test_every_stage_of_the_figure_has_a_chapter():
    lit = {chapter.stage for chapter in journey.CHAPTERS} - {""}
    assert lit == {name for name, *_ in journey.STAGES}


@pytest.fixture
def longer(tmp_path, monkeypatch):
    """The book with two more chapters, 14 and 15: a row and a notebook each."""
    for path in (ROOT / "book").glob("[0-9][0-9]_*.ipynb"):
        (tmp_path / path.name).touch()
    shutil.copy(ROOT / "book" / "chapters.toml", tmp_path)
    with open(tmp_path / "chapters.toml", "a") as file:
        for name, stage in (("98_inpainting", 'stage = "Sampler"'), ("99_lora", "")):
            (tmp_path / f"{name}.ipynb").touch()
            file.write(f'[[chapter]]\nfile = "{name}"\npart = "V. Going further"\ntitle = "{name[3:]}"\n{stage}\n'
                       'maps = "a -> b"\nbuilds = "c"\nmodules = ["tiny.scenes", "vae"]\nminutes = 5\n')  # fmt: skip
    monkeypatch.setattr(journey, "CHAPTERS", journey.read_chapters(tmp_path))


def test_a_new_chapter_is_everywhere(longer):
    row = "| [98 inpainting](book/98_inpainting.ipynb) | a -> b | `tiny/scenes.py`, `vae.py` | 5 min |"
    assert row in journey.readme_table().splitlines()
    assert "| [99 lora](99_lora.ipynb) | c | 5 min |" in journey.index_table().splitlines()
    assert journey.contents().index("book/98_inpainting") < journey.contents().index("caption: Beside the chapters")
    found = {chapter.number: journey.journey(chapter) for chapter in journey.CHAPTERS}
    assert found["98"].count('fill="#d2612f"') == 1 and found["99"].count('fill="#d2612f"') == len(journey.STAGES)
    assert re.search(r">08[^<]*, 98<", found["98"])
    for plan, kind in ((journey.WIDE, "wide"), (journey.TALL, "tall")):
        drawing = journey.map_of(plan, kind)
        assert len(re.findall(r'<a href="', drawing)) == len(journey.CHAPTERS)
        width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', drawing).groups())
        places, _ = journey.places_of(plan)
        for x, y, wide in places.values():
            assert 0 <= x <= x + wide <= width and y + 44 <= height
        boxes = [places[chapter.number] for chapter in journey.CHAPTERS]
        assert len({box[:2] for box in boxes}) == len(boxes)


def test_a_page_without_its_marks_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("a page")
    with pytest.raises(SystemExit, match="page.md has no <!-- chapters -->"):
        journey.filled(tmp_path / "page.md", chapters="x")


def test_the_tree_in_readme_is_the_one_that_is_there():
    text = (ROOT / "README.md").read_text("utf-8")
    tree = re.search(r"```\n(book/ .*?)```", text, re.DOTALL)[1]
    top, told = "", set()
    for line in tree.splitlines():
        words = line[:24].split()
        names = [word for word in words if re.fullmatch(r"[\w./]+", word)]
        top = names[0] if not line.startswith(" ") else top
        for name in names if line.startswith(" ") else [""]:
            assert (ROOT / top / name).exists(), f"README's tree names {top}{name}"
            told.add(f"{top}{name}".rstrip("/"))
    modules = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "src" / "sdlearn").iterdir() if path.name[0] != "_"
    }
    assert {path for path in modules if not path.endswith("data")} == told & modules
