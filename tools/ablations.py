"""The ablations of chapter 09: the U-Net's recipe with one thing changed, at equal steps, as the judge sees it.

    python tools/ablations.py --runs runs                 all that is missing (half an hour an arm on two quiet cores)
    python tools/ablations.py --runs runs --arms hint     only the arms whose name holds a word

Every arm needs the stages before `sdlearn train unet`, begins with the same weights, sees the same scenes in the same
order, and is judged on the same prompts. Drawing starts from noise as in training: with an offset where there was one.
Training may be stopped and goes on; the table is written after each arm.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from sdlearn.disk import write_files
from sdlearn.pipeline import StableDiffusion
from sdlearn.speed import keep_memory
from sdlearn.tiny.evaluate import ROWS, draw, fresh_scenes, judged, shares, unsaid
from sdlearn.tiny.judge import load_judge
from sdlearn.tiny.recipe import STAGES, make_clip, train_task, trained, unet_task
from sdlearn.tiny.tasks import HintedTask, to_tensor

MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
TABLE = MODEL / "history" / "ablations.json"
STEPS, SEED, PROMPTS = 2_000, 9, 200
HOW = {"steps": 20, "sampler": "ddim", "cfg_scale": 7.5}
ARMS = {  # name -> what is changed in HintedTask; None: see `make`
    "the recipe": {},
    "without offset noise": {"offset": 0.0},
    "without the hint": {"hint": 0.0},
    "times drawn evenly": None,
    "without places": None,
}


def make(runs: Path, arm: str) -> HintedTask:
    """The task of an arm."""
    task = unet_task(partial(HintedTask, **ARMS[arm] or {}), runs)
    if arm == "times drawn evenly":
        task.often = torch.ones_like(task.often)
        task.chances = list(accumulate(task.often.tolist()))
    if arm == "without places":  # CLIP's text encoder as it was
        task.text_encoder.load_state_dict(make_clip(runs).clip.text_encoder.state_dict())
    return task


def measure(task: HintedTask) -> dict:
    """Shares of all scenes and of each kind; and how varied the backgrounds are that no sentence names."""
    model, judge = StableDiffusion.load(MODEL, "cpu", torch.float32), load_judge(MODEL)
    model.parts |= {"unet": task.unet.eval(), "text_encoder": task.text_encoder.eval()}
    if not task.offset:
        model.schedule = replace(model.schedule, noise_offset=0.0)
    scenes, verdicts, found = [], [], {}
    for i, (row, (split, things)) in enumerate(ROWS.items()):
        some = fresh_scenes(PROMPTS // len(ROWS), SEED + i, split, things)
        pictures = draw(model, some, **HOW, seed=1_000 * i)
        verdict = judged(judge, some, [to_tensor(np.array(picture)) for picture in pictures])
        found[row] = shares(some, verdict)
        scenes, verdicts = scenes + some, verdicts + verdict
    how = {name: value for name, value in HOW.items() if name != "cfg_scale"}
    return {
        "every scene": shares(scenes, verdicts),
        "kinds": found,
        "left open": unsaid(model, judge, **how, seed=SEED),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="where the stages before the U-Net are")
    parser.add_argument("--arms", default="", help="only arms whose name holds this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16", "fp16"))
    args = parser.parse_args()
    recipe = replace(STAGES["unet"], steps=STEPS, cooldown=0)
    for arm in (arm for arm in ARMS if args.arms in arm):
        known = json.loads(TABLE.read_text("utf-8"))["arms"] if TABLE.exists() else {}
        if arm in known:
            continue
        torch.set_num_threads(args.threads)
        folder = args.runs / "ablations" / arm.replace(" ", "-")
        train_task(arm, partial(make, args.runs, arm), recipe, folder, args.precision, compile=True)
        task = trained(make(args.runs, arm), args.runs, f"ablations/{folder.name}")
        table = {"steps": STEPS, "prompts": PROMPTS, "how": HOW, "arms": known | {arm: measure(task)}}
        text = json.dumps(table, indent=1) + "\n"
        write_files({TABLE: lambda part, text=text: part.write_text(text, "utf-8")})
        print(arm, table["arms"][arm]["every scene"], flush=True)


if __name__ == "__main__":
    keep_memory()
    main()
