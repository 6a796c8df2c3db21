"""A model on the Hugging Face hub -> checkpoints/: resumed where it stopped, its checksum compared.

Nothing needs it: the course ships its own model, and a file that one has already is read from where it is.
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

from sdlearn.headers import clean, human

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

SHORT = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5/v1-5-pruned-emaonly.safetensors"
}
WANTED = f"give {', '.join(SHORT)}, OWNER/NAME, OWNER/NAME/FILE or an address on huggingface.co"
FOLDERS = (
    "unet",
    "vae",
    "text_encoder",
    "tokenizer",
    "scheduler",
    "text_encoder_2",
    "tokenizer_2",
)
SMALL = (".json", ".txt")  # what a model folder has beside its weights
WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
)


class Place(NamedTuple):
    """Something on the hub: a file, or without one all that a model needs."""

    repo: str
    file: str = ""
    revision: str | None = None


def find_place(what: str, endpoint: str = "https://huggingface.co") -> Place:
    """sd15, an id or an address -> a place on the hub."""
    what = SHORT.get(what, what)
    revision = None
    if "://" in what:
        url = urlsplit(what)
        if url.netloc not in ("huggingface.co", "hf.co", urlsplit(endpoint).netloc):
            raise ValueError(
                f"{clean(what)} is not on the Hugging Face hub, so there is no checksum to compare: download it with a "
                "browser into checkpoints/, and see `sdlearn inspect`"
            )
        words = [unquote(word) for word in url.path.strip("/").split("/")]
        if words[2:3] in (["resolve"], ["blob"], ["tree"]):
            revision, words = (words[3:4] or [None])[0], [*words[:2], *words[4:]]
    else:
        words = what.split("/")
    good = all(
        re.fullmatch(r"\w[\w.+ -]*", word) and ".." not in word for word in words
    )
    if len(words) < 2 or not good:
        raise ValueError(f"{clean(what)!r} is no model on the hub: {WANTED}")
    return Place("/".join(words[:2]), "/".join(words[2:]), revision)


def choose(place: Place, there: dict[str, RepoSibling]) -> list[str]:
    """The files to download, of those that are there."""
    safe = sorted(
        name for name in there if name.endswith(".safetensors") and "/" not in name
    )
    if place.file:
        if place.file not in there:
            known = (
                f"it has {', '.join(map(clean, safe[:3]))}"
                if safe
                else "look at its page"
            )
            raise ValueError(f"{place.repo} has no file {clean(place.file)}: {known}")
        return [place.file]
    if "model_index.json" not in there:
        if len(safe) != 1:
            found = (
                f"{len(safe)} .safetensors files ({', '.join(map(clean, safe[:3]))} ...)"
                if safe
                else "no model"
            )
            raise ValueError(
                f"{place.repo} has {found}: name the file that you want, {place.repo}/FILE"
            )
        return safe
    chosen = ["model_index.json"]
    for folder in FOLDERS:
        inside = [name for name in there if re.fullmatch(rf"{folder}/[\w.-]+", name)]
        chosen += sorted(
            name for name in inside if name.endswith(SMALL) and ".index." not in name
        )
        chosen += [
            f"{folder}/{name}" for name in WEIGHTS if f"{folder}/{name}" in inside
        ][:1]
    if missing := [
        f
        for f in FOLDERS[:3]
        if not any(n.startswith(f"{f}/") and n.endswith(WEIGHTS) for n in chosen)
    ]:
        raise ValueError(
            f"{place.repo} has no .safetensors file in {missing[0]}/: take another model"
        )
    return chosen


def checksum(path: Path, sibling: RepoSibling) -> bool:
    """Is the file what the hub says? Large files have a SHA-256 there, small ones the SHA-1 that git gives them."""
    with path.open("rb") as file:
        if sibling.lfs:
            return (
                hashlib.file_digest(file, "sha256").hexdigest() == sibling.lfs["sha256"]
            )
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        return hashlib.file_digest(file, lambda: digest).hexdigest() == sibling.blob_id


def download(
    what: str, folder: str | Path = "checkpoints", endpoint: str | None = None
) -> Path:
    """Download a model into `folder`; returns its file, or its folder. What is there already is kept and compared.

    Raises ValueError, one sentence, for all that can go wrong on the way; a second call goes on where it stopped.
    """
    from huggingface_hub import HfApi, constants, logging

    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    place = find_place(what, endpoint)
    logging.set_verbosity_error()  # its retries; what in the end goes wrong is said below
    with clear_errors(place, endpoint):
        info = HfApi(endpoint).model_info(
            place.repo, revision=place.revision, files_metadata=True, timeout=30
        )
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    names = choose(place, there)
    if unsure := [
        name
        for name in names
        if there[name].size is None or not (there[name].lfs or there[name].blob_id)
    ]:
        raise ValueError(
            f"{endpoint} tells no size or checksum of {clean(unsure[0])}: take another model"
        )
    whole = len(names) > 1
    target = Path(folder) / (
        place.repo.rpartition("/")[2] if whole else PurePosixPath(names[0]).name
    )
    paths = {
        target / PurePosixPath(name) if whole else target: there[name] for name in names
    }
    todo = {
        path: sibling for path, sibling in paths.items() if not is_there(path, sibling)
    }
    check_space(todo, Path(folder))
    for path, sibling in todo.items():
        with clear_errors(place, endpoint):
            fetch(
                Place(place.repo, sibling.rfilename, info.sha), sibling, path, endpoint
            )
    return target


def is_hub_id(what: str) -> bool:
    """Does it look like OWNER/NAME, and not like a path that was misspelt?"""
    owner, _, name = what.partition("/")
    words = all(re.fullmatch(r"\w[\w.-]*", word) for word in (owner, name))
    return (
        words
        and not Path(owner).exists()
        and not name.endswith((".safetensors", ".ckpt", ".bin", ".pt"))
    )


def find_on_hub(what: str, folder: str | Path = "checkpoints") -> Path:
    """OWNER/NAME -> its place on this machine: in `folder`, downloaded into it if it is not there yet."""
    there = Path(folder) / what.partition("/")[2]
    if (there / "model_index.json").is_file():
        return there
    try:
        return download(what, folder)
    except ValueError as error:
        raise ValueError(
            f"there is no model at {what}, and from the hub: {error}"
        ) from None


def is_there(path: Path, sibling: RepoSibling) -> bool:
    """Has the file been downloaded before? Another one of its name is never written over."""
    if not path.exists():
        return False
    if (
        not path.is_file()
        or path.stat().st_size != sibling.size
        or not checksum(path, sibling)
    ):
        raise ValueError(
            f"{path} is there already and is another file than the hub's: move it away, or give -o FOLDER"
        )
    return True


def part_of(path: Path, sibling: RepoSibling) -> Path:
    """Where a file is while it is incomplete; another version of it has another one."""
    version = sibling.lfs["sha256"] if sibling.lfs else sibling.blob_id
    return path.with_name(f"{path.name}.{version[:8]}.part")


def check_space(todo: dict[Path, RepoSibling], folder: Path) -> None:
    """Find out before the download, not at its end, whether it fits."""
    parts = [part_of(path, sibling) for path, sibling in todo.items()]
    need = sum(sibling.size for sibling in todo.values()) - sum(
        part.stat().st_size for part in parts if part.exists()
    )
    where = next(
        place for place in (folder, *folder.resolve().parents) if place.is_dir()
    )
    if need > (free := shutil.disk_usage(where).free):
        raise ValueError(
            f"{human(need)} are still to download, but {folder} has {human(free)} free: give -o FOLDER"
        )


def fetch(place: Place, sibling: RepoSibling, path: Path, endpoint: str) -> None:
    """One file, from where it stopped the last time. It gets its name when its checksum is right."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path, sibling)
    lock = part.with_suffix(".lock")
    with WeakFileLock(lock, timeout=1):
        try:
            cached = try_to_load_from_cache(
                place.repo, place.file, revision=place.revision
            )
            if isinstance(cached, str) and checksum(
                Path(cached), sibling
            ):  # another program has downloaded it
                shutil.copyfile(cached, part)
            if part.exists() and part.stat().st_size > sibling.size:
                part.unlink()
            url = hf_hub_url(
                place.repo, place.file, revision=place.revision, endpoint=endpoint
            )
            with part.open("ab") as file:
                http_get(
                    url,
                    file,
                    resume_size=file.tell(),
                    headers=build_hf_headers(),
                    expected_size=sibling.size,
                    displayed_filename=path.name,
                )
            if not checksum(part, sibling):
                part.unlink()
                raise ValueError(
                    f"{path.name} came with a wrong checksum and was deleted: run the same command again"
                )
            os.replace(part, path)
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def clear_errors(place: Place, endpoint: str) -> Iterator[None]:
    """One sentence for whatever the hub, the network or the disk does."""
    import filelock
    from huggingface_hub import errors

    network = errors.HfHubHTTPError.__bases__[
        0
    ]  # of the HTTP library that this version uses
    page = f"{endpoint}/{place.repo}"
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ValueError(
            "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to download"
        ) from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{place.repo} has terms to accept: do so at {page}, then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(
            f"{place.repo} has no version {clean(place.revision)}: see {page}"
        ) from None
    except errors.EntryNotFoundError:
        raise ValueError(
            f"{place.repo} has no file {clean(place.file)} any more: see {page}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            what = f"the hub has no model {place.repo}, or not for you"
            raise ValueError(
                f"{what}: see {page}, and log in with `hf auth login` if it is there"
            ) from None
        raise ValueError(
            f"the hub at {endpoint} answers {status} for {place.repo}: try again later"
        ) from None
    except filelock.Timeout:
        raise ValueError(
            "another process is downloading the same file: wait until it is done"
        ) from None
    except (network, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise ValueError(
                "the disk is full: make room and run the same command, it goes on there"
            ) from None
        if getattr(error, "filename", None):
            raise ValueError(
                f"{error.filename} cannot be written ({error.strerror}): give -o FOLDER"
            ) from None
        why = clean(next(iter(str(error).splitlines()), "") or type(error).__name__, 90)
        raise ValueError(
            f"{place.repo} cannot be downloaded from {endpoint} ({why}): check the network and run the same command, "
            "it goes on where it stopped"
        ) from None
