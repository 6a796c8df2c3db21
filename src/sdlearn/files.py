"""A file <-> its named tensors: mapped into memory when read, whole or not at all when written. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlearn.headers import clean, human, read_header

__all__ = [
    "Tensors",
    "read_tensors",
    "lies_in",
    "write_files",
    "write_or_say",
    "json_writer",
    "tensor_writer",
]


class Tensors(dict[str, Tensor]):
    """Tensors by name; mapped: their numbers are still in the file, and are read when somebody looks at them."""

    mapped = False

    def only(self, wanted: Callable[[str], object]) -> "Tensors":
        """Those whose name is wanted."""
        some = Tensors({name: tensor for name, tensor in self.items() if wanted(name)})
        some.mapped = self.mapped
        return some


def read_tensors(path: str | Path) -> Tensors:
    """All tensors of a .safetensors file, or of a pickle (.ckpt, .bin, .pt), of which nothing is ever executed."""
    path = Path(path)
    header = read_header(path)  # it says in a sentence what is wrong with a file
    if header.foreign:
        raise ValueError(
            f"{path} holds more than tensors ({clean(header.foreign[0])}): take the .safetensors file"
        )
    try:
        if header.format == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=header.format == ".ckpt",
            )
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; take the .safetensors file instead"
        ) from None
    except Exception as error:  # damaged bytes fail in many ways
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint ({reason})") from None
    for _ in range(9):  # a table may even hold itself
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    tensors = Tensors(
        {name: value for name, value in content.items() if isinstance(value, Tensor)}
    )
    tensors.mapped = lies_in(
        max(tensors.values(), key=Tensor.numel, default=torch.empty(0)), path
    )
    return tensors


def lies_in(tensor: Tensor, path: Path) -> bool:
    """Is the tensor's memory a view of the file? Linux tells; elsewhere the answer is no."""
    try:
        maps = [
            line.split(maxsplit=5)
            for line in Path("/proc/self/maps").read_text().splitlines()
        ]
    except OSError:
        return False
    for place, *_, name in (words for words in maps if len(words) == 6):
        begin, end = (int(x, 16) for x in place.split("-"))
        if begin <= tensor.data_ptr() < end:
            return name == str(path.resolve())
    return False


def write_files(files: dict[Path, Callable[[Path], object]]) -> None:
    """Write every file beside its target first, then rename them all: a full disk or an interruption spoils nothing."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].touch()
            mode = (
                parts[path].stat().st_mode
            )  # what a new file has here; some writers would make it private
            write_or_say(write, parts[path], path)
            os.chmod(parts[path], mode)
            with open(parts[path], "rb+") as file:
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def write_or_say(write: Callable[[Path], object], part: Path, path: Path) -> None:
    """Write, and say in one sentence if the disk is full."""
    try:
        write(part)
    except Exception as error:  # safetensors has an error of its own for this
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(
            error
        ):
            raise
        raise ValueError(
            f"{path} cannot be written (No space left on device): make room on the disk"
        ) from None


def json_writer(content: dict) -> Callable[[Path], object]:
    return lambda path: path.write_text(
        json.dumps(content, indent=2) + "\n", encoding="utf-8"
    )


def tensor_writer(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Callable[[Path], object]:
    """A .safetensors file, or a .ckpt if its name ends so; dtype None keeps what the tensors have."""

    def write(path: Path) -> None:
        ready = {
            name: tensor.detach().to("cpu", dtype).contiguous()
            for name, tensor in tensors.items()
        }
        need, free = (
            sum(tensor.nbytes for tensor in ready.values()),
            shutil.disk_usage(path.parent).free,
        )
        if need > free:
            raise ValueError(
                f"{path.parent} has {human(free)} free, but {human(need)} are to be written: make room"
            )
        if ".ckpt." in path.name:  # the name under which it is written ends in .part
            torch.save({"state_dict": ready}, path)
        else:
            save_file(ready, path, metadata={"format": "pt"})

    return write
