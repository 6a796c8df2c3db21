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

    Gal et al. 2023, section 3. second: those for SDXL's second text encoder.
    """

    token: str
    vectors: Tensor
    second: Tensor | None = None


def with_rows(sd: Any, part: str, token: str, rows: Tensor) -> tuple[Any, nn.Module]:
    """A text encoder's tokenizer with the word, and its table with the rows below."""
    tokenizer = sd.parts[part.replace("text_encoder", "tokenizer")]
    (count, width), known = rows.shape, sd.parts[part].config.width
    if width != known:
        family = f" ({WIDTHS[width]})" if width in WIDTHS else ""
        raise ValueError(
            f"the vectors of {shown(token)} have {width} numbers{family}, but this "
            f"model's words have {known}: take a word that was learned with it"
        )
    longer = tokenizer.with_word(token, count)
    table = sd.parts[part].token_embedding.weight[: len(tokenizer)]
    new = rows.to(table)
    check_numbers(rows, new, f"the word {shown(token)}")
    both = torch.cat([table, new])
    return longer, nn.Embedding.from_pretrained(both, freeze=False)


@torch.no_grad()
def add_embedding(sd: Any, embedding: Embedding) -> None:
    """Teach a `StableDiffusion` the word: tokens behind its vocabulary, rows below its
    table. All that it knew stays as it was, to the bit."""
    token, vectors, second = embedding
    families, two = ("SD 1 or SD 2", "SDXL"), second is not None
    if two != ("text_encoder_2" in sd.parts):
        raise ValueError(
            f"{shown(token)} is a word for {families[two]}, but this model is "
            f"{families[not two]}: leave the word out, or take another model"
        )
    rows: dict[str, Any] = {"text_encoder": vectors, "text_encoder_2": second}
    here = [part for part in rows if part in sd.parts]
    made = {part: with_rows(sd, part, token, rows[part]) for part in here}
    for part, (tokenizer, table) in made.items():
        text = sd.parts[part]
        text.token_embedding = table
        text.config = replace(text.config, vocab=len(tokenizer))
        sd.parts[part.replace("text_encoder", "tokenizer")] = tokenizer


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
    names, own = find_word(tensors)
    read = [tensors[name].detach().clone() for name in names]
    read = [x.reshape(-1, x.shape[-1]) for x in read]
    for name, x in zip(names, read, strict=True):
        check_numbers(x, x, f"{path}: {shown(name)}")
    return Embedding(token or own, *read)


def split_word(text: str) -> tuple[str, str]:
    """FILE or FILE:WORD -> both; a file may have colons of its own."""
    path, _, word = text.rpartition(":")
    alone = not path or Path(text).exists() or re.search(r"[\\/]", word)
    return (text, "") if alone else (path, word)


def write_embedding(path: str | Path, embedding: Embedding) -> None:
    """For diffusers, or for A1111 if the path ends in .pt; A1111 reads both.

    A word for SDXL is named after its file.
    """
    path, (token, *both) = Path(path), embedding
    kept, *more = (x.detach().float().cpu().contiguous() for x in both if x is not None)
    tensors = {"clip_l": kept, "clip_g": more[0]} if more else {token: kept}
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
    plain = more or path.suffix != ".pt"
    pickled = partial(torch.save, tensors if plain else a1111)
    safe = path.suffix == ".safetensors"
    write_files({path: tensor_writer(tensors) if safe else pickled})


class WordFile(NamedTuple):
    """Says in a picture's file where a word of its prompt came from; an extra of a
    `Request`. word: what it is called there, if not as in the file."""

    path: str
    word: str = ""

    def __call__(self, sd: Any, setup: Any) -> Any:
        return setup  # what the word does, `add_embedding` has done

    def said(self) -> dict[str, object]:
        return {"Embedding": f"{self.path}:{self.word}" if self.word else self.path}
