"""Faster forms give the answers of the simple ones; tiles meet without seams; nothing is made on the wrong device."""

import copy
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_model import SMALL_UNET, SMALL_VAE, random_parts
from torch import nn

from sdlearn import speed
from sdlearn.attention import Attention
from sdlearn.checkpoint.load import load_vae
from sdlearn.pipeline import StableDiffusion
from sdlearn.speed import FastAttention, TiledVAE, compile_unet, faster, places, ramp, sliced_attention, speed_up, tiled
from sdlearn.tiny.scenes import parse
from sdlearn.tiny.tasks import to_tensor
from sdlearn.unet import UNet, UNetConfig, record_attention
from sdlearn.vae import VAE

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 12))
def test_slices_give_what_the_whole_gives(batch, heads, rows, words, power):
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, 8) for n in (rows, words, words))
    torch.testing.assert_close(sliced_attention(q, k, v, 2**power), F.scaled_dot_product_attention(q, k, v),
                               atol=1e-5, rtol=1e-5)  # fmt: skip


def test_slices_take_views_and_16_bits():
    q, k, v = (torch.randn(2, 50, 4, 8).transpose(1, 2) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    assert (sliced_attention(*(x.bfloat16() for x in (q, k, v)), 256).float() - exact).abs().max() < 2e-2


@pytest.mark.parametrize("slow, wins", [("sliced_attention", False), ("scaled_dot_product_attention", True)])
def test_slices_are_taken_where_they_are_faster(slow, wins, monkeypatch):
    home = speed if slow == "sliced_attention" else F
    form = getattr(home, slow)
    monkeypatch.setattr(home, slow, lambda q, k, v: (time.sleep(0.02), form(q, k, v))[1])
    speed.slices_win.cache_clear()
    assert speed.slices_win(torch.bfloat16, 16) is wins
    speed.slices_win.cache_clear()


def test_only_16_bits_on_a_cpu_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(speed, "slices_win", lambda dtype: asked.append(dtype) or True)
    for dtype, device, sliced in ((torch.float32, "cpu", False), (torch.bfloat16, "cpu", True),
                                  (torch.bfloat16, "meta", False)):  # fmt: skip
        network = faster(nn.Sequential(Attention(16, 2), Attention(16, 2)).to(device, dtype))
        assert [part.sliced for part in network] == [sliced] * 2
    assert asked == [torch.bfloat16]  # once for a network


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("context_width", [None, 12])
def test_a_fast_attention_answers_as_the_one_that_it_replaces(sliced, context_width, monkeypatch):
    monkeypatch.setattr(speed, "LARGE", 0)
    simple = Attention(16, 4, context_width)
    fast, x = FastAttention(simple, sliced), torch.randn(2, 9, 16)
    contexts = [None] if context_width is None else [torch.randn(2, 5, 12) for _ in range(2)]
    with torch.no_grad():
        for context in contexts * 2:  # a new one, and the same again
            torch.testing.assert_close(fast(x, context), simple(x, context), atol=1e-6, rtol=1e-5)
        if context_width is None:
            torch.testing.assert_close(fast(x, causal=True), simple(x, causal=True))
    assert all(a is b for a, b in zip(fast.parameters(), simple.parameters(), strict=True))


def test_keys_and_values_of_a_context_are_computed_once():
    fast, calls = FastAttention(Attention(16, 2, 12), False), []
    fast.to_k.register_forward_pre_hook(lambda *call: calls.append(1))
    words, others = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    with torch.no_grad():
        for context in (words, words, words, others, others, words, others):  # two passes take turns
            fast(torch.randn(2, 9, 16), context)
        assert len(calls) == 2
        for context in (torch.randn(2, 5, 12), others, words):  # a third drives out the one computed first
            fast(torch.randn(2, 9, 16), context)
        assert len(calls) == 4


def test_keys_and_values_are_forgotten_when_weights_change():
    """A LoRA changes weights in place, or puts others in; the same context must be read anew."""
    simple = Attention(16, 2, 12)
    fast, x, words = FastAttention(simple, False), torch.randn(2, 9, 16), torch.randn(2, 5, 12)

    def changes():
        yield "nothing"
        simple.to_k.weight += 0.1
        yield "in place"
        simple.to_v.weight.data = simple.to_v.weight.data * 2
        yield "other data"
        fast.to_k = simple.to_k = nn.Linear(12, 16, bias=False)
        yield "another layer"
        fast.load_state_dict({name: x + 0.1 for name, x in fast.state_dict().items()})
        yield "loaded"

    with torch.no_grad():
        for change in changes():
            for _ in range(2):
                assert torch.equal(fast(x, words), simple(x, words)), change


def test_weights_of_inference_mode_are_read_too():
    with torch.inference_mode():
        simple = Attention(16, 2, 12)
    fast, x, words = FastAttention(simple, False), torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    with torch.no_grad():
        assert torch.equal(fast(x, words), simple(x, words)) and torch.equal(fast(x, words), simple(x, words))


@pytest.mark.parametrize("two_passes, contexts", [(False, 1), (True, 2)])
def test_a_whole_drawing_computes_the_words_once_for_each_context(two_passes, contexts):
    parts, _ = random_parts()
    sd, calls = speed_up(StableDiffusion(*parts, "cpu"), fast=True), []
    layers = [part for name, part in sd.unet.named_modules() if name.endswith("attn2.to_k")]
    for part in layers:
        part.register_forward_pre_hook(lambda *call: calls.append(1))
    sd.txt2img("a cat", steps=4, seed=0, two_passes=two_passes)
    assert len(calls) == contexts * len(layers)


def test_a_faster_network_says_the_same_and_keeps_its_names(monkeypatch):
    monkeypatch.setattr(speed, "LARGE", 0)
    torch.manual_seed(0)
    unet = UNet(SMALL_UNET).eval()
    quick = faster(copy.deepcopy(unet), sliced=True)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.randn(2, 77, SMALL_UNET.context_width)
    with torch.no_grad():
        torch.testing.assert_close(quick(x, t, context), unet(x, t, context), atol=1e-5, rtol=1e-4)
        with record_attention(quick) as mine, record_attention(unet) as theirs:
            quick(x, t, context), unet(x, t, context)
    assert list(quick.state_dict()) == list(unet.state_dict()) and list(mine) == list(theirs)
    kinds = {type(part) for part in quick.modules() if isinstance(part, Attention)}
    assert kinds == {FastAttention}
    assert faster(quick) is quick  # twice is once


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(2, 64), st.data())
def test_tiles_cover_everything_and_overlap(length, tile, data):
    overlap = data.draw(st.integers(1, tile // 2))
    starts = places(length, tile, overlap)
    assert starts[0] == 0 and starts == sorted(starts)
    if length > tile:
        assert starts[-1] + tile == length
        assert all(a + tile - b >= overlap for a, b in zip(starts, starts[1:], strict=False))
    else:
        assert starts == [0]


def test_a_ramp_falls_only_where_another_tile_goes_on():
    assert ramp(6, True, True, 2).tolist() == [1] * 6
    assert ramp(6, False, True, 2).tolist() == [0.25, 0.75, 1, 1, 1, 1]
    assert ramp(6, False, False, 2).tolist() == [0.25, 0.75, 1, 1, 0.75, 0.25]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(4, 16), st.sampled_from([1, 2, 8]))
def test_work_that_sees_only_its_own_position_is_the_same_in_tiles(height, width, tile, scale):
    x = torch.randn(1, 2, height, width)

    def enlarged(x):
        return 3 * F.interpolate(x, scale_factor=scale) + 1 if scale > 1 else 3 * x + 1

    y = tiled(lambda rows, columns: enlarged(x[..., rows, columns]), (height, width), tile, tile // 2, scale)
    torch.testing.assert_close(y, enlarged(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_tiled_vae():
    """The trained one, on a picture four times as large as those that it knows."""
    vae = load_vae(TINY)
    tiles, f = TiledVAE(vae, tile=16, overlap=8), 128
    image = torch.stack([to_tensor(parse("a fox above a red key").render())]).repeat(1, 1, 2, 2)
    with torch.no_grad():
        mine, theirs = tiles.encode(image), vae.encode(image)
        assert mine.logvar.shape == theirs.logvar.shape == (1, 4, 32, 32)
        assert (mine.mean - theirs.mean).abs().mean() < 0.05 * theirs.mean.std()
        latents = vae.config.scale * theirs.mean
        whole, parts = vae.decode(latents), tiles.decode(latents)
        assert parts.shape == whole.shape and (parts - whole).abs().mean() * 127.5 < 1.5
        assert torch.equal(tiles.decode(latents[..., :16, :16]), vae.decode(latents[..., :16, :16]))
        assert torch.equal(tiles.encode(image[..., :f, :f]).mean, vae.encode(image[..., :f, :f]).mean)
        without_fading = TiledVAE(vae, tile=16, overlap=1).decode(latents)
        assert (without_fading - whole).abs().mean() > 1.2 * (parts - whole).abs().mean()
    assert list(tiles.state_dict()) == list(vae.state_dict()) and tiles.config == vae.config
    with pytest.raises(ValueError, match="multiples of 8"):
        tiles.encode(torch.zeros(1, 3, 9 * 16, 203))
    for tile, overlap in ((16, 0), (16, 9)):
        with pytest.raises(ValueError, match="overlap"):
            TiledVAE(vae, tile, overlap)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler is here")
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_unet_answers_the_same_for_every_picture_with_one_compilation(whole):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = UNet(UNetConfig((32,), (True,), heads=(2,), blocks=1, context_width=16)).eval()
    fast = compile_unet(faster(copy.deepcopy(plain)), whole)
    x, t, made = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), []
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for _ in range(3):  # three pictures, of two steps each
            context = torch.randn(2, 77, 16)
            for _ in range(2):
                torch.testing.assert_close(fast(x, t, context), plain(x, t, context), atol=1e-4, rtol=1e-4)
            made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[0] > 0 and made[1] == made[2] <= made[0] + 1


def test_compiling_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install g"):
        compile_unet(UNet(SMALL_UNET))


def test_memory_of_a_tiled_decode_does_not_grow_with_the_picture():
    """The largest map that any layer makes belongs to one tile."""
    vae, largest = VAE(SMALL_VAE).eval(), []
    for part in vae.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda part, inputs, output: largest.append(output.numel()))
    sizes = []
    for side in (24, 48):
        largest.clear()
        with torch.no_grad():
            TiledVAE(vae, tile=16, overlap=4).decode(torch.randn(1, 4, side, side))
        sizes.append(max(largest))
    assert sizes[0] == sizes[1]


def test_the_pipeline_draws_the_same_with_every_switch_that_keeps_the_picture():
    parts, _ = random_parts()
    settings = dict(steps=4, sampler="ddim", seed=0)
    plain = StableDiffusion(*copy.deepcopy(parts), "cpu").txt2img("a cat", **settings)[0]
    for offload, switches, two_passes in ((False, {"fast": True}, False), (False, {"tiled": True}, False),
                                          (False, {}, True), (True, {"fast": True, "tiled": True}, True)):  # fmt: skip
        other = speed_up(StableDiffusion(*copy.deepcopy(parts), "cpu", offload=offload), **switches)
        picture = other.txt2img("a cat", two_passes=two_passes, **settings)[0]
        pixels = [torch.tensor(list(x.tobytes()), dtype=torch.int) for x in (plain, picture)]
        assert (pixels[0] - pixels[1]).abs().max() <= 1
    late = StableDiffusion(*copy.deepcopy(parts), "cpu").txt2img("a cat", guided_times=(0, 500), **settings)[0]
    assert late.tobytes() != plain.tobytes()


def test_nothing_is_made_on_another_device_than_the_one_asked_for():
    """On the meta device: all but tokens, times and noise, which is drawn on the CPU by intent."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Elsewhere(TorchDispatchMode):
        sizes: set = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for x in made if isinstance(made, tuple | list) else (made,):
                if isinstance(x, torch.Tensor) and x.device.type != "meta" and x.numel() > 1:
                    self.sizes.add(tuple(x.shape))
            return made

    parts, _ = random_parts()
    sd = speed_up(StableDiffusion(*parts, "cpu"), fast=True)
    sd.device = torch.device("meta")
    for network in sd.networks().values():
        network.to("meta")
    with Elsewhere() as elsewhere:
        *_, drawing = sd.steps("a cat", steps=3, seed=0, n=2, guided_times=(300, 900), two_passes=True)
        decoded = sd.vae.decode(drawing.latents)
    assert {x.device.type for x in (drawing.latents, drawing.x0, decoded)} == {"meta"}
    noise = {(2, 4, 4, 4), (4, 4, 4), (1, 4, 4, 4)}
    expected = noise | {(1, 77), (3,), (1000,)}
    assert elsewhere.sizes <= expected, elsewhere.sizes
    elsewhere.sizes.clear()
    with elsewhere:
        *_, drawing = sd.steps("a cat", steps=3, seed=0, image=Image.new("RGB", (32, 32)), strength=0.9)
    assert drawing.latents.device.type == "meta"
    given = {size for size in elsewhere.sizes if sorted(size[-3:]) == [3, 32, 32]}  # the picture on its way in
    assert elsewhere.sizes - given <= expected | {(2,)}, elsewhere.sizes

    def fault(part, inputs, output):
        torch.zeros(7, 7)

    sd.unet.conv_in.register_forward_hook(fault)
    with elsewhere:
        next(sd.steps("a cat", steps=3, seed=0))
    assert (7, 7) in elsewhere.sizes


FAULTS = """
import resource, torch
from sdlearn.speed import keep_memory
{switch}
x, found = torch.zeros(2**24), []  # 64 MiB
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        x = x + 1
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(found))  # a busy system may take pages away in between
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_what_is_kept_is_not_cleared_again():
    faults = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(switch=switch)]))
        for switch in ("", "keep_memory()")
    ]
    assert faults[1] < faults[0] / 2, faults


def test_elsewhere_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(speed.sys, "platform", "darwin")
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda name: pytest.fail("asked"))
    speed.keep_memory()
