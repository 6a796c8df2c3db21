"""Every file that is shipped: diffusers loads it, and it means there what it means here."""

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from repository import ROOT

from sdlearn.controlnet import ControlNet
from sdlearn.inversion import add_embedding, read_embedding
from sdlearn.lora import load_lora, merge
from sdlearn.pipeline import StableDiffusion
from sdlearn.tiny.crops import load_crops
from sdlearn.tiny.inpainting import load_inpainting

pytestmark = pytest.mark.slow
TINY = ROOT / "checkpoints" / "tiny"
LORAS, WORDS = sorted(TINY.glob("lora/*")), sorted(TINY.glob("embeddings/*"))
CONTROLNETS = sorted(TINY.glob("controlnet-*"))
ELSEWHERE = {"text_encoder", "vae", "unet", "clip"}  # test_tiny_diffusers.py
OURS = {"judge"}  # a ruler of ours, in no format of theirs


def names(paths):
    return [path.stem for path in paths]


@pytest.fixture
def sd():
    return StableDiffusion.load(TINY, "cpu", torch.float32)


@pytest.fixture
def pipe():
    return StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, dtype=torch.float32)


def questions(channels=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, 16, 16, generator=g), torch.tensor([801, 101]), torch.randn(2, 77, 192, generator=g)


def far(ours, theirs):
    return (ours - theirs).abs().max().item()


def test_no_file_is_forgotten():
    there = {path.relative_to(TINY).parts[0] for path in TINY.rglob("*.safetensors")}
    here = {path.relative_to(TINY).parts[0] for path in (*LORAS, *WORDS, *CONTROLNETS)}
    assert there - OURS == here | ELSEWHERE | {"inpainting", "crops"} and len(here) >= 4


@pytest.mark.parametrize("path", LORAS, ids=names(LORAS))
@torch.no_grad()
def test_loras(sd, pipe, path):
    before = sd.unet(*questions())
    merge(sd.networks(), (load_lora(path, sd.networks()), 0.8))
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="x")
    pipe.set_adapters(["x"], [0.8])
    ours = sd.unet(*questions())
    assert far(ours, pipe.unet(*questions()).sample) <= 1e-4 and far(ours, before) > 0.01


@pytest.mark.parametrize("path", WORDS, ids=names(WORDS))
@torch.no_grad()
def test_words(sd, pipe, path):
    word = read_embedding(path)
    add_embedding(sd, word)
    pipe.load_textual_inversion(str(path.parent), weight_name=path.name)
    prompt = f"a {word.token} above a cat"
    theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    assert far(sd.encode([prompt])["context"], theirs) <= 1e-5


@pytest.mark.parametrize("path", CONTROLNETS, ids=names(CONTROLNETS))
@torch.no_grad()
def test_controlnets(path):
    hint = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    ours = ControlNet.load(path)(*questions(), hint)
    down, middle = ControlNetModel.from_pretrained(path)(*questions(), hint, return_dict=False)
    assert max(map(far, ours, [*down, middle])) <= 1e-4 and min(x.abs().max() for x in ours) > 0.01


@torch.no_grad()
def test_the_inpainting_twin(tmp_path):
    """What is shipped is a difference to our base, in no format of theirs; the whole model that it makes is in one."""
    nine = load_inpainting(TINY)
    nine.save(tmp_path, torch.float32)
    theirs = StableDiffusionInpaintPipeline.from_pretrained(tmp_path, safety_checker=None, dtype=torch.float32)
    assert theirs.unet.config.in_channels == 9
    assert far(nine.unet(*questions(9)), theirs.unet(*questions(9)).sample) <= 1e-4


@torch.no_grad()
def test_the_twin_that_is_told_of_crops(tmp_path):
    """Its six ids go where SDXL's go; there is no pooled text."""
    told = load_crops(TINY)
    told.save(tmp_path, torch.float32)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    ids = torch.tensor([[128, 128, 0, 64, 128, 128]] * 2)
    added = {"text_embeds": torch.zeros(2, 0), "time_ids": ids}
    ours = told.unet(*questions(), pooled=torch.zeros(2, 0), ids=ids)
    assert far(ours, theirs(*questions(), added_cond_kwargs=added).sample) <= 1e-4
