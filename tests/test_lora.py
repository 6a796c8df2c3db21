"""LoRA: beside the layers or in the weights, exact to take out; files of every dialect; refusals in one sentence."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from lora_files import ALL, DIALECTS, U_NET, halves, kohya, metadata, random_lora
from random_model import SMALL_UNET, random_parts, save_random_model
from safetensors.torch import save_file
from torch import nn

from sdlearn.checkpoint.adapters import name_of, spellings
from sdlearn.cli import main
from sdlearn.lora import Pair, find_lora, load_lora, merge, save_lora, split_tags, unmerge, with_lora
from sdlearn.pictures import read_parameters
from sdlearn.pipeline import StableDiffusion
from sdlearn.speed import compile_unet, faster
from sdlearn.unet import UNet, UNetConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    save_random_model(path)
    return path


MODEL = {name: x for name, x in random_parts()[0].networks.items() if name in ("unet", "text_encoder")}


@pytest.fixture
def networks():
    return {name: copy.deepcopy(x) for name, x in MODEL.items()}


@pytest.fixture
def unet(networks):
    return {"unet": networks["unet"]}


def inputs(context_width=32):
    g = torch.Generator().manual_seed(5)
    latents, context = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 7, context_width, generator=g)
    return latents, torch.tensor([900, 100]), context


@torch.no_grad()
def eps(networks):
    return networks["unet"](*inputs()).clone()


def weights(networks):
    return {f"{part}.{k}": v.clone() for part, x in networks.items() for k, v in x.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(6, 5), (2, 3, 6)),
        (nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
        (nn.Conv2d(6, 5, 3, padding=1), (2, 6, 4, 4)),
        (nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 5, 7)),
    ],
    ids=["linear", "1x1", "3x3", "3x3, stride 2"],
)
@torch.no_grad()
def test_a_pair_is_a_change_of_the_weight(layer, shape):
    pair = Pair(layer, 2, alpha=8.0)
    pair.up.normal_()
    x, before = torch.randn(shape), layer.weight.clone()
    want = layer(x) + pair(x)
    layer.weight += pair.delta()
    assert (layer(x) - want).abs().max() < 1e-5
    product = pair.up.flatten(1) @ pair.down.flatten(1)
    assert torch.allclose((layer.weight - before).flatten(1), 4 * product, atol=1e-6)
    assert torch.linalg.matrix_rank(pair.delta().flatten(1)) == 2


def test_a_new_lora_changes_nothing_and_alone_learns(unet):
    before, answer = weights(unet), eps(unet)
    lora = with_lora(unet, rank=2)
    assert torch.equal(eps(unet), answer)
    unet["unet"](*inputs()).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in unet["unet"].parameters())
    for _, pair in lora.items():  # up is zero: nothing reaches down in the first step
        assert pair.up.grad.abs().max() > 0 and not pair.down.grad.any()
    assert same(weights(unet), before)


def test_which_layers(networks):
    kinds = {x.rpartition(".")[2] for x in with_lora(networks).layers}
    assert kinds == {"to_q", "to_k", "to_v", "0"}
    lora = with_lora(networks, 1, targets=r"attn2\.to_v|self_attn\.q_proj")
    assert len(lora.layers) == 4 + 2 and {x.partition(".")[0] for x in lora.layers} == {"unet", "text_encoder"}


def test_full_size_has_the_known_number_of_parameters():
    with torch.device("meta"):
        lora = with_lora({"unet": UNet(UNetConfig())}, rank=4)
    assert len(lora.layers) == 128 and sum(p.numel() for p in lora.parameters()) == 797_184


def test_beside_and_merged_are_one(networks):
    lora, plain = random_lora(networks), eps(networks)
    lora.attach(networks, scale=0.7)
    beside = eps(networks)
    lora.detach()
    assert torch.equal(eps(networks), plain)
    merge(networks, (lora, 0.7))
    assert (eps(networks) - beside).abs().max() < 1e-5 and (beside - plain).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unmerge_is_exact(networks, dtype):
    for network in networks.values():
        network.to(dtype)
    before, lora = weights(networks), random_lora(networks)
    for scale in (0.3, -2.0, 1.0):
        merge(networks, (lora, scale))
        unmerge(networks)
    assert same(weights(networks), before)
    unmerge(networks)
    assert same(weights(networks), before)


def test_scales_do_not_add_up_and_names_stay(networks):
    lora = random_lora(networks)
    merge(networks, (lora, 0.5))
    once, names = weights(networks), networks["unet"].state_dict().keys()
    merge(networks, (lora, 3.0))
    merge(networks, (lora, 0.5))
    assert same(weights(networks), once) and names == MODEL["unet"].state_dict().keys()


def test_two_loras_in_either_order_and_one_against_itself(networks):
    a, before = random_lora(networks), weights(networks)
    b = random_lora(networks, rank=5, targets="attn1|mlp")
    merge(networks, (a, 0.6), (b, -0.4))
    both = weights(networks)
    merge(networks, (b, -0.4), (a, 0.6))
    assert same(weights(networks), both)
    merge(networks, (a, 1.5), (a, -1.5))
    assert same(weights(networks), before)


def test_a_model_with_a_lora_saves_and_loads(folder, tmp_path):
    sd = StableDiffusion.load(folder, "cpu", torch.float32)
    merge(sd.networks(), (random_lora(sd.networks()), 1.0))
    sd.save(tmp_path / "merged", dtype=None)
    again = StableDiffusion.load(tmp_path / "merged", "cpu", torch.float32)
    assert same(weights(again.networks()), weights(sd.networks()))


def test_fast_attention_forgets_what_it_remembers(networks):
    lora, given = random_lora(networks, targets=U_NET), inputs()
    fast = faster(networks["unet"], sliced=False)
    with torch.no_grad():
        plain = fast(*given).clone()  # remembers the keys and values of these words
        merge(networks, (lora, 1.0))
        merged = fast(*given).clone()
        unmerge(networks)
        assert torch.equal(fast(*given), plain)
    fresh = {"unet": copy.deepcopy(MODEL["unet"])}
    merge(fresh, (random_lora(fresh, targets=U_NET), 1.0))
    assert (merged - eps(fresh)).abs().max() < 1e-5 and (merged - plain).abs().max() > 0.01


def test_fast_attention_hears_a_lora_that_stands_beside_it(networks):
    """The same words, before, with and after it: what is remembered are keys and values without it."""
    lora, given = random_lora(networks, targets=r"attn2\.to_[kv]"), inputs()
    fast = faster(networks["unet"], sliced=False)
    with torch.no_grad():
        plain = fast(*given).clone()
        lora.attach(networks, 0.7)
        beside = fast(*given).clone()
        lora.detach()
        assert torch.equal(fast(*given), plain)
    fresh = {"unet": copy.deepcopy(MODEL["unet"])}
    merge(fresh, (lora, 0.7))
    assert (beside - eps(fresh)).abs().max() < 1e-5 and (beside - plain).abs().max() > 0.01


@torch.no_grad()
def test_beside_a_linear_over_a_map():
    """SD 2 and SDXL enter and leave their transformers so; the sides of the map differ from its channels."""
    torch.manual_seed(0)
    unet = {"unet": UNet(replace(SMALL_UNET, linear=True)).eval()}
    lora, g = random_lora(unet, targets=r"proj_(in|out)$"), torch.Generator().manual_seed(5)
    given = torch.randn(2, 4, 4, 6, generator=g), torch.tensor([900, 100]), torch.randn(2, 7, 32, generator=g)
    plain = unet["unet"](*given)
    lora.attach(unet)
    beside = unet["unet"](*given)
    lora.detach()
    merge(unet, (lora, 1.0))
    assert (unet["unet"](*given) - beside).abs().max() < 1e-5 and (beside - plain).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling wants a C++ compiler")
def test_a_compiled_unet_takes_a_lora(unet):
    lora, given = random_lora(unet), inputs()
    compiled = compile_unet(unet["unet"])
    with torch.no_grad():
        plain = compiled(*given).clone()
        merge(unet, (lora, 1.0))
        merged = compiled(*given).clone()
        unmerge(unet)
        assert torch.equal(compiled(*given), plain)
    fresh = {"unet": copy.deepcopy(MODEL["unet"])}
    merge(fresh, (lora, 1.0))
    assert (merged - eps(fresh)).abs().max() < 1e-4 < (merged - plain).abs().max()


def test_offload_and_sixteen_bits_follow(folder):
    sd = StableDiffusion.load(folder, "cpu", torch.bfloat16, offload=True)
    plain = sd.txt2img("a fox", steps=2, sampler="ddim", seed=1)[0]
    merge(sd.networks(), (random_lora(sd.networks()), 1.0))
    changed = sd.txt2img("a fox", steps=2, sampler="ddim", seed=1)[0]
    unmerge(sd.networks())
    assert sd.txt2img("a fox", steps=2, sampler="ddim", seed=1)[0].tobytes() == plain.tobytes() != changed.tobytes()


def test_no_two_layers_are_spelled_alike():
    """Dots turned into underlines: still every name means one layer, also at SD's and the tiny model's size."""
    tiny = UNetConfig((96, 192, 224), (False, True, True), (3, 6, 7), blocks=1, context_width=192)
    for config in (UNetConfig(), tiny):
        with torch.device("meta"):
            layers = [path for path, x in UNet(config).named_modules() if isinstance(x, nn.Linear | nn.Conv2d)]
        names = [flat for path in layers for flat in {*spellings("unet", path, config)}]
        assert len(names) == len(set(names)) and len(names) >= 4 * len(layers) - 8


EVERY = {**{k: v[2] for k, v in DIALECTS.items()}, "raw PEFT": None, "CompVis' names": None}


def written(name, lora, networks, path):
    """A file of this dialect; returns the scale that makes up for an alpha that it does not say."""
    targets, says_alpha, write = DIALECTS.get(name, (ALL, False, None))
    header = metadata(lora) if "header" in name else {"format": "pt"}
    if name == "raw PEFT":
        tensors = halves(lora, ".lora_A.weight", ".lora_B.weight", lambda x: x.replace("unet.", "base_model.model."))
        (path.parent / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 2.0, "alpha_pattern": {}}))
    elif name == "CompVis' names":
        config = networks["unet"].config
        ldm = {
            name_of("unet", path, config): name_of("unet", path, config, ldm=True)
            for path, layer in networks["unet"].named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        tensors = kohya(lora)
        for ours, theirs in ldm.items():
            tensors = {
                k.replace("lora_" + ours.replace(".", "_") + ".", "lora_" + theirs.replace(".", "_") + "."): v
                for k, v in tensors.items()
            }
        assert any(x.startswith("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.") for x in tensors)
    else:
        tensors = write(lora)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, header)


@pytest.mark.parametrize("name", EVERY)
def test_every_dialect_gives_the_same_lora(name, networks, tmp_path):
    targets, says_alpha, _ = DIALECTS.get(name, ("unet", True, None))
    targets = r"unet.*attn" if name == "raw PEFT" else targets
    lora = random_lora(networks, 3, 2.0 if says_alpha else None, targets)
    written(name, lora, networks, tmp_path / "x.safetensors")
    read = dict(load_lora(tmp_path / "x.safetensors", networks).items())
    assert read.keys() == set(lora.layers)
    assert all(torch.equal(read[k].delta(), pair.delta()) for k, pair in lora.items())


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_what_is_written_is_read(form, networks, tmp_path):
    lora = random_lora(networks, 3, 2.0)
    save_lora(tmp_path / "x.safetensors", lora, form, dtype=None)
    read = dict(load_lora(tmp_path / "x.safetensors", networks).items())
    assert all(torch.allclose(read[k].delta(), pair.delta(), atol=1e-7) for k, pair in lora.items())
    assert {read[x].alpha for x in read} == ({2.0} if form == "kohya" else {3.0})


def test_alpha_zero_is_the_rank_and_patterns_count(networks, tmp_path):
    path, lora = tmp_path / "x.safetensors", random_lora(networks, 3, 2.0, r"attn1\.to_q")
    save_file(kohya(lora) | {k: torch.tensor(0.0) for k in kohya(lora) if k.endswith("alpha")}, path)
    assert {pair.alpha for _, pair in load_lora(path, networks).items()} == {3.0}
    special = lora.layers[0].removeprefix("unet.")
    said = {"unet.lora_alpha": 6, "unet.r": 3, "unet.alpha_pattern": {special: 12}, "unet.use_rslora": False}
    tensors = halves(lora, ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(said)})
    alphas = {name: pair.alpha for name, pair in load_lora(path, networks).items()}
    assert alphas.pop(lora.layers[0]) == 12 and set(alphas.values()) == {6}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(said | {"unet.use_rslora": True})})
    assert {round(pair.alpha, 3) for _, pair in load_lora(path, networks).items()} == {20.785, 10.392}


@pytest.mark.parametrize("told", ["[1]", "3", "[" * 5000, "{", '{"unet.lora_alpha": 2, "unet.alpha_pattern": [1]}'])
def test_settings_of_another_form_are_none(networks, tmp_path, told):
    """What stands in a header may be anything; alpha is then the rank, or what else the file says."""
    lora = random_lora(networks, 3, None, r"attn1\.to_q")
    tensors = halves(lora, ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": told})
    alphas = {pair.alpha for _, pair in load_lora(tmp_path / "x.safetensors", networks).items()}
    assert alphas == {2.0 if "lora_alpha" in told else 3.0}


def test_a_whole_wrong_strength_would_be_seen(networks, tmp_path):
    """The control of the tests above: alpha matters."""
    lora = random_lora(networks, 3, 2.0)
    save_file(kohya(lora, alpha=False), tmp_path / "x.safetensors")
    read = dict(load_lora(tmp_path / "x.safetensors", networks).items())
    assert not any(torch.allclose(read[k].delta(), pair.delta(), rtol=0.1) for k, pair in lora.items())


@pytest.mark.parametrize(
    "prompt, words, tags",
    [
        ("a fox", "a fox", []),
        ("a fox <lora:night:0.8>", "a fox", [("night", 0.8)]),
        ("<lora:a:-1>a fox <lora:b> on blue", "a fox on blue", [("a", -1.0), ("b", 1.0)]),
        ("a <lora:C:\\x y.safetensors:2>", "a", [("C:\\x y.safetensors", 2.0)]),
        ("a <lora:C:\\x.safetensors>", "a", [("C:\\x.safetensors", 1.0)]),
    ],
)
def test_tags(prompt, words, tags):
    assert split_tags(prompt) == (words, tags)


def test_where_a_lora_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "model" / "lora").mkdir(parents=True)
    (tmp_path / "lora").mkdir()
    for place in ("model/lora/a", "lora/b", "lora/a"):
        (tmp_path / f"{place}.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert find_lora("a", "model").parts[-3:] == ("model", "lora", "a.safetensors")
    assert find_lora("b", "model/x.safetensors").parts == ("lora", "b.safetensors")
    assert find_lora("lora/a.safetensors", "model").parts == ("lora", "a.safetensors")
    with pytest.raises(ValueError, match="there is no LoRA 'c': give its file, or one of a, b"):
        find_lora("c", "model")
    with pytest.raises(ValueError, match="that nobody can read"):
        split_tags("a <lora:b")


def test_the_command_line_draws_with_it_and_the_file_tells(folder, tmp_path, capsys):
    sd = StableDiffusion.load(folder, "cpu", torch.float32)
    lora = random_lora(sd.networks())
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / "lora").mkdir()
    save_lora(model / "lora" / "x.safetensors", lora)
    how = ["--model", str(model), "--steps", "2", "--sampler", "ddim", "--seed", "1", "--device", "cpu"]
    merge(sd.networks(), (load_lora(model / "lora" / "x.safetensors", sd.networks()), 0.8))
    want = sd.txt2img("a fox", steps=2, sampler="ddim", seed=1)[0].tobytes()
    out = tmp_path / "a.png"
    assert main(["txt2img", "a fox", "--lora", "x:0.8", "-o", str(out), *how]) == 0
    from PIL import Image

    assert Image.open(out).tobytes() == want
    told = read_parameters(out)["prompt"]
    assert told == "a fox <lora:x:0.8>"
    assert main(["txt2img", told, "-o", str(tmp_path / "b.png"), *how]) == 0
    assert Image.open(tmp_path / "b.png").tobytes() == want
    two = ["--lora", str(model / "lora" / "x.safetensors") + ":0.3", "--lora", "x:0.5"]
    assert main(["txt2img", "a fox", *two, "-o", str(tmp_path / "c.png"), *how]) == 0
    assert read_parameters(tmp_path / "c.png")["prompt"].endswith("x.safetensors:0.3> <lora:x:0.5>")
    close = torch.frombuffer(bytearray(Image.open(tmp_path / "c.png").tobytes()), dtype=torch.uint8).int()
    assert (close - torch.frombuffer(bytearray(want), dtype=torch.uint8).int()).abs().max() <= 1
    capsys.readouterr()
    for words, said in {
        ("a fox", "--lora", "nothing"): "there is no LoRA 'nothing': give its file, or one of x",
        ("a fox", "--lora", "x:nan"): "scale is nan",
        ("a fox <lora:x:1", "--seed", "2"): "that nobody can read",
        ("a fox <lora:x:1>", "a cat"): "the prompts name different LoRAs",
        ("a fox", "--negative-prompt", "<lora:x:1>"): "stands in the negative prompt",
    }.items():
        assert main(["txt2img", *words, "-o", str(tmp_path / "no"), *how]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()
