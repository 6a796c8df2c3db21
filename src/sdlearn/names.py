"""Our names of tensors <-> those in checkpoint files. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from sdlearn.unet import UNetConfig
from sdlearn.vae import VAEConfig

__all__ = [
    "Rules",
    "rename",
    "CLIP_RULES",
    "VAE_RULES",
    "OLD_VAE_RULES",
    "TRANSFORMER_RULES",
    "unet_rules",
    "LDM_RESNET",
    "ldm_unet_rules",
    "ldm_vae_rules",
    "clip_name",
    "SIGNS",
    "recognise",
    "LDM_PREFIXES",
    "IGNORED",
    "why_ignored",
    "averaged_name",
]

Rules = Sequence[
    tuple[str, str | Callable[[re.Match], str]]
]  # (pattern, replacement), applied one after the other


def rename(name: str, rules: Rules) -> str:
    """Our name of a tensor -> theirs."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


CLIP_RULES = (  # ours -> transformers'; both towers
    (r"^(token|patch|position|class)_embedding", r"embeddings.\1_embedding"),
    (r"^layers\.", "encoder.layers."),
    (r"\.fc(\d)\.", r".mlp.fc\1."),
    (r"\.to_([qkv])\.", r".\1_proj."),
    (r"\.to_out\.", ".out_proj."),
    (r"^pre_layernorm", "pre_layrnorm"),  # misspelt there, for ever
)
VAE_RULES = (  # ours -> diffusers'
    (r"middle\.resnets", "mid_block.resnets"),
    (r"middle\.attention\.(attention\.)?", "mid_block.attentions.0."),
    (r"to_out\.", "to_out.0."),
    (r"encoder\.levels\.(\d+)", r"encoder.down_blocks.\1"),
    (r"decoder\.levels\.(\d+)", r"decoder.up_blocks.\1"),
    (r"(down|up)(_blocks\.\d+)\.resample", r"\1\2.\1samplers.0"),
    (r"\.norm_out", ".conv_norm_out"),
)
OLD_VAE_RULES = (
    *VAE_RULES,  # as diffusers wrote them before 2023
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
)
TRANSFORMER_RULES = (  # inside a SpatialTransformer, diffusers and CompVis agree
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj\.", ".ff.net.0.proj."),
    (r"\.ff\.out\.", ".ff.net.2."),
)


def unet_rules(config: UNetConfig) -> Rules:
    """Ours -> diffusers'. Our `down` and `up` are flat lists; theirs are cut into levels."""

    def place(match: re.Match) -> str:
        way, kind = match[1], match[3]
        level, i = divmod(int(match[2]), config.blocks + (1 if way == "down" else 2))
        return f"{way}_blocks.{level}." + (
            f"{way}samplers.0.conv." if kind == "conv" else f"{kind}s.{i}."
        )

    return (
        (r"^(down|up)\.(\d+)\.(resnet|attention|conv)\.", place),
        (r"^middle\.resnets", "mid_block.resnets"),
        (r"^middle\.attention", "mid_block.attentions.0"),
        *TRANSFORMER_RULES,
    )


LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_unet_rules(config: UNetConfig) -> Rules:
    """Ours -> CompVis'. Their `input_blocks` begin with conv_in; their `output_blocks` contain the upsamplers."""

    def place(match: re.Match) -> str:
        way, n, kind = match[1], int(match[2]), match[3]
        if way == "down":
            return (
                f"input_blocks.{n + 1}."
                + {"resnet": "0.", "attention": "1.", "conv": "0.op."}[kind]
            )
        level, i = divmod(n, config.blocks + 2)
        last = (
            2 if config.attention[::-1][level] else 1
        )  # the upsampler comes after the attention, if there is one
        block = level * (config.blocks + 1) + min(i, config.blocks)
        return (
            f"output_blocks.{block}."
            + {"resnet": "0.", "attention": "1.", "conv": f"{last}.conv."}[kind]
        )

    return (
        (
            rf"(resnet|resnets\.\d)\.({'|'.join(LDM_RESNET)})\.",
            lambda match: f"{match[1]}.{LDM_RESNET[match[2]]}.",
        ),
        (r"^(down|up)\.(\d+)\.(resnet|attention|conv)\.", place),
        (r"^middle\.resnets\.(\d)", lambda match: f"middle_block.{2 * int(match[1])}"),
        (r"^middle\.attention", "middle_block.1"),
        (
            r"^time_embedding\.linear_(\d)",
            lambda match: f"time_embed.{2 * int(match[1]) - 2}",
        ),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        *TRANSFORMER_RULES,
    )


def ldm_vae_rules(config: VAEConfig) -> Rules:
    """Ours -> CompVis'. Their `decoder.up` counts from the picture, but runs from the latents: the last comes first."""
    top = len(config.channels) - 1
    return (
        (r"middle\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (r"middle\.attention\.group_norm", "mid.attn_1.norm"),
        (r"middle\.attention\.attention\.to_([qkv])", r"mid.attn_1.\1"),
        (r"middle\.attention\.attention\.to_out", "mid.attn_1.proj_out"),
        (r"encoder\.levels\.(\d+)", r"encoder.down.\1"),
        (r"decoder\.levels\.(\d+)", lambda match: f"decoder.up.{top - int(match[1])}"),
        (r"\.resnets\.", ".block."),
        (r"(down|up)(\.\d+)\.resample", r"\1\2.\1sample"),
        (r"conv_shortcut", "nin_shortcut"),
    )


def clip_name(name: str) -> str:
    """Our name in a whole CLIP -> transformers' name."""
    tower, _, rest = name.partition(".")
    theirs = {"text_encoder": "text_model.", "image_encoder": "vision_model."}.get(
        tower
    )
    return theirs + rename(rest, CLIP_RULES) if theirs else name


SIGNS = {  # a pattern in the names of the tensors -> what the file is; the first that occurs decides
    r"lora_|[._]lora\.|\.hada_w1|\.lokr_w1": "a LoRA (chapter 15)",
    r"^control_model\.|^controlnet_|^input_hint_block\.": "a ControlNet (chapter 16)",
    r"^conditioner\.embedders\.": "an SDXL model (chapter 17)",
    r"^cond_stage_model\.model\.": "an SD 2 model",
    r"^cond_stage_model\.transformer\.": "SD 1",
    r"^string_to_param|^emb_params$|^clip_[lg]$|^<.*>$": "a textual inversion",
    r"^model\.diffusion_model\.": "a U-Net without a text encoder",
    r"^(down|up)_blocks\.|^(text_model\.)?encoder\.layers\.": "one part of a diffusers folder",
    r"(^|\.)(encoder|decoder)\.mid(_block)?\.": "a VAE alone",
}


def recognise(names: Iterable[str]) -> str:
    """What a single file is, told from the names of its tensors."""
    text = "\n".join(names)
    return next(
        (kind for sign, kind in SIGNS.items() if re.search(sign, text, re.MULTILINE)),
        "unknown",
    )


LDM_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
}
IGNORED = {  # how a name begins -> why such a tensor is not needed to draw
    r"(log_)?(one_minus_)?(sqrt_)?(recip_?|recipm1_|one_minus_)?(betas|alphas_cumprod)(_prev)?$": "a table of the noise schedule, which follows from two numbers",
    r"posterior_": "a table of the reverse process, which follows from the same two numbers",
    r"logvar$|lvlb_": "a weight of the training loss",
    r"scale_factor$": "the latent scale, which stands in the configuration",
    r".*position_ids$": "the numbers 0 to 76",
    r"cond_stage_model\.(logit_scale|text_projection)": "a part of CLIP that only compares texts with pictures",
    r"((first_stage_model|vae)\.)?loss\.": "a judge of the VAE's training",
    r"model_ema\.": "the averaged copy, taken only when it is asked for",
}


def why_ignored(name: str) -> str | None:
    """The reason why a tensor of a single file is not needed; None if it must find a place."""
    return next(
        (reason for pattern, reason in IGNORED.items() if re.match(pattern, name)), None
    )


def averaged_name(name: str) -> str:
    """LDM's name of a U-Net tensor -> that of its averaged copy (EMA), which has lost its dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")
