"""SD 2, SDXL and its refiner: as deep as they are, an eighth as wide or less, beside diffusers and transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from family import SIZES, family, save_family, save_single
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdlearn.checkpoint import load as loading
from sdlearn.checkpoint.configs import text_to_json, unet_to_json
from sdlearn.checkpoint.load import build, empty, plan, rules
from sdlearn.checkpoint.dialects import rename
from sdlearn.clip import CLIPTextEncoder
from sdlearn.pipeline import StableDiffusion
from sdlearn.prediction import EPSILON, V
from sdlearn.request import Request
from sdlearn.schedule import Schedule, scaled_linear, zero_terminal_snr
from sdlearn.sdxl import MicroConditioning, PartOfTheWay
from sdlearn.unet import UNet

KINDS = list(SIZES)
PROMPT = "a fox to the left of a green umbrella"
PIPELINES = {"SD 2": StableDiffusionPipeline, "SDXL": StableDiffusionXLPipeline,
             "SDXL refiner": StableDiffusionXLImg2ImgPipeline}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A kind, and the same folder read by sdlearn and by diffusers."""
    folder = tmp_path_factory.mktemp("model")
    save_family(folder, request.param)
    return request.param, StableDiffusion.load(folder, "cpu", torch.float32), theirs_of(request.param, folder)


def theirs_of(kind, folder):
    pipe = PIPELINES[kind].from_pretrained(folder, dtype=torch.float32, **({"add_watermarker": False} if "XL" in kind else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def far(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


# --- the real sizes, without numbers
COUNTS = {"SD 2": {"unet": (865_910_724, 686), "text_encoder": (340_387_840, 372)},
          "SDXL": {"unet": (2_567_463_684, 1680), "text_encoder_2": (694_659_840, 517)},
          "SDXL refiner": {"unet": (2_259_526_660, 1220), "text_encoder_2": (694_659_840, 517)}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_counts_of_the_real_sizes(kind):
    sizes = loading.SIZES[kind]
    with torch.device("meta"):
        theirs = {"unet": UNet2DConditionModel.from_config(unet_to_json(sizes.unet, 128))}
        for part, make in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if config := getattr(sizes, part):
                theirs[part] = make(make.config_class(**text_to_json(config)))
    for part, reference in theirs.items():
        config = getattr(sizes, part)
        model = empty(UNet if part == "unet" else CLIPTextEncoder, config)
        names = {rename(name, rules(config)): tuple(x.shape) for name, x in model.state_dict().items()}
        found = {name.removeprefix("text_model."): tuple(x.shape) for name, x in reference.state_dict().items()}
        assert names == found
        numbers = sum(p.numel() for p in model.parameters())
        wanted = COUNTS[kind].get(part)
        if wanted:
            assert (numbers, len(names)) == wanted


# --- beside diffusers
@torch.no_grad()
def test_every_hidden_state_and_the_pooled_text(both):
    kind, ours, theirs = both
    for part in [name for name in ours.networks() if name.startswith("text_encoder")]:
        tokenizer = ours.parts[part.replace("text_encoder", "tokenizer")]
        reference = getattr(theirs, part.replace("text_encoder", "tokenizer"))
        tokens = tokenizer([PROMPT, ""])
        assert torch.equal(tokens, torch.tensor(reference([PROMPT, ""], padding="max_length").input_ids))
        answer = getattr(theirs, part)(tokens, output_hidden_states=True)
        states = ours.parts[part].hidden_states(tokens)
        assert len(states) == len(answer.hidden_states) > 12
        assert max(far(a, b) for a, b in zip(states, answer.hidden_states, strict=True)) <= 1e-4
    found = ours.encode([PROMPT, ""])
    if kind == "SD 2":
        assert found.keys() == {"context"} and far(found["context"], answer.last_hidden_state) <= 1e-4
        return
    context, _, pooled, _ = theirs.encode_prompt([PROMPT, ""], do_classifier_free_guidance=False)
    assert found["context"].std() > 0.1 and far(found["context"], context) <= 1e-4
    assert far(found["pooled"], pooled) <= 1e-4
    skipped = ours.encode([PROMPT, ""], clip_skip=3)["context"]
    wanted = theirs.encode_prompt([PROMPT, ""], do_classifier_free_guidance=False, clip_skip=3)[0]
    assert far(skipped, wanted) <= 1e-4 and far(skipped, context) > 1e-2


@torch.no_grad()
def test_the_answer_of_the_unet_at_several_times(both):
    kind, ours, theirs = both
    dice, t = torch.Generator().manual_seed(0), torch.tensor([999, 500, 1])
    latents = torch.randn(3, 4, 9, 12, generator=dice)  # no multiples of 4
    told = ours.encode([PROMPT, "a cat", ""])
    more = {}
    if kind != "SD 2":
        ids = torch.tensor([[512.0, 768, 0, 64, 1024, 1000], [64, 64, 0, 0, 64, 64], [1, 2, 3, 4, 5, 6]])
        ids = ids[:, : 5 if ours.is_refiner() else 6]
        told["ids"], more = ids, {"added_cond_kwargs": {"text_embeds": told["pooled"], "time_ids": ids}}
    answer = theirs.unet(latents, t, told["context"], **more).sample
    assert answer.std() > 0.1 and far(ours.unet(latents, t, **told), answer) <= 1e-4
    if kind != "SD 2":
        told["ids"] = ids.flip(1)
        assert far(ours.unet(latents, t, **told), answer) > 1e-3


def draw_theirs(pipe, latents, prompt=PROMPT, negative=None, **how):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    how |= {"num_inference_steps": 4, "guidance_scale": 5.0} | how
    how |= {} if latents is None else {"latents": latents, "height": 64, "width": 64}
    return np.asarray(pipe(prompt, negative_prompt=negative, **how).images[0])


@pytest.fixture
def latents():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_the_same_picture(both, latents, negative):
    kind, ours, theirs = both
    how = {"negative_prompt": negative, "steps": 4, "cfg_scale": 5.0, "sampler": "ddim"}
    if kind == "SDXL refiner":
        start = ours.decode(latents)[0]
        mine = ours.img2img(PROMPT, start, strength=0.5, seed=3, **how)[0]
        image = torch.from_numpy(np.asarray(start)).permute(2, 0, 1)[None] / 255
        other = draw_theirs(theirs, None, negative=negative or None, image=image, strength=0.5,
                            generator=torch.Generator().manual_seed(3))  # fmt: skip
    else:
        mine = ours.txt2img(PROMPT, latents=latents, **how)[0]
        other = draw_theirs(theirs, latents, negative=negative or None)
    assert np.asarray(mine).std() > 5 and far(mine, other) <= 1


def test_an_empty_negative_prompt_is_zeros_where_the_unet_was_trained_so(both):
    kind, ours, _ = both
    request = Request(["a cat", "a dog"], negative_prompt=["", "blurry"], n=2, seed=0,
                      latents=torch.zeros(4, 4, 8, 8))  # fmt: skip
    cond, uncond = ours.told(request)
    empty_rows = [not x.any() for x in uncond["context"]]
    assert empty_rows == ([True, True, False, False] if kind == "SDXL" else [False] * 4)
    assert cond["context"].any(dim=-1).all()
    if kind != "SD 2":
        assert [not x.any() for x in uncond["pooled"]] == empty_rows
    without = ours.told(replace(request, cfg_scale=1.0))
    assert without[1] is None and without[0].keys() == cond.keys()
