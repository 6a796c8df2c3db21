"""Every wrong input of the command line: one clear sentence, exit code 2, no traceback, files left as they were."""

import json
from pathlib import Path

import pytest
from PIL import Image
from random_model import save_random_model
from safetensors.torch import load_file, save_file

from sdlearn import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "random"
    save_random_model(folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must fail; its sentence, after all else has been checked."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        before = snapshot(tmp_path)
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:  # argparse's own way to end
            code = stop.code
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        assert err.startswith("sdlearn") and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err
        assert len(err) < 400
        assert snapshot(tmp_path) == before
        return err

    return run


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--sampler", "magic"], "sampler 'magic' is unknown; choose one of ddpm, ddim"),
        (["--device", "toaster"], "device 'toaster' is unknown"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available"),
        (["--dtype", "int4"], "--dtype"),
        (["--steps", "0"], "steps is 0"),
        (["--steps", "1001"], "1001 sampling steps"),
        (["--steps", "many"], "many"),
        (["--width", "100"], "width is 100"),
        (["--width", "0"], "width is 0"),
        (["--height", "-8"], "height is -8"),
        (["--height", "1000000000"], "height is 1000000000"),
        (["--cfg-scale", "nan"], "cfg_scale is nan"),
        (["--rescale", "7"], "rescale is 7"),
        (["--clip-skip", "99"], "skip is 99"),
        (["--seed", "-5"], "seed is -5"),
        (["--seed", str(2**32)], "seed is 4294967296"),
        (["--spacing", "magic"], "spacing 'magic' is unknown; choose one of leading, trailing, linspace"),
        (["--eta", "2"], "eta is 2"),
        (["--threads", "-1"], "--threads is -1"),
        (["--threads", "100000"], "--threads is 100000"),
        (["-n", "0"], "n is 0"),
        (["-n", "2", "-o", "one.png"], "give a folder"),
        (["-o", "picture.jpg"], "written as .png"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_settings(refused, model, words, sentence):
    assert sentence in refused("txt2img", "a cat", "--model", model, "-o", "out", *words)


@pytest.mark.parametrize("words", [[], ["paint"], ["txt2img"], ["img2img", "a cat"]])
def test_incomplete_commands(refused, words):
    assert "see sdlearn" in refused(*words)


def test_pictures(refused, model, tmp_path):
    Image.effect_noise((300, 300), 50).save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    Image.new("L", (50_000, 1)).save(tmp_path / "wide.png")
    reasons = {"missing": "there is no picture", "truncated": "cannot be read as a picture", "text": "another format",
               "folder": "is a folder",
               "wide": "50000x1"}  # fmt: skip
    for name, reason in reasons.items():
        sentence = refused("img2img", "a cat", "--image", f"{name}.png", "--model", model, "-o", "out")
        assert reason in sentence, name


def test_model_paths(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "zero.safetensors").touch()
    save_file({"lora_unet_x.alpha": load_tensor()}, tmp_path / "lora.safetensors")
    reasons = {"nowhere": "there is no model", "": "--model is empty", "empty": "has no model_index.json",
               "notes.txt": "is text, but a .safetensors or .ckpt file is wanted", "zero.safetensors": "is empty",
               "lora.safetensors": "is a LoRA"}  # fmt: skip
    for name, reason in reasons.items():
        assert reason in refused("txt2img", "a cat", "--model", name, "-o", "out"), name


def load_tensor():
    import torch

    return torch.zeros(1)


@pytest.mark.parametrize("part, file", [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                                        ("text_encoder", "model")])  # fmt: skip
def test_spoiled_tensors(refused, tmp_path, part, file):
    save_random_model(tmp_path / "model")
    path = tmp_path / "model" / part / f"{file}.safetensors"
    good = load_file(path)
    name = sorted(good)[0]
    words = ["txt2img", "a cat", "--model", "model", "-o", "out"]
    bare = name.removeprefix("text_model.")
    save_file({k: v for k, v in good.items() if k != name}, path)
    assert bare in refused(*words)
    save_file(good | {"surplus": load_tensor()}, path)
    assert "surplus" in refused(*words)
    save_file(good | {name: load_tensor().expand(3, 3).contiguous()}, path)
    assert bare in (sentence := refused(*words)) and "(3, 3)" in sentence and str(tuple(good[name].shape)) in sentence
    path.write_bytes(b"rubbish")
    assert "is text, but a .safetensors or .ckpt file is wanted" in refused(*words)
    path.unlink()
    assert "holds no weights" in refused(*words)


def test_spoiled_files(refused, tmp_path):
    words = ["txt2img", "a cat", "--model", "model", "-o", "out"]
    for name in ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
                 "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):  # fmt: skip
        save_random_model(tmp_path / "model")
        path = tmp_path / "model" / name
        path.write_text("{ rubbish")
        assert path.name in refused(*words) or "merge" in refused(*words)
        path.unlink()
        assert path.name in refused(*words)


def test_another_kind_of_model(refused, tmp_path):
    save_random_model(tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    good = json.loads(path.read_text())
    changes = {"addition_embed_type": ("text", "SDXL"), "in_channels": (9, "takes 9 channels"),
               "cross_attention_dim": (1024, "(")}  # fmt: skip
    for key, (value, reason) in changes.items():
        path.write_text(json.dumps(good | {key: value}))
        if key == "in_channels":
            weights = path.with_name("diffusion_pytorch_model.safetensors")
            tensors = load_file(weights)
            save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :1].repeat(1, 9, 1, 1)}, weights)
        assert reason in refused("txt2img", "a cat", "--model", "model", "-o", "out"), key


def test_output_that_cannot_be_written(refused, model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    words = ["txt2img", "a cat", "--model", model, "-o"]
    for name in ("file", "file/sub", "file/one.png"):
        assert "cannot be written" in refused(*words, name)

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", deny)
    (tmp_path / "locked").mkdir()
    assert "Permission denied" in refused(*words, "locked")
    assert "file name" in refused("demo", "--model", model, "-o", "one.png")
