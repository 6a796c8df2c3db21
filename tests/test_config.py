"""Configurations: SD 1.5's own files, round trips, and what cannot be honoured."""

import json
from operator import attrgetter

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.checkpoint import configs as config
from sdlearn.clip import CLIPImageConfig, CLIPTextConfig
from sdlearn.disk import read_json
from sdlearn.prediction import EPSILON, PREDICTIONS, V
from sdlearn.schedule import Schedule, cosine, linear, scaled_linear, zero_terminal_snr
from sdlearn.unet import UNetConfig
from sdlearn.vae import VAEConfig

CROSS = "CrossAttnDownBlock2D"
SD_UNET = {  # unet/config.json of SD 1.5, as published
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": [CROSS, CROSS, CROSS, "DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
    "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SD_VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SD_TEXT = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
}  # fmt: skip
SD_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
READ = {
    "unet": (config.unet_from_json, SD_UNET), "vae": (config.vae_from_json, SD_VAE),
    "text encoder": (config.text_from_json, SD_TEXT), "scheduler": (config.schedule_from_json, SD_SCHEDULER),
}  # fmt: skip


def test_sd_1_5_is_the_default():
    assert config.unet_from_json(SD_UNET) == UNetConfig()
    assert config.vae_from_json(SD_VAE) == VAEConfig()
    assert config.text_from_json(SD_TEXT) == CLIPTextConfig()
    schedule, prediction = config.schedule_from_json(SD_SCHEDULER)
    assert prediction is EPSILON and alike(schedule, Schedule())


def alike(a, b):
    """Two schedules, of which one may have come through a file."""
    assert torch.equal(a.betas, b.betas)
    rest = attrgetter("spacing", "offset", "ends_clean", "noise_offset")
    return rest(a) == rest(b)


def through_a_file(content, path):
    path.write_text(json.dumps(content))
    return read_json(path)


small = st.sampled_from([1, 2, 4])


@st.composite
def unets(draw):
    levels = draw(st.integers(1, 5))
    channels = tuple(32 * draw(small) for _ in range(levels))
    flags = tuple(draw(st.booleans()) for _ in range(levels))
    heads = tuple(draw(small) for _ in range(levels))
    return UNetConfig(channels, flags, heads, draw(small), draw(small), draw(small), draw(small), draw(small))


@settings(max_examples=40, deadline=None)
@given(unets(), small, st.floats(0.01, 10), small)
def test_round_trips(tmp_path_factory, unet, number, scale, width):
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    assert config.unet_from_json(through_a_file(config.unet_to_json(unet, 16), path)) == unet
    vae = VAEConfig(unet.channels, number, number, number, scale)
    assert config.vae_from_json(through_a_file(config.vae_to_json(vae, 128), path)) == vae
    text, image = CLIPTextConfig(100, 77, width, number, 1), CLIPImageConfig(8 * number, 8, width, number, 1)
    assert config.text_from_json(through_a_file(config.text_to_json(text), path)) == text
    assert config.clip_from_json(through_a_file(config.clip_to_json(text, image, 5), path)) == (text, image, 5)
    for betas in (scaled_linear(number + 1), linear(number + 1, 0.001, 0.01), cosine(number + 1)):
        schedule = Schedule(betas, "trailing", 1, number > 1, 0.1 * (number - 1))
        read, prediction = config.schedule_from_json(through_a_file(config.schedule_to_json(schedule, V), path))
        assert prediction is V and alike(read, schedule)


def test_heads_are_called_attention_head_dim_and_may_be_one_number_or_a_list():
    assert config.unet_from_json(SD_UNET | {"attention_head_dim": [5, 10, 20, 20]}).heads == (5, 10, 20, 20)
    assert config.unet_from_json(SD_UNET | {"num_attention_heads": 4}).heads == (4, 4, 4, 4)
    with pytest.raises(ValueError, match="attention_head_dim has 2 entries"):
        config.unet_from_json(SD_UNET | {"attention_head_dim": [5, 10]})


def test_a_list_of_equal_values_is_that_value():
    newer = {"layers_per_block": [2, 2, 2, 2], "only_cross_attention": [False] * 4, "conv_in_kernel": [3]}
    assert config.unet_from_json(SD_UNET | newer) == UNetConfig()


def test_unknown_keys_are_harmless():
    for read, content in READ.values():
        mine, theirs = read(content | {"a key from the future": {"x": 1}}), read(content)
        assert (
            alike(mine[0], theirs[0]) and mine[1] == theirs[1] if read is config.schedule_from_json else mine == theirs
        )


ALWAYS = {"unet": config.UNET_ALWAYS, "vae": config.VAE_ALWAYS, "text encoder": config.CLIP_ALWAYS,
          "scheduler": config.SCHEDULE_ALWAYS}  # fmt: skip


@pytest.mark.parametrize("part, key", [(part, key) for part, always in ALWAYS.items() for key in always])
def test_what_cannot_be_honoured_is_named(part, key):
    read, content = READ[part]
    with pytest.raises(ValueError, match=f"^{part} config: {key} is 'another'.*") as error:
        read(content | {key: "another"})
    assert "\n" not in str(error.value)


def test_hints_name_the_model():
    whole = config.clip_to_json(CLIPTextConfig(), CLIPImageConfig(), 768)
    whole["vision_config"]["hidden_act"] = "gelu"
    with pytest.raises(ValueError, match="this is the image tower of an OpenCLIP$"):
        config.clip_from_json(whole)


@pytest.mark.parametrize(
    "part, change, sentence",
    [
        ("unet", {"block_out_channels": None}, "block_out_channels is None"),
        ("unet", {"block_out_channels": [0, 1]}, "whole numbers above 0"),
        ("unet", {"layers_per_block": [1, 2, 2, 2]}, r"\[1, 2, 2, 2\], but sdlearn's levels all have the same number"),
        ("unet", {"layers_per_block": True}, "layers_per_block is True, but a whole number above 0"),
        ("unet", {"in_channels": 10**18}, "in_channels is 1000000000000000000, but at most 1,048,576"),
        ("unet", {"block_out_channels": [10**18] * 4}, "none above 1,048,576"),
        ("unet", {"down_block_types": None}, "blocks None down"),
        ("unet", {"down_block_types": 7}, "blocks 7 down"),
        ("unet", {"down_block_types": [[]] * 4}, "for 4 levels"),
        ("unet", {"attention_head_dim": 7}, "320 channels do not split into 7 heads"),
        ("unet", {"act_fn": []}, r"act_fn is \[\]"),
        ("unet", {"cross_attention_dim": "768"}, "cross_attention_dim is '768'"),
        ("unet", {"in_channels": True}, "in_channels is True"),
        ("unet", {"down_block_types": [CROSS] * 3}, "for 4 levels"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ("unet", {"up_block_types": ["UpBlock2D"] * 4}, "mirror image"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0"),
        ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types"),
        ("text encoder", {"intermediate_size": 5}, "size is 5, but the layers of sdlearn's CLIP are 4 times"),
        ("text encoder", {"num_attention_heads": 7}, "width 768 does not split into 7 heads"),
        ("text encoder", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("vae", {"scaling_factor": True}, "scaling_factor is True"),
        ("vae", {"norm_num_groups": 7}, "128 channels do not split into 7 groups"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', but sdlearn knows only linear"),
        ("scheduler", {"beta_schedule": []}, r"beta_schedule is \[\]"),
        ("scheduler", {"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ("scheduler", {"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ("scheduler", {"beta_start": "small"}, "betas .'small', 0.012."),
        ("scheduler", {"beta_end": float("nan")}, "betas .0.00085, nan."),
        ("scheduler", {"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000 steps"),
        ("scheduler", {"trained_betas": {"a": 1}}, "betas {'a': 1}"),
        ("scheduler", {"noise_offset": -0.1}, "noise_offset is -0.1"),
        ("scheduler", {"noise_offset": "some"}, "noise_offset is 'some'"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ("scheduler", {"timestep_spacing": 3}, "timestep_spacing is 3"),
        ("scheduler", {"set_alpha_to_one": 1}, "set_alpha_to_one is 1, but true or false"),
        ("scheduler", {"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes'"),
        (
            "scheduler",
            {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"},
            "variance_type is 'fixed_large'",
        ),
    ],
)
def test_wrong_values(part, change, sentence):
    read, content = READ[part]
    with pytest.raises(ValueError, match=sentence):
        read(content | change)


def test_the_end_of_a_text():
    """A whole CLIP takes its pooled context there; SD 1's text encoder never asks, and is not refused for it."""
    whole = config.clip_to_json(CLIPTextConfig(), CLIPImageConfig(), 768)
    assert config.clip_from_json(whole)[0] == config.text_from_json(SD_TEXT) == CLIPTextConfig(end=49407)
    for said, end in {49407: 49407, 2: 49407, 7: 7, "2": None, 49408: None, -1: None}.items():
        whole["text_config"]["eos_token_id"] = said
        assert config.text_from_json(SD_TEXT | {"eos_token_id": said}).end == (end or 49407)
        if end:
            assert config.clip_from_json(whole)[0].end == end
            continue
        with pytest.raises(ValueError, match="eos_token_id is .*, but one of 49408 entries is wanted"):
            config.clip_from_json(whole)
    longer = CLIPTextConfig(vocab=102, end=99)  # two words were learned later
    written = config.text_to_json(longer)
    assert [written[f"{x}_token_id"] for x in ("bos", "eos", "pad")] == [98, 99, 99]
    assert config.text_from_json(written) == longer


@pytest.mark.parametrize("size, pixels", [(64, (64, 64)), ([60, 80], (60, 80)), (None, (64, 64)), ([32, 32], (32, 32))])
def test_sizes_of_pictures(size, pixels):
    assert config.sample_size({"sample_size": size}) == pixels


@pytest.mark.parametrize("size", [1.5, 0, -1, "64", [64], [1, 2, 3], [64, 1.5], True, {}, 10**18])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="unet config: sample_size"):
        config.sample_size({"sample_size": size})


SCHEDULERS = {  # what stands in the file; what is absent means what diffusers then takes
    "nothing": {},
    "SD 1's own": SD_SCHEDULER,
    "PNDM, nothing": {"_class_name": "PNDMScheduler"},
    "DDIM, nothing": {"_class_name": "DDIMScheduler"},
    "Euler, nothing": {"_class_name": "EulerDiscreteScheduler"},
    "offset 0, clipped": {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True},
    "cosine": {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    "zero SNR": {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear",
                 "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "trained": {"_class_name": "DDPMScheduler", "trained_betas": [0.001 * (i + 1) for i in range(50)],
                "num_train_timesteps": 50, "variance_type": "fixed_small_log"},
    "ends clean": SD_SCHEDULER | {"set_alpha_to_one": True},
}  # fmt: skip
CLASSES = {x.__name__: x for x in (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler)}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_are_those_of_diffusers(name):
    content = SCHEDULERS[name]
    ours, prediction = config.schedule_from_json(content)
    theirs = CLASSES[content.get("_class_name", "DDIMScheduler")].from_config(dict(content))
    assert torch.allclose(ours.betas, theirs.betas, rtol=1e-4, atol=1e-6)
    assert torch.allclose(ours.alpha_bar, DDIMScheduler.from_config(theirs.config).alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert prediction.name == theirs.config.prediction_type and ours.offset == 1
    assert ours.spacing == theirs.config.timestep_spacing
    own = theirs if "set_alpha_to_one" in theirs.config else DDIMScheduler.from_config(theirs.config)
    assert ours.ends_clean == own.config.set_alpha_to_one


def test_a_table_that_is_known_is_named_and_another_is_written_out():
    def written(betas):
        return config.schedule_to_json(Schedule(betas), EPSILON)

    assert (
        written(scaled_linear())["beta_schedule"] == "scaled_linear"
        and written(scaled_linear())["beta_start"] == 0.00085
    )
    assert written(linear())["beta_schedule"] == "linear" and written(linear())["beta_end"] == 0.02
    for betas in (cosine(), zero_terminal_snr(scaled_linear())):
        found = written(betas)
        assert found["trained_betas"] == betas.tolist() and len(json.dumps(found)) < 30_000
        assert torch.equal(config.schedule_from_json(found)[0].betas, betas)


def test_predictions_have_the_names_of_diffusers():
    for name, prediction in PREDICTIONS.items():
        assert config.schedule_from_json({"prediction_type": name})[1] is prediction
