"""The ablations of chapter 09: a stage of the recipe with one thing changed, at equal steps.

    python tools/ablations.py --runs runs                 all that is missing (a quarter of an hour of one core each)
    python tools/ablations.py --runs runs --arms hint     only the arm of this name, or those that hold it

Every arm needs the stages before its own (`sdlearn train begin --runs runs` takes the shipped ones; so did
the arms of the U-Net in the table), begins with the same weights and draws its examples with the same seeds.
Arms of `places` are measured by the colours that its layer of answers names; those of the U-Net by the judge, on the
same prompts, from noise as in training: with an offset where there was one. Their U-Net is half as wide as the shipped
one, and so four times as fast. Training may be stopped and goes on; the table is written after each arm.
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
from sdlearn.tiny import tasks
from sdlearn.tiny.evaluate import ROWS, draw, fresh_scenes, judged, shares, unsaid, without_nan, words_heard
from sdlearn.tiny.judge import load_judge
from sdlearn.tiny.recipe import STAGES, UNET_SIZES, make_clip, make_places, train_task, trained, unet_task
from sdlearn.tiny.tasks import HintedTask, PlacesTask, in_any_colour, layout, to_tensor

MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
TABLE = MODEL / "history" / "ablations.json"
STEPS, SEED, PROMPTS, SENTENCES = 2_000, 9, 200, 400
HOW = {"steps": 20, "sampler": "ddim", "cfg_scale": 7.5}
UNET = replace(STAGES["unet"], steps=STEPS, batch=16, cooldown=STEPS // 4, ema=0.99)
NARROW = replace(UNET_SIZES, channels=(48, 96, 128), heads=(3, 3, 4), groups=16)
SCENES = 8_192  # whose latents are computed
ARMS = {  # name -> how it is trained
    "places": STAGES["places"],
    "places, colours of pictures only": STAGES["places"],
    "places, all tokens seen": STAGES["places"],
    "unet": UNET,
    "unet, no offset noise": UNET,
    "unet, no hint": UNET,
    "unet, times drawn evenly": UNET,
    "unet, no places": UNET,
}


def make(runs: Path, arm: str) -> HintedTask | PlacesTask:
    """The task of an arm: that of the recipe, and one thing changed."""
    stage, _, changed = arm.partition(", ")
    if stage == "places":
        task = make_places(runs)
        task.seen = 1.0 if changed == "all tokens seen" else task.seen
        only = changed == "colours of pictures only"
        tasks.in_any_colour = (lambda scene, rng: scene) if only else in_any_colour
        return task
    told = {"no offset noise": {"offset": 0.0}, "no hint": {"hint": 0.0}}.get(changed, {})
    task = unet_task(partial(HintedTask, **told), runs, SCENES, NARROW)
    if changed == "times drawn evenly":
        task.often = torch.ones_like(task.often)
        task.chances = list(accumulate(task.often.tolist()))
    if changed == "no places":  # CLIP's text encoder as it was
        task.text_encoder.load_state_dict(make_clip(runs).clip.text_encoder.state_dict())
    return task


@torch.inference_mode()
def named(task: PlacesTask) -> dict:
    """How often all colours of a sentence are named right: at each thing's places, the likeliest of the colours."""
    found = {}
    for row, (split, things) in ROWS.items():
        scenes = fresh_scenes(SENTENCES, SEED, split, things)
        tokens = task.tokenizer([scene.sentence() for scene in scenes])
        told = task.places(task.text_encoder(tokens))[1].softmax(-1)
        right = []
        for (objects, colours), said in zip(map(layout, scenes), told, strict=True):
            wanted = [(objects == one, colours[objects == one][0]) for one in objects.unique() if one]
            right.append(all(said[here, 1:].sum(0).argmax() + 1 == colour for here, colour in wanted if colour))
        found[row] = float(np.mean(right))
    return {"colours named right": found}


def model_of(task: HintedTask) -> StableDiffusion:
    """The shipped model with an arm's U-Net and its text encoder."""
    model = StableDiffusion.load(MODEL, "cpu", torch.float32)
    model.parts |= {"unet": task.unet.eval(), "text_encoder": task.text_encoder.eval()}
    if not task.offset:
        model.schedule = replace(model.schedule, noise_offset=0.0)
    return model


def drawn(task: HintedTask) -> dict:
    """Shares of all scenes and of each kind; how varied the backgrounds are that no sentence names; and which words the
    U-Net hears, which takes no drawing and shows earlier what it has learned."""
    model, judge = model_of(task), load_judge(MODEL)
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
        "words heard": words_heard(model, PROMPTS, seed=SEED),
    }


def known() -> dict:
    """The arms that are measured already, also by another process."""
    return json.loads(TABLE.read_text("utf-8"))["arms"] if TABLE.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="where the stages before the U-Net are")
    parser.add_argument("--arms", default="", help="only arms whose name holds this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16", "fp16"))
    args = parser.parse_args()
    chosen = [args.arms] if args.arms in ARMS else [arm for arm in ARMS if args.arms in arm]
    for arm, recipe in ((arm, ARMS[arm]) for arm in chosen):
        if arm in known():
            continue
        torch.set_num_threads(args.threads)
        folder = args.runs / "ablations" / arm.replace(", ", "-").replace(" ", "-")
        train_task(arm, partial(make, args.runs, arm), recipe, folder, args.precision, compile=True)
        task = trained(make(args.runs, arm), args.runs, f"ablations/{folder.name}")
        measured = {"steps": recipe.steps} | (named(task) if isinstance(task, PlacesTask) else drawn(task))
        table = {"sentences": SENTENCES, "prompts": PROMPTS, "how": HOW, "arms": known() | {arm: without_nan(measured)}}
        text = json.dumps(table, indent=1) + "\n"
        write_files({TABLE: lambda part, text=text: part.write_text(text, "utf-8")})
        print(arm, measured, flush=True)


if __name__ == "__main__":
    keep_memory()
    main()
