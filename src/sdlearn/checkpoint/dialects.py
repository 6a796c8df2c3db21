"""Names of tensors, ours <-> everybody's; and what they say a file is. Chapter 11.
Exported from book/11_weights.ipynb by `make export`; edit it there.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

# (pattern, replacement), applied one after the other
Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]


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
    (r"^pre_layernorm", "pre_layrnorm"),  # misspelt there to this day
)
OPEN_CLIP_RULES = (  # ours -> OpenCLIP's text tower, its fused tensors taken apart
    (r"^position_embedding\.weight", "positional_embedding"),
    (r"^layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.to_([qkv])\.", r".attn.\1_proj."),
    (r"\.self_attn\.to_out\.", ".attn.out_proj."),
    (r"\.fc1\.", ".mlp.c_fc."),
    (r"\.fc2\.", ".mlp.c_proj."),
    (r"^final_layer_norm", "ln_final"),
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
TRANSFORMER_RULES = (  # inside a SpatialTransformer, diffusers and CompVis agree
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj\.", ".ff.net.0.proj."),
    (r"\.ff\.out\.", ".ff.net.2."),
)


def unet_rules(blocks: int) -> Rules:
    """Ours -> diffusers'. Our `down` and `up` are flat; theirs are cut into levels."""

    def place(match: re.Match) -> str:
        way, kind = match[1], match[3]
        level, i = divmod(int(match[2]), blocks + (1 if way == "down" else 2))
        inside = f"{way}samplers.0.conv" if kind == "conv" else f"{kind}s.{i}"
        return f"{way}_blocks.{level}.{inside}."

    return (
        (r"^(down|up)\.(\d+)\.(resnet|attention|conv)\.", place),
        (r"^middle\.resnets", "mid_block.resnets"),
        (r"^middle\.attention", "mid_block.attentions.0"),
        *TRANSFORMER_RULES,
    )


LDM_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2"}
LDM_RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3"}
LDM_RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def ldm_unet_rules(blocks: int, attention: Sequence[bool]) -> Rules:
    """Ours -> CompVis'. attention: which levels have transformers.

    Their `input_blocks` begin with conv_in; `output_blocks` contain the upsamplers,
    after the attention if there is one.
    """
    inside = {"resnet": "0.", "attention": "1.", "conv": "0.op."}

    def place(match: re.Match) -> str:
        way, n, kind = match[1], int(match[2]), match[3]
        if way == "down":
            return f"input_blocks.{n + 1}.{inside[kind]}"
        level, i = divmod(n, blocks + 2)
        last = f"{2 if attention[::-1][level] else 1}.conv."
        block = level * (blocks + 1) + min(i, blocks)
        return f"output_blocks.{block}.{last if kind == 'conv' else inside[kind]}"

    def twice(pattern: str, theirs: str, less: int) -> tuple:
        return (pattern, lambda match: f"{theirs}.{2 * (int(match[1]) - less)}")

    inner = rf"(resnet|resnets\.\d)\.({'|'.join(LDM_RESNET)})\."
    return (
        (inner, lambda match: f"{match[1]}.{LDM_RESNET[match[2]]}."),
        (r"^(down|up)\.(\d+)\.(resnet|attention|conv)\.", place),
        twice(r"^middle\.resnets\.(\d)", "middle_block", 0),
        (r"^middle\.attention", "middle_block.1"),
        twice(r"^time_embedding\.linear_(\d)", "time_embed", 1),
        (r"^time_embedding\.cond_proj", "time_embed.cond_proj"),
        twice(r"^add_embedding\.linear_(\d)", "label_emb.0", 1),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        *TRANSFORMER_RULES,
    )


def ldm_vae_rules(levels: int) -> Rules:
    """Ours -> CompVis'. Their `decoder.up` counts from the picture, against time."""
    return (
        (r"middle\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"middle\.attention\.group_norm", "mid.attn_1.norm"),
        (r"middle\.attention\.attention\.to_([qkv])", r"mid.attn_1.\1"),
        (r"middle\.attention\.attention\.to_out", "mid.attn_1.proj_out"),
        (r"encoder\.levels\.(\d+)", r"encoder.down.\1"),
        (r"decoder\.levels\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}"),
        (r"\.resnets\.", ".block."),
        (r"(down|up)(\.\d+)\.resample", r"\1\2.\1sample"),
        (r"conv_shortcut", "nin_shortcut"),
    )


def clip_name(name: str) -> str:
    """Our name in a whole CLIP -> transformers' name."""
    tower, _, rest = name.partition(".")
    towers = {"text_encoder": "text_model.", "image_encoder": "vision_model."}
    return towers[tower] + rename(rest, CLIP_RULES) if tower in towers else name


VAE_ATTENTION = (  # each line: what it has been called over the years
    ("group_norm", "norm"),
    ("to_q", "query", "q"),
    ("to_k", "key", "k"),
    ("to_v", "value", "v"),
    ("to_out.0", "to_out", "proj_attn", "proj_out"),
)
TEXTS = {  # where the text encoders of a whole file lie, by its kind
    "SD 1": {"text_encoder": "cond_stage_model.transformer."},
    "SD 2": {"text_encoder": "cond_stage_model.model."},
    "SDXL": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "SDXL refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
LDM_TEXTS = [root for roots in TEXTS.values() for root in roots.values()]
PREFIXES = {  # how the names of a network may begin, alone or with others
    "unet": ("model.diffusion_model.", "unet.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
    "text_encoder": (
        *(root + tower for root in LDM_TEXTS for tower in ("text_model.", "")),
        *("text_model.", ""),
    ),
}


def placed(prefix: str, name: str) -> str:
    """A name behind its prefix: transformers' text_projection is not in the tower."""
    aside = name == "text_projection.weight"
    return prefix.removesuffix("text_model.") + name if aside else prefix + name


def spelling(name: str, there: Collection[str]) -> str:
    """A name as this file writes it, if it belongs to the attention of a VAE."""
    middle = r"(.*\bmid(?:_block\.attentions\.0|\.attn_1)\.)(.+)\.(weight|bias)"
    if name in there or not (match := re.fullmatch(middle, name)):
        return name
    words = next((line for line in VAE_ATTENTION if match[2] in line), ())
    names = [f"{match[1]}{word}.{match[3]}" for word in words]
    return next((other for other in names if other in there), name)


def spell_all(
    ours: Iterable[str], rules: Rules, part: str, there: Collection[str]
) -> dict[str, str]:
    """Our names -> those of a file, whatever prefix and spelling it has.

    part: unet, vae or text_encoder. there: all names in the file.
    """
    prefixes = PREFIXES[part.removesuffix("_2")]
    prefix = next(p for p in prefixes if any(x.startswith(p) for x in there))
    names = {name: placed(prefix, rename(name, rules)) for name in ours}
    return {name: spelling(theirs, there) for name, theirs in names.items()}


KINDS = {  # what a file is -> a sign in its names; the first that occurs decides
    "ControlNet, LDM names": r"^control_model\.|^input_hint_block\.",
    "motion module": r"\bmotion_modules\.",
    "SDXL refiner": r"^conditioner\.embedders\.0\.model\.",
    "SDXL": r"^conditioner\.embedders\.",
    "SD 2": r"^cond_stage_model\.model\.",
    "SD 1": r"^cond_stage_model\.transformer\.",
    "LoRA": r"\.lora_(down|A)\.|\.processor\..*_lora\.|\.lora\.(down|up)\."
    r"|\.hada_w1|\.lokr_w1|^lora_unet_|^lora_te\d?_",
    "IP-Adapter": r"^ip_adapter\.",
    "T2I-Adapter": r"^(adapter\.)?body\.\d+\.",
    "ControlNet, diffusers names": r"^controlnet_(cond_emb|down_block|mid_block)",
    "SD 3": r"\bjoint_blocks\.|^transformer_blocks\.\d+\.ff_context\.",
    "FLUX": r"\bdouble_blocks\.|^single_transformer_blocks\.",
    "textual inversion": r"^string_to_param\.|^emb_params$|^clip_[lg]$|^<.*>$",
    "U-Net, LDM names": r"^model\.diffusion_model\.|^input_blocks\.",
    "U-Net, diffusers names": r"^(unet\.)?up_blocks\.",
    "VAE, LDM names": r"^((first_stage_model|vae)\.)?(encoder|decoder)\.mid\.",
    "VAE, diffusers names": r"^(vae\.)?(encoder|decoder)\.mid_block\.",
    "CLIP": r"^vision_model\.",
    "text encoder": r"^(text_model\.)?encoder\.layers\.",
}
CALLED = {f"SD {n}": f"a Stable Diffusion {n}" for n in (1, 2, 3)}
CALLED |= {  # in a sentence; the others take "a"
    "SDXL": "an SDXL model",
    "SDXL refiner": "an SDXL refiner",
    "IP-Adapter": "an IP-Adapter",
    "U-Net": "a U-Net alone",
    "VAE": "a VAE alone",
    "FLUX": "FLUX",
    "unknown": "unknown",
}


def recognise(names: Iterable[str]) -> str:
    """What a file is, told from its tensors' names: a key of KINDS, or unknown."""
    text = "\n".join(names)
    signs = (kind for kind, sign in KINDS.items() if re.search(f"(?m){sign}", text))
    return next(signs, "unknown")


def called(kind: str) -> str:
    """A kind as a sentence says it: SDXL -> an SDXL model."""
    word = kind.partition(",")[0]
    return CALLED.get(word, f"a {word}")


# The channels that a U-Net takes in -> what such a model is for.
CHANNELS = {5: "depth", 7: "an upscaler", 8: "instruct-pix2pix", 9: "inpainting"}
FIRST = ("model.diffusion_model.input_blocks.0.0", "input_blocks.0.0", "conv_in")


def guidance_width(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """How wide the vector is that tells a U-Net its guidance; 0: it is not told."""
    named = (x for name, (_, x) in entries.items() if name.endswith("cond_proj.weight"))
    return next((shape[1] for shape in named if len(shape) == 2), 0)


def variant(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """What a U-Net was made for, if not for noisy latents, time and text alone.

    entries: type and shape of each tensor.
    """
    first = next((f"{x}.weight" for x in FIRST if f"{x}.weight" in entries), None)
    shape = entries[first][1] if first else ()
    channels = shape[1] if len(shape) == 4 else 4
    if guidance_width(entries):
        return "latent consistency (LCM)"
    return "" if channels == 4 else CHANNELS.get(channels, f"{channels} channels")


TABLE = r"(betas|alphas_cumprod)(_prev)?$"
IGNORED = {  # how a name begins -> why drawing needs no such tensor
    rf"(log_)?(one_minus_)?(sqrt_)?(recip_?|recipm1_|one_minus_)?{TABLE}": (
        "a table of the noise schedule, which follows from two numbers"
    ),
    r"posterior_": "a table of the reverse process, which follows from those, too",
    r"logvar$|lvlb_": "a weight of the training loss",
    r"scale_factor$": "the latent scale, which stands in the configuration",
    r".*position_ids$": "the numbers 0 to 76",
    r"cond_stage_model\.(model\.)?(logit_scale|text_projection)"
    r"|conditioner\.embedders\.(\d\.(model\.)?logit_scale|0\.text_projection)": (
        "a part of CLIP that only compares texts with pictures"
    ),
    r"cond_stage_model\.model\.transformer\.resblocks\.23\.": (
        "the last layer of SD 2's text encoder, of which the last but one is read"
    ),
    r".*\.attn_mask$": "the mask that hides the words to come",
    r"v_pred$|ztsnr$": "a mark without numbers: the file says v, or zero SNR",
    r"denoiser\.sigmas$": "a table of noise levels, which follows from the schedule",
    r"((first_stage_model|vae)\.)?loss\.": "a judge of the VAE's training",
    r"model_ema\.": "the averaged copy, taken only when it is asked for",
}


def why_ignored(name: str) -> str | None:
    """Why a tensor is not needed; None if it must find a place."""
    reasons = (reason for sign, reason in IGNORED.items() if re.match(sign, name))
    return next(reasons, None)


def averaged_name(name: str) -> str:
    """LDM's name of a U-Net tensor -> that of its averaged copy, which has no dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")
