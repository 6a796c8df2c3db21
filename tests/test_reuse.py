"""Deep features shared by neighbouring looks: the top is the U-Net's own, every = 1 is exact, memory is never stale."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import SMALL_UNET, random_parts
from torch.utils.flop_counter import FlopCounterMode

from sdlearn.checkpoint.load import empty
from sdlearn.controlnet import ControlNet, ControlNetConfig
from sdlearn.inpaint import Inpaint
from sdlearn.pipeline import StableDiffusion
from sdlearn.reuse import Reuse, cut
from sdlearn.speed import speed_up
from sdlearn.unet import UNet, UNetConfig

DEEP_UNET = UNetConfig((32, 64, 64), (True, True, False), heads=(2, 4, 4), blocks=2, context_width=32, groups=8)


@pytest.fixture
def sd() -> StableDiffusion:
    return StableDiffusion(*random_parts(DEEP_UNET)[0], "cpu")


def latents(sd: StableDiffusion, **settings) -> torch.Tensor:
    settings = {"sampler": "ddim", "steps": 10, "seed": 0} | settings
    *_, last = sd.steps("a cat", **settings)
    return last.latents


def looks(sd: StableDiffusion, **settings) -> str:
    """A letter for each call of the U-Net: Whole, or its top alone."""
    calls = []
    hooks = [sd.unet.conv_in.register_forward_hook(lambda *call: calls.append("t")),
             sd.unet.middle.register_forward_hook(lambda *call: calls.__setitem__(-1, "W"))]  # fmt: skip
    latents(sd, **settings)
    for hook in hooks:
        hook.remove()
    return "".join(calls)


@pytest.mark.parametrize("skips", range(1, 9))
@pytest.mark.parametrize("side", [8, 10])
def test_the_top_on_the_map_from_below_answers_as_the_whole(skips, side):
    torch.manual_seed(0)
    unet, maps = UNet(DEEP_UNET).eval(), []
    top, below = cut(unet, skips)
    x, t, words = torch.randn(2, 4, side, side), torch.tensor([5, 900]), torch.randn(2, 7, 32)
    with torch.no_grad():
        below.register_forward_hook(lambda *call: maps.append(call[2]))
        answer = unet(x, t, words)
        top.middle.map = maps[0]
        assert torch.equal(top(x, t, words), answer) and len(maps) == 1
        assert not torch.equal(top(x + 0.1, t, words), answer)
    assert {*map(id, top.parameters())} < {*map(id, unet.parameters())}
    assert len(unet.down) == 8 and len(unet.up) == 11


@pytest.mark.parametrize("settings", [
    {"sampler": "heun"},
    {"two_passes": True},
    {"guided_times": (300, 700)},
    {"cfg_scale": 1.0},
    {"sampler": "ddpm", "n": 2},
    {"image": Image.new("RGB", (32, 32), "red")},
])  # fmt: skip
def test_every_look_whole_is_the_plain_drawing(sd, settings):
    for skips in (1, 4):
        assert torch.equal(latents(sd, **settings, extras=[Reuse(1, skips)]), latents(sd, **settings))


def test_it_draws_nearly_the_plain_picture_and_the_nearer_the_less_it_spares(sd):
    plain = latents(sd, steps=20)
    off = [(latents(sd, steps=20, extras=[how]) - plain).abs().mean()
           for how in (Reuse(2), Reuse(5), Reuse(5, 4), Reuse(5, start=0.6))]  # fmt: skip
    assert 0 < off[0] < off[1] < 0.2 * plain.abs().mean() and off[2] < off[1] > off[3] > 0


@pytest.mark.parametrize(("how", "settings", "order"), [
    (Reuse(2, 1, 0), {}, "WtWtWtWtWt"),
    (Reuse(3, 1, 0), {}, "WttWttWttW"),
    (Reuse(3, 1, 0.3), {}, "WWWttWttWt"),
    (Reuse(3, 1, 1), {}, "WWWWWWWWWW"),
    (Reuse(1), {}, "WWWWWWWWWW"),
    (Reuse(3, 1, 0), {"two_passes": True, "steps": 4}, "WWttttWW"),
    (Reuse(9, 1, 0), {"guided_times": (300, 700)}, "WttWtttWtt"),  # another context, and back to an old one
    (Reuse(9, 1, 0), {"steps": 2, "sampler": "heun"}, "Wtt"),
])  # fmt: skip
def test_which_looks_are_whole(sd, how, settings, order):
    assert looks(sd, extras=[how], **settings) == order


def test_after_going_up_again_nothing_old_is_reused(sd):
    mask = Image.fromarray(np.uint8(np.arange(32) > 15)[None].repeat(32, 0) * 255)
    how = {"image": Image.new("RGB", (32, 32), "red"), "strength": 1.0}
    for extras in ([Inpaint(mask, resample=3), Reuse(99, 1, 0)], [Reuse(99, 1, 0), Inpaint(mask, resample=3)]):
        order = looks(sd, steps=20, extras=extras, **how)
        setup_levels = sd.set_up(_request(steps=20, extras=extras, **how)).levels
        times = [level.t for level in setup_levels]
        rises = sum(b > a for a, b in zip(times, times[1:], strict=False))
        assert rises > 1 and order.count("W") == 1 + rises


def _request(**settings):
    from sdlearn.request import Request

    return Request("a cat", sampler="ddim", seed=0, **settings)


def test_a_controlnet_goes_on_steering(sd):
    torch.manual_seed(1)
    net = ControlNet(ControlNetConfig(**vars(DEEP_UNET), hint_channels=(4, 8, 8, 8))).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    control = [(net, Image.new("RGB", (32, 32), "white"))]
    steered, plain = latents(sd, control=control), latents(sd)
    assert torch.equal(latents(sd, control=control, extras=[Reuse(1)]), steered)
    shared = latents(sd, control=control, extras=[Reuse(2)])
    assert 0 < (shared - steered).abs().mean() < 0.5 * (plain - steered).abs().mean()


@pytest.mark.parametrize("offload", [False, True])
def test_the_model_is_afterwards_what_it_was(offload, monkeypatch):
    sd = StableDiffusion(*random_parts()[0], "cpu", offload=offload)
    unet, names, before = sd.unet, list(sd.unet.state_dict()), latents(sd)
    latents(sd, extras=[Reuse(2)])
    monkeypatch.setattr(unet.conv_norm_out, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latents(sd, extras=[Reuse(2)])
    monkeypatch.undo()
    assert sd.unet is unet and list(unet.state_dict()) == names and torch.equal(latents(sd), before)
    assert not any(part._forward_hooks for part in unet.modules())


def test_with_fast_attention_and_8_bits(sd):
    plain = latents(sd, extras=[Reuse(3)])
    fast = latents(speed_up(copy.copy(sd), fast=True), extras=[Reuse(3)])
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    assert 0 < (latents(speed_up(sd, int8=True), extras=[Reuse(3)]) - plain).abs().mean() < 0.1


def test_two_drawings_at_once_do_not_share_their_memory(sd):
    how = {"sampler": "ddim", "steps": 6, "seed": 0, "extras": [Reuse(3, 1, 0)]}
    alone = [[step.latents for step in sd.steps(prompt, **how)] for prompt in ("a cat", "a red apple")]
    pairs = zip(sd.steps("a cat", **how), sd.steps("a red apple", **how), strict=True)
    for i, together in enumerate(pairs):
        assert all(torch.equal(step.latents, found[i]) for step, found in zip(together, alone, strict=True))


@pytest.mark.slow
def test_at_full_size_a_drawing_takes_hardly_more_than_half_of_the_operations():
    """What the chapter says: half of all looks are whole, so any number of steps takes 1.85 times fewer."""
    unet, counts = empty(UNet, UNetConfig()), {}
    top, below = cut(unet, 1)
    sizes = (2, 4, 64, 64), (2,), (2, 77, 768)
    below.register_forward_hook(lambda *call: setattr(top.middle, "map", call[2]))
    for name, network in (("whole", unet), ("top", top)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*(torch.empty(size, device="meta") for size in sizes))
        counts[name] = counter.get_total_flops()
    assert round(counts["whole"] / 1e9) == 1607 and round(counts["top"] / 1e9) == 127
    sd = StableDiffusion(*random_parts()[0], "cpu")
    for steps in (10, 20, 50):
        for how in (Reuse(), Reuse(6, 1, 0.4), Reuse(3, 1, 0.25)):
            order = looks(sd, steps=steps, extras=[how])
            spent = order.count("W") * counts["whole"] + order.count("t") * counts["top"]
            assert 1.8 < steps * counts["whole"] / spent < (1.9 if how == Reuse() else 2.3), (steps, how)


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"every": 0}, "every is 0; give a whole number from 1 to 1000"),
    ({"every": 2.5}, "every is 2.5; give a whole number"),
    ({"skips": 0}, "skips is 0; give a whole number"),
    ({"start": 1.5}, "start is 1.5; give a share of the way, 0 to 1"),
    ({"start": "late"}, "start is 'late'; give a share of the way"),
])  # fmt: skip
def test_settings_that_cannot_be_meant(wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        Reuse(**wrong)


def test_what_this_unet_cannot_do_is_said():
    sd = StableDiffusion(*random_parts(SMALL_UNET)[0], "cpu")
    with pytest.raises(ValueError, match="^skips is 4; give a whole number from 1 to 3$"):
        latents(sd, extras=[Reuse(2, 4)])


@pytest.mark.slow
def test_a_compiled_unet_is_refused(sd):
    sd.unet.compile()
    with pytest.raises(ValueError, match="^a compiled U-Net is one program"):
        latents(sd, extras=[Reuse(2)])


def test_the_png_says_so():
    assert Reuse(4, 2, 0.2).said() == {"Reuse every": 4, "Reuse skips": 2, "Reuse start": 0.2}
