"""What the chapters draw with: figures, and figures that move. It imports no model."""

from pathlib import Path


def from_top(path: str) -> Path:
    """A path of the repository, seen from wherever in it a notebook runs.

    That may be book/, a reader's own copy in my/, or the top of the repository itself.
    """
    for folder in (".", "..", "../.."):
        if (found := Path(folder, path)).exists():
            return found
    raise ValueError(
        f"there is no {path} here or above: open the notebook in a clone of the "
        "repository, in book/ or in my/"
    )
