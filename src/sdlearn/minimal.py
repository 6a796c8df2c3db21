"""The whole of Stable Diffusion in thirty lines. Chapter 12.
Exported from book/12_pipeline.ipynb by `make export`; edit it there.
"""

from itertools import pairwise

import torch
from PIL import Image

from sdlearn.checkpoint.load import Parts


@torch.inference_mode()
def draw_by_hand(
    model: Parts, prompt: str, seed: int = 0, steps: int = 20, scale: float = 7.5
) -> Image.Image:
    """One picture, by DDIM, of the size that the model was trained on."""
    part = model.networks
    context = part["text_encoder"](part["tokenizer"](["", prompt]))  # (2, 77, D)
    height, width = (side // 8 for side in model.size)
    dice = torch.Generator().manual_seed(seed)
    xt = torch.randn(1, 4, height, width, generator=dice)
    xt += model.schedule.noise_offset * torch.randn(1, 4, 1, 1, generator=dice)
    levels = model.schedule.levels(steps, clean=False)  # 20: t = 951, 901 ... 1, 0
    for now, then in pairwise(levels):
        both = torch.cat([xt, xt])  # the same noise for both
        uncond, cond = part["unet"](both, now.t, context).chunk(2)  # (1, 4, h, w) each
        output = uncond + scale * (cond - uncond)
        x0, eps = model.prediction.split(xt, output, now)
        xt = then.alpha * x0 + then.sigma * eps
    picture = part["vae"].decode(xt)[0]  # (3, H, W), about -1 to 1
    pixels = (picture * 127.5 + 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
