"""A Stable Diffusion of random weights, small enough for tests, in diffusers' folder layout."""

from pathlib import Path

import torch

from sdlearn.checkpoint.load import Parts, save, save_clip
from sdlearn.clip import CLIP, CLIPImageConfig, CLIPTextConfig
from sdlearn.schedule import Schedule
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

CAPTIONS = ["a red apple on a blue background", "a fox to the left of a green umbrella", "a cat above a yellow star"]
SMALL_UNET = UNetConfig((32, 64), (True, False), heads=(2, 4), blocks=1, context_width=32, groups=8)
SMALL_VAE = VAEConfig((8, 16, 16, 16), blocks=1, groups=4, scale=0.5)
TINY_UNET = UNetConfig((96, 192, 256), (True, True, True), heads=(3, 6, 8), blocks=1, context_width=192)
TINY_VAE = VAEConfig((32, 64, 128, 192), blocks=1, groups=8)


def random_parts(unet: UNetConfig = SMALL_UNET, vae: VAEConfig = SMALL_VAE, layers: int = 2, heads: int = 2,
                 size: int = 32) -> tuple[Parts, CLIP]:  # fmt: skip
    """The parts of a pipeline and a CLIP that shares its text encoder; its pictures have contrast."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(CAPTIONS * 2)
    text = CLIPTextConfig(vocab=len(tokenizer), width=unet.context_width, layers=layers, heads=heads)
    clip = CLIP(text, CLIPImageConfig(size=32, patch=8, width=16, layers=2, heads=2), projection=8).eval()
    networks = {"tokenizer": tokenizer, "text_encoder": clip.text_encoder, "vae": VAE(vae).eval(),
                "unet": UNet(unet).eval()}  # fmt: skip
    with torch.no_grad():
        networks["vae"].decoder.conv_out.weight *= 8
        for parameter in clip.text_encoder.token_embedding.parameters():
            parameter *= 50
    return Parts(networks, Schedule(), size=(size, size)), clip


def save_random_model(folder: Path, dtype: torch.dtype = torch.float32, **sizes) -> Parts:
    parts, clip = random_parts(**sizes)
    save(folder, parts, dtype)
    save_clip(folder, clip, dtype=dtype)
    return parts


def random_vectors(count: int, width: int = SMALL_UNET.context_width) -> torch.Tensor:
    """What a word of `count` tokens may have learned."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))
