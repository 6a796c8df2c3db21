"""notebooks -> modules: round trip, determinism, two modules from one notebook, bad input."""

import ast
import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


exporter, checker = tool("export"), tool("check_notebooks")

VAE_CELLS = (
    '#| default_exp vae\n"""image <-> latents. Chapter 05.\n\nA backslash \\\\d stays.\n"""',
    "#| export\nimport torch, math\nfrom torch import nn, Tensor\nimport json",
    '#| export blocks\n"""map -> map. Chapter 05."""\nfrom __future__ import annotations\nfrom torch import nn',
    "import matplotlib\nprint('a lesson')",
    "#| export blocks\n@staticmethod\ndef helper(x): return x\nclass Block(nn.Module):\n    '''A block.'''",
    "#| export\n# Why this number.\nSCALE: float = 0.18215  # 1/std\n_TAU, PI = 2 * math.pi, math.pi",
    "#| export\nclass VAE(nn.Module):\n    def f(self, x: Tensor):\n        import os\n        return Block(x), os",
)


@pytest.fixture
def tree(tmp_path):
    """Writes notebooks, exports them; `tree({"05_vae": [cell, ...]})` -> (changed, errors, package folder)."""
    book, package = tmp_path / "book", tmp_path / "package"
    book.mkdir()
    package.mkdir()

    def build(notebooks: dict, **options):
        for name, cells in notebooks.items():
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
            nbformat.write(notebook, book / f"{name}.ipynb")
        return *exporter.export(book, package, **options), package

    return build


def test_one_notebook_makes_two_modules(tree):
    changed, errors, package = tree({"05_vae": VAE_CELLS})
    assert (sorted(changed), errors) == (["blocks.py", "vae.py"], [])
    vae = (package / "vae.py").read_text()
    assert vae == (
        '"""image <-> latents. Chapter 05.\n'
        "Exported from book/05_vae.ipynb by `make export`; edit it there.\n"
        '\nA backslash \\\\d stays.\n"""\n\n'
        "import math\n\nfrom torch import Tensor, nn\n\n"
        "from sdlearn.blocks import Block\n\n"
        "# Why this number.\nSCALE: float = 0.18215  # 1/std\n_TAU, PI = 2 * math.pi, math.pi\n\n\n"
        "class VAE(nn.Module):\n    def f(self, x: Tensor):\n        import os\n\n        return Block(x), os\n"
    )
    blocks = (package / "blocks.py").read_text()
    assert blocks.index("from __future__") < blocks.index("from torch") < blocks.index("@static")
    assert [node.name for node in ast.parse(blocks).body[3:]] == ["helper", "Block"]
    assert "lesson" not in vae + blocks and "json" not in vae


def test_a_class_told_in_pieces_is_one_class_in_the_module(tree):
    pieces = [
        '#| default_exp vae\n#| export\n"""a -> b."""\nONE = 1',
        "#| export\nclass VAE:\n    def f(self):\n        return ONE\n\nTWO = 2",
        "#| export\nclass VAE(VAE):\n    # why\n    @property\n    def g(self):\n        return self.f()",
    ]
    _, errors, package = tree({"05_vae": pieces})
    text = (package / "vae.py").read_text()
    (made,) = [x for x in ast.parse(text).body if isinstance(x, ast.ClassDef)]
    assert not errors and not made.bases and [member.name for member in made.body] == ["f", "g"]
    assert "    # why\n    @property\n" in text and text.index("class VAE") < text.index("TWO = 2")
    pieces[1] = "#| export\nTWO = 2"
    assert "no earlier cell begins" in tree({"05_vae": pieces})[1][0]


def test_what_a_cell_imports_goes_before_what_a_neighbour_is_called(tree):
    cells = [
        '#| default_exp vae\n#| export\n"""a -> b."""\nfrom os import path\n\nHERE = path',
        '#| export blocks\n"""b -> c."""\ndef path():\n    return 1',
    ]
    changed, errors, package = tree({"05_vae": cells})
    assert sorted(changed) == ["blocks.py", "vae.py"] and not errors
    assert "from os import path\n\nHERE = path" in (package / "vae.py").read_text()
    assert "sdlearn.blocks" not in (package / "vae.py").read_text()


def test_the_second_export_changes_nothing(tree):
    tree({"05_vae": VAE_CELLS})
    _, _, package = tree({})
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in package.iterdir()}
    assert tree({})[:2] == ([], [])
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in package.iterdir()} == before


def test_check_names_what_differs_and_writes_nothing(tree):
    changed, errors, package = tree({"05_vae": VAE_CELLS}, check=True)
    assert sorted(changed) == ["blocks.py", "vae.py"] and not errors and not list(package.iterdir())
    tree({})
    edited = (package / "vae.py").read_text() + "# edited"
    (package / "vae.py").write_text(edited)
    assert tree({}, check=True)[0] == ["vae.py"]
    assert (package / "vae.py").read_text() == edited


def test_a_module_may_stand_in_a_room(tree):
    changed, errors, package = tree({"04_a": ["#| default_exp tiny.scenes\n'''a -> b.'''\nONE = 1"]})
    assert (changed, errors) == (["tiny/scenes.py"], []) and "ONE = 1" in (package / "tiny" / "scenes.py").read_text()


def test_a_module_written_by_hand_is_not_overwritten(tree):
    _, _, package = tree({})
    (package / "cli.py").write_text("by hand")
    changed, errors, _ = tree({"05_a": ["#| default_exp cli\n'''a -> b.'''\nONE = 1"]})
    assert not changed and errors == ["05_a.ipynb: cli.py is written by hand; give the module another name"]


def test_two_notebooks_feed_one_module_in_book_order(tree):
    _, errors, package = tree(
        {
            "12_b": ["#| default_exp b\n'''b -> c.'''", "#| export a\nTWO = ONE + 1"],
            "11_a": ["#| default_exp a\n'''a -> b.'''\nONE = 1"],
        }
    )
    text = (package / "a.py").read_text()
    assert not errors and text.index("ONE = 1") < text.index("TWO = ONE + 1")
    assert "Exported from book/11_a.ipynb and book/12_b.ipynb by" in text


def test_a_later_chapter_may_add_to_a_table_of_its_module(tree):
    begin = ["#| default_exp samplers\n#| export\n'''a -> b.'''\nTABLE = {'a': 1}"]
    go_on = ["#| default_exp samplers\n#| export\nTABLE |= {'b': 2}"]
    _, errors, package = tree({"08_a": begin, "13_b": go_on})
    assert not errors
    exec((package / "samplers.py").read_text(), module := {})
    assert module["TABLE"] == {"a": 1, "b": 2}
    _, errors, _ = tree({"13_b": [go_on[0].replace("TABLE", "OTHER")]})
    assert errors == [
        "13_b.ipynb, cell-000: 'OTHER' is added to, but no cell before exports it; begin it with 'OTHER ='"
    ]


def test_a_module_that_lost_its_notebook_is_named(tree):
    _, _, package = tree({"05_vae": VAE_CELLS})
    (package / "old.py").write_text((package / "vae.py").read_text())
    assert tree({})[1] == ["old.py: no notebook exports it now; delete it"]


def test_only_the_named_notebook_is_written_and_others_may_be_broken(tree):
    changed, errors, package = tree({"05_vae": VAE_CELLS, "06_time": ["#| exprot\nx"]}, only=("05_vae.ipynb",))
    assert sorted(changed) == ["blocks.py", "vae.py"] and not errors


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["#| export\nx = 1"], "cell-000: no module is named"),
        (["#| default_exp vae\n'''a'''", "#| exprot\nx = 1"], "cell-001: '#| exprot' is not known"),
        (["#| default_exp vae\n'''a'''", "x = 1\n#| export"], "cell-001: a '#|' line stands below code"),
        (["#| default_exp vae\n'''a'''", "#| default_exp b\n'''b'''"], "a second '#| default_exp'"),
        (["#| default_exp a.b.c\n'''a'''"], "cannot be called 'a.b.c'"),
        (["#| default_exp vae\n'''a'''", "#| export ../up\nx = 1"], "cannot be called '../up'"),
        (["#| default_exp vae\n'''a'''", "#| export\nprint(1)"], "'print(1)' is no definition"),
        (["#| default_exp vae\n'''a'''", "#| export\n%matplotlib inline"], "line 1 is not plain Python"),
        (["#| default_exp vae\n'''a'''", "#| export\nimport os; x = 1"], "share the line 'import os; x = 1'"),
        (
            ["#| default_exp vae\n'''a'''", "#| export\nx = 1", "#| export\nx = 2"],
            "'x' is exported for the second time",
        ),
        (["#| default_exp vae\nx = 1"], "vae has no docstring"),
        (["#| default_exp vae\n'''a'''\ndef f():\n    return torch.ones(1)"], "Undefined name `torch`"),
    ],
)
def test_bad_input_gets_one_clear_sentence(tree, cells, words):
    changed, errors, package = tree({"05_vae": cells})
    assert not changed and not list(package.iterdir())
    assert len(errors) == 1 and words in errors[0] and "\n" not in errors[0]


def test_an_unreadable_notebook_is_named(tree, tmp_path):
    (tmp_path / "book" / "05_vae.ipynb").write_text("{")
    assert tree({})[1] == ["05_vae.ipynb is not a readable notebook (NotJSONError)"]


def good_notebook() -> nbformat.NotebookNode:
    """Two executed cells, as they should be."""
    cells = [
        nbformat.v4.new_markdown_cell("# 01 Title"),
        nbformat.v4.new_code_cell("1 + 1", execution_count=1, metadata={"tags": ["nbval-ignore-output"]}),
        nbformat.v4.new_code_cell("print('a')", execution_count=2),
    ]
    cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text="a\n")]
    return checker.normalise(nbformat.v4.new_notebook(cells=cells))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: None, None),
        (lambda c: c[2].update(execution_count=3), "cell-002 has execution count 3, not 2"),
        (lambda c: c[1].update(execution_count=None), "cell-001 has execution count None, not 1"),
        (lambda c: c[1].update(id="random"), "transient ids or metadata"),
        (lambda c: c[1].metadata.update(execution={"iopub": "now"}), "transient ids or metadata"),
        (lambda c: c[0].update(source="see /home/ann/x"), "cell-000 names a path of this machine, /home/ann"),
        (
            lambda c: c[2].outputs[0].update(text="/home/ann/y.py:3: warning"),
            "cell-002 prints a path of this machine, /home/ann",
        ),
        (lambda c: c[2].outputs[0].update(text="<f at 0x7fa1b2c3d4e5>"), "cell-002 prints an address"),
        (lambda c: c[0].update(source="[x](https://a.org/home/ann)"), None),
        (lambda c: c[2].update(source="\n".join(["x = 1"] * 31)), "cell-002 has 31 lines of code; at most 30"),
        (lambda c: c[2].update(source="#| export\n" + "\n".join(["x = 1"] * 100)), None),
        (
            lambda c: c[2].update(source="#| export\n" + "\n".join(["x = 1"] * 101)),
            "has 101 lines of code; at most 100",
        ),
        (lambda c: c[2].update(source="# " + "x" * 1_000_000), "is 1.0 MB"),
    ],
)
def test_the_checker_finds_each_fault(tmp_path, spoil, words):
    notebook = good_notebook()
    spoil(notebook.cells)
    nbformat.write(notebook, path := tmp_path / "01_x.ipynb")
    found = list(checker.findings(path))
    assert not found if words is None else len(found) == 1 and words in found[0]


def test_an_error_is_allowed_only_where_it_is_tagged(tmp_path):
    notebook, path = good_notebook(), tmp_path / "01_x.ipynb"
    notebook.cells[2].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]
    nbformat.write(notebook, path)
    assert list(checker.findings(path)) == ["cell-002 ends in ValueError; mend it, or tag it raises-exception"]
    notebook.cells[2].metadata.tags = ["raises-exception"]
    nbformat.write(notebook, path)
    assert not list(checker.findings(path))


def test_fix_cleans_ids_and_metadata_and_keeps_tags(tmp_path):
    notebook, path = good_notebook(), tmp_path / "01_x.ipynb"
    notebook.metadata.widgets = {"state": {}}
    notebook.cells[1].update(id="random")
    notebook.cells[1].metadata.execution = {"iopub": "now"}
    nbformat.write(notebook, path)
    checker.fix(path)
    assert not list(checker.findings(path))
    assert nbformat.read(path, as_version=4).cells[1].metadata.tags == ["nbval-ignore-output"]
    before = path.read_bytes()
    checker.fix(path)
    assert path.read_bytes() == before
