"""Files, carefully: read only if they are plain, written whole or not at all.

Every way to fail is a ValueError with one sentence. The other modules read and write
their files through this one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "check_plain",
    "check_writable",
    "explained",
    "locked",
    "read_json",
    "read_text",
    "reserve",
    "write_files",
]

PART = re.compile(r"\..+\.[0-9a-f]{12}\.part")  # a file that is being written
STALE = 24 * 3600  # seconds after which nobody is still writing it
LARGEST_TEXT = 64 * 2**20  # bytes; the vocabulary of CLIP has less than 1 MB
FULL = ("No space left", "disk is full", "Disk quota", "unexpected pos")


def check_plain(path: str | Path, largest: int | None = None) -> os.stat_result:
    """What the system says of a file, if it is a plain one of at most `largest` bytes.

    A pipe or a device behind the name would be waited for, or read, for ever.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({why}): check the path") from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is a folder, but a file is wanted")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"{path} is a pipe or a device, but a plain file is wanted: copy it there"
        )
    if largest is not None and found.st_size > largest:
        raise ValueError(
            f"{path} has {found.st_size:,} bytes, but at most {largest:,} are wanted "
            "here: it is another kind of file"
        )
    return found


def read_text(path: str | Path, largest: int = LARGEST_TEXT) -> str:
    """The text of a plain file in UTF-8, with or without a byte-order mark."""
    check_plain(path, largest)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as text ({error}): copy it again"
        ) from None


def read_json(path: str | Path) -> dict:
    """A JSON object from a plain file."""
    if not Path(path).exists():
        raise ValueError(
            f"{path} is missing: copy the folder again, with all its files"
        )
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(
            f"{path} cannot be read as JSON ({error}): copy it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, but a JSON object is wanted: "
            "copy it again"
        )
    return content


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Say in one sentence why `path` cannot be written, whichever library found out."""
    try:
        yield
    except Exception as error:  # safetensors and torch have errors of their own
        code, text = getattr(error, "errno", None), str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or any(word in text for word in FULL):
            raise ValueError(
                f"{path} cannot be written (No space left on device): "
                "make room on the disk"
            ) from None
        if isinstance(error, OSError):
            raise ValueError(
                f"{path} cannot be written ({error.strerror or error}): "
                "give another folder, or change its permissions"
            ) from None
        raise


def write_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write each file beside its target, flush it, and rename them all at the end.

    A full disk or an interruption leaves what was there before. The temporary names are
    random and created by us alone, so no link that lies there is followed.
    """
    parts: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                sweep(path.parent)
                name = f".{path.name[:80]}.{secrets.token_hex(6)}.part"
                parts[path] = part = path.with_name(name)
                os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                mode = part.stat().st_mode  # some writers would make it private
                write(part)
                os.chmod(part, mode)
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
        for path, part in parts.items():
            with explained(path):
                os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Find out before the work, not after it, whether a file can be written."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but the name of a file is wanted")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Work alone: while one program holds the lock, a second one gets a sentence.

    The system lets go when the program ends, however it ends; the empty file stays.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(path, flags, 0o666)
    try:
        try:
            if sys.platform == "win32":
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another program is at work in {path.parent}: wait for it to end, "
                "or give another folder"
            ) from None
        except OSError:
            pass  # a network disk that knows no locks
        yield
    finally:
        os.close(file)


def sweep(folder: Path) -> None:
    """Remove what killed programs left behind."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if (
                PART.fullmatch(part.name)
                and time.time() - part.lstat().st_mtime > STALE
            ):
                part.unlink()


def reserve(folder: Path, stem: str, suffix: str, count: int = 1) -> list[Path]:
    """Create `count` empty files under the next free numbers, stem-0001.png ...

    Another program that looks for a name at the same time gets another one.
    """
    with explained(folder / f"{stem}{suffix}"):
        folder.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(rf"{re.escape(stem)}-(\d+){re.escape(suffix)}")
        taken = [m[1] for path in os.listdir(folder) if (m := pattern.fullmatch(path))]
        number = max(map(int, taken), default=0) + 1
        paths: list[Path] = []
        while len(paths) < count:
            path = folder / f"{stem}-{number:04d}{suffix}"
            number += 1
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                continue
            paths.append(path)
    return paths
