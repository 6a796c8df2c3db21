"""`make lab`: a reader's own copy of the book, which is never overwritten."""

import json

import nbformat
import pytest
from nbformat.sign import NotebookNotary
from repository import tool

LAB = tool("lab")


@pytest.fixture
def book(tmp_path):
    folder = tmp_path / "book"
    (folder / "_static").mkdir(parents=True)
    (folder / "_static" / "map.svg").write_text("<svg/>")
    write(folder / "05_vae.ipynb", "first")
    (folder / "glossary.md").write_text("words")
    return folder


def write(path, text: str) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), path)


def said(path) -> str:
    return json.loads(path.read_text("utf-8"))["cells"][0]["source"][0]


def test_what_a_reader_wrote_stays(book, tmp_path):
    mine = tmp_path / "my"
    assert LAB.copy(book, mine, []) == []
    assert (mine / "_static" / "map.svg").is_file() and (mine / "glossary.md").is_file()
    assert NotebookNotary().check_signature(nbformat.read(mine / "05_vae.ipynb", 4)), "trusted, so that figures move"
    write(book / "05_vae.ipynb", "second")
    assert LAB.copy(book, mine, []) == [] and said(mine / "05_vae.ipynb") == "second", "an unchanged copy follows"
    write(mine / "05_vae.ipynb", "my own")
    assert LAB.copy(book, mine, []) == [], "nothing newer, nothing to say"
    write(book / "05_vae.ipynb", "third")
    (told,) = LAB.copy(book, mine, [])
    assert "make lab FRESH=05" in told and said(mine / "05_vae.ipynb") == "my own"
    (told,) = LAB.copy(book, mine, ["05"])
    assert "05_vae.mine-1.ipynb" in told and said(mine / "05_vae.ipynb") == "third"
    assert said(mine / "05_vae.mine-1.ipynb") == "my own"
    write(mine / "05_vae.ipynb", "again")
    LAB.copy(book, mine, ["05"])
    assert said(mine / "05_vae.mine-2.ipynb") == "again" and said(mine / "05_vae.mine-1.ipynb") == "my own"


def test_a_path_is_found_from_every_folder_of_the_repository(tmp_path, monkeypatch):
    from sdlearn.book import from_top

    (tmp_path / "checkpoints" / "tiny").mkdir(parents=True)
    for folder in ("", "book", "my", "my/deeper"):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        assert from_top("checkpoints/tiny").resolve() == tmp_path / "checkpoints" / "tiny"
    with pytest.raises(ValueError, match="there is no checkpoints/none here or above"):
        from_top("checkpoints/none")
