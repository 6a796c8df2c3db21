"""The record of what to draw: types before values, NumPy's numbers are numbers, every refusal is a sentence."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from sdlearn.request import CHECKS, Request, Settings, settings_of
from sdlearn.samplers import SAMPLERS
from sdlearn.schedule import SPACINGS

PICTURE = Image.new("RGB", (9, 9))
LATENTS = torch.zeros(1, 4, 4, 4)


def test_every_field_is_checked_and_can_be_set():
    fields = {field.name for field in dataclasses.fields(Request)}
    assert CHECKS.keys() | {"seed"} == fields == Settings.__annotations__.keys() | {"prompt", "image"}


def test_numpy_numbers_are_numbers():
    whole = {"steps": np.int64(7), "seed": np.uint32(3), "n": np.int8(2), "width": np.int32(64)}
    whole |= {"clip_skip": np.int16(1), "guided_times": (np.int64(1), np.int64(5))}
    request = Request("a", strength=np.float32(1), cfg_scale=np.float64(2), **whole)
    assert (request.steps, request.seed, request.width, request.cfg_scale) == (7, (3, 4), 64, 2.0)
    assert {type(x) for x in (request.steps, request.n, request.width, request.clip_skip, *request.seed)} == {int}
    assert {type(x) for x in (request.cfg_scale, request.strength)} == {float}
    assert Request(["a", "b"], seed=[np.int64(9), 1]).seed == (9, 1)


def test_seeds_count_up_from_one_that_may_be_nobodys_choice():
    assert Request(["a", "b"], seed=2**32 - 4, n=2).seed == tuple(range(2**32 - 4, 2**32))
    one, other = Request("a"), Request("a")
    assert one.seed != other.seed and 0 <= one.seed[0] < 2**32


@pytest.mark.parametrize(
    "field, values, sentence",
    [
        ("prompt", [3, None, [], [1], b"a", "\udcff"], "prompt (is|holds)"),
        ("negative_prompt", [None, 3, {"a"}], "negative_prompt is"),
        ("negative_prompt", [["a", "b"]], "2 negative prompts for 1"),
        ("n", [0, 1.0, True, "2", None, 1001], "n is"),
        ("steps", [0, -1, 2.0, "20", None, np.float32(3)], "steps is"),
        ("width", [0, -8, 32.0, "64", 10**5, torch.tensor(64)], "width is"),
        ("height", [0, 10**9], "height is"),
        ("cfg_scale", ["7.5", None, -1, float("nan"), float("inf"), [7.5], torch.ones(9, 9)], "cfg_scale is"),
        ("rescale", [2, -0.1, "0", None], "rescale is"),
        ("clip_skip", [-1, 0.5, None], "clip_skip is"),
        ("strength", [0, 1.5, -1, float("nan"), None, "1"], "strength is"),
        ("eta", [2, -1, "1", True], "eta is"),
        ("sampler", [None, "magic", 3, ["ddim"], SAMPLERS["ddim"]], "sampler .* is unknown; choose one of ddpm, ddim"),
        ("spacing", ["magic", 3, ["linspace"]], "spacing .* is unknown; choose one of leading"),
        ("seed", [-1, 1.5, True, "1", [1, 2], [None], [2**32], 2**32, 2**63, np.ones(3)], "seed is"),
        ("guided_times", [(0.2, 0.8), (5, 5), (-1, 5), (1, 2, 3), None, 7, "ab"], "guided_times are .* whole numbers"),
        ("two_passes", [None, 1, "yes"], "two_passes is"),
        ("image", [np.zeros((9, 9, 3)), torch.zeros(3, 9, 9), [PICTURE], 3], "image is of type .*Image.fromarray"),
        ("image", ["nowhere.png"], "no picture at nowhere.png"),
        ("latents", [np.zeros((1, 4, 4, 4)), [LATENTS], LATENTS[0], 3], "latents are of type"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_sentence(field, values, sentence):
    for value in values:
        with pytest.raises(ValueError, match=sentence) as refused:
            Request(**({"prompt": "a"} | {field: value}))
        assert len(str(refused.value)) < 300 and "\n" not in str(refused.value), value


def test_latents_or_an_image():
    with pytest.raises(ValueError, match="latents and an image"):
        Request("a", image=PICTURE, latents=LATENTS)


def test_a_png_says_what_other_programs_say(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "dpmpp", dataclasses.replace(SAMPLERS["ddim"], label="DPM++ 2M"))
    monkeypatch.setitem(SPACINGS, "curve", SPACINGS["leading"]._replace(label="Karras"))
    request = Request(["a", "b"], "no", sampler="dpmpp", spacing="curve", n=2, seed=5, steps=20)
    assert request.parameters(2, 64, 32, "tiny") == (
        "b\nNegative prompt: no\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, "
        "Size: 64x32, Model: tiny"
    )
    more = Request("a", image=PICTURE, strength=0.5, clip_skip=1, eta=0.5, rescale=0.7, seed=1)
    assert list(settings_of(more, 0).items())[3:] == [
        ("Seed", 1), ("Denoising strength", 0.5), ("Clip skip", 2), ("Eta", 0.5), ("CFG Rescale phi", 0.7)
    ]  # fmt: skip
    two = Request(["a", "b"], ["x", "y"], n=2)
    assert [two.parameters(i, 8, 8, "m").splitlines()[:2] for i in (1, 2)] == [
        ["a", "Negative prompt: x"], ["b", "Negative prompt: y"]
    ]  # fmt: skip
