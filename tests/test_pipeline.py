"""The whole: seeds, batches, strengths, offload, pictures of every kind, settings in PNGs."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_model import random_parts

from sdlearn.pictures import describe, open_image, read_parameters, save_png, to_image, to_tensor
from sdlearn.pipeline import PromptCut, StableDiffusion, pick_device
from sdlearn.unet import UNetConfig

FAST = {"steps": 2, "sampler": "ddim"}


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(*random_parts()[0], device="cpu", name="random")


def pixels(image):
    return np.asarray(image).astype(int)


def far(a, b):
    """The largest difference of two pictures, 0 to 255."""
    return abs(pixels(a) - pixels(b)).max()


def test_txt2img_draws_pictures_of_the_trained_size(sd):
    (image,) = sd.txt2img("a red apple", **FAST, seed=0)
    assert image.size == (32, 32) and image.mode == "RGB" and pixels(image).std() > 5
    (image,) = sd.txt2img("a red apple", **FAST, seed=0, width=64, height=48)
    assert image.size == (64, 48)


def test_the_same_seed_is_the_same_picture_whatever_the_batch(sd):
    for sampler in ("ddpm", "ddim"):
        batch = sd.txt2img(["a cat", "a star"], steps=3, sampler=sampler, seed=5, n=2)
        assert len(batch) == 4
        for i, prompt in enumerate(["a cat", "a cat", "a star", "a star"]):
            assert far(sd.txt2img(prompt, steps=3, sampler=sampler, seed=5 + i)[0], batch[i]) <= 1
        assert far(batch[0], batch[1]) > 5
    chosen = sd.txt2img(["a cat", "a star"], **FAST, seed=[9, 9])
    assert far(chosen[1], sd.txt2img("a star", **FAST, seed=9)[0]) <= 1


def test_no_seed_is_another_picture_each_time(sd):
    assert far(*(sd.txt2img("a cat", **FAST)[0] for _ in range(2))) > 5


def test_prompts_negative_prompts_scale_rescale_and_clip_skip_all_matter(sd):
    base = sd.txt2img("a cat", **FAST, seed=1)[0]
    changes = [
        {"prompt": "a fox"},
        {"negative_prompt": "a star"},
        {"cfg_scale": 2.0},
        {"rescale": 1.0},
        {"clip_skip": 1},
    ]
    for change in changes:
        assert far(base, sd.txt2img(**{"prompt": "a cat", "seed": 1} | FAST | change)[0]) > 0, change
    two = sd.txt2img(["a cat", "a cat"], ["", "a star"], **FAST, seed=[1, 1])
    assert far(two[0], base) <= 1 and far(two[1], base) > 0


def test_scale_1_costs_half(sd, monkeypatch):
    sizes = []
    forward = sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda x, t, c: (sizes.append(len(x)), forward(x, t, c))[1])
    sd.txt2img("a cat", **FAST, n=3, cfg_scale=1.0)
    sd.txt2img("a cat", **FAST, n=3, cfg_scale=7.5)
    assert sizes == [3, 3, 6, 6]


def test_latents_replace_the_noise(sd):
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    assert far(sd.txt2img("a cat", **FAST, latents=noise)[0], sd.txt2img("a cat", **FAST, seed=7)[0]) == 0
    assert sd.txt2img("a cat", **FAST, latents=torch.randn(1, 4, 6, 8))[0].size == (64, 48)
    for latents, more in (
        (torch.randn(2, 4, 4, 4), {}),
        (torch.randn(1, 9, 4, 4), {}),
        (noise[0], {}),
        (noise, {"width": 64}),
    ):
        with pytest.raises(ValueError, match="latents are"):
            sd.txt2img("a cat", **FAST, latents=latents, **more)


def test_steps_are_yielded_with_previews(sd):
    drawings = list(sd.steps("a cat", steps=3, seed=1))
    assert [(d.index, d.total, d.t) for d in drawings] == [(0, 3, 667), (1, 3, 334), (2, 3, 1)]
    assert drawings[1].preview()[0].size == (32, 32)
    assert not drawings[-1].latents.requires_grad
    assert far(drawings[-1].images()[0], sd.txt2img("a cat", steps=3, seed=1)[0]) == 0


def test_img2img_keeps_less_the_stronger_it_is(sd):
    image = sd.txt2img("a star", **FAST, seed=3)[0]
    start = sd.encode_image(to_tensor(image, 32, 32), [torch.Generator().manual_seed(1)])
    away = []
    for strength in (0.02, 0.2, 1.0):
        *_, end = sd.steps("a cat", image=image, strength=strength, steps=50, sampler="ddim", seed=1)
        away.append((end.latents - start).abs().mean().item())
    assert away[0] < 0.1 < away[1] < away[2]
    counts = [len(list(sd.steps("a cat", steps=10, image=image, strength=s))) for s in (0.1, 0.5, 0.8, 1.0)]
    assert counts == [1, 5, 8, 10]


def test_img2img_seeds_do_not_depend_on_the_batch(sd):
    image = Image.effect_noise((40, 60), 80)
    both = sd.img2img(["a cat"], image, **FAST, seed=4, n=2)
    assert far(both[1], sd.img2img("a cat", image, **FAST, seed=5)[0]) <= 1


def test_offload_draws_the_same_and_16_bits_nearly(sd):
    parts = random_parts()[0]
    offloaded = StableDiffusion(*parts, device="cpu", offload=True)
    assert far(offloaded.txt2img("a cat", **FAST, seed=1)[0], sd.txt2img("a cat", **FAST, seed=1)[0]) == 0
    half = StableDiffusion(*random_parts()[0], device="cpu", dtype=torch.bfloat16)
    a, b = (x.txt2img("a cat", **FAST, seed=1)[0] for x in (half, sd))
    assert abs(pixels(a) - pixels(b)).mean() < 8


def test_offload_moves_only_the_network_at_work():
    class Network(torch.nn.Linear):
        def to(self, *args, **kwargs):
            moves.append((self.name, str(args[0])))
            return self

    sd = StableDiffusion(*random_parts()[0], device="cpu")
    for name in ("text_encoder", "vae", "unet"):
        setattr(sd, name, Network(1, 1))
        getattr(sd, name).name = name
    sd.offload, sd.device, moves = True, torch.device("meta"), []
    sd.use(sd.unet)
    assert sorted(moves[:2]) == [("text_encoder", "cpu"), ("vae", "cpu")] and moves[2:] == [("unet", "meta")]


def test_a_long_prompt_says_what_is_cut(sd):
    with pytest.warns(PromptCut, match="end"):
        cut = sd.txt2img("cat " * 76 + "end", **FAST, seed=0)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert far(cut, sd.txt2img("cat " * 75, **FAST, seed=0)[0]) == 0
        sd.txt2img("", **FAST)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, "list of texts"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1"),
        ({"n": 0}, "n is 0"),
        ({"n": 1.0}, "n is 1.0"),
        ({"width": 30}, "width is 30"),
        ({"height": 0}, "height is 0"),
        ({"height": -32}, "height is -32"),
        ({"width": 100_000}, "width is 100000"),
        ({"width": 32.0}, "width is 32.0"),
        ({"steps": 0}, "0 sampling steps"),
        ({"steps": 1001}, "1001"),
        ({"sampler": "magic"}, "magic"),
        ({"cfg_scale": float("nan")}, "nan"),
        ({"cfg_scale": -1.0}, "-1.0"),
        ({"rescale": 2.0}, "rescale is 2.0"),
        ({"clip_skip": 3}, "skip is 3"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": [1, 2]}, "list of 1"),
        ({"image": Image.new("RGB", (9, 9)), "strength": 0.0}, "strength is 0.0"),
        ({"image": Image.new("RGB", (9, 9)), "strength": float("nan")}, "strength is nan"),
        ({"image": Image.new("RGB", (20_000, 1))}, "20000x1"),
        ({"image": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_drawn(sd, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        sd.steps(**{"prompt": "a cat", "steps": 2} | wrong)  # not even iterated


def test_devices_and_parts_that_do_not_fit():
    assert pick_device().type in ("cuda", "mps", "cpu")
    for device in ("gpu", "cuda:99", "", 3.5):
        with pytest.raises(ValueError, match="this machine has"):
            pick_device(device)
    small, other = random_parts()[0], random_parts(unet=UNetConfig((32,), (True,), heads=(1,)))[0]
    with pytest.raises(ValueError, match="do not fit"):
        StableDiffusion(small.tokenizer, small.text_encoder, small.vae, other.unet, small.schedule)


def test_save_and_load(sd, tmp_path):
    sd.save(tmp_path / "SD v1.5", dtype=None)
    again = StableDiffusion.load(tmp_path / "SD v1.5", device="cpu")
    assert again.name == "SD v1.5" and again.size == 32 and again.dtype == torch.float32
    assert far(again.txt2img("a cat", **FAST, seed=1)[0], sd.txt2img("a cat", **FAST, seed=1)[0]) == 0


def test_pictures_of_every_kind_become_tensors(tmp_path):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    want = to_tensor(Image.fromarray(grey), 32, 32)
    kinds = {
        "rgb.png": Image.fromarray(grey).convert("RGB"),
        "palette.png": Image.fromarray(grey).convert("P"),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "float.tiff": Image.fromarray(grey.astype(np.float32)),
        "cmyk.jpg": Image.fromarray(grey).convert("CMYK"),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name, quality=95) if name.endswith("jpg") else image.save(tmp_path / name)
        found = to_tensor(open_image(tmp_path / name), 32, 32)
        assert found.shape == (1, 3, 32, 32) and (found - want).abs().max() < 0.1, name
    clear = Image.new("LA", (8, 8), (0, 0))
    assert (to_tensor(clear, 32, 32) == 1).all()  # transparent is white


def test_a_turned_photo_is_put_upright(tmp_path):
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 32, 32))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes up
    image.save(tmp_path / "photo.png", exif=exif)
    tensor = to_tensor(open_image(tmp_path / "photo.png"), 32, 64)
    assert tensor[0, :, :28].max() < -0.9 and tensor[0, :, 36:].min() > 0.9


def test_not_a_number_is_told():
    with pytest.raises(ValueError, match="float32"):
        to_image(torch.full((3, 8, 8), float("nan")))


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40).filter(
    lambda t: "Negative prompt: " not in t
)


@settings(max_examples=40, deadline=None)
@given(words, words, st.sampled_from(["tiny", 'SD, v1.5: "pruned"', "model:a"]))
def test_settings_come_back_from_a_png(tmp_path_factory, prompt, negative, model):
    path = tmp_path_factory.getbasetemp() / "settings.png"
    text = describe(prompt, negative, Steps=50, Sampler="DDPM", CFG_scale=7.5, Seed=1, Size="32x32", Model=model)
    save_png(Image.new("RGB", (4, 4)), path, text)
    found = read_parameters(path)
    assert found["prompt"] == prompt and found["negative_prompt"] == negative and found["Model"] == model
    assert found["Size"] == "32x32" and found["CFG scale"] == "7.5"


def test_the_text_is_what_other_tools_write(tmp_path):
    text = describe("a cat", "a dog", Steps=50, Sampler="DDPM", CFG_scale=7.5, Seed=1, Size="128x128", Model="tiny",
                    Denoising_strength=0.8)  # fmt: skip
    assert text == ("a cat\nNegative prompt: a dog\nSteps: 50, Sampler: DDPM, CFG scale: 7.5, Seed: 1, Size: 128x128, "
                    "Model: tiny, Denoising strength: 0.8")  # fmt: skip
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert read_parameters(tmp_path / "plain.png") == {}
