"""The measured table of chapter 19: what cheaper steps cost, on the tiny model, as the judge sees it.

    python tools/speed_table.py                 all rows that are missing
    python tools/speed_table.py --rows reuse    only the rows whose name holds a word

Every row draws the same prompts from the same noise, twenty at a time. `right`: whether the judge calls each picture
all right; `looks`: how often the U-Net was asked for one picture, by kind. What a look costs is no matter of this
table: the chapter measures it where it runs. The table is written after every twenty pictures, so the script may be
stopped and started again.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdlearn.lora import load_lora, merge
from sdlearn.pipeline import StableDiffusion
from sdlearn.reuse import Reuse
from sdlearn.samplers import SAMPLERS
from sdlearn.speed import speed_up
from sdlearn.tiny.evaluate import ROWS, fresh_scenes, judged
from sdlearn.tiny.judge import load_judge
from sdlearn.tiny.tasks import to_tensor

MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
TABLE = MODEL / "history" / "speed.json"
LCM = MODEL / "lora" / "lcm.safetensors"
CHUNK = 20
CHOSEN: dict[str, dict[str, Any]] = {
    "ddim 50": {"sampler": "ddim", "steps": 50},
    "ddim 50, reuse": {"sampler": "ddim", "steps": 50, "reuse": (3, 1, 0.1)},
    "ddim 20": {"sampler": "ddim", "steps": 20},
    "ddim 20, reuse": {"sampler": "ddim", "steps": 20, "reuse": (2, 1, 0.1)},
    "ddim 20, guided above 500": {"sampler": "ddim", "steps": 20, "guided_times": (500, 1000)},
    "ddim 20, guided above 500, reuse": {
        **{"sampler": "ddim", "steps": 20, "guided_times": (500, 1000), "reuse": (2, 1, 0.1)}
    },
    "ddim 20, 8 bits": {"sampler": "ddim", "steps": 20, "int8": True},
    "ddim 20, reuse from the start": {"sampler": "ddim", "steps": 20, "reuse": (2, 1, 0.0)},
    "lcm 4": {"sampler": "lcm", "steps": 4, "cfg_scale": 1.0},
    "lcm 2": {"sampler": "lcm", "steps": 2, "cfg_scale": 1.0},
    "lcm 1": {"sampler": "lcm", "steps": 1, "cfg_scale": 1.0},
}


def scenes_of(prompts: int, seed: int) -> list:
    """As many scenes of each kind that `sdlearn evaluate` knows, so mixed that every twenty are alike."""
    kinds = [fresh_scenes(prompts // len(ROWS), seed, split, things) for split, things in ROWS.values()]
    return [scene for some in zip(*kinds, strict=True) for scene in some]


@cache
def model_for(kind: str) -> StableDiffusion:
    """The tiny model: plain, with the LoRA that makes it consistent, or in 8 bits."""
    model = StableDiffusion.load(MODEL)
    if kind == "lcm":
        merge(model.networks(), (load_lora(LCM, model.networks()), 1.0))
    return speed_up(model, int8=True) if kind == "int8" else model


def draw(model: StableDiffusion, prompts: list[str], seed: int, how: dict[str, Any]) -> tuple[list, Counter]:
    """Pictures, and the U-Net's looks at each of them by kind."""
    looks: Counter[str] = Counter()
    settings = {name: value for name, value in how.items() if name not in ("reuse", "int8")}
    extras = [Reuse(*how["reuse"])] if "reuse" in how else []
    deepest = model.unet.down[-1]  # it runs when the whole U-Net does
    whole = deepest.register_forward_hook(lambda part, inputs, output: looks.update({f"{len(output)} whole": 1}))
    top = model.unet.conv_in.register_forward_hook(lambda part, inputs, output: looks.update({f"{len(output)} all": 1}))
    *_, last = model.steps(prompts, seed=seed, extras=extras, **settings)
    whole.remove(), top.remove()
    named = {}
    for size, kind in ((2 * len(prompts), "guided"), (len(prompts), "alone")):
        named[kind] = looks[f"{size} whole"]
        named[f"{kind}, top only"] = looks[f"{size} all"] - looks[f"{size} whole"]
    return [to_tensor(np.array(picture)) for picture in last.images()], Counter(named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    args = parser.parse_args()
    judge, scenes = load_judge(MODEL), scenes_of(args.prompts, args.seed)
    about = {"seed": args.seed, "sentences": [scene.sentence() for scene in scenes]}
    table = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else {"rows": {}}
    if {key: table.get(key, about[key]) for key in about} != about:
        parser.error(f"{TABLE.name} was measured with other settings; move it away first")
    table |= about
    for first in range(0, len(scenes), CHUNK):
        some = scenes[first : first + CHUNK]
        for name, how in CHOSEN.items():
            known = table["rows"].setdefault(name, {"how": how, "right": [], "looks": {}})
            ready = how["sampler"] in SAMPLERS and (how["sampler"] != "lcm" or LCM.exists())
            if args.rows not in name or len(known["right"]) != first or not ready:
                continue
            sentences = [scene.sentence() for scene in some]
            model = model_for("lcm" if how["sampler"] == "lcm" else "int8" if "int8" in how else "plain")
            pictures, looks = draw(model, sentences, args.seed + first, how)
            known["right"] += [int(verdict["all"]) for verdict in judged(judge, some, pictures)]
            known["looks"] = {kind: count for kind, count in looks.items() if count}
            print(f"{name:34} {len(known['right']):4}: right {np.mean(known['right']):.3f}, {dict(looks)}", flush=True)
            measured = {row: cell for row, cell in table["rows"].items() if cell["right"]}
            TABLE.write_text(json.dumps(table | {"rows": measured}) + "\n", "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
