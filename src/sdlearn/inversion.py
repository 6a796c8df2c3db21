"""A few pictures -> a word that means them: textual inversion.
Exported from book/15_lora.ipynb by `make export`; edit it there.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.checkpoint.adapters import WIDTHS, find_word
from sdlearn.checkpoint.files import read_tensors, tensor_writer
from sdlearn.checkpoint.load import check_numbers, refuse_foreign
from sdlearn.disk import write_files
from sdlearn.request import shown


class NewRows(nn.Module):
    """A table whose rows stay, and new ones below it that learn: (B,S) -> (B,S,D)."""

    table: Tensor

    def __init__(self, table: Tensor, rows: Tensor):
        super().__init__()
        self.register_buffer("table", table.detach(), persistent=False)
        self.rows = nn.Parameter(rows.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        new = tokens - len(self.table)
        old = F.embedding(tokens.clamp(max=len(self.table) - 1), self.table)
        learned = F.embedding(new.clamp(min=0), self.rows)
        return torch.where((new < 0)[..., None], old, learned)


class Embedding(NamedTuple):
    """A word that was learned from pictures: one vector (n, D) for each of its tokens.

    Gal et al. 2023, section 3.
    """

    token: str
    vectors: Tensor


@torch.no_grad()
def add_embedding(sd: Any, embedding: Embedding) -> None:
    """Teach a `StableDiffusion` the word: tokens behind its vocabulary, rows below its
    table. All that it knew stays as it was, to the bit."""
    token, vectors = embedding
    if "text_encoder_2" in sd.parts:
        raise ValueError(
            f"{shown(token)} is a word for SD 1 or SD 2, but this model is an SDXL: "
            "leave the word out, or take another model"
        )
    text = sd.text_encoder
    (count, width), known = vectors.shape, text.config.width
    if width != known:
        family = f" ({WIDTHS[width]})" if width in WIDTHS else ""
        raise ValueError(
            f"the vectors of {shown(token)} have {width} numbers{family}, but this "
            f"model's words have {known}: take a word that was learned with it"
        )
    tokenizer = sd.tokenizer.with_word(token, count)
    table = text.token_embedding.weight[: len(sd.tokenizer)]
    rows = vectors.to(table)
    check_numbers(vectors, rows, f"the word {shown(token)}")
    table = torch.cat([table, rows])
    text.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
    text.config = replace(text.config, vocab=len(tokenizer))
    sd.tokenizer = tokenizer


FORMS = (".safetensors", ".bin", ".pt")


def read_embedding(path: str | Path, token: str = "") -> Embedding:
    """The word in a file of diffusers or A1111, .safetensors, .bin or .pt.

    token: what to call it; without a wish what the file says, or else its own name.
    Raises ValueError, one sentence, for other files.
    """
    path = Path(path)
    for name in ("learned_embeds.safetensors", "learned_embeds.bin"):  # diffusers'
        path = path / name if (path / name).is_file() else path
    tensors = read_tensors(path)
    refuse_foreign(tensors)
    key, own = find_word(tensors)
    vectors = tensors[key].detach().clone()
    vectors = vectors.reshape(-1, vectors.shape[-1])
    check_numbers(vectors, vectors, f"{path}: {shown(key)}")
    return Embedding(token or own, vectors)


def split_word(text: str) -> tuple[str, str]:
    """FILE or FILE:WORD -> both; a file may have colons of its own."""
    path, _, word = text.rpartition(":")
    alone = not path or Path(text).exists() or re.search(r"[\\/]", word)
    return (text, "") if alone else (path, word)


def write_embedding(path: str | Path, embedding: Embedding) -> None:
    """For diffusers, or for A1111 if the path ends in .pt; which reads both."""
    path, (token, vectors) = Path(path), embedding
    kept = vectors.detach().float().cpu().contiguous()
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": kept},
        "name": token,
        "step": 0,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    if path.suffix not in FORMS:
        raise ValueError(
            f"{path} does not say its format; give a name that ends in "
            f"{', '.join(FORMS)}"
        )
    pickled = partial(torch.save, a1111 if path.suffix == ".pt" else {token: kept})
    safe = path.suffix == ".safetensors"
    write_files({path: tensor_writer({token: kept}) if safe else pickled})


class WordFile(NamedTuple):
    """Says in a picture's file where a word of its prompt came from; an extra of a
    `Request`. word: what it is called there, if not as in the file."""

    path: str
    word: str = ""

    def __call__(self, sd: Any, setup: Any) -> Any:
        return setup  # what the word does, `add_embedding` has done

    def said(self) -> dict[str, object]:
        return {"Embedding": f"{self.path}:{self.word}" if self.word else self.path}
