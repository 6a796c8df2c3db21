"""LoRA files that cannot be meant, values that cannot be meant: one sentence, and the networks stay as they were."""

import copy

import pytest
import torch
from lora_files import kohya, random_lora
from random_model import random_parts, save_random_model
from safetensors.torch import save_file

from sdlearn.checkpoint.inspect import inspect
from sdlearn.cli import main
from sdlearn.lora import load_lora, merge, save_lora, with_lora

MODEL = {name: x for name, x in random_parts()[0].networks.items() if name in ("unet", "text_encoder")}


@pytest.fixture
def networks():
    return {name: copy.deepcopy(x) for name, x in MODEL.items()}


def weights(networks):
    return {f"{part}.{k}": v.clone() for part, x in networks.items() for k, v in x.state_dict().items()}


def refused(call, words):
    with pytest.raises(ValueError) as told:
        call()
    assert words in str(told.value)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def spoiled(change):
    """The tensors of a good file, changed."""
    tensors = kohya(random_lora(copy.deepcopy(MODEL), 3, 2.0, r"attn2\.to_[kq]"))
    change(tensors)
    return tensors


def renamed(tensors, old, new):
    for name in [x for x in tensors if old in x]:
        tensors[name.replace(old, new)] = tensors.pop(name)


HALVES = ("lora_down.weight", "lora_up.weight")
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TE2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
SDXL_TEXT = {f"{TE2}.lora_down.weight": torch.ones(3, 1280), f"{TE2}.lora_up.weight": torch.ones(5120, 3)}
BAD_FILES = {  # name -> (what is done to a good file, what is said)
    "DoRA": (lambda t: t.update({f"{K}.dora_scale": torch.ones(3)}), "is a DoRA, but only plain LoRAs"),
    "DoRA of PEFT": (lambda t: t.update({"unet.x.lora_magnitude_vector": torch.ones(3)}), "is a DoRA"),
    "LoHa": (lambda t: t.update({f"{K}.hada_w1_a": torch.ones(3)}), "is a LoHa"),
    "LoKr": (lambda t: t.update({f"{K}.lokr_w1": torch.ones(3)}), "is a LoKr"),
    "Tucker": (lambda t: t.update({f"{K}.lora_mid.weight": torch.ones(3, 3)}), "third factor"),
    "OFT": (lambda t: t.update({f"{K}.oft_blocks": torch.ones(3)}), "is an OFT"),
    "difference": (lambda t: t.update({f"{K}.diff": torch.ones(3)}), "is a full difference"),
    "no up": (lambda t: t.pop(f"{K}.lora_up.weight"), "only a part of lora_unet"),
    "no down": (lambda t: t.pop(f"{K}.lora_down.weight"), "only a part of lora_unet"),
    "alpha alone": (lambda t: t.update({"lora_unet_y.alpha": torch.tensor(1.0)}), "only a part of lora_unet_y"),
    "rank 0": (
        lambda t: t.update({f"{K}.lora_down.weight": torch.ones(0, 32), f"{K}.lora_up.weight": torch.ones(32, 0)}),
        "has rank 0",
    ),
    "two ranks": (lambda t: t.update({f"{K}.lora_up.weight": torch.ones(32, 7)}), "no two halves"),
    "whole numbers": (lambda t: t.update({f"{K}.lora_down.weight": torch.ones(3, 32).int()}), "no two halves"),
    "scalar half": (lambda t: t.update({f"{K}.lora_up.weight": torch.ones(())}), "no two halves"),
    "NaN": (lambda t: t[f"{K}.lora_up.weight"].fill_(torch.nan), "holds NaN or infinite"),
    "infinite alpha": (lambda t: t.update({f"{K}.alpha": torch.tensor(torch.inf)}), "has an alpha of inf"),
    "two alphas": (lambda t: t.update({f"{K}.alpha": torch.ones(2)}), "is (2,), but one number is wanted"),
    "no alpha": (lambda t: t.update({f"{K}.alpha": torch.ones(0)}), "is (0,), but one number is wanted"),
    "one layer, two names": (
        lambda t: t.update({f"{K.replace('lora_unet_', 'unet.')}.{x}": t[f"{K}.{x}"].clone() for x in HALVES}),
        "attn2.to_k twice, under two names",
    ),
    "another size": (lambda t: t.update({f"{K}.lora_down.weight": torch.ones(3, 9)}), "another"),
    "unknown layer": (lambda t: renamed(t, "down_blocks_0", "down_blocks_7"), "which this model has not"),
    "SD 1": (lambda t: t.update({f"{K}.lora_down.weight": torch.ones(3, 768)}), "is a LoRA for SD 1, but"),
    "SDXL": (
        lambda t: (
            t.clear(),
            t.update({
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(3, 2048),
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.ones(640, 3),
            }),
        ),
        "is a LoRA for SDXL, but",
    ),
    "SDXL's second text encoder": (
        lambda t: (t.clear(), t.update(SDXL_TEXT)),
        "is a LoRA for SDXL, but",
    ),
    "something else beside": (lambda t: t.update({"model.weight": torch.ones(3)}), "model.weight is no part"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name, networks, tmp_path):
    change, words = BAD_FILES[name]
    tensors = spoiled(change)
    save_file(tensors, tmp_path / "x.safetensors")
    before = weights(networks)
    refused(lambda: load_lora(tmp_path / "x.safetensors", networks), words)
    assert all(torch.equal(x, before[name]) for name, x in weights(networks).items())


def test_a_file_that_is_cut_off_or_no_lora(networks, tmp_path):
    save_lora(tmp_path / "x.safetensors", random_lora(networks))
    content = (tmp_path / "x.safetensors").read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "x.safetensors").write_bytes(content[:size])
        refused(lambda: load_lora(tmp_path / "x.safetensors", networks), "x.safetensors is")
    save_random_model(tmp_path)
    refused(lambda: load_lora(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", networks), "U-Net")
    refused(lambda: load_lora(tmp_path / "none.safetensors", networks), "cannot be read")


def test_values_that_cannot_be_meant(networks, tmp_path):
    unet = {"unet": networks["unet"]}
    lora = random_lora(networks)
    for scale in (float("nan"), float("inf")):
        refused(lambda scale=scale: merge(networks, (lora, scale)), "scale is")
    refused(lambda: with_lora(networks, 0), "rank is 0")
    refused(lambda: with_lora(networks, 1.5), "rank is 1.5")
    refused(lambda: with_lora(networks, 4, targets="attn9"), "no layer is called 'attn9'")
    refused(lambda: merge(unet, (lora, 1.0)), "the LoRA changes text_encoder")
    refused(lambda: save_lora(tmp_path / "x.ckpt", lora), "let it end in .safetensors")
    refused(lambda: save_lora(tmp_path / "x.safetensors", lora, "peft"), "use kohya or diffusers")


@pytest.mark.parametrize("name", ["DoRA", "no up", "rank 0", "NaN", "SDXL", "unknown layer"])
def test_the_command_line_says_it_and_draws_nothing(name, tmp_path, capsys):
    change, words = BAD_FILES[name]
    save_random_model(tmp_path / "model")
    save_file(spoiled(change), tmp_path / "x.safetensors")
    how = ["--model", str(tmp_path / "model"), "--steps", "1", "--sampler", "ddim", "-o", str(tmp_path / "out")]
    assert main(["txt2img", "a fox", "--lora", str(tmp_path / "x.safetensors"), *how]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_inspect_says_what_it_is_for(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(spoiled(lambda t: None), path)
    report = inspect(path)
    assert report.description == "LoRA, rank 3 in 8 layers, written by kohya"
    assert report.can.startswith('sdlearn txt2img "..." --lora ') and report.but == [
        "its names do not say for which model it is"
    ]
    for width, words in {768: "LoRA for SD 1, rank 4 in 1 layers", 192: "LoRA for the tiny model, rank 4"}.items():
        halves_of = {"lora_A.weight": torch.ones(4, width), "lora_B.weight": torch.ones(width, 4)}
        save_file({f"unet.a.attn2.to_k.{k}": v for k, v in halves_of.items()}, path)
        report = inspect(path)
        assert report.description.startswith(words) and report.description.endswith("written by diffusers (PEFT)")
        assert f"--lora {path}" in report.can and not report.but
        assert ("--model MODEL" in report.can) == (width == 768)
    save_file(spoiled(BAD_FILES["SDXL"][0]), path)
    report = inspect(path)
    assert report.description.startswith("LoRA for SDXL") and f"--lora {path}" in report.can and not report.but
    for name in ("LoHa", "no up"):
        save_file(spoiled(BAD_FILES[name][0]), path)
        report = inspect(path)
        assert report.description.startswith("LoRA") and not report.can and len(report.but) == 1
    flux = "lora_unet_double_blocks_0_img_attn_proj.lora_"
    save_file({f"{flux}down.weight": torch.ones(4, 8), f"{flux}up.weight": torch.ones(8, 4)}, path)
    assert inspect(path).but == [f"{path} is a LoRA for FLUX, but one for SD 1, SD 2 or SDXL is wanted"]
