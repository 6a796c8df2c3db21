"""A path, or a model on the Hugging Face hub -> where it lies on this machine.

Nothing needs the hub: the course ships its own model, and a file that one has already
is read from where it is. Downloads go on where they stopped; checksums are compared.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from sdlearn.checkpoint.files import WEIGHTS, clean, human

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SHORT = {"sd15": f"{SD15}/v1-5-pruned-emaonly.safetensors"}
WANTED = "give sd15, OWNER/NAME, OWNER/NAME/FILE or an address on huggingface.co"
NEEDED = ("unet", "vae", "text_encoder")
FOLDERS = (*NEEDED, "tokenizer", "scheduler", "text_encoder_2", "tokenizer_2")
SMALL = (".json", ".txt")  # what a model folder has beside its weights
TRIES = 6  # of a connection that breaks
FILES = (".safetensors", ".sft", ".ckpt", ".bin", ".pt", ".pth")


class Place(NamedTuple):
    """Something on the hub: a file, or without one all that a model needs."""

    repo: str
    file: str = ""
    revision: str | None = None


def is_hub_id(what: str) -> bool:
    """Is it OWNER/NAME, and does nothing about it look like a path?"""
    owner = what.partition("/")[0]
    if what.lower().endswith(FILES) or owner == "checkpoints" or Path(owner).exists():
        return False
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", what))


def model_name(path: Path) -> str:
    """What a model is called: its own name, not that of the file behind a link."""
    name = path.name if path.name.strip(".") else path.resolve().name
    return re.sub(r"(\.safetensors|\.sft|\.ckpt)$", "", name, flags=re.IGNORECASE)


def find_model(what: str | Path, folder: str | Path = "checkpoints") -> Path:
    """A path as it is; OWNER/NAME in `folder`, downloaded if it is not there yet."""
    path = Path(what).expanduser()
    if path.exists() or path.is_symlink():
        return path
    if not isinstance(what, str) or not is_hub_id(what):
        seen = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
        raise ValueError(
            f"there is no model at {clean(what, 400)}{seen}: give a diffusers folder, "
            "a .safetensors or .ckpt file, or OWNER/NAME of one on the Hugging Face hub"
        )
    there = Path(folder) / what
    if (there / "model_index.json").is_file():
        return there
    if len(alone := [*there.glob("*.safetensors")]) == 1:
        return alone[0]
    try:
        return download(what, folder)
    except ValueError as error:
        said = f"there is no model at {what}, and from the hub: {error}"
        raise ValueError(said) from None


def find_place(what: str, endpoint: str = "https://huggingface.co") -> Place:
    """sd15, an id or an address -> a place on the hub."""
    what, revision = SHORT.get(what, what), None
    words = what.split("/")
    if "://" in what:
        url = urlsplit(what)
        if url.netloc not in ("huggingface.co", "hf.co", urlsplit(endpoint).netloc):
            raise ValueError(
                f"{clean(what)} is not on the Hugging Face hub, so there is no "
                "checksum to compare: download it with a browser into checkpoints/, "
                "and see `sdlearn inspect`"
            )
        words = [unquote(word) for word in url.path.strip("/").split("/")]
        if words[2:3] in (["resolve"], ["blob"], ["tree"]):
            revision, words = next(iter(words[3:4]), None), [*words[:2], *words[4:]]
    plain = [re.fullmatch(r"\w[\w.+ -]*", word) and ".." not in word for word in words]
    if len(words) < 2 or not all(plain):
        raise ValueError(f"{clean(what)!r} is no model on the hub: {WANTED}")
    return Place("/".join(words[:2]), "/".join(words[2:]), revision)


def choose(place: Place, there: dict[str, RepoSibling]) -> list[str]:
    """The files to download, of those that are there."""
    safe = sorted(x for x in there if x.endswith(".safetensors") and "/" not in x)
    some = ", ".join(map(clean, safe[:3]))
    if place.file in there:
        return [place.file]
    if place.file:
        known = f"it has {some}" if safe else "look at its page"
        raise ValueError(f"{place.repo} has no file {clean(place.file)}: {known}")
    if "model_index.json" not in there:
        if len(safe) == 1:
            return safe
        found = f"{len(safe)} .safetensors files ({some} ...)" if safe else "no model"
        advice = f"name the file that you want, {place.repo}/FILE"
        raise ValueError(f"{place.repo} has {found}: {advice}")
    chosen = ["model_index.json"]
    for folder in FOLDERS:
        inside = [x for x in there if re.fullmatch(rf"{folder}/[\w.-]+", x)]
        small = (x for x in inside if x.endswith(SMALL) and ".index." not in x)
        weights = weights_of(folder, inside)
        refiner = folder == "text_encoder" and weights_of(f"{folder}_2", [*there])
        if folder in NEEDED and not weights and not refiner:
            raise ValueError(
                f"{place.repo} has no .safetensors file in {folder}/: take another "
                "model"
            )
        chosen += [*sorted(small), *weights]
    return chosen


def weights_of(folder: str, inside: list[str]) -> list[str]:
    """The weights that we would read, whole or cut into shards."""
    for name in (f"{folder}/{x}" for x in WEIGHTS if x.endswith(".safetensors")):
        if name in inside:
            return [name]
        if f"{name}.index.json" in inside:
            shard = re.escape(name).replace(r"\.safe", r"-\d+-of-\d+\.safe")
            shards = sorted(x for x in inside if re.fullmatch(shard, x))
            return [f"{name}.index.json", *shards]
    return []


def checksum(path: Path, sibling: RepoSibling) -> bool:
    """Is a file what the hub says? Large ones have a SHA-256, small ones git's."""
    with path.open("rb") as file:
        if sibling.lfs:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            return found == sibling.lfs["sha256"]
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        return hashlib.file_digest(file, lambda: digest).hexdigest() == sibling.blob_id


def download(
    what: str, folder: str | Path = "checkpoints", endpoint: str | None = None
) -> Path:
    """Download a model into `folder`; returns its file, or its folder.

    A model is put into OWNER/NAME, a file that is named into `folder` itself. What is
    there already is kept and compared. Raises ValueError, one sentence, for all that
    can go wrong on the way; a second call goes on where it stopped.
    """
    try:
        from huggingface_hub import HfApi, constants, logging
    except ImportError:
        said = "huggingface_hub, which downloads, is not installed: pip install "
        raise ValueError(f"{said}huggingface_hub") from None
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    place = find_place(what, endpoint)
    logging.set_verbosity_error()  # its retries; what goes wrong is said below
    with clear_errors(place, endpoint):
        info = HfApi(endpoint).model_info(
            place.repo, revision=place.revision, files_metadata=True, timeout=30
        )
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    names = choose(place, there)
    for name in names:
        known = there[name].lfs or there[name].blob_id
        if there[name].size is None or not known:
            raise ValueError(
                f"{endpoint} tells no size or checksum of {clean(name)}: take another "
                "model"
            )
    home = Path(folder) if place.file else Path(folder) / place.repo
    paths = {home / (PurePosixPath(x).name if place.file else x): x for x in names}
    todo = {p: there[x] for p, x in paths.items() if not is_there(p, there[x])}
    check_space(todo, home)
    for path, sibling in todo.items():
        with clear_errors(place, endpoint):
            file = Place(place.repo, sibling.rfilename, info.sha)
            fetch(file, sibling, path, endpoint)
    return home if "model_index.json" in names else next(iter(paths))


def is_there(path: Path, sibling: RepoSibling) -> bool:
    """Has the file been downloaded before? Another one is never written over."""
    if not path.exists():
        return False
    same = path.is_file() and path.stat().st_size == sibling.size
    if not same or not checksum(path, sibling):
        raise ValueError(
            f"{path} is there already and is another file than the hub's: move it "
            "away, or give -o FOLDER"
        )
    return True


def part_of(path: Path, sibling: RepoSibling) -> Path:
    """Where a file is while it is incomplete; another version of it has another one."""
    version = sibling.lfs["sha256"] if sibling.lfs else sibling.blob_id
    return path.with_name(f"{path.name}.{version[:8]}.part")


def check_space(todo: dict[Path, RepoSibling], folder: Path) -> None:
    """Find out before the download, not at its end, whether it fits."""
    parts = [part_of(path, sibling) for path, sibling in todo.items()]
    begun = sum(part.stat().st_size for part in parts if part.exists())
    need = sum(sibling.size for sibling in todo.values()) - begun
    where = next(x for x in (folder, *folder.absolute().parents) if x.is_dir())
    if need > (free := shutil.disk_usage(where).free):
        raise ValueError(
            f"{human(need)} are still to download, but {folder} has {human(free)} "
            "free: give -o FOLDER"
        )


def fetch(place: Place, sibling: RepoSibling, path: Path, endpoint: str) -> None:
    """One file, from where it stopped last time; named when its checksum is right.

    The library's own hf_hub_download throws away what it has when it is interrupted.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import try_to_load_from_cache

    path.parent.mkdir(parents=True, exist_ok=True)
    part, size = part_of(path, sibling), sibling.size
    lock = part.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=1):
            try:
                cached = try_to_load_from_cache(*place[:2], revision=place.revision)
                if isinstance(cached, str) and checksum(Path(cached), sibling):
                    shutil.copyfile(cached, part)  # another program has downloaded it
                if part.exists() and part.stat().st_size > size:
                    part.unlink()
                with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
                    bar.set_description(path.name)
                    stream(place, part, size, endpoint, bar)
                if not checksum(part, sibling):
                    part.unlink()
                    raise ValueError(
                        f"{path.name} came with a wrong checksum and was deleted: run "
                        "the same command again"
                    )
                os.replace(part, path)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise ValueError(
            "another process is downloading the same file: wait until it is done"
        ) from None


def stream(place: Place, part: Path, size: int, endpoint: str, bar: tqdm) -> None:
    """Add to `part` what it lacks of `size` bytes; a broken connection is taken up."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(*place[:2], revision=place.revision, endpoint=endpoint)
    with part.open("ab") as file:
        bar.update(file.tell())
        for left in reversed(range(TRIES)):
            begin, headers = file.tell(), build_hf_headers()
            if begin >= size:
                return
            headers |= {"Accept-Encoding": "identity"}
            headers |= {"Range": f"bytes={begin}-"} if begin else {}
            asked = {"headers": headers, "follow_redirects": True, "timeout": 30}
            try:
                with get_session().stream("GET", url, **asked) as answer:
                    hf_raise_for_status(answer)
                    if begin and answer.status_code != 206:  # it begins anew
                        file.truncate(0)
                        bar.reset()
                    for block in answer.iter_bytes():
                        file.write(block)
                        bar.update(len(block))
                    if file.tell() >= size:
                        return
            except Exception as error:
                if left == 0 or getattr(error, "response", None) is not None:
                    raise
                if isinstance(error, OSError) and error.filename or file.closed:
                    raise
    found = part.stat().st_size
    raise ConnectionError(f"it ended after {found:,} of {size:,} bytes")


@contextlib.contextmanager
def clear_errors(place: Place, endpoint: str) -> Iterator[None]:
    """One sentence for whatever the hub, the network or the disk does."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError:  # a sentence of ours
            raise
        raise ValueError(sentence(error, place, endpoint)) from None


def sentence(error: Exception, place: Place, endpoint: str) -> str:
    """What went wrong, told by the kind of error: the first that fits."""
    repo, page = place.repo, f"{endpoint}/{place.repo}"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "HfHubHTTPError" in kinds and status in (401, 403):
        kinds.add("RepositoryNotFoundError")
    for kind, said in {
        "ValueError": f"{repo} cannot be downloaded ({clean(error)}): see {page}",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: "
        "unset it to download",
        "GatedRepoError": f"{repo} has terms to accept: do so at {page}, then "
        "`hf auth login`",
        "RevisionNotFoundError": f"{repo} has no version {clean(place.revision)}: "
        f"see {page}",
        "EntryNotFoundError": f"{repo} has no file {clean(place.file)} any more: "
        f"see {page}",
        "RepositoryNotFoundError": f"the hub has no model {repo}, or not for you: see "
        f"{page}, and log in with `hf auth login` if it is there",
        "HfHubHTTPError": f"the hub at {endpoint} answers {status} for {repo}: try "
        "again later",
    }.items():
        if kind in kinds:
            return said
    if getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full: make room and run the same command, it goes on there"
    if file := getattr(error, "filename", None):
        why = getattr(error, "strerror", None)
        return f"{file} cannot be written ({why}): give -o FOLDER"
    why = clean(next(iter(str(error).splitlines()), "") or type(error).__name__, 90)
    return (
        f"{repo} cannot be downloaded from {endpoint} ({why}): check the network and "
        "run the same command, it goes on where it stopped"
    )
