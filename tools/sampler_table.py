"""The measured table of chapter 13: how far each sampler gets with few looks, on the tiny model.

    python tools/sampler_table.py               all cells that are missing (about an hour of one core)
    python tools/sampler_table.py --rows ddim   only the rows whose name holds a word

Every cell draws the same prompts from the same noise, which has no offset. `error`: for each prompt the mean squared
difference of its latents from those of a long walk, for samplers without fresh noise; `right`: whether the judge calls
the picture all right. A cell is written as soon as it is measured, so the script may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from sdlearn.pipeline import StableDiffusion
from sdlearn.samplers import SAMPLERS, draw_noise
from sdlearn.tiny.evaluate import ROWS, fresh_scenes, judged
from sdlearn.tiny.judge import load_judge
from sdlearn.tiny.tasks import to_tensor

MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
TABLE = MODEL / "history" / "samplers.json"
REFERENCE = "unipc exponential 200"
LOOKS = (5, 8, 12, 20, 30, 50)
CHOSEN = (
    "ddim leading, ddim trailing, euler karras, dpmpp_2m leading, dpmpp_2m trailing, dpmpp_2m karras, dpmpp_2m ays, "
    "unipc trailing, dpmpp_3m trailing, heun karras, plms leading, ddpm leading, euler_a trailing, "
    "dpmpp_2m_sde trailing, dpmpp_sde karras"
).split(", ")
TWICE, ONCE_MORE = ("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde"), ("plms",)


def steps_of(sampler: str, looks: int) -> int:
    """The steps that cost so many looks; the last step to the clean picture takes one look with any sampler."""
    return (looks + 1) // 2 if sampler in TWICE else looks - (sampler in ONCE_MORE)


def draw(model: StableDiffusion, scenes: list, sampler: str, spacing: str, steps: int, seed: int) -> tuple:
    """(latents (B, 4, 16, 16), pictures) of the scenes' sentences, ten at a time."""
    latents, pictures = [], []
    for first in range(0, len(scenes), 10):
        prompts = [scene.sentence() for scene in scenes[first : first + 10]]
        seeds = [seed + first + i for i in range(len(prompts))]
        noise = draw_noise((len(prompts), 4, 16, 16), [torch.Generator().manual_seed(one) for one in seeds])
        how = {"sampler": sampler, "spacing": spacing, "steps": steps, "latents": noise, "seed": seeds}
        *_, last = model.steps(prompts, **how)
        latents.append(last.latents)
        pictures += [to_tensor(np.array(picture)) for picture in last.images()]
    return torch.cat(latents), pictures


def measure(model: StableDiffusion, judge, scenes: list, row: str, looks: int, seed: int, goal: torch.Tensor) -> dict:
    """One cell of the table."""
    sampler, spacing = row.split()
    start = time.process_time()
    latents, pictures = draw(model, scenes, sampler, spacing, steps_of(sampler, looks), seed)
    seconds = time.process_time() - start
    cell = {"right": [int(verdict["all"]) for verdict in judged(judge, scenes, pictures)], "seconds": round(seconds)}
    if not SAMPLERS[sampler].eta:
        errors = (latents - goal).square().mean(dim=(1, 2, 3))
        cell["error"] = [float(f"{error:.3g}") for error in errors]
    return cell


def scenes_of(prompts: int, seed: int) -> list:
    """As many scenes of each kind that `sdlearn evaluate` knows."""
    return [s for split, things in ROWS.values() for s in fresh_scenes(prompts // len(ROWS), seed, split, things)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    parser.add_argument("--looks", type=int, nargs="*", default=LOOKS)
    args = parser.parse_args()
    table = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else {"rows": {}}
    model, judge, scenes = StableDiffusion.load(MODEL), load_judge(MODEL), scenes_of(args.prompts, args.seed)
    about = {"seed": args.seed, "reference": REFERENCE, "sentences": [scene.sentence() for scene in scenes]}
    if {key: table.get(key, about[key]) for key in about} != about:
        parser.error(f"{TABLE.name} was measured with other settings; move it away first")
    table |= about
    path = MODEL.parent.parent / "runs" / f"samplers-reference-{args.prompts}-{args.seed}.pt"
    if path.exists():
        goal = torch.load(path)
    else:
        sampler, spacing, steps = REFERENCE.split()
        goal, pictures = draw(model, scenes, sampler, spacing, int(steps), args.seed)
        table["reference right"] = [int(verdict["all"]) for verdict in judged(judge, scenes, pictures)]
        TABLE.write_text(json.dumps(table) + "\n", "utf-8")
        path.parent.mkdir(exist_ok=True)
        torch.save(goal, path)
    for row in (row for row in CHOSEN if args.rows in row):
        for looks in args.looks:
            if str(looks) in table["rows"].get(row, {}):
                continue
            cell = measure(model, judge, scenes, row, looks, args.seed, goal)
            if TABLE.exists():  # another of us may have written since
                table = json.loads(TABLE.read_text("utf-8")) | about
            table["rows"].setdefault(row, {})[str(looks)] = cell
            error = f"{np.median(cell['error']):.2g}" if "error" in cell else "-"
            right = np.mean(cell["right"])
            print(f"{row:24} {looks:3} looks: right {right:.2f}, error {error}, {cell['seconds']} s", flush=True)
            TABLE.write_text(json.dumps(table) + "\n", "utf-8")


if __name__ == "__main__":
    main()
