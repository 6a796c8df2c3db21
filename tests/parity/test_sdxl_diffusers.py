"""SD 2, SDXL and its refiner, as deep as they are and much narrower, beside diffusers and transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from family import SIZES, family, save_family, save_single
from full_model import fill
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdlearn.checkpoint.configs import text_to_json, unet_to_json
from sdlearn.checkpoint.dialects import rename
from sdlearn.checkpoint.inspect import inspect
from sdlearn.checkpoint.load import SIZES as REAL
from sdlearn.checkpoint.load import build, empty, plan, rules, save
from sdlearn.clip import CLIPTextEncoder
from sdlearn.pipeline import StableDiffusion
from sdlearn.prediction import V
from sdlearn.schedule import Schedule, scaled_linear, zero_terminal_snr
from sdlearn.sdxl import MicroConditioning, PartOfTheWay
from sdlearn.unet import UNet

pytestmark = pytest.mark.slow
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
    plain = {"add_watermarker": False} if "XL" in kind else {}
    pipe = PIPELINES[kind].from_pretrained(folder, dtype=torch.float32, **plain)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def far(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_of_the_real_sizes(kind):
    sizes = REAL[kind]
    with torch.device("meta"):
        theirs = {"unet": UNet2DConditionModel.from_config(unet_to_json(sizes.unet, 128))}
        for part, make in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if config := getattr(sizes, part):
                theirs[part] = make(make.config_class(**text_to_json(config)))
    for part, reference in theirs.items():
        config = getattr(sizes, part)
        ours = empty(UNet if part == "unet" else CLIPTextEncoder, config).state_dict()
        names = {rename(name, rules(config)): x.shape for name, x in ours.items()}
        assert names == {name.removeprefix("text_model."): x.shape for name, x in reference.state_dict().items()}


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


def test_a_latent_consistency_model_of_sdxl(tmp_path, latents):
    """A folder with the U-Net of lcm-sdxl, which is told its guidance, beside everything of SDXL."""
    parts = family("SDXL", deep=False)
    told = replace(parts.networks["unet"].config, guidance_width=16)
    parts.networks["unet"] = fill(empty(UNet, told), torch.Generator().manual_seed(1), torch.float32)
    save(tmp_path, parts, torch.float32)
    theirs = theirs_of("SDXL", tmp_path)
    assert isinstance(theirs.scheduler, LCMScheduler) and inspect(tmp_path).description.startswith(
        "StableDiffusionXLPipeline, LCM"
    )
    sd, pictures = StableDiffusion.load(tmp_path, "cpu", torch.float32), []
    for scale in (2.0, 8.0):
        how = {"num_inference_steps": 4, "guidance_scale": scale, "generator": torch.Generator().manual_seed(7)}
        other = theirs(PROMPT, latents=latents, height=64, width=64, **how).images[0]
        how = {"steps": 4, "sampler": "lcm", "cfg_scale": scale, "seed": 7}
        pictures += sd.txt2img(PROMPT, latents=latents, **how)
        assert far(pictures[-1], other) <= 1
    assert far(*pictures) > 2 and np.asarray(pictures[0]).std() > 5


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
        image = torch.from_numpy(np.array(start)).permute(2, 0, 1)[None] / 255
        other = draw_theirs(theirs, None, negative=negative or None, image=image, strength=0.5,
                            generator=torch.Generator().manual_seed(3))  # fmt: skip
    else:
        mine = ours.txt2img(PROMPT, latents=latents, **how)[0]
        other = draw_theirs(theirs, latents, negative=negative or None)
    assert np.asarray(mine).std() > 5 and far(mine, other) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_read_as_diffusers_reads_it(tmp_path, kind):
    parts = family(kind, clip=True)
    save(tmp_path / "folder", parts, torch.float32)  # diffusers finds its configurations there
    path = save_single(tmp_path / "x.safetensors", parts, kind)
    plain = {"add_watermarker": False} if "XL" in kind else {}
    theirs = PIPELINES[kind].from_single_file(
        str(path), config=str(tmp_path / "folder"), local_files_only=True, **plain
    )
    reference = theirs_of(kind, tmp_path / "folder")
    found = build(plan(path, sizes=SIZES[kind]), dtype=None)
    for name, part in parts.networks.items():
        if "tokenizer" in name:
            assert found.networks[name](PROMPT).tolist() == part(PROMPT).tolist()
            continue
        mine, wanted = found.networks[name].state_dict(), part.state_dict()
        assert mine.keys() == wanted.keys() and all(torch.equal(mine[key], wanted[key]) for key in mine)
        mine, wanted = getattr(theirs, name).state_dict(), getattr(reference, name).state_dict()
        assert mine.keys() == wanted.keys() and all(torch.equal(mine[key], wanted[key]) for key in mine)


@pytest.mark.parametrize("zero", [False, True], ids=["v", "v, zero SNR"])
def test_v_of_sd_2(tmp_path, latents, zero):
    betas = zero_terminal_snr(scaled_linear()) if zero else scaled_linear()
    save_family(tmp_path, "SD 2", prediction=V, schedule=Schedule(betas, "trailing" if zero else "leading"))
    ours, theirs = StableDiffusion.load(tmp_path, "cpu", torch.float32), theirs_of("SD 2", tmp_path)
    assert ours.prediction is V and (ours.schedule.alpha_bar[-1] < 1e-6) == zero
    how = {"negative_prompt": "blurry", "steps": 4, "cfg_scale": 5.0, "sampler": "ddim", "rescale": 0.7}
    mine = ours.txt2img(PROMPT, latents=latents, **how)[0]
    other = draw_theirs(theirs, latents, negative="blurry", guidance_rescale=0.7)
    assert np.asarray(mine).std() > 5 and far(mine, other) <= 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and its refiner, which share the second text encoder."""
    folders = {kind: tmp_path_factory.mktemp("pair") for kind in ("SDXL", "SDXL refiner")}
    for kind, folder in folders.items():
        save_family(folder, kind)
    return ([StableDiffusion.load(folder, "cpu", torch.float32) for folder in folders.values()],
            [theirs_of(kind, folder) for kind, folder in folders.items()])  # fmt: skip


@pytest.mark.parametrize("at", [0.8, 0.5])
def test_the_refiner_goes_on_where_the_base_stops(pair, latents, at):
    (base, refiner), theirs = pair
    how = {"steps": 10, "cfg_scale": 5.0, "sampler": "ddim"}
    *_, end = base.steps(PROMPT, latents=latents, extras=[PartOfTheWay(end=at)], **how)
    mine = refiner.txt2img(PROMPT, latents=end.latents, extras=[PartOfTheWay(begin=at)], **how)[0]
    for pipe in theirs:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    how = {"num_inference_steps": 10, "guidance_scale": 5.0}
    half = theirs[0](PROMPT, latents=latents, height=64, width=64, denoising_end=at, output_type="latent", **how).images
    assert far(end.latents, half) <= 1e-4 and end.total < 10
    other = np.asarray(theirs[1](PROMPT, image=half, denoising_start=at, **how).images[0])
    assert np.asarray(mine).std() > 5 and far(mine, other) <= 1


def test_scores_of_beauty(pair, latents):
    (_, refiner), (_, theirs) = pair
    start, told = refiner.decode(latents)[0], MicroConditioning(crop=(0, 8), score=9.0, negative_score=1.0)
    how = {"negative_prompt": "blurry", "steps": 4, "cfg_scale": 5.0, "sampler": "ddim", "strength": 0.5, "seed": 3}
    plain, mine = (refiner.img2img(PROMPT, start, extras=extras, **how)[0] for extras in ([], [told]))
    image = torch.from_numpy(np.array(start)).permute(2, 0, 1)[None] / 255
    other = draw_theirs(theirs, None, negative="blurry", image=image, strength=0.5, aesthetic_score=9.0,
                        negative_aesthetic_score=1.0, crops_coords_top_left=(0, 8),
                        negative_crops_coords_top_left=(0, 8), generator=torch.Generator().manual_seed(3))  # fmt: skip
    assert far(mine, other) <= 1 < far(plain, mine)


def test_sizes_and_crops(pair, latents):
    (ours, _), (theirs, _) = pair
    told = MicroConditioning(original=(512, 768), crop=(0, 64), target=(1000, 900))
    how = {"negative_prompt": "blurry", "steps": 4, "cfg_scale": 5.0, "sampler": "ddim", "latents": latents}
    plain, mine = (ours.txt2img(PROMPT, extras=extras, **how)[0] for extras in ([], [told]))
    other = draw_theirs(theirs, latents, negative="blurry", original_size=(512, 768), crops_coords_top_left=(0, 64),
                        target_size=(1000, 900))  # fmt: skip
    assert far(mine, other) <= 1 < far(plain, mine)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_turbo_in_few_steps_without_guidance(tmp_path, latents, steps):
    """Euler a, trailing times, no guidance. Pure noise is a little weaker there: of the last sigma, not of spread 1."""
    save_family(tmp_path, "SDXL", schedule=Schedule(spacing="trailing"))
    ours, theirs = StableDiffusion.load(tmp_path, "cpu", torch.float32), theirs_of("SDXL", tmp_path)
    theirs.scheduler = EulerAncestralDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.scheduler.set_timesteps(steps)
    sigma = float(theirs.scheduler.init_noise_sigma)
    how = {"num_inference_steps": steps, "guidance_scale": 0.0, "height": 64, "width": 64}
    dice = torch.Generator().manual_seed(3)
    other = np.asarray(theirs(PROMPT, latents=latents, generator=dice, **how).images[0])
    start = latents * sigma / (sigma**2 + 1) ** 0.5
    mine = ours.txt2img(PROMPT, latents=start, steps=steps, cfg_scale=1.0, sampler="euler_a", seed=3)[0]
    assert np.asarray(mine).std() > 5 and far(mine, other) <= 1
