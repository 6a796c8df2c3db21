"""What the networks learn from: examples that follow from their generators, and losses as the chapters say."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageColor
from torch import nn

from sdlearn.clip import CLIP, CLIPImageConfig, CLIPTextConfig
from sdlearn.schedule import Schedule
from sdlearn.tiny import tasks
from sdlearn.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_COLOURS,
    OBJECTS,
    RECOLOURED,
    Scene,
    Thing,
    parse,
    random_scene,
    split_of,
)
from sdlearn.tiny.tasks import (
    PREVIEW,
    CLIPTask,
    DecoderTask,
    DenoiseTask,
    GuidedTask,
    HintedTask,
    PlacesTask,
    PlainTask,
    VAETask,
    doodle,
    encode_scenes,
    family,
    in_any_colour,
    latent_bank,
    layout,
    loss_weights,
    normal,
    numbered_scene,
    scene_tokenizer,
    to_tensor,
)
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

SMALL_VAE = VAEConfig((8, 8, 16, 16), blocks=1, groups=4, scale=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return scene_tokenizer()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(SMALL_VAE).eval()


@pytest.fixture(scope="module")
def denoise(tokenizer, vae):
    torch.manual_seed(0)
    clip = make_clip(tokenizer)
    unet = UNet(UNetConfig((16, 32), (True, False), heads=(2, 4), blocks=1, context_width=16, groups=8))
    latents = torch.randn(50, 4, 16, 16).half()
    return DenoiseTask(unet, clip.text_encoder, tokenizer, latents, Schedule(), vae=vae)


def make_clip(tokenizer):
    text = CLIPTextConfig(vocab=len(tokenizer), width=16, layers=1, heads=2)
    return CLIP(text, CLIPImageConfig(size=128, patch=32, width=16, layers=1, heads=2), projection=8)


def rngs(count, seed=0):
    return [random.Random(f"{seed} {i}") for i in range(count)]


def check_examples(task, count, shapes):
    batch, again, other = (task.examples(rngs(count, seed)) for seed in (0, 0, 1))
    assert {name: tuple(x.shape) for name, x in batch.items()} == shapes
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not all(torch.equal(batch[name], other[name]) for name in batch)
    losses = task(batch)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    assert losses["loss"].requires_grad
    return batch, losses


def test_pictures_become_tensors():
    x = to_tensor(np.array([[[0, 127, 255]]], np.uint8))
    assert x.shape == (3, 1, 1) and x.flatten().tolist() == pytest.approx([-1, -1 / 255, 1])


def test_noise_is_normal_and_belongs_to_its_example():
    noise = normal(rngs(4), 3, 50, 50)
    assert noise.shape == (4, 3, 50, 50)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert torch.equal(normal(rngs(4)[2:], 3, 50, 50), noise[2:])  # whatever its neighbours are


@pytest.mark.parametrize(("crop", "size"), [(None, 128), (64, 64)])
def test_vae_task(vae, crop, size):
    shapes = {"image": (3, 3, size, size), "noise": (3, 4, size // 8, size // 8)}
    batch, losses = check_examples(VAETask(vae, crop), 3, shapes)
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert losses["psnr"].item() == pytest.approx(10 * np.log10(4 / 10 ** (-losses["psnr"].item() / 10) / 4))


def test_vae_loss_of_a_perfect_decoder_is_its_kl(vae):
    task = VAETask(vae)
    batch = task.examples(rngs(1))
    task.vae = nn.Module()
    task.vae.unscaled, task.vae.config = vae.unscaled, vae.config
    task.vae.decode = lambda latents: batch["image"]
    losses = task(batch)
    assert losses["absolute"] == 0 and losses["loss"].item() == pytest.approx(task.kl * losses["kl"].item())


def test_doodles_have_outlines_and_the_worlds_colours():
    pictures = [doodle(random.Random(seed)) for seed in range(20)]
    assert all(picture.shape == (128, 128, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert np.array_equal(pictures[3], doodle(random.Random(3)))
    seen = {tuple(pixel) for picture in pictures for pixel in picture.reshape(-1, 3)}
    fills = {ImageColor.getrgb(fill) for pair in COLOURS.values() for fill in pair}
    assert {(0, 0, 0)} | {tuple(ground) for ground in BACKGROUNDS.values()} | fills <= seen


@pytest.mark.slow
def test_decoder_task(vae):
    task = DecoderTask(copy.deepcopy(vae), noise=0.2, doodles=0.5)
    batch = task.examples(rngs(40))
    assert batch["image"].shape == (40, 3, 128, 128) and batch["noise"].shape == (40, 4, 16, 16)
    strengths = batch["noise"].std(dim=(1, 2, 3))
    assert 0.15 < strengths.max() < 0.22 and strengths.min() < 0.05
    scenes = [to_tensor(random_scene(rng).render()) for rng in rngs(40)]
    kept = [torch.equal(a, b) for a, b in zip(batch["image"], scenes, strict=True)]
    assert 10 <= sum(kept) <= 30  # the others are doodles
    task(batch)["loss"].backward()
    learning = {name.split(".")[1] for name, p in task.named_parameters() if p.grad is not None}
    assert learning == {"decoder", "post_quant_conv"}
    hue, speckles = torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    speckles[..., ::2], speckles[..., 1::2] = 1, -1  # as large, but none of it in the large
    mine, plain = task.difference, super(DecoderTask, task).difference
    assert mine(hue) == plain(hue) + 1 and mine(speckles) == plain(speckles)


def test_every_word_of_the_world_is_one_token(tokenizer):
    for sentence in PREVIEW:
        assert len(tokenizer.split(sentence)) == len(sentence.split())
    assert len(tokenizer) < 2000


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32))
def test_a_family_differs_in_one_thing(seed):
    scene, *others = family(random.Random(seed))
    assert len(others) == 3 and all(split_of(x) == "train" for x in (scene, *others))

    def attributes(x):
        return [(t.name, t.colour) for t in x.things], [(t.x, t.y) for t in x.things], x.background

    for other in others:
        changed = [a != b for a, b in zip(attributes(scene), attributes(other), strict=True)]
        assert sum(changed) <= 1
        if changed[0]:
            assert sum(a != b for a, b in zip(attributes(scene)[0], attributes(other)[0], strict=True)) == 1


def test_most_members_of_a_family_are_different():
    """A change may draw what was there before; that is rare."""
    families = [family(random.Random(i)) for i in range(200)]
    assert np.mean([len({x.sentence() for x in members}) == 4 for members in families]) > 0.9


def test_clip_task(tokenizer):
    task = CLIPTask(make_clip(tokenizer), tokenizer)
    batch = task.examples(rngs(8))
    longest = batch["tokens"].shape[1]
    check_examples(task, 8, {"tokens": (8, longest), "image": (8, 3, 128, 128)})
    assert longest < 77 and bool((batch["tokens"] == tokenizer.eos).any(dim=1).all())  # shorter, but whole


def test_numbered_scenes_and_their_latents(vae):
    assert numbered_scene(3) == numbered_scene(3) != numbered_scene(4)
    latents = encode_scenes(vae, range(3, 6), batch=2)
    assert latents.shape == (3, 4, 16, 16) and latents.dtype == torch.float16
    one = vae.unscaled(to_tensor(numbered_scene(4).render())[None]).mean
    torch.testing.assert_close(latents[1:2].float(), one.detach(), atol=2e-3, rtol=2e-3)


def test_a_latent_bank_goes_on_where_it_stopped(vae, tmp_path, monkeypatch):
    unbroken = latent_bank(vae, 8, tmp_path / "a.pt", chunk=2)
    encoded = []
    original = encode_scenes
    monkeypatch.setattr(tasks, "encode_scenes", lambda vae, numbers: encoded.append(numbers) or original(vae, numbers))
    first = latent_bank(vae, 4, tmp_path / "b.pt", chunk=2)
    resumed = latent_bank(vae, 8, tmp_path / "b.pt", chunk=2)
    assert torch.equal(resumed, unbroken) and torch.equal(first, unbroken[:4])
    look = range(0, 1)  # is it this VAE's?
    assert encoded == [look, range(0, 2), range(2, 4), look, range(4, 6), range(6, 8)]  # nothing else twice
    assert torch.equal(latent_bank(vae, 3, tmp_path / "b.pt"), unbroken[:3]) and len(encoded) == 7


@pytest.mark.parametrize("sizes", [SMALL_VAE, replace(SMALL_VAE, latent_channels=3)])
def test_a_latent_bank_of_another_vae_is_not_taken_for_ones_own(vae, tmp_path, sizes):
    torch.manual_seed(1)
    other = VAE(sizes).eval()
    latent_bank(other, 4, tmp_path / "bank.pt", chunk=2)
    again = latent_bank(vae, 2, tmp_path / "bank.pt")
    assert torch.equal(again, latent_bank(vae, 2, tmp_path / "mine.pt"))


def test_loss_weights():
    weights = loss_weights(Schedule())
    assert weights.shape == (1000,) and weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert (weights > 0).all() and weights[-1] > 10 * weights[0]  # strong noise counts more
    assert (weights.diff() >= -1e-6).all()


def test_denoise_task(denoise):
    shapes = {"latents": (3, 4, 16, 16), "tokens": (3, 77), "t": (3,), "noise": (3, 4, 16, 16), "number": (3,)}
    batch, _ = check_examples(denoise, 3, shapes)
    assert batch["latents"].dtype == torch.float32
    denoise(batch)["loss"].backward()
    assert all(p.grad is None for p in denoise.text_encoder.parameters())  # frozen
    denoise.zero_grad(set_to_none=True)


def test_the_plain_task_is_algorithm_1(denoise):
    """Uniform times, plain noise, the mean squared error; the same scenes and captions as DenoiseTask."""
    parts = denoise.text_encoder, denoise.tokenizer, denoise.latents, denoise.schedule
    plain = PlainTask(nn.Module(), *parts)
    plain.unet.forward = lambda xt, t, context: torch.zeros_like(xt)
    batch, ours = plain.examples(rngs(4)), denoise.examples(rngs(4))
    assert all(torch.equal(batch[name], ours[name]) for name in ("latents", "tokens", "number"))
    torch.testing.assert_close(plain(batch), {"loss": batch["noise"].square().mean()})
    assert not any(p.requires_grad for p in plain.text_encoder.parameters())
    t = torch.cat([plain.times(rngs(1000, seed)) for seed in range(10)])
    share = torch.bincount(t // 100, minlength=10) / len(t)
    torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.015, rtol=0)
    means = [task.fresh_noise(rngs(2000)).mean((2, 3)).std().item() for task in (plain, denoise)]
    assert means == pytest.approx([1 / 16, (1 / 256 + 0.1**2) ** 0.5], rel=0.05)  # 256 positions; offset noise


def test_denoise_loss_is_the_weighted_error_of_eps(denoise):
    batch = denoise.examples(rngs(4))
    zero = DenoiseTask(nn.Module(), denoise.text_encoder, denoise.tokenizer, denoise.latents, denoise.schedule)
    zero.unet.forward = lambda xt, t, context: torch.zeros_like(xt)
    losses, error = zero(batch), batch["noise"].square().mean(dim=(1, 2, 3)) / zero.often[batch["t"]]
    torch.testing.assert_close(losses["plain"], error.mean())
    torch.testing.assert_close(losses["loss"], (loss_weights(Schedule())[batch["t"]] * error).mean())


def test_one_caption_in_ten_is_empty_and_the_others_are_true(denoise, tokenizer):
    tokens = torch.cat([denoise.examples(rngs(100, seed))["tokens"] for seed in range(10)])
    empty = (tokens == tokenizer([""])).all(dim=1)
    assert 0.07 < empty.float().mean() < 0.13
    decoded = [tokenizer.decode(row) for row in tokens[~empty][:50]]
    assert all(parse(caption) for caption in decoded)


def test_times_are_drawn_as_often_as_they_say_and_count_as_if_uniform(denoise):
    t = torch.cat([denoise.times(rngs(1000, seed)) for seed in range(10)])
    assert t.min() >= 0 and t.max() <= 999
    share = torch.bincount(t // 100, minlength=10) / len(t)
    torch.testing.assert_close(share, denoise.often.view(10, 100).sum(1) / 1000, atol=0.015, rtol=0)
    assert share[9] > 2 * share[0]
    for error in (torch.ones(1000), torch.linspace(0, 1, 1000)):  # any error keeps the mean that uniform times give it
        assert (error / denoise.often)[t].mean().item() == pytest.approx(error.mean().item(), abs=0.02)


def test_a_layout_says_what_lies_where():
    cat, star = Thing("cat", None, 32, 64, 56), Thing("star", "yellow", 96, 64, 56)
    objects, colours = layout(Scene((cat, star), "white")).view(2, 4, 4)
    for labels, cats, stars in ((objects, 1 + OBJECTS.index("cat"), 1 + OBJECTS.index("star")),
                                (colours, 0, 1 + [*COLOURS].index("yellow"))):  # fmt: skip
        assert (labels[1:3, :2] == cats).all() and (labels[1:3, 2:] == stars).all()
        assert (labels[[0, 3]] == 0).all()


def test_places_task(tokenizer):
    torch.manual_seed(0)
    task = PlacesTask(make_clip(tokenizer).text_encoder, tokenizer)
    shapes = {"tokens": (8, 77), "layout": (8, 2, 16), "mirrored": (8, 2, 16), "background": (8,), "told": (8,),
              "seen": (77,)}  # fmt: skip
    batch, _ = check_examples(task, 8, shapes)
    seen = torch.stack([task.examples(rngs(1, i))["seen"] for i in range(50)])
    assert 0.55 < seen[:, :24].float().mean() < 0.65 and seen[:, 24:].all()
    looked = []
    task.places.attention.register_forward_pre_hook(lambda layer, inputs: looked.append(inputs[1].shape[1]))
    task(batch)
    assert looked == [batch["seen"].sum()] and looked[0] < 77
    told = batch["told"]
    assert told.any() and not told.all()
    assert (batch["layout"] != batch["mirrored"]).flatten(1).any(dim=1)[told].all()
    assert torch.equal(batch["layout"][~told], batch["mirrored"][~told])
    for wanted, sides in (("layout", 1), ("mirrored", 0)):  # who knows the truth is told so
        answers = [F.one_hot(batch[wanted][:, i], n) * 9.0 for i, n in ((0, 1 + len(OBJECTS)), (1, 1 + len(COLOURS)))]
        task.places.forward = lambda context, answers=answers: (*answers, torch.zeros(8, 8))
        assert task(batch)["sides"] == sides


def test_places_reads_of_any_colour_but_of_nothing_that_is_held_out(tokenizer):
    """Also of blue dogs, which no picture shows; it names what it says, and says what it names."""
    dice = random.Random(0)
    pairs = [(scene, in_any_colour(scene, dice)) for scene in (random_scene(dice) for _ in range(1000))]
    assert all(split_of(new) == "train" and replace(new, things=old.things) == old for old, new in pairs)
    looks = {(thing.name, thing.colour) for _, new in pairs for thing in new.things}
    assert {name for name, colour in looks if colour} == {*OBJECTS} and not looks & HELD_OUT_COLOURS
    task = PlacesTask(make_clip(tokenizer).text_encoder, tokenizer)
    labels = task.examples(rngs(64))["layout"]
    natural = torch.tensor([name not in RECOLOURED for name in ("", *OBJECTS)])
    assert (labels[:, 1][natural[labels[:, 0]] & (labels[:, 0] > 0)] > 0).any()


def test_a_hint_is_what_the_middle_says_about_places(denoise):
    torch.manual_seed(0)
    parts = denoise.unet, denoise.text_encoder, denoise.tokenizer, denoise.latents, denoise.schedule
    task = HintedTask(*parts, hint=0.5)
    batch = task.examples(rngs(4))
    plain, hinted = denoise(batch), task(batch)
    assert torch.equal(plain["plain"], hinted["plain"])
    torch.testing.assert_close(hinted["loss"], plain["loss"] + 0.5 * hinted["hint"])
    hinted["hint"].backward()
    reached = {name.split(".")[0] for name, p in task.unet.named_parameters() if p.grad is not None}
    assert {"down", "middle"} <= reached and not reached & {"up", "conv_out"}  # nor what comes later
    task.zero_grad(set_to_none=True)
    truth = torch.stack([layout(numbered_scene(n)) for n in batch["number"].tolist()])
    objects, colours = (F.one_hot(truth[:, i], n) * 20.0 for i, n in ((0, 1 + len(OBJECTS)), (1, 1 + len(COLOURS))))
    said = torch.cat([objects, colours], dim=2).mT.unflatten(2, (4, 4))
    task.says.forward = lambda seen: said
    assert task(batch)["hint"] < 1e-3
    assert not task.unet.middle._forward_hooks
    with pytest.raises(KeyError):  # and after a failure
        task({name: x for name, x in batch.items() if name != "noise"})
    task.text_encoder.forward = lambda tokens: 1 / 0
    with pytest.raises(ZeroDivisionError):
        task(batch)
    del task.text_encoder.forward
    assert not task.unet.middle._forward_hooks


def test_guided_examples_are_pairs_with_words_and_without(denoise, tokenizer):
    task = GuidedTask(denoise.unet, denoise.text_encoder, tokenizer, denoise.latents, denoise.schedule)
    batch = task.examples(rngs(8))
    for name, x in batch.items():
        told, untold = x.chunk(2)
        assert name == "tokens" or torch.equal(told, untold)
    told, untold = batch["tokens"].chunk(2)
    assert (untold == tokenizer("")).all() and not (told == tokenizer("")).all(dim=1).any()
    halves = [task.examples(rngs(8)[:4]), task.examples(rngs(8)[4:])]  # two processes share the batch
    numbers = torch.cat([half["number"].chunk(2)[0] for half in halves])
    assert torch.equal(numbers, batch["number"].chunk(2)[0])


def test_the_guided_answer_counts_where_noise_is_weak(denoise):
    parts = denoise.unet, denoise.text_encoder, denoise.tokenizer, denoise.latents, denoise.schedule
    task = GuidedTask(*parts, scale=3.0, below=500, guided=0.5)
    target, t = torch.randn(2, 4, 16, 16).repeat(2, 1, 1, 1), torch.tensor([499, 500]).repeat(2)
    off = torch.tensor([0.1, 0.1, -0.1, -0.1]).view(4, 1, 1, 1)  # told too high, untold too low
    losses = task.losses(target + off, target, t)
    plain = denoise.losses(target + off, target, t)["loss"]
    guided = task.weights[499] * (-0.1 + 3.0 * 0.2) ** 2 / task.often[499] / 2  # nothing of the second example
    torch.testing.assert_close(losses["guided"], guided)
    torch.testing.assert_close(losses["loss"], plain + 0.5 * guided)
    batch = task.examples(rngs(16))
    losses = task(batch)
    assert (batch["t"] < 500).any() and losses["guided"] > 0
    torch.testing.assert_close(losses["loss"], losses["weighted"] + 0.05 * losses["hint"])


def test_joint_training_teaches_the_text_encoder_too(tokenizer):
    task = DenoiseTask(nn.Linear(1, 1), make_clip(tokenizer).text_encoder, tokenizer, torch.zeros(1), Schedule(),
                       joint=True)  # fmt: skip
    assert all(p.requires_grad for p in task.text_encoder.parameters())


def test_preview_draws_the_same_pictures_every_time(denoise):
    pictures = denoise.preview(PREVIEW[:2], steps=2)
    assert pictures.shape == (2, 3, 128, 128) and torch.equal(pictures, denoise.preview(PREVIEW[:2], steps=2))
