"""Checkpoint files: names against the references, round trips, LDM single files, and every way to be wrong."""

import json
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from random_model import SMALL_UNET, SMALL_VAE, random_parts, save_random_model
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel

from sdlearn.checkpoint import load as weights
from sdlearn.checkpoint.configs import clip_to_json, text_to_json, unet_to_json, vae_to_json
from sdlearn.checkpoint.dialects import (
    CLIP_RULES,
    PREFIXES,
    VAE_RULES,
    averaged_name,
    clip_name,
    recognise,
    rename,
    why_ignored,
)
from sdlearn.checkpoint.files import read_tensors
from sdlearn.checkpoint.load import Sizes, build, named, plan, rules
from sdlearn.clip import CLIP, CLIPImageConfig, CLIPTextConfig, CLIPTextEncoder
from sdlearn.prediction import EPSILON, V
from sdlearn.schedule import Schedule, cosine
from sdlearn.unet import UNet, UNetConfig
from sdlearn.vae import VAE, VAEConfig

NETWORKS = ("text_encoder", "vae", "unet")
LDM = {part: prefixes[0] for part, prefixes in PREFIXES.items()}
UNETS = [UNetConfig(), SMALL_UNET, UNetConfig((32, 64, 64), (False, True, False), (1, 2, 4), blocks=3, groups=8)]
VAES = [VAEConfig(), SMALL_VAE]


def same(a, b):
    """Two state dicts hold the same numbers under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pairs(a, b):
    """The networks of two models, side by side."""
    return [(a.networks[part], b.networks[part]) for part in NETWORKS]


def shapes(model, rules=()):
    """Their names -> shapes."""
    return {rename(name, rules): tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, save_random_model(folder)


@pytest.mark.parametrize("config", UNETS)
def test_unet_names_and_shapes_are_those_of_diffusers(config):
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet_to_json(config, 64))
    assert shapes(weights.empty(UNet, config), rules(config)) == shapes(theirs)


@pytest.mark.parametrize("config", VAES)
def test_vae_names_and_shapes_are_those_of_diffusers(config):
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(vae_to_json(config, 512))
    ours = shapes(weights.empty(VAE, config), VAE_RULES)
    assert ours == shapes(theirs)


def test_clip_names_and_shapes_are_those_of_transformers():
    text, image = CLIPTextConfig(layers=2), CLIPImageConfig(layers=3)
    with torch.device("meta"):
        theirs = CLIPTextModel(CLIPTextModel.config_class(**text_to_json(text)))
        whole = CLIPModel(CLIPModel.config_class(**clip_to_json(text, image, 32)))
    ours = weights.empty(CLIPTextEncoder, text)
    assert shapes(ours, CLIP_RULES) == {k.removeprefix("text_model."): v for k, v in shapes(theirs).items()}
    clip = weights.empty(CLIP, text, image, 32)
    assert {clip_name(k): tuple(v.shape) for k, v in clip.state_dict().items()} == shapes(whole)


@pytest.mark.parametrize("config", UNETS)
def test_ldm_unet_names_lead_to_diffusers_names(config):
    ours = weights.empty(UNet, config).state_dict()
    ldm = {LDM["unet"] + rename(name, rules(config, ldm=True)): value for name, value in ours.items()}
    assert len(ldm) == len(ours)
    theirs = convert_ldm_unet_checkpoint(dict(ldm), unet_to_json(config, 64) | {"layers_per_block": config.blocks})
    wanted = {rename(name, rules(config)): value for name, value in ours.items()}
    assert {k: id(v) for k, v in theirs.items()} == {k: id(v) for k, v in wanted.items()}


@pytest.mark.parametrize("config", VAES)
def test_ldm_vae_names_lead_to_diffusers_names(config):
    ours = weights.empty(VAE, config).state_dict()
    ldm = {LDM["vae"] + rename(name, rules(config, ldm=True)): value for name, value in ours.items()}
    theirs = convert_ldm_vae_checkpoint(dict(ldm), vae_to_json(config, 512))
    assert {k: tuple(v.shape) for k, v in theirs.items()} == shapes(weights.empty(VAE, config), VAE_RULES)
    attention = "encoder.mid_block.attentions.0"
    assert theirs[f"{attention}.to_out.0.weight"] is ours["encoder.middle.attention.attention.to_out.weight"]


def test_full_size_counts():
    models = {(UNet, UNetConfig()): (859_520_964, 686), (VAE, VAEConfig()): (83_653_863, 248)}
    models[CLIPTextEncoder, CLIPTextConfig()] = (123_060_480, 196)
    for (make, config), (numbers, tensors) in models.items():
        state = weights.empty(make, config).state_dict()
        assert (sum(x.numel() for x in state.values()), len(state)) == (numbers, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_is_loaded(tmp_path, dtype):
    parts = save_random_model(tmp_path, dtype)
    loaded = weights.load(tmp_path, dtype=None)
    modes = {path.stat().st_mode for path in tmp_path.rglob("*.*") if path.is_file()}
    assert len(modes) == 1  # all as readable as any new file
    assert loaded.size == (32, 32) and loaded.name == tmp_path.name and loaded.prediction is EPSILON
    assert torch.equal(loaded.schedule.betas, parts.schedule.betas) and loaded.schedule.ends_clean is False
    assert loaded.networks["tokenizer"].vocab == parts.networks["tokenizer"].vocab
    for mine, theirs in pairs(loaded, parts):
        assert mine.config == theirs.config and not mine.training
        assert same(mine.state_dict(), {k: v.to(dtype) for k, v in theirs.state_dict().items()})
        assert all(p.requires_grad and p.device.type == "cpu" for p in mine.parameters())
    tokenizer, clip = weights.load_clip(tmp_path)
    assert len(tokenizer) == clip.text_encoder.config.vocab
    assert same(clip.state_dict(), {k: v.to(dtype).float() for k, v in random_parts()[1].state_dict().items()})


@pytest.mark.slow
def test_loading_draws_no_random_numbers_and_imports_no_compiler(model):
    state = torch.get_rng_state()
    weights.load(model[0])
    assert torch.equal(state, torch.get_rng_state())
    code = f"import sys; from sdlearn.checkpoint.load import *; load({str(model[0])!r}); load_clip({str(model[0])!r})"
    code += "; sys.exit('sympy' in sys.modules or 'torch._inductor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def ldm_tensors(parts):
    """The parts as CompVis' code would save them, with all that comes along."""
    found = {}
    for part in NETWORKS:
        found |= {name: x.clone() for name, x in named(parts.networks[part], ldm=True).items()}
    position_ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    tables = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
              "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar",
              "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
              "lvlb_weights", "scale_factor", "model_ema.decay", "model_ema.num_updates",
              "model_ema.diffusion_modelinput_blocks00weight", "first_stage_model.loss.logvar"]  # fmt: skip
    return found | position_ids | {name: torch.zeros(3) for name in tables}


@pytest.fixture(scope="module")
def single(model):
    return ldm_tensors(model[1])


def load_small(path, parts, dtype=None, *how, **which):
    sizes = Sizes(parts.networks["text_encoder"].config, SMALL_VAE, SMALL_UNET)
    return build(plan(path, sizes=sizes, **which), "small", dtype, *how)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "nested ckpt", "no text_model"])
def test_single_file_of_compvis(tmp_path, model, single, kind):
    path = tmp_path / ("sd.ckpt" if "ckpt" in kind else "sd.safetensors")
    tensors = single
    if kind == "no text_model":
        tensors = {name.replace("transformer.text_model.", "transformer."): value for name, value in single.items()}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": {"state_dict": tensors} if "nested" in kind else tensors, "global_step": 7}, path)
    else:
        save_file(tensors, path)
    loaded = load_small(path, model[1])
    for mine, theirs in pairs(loaded, model[1]):
        assert same(mine.state_dict(), theirs.state_dict())
    assert loaded.size == (512, 512) and len(loaded.networks["tokenizer"]) == 49408


def test_single_file_is_strict(tmp_path, model, single):
    path = tmp_path / "sd.safetensors"
    name = "model.diffusion_model.input_blocks.0.0.weight"
    wrong = {
        "lacks the tensor " + name: {k: v for k, v in single.items() if k != name},
        "is a Stable Diffusion 1 for instruct-pix2pix, but a whole checkpoint of SD 1": single
        | {name: torch.zeros(32, 8, 3, 3)},
        r"\(32, 4, 5, 5\).*\(32, 4, 3, 3\)": single | {name: torch.zeros(32, 4, 5, 5)},
        "no part of the model takes, .*cond_proj.weight": single
        | {LDM["unet"] + "time_embed.cond_proj.weight": torch.zeros(1)},
        "has no VAE: name the file of one with --vae": {
            k: v for k, v in single.items() if not k.startswith(LDM["vae"])
        },
        "no part takes, lora_te_x": single | {"lora_te_x.alpha": torch.zeros(1)},  # one stray key makes no LoRA
        "model.diffusion_model.more.weight": single | {"model.diffusion_model.more.weight": torch.zeros(1)},
        "no part takes, surprise": single | {"surprise": torch.zeros(1)},
        "int64": single | {name: torch.zeros(32, 4, 3, 3, dtype=torch.int64)},
    }
    for sentence, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=sentence):
            load_small(path, model[1])


def test_every_tensor_of_a_file_is_taken_or_ignored_for_a_reason(model, single):
    prefixes = tuple(LDM.values())
    taken = [name for name in single if not why_ignored(name)]
    assert all(name.startswith(prefixes) for name in taken)
    assert len(taken) == sum(len(model[1].networks[part].state_dict()) for part in NETWORKS)
    ignored = {name: why_ignored(name) for name in single if why_ignored(name)}
    assert len(ignored) == len(single) - len(taken) == 20
    assert ignored["model_ema.decay"] == "the averaged copy, taken only when it is asked for"
    assert ignored["sqrt_recipm1_alphas_cumprod"].startswith("a table of the noise schedule")
    for name in (*taken, "surprise", "betas.more", "my_betas", "cond_stage_model.transformer.logit_scale"):
        assert why_ignored(name) is None, name


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_averages_or_plain_weights(tmp_path, model, single, suffix):
    path = tmp_path / f"sd.{suffix}"
    parts = model[1]
    plain = [name for name in single if name.startswith(LDM["unet"])]
    averages = {averaged_name(name): single[name] + 1 for name in plain}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages and len(averages) == len(plain)
    save_file(single | averages, path) if suffix == "safetensors" else torch.save(single | averages, path)
    plainly, averaged = (load_small(path, parts, ema=ema).networks for ema in (False, True))
    unet = parts.networks["unet"].state_dict()
    assert same(plainly["unet"].state_dict(), unet)
    assert same(averaged["unet"].state_dict(), {name: x + 1 for name, x in unet.items()})
    assert same(averaged["vae"].state_dict(), parts.networks["vae"].state_dict())
    save_file(
        {k: v for k, v in (single | averages).items() if k != averaged_name(plain[3])}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match="lacks the tensor model_ema.diffusion_model"):
        load_small(tmp_path / "a.safetensors", parts, ema=True)
    save_file({k: v for k, v in single.items() if "ema" not in k}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="has no averaged copy of its U-Net .EMA.: load it without ema"):
        load_small(tmp_path / "b.safetensors", parts, ema=True)
    with pytest.raises(ValueError, match="is a folder, which holds one copy of the U-Net: load it without ema"):
        weights.load(model[0], ema=True)


VAE_NAMES = {  # how a stand-alone VAE may be written: prefix, CompVis' names?, today's names of the attention -> others
    "CompVis": ("", True, {}),
    "CompVis in its place": ("first_stage_model.", True, {}),
    "CompVis, short": ("vae.", True, {}),
    "CompVis, to_q": ("first_stage_model.", True, {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}),
    "CompVis, query": (
        "",
        True,
        {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"},
    ),
    "diffusers": ("", False, {}),
    "diffusers, prefixed": ("vae.", False, {}),
    "diffusers before 2023": ("", False, {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}),
    "diffusers, mixed": ("", False, {"to_q": "q", "to_k": "key", "to_v": "v", "to_out.0": "proj_out"}),
    "folder": ("", False, {}),
    "model": ("", False, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", VAE_NAMES)
def test_another_vae(tmp_path, model, kind):
    """A VAE that stands alone takes the place of the model's own, whatever its names."""
    prefix, ldm, other = VAE_NAMES[kind]
    wanted = {name: x / 2 for name, x in model[1].networks["vae"].state_dict().items()}
    tensors = {}
    for ours, x in wanted.items():
        name = rename(ours, rules(SMALL_VAE, ldm))
        place, dot, last = re.fullmatch(r"(.*(?:attn_1|attentions\.0)\.)?(.*)(\.\w+)", name).groups()
        conv = ldm and ".mid.attn_1." in name and x.ndim == 2
        tensors[prefix + (place or "") + (other.get(dot, dot) if place else dot) + last] = (
            x[:, :, None, None].clone() if conv else x
        )
    assert len(tensors) == len(wanted) and all(any(f".{new}." in name for name in tensors) for new in other.values())
    if ldm:
        tensors |= {f"{prefix}loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    path = tmp_path / "vae.safetensors"
    if kind in ("folder", "model"):
        folder = tmp_path / ("vae" if kind == "model" else "my-vae")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(vae_to_json(SMALL_VAE, 32)))
        path = folder / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path)
    given = {"folder": path.parent, "model": tmp_path}.get(kind, path)
    loaded = weights.load(model[0], torch.float32, vae=given).networks
    assert same(loaded["vae"].state_dict(), wanted) and loaded["vae"].config == SMALL_VAE
    assert same(loaded["unet"].state_dict(), model[1].networks["unet"].state_dict())
    single = tmp_path / "sd.safetensors"
    weights.save(single, model[1], dtype=None)
    without = {k: x for k, x in load_file(single).items() if not k.startswith("first_stage_model.")}
    for content in (load_file(single), without):
        save_file(content, single)
        assert same(load_small(single, model[1], vae=given).networks["vae"].state_dict(), wanted)
    with pytest.raises(ValueError, match="is a Stable Diffusion 1, but a VAE alone is wanted: give its file"):
        weights.load(model[0], vae=single)


def test_attention_of_the_vae_in_its_own_place(tmp_path):
    """The names of other years are read in a folder and in a whole file, not only alone."""
    parts = save_random_model(tmp_path / "model")
    path = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    for old in (
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
        {"query": "q", "key": "to_k"},
    ):
        tensors = load_file(path)
        for new, name in old.items():
            tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): x for k, x in tensors.items()}
        assert any(f".{name}." in k for k in tensors for name in old.values())
        save_file(tensors, path)
        assert same(weights.load_vae(tmp_path / "model").state_dict(), parts.networks["vae"].state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_file_is_read_as_it_was_written(tmp_path, model, suffix, dtype):
    path = tmp_path / f"sd.{suffix}"
    weights.save(path, model[1], dtype)
    loaded = load_small(path, model[1])
    for mine, theirs in pairs(loaded, model[1]):
        assert same(mine.state_dict(), {name: x.to(dtype) for name, x in theirs.state_dict().items()})
    for name in ("q", "k", "v", "proj_out"):  # which CompVis' own code loads strictly
        assert read_tensors(path)[f"first_stage_model.decoder.mid.attn_1.{name}.weight"].shape[2:] == (1, 1)
    again = tmp_path / f"again.{suffix}"
    weights.save(again, loaded, None)
    assert read_tensors(again).keys() == read_tensors(path).keys()
    assert same(read_tensors(again), read_tensors(path))
    with pytest.raises(ValueError, match="does not say its format: give a name that ends in .safetensors or .ckpt"):
        weights.save(tmp_path / "sd.bin", model[1])


NAMES = {"a.SAFETENSORS": "file", "model.ckpt.safetensors": "file", "b.Ckpt": "pickle",
         "model.safetensors.ckpt": "pickle", "sd-v1.5": "folder", "plain": "folder"}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_format_is_the_last_suffix(tmp_path, model, name):
    """And what was written is read again under the same name."""
    weights.save(tmp_path / name, model[1], None)
    folder = NAMES[name] == "folder"
    assert (tmp_path / name).is_dir() == folder
    loaded = weights.load(tmp_path / name, None) if folder else load_small(tmp_path / name, model[1])
    assert folder or (tmp_path / name).read_bytes().startswith(b"PK") == (NAMES[name] == "pickle")
    assert same(loaded.networks["unet"].state_dict(), model[1].networks["unet"].state_dict())


def test_a_single_file_cannot_hide_another_schedule(tmp_path, model):
    for other in (model[1]._replace(prediction=V), model[1]._replace(schedule=Schedule(cosine()))):
        with pytest.raises(ValueError, match="a single file of SD 1 cannot say that this model has another schedule"):
            weights.save(tmp_path / "x.safetensors", other)
        weights.save(tmp_path / "x", other)
        loaded = weights.load(tmp_path / "x")
        assert loaded.prediction is other.prediction and torch.equal(loaded.schedule.betas, other.schedule.betas)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_diffusers_reads_our_single_file(tmp_path, model, suffix):
    path = tmp_path / f"sd.{suffix}"
    weights.save(path, model[1], torch.float32)
    pipe = StableDiffusionPipeline.from_single_file(
        str(path), config=str(model[0]), local_files_only=True, torch_dtype=torch.float32, safety_checker=None
    )
    parts = SimpleNamespace(**model[1].networks)
    tokens = parts.tokenizer(["a red apple", ""])
    with torch.no_grad():
        context = parts.text_encoder(tokens)
        assert (context - pipe.text_encoder(tokens).last_hidden_state).abs().max() <= 1e-4
        x, t = torch.randn(2, 4, 4, 4), torch.tensor([981, 1])
        assert (parts.unet(x, t, context) - pipe.unet(x, t, context).sample).abs().max() <= 1e-4
        assert (parts.vae.decode(x) - pipe.vae.decode(x / SMALL_VAE.scale).sample).abs().max() <= 1e-4


def test_where_and_how_tensors_are_put(tmp_path, model):
    weights.save(tmp_path / "sd.safetensors", model[1], torch.float16)
    kept = load_small(tmp_path / "sd.safetensors", model[1]).networks
    moved = load_small(tmp_path / "sd.safetensors", model[1], None, "cpu", torch.channels_last).networks["unet"]
    assert moved.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert same(moved.state_dict(), kept["unet"].state_dict())
    nowhere = load_small(tmp_path / "sd.safetensors", model[1], torch.float32, "meta").networks
    assert all(x.device.type == "meta" for part in NETWORKS for x in nowhere[part].state_dict().values())
    before = {name: x.clone() for name, x in kept["unet"].state_dict().items()}
    (tmp_path / "sd.safetensors").write_bytes(bytes((tmp_path / "sd.safetensors").stat().st_size))
    assert same(kept["unet"].state_dict(), before)  # a file may be written over: nothing of it is mapped any more


PEAK = """
import re, sys, torch
from pathlib import Path
from sdlearn.checkpoint import load as weights
def now(key): return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
path, dtype, layout = Path(sys.argv[1]), getattr(torch, sys.argv[2], None), getattr(torch, sys.argv[3])
weights.load(path.parent / "small", dtype)  # what is imported and set up once is no part of the measure
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = now("VmRSS")
unet = weights.load_unet(path, dtype=dtype, layout=layout)
need = sum(x.nbytes for x in unet.parameters())
print((now("VmHWM") - before) / need)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_at_its_peak_is_that_of_the_weights(tmp_path, form):
    """All of it counts, also the pages of a mapped file: at most 1.15 x the weights as they are wanted."""
    big = UNetConfig((128, 256, 320), (True, True, False), (4, 8, 8), blocks=2, context_width=256)
    unet = weights.empty(UNet, big)
    unet.load_state_dict({n: torch.full(x.shape, 0.5) for n, x in unet.state_dict().items()}, assign=True)
    assert sum(x.numel() for x in unet.parameters()) > 30e6
    save_random_model(tmp_path / "small")
    for held in (torch.float32, torch.float16):
        here = tmp_path / str(held).removeprefix("torch.") / "unet"
        here.mkdir(parents=True)
        (here / "config.json").write_text(json.dumps(unet_to_json(big, 64)))
        tensors = {rename(n, rules(big)): x.to(held) for n, x in unet.state_dict().items()}
        if form == "bin":
            torch.save(tensors, here / "diffusion_pytorch_model.bin")
        else:
            save_file(tensors, here / "diffusion_pytorch_model.safetensors")
    cases = [("float32", "bfloat16", "preserve_format"), ("float16", "float32", "channels_last"),
             ("float32", "None", "preserve_format"), ("float16", "float16", "channels_last")]  # fmt: skip
    for held, wanted, layout in cases:
        command = [sys.executable, "-c", PEAK, str(tmp_path / held), wanted, layout]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert 0.2 < float(result.stdout) <= 1.15, (form, held, wanted, layout, result.stdout)


def test_a_model_of_the_hub_is_looked_for_here_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = save_random_model(tmp_path / "checkpoints" / "some-one" / "small-sd")
    loaded = weights.load("some-one/small-sd")
    assert same(loaded.networks["unet"].state_dict(), parts.networks["unet"].state_dict())
    (tmp_path / "checkpoints" / "small-sd").mkdir()
    with pytest.raises(ValueError, match="there is no model at another/small-sd, and from the hub"):
        weights.load("another/small-sd")


def test_sizes_default_to_sd_1_5(tmp_path, single):
    save_file(single, tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match="lacks the tensor"):
        weights.load(tmp_path / "sd.safetensors")


@pytest.mark.parametrize(
    "name, kind",
    [
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "SD 1"),
        ("cond_stage_model.model.ln_final.bias", "SD 2"),
        ("conditioner.embedders.1.model.ln_final.bias", "SDXL"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.alpha", "LoRA"),
        ("unet.up_blocks.0.attentions.0.proj_in.lora_A.weight", "LoRA"),
        ("control_model.input_hint_block.0.bias", "ControlNet"),
        ("controlnet_down_blocks.0.bias", "ControlNet"),
        ("encoder.mid.attn_1.k.bias", "VAE"),
        ("up_blocks.0.resnets.0.conv1.bias", "U-Net"),
        ("something.else", "unknown"),
    ],
)
def test_recognise_and_refuse(tmp_path, name, kind):
    assert kind in recognise([name, "model.diffusion_model.x"] if "stage" in name else [name])
    save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors (is|lacks|has no VAE)"):
        weights.load(tmp_path / "x.safetensors")


def test_names_without_text_model_and_fp16_variants_are_read(tmp_path):
    """transformers 5 saves no text_model prefix."""
    parts = save_random_model(tmp_path)
    text = parts.networks["text_encoder"].state_dict()
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    save_file(tensors | {"embeddings.position_ids": torch.arange(77)}, path)
    assert same(weights.load_text_encoder(tmp_path).state_dict(), text)
    path.rename(path.with_name("model.fp16.safetensors"))
    assert same(weights.load_text_encoder(tmp_path).state_dict(), text)


@pytest.mark.parametrize("part, name", [("unet", "conv_in.weight"), ("vae", "quant_conv.bias"),
                                        ("text_encoder", "text_model.final_layer_norm.bias")])  # fmt: skip
def test_missing_extra_and_misshapen_tensors_are_named(tmp_path, part, name):
    save_random_model(tmp_path)
    path = next((tmp_path / part).glob("*.safetensors"))
    load = getattr(weights, f"load_{part}")
    good = load_file(path)
    save_file({k: v for k, v in good.items() if k != name}, path)
    with pytest.raises(ValueError, match=f"lacks the tensor {name}"):
        load(tmp_path)
    save_file(good | {"more.weight": torch.zeros(2), "most.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no part of the model takes, more.weight and 1 more"):
        load(tmp_path)
    save_file(good | {name: torch.zeros(7, 5)}, path)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert name in str(error.value) and "(7, 5)" in str(error.value)
    assert str(tuple(good[name].shape)) in str(error.value)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"\x80\x02", pickle.dumps(Bomb()), b"\x00" * 4096])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_damaged_and_dangerous_files_are_one_sentence(tmp_path, content, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        weights.load(path)


def test_a_pickle_that_acts_is_not_obeyed(tmp_path):
    torch.save({"state_dict": {"x": Bomb()}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="runs code when it is opened.*nothing of it was run: do not use it"):
        weights.load(tmp_path / "model.ckpt")


def test_truncated_file(tmp_path, single):
    path = tmp_path / "model.safetensors"
    save_file(single, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged, incomplete metadata, file not fully covered: download it again"):
        weights.load(path)


def test_folder_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="there is no model at"):
        weights.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no model, for it has no model_index\.json: give the folder of a model"):
        weights.load(tmp_path)
    save_random_model(tmp_path)
    for kind in ("StableDiffusion3Img2ImgPipeline", "FluxPipeline", "StableDiffusion3Pipeline", 7, ["x"]):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(ValueError, match=f"is a {re.escape(str(kind))}, but a StableDiffusionPipeline"):
            weights.load(tmp_path)
    save_random_model(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        weights.load(tmp_path)


def test_a_pickle_that_holds_itself_is_read(tmp_path):
    content = {"weight": torch.zeros(2)}
    content["state_dict"] = content
    torch.save(content, tmp_path / "ring.ckpt")
    assert list(read_tensors(tmp_path / "ring.ckpt")) == ["weight"]
