"""The benchmark: turns, medians and ratios; a small run of the whole; wrong wishes in one sentence."""

import argparse
import json

import pytest
import torch

from sdlearn import bench
from sdlearn.bench import Row, alternate, compare, in_a_process, table_of
from sdlearn.cli import main


def test_both_work_in_turns_and_the_first_round_does_not_count():
    order = []
    found = alternate(lambda: order.append("a") or len(order), lambda: order.append("b") or len(order), 2)
    assert order == ["a", "b"] * 3 and found == ([3, 5], [4, 6])


def test_medians_and_ratio(monkeypatch):
    ticks = iter([0, 9, 0, 9, 0, 1, 0, 4, 0, 3, 0, 8, 0, 2, 0, 4])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    row = compare("x", lambda: None, lambda: None, torch.device("cpu"), 3)
    assert (row.ours, row.theirs, row.ratio) == (2, 4, 0.5)


def test_table():
    lines = table_of([Row("U-Net step", 0.5, 2.0)], {"torch": "2", "threads": "1"}).splitlines()
    assert lines[0] == "torch 2, threads 1" and lines[2].split() == ["U-Net", "step", "0.500", "2.000", "0.25"]


@pytest.mark.slow
def test_a_process_is_measured_and_its_failure_told():
    seconds, memory = in_a_process("import time; time.sleep(0.2); x = bytearray(300 * 2**20)", 1)
    assert 0.2 < seconds < 60 and memory > 0.3
    large = torch.ones(2**28)  # 1 GiB of ours is not theirs
    assert in_a_process("", 1)[1] < 0.9 < large.nbytes / 2**30
    with pytest.raises(ValueError, match="failed: ZeroDivisionError"):
        in_a_process("1 / 0", 1)


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    json_file = tmp_path / "figures.json"
    words = f"bench unet vae text tiles --small --size 64 --repeats 1 --device cpu --threads 1 --json {json_file}"
    assert main(words.split()) == 0
    text, rows = capsys.readouterr().out, json.loads(json_file.read_text())["rows"]
    assert [row["name"].split()[0] for row in rows] == ["U-Net", "VAE", "text", "tiled", "its"]
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows) and "ratio" in text


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
