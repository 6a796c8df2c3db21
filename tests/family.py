"""Relatives of SD 1 with random weights, small: SD 2, SDXL and its refiner, as folders and as their makers' files."""

from dataclasses import replace
from pathlib import Path

import torch
from full_model import fill
from random_model import CAPTIONS
from safetensors.torch import save_file
from torch import Tensor

from sdlearn.checkpoint.dialects import OPEN_CLIP_RULES, TEXTS, rename
from sdlearn.checkpoint.load import Parts, Sizes, empty, named, save
from sdlearn.clip import CLIPTextConfig, CLIPTextEncoder
from sdlearn.prediction import EPSILON, Prediction
from sdlearn.schedule import Schedule
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

H = CLIPTextConfig(width=32, layers=23, heads=4, exact_gelu=True)
L = CLIPTextConfig(width=24, layers=12, heads=3)
G = CLIPTextConfig(width=40, layers=32, heads=5, exact_gelu=True, projection=40)
SMALL = VAEConfig((8, 16, 16, 16), blocks=1, groups=4)
XL_SMALL = VAEConfig((8, 16, 16, 16), blocks=1, groups=4, scale=0.13025, upcast=True)
SIZES = {  # as deep as the models of these names, and much narrower
    "SD 2": Sizes(H, SMALL, UNetConfig((16, 32, 64, 64), heads=(1, 2, 4, 4), context_width=32, groups=8, linear=True)),
    "SDXL": Sizes(L, XL_SMALL, UNetConfig((16, 32, 64), (False, True, True), (1, 2, 4), context_width=64, groups=8,
                  depth=(1, 2, 10), linear=True, added=40 + 6 * 256, zeros=True), G),
    "SDXL refiner": Sizes(None, XL_SMALL, UNetConfig((16, 32, 64, 64), (False, True, True, False), (1, 2, 4, 4),
                          context_width=40, groups=8, depth=(4, 4, 4, 4), linear=True, added=40 + 5 * 256), G),
}  # fmt: skip
MAKE = {"vae": VAE, "unet": UNet, "text_encoder": CLIPTextEncoder, "text_encoder_2": CLIPTextEncoder}


def shallow(sizes: Sizes) -> Sizes:
    """Two layers where there are dozens; but SD 2's text encoder is known by the last of its 24."""
    texts = {
        part: x if x in (None, H) else replace(x, layers=2) for part, x in sizes._asdict().items() if "text" in part
    }
    unet = replace(sizes.unet, blocks=1, depth=tuple(min(depth, 2) for depth in sizes.unet.depth))
    return sizes._replace(unet=unet, **texts)


def family(kind: str, prediction: Prediction = EPSILON, schedule: Schedule | None = None, clip: bool = False,
           deep: bool = True) -> Parts:  # fmt: skip
    """The parts. clip: with CLIP's own vocabulary, as a single file has it; else with a small one."""
    dice, sizes = torch.Generator().manual_seed(1), SIZES[kind] if deep else shallow(SIZES[kind])
    networks: dict = {}
    for part, root in TEXTS[kind].items():
        pad = "<|endoftext|>" if root.endswith("transformer.") else "!"
        trained = Tokenizer.clip(pad=pad) if clip else Tokenizer(Tokenizer.train(CAPTIONS * 2).merges, pad=pad)
        networks[part.replace("text_encoder", "tokenizer")] = trained
    for part, make in MAKE.items():
        config = getattr(sizes, part)
        if config is not None:
            if not clip and part.startswith("text"):
                words = len(networks[part.replace("text_encoder", "tokenizer")])
                config = replace(config, vocab=words, end=words - 1)
            networks[part] = fill(empty(make, config), dice, torch.float32)
    with torch.no_grad():
        networks["vae"].decoder.conv_out.weight *= 8
    return Parts(networks, schedule or Schedule(), prediction, (64, 64))


def open_clip(encoder: CLIPTextEncoder) -> dict[str, Tensor]:
    """A text encoder's tensors as OpenCLIP names and fuses them; SD 2 does not read the last of its layers."""
    found = {rename(name, OPEN_CLIP_RULES): x for name, x in encoder.state_dict().items()}
    for i in range(encoder.config.layers):
        place = f"transformer.resblocks.{i}.attn."
        for kind in ("weight", "bias"):
            found[f"{place}in_proj_{kind}"] = torch.cat([found.pop(f"{place}{x}_proj.{kind}") for x in "qkv"])
    if "text_projection.weight" in found:
        found["text_projection"] = found.pop("text_projection.weight").T
    else:
        found["text_projection"] = torch.zeros(encoder.config.width, 8)
        last = encoder.config.layers - 1
        more = {name.replace(f".{last}.", f".{last + 1}."): x for name, x in found.items() if f".{last}." in name}
        found |= more
    return found | {"logit_scale": torch.zeros(())}


def save_single(path: Path, parts: Parts, kind: str, metadata: dict[str, str] | None = None, **more: Tensor) -> Path:
    """One file with the names that the makers of this kind of model gave them."""
    tensors = dict(more)
    for part in ("unet", "vae"):
        tensors |= named(parts.networks[part], ldm=True)
    for part, root in TEXTS[kind].items():
        encoder = parts.networks[part]
        old = root.endswith("transformer.")
        texts = named(encoder) if old else open_clip(encoder)
        tensors |= {root + name: x for name, x in texts.items()}
    save_file({name: x.contiguous().clone() for name, x in tensors.items()}, path, metadata)
    return path


def save_family(folder: Path, kind: str, **how) -> Parts:
    parts = family(kind, **how)
    save(folder, parts, torch.float32)
    return parts
