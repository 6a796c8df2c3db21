"""Configurations: SD 1.5's own files, round trips, and what cannot be honoured."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn import config
from sdlearn.clip import CLIPImageConfig, CLIPTextConfig
from sdlearn.schedule import Schedule
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
    assert config.schedule_from_json(SD_SCHEDULER) == Schedule()


def through_a_file(content, path):
    path.write_text(json.dumps(content))
    return config.read_json(path)


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
    schedule = Schedule(number, prediction="v_prediction", spacing="trailing", offset=0)
    assert config.schedule_from_json(through_a_file(config.schedule_to_json(schedule), path)) == schedule


def test_heads_are_called_attention_head_dim_and_may_be_one_number_or_a_list():
    assert config.unet_from_json(SD_UNET | {"attention_head_dim": [5, 10, 20, 20]}).heads == (5, 10, 20, 20)
    assert config.unet_from_json(SD_UNET | {"num_attention_heads": 4}).heads == (4, 4, 4, 4)
    with pytest.raises(ValueError, match="attention_head_dim has 2 entries"):
        config.unet_from_json(SD_UNET | {"attention_head_dim": [5, 10]})


def test_a_list_of_equal_values_is_that_value():
    newer = {"layers_per_block": [2, 2, 2, 2], "only_cross_attention": [False] * 4, "transformer_layers_per_block": [1]}
    assert config.unet_from_json(SD_UNET | newer) == UNetConfig()


def test_unknown_keys_are_harmless():
    for read, content in READ.values():
        assert read(content | {"a key from the future": {"x": 1}}) == read(content)


ALWAYS = {"unet": config.UNET_ALWAYS, "vae": config.VAE_ALWAYS, "text encoder": config.CLIP_ALWAYS,
          "scheduler": config.SCHEDULE_ALWAYS}  # fmt: skip


@pytest.mark.parametrize("part, key", [(part, key) for part, always in ALWAYS.items() for key in always])
def test_what_cannot_be_honoured_is_named(part, key):
    read, content = READ[part]
    with pytest.raises(ValueError, match=f"^{part} config: {key} is 'another'.*") as error:
        read(content | {key: "another"})
    assert "\n" not in str(error.value)


def test_hints_name_the_chapter():
    with pytest.raises(ValueError, match="SDXL, see chapter 17"):
        config.unet_from_json(SD_UNET | {"addition_embed_type": "text_time"})
    with pytest.raises(ValueError, match="SD 2"):
        config.text_from_json(SD_TEXT | {"hidden_act": "gelu"})


@pytest.mark.parametrize(
    "part, change, sentence",
    [
        ("unet", {"block_out_channels": None}, "block_out_channels is None"),
        ("unet", {"block_out_channels": [0, 1]}, "whole numbers above 0"),
        ("unet", {"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
        ("unet", {"cross_attention_dim": "768"}, "cross_attention_dim is '768'"),
        ("unet", {"in_channels": True}, "in_channels is True"),
        ("unet", {"down_block_types": [CROSS] * 3}, "for 4 levels"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ("unet", {"up_block_types": ["UpBlock2D"] * 4}, "mirror image"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0"),
        ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types"),
        ("text encoder", {"intermediate_size": 5}, "intermediate_size is 5"),
        ("text encoder", {"eos_token_id": 7}, "eos_token_id is 7"),
        ("text encoder", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ("scheduler", {"num_train_timesteps": 0}, "steps is 0"),
        ("scheduler", {"beta_start": "small"}, "scheduler config"),
    ],
)
def test_wrong_values(part, change, sentence):
    read, content = READ[part]
    with pytest.raises(ValueError, match=sentence):
        read(content | change)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0", '"x"'])
def test_damaged_json_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        config.read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match="missing"):
        config.read_json(tmp_path / "other.json")


def test_json_that_is_nested_without_end_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        config.read_json(tmp_path / "config.json")
