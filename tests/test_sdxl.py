"""SD 2, SDXL and its refiner: files, what they are told, what is refused. tests/parity compares them with diffusers."""

import copy
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from family import SIZES, family, save_single, shallow
from lora_files import random_lora
from PIL import Image
from random_model import random_parts, save_random_model
from safetensors.torch import save_file
from torch import nn

from sdlearn.checkpoint import hub
from sdlearn.checkpoint import load as loading
from sdlearn.checkpoint.adapters import layers_of
from sdlearn.checkpoint.configs import schedule_from_json, unet_from_json, unet_to_json
from sdlearn.checkpoint.dialects import why_ignored
from sdlearn.checkpoint.files import read_tensors
from sdlearn.checkpoint.inspect import inspect
from sdlearn.checkpoint.load import Parts, asked_prediction, build, empty, is_fast, kept, load, plan, save
from sdlearn.cli import main
from sdlearn.clip import CLIPTextEncoder
from sdlearn.controlnet import ControlNet
from sdlearn.inversion import Embedding, add_embedding, read_embedding, write_embedding
from sdlearn.lora import load_lora, save_lora
from sdlearn.pictures import read_parameters
from sdlearn.pipeline import StableDiffusion
from sdlearn.prediction import EPSILON, V
from sdlearn.request import Request
from sdlearn.schedule import Schedule, cosine, zero_terminal_snr
from sdlearn.sdxl import MicroConditioning, PartOfTheWay, scale_decoder
from sdlearn.unet import UNet, UNetConfig

KINDS = list(SIZES)
SLOW = pytest.mark.slow
COUNTS = {
    "SD 2": {"unet": (865_910_724, 686), "text_encoder": (340_387_840, 372)},
    "SDXL": {"unet": (2_567_463_684, 1680), "text_encoder_2": (694_659_840, 517)},
    "SDXL refiner": {"unet": (2_259_526_660, 1220), "text_encoder_2": (694_659_840, 517)},
}
FEW = {"steps": 2, "cfg_scale": 3.0, "sampler": "ddim", "seed": 0}


@pytest.fixture(scope="module")
def models():
    return {kind: StableDiffusion(*family(kind, deep=False), "cpu", torch.float32) for kind in KINDS}


class Files(dict):
    """Each kind as its makers' file, and its parts; written when it is asked for."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, kind):
        parts = family(kind, clip=True, deep=False)
        self[kind] = save_single(self.folder / f"{kind}.safetensors", parts, kind), parts
        return self[kind]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("files"))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_the_real_sizes(kind):
    for part, wanted in COUNTS[kind].items():
        make = UNet if part == "unet" else CLIPTextEncoder
        state = empty(make, getattr(loading.SIZES[kind], part)).state_dict()
        assert (sum(x.numel() for x in state.values()), len(state)) == wanted


# --- files
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_back(tmp_path, kind):
    parts = family(kind, deep=False)
    save(tmp_path, parts, torch.float32)
    loaded = load(tmp_path)
    assert loaded.networks.keys() == parts.networks.keys()
    for name, part in parts.networks.items():
        if isinstance(part, nn.Module):
            assert same(loaded.networks[name], part) and loaded.networks[name].config == part.config
        else:
            assert loaded.networks[name].pad == part.pad and loaded.networks[name].vocab == part.vocab
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert ("XL" in index["_class_name"]) == (kind != "SD 2") and ("Img2Img" in index["_class_name"]) == ("ref" in kind)
    assert index["text_encoder"][0] == (None if "refiner" in kind else "transformers")
    report = inspect(tmp_path)
    how = 'img2img "..." --image FILE' if "refiner" in kind else 'txt2img "..."'
    assert report.can == f"sdlearn {how} --model {tmp_path}" and not report.but


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_read(files, kind):
    path, parts = files[kind]
    loaded = build(plan(path, sizes=shallow(SIZES[kind])), dtype=None)
    assert loaded.networks.keys() == parts.networks.keys()
    for name, part in parts.networks.items():
        if isinstance(part, nn.Module):
            assert same(loaded.networks[name], part)
        else:
            assert loaded.networks[name]("a cat").tolist() == part("a cat").tolist()


def test_padding_differs(models):
    pads = {(kind, name): part.pad for kind, sd in models.items() for name, part in sd.parts.items() if "tok" in name}
    ends = {key for key, pad in pads.items() if pad != 0}
    assert ends == {("SDXL", "tokenizer")} and len(pads) == 4


@pytest.mark.slow
def test_what_a_file_says_of_its_answers(tmp_path, files):
    sizes = shallow(SIZES["SD 2"])
    for said, prediction in (("v", V), ("epsilon", EPSILON), (None, None)):
        about = {"modelspec.prediction_type": said} if said else None
        path = save_single(tmp_path / "x.safetensors", files["SD 2"][1], "SD 2", about)
        assert plan(path, sizes=sizes).prediction is prediction
        assert f"({said or 'base or v: its tensors do not say'})" in inspect(path).description
    path = save_single(
        tmp_path / "x.safetensors", files["SDXL"][1], "SDXL", v_pred=torch.zeros(0), ztsnr=torch.zeros(0)
    )
    found = plan(path, sizes=shallow(SIZES["SDXL"]))
    assert found.prediction is V and torch.equal(found.schedule.betas, zero_terminal_snr(Schedule().betas))
    assert "v_prediction" in inspect(path).description
    assert plan(files["SDXL"][0], sizes=shallow(SIZES["SDXL"])).prediction is EPSILON


class Answering(nn.Module):
    """A U-Net of known answers: to noise with a bit of a picture."""

    def __init__(self, prediction):
        super().__init__()
        self.config, self.conv_in, self.prediction = SIZES["SD 2"].unet, nn.Conv2d(4, 8, 3), prediction

    def forward(self, xt, t, context):
        level = Schedule().at(float(t))
        x0 = 0.3 * torch.ones_like(xt)
        eps = (xt - level.alpha * x0) / level.sigma
        return self.prediction.target(x0, eps, level)


def test_the_unet_is_asked_whether_it_answers_noise_or_v(tiny_unet):
    assert asked_prediction(tiny_unet) is EPSILON
    for prediction in (EPSILON, V):
        assert asked_prediction(Answering(prediction)) is prediction


@pytest.fixture(scope="module")
def tiny_unet():
    from repository import ROOT

    return loading.load_unet(ROOT / "checkpoints" / "tiny")


@pytest.mark.slow
def test_a_single_file_of_sd_2_takes_the_size_of_its_answers(files, monkeypatch):
    path, _ = files["SD 2"]
    for prediction, side in ((V, 768), (EPSILON, 512)):
        monkeypatch.setattr(loading, "asked_prediction", lambda unet, found=prediction: found)
        loaded = build(plan(path, sizes=shallow(SIZES["SD 2"])))
        assert loaded.prediction is prediction and loaded.size == (side, side)


def test_what_is_left_aside():
    for name in ("cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection", "denoiser.sigmas",
                 "cond_stage_model.model.transformer.resblocks.23.mlp.c_fc.weight", "v_pred", "ztsnr",
                 "conditioner.embedders.1.model.logit_scale", "conditioner.embedders.0.logit_scale"):  # fmt: skip
        assert why_ignored(name), name
    for name in ("conditioner.embedders.1.model.text_projection", "my_v_pred",
                 "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight"):  # fmt: skip
        assert why_ignored(name) is None, name


@pytest.mark.parametrize("change, sentence", [
    ({"conditioner.embedders.1.model.ln_final.bias": None}, "lacks the tensor conditioner.embedders.1.model.ln_f"),
    ({"conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight": None}, "attn.q_proj.weight"),
    ({"conditioner.embedders.1.model.more": (3,)}, "no part of the model takes, conditioner.embedders.1.model.more"),
    ({"surprise": (3,)}, "no part takes, surprise: it is not a plain SDXL checkpoint"),
    ({"conditioner.embedders.1.model.text_projection": (40, 8)}, r"\(8, 40\) of float32, but .* \(40, 40\)"),
    ({"model.diffusion_model.label_emb.0.0.weight": None}, "lacks the tensor model.diffusion_model.label_emb.0.0.weig"),
    ({"model.diffusion_model.input_blocks.0.0.weight": (16, 8, 3, 3)}, "is an SDXL model for instruct-pix2pix, but a"),
    ({"model.diffusion_model.time_embed.cond_proj.weight": (8, 8)}, r"cond_proj.weight is .*, but .* \(16, 8\)"),
])  # fmt: skip
def test_single_files_are_strict(tmp_path, files, change, sentence):
    tensors = dict(read_tensors(files["SDXL"][0]))
    for name, shape in change.items():
        tensors.pop(name, None)
        tensors |= {name: torch.zeros(shape)} if shape else {}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=sentence):
        plan(tmp_path / "x.safetensors", sizes=shallow(SIZES["SDXL"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SD 2", "SDXL"])
def test_inpainting_models(tmp_path, files, kind):
    """Nine channels, in a file and in a folder: they draw with a mask, and with nothing else."""
    tensors = dict(read_tensors(files[kind][0]))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[name] = torch.cat([tensors[name], 0.1 * torch.ones(16, 5, 3, 3)], dim=1)
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = build(plan(tmp_path / "x.safetensors", sizes=shallow(SIZES[kind])), dtype=None)
    sd = StableDiffusion(*loaded, "cpu", torch.float32)
    image, mask = Image.radial_gradient("L").convert("RGB").resize((64, 64)), Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    size = {"width": 64, "height": 64}
    with pytest.raises(ValueError, match="this model was made for inpainting, its U-Net takes 9 channels"):
        sd.txt2img("a cat", **size, **FEW)
    drawn, other = (np.asarray(sd.inpaint(x, image, mask, **size, **FEW)[0]).astype(int) for x in ("a cat", "a dog"))
    hole = np.asarray(mask) > 0
    assert (drawn[~hole] == np.asarray(image)[~hole]).all() and (drawn[hole] != np.asarray(image)[hole]).any()
    assert (drawn != other).any()
    sd.save(tmp_path / "folder", torch.float32)
    xl = "XL" if kind == "SDXL" else ""
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == f"StableDiffusion{xl}InpaintPipeline"
    assert inspect(tmp_path / "folder").can.startswith('sdlearn inpaint "..." --image FILE --mask FILE')
    assert same(load(tmp_path / "folder").networks["unet"], sd.unet)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_written(tmp_path, files, kind):
    """The same tensors under the same names as in its makers' file, without what nobody reads; and v and zero SNR."""
    theirs, parts = files[kind]
    save(tmp_path / "x.safetensors", parts, None)
    mine, wanted = (dict(read_tensors(x)) for x in (tmp_path / "x.safetensors", theirs))
    assert mine.keys() == {name for name in wanted if not why_ignored(name)}
    assert all(torch.equal(mine[name], wanted[name]) for name in mine)
    betas = zero_terminal_snr(Schedule().betas)
    save(tmp_path / "v.ckpt", parts._replace(prediction=V, schedule=Schedule(betas)), None)
    found = plan(tmp_path / "v.ckpt", sizes=shallow(SIZES[kind]))
    assert found.prediction is V and torch.equal(found.schedule.betas, betas)
    assert found.size == ((768, 768) if kind == "SD 2" else (512, 512))


def test_single_files_that_nobody_could_read(tmp_path, models):
    for kind, sd in models.items():
        parts = Parts(sd.parts, sd.schedule, sd.prediction)
        cosine_betas = Schedule(cosine(1000))
        with pytest.raises(ValueError, match=f"a single file of {kind} cannot say that this model has another"):
            save(tmp_path / "x.safetensors", parts._replace(schedule=cosine_betas))
        name = max(x for x in sd.parts if x.startswith("text_encoder"))
        other = CLIPTextEncoder(replace(sd.parts[name].config, exact_gelu=False))
        less = {x: part for x, part in sd.parts.items() if x != name}
        for networks in (less, sd.parts | {name: other}):
            with pytest.raises(ValueError, match="holds an SD 1, SD 2 or SDXL, but this model has other parts: save"):
                save(tmp_path / "x.safetensors", parts._replace(networks=networks))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, sentence", [
    ({"addition_embed_type": "text"}, "addition_embed_type is 'text', but sdlearn knows only 'text_time'"),
    ({"addition_time_embed_dim": 128}, "knows only 'text_time' with 256 waves an id"),
    ({"projection_class_embeddings_input_dim": None}, "projection_class_embeddings_input_dim is None"),
    ({"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block has 2 entries, but block_out_channels"),
    ({"transformer_layers_per_block": [1, [2, 2], 10]}, "transformer_layers_per_block is .*, but a list of whole"),
    ({"reverse_transformer_layers_per_block": [1, 2, 3]}, "reverse_transformer_layers_per_block is"),
    ({"use_linear_projection": "yes"}, "use_linear_projection is 'yes', but true or false"),
])  # fmt: skip
def test_configurations_that_cannot_be_honoured(change, sentence):
    content = unet_to_json(SIZES["SDXL"].unet, 128)
    assert unet_from_json(content) == replace(SIZES["SDXL"].unet, zeros=False)  # which stands in model_index.json
    with pytest.raises(ValueError, match=f"^unet config: .*{sentence}"):
        unet_from_json(content | change)


@pytest.mark.slow
def test_a_folder_lacks_a_text_encoder(tmp_path):
    save(tmp_path, family("SDXL", deep=False), torch.float32)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for absent, sentence in (("text_encoder", "there is text_encoder_2, with a pooled text of width 40, but the"),
                             ("text_encoder_2", "there is text_encoder, with a pooled text of width 0")):  # fmt: skip
        (tmp_path / "model_index.json").write_text(json.dumps(index | {absent: [None, None]}))
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path)
    index["force_zeros_for_empty_prompt"] = False
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load(tmp_path).networks["unet"].config.zeros is False


def test_a_vae_that_overflows_stays_in_32_bits(tmp_path):
    save(tmp_path, family("SDXL", deep=False), torch.float16)
    sd = StableDiffusion.load(tmp_path, "cpu", torch.float16)
    assert {name: next(part.parameters()).dtype for name, part in sd.networks().items()} == {
        "text_encoder": torch.float16, "text_encoder_2": torch.float16, "unet": torch.float16, "vae": torch.float32,
    }  # fmt: skip
    assert np.asarray(sd.decode(torch.randn(1, 4, 8, 8))[0]).std() > 5
    assert sd.encode_image(torch.zeros(1, 3, 64, 64), [torch.Generator()]).isfinite().all()
    assert kept(sd.vae, torch.bfloat16) is torch.bfloat16 and kept(sd.unet, torch.float16) is torch.float16


@pytest.mark.slow
def test_all_parts_count_before_the_first_is_read(files, monkeypatch):
    path, parts = files["SDXL"]
    found = plan(path, sizes=shallow(SIZES["SDXL"]))
    need = sum(x.nbytes for part in parts.networks.values() if isinstance(part, nn.Module) for x in part.parameters())
    for device, advice in (("cpu", "are free: close other"), ("cuda", "are free: add --offload, close other")):
        monkeypatch.setattr(loading, "free_memory", lambda device: need - 1)
        with pytest.raises(ValueError, match=advice):
            build(found, "x", torch.float32, device)


# --- what it is told
def test_an_empty_negative_prompt_is_zeros_where_the_unet_was_trained_so(models):
    told = {"negative_prompt": ["", "blurry"], "n": 2, "seed": 0, "latents": torch.zeros(4, 4, 8, 8)}
    for kind, sd in models.items():
        cond, uncond = sd.told(Request(["a cat", "a dog"], **told))
        empty_rows = [not x.any() for x in uncond["context"]]
        assert empty_rows == ([True, True, False, False] if kind == "SDXL" else [False] * 4)
        assert cond["context"].any(dim=-1).all()
        if kind != "SD 2":
            assert [not x.any() for x in uncond["pooled"]] == empty_rows
        without = sd.told(Request(["a cat", "a dog"], cfg_scale=1, **told))
        assert without[1] is None and without[0].keys() == cond.keys()


def test_the_ids(models):
    request = Request("a cat", width=80, height=64, seed=0)
    cond, uncond = models["SDXL"].told(request)
    assert cond["ids"].tolist() == uncond["ids"].tolist() == [[64, 80, 0, 0, 64, 80]]
    refiner = models["SDXL refiner"]
    cond, uncond = refiner.told(replace(request, latents=torch.zeros(1, 4, 8, 10)))
    assert cond["ids"].tolist() == [[64, 80, 0, 0, 6]] and uncond["ids"].tolist() == [[64, 80, 0, 0, 2.5]]
    extra = MicroConditioning((512, 768), (0, 64), (100, 200))
    setup = models["SDXL"].set_up(replace(request, extras=[extra], cfg_scale=1.0))
    assert setup.told[0]["ids"].tolist() == [[512, 768, 0, 64, 100, 200]] and setup.told[1] is None
    assert extra.said() == {"Original size": "768x512", "Crop top left": "0,64"}
    assert set(MicroConditioning().said().values()) == {None}


def test_ids_and_pooled_change_the_answer(models):
    sd = models["SDXL"]
    told, dice = sd.told(Request("a cat", seed=0))[0], torch.Generator().manual_seed(0)
    xt = torch.randn(1, 4, 8, 8, generator=dice)
    with torch.no_grad():
        answer = sd.unet(xt, 500, **told)
        for i in range(6):
            ids = told["ids"].clone()
            ids[0, i] += 32
            assert (sd.unet(xt, 500, **told | {"ids": ids}) - answer).abs().max() > 1e-4, i
        assert (sd.unet(xt, 500, **told | {"pooled": -told["pooled"]}) - answer).abs().max() > 1e-3


def test_what_the_unet_refuses(models):
    sd = models["SDXL"]
    told, xt = sd.told(Request("a cat", seed=0))[0], torch.zeros(1, 4, 8, 8)
    wrong = {"ids": told["ids"][:, :5], "pooled": told["pooled"][:, :8]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=r"this U-Net reads 1576 = pooled \+ 256 x ids"):
            sd.unet(xt, 1, **told | {name: value})
    with pytest.raises(ValueError, match="pooled is 0 wide and there are 0 ids"):
        sd.unet(xt, 1, told["context"])
    with pytest.raises(ValueError, match="but this U-Net reads 0 = pooled"):
        models["SD 2"].unet(xt, 1, torch.zeros(1, 77, 32), pooled=told["pooled"], ids=told["ids"])
    with pytest.raises(ValueError, match=r"channels, attention, heads, depth have \(2, 2, 2, 3\) entries"):
        UNetConfig((32, 64), (True, True), (1, 1), depth=(1, 1, 1))


def test_parts_that_do_not_fit(models):
    xl, plain = models["SDXL"], StableDiffusion(*random_parts()[0], "cpu")
    for parts, sentence in (
        ({k: x for k, x in xl.parts.items() if k != "text_encoder_2"}, "there is text_encoder, with a pooled text of"),
        ({k: x for k, x in xl.parts.items() if k != "text_encoder"}, "there is text_encoder_2, with a pooled text of"),
        (xl.parts | {"unet": models["SDXL refiner"].unet}, "there is text_encoder, text_encoder_2, with a pooled"),
        (xl.parts | {"unet": plain.unet}, "do not fit: take all"),
        ({k: x for k, x in plain.parts.items() if k != "text_encoder"}, "there is no text encoder, with a pooled"),
        (models["SDXL refiner"].parts | {"unet": UNet(UNetConfig((16,), (True,), (1,), context_width=40, groups=8))},
         "there is text_encoder_2, with a pooled text of width 40, but the U-Net reads 40 for words and 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(sentence)):
            StableDiffusion(parts, Schedule(), device="cpu")


def test_clip_skip(models):
    sd = models["SDXL"]
    assert not torch.equal(sd.encode(["a cat"], 1)["context"], sd.encode(["a cat"])["context"])
    assert torch.equal(sd.encode(["a cat"], 1)["pooled"], sd.encode(["a cat"])["pooled"])
    with pytest.raises(ValueError, match="skip is 2: choose 0 to 1, the number of layers to leave out beside the last"):
        sd.encode(["a cat"], 2)


# --- base and refiner
def test_a_refiner_begins_nothing(models):
    with pytest.raises(ValueError, match="this model is a refiner, which goes on with what another has begun"):
        models["SDXL refiner"].txt2img("a cat", **FEW)
    picture = models["SDXL"].txt2img("a cat", **FEW)[0]
    assert np.asarray(models["SDXL refiner"].img2img("a cat", picture, **FEW)[0]).std() > 5


@pytest.mark.parametrize("at", [0.5, *(pytest.param(at, marks=SLOW) for at in (0.1, 0.75, 0.99))])
def test_two_parts_of_the_way_are_the_whole(models, at):
    """With one model in both parts there is no seam, since no noise is added in between."""
    sd, how = models["SDXL"], FEW | {"steps": 20, "cfg_scale": 1.0}
    whole = sd.txt2img("a cat", **how)[0]
    *_, end = sd.steps("a cat", extras=[PartOfTheWay(end=at)], **how)
    *_, rest = sd.steps("a cat", latents=end.latents, extras=[PartOfTheWay(begin=at)], **how)
    assert end.total + rest.total == 20 and np.array_equal(np.asarray(whole), np.asarray(rest.images()[0]))


@pytest.mark.parametrize("sampler", ["ddpm", "euler_a", "lcm"])
def test_the_dice_of_the_second_part_go_on(models, sampler):
    """The noise that the first part rolled is not rolled again; each picture has dice of its own."""
    sd, how = models["SDXL"], FEW | {"steps": 5, "cfg_scale": 1.0, "sampler": sampler, "n": 2}
    whole = sd.txt2img("a cat", **how)
    *_, end = sd.steps("a cat", extras=[PartOfTheWay(end=0.5)], **how)
    *_, rest = sd.steps("a cat", latents=end.latents, extras=[PartOfTheWay(begin=0.5)], **how)
    assert [x.tobytes() for x in rest.images()] == [x.tobytes() for x in whole]


@pytest.mark.parametrize("make, sentence", [
    (lambda: PartOfTheWay(0.5, 0.5), "a part of the way from 0.5 to 0.5 has no length; begin before the end"),
    (lambda: PartOfTheWay(end=1.5), "end is 1.5; give a number from 0 to 1"),
    (lambda: PartOfTheWay(begin="x"), "begin is 'x'; give a number from 0 to 1"),
    (lambda: PartOfTheWay(begin=float("nan")), "begin is nan; give a number from 0 to 1"),
    (lambda: MicroConditioning(original=512), "original is 512; give two whole numbers from 1 to 65536, the vertical"),
    (lambda: MicroConditioning(original=(0, 1)), r"original is \(0, 1\); give two whole numbers from 1"),
    (lambda: MicroConditioning(crop=(-1, 0)), r"crop is \(-1, 0\); give two whole numbers from 0"),
    (lambda: MicroConditioning(crop=(1.5, 0)), r"crop is \(1.5, 0\); give two whole numbers"),
    (lambda: MicroConditioning(crop=(1, 2, 3)), r"crop is \(1, 2, 3\); give two whole numbers"),
    (lambda: MicroConditioning(target="1024x1024"), "target is '1024x1024'; give two whole numbers"),
    (lambda: MicroConditioning(score=11), "score is 11; give a number from 0 to 10"),
    (lambda: MicroConditioning(negative_score=None), "negative_score is None; give a number from 0 to 10"),
])  # fmt: skip
def test_settings_that_cannot_be_meant(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_extras_that_do_not_fit(models):
    sd = models["SDXL"]
    for extra, sentence in (
        (PartOfTheWay(begin=0.5), "begins at 0.5, but there are no latents to go on with; give those that another"),
        (PartOfTheWay(end=0.001), "none of the 2 steps lies between 0.0 and 0.001 of the way; take more steps"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sd.txt2img("a cat", extras=[extra], **FEW)
    with pytest.raises(ValueError, match="this model is told no sizes; leave MicroConditioning out"):
        models["SD 2"].txt2img("a cat", extras=[MicroConditioning()], **FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SD 2", "SDXL"])
def test_batches_passes_and_offload_draw_the_same(models, kind):
    sd = models[kind]
    both = sd.txt2img(["a cat", "a dog"], negative_prompt=["", "x"], **FEW)
    alone = [
        sd.txt2img(p, negative_prompt=x, **FEW | {"seed": i})[0]
        for i, (p, x) in enumerate([("a cat", ""), ("a dog", "x")])
    ]
    twice = sd.txt2img(["a cat", "a dog"], negative_prompt=["", "x"], two_passes=True, **FEW)
    moved = StableDiffusion(sd.parts, sd.schedule, sd.prediction, sd.size, "", "cpu", torch.float32, offload=True)
    others = [alone, twice, moved.txt2img(["a cat", "a dog"], negative_prompt=["", "x"], **FEW)]
    for pictures in others:
        for a, b in zip(both, pictures, strict=True):
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    assert not np.array_equal(np.asarray(both[0]), np.asarray(both[1]))


# --- what is added to a model
def test_a_lora_changes_both_text_encoders(tmp_path, models):
    networks = {name: copy.deepcopy(x) for name, x in models["SDXL"].networks().items()}
    lora = random_lora(networks, alpha=None)
    parts = {name.partition(".")[0] for name in lora.layers}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    for form in ("kohya", "diffusers"):
        path = tmp_path / f"{form}.safetensors"
        save_lora(path, lora, form, torch.float32)
        found = load_lora(path, networks)
        assert dict(found.items()).keys() == dict(lora.items()).keys()
        for (_, a), (_, b) in zip(sorted(found.items()), sorted(lora.items()), strict=True):
            assert torch.equal(a.delta(), b.delta())
        assert inspect(path).can.startswith('sdlearn txt2img "..." --lora')
    layer = "text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    assert {f"lora_te_{layer}", f"lora_te2_{layer}"} <= read_tensors(tmp_path / "kohya.safetensors").keys()
    with pytest.raises(ValueError, match="that size|another model|is a LoRA for SDXL, but this model is"):
        load_lora(path, models["SD 2"].networks())


def test_a_word_of_another_family_is_not_taken(models):
    for kind, width in (("SDXL", 24), ("SDXL refiner", 40)):
        with pytest.raises(ValueError, match="'<toy>' is a word for SD 1 or SD 2, but this model is SDXL: leave"):
            add_embedding(models[kind], Embedding("<toy>", torch.zeros(1, width)))
    with pytest.raises(ValueError, match="'<toy>' is a word for SDXL, but this model is SD 1 or SD 2: leave"):
        add_embedding(models["SD 2"], Embedding("<toy>", torch.zeros(1, 32), torch.zeros(1, 40)))


@pytest.mark.parametrize("name", ["toy.safetensors", "toy.bin", "toy.pt"])
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=["one vector", "one row", "three rows"])
def test_a_word_for_both_text_encoders(tmp_path, name, shape):
    kept = family("SDXL", deep=False)
    sd, before = (StableDiffusion(*copy.deepcopy(kept), "cpu", torch.float32) for _ in range(2))
    first, second = (torch.randn(*shape, width, generator=torch.Generator().manual_seed(1)) for width in (24, 40))
    if shape:
        write_embedding(tmp_path / name, Embedding("<toy>", first, second))
    else:  # as some write it
        (save_file if name.endswith("s") else torch.save)({"clip_g": second, "clip_l": first}, tmp_path / name)
    word = read_embedding(tmp_path / name, "<toy>")
    assert torch.equal(word.vectors, first.reshape(-1, 24)) and torch.equal(word.second, second.reshape(-1, 40))
    assert read_embedding(tmp_path / name).token == "toy"
    add_embedding(sd, word)
    for part, rows in (("text_encoder", word.vectors), ("text_encoder_2", word.second)):
        table = sd.parts[part].token_embedding.weight
        assert torch.equal(table[: -len(rows)], before.parts[part].token_embedding.weight)
        assert torch.equal(table[-len(rows) :], rows)
    old, new = ["a cat above a yellow star", "", "toy"], ["a <toy> above a cat"]
    for mine, theirs in zip(sd.encode(old).values(), before.encode(old).values(), strict=True):
        assert torch.equal(mine, theirs)
    told, untold = sd.encode(new), before.encode(new)
    assert not torch.equal(told["context"][..., :24], untold["context"][..., :24])
    assert not torch.equal(told["context"][..., 24:], untold["context"][..., 24:])
    assert not torch.equal(told["pooled"], untold["pooled"])
    sd.save(tmp_path / "new", torch.float32)
    again = StableDiffusion.load(tmp_path / "new", "cpu").encode(new)
    assert all(torch.equal(again[part], told[part]) for part in told)


def test_a_refiner_takes_its_half_of_a_word_and_a_wrong_half_changes_nothing():
    refiner, base = (
        StableDiffusion(*family(kind, deep=False), "cpu", torch.float32) for kind in ("SDXL refiner", "SDXL")
    )
    add_embedding(refiner, Embedding("<toy>", torch.ones(2, 24), torch.ones(2, 40)))
    assert torch.equal(refiner.text_encoder_2.token_embedding.weight[-2:], torch.ones(2, 40))
    before = {part: base.parts[part] for part in ("tokenizer", "tokenizer_2")}
    tables = [base.parts[part].token_embedding for part in ("text_encoder", "text_encoder_2")]
    with pytest.raises(ValueError, match="'<toy>' have 39 numbers, but this model's words have 40"):
        add_embedding(base, Embedding("<toy>", torch.ones(2, 24), torch.ones(2, 39)))
    assert all(base.parts[part] is x for part, x in before.items())
    assert [base.parts[part].token_embedding for part in ("text_encoder", "text_encoder_2")] == tables


# --- the command line
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, its refiner, and a model of another family."""
    here = tmp_path_factory.mktemp("folders")
    for kind, name in (("SDXL", "base"), ("SDXL refiner", "refiner"), ("SD 2", "sd2")):
        save(here / name, family(kind, deep=False), torch.float32)
    return here


def run(folder, *words, model="base"):
    few = ["--steps", "10", "--cfg-scale", "2", "--sampler", "ddim", "--seed", "0", "--device", "cpu"]
    return main(["txt2img", "a cat", "--model", str(folder / model), *few, *words])


@pytest.mark.slow
def test_drawing_with_sdxl(folders, tmp_path, capsys):
    said = {}
    for name, words in {
        "plain": [],
        "told": ["--crop", "0", "64", "--original-size", "512", "768"],
        "refined": ["--refiner", str(folders / "refiner")],
    }.items():
        path = tmp_path / f"{name}.png"
        assert run(folders, "-o", str(path), *words) == 0, capsys.readouterr().err
        said[name] = read_parameters(path), np.asarray(Image.open(path))
    assert said["told"][0]["Crop top left"] == "0,64" and said["told"][0]["Original size"] == "768x512"
    assert said["refined"][0]["Refiner switch at"] == "0.8" and said["refined"][0]["Model"] == "base and refiner"
    assert len({pixels.tobytes() for _, pixels in said.values()}) == 3


@pytest.mark.parametrize("words, sentence", [
    (["--refiner", "nowhere"], "there is no model at nowhere"),
    (["--refiner", "sd2"], "sd2 has other latents than base: give a model of the same family to go on with them"),
    (["--refine-at", "0.8"], "--refine-at says when a refiner begins: name it with --refiner"),
    (["--refiner", "refiner", "--refine-at", "0.95", "--steps", "4", "--spacing", "trailing"],
     "none of the 4 steps lies between 0.95 and 1.0 of the way"),
    (["--refiner", "refiner", "--refine-at", "1.5"], "end is 1.5; give a number from 0 to 1"),
    (["--refiner", "refiner", "--refine-at", "0"], "a part of the way from 0.0 to 0.0 has no length"),
    (["--crop", "-1", "0"], "crop is (-1, 0); give two whole numbers from 0"),
    (["--original-size", "0", "5"], "original is (0, 5); give two whole numbers from 1"),
    (["--width", "100"], "width is 100; give a multiple of 8"),
])  # fmt: skip
def test_wrong_words(folders, tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(folders)
    assert run(Path(), "-o", str(tmp_path / "x.png"), *words) == 2
    said = capsys.readouterr().err
    assert sentence in said.splitlines()[-1] and not (tmp_path / "x.png").exists()
    assert "step/s" not in said  # nothing was drawn in vain


def test_times_of_its_own_are_no_way_for_two(folders, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    words = ["-i", tmp_path / "x.png", "--model", folders / "base", "--refiner", folders / "refiner"]
    assert main(["img2img", "a cat", *map(str, words), "--sampler", "lcm", "-o", str(tmp_path / "y.png")]) == 2
    assert "with an image the sampler lcm has times of its own" in capsys.readouterr().err


def test_a_mask_is_for_the_base(folders, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["inpaint", "a cat", "-i", "x.png", "--mask", "y.png", "--refiner", str(folders / "refiner")])
    assert "unrecognized arguments: --refiner" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_made_for_the_base_is_not_given_to_the_refiner(tmp_path, capsys, monkeypatch):
    """A LoRA, a word and a ControlNet; what is told of sizes goes to both."""
    save_random_model(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "refiner")
    sd = StableDiffusion.load(tmp_path / "base", "cpu", torch.float32)
    (tmp_path / "base" / "lora").mkdir()
    save_lora(tmp_path / "base" / "lora" / "x.safetensors", random_lora(sd.networks()))
    write_embedding(tmp_path / "toy.safetensors", Embedding("<toy>", torch.ones(1, 32)))
    ControlNet.of(sd.unet).save(tmp_path / "net")
    Image.radial_gradient("L").save(tmp_path / "hint.png")
    seen, drawing = [], StableDiffusion.draw

    def draw(sd, request):
        merged = any("original" in vars(layer) for layer in layers_of(sd.networks()).values())
        ends = [(x.begin, x.end) for x in request.extras if isinstance(x, PartOfTheWay)]
        seen.append((sd.name, request.prompt, merged, len(sd.tokenizer), len(request.control), ends))
        return drawing(sd, request)

    monkeypatch.setattr(StableDiffusion, "draw", draw)
    words = ["--lora", "x:0.5", "--embedding", tmp_path / "toy.safetensors", "--control", tmp_path / "net"]
    words += ["--hint", tmp_path / "hint.png", "--refiner", tmp_path / "refiner", "--refine-at", "0.5"]
    words += ["--model", tmp_path / "base", "--steps", "4", "--device", "cpu", "-o", tmp_path / "x.png"]
    assert main(["txt2img", "a <toy>", *map(str, words)]) == 0, capsys.readouterr().err
    known, prompt = len(sd.tokenizer), ("a <toy>",)
    assert seen == [
        ("base", prompt, True, known + 1, 1, [(0, 0.5)]),
        ("base and refiner", prompt, False, known, 0, [(0.5, 1)]),
    ]
    told = read_parameters(tmp_path / "x.png")
    assert told["prompt"] == "a <toy> <lora:x:0.5>" and told["Refiner switch at"] == "0.5"
    assert told["ControlNet net"].startswith("Model: net") and told["Model"] == "base and refiner"


def test_a_refiner_as_a_base(folders, tmp_path, capsys):
    assert run(folders, "-o", str(tmp_path / "x.png"), model="refiner") == 2
    assert "this model is a refiner, which goes on with what another has begun" in capsys.readouterr().err


TURBO = {"timestep_spacing": "trailing", "_class_name": "EulerAncestralDiscreteScheduler"}  # as its folder says


@pytest.mark.parametrize("said, fast", [
    (TURBO, True),
    (TURBO | {"timestep_spacing": "leading"}, False),
    (TURBO | {"prediction_type": "v_prediction"}, False),
    (TURBO | {"rescale_betas_zero_snr": True}, False),
])  # fmt: skip
def test_who_draws_in_few_steps(said, fast):
    ends = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    assert is_fast(*schedule_from_json(ends | said)) is fast


def test_a_turbo_says_how_it_wants_to_be_drawn_with(models):
    base = models["SDXL"]
    turbo = StableDiffusion(base.parts, Schedule(spacing="trailing"), EPSILON, base.size, "", "cpu", torch.float32)
    calm = {"steps": 1, "cfg_scale": 1.0, "sampler": "euler_a", "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turbo.txt2img("a cat", **calm)
        base.txt2img("a cat", **FEW)
        for wrong in ({"steps": 50}, {"cfg_scale": 7.5}):
            with pytest.raises(
                UserWarning, match="this model draws in 1 to 4 steps, without guidance: take steps 4, cfg"
            ):
                turbo.set_up(Request("a cat", **calm | wrong))


@pytest.mark.slow
def test_a_turbo_on_the_command_line(folders, tmp_path, capsys):
    shutil.copytree(folders / "base", tmp_path / "turbo")
    path = tmp_path / "turbo" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TURBO))
    command = inspect(tmp_path / "turbo").can
    assert command == f'sdlearn txt2img "..." --steps 4 --cfg-scale 1 --sampler euler_a --model {tmp_path / "turbo"}'
    assert "--steps" not in inspect(folders / "base").can
    said = []
    for more in (["--cfg-scale", "5"], command.partition('"..." ')[2].split()):
        words = [
            "--model",
            str(tmp_path / "turbo"),
            "--steps",
            "2",
            *more,
            "--device",
            "cpu",
            "-o",
            str(tmp_path / "x.png"),
        ]
        assert main(["txt2img", "a cat", *words]) == 0
        said.append("draws in 1 to 4 steps" in capsys.readouterr().err)
    assert said == [True, False]


def test_ids_of_the_wrong_length(models):
    sd = models["SDXL"]
    told, xt = sd.told(Request("a cat", seed=0))[0], torch.zeros(1, 4, 8, 8)
    for ids in (told["ids"][:, :5], told["ids"][:, [0] * 7]):
        with pytest.raises(
            ValueError, match=f"pooled is 40 wide and there are {ids.shape[1]} ids, but this U-Net reads"
        ):
            sd.unet(xt, 500, **told | {"ids": ids})
    with pytest.raises(ValueError, match="pooled is 0 wide and there are 0 ids, but this U-Net reads 1576"):
        sd.unet(xt, 500, told["context"])


@pytest.mark.parametrize("absent, sentence", [
    ("conditioner.embedders.0.", "has no text_encoder: take a whole checkpoint"),
    ("conditioner.embedders.1.", "has no text_encoder_2: take a whole checkpoint"),
    ("first_stage_model.", "has no VAE: name the file of one with --vae"),
    ("model.diffusion_model.", "has no unet: take a whole checkpoint"),
])  # fmt: skip
def test_a_single_file_lacks_a_part(tmp_path, files, absent, sentence):
    tensors = {name: x for name, x in read_tensors(files["SDXL"][0]).items() if not name.startswith(absent)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=sentence):
        plan(tmp_path / "x.safetensors", sizes=shallow(SIZES["SDXL"]))
    report = inspect(tmp_path / "x.safetensors")
    assert not report.can and len(report.but) == 1


def test_a_decoder_is_the_same_at_another_scale(models):
    vae, z = models["SDXL"].vae, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, other = vae.decode(z), scale_decoder(copy.deepcopy(vae), 64.0)
        assert (other.decode(z) - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert not same(other, vae) and same(scale_decoder(other, 1 / 64), vae)


def test_a_refiner_is_downloaded_without_its_first_text_encoder():
    names = [f"{part}/{'model' if 'text' in part else 'diffusion_pytorch_model'}.safetensors"
             for part in ("unet", "vae", "text_encoder_2")]  # fmt: skip
    there = dict.fromkeys(["model_index.json", *names, "tokenizer_2/merges.txt", "scheduler/scheduler_config.json"])
    assert set(hub.choose(hub.Place("a/b", "", None), there)) == set(there)
    with pytest.raises(ValueError, match="has no .safetensors file in text_encoder/"):
        hub.choose(hub.Place("a/b", "", None), {name: x for name, x in there.items() if "_2" not in name})
