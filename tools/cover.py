"""The pictures of the first page, drawn by the shipped model.

python tools/cover.py                    writes all of them
python tools/cover.py cover film         writes book/_static/cover.png and film.jpg
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sdlearn.pipeline import StableDiffusion
from sdlearn.tiny.evaluate import judged
from sdlearn.tiny.judge import load_judge
from sdlearn.tiny.scenes import parse
from sdlearn.tiny.tasks import to_tensor

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "book" / "_static"
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
JPEG = {"dpi": 120, "pil_kwargs": {"quality": 88}}


def cover(sd: StableDiffusion) -> None:
    """Twelve pictures, each over its sentence, of the first seed with which the judge finds nothing wrong."""
    judge, scenes = load_judge(ROOT / "checkpoints" / "tiny"), list(map(parse, PROMPTS))
    for seed in range(30):
        pictures = sd.txt2img(list(PROMPTS), seed=seed, cfg_scale=4)
        verdicts = judged(judge, scenes, [to_tensor(np.array(picture)) for picture in pictures])
        if all(verdict["all"] for verdict in verdicts):
            break
    else:
        sys.exit("with none of 30 seeds are all twelve right: take other sentences")
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.9), layout="constrained", facecolor="white")
    for axis, picture, prompt in zip(axes.flat, pictures, PROMPTS, strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
        axis.set_title(textwrap.fill(prompt, 28), y=-0.3, fontsize=8.5, va="center")
    figure.savefig(STATIC / "cover.png", dpi=110, metadata={"Software": None})


def film(sd: StableDiffusion) -> None:
    """One drawing at eight of its fifty steps: what the U-Net is given, and what it guesses."""
    drawings = list(sd.steps(PROMPTS[0], seed=SEED, steps=50, sampler="ddim"))
    chosen = [drawings[i] for i in (0, 6, 12, 18, 25, 33, 41, 49)]
    figure, axes = plt.subplots(2, 8, figsize=(9.6, 2.75), layout="constrained", facecolor="white")
    for column, drawing in zip(axes.T, chosen, strict=True):
        for axis, picture in zip(column, (drawing.images()[0], drawing.preview()[0]), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
        column[0].set_title(f"step {drawing.index + 1}", fontsize=9)
    figure.savefig(STATIC / "film.jpg", **JPEG)


def repaint(sd: StableDiffusion) -> None:
    """Image-to-image: a picture, and what another sentence makes of it at five strengths."""
    how = {"steps": 25, "sampler": "ddim", "cfg_scale": 4}
    start = sd.txt2img("a green house on a blue background", seed=SEED, **how)[0]
    wish, strengths = "a red mushroom on a yellow background", (0.2, 0.4, 0.6, 0.8, 1.0)
    pictures = [sd.img2img(wish, start, strength=s, seed=SEED + 1, **how)[0] for s in strengths]
    figure, axes = plt.subplots(1, 6, figsize=(9.6, 1.9), layout="constrained", facecolor="white")
    titles = ["the picture", *(f"strength {s}" for s in strengths)]
    for axis, picture, title in zip(axes, [start, *pictures], titles, strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
        axis.set_title(title, fontsize=9)
    figure.savefig(STATIC / "repaint.jpg", **JPEG)


def main() -> None:
    known = {"cover": cover, "film": film, "repaint": repaint}
    wanted = sys.argv[1:] or list(known)
    if unknown := set(wanted) - set(known):
        sys.exit(f"no picture is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    sd = StableDiffusion.load(ROOT / "checkpoints" / "tiny", device="cpu")
    for name in wanted:
        known[name](sd)


if __name__ == "__main__":
    main()
