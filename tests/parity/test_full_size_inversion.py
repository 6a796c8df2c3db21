"""Words learned from pictures: diffusers reads our files and hears the same context, small and at full size."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from full_model import fill
from random_model import save_random_model
from transformers import CLIPTextModel, CLIPTokenizer

from sdlearn.checkpoint.configs import text_to_json
from sdlearn.checkpoint.files import json_writer, tensor_writer
from sdlearn.checkpoint.load import empty, named
from sdlearn.clip import CLIPTextConfig, CLIPTextEncoder
from sdlearn.disk import write_files
from sdlearn.inversion import Embedding, add_embedding, read_embedding, write_embedding
from sdlearn.pipeline import StableDiffusion
from sdlearn.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
PROMPTS = ["a <toy> above a cat", "a cat", "<TOY>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_random_model(path)
    return path


@pytest.fixture
def sd(folder):
    return StableDiffusion.load(folder, "cpu")


def vectors(count: int, width: int = 32) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def theirs(pipe, prompts):
    return torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt"])
@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_hears_the_same(tmp_path, folder, sd, name, count):
    write_embedding(tmp_path / name, Embedding("<toy>", vectors(count)))
    add_embedding(sd, read_embedding(tmp_path / name, "<toy>"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, unet=None, vae=None)
    pipe.load_textual_inversion(str(tmp_path), weight_name=name)
    prompts = PROMPTS[: 3 if count == 1 else 2]  # it knows a word of several tokens in small letters, and once
    torch.testing.assert_close(sd.encode(prompts)["context"], theirs(pipe, prompts), atol=1e-5, rtol=0)


def test_diffusers_hears_the_same_in_a_saved_folder(tmp_path, sd):
    add_embedding(sd, Embedding("<toy>", vectors(3)))
    add_embedding(sd, Embedding("<fox-2>", vectors(1)))
    sd.save(tmp_path, torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, unet=None, vae=None)
    prompts = ["a <toy> above a <fox-2>", "<fox-2>"]
    torch.testing.assert_close(sd.encode(prompts)["context"], theirs(pipe, prompts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 6])
def test_at_full_size(tmp_path, count):
    """CLIP's own vocabulary and the sizes of SD 1.5, random weights; A1111's form."""
    text = fill(empty(CLIPTextEncoder, CLIPTextConfig()), torch.Generator().manual_seed(0), torch.float32)
    sd = SimpleNamespace(tokenizer=Tokenizer.clip(), text_encoder=text)
    weights = {"config.json": json_writer(text_to_json(text.config)), "model.safetensors": tensor_writer(named(text))}
    write_files({tmp_path / name: write for name, write in weights.items()})
    sd.tokenizer.save(tmp_path / "tokenizer")
    write_embedding(tmp_path / "word.pt", Embedding("<toy>", 0.03 * vectors(count, 768)))
    add_embedding(sd, read_embedding(tmp_path / "word.pt", "<toy>"))
    encoder, tokenizer = CLIPTextModel.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    pipe = StableDiffusionPipeline(
        None, encoder, tokenizer, None, DDIMScheduler(steps_offset=1, clip_sample=False), None, None, None, False
    )
    pipe.load_textual_inversion(str(tmp_path), weight_name="word.pt", token="<toy>")
    prompts = ["a photo of a <toy>, on a beach", "<toy>", "a dog"]
    with torch.no_grad():
        ours = text(sd.tokenizer(prompts))
    torch.testing.assert_close(ours, theirs(pipe, prompts), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="knows 'unicorn' already"):
        add_embedding(sd, Embedding("unicorn", vectors(1, 768)))
