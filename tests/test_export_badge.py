"""The built page shows a badge in place of a code cell's `#|` lines."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CELLS = (
    "#| default_exp vae",
    "#| export\nimport torch",
    "#| export blocks\nclass Block:\n    pass",
    "x = '#| not a directive'",
    "#| export\ndef f(x):\n    return x",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    pytest.importorskip("myst_nb")
    from sphinx.cmd.build import build_main

    source = tmp_path_factory.mktemp("book")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    nbformat.write(notebook, source / "index.ipynb")
    (source / "conf.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        "extensions = ['myst_nb', 'export_badge']; nb_execution_mode = 'off'\n"
    )
    assert build_main(["-q", "-W", "-b", "html", str(source), str(source / "html")]) == 0
    return (source / "html" / "index.html").read_text(encoding="utf-8")


def test_each_exported_cell_has_its_badge(page):
    assert re.findall(r'class="export-badge">→ ([^<]*)<', page) == [
        "src/sdlearn/vae.py",
        "src/sdlearn/blocks.py",
        "src/sdlearn/vae.py",
    ]


def test_directives_are_hidden_and_code_is_not(page):
    assert page.count("#|") == 1 and "not a directive" in page
    assert "default_exp" not in page
    boxes = [page.count(f'<div class="{name} docutils') for name in ("cell", "cell_input")]
    assert boxes == [4, 4], "a cell of directives alone leaves no empty box"
    assert "Block" in page
