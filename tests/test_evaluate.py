"""The figures of `sdlearn evaluate`, on models whose figures are known beforehand."""

import json
import math
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_judge import Perfect

from sdlearn.cli import main
from sdlearn.tiny import evaluate, unsaid
from sdlearn.tiny.evaluate import (
    CEILINGS,
    PARTS,
    ROWS,
    draw,
    fresh_scenes,
    judged,
    load_judge,
    prompt_following,
    psnr,
    share,
    table_of,
    vae_psnr,
)
from sdlearn.tiny.judge import Finding, Judge
from sdlearn.tiny.scenes import RELATIONS, parse, split_of
from sdlearn.tiny.tasks import to_tensor
from sdlearn.unet import UNet, UNetConfig

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"


class Painter:
    """A "model" that renders its prompts, and can be told to paint something else instead."""

    def __init__(self, change=lambda scene: scene):
        self.change, self.calls = change, []

    def txt2img(self, prompts, **settings):
        self.calls.append((prompts, settings))
        return [self.change(parse(prompt)).image() for prompt in prompts]


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    assert psnr(a, b).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_share():
    verdicts = [{"objects": True, "relation": True}, {"objects": True, "relation": False},
                {"objects": False, "relation": False}]  # fmt: skip
    assert share(verdicts, "objects") == pytest.approx(2 / 3)
    assert share(verdicts, "relation", "objects") == 0.5
    assert math.isnan(share(verdicts[2:], "relation", "objects"))


def test_fresh_scenes_are_of_their_split_and_repeat():
    for split, things in ROWS.values():
        scenes = fresh_scenes(20, 1, split, things)
        assert scenes == fresh_scenes(20, 1, split, things) != fresh_scenes(20, 2, split, things)
        assert all(split_of(scene) == split and len(scene.things) == things for scene in scenes)


def test_draw_asks_for_every_sentence_once_with_its_own_seed():
    scenes, painter, counts = fresh_scenes(7, 0), Painter(), []
    pictures = draw(painter, scenes, 12, "ddim", 3.0, seed=100, batch=3, advance=counts.append)
    assert [prompt for prompts, _ in painter.calls for prompt in prompts] == [s.sentence() for s in scenes]
    assert [settings["seed"] for _, settings in painter.calls] == [100, 103, 106] and counts == [3, 3, 1]
    assert painter.calls[0][1] == {"steps": 12, "sampler": "ddim", "cfg_scale": 3.0, "seed": 100}
    assert len(pictures) == 7


def told(scenes):
    """A stand-in for `look`: the perfect judge of these scenes."""
    return lambda judge, images: LOOK(Perfect(*scenes), images)


LOOK = evaluate.look


def test_judged_pairs_every_picture_with_its_scene(monkeypatch):
    scenes = fresh_scenes(4, 0, things=2)
    monkeypatch.setattr(evaluate, "look", told(scenes))
    pictures = [to_tensor(scene.render()) for scene in scenes]
    assert all(verdict["all"] for verdict in judged(None, scenes, pictures))
    mirrored = [scene.mirrored() for scene in scenes]
    assert not any(verdict["relation"] for verdict in judged(None, mirrored, pictures))
    assert all(verdict["objects"] for verdict in judged(None, mirrored, pictures))


@pytest.mark.parametrize("mirror", [False, True])
def test_prompt_following_of_a_painter(monkeypatch, mirror):
    """Who paints what is asked is all right; who swaps the places errs in the relation, and only there."""
    painted = []

    class Recorder(Painter):
        def txt2img(self, prompts, **settings):
            shown = [parse(prompt) for prompt in prompts]
            shown = [scene.mirrored() if mirror and len(scene.things) == 2 else scene for scene in shown]
            painted.append(shown)
            return [scene.image() for scene in shown]

    def look(judge, images):  # first the drawn pictures, then the real ones
        scenes = painted.pop() if painted else look.real
        return LOOK(Perfect(*scenes), images)

    original = fresh_scenes

    def remember(*words):
        look.real = original(*words)
        return look.real

    monkeypatch.setattr(evaluate, "fresh_scenes", remember)
    monkeypatch.setattr(evaluate, "look", look)
    monkeypatch.setattr(evaluate, "remade", lambda model, scenes: [[to_tensor(s.render()) for s in scenes]] * 2)
    table = prompt_following(Recorder(), None, count=10)
    assert list(table) == list(ROWS)
    for row, values in table.items():
        pair = ROWS[row][1] == 2
        assert all(values[name] == 1 for name in ("objects", "colours", "background", *CEILINGS))
        assert values["relation"] == (float(not mirror)) if pair else math.isnan(values["relation"])
        assert values["all"] == float(not (mirror and pair))


@pytest.mark.parametrize("mirror", [False, True])
def test_otherwise_draws_the_same_scenes_in_each_way_and_single_things_have_no_relation(monkeypatch, mirror):
    painter = Painter(lambda scene: scene.mirrored() if mirror and len(scene.things) == 2 else scene)

    def look(judge, images):  # all pictures of the way that was drawn last
        prompts = [prompt for prompts, _ in painter.calls for prompt in prompts][-len(images) :]
        return LOOK(Perfect(*(painter.change(parse(prompt)) for prompt in prompts)), images)

    monkeypatch.setattr(evaluate, "look", look)
    table = evaluate.otherwise(painter, None, 10, steps=50, sampler="ddpm", cfg_scale=5.0, seed=1)
    assert list(table) == [*evaluate.ELSE]
    assert {"guidance 1", "guidance 3", "guidance 7.5"} <= set(table)  # one control for all of them
    for values in table.values():
        assert values["objects"] == values["colours"] == values["background"] == 1
        assert values["relation"] == float(not mirror) and values["all"] == (0.4 if mirror else 1)
    settings, prompts = [how for _, how in painter.calls], [prompts for prompts, _ in painter.calls]
    assert all(asked == prompts[0] for asked in prompts) and len({how["seed"] for how in settings}) == 1
    for how, changes in zip(settings, evaluate.ELSE.values(), strict=True):
        assert {"steps": 50, "sampler": "ddpm", "cfg_scale": 5.0} | changes == {k: how[k] for k in how if k != "seed"}


def test_what_is_left_open_is_drawn_from_noise_of_its_own(monkeypatch):
    """No seed twice for one scale, and the same ones for the other."""
    seeds = {}

    class Artist:
        def txt2img(self, prompts, *, seed, cfg_scale, **settings):
            assert settings == {"steps": 9, "sampler": "ddim"} and len(set(prompts)) == 1
            seeds.setdefault(cfg_scale, []).extend(range(seed, seed + len(prompts)))
            return [parse(prompts[0]).image()] * len(prompts)

    monkeypatch.setattr(unsaid, "look", lambda judge, images: [Finding({}, "pink", 0.0)] * len(images))
    found = evaluate.unsaid(Artist(), None, count=6, throws=4, steps=9, sampler="ddim", cfg_scale=3.0, seed=5)
    assert list(found) == ["guidance 1", "guidance 7.5"] and found["guidance 1"]["backgrounds"] == 0
    assert seeds[1.0] == seeds[7.5] and len(set(seeds[1.0])) == 6 * 4


def test_vae_psnr_of_a_vae_that_loses_nothing_but_a_little():
    def model(error):
        vae = SimpleNamespace(encode=lambda x: SimpleNamespace(mean=x / 2),
                              decode=lambda latents: latents.mul(2 * (1 - error)))  # fmt: skip
        return SimpleNamespace(vae=vae, device=torch.device("cpu"), dtype=torch.float32)

    assert 20 < vae_psnr(model(0.1), count=20) < 35 < vae_psnr(model(0.01), count=20)


def test_table():
    values = dict.fromkeys(PARTS, 0.5) | {"true pictures": 1.0, "through the VAE": 0.75, "relation": math.nan}
    text = table_of({"VAE PSNR, dB": 28.04, "CLIP retrieval": {"a": 0.5}, "attention overlap": {"inside": 0.25},
                     "words heard": {"colours": 0.75}, "prompt following": {"seen, one thing": values},
                     "pictures in a row": 80, "settings": {"steps": 50, "seed": 1},
                     "otherwise": {"guidance 1": dict.fromkeys(PARTS, 0.25) | {"relation": math.nan}},
                     "unsaid": {"guidance 1": {"backgrounds": 0.9, "sides": 0.8, "backgrounds, standard error": 0.02,
                                               "sides, standard error": math.nan}},
                     "fills": {"drawn": 12.34}})  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "VAE PSNR on fresh scenes: 28.0 dB"
    assert lines[1:4] == ["CLIP retrieval: a 0.50", "attention overlap: inside 0.25", "words heard: colours 0.75"]
    assert lines[4] == "80 pictures in each row; steps 50 seed 1; a share of 0.90 has a standard error of 0.03"
    assert lines[5].split() == ["prompt", "following", *PARTS, *" ".join(CEILINGS).split()]
    assert lines[6].split()[3:] == ["0.50", "0.50", "0.50", "-", "0.50", "1.00", "0.75"]
    assert lines[8].split() == ["guidance", "1", "0.25", "0.25", "0.25", "-", "0.25"]
    assert lines[9] == "left open, guidance 1 (1: as a fair die): backgrounds 0.90 ± 0.02, sides 0.80 ± nan"
    assert lines[10] == "main fill, distance from its colour in RGB: drawn 12.3"


def test_a_judge_is_saved_and_loaded(tmp_path):
    judge = Judge()
    (tmp_path / "judge").mkdir()
    save_file({name: x.half().contiguous() for name, x in judge.state_dict().items()},
              tmp_path / "judge" / "model.safetensors")  # fmt: skip
    loaded = load_judge(tmp_path)
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    x = torch.rand(1, 3, 128, 128)
    torch.testing.assert_close(loaded(x)[0], judge(x)[0], atol=2e-2, rtol=2e-2)


def test_a_missing_judge_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="judge") as caught:
        load_judge(tmp_path)
    assert "\n" not in str(caught.value)


def test_retrieval_of_a_clip_that_knows_nothing_is_chance(tmp_path):
    random_clip = save_random_clip(tmp_path)
    found = evaluate.clip_retrieval(random_clip, count=20)
    assert set(found) == {"picture finds sentence", "sentence finds picture", "tells sides apart"}
    assert 0 <= found["picture finds sentence"] <= 0.3 and 0 <= found["sentence finds picture"] <= 0.3


def save_random_clip(folder):
    from sdlearn.checkpoint.load import save_clip
    from sdlearn.tiny.recipe import make_clip

    task = make_clip()
    task.tokenizer.save(folder / "tokenizer")
    save_clip(folder, task.clip)
    return folder


def untrained():
    from sdlearn.pipeline import StableDiffusion
    from sdlearn.tiny.recipe import SCHEDULE, UNET_SIZES, VAE_SIZES, make_clip
    from sdlearn.vae import VAE

    clip = make_clip()
    parts = {"tokenizer": clip.tokenizer, "text_encoder": clip.clip.text_encoder}
    parts |= {"vae": VAE(VAE_SIZES), "unet": UNet(UNET_SIZES)}
    return StableDiffusion(parts, SCHEDULE, size=(128, 128), device="cpu")


def test_a_changed_sentence_is_wrong_in_one_thing():
    for i in range(50):
        scene = evaluate.fresh_scenes(1, i, things=2)[0]
        wrong = evaluate.changed(scene, random.Random(i))
        assert ("colours" in wrong) == bool(scene.things[0].colour)
        assert scene.sentence() not in wrong.values() and all(parse(sentence) for sentence in wrong.values())
        other = parse(wrong["relation"])
        assert other.relation() == RELATIONS[scene.relation()]
        assert [(x.name, x.colour) for x in other.things] == [(x.name, x.colour) for x in scene.things]


class Listener(torch.nn.Module):
    """Knows the noise, and answers it a little worse when a sentence is wrong."""

    def __init__(self, deaf):
        super().__init__()
        self.deaf, self.calls, self.config = deaf, 0, UNetConfig()

    def forward(self, latents, t, context):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        self.calls += 1  # the first call has the true sentences, the others the wrong ones, in the order of PARTS
        worse = 0.0 if self.calls == 1 else -0.1 if self.calls == 1 + self.deaf else 0.1
        return noise * (1.5 + worse)


@pytest.mark.parametrize("deaf", [0, 4])
def test_words_heard(deaf):
    model = untrained()
    model.parts["unet"] = Listener(deaf)
    heard = evaluate.words_heard(model, count=8)
    assert list(heard) == [*PARTS[:4]]
    assert all(share == (part != "relation" or not deaf) for part, share in heard.items())


def test_attention_overlap_of_a_random_model_is_that_of_the_area():
    found = evaluate.attention_overlap(untrained(), count=2)
    assert found["inside"] == pytest.approx(found["area"], rel=0.35) and 0 <= found["points"] <= 1


QUICK = {"vae_psnr": 8, "clip_retrieval": 20, "attention_overlap": 2, "words_heard": 8, "fills": 8}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_figure_of_the_shipped_model_is_printed_and_written(monkeypatch, tmp_path, capsys, dtype):
    """All measures, on fewer scenes; in 16 bits as on a GPU."""
    for name, count in QUICK.items():
        monkeypatch.setattr(evaluate, name, partial(getattr(evaluate, name), count=count))
    monkeypatch.setattr(evaluate, "ELSE", {"guidance 3": {"cfg_scale": 3.0}})
    monkeypatch.setattr(evaluate, "unsaid", partial(evaluate.unsaid, count=2, throws=4))
    path = tmp_path / "new" / "figures.json"
    words = f"evaluate --model {TINY} --prompts 10 --steps 2 --sampler ddim --device cpu --dtype {dtype} --json {path}"
    assert main(words.split()) == 0
    text, figures = capsys.readouterr().out, json.loads(path.read_text(), parse_constant=pytest.fail)
    assert "2 pictures in each row; steps 2 sampler ddim cfg_scale 7.5 seed 1" in text
    assert figures["pictures in a row"] == 2 and list(figures["prompt following"]) == list(ROWS)
    assert figures["prompt following"]["seen, one thing"]["relation"] is None  # one thing has none
    assert figures["VAE PSNR, dB"] > 25 and f"{figures['VAE PSNR, dB']:.1f} dB" in text
    assert figures["CLIP retrieval"]["picture finds sentence"] > 0.9 and figures["words heard"]["background"] > 0.8
    assert list(figures["otherwise"]) == [*evaluate.ELSE] and list(figures["unsaid"]) == ["guidance 1", "guidance 7.5"]
    assert 0 < figures["fills"]["true pictures through the VAE"] < 20
    assert figures["attention overlap"]["inside"] > 1.3 * figures["attention overlap"]["area"]


@pytest.mark.parametrize(("words", "sentence"), [
    ("--prompts 4", "--prompts 4 is too few: give at least 5"),
    ("--json {folder}", "is a folder, but the name of a file is wanted"),
    ("--json {folder}/file/figures.json", "cannot be written"),
    ("--sampler none", "none"),
    ("--steps 0", "steps is 0"),
    ("--seed 4294967000", "seed is"),  # not after an hour, where the seeds end
    ("--model {folder}", "{folder}"),
])  # fmt: skip
def test_wrong_wishes_are_told_before_the_work(words, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(UNet, "forward", lambda *words: pytest.fail("it begins to draw"))
    if "model" not in words:
        monkeypatch.setattr(evaluate.StableDiffusion, "load", lambda *words: pytest.fail("it loads a model"))
    assert main(["evaluate", "--model", str(TINY), *words.format(folder=tmp_path).split()]) == 2
    told = capsys.readouterr().err
    assert sentence.format(folder=tmp_path) in told and told.count("\n") == 1


def test_a_box_covers_the_positions_whose_middles_it_holds():
    def covered(*box):
        return evaluate.inside_of(box, torch.zeros(4, 4), 8).nonzero().tolist()

    assert covered(0, 0, 8, 8) == [[0, 0]]
    assert covered(4, 4, 12, 12) == [[0, 0]] and covered(12, 12, 20, 20) == [[1, 1]]  # halves: always the same side
    assert covered(5, 20, 20, 40) == [[2, 1], [3, 1]]
    assert covered(-9, -9, 5, 5) == [[0, 0]] and covered(0, 0, 4, 4) == []


def test_evaluation_scenes_are_not_the_first_training_scenes():
    from sdlearn.tiny.tasks import numbered_scene

    seen = {numbered_scene(i) for i in range(2000)}
    assert not seen & set(fresh_scenes(200, 1))
