"""Every wrong checkpoint: one clear sentence that says what was given, what is wanted and what to do; exit code 2.

The same files are also given to the loader, which must refuse them as well, in a sentence that names the file.
"""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import header
from PIL import Image
from random_model import random_parts, save_random_model
from safetensors.torch import load_file, save_file

from sdlearn import cli
from sdlearn.checkpoint import files
from sdlearn.checkpoint import load as weights
from sdlearn.checkpoint.files import human
from sdlearn.pipeline import StableDiffusion

SMALL = {"lora_unet_x.lora_down.weight": (4, 3), "lora_unet_x.lora_up.weight": (3, 4)}
Maker = Callable[[Path], object]


def safe(change: Callable[[dict], object] = lambda content: None, size: int = 96, text: bytes | None = None) -> Maker:
    """A .safetensors file whose header was changed, as a table or as text, with `size` bytes of numbers behind it."""

    def make(path: Path) -> None:
        content = json.loads(header(SMALL)[8:])
        change(content)
        raw = json.dumps(content).encode() if text is None else text
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))

    return make


def entry(**values: object) -> Callable[[dict], object]:
    return lambda content: content["lora_unet_x.lora_up.weight"].update(values)


def write(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content)


def saved(content: object, **options: object) -> Maker:
    return lambda path: torch.save(content, path, **options)


def cut(make: Maker, keep: float) -> Maker:
    def make_cut(path: Path) -> None:
        make(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return make_cut


def flip(make: Maker, place: int) -> Maker:
    def make_flipped(path: Path) -> None:
        make(path)
        content = bytearray(path.read_bytes())
        content[place] ^= 4
        path.write_bytes(bytes(content))

    return make_flipped


def zipped(**members: bytes) -> Maker:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"x/{name.replace('__', '/').replace('_', '.')}", content)

    return make


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.ckpt"), io.BytesIO())


def repacked(drop: str, method: int = zipfile.ZIP_STORED) -> Maker:
    """A checkpoint of torch of which a part is missing, or which was compressed."""

    def make(path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"w": torch.ones(100)}, buffer)
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", method) as new:
            for name in old.namelist():
                if drop not in name:
                    new.writestr(name, old.read(name))

    return make


@cache
def bomb_bytes() -> bytes:
    """72 MB of zeros in 72 kB, all else as torch writes it."""
    buffer, packed = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.zeros(18_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed.getvalue()


def nested(depth: int) -> bytes:
    """A table whose key is a tuple of tuples of tuples, each twice the one before: its hash takes for ever."""
    steps = b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(depth))
    return b"\x80\x02}K\x01" + steps + b"K\x01s."


def dup(depth: int) -> bytes:
    return b"\x80\x02}K\x01" + b"2\x86" * depth + b"K\x01s."


def giant(module: str, name: str) -> bytes:
    """Calls something that torch allows with a number that fills any memory."""
    return f"\x80\x02c{module}\n{name}\n".encode("latin1") + b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."


def zipped_stored(program: bytes) -> Maker:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", program)

    return make


def grown(path: Path) -> None:
    """The table says more numbers than the storage has."""
    torch.save({"w": torch.ones(100)}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content.replace(b"Kd\x85", b"K\xff\x85") if name.endswith("data.pkl") else content)


class Acts:
    def __reduce__(self):
        return os.system, ("touch trace",)


GOOD = saved({"state_dict": {"lora_unet_x.lora_down.weight": torch.ones(4, 3)}})
OLD = saved({"a": torch.ones(99)}, _use_new_zipfile_serialization=False)
DUPLICATE = header(SMALL)[8:].replace(b"lora_up", b"lora_down")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265146304\n"
ENDLESS = header(SMALL)[8:].replace(b"96]", b"9" * 9999 + b"]")
HUGE = (2**62).to_bytes(8, "little") + b'{"a": 1}'
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Not found</title></head><body>404</body></html>"
DEEP = b"[" * 50_000 + b"]" * 50_000
FAULTS: dict[str, tuple[str, Maker, str]] = {  # what is wrong -> the file's name, how it is made, what is said
    "empty": ("x.safetensors", write(b""), "is empty"),
    "empty pickle": ("x.ckpt", write(b""), "is empty"),
    "one byte": ("x.safetensors", write(b"\x07"), "is damaged, header too small"),
    "only a length": ("x.safetensors", write(bytes([9]) + bytes(7)), "is damaged, in"),
    "truncated header": ("x.safetensors", cut(safe(), 0.4), "is damaged, in"),
    "truncated numbers": ("x.safetensors", safe(size=90), "is damaged, incomplete metadata, file not fully covered"),
    "surplus bytes": ("x.safetensors", safe(size=97), "is damaged, incomplete metadata, file not fully covered"),
    "absurd length": ("x.safetensors", write(HUGE), "is damaged, header too large"),
    "bit-flipped length": ("x.safetensors", flip(safe(), 3), "is damaged, in"),
    "bit-flipped bracket": ("x.safetensors", flip(safe(), 8), "is damaged, invalid "),
    "bit-flipped quote": ("x.safetensors", flip(safe(), 9), "is damaged, invalid JSON in header"),
    "no JSON": ("x.safetensors", safe(text=b"{'a': 1}" + b" " * 8), "invalid JSON in header"),
    "no UTF-8": ("x.safetensors", safe(text=b'{"\xff": 1}'), "is damaged, invalid UTF-8 in header"),
    "deep JSON": ("x.safetensors", safe(text=b'{"a": ' + DEEP + b"}"), "recursion limit exceeded"),
    "no table": ("x.safetensors", safe(text=b"[1, 2, 3, 4, 5, 6]"), "is damaged, invalid "),
    "bad metadata": ("x.safetensors", safe(lambda c: c.update(__metadata__={"a": 1})), "expected a string"),
    "duplicate names": ("x.safetensors", safe(text=DUPLICATE), "invalid offset for tensor `lora_unet_x.lora_down"),
    "no tensors": ("x.safetensors", safe(lambda content: content.clear(), 0), "holds no tensors"),
    "unknown type": ("x.safetensors", safe(entry(dtype="F23")), "unknown variant `F23`"),
    "negative shape": ("x.safetensors", safe(entry(shape=[-3, -4])), "invalid value: integer `-3`"),
    "shape of words": ("x.safetensors", safe(entry(shape=["3", "4"])), "is damaged, invalid JSON in header: inva"),
    "monstrous shape": ("x.safetensors", safe(entry(shape=[10**18, 10**18])), "overflow computing buffer size"),
    "number without end": ("x.safetensors", safe(text=ENDLESS), "is damaged, invalid JSON"),
    "overlap": ("x.safetensors", safe(entry(data_offsets=[40, 88])), "invalid offset for tensor"),
    "gap": ("x.safetensors", safe(entry(data_offsets=[50, 98])), "invalid offset for tensor"),
    "out of range": ("x.safetensors", safe(entry(shape=[3, 40], data_offsets=[48, 528])), "is damaged, in"),
    "backward place": ("x.safetensors", safe(entry(data_offsets=[96, 48])), "is damaged, invalid "),
    "no place": ("x.safetensors", safe(entry(data_offsets=None)), "is damaged, invalid JSON"),
    "pickle called safetensors": ("x.safetensors", GOOD, "holds a pickle (.ckpt) under another name: rename it"),
    "old pickle called safetensors": ("x.safetensors", OLD, "holds a pickle (.ckpt) under another name: rename it"),
    "safetensors called pickle": ("x.ckpt", safe(), "holds .safetensors under another name: rename it"),
    "truncated pickle": ("x.ckpt", cut(GOOD, 0.7), "is damaged, or cut off"),
    "truncated old pickle": ("x.ckpt", cut(OLD, 0.8), "is damaged, its pickle cannot be read"),
    "missing storage": ("x.ckpt", repacked("data/0"), "is damaged, its pickle cannot be read"),
    "packed again": ("x.ckpt", repacked("nothing", zipfile.ZIP_DEFLATED), "was packed a second time, after torch"),
    "missing pickle": ("x.ckpt", repacked("data.pkl"), "is a zip archive, but holds no checkpoint: unpack it"),
    "pickle that acts": ("x.ckpt", saved({"w": torch.ones(1), "x": Acts()}), "system); nothing of it was run"),
    "plain pickle that acts": ("x.ckpt", write(pickle.dumps(Acts())), "nothing of it was run"),
    "program": ("x.pt", zipped(data_pkl=b"\x80\x02}.", constants_pkl=b"\x80\x02)."), "a program (TorchScript)"),
    "a single tensor": ("x.ckpt", saved(torch.ones(3)), "holds a Tensor, but named tensors are wanted"),
    "a list": ("x.ckpt", saved([torch.ones(3)]), "holds a list, but named tensors are wanted"),
    "settings only": ("x.ckpt", saved({"lr": 0.1, "steps": [1, 2]}), "holds no tensors"),
    "gzip": ("x.ckpt", write(gzip.compress(b"weights" * 99)), "is packed with gzip"),
    "gzip called safetensors": ("x.safetensors", write(gzip.compress(b"weights" * 99)), "is packed with gzip"),
    "xz": ("x.ckpt", write(b"\xfd7zXZ\x00" + bytes(99)), "is packed with xz"),
    "tar": ("x.ckpt", tar, "wanted"),
    "zip of a picture": ("x.ckpt", zipped(cat_png=b"\x89PNG"), "is a zip archive, but holds no checkpoint"),
    "zip bomb": ("x.ckpt", lambda path: path.write_bytes(bomb_bytes()), "unfolds to 72.00 MB (a zip bomb?)"),
    "web page": ("x.safetensors", write(PAGE), "is a web page, but a .safetensors or .ckpt file is wanted"),
    "web page called ckpt": ("x.ckpt", write(PAGE), "download the file itself, not the page about it"),
    "error in JSON": ("x.safetensors", write(b'{"error": "Invalid credentials in Authorization header"}'), "is text"),
    "git-lfs pointer": ("x.safetensors", write(LFS), "is a git-lfs pointer"),
    "git-lfs pointer called ckpt": ("x.ckpt", write(LFS), "run `git lfs pull`"),
    "GGUF": ("x.gguf", write(b"GGUF\x03\x00\x00\x00" + bytes(99)), "is a GGUF file, whose weights are quantised"),
    "picture": ("x.safetensors", lambda path: Image.new("RGB", (9, 9)).save(path, "png"), "is a picture"),
    "zeros": ("x.ckpt", write(bytes(5000)), "is no checkpoint, or is damaged from its first byte on"),
    "type of a list": ("x.safetensors", safe(entry(dtype=[])), "is damaged, invalid JSON in header: invalid type"),
    "larger than its storage": ("x.ckpt", grown, "is damaged, "),
    "repeated without end": ("x.ckpt", saved({"w": torch.ones(1).expand(10**9, 10**9)}), "w is larger than the whole"),
    "tuples of tuples": ("x.ckpt", write(nested(60)), "is damaged, its pickle holds a tuple without end"),
    "tuples of tuples in a zip": ("x.ckpt", zipped_stored(nested(60)), "its pickle holds a tuple without end"),
    "tuples by dup": ("x.ckpt", write(dup(30)), "it does what no table of tensors needs"),
    "deep tuples": ("x.ckpt", write(b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"K\x01s."), "a tuple without end"),
    "an empty giant": ("x.ckpt", write(giant("builtins", "bytearray")), "(it calls builtins.bytearray)"),
    "a giant tensor": ("x.ckpt", write(giant("torch", "FloatTensor")), "(it calls torch.FloatTensor)"),
    "a pickle without end": ("x.ckpt", write(b"\x80\x02" + b"N0" * 3_000_000 + b"."), "its pickle never ends"),
    "noise": ("x.safetensors", write(bytes(range(255, 5, -1)) * 9), "header too large"),
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must fail; its sentence, after all else has been checked."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        before = snapshot(tmp_path)
        assert cli.main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("sdlearn: ") and err.count("\n") == 1 and len(err) < 400
        assert "Traceback" not in err and "Error(" not in err
        assert snapshot(tmp_path) == before
        return err

    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_inspect(refused, tmp_path, fault):
    name, make, sentence = FAULTS[fault]
    make(tmp_path / name)
    said = refused("inspect", name)
    assert f"sdlearn: {name} " in said and sentence in said and ": " in said.removeprefix("sdlearn: ")
    assert refused("inspect", name, "--json") == said


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4", "ignore:'torch.load' received a zip file that looks")
@pytest.mark.parametrize("fault", FAULTS)
def test_load(tmp_path, monkeypatch, fault):
    name, make, _ = FAULTS[fault]
    monkeypatch.chdir(tmp_path)  # where a pickle that acts would leave its trace
    make(tmp_path / name)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError) as error:
        weights.load(tmp_path / name)
    said = str(error.value)
    assert said.startswith(str(tmp_path / name)) and "\n" not in said and snapshot(tmp_path) == before
    with pytest.raises(ValueError) as again:
        StableDiffusion.load(tmp_path / name, "cpu")
    assert str(again.value) == said


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4", "ignore:'torch.load' received a zip file that looks")
@pytest.mark.parametrize("fault", FAULTS)
def test_draw_with_it(refused, tmp_path, fault):
    """The way that a reader takes. What a header shows is said in the same words by every command."""
    name, make, _ = FAULTS[fault]
    make(tmp_path / name)
    assert refused("txt2img", "a cat", "--model", name, "-o", "out") == refused("inspect", name)


OTHER_MODELS = {  # tensors of a sound file -> what is said of it
    "LoRA of kohya": (SMALL, "x.safetensors is a LoRA, but a whole checkpoint of SD 1, SD 2 or SDXL is wanted"),
    "LoRA of diffusers": ({"unet.x.lora_A.weight": (4, 3), "unet.x.lora_B.weight": (3, 4)}, "is a LoRA"),
    "LoRA of attention processors": ({"unet.x.processor.to_q_lora.down.weight": (4, 3)}, "is a LoRA"),
    "LoHa": ({"lycoris_x.hada_w1_a": (4, 3)}, "is a LoRA"),
    "LoKr": ({"lycoris_x.lokr_w1": (4, 3)}, "is a LoRA"),
    "ControlNet": ({"control_model.input_hint_block.0.bias": (1,)}, "is a ControlNet"),
    "bare ControlNet": ({"input_hint_block.0.bias": (1,)}, "is a ControlNet"),
    "ControlNet of diffusers": ({"controlnet_down_blocks.0.bias": (1,)}, "is a ControlNet"),
    "textual inversion": ({"emb_params": (8, 768)}, "is a textual inversion"),
    "textual inversion of diffusers": ({"<cat-toy>": (768,)}, "is a textual inversion"),
    "SD 3": ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "is a Stable Diffusion 3"),
    "half an SD 2": ({"cond_stage_model.model.ln_final.bias": (1,), "model.diffusion_model.x": (1,)}, "has no VAE"),
    "half an SDXL": ({"conditioner.embedders.0.x": (1,), "model.diffusion_model.x": (1,)}, "has no VAE"),
    "U-Net alone": ({"model.diffusion_model.out.2.bias": (4,)}, "is a U-Net alone"),
    "U-Net of a folder": ({"down_blocks.0.x": (1,), "up_blocks.0.x": (1,)}, "is a U-Net alone"),
    "VAE": ({"encoder.mid.attn_1.q.weight": (1, 1, 1, 1)}, "is a VAE alone"),
    "VAE of diffusers": ({"decoder.mid_block.attentions.0.to_q.weight": (1, 1)}, "is a VAE alone"),
    "judge": ({"classifier.weight": (10, 3)}, "is unknown, but a whole checkpoint of SD 1, SD 2 or SDXL is wanted"),
}


@pytest.mark.parametrize("fault", OTHER_MODELS)
def test_draw_with_another_kind_of_file(refused, tmp_path, fault):
    shapes, sentence = OTHER_MODELS[fault]
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    assert sentence in refused("txt2img", "a cat", "--model", "x.safetensors", "-o", "out")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(refused, tmp_path, part, value):
    save_random_model(tmp_path / "model", torch.float16)
    path = next((tmp_path / "model" / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    said = refused("txt2img", "a cat", "--model", "model", "-o", "out")
    wanted = "holds NaN or infinite numbers: the file is spoiled, take another copy"
    assert f"{path.relative_to(tmp_path)}: {name} {wanted}" in said


def test_weights_that_16_bits_cannot_hold(tmp_path):
    save_random_model(tmp_path / "model")
    path = tmp_path / "model" / UNET
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 70_000
    save_file(tensors, path)
    assert weights.load(tmp_path / "model", torch.bfloat16)
    with pytest.raises(ValueError, match="conv_in.bias has numbers too large for float16: take another --dtype"):
        weights.load(tmp_path / "model", torch.float16)


def test_not_enough_memory(refused, tmp_path, monkeypatch):
    """Said before anything is read, where it can be known."""
    save_random_model(tmp_path / "model", torch.float16)
    parts = weights.load(tmp_path / "model", torch.float32)  # what the command computes in on a CPU
    need = sum(x.nbytes for part in ("text_encoder", "vae", "unet") for x in parts.networks[part].parameters())
    monkeypatch.setattr(weights, "free_memory", lambda device: need - 1)
    said = refused("txt2img", "a cat", "--model", "model", "-o", "out")
    assert f"model needs {human(need)} of memory, but only {human(need - 1)} are free: close other programs" in said
    with pytest.raises(ValueError, match=f"needs {human(need)} of memory"):
        weights.load(tmp_path / "model", torch.float32)
    monkeypatch.setattr(weights, "free_memory", lambda device: need)
    assert weights.load(tmp_path / "model", torch.float32)
    monkeypatch.setattr(weights, "free_memory", lambda device: None)  # a machine that does not tell
    assert weights.load(tmp_path / "model", torch.float32)


def test_memory_is_exhausted_all_the_same(refused, tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: not enough memory")

    save_random_model(tmp_path / "model")
    monkeypatch.setattr(weights, "check_numbers", exhausted)
    assert "sdlearn: not enough memory" in refused("txt2img", "a cat", "--model", "model", "-o", "out")


@pytest.mark.parametrize("file", ["model.safetensors", "model.ckpt", "folder"])
def test_no_disk_to_write_on(tmp_path, monkeypatch, file):
    """Known before, or met on the way: what was there is still whole, and nothing half is left."""
    parts, _ = random_parts()
    (tmp_path / "old").write_text("whole")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match=r"has 1.00 kB free, but .* are to be written: make room"):
            weights.save(tmp_path / file, parts)
    for name in ("safetensors.torch.save_file", "torch.save"):

        def fill(tensors, path, **more):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(name, fill)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\): make room on the disk"):
        weights.save(tmp_path / file, parts)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["old"]


def test_a_path_or_a_model_of_the_hub(refused, tmp_path):
    (tmp_path / "models").mkdir()
    for path in ("nowhere", "models/nowhere", "x.ckpt", "some/x.safetensors", "a/b/c", "../up", "/none/there"):
        said = refused("txt2img", "a cat", "--model", path, "-o", "out")
        assert f"there is no model at {path}" in said
        assert ": give a diffusers folder, a .safetensors or .ckpt file, or OWNER/NAME" in said
    said = refused("txt2img", "a cat", "--model", "some-one/some-model", "-o", "out")
    assert "there is no model at some-one/some-model, and from the hub: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE" in said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A good model folder: name -> bytes."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_random_model(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
INDEX = b'{"_class_name": "StableDiffusionPipeline", "../unet": ["diffusers", "UNet2DConditionModel"]}'
FOLDER_FAULTS: dict[str, tuple[dict[str, bytes | None], str, bool]] = {  # what changes, what is said, does load see it?
    "no unet": ({"unet/": None}, "has no folder unet, but its model_index.json wants one: copy it again", True),
    "no tokenizer": ({"tokenizer/": None}, "has no folder tokenizer", True),
    "no scheduler": ({"scheduler/": None}, "has no folder scheduler", True),
    "no weights": ({UNET: None}, "unet holds no weights, but a .safetensors file is wanted: copy it again", True),
    "empty weights": ({VAE: b""}, f"{VAE} is empty, but", True),
    "git-lfs pointer": ({VAE: LFS}, f"{VAE} is a git-lfs pointer", True),
    "truncated weights": ({UNET: b"\x07\0\0\0\0\0\0\0{"}, f"{UNET} is damaged", True),
    "no index": ({"model_index.json": None}, "is no model, for it has no model_index.json: give the folder of", True),
    "index of rubbish": ({"model_index.json": b"{ rubbish"}, "model_index.json", True),
    "index of a list": ({"model_index.json": b"[1]"}, "model_index.json", True),
    "index in a deep table": ({"model_index.json": DEEP}, "model_index.json", True),
    "index that leads outside": ({"model_index.json": INDEX}, "has no folder ../unet, but its", True),
    "empty index": ({"model_index.json": b"{}", "clip/": None, "judge/": None}, "has no part with weights", True),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_folders(refused, tmp_path, model, fault):
    changes, sentence, load_sees_it = FOLDER_FAULTS[fault]
    for name, content in (model | changes).items():
        if content is not None and not any(name.startswith(gone) for gone in changes if gone.endswith("/")):
            (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "model" / name).write_bytes(content)
    said = refused("inspect", "model")
    assert said.startswith("sdlearn: model") and sentence in said
    if load_sees_it:
        with pytest.raises(ValueError, match="model") as error:
            weights.load(Path("model"))
        assert "\n" not in str(error.value)
        assert refused("txt2img", "a cat", "--model", "model", "-o", "out") == f"sdlearn: {error.value}\n"


def test_paths(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "a.safetensors").touch()
    (tmp_path / "dangling.ckpt").symlink_to("nowhere")
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")  # whoever opens it waits for ever
    sentences = {
        "nowhere.ckpt": "there is nothing at nowhere.ckpt: give a .safetensors or .ckpt file, or a folder",
        "": "the path is empty: give",
        "empty": "empty is no model, for it has no model_index.json: give the folder of a model, or a file",
        "folder.safetensors": "folder.safetensors is no model",
        "several": "several is no model, for it has no model_index.json: give one of its files, such as a.safetensors",
        "dangling.ckpt": "dangling.ckpt cannot be read (No such file or directory)",
        "loop.ckpt": "loop.ckpt cannot be read (Too many levels of symbolic links)",
        "pipe.ckpt": "pipe.ckpt is a pipe or a device, but a plain file is wanted",
        "x" * 300: "File name too long",
    }
    for path, sentence in sentences.items():
        assert sentence in refused("inspect", path), path


@pytest.mark.parametrize("where", ["file", "folder"])
def test_what_may_not_be_read(refused, tmp_path, monkeypatch, where):
    """Nobody can forbid root to read: so the system call is made to say no."""

    def forbid(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    if where == "folder":
        (tmp_path / "x").mkdir()
        monkeypatch.setattr(Path, "iterdir", forbid)
    else:
        (tmp_path / "x").touch()
        monkeypatch.setattr(Path, "open", forbid)
    assert refused("inspect", "x").endswith(" x cannot be read (Permission denied): copy it to where you may read it\n")
