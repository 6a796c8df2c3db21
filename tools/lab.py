"""book/ -> my/, a reader's own copy, opened in JupyterLab: what one runs and writes there never touches the clone.

    python tools/lab.py                 copy what is not there yet, and open my/ in JupyterLab
    python tools/lab.py --fresh 05 12   first take chapters 05 and 12 anew; the old ones are kept beside them
    python tools/lab.py --copy          only copy

A copy that its reader has changed is never overwritten. One that is still as it was copied follows the book. Copies are
marked as trusted, as the code of this clone is, so that figures move as soon as a chapter is open.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.sign import NotebookNotary

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("*.ipynb", "*.md", "*.bib", "_static/*.svg", "_static/*.png", "_static/*.jpg")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def keep(path: Path) -> Path:
    """Move a reader's file aside, under the next free name."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.mine-{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)


def copy(book: Path, mine: Path, fresh: list[str]) -> list[str]:
    """Bring mine up to date; returns what a reader should know."""
    mine.mkdir(exist_ok=True)
    record, told = mine / ".copied.json", []
    copied = json.loads(record.read_text("utf-8")) if record.exists() else {}
    for source in sorted(path for kind in KINDS for path in book.glob(kind)):
        name = source.relative_to(book).as_posix()
        target, now = mine / name, digest(source)
        changed = target.exists() and digest(target) != copied.get(name)
        if changed and any(name.startswith(chapter) for chapter in fresh):
            told.append(f"{name} is fresh; yours is now {keep(target).name}")
        elif changed:
            if now != copied.get(name):
                told.append(f"{name} is yours, and the book has a newer one: make lab FRESH={name[:2]}")
            continue
        if not target.exists() or digest(target) != now:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
            if target.suffix == ".ipynb":
                NotebookNotary().sign(nbformat.read(target, 4))
        copied[name] = now
    record.write_text(json.dumps(copied, indent=1), "utf-8")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", nargs="*", default=[], metavar="NN", help="chapters to take anew")
    parser.add_argument("--copy", action="store_true", help="only copy, do not open JupyterLab")
    options = parser.parse_args()
    chapters = [path.name[:2] for path in (ROOT / "book").glob("[0-9][0-9]_*.ipynb")]
    if unknown := sorted(set(options.fresh) - set(chapters)):
        parser.error(f"there is no chapter {', '.join(unknown)}; give its two digits, such as 05")
    told = copy(ROOT / "book", ROOT / "my", options.fresh)
    print(*told, sep="\n", end="\n" * bool(told))
    print("Your own copy of the book is in my/, which git ignores. A chapter anew: make lab FRESH=05 (yours is kept).")
    if options.copy:
        return 0
    return subprocess.call([sys.executable, "-m", "jupyter", "lab", str(ROOT / "my")])


if __name__ == "__main__":
    sys.exit(main())
