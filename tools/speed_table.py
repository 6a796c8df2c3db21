"""The measured table of chapter 19: what cheaper steps cost, on the tiny model, as the judge sees it.

    python tools/speed_table.py                 all that is missing or no longer true (half an hour of one core)
    python tools/speed_table.py --rows reuse    only the rows whose name holds a word
    python tools/speed_table.py --lora FILE     the rows of latent consistency with this LoRA, not the shipped one

Every row draws the same prompts from the same noise, twenty at a time. `right`: whether the judge calls each picture
all right; `looks`: how often the U-Net was asked for one picture, by kind. What a look costs is no matter of this
table: the chapter measures it where it runs. The table is written after every twenty pictures, so the script may be
stopped and started again. A row knows which weights and settings it was drawn with, and is measured anew when these
are others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampler_table import steps_of

from sdlearn.disk import write_files
from sdlearn.lora import load_lora, merge
from sdlearn.pipeline import StableDiffusion
from sdlearn.reuse import Reuse
from sdlearn.samplers import SAMPLERS
from sdlearn.speed import keep_memory
from sdlearn.tiny.difference import fingerprint
from sdlearn.tiny.evaluate import ROWS, fresh_scenes, judged
from sdlearn.tiny.judge import load_judge
from sdlearn.tiny.tasks import to_tensor

MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
TABLE = MODEL / "history" / "speed.json"
LCM = MODEL / "lora" / "lcm.safetensors"
SEED, CHUNK = 19, 20
SOME, MANY = 60, 120  # prompts: of a row, and of one that decides about a default
CHOSEN: dict[str, dict[str, Any]] = {
    "ddim 20": {"sampler": "ddim", "steps": 20},
    # three ways to let half of the looks be whole: from when on, and then one of how many
    "ddim 20, reuse 2": {"sampler": "ddim", "steps": 20, "reuse": {"every": 2, "start": 0.0}},
    "ddim 20, reuse 3": {"sampler": "ddim", "steps": 20, "reuse": {"every": 3, "start": 0.25}},
    "ddim 20, reuse 6": {"sampler": "ddim", "steps": 20, "reuse": {"every": 6, "start": 0.4}},
    "ddim 20, guided above 500": {"sampler": "ddim", "steps": 20, "guided_times": [500, 1000]},
    "ddim 10": {"sampler": "ddim", "steps": 10},
    "dpmpp_2m 10": {"sampler": "dpmpp_2m", "steps": 10},
    "ddpm 50": {"sampler": "ddpm", "steps": 50},
    "ddpm 50, reuse": {"sampler": "ddpm", "steps": 50, "reuse": {}},
    "lcm 4": {"sampler": "lcm", "steps": 4, "cfg_scale": 1.0},
    "lcm 2": {"sampler": "lcm", "steps": 2, "cfg_scale": 1.0},
    "lcm 1": {"sampler": "lcm", "steps": 1, "cfg_scale": 1.0},
}
for name in [name for name in SAMPLERS if name not in ("ddim", "lcm")]:  # every other sampler, for as many looks
    CHOSEN[f"{name} {steps_of(name, 20)}"] = {"sampler": name, "steps": steps_of(name, 20)}
DECIDING = [name for name in CHOSEN if name in ("ddim 20", "ddpm 50") or "reuse" in name]


def scenes_of(prompts: int, seed: int) -> list:
    """As many scenes of each kind that `sdlearn evaluate` knows, so mixed that every twenty are alike."""
    kinds = [fresh_scenes(prompts // len(ROWS), seed, split, things) for split, things in ROWS.values()]
    return [scene for some in zip(*kinds, strict=True) for scene in some]


@cache
def base() -> str:
    """What every row depends on: a hash of the model's weights, of its noise levels and of the sentences."""
    levels = (MODEL / "scheduler" / "scheduler_config.json").read_text("utf-8")
    sentences = [scene.sentence() for scene in scenes_of(MANY, SEED)]
    return hashlib.sha256(json.dumps([fingerprint(MODEL), levels, SEED, sentences]).encode()).hexdigest()


def empty_row(how: dict[str, Any], lora: Path) -> dict[str, Any]:
    """A row before anything is measured, with all that its numbers will depend on."""
    if "reuse" in how:
        how = how | {"reuse": vars(Reuse(**how["reuse"]))}
    of = {"base": base()}
    if how["sampler"] == "lcm" and lora.exists():
        of["lora"] = hashlib.sha256(lora.read_bytes()).hexdigest()
    return {"how": how, "of": of, "right": [], "looks": {}}


def still_true(row: dict[str, Any], fresh: dict[str, Any]) -> bool:
    """Whether a row was measured with today's weights; one of a LoRA that is not here is believed."""
    return row["how"] == fresh["how"] and row.get("of", {}) == row.get("of", {}) | fresh["of"]


@cache
def model_for(lora: Path | None) -> StableDiffusion:
    """The tiny model: plain, or with the LoRA that makes it consistent."""
    model = StableDiffusion.load(MODEL)
    if lora:
        merge(model.networks(), (load_lora(lora, model.networks()), 1.0))
    return model


def draw(model: StableDiffusion, prompts: list[str], seed: int, how: dict[str, Any]) -> tuple[list, dict[str, int]]:
    """Pictures, and the U-Net's looks at each of them by kind."""
    looks: Counter[str] = Counter()
    settings = {name: value for name, value in how.items() if name != "reuse"}
    extras = [Reuse(**how["reuse"])] if "reuse" in how else []
    deepest = model.unet.down[-1]  # it runs when the whole U-Net does
    whole = deepest.register_forward_hook(lambda part, inputs, output: looks.update({f"{len(output)} whole": 1}))
    top = model.unet.conv_in.register_forward_hook(lambda part, inputs, output: looks.update({f"{len(output)} all": 1}))
    *_, last = model.steps(prompts, seed=seed, extras=extras, **settings)
    whole.remove(), top.remove()
    named = {}
    for size, kind in ((2 * len(prompts), "guided"), (len(prompts), "alone")):
        named[kind] = looks[f"{size} whole"]
        named[f"{kind}, top only"] = looks[f"{size} all"] - looks[f"{size} whole"]
    pictures = [to_tensor(np.array(picture)) for picture in last.images()]
    return pictures, {kind: count for kind, count in named.items() if count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    parser.add_argument("--lora", type=Path, default=LCM, help="the LoRA of latent consistency")
    args = parser.parse_args()
    judge, scenes = load_judge(MODEL), scenes_of(MANY, SEED)
    known = json.loads(TABLE.read_text("utf-8"))["rows"] if TABLE.exists() else {}
    rows = {name: empty_row(how, args.lora) for name, how in CHOSEN.items()}
    rows |= {name: known[name] for name, row in rows.items() if name in known and still_true(known[name], row)}
    table = {"seed": SEED, "sentences": [scene.sentence() for scene in scenes]}
    for first in range(0, MANY, CHUNK):
        some = scenes[first : first + CHUNK]
        for name, row in rows.items():
            is_lcm, many = row["how"]["sampler"] == "lcm", MANY if name in DECIDING else SOME
            ready = args.lora.exists() or not is_lcm
            if args.rows not in name or len(row["right"]) != first or first >= many or not ready:
                continue
            model = model_for(args.lora if is_lcm else None)
            pictures, row["looks"] = draw(model, [scene.sentence() for scene in some], SEED + first, row["how"])
            row["right"] += [int(verdict["all"]) for verdict in judged(judge, some, pictures)]
            print(f"{name:34} {len(row['right']):4}: right {np.mean(row['right']):.3f}, {row['looks']}", flush=True)
            measured = {each: cells for each, cells in rows.items() if cells["right"]}
            text = json.dumps(table | {"rows": measured}) + "\n"
            write_files({TABLE: lambda part, text=text: part.write_text(text, "utf-8")})


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_memory()
    main()
