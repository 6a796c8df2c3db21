"""Imports run one way, along the journey of a prompt; importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "sdlearn"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not path.stem.startswith("__")
)
# A module imports only from rows above its own, or from the left in its own row.
JOURNEY = """
    disk arguments tiny.scenes
    tokenizer attention blocks timestep schedule prediction
    clip vae unet
    ddpm samplers guidance
    training
    checkpoint.hub checkpoint.dialects checkpoint.configs checkpoint.files checkpoint.load checkpoint.inspect
    headers hub names config files fitting saving weights
    pictures request pipeline minimal
    inpaint lora controlnet sdxl lcm speed
    tiny.tasks tiny.judge tiny.recipe tiny.evaluate bench
    book.show book.moving
    inspection
    cli
"""
ORDER = JOURNEY.split()


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
                inside = {f"{room}.{alias.name}".strip(".") for alias in node.names} & set(ORDER)
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


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    assert name in ORDER, f"{name}.py has no place in the journey; give it one in this file"
    allowed = ORDER[: ORDER.index(name)]
    wrong = imported(tree_of(name)) - set(allowed)
    assert not wrong, f"{name}.py imports {', '.join(sorted(wrong))}, which comes later in the journey"


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


def test_no_module_needs_the_references_or_the_plotting():
    names = [name for name in MODULES if not name.startswith("book.")]
    code = "\n".join(f"import sdlearn.{name}" for name in names)
    assert not loaded_by(code) & {"diffusers", "transformers", "matplotlib", "jupyter", "IPython"}
