"""A LoRA of each dialect, on a small random model: what diffusers makes of the file, and what we make of it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_files import ALL, DIALECTS, metadata, random_lora
from safetensors.torch import save_file

from sdlearn.lora import load_lora, merge, save_lora
from sdlearn.pipeline import StableDiffusion

pytestmark = pytest.mark.slow


@torch.no_grad()
def answers(text_encoder, unet, tokens):
    g = torch.Generator().manual_seed(1)
    latents, t = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([800, 100])
    context = text_encoder(tokens)
    context = context if isinstance(context, torch.Tensor) else context.last_hidden_state
    eps = unet(latents, t, context)
    return context, eps if isinstance(eps, torch.Tensor) else eps.sample


def compare(small_folder, file, scale=0.7):
    """Largest differences of context and eps, and how much the LoRA changes them."""
    ours = StableDiffusion.load(small_folder, "cpu", torch.float32)
    tokens = ours.tokenizer(["a fox", "a red apple"])
    before = answers(ours.text_encoder, ours.unet, tokens)
    merge(ours.networks(), (load_lora(file, ours.networks()), scale))
    mine = answers(ours.text_encoder, ours.unet, tokens)
    theirs = StableDiffusionPipeline.from_pretrained(small_folder, safety_checker=None, dtype=torch.float32)
    theirs.load_lora_weights(file.parent, weight_name=file.name, adapter_name="x")
    theirs.set_adapters(["x"], [scale])
    other = answers(theirs.text_encoder, theirs.unet, tokens)
    far = [(a - b).abs().max().item() for a, b in zip(mine, other, strict=True)]
    moved = [(a - b).abs().max().item() for a, b in zip(mine, before, strict=True)]
    return far, moved


@pytest.mark.parametrize("name", DIALECTS)
def test_diffusers_reads_the_same_from_a_file(name, small_folder, tmp_path):
    targets, says_alpha, write = DIALECTS[name]
    networks = StableDiffusion.load(small_folder, "cpu", torch.float32).networks()
    lora = random_lora(networks, 3, 2.0 if says_alpha else None, targets)
    header = metadata(lora) if "header" in name else {"format": "pt"}
    save_file({k: v.contiguous() for k, v in write(lora).items()}, tmp_path / "x.safetensors", header)
    (context, eps), moved = compare(small_folder, tmp_path / "x.safetensors")
    assert context <= 1e-4 and eps <= 1e-4
    assert moved[1] > 0.01 and (moved[0] > 0.01 or "self_attn" not in targets)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_reads_what_we_write(form, small_folder, tmp_path):
    networks = StableDiffusion.load(small_folder, "cpu", torch.float32).networks()
    save_lora(tmp_path / "x.safetensors", random_lora(networks, 3, 2.0, ALL), form)
    (context, eps), moved = compare(small_folder, tmp_path / "x.safetensors")
    assert context <= 1e-4 and eps <= 1e-4 and min(moved) > 0.01
