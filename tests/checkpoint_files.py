"""Checkpoint files for tests: full size at no cost, since only their headers are written and the rest is a hole."""

import json
from pathlib import Path

from sdlearn.checkpoint.load import empty, named
from sdlearn.clip import CLIPTextConfig, CLIPTextEncoder
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

Shapes = dict[str, tuple[int, ...]]


def sd15_shapes(in_channels: int = 4) -> dict[str, Shapes]:
    """The tensors of Stable Diffusion 1.5 under LDM's names: those of the U-Net, of the VAE, of the text encoder."""
    models = {"unet": empty(UNet, UNetConfig(in_channels=in_channels)), "vae": empty(VAE, VAEConfig()),
              "text": empty(CLIPTextEncoder, CLIPTextConfig())}  # fmt: skip
    return {part: {n: tuple(x.shape) for n, x in named(model, ldm=True).items()} for part, model in models.items()}


BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}


CLUTTER = {name: (1000,) for name in (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")}  # fmt: skip
CLUTTER["scale_factor"] = ()


def ema_shapes(unet: Shapes) -> Shapes:
    """The averaged copy of a U-Net, whose names have lost their dots, and two counters."""
    names = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in unet}
    return {names[name]: shape for name, shape in unet.items()} | {"model_ema.decay": (), "model_ema.num_updates": ()}


def header(shapes: Shapes, dtype: str = "F32", metadata: dict[str, str] | None = None, **dtypes: str) -> bytes:
    """The beginning of a .safetensors file; dtypes: of tensors whose name ends so."""
    content: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        kind = dtypes.get(name.rpartition(".")[2], dtype)
        size = BYTES[kind]
        for side in shape:
            size *= side
        content[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


def write_sparse(path: Path, shapes: Shapes, dtype: str = "F32", metadata: dict[str, str] | None = None, **dtypes: str):
    """A .safetensors file with a hole in place of its numbers."""
    begin = header(shapes, dtype, metadata, **dtypes)
    places = [entry["data_offsets"][1] for name, entry in json.loads(begin[8:]).items() if name != "__metadata__"]
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + max(places, default=0))
    return path
