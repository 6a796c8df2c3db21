"""Every command runs in bfloat16 on a CPU, as it would on a GPU. `evaluate` does in test_evaluate.py, the benchmark in
test_bench.py, training in test_training.py."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlearn.cli import main

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
LCM = TINY / "lora" / "lcm.safetensors"
PROMPT = "a red apple on a blue background"


def drawn(folder: Path, *words: object) -> np.ndarray:
    common = ["--model", TINY, "--device", "cpu", "--steps", 4, "--sampler", "ddim", "--seed", 1, "-o", folder]
    assert main([str(word) for word in [*words, *common]]) == 0
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--tiled"], ["--fast"], ["--offload"], ["--clip-skip", 1]], ids=str)
def test_txt2img(tmp_path, more):
    plain = drawn(tmp_path / "32", "txt2img", PROMPT, *more)
    half = drawn(tmp_path / "16", "txt2img", PROMPT, *more, "--dtype", "bf16")
    assert half.std() > 20 and np.abs(plain - half).mean() < 6  # of 255


def test_img2img(tmp_path):
    Image.new("RGB", (128, 128), "orange").save(tmp_path / "start.png")
    words = ["img2img", PROMPT, "--image", tmp_path / "start.png", "--strength", 0.75]
    plain, half = drawn(tmp_path / "32", *words), drawn(tmp_path / "16", *words, "--dtype", "bf16")
    assert half.std() > 20 and np.abs(plain - half).mean() < 6


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    assert main(["demo", "--model", str(TINY), "--device", "cpu", "--dtype", "bf16", "-o", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 8 + 3 * LCM.is_file() and "written:" in capsys.readouterr().out
