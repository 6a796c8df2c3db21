"""Every wrong ControlNet or hint: one clear sentence, exit code 2, nothing drawn, files left as they were."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import random_parts
from safetensors.torch import load_file, save_file

from sdlearn import cli
from sdlearn.checkpoint.load import save
from sdlearn.controlnet import ControlNet
from sdlearn.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A model, a ControlNet of it, another one's, and a hint."""
    folder = tmp_path_factory.mktemp("sound")
    parts, _ = random_parts()
    save(folder / "model", parts, torch.float32)
    unet = parts.networks["unet"]
    ControlNet.of(unet, (4, 8, 8, 8)).save(folder / "net")
    ControlNet.of(unet, (4, 8, 8)).save(folder / "coarse")
    wide = UNetConfig((32, 64), (True, False), heads=(2, 4), blocks=1, context_width=48, groups=8)
    ControlNet.of(UNet(wide), (4, 8, 8, 8)).save(folder / "other")
    Image.new("RGB", (32, 32)).save(folder / "hint.png")
    return folder


@pytest.fixture
def refused(sound, tmp_path, monkeypatch, capsys):
    """Draw with these words, which must fail; its sentence, after all else has been checked."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        drawing = ["txt2img", "a cat", "--model", "model", "--steps", "1", "-o", "out"]
        try:
            code = cli.main([str(word) for word in (*drawing, *words)])
        except SystemExit as stop:  # argparse's own way to end
            code = stop.code
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        assert err.startswith("sdlearn") and err.count("\n") == 1 and "Traceback" not in err and len(err) < 400
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        return err

    return run


GIVEN = ["--control", "net", "--hint", "hint.png"]
WORDS = {  # words -> the sentence
    "no hint": (["--control", "net"], "--control is given 1 times and --hint 0 times: each ControlNet needs a hint"),
    "no control": (["--hint", "hint.png"], "--control is given 0 times and --hint 1 times"),
    "a scale without a net": (["--control-scale", "0.5"], "--control-scale is given, but no --control: give a"),
    "preprocess without a net": (["--preprocess", "edges"], "--preprocess is given, but no --control"),
    "guess without a net": (["--guess"], "--guess is given, but no --control"),
    "a hint too many": ([*GIVEN, "--hint", "hint.png"], "--control is given 1 times and --hint 2 times"),
    "two scales": (
        [*GIVEN, "--control-scale", "1", "--control-scale", "2"],
        "--control-scale is given 2 times for 1 ControlNets: give it once for all, or once for each",
    ),
    "scale NaN": ([*GIVEN, "--control-scale", "nan"], "control scale is nan; give a finite number"),
    "scale inf": ([*GIVEN, "--control-scale", "inf"], "control scale is inf; give a finite number"),
    "scale a word": ([*GIVEN, "--control-scale", "much"], "invalid float value: 'much'"),
    "start": ([*GIVEN, "--control-start", "-1"], "control start is -1.0; give a number from 0"),
    "end": ([*GIVEN, "--control-end", "2"], "control end is 2.0; give a number from 0"),
    "end before start": ([*GIVEN, "--control-start", "0.5", "--control-end", "0.5"], "give a start below the end"),
    "preprocess": ([*GIVEN, "--preprocess", "canny"], "preprocess 'canny' is unknown; choose one of none, edges"),
    "hint nowhere": (["--control", "net", "--hint", "no.png"], "there is no picture at no.png"),
    "hint a folder": (["--control", "net", "--hint", "net"], "net"),
    "hint no picture": (["--control", "net", "--hint", "net/config.json"], "cannot be read as a picture"),
    "control nowhere": (["--control", "no", "--hint", "hint.png"], "there is no ControlNet at no: give its file"),
    "control a picture": (["--control", "hint.png", "--hint", "hint.png"], "hint.png"),
    "control a whole model": (["--control", "model", "--hint", "hint.png"], "model holds no weights"),
    "control a U-Net": (["--control", "model/unet", "--hint", "hint.png"], "is a U-Net alone, but a ControlNet is"),
    "control a VAE": (["--control", "model/vae", "--hint", "hint.png"], "is a VAE alone, but a ControlNet is wanted"),
    "of another model": (["--control", "other", "--hint", "hint.png"], "whose context_width are 48, but the model's"),
    "of another VAE": (["--control", "coarse", "--hint", "hint.png"], "makes a hint 4 times smaller"),
}


@pytest.mark.parametrize("fault", WORDS)
def test_wrong_words(refused, fault):
    words, sentence = WORDS[fault]
    assert sentence in refused(*words)


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Exchange tensors of a file, or take them away."""
    there = load_file(path) | {name.replace("__", "."): x for name, x in tensors.items()}
    save_file({name: x for name, x in there.items() if x is not None}, path)


def configured(**values: object):
    def make(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return make


FILES = {  # what happens to the folder `net` -> the sentence
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "net"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "net"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "net holds no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "a tensor is missing": (lambda f: change(f / WEIGHTS, controlnet_mid_block__bias=None), "lacks the tensor"),
    "a tensor too many": (
        lambda f: change(f / WEIGHTS, x=torch.ones(1)),
        "has a tensor that no part of the model takes",
    ),
    "a NaN": (
        lambda f: change(f / WEIGHTS, controlnet_mid_block__bias=torch.full((64,), float("nan"))),
        "holds NaN or infinite numbers",
    ),
    "another pyramid": (configured(conditioning_embedding_out_channels=[4, 8, 16, 8]), "but the configuration wants"),
    "an impossible pyramid": (configured(conditioning_embedding_out_channels=[4, "x"]), "a list of whole numbers"),
    "blue first": (configured(controlnet_conditioning_channel_order="bgr"), "knows only 'rgb' here"),
    "grey hints": (configured(conditioning_channels=1), "conditioning_channels is 1, but sdlearn knows only 3 here"),
    "pooled": (configured(global_pool_conditions=True), "global_pool_conditions is True"),
    "other blocks": (configured(down_block_types=["Magic", "Magic"]), "sdlearn knows (CrossAttn)DownBlock2D"),
    "SD 2": (lambda f: change(f / WEIGHTS, **{ATTENTION: torch.ones(32, 1024)}), "is a ControlNet for SD 2, but those"),
    "SDXL": (lambda f: change(f / WEIGHTS, **{ATTENTION: torch.ones(32, 2048)}), "is a ControlNet for SDXL, but those"),
}


@pytest.mark.parametrize("fault", FILES)
def test_wrong_files(refused, tmp_path, fault, capsys):
    make, sentence = FILES[fault]
    make(tmp_path / "net")  # refused has copied it
    said = refused(*GIVEN)
    assert sentence in said
    if fault not in ("a NaN", "no weights"):  # inspect reads no numbers, and knows no folder without weights
        assert cli.main(["inspect", "net"]) in (0, 2)  # what it is, and why it cannot be used
        told = " ".join("".join(capsys.readouterr()).split())
        assert " ".join(said.removeprefix("sdlearn: ").split())[:60] in told


def test_a_file_for_sd_1_and_another_model(refused, tmp_path):
    """A single file does not tell its sizes: it is taken for SD 1's."""
    ControlNet.load("net").save("net.safetensors")
    assert "net.safetensors lacks the tensor control_model." in refused(
        "--control", "net.safetensors", "--hint", "hint.png"
    )


def test_bad_hints_of_a_notebook(sound):
    net = ControlNet.load(sound / "net")
    for hint in (np.zeros((8, 8, 3)), torch.zeros(3, 8, 8), 3, None):
        with pytest.raises(ValueError, match="control hint is of type .*; give a PIL picture"):
            net.control(hint)
