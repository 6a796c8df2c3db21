"""What a checkpoint is, told from its header: every kind, at full size, at once and without running anything."""

import importlib
import json
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_files import CLUTTER, ema_shapes, header, sd15_shapes, write_sparse
from random_model import save_random_model
from repository import ROOT
from safetensors.torch import save_file

from sdlearn.checkpoint.dialects import called, recognise
from sdlearn.checkpoint.files import read_tensors
from sdlearn.checkpoint.inspect import PARTS, inspect, to_json, to_text
from sdlearn.checkpoint.load import load

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
SD1 = {"U-Net": (686, 859_520_964), "VAE": (248, 83_653_863), "text encoder": (196, 123_060_480)}
POSITIONS = {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}
LDM_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
KOHYA = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def sd15():
    return sd15_shapes()


def together(parts):
    return {name: shape for part in parts.values() for name, shape in part.items()}


CHILD = """
import sys, time
from sdlearn import cli
code = cli.main(["inspect", sys.argv[1]])
heavy = {"torch", "huggingface_hub"} & {name.partition(".")[0] for name in sys.modules}
try:
    most = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))  # kB
except OSError:
    most = 0  # only Linux tells
print(code, time.process_time(), int(most) // 1024, *heavy)
"""


def in_a_fresh_process(path, most=8.0, torch=True):
    """The lines that `sdlearn inspect` prints, after it was seen to be quick, and small where torch is not needed.

    A Stable Diffusion 1 is compared with our own networks, so torch is imported then.
    """
    result = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    code, seconds, megabytes, *heavy = last.split()
    assert code == "0" and float(seconds) < most and (heavy == ["torch"] or not torch)
    assert torch or (not heavy and int(megabytes) < 80)
    return lines


@pytest.mark.slow
def test_a_full_size_file_with_all_its_clutter(sd15, tmp_path):
    shapes = together(sd15) | ema_shapes(sd15["unet"]) | CLUTTER | POSITIONS
    path = write_sparse(tmp_path / "sd.safetensors", shapes, metadata={"format": "pt"}, position_ids="I64")
    assert path.stat().st_size > 7e9
    lines = in_a_fresh_process(path)
    path.unlink()
    assert lines == [
        f"path      {path}",
        "is        Stable Diffusion 1.x, in one file, LDM names",
        "size      7.70 GB, .safetensors",
        "metadata  format: pt",
        f'draw      sdlearn txt2img "..." --model {path}',
        "but       the EMA copies are left aside, the plain weights are used",
        "  part         tensors     parameters  precision",
        "  U-Net            686    859,520,964  float32",
        "  VAE              248     83,653,863  float32",
        "  text encoder     196    123,060,480  float32",
        "  EMA copies       686    859,520,964  float32",
        "  left aside        16         12,080  float32",
    ]


@pytest.mark.slow
def test_a_full_size_pickle(sd15, tmp_path):
    path = tmp_path / "sd.ckpt"
    with torch.serialization.skip_data():  # torch writes all but the numbers
        tensors = {name: torch.empty(shape, dtype=torch.float16) for name, shape in together(sd15).items()}
        torch.save({"state_dict": {"state_dict": tensors}, "global_step": 840000}, path)
    assert path.stat().st_size > 2.1e9
    lines = in_a_fresh_process(path, most=12.0)
    path.unlink()
    assert lines[1:4] == ["is        Stable Diffusion 1.x, in one file, LDM names", "size      2.13 GB, .ckpt",
                          f'draw      sdlearn txt2img "..." --model {path}']  # fmt: skip
    assert [line.split()[-3:] for line in lines[5:]] == [
        [str(tensors), f"{parameters:,}", "float16"] for tensors, parameters in SD1.values()
    ]


def test_what_is_no_whole_model_is_told_without_torch(tmp_path):
    path = write_sparse(tmp_path / "x.safetensors", KINDS[8][0], "F16")
    assert in_a_fresh_process(path, most=3.0, torch=False)[1].startswith("is        LoRA for SD 1, rank 8 to 16")


def test_the_numbers_of_sd_1_5_are_those_of_our_models(sd15):
    for (tensors, parameters), shapes in zip(SD1.values(), (sd15["unet"], sd15["vae"], sd15["text"]), strict=True):
        counted = sum(torch.Size(shape).numel() for shape in shapes.values())
        assert (tensors, parameters) == (len(shapes), counted)


def test_parts_have_the_names_of_our_models(sd15):
    for part, shapes in zip(SD1, (sd15["unet"], sd15["vae"], sd15["text"]), strict=True):
        assert all(re.match(PARTS[part], name) for name in shapes)


KINDS = [  # tensors -> what the text says, what a sentence of the loader says
    ({LDM_K: (320, 1024), FIRST: (320, 4, 3, 3), "cond_stage_model.model.ln_final.bias": (1024,)},
     "Stable Diffusion 2.x (base or v: its tensors do not say), in one file, LDM names", "a Stable Diffusion 2"),
    ({LDM_K: (320, 1024), FIRST: (320, 9, 3, 3), "cond_stage_model.model.ln_final.bias": (1024,)},
     "Stable Diffusion 2.x (base or v: its tensors do not say), inpainting, in one file", "a Stable Diffusion 2"),
    ({LDM_K: (320, 2048), FIRST: (320, 4, 3, 3), "conditioner.embedders.0.transformer.text_model.x": (1,),
      "conditioner.embedders.1.model.ln_final.bias": (1280,)},
     "Stable Diffusion XL (base, or Turbo: its tensors do not say), in one", "an SDXL model"),
    ({LDM_K: (320, 2048), FIRST: (320, 9, 3, 3), "conditioner.embedders.0.transformer.text_model.x": (1,)},
     "Stable Diffusion XL (base, or Turbo: its tensors do not say), inpainting, in one file", "an SDXL model"),
    ({LDM_K: (384, 1280), FIRST: (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.bias": (1280,)},
     "Stable Diffusion XL (refiner), in one file", "an SDXL refiner"),
    ({"encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "decoder.conv_in.weight": (512, 4, 3, 3)},
     "VAE alone for SD 1, SD 2 or SDXL (their shapes are the same), LDM names", "a VAE alone"),
    ({"first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1)}, "VAE alone, LDM names", "a VAE alone"),
    ({"decoder.mid_block.attentions.0.to_q.weight": (512, 512), "decoder.conv_in.weight": (512, 16, 3, 3),
      "encoder.down_blocks.0.resnets.0.conv1.bias": (128,)}, "VAE alone, diffusers names", "a VAE alone"),
    ({f"lora_unet_{KOHYA}.lora_down.weight": (16, 768), f"lora_unet_{KOHYA}.lora_up.weight": (320, 16),
      f"lora_unet_{KOHYA}.alpha": (), "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 768)},
     "LoRA for SD 1, rank 8 to 16 in 2 layers, written by kohya", "a LoRA"),
    ({f"lora_unet_{KOHYA}.lora_down.weight": (4, 2048), f"lora_unet_{KOHYA}.lora_up.weight": (320, 4)},
     "LoRA for SDXL, rank 4 in 1 layers, written by kohya", "a LoRA"),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)}, "LoRA for SDXL", "a LoRA"),
    ({f"lora_unet_{KOHYA}.hada_w1_b": (4, 768), f"lora_unet_{KOHYA}.hada_w1_a": (320, 4)}, "LoRA for SD 1", "a LoRA"),
    ({f"unet.{PEFT}.to_k.lora_A.weight": (4, 1024), f"unet.{PEFT}.to_k.lora_B.weight": (320, 4)},
     "LoRA for SD 2, rank 4 in 1 layers, written by diffusers (PEFT)", "a LoRA"),
    ({f"base_model.model.{PEFT}.to_k.lora_A.default.weight": (4, 768)}, "LoRA for SD 1, rank 4", "a LoRA"),
    ({f"unet.{PEFT}.processor.to_k_lora.down.weight": (4, 768)}, "LoRA for SD 1, rank 4 in 1", None),
    ({f"unet.{PEFT}.to_k.lora.down.weight": (4, 768)}, "LoRA for SD 1, rank 4 in 1", "a LoRA"),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}, "LoRA for FLUX", "a LoRA"),
    ({"control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
      "control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "ControlNet for SD 1, LDM names", "a ControlNet"),
    ({"input_hint_block.0.weight": (16, 3, 3, 3), LDM_K.removeprefix("model.diffusion_model."): (320, 1024)},
     "ControlNet for SD 2, LDM names", None),
    ({f"{PEFT}.to_k.weight": (320, 2048), "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
     "ControlNet for SDXL, diffusers names", "a ControlNet"),
    ({"emb_params": (8, 768)}, "textual inversion for SD 1, vectors: 8", "a textual inversion"),
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "textual inversion for SDXL, vectors: 2", "a textual inversion"),
    ({"<cat-toy>": (768,)}, "textual inversion for SD 1, vectors: 1", "a textual inversion"),
    ({"my-cat": (3, 1024)}, "textual inversion for SD 2, vectors: 3", None),
    ({"ip_adapter.1.to_k_ip.weight": (320, 768), "image_proj.proj.weight": (3072, 1024)}, "IP-Adapter for SD 1", None),
    ({"adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)}, "T2I-Adapter", None),
    ({f"{PEFT}.to_k.weight": (320, 768), "up_blocks.0.resnets.0.conv1.bias": (1,), "conv_in.weight": (320, 9, 3, 3)},
     "U-Net alone for SD 1, inpainting, diffusers names", "a U-Net alone"),
    ({f"{PEFT}.to_k.weight": (320, 768), "up_blocks.0.resnets.0.conv1.bias": (1,),
      "time_embedding.cond_proj.weight": (320, 256)}, "U-Net alone for SD 1, LCM, diffusers names", None),
    ({LDM_K: (320, 768), FIRST: (320, 8, 3, 3)}, "U-Net alone for SD 1, instruct-pix2pix, LDM", "a U-Net alone"),
    ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}, "text encoder", None),
    ({"vision_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}, "CLIP", None),
    ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, "Stable Diffusion 3, in one file", None),
    ({"double_blocks.0.img_attn.qkv.weight": (1, 1)}, "FLUX, in one file", None),
    ({"down_blocks.0.motion_modules.0.proj.weight": (1, 1)}, "motion module", None),
    ({"classifier.weight": (10, 512), "classifier.bias": (10,)}, "unknown", "unknown"),
]  # fmt: skip


@pytest.mark.parametrize("shapes, description, recognised", KINDS, ids=[description for _, description, _ in KINDS])
def test_kinds(tmp_path, shapes, description, recognised):
    report = inspect(write_sparse(tmp_path / "x.safetensors", shapes, "F16"))
    assert report.description.startswith(description)
    words = "textual inversion for SD 1", "textual inversion for SD 2", "textual inversion for SDXL"
    can = description.startswith((*words, "LoRA for SDXL, rank 4 in", "LoRA for SD 2"))  # others are half a LoRA
    assert bool(report.can) == can and len(report.but) == (not can)
    assert sum(part.tensors for part in report.parts) == len(shapes) and "others" not in [p.name for p in report.parts]
    assert {part.precision for part in report.parts} == {"float16"}
    if recognised:
        assert called(recognise(shapes)) == recognised


def test_inpainting_is_not_taken_for_a_plain_model(tmp_path):
    path = write_sparse(tmp_path / "x.safetensors", together(sd15_shapes(9)), "F16")
    report = inspect(path)
    assert report.description == "Stable Diffusion 1.x, inpainting, in one file, LDM names"
    assert report.can == f'sdlearn inpaint "..." --image FILE --mask FILE --model {path}' and not report.but
    assert report.parts[0][1:3] == (686, 859_535_364)
    report = inspect(write_sparse(path, together(sd15_shapes(8)), "F16"))
    reason = (
        "x.safetensors is a Stable Diffusion 1 for instruct-pix2pix, but a whole checkpoint of SD 1, SD 2 or SDXL is "
        "wanted"
    )
    assert report.can == "" and len(report.but) == 1 and report.but[0].endswith(reason)


def test_a_published_lcm_is_a_u_net_alone_and_is_told_where_it_belongs(tmp_path):
    shapes = {LDM_K: (320, 768), FIRST: (320, 4, 3, 3), "time_embedding.cond_proj.weight": (320, 256)}
    report = inspect(write_sparse(tmp_path / "x.safetensors", shapes, "F16"))
    assert report.but[0].endswith("SDXL is wanted: put it into the folder unet of one")


def test_where_a_file_differs_from_sd_1_5(sd15, tmp_path):
    path, whole = tmp_path / "x.safetensors", together(sd15)
    last = "model.diffusion_model.out.2.bias"
    changes = {
        f"lacks the tensor {last}": {k: v for k, v in whole.items() if k != last},
        f": {last} is (5,) of float32, but the configuration wants floats in (4,)": whole | {last: (5,)},
        "has a tensor that no part takes, surprise.weight": whole | {"surprise.weight": (3,)},
        "has no VAE: name the file of one with --vae": {k: v for k, v in whole.items() if k not in sd15["vae"]},
    }
    for reason, shapes in changes.items():
        report = inspect(write_sparse(path, shapes))
        assert report.can == "" and len(report.but) == 1 and reason in report.but[0]
    assert "of int8, but the configuration wants floats" in inspect(write_sparse(path, whole, "I8")).but[0]
    mixed = inspect(write_sparse(path, whole, "F16", weight="BF16"))
    assert mixed.can and [part.precision for part in mixed.parts] == ["bfloat16, float16"] * 3


def test_metadata_is_shown_and_made_safe(tmp_path):
    metadata = {f"ss_{i}": "x" * 500 for i in range(9)} | {
        "a\x1b[31m": "red\nalert",
        "ss_base_model_version": "sdxl_v1",
    }
    path = write_sparse(tmp_path / "x.safetensors", {"lora_unet_x.lora_down.weight": (4, 320)}, metadata=metadata)
    report = inspect(path)
    assert report.description == "LoRA for SDXL, rank 4 in 1 layers, written by kohya"
    text = to_text(report)
    assert "a?[31m: red?alert" in text and "and 5 more entries; --json shows all" in text and "\x1b" not in text
    assert max(len(line) for line in text.splitlines() if not line.startswith(("path", "because"))) < 130
    content = json.loads(to_json(report))
    assert content["metadata"] == metadata and content["parts"] == [
        {"name": "U-Net", "tensors": 1, "parameters": 1280, "precision": "float32"}
    ]


def test_our_own_tiny_model():
    report = inspect(TINY)
    assert report.description == "the course's own tiny model, diffusers folder" and report.can and not report.but
    assert [part.name for part in report.parts] == ["text_encoder", "vae", "unet", "clip", "judge"]
    files = (path for part in report.parts for path in (TINY / part.name).glob("*.safetensors"))
    assert report.bytes == sum(path.stat().st_size for path in files)


def test_folders(tmp_path):
    save_random_model(tmp_path)
    assert inspect(tmp_path).description == "a Stable Diffusion of its own sizes, diffusers folder"
    for path in [*tmp_path.rglob("*model.safetensors")]:
        path.rename(path.with_suffix(".fp16.safetensors"))
    report = inspect(tmp_path)
    assert report.format == "diffusers folder, fp16 variant" and report.can
    assert load(tmp_path)  # and it is true
    assert inspect(tmp_path / "vae").description == "VAE alone, diffusers names"
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    report = inspect(tmp_path)
    assert report.can == "" and report.description == "StableDiffusionXLPipeline, diffusers folder, fp16 variant"


@pytest.mark.parametrize("width, scheduler, description", [
    (768, {}, "Stable Diffusion 1.x, diffusers folder"),
    (1024, {"prediction_type": "v_prediction"}, "Stable Diffusion 2.x (v_prediction), diffusers folder"),
    (1024, {}, "Stable Diffusion 2.x (epsilon), diffusers folder"),
])  # fmt: skip
def test_families_of_folders(tmp_path, width, scheduler, description):
    save_random_model(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    unet = {f"{PEFT}.to_k.weight": (320, width), "conv_in.weight": (320, 4, 3, 3), "up_blocks.0.x": (1,)}
    write_sparse(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", unet)
    report = inspect(tmp_path)
    assert report.description == description and not report.can  # it is no whole U-Net
    write_sparse(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", unet | {"conv_in.weight": (320, 9, 3, 3)})
    assert ", inpainting, diffusers folder" in inspect(tmp_path).description and not inspect(tmp_path).can


def all_sorts_of_tensors():
    table = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "plain": table.clone(), "parameter": torch.nn.Parameter(table.half()), "bf16": table.bfloat16(),
        "transposed": table.T, "view": table[1:, 2:], "expanded": torch.ones(1).expand(5, 7), "scalar": torch.ones(()),
        "empty": torch.ones(0, 3), "long": torch.arange(3), "bool": torch.ones(2, dtype=torch.bool),
        "float8": table.to(torch.float8_e4m3fn), "double": table.double(),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "old ckpt", "ordered ckpt"])
def test_headers_say_what_torch_loads(tmp_path, form):
    path, tensors = tmp_path / f"x.{form.split()[-1]}", all_sorts_of_tensors()
    if form == "safetensors":
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    elif form == "ordered ckpt":
        state = OrderedDict(tensors)
        state._metadata = {"": {"version": 1}}  # as nn.Module.state_dict() leaves it
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        tensors = {name: value for name, value in tensors.items() if "old" not in form or name != "float8"}
        torch.save(tensors, path, _use_new_zipfile_serialization="old" not in form)
    found = read_tensors(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[n].float(), x.float()) for n, x in tensors.items())
    assert found.entries == {
        name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in found.items()
    }


def test_textual_inversion_of_the_web_ui(tmp_path):
    vectors = torch.nn.Parameter(torch.ones(4, 768))
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": vectors}, "name": "cat"}
    torch.save(content, tmp_path / "cat.pt")
    assert inspect(tmp_path / "cat.pt").description == "textual inversion for SD 1, vectors: 4"


class Trainer:
    """Stands for the classes of a training framework, which old checkpoints name."""


def test_a_pickle_that_names_a_class_is_described_but_not_promised(tmp_path):
    torch.save({"state_dict": {"emb_params": torch.ones(2, 768)}, "callbacks": {Trainer: 3}}, tmp_path / "x.ckpt")
    report = inspect(tmp_path / "x.ckpt")
    assert report.kind == "textual inversion" and report.can == ""
    assert report.but[0].endswith(
        "x.ckpt holds more than tensors (its pickle names test_inspection.Trainer): take the .safetensors file"
    )
    with pytest.raises(ValueError, match="holds more than tensors"):  # and it is true
        load(tmp_path / "x.ckpt")


class Acts:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return exec, (f"open({self.trace!r}, 'w').close()",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(
    "way", ["zip", "old", "plain", "protocol 0", "inst", "obj", "hidden in a table", "after damage"]
)
def test_a_pickle_that_acts_is_not_obeyed(tmp_path, way):
    path, trace = tmp_path / "x.ckpt", tmp_path / "trace"
    code = f'open("{trace}", "w").close()'.encode()
    if way in ("zip", "old"):
        torch.save({"w": torch.ones(1), "x": Acts(trace)}, path, _use_new_zipfile_serialization=way == "zip")
    elif way == "plain":
        path.write_bytes(pickle.dumps({"x": Acts(trace)}))
    elif way == "hidden in a table":
        torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": {"a": [{"b": (Acts(trace),)}]}}, path)
    else:
        program = {
            "protocol 0": b"\x80\x02cbuiltins\nexec\n(S'" + code + b"'\ntR.",
            "inst": b"\x80\x02(S'" + code + b"'\nibuiltins\nexec\n.",
            "obj": b"\x80\x02(cbuiltins\nexec\nS'" + code + b"'\no.",
            "after damage": b"\x80\x02cbuiltins\nexec\n(S'" + code + b"'\ntRq\x00\xff\xff",
        }[way]
        path.write_bytes(program)
        if way != "after damage":
            pickle.loads(program)  # it would act
            assert trace.exists()
            trace.unlink()
    with pytest.raises(
        ValueError, match=r"runs code when it is opened \(it calls builtins.exec\); nothing of it was run"
    ):
        inspect(path)
    assert not trace.exists()
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        load(path)
    assert not trace.exists()


def torch_zip(path, program: bytes, **records: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        for name, content in records.items():
            archive.writestr(f"x/data/{name}", content)


@pytest.mark.parametrize("program", [
    b"\x80\x02}r\xff\xff\xff\x7f.",  # asks for a memo of 2**31 entries
    b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",  # bytes that would fill any memory
    b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".",
    b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a table that holds itself
    b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
    b"\x80\x02" + b"]" * 100_000 + b"0" * 99_999 + b".",
    b"\x80\x02ccollections\nOrderedDict\n}X\x05\x00\x00\x00itemsNsb.",  # writes upon a class
    b"\x80\x02\x82\x01.",  # an extension of pickle
    b"\x80\x02(X\x07\x00\x00\x00storageNNNNtQ.",
    b"\x80\x02.", b"",
])  # fmt: skip
def test_malicious_programs_fail_small(tmp_path, program):
    torch_zip(tmp_path / "x.ckpt", program)
    with pytest.raises(ValueError, match=r"x\.ckpt (is damaged|holds)"):
        inspect(tmp_path / "x.ckpt")


def test_random_damage_is_always_one_sentence(tmp_path):
    """Flip bits in the headers of good files: whatever comes out is an answer or a ValueError."""
    generator = torch.Generator().manual_seed(0)
    small = {"lora_unet_x.lora_down.weight": (4, 3), "lora_unet_x.lora_up.weight": (3, 4)}
    write_sparse(tmp_path / "x.safetensors", small, metadata={"a": "b"})
    torch.save({"state_dict": {name: torch.ones(shape) for name, shape in small.items()}}, tmp_path / "x.ckpt")
    torch.save({"x": torch.ones(3)}, tmp_path / "y.ckpt", _use_new_zipfile_serialization=False)
    refused = 0
    for name in ("x.safetensors", "x.ckpt", "y.ckpt"):
        path = tmp_path / name
        good = path.read_bytes()
        for i in torch.randint(0, 8 * len(good), (100,), generator=generator).tolist():
            place, bit = divmod(i, 8)
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            try:
                inspect(path)
            except ValueError as error:
                refused += 1
                assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 400
    assert refused > 60


def test_a_header_can_be_read_back(tmp_path):
    """The helper of these tests writes what the safetensors library reads."""
    from safetensors import safe_open

    path = write_sparse(tmp_path / "x.safetensors", {"a": (2, 3), "b": ()}, "BF16", {"k": "v"})
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").shape == (2, 3) and file.metadata() == {"k": "v"}
    assert header({"a": (2,)})[:8] == len(header({"a": (2,)})[8:]).to_bytes(8, "little")


@pytest.mark.parametrize("name, what, who", [
    ("inpainting", "inpainting", "sdlearn.tiny.inpainting.load_inpainting"),
    ("crops", "crops", "sdlearn.tiny.crops.load_crops"),
])  # fmt: skip
def test_the_differences_that_are_shipped(name, what, who):
    """They are no models; inspect says what each is, and who makes one of it."""
    report = inspect(ROOT / "checkpoints" / "tiny" / name / "difference.safetensors")
    assert report.description == f"difference to the tiny model's U-Net, for {what}" and not report.can
    assert report.but == [f"it is the change of a U-Net, and no model: {who}(BASE).save(FOLDER) writes the whole one"]
    module, function = who.rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), function))
