"""The book, its code and README -> one line for each word that is spelled wrongly, or not in the British way.

    python tools/spelling.py           everything
    python tools/spelling.py FILE...   these files

codespell knows the common mistakes; tools/british.txt adds American spellings (for prose: text, comments, docstrings,
not for code, where `color` is matplotlib's); tools/words.txt holds the words of ours that are no mistakes.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
PATTERNS = ("*.md", "book/*.md", "book/*.ipynb", "src/sdlearn/**/*.py", "tools/*.py", "book/_ext/*.py")
Line = tuple[str, str, bool]  # place, text, is it prose?


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a Markdown text without its blocks of code, numbered; what stands in directives is prose."""
    directives, fence = [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        mark, info = re.match(r"(`{3,}|~{3,}|:{3,})? *(.?)", line).groups()
        if fence:
            fence = "" if line.rstrip() == fence else fence
        elif directives and line.rstrip() == directives[-1]:
            directives.pop()
        elif mark and info == "{":
            directives.append(mark)
            yield number, line
        elif mark and not mark.startswith(":"):
            fence = mark
        else:
            yield number, line


def of_markdown(text: str, place: str) -> Iterator[Line]:
    """Its prose without code spans, formulas, addresses and names of roles."""
    for number, line in prose(text):
        line = re.sub(r"`+[^`]*`+|\$[^$]*\$|<[^>]*>|\]\([^)]*\)|https?://\S+|\{[\w:-]+\}", " ", line)
        yield f"{place}:{number}", line, True


def of_python(code: str, place: str) -> Iterator[Line]:
    """Its comments and docstrings, which are prose, and its other strings, which may be anything."""
    before = None
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT:
                yield f"{place}:{token.start[0]}", token.string, True
            elif token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
                alone = before in (None, tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
                for number, line in enumerate(token.string.splitlines(), start=token.start[0]):
                    line = re.sub(r"`[^`]*`|https?://\S+", " ", line)
                    yield f"{place}:{number}", line, alone and token.string.lstrip("rR").startswith('"""')
            if token.type != tokenize.COMMENT:
                before = token.type
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return  # a cell that is no Python has no comments to check


def lines_of(path: Path) -> Iterator[Line]:
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    if path.suffix == ".ipynb":
        for i, cell in enumerate(nbformat.read(path, 4).cells):
            read = of_python if cell.cell_type == "code" else of_markdown
            yield from read(cell.source, f"{name} cell-{i:03d}")
    elif path.suffix == ".py":
        yield from of_python(path.read_text("utf-8"), name)
    else:
        yield from of_markdown(path.read_text("utf-8"), name)


def codespell(lines: list[Line], *options: str) -> list[str]:
    """What codespell says about these lines, with their places in front."""
    words = ("-I", str(TOOLS / "words.txt"))
    command = [sys.executable, "-m", "codespell_lib", "--config", os.devnull, *options, *words, "-"]
    text = "\n".join(re.sub(r"\s", " ", line) for _, line, _ in lines) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8")
    if done.returncode not in (0, 65):
        raise RuntimeError(f"codespell does not run: {done.stderr}")
    found = re.findall(r"^(\d+): (.*)\n\s+(.*)$", done.stdout, re.MULTILINE)
    return [f"{lines[int(number) - 1][0]}: {what}" for number, _, what in found]


def main() -> int:
    paths = [Path(name).resolve() for name in sys.argv[1:]]
    paths = paths or [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    lines = [line for path in paths for line in lines_of(path)]
    found = codespell(lines, "-D", "-", "--builtin", "clear,rare,informal")
    found += codespell([line for line in lines if line[2]], "-D", str(TOOLS / "british.txt"))
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
