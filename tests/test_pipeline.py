"""The whole: seeds, batches, strengths, offload, 16 bits, a fourth network, saving and loading."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import SMALL_UNET, random_parts

from sdlearn import pipeline
from sdlearn.checkpoint.files import human
from sdlearn.checkpoint.load import load
from sdlearn.minimal import draw_by_hand
from sdlearn.pictures import to_tensor
from sdlearn.pipeline import PromptCut, StableDiffusion, pick_device
from sdlearn.prediction import V
from sdlearn.request import Request
from sdlearn.samplers import draw_noise
from sdlearn.schedule import Schedule
from sdlearn.speed import speed_up
from sdlearn.unet import UNet, UNetConfig

FAST = {"steps": 2, "sampler": "ddim"}


def model(device="cpu", dtype=None, offload=False):
    return StableDiffusion(*random_parts()[0], device, dtype, offload)


@pytest.fixture(scope="module")
def sd():
    return model()


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
    two = sd.txt2img(["a cat", "a cat"], negative_prompt=["", "a star"], **FAST, seed=[1, 1])
    assert far(two[0], base) <= 1 and far(two[1], base) > 0


def test_scale_1_costs_half(sd, monkeypatch):
    sizes = []
    forward = sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda x, t, context: (sizes.append(len(x)), forward(x, t, context))[1])
    sd.txt2img("a cat", **FAST, n=3, cfg_scale=1.0)
    sd.txt2img("a cat", **FAST, n=3, cfg_scale=7.5)
    assert sizes == [3, 3, 6, 6]


def test_latents_replace_the_noise(sd):
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    assert far(sd.txt2img("a cat", **FAST, latents=noise)[0], sd.txt2img("a cat", **FAST, seed=7)[0]) == 0
    assert sd.txt2img("a cat", **FAST, latents=torch.randn(1, 4, 6, 8))[0].size == (64, 48)
    for latents, more in ((torch.randn(2, 4, 4, 4), {}), (torch.randn(1, 9, 4, 4), {}), (noise, {"width": 64})):
        with pytest.raises(ValueError, match="latents are"):
            sd.txt2img("a cat", **FAST, latents=latents, **more)


def test_the_first_noise_may_stray_by_channel(sd):
    """Offset noise: one more number a channel, with the asked spread, from the same dice."""
    shape, seeds = (50, 4, 8, 8), range(50)
    dice = [[torch.Generator().manual_seed(seed) for seed in seeds] for _ in range(2)]
    assert torch.equal(sd.first_noise(shape, dice[0]), draw_noise(shape, dice[1]))
    strays = model()
    strays.schedule = Schedule(noise_offset=0.3)
    plain, moved = sd.first_noise(shape, dice[0]), strays.first_noise(shape, dice[1])
    moves = moved - plain
    assert moves.std(dim=(2, 3)).max() < 1e-6 and 0.25 < moves.mean(dim=(2, 3)).std() < 0.35
    start = next(strays.steps("a cat", **FAST, seed=7)), next(sd.steps("a cat", **FAST, seed=7))
    assert not torch.equal(start[0].latents, start[1].latents)


def test_steps_are_yielded_with_previews(sd):
    drawings = list(sd.steps("a cat", steps=3, seed=1))
    assert [(d.index, d.total, d.t) for d in drawings] == [(0, 3, 667), (1, 3, 334), (2, 3, 1)]
    assert drawings[1].preview()[0].size == (32, 32)
    assert drawings[-1].latents.grad_fn is None and not drawings[-1].latents.requires_grad
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
    offloaded = model(offload=True)
    assert far(offloaded.txt2img("a cat", **FAST, seed=1)[0], sd.txt2img("a cat", **FAST, seed=1)[0]) == 0
    half = model(dtype=torch.bfloat16)
    for image in (None, Image.effect_noise((32, 32), 80)):
        a, b = (x.steps("a cat", **FAST, seed=1, image=image) for x in (half, sd))
        a, b = [*a][-1], [*b][-1]
        assert a.latents.dtype == torch.float32 and abs(pixels(a.images()[0]) - pixels(b.images()[0])).mean() < 8
    assert {p.dtype for network in half.networks().values() for p in network.parameters()} == {torch.bfloat16}


def test_offload_moves_only_the_network_at_work_and_a_fourth_is_no_special_case():
    class Network(torch.nn.Linear):
        def __init__(self, name):
            super().__init__(1, 1)
            self.name = name

        def to(self, *args, **kwargs):
            moves.append((self.name, str(args[0])))
            return self

    sd = model()
    sd.parts |= {name: Network(name) for name in ("text_encoder", "vae", "unet", "controlnet")}
    sd.offload, sd.device, moves = True, torch.device("meta"), []
    assert sd.use("controlnet") is sd.controlnet
    assert moves == [("text_encoder", "cpu"), ("vae", "cpu"), ("unet", "cpu"), ("controlnet", "meta")]
    with pytest.raises(AttributeError, match="has no text_encoder_2"):
        _ = sd.text_encoder_2


def test_another_encode_and_a_wrapped_network_are_enough(sd):
    """What later chapters do: more keyword arguments for the network, and something around it."""
    seen = []

    class More(StableDiffusion):
        def encode(self, prompts, clip_skip=0):
            return super().encode(prompts, clip_skip) | {"size": torch.full((len(prompts),), 7.0)}

        def network(self, request):
            answer = super().network(request)

            def wrapped(latents, t, size, **conditioning):
                seen.append((size.tolist(), request.steps))
                return answer(latents, t, **conditioning)

            return wrapped

    more = More(*random_parts()[0], "cpu")
    assert far(more.txt2img("a cat", **FAST, seed=1)[0], sd.txt2img("a cat", **FAST, seed=1)[0]) == 0
    assert seen == [([7.0, 7.0], 2)] * 2


def test_extras_change_the_setup_and_say_so(sd):
    class Frozen:
        """The latents stay as they are."""

        def __call__(self, model, setup):
            assert model is sd and setup.x0 is None and setup.start is setup.noise
            return replace(setup, start=0 * setup.start, after=lambda xt, level: 0 * xt)

        def said(self):
            return {"Frozen": "yes"}

    class Net:
        def control(self, hint, scale=1.0):
            assert (hint, scale) == ("a hint", 0.5)
            return Frozen()

    plain = sd.decode(torch.zeros(1, 4, 8, 8))[0]
    assert far(sd.txt2img("a cat", **FAST, extras=[Frozen()], width=64, height=64)[0], plain) == 0
    assert far(sd.txt2img("a cat", **FAST, control=[(Net(), "a hint", 0.5)], width=64, height=64)[0], plain) == 0
    request = Request("a cat", control=[(Net(), "a hint", 0.5)], seed=3)
    assert "Frozen: yes" in request.parameters(0, 64, 64, "m")
    again = replace(request, steps=7)  # a request may be made from a checked one
    assert again.control == request.control and again.seed == (3,) and again.steps == 7


@pytest.mark.parametrize("control", [7, None, [7], [()], [("net", "hint")], {"a": 1}])
def test_what_is_no_controlnet_is_refused(control):
    with pytest.raises(ValueError, match="give a list of .net, hint. or .net, hint, scale, start, end., each net a"):
        Request("a cat", control=control)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_thirty_lines_draw_the_same(prediction, tmp_path):
    sd = model()
    if prediction == "v":
        sd.prediction, sd.schedule = V, Schedule(noise_offset=0.3)
    sd.save(tmp_path / "model", dtype=None)
    drawn = draw_by_hand(load(tmp_path / "model"), "a cat", seed=3, steps=4, scale=5.0)
    assert far(drawn, sd.txt2img("a cat", seed=3, steps=4, cfg_scale=5.0, sampler="ddim")[0]) <= 1


def test_a_long_prompt_says_what_is_cut(sd):
    with pytest.warns(PromptCut, match="end"):
        cut = sd.txt2img("cat " * 76 + "end", **FAST, seed=0)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert far(cut, sd.txt2img("cat " * 75, **FAST, seed=0)[0]) == 0
        sd.txt2img("", **FAST)


def test_too_little_memory_to_decode_is_said_before_the_first_step(sd, monkeypatch):
    """What is named is what a convolution of the last level has at once; with tiles it is that of a tile."""
    held, sd = [], StableDiffusion(sd.parts, sd.schedule, size=sd.size)
    hooks = [
        part.register_forward_hook(lambda part, given, made: held.append(given[0].nbytes + made.nbytes))
        for part in sd.vae.modules()
        if isinstance(part, torch.nn.Conv2d)
    ]
    sd.decode(torch.zeros(1, 4, 40, 48))
    for hook in hooks:
        hook.remove()
    need, (height, width) = max(held), (40 * sd.factor, 48 * sd.factor)
    how = {"height": height, "width": width, "steps": 1}
    monkeypatch.setattr(pipeline, "free_memory", lambda device: need - 1)
    said = f"decoding {width}x{height} pixels takes {human(need)} of memory or more, but only .* are free: add --tiled"
    with pytest.warns(UserWarning, match=said):
        sd.steps("a cat", **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.steps("a cat", **how | {"width": height})
        monkeypatch.setattr(pipeline, "free_memory", lambda device: None)  # a machine that does not tell
        sd.steps("a cat", **how)
    speed_up(sd, tiled=True).vae.tile = 20
    monkeypatch.setattr(pipeline, "free_memory", lambda device: need * 20 * 20 // (40 * 48) - 1)
    with pytest.warns(UserWarning, match="are free: draw a smaller picture"):
        sd.steps("a cat", **how)
    monkeypatch.setattr(pipeline, "free_memory", lambda device: need * 20 * 20 // (40 * 48))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.steps("a cat", **how)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"prompt": 3}, "prompt is 3"),
        ({"width": 30}, "width is 30; give a multiple of 8"),
        ({"steps": 1001}, "1001"),
        ({"clip_skip": 3}, "skip is 3"),
        ({"image": Image.new("RGB", (9, 9)), "strength": 0.001}, "leaves no step"),
        ({"image": Image.new("RGB", (20_000, 1))}, "20000x1"),
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
    parts = random_parts()[0]
    for wrong, words in ((UNetConfig((32,), (True,), heads=(1,)), "do not fit"),
                         (replace(SMALL_UNET, in_channels=8), "takes 8 channels and answers 4"),
                         (replace(SMALL_UNET, out_channels=8), "answers 8")):  # fmt: skip
        networks = parts.networks | {"unet": UNet(wrong)}
        with pytest.raises(ValueError, match=words):
            StableDiffusion(networks, parts.schedule)


def test_img2img_wants_a_picture(sd):
    with pytest.raises(ValueError, match="image is None"):
        sd.img2img("a cat", None)


def test_save_and_load(sd, tmp_path):
    sd.save(tmp_path / "SD v1.5", dtype=None)
    again = StableDiffusion.load(tmp_path / "SD v1.5", device="cpu")
    assert again.name == "SD v1.5" and again.size == (32, 32) and again.dtype == torch.float32
    assert far(again.txt2img("a cat", **FAST, seed=1)[0], sd.txt2img("a cat", **FAST, seed=1)[0]) == 0


def test_a_part_is_exchanged_by_its_name():
    parts = {"unet": 1}
    sd = StableDiffusion.__new__(StableDiffusion)
    sd.parts = parts
    sd.unet = 2
    assert sd.parts["unet"] == sd.unet == 2 and "unet" not in vars(sd)
