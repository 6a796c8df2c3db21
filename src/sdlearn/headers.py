"""A checkpoint file -> its header: names, types and shapes of its tensors. No weight is read, nothing in it is run.

It imports no torch, so it answers at once, and it trusts no byte: whatever is wrong with a file is one clear sentence.
"""

from __future__ import annotations

import json
import math
import pickle
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

DTYPES = {  # as a .safetensors header says it -> torch's name, bits
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4", 4),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}
TORCH_TYPES = {
    name: code for code, (name, _) in DTYPES.items()
} | {  # and the names of torch's storages
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
LARGEST_HEADER, LARGEST_PICKLE = (
    100_000_000,
    2**26,
)  # bytes; the first is the format's own limit
DIMENSIONS = 32  # of a tensor, at most
WANTED = "a .safetensors or .ckpt file is wanted"
OTHERS = {  # the first bytes of a file -> what it is, what to do
    b"version https://git-lfs": (
        "a git-lfs pointer, a note that stands for the file",
        "run `git lfs pull`",
    ),
    b"\x1f\x8b": ("packed with gzip", "unpack it"),
    b"BZh": ("packed with bzip2", "unpack it"),
    b"\xfd7zXZ": ("packed with xz", "unpack it"),
    b"7z\xbc\xaf": ("packed with 7-Zip", "unpack it"),
    b"Rar!": ("packed with RAR", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", "unpack it"),
    b"GGUF": ("a GGUF file, whose weights are quantised", "take the .safetensors file"),
    b"\x89HDF": ("an HDF5 file, as Keras writes it", "take the .safetensors file"),
    b"\x89PNG": ("a picture", "give the model's file"),
    b"\xff\xd8\xff": ("a picture", "give the model's file"),
}


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return -(-math.prod(self.shape) * DTYPES[self.dtype][1] // 8)


class Header(NamedTuple):
    """What can be read of a file at once; foreign: what its pickle names beside tensors."""

    format: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    foreign: list[str]


def clean(text: object, longest: int = 60) -> str:
    """A name from a file, safe to print."""
    text = "".join(c if c.isprintable() else "?" for c in str(text)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."


def damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is damaged, {why}: download it again, or take another copy"
    )


def read_header(path: str | Path) -> Header:
    """The header of a checkpoint file. Every way to fail is one sentence."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise ValueError(f"{path} is {what}, but {WANTED}: give the path of one")
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(0)
            return read_open(path, file, head)
    except FileNotFoundError:
        raise ValueError(
            f"there is nothing at {path}: give a .safetensors or .ckpt file, or a folder"
        ) from None
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"{path} cannot be read ({why}): copy it to where you may read it"
        ) from None


def read_open(path: Path, file: BinaryIO, head: bytes) -> Header:
    """Find out from its first bytes, not from its name, how a file is to be read."""
    safe_name = path.suffix.lower() in (".safetensors", ".sft")
    if not head:
        raise ValueError(f"{path} is empty, but {WANTED}: download it again")
    if head[5:8] == b"\0\0\0" and (
        safe_name or head[8:9] == b"{"
    ):  # a length in 8 bytes, then JSON
        if not safe_name:
            raise ValueError(
                f"{path} holds .safetensors under another name: rename it, so that its name ends so"
            )
        return read_safetensors(path, file)
    for magic, (what, advice) in OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}, but {WANTED}: {advice}")
    if head[:2] == b"PK" or head[:1] == b"\x80":
        if safe_name:
            raise ValueError(
                f"{path} holds a pickle (.ckpt) under another name: rename it, so that it ends in .ckpt"
            )
        return (
            read_zip(path, file) if head[:2] == b"PK" else read_old_pickle(path, file)
        )
    text = all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head[:64])
    if text and head.lstrip().startswith(b"<"):
        raise ValueError(
            f"{path} is a web page, but {WANTED}: download the file itself, not the page about it"
        )
    if text:
        raise ValueError(f"{path} is text, but {WANTED}: give the model's file")
    if safe_name:
        return read_safetensors(path, file)
    raise ValueError(
        f"{path} is no checkpoint, or is damaged from its first byte on, but {WANTED}: download it again"
    )


def read_safetensors(path: Path, file: BinaryIO) -> Header:
    """8 bytes that say how long the JSON is; the JSON; the tensors, one after the other, without gaps."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            name = next(
                name
                for name, count in Counter(name for name, _ in pairs).items()
                if count > 1
            )
            raise damaged(path, f"its header names {clean(name)} twice")
        return content

    def whole(digits: str) -> int:
        return int(digits) if len(digits) < 20 else -1

    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise damaged(path, f"its header claims to have {length:,} bytes")
    if size < 8 + length:
        raise damaged(
            path, f"its header has {length:,} bytes, but the file ends after {size:,}"
        )
    try:
        content = json.loads(
            file.read(length).decode(), object_pairs_hook=unique, parse_int=whole
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(path, f"its header is no JSON ({type(error).__name__})") from None
    metadata = content.pop("__metadata__", {}) if isinstance(content, dict) else None
    if not isinstance(metadata, dict) or any(
        type(value) is not str for value in metadata.values()
    ):
        raise damaged(path, "its header is no table of tensors")
    tensors, places = {}, []
    for name, entry in content.items():
        entry = entry if isinstance(entry, dict) else {}
        shape, place = entry.get("shape"), entry.get("data_offsets")
        good = (
            isinstance(shape, list)
            and len(shape) <= DIMENSIONS
            and isinstance(place, list)
            and len(place) == 2
        )
        if (
            not good
            or any(type(x) is not int or x < 0 for x in shape + place)
            or entry.get("dtype") not in DTYPES
        ):
            raise damaged(
                path, f"its header has no type, shape or place for {clean(name)}"
            )
        tensors[name] = Tensor(entry["dtype"], tuple(shape))
        if place[1] - place[0] != tensors[name].bytes:
            raise damaged(
                path,
                f"{clean(name)} has {place[1] - place[0]:,} bytes, but {shape} needs another number",
            )
        places.append((*place, name))
    end = 0
    for first, last, name in sorted(places):
        if first != end:
            raise damaged(
                path,
                f"{clean(name)} {'overlaps' if first < end else 'leaves a gap after'} its neighbour",
            )
        end = last
    if size != 8 + length + end:
        raise damaged(
            path,
            f"it has {size:,} bytes, but its header speaks of {8 + length + end:,}",
        )
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors, but named weights are wanted: take another file"
        )
    return Header(".safetensors", tensors, metadata, [])


class Inert:
    """Stands for whatever a pickle names. It takes everything and does nothing."""

    def ignore(*args: object, **more: object) -> None:
        pass

    __setstate__ = append = extend = add = update = __setitem__ = ignore


class Table(Inert, dict):
    __setitem__ = dict.__setitem__


class Reader(
    pickle._Unpickler
):  # the one written in Python: that in C can be made to ask for any amount of memory
    """A pickle of tensors -> their types and shapes. Nothing that it names is imported, let alone called."""

    def __init__(self, data: BinaryIO):
        super().__init__(data, encoding="latin1")
        self.storages: dict[str, int] = {}  # key -> bytes
        self.foreign: dict[str, type] = {}
        self.called: list[str] = []

    def find_class(self, module: str, name: str) -> object:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"  # Python 2 called it so
        if module == "torch" and name in TORCH_TYPES:
            return TORCH_TYPES[name]
        if full == "torch.storage.UntypedStorage":
            return "U8"
        if full in PURE:
            return lambda *args: PURE[full](
                *args
            )  # a new one each time: a pickle may write upon it
        if full not in self.foreign:

            def new(cls: type, *args: object, **more: object) -> object:
                if full not in TRAINING_LEFTOVERS:
                    self.called.append(full)
                return object.__new__(cls)

            self.foreign[full] = type("Foreign", (Inert,), {"__new__": new})
        return self.foreign[full]

    def persistent_load(self, pid: tuple) -> tuple[str, int]:
        word, dtype, key, _, count = pid[:5]
        if (
            word != "storage"
            or dtype not in DTYPES
            or type(key) is not str
            or type(count) is not int
            or count < 0
        ):
            raise ValueError("a storage of an unknown kind")
        self.storages[key] = Tensor(dtype, (count,)).bytes
        return dtype, self.storages[key]


def shape_of(
    storage: tuple[str, int], offset: int, size: tuple, stride: tuple, *more: object
) -> Tensor:
    """torch._utils._rebuild_tensor, which only looks whether there would be enough bytes."""
    dtype = (
        more[2] if len(more) > 2 and isinstance(more[2], str) else storage[0]
    )  # only in its third version
    numbers = (offset, *size, *stride)
    if not len(size) == len(stride) <= DIMENSIONS or any(
        type(x) is not int or x < 0 for x in numbers
    ):
        raise ValueError("a tensor of an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and Tensor(dtype, (last + 1,)).bytes > storage[1]:
        raise ValueError("a tensor that is larger than its storage")
    return Tensor(dtype, tuple(size))


PURE = {  # all that a pickle of tensors needs to call -> what it gets instead
    "collections.OrderedDict": lambda *_: Table(),
    "collections.Counter": lambda *_: Table(),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": shape_of,
    "torch._utils._rebuild_tensor_v2": shape_of,
    "torch._utils._rebuild_tensor_v3": shape_of,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.device": lambda *_: None,
    "builtins.set": lambda *_: None,
    "_codecs.encode": lambda *_: None,
}
TRAINING_LEFTOVERS = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def read_zip(path: Path, file: BinaryIO) -> Header:
    """A .ckpt as torch has written it since 2020: a zip of one pickle and a file for each storage."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            found = [
                name
                for name in entries
                if name.endswith("data.pkl") and name.count("/") == 1
            ]
            if len(found) != 1:
                raise ValueError(
                    f"{path} is a zip archive, but holds no checkpoint: unpack it and give what is in it"
                )
            root = found[0].removesuffix("data.pkl")
            if f"{root}constants.pkl" in entries:
                raise ValueError(
                    f"{path} holds a program (TorchScript), but {WANTED}: take the weights alone"
                )
            size = sum(entry.file_size for entry in entries.values())
            if (
                size > 2 * path.stat().st_size + LARGEST_PICKLE
                or entries[found[0]].file_size > LARGEST_PICKLE
            ):
                raise ValueError(
                    f"{path} unfolds to {human(size)} (a zip bomb?): do not use it, take another copy"
                )
            data = archive.read(found[0])
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        RuntimeError,
        EOFError,
        UnicodeError,
    ) as error:
        raise damaged(path, f"or cut off ({clean(error)})") from None
    reader, content = unpickle(path, BytesIO(data))
    for key, size in reader.storages.items():
        entry = entries.get(f"{root}data/{key}")
        if entry is None or entry.file_size < size:
            raise damaged(path, f"it lacks the numbers of the storage {clean(key)}")
        if (
            entry.compress_type != zipfile.ZIP_STORED
        ):  # then its bytes are not the numbers
            raise ValueError(
                f"{path} was packed a second time, after torch wrote it: take another copy"
            )
    return named_tensors(path, ".ckpt", content, reader)


def read_old_pickle(path: Path, file: BinaryIO) -> Header:
    """A .ckpt from before 2020: three pickles about the file, that of the tensors, one of keys, the storages."""
    data = BytesIO(file.read(LARGEST_PICKLE))
    reader, content = unpickle(path, data)
    if content == 0x1950A86A20F9469CFC6C:
        for _ in "protocol", "system", "tensors":
            reader, content = unpickle(path, data)
        _, keys = unpickle(path, data)
        wanted = data.tell() + sum(size + 8 for size in reader.storages.values())
        if (
            not isinstance(keys, list)
            or {*map(str, keys)} != {*reader.storages}
            or path.stat().st_size < wanted
        ):
            raise damaged(
                path, f"it has {path.stat().st_size:,} bytes, but {wanted:,} are wanted"
            )
    return named_tensors(path, ".ckpt (old)", content, reader)


def unpickle(path: Path, data: BinaryIO) -> tuple[Reader, object]:
    reader = Reader(data)
    try:
        content = reader.load()
    except Exception as error:  # a pickle is a program: it can fail in any way
        if not reader.called:
            raise damaged(
                path, f"its pickle cannot be read ({type(error).__name__})"
            ) from None
    if reader.called:
        raise ValueError(
            f"{path} is a pickle that runs code when it is opened (it calls {clean(reader.called[0])}); nothing of it "
            "was run: do not use it, take the .safetensors file"
        )
    return reader, content


def named_tensors(path: Path, form: str, content: object, reader: Reader) -> Header:
    """The tensors of a pickle's content, also those in tables within the table."""
    for _ in range(9):  # a table may even hold itself
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(
            f"{path} holds a {kind}, but named tensors are wanted: take another file"
        )
    seen: set[int] = set()

    def flat(table: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        seen.add(id(table))
        for key, value in table.items():
            if isinstance(value, Tensor) and isinstance(key, (str, int)):
                yield f"{prefix}{key}", value
            elif (
                isinstance(value, dict)
                and isinstance(key, (str, int))
                and id(value) not in seen
                and len(seen) < 1000
            ):
                yield from flat(value, f"{prefix}{key}.")

    try:
        tensors = dict(flat(content))
    except RecursionError:
        raise damaged(path, "its tables lie too deep in each other") from None
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors, but named weights are wanted: take another file"
        )
    return Header(form, tensors, {}, sorted(reader.foreign))


def human(size: float) -> str:
    """Bytes, as shops count them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"
