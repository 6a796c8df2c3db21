"""The benchmark: turns, medians and ratios; a small run of the whole; wrong wishes in one sentence."""

import argparse
import importlib.util
import json

import pytest
import torch

from sdlearn import bench
from sdlearn.bench import Row, alternate, compare, in_a_process, table_of
from sdlearn.cli import main


def test_both_work_in_turns_and_the_first_round_does_not_count():
    order = []
    works = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert alternate(works, 2) == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}
    assert order == ["a", "b", "c"] * 3


def test_medians_ratios_and_who_stands_beside_whom(monkeypatch):
    lengths = {"ours": [9, 1, 3, 2], "diffusers": [9, 4, 8, 4], "OpenVINO": [9, 5, 1, 1], "compiled": [9, 1, 1, 1]}
    monkeypatch.setattr(bench, "timer", lambda work, device: work)
    works = {who: iter(found).__next__ for who, found in lengths.items()}
    rows = compare("step", works, torch.device("cpu"), 3)
    assert rows == [Row("step", 2, 4), Row("step", 2, 1, "OpenVINO"), Row("step, compiled", 1, 1, "OpenVINO")]
    assert [row.ratio for row in rows] == [0.5, 2, 1]


def test_a_call_is_timed_in_inference_mode(monkeypatch):
    ticks, modes = iter([3, 7]), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    timed = bench.timer(lambda: modes.append(torch.is_inference_mode_enabled()), torch.device("cpu"))
    assert timed() == 4 and modes == [True]


def test_table():
    rows = [Row("U-Net step", 0.5, 2.0), Row("U-Net step", 0.5, 0.4, "OpenVINO")]
    lines = table_of(rows, {"torch": "2", "threads": "1"}).splitlines()
    assert lines[0] == "torch 2, threads 1" and lines[1].split()[-3:] == ["ours", "theirs", "ratio"]
    assert lines[2].split() == ["U-Net", "step", "0.500", "2.000", "0.25", "diffusers"]
    assert lines[3].split()[-2:] == ["1.25", "OpenVINO"]


def test_the_processor_tells_what_counts(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nflags\t\t: fpu amx_int8 avx2 sse\n\nprocessor\t: 1\nflags\t\t: fpu amx_int8 avx2\n"
    )
    monkeypatch.setattr(bench, "Path", lambda path: cpuinfo)
    assert bench.processor().split()[1:] == ["avx2", "amx_int8"]
    cpuinfo.unlink()
    assert len(bench.processor().split()) == 1


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed")
def test_openvino_answers_as_the_unet_that_it_was_given():
    from diffusers import UNet2DConditionModel

    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2}
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(sample_size=8, **sizes, **kinds).eval()
    xt, t, context = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.randn(2, 77, 16)
    answer = torch.from_numpy(bench.openvino_step(unet, xt, t, context)()[0])
    with torch.inference_mode():
        torch.testing.assert_close(answer, unet(xt, t, context).sample, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_process_is_measured_and_its_failure_told():
    seconds, processor, memory = in_a_process("import time; time.sleep(3); x = bytearray(300 * 2**20)", 1)
    assert 3 < seconds < 60 and memory > 0.3
    assert 0 < processor < seconds - 2  # waiting takes none
    large = torch.ones(2**28)  # 1 GiB of ours is not theirs
    assert in_a_process("", 1)[2] < 0.9 < large.nbytes / 2**30
    with pytest.raises(ValueError, match="failed: ZeroDivisionError"):
        in_a_process("1 / 0", 1)


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    json_file = tmp_path / "figures.json"
    words = f"bench unet vae text tiles --small --size 64 --repeats 1 --device cpu --threads 1 --json {json_file}"
    assert main(words.split()) == 0
    text, rows = capsys.readouterr().out, json.loads(json_file.read_text())["rows"]
    assert {row["name"].split()[0] for row in rows} == {"U-Net", "VAE", "text", "tiled", "its"}
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows) and "ratio" in text


def test_a_process_that_is_killed_is_told():
    """Nobody writes a last word then: not enough memory, say."""
    with pytest.raises(ValueError, match="failed: it ended with 9, perhaps for want of memory"):
        in_a_process("import os; os._exit(9)", 1)


def test_small_networks_are_measured_in_all_parts_that_can_be_small(monkeypatch):
    monkeypatch.setattr(bench, "write_models", lambda folder, *how: folder)
    done, row = [], [Row("x", 1.0, 1.0)]
    for part in ("networks", "loading", "tiles", "tiny_process"):
        monkeypatch.setattr(bench, part, lambda *how, part=part: done.append(part) or row)
    assert main(["bench", "--small", "--device", "cpu"]) == 0 and done == ["networks", "tiles", "tiny_process"]


@pytest.mark.parametrize(("words", "sentence"), [
    ("bench unets", "part 'unets' is unknown"),
    ("bench unet --repeats 0", "--repeats 0"),
    ("bench unet --size 100", "--size 100"),
    ("bench unet --device tpu", "'tpu'"),
    ("bench load --small", "leave out --small"),
    ("bench tiny --model nowhere", "there is no model at nowhere"),
    ("bench unet --json /dev/null/figures.json", "cannot be written"),
])  # fmt: skip
def test_wrong_wishes(words, sentence, capsys):
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1


def test_arguments():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args([])
    assert args.parts == [] and args.size == 512 and args.dtype == "bf16" and args.repeats == 3


@pytest.mark.parametrize("count", ["0", "-1", "100000", "two"])
def test_a_number_of_threads_that_cannot_work_is_refused(count, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "unet", "--threads", count])
    assert "argument --threads: give a whole number from 1 to" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tiny_model_from_command_to_file_is_quicker_and_smaller_than_the_reference(tmp_path):
    """Whole processes, in seconds of the processor: the quicker of two runs in turns, for a busy machine slows either.

    On a quiet machine the ratio is 0.6.
    """
    words = {"path": "checkpoints/tiny", "device": "cpu", "folder": str(tmp_path), "prompt": bench.PROMPT}
    scripts = [script.format(**words) for script in (bench.OUR_TINY, bench.THEIR_TINY)]
    turns = [[in_a_process(script, 1)[1:] for script in scripts] for _ in range(2)]
    (ours, our_memory), (theirs, their_memory) = (
        map(min, zip(*runs, strict=True)) for runs in zip(*turns, strict=True)
    )
    assert ours <= 0.8 * theirs and our_memory <= 0.75 * their_memory, turns
    assert len(list(tmp_path.glob("*.png"))) == 2
