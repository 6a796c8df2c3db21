"""Words learned from pictures, at the full size of SD 1.5: diffusers reads our files and hears the same context."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from full_model import fill
from random_model import random_vectors
from transformers import CLIPTextModel, CLIPTokenizer

from sdlearn.checkpoint.configs import text_to_json
from sdlearn.checkpoint.files import json_writer, tensor_writer
from sdlearn.checkpoint.load import empty, named
from sdlearn.clip import CLIPTextConfig, CLIPTextEncoder
from sdlearn.disk import write_files
from sdlearn.inversion import Embedding, add_embedding, read_embedding, write_embedding
from sdlearn.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("count", [1, 6])
def test_at_full_size(tmp_path, count):
    """CLIP's own vocabulary and the sizes of SD 1.5, random weights; A1111's form."""
    text = fill(empty(CLIPTextEncoder, CLIPTextConfig()), torch.Generator().manual_seed(0), torch.float32)
    sd = SimpleNamespace(parts={"text_encoder": text, "tokenizer": Tokenizer.clip()})
    weights = {"config.json": json_writer(text_to_json(text.config)), "model.safetensors": tensor_writer(named(text))}
    write_files({tmp_path / name: write for name, write in weights.items()})
    sd.parts["tokenizer"].save(tmp_path / "tokenizer")
    write_embedding(tmp_path / "word.pt", Embedding("<toy>", 0.03 * random_vectors(count, 768)))
    add_embedding(sd, read_embedding(tmp_path / "word.pt", "<toy>"))
    encoder, tokenizer = CLIPTextModel.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    pipe = StableDiffusionPipeline(
        None, encoder, tokenizer, None, DDIMScheduler(steps_offset=1, clip_sample=False), None, None, None, False
    )
    pipe.load_textual_inversion(str(tmp_path), weight_name="word.pt", token="<toy>")
    prompts = ["a photo of a <toy>, on a beach", "<toy>", "a dog"]
    with torch.no_grad():
        ours = text(sd.parts["tokenizer"](prompts))
    theirs = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="knows 'unicorn' already"):
        add_embedding(sd, Embedding("unicorn", random_vectors(1, 768)))
