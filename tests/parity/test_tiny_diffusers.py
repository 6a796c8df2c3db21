"""What we write, diffusers and transformers read; from the same latents they draw the same picture."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from random_model import TINY_UNET, TINY_VAE, save_random_model
from transformers import CLIPModel, CLIPTokenizer

from sdlearn.checkpoint.load import load_clip
from sdlearn.pictures import to_tensor
from sdlearn.pipeline import StableDiffusion

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny"
PROMPT = "a fox to the left of a green umbrella"


@pytest.fixture(scope="module", params=["random", "shipped"])
def folder(request, tmp_path_factory):
    if request.param == "shipped":
        if not (SHIPPED / "model_index.json").exists():
            pytest.skip("checkpoints/tiny is not here")
        return SHIPPED
    path = tmp_path_factory.mktemp("tiny")
    save_random_model(path, torch.float16, unet=TINY_UNET, vae=TINY_VAE, layers=4, heads=6, size=128)
    return path


@pytest.fixture(scope="module")
def both(folder):
    ours = StableDiffusion.load(folder, device="cpu", dtype=torch.float32)
    ours.schedule = replace(ours.schedule, noise_offset=0.0)  # the first noise of diffusers has none
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


def far(a, b):
    return abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def test_every_part_is_equal(both):
    ours, theirs = both
    tokens = ours.tokenizer([PROMPT, ""])
    assert torch.equal(tokens, torch.tensor(theirs.tokenizer([PROMPT, ""], padding="max_length").input_ids))
    g = torch.Generator().manual_seed(0)
    latents, image = torch.randn(2, 4, 16, 16, generator=g), torch.rand(1, 3, 128, 128, generator=g) * 2 - 1
    with torch.no_grad():
        context = ours.text_encoder(tokens)
        assert (context - theirs.text_encoder(tokens).last_hidden_state).abs().max() <= 1e-4
        t = torch.tensor([981, 1])
        assert (ours.unet(latents, t, context) - theirs.unet(latents, t, context).sample).abs().max() <= 1e-4
        scale = ours.vae.config.scale
        assert scale == theirs.vae.config.scaling_factor
        assert (ours.vae.decode(latents) - theirs.vae.decode(latents / scale).sample).abs().max() <= 1e-4
        assert (ours.vae.encode(image).mean - scale * theirs.vae.encode(image).latent_dist.mean).abs().max() <= 1e-4
    assert torch.equal(ours.schedule.alpha_bar, theirs.scheduler.alphas_cumprod)


def test_the_same_picture_from_the_same_latents(both):
    ours, theirs = both
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    mine = ours.txt2img(PROMPT, negative_prompt="a cat", steps=10, sampler="ddim", latents=latents)[0]
    other = theirs(PROMPT, negative_prompt="a cat", num_inference_steps=10, guidance_scale=7.5, latents=latents).images[
        0
    ]
    assert np.asarray(mine).std() > 5  # a picture, not a grey square
    assert far(mine, other) <= 2


def test_the_same_picture_from_the_same_seed_with_ddpm(both):
    ours, theirs = both
    ddim = theirs.scheduler
    theirs.scheduler = DDPMScheduler.from_config(ddim.config)
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        other = theirs([PROMPT, "a cat"], num_inference_steps=5, generator=generators).images
    finally:
        theirs.scheduler = ddim
    for mine, picture in zip(ours.txt2img([PROMPT, "a cat"], steps=5, seed=5), other, strict=True):
        assert far(mine, picture) <= 2


def test_the_same_img2img(both):
    ours, theirs = both
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(theirs, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    start = ours.txt2img("a cat", steps=2, seed=0, sampler="ddim")[0]
    mine = ours.img2img(PROMPT, start, strength=0.5, steps=10, sampler="ddim", seed=3)[0]
    other = pipe(PROMPT, image=(to_tensor(start, 128, 128) + 1) / 2, strength=0.5, num_inference_steps=10,
                 guidance_scale=7.5, generator=torch.Generator().manual_seed(3)).images[0]  # fmt: skip
    assert far(mine, other) <= 2


def test_transformers_reads_clip(folder):
    tokenizer, clip = load_clip(folder)
    theirs = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32).eval()
    words = ["a red apple on a blue background", "a cat above a yellow star"]
    tokens = torch.tensor(CLIPTokenizer.from_pretrained(folder / "tokenizer")(words, padding="max_length").input_ids)
    assert torch.equal(tokens, tokenizer(words))
    size = clip.image_encoder.config.size
    image = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        output = theirs(input_ids=tokens, pixel_values=image)
        assert (output.text_embeds - clip.embed_text(tokens)).abs().max() <= 1e-4
        assert (output.image_embeds - clip.embed_image(image)).abs().max() <= 1e-4
        assert (output.logits_per_text - clip(tokens, image)).abs().max() <= 1e-3


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
def test_what_todays_libraries_save_draws_their_picture(both, tmp_path, shards):
    """Saved by the pinned diffusers and transformers: tokenizer.json alone, other names, perhaps several files."""
    ours, theirs = both
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "5MB"} if shards else {}))
    names = sorted(path.name for path in (tmp_path / "tokenizer").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    assert (len([*(tmp_path / "unet").glob("*.safetensors")]) > 3) == shards
    loaded = StableDiffusion.load(tmp_path, device="cpu", dtype=torch.float32)
    for name, network in ours.networks().items():
        mine = loaded.networks()[name].state_dict()
        assert all(torch.equal(value, mine[key]) for key, value in network.state_dict().items()), name
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    mine = loaded.txt2img(PROMPT, negative_prompt="a cat", steps=6, sampler="ddim", latents=latents)[0]
    other = theirs(PROMPT, negative_prompt="a cat", num_inference_steps=6, guidance_scale=7.5, latents=latents)
    assert np.asarray(mine).std() > 5 and far(mine, other.images[0]) <= 2


@pytest.mark.parametrize("change", [{"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True}, {"steps_offset": 0}, {"set_alpha_to_one": True}],
    ids=["cosine", "v", "zero SNR", "offset 0", "ends clean"])  # fmt: skip
def test_where_only_the_schedule_differs(folder, tmp_path, change):
    """The networks are the same; both libraries read another scheduler_config.json and draw the same."""
    here = tmp_path / "model"
    here.mkdir()
    for path in folder.iterdir():
        (here / path.name).symlink_to(path) if path.name != "scheduler" else (here / path.name).mkdir()
    name = "scheduler/scheduler_config.json"
    (here / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    ours = StableDiffusion.load(here, device="cpu", dtype=torch.float32)
    theirs = StableDiffusionPipeline.from_pretrained(here, safety_checker=None, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    mine = ours.txt2img(PROMPT, negative_prompt="a cat", steps=5, sampler="ddim", latents=latents)[0]
    other = theirs(PROMPT, negative_prompt="a cat", num_inference_steps=5, guidance_scale=7.5, latents=latents)
    assert np.asarray(mine).std() > 5 and far(mine, other.images[0]) <= 2
