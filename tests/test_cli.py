"""The command line: pictures, their names and settings, progress, interruption."""

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from random_model import save_random_model

from sdlearn import cli
from sdlearn.lora import save_lora, with_lora
from sdlearn.pictures import read_parameters
from sdlearn.pipeline import StableDiffusion
from sdlearn.request import Request


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
    assert code == 0 and "2/2" in err and "seed 7" in err
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


@pytest.mark.parametrize("words", [["txt2img", "a cat"], ["img2img", "a cat", "--image", "in.png"], ["demo"]])
def test_every_drawing_command_in_16_bits(model, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").save("in.png")
    seen = []
    encode = StableDiffusion.encode
    monkeypatch.setattr(StableDiffusion, "encode", lambda sd, *args: seen.append(sd.dtype) or encode(sd, *args))
    more = [] if words == ["demo"] else ["--steps", 2]
    assert (
        run(*words, *more, "--model", model, "--dtype", "bf16", "--device", "cpu", "--offload", "--tiled", "-o", "out")
        == 0
    )
    assert set(seen) == {torch.bfloat16} and Image.open(next((tmp_path / "out").iterdir())).size == (32, 32)


def test_cheaper_steps(model, tmp_path, capsys):
    words = ["--model", model, "--steps", 6, "--seed", 1, "--sampler", "ddim", "--device", "cpu"]
    switches = [
        [],
        ["--int8"],
        ["--reuse", 3],
        ["--guided-times", 400, 900],
        ["--int8", "--lora", tmp_path / "x.safetensors"],
    ]
    networks = {"unet": StableDiffusion.load(model, "cpu").unet}
    lora = with_lora(networks, rank=2)
    for _, pair in lora.items():
        torch.nn.init.normal_(pair.up)
    save_lora(tmp_path / "x.safetensors", lora)
    pictures = []
    for i, more in enumerate(switches):
        assert run("txt2img", "a cat", *words, *more, "-o", tmp_path / f"{i}.png") == 0
        pictures.append(Image.open(tmp_path / f"{i}.png").tobytes())
    assert len(set(pictures)) == len(switches)  # each of them does something, the LoRA in 8 bits as well
    assert read_parameters(tmp_path / "2.png")["Reuse every"] == "3"
    assert run("txt2img", "a cat", *words, "--reuse", 0, "-o", tmp_path / "9.png") == 2
    assert "sdlearn: every is 0; give a whole number from 1 to 1000" in capsys.readouterr().err


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
    assert out.count(" s\n") == 5
    written = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert len(written) == 6 and all(name in out for name in written)
    assert read_parameters(tmp_path / "outputs" / "txt2img-ddpm-0001.png")["Steps"] == "50"


def test_a_cut_prompt_is_told_in_one_line(model, tmp_path, capsys):
    assert run("txt2img", "cat " * 75 + "end", "--model", model, "--steps", 1, "-o", tmp_path) == 0
    assert "sdlearn: a prompt is cut after 75 tokens; its end is lost: end\n" in capsys.readouterr().err


def test_the_default_model_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    repository = cli.Path(cli.__file__).resolve().parents[2]
    assert cli.find_model("src/sdlearn") == repository / "src/sdlearn"
    assert cli.find_model("no/such/thing") == "no/such/thing"


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_interruption_leaves_nothing_behind(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StableDiffusion, "encode", raising(KeyboardInterrupt))
    assert run("txt2img", "a cat", "--model", model, "-o", tmp_path / "out") == 130
    err = capsys.readouterr().err
    assert err.endswith("\nsdlearn: interrupted\n") and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left"), 2)])
def test_a_picture_is_written_whole_or_not_at_all(model, tmp_path, monkeypatch, capsys, error, code):
    monkeypatch.setattr(Image.Image, "save", raising(error))
    assert run("txt2img", "a cat", "--model", model, "--steps", 1, "-o", tmp_path) == code
    assert list(tmp_path.iterdir()) == []
    assert ("make room on the disk" in capsys.readouterr().err) == (code == 2)


def start(*words, **how):
    """A real process."""
    return subprocess.Popen(
        [sys.executable, "-m", "sdlearn", *map(str, words)], stderr=subprocess.PIPE, text=True, **how
    )


@pytest.mark.slow
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_a_real_process(model, tmp_path, sent, code):
    words = ["txt2img", "a cat", "--steps", 1000, "--width", 256, "--height", 256, "--model", model]
    process, err = start(*words, "-o", tmp_path / "out"), ""
    while "step" not in err:  # until it has begun to draw
        err += process.stderr.read(1)
    process.send_signal(sent)
    err += process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in err and not (tmp_path / "out").exists()
    assert err.endswith("sdlearn: interrupted\n") == (sent == signal.SIGINT)


@pytest.mark.parametrize("module", ["argparse", "numpy"])  # needed by the command line itself, and by its work
def test_ctrl_c_while_it_imports(tmp_path, module):
    """A module that is interrupted as soon as its import begins."""
    stop = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / f"{module}.py").write_text(stop)
    places = os.pathsep.join([str(tmp_path), str(cli.Path(cli.__file__).parents[1])])
    process = start("txt2img", "a cat", env=os.environ | {"PYTHONPATH": places})
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams",
    [">&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true", "| PYTHONIOENCODING= cat"],
    ids=["closed", "full", "pipe", "cp1252"],
)
def test_no_stream_decides_whether_a_picture_is_drawn(model, tmp_path, streams):
    order = f"txt2img 'a cat' --steps 1 --seed 1 --model '{model}' -o '{tmp_path}/出.png'"
    line = f"{sys.executable} -m sdlearn {order} {streams}; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert read_parameters(tmp_path / "出.png")["Seed"] == "1"
    if "cat" in streams:
        assert result.stdout.endswith("\\u51fa.png\n")


def test_writers_at_the_same_time_overwrite_nothing(tmp_path, monkeypatch):
    """All of them look for free numbers before any has written."""
    sd = SimpleNamespace(name="m")

    def write(seed):
        request = Request("a cat", n=3, seed=seed)
        shades = [Image.new("RGB", (4, 4), (seed, i, 0)) for i in range(3)]
        return cli.save_all(sd, request, shades, tmp_path, "txt2img")

    with monkeypatch.context() as at_once, ThreadPoolExecutor(8) as pool:
        at_once.setattr(os, "listdir", lambda folder: [])
        written = list(pool.map(write, range(0, 240, 10)))
    assert len(set().union(*written)) == 72 == len(list(tmp_path.iterdir()))
    for seed, paths in zip(range(0, 240, 10), written, strict=True):
        for i, path in enumerate(paths):
            assert Image.open(path).getpixel((0, 0)) == (seed, i, 0)
            assert read_parameters(path)["Seed"] == str(seed + i)


def test_prompts_stand_anywhere_and_may_begin_with_a_dash():
    args = cli.parse(["txt2img", "a", "--seed", "1", "b", "--negative-prompt", "-blurry, -dark"])
    assert args.prompt == ["a", "b"] and args.seed == 1 and args.negative_prompt == "-blurry, -dark"
    for words in (["--negative-prompt", "--seed", "1"], ["--negative-prompt", "-n", "2"], ["--colour"]):
        with pytest.raises(SystemExit):
            cli.parse(["txt2img", "a", *words])


def test_a_dot_in_a_name_makes_no_file(model, tmp_path, capsys):
    assert run("txt2img", "a", "--model", model, "--steps", 1, "-o", tmp_path / "sd-v1.5") == 0
    assert (tmp_path / "sd-v1.5" / "txt2img-0001.png").is_file()


def test_what_would_move_a_cursor_is_shown_escaped(model, tmp_path, capsys):
    evil = "\x1b]0;title\x07\x1b[31m\x9b2J"
    assert run("txt2img", "cat " * 75 + evil, "--model", model, "--steps", 1, "-o", tmp_path / evil) == 0
    assert run("txt2img", "a", "--model", f"nowhere{evil}") == 2
    assert run("img2img", "a", "--image", f"nowhere{evil}", "--model", model) == 2
    with pytest.raises(SystemExit):
        run("txt2img", "a", f"--{evil}")
    out, err = capsys.readouterr()
    assert not set("\x1b\x07\x9b") & set(out + err) and (out + err).count(r"\x1b]0;title\x07") >= 3


MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_too_little_memory_is_one_sentence(model, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(StableDiffusion, "encode", raising(error))
    assert run("txt2img", "a cat", "--model", model, "-o", tmp_path) == 2
    assert "sdlearn: not enough memory; try --tiled, --offload" in capsys.readouterr().err


def test_a_bug_is_not_hidden(model, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "encode", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run("txt2img", "a cat", "--model", model, "-o", tmp_path)


def test_help_is_quick_and_names_every_command():
    code = (
        "import sys; from sdlearn.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    help_of = {}
    for words in (["--help"], ["inspect", "--help"], ["download", "--help"]):
        result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        help_of[words[0]] = result.stdout
    assert all(f"\n    {name} " in help_of["--help"] for name in cli.RUN.keys() | cli.ELSEWHERE.keys())
    assert "FILE_OR_FOLDER" in help_of["inspect"] and "sd15, OWNER/NAME" in help_of["download"]
    result = subprocess.run([sys.executable, "-m", "sdlearn", "txt2img", "--help"], capture_output=True, text=True)
    for name in ("--cfg-scale", "--negative-prompt", "--sampler", "--offload", "samplers:", "  ddim ", "spacings:"):
        assert name in result.stdout


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
    monkeypatch.setattr(
        "sdlearn.checkpoint.hub.download", lambda what, folder: asked.append((what, folder)) or folder / "x.ckpt"
    )
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


def test_inpaint_paints_what_is_white_and_says_so(model, tmp_path, capsys):
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(tmp_path / "in.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    words = ["--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--steps", 6, "--resample", 2]
    assert run("inpaint", "a cat", *words, "--model", model, "--seed", 3, "-o", tmp_path / "out.png") == 0
    found = read_parameters(tmp_path / "out.png")
    assert found["Masked"] == "50%" and found["Resample"] == "2" and found["Denoising strength"] == "1.0"
    before, after = Image.open(tmp_path / "in.png"), Image.open(tmp_path / "out.png")
    for box, kept in (((0, 0, 16, 32), True), ((16, 0, 32, 32), False)):
        assert (before.crop(box).tobytes() == after.crop(box).tobytes()) == kept


def test_inpaint_draws_a_larger_canvas(model, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in.png")
    words = ["--image", tmp_path / "in.png", "--expand", "left=16,bottom=8", "--steps", 2]
    assert run("inpaint", "a cat", *words, "--model", model, "-o", tmp_path / "out.png") == 0
    drawn = Image.open(tmp_path / "out.png")
    assert drawn.size == (48, 40) and drawn.crop((24, 0, 48, 24)).getcolors() == [(24 * 24, (255, 0, 0))]
