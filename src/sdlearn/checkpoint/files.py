"""A checkpoint file -> names, types and shapes; numbers when they are asked for.

Nothing in a file is ever run, and whatever is wrong with one is a single sentence. Only
pickles need torch here, so the header of a .safetensors file is told at once.
"""

from __future__ import annotations

import json
import math
import pickletools
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sdlearn.disk import check_plain, read_json

if TYPE_CHECKING:
    import torch

SAFE = (".safetensors", ".sft")
WANTED = "a .safetensors or .ckpt file is wanted"
LARGEST_PICKLE = 2**26  # bytes without the tensors; that of SD 1.5 has 0.2 MB
MOST_STEPS = 500_000  # of a pickle; that of SD 1.5 has 0.03 million
HEAVIEST = 10_000  # parts of a tuple, and of the tuples in it
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
WEIGHTS = [  # of one part of a model's folder, in the order in which we look for them
    f"{stem}{variant}{suffix}"
    for suffix in (".safetensors", ".bin")
    for variant in ("", ".fp16")
    for stem in STEMS
]
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
WEIGHTLESS = ("tokenizer", "scheduler", "feature_extractor")
TYPES = dict(  # where the header's word is not torch's without its dot
    pair.split("=")
    for pair in "F64=float64 F32=float32 F16=float16 BF16=bfloat16 C64=complex64 "
    "F8_E4M3=float8_e4m3fn F8_E5M2=float8_e5m2 F8_E8M0=float8_e8m0fnu BOOL=bool".split()
)
OTHERS = {  # the first bytes of a file -> what it is: what to do
    b"version https://git-lfs": "a git-lfs pointer, a note that stands for the file: "
    "run `git lfs pull`",
    b"\x1f\x8b": "packed with gzip: unpack it",
    b"BZh": "packed with bzip2: unpack it",
    b"\xfd7zXZ": "packed with xz: unpack it",
    b"7z\xbc\xaf": "packed with 7-Zip: unpack it",
    b"Rar!": "packed with RAR: unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it",
    b"GGUF": "a GGUF file, whose weights are quantised: take the .safetensors file",
    b"\x89HDF": "an HDF5 file, as Keras writes it: take the .safetensors file",
    b"\x89PNG": "a picture: give the model's file",
    b"\xff\xd8\xff": "a picture: give the model's file",
}
NEEDED = set(  # what a pickle of tensors names, beside torch's storages and types
    "collections.OrderedDict collections.Counter torch.Size torch.device "
    "_codecs.encode torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 "
    "builtins.set torch._utils._rebuild_tensor_v3 torch._utils._rebuild_parameter "
    "torch.nn.parameter.Parameter torch.storage.UntypedStorage".split()
)
NUMPY = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


class Entry(NamedTuple):
    """What is known of a tensor before its numbers are read."""

    dtype: str  # as torch calls it
    shape: tuple[int, ...]


class Reader:
    """One file, mapped anew after every twenty-fifth of it: its pages leave memory."""

    def __init__(self, path: Path, opened: Callable[[], Callable[[str], torch.Tensor]]):
        self.bytes, self._opened, self._read = path.stat().st_size, opened, 0
        self._get: Callable[[str], torch.Tensor] | None = None

    def __call__(self, name: str) -> torch.Tensor:
        if self._get is None or self._read > max(self.bytes / 25, 2**22):
            self._get = None
            self._get, self._read = self._opened(), 0
        tensor = self._get(name)
        self._read += tensor.nbytes + 2**16  # the system maps pages around it, too
        return tensor


@dataclass(frozen=True)
class Piece:
    """A tensor that a file holds in another form, such as a third of a larger one."""

    reader: Callable[[str], torch.Tensor]
    name: str  # in the file
    form: Callable[[torch.Tensor], torch.Tensor]
    bytes: int = 0  # they count where the whole is

    def __call__(self, name: str) -> torch.Tensor:
        return self.form(self.reader(self.name))


@dataclass(eq=False)
class Tensors(Mapping[str, "torch.Tensor"]):
    """Tensors by name, from one file or several; the numbers are read when asked for.

    A tensor is a view of its file: copy it and let it go, then its pages do not stay in
    memory.
    """

    path: Path
    format: str
    entries: dict[str, Entry]  # types and shapes
    readers: Mapping[str, Reader | Piece]
    metadata: dict[str, str] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)  # named by a pickle beside tensors

    @property
    def bytes(self) -> int:
        return sum(x.bytes for x in {self.readers[name] for name in self.entries})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.readers[name](name)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def only(self, wanted: Callable[[str], object]) -> Tensors:
        """Those whose name is wanted."""
        some = {name: entry for name, entry in self.entries.items() if wanted(name)}
        return replace(self, entries=some)


def unfused(tensors: Tensors) -> Tensors:
    """OpenCLIP's text tower in CLIP's form: its q, k and v lie in one tensor, one below
    the other, and its projection is transposed."""
    entries, readers = dict(tensors.entries), dict(tensors.readers)
    for name, (dtype, shape) in tensors.entries.items():
        third, rest = (shape[0] // 3 if shape else 0), shape[1:]
        if found := re.fullmatch(r"(.*\.attn\.)in_proj_(weight|bias)", name):
            del entries[name]
            for i, which in enumerate("qkv"):
                piece = f"{found[1]}{which}_proj.{found[2]}"
                rows = slice(i * third, (i + 1) * third)
                entries[piece] = Entry(dtype, (third, *rest))
                readers[piece] = Piece(readers[name], name, itemgetter(rows))
        elif name.endswith(".text_projection") and len(shape) == 2:
            del entries[name]
            piece = f"{name}.weight"
            entries[piece] = Entry(dtype, shape[::-1])
            readers[piece] = Piece(readers[name], name, lambda x: x.T)
    return replace(tensors, entries=entries, readers=readers)


def clean(text: object, longest: int = 60) -> str:
    """A name from a file, safe to print."""
    text = "".join(c if c.isprintable() else "?" for c in str(text)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."


def human(size: float) -> str:
    """Bytes, as shops count them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def damaged(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path} is damaged, {clean(why, 150)}: download it again, or take another copy"
    )


def unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({error.strerror}): copy it to where you may read it"
    )


def read_tensors(path: str | Path) -> Tensors:
    """The tensors of a .safetensors file, or of a pickle (.ckpt, .bin, .pt, .pth)."""
    path = Path(path)
    size = check_plain(path).st_size
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise unreadable(path, error) from None
    tensors = read_as(form_of(path, head), path)
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors, but named weights are wanted: take another file"
        )
    for name, entry in tensors.entries.items():
        if math.prod(entry.shape) > size * 2:  # at least 4 bits a number
            raise damaged(path, f"{clean(name)} is larger than the whole file")
    return tensors


def form_of(path: Path, head: bytes) -> str:
    """How a file is to be read: its first bytes tell, not its name."""
    safe_name = path.suffix.lower() in SAFE
    if head[5:8] == b"\0\0\0" and (safe_name or head[8:9] == b"{"):
        if safe_name:
            return ".safetensors"
        raise ValueError(
            f"{path} holds .safetensors under another name: rename it, so that its "
            "name ends so"
        )
    other = next((x for magic, x in OTHERS.items() if head.startswith(magic)), "")
    if not other and (head[:2] == b"PK" or head[:1] == b"\x80"):
        if not safe_name:
            return ".ckpt" if head[:2] == b"PK" else ".ckpt (old)"
        raise ValueError(
            f"{path} holds a pickle (.ckpt) under another name: rename it, so that it "
            "ends in .ckpt"
        )
    if not other and not head:
        other = "empty: download it again"
    elif not other and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head[:64]):
        other = "text: give the model's file"
        if head.lstrip().startswith(b"<"):
            other = "a web page: download the file itself, not the page about it"
    elif not other and safe_name:
        return ".safetensors"
    unknown = "no checkpoint, or is damaged from its first byte on: download it again"
    what, advice = (other or unknown).split(": ")
    raise ValueError(f"{path} is {what}, but {WANTED}: {advice}")


def read_as(form: str, path: Path) -> Tensors:
    """The tensors of a file in this form; the library's complaint as a sentence."""
    if form != ".safetensors":
        return read_pickle(path, form)
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            entries = {
                name: Entry(type_of(x.get_dtype()), tuple(x.get_shape()))
                for name, x in slices.items()
            }
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        said = str(error).removeprefix("Error while deserializing header: ")
        raise damaged(path, said) from None
    reader = Reader(path, lambda: safe_open(path, "pt").get_tensor)
    return Tensors(path, form, entries, dict.fromkeys(entries, reader), metadata)


def type_of(word: str) -> str:
    """A header's word for a type -> torch's: I64 -> int64."""
    return TYPES.get(word) or word.replace("I", "int").replace("U", "uint").lower()


def read_pickle(path: Path, form: str) -> Tensors:
    """A .ckpt: read by torch, which builds tensors and calls nothing the file chooses.

    What else a pickle names is replaced by something that takes everything and does
    nothing, so that a file is described even where it is not to be trusted.
    """
    import torch

    named, called = check_zip(path) if form == ".ckpt" else check_pickles(path)
    kinds = [str(x)[6:] for x in vars(torch).values() if type(x) is torch.dtype]
    kinds += [name for name in vars(torch) if name.endswith("Storage")]
    foreign = sorted(named - NEEDED - {f"torch.{kind}" for kind in kinds})
    if acts := [name for name in foreign if name in called and name not in NUMPY]:
        raise acting(path, acts[0])
    ignore = {"__init__": lambda *_, **__: None, "__setstate__": lambda *_: None}
    inert: list[Callable | tuple[Callable, str]]
    inert = [(type("Inert", (), dict(ignore)), name) for name in foreign]

    def content() -> dict[str, torch.Tensor]:
        with torch.serialization.safe_globals(inert):
            found = torch.load(path, "cpu", weights_only=True, mmap=form == ".ckpt")
        return dict(flat(found, path))

    try:
        tensors = content()
    except Exception as error:  # a pickle is a program: it can fail in any way
        if str(error).startswith(str(path)) or "memory" in str(error):
            raise
        why = str(error).split("\n")[0] or type(error).__name__
        if isinstance(error, UnpicklingError):
            why = "it does what no table of tensors needs"
        raise damaged(path, f"its pickle cannot be read ({why})") from None
    entries = {
        name: Entry(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        for name, x in tensors.items()
    }
    kept = None if form == ".ckpt" else tensors  # a zip is mapped again
    reader = Reader(path, lambda: (content() if kept is None else kept).__getitem__)
    return Tensors(path, form, entries, dict.fromkeys(entries, reader), {}, foreign)


def acting(path: Path, name: str) -> ValueError:
    return ValueError(
        f"{path} is a pickle that runs code when it is opened (it calls "
        f"{clean(name)}); nothing of it was run: do not use it, take the .safetensors "
        "file"
    )


def flat(content: object, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a pickle's content, also those in tables within the table."""
    import torch

    for _ in range(9):  # a table may even hold itself
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, but named tensors are wanted: "
            "take another file"
        )
    tables, seen = [("", content)], {id(content)}
    while tables and len(seen) < 1000:
        prefix, table = tables.pop(0)
        for key, value in table.items():
            if isinstance(value, torch.Tensor) and isinstance(key, str | int):
                yield f"{prefix}{key}", value
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                tables.append((f"{prefix}{key}.", value))


def check_zip(path: Path) -> tuple[set[str], set[str]]:
    """What the pickle in a zip names and calls; torch writes one, a file a storage."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            places = [n for n in entries if re.fullmatch(r"[^/]*/data\.pkl", n)]
            place = places[0] if len(places) == 1 else ""
            size = sum(entry.file_size for entry in entries.values())
            kinds = {entry.compress_type for entry in entries.values()}
            for sentence, wrong in {
                "is a zip archive, but holds no checkpoint: unpack it and give what is "
                "in it": not place,
                f"holds a program (TorchScript), but {WANTED}: take the weights "
                "alone": place.replace("data.pkl", "constants.pkl") in entries,
                f"unfolds to {human(size)} (a zip bomb?): do not use it, take another "
                "copy": size > 2 * path.stat().st_size + LARGEST_PICKLE,
                "was packed a second time, after torch wrote it: take another "
                "copy": kinds != {zipfile.ZIP_STORED},
            }.items():
                if wrong:
                    raise ValueError(f"{path} {sentence}")
            if entries[place].file_size > LARGEST_PICKLE:
                raise damaged(path, "its table of tensors is absurdly long")
            with archive.open(place) as file:
                return check_steps(path, file)
    except Exception as error:  # damaged bytes fail in many ways
        if str(error).startswith(str(path)):
            raise
        raise damaged(path, f"or cut off ({error})") from None


def check_pickles(path: Path) -> tuple[set[str], set[str]]:
    """The same of a file from before 2020: five pickles, then the storages."""
    with path.open("rb") as file:
        named, called = check_steps(path, file)
        alone = file.tell() > 20  # the first is a number; else torch did not write it
        for _ in range(0 if alone else 4):
            more = check_steps(path, file)
            named, called = named | more[0], called | more[1]
    return named, called


def check_steps(path: Path, file: IO[bytes]) -> tuple[set[str], set[str]]:
    """All that a pickle names, and what of it it calls; told from its steps, none of
    which is taken: pickletools knows what each takes from the stack and leaves there.

    Tuples of tuples of tuples take for ever to hash, so each is weighed.
    """
    named, called, mark = set(), set(), pickletools.markobject
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for count, (step, argument, place) in enumerate(pickletools.genops(file)):
            if count > MOST_STEPS or (place or 0) > LARGEST_PICKLE:
                raise damaged(path, "its pickle never ends")
            if "PUT" in step.name or step.name == "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
                continue
            if "GET" in step.name:
                stack.append(memo[argument])
                continue
            taken: list[Any] = []
            wanted = list(step.stack_before)
            if mark in wanted:
                while (top := stack.pop()) is not mark:
                    taken.insert(0, top)
                wanted = wanted[: wanted.index(mark)]
            taken = [stack.pop() for _ in wanted][::-1] + taken
            left = argument if isinstance(argument, str) else 1
            if step.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                words = map(str, taken) if argument is None else argument.split(" ")
                left = ".".join(words).replace("__builtin__.", "builtins.")
                named.add(left)
            if step.name in ("REDUCE", "INST", "OBJ") or "NEWOBJ" in step.name:
                called.add(str(taken[0] if taken and step.name != "INST" else left))
            if step.name.startswith("TUPLE"):
                left = 1 + sum(x if type(x) is int else 1 for x in taken)
                if left > HEAVIEST:
                    raise damaged(path, "its pickle holds a tuple without end")
            stack += [mark if x is mark else left for x in step.stack_after]
    except Exception as error:  # damaged bytes fail in many ways
        if acts := sorted(called & named - NEEDED):
            raise acting(path, acts[0]) from None
        if str(error).startswith(str(path)):
            raise
        raise damaged(path, f"its pickle cannot be read ({error})") from None
    return named, called


def read_weights(folder: str | Path) -> Tensors:
    """The tensors of one part of a model's folder, in one file or in several (sharded).

    A .safetensors file is taken before a .bin, a plain one before its fp16 variant.
    """
    folder = Path(folder)
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            return read_shards(index)
    raise ValueError(
        f"{folder} holds no weights, but a .safetensors file is wanted: copy it again"
    )


def read_shards(index: Path) -> Tensors:
    """Weights cut into several files; the index says which tensor lies where."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise damaged(index, "it has no weight_map")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise damaged(index, f"it says {clean(file)} for {clean(name)}")
    files = {x: read_tensors(index.parent / x) for x in dict.fromkeys(places.values())}
    for name, file in places.items():
        if name not in files[file]:
            raise damaged(index.parent / file, f"it lacks the tensor {clean(name)}")
    first = next(iter(files.values()))
    entries = {name: files[file].entries[name] for name, file in places.items()}
    readers = {name: files[file].readers[name] for name, file in places.items()}
    foreign = [name for file in files.values() for name in file.foreign]
    return Tensors(index, first.format, entries, readers, first.metadata, foreign)


def read_index(folder: Path) -> dict:
    """`model_index.json`, which says what a folder in diffusers' layout holds."""
    if (folder / "model_index.json").exists():
        return read_json(folder / "model_index.json")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from None
    files = [name for name in names if name.lower().endswith((".safetensors", ".ckpt"))]
    advice = "give the folder of a model, or a file"
    advice = f"give one of its files, such as {files[0]}" if files else advice
    raise ValueError(f"{folder} is no model, for it has no model_index.json: {advice}")


def find_parts(folder: Path, index: dict) -> list[str]:
    """The subfolders with weights. Those that the index names are there."""
    pairs = {n: x for n, x in index.items() if isinstance(x, list) and len(x) == 2}
    named = [name for name, pair in pairs.items() if None not in pair]
    if str(index.get("_class_name")).startswith("StableDiffusion"):
        named += [name for name in PARTS if name not in pairs]
    for name in named:
        there = (folder / name).is_dir() or name in OPTIONAL
        if not name.isidentifier() or not there:
            raise ValueError(
                f"{folder} has no folder {clean(name)}, but its model_index.json wants "
                "one: copy it again"
            )
    named += [name for name in ("clip", "judge") if name not in named]  # our own
    found = [n for n in named if (folder / n).is_dir() and not n.startswith(WEIGHTLESS)]
    if not found:
        raise ValueError(
            f"{folder} has no part with weights, but unet, vae and text_encoder are "
            "wanted: copy it again"
        )
    return found


def text_writer(text: str) -> Callable[[Path], object]:
    """A text file, for `sdlearn.disk.write_files`."""
    return lambda path: path.write_text(text, encoding="utf-8", newline="\n")


def json_writer(content: dict) -> Callable[[Path], object]:
    """A JSON file, for `sdlearn.disk.write_files`."""
    return text_writer(json.dumps(content, indent=2) + "\n")


def tensor_writer(
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    pickled: bool = False,
) -> Callable[[Path], object]:
    """A .safetensors file, or a pickle (.ckpt); dtype None: as the tensors are."""

    def write(path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        copies = (x.detach().to("cpu", dtype).contiguous() for x in tensors.values())
        ready = dict(zip(tensors, copies, strict=True))
        need = sum(tensor.nbytes for tensor in ready.values())
        if need > (free := shutil.disk_usage(path.parent).free):
            raise ValueError(
                f"{path.parent} has {human(free)} free, but {human(need)} are to be "
                "written: make room"
            )
        if pickled:
            torch.save({"state_dict": ready}, path)
        else:
            save_file(ready, path, metadata={"format": "pt"})

    return write
