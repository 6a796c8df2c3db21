"""notebooks -> src/sdlearn/*.py. Every code cell of the book that starts with `#| export` becomes part of a module.

    python tools/export.py                      write all modules
    python tools/export.py book/05_vae.ipynb    write only the modules that this notebook feeds
    python tools/export.py --check              write nothing; exit 1 and name the modules that differ

A long class may be told in pieces: `class X(X):` adds methods to the class X of an earlier cell of the notebook.

The words are nbdev's: `#| default_exp vae` names the notebook's module, `#| export` sends a cell there,
`#| export blocks` sends it to another module. The first string of a module's first cell is its docstring.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
MARK = "by `make export`; edit it there."
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)


class ExportError(ValueError):
    """Why a notebook cannot be exported: where, what, and what to do."""


@dataclass
class Module:
    """What the notebooks have said about one module so far."""

    notebooks: dict[str, bool] = field(default_factory=dict)  # a set that keeps its order
    docstring: str = ""
    imports: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def directives(source: str) -> tuple[dict[str, str], str]:
    """Split a cell into its `#|` lines, as {"export": "blocks"}, and the code below them."""
    lines = source.splitlines()
    found: dict[str, str] = {}
    while lines and (lines[0].startswith("#|") or not lines[0].strip()):
        word, *rest = lines.pop(0)[2:].split() or [""]
        if word not in ("", "export", "default_exp") or len(rest) > 1:
            raise ExportError(f"'#| {word}' is not known; use '#| export' or '#| default_exp NAME'")
        if word:
            found[word] = rest[0] if rest else ""
    if any(line.startswith("#|") for line in lines):
        raise ExportError("a '#|' line stands below code; move it to the top of the cell")
    return found, "\n".join(lines)


def defined_names(node: ast.stmt) -> list[str]:
    """The names that one top-level definition binds; `SAMPLERS |= {...}` binds none, it adds to one that is there."""
    if isinstance(node, ast.AugAssign):
        return []
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [x.id for y in targets for x in ast.walk(y) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]


def add_cell(module: Module, code: str) -> None:
    """Sort the statements of one cell into docstring, imports and body; the body keeps its comments."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise ExportError(f"line {error.lineno} is not plain Python ({error.msg}); export only definitions") from None
    lines = code.splitlines()
    kept, lifted = set(), set()  # line numbers
    for i, node in enumerate(tree.body):
        span = range(node.lineno - 1, node.end_lineno)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module.imports.append(ast.unparse(node))
            lifted.update(span)
        elif i == 0 and (docstring := ast.get_docstring(tree)) and not module.docstring and not module.bodies:
            module.docstring = docstring
            lifted.update(span)
        elif isinstance(node, ast.ClassDef) and node.name in {ast.unparse(base) for base in node.bases}:
            continue_class(module, node, lines[node.lineno : node.end_lineno])
            lifted.update(span)
        elif isinstance(node, DEFINITIONS):
            names = defined_names(node)
            if isinstance(node, ast.AugAssign) and (table := ast.unparse(node.target)) not in module.names:
                raise ExportError(f"'{table}' is added to, but no cell before exports it; begin it with '{table} ='")
            if twice := set(names) & set(module.names):
                raise ExportError(f"'{min(twice)}' is exported for the second time; give one of them another name")
            module.names.extend(names)
            kept.update(span)
        else:
            raise ExportError(f"'{lines[span[0]].strip()}' is no definition; move it to a cell without '#| export'")
    if kept & lifted:
        raise ExportError(f"two statements share the line '{lines[min(kept & lifted)].strip()}'; use two lines")
    if body := "\n".join(line for i, line in enumerate(lines) if i not in lifted).strip():
        module.bodies.append(body)


def continue_class(module: Module, node: ast.ClassDef, members: list[str]) -> None:
    """Put the members of `class X(X):` at the end of the class X that an earlier cell began."""
    for i, body in enumerate(module.bodies):
        for there in ast.parse(body).body:
            if isinstance(there, ast.ClassDef) and there.name == node.name:
                lines = body.splitlines()
                lines[there.end_lineno : there.end_lineno] = ["", *members]
                module.bodies[i] = "\n".join(lines)
                return
    raise ExportError(f"'class {node.name}({node.name})' goes on with a class that no earlier cell begins")


def read_notebook(path: Path, modules: dict[str, Module]) -> None:
    """Add the exported cells of one notebook to `modules`."""
    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as error:
        raise ExportError(f"{path.name} is not a readable notebook ({type(error).__name__})") from None
    default = ""
    for number, cell in enumerate(cells):
        if cell.cell_type != "code" or "#|" not in cell.source:
            continue
        try:
            words, code = directives(cell.source)
            if not words:
                continue
            if "default_exp" in words and default:
                raise ExportError("a second '#| default_exp'; a notebook has one, at the top")
            default = words.get("default_exp", default)
            name = words.get("export") or default
            if not name:
                raise ExportError("no module is named; put '#| default_exp NAME' into the first code cell")
            words_of = name.split(".")  # vae, or tiny.scenes in a room of its own
            if len(words_of) > 2 or not all(w.isidentifier() and w.islower() for w in words_of):
                raise ExportError(f"a module cannot be called '{name}'; take a short lower-case name of its own")
            add_cell(modules.setdefault(name, Module()), code)
            modules[name].notebooks[path.name] = True
        except ExportError as error:
            raise ExportError(f"{path.name}, cell-{number:03d}: {error}") from None


def render(name: str, modules: dict[str, Module]) -> str:
    """The text of one module, formatted."""
    module = modules[name]
    if not module.docstring:
        raise ExportError(f'{min(module.notebooks)}: {name} has no docstring; begin its first cell with """X -> Y."""')
    body = "\n\n\n".join(module.bodies)
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)} - set(module.names)
    used -= {alias.asname or alias.name for line in module.imports for alias in ast.parse(line).body[0].names}
    neighbours = [  # what a notebook defines for one of its modules, its other modules may simply use
        f"from sdlearn.{other} import {x}"
        for other, that in modules.items()
        for x in that.names
        if other != name and set(that.notebooks) & set(module.notebooks) and x in used
    ]
    first, _, rest = module.docstring.replace("\\", "\\\\").replace('"""', '\\"\\"\\"').partition("\n")
    *most, last = (f"book/{notebook}" for notebook in module.notebooks)
    books = " and ".join([*([", ".join(most)] if most else []), last])
    head = f"Exported from {books} {MARK}"
    if len(head) > 88:  # several chapters
        head = f"Exported from {books}\n{MARK}"
    doc = f'"""{first}\n{head}\n{rest}'.rstrip() + '\n"""'
    head = "\n".join([*module.imports, *neighbours])
    return tidy(f"{doc}\n\n{head}\n\n{body}\n", name)


def tidy(text: str, name: str) -> str:
    """Merge and sort the imports, drop unused ones, format; complain about a name that nothing defines."""
    for command in (["check", "--fix", "--select", "I,F401,F821", "--output-format", "concise"], ["format"]):
        words = [
            "ruff",
            *command,
            "--quiet",
            "--no-cache",
            "--stdin-filename",
            f"src/sdlearn/{name.replace('.', '/')}.py",
            "-",
        ]
        result = subprocess.run([sys.executable, "-m", *words], input=text, capture_output=True, text=True, cwd=ROOT)
        if result.returncode:
            raise ExportError(f"{name}: {result.stderr.strip()} (an exported cell must import or define it)")
        text = result.stdout
    return text


def export(book: Path, package: Path, check: bool = False, only: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Export `book/*.ipynb` into `package`: (modules that changed or, with `check`, would; what went wrong)."""
    modules: dict[str, Module] = {}
    errors: list[str] = []
    for path in sorted(book.glob("*.ipynb")):
        try:
            read_notebook(path, modules)
        except ExportError as error:
            if not only or path.name in only:
                errors.append(str(error))
    wanted = {name: m for name, m in modules.items() if not only or set(only) & set(m.notebooks)}
    try:
        texts = {} if errors else {path_of(name, package): render(name, modules) for name in wanted}
    except ExportError as error:
        errors.append(str(error))
    there = {path: path.read_text("utf-8") for path in sorted(package.rglob("*.py"))}
    errors += [
        f"{min(modules[name].notebooks)}: {path.name} is written by hand; give the module another name"
        for name in wanted
        if (path := path_of(name, package)) in there and MARK not in there[path]
    ]
    if errors:
        return [], errors
    changed = {path: text for path, text in texts.items() if there.get(path) != text}
    for path, text in {} if check else changed.items():
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_suffix(".new")  # then replaced in one step: an interruption leaves the old file whole
        fresh.write_text(text, encoding="utf-8", newline="\n")
        os.replace(fresh, path)
    known = {path_of(name, package) for name in modules}
    orphans = [] if only else [path for path, text in there.items() if MARK in text and path not in known]
    errors = [f"{path.name}: no notebook exports it now; delete it" for path in orphans]
    return [path.relative_to(package).as_posix() for path in changed], errors


def path_of(name: str, package: Path) -> Path:
    """vae -> vae.py, tiny.scenes -> tiny/scenes.py."""
    return package.joinpath(*name.split(".")).with_suffix(".py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="export only these (default: all of book/)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where notebooks and modules differ")
    options = parser.parse_args()
    only = tuple(path.name for path in options.notebooks)
    if missing := [name for name in only if not (ROOT / "book" / name).is_file()]:
        parser.error(f"there is no notebook book/{missing[0]}")
    changed, errors = export(ROOT / "book", ROOT / "src" / "sdlearn", options.check, only)
    for name in changed:
        print(f"src/sdlearn/{name}", "differs from its notebook; run `make export`" if options.check else "written")
    for error in errors:
        print(error, file=sys.stderr)
    return int(bool(errors or (options.check and changed)))


if __name__ == "__main__":
    sys.exit(main())
