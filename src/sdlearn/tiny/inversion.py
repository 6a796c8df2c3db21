"""a few pictures -> a word, or a U-Net, that knows them: textual inversion, DreamBooth."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdlearn.inversion import Embedding, NewRows
from sdlearn.pictures import to_tensor
from sdlearn.tiny.tasks import DenoiseTask, normal
from sdlearn.tokenizer import Tokenizer

Pictures = Sequence[tuple[Image.Image, str]]  # each with its caption


@torch.no_grad()
def latents_of(sd: Any, pictures: Pictures) -> Tensor:
    """(N, 4, h, w), in the size that the model was trained in."""
    height, width = sd.size
    images = (to_tensor(image, width, height) for image, _ in pictures)
    vae = sd.use("vae")
    return torch.cat([vae.encode(x.to(sd.device, sd.dtype)).mean for x in images])


class PicturesTask(DenoiseTask):
    """DenoiseTask on pictures that somebody gives, each with its caption."""

    def __init__(self, sd: Any, pictures: Pictures, **more: Any):
        latents = latents_of(sd, pictures).float().cpu()
        parts = sd.unet, sd.text_encoder, sd.tokenizer, latents, sd.schedule
        super().__init__(*parts, vae=sd.vae, prediction=sd.prediction, **more)
        self.captions = [caption for _, caption in pictures]

    def examples(self, rngs: Sequence[random.Random]) -> dict[str, Tensor]:
        numbers = [rng.randrange(len(self.latents)) for rng in rngs]
        told = [
            "" if rng.random() < self.drop else self.captions[n]
            for n, rng in zip(numbers, rngs, strict=True)
        ]
        channels, *size = self.latents.shape[1:]
        return {
            "latents": self.latents[numbers],
            "tokens": self.tokenizer(told),
            "t": self.times(rngs),
            "noise": normal(rngs, channels, *size)
            + self.offset * normal(rngs, channels, 1, 1),
        }


class InversionTask(PicturesTask):
    """Find the vectors of a new word, and change nothing else.

    Gal et al. 2023, section 3. like: a word from whose vectors the new ones begin.
    """

    def __init__(
        self, sd: Any, pictures: Pictures, token: str, count: int, like: str, **more: Any
    ):
        super().__init__(sd, pictures, **{"drop": 0.0} | more)
        self.requires_grad_(False)
        known = self.tokenizer.encode(like)
        self.tokenizer, self.token = self.tokenizer.with_word(token, count), token
        table = self.text_encoder.token_embedding.weight
        begin = table[[known[i % len(known)] for i in range(count)]]
        self.text_encoder.token_embedding = NewRows(table, begin)

    @property
    def learned(self) -> Embedding:
        rows = self.text_encoder.token_embedding.rows
        return Embedding(self.token, rows.detach().clone())
