"""The stages of the tiny model: they build, fit together, and what they leave behind is a checkpoint that loads."""

import argparse
import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from repository import ROOT

from sdlearn.checkpoint.load import load_unet
from sdlearn.pipeline import StableDiffusion
from sdlearn.tiny import recipe as tiny
from sdlearn.tiny.judge import look
from sdlearn.tiny.recipe import (
    BANK,
    MAKE,
    STAGES,
    UNET_SIZES,
    VAE_SIZES,
    make_clip,
    make_decoder,
    make_judge,
    make_unet,
    make_vae,
)
from sdlearn.tiny.tasks import GuidedTask, PlacesTask
from sdlearn.training import Average, averaged_weights, resume
from sdlearn.unet import UNet
from sdlearn.vae import VAE


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Saved states of all stages, as training leaves them, with untrained weights."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    unet, clip, other = UNet(UNET_SIZES), make_clip(), make_clip()
    parts = {
        "clip": clip,
        "vae": make_vae(),
        "judge": make_judge(),
        "places": PlacesTask(other.clip.text_encoder, other.tokenizer),
        "unet": torch.nn.ModuleDict({"unet": unet}),
    }
    for stage, part in parts.items():
        (folder / stage).mkdir()
        average = {name: p.detach() for name, p in part.named_parameters()}
        state = {"step": 1, "recipe": {"precision": "bf16"}, "average": average, "weights": average, "optimizer": {}}
        torch.save(state, folder / stage / "state.pt")
    torch.save(torch.randn(2048, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half(), folder / "latents.pt")
    for stage in parts:
        (folder / stage / "log.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 1001)))
    for step in range(500, 10_001, 500):
        Image.new("RGB", (512, 128)).save(folder / "unet" / f"preview-{step:06d}.png")
    return folder


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_sizes():
    """Weights in fp16 have to stay below 60 MB in all."""
    clip = make_clip()
    parts = {"unet": count(UNet(UNET_SIZES)), "vae": count(VAE(VAE_SIZES)), "clip": count(clip.clip),
             "text": count(clip.clip.text_encoder), "judge": count(make_judge())}  # fmt: skip
    assert 2 * sum(parts.values()) < 60e6
    assert 15e6 < parts["unet"] < 20e6 and 5e6 < parts["vae"] < 7e6 and parts["judge"] < 1.2e6
    assert UNET_SIZES.context_width == clip.clip.text_encoder.config.width
    assert UNET_SIZES.in_channels == VAE_SIZES.latent_channels == 4 and len(VAE_SIZES.channels) == 4


def test_every_stage_has_a_recipe_and_a_maker():
    assert (
        list(STAGES) == list(MAKE) == list(tiny.STAGE_HELP) and list(STAGES)[-2:] == ["unet", "guided"] and BANK >= 2048
    )
    assert all(recipe.cooldown < recipe.steps for recipe in STAGES.values())
    assert STAGES["clip"].batch % 4 == 0  # whole families


def test_the_decoder_stage_leaves_the_encoder_alone(runs):
    task = make_decoder(runs)
    learned = {name.split(".")[1] for name, p in task.named_parameters() if p.requires_grad}
    assert learned == {"decoder", "post_quant_conv"}
    assert task.crop is None


def test_a_stage_that_needs_another_says_which(tmp_path):
    with pytest.raises(ValueError, match="train that stage first .sdlearn train vae."):
        make_decoder(tmp_path)


def test_the_unet_task_stands_on_the_others(runs):
    task = make_unet(runs, bank=2048)
    assert task.latents.shape == (2048, 4, 16, 16)
    assert task.latents.float().std().item() == pytest.approx(1, abs=1e-3)  # the scale was measured: 1 / std
    learned = {name.split(".")[0] for name, p in task.named_parameters() if p.requires_grad}
    assert learned == {"unet", "says"}  # the text encoder stays as it is
    losses = task(task.examples([random.Random(i) for i in range(2)]))
    assert losses["loss"].isfinite()
    taught = averaged_weights(runs / "places" / "state.pt")  # the text encoder comes from CLIP by way of `places`
    assert all(torch.equal(p, taught[f"text_encoder.{name}"]) for name, p in task.text_encoder.named_parameters())


@pytest.mark.slow
def test_the_guided_stage_begins_with_the_trained_unet_and_is_what_is_exported(runs, tmp_path):
    task, saved = tiny.make_guided(runs, bank=2048), averaged_weights(runs / "unet" / "state.pt")
    assert isinstance(task, GuidedTask) and task.drop == 0
    assert all(torch.equal(p, saved[f"unet.{name}"]) for name, p in task.unet.named_parameters())
    mine = tmp_path / "runs"
    shutil.copytree(runs, mine)
    (mine / "guided").mkdir()
    average = {name: p + 1 for name, p in saved.items()}
    state = {"step": 1, "recipe": {}, "average": average, "weights": average, "optimizer": {}}
    torch.save(state, mine / "guided" / "state.pt")
    tiny.export(mine, tmp_path / "tiny")
    for name, weight in load_unet(tmp_path / "tiny").state_dict().items():  # halfway between before and after
        torch.testing.assert_close(weight, saved[f"unet.{name}"] + 0.5, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_export_writes_a_checkpoint_that_the_pipeline_loads(runs, tmp_path):
    from sdlearn.tiny.evaluate import load_judge

    folder = tmp_path / "tiny"
    tiny.export(runs, folder)
    model = StableDiffusion.load(folder, device="cpu")
    assert model.size == (128, 128) and model.vae.config.scale == make_unet(runs, bank=2048).vae.config.scale
    saved = torch.load(runs / "unet" / "state.pt", weights_only=True)["average"]
    for name, value in model.unet.state_dict().items():
        torch.testing.assert_close(value, saved[f"unet.{name}"], atol=1e-3, rtol=1e-3)
    (picture,) = model.txt2img("a red apple on a blue background", steps=1, sampler="ddim", cfg_scale=1.0, seed=0)
    assert picture.size == (128, 128)
    assert len(look(load_judge(folder), torch.zeros(1, 3, 128, 128))) == 1
    history = [json.loads(line) for line in (folder / "history" / "unet.jsonl").read_text().splitlines()]
    assert 100 <= len(history) <= 200 and history[-1]["step"] == 1000
    previews = sorted(path.name for path in (folder / "history").glob("preview-*"))
    assert len(previews) == 8 and previews[0] == "preview-000500.jpg" and previews[-1] == "preview-010000.jpg"
    assert f"| 1,000 | {1000 * STAGES['unet'].batch:,} |" in (folder / "history" / "stages.md").read_text("utf-8")


def test_the_table_of_stages_adds_up_what_the_logs_say(tmp_path):
    """Steps, samples and hours; a run that went on with another speed; a log without speeds."""
    batch = STAGES["unet"].batch
    logs = {
        "unet": [{"step": s, "weighted": w, "examples_per_second": batch / v} for s, w, v in
                 ((50, 1.0, 36.0), (100, 0.5, 36.0), (200, 0.25, 72.0))],
        "vae": [{"step": 10, "psnr": 20.0}, {"step": 20, "psnr": 30.04}],
    }  # fmt: skip
    for stage, lines in logs.items():
        (tmp_path / f"{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = tiny.stage_table(tmp_path).splitlines()
    assert table[2:] == [
        f"| `vae` | 20 | {20 * STAGES['vae'].batch} | not told | psnr 20 → 30 |",
        f"| `unet` | 200 | {200 * batch:,} | 3.0 | weighted 1 → 0.25 |",
    ]


@pytest.mark.slow
def test_a_checkpoint_is_a_place_to_begin_from(runs, tmp_path):
    tiny.export(runs, tmp_path / "tiny")
    tiny.begin(tmp_path / "runs", tmp_path / "tiny")
    for stage, make in {"judge": make_judge, "vae": make_vae, "clip": make_clip}.items():
        task, recipe = make(), replace(STAGES[stage], precision="bf16", begun=1000)
        average, optimizer = Average(task, recipe.ema), torch.optim.AdamW(task.parameters())
        assert resume(tmp_path / "runs" / stage / "state.pt", task, optimizer, average, recipe) == 1000
        before = averaged_weights(runs / stage / "state.pt")
        for name, value in average.weights.items():
            torch.testing.assert_close(value, before[name], atol=2e-3, rtol=2e-3)
    kept = [{p.name for p in d.glob("preview-*")} for d in (tmp_path / "tiny/history", tmp_path / "runs/unet")]
    assert kept[0] == kept[1]
    with pytest.raises(ValueError, match="is there already"):
        tiny.begin(tmp_path / "runs", tmp_path / "tiny")


def test_previews_survive_a_new_beginning(runs, tmp_path):
    tiny.keep_previews(runs / "unet", tmp_path / "first")
    for old in (tmp_path / "first").iterdir():  # what `begin` copies; then training goes on and saves another one
        (tmp_path / old.name).write_bytes(old.read_bytes())
    Image.new("RGB", (512, 128)).save(tmp_path / "preview-010500.png")
    tiny.keep_previews(tmp_path, tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "second").iterdir())
    assert len(names) == 8 and names[0] == "preview-000500.jpg" and names[-1] == "preview-010500.jpg"
    for name in names[:-1]:  # not compressed a second time
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_train_stage_reports_logs_and_goes_on(tmp_path, monkeypatch):
    from toy_task import Toy

    from sdlearn.training import Recipe

    monkeypatch.setitem(tiny.MAKE, "vae", lambda runs: Toy())
    monkeypatch.setitem(tiny.STAGES, "vae", Recipe(steps=200, batch=2))
    tiny.train_stage("vae", tmp_path, 50, "no")
    tiny.train_stage("vae", tmp_path, 100, "auto")  # auto: the precision that the run began with
    lines = [json.loads(line) for line in (tmp_path / "vae" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100] and {"loss", "lr", "norm"} <= set(lines[0])
    state = torch.load(tmp_path / "vae" / "state.pt", weights_only=True)
    assert state["step"] == 100 and state["recipe"]["precision"] == "no"


def possible(record):
    """No squared error, cross-entropy or learning rate is below 0, and all numbers are finite."""
    never_below_zero = {"loss", "plain", "weighted", "hint", "guided", "told", "absolute", "objects", "colours",
                        "background", "lr"}  # fmt: skip
    numbers = {name: x for name, x in record.items() if isinstance(x, int | float)}
    return all(math.isfinite(x) and (x >= 0 or name not in never_below_zero) for name, x in numbers.items())


@pytest.mark.parametrize("path", sorted((ROOT / "checkpoints/tiny/history").glob("*.jsonl")), ids=lambda p: p.stem)
def test_the_history_holds_no_impossible_record(path):
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert records and [x for x in records if not possible(x)] == []
    steps = [x["step"] for x in records if "step" in x]
    assert steps == sorted(steps)


BY_HAND = {  # stage: where its rate left the recipe; empty it when weights come that the recipe made in one go
    "judge": "its learning rate fell to 0 at step 1,500 and rose again",
    "unet": "its learning rate fell to 0 at steps 7,600 and 12,700 and rose again",
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_history_of_a_stage_is_one_run_of_its_recipe(stage, request):
    """All its steps, at the learning rate of the recipe at each report."""
    if stage in BY_HAND:
        request.applymarker(pytest.mark.xfail(reason=BY_HAND[stage], strict=True))
    path, recipe = ROOT / f"checkpoints/tiny/history/{stage}.jsonl", STAGES[stage]
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert records[-1]["step"] == recipe.steps
    for record in records:  # the oldest logs do not tell the rate
        assert record.get("lr", recipe.rate(record["step"] - 1)) == pytest.approx(
            recipe.rate(record["step"] - 1), abs=2e-6
        ), record


def test_an_impossible_record_is_found():
    sound = {"step": 8550, "loss": 0.03879, "weighted": 0.021137, "lr": 0.0008}
    assert possible(sound) and not possible(sound | {"weighted": -0.093611}) and not possible(sound | {"lr": math.nan})


def test_the_command_line_knows_the_stages(capsys):
    parser = argparse.ArgumentParser()
    tiny.add_arguments(parser)
    assert parser.parse_args(["vae"]).stage == "vae"
    with pytest.raises(SystemExit):
        parser.parse_args(["everything"])
    assert "invalid choice" in capsys.readouterr().err


def test_thinned_keeps_order_and_ends_with_a_line_break():
    lines = [str(i) for i in range(1001)]
    text = tiny.thinned(lines, most=100)
    kept = text.splitlines()
    assert text.endswith("\n") and kept[-1] == "1000" and len(kept) <= 101 and kept == sorted(kept, key=int)
    assert tiny.thinned(["a", "b"]) == "a\nb\n"
