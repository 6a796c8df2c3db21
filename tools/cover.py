"""The cover: twelve pictures by the shipped model, each over the sentence that it was drawn from.

python tools/cover.py          writes book/_static/cover.png
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sdlearn.pipeline import StableDiffusion

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "a red apple on a blue background",
    "a fox on a green background",
    "a purple guitar on a yellow background",
    "a blue butterfly on a pink background",
    "a tiger on a white background",
    "a yellow crown on a purple background",
    "a green house to the left of a tree on a blue background",
    "a cat above a yellow star on a pink background",
    "a rocket to the right of a sun on an orange background",
    "an owl and a red mushroom on a gray background",
    "a blue apple on a white background",
    "a penguin to the left of a snowman on a purple background",
)
SEED = 1


def main() -> None:
    sd = StableDiffusion.load(ROOT / "checkpoints" / "tiny", device="cpu")
    pictures = sd.txt2img(list(PROMPTS), seed=SEED, steps=50, sampler="ddim")
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.9), layout="constrained", facecolor="white")
    for axis, picture, prompt in zip(axes.flat, pictures, PROMPTS, strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
        axis.set_title(textwrap.fill(prompt, 28), y=-0.3, fontsize=8.5, va="center")
    figure.savefig(ROOT / "book" / "_static" / "cover.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
