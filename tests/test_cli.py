"""The command line: pictures, their names and settings, progress, interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from random_model import save_random_model

from sdlearn import cli
from sdlearn.pictures import read_parameters
from sdlearn.pipeline import StableDiffusion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "random"
    save_random_model(folder)
    return str(folder)


def run(*words):
    return cli.main([str(word) for word in words])


def test_txt2img_writes_pictures_with_their_settings(model, tmp_path, capsys):
    code = run("txt2img", "a red apple", "--model", model, "--steps", 2, "--seed", 7, "-n", 2, "-o", tmp_path / "out",
               "--negative-prompt", "a fox", "--cfg-scale", 3, "--sampler", "ddim", "--device", "cpu")  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0 and "2/2" in err
    paths = out.split()
    assert [os.path.basename(path) for path in paths] == ["txt2img-0001.png", "txt2img-0002.png"]
    assert read_parameters(paths[1]) == {
        "prompt": "a red apple", "negative_prompt": "a fox", "Steps": "2", "Sampler": "DDIM", "CFG scale": "3.0",
        "Seed": "8", "Size": "32x32", "Model": "random",
    }  # fmt: skip
    run("txt2img", "a red apple", "--model", model, "--steps", 2, "-o", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir())[-1] == "txt2img-0003.png"  # nothing is overwritten


def test_the_command_line_draws_what_the_library_draws(model, tmp_path, capsys):
    path = tmp_path / "one.png"
    assert run("txt2img", "a cat", "--model", model, "--steps", 3, "--seed", 1, "-o", path) == 0
    picture = StableDiffusion.load(model, "cpu").txt2img("a cat", steps=3, seed=1)[0]
    assert Image.open(path).tobytes() == picture.tobytes()
    assert run("txt2img", "a cat", "--model", model, "--steps", 3, "--dtype", "bf16", "--offload", "-o", path) == 0


def test_several_prompts_are_one_batch(model, tmp_path, capsys):
    assert run("txt2img", "a cat", "", "--model", model, "--steps", 1, "--seed", 3, "-o", tmp_path) == 0
    settings = [read_parameters(path) for path in capsys.readouterr().out.split()]
    assert [(s["prompt"], s["Seed"]) for s in settings] == [("a cat", "3"), ("", "4")]


def test_img2img(model, tmp_path, capsys):
    Image.radial_gradient("L").save(tmp_path / "in.png")
    words = ["--image", tmp_path / "in.png", "--strength", 0.5, "--steps", 4, "--clip-skip", 1, "--rescale", 0.5]
    assert run("img2img", "a cat", *words, "--model", model, "-o", tmp_path / "out.png") == 0
    found = read_parameters(tmp_path / "out.png")
    assert found["Denoising strength"] == "0.5" and found["Clip skip"] == "2" and "2/2" in capsys.readouterr().err


def test_demo(model, tmp_path, capsys):
    assert run("demo", "--model", model, "-o", tmp_path / "outputs") == 0
    out = capsys.readouterr().out
    assert out.count(" s\n") == 4
    written = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert len(written) == 5 and all(name in out for name in written)
    assert read_parameters(tmp_path / "outputs" / "txt2img-ddpm-0001.png")["Steps"] == "50"


def test_a_cut_prompt_is_told_in_one_line(model, tmp_path, capsys):
    assert run("txt2img", "cat " * 75 + "end", "--model", model, "--steps", 1, "-o", tmp_path) == 0
    assert "sdlearn: a prompt is cut after 75 tokens; its end is lost: end\n" in capsys.readouterr().err


def test_the_default_model_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    repository = cli.Path(cli.__file__).resolve().parents[2]
    assert cli.find_model("src/sdlearn") == repository / "src/sdlearn"
    assert cli.find_model("no/such/thing") == "no/such/thing"


def test_interruption_leaves_nothing_behind(model, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusion, "denoise", interrupt)
    assert run("txt2img", "a cat", "--model", model, "-o", tmp_path / "out") == 130
    err = capsys.readouterr().err
    assert err.endswith("\nsdlearn: interrupted\n") and "Traceback" not in err
    assert list((tmp_path / "out").iterdir()) == []


def test_interruption_while_a_picture_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("txt2img", "a cat", "--model", model, "--steps", 1, "-o", tmp_path) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(model, tmp_path):
    words = ["txt2img", "a cat", "--steps", "1000", "--width", "256", "--height", "256", "--model", model]
    process = subprocess.Popen([sys.executable, "-m", "sdlearn", *words, "-o", str(tmp_path / "out")],
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not (tmp_path / "out").exists() and process.poll() is None:  # until it has begun to draw
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in err and err.endswith("sdlearn: interrupted\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_memory_is_one_sentence(model, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(StableDiffusion, "denoise", fail)
    assert run("txt2img", "a cat", "--model", model, "-o", tmp_path) == 2
    assert "sdlearn: not enough memory; try --offload" in capsys.readouterr().err


def test_a_bug_is_not_hidden(model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(StableDiffusion, "denoise", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("txt2img", "a cat", "--model", model, "-o", tmp_path)


def test_help_is_quick_and_names_every_command():
    code = (
        "import sys; from sdlearn.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    help_of = {}
    for words in (["--help"], ["inspect", "--help"], ["download", "--help"], ["txt2img", "--help"]):
        result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        help_of[words[0]] = result.stdout
    assert all(f"\n    {name} " in help_of["--help"] for name in cli.RUN.keys() | cli.ELSEWHERE.keys())
    assert "FILE_OR_FOLDER" in help_of["inspect"] and "sd15, OWNER/NAME" in help_of["download"]
    assert all(name in result.stdout for name in ("--cfg-scale", "--negative-prompt", "--sampler", "--offload"))


def test_inspect(model, tmp_path, monkeypatch, capsys):
    assert run("inspect", model) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"path      {model}\nis        a Stable Diffusion of its own sizes, diffusers folder\n")
    assert f'draw      sdlearn txt2img "..." --model {model}\n' in out
    assert run("inspect", model, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["path"] == model and {part["name"] for part in content["parts"]} >= {"unet", "vae", "text_encoder"}
    monkeypatch.chdir(tmp_path)  # a path is found from anywhere, as that of --model is
    assert run("inspect", "checkpoints/tiny") == 0 and "the course's own tiny model" in capsys.readouterr().out


def test_download_prints_the_path_and_what_to_do_next(tmp_path, monkeypatch, capsys):
    asked = []
    there = lambda what, folder: asked.append((what, folder)) or folder / "x.ckpt"  # noqa: E731
    monkeypatch.setattr("sdlearn.checkpoint.hub.download", there)
    assert run("download", "sd15", "-o", tmp_path) == 0
    out, err = capsys.readouterr()
    assert asked == [("sd15", tmp_path)] and out == f"{tmp_path / 'x.ckpt'}\n"
    assert err == f"next: sdlearn inspect {tmp_path / 'x.ckpt'}\n"
    monkeypatch.chdir(tmp_path)  # without -o it goes where the course keeps its models
    assert run("download", "me/x") == 0 and asked[-1][1] == cli.Path(cli.__file__).resolve().parents[2] / "checkpoints"


def test_train_and_evaluate_are_imported_only_when_asked_for(monkeypatch):
    called = []
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: called.append(name) or FakeModule)
    for command in ("train", "evaluate"):
        assert run(command, "--word", "x") == 0
    assert called == ["sdlearn.tiny.recipe"] * 2 + ["sdlearn.tiny.evaluate"] * 2 and FakeModule.seen == ["x", "x"]


class FakeModule:
    seen = []

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--word")

    @classmethod
    def main(cls, args):
        cls.seen.append(args.word)
