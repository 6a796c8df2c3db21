"""Inpainting: masks of all kinds, what stays, stairs, nine channels, larger canvases; two pixels in closed form."""

import inspect as python
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import RePaintScheduler
from PIL import Image, ImageDraw
from random_model import SMALL_UNET, random_parts

from sdlearn.checkpoint.inspect import inspect
from sdlearn.inpaint import OVERLAP, Inpaint, expand, grey, rail, read_expansion, stairs, to_cells, to_mask
from sdlearn.pictures import to_image, to_tensor
from sdlearn.pipeline import StableDiffusion
from sdlearn.prediction import PREDICTIONS
from sdlearn.request import Request
from sdlearn.samplers import SAMPLERS, Denoiser, draw_noise, sample
from sdlearn.schedule import Schedule, add_noise

FAST = {"steps": 3, "sampler": "ddim", "seed": 4}
NINE = replace(SMALL_UNET, in_channels=9)


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(*random_parts()[0], "cpu")


@pytest.fixture(scope="module")
def nine():
    return StableDiffusion(*random_parts(NINE)[0], "cpu")


def picture(width=32, height=32):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([7 * x % 256, 5 * y % 256, 200 * (x // 4 % 2)], -1).astype("uint8"))


def half(width=32, height=32):
    """The right half is to be painted."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def pixels(image):
    return np.asarray(image).astype(int)


# --- masks
def kinds_of_masks():
    white = np.asarray(half())
    opaque = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    opaque.paste((255, 255, 255, 255), (16, 0, 32, 32))
    return {
        "L": half(), "1": half().convert("1"), "RGB": half().convert("RGB"), "P": half().convert("P"),
        "white on clear": opaque, "LA": opaque.convert("LA"), "black on opaque": half().convert("RGBA"),
        "16 bits": Image.fromarray(white.astype(np.uint16) * 257), "float": Image.fromarray(white / np.float32(255)),
        "twice as large": half().resize((64, 64), 0), "half as large": half().resize((16, 16), 0),
        "grey, above the half": half().point(lambda x: 140 if x else 120),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds_of_masks())
def test_masks_of_all_kinds_say_the_same(sd, kind):
    mask = kinds_of_masks()[kind]
    wanted = sd.inpaint("a cat", picture(), half(), **FAST)[0]
    assert sd.inpaint("a cat", picture(), mask, **FAST)[0].tobytes() == wanted.tobytes()


def test_a_mask_is_cropped_as_its_picture_is():
    """A red square that the mask covers: both are cropped from 2:1 to 1:1, and it is still covered exactly."""
    image, mask = Image.new("RGB", (128, 64), "blue"), Image.new("L", (128, 64))
    for target, fill in ((image, "red"), (mask, 255)):
        ImageDraw.Draw(target).rectangle((48, 16, 79, 47), fill=fill)
    seen, hole = to_tensor(image, 64, 64), to_mask(grey(mask), 64, 64)
    assert torch.equal(hole[0, 0] == 1, seen[0, 0] > 0) and hole.sum() == 32 * 32


def test_cells_are_those_of_nearest_interpolation():
    mask = (torch.rand(1, 1, 64, 48) < 0.3).float()
    assert torch.equal(to_cells(mask, 8), F.interpolate(mask, (8, 6)))


# --- what stays
SETTINGS = [{}, {"strength": 0.5}, {"soft": 6}, {"cfg_scale": 1.0}]


@pytest.mark.parametrize("channels, settings", [(4, {"resample": 2}), *product((4, 9), SETTINGS)])
def test_known_pixels_stay_to_the_bit(sd, nine, channels, settings):
    image, mask = picture(), Image.new("L", (32, 32))
    ImageDraw.Draw(mask).ellipse((6, 3, 27, 20), fill=255)
    for drawn in {4: sd, 9: nine}[channels].inpaint(["a cat", "a fox"], image, mask, **FAST | settings):
        changed = (pixels(drawn) != pixels(image)).any(-1)
        assert not changed[np.asarray(mask) == 0].any() and changed[np.asarray(mask) == 255].mean() > 0.5


def test_without_pasting_the_vae_moves_them(sd):
    drawn = sd.inpaint("a cat", picture(), half(), paste=False, **FAST)[0]
    away = abs(pixels(drawn) - pixels(picture()))[np.asarray(half()) == 0]
    assert away.max() > 20  # this VAE is random, so it is far away


def test_a_soft_edge_fades_inside_the_hole(sd):
    hard, soft = (pixels(sd.inpaint("a cat", picture(), half(), soft=x, **FAST)[0]) for x in (0, 8))
    moved, share = abs(hard - pixels(picture())).sum(-1), abs(soft - pixels(picture())).sum(-1)
    near, far = (share[:, columns].sum() / moved[:, columns].sum() for columns in (slice(16, 18), slice(24, 32)))
    assert near < 0.4 and far > 0.95


def test_the_rail_is_the_noised_truth_of_the_next_level_and_clean_at_the_end():
    levels, g = Schedule().levels(5), torch.Generator().manual_seed(0)
    x0, noise, xt = torch.randn(3, 1, 4, 4, 4, generator=g)
    hole = torch.zeros(1, 1, 4, 4)
    hole[..., 2:] = 1
    after = rail(x0, lambda: noise, hole, levels[-1])
    for level in levels[1:-1]:
        assert torch.equal(after(xt, level)[..., :2], add_noise(x0, noise, level)[..., :2])
    for level in levels[1:]:
        assert torch.equal(after(xt, level)[..., 2:], xt[..., 2:])
    assert torch.equal(after(xt, levels[-1])[..., :2], x0[..., :2])


def test_latents_outside_the_hole_end_at_the_truth(sd):
    request = Request("a cat", image=picture(), strength=1.0, extras=[Inpaint(half())], **FAST)
    x0 = sd.set_up(request).x0
    *_, drawing = sd.draw(request)
    assert torch.equal(drawing.latents[..., :2], x0[..., :2]) and not torch.equal(drawing.latents, x0)


def test_strength_one_forgets_the_picture_under_the_mask(sd):
    other = picture()
    other.paste("white", (16, 0, 32, 32))
    setups = [sd.set_up(Request("a cat", image=x, strength=1.0, extras=[Inpaint(half())], **FAST))
              for x in (picture(), other)]  # fmt: skip
    assert torch.equal(setups[0].start, setups[1].start) and not torch.equal(setups[0].x0, setups[1].x0)


# --- stairs
@pytest.mark.parametrize("steps, times, jump", [(20, 3, 5), (10, 2, 1), (50, 4, 10), (7, 2, 3)])
def test_stairs_are_those_of_the_authors(steps, times, jump):
    """diffusers climbs step by step; we climb at once, which is the same noise in all."""
    scheduler = RePaintScheduler()
    scheduler.set_timesteps(steps, jump, times)
    theirs, levels = scheduler.timesteps.tolist(), Schedule().levels(steps)
    rises = [t for before, t, after in zip([2000, *theirs], theirs, [*theirs[1:], -1], strict=False)
             if not before < t < after]  # fmt: skip
    index = {t: i for i, t in enumerate(sorted(set(theirs), reverse=True))}
    assert [levels.index(x) for x in stairs(levels, times, jump)] == [*map(index.__getitem__, rises), steps]


def test_stairs_of_one_time_are_the_levels():
    levels = Schedule().levels(9)
    assert stairs(levels, 1) == levels
    assert len(stairs(levels[-2:], 4)) >= 2  # a single step


C = torch.tensor([[1.0, 0.9], [0.9, 1.0]])


def two_pixels(sampler, times, jump=1, steps=50, count=4000):
    """Two pixels whose correlation is .9; one is known to be 1.5. What becomes of the other: mean and deviation."""
    schedule, g = Schedule(), torch.Generator().manual_seed(0)

    def best(xt, t):  # E[x0 | xt], in closed form
        level = schedule.at(t)
        a, s = level.alpha, level.sigma
        return xt @ (a * C @ torch.linalg.inv(a * a * C + s * s * torch.eye(2))).T

    levels = schedule.levels(steps, clean=SAMPLERS[sampler].clean)
    x0, hole = torch.full((count, 1, 1, 2), 1.5), torch.tensor([[[[0.0, 1.0]]]])
    noise = torch.randn(x0.shape, generator=g)
    again = (lambda: noise) if times == 1 else lambda: torch.randn(x0.shape, generator=g)
    after = rail(x0, again, hole, levels[-1])
    denoise = Denoiser(best, schedule, PREDICTIONS["sample"])
    *_, step = sample(denoise, noise, stairs(levels, times, jump), sampler, g, after=after)
    return step.latents[..., 1].mean().item(), step.latents[..., 1].std().item()


def test_two_pixels_in_closed_form():
    """True are 1.35 and .436; a hole that never tells the rail misses them, and going back repairs that."""
    means = [two_pixels("ddim", 1)[0], two_pixels("ddpm", 1)[0], two_pixels("ddpm", 2)[0], two_pixels("ddpm", 5)[0]]
    assert np.allclose(means, [0.67, 0.91, 1.12, 1.26], atol=0.04)
    assert abs(two_pixels("ddpm", 10)[0] - 1.35) < 0.07


# --- nine channels
def test_a_network_of_nine_channels_sees_mask_and_masked_picture_in_both_halves(nine, monkeypatch):
    seen, forward = [], nine.unet.forward
    monkeypatch.setattr(nine.unet, "forward", lambda x, *more, **how: (seen.append(x), forward(x, *more, **how))[1])
    nine.inpaint(["a cat", "a fox"], picture(), half(), **FAST)
    dice = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    noise = draw_noise((2, 4, 4, 4), dice)  # first the noise, then the VAE's
    masked = nine.encode_image(to_tensor(picture(), 32, 32) * (to_mask(half(), 32, 32) < 0.5), dice)
    for x in seen:
        assert x.shape == (4, 9, 4, 4)
        assert torch.equal(x[:, 4], torch.tensor([0.0, 0, 1, 1]).expand(4, 4, 4))
        assert torch.equal(x[:2, 4:], x[2:, 4:]) and not torch.equal(x[0, :4], x[1, :4])
        assert torch.equal(x[:2, 5:], masked)
    assert len(seen) == 3 and torch.equal(seen[0][:2, :4], noise)


def test_a_model_of_nine_channels_is_saved_loaded_and_recognised(nine, tmp_path):
    nine.save(tmp_path / "folder", None)
    again = StableDiffusion.load(tmp_path / "folder", "cpu")
    assert again.unet.config == NINE
    a, b = (x.inpaint("a cat", picture(), half(), **FAST)[0] for x in (nine, again))
    assert a.tobytes() == b.tobytes()
    report = inspect(tmp_path / "folder")
    assert "inpainting" in report.description and report.can.startswith("sdlearn inpaint ")


@pytest.mark.parametrize("draw", ["txt2img", "img2img"])
def test_a_model_of_nine_channels_asks_for_a_mask(nine, draw):
    words = ["a cat", picture()][: 1 + (draw == "img2img")]
    with pytest.raises(ValueError, match=r"made for inpainting.* 9 channels.*picture and a mask"):
        getattr(nine, draw)(*words, **FAST)


# --- larger canvases
def test_expand_puts_the_picture_on_a_larger_canvas():
    canvas, mask = expand(picture(), left=16, bottom=8)
    assert canvas.size == mask.size == (48, 40)
    assert np.array_equal(pixels(canvas)[:32, 16:], pixels(picture()))
    known = np.asarray(mask) == 0
    assert known[: 32 - OVERLAP, 16 + OVERLAP :].all() and known.sum() == (32 - OVERLAP) ** 2
    assert np.array_equal(pixels(canvas)[32:, 16:], np.repeat(pixels(picture())[31:], 8, axis=0))


def test_outpainting_keeps_the_middle(sd):
    canvas, mask = expand(picture(), right=32)
    drawn = sd.inpaint("a cat", canvas, mask, width=64, height=32, **FAST)[0]
    assert drawn.size == (64, 32)
    assert np.array_equal(pixels(drawn)[:, : 32 - OVERLAP], pixels(picture())[:, : 32 - OVERLAP])


def test_expansions_are_read():
    assert read_expansion("left=64,bottom=8") == {"left": 64, "bottom": 8}
    wrong = ["", "left", "left=", "left=-8", "up=8", "left=8;top=8", "left=8,", ",left=8", "left=8.5", "left= 8"]
    for text in [*wrong, "left=8,top=8,left=16"]:
        with pytest.raises(ValueError, match="give sides and pixels"):
            read_expansion(text)
    for wrong in ({"left": -1}, {"left": 1.5}, {"top": True}, {"right": 10**6}, {"left": float("nan")}):
        with pytest.raises(ValueError, match="whole number of pixels"):
            expand(picture(), **wrong)
    with pytest.raises(ValueError, match="to which side"):
        expand(picture())


# --- wrong input
@pytest.mark.parametrize("mask, how, sentence", [
    (Image.new("L", (32, 32)), {}, "black all over"),
    (Image.new("L", (32, 32), 255), {}, "white all over"),
    (Image.new("L", (32, 32), 127), {}, "black all over"),
    (Image.new("RGBA", (32, 32), (255, 255, 255, 0)), {}, "black all over"),
    (half(64, 32), {}, r"mask is 64x32 pixels and the picture 32x32"),
    (np.ones((32, 32)), {}, "mask is of type ndarray"),
    (None, {}, "mask is of type NoneType"),
    ("nowhere.png", {}, "there is no picture at nowhere.png"),
    (half(), {"resample": 0}, "resample is 0; give a whole number of times"),
    (half(), {"resample": 1.5}, "resample is 1.5"),
    (half(), {"resample": True}, "resample is True"),
    (half(), {"paste": 1}, "paste is 1; give True or False"),
    (half(), {"soft": float("nan")}, "soft is nan; give a number of pixels"),
    (half(), {"soft": -1}, "soft is -1"),
    (half(), {"strength": float("nan")}, "strength is nan"),
    (half(), {"strength": 0}, "strength is 0"),
])  # fmt: skip
def test_wrong_input_is_one_sentence(sd, mask, how, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        sd.inpaint("a cat", picture(), mask, **FAST | how)
    assert "\n" not in str(error.value)


def test_a_mask_without_a_cell_and_a_mask_without_a_picture(sd, nine):
    thin = Image.new("L", (32, 32))
    thin.paste(255, (3, 3, 6, 6))
    with pytest.raises(ValueError, match=r"too thin: at 32x32 no cell of 8x8"):
        sd.inpaint("a cat", picture(), thin, **FAST)
    with pytest.raises(ValueError, match="image is of type NoneType"):
        sd.inpaint("a cat", None, half(), **FAST)
    with pytest.raises(ValueError, match="a mask, but no picture"):
        sd.txt2img("a cat", extras=[Inpaint(half())], **FAST)
    with pytest.raises(ValueError, match="resample is 3, but this model sees the picture itself"):
        nine.inpaint("a cat", picture(), half(), resample=3, **FAST)


def test_the_png_says_what_was_masked(sd):
    hole = Inpaint(half(), resample=3, soft=2)
    request = Request("a cat", image=picture(), strength=1.0, extras=[hole], **FAST)
    said = request.parameters(0, 32, 32, "x")
    assert "Masked: 50%, Resample: 3, Mask blur: 2.0" in said and "Denoising strength: 1.0" in said
    assert Inpaint(half()).said() == {"Masked": "50%", "Resample": None, "Mask blur": None}


def test_a_drawing_shows_the_known_part_from_the_first_step_on(sd):
    request = Request("a cat", image=picture(), strength=1.0, extras=[Inpaint(half())], **FAST)
    for drawing in sd.draw(request):
        assert np.array_equal(pixels(drawing.images()[0])[:, :16], pixels(picture())[:, :16])


def test_the_method_takes_what_the_record_takes():
    taken = python.signature(StableDiffusion.inpaint).parameters
    for name, field in Inpaint.__dataclass_fields__.items():
        assert name in taken and (name == "mask" or taken[name].default == field.default)
    assert to_image(to_tensor(picture(), 32, 32)[0]).tobytes() == picture().tobytes()  # what pasting rests on
