"""Our configurations <-> the JSON files of diffusers and transformers. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from sdlearn.clip import CLIPImageConfig, CLIPTextConfig
from sdlearn.prediction import PREDICTIONS, Prediction
from sdlearn.schedule import Schedule, cosine, linear, scaled_linear, zero_terminal_snr
from sdlearn.unet import AddedEmbedding, UNetConfig
from sdlearn.vae import VAEConfig

# What our classes always do. A file that says otherwise is another model.
NOTHING = (  # what is absent in our U-Net
    "class_embed_type num_class_embeds encoder_hid_dim "
    "encoder_hid_dim_type mid_block_only_cross_attention "
    "cross_attention_norm time_embedding_dim time_embedding_act_fn timestep_post_act "
    "reverse_transformer_layers_per_block"
)
SWITCHED_OFF = (
    "only_cross_attention dual_cross_attention center_input_sample resnet_skip_time_act"
)
UNET_ALWAYS = dict.fromkeys(NOTHING.split()) | {
    **dict.fromkeys(SWITCHED_OFF.split(), False),
    **dict.fromkeys(("attention_type", "resnet_time_scale_shift"), "default"),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), 3),
    "downsample_padding": 1,
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), 1),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "time_embedding_type": "positional",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
VAE_ALWAYS = {
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std")),
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), True),
    **dict.fromkeys(("in_channels", "out_channels"), 3),
    "mid_block_add_attention": True,
    "act_fn": "silu",
}
CLIP_ALWAYS = {"layer_norm_eps": 1e-5}
GELUS = "quick_gelu", "gelu"  # of CLIP, and of OpenCLIP
TOWER_ALWAYS = CLIP_ALWAYS | {"hidden_act": GELUS[0]}
SCHEDULE_ALWAYS = {"thresholding": False}
LCM_ALWAYS = {"original_inference_steps": 50, "timestep_scaling": 10.0}


BOTH = {"layers_per_block": "blocks", "norm_num_groups": "groups"}  # theirs -> ours
UNET_SIZES = BOTH | {"cross_attention_dim": "context_width"}
UNET_SIZES |= {"in_channels": "in_channels", "out_channels": "out_channels"}
VAE_SIZES = BOTH | {"latent_channels": "latent_channels"}
TOWER_SIZES = {"hidden_size": "width", "num_hidden_layers": "layers"}
TOWER_SIZES |= {"num_attention_heads": "heads"}
TEXT_SIZES = {"max_position_embeddings": "positions", "vocab_size": "vocab"}
TEXT_SIZES |= TOWER_SIZES
IMAGE_SIZES = TOWER_SIZES | {"image_size": "size", "patch_size": "patch"}
# What a file tells of -> what holds always, and the sizes that it gives.
MODELS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "unet": (UNET_ALWAYS, UNET_SIZES),
    "vae": (VAE_ALWAYS, VAE_SIZES),
    "text encoder": (CLIP_ALWAYS, TEXT_SIZES),
    "image tower": (TOWER_ALWAYS, IMAGE_SIZES),
    "scheduler": (SCHEDULE_ALWAYS, {}),
    "LCM scheduler": (LCM_ALWAYS, {}),
}
UNSAID = {"norm_num_groups": 32, "num_train_timesteps": 1000}
SAME = {"swish": "silu"}  # two names of one function
HINTS = {  # what a file with such a key probably is
    "hidden_act": "this is the image tower of an OpenCLIP"
}
LARGEST = 2**20  # of any size in a file


def one(value: Any) -> Any:
    """[x, x, x] -> x: newer files say once what older ones say for every level."""
    same = isinstance(value, list) and value and all(x == value[0] for x in value)
    value = value[0] if same else value
    return SAME.get(value, value) if isinstance(value, str) else value


def number(content: Mapping, key: str, part: str) -> int:
    """A whole number above 0."""
    value = one(content.get(key, UNSAID.get(key)))
    if type(value) is int and 0 < value <= LARGEST:
        return value
    why = "a whole number above 0 is wanted"
    if isinstance(value, list) and all(type(x) is int for x in value):
        why = "sdlearn's levels all have the same number: take another model"
    elif type(value) is int and value > LARGEST:
        why = f"at most {LARGEST:,} is possible"
    raise ValueError(f"{part} config: {key} is {content.get(key)!r}, but {why}")


def numbers(content: Mapping, key: str, part: str, count: int = 0) -> tuple[int, ...]:
    """A list of whole numbers above 0; one number stands for `count` equal ones."""
    value = content.get(key)
    if count and type(value) is int:
        value = [value] * count
    found = value if isinstance(value, list) else []
    if not found or any(type(x) is not int or not 0 < x <= LARGEST for x in found):
        raise ValueError(
            f"{part} config: {key} is {content.get(key)!r}, but a list of whole "
            f"numbers above 0 is wanted, none above {LARGEST:,}"
        )
    if count and len(found) != count:
        raise ValueError(
            f"{part} config: {key} has {len(found)} entries, but block_out_channels "
            f"has {count}"
        )
    return tuple(found)


def choose(
    content: Mapping,
    key: str,
    known: Mapping | tuple,
    unsaid: str,
    part: str = "scheduler",
) -> str:
    """The value of a key, one of those that we know."""
    value = content.get(key, unsaid)
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"{part} config: {key} is {value!r}, but sdlearn knows only "
            f"{', '.join(known)}: take another model"
        )
    return value


def switch(content: Mapping, key: str, unsaid: bool, part: str = "scheduler") -> bool:
    """The value of a key that is true or false."""
    value = content.get(key, unsaid)
    if type(value) is not bool:
        raise ValueError(
            f"{part} config: {key} is {value!r}, but true or false is wanted"
        )
    return value


def read(content: Mapping, part: str) -> dict[str, Any]:
    """The sizes in a file, under our names, if it asks for nothing else than we do."""
    always, sizes = MODELS[part]
    for key, value in always.items():
        if one(content.get(key, value)) != value:
            raise ValueError(
                f"{part} config: {key} is {content[key]!r}, but sdlearn knows only "
                f"{value!r} here: {HINTS.get(key, 'take another model')}"
            )
    return {ours: number(content, theirs, part) for theirs, ours in sizes.items()}


def write(config: object, part: str) -> dict[str, Any]:
    """The way back: our sizes under their names, and what holds always."""
    always, sizes = MODELS[part]
    return always | {theirs: getattr(config, ours) for theirs, ours in sizes.items()}


def check_split(part: str, width: int, count: int, into: str) -> None:
    """Heads, or groups, share the channels of a level evenly."""
    if width % count:
        raise ValueError(
            f"{part} config: {width} channels do not split into {count} {into}: the "
            "file is damaged, take another copy"
        )


def unet_from_json(content: Mapping) -> UNetConfig:
    """`unet/config.json` -> ours. In SD 1, attention_head_dim counts the heads."""
    sizes = read(content, "unet")
    channels = numbers(content, "block_out_channels", "unet")
    known = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    down, up = content.get("down_block_types"), content.get("up_block_types")
    kinds = down if isinstance(down, list) else []
    fine = all(isinstance(kind, str) and kind in known for kind in kinds)
    if not fine or len(kinds) != len(channels) or up not in (None, mirrored(kinds)):
        raise ValueError(
            f"unet config: blocks {down} down and {up} up for {len(channels)} levels; "
            "sdlearn knows (CrossAttn)DownBlock2D, one a level, and their mirror image"
        )
    key = "num_attention_heads" if content.get("num_attention_heads") else ""
    heads = numbers(content, key or "attention_head_dim", "unet", len(channels))
    for width, count in zip(channels, heads, strict=True):
        check_split("unet", width, count, "heads")
    if content.get("time_cond_proj_dim") is not None:  # it is told its guidance
        sizes["guidance_width"] = number(content, "time_cond_proj_dim", "unet")
    key = "transformer_layers_per_block"
    return UNetConfig(
        channels,
        tuple(known[kind] for kind in kinds),
        heads,
        depth=numbers({key: 1, **content}, key, "unet", len(channels)),
        linear=switch(content, "use_linear_projection", False, "unet"),
        added=added_width(content),
        **sizes,
    )


def added_width(content: Mapping) -> int:
    """How much SDXL's U-Net is told beside the words; 0 for the others."""
    kind, waves = content.get("addition_embed_type"), AddedEmbedding.waves
    if kind is None:
        return 0
    if kind != "text_time" or content.get("addition_time_embed_dim") != waves:
        raise ValueError(
            f"unet config: addition_embed_type is {kind!r}, but sdlearn knows only "
            f"'text_time' with {waves} waves an id, as in SDXL: take another model"
        )
    return number(content, "projection_class_embeddings_input_dim", "unet")


def mirrored(down: list[str]) -> list[str]:
    """The kinds of blocks on the way up."""
    return [kind.replace("Down", "Up") for kind in reversed(down)]


def sample_size(content: Mapping) -> tuple[int, int]:
    """The height and width of the latents that a U-Net was trained on; 64 if unsaid."""
    size = content.get("sample_size")
    size = 64 if size is None else size
    height, width = numbers({"sample_size": size}, "sample_size", "unet", 2)
    return height, width


def unet_to_json(config: UNetConfig, sample_size: int | list[int]) -> dict:
    """Ours -> `unet/config.json`; sample_size: of latents, a side or both."""
    down = ["CrossAttn" * there + "DownBlock2D" for there in config.attention]
    return write(config, "unet") | {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "down_block_types": down,
        "up_block_types": mirrored(down),
        "block_out_channels": list(config.channels),
        "attention_head_dim": list(config.heads),
        "time_cond_proj_dim": config.guidance_width or None,
        "transformer_layers_per_block": one(list(config.depth)),
        "use_linear_projection": config.linear,
        "addition_embed_type": "text_time" if config.added else None,
        "addition_time_embed_dim": AddedEmbedding.waves if config.added else None,
        "projection_class_embeddings_input_dim": config.added or None,
    }


def vae_from_json(content: Mapping) -> VAEConfig:
    """`vae/config.json` -> ours. SD 1's own file is older than the scaling_factor."""
    sizes = read(content, "vae")
    channels = numbers(content, "block_out_channels", "vae")
    for width in channels:
        check_split("vae", width, sizes["groups"], "groups")
    for key, kinds in vae_blocks(channels).items():
        if content.get(key, kinds) != kinds:
            raise ValueError(
                f"vae config: {key} is {content[key]}, but sdlearn knows only "
                f"{kinds[0]}, one a level"
            )
    scale = content.get("scaling_factor", VAEConfig.scale)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(
            f"vae config: scaling_factor is {scale!r}, but a number above 0 is wanted; "
            "SD 1 has 0.18215"
        )
    upcast = switch(content, "force_upcast", False, "vae")
    return VAEConfig(channels, scale=float(scale), upcast=upcast, **sizes)


def vae_blocks(channels: tuple[int, ...]) -> dict[str, list[str]]:
    """The kinds of blocks of a VAE."""
    kinds = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}
    return {f"{way}_block_types": [x] * len(channels) for way, x in kinds.items()}


def vae_to_json(config: VAEConfig, sample_size: int) -> dict:
    """Ours -> `vae/config.json`; sample_size: the side of pictures in training."""
    sizes = write(config, "vae") | vae_blocks(config.channels)
    return sizes | {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "block_out_channels": list(config.channels),
        "scaling_factor": config.scale,
        "force_upcast": config.upcast,
    }


def tower(content: Mapping, part: str) -> dict[str, int]:
    """The sizes of one tower, which has to be made of our layers."""
    sizes = read(content, part)
    width, inner = sizes["width"], content.get("intermediate_size")
    if inner != 4 * width:
        raise ValueError(
            f"{part} config: intermediate_size is {inner}, but the layers of sdlearn's "
            f"CLIP are 4 times as wide inside, 4 x {width} here: take another model"
        )
    if width % sizes["heads"]:
        raise ValueError(
            f"{part} config: width {width} does not split into {sizes['heads']} heads: "
            "the file is damaged, take another copy"
        )
    return sizes


def text_from_json(content: Mapping) -> CLIPTextConfig:
    """`text_encoder/config.json`, or the `text_config` of a whole CLIP -> ours.

    An encoder whose class ends in WithProjection, as the second one of SDXL, has a
    projection of its own; the number stands in the files of the others, too.
    """
    sizes, part = tower(content, "text encoder"), "text encoder"
    gelu = choose(content, "hidden_act", GELUS, "quick_gelu", part)
    own = "WithProjection" in str(content.get("architectures"))
    projection = number(content, "projection_dim", part) if own else 0
    end = content.get("eos_token_id", 2)  # older files say 2 and mean the last id
    known = type(end) is int and 0 <= end < sizes["vocab"] and end != 2
    sizes |= {"projection": projection, "end": end if known else -1}
    return CLIPTextConfig(**sizes, exact_gelu=gelu == "gelu")


def clip_from_json(content: Mapping) -> tuple[CLIPTextConfig, CLIPImageConfig, int]:
    """`clip/config.json` -> both towers and the width of the common space."""
    text, image = content.get("text_config"), content.get("vision_config")
    if not isinstance(text, dict) or not isinstance(image, dict):
        raise ValueError(
            "clip config: text_config or vision_config is missing, but a whole "
            "CLIPModel is wanted"
        )
    config = text_from_json(text)
    end = text.get("eos_token_id", 2)
    if type(end) is not int or not 0 <= end < config.vocab:
        raise ValueError(
            f"clip config: eos_token_id is {end!r}, but one of {config.vocab} entries "
            "is wanted, where the text's vector is taken"
        )
    seen = CLIPImageConfig(**tower(image, "image tower"))
    return config, seen, number(content, "projection_dim", "clip")


def text_to_json(config: CLIPTextConfig, projection: int | None = None) -> dict:
    """Ours -> `text_encoder/config.json`; the start token stands before the end."""
    return write(config, "text encoder") | {
        "architectures": ["CLIPTextModel" + "WithProjection" * bool(config.projection)],
        "model_type": "clip_text_model",
        "hidden_act": GELUS[config.exact_gelu],
        "intermediate_size": 4 * config.width,
        "projection_dim": projection or config.projection or config.width,
        "bos_token_id": config.end - 1,
        "eos_token_id": config.end,
        "pad_token_id": config.end,
    }


def clip_to_json(text: CLIPTextConfig, image: CLIPImageConfig, projection: int) -> dict:
    """Ours -> the `config.json` of transformers' CLIPModel."""
    seen = {"model_type": "clip_vision_model", "intermediate_size": 4 * image.width}
    seen |= {"num_channels": 3, "projection_dim": projection}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": text_to_json(text, projection),
        "vision_config": write(image, "image tower") | seen,
    }


SLOPES = {"linear": linear, "scaled_linear": scaled_linear}  # by first and last beta
BETAS = (*SLOPES, "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
LINSPACE = "Euler|Heun|LMS|KDPM2|DPMSolver|UniPC|DEIS"  # what these take if unsaid


def table_of_betas(content: Mapping) -> torch.Tensor:
    """The betas of a scheduler's file: (steps,) float32."""
    start, end = content.get("beta_start", 0.0001), content.get("beta_end", 0.02)
    trained, key = content.get("trained_betas"), "rescale_betas_zero_snr"
    zero = content.get(key) is not None and switch(content, key, False)
    steps = number(content, "num_train_timesteps", "scheduler")
    kind = choose(content, "beta_schedule", BETAS, "linear")
    listed = [start, end] if trained is None else trained
    good = isinstance(listed, list) and all(type(x) in (int, float) for x in listed)
    if not good or not all(0 < beta <= 1 for beta in listed):
        raise ValueError(
            f"scheduler config: betas {str(listed)[:40]}, but numbers above 0 and at "
            "most 1 are wanted: the file is damaged, take another copy"
        )
    if steps < 2:
        raise ValueError(
            f"scheduler config: num_train_timesteps is {steps}, but at least 2 are "
            "wanted"
        )
    if trained is None:
        betas = SLOPES[kind](steps, start, end) if kind in SLOPES else cosine(steps)
    elif len(trained) == steps:
        betas = torch.tensor(trained, dtype=torch.float32)
    else:
        raise ValueError(
            f"scheduler config: {len(trained)} trained_betas for {steps} steps: the "
            "file is damaged, take another copy"
        )
    return zero_terminal_snr(betas) if zero else betas


def schedule_from_json(content: Mapping) -> tuple[Schedule, Prediction]:
    """`scheduler/scheduler_config.json` -> the schedule, and what the network answers.

    The sampler that it names is not taken over: one chooses it anew. A key that is
    absent means what that sampler's class in diffusers then takes; like its pipeline
    for Stable Diffusion we take an offset of 1 and clip no samples, whatever it says.
    """
    read(content, "scheduler")
    sampler = str(content.get("_class_name", ""))
    if sampler == "LCMScheduler":
        read(content, "LCM scheduler")
    if sampler == "DDPMScheduler":
        small = ("fixed_small", "fixed_small_log")
        choose(content, "variance_type", small, "fixed_small")
    unsaid = "linspace" if re.match(LINSPACE, sampler) else "leading"
    clean = switch(content, "set_alpha_to_one", sampler != "PNDMScheduler")
    spacing = choose(content, "timestep_spacing", SPACINGS, unsaid)
    prediction = choose(content, "prediction_type", PREDICTIONS, "epsilon")
    strays = content.get("noise_offset", 0.0)
    if type(strays) not in (int, float) or not 0 <= strays < 10:
        raise ValueError(
            f"scheduler config: noise_offset is {strays!r}, but a number from 0 to 10 "
            "is wanted: the file is damaged, take another copy"
        )
    schedule = Schedule(table_of_betas(content), spacing, 1, clean, strays)
    return schedule, PREDICTIONS[prediction]


def schedule_to_json(schedule: Schedule, prediction: Prediction) -> dict:
    """Ours -> `scheduler/scheduler_config.json`, with DDIM: it needs few steps.

    A straight table of betas is written as its two ends, any other one as it is.
    """
    betas = schedule.betas
    start, end = round(betas[0].item(), 8), round(betas[-1].item(), 8)
    found: dict[str, Any] = {"beta_schedule": "linear", "trained_betas": betas.tolist()}
    for kind, slope in SLOPES.items():
        if torch.equal(slope(len(betas), start, end), betas):
            found = {"beta_schedule": kind, "trained_betas": None}
            found |= {"beta_start": start, "beta_end": end}
            break
    found |= SCHEDULE_ALWAYS
    return (
        found
        | {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": len(betas),
            "prediction_type": prediction.name,
            "timestep_spacing": schedule.spacing,
            "steps_offset": schedule.offset,
            "set_alpha_to_one": schedule.ends_clean,
            "clip_sample": False,
        }
        | ({"noise_offset": strays} if (strays := schedule.noise_offset) else {})
    )
