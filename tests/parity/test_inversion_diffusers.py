"""Words learned from pictures, on a small random model: diffusers and transformers read our files and hear the same."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from family import save_family
from random_model import random_vectors
from safetensors.torch import load_file
from transformers import CLIPTextModel

from sdlearn.inversion import Embedding, add_embedding, read_embedding, write_embedding
from sdlearn.pipeline import StableDiffusion

pytestmark = pytest.mark.slow
PROMPTS = ["a <toy> above a cat", "a cat", "<TOY>"]


@pytest.fixture
def sd(small_folder):
    return StableDiffusion.load(small_folder, "cpu")


def theirs(pipe, prompts):
    return torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt"])
@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_hears_the_same(tmp_path, small_folder, sd, name, count):
    write_embedding(tmp_path / name, Embedding("<toy>", random_vectors(count)))
    add_embedding(sd, read_embedding(tmp_path / name, "<toy>"))
    pipe = StableDiffusionPipeline.from_pretrained(small_folder, unet=None, vae=None)
    pipe.load_textual_inversion(str(tmp_path), weight_name=name)
    prompts = PROMPTS[: 3 if count == 1 else 2]  # it knows a word of several tokens in small letters, and once
    torch.testing.assert_close(sd.encode(prompts)["context"], theirs(pipe, prompts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_diffusers_hears_the_same_word_with_both_text_encoders_of_sdxl(tmp_path, count):
    save_family(tmp_path / "sdxl", "SDXL", deep=False)
    ours = StableDiffusion.load(tmp_path / "sdxl", "cpu", torch.float32)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "sdxl", unet=None, vae=None, add_watermarker=False)
    write_embedding(
        tmp_path / "toy.safetensors", Embedding("<toy>", random_vectors(count, 24), random_vectors(count, 40))
    )
    add_embedding(ours, read_embedding(tmp_path / "toy.safetensors", "<toy>"))
    state = load_file(tmp_path / "toy.safetensors")
    for name, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {"text_encoder": getattr(pipe, f"text_encoder{end}"), "tokenizer": getattr(pipe, f"tokenizer{end}")}
        pipe.load_textual_inversion(state[name], token="<toy>", **parts)
    for prompt in PROMPTS[: 3 if count == 1 else 2]:
        context, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        mine = ours.encode([prompt])
        torch.testing.assert_close(mine["context"], context, atol=1e-5, rtol=0)
        torch.testing.assert_close(mine["pooled"], pooled, atol=1e-5, rtol=0)


def test_diffusers_hears_the_same_in_a_saved_folder(tmp_path, sd):
    add_embedding(sd, Embedding("<toy>", random_vectors(3)))
    add_embedding(sd, Embedding("<fox-2>", random_vectors(1)))
    sd.save(tmp_path, torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, unet=None, vae=None)
    prompts = ["a <toy> above a <fox-2>", "<fox-2>"]
    torch.testing.assert_close(sd.encode(prompts)["context"], theirs(pipe, prompts), atol=1e-5, rtol=0)


def test_transformers_pools_where_we_do(tmp_path, sd):
    """Behind the end token lie learned words, with larger ids: neither takes one of them for the end."""
    add_embedding(sd, Embedding("<toy>", random_vectors(3)))
    sd.save(tmp_path, torch.float32)
    told = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert [told[f"{x}_token_id"] for x in ("bos", "eos", "pad")] == [
        getattr(sd.tokenizer, x) for x in ("bos", "eos", "pad")
    ]
    assert told["vocab_size"] == told["eos_token_id"] + 4
    encoder, tokens = CLIPTextModel.from_pretrained(tmp_path / "text_encoder"), sd.tokenizer(["a <toy>", "a cat", ""])
    with torch.no_grad():
        ours, theirs = sd.text_encoder.pool(tokens, sd.text_encoder(tokens)), encoder(tokens).pooler_output
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    again = StableDiffusion.load(tmp_path, "cpu").text_encoder
    assert again.config == sd.text_encoder.config and again.config.end == sd.tokenizer.eos
