"""Our configurations <-> the JSON files of diffusers and transformers. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import math
import re
from collections.abc import Mapping

import torch

from sdlearn.clip import CLIPImageConfig, CLIPTextConfig
from sdlearn.prediction import PREDICTIONS, Prediction
from sdlearn.schedule import Schedule, cosine, linear, scaled_linear, zero_terminal_snr
from sdlearn.unet import UNetConfig
from sdlearn.vae import VAEConfig

__all__ = [
    "NOTHING",
    "SWITCHED_OFF",
    "UNET_ALWAYS",
    "VAE_ALWAYS",
    "CLIP_ALWAYS",
    "SCHEDULE_ALWAYS",
    "SAME",
    "HINTS",
    "LARGEST",
    "one",
    "refuse_others",
    "number",
    "numbers",
    "unet_from_json",
    "sample_size",
    "unet_to_json",
    "vae_from_json",
    "vae_to_json",
    "TOWER",
    "TEXT",
    "IMAGE",
    "tower",
    "text_from_json",
    "clip_from_json",
    "tower_to_json",
    "text_to_json",
    "clip_to_json",
    "BETAS",
    "LINSPACE",
    "choose",
    "table_of_betas",
    "SLOPES",
    "SPACINGS",
    "schedule_from_json",
    "schedule_to_json",
]

# What our classes always do. A file that says otherwise is another model.
NOTHING = (  # what is absent in our U-Net
    "addition_embed_type class_embed_type num_class_embeds encoder_hid_dim "
    "encoder_hid_dim_type time_cond_proj_dim mid_block_only_cross_attention "
    "cross_attention_norm time_embedding_dim time_embedding_act_fn timestep_post_act"
)
SWITCHED_OFF = (
    "use_linear_projection only_cross_attention dual_cross_attention "
    "center_input_sample resnet_skip_time_act"
)
UNET_ALWAYS = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "attention_type": "default",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    **dict.fromkeys(NOTHING.split()),
    **dict.fromkeys(SWITCHED_OFF.split(), False),
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
SCHEDULE_ALWAYS = {"thresholding": False}
SAME = {"swish": "silu"}  # two names of one function
HINTS = {  # what a file with such a key probably is
    "addition_embed_type": "this is the U-Net of SDXL",
    "use_linear_projection": "this is a U-Net of SD 2 or SDXL",
    "time_cond_proj_dim": "this is a latent consistency model",
    "hidden_act": "this is the text encoder of SD 2, or the second one of SDXL",
}
LARGEST = 2**20  # of any size in a file


def one(value: object) -> object:
    """[x, x, x] -> x: newer files say once what older ones say for every level."""
    same = isinstance(value, list) and value and all(x == value[0] for x in value)
    value = value[0] if same else value
    return SAME.get(value, value) if isinstance(value, str) else value


def refuse_others(
    content: Mapping, always: Mapping[str, object], part: str, hint: str = ""
) -> None:
    """Complain about the first key that asks for what our class does not do."""
    for key, value in always.items():
        if one(content.get(key, value)) != value:
            raise ValueError(
                f"{part} config: {key} is {content[key]!r}, but sdlearn knows only "
                f"{value!r} here: {HINTS.get(key, 'take another model')}"
            )


def number(content: Mapping, key: str, part: str) -> int:
    """A whole number above 0."""
    value = one(content.get(key))
    if type(value) is not int or not 0 < value <= LARGEST:
        why = "a whole number above 0 is wanted"
        if isinstance(value, list) and all(type(x) is int for x in value):
            why = "sdlearn's levels all have the same number: take another model"
        elif type(value) is int and value > LARGEST:
            why = f"at most {LARGEST:,} is possible"
        raise ValueError(f"{part} config: {key} is {content.get(key)!r}, but {why}")
    return value


def numbers(
    content: Mapping, key: str, part: str, count: int | None = None
) -> tuple[int, ...]:
    """A list of whole numbers above 0; one number stands for `count` equal ones."""
    value = content.get(key)
    if count and type(value) is int:
        value = [value] * count
    good = isinstance(value, list) and value
    if not good or any(type(x) is not int or not 0 < x <= LARGEST for x in value):
        raise ValueError(
            f"{part} config: {key} is {content.get(key)!r}, but a list of whole "
            "numbers "
            f"above 0 is wanted, none above {LARGEST:,}"
        )
    if count and len(value) != count:
        raise ValueError(
            f"{part} config: {key} has {len(value)} entries, but block_out_channels "
            "has "
            f"{count}"
        )
    return tuple(value)


def unet_from_json(content: Mapping) -> UNetConfig:
    """`unet/config.json` -> ours. In SD 1, attention_head_dim is the number of
    heads."""
    refuse_others(content, UNET_ALWAYS, "unet")
    channels = numbers(content, "block_out_channels", "unet")
    known = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    down, up = content.get("down_block_types"), content.get("up_block_types")
    good = isinstance(down, list) and all(
        isinstance(x, str) and x in known for x in down
    )
    mirrored = [x.replace("Down", "Up") for x in reversed(down)] if good else None
    if not good or len(down) != len(channels) or up not in (None, mirrored):
        raise ValueError(
            f"unet config: blocks {down} down and {up} up for {len(channels)} levels; "
            "sdlearn knows (CrossAttn)DownBlock2D, one a level, and their mirror image"
        )
    key = "num_attention_heads" if content.get("num_attention_heads") else ""
    heads = numbers(content, key or "attention_head_dim", "unet", len(channels))
    for width, count in zip(channels, heads, strict=True):
        if width % count:
            raise ValueError(
                f"unet config: {width} channels do not split into {count} heads: the "
                "file "
                "is damaged, take another copy"
            )
    return UNetConfig(
        channels=channels,
        attention=tuple(known[kind] for kind in down),
        heads=heads,
        blocks=number(content, "layers_per_block", "unet"),
        context_width=number(content, "cross_attention_dim", "unet"),
        in_channels=number(content, "in_channels", "unet"),
        out_channels=number(content, "out_channels", "unet"),
        groups=number({"norm_num_groups": 32} | content, "norm_num_groups", "unet"),
    )


def sample_size(content: Mapping) -> tuple[int, int]:
    """The height and width of the latents that a U-Net was trained on; 64 if unsaid."""
    size = content.get("sample_size")
    if size is None or type(size) is int:
        size = [64 if size is None else size] * 2
    return numbers({"sample_size": size}, "sample_size", "unet", 2)


def unet_to_json(config: UNetConfig, sample_size: int | list[int]) -> dict:
    """Ours -> `unet/config.json`; sample_size: side, or height and width, of
    latents."""
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


def vae_from_json(content: Mapping) -> VAEConfig:
    """`vae/config.json` -> ours. SD 1's own file is older than the scaling_factor."""
    refuse_others(content, VAE_ALWAYS, "vae")
    channels = numbers(content, "block_out_channels", "vae")
    groups = number({"norm_num_groups": 32} | content, "norm_num_groups", "vae")
    for width in channels:
        if width % groups:
            raise ValueError(
                f"vae config: {width} channels do not split into {groups} groups: the "
                "file "
                "is damaged, take another copy"
            )
    for key, kind in {
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
    }.items():
        if content.get(key, wanted := [kind] * len(channels)) != wanted:
            raise ValueError(
                f"vae config: {key} is {content[key]}, but sdlearn knows only {kind}, "
                "one "
                "a level"
            )
    scale = content.get("scaling_factor", VAEConfig.scale)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(
            f"vae config: scaling_factor is {scale!r}, but a number above 0 is wanted; "
            "SD 1 has 0.18215"
        )
    return VAEConfig(
        channels=channels,
        blocks=number(content, "layers_per_block", "vae"),
        latent_channels=number(content, "latent_channels", "vae"),
        groups=groups,
        scale=float(scale),
    )


def vae_to_json(config: VAEConfig, sample_size: int) -> dict:
    """Ours -> `vae/config.json`; sample_size: the side of pictures in training."""
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


TOWER = {  # ours -> theirs, in both towers of CLIP
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}
TEXT = TOWER | {"vocab": "vocab_size", "positions": "max_position_embeddings"}
IMAGE = TOWER | {"size": "image_size", "patch": "patch_size"}


def tower(content: Mapping, part: str, keys: Mapping[str, str]) -> dict[str, int]:
    """The sizes of one tower, which has to be made of our layers."""
    refuse_others(content, CLIP_ALWAYS, part)
    sizes = {ours: number(content, theirs, part) for ours, theirs in keys.items()}
    inner = content.get("intermediate_size")
    if inner != 4 * sizes["width"]:
        raise ValueError(
            f"{part} config: intermediate_size is {inner}, but the layers of sdlearn's "
            "CLIP "
            f"are 4 times as wide inside, 4 x {sizes['width']} here: take another model"
        )
    if sizes["width"] % sizes["heads"]:
        raise ValueError(
            f"{part} config: width {sizes['width']} does not split into "
            f"{sizes['heads']} "
            "heads: the file is damaged, take another copy"
        )
    return sizes


def text_from_json(content: Mapping) -> CLIPTextConfig:
    """`text_encoder/config.json`, or the `text_config` of a whole CLIP -> ours."""
    return CLIPTextConfig(**tower(content, "text encoder", TEXT))


def clip_from_json(content: Mapping) -> tuple[CLIPTextConfig, CLIPImageConfig, int]:
    """`clip/config.json` -> both towers and the width of the common space."""
    text, image = content.get("text_config"), content.get("vision_config")
    if not isinstance(text, dict) or not isinstance(image, dict):
        raise ValueError(
            "clip config: text_config or vision_config is missing, but a whole "
            "CLIPModel "
            "is wanted"
        )
    config = text_from_json(text)
    end = text.get("eos_token_id", config.vocab - 1)
    if end not in (config.vocab - 1, 2):  # older files say 2 and mean the largest id
        raise ValueError(
            f"clip config: eos_token_id is {end!r}, but the last of {config.vocab} "
            "entries "
            "is wanted, where the text's vector is taken"
        )
    seen = CLIPImageConfig(**tower(image, "image tower", IMAGE))
    return config, seen, number(content, "projection_dim", "clip")


def tower_to_json(
    config: CLIPTextConfig | CLIPImageConfig, keys: Mapping[str, str], kind: str
) -> dict:
    """Either tower -> its part of a config.json."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    return (
        {"model_type": kind, "intermediate_size": 4 * config.width}
        | sizes
        | CLIP_ALWAYS
    )


def text_to_json(config: CLIPTextConfig, projection: int | None = None) -> dict:
    """Ours -> `text_encoder/config.json`; start and end are the last two entries."""
    return tower_to_json(config, TEXT, "clip_text_model") | {
        "architectures": ["CLIPTextModel"],
        "projection_dim": projection or config.width,
        "bos_token_id": config.vocab - 2,
        "eos_token_id": config.vocab - 1,
        "pad_token_id": config.vocab - 1,
    }


def clip_to_json(text: CLIPTextConfig, image: CLIPImageConfig, projection: int) -> dict:
    """Ours -> the `config.json` of transformers' CLIPModel."""
    more = {"num_channels": 3, "projection_dim": projection}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": text_to_json(text, projection),
        "vision_config": tower_to_json(image, IMAGE, "clip_vision_model") | more,
    }


BETAS = {"linear": linear, "scaled_linear": scaled_linear, "squaredcos_cap_v2": cosine}
LINSPACE = "Euler|Heun|LMS|KDPM2|DPMSolver|UniPC|DEIS"  # what these take if unsaid


def choose(content: Mapping, key: str, known: Mapping | tuple, unsaid: str) -> str:
    """The value of a key, one of those that we know."""
    value = content.get(key, unsaid)
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"scheduler config: {key} is {value!r}, but sdlearn knows only "
            f"{', '.join(known)}: take another model"
        )
    return value


def table_of_betas(content: Mapping) -> torch.Tensor:
    """The betas of a scheduler's file: (steps,) float32."""
    start, end = content.get("beta_start", 0.0001), content.get("beta_end", 0.02)
    trained, zero = content.get("trained_betas"), content.get("rescale_betas_zero_snr")
    if zero not in (None, False, True):
        raise ValueError(
            f"scheduler config: rescale_betas_zero_snr is {zero!r}, but true or false "
            "is "
            "wanted"
        )
    steps = number(
        {"num_train_timesteps": 1000} | content, "num_train_timesteps", "scheduler"
    )
    kind = choose(content, "beta_schedule", BETAS, "linear")
    listed = [start, end] if trained is None else trained
    if not isinstance(listed, list) or not all(
        type(beta) in (int, float) and 0 < beta <= 1 for beta in listed
    ):
        raise ValueError(
            f"scheduler config: betas {str(listed)[:40]}, but numbers above 0 and at "
            "most "
            "1 are wanted: the file is damaged, take another copy"
        )
    if steps < 2:
        raise ValueError(
            f"scheduler config: num_train_timesteps is {steps}, but at least 2 are "
            "wanted"
        )
    if trained is not None and len(trained) != steps:
        raise ValueError(
            f"scheduler config: {len(trained)} trained_betas for {steps} steps: the "
            "file "
            "is damaged, take another copy"
        )
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float32)
    else:
        betas = cosine(steps) if kind not in SLOPES else BETAS[kind](steps, start, end)
    return zero_terminal_snr(betas) if zero is True else betas


SLOPES = ("linear", "scaled_linear")  # given by their first and last beta
SPACINGS = ("leading", "trailing", "linspace")


def schedule_from_json(content: Mapping) -> tuple[Schedule, Prediction]:
    """`scheduler/scheduler_config.json` -> the schedule, and what the network answers.

    The sampler that it names is not taken over: one chooses it anew. A key that is
    absent
    means what that sampler's class in diffusers then takes; like its pipeline for
    Stable
    Diffusion we take an offset of 1 and clip no samples, whatever the file says.
    """
    refuse_others(content, SCHEDULE_ALWAYS, "scheduler")
    sampler = str(content.get("_class_name", ""))
    if sampler == "DDPMScheduler":
        small = ("fixed_small", "fixed_small_log")
        choose(content, "variance_type", small, "fixed_small")
    unsaid = "linspace" if re.match(LINSPACE, sampler) else "leading"
    clean = content.get("set_alpha_to_one", sampler != "PNDMScheduler")
    if type(clean) is not bool:
        raise ValueError(
            f"scheduler config: set_alpha_to_one is {clean!r}, but true or false is "
            "wanted"
        )
    spacing = choose(content, "timestep_spacing", SPACINGS, unsaid)
    prediction = choose(content, "prediction_type", PREDICTIONS, "epsilon")
    schedule = Schedule(table_of_betas(content), spacing, 1, clean)
    return schedule, PREDICTIONS[prediction]


def schedule_to_json(schedule: Schedule, prediction: Prediction) -> dict:
    """Ours -> `scheduler/scheduler_config.json`, with DDIM: it needs few steps.

    A straight table of betas is written as its two ends, any other one as it is.
    """
    betas = schedule.betas
    found = {"beta_schedule": "linear", "trained_betas": betas.tolist()}
    for kind in SLOPES:
        ends = round(betas[0].item(), 8), round(betas[-1].item(), 8)
        if torch.equal(BETAS[kind](len(betas), *ends), betas):
            found = {"beta_schedule": kind, "trained_betas": None}
            found |= {"beta_start": ends[0], "beta_end": ends[1]}
            break
    return found | {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas),
        "prediction_type": prediction.name,
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.offset,
        "set_alpha_to_one": schedule.ends_clean,
        "clip_sample": False,
        "thresholding": False,
    }
