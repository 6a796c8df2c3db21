"""Downloads, against a stand-in for the hub on this machine: whole, interrupted, spoiled, refused."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import SimpleNamespace

import pytest
from filelock import FileLock
from huggingface_hub import constants
from random_model import save_random_model

from sdlearn import cli
from sdlearn.checkpoint import hub
from sdlearn.checkpoint.hub import Place, choose, download, find_model, find_place, is_hub_id, model_name
from sdlearn.checkpoint.load import load

COMMIT = "c" * 40
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FILE = "v1-5-pruned-emaonly.safetensors"
WEIGHTS = hashlib.shake_256(b"weights").digest(300_000)


class Hub(ThreadingHTTPServer):
    """The three addresses of the hub that a download needs, and the ways in which they fail."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {SD15: {FILE: WEIGHTS, "model_index.json": b"{}", "README.md": b"x"}}
        self.ranges: list[str | None] = []  # of each request for a file
        self.served: dict[str, bytes] = {}  # what is sent instead of a file
        self.break_after: list[int] = []  # of the next requests for files: hang up after so many bytes
        self.status: tuple[int, dict[str, str]] | None = None  # the answer to all requests
        self.info: dict[str, dict] = {}  # what is told of a file beside, or instead of, the truth
        self.gone: list[str] = []  # files that are listed, but are not there
        self.know_ranges, self.stall_at, self.go_on = True, 10**9, Event()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients hang up in these tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.server.status:
            status, headers = self.server.status
            return self.answer(status, b"{}", **headers)
        path = self.path.partition("?")[0]
        for repo, files in self.server.repos.items():
            if re.fullmatch(f"/api/models/{repo}(/revision/(main|{COMMIT}))?", path):
                told = self.server.info
                siblings = [sibling_of(name, content) | told.get(name, {}) for name, content in files.items()]
                body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
                return self.answer(200, body, Content_Type="application/json")
            if path.startswith(f"/api/models/{repo}/revision/"):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            prefix = f"/{repo}/resolve/{COMMIT}/"
            if path.startswith(prefix) and (name := path.removeprefix(prefix)) in files.keys() - self.server.gone:
                if not name.endswith(".safetensors"):
                    return self.send_file(self.server.served.get(name, files[name]))
                return self.answer(302, Location=f"/storage/{repo}/{name}")  # large files are elsewhere
            if path.startswith(f"/storage/{repo}/"):
                name = path.removeprefix(f"/storage/{repo}/")
                return self.send_file(self.server.served.get(name, files[name]))
        known = any(path.startswith(f"/{repo}/") for repo in self.server.repos)
        return self.answer(404, b"{}", X_Error_Code="EntryNotFound" if known else "RepoNotFound")

    def send_file(self, content):
        self.server.ranges.append(wanted := self.headers.get("Range"))
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.know_ranges else 0
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        last = first + self.server.break_after.pop(0) if self.server.break_after else len(content)
        last, stall = min(last, len(content)), self.server.stall_at
        self.wfile.write(content[first : min(last, stall)])
        if first < stall < last:
            self.server.go_on.wait(60)
            self.wfile.write(content[stall:last])
        if last < len(content):
            self.close_connection = True


def sibling_of(name, content):
    """What the hub tells of a file: SHA-256 of the large ones, git's SHA-1 of the small ones."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"rfilename": name, "size": len(content), "blobId": blob}
    if name.endswith(".safetensors"):
        found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
    return found


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stand-in; the library's settings are read at its import, so they are changed here."""
    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_sd15(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # a bar is only drawn for people
    target = download("sd15", tmp_path / "new" / "checkpoints", server.endpoint)
    assert target == tmp_path / "new" / "checkpoints" / FILE and target.read_bytes() == WEIGHTS
    assert listing(tmp_path) == [f"new/checkpoints/{FILE}"]
    assert "100%" in capsys.readouterr().err  # progress
    assert server.ranges == [None]
    assert download("sd15", target.parent, server.endpoint) == target and server.ranges == [None]  # is there already


def test_a_broken_connection_is_resumed_at_once(server, tmp_path):
    server.break_after = [100_000, 50_000]
    assert download("sd15", tmp_path, server.endpoint).read_bytes() == WEIGHTS
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_an_interrupted_download_goes_on_the_next_time(server, tmp_path):
    server.break_after = [100_000] + 5 * [0]
    with pytest.raises(ValueError, match="run the same command, it goes on where it stopped"):
        download("sd15", tmp_path, server.endpoint)
    assert re.fullmatch(rf"{FILE}\.[0-9a-f]{{8}}\.part", *listing(tmp_path))
    server.ranges.clear()
    assert download("sd15", tmp_path, server.endpoint).read_bytes() == WEIGHTS
    assert server.ranges == ["bytes=100000-"] and listing(tmp_path) == [FILE]


def test_a_server_that_knows_no_ranges(server, tmp_path):
    server.break_after, server.know_ranges = [100_000], False
    assert download("sd15", tmp_path, server.endpoint).read_bytes() == WEIGHTS
    assert server.ranges == [None, "bytes=100000-"]


def test_remains_of_another_version_are_not_mixed_in(server, tmp_path):
    server.break_after = [100_000] + 5 * [0]
    with pytest.raises(ValueError):
        download("sd15", tmp_path, server.endpoint)
    server.repos[SD15][FILE] = WEIGHTS[::-1]
    assert download("sd15", tmp_path, server.endpoint).read_bytes() == WEIGHTS[::-1]
    assert server.ranges[-1] is None


@pytest.mark.parametrize("served", [WEIGHTS[:-1] + b"?", WEIGHTS[::-1]])
def test_a_wrong_checksum(server, tmp_path, served):
    server.served[FILE] = served
    with pytest.raises(ValueError, match="came with a wrong checksum and was deleted: run the same command again"):
        download("sd15", tmp_path, server.endpoint)
    assert listing(tmp_path) == []
    server.served.clear()
    assert download("sd15", tmp_path, server.endpoint).read_bytes() == WEIGHTS


@pytest.mark.parametrize("served", [WEIGHTS[:-5], WEIGHTS + b"more", b"<html>log in</html>"])
def test_a_wrong_size(server, tmp_path, served):
    server.served[FILE] = served
    with pytest.raises(ValueError, match="cannot be downloaded from http.*it ended after|came with a wrong checksum"):
        download("sd15", tmp_path, server.endpoint)
    assert FILE not in listing(tmp_path)
    server.served.clear()
    if not WEIGHTS.startswith(served):  # what cannot be continued is found out by its checksum
        with pytest.raises(ValueError, match="checksum") if len(served) < len(WEIGHTS) else nothing():
            download("sd15", tmp_path, server.endpoint)
    assert download("sd15", tmp_path, server.endpoint).read_bytes() == WEIGHTS


class nothing:
    def __enter__(self):
        pass

    def __exit__(self, *args):
        pass


Usage = namedtuple("Usage", "total used free")


def test_the_disk_is_looked_at_first(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 299_999))
    with pytest.raises(ValueError, match=r"300.00 kB are still to download, but .* has 300.00 kB free: give -o FOLDER"):
        download("sd15", tmp_path / "new", server.endpoint)
    assert server.ranges == [] and listing(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 200_001))  # enough for the rest
    hub.part_of(tmp_path / FILE, SimpleNamespace(lfs=sibling_of(FILE, WEIGHTS)["lfs"])).write_bytes(WEIGHTS[:100_000])
    assert download("sd15", tmp_path, server.endpoint).read_bytes() == WEIGHTS


def test_the_disk_becomes_full(server, tmp_path, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "stream", fill)
    with pytest.raises(ValueError, match="the disk is full: make room"):
        download("sd15", tmp_path, server.endpoint)


def test_a_target_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file.* cannot be written \((Not a directory|File exists)\): give -o FOLDER"):
        download("sd15", tmp_path / "file", server.endpoint)


def test_another_file_of_that_name_is_left_alone(server, tmp_path):
    (tmp_path / FILE).write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there already and is another file than the hub's: move it away"):
        download("sd15", tmp_path, server.endpoint)
    assert (tmp_path / FILE).read_bytes() == b"mine" and server.ranges == []


def test_two_downloads_at_once(server, tmp_path):
    part = hub.part_of(tmp_path / FILE, SimpleNamespace(lfs=sibling_of(FILE, WEIGHTS)["lfs"]))
    going_on = pytest.raises(ValueError, match="another process is downloading the same file: wait until it is done")
    with FileLock(part.with_suffix(".lock")), going_on:
        download("sd15", tmp_path, server.endpoint)
    assert download("sd15", tmp_path, server.endpoint).read_bytes() == WEIGHTS


def test_what_another_program_has_downloaded_is_not_downloaded_again(server, tmp_path):
    snapshot = tmp_path / "cache" / f"models--{SD15.replace('/', '--')}" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / FILE).write_bytes(WEIGHTS)
    assert download("sd15", tmp_path / "here", server.endpoint).read_bytes() == WEIGHTS and server.ranges == []
    (tmp_path / "here" / FILE).unlink()
    (snapshot / FILE).write_bytes(WEIGHTS[::-1])  # spoiled
    assert download("sd15", tmp_path / "here", server.endpoint).read_bytes() == WEIGHTS and server.ranges == [None]


NOT_THERE = f"the hub has no model {SD15}, or not for you: see http.*, and log in with `hf auth login` if it is there"
REFUSALS = {
    "no such model": (404, {"X-Error-Code": "RepoNotFound"}, NOT_THERE),
    "not for strangers": (401, {}, NOT_THERE),
    "wrong token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, NOT_THERE),
    "terms": (403, {"X-Error-Code": "GatedRepo"}, f"{SD15} has terms to accept: do so at http.*, then `hf auth login`"),
    "forbidden": (403, {}, NOT_THERE),
    "out of order": (500, {}, "answers 500 for .*: try again later"),
    "too many": (429, {}, "answers 429 for .*: try again later"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals(server, tmp_path, refusal):
    status, headers, sentence = REFUSALS[refusal]
    server.status = status, headers
    with pytest.raises(ValueError, match=sentence) as error:
        download("sd15", tmp_path, server.endpoint)
    assert "\n" not in str(error.value) and listing(tmp_path) == []


def test_no_version_no_file_no_checksum(server, tmp_path):
    with pytest.raises(ValueError, match=f"{SD15} has no version old: see http"):
        download(f"{server.endpoint}/{SD15}/blob/old/{FILE}", tmp_path, server.endpoint)
    with pytest.raises(ValueError, match=f"{SD15} has no file other.safetensors: it has {FILE}"):
        download(f"{SD15}/other.safetensors", tmp_path, server.endpoint)
    server.info[FILE] = {"size": None, "lfs": None, "blobId": None}
    with pytest.raises(ValueError, match=f"tells no size or checksum of {FILE}"):
        download("sd15", tmp_path, server.endpoint)
    assert listing(tmp_path) == []


def test_a_file_vanishes_between_listing_and_download(server, tmp_path):
    server.gone.append(FILE)
    with pytest.raises(ValueError, match=f"{SD15} has no file {FILE} any more"):
        download("sd15", tmp_path, server.endpoint)


def test_without_a_network(server, tmp_path, monkeypatch, capsys):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="cannot be downloaded from http://127.0.0.1:.*: check the network"):
        download("sd15", tmp_path, server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["download", "sd15", "-o", "here"]) == 2
    assert capsys.readouterr().err == "sdlearn: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to download\n"
    assert listing(tmp_path) == []


def test_a_whole_folder(server, tmp_path):
    save_random_model(tmp_path / "theirs")
    there = {name: (tmp_path / "theirs" / name).read_bytes() for name in listing(tmp_path / "theirs")}
    clutter = {"unet/diffusion_pytorch_model.bin": b"x", "safety_checker/model.safetensors": b"x", "sd.ckpt": b"x",
               "unet/diffusion_pytorch_model.fp16.safetensors": b"x", "big.safetensors": b"x"}  # fmt: skip
    server.repos["me/small-sd"] = there | clutter
    target = download("me/small-sd", tmp_path / "mine", server.endpoint)
    assert target == tmp_path / "mine" / "me" / "small-sd"
    assert listing(target) == [name for name in sorted(there) if not name.startswith("clip/")]
    assert load(target).size == (32, 32)
    before = len(server.ranges)
    (target / "vae" / "config.json").unlink()
    download("me/small-sd", tmp_path / "mine", server.endpoint)
    assert len(server.ranges) == before + 1  # only what is missing
    server.served["vae/config.json"] = b"\n" * len(there["vae/config.json"])  # small files have checksums too
    (target / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json came with a wrong checksum"):
        download("me/small-sd", tmp_path / "mine", server.endpoint)


def test_a_model_of_the_hub_is_loaded_by_its_id(server, tmp_path, monkeypatch, capsys):
    """Downloaded once, after a look at the disk; what is here needs no hub."""
    save_random_model(tmp_path / "theirs")
    there = {name: (tmp_path / "theirs" / name).read_bytes() for name in listing(tmp_path / "theirs")}
    server.repos["me/small-sd"] = there
    monkeypatch.setattr(hub, "download", lambda what, folder: download(what, folder, server.endpoint))
    monkeypatch.chdir(tmp_path)
    draw = ["txt2img", "a cat", "--model", "me/small-sd", "--steps", "1", "-o", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
        assert cli.main(draw) == 2
        err = capsys.readouterr().err
        assert "no model at me/small-sd, and from the hub:" in err and "has 1.00 kB free: give -o FOLDER" in err
    assert load("me/small-sd").size == (32, 32)
    before = len(server.ranges)
    server.status = 500, {}  # what is here needs no hub
    assert cli.main(draw) == 0 and len(server.ranges) == before
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    assert cli.main(["txt2img", "a cat", "--model", "me/other-sd", "-o", "out"]) == 2
    assert "there is no model at me/other-sd, and from the hub: " in capsys.readouterr().err


def test_what_is_chosen():
    def chosen(*names, file=""):
        return choose(Place("me/x", file), dict.fromkeys(names))

    parts = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
    folder = ["model_index.json", "unet/config.json", *(f"{part}.fp16.safetensors" for part in parts)]
    assert sorted(chosen(*folder)) == sorted(folder)  # the variant, where there is nothing else
    assert chosen("a.safetensors", "b.ckpt") == ["a.safetensors"]
    evil = ["unet/../../evil.json", "../evil.json", "unet/..\\evil.json", "/etc/evil.json", "unet/sub/evil.json"]
    assert sorted(chosen(*folder, *evil)) == sorted(folder)
    for names, sentence in [
        (["a.safetensors", "b.safetensors"], r"has 2 .safetensors files \(a.safetensors, b.safetensors ...\): name"),
        (["README.md"], "has no model: name the file"),
        (folder[:-1], "has no .safetensors file in text_encoder/: take another model"),
        (["model_index.json", "unet/diffusion_pytorch_model.bin"], "has no .safetensors file in unet/"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            chosen(*names)


@pytest.mark.parametrize("what, place", [
    ("sd15", Place(SD15, FILE)),
    ("me/x", Place("me/x")),
    ("me/x/unet/a b.safetensors", Place("me/x", "unet/a b.safetensors")),
    ("https://huggingface.co/me/x", Place("me/x")),
    ("https://hf.co/me/x/", Place("me/x")),
    ("https://huggingface.co/me/x/tree/main", Place("me/x", "", "main")),
    ("https://huggingface.co/me/x/resolve/main/a%20b.safetensors?download=true",
     Place("me/x", "a b.safetensors", "main")),
    ("https://huggingface.co/me/x/blob/refs%2Fpr%2F1/y/z.ckpt", Place("me/x", "y/z.ckpt", "refs/pr/1")),
])  # fmt: skip
def test_places(what, place):
    assert find_place(what) == place


NOWHERE = ["sd16", "", "/", "me/", "me/../x", "../x", "me/x/../../y", "me/x\n", "C:\\model", "a b"]


@pytest.mark.parametrize("what", NOWHERE)
def test_what_is_no_place(what):
    with pytest.raises(ValueError, match="is no model on the hub: give sd15, OWNER/NAME, OWNER/NAME/FILE or an addr"):
        find_place(what)


def test_other_addresses_have_no_checksum():
    for what in ("https://example.org/model.safetensors", "http://huggingface.co.example.org/me/x", "ftp://x/y"):
        with pytest.raises(ValueError, match="is not on the Hugging Face hub, so there is no checksum to compare"):
            find_place(what)


def test_the_library_is_imported_only_here():
    code = "import sys, sdlearn.checkpoint.hub, sdlearn.cli"
    code += "; sys.exit(bool({'huggingface_hub', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_the_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["download", "sd15", "-o", str(tmp_path)]) == 2
    assert "huggingface_hub, which downloads, is not installed: pip install huggingface_hub" in capsys.readouterr().err


def test_ctrl_c_and_again_in_real_processes(server, tmp_path):
    content = WEIGHTS * 50  # 15 MB; the library writes 10 MB at a time
    server.repos[SD15][FILE], server.stall_at = content, 12_000_000
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = clean | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "sdlearn", "download", "sd15", "-o", str(tmp_path / "mine")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not any(path.stat().st_size for path in tmp_path.glob("mine/*.part")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    server.go_on.set()
    assert process.returncode == 130 and err.endswith("sdlearn: interrupted\n") and "Traceback" not in err
    begun = next(tmp_path.glob("mine/*.part")).stat().st_size
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == f"{tmp_path / 'mine' / FILE}\n", result.stderr
    assert f"next: sdlearn inspect {tmp_path / 'mine' / FILE}\n" in result.stderr
    assert server.ranges == [None, f"bytes={begun}-"] and listing(tmp_path / "mine") == [FILE]
    assert (tmp_path / "mine" / FILE).read_bytes() == content


PATHS = ("x.safetensors", "me/x.CKPT", "./me/x", "../me/x", "~/me/x", "/me/x", "a/b/c", "name", "", "checkpoints/tiny",
         "there/x", "me/", "me\\x")  # fmt: skip
IDS = ("me/x", "me/sd-v1.5", "SG161222/Realistic_Vision_V5.1_noVAE", "a/b")


def test_a_path_is_no_id_and_an_id_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(hub, "download", lambda what, folder: tmp_path / folder / what)
    for what in PATHS:
        assert not is_hub_id(what)
        if what:
            with pytest.raises(ValueError, match="^there is no model at .*: give a diffusers folder"):
                find_model(what)
    for what in IDS:
        assert is_hub_id(what) and find_model(what) == tmp_path / "checkpoints" / what
    save_random_model(tmp_path / "checkpoints" / "me" / "x")
    (tmp_path / "checkpoints" / "x").mkdir()
    monkeypatch.setattr(hub, "download", lambda what, folder: 1 / 0)
    assert find_model("me/x") == tmp_path.joinpath("checkpoints/me/x").relative_to(tmp_path)
    (tmp_path / "me" / "x").mkdir(parents=True)
    assert str(find_model("me/x")) == "me/x"  # what is there is a path
    with pytest.raises(ValueError, match=rf"no model at checkpoints/tiny \(seen from {re.escape(str(tmp_path))}\)"):
        load("checkpoints/tiny")


def test_a_model_of_one_file_is_found_again(server, tmp_path, monkeypatch):
    server.repos["me/one"] = {"one.safetensors": WEIGHTS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda what, folder: download(what, folder, server.endpoint))
    first = find_model("me/one")
    assert str(first) == "checkpoints/me/one/one.safetensors"
    server.status = 500, {}
    assert find_model("me/one") == first


def test_a_link_has_its_own_name(tmp_path):
    parts = save_random_model(tmp_path / "6ce0161689b3")
    for name in ("dreamy-v2", "dreamy.v2"):
        (tmp_path / name).symlink_to("6ce0161689b3")
        assert load(tmp_path / name).name == name
    for name, shown in {"a.SAFETENSORS": "a", "b.ckpt": "b", "sd-v1.5": "sd-v1.5"}.items():
        (tmp_path / name).symlink_to("6ce0161689b3")
        assert model_name(tmp_path / name) == shown
    assert parts.name == "" and model_name(tmp_path / "a.ckpt" / "..") == tmp_path.name


def test_without_the_library_the_missing_model_is_told_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="no model at me/x, and from the hub: huggingface_hub, which downl"):
        load("me/x")
    with pytest.raises(ValueError, match="there is no model at checkpoints/tiny"):
        load("checkpoints/tiny")


def test_shards_are_chosen_together():
    parts = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
    shards = [f"{parts[0]}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"{parts[0]}.safetensors.index.json"
    files = ["model_index.json", index, *shards, *(f"{part}.safetensors" for part in parts[1:])]
    clutter = [f"{parts[0]}-00001-of-00002.fp16.safetensors", f"{parts[0]}.bin"]
    assert sorted(choose(Place("me/x"), dict.fromkeys(files + clutter))) == sorted(files)
