"""`inspect` and `load` ask one function what a folder or file is: over odd ones, they agree each time."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import sd15_shapes, write_sparse
from random_model import save_random_model
from safetensors.torch import load_file, save_file

from sdlearn.checkpoint.inspect import inspect
from sdlearn.checkpoint.load import load
from sdlearn.lora import load_lora

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
Change = Callable[[Path], object]


def config(part: str, **changes: object) -> Change:
    """Other values in a part's JSON; ... takes a key away."""
    name = {"scheduler": SCHEDULER, "index": "model_index.json"}.get(part, f"{part}/config.json")

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(content))

    return change


def gone(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def stray(name: str, content: bytes = b"nothing that anybody could read") -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(name: str, change: Callable[[dict], object]) -> Change:
    def changed(folder: Path) -> None:
        content = load_file(folder / name)
        change(content)
        save_file(content, folder / name)

    return changed


def renamed(name: str, new: str) -> Change:
    return lambda folder: (folder / name).rename(folder / new)


def marked(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def pickled(name: str) -> Change:
    def change(folder: Path) -> None:
        torch.save(load_file(folder / name), (folder / name).with_suffix(".bin"))
        (folder / name).unlink()

    return change


def sharded(suffix: str = ".safetensors", lose: bool = False) -> Change:
    def change(folder: Path) -> None:
        path, places = folder / UNET, {}
        content = list(load_file(path).items())
        path.unlink()
        for i, part in enumerate((content[::2], content[1::2])):
            name = f"diffusion_pytorch_model-0000{i + 1}-of-00002{suffix}"
            places |= dict.fromkeys(dict(part), name)
            (save_file if suffix == ".safetensors" else torch.save)(dict(part), path.parent / name)
        index = path.with_name(f"diffusion_pytorch_model{suffix}.index.json")
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        if lose:
            (path.parent / places[content[0][0]]).unlink()

    return change


def modern(merges: type = list) -> Change:
    """tokenizer.json alone, as transformers 5 writes it."""

    def change(folder: Path) -> None:
        here = folder / "tokenizer"
        pairs = [line.split() for line in (here / "merges.txt").read_text().split("\n")[1:] if line]
        vocab = json.loads((here / "vocab.json").read_text())
        model = {"type": "BPE", "vocab": vocab, "merges": [merges(p) if merges is list else " ".join(p) for p in pairs]}
        (here / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
        for name in ("merges.txt", "vocab.json", "special_tokens_map.json"):
            (here / name).unlink()

    return change


def added(*ids: int, grow: bool = True) -> Change:
    def change(folder: Path) -> None:
        count = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
        words = {f"<cat-{i}>": count + i for i in ids}
        (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps(words))
        if grow:
            more = len(words)
            name = "text_model.embeddings.token_embedding.weight"
            tensors(TEXT, lambda c: c.update({name: torch.cat([c[name], c[name][:more]])}))(folder)
            config("text_encoder", vocab_size=count + more)(folder)

    return change


GOOD: dict[str, Change] = {
    "as it was saved": lambda folder: None,
    "a byte-order mark in every JSON": lambda folder: [marked(str(p.relative_to(folder)))(folder)
                                                       for p in folder.rglob("*.json")],
    "a stray .bin beside the weights": stray("unet/diffusion_pytorch_model.bin"),
    "a stray fp16 variant": stray("vae/diffusion_pytorch_model.fp16.safetensors"),
    "pickles": lambda folder: [pickled(name)(folder) for name in (UNET, VAE, TEXT)],
    "fp16 variants alone": renamed(UNET, "unet/diffusion_pytorch_model.fp16.safetensors"),
    "two shards": sharded(),
    "two pickled shards": sharded(".bin"),
    "tokenizer.json alone, pairs": modern(list),
    "tokenizer.json alone, words": modern(str),
    "an added token": added(0),
    "inpainting": lambda folder: (
        config("unet", in_channels=9)(folder),
        tensors(UNET, lambda c: c.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)}))(folder)),
    "three added tokens": added(0, 1, 2),
    "squaredcos_cap_v2": config("scheduler", beta_schedule="squaredcos_cap_v2"),
    "linear betas": config("scheduler", beta_schedule="linear"),
    "trained betas": config("scheduler", trained_betas=[0.001] * 1000),
    "zero SNR": config("scheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "v_prediction": config("scheduler", prediction_type="v_prediction"),
    "samples are clipped": config("scheduler", clip_sample=True),
    "set_alpha_to_one": config("scheduler", set_alpha_to_one=True),
    "no steps_offset": config("scheduler", steps_offset=...),
    "an empty scheduler": lambda folder: (folder / SCHEDULER).write_text("{}"),
    "swish": config("unet", act_fn="swish"),
    "keys of tomorrow": config("unet", a_key_of_tomorrow={"x": 1}),
    "an oblong": config("unet", sample_size=[6, 8]),
    "no sample_size": config("unet", sample_size=None),
    "layers_per_block, a list": config("unet", layers_per_block=[1, 1]),
    "no text_model": tensors(TEXT, lambda c: [c.update({n.removeprefix("text_model."): c.pop(n)}) for n in [*c]]),
    "position_ids": tensors(TEXT, lambda c: c.update({"text_model.embeddings.position_ids": torch.arange(77)})),
    "attention of 2022": tensors(VAE, lambda c: [c.update({n.replace(".to_q.", ".query."): c.pop(n)}) for n in [*c]]),
    "a safety checker that is not there": config("index", safety_checker=["stable_diffusion", "Checker"]),
    "gelu": config("text_encoder", hidden_act="gelu"),
    "SD 2's projections": config("unet", use_linear_projection=True),  # a 1x1 convolution holds the same numbers
    "a link to it": lambda folder: (folder.rename(folder.parent / "behind"), folder.symlink_to("behind")),
}  # fmt: skip
BAD: dict[str, Change] = {
    "relu": config("text_encoder", hidden_act="relu"),
    "norm_eps 1e-6": config("unet", norm_eps=1e-6),
    "SDXL's additions": config("unet", addition_embed_type="text_time"),
    "intermediate_size": config("text_encoder", intermediate_size=100),
    "unequal layers_per_block": config("unet", layers_per_block=[1, 2]),
    "sample_size 1.5": config("unet", sample_size=1.5),
    "no down_block_types": config("unet", down_block_types=None),
    "10^18 channels": config("unet", block_out_channels=[10**18, 10**18]),
    "10^6 channels": config("unet", block_out_channels=[10**6, 10**6]),
    "10^6 layers": config("unet", layers_per_block=10**6),
    "10^6 layers of text": config("text_encoder", num_hidden_layers=10**6),
    "10^6 layers of the VAE": config("vae", layers_per_block=10**6),
    "eight answers": lambda folder: (
        config("unet", out_channels=8)(folder),
        tensors(UNET, lambda c: c.update({n: torch.cat([c[n], c[n]]) for n in [*c] if n[:9] == "conv_out."}))(folder)),
    "eight channels": lambda folder: (
        config("unet", in_channels=8)(folder),
        tensors(UNET, lambda c: c.update({"conv_in.weight": torch.zeros(32, 8, 3, 3)}))(folder)),
    "text of another width": config("unet", cross_attention_dim=16),
    "a token that the text encoder lacks": added(0, grow=False),
    "added tokens with a gap": added(0, 2),
    "fixed_large": config("scheduler", _class_name="DDPMScheduler", variance_type="fixed_large"),
    "a flow": config("scheduler", prediction_type="flow_prediction"),
    "thresholding": config("scheduler", thresholding=True),
    "betas of words": config("scheduler", beta_start="small"),
    "no tokenizer": gone("tokenizer"),
    "an empty tokenizer": lambda folder: [path.unlink() for path in (folder / "tokenizer").iterdir()],
    "a vocabulary of another": lambda folder: (folder / "tokenizer" / "vocab.json").write_text('{"!": 0}'),
    "no scheduler": gone("scheduler"),
    "no config of the U-Net": gone("unet/config.json"),
    "no VAE": gone("vae"),
    "no weights": gone(UNET),
    "an empty file": stray(UNET, b""),
    "a shard is missing": sharded(lose=True),
    "SDXL's pipeline": config("index", _class_name="StableDiffusionXLPipeline"),
    "a pipeline of no name": config("index", _class_name=7),
    "one tensor less": tensors(UNET, lambda c: c.pop("conv_in.bias")),
    "one tensor more": tensors(UNET, lambda c: c.update({"more": torch.zeros(1)})),
    "another shape": tensors(VAE, lambda c: c.update({"quant_conv.bias": torch.zeros(3)})),
    "whole numbers": tensors(VAE, lambda c: c.update({"quant_conv.bias": torch.zeros(8, dtype=torch.int64)})),
    "text in a JSON": stray("vae/config.json", b"{ rubbish"),
    "a list in a JSON": stray("vae/config.json", b"[1]"),
    "a folder in the place of a file": lambda folder: (gone("vae/config.json")(folder),
                                                       (folder / "vae" / "config.json").mkdir()),
    "a pipe in the place of a file": lambda folder: (gone(SCHEDULER)(folder), os.mkfifo(folder / SCHEDULER)),
    "a pickle that names a class": lambda folder: (
        torch.save(load_file(folder / UNET) | {"x": {pytest.Item: 1}}, (folder / UNET).with_suffix(".bin")),
        gone(UNET)(folder)),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_random_model(folder)
    shutil.rmtree(folder / "clip")
    return folder


def answers(path: Path) -> tuple[bool, str, bool, str]:
    """Whether inspect and load say yes, and their reasons."""
    try:
        report = inspect(path)
        promised, why = bool(report.can), "; ".join(report.but)
    except ValueError as error:
        promised, why = False, str(error)
    try:
        load(path, None)
        return promised, why, True, ""
    except ValueError as error:
        return promised, why, False, str(error)


@pytest.mark.parametrize("odd", [*GOOD, *BAD])
def test_folders(tmp_path, model, odd):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (GOOD | BAD)[odd](folder)
    promised, why, loaded, reason = answers(folder)
    assert promised == loaded == (odd in GOOD), (why, reason)
    assert why == reason and "\n" not in why  # one judge, one sentence


def test_there_are_enough():
    assert len(GOOD) + len(BAD) + len(FILES) >= 75


WORD = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
FILES = {  # tensors of a single file
    "SD 1 without all": {WORD: (768,)},
    "SD 2": {"cond_stage_model.model.ln_final.bias": (1024,)},
    "SDXL": {"conditioner.embedders.1.model.ln_final.bias": (1280,)},
    "a VAE": {"encoder.mid.attn_1.q.weight": (1, 1, 1, 1)},
    "unknown": {"x": (1,)},
}


@pytest.mark.parametrize("odd", FILES)
def test_files(tmp_path, odd):
    promised, why, loaded, reason = answers(write_sparse(tmp_path / "x.safetensors", FILES[odd]))
    assert (promised, loaded) == (False, False) and why == reason


def test_half_a_lora(tmp_path):
    """A LoRA has a reader of its own, which is asked there."""
    path = write_sparse(tmp_path / "x.safetensors", {"lora_unet_x.lora_down.weight": (4, 3)})
    with pytest.raises(ValueError) as error:
        load_lora(path, {})
    report = inspect(path)
    assert not report.can and report.but == [str(error.value)]


def test_whole_files(tmp_path):
    """At full size, and with one thing wrong; what is right is only looked at, for it would take gigabytes."""
    parts = sd15_shapes()
    whole = {name: shape for part in parts.values() for name, shape in part.items()}
    assert inspect(write_sparse(tmp_path / "X.SAFETENSORS", whole)).can
    nine = dict(sum((list(part.items()) for part in sd15_shapes(9).values()), []))
    assert inspect(write_sparse(tmp_path / "nine.safetensors", nine)).can.startswith("sdlearn inpaint ")
    for odd in (
        {k: v for k, v in whole.items() if k not in parts["vae"]},
        whole | {"lora_te_stray.alpha": ()},
        {k: v for k, v in whole.items() if k != WORD},
        whole | {WORD: (769,)},
        sum((list(sd15_shapes(8)[part].items()) for part in parts), []),
    ):
        promised, why, loaded, reason = answers(write_sparse(tmp_path / "x.safetensors", dict(odd)))
        assert (promised, loaded) == (False, False) and why == reason
