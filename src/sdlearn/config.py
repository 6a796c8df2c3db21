"""Our configurations <-> the JSON files of diffusers and transformers. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import json
from pathlib import Path

from sdlearn.clip import CLIPImageConfig, CLIPTextConfig
from sdlearn.prediction import PREDICTIONS, Prediction
from sdlearn.schedule import Schedule, linear, scaled_linear
from sdlearn.unet import UNetConfig
from sdlearn.vae import VAEConfig

__all__ = [
    "UNET_ALWAYS",
    "VAE_ALWAYS",
    "CLIP_ALWAYS",
    "SCHEDULE_ALWAYS",
    "HINTS",
    "read_json",
    "one",
    "refuse_others",
    "number",
    "numbers",
    "unet_from_json",
    "unet_to_json",
    "vae_from_json",
    "vae_to_json",
    "refuse_other_towers",
    "text_from_json",
    "text_to_json",
    "clip_from_json",
    "clip_to_json",
    "BETAS",
    "schedule_from_json",
    "schedule_to_json",
]

# What our classes always do. A file that says otherwise is another model; a key that stands nowhere here is harmless.
UNET_ALWAYS = {
    "addition_embed_type": None,
    "use_linear_projection": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "dual_cross_attention": False,
    "cross_attention_norm": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "attention_type": "default",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "downsample_padding": 1,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
}
VAE_ALWAYS = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
CLIP_ALWAYS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SCHEDULE_ALWAYS = {
    "trained_betas": None,
    "clip_sample": False,
    "thresholding": False,
    "set_alpha_to_one": False,
    "rescale_betas_zero_snr": False,
}
HINTS = {
    "addition_embed_type": "this is the U-Net of SDXL, see chapter 17",
    "use_linear_projection": "this is a U-Net of SD 2 or SDXL, see chapter 17",
    "time_cond_proj_dim": "this is a latent consistency model, see chapter 18",
    "hidden_act": "this is the text encoder of SD 2, or the second one of SDXL, see chapter 17",
}


def read_json(path: str | Path) -> dict:
    """A JSON object from a file; every way to fail is one sentence."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: a model folder in diffusers' layout holds it, so copy it again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({error}): copy it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, but a JSON object is wanted: copy it again"
        )
    return content


def one(value: object) -> object:
    """A list of equal entries is that entry: newer files say once what older ones say for every level."""
    return (
        value[0]
        if isinstance(value, list) and value and all(x == value[0] for x in value)
        else value
    )


def refuse_others(content: dict, always: dict[str, object], part: str) -> None:
    """Complain about the first key that asks for what our class does not do."""
    for key, value in always.items():
        if one(content.get(key, value)) != value:
            hint = HINTS.get(key, "take another model")
            raise ValueError(
                f"{part} config: {key} is {content[key]!r}, but sdlearn knows only {value!r} here: {hint}"
            )


def number(content: dict, key: str, part: str) -> int:
    """A whole number above 0."""
    value = one(content.get(key))
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{part} config: {key} is {content.get(key)!r}, but a whole number above 0 is wanted"
        )
    return value


def numbers(
    content: dict, key: str, part: str, count: int | None = None
) -> tuple[int, ...]:
    """A list of whole numbers above 0; one number alone stands for `count` equal ones."""
    value = content.get(key)
    if count and type(value) is int:
        value = [value] * count
    if (
        not isinstance(value, list)
        or not value
        or any(type(x) is not int or x < 1 for x in value)
    ):
        raise ValueError(
            f"{part} config: {key} is {content.get(key)!r}, but a list of whole numbers above 0 is wanted"
        )
    if count and len(value) != count:
        raise ValueError(
            f"{part} config: {key} has {len(value)} entries, but block_out_channels has {count}"
        )
    return tuple(value)


def unet_from_json(content: dict) -> UNetConfig:
    """`unet/config.json` -> ours. What the file calls attention_head_dim is, for SD 1, the number of heads."""
    refuse_others(content, UNET_ALWAYS, "unet")
    channels = numbers(content, "block_out_channels", "unet")
    known = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    attention = tuple(known.get(kind) for kind in content.get("down_block_types", ()))
    upwards = [
        kind.replace("Down", "Up")
        for kind in reversed(content.get("down_block_types", ()))
    ]
    if (
        None in attention
        or len(attention) != len(channels)
        or content.get("up_block_types", upwards) != upwards
    ):
        raise ValueError(
            f"unet config: blocks {content.get('down_block_types')} down and {content.get('up_block_types')} up for "
            f"{len(channels)} levels; sdlearn knows (CrossAttn)DownBlock2D, one a level, and their mirror image"
        )
    heads_key = (
        "num_attention_heads"
        if content.get("num_attention_heads")
        else "attention_head_dim"
    )
    return UNetConfig(
        channels=channels,
        attention=attention,
        heads=numbers(content, heads_key, "unet", len(channels)),
        blocks=number(content, "layers_per_block", "unet"),
        context_width=number(content, "cross_attention_dim", "unet"),
        in_channels=number(content, "in_channels", "unet"),
        out_channels=number(content, "out_channels", "unet"),
        groups=number({"norm_num_groups": 32} | content, "norm_num_groups", "unet"),
    )


def unet_to_json(config: UNetConfig, sample_size: int) -> dict:
    """Ours -> `unet/config.json`; sample_size is the side of the latents that it was trained on."""
    down = [
        "CrossAttnDownBlock2D" if there else "DownBlock2D" for there in config.attention
    ]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.context_width,
        "norm_num_groups": config.groups,
    } | UNET_ALWAYS


def vae_from_json(content: dict) -> VAEConfig:
    """`vae/config.json` -> ours."""
    refuse_others(content, VAE_ALWAYS, "vae")
    channels = numbers(content, "block_out_channels", "vae")
    for key, kind in {
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
    }.items():
        if content.get(key, wanted := [kind] * len(channels)) != wanted:
            raise ValueError(
                f"vae config: {key} is {content[key]}, but sdlearn knows only {kind}, one a level"
            )
    scale = content.get(
        "scaling_factor", VAEConfig.scale
    )  # SD 1's own file is older than this key
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise ValueError(
            f"vae config: scaling_factor is {scale!r}, but a number above 0 is wanted; SD 1 has 0.18215"
        )
    return VAEConfig(
        channels=channels,
        blocks=number(content, "layers_per_block", "vae"),
        latent_channels=number(content, "latent_channels", "vae"),
        groups=number({"norm_num_groups": 32} | content, "norm_num_groups", "vae"),
        scale=float(scale),
    )


def vae_to_json(config: VAEConfig, sample_size: int) -> dict:
    """Ours -> `vae/config.json`; sample_size is the side of the pictures that it was trained on."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
    } | VAE_ALWAYS


def refuse_other_towers(content: dict, part: str) -> None:
    """Both towers of CLIP are made of the same layers."""
    refuse_others(content, CLIP_ALWAYS, part)
    inner, width = (
        content.get("intermediate_size"),
        number(content, "hidden_size", part),
    )
    if inner != 4 * width:
        raise ValueError(
            f"{part} config: intermediate_size is {inner}, but sdlearn knows only 4 x {width} here"
        )


def text_from_json(content: dict) -> CLIPTextConfig:
    """`text_encoder/config.json`, or the `text_config` of a whole CLIP -> ours."""
    refuse_other_towers(content, "text encoder")
    vocab = number(content, "vocab_size", "text encoder")
    end = content.get("eos_token_id", vocab - 1)
    if end not in (vocab - 1, 2):  # older files say 2 and mean the largest id
        raise ValueError(
            f"text encoder config: eos_token_id is {end}, but the last of {vocab} entries is wanted"
        )
    return CLIPTextConfig(
        vocab=vocab,
        positions=number(content, "max_position_embeddings", "text encoder"),
        width=number(content, "hidden_size", "text encoder"),
        layers=number(content, "num_hidden_layers", "text encoder"),
        heads=number(content, "num_attention_heads", "text encoder"),
    )


def text_to_json(config: CLIPTextConfig, projection: int | None = None) -> dict:
    """Ours -> `text_encoder/config.json`; start and end are the last two entries of the vocabulary."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab,
        "max_position_embeddings": config.positions,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": projection or config.width,
        "bos_token_id": config.vocab - 2,
        "eos_token_id": config.vocab - 1,
        "pad_token_id": config.vocab - 1,
    } | CLIP_ALWAYS


def clip_from_json(content: dict) -> tuple[CLIPTextConfig, CLIPImageConfig, int]:
    """`clip/config.json` of a whole CLIP -> both towers and the width of the common space."""
    text, image = content.get("text_config"), content.get("vision_config")
    if not isinstance(text, dict) or not isinstance(image, dict):
        raise ValueError(
            "clip config: text_config or vision_config is missing, but a whole CLIPModel is wanted"
        )
    refuse_other_towers(image, "image tower")
    sizes = {
        "size": "image_size",
        "patch": "patch_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
    }
    config = CLIPImageConfig(
        **{ours: number(image, theirs, "image tower") for ours, theirs in sizes.items()}
    )
    return text_from_json(text), config, number(content, "projection_dim", "clip")


def clip_to_json(text: CLIPTextConfig, image: CLIPImageConfig, projection: int) -> dict:
    """Ours -> the `config.json` of transformers' CLIPModel."""
    vision = {
        "model_type": "clip_vision_model",
        "image_size": image.size,
        "patch_size": image.patch,
        "num_channels": 3,
        "hidden_size": image.width,
        "intermediate_size": 4 * image.width,
        "num_hidden_layers": image.layers,
        "num_attention_heads": image.heads,
        "projection_dim": projection,
    }
    towers = {
        "text_config": text_to_json(text, projection),
        "vision_config": vision | CLIP_ALWAYS,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": projection,
    } | towers


BETAS = {"scaled_linear": scaled_linear, "linear": linear}


def schedule_from_json(content: dict) -> tuple[Schedule, Prediction]:
    """`scheduler/scheduler_config.json` -> ours."""
    refuse_others(content, SCHEDULE_ALWAYS, "scheduler")
    betas = BETAS[content.get("beta_schedule", "linear")](
        content.get("num_train_timesteps", 1000),
        content.get("beta_start", 0.0001),
        content.get("beta_end", 0.02),
    )
    spacing = content.get("timestep_spacing", "leading")
    schedule = Schedule(betas, spacing, content.get("steps_offset", 0))
    return schedule, PREDICTIONS[content.get("prediction_type", "epsilon")]


def schedule_to_json(schedule: Schedule, prediction: Prediction) -> dict:
    """Ours -> `scheduler/scheduler_config.json`."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction.name,
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.offset,
    } | SCHEDULE_ALWAYS
