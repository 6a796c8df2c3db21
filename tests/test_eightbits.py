"""Weights in 8 bits: wrong by half a scale at most, a fourth of the bytes, and nobody else notices."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_parts
from torch import nn

from sdlearn.eightbits import EightBits, in_eight_bits, to_eight_bits
from sdlearn.lora import merge, unmerge, with_lora
from sdlearn.pipeline import StableDiffusion
from sdlearn.speed import speed_up
from sdlearn.unet import Pointwise


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-4, 1e3), st.integers(0, 99))
def test_a_weight_is_wrong_by_half_a_scale_at_most(out, width, size, seed):
    dice = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(out, width, 3, 3, generator=dice) * torch.rand(out, 1, 1, 1, generator=dice) ** 4
    numbers, scale = to_eight_bits(weight)
    assert numbers.dtype == torch.int8 and scale.shape == (out, 1, 1, 1)
    assert ((numbers * scale - weight).abs() <= 0.5001 * scale).all()
    assert (numbers.flatten(1).abs().amax(1) == 127).all()  # each channel uses the whole range


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_channel_of_zeros_stays_zero(dtype):
    numbers, scale = to_eight_bits(torch.zeros(2, 3, dtype=dtype))
    assert (numbers == 0).all() and scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_belong_to_the_scale_that_is_kept(dtype):
    """In 16 bits the scale is rounded, too; the numbers are then those of the rounded one."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers, scale = to_eight_bits(weight)
    assert scale.dtype == dtype and numbers.abs().max() <= 127
    off = (numbers.float() * scale.float() - weight.float()).abs() / scale.float()
    assert (off[numbers.abs() < 127] <= 0.5001).all()


def test_a_model_in_8_bits_is_not_saved(tmp_path):
    sd = speed_up(StableDiffusion(*random_parts()[0], "cpu"), int8=True)
    for name in ("folder", "file.safetensors"):
        with pytest.raises(ValueError, match="weights in 8 bits are for drawing alone, no file holds them"):
            sd.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer, x", [
    (nn.Linear(6, 5), (2, 7, 6)),
    (nn.Linear(6, 5, bias=False), (2, 6)),
    (Pointwise(6, 5), (2, 6, 4, 4)),
    (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 8, 8)),
    (nn.Conv2d(3, 5, 3, stride=2), (2, 3, 9, 9)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_with_its_rounded_weights(layer, x, dtype):
    layer, x = copy.deepcopy(layer).to(dtype), torch.randn(x).to(dtype)
    small, rounded = EightBits(layer), copy.deepcopy(layer)
    rounded.weight.data = (small.numbers * small.scale).reshape(layer.weight.shape)
    loose = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        torch.testing.assert_close(small(x), rounded(x), atol=loose, rtol=loose)
        assert small(x).dtype == dtype
        assert 0 < (small(x) - layer(x)).float().norm() < 0.05 * layer(x).float().norm()


def test_a_network_takes_a_quarter_of_the_bytes_on_any_device_and_in_any_dtype():
    parts, _ = random_parts()
    unet, sizes = parts.networks["unet"], []
    for network in (unet, in_eight_bits(copy.deepcopy(unet))):
        kept = [*network.parameters(), *network.buffers()]
        sizes.append(sum(x.nbytes for x in kept))
        assert not {type(part) for part in network.modules()} & ({nn.Linear, nn.Conv2d} if len(sizes) == 2 else set())
    assert sizes[1] < 0.3 * sizes[0]
    moved = network.to(torch.bfloat16).to("meta")
    numbers = [x for name, x in moved.named_buffers() if name.endswith("numbers")]
    assert {x.dtype for x in numbers} == {torch.int8} and {x.device.type for x in numbers} == {"meta"}
    assert moved.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_draws_nearly_the_same(dtype):
    how = {"steps": 4, "sampler": "ddim", "seed": 0}
    sd = StableDiffusion(*random_parts()[0], "cpu", dtype)
    *_, plain = sd.steps("a cat", **how)
    *_, small = speed_up(sd, int8=True, fast=True).steps("a cat", **how)
    assert 0 < (small.latents - plain.latents).abs().mean() < 0.1 * plain.latents.abs().mean()
    assert {type(x) for x in sd.networks().values() for x in x.modules()} >= {EightBits}
    small.images()


def test_a_lora_is_merged_before_and_refused_after():
    networks = {"unet": random_parts()[0].networks["unet"]}
    lora = with_lora(networks, rank=2)
    for _, pair in lora.items():
        nn.init.normal_(pair.up)
    lora.detach()
    merge(networks, (lora, 1.0))
    name, layer = next((n, m) for n, m in networks["unet"].named_modules() if n.endswith("attn2.to_q"))
    merged = layer.weight.clone()
    in_eight_bits(networks["unet"])
    kept = networks["unet"].get_submodule(name).weight
    assert F.mse_loss(kept, merged) < 1e-4 < F.mse_loss(layer.original, merged)
    for change in (partial(merge, networks, (lora, 1.0)), partial(unmerge, networks), partial(with_lora, networks)):
        with pytest.raises(ValueError, match="weights in 8 bits cannot be changed any more: load the model again"):
            change()
