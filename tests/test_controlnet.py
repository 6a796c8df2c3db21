"""A ControlNet: a copy that is silent at first, files in every form, and its part in a drawing."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from full_model import fill
from PIL import Image
from random_model import SMALL_UNET, random_parts
from safetensors.torch import load_file, save_file

from sdlearn import cli
from sdlearn.checkpoint.dialects import rename
from sdlearn.checkpoint.inspect import inspect
from sdlearn.checkpoint.load import empty, save
from sdlearn.controlnet import (
    PREPROCESSORS,
    ControlNet,
    ControlNetConfig,
    control_from_json,
    control_rules,
    control_to_json,
    draw_boxes,
    edges,
    layout,
    plan,
    preprocess,
    scribble,
)
from sdlearn.pictures import read_parameters, upright
from sdlearn.pipeline import StableDiffusion
from sdlearn.request import Request
from sdlearn.samplers import SAMPLERS
from sdlearn.schedule import Schedule
from sdlearn.unet import UNet

HINTS = (4, 8, 8, 8)  # channels of a small pyramid
SIZE = 32


def page() -> Image.Image:
    lines = np.zeros((SIZE, SIZE, 3), np.uint8)
    lines[8], lines[:, 20] = 255, 255
    return Image.fromarray(lines)


@pytest.fixture(scope="module")
def sd():
    parts, _ = random_parts(size=SIZE)
    return StableDiffusion(*parts, device="cpu")


@pytest.fixture(scope="module")
def net(sd):
    """A ControlNet that is not silent."""
    return fill(ControlNet.of(sd.unet, HINTS), torch.Generator().manual_seed(0), torch.float32)


def inputs(count: int = 2) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    xt, context = torch.randn(count, 4, 4, 4, generator=g), torch.randn(count, 77, 32, generator=g)
    return xt, torch.arange(count) * 300, context, torch.rand(count, 3, SIZE, SIZE, generator=g)


def test_the_size_of_sd_1():
    net = empty(ControlNet, ControlNetConfig())
    assert sum(p.numel() for p in net.parameters()) == 361_279_120
    assert len(net.state_dict()) == 340


def test_a_new_one_is_a_copy_that_says_nothing(sd):
    net = ControlNet.of(sd.unet, HINTS)
    theirs = sd.unet.state_dict()
    shared = {name: x for name, x in net.state_dict().items() if name in theirs}
    assert len(shared) > 20 and all(torch.equal(x, theirs[name]) for name, x in shared.items())
    with torch.no_grad():
        maps = net(*inputs())
    skips = sum(1 for _ in sd.unet.down) + 1
    assert len(maps) == skips + 1 and all(not x.any() for x in maps)


def test_maps_fit_the_unet_and_one_hint_serves_all(sd, net):
    xt, t, context, hint = inputs()
    with torch.no_grad():
        maps = net(xt, t, context, hint[:1])
        each = net(xt, t, context, hint[:1].expand(2, -1, -1, -1))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, each, strict=True))
        plain, steered = sd.unet(xt, t, context), sd.unet(xt, t, context, residuals=maps)
    assert (plain - steered).abs().max() > 0.01


def test_in_the_first_step_only_the_zero_convolutions_learn(sd):
    net = ControlNet.of(sd.unet, HINTS)
    xt, t, context, hint = inputs()

    def learning() -> set[str]:
        net.zero_grad()
        sd.unet(xt, t, context, residuals=net(xt, t, context, hint)).square().mean().backward()
        return {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}

    assert learning() == {"zero_convs", "zero_middle"}
    with torch.no_grad():
        for conv in (*net.zero_convs, net.zero_middle):
            conv.weight += 0.01
    assert {"hint", "down", "conv_in", "middle"} <= learning()


@pytest.mark.parametrize("ldm", [False, True])
def test_names_of_sd_1(ldm):
    """By heart, from lllyasviel's files and diffusers'."""
    config = ControlNetConfig()
    names = empty(ControlNet, config).state_dict()
    theirs = {rename(name, control_rules(config, ldm)) for name in names}
    assert len(theirs) == 340
    if ldm:
        known = "input_hint_block.0.weight input_hint_block.2.bias input_hint_block.14.weight zero_convs.11.0.bias"
        known += " middle_block_out.0.weight time_embed.2.bias input_blocks.0.0.weight middle_block.1.norm.weight"
        known += " input_blocks.4.1.transformer_blocks.0.attn2.to_out.0.bias input_blocks.3.0.op.weight"
    else:
        known = "controlnet_cond_embedding.conv_in.weight controlnet_cond_embedding.blocks.5.bias conv_in.bias"
        known += " controlnet_cond_embedding.conv_out.weight controlnet_down_blocks.11.weight controlnet_mid_block.bias"
        known += " down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.bias mid_block.resnets.1.norm1.weight"
    assert set(known.split()) <= theirs


@pytest.mark.parametrize("name", ["folder", "x.safetensors", "x.ckpt"])
def test_saved_and_loaded(net, tmp_path, monkeypatch, name):
    if name != "folder":  # a file does not tell its sizes: SD 1's are those of this test
        monkeypatch.setattr("sdlearn.controlnet.ControlNetConfig", lambda: net.config)
    net.save(tmp_path / name, torch.float32)
    again = ControlNet.load(tmp_path / name)
    assert again.config == net.config and again.name == name.partition(".")[0]
    mine, theirs = net.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[n]) for n, x in mine.items())


def test_bare_and_inside_a_whole_model(net, tmp_path, monkeypatch):
    monkeypatch.setattr("sdlearn.controlnet.ControlNetConfig", lambda: net.config)
    net.save(tmp_path / "x.safetensors", torch.float32)
    tensors = load_file(tmp_path / "x.safetensors")
    save_file({n.removeprefix("control_model."): x for n, x in tensors.items()}, tmp_path / "bare.safetensors")
    whole = tensors | {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "cond_stage_model.transformer.x": torch.ones(1),
    }
    save_file(whole, tmp_path / "whole.safetensors")
    for name in ("bare", "whole"):
        again = ControlNet.load(tmp_path / f"{name}.safetensors")
        assert torch.equal(again.zero_middle.weight, net.zero_middle.weight)


def test_the_configuration_goes_there_and_back():
    for config in (ControlNetConfig(), ControlNetConfig(**vars(SMALL_UNET), hint_channels=HINTS)):
        assert control_from_json(control_to_json(config)) == config
    old = control_to_json(ControlNetConfig()) | {"attention_head_dim": 8}
    del old["conditioning_embedding_out_channels"], old["global_pool_conditions"]
    assert control_from_json(old) == ControlNetConfig()
    with pytest.raises(ValueError, match="channel_order is bgr, but sdlearn knows only 'rgb'"):
        control_from_json(old | {"controlnet_conditioning_channel_order": "bgr"})


# Drawing


def draw(sd, *extras, **more) -> np.ndarray:
    settings = {"steps": 4, "sampler": "ddim", "seed": 1} | more
    return np.array(sd.txt2img("a red apple", extras=extras, **settings)[0]).astype(int)


def test_scale_start_end(sd, net):
    plain, full = draw(sd), draw(sd, net.control(page()))
    assert abs(full - plain).max() > 5
    assert (draw(sd, net.control(page(), scale=0.0)) == plain).all()
    first, last = draw(sd, net.control(page(), end=0.5)), draw(sd, net.control(page(), start=0.5))
    assert (first != last).any() and (first != full).any() and (last != full).any()
    assert (draw(sd, net.control(page(), start=0.9, end=0.95)) == plain).all()  # in no step


@pytest.mark.parametrize("guess", [False, True])
@torch.no_grad()
def test_the_unet_hears_the_maps_times_the_scale(sd, net, guess):
    """Sign, size and order of what arrives; in guess mode only the prompt's half, the finest map least."""
    xt, t, context, _ = inputs()
    t[:] = 300
    heard: dict[str, list] = {}
    setup = sd.set_up(Request("a cat", seed=1))
    setup.network = lambda latents, t, **given: heard.update(given) or latents
    net.control(page(), -0.7, guess=guess)(sd, setup).network(xt, t, context=context)
    hint = torch.from_numpy(np.array(page())).permute(2, 0, 1)[None] / 255
    maps = net(xt, t, context, hint)
    factors = np.logspace(-1, 0, len(maps)) if guess else np.ones(len(maps))
    for mine, theirs, factor in zip(heard["residuals"], maps, factors, strict=True):
        torch.testing.assert_close(mine[1], -0.7 * float(factor) * theirs[1], atol=1e-5, rtol=1e-4)
        assert not mine[0].any() if guess else torch.allclose(mine[0], -0.7 * theirs[0], atol=1e-5)


def counted(sd, net, request_times: list[float], **how) -> list[bool]:
    control = net.control(page(), **how)
    levels = Schedule().levels(10)
    return [control.works_at(t, levels) for t in request_times or [level.t for level in levels[:-1]]]


def test_start_and_end_count_steps(sd, net):
    assert counted(sd, net, [], end=0.3) == [True] * 3 + [False] * 7
    assert counted(sd, net, [], start=0.25, end=0.75) == [False] * 3 + [True] * 4 + [False] * 3
    first, second = (level.t for level in Schedule().levels(10)[:2])
    between = (first + second) / 2  # the second look of a step belongs to the step
    assert counted(sd, net, [first, between, second], end=0.1) == [True, True, False]


def test_several_are_added(sd, net):
    half = net.control(page(), scale=0.5)
    assert abs(draw(sd, half, half) - draw(sd, net.control(page()))).max() <= 1
    assert (draw(sd, half) != draw(sd, half, half)).any()


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddim"])
def test_every_sampler_hears_it(sd, net, sampler):
    how = {"sampler": sampler, "steps": 3}
    assert (draw(sd, net.control(page(), end=0.7), **how) != draw(sd, **how)).any()


def test_guess_mode(sd, net):
    guess = net.control(page(), guess=True)
    assert guess.weights(13) == pytest.approx(np.logspace(-1, 0, 13))
    assert (draw(sd, guess) != draw(sd, net.control(page()))).any()
    alone = net.control(page(), guess=True)
    assert (draw(sd, alone, cfg_scale=1.0) != draw(sd, cfg_scale=1.0)).any()  # no other half to be told from
    assert (draw(sd, alone, guided_times=(500, 1000)) != draw(sd, alone)).any()
    with pytest.raises(ValueError, match="guess mode needs both halves"):
        draw(sd, guess, two_passes=True)


def test_pictures_do_not_depend_on_their_batch(sd, net):
    one = draw(sd, net.control(page()), seed=2)
    two = sd.txt2img("a red apple", steps=4, sampler="ddim", seed=1, n=2, control=[(net, page())])
    assert abs(np.array(two[1]).astype(int) - one).max() <= 1


def test_offload_and_two_passes_change_nothing(sd, net, monkeypatch):
    whole = draw(sd, net.control(page()))
    assert abs(draw(sd, net.control(page()), two_passes=True) - whole).max() <= 1
    monkeypatch.setattr(sd, "offload", True)
    assert abs(draw(sd, net.control(page())) - whole).max() <= 1


def test_a_hint_is_fitted_as_pictures_are(sd, net):
    large = page().resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST)
    wide = Image.new("RGB", (3 * SIZE, SIZE))
    wide.paste(page(), (SIZE, 0))  # its middle is what is looked at
    assert (draw(sd, net.control(wide)) == draw(sd, net.control(page()))).all()
    assert (draw(sd, net.control(large.convert("L"))) != draw(sd)).any()


def test_what_a_png_says(net):
    said = net.control(page(), 0.7, 0.0, 0.5, guess=True).said()
    assert said == {
        "ControlNet": "Model: unnamed, Weight: 0.7, Guidance Start: 0.0, Guidance End: 0.5, "
        "Control Mode: My prompt is more important"
    }
    made = net.control(preprocess(page(), "scribble")).said()["ControlNet"]
    assert made.startswith("Module: scribble, Model: unnamed,")


def test_a_png_tells_of_two_of_one_name(net):
    request = Request("x", seed=1, control=[(net, page(), 0.5), (net, page(), 0.7)])
    text = request.parameters(0, 8, 8, "m")
    assert 'ControlNet: "Model: unnamed, Weight: 0.5,' in text and 'ControlNet 2: "Model: unnamed, Weight: 0.7,' in text


WRONG = {  # what is given -> the sentence
    "nothing": ({"hint": None}, "control hint is of type NoneType; give a PIL picture"),
    "no file": ({"hint": "nowhere.png"}, "there is no picture at nowhere.png"),
    "scale": ({"scale": float("nan")}, "control scale is nan; give a finite number"),
    "text": ({"scale": "much"}, "control scale is 'much'; give a finite number"),
    "start": ({"start": -0.1}, "control start is -0.1; give a number from 0"),
    "end": ({"end": 1.5}, "control end is 1.5; give a number from 0"),
    "order": ({"start": 0.6, "end": 0.4}, "control begins at 0.6 and ends at 0.4 of the steps"),
    "guess": ({"guess": 1}, "control guess is 1; give True or False"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_cannot_be_meant(net, fault):
    given, sentence = WRONG[fault]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        net.control(**({"hint": page()} | given))


def test_another_family(sd, net):
    for change, sentence in {
        "channels": ({"channels": (32, 32), "heads": (2, 2)}, r"whose channels are \(32, 32\), but the model's are"),
        "context": ({"context_width": 48}, "whose context_width are 48, but the model's are 32"),
    }.values():
        other = ControlNet.of(UNet(replace(SMALL_UNET, **change)), HINTS)
        with pytest.raises(ValueError, match=sentence):
            draw(sd, other.control(page()))
    with pytest.raises(ValueError, match="makes a hint 4 times smaller"):
        draw(sd, ControlNet.of(sd.unet, (4, 8, 8)).control(page()))


# Hints


def test_edges_and_boxes():
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((200, 0, 0), (16, 24, 40, 48))
    found = np.array(edges(picture))[..., 0] > 0
    rows, columns = found.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 48, 16, 40)
    assert found.sum() == 4 * 24 - 1 and not found[30, 20]  # one corner touches no side
    box = np.array(layout(picture)).astype(int)
    assert (np.array(draw_boxes([(16, 24, 40, 48)], (64, 64))) == box).mean() > 0.97 and tuple(box[30, 20]) == (
        255,
        0,
        0,
    )
    thick = np.array(scribble(picture.resize((256, 256), Image.Resampling.NEAREST)))[..., 0]
    assert set(np.unique(thick)) == {0, 255} and 3 < (thick > 0).sum() / (4 * 96) < 8  # so many pixels wide


def test_a_layout_says_what_it_leaves_out():
    picture = Image.new("RGB", (280, 40), "white")
    for i in range(7):
        picture.paste("navy", (40 * i + 15, 5, 40 * i + 25, 35))
    with pytest.warns(UserWarning, match="room for 6 things, but the picture has 7: those farthest right are left out"):
        hint = layout(picture)
    assert len({colour for _, colour in hint.getcolors()}) == 7  # six, and the black ground


def test_things_far_apart_are_two_boxes():
    picture = Image.new("RGB", (128, 96), "blue")
    for left in (10, 80):
        picture.paste((255, 255, 0), (left, 20, left + 30, 70))
    hint = np.array(layout(picture))
    assert tuple(hint[40, 25]) == (255, 0, 0) and tuple(hint[40, 95]) == (0, 0, 255) and not hint[40, 60].any()


@pytest.mark.parametrize("how", PREPROCESSORS)
def test_a_picture_that_lies_on_its_side(how):
    """A camera's picture is turned as its EXIF data say: nothing of it is cut off."""
    picture, turn = Image.new("RGB", (96, 48), "white"), Image.Exif()
    picture.paste("red", (4, 10, 30, 38))
    picture.paste("blue", (66, 10, 92, 38))
    turn[0x0112] = 6
    with io.BytesIO() as file:
        picture.save(file, "PNG", exif=turn)
        camera = Image.open(io.BytesIO(file.getvalue()))
    assert camera.size == (96, 48) and upright(camera).size == (48, 96)
    hint = upright(preprocess(camera, how))
    assert hint.size == (48, 96) and hint.tobytes() == preprocess(upright(camera), how).tobytes()
    assert len(set(hint.get_flattened_data() if hasattr(hint, "get_flattened_data") else hint.getdata())) > 1


def test_a_folder_whose_name_has_a_point(net, tmp_path):
    net.save(tmp_path / "edges-v1.1")
    assert ControlNet.load(tmp_path / "edges-v1.1").name == "edges-v1.1"


def test_any_picture_becomes_a_hint():
    for picture in (Image.new("L", (5, 3)), Image.new("RGBA", (1, 1)), Image.new("I;16", (40, 7))):
        for how in PREPROCESSORS:
            assert preprocess(picture, how).size == picture.size
    with pytest.raises(ValueError, match="preprocess 'canny' is unknown; choose one of none, edges, scribble, layout"):
        preprocess(page(), "canny")


# The command line


@pytest.fixture(scope="module")
def folder(sd, net, tmp_path_factory):
    """A model, a ControlNet and a hint."""
    path = tmp_path_factory.mktemp("control")
    parts, _ = random_parts(size=SIZE)
    save(path / "sd", parts, torch.float32)
    net.save(path / "net", torch.float32)
    page().save(path / "page.png")
    return path


def test_drawn_from_the_command_line(folder, tmp_path, capsys):
    words = ["txt2img", "a red apple", "--model", folder / "sd", "--steps", "3", "--sampler", "ddim", "--seed", "1"]
    control = ["--control", folder / "net", "--hint", folder / "page.png", "--control-scale", "0.8"]
    drawn = {}
    for name, more in {"plain": [], "steered": control, "edges": [*control, "--preprocess", "edges"]}.items():
        path = tmp_path / f"{name}.png"
        assert cli.main([str(word) for word in (*words, *more, "-o", path)]) == 0
        drawn[name] = np.array(Image.open(path))
        said = read_parameters(path)
        assert ("ControlNet net" in said) == (name != "plain")
    assert said["ControlNet net"].startswith("Module: edges, Model: net, Weight: 0.8, ")
    assert (drawn["plain"] != drawn["steered"]).any() and (drawn["edges"] != drawn["steered"]).any()


def test_what_inspect_says(folder):
    report = inspect(folder / "net")
    assert report.description.startswith("ControlNet") and not report.but
    assert report.can == f'sdlearn txt2img "..." --control {folder / "net"} --hint PICTURE'


def test_what_is_no_controlnet(folder):
    for path, sentence in {
        folder / "sd" / "unet": "is a U-Net alone, but a ControlNet is wanted",
        folder / "nowhere": "there is no ControlNet at",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            plan(path)
