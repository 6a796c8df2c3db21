"""A checkpoint file or folder -> what it is, and what sdlearn can do with it; told from headers, without torch."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from sdlearn.headers import DTYPES, Header, Tensor, clean, human, read_header

KINDS = {  # what a file is -> a pattern in the names of its tensors; the first that occurs decides
    "LoRA": r"\.lora_(down|A)\.|\.processor\..*_lora\.|\.lora\.down\.|\.hada_w1|\.lokr_w1|^lora_unet_|^lora_te\d?_",
    "IP-Adapter": r"^ip_adapter\.",
    "T2I-Adapter": r"^(adapter\.)?body\.\d+\.",
    "ControlNet, LDM names": r"^control_model\.|^input_hint_block\.",
    "ControlNet, diffusers names": r"^controlnet_(cond_embedding|down_blocks|mid_block)",
    "motion module": r"\bmotion_modules\.",
    "SDXL": r"^conditioner\.embedders\.",
    "SD 3": r"\bjoint_blocks\.|^transformer_blocks\.\d+\.ff_context\.",
    "FLUX": r"\bdouble_blocks\.|^single_transformer_blocks\.",
    "SD 2": r"^cond_stage_model\.model\.",
    "SD 1": r"^cond_stage_model\.transformer\.",
    "textual inversion": r"^string_to_param\.|^emb_params$|^clip_[lg]$|^<.*>$",
    "U-Net, LDM names": r"^model\.diffusion_model\.|^input_blocks\.",
    "U-Net, diffusers names": r"^up_blocks\.",
    "VAE, LDM names": r"^((first_stage_model|vae)\.)?(encoder|decoder)\.mid\.",
    "VAE, diffusers names": r"^(encoder|decoder)\.mid_block\.",
    "CLIP": r"^vision_model\.",
    "text encoder": r"^(text_model\.)?encoder\.layers\.",
}
WHOLE = {
    "SD 1": "Stable Diffusion 1.x",
    "SD 2": "Stable Diffusion 2.x",
    "SDXL": "Stable Diffusion XL (base)",
    "SD 3": "Stable Diffusion 3",
    "FLUX": "FLUX",
}
ADDED = (
    "LoRA",
    "IP-Adapter",
    "T2I-Adapter",
    "ControlNet",
    "motion module",
    "textual inversion",
)  # to a whole model
IGNORED = re.compile(  # as in sdlearn.names, which cannot be imported without torch; a test compares the two
    r"(log_)?(one_minus_)?(sqrt_)?(recip_?|recipm1_|one_minus_)?(betas|alphas_cumprod)(_prev)?$|posterior_|logvar$|lvlb_"
    r"|scale_factor$|.*position_ids$|cond_stage_model\.(logit_scale|text_projection)"
    r"|((first_stage_model|vae)\.)?loss\.|model_ema\."
)
PARTS = {  # of files that have several -> how the names of their tensors begin
    "transformer": r"model\.diffusion_model\.(joint|double|single)_",
    "U-Net": r"model\.diffusion_model\.|lora_unet_|unet\.|(base_model\.model\.)?(down|mid|up)_blocks?\.",
    "VAE": r"first_stage_model\.|vae\.",
    "text encoder": r"cond_stage_model\.|conditioner\.embedders\.0\.|lora_te1?_|text_encoder\.|text_encoders\.",
    "text encoder 2": r"conditioner\.embedders\.1\.|lora_te2_|text_encoder_2\.",
    "encoder": r"encoder\.|quant_conv\.",
    "decoder": r"decoder\.|post_quant_conv\.",
    "image projection": r"image_proj\.",
    "attention": r"ip_adapter\.",
    "EMA copies": r"model_ema\.(diffusion_)?model",
}
ASIDE = "left aside"  # what nobody needs for drawing
SD1 = {
    "U-Net": (686, 859_520_964),
    "VAE": (248, 83_653_863),
    "text encoder": (196, 123_060_480),
}  # tensors, parameters
CONTEXT = re.compile(  # the projections of the context to keys; LoRAs and IP-Adapters have their own
    r"(attn2[._](processor\.)?to_k(_lora)?|to_k_ip)\.((lora[._])?(down|A)\.(default\.)?)?weight$|attn2_to_k\.hada_w1_b$"
)
WIDTHS = {
    768: "SD 1",
    1024: "SD 2",
    1280: "SDXL refiner",
    2048: "SDXL",
}  # of the context, which the U-Net reads
CHANNELS = {
    4: "",
    5: ", depth",
    7: ", upscaler",
    8: ", instruct-pix2pix",
    9: ", inpainting",
}  # that the U-Net takes in
FIRST = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "input_blocks.0.0.weight",
    "conv_in.weight",
)
OPTIONAL = (
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)  # subfolders that may be missing
WEIGHTLESS = ("tokenizer", "scheduler", "feature_extractor")
WEIGHTS = re.compile(r"(diffusion_pytorch_|pytorch_)?model(\.fp16)?\.(safetensors|bin)")


class Part(NamedTuple):
    name: str
    tensors: int
    parameters: int
    precision: str


@dataclass
class Report:
    """What there is to say. can: the command that uses it, or nothing; but: what cannot be done with it, and why."""

    path: str
    kind: str
    description: str
    format: str
    bytes: int
    parts: list[Part]
    metadata: dict[str, str] = field(default_factory=dict)
    can: str = ""
    but: list[str] = field(default_factory=list)


def inspect(path: str | Path) -> Report:
    """What a file or folder is. Raises ValueError, one sentence, if nothing can be said of it."""
    path = Path(path)
    try:
        return inspect_folder(path) if path.is_dir() else inspect_file(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): copy it to where you may read it"
        ) from None


def inspect_file(path: Path) -> Report:
    form, tensors, metadata, foreign = read_header(path)
    kind = kind_of(tensors)
    report = Report(
        str(path),
        kind,
        describe(kind, tensors, metadata),
        form,
        path.stat().st_size,
        count(tensors, kind),
        metadata,
    )
    if foreign:
        named = clean(foreign[0]) + (
            f" and {len(foreign) - 1} more" if foreign[1:] else ""
        )
        report.but.append(
            f"its pickle names {named}, which a safe reader refuses: take the .safetensors file"
        )
    if kind in WHOLE and kind != "SD 1":
        report.but.append("sdlearn draws with Stable Diffusion 1.x")
    elif kind.startswith(ADDED):
        report.but.append(
            f"a {kind.partition(',')[0]} is added to a whole model, which sdlearn cannot do yet"
        )
    elif kind != "SD 1":
        report.but.append("sdlearn draws with whole models")
    elif variant := variant_of(tensors):
        report.but.append(
            f"sdlearn draws with plain models, not with {variant.removeprefix(', ')}"
        )
    else:
        report.but += misfits(
            report.parts, [name for name in tensors if part_of(name, kind) == "others"]
        )
    report.can = (
        "" if report.but else f'sdlearn txt2img "..." --model {quote(str(path))}'
    )
    if any(part.name == "EMA copies" for part in report.parts):
        report.but.append("the EMA copies are left aside, the plain weights are used")
    return report


def misfits(parts: list[Part], others: list[str]) -> list[str]:
    """Where a file differs from Stable Diffusion 1.5."""
    found = {part.name: part for part in parts}
    wrong = [f"a tensor that no part takes, {clean(others[0])}"] if others else []
    for name, (tensors, parameters) in SD1.items():
        has = found.get(name, Part(name, 0, 0, ""))
        if has.tensors != tensors:
            wrong.append(
                f"{has.tensors} tensors of the {name}, but {tensors} are wanted"
            )
        elif has.parameters != parameters:
            wrong.append(
                f"{has.parameters:,} parameters of the {name}, but {parameters:,} are wanted"
            )
        elif "float" not in has.precision:
            wrong.append(f"{has.precision} in the {name}, but floats are wanted")
    return [f"it has {'; it has '.join(wrong)}"] if wrong else []


def precision(tensors: Iterable[Tensor]) -> str:
    """The types of the numbers, the most frequent first; whole numbers count only where there is nothing else."""
    names = [
        name
        for name, _ in Counter(
            DTYPES[tensor.dtype][0] for tensor in tensors
        ).most_common()
    ]
    return ", ".join([name for name in names if "float" in name] or names)


def part_of(name: str, kind: str) -> str:
    """The part that a tensor belongs to; only some kinds have several."""
    if not name.startswith("model_ema.") and IGNORED.match(name):
        return ASIDE
    if kind in WHOLE or kind.startswith(("LoRA", "IP-Adapter", "VAE", "U-Net, LDM")):
        default = (
            ASIDE
            if name.startswith("model_ema.")
            else "others"
            if "SD" in kind
            else kind.partition(",")[0]
        )
        return next(
            (part for part, pattern in PARTS.items() if re.match(pattern, name)),
            default,
        )
    return kind.partition(",")[0]


def count(tensors: dict[str, Tensor], kind: str) -> list[Part]:
    """The parts of a file."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(part_of(name, kind), []).append(tensor)
    order = [*PARTS, kind.partition(",")[0], "others", ASIDE]
    return [
        Part(
            name,
            len(groups[name]),
            sum(math.prod(t.shape) for t in groups[name]),
            precision(groups[name]),
        )
        for name in sorted(groups, key=order.index)
    ]


def kind_of(tensors: dict[str, Tensor]) -> str:
    """The first of KINDS that fits."""
    names = "\n".join(tensors)
    kind = next(
        (
            kind
            for kind, pattern in KINDS.items()
            if re.search(pattern, names, re.MULTILINE)
        ),
        "unknown",
    )
    alone = len(tensors) == 1 and next(iter(tensors.values())).shape[-1:] in [
        (width,) for width in WIDTHS
    ]
    return "textual inversion" if kind == "unknown" and alone else kind


def family_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The model that something belongs to: from the width of the context, else from what its maker wrote."""
    for name, tensor in tensors.items():
        if CONTEXT.search(name) and len(tensor.shape) > 1:
            return WIDTHS.get(tensor.shape[1], "")
    if any(re.match("lora_te2_|text_encoder_2|clip_g", name) for name in tensors):
        return "SDXL"
    if any(
        re.match(r"(lora_unet_|transformer\.)(single|double)_", name)
        for name in tensors
    ):
        return "FLUX"
    said = " ".join(
        metadata.get(key, "")
        for key in ("modelspec.architecture", "ss_base_model_version")
    ).lower()
    known = {"xl": "SDXL", "v2": "SD 2", "v1": "SD 1", "flux": "FLUX"}
    return next((family for word, family in known.items() if word in said), "")


def variant_of(tensors: dict[str, Tensor]) -> str:
    """How a U-Net differs from a plain one: in what it takes in beside noisy latents, time and text."""
    shape = next((tensors[name].shape for name in FIRST if name in tensors), ())
    channels = shape[1] if len(shape) == 4 else 4
    lcm = ", LCM" if any(name.endswith("cond_proj.weight") for name in tensors) else ""
    return CHANNELS.get(channels, f", {channels} input channels") + lcm


def describe(kind: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """A file's kind in words."""
    family, variant = family_of(tensors, metadata), variant_of(tensors)
    of = f" for {family}" if family else ""
    word, _, names = kind.partition(", ")
    if kind in WHOLE:
        said = (
            metadata.get("modelspec.prediction_type")
            or "base or v: its tensors do not say"
        )
        what = (
            "Stable Diffusion XL (refiner)" if family == "SDXL refiner" else WHOLE[kind]
        )
        return f"{what}{f' ({clean(said)})' if kind == 'SD 2' else ''}{variant}, in one file, LDM names"
    if word == "U-Net":
        return f"U-Net alone{of}{variant}, {names}"
    if word == "VAE":
        first = next(
            (
                t.shape[:2]
                for name, t in tensors.items()
                if name.endswith("decoder.conv_in.weight")
            ),
            (),
        )
        of = (
            " for SD 1, SD 2 or SDXL (their shapes are the same)"
            if first == (512, 4)
            else ""
        )
        return f"VAE alone{of}, {names}"
    if kind == "LoRA":
        downs = [
            t.shape[0]
            for name, t in tensors.items()
            if re.search(r"lora[._](down|A)\.", name) and t.shape
        ]
        ranks = (
            " to ".join(str(rank) for rank in sorted({min(downs), max(downs)}))
            if downs
            else "unknown"
        )
        maker = (
            "kohya"
            if any(name.startswith("lora_") for name in tensors)
            else "diffusers"
        )
        return f"LoRA{of}, of rank {ranks} in {len(downs)} layers, {maker} names"
    if kind == "textual inversion":
        *count, width = next(
            (
                t.shape
                for name, t in tensors.items()
                if t.shape and "_to_token" not in name
            ),
            (0, 0),
        )
        of = (
            " for SDXL"
            if "clip_g" in tensors
            else f" for {WIDTHS[width]}"
            if width in WIDTHS
            else ""
        )
        return f"textual inversion{of}, vectors: {math.prod(count)}"
    if kind == "unknown":
        return "unknown: its tensors have the names of no model that sdlearn knows"
    return f"{word}{of}" + (f", {names}" if names else "")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is no readable JSON object, but a model folder needs it: copy it again"
        )
    return content


def weights_of(folder: Path) -> Path | None:
    """The file of weights that sdlearn would read: .safetensors before .bin, the plain one before its fp16 variant."""
    found = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name)]
    return min(
        found, key=lambda path: (path.suffix, ".fp16" in path.name), default=None
    )


def inspect_folder(folder: Path) -> Report:
    """A model in diffusers' layout, or one part of it."""
    if not (folder / "model_index.json").is_file():
        if alone := weights_of(folder):
            return inspect_file(alone)
        files = sorted(
            path.name
            for path in folder.iterdir()
            if path.suffix in (".safetensors", ".ckpt")
        )
        advice = (
            f"give one of its files, such as {files[0]}"
            if files
            else "give the folder of a model, or a file"
        )
        raise ValueError(
            f"{folder} is no model, for it has no model_index.json: {advice}"
        )
    index = read_json(folder / "model_index.json")
    headers, size, parts = {}, 0, []
    for name in parts_of(folder, index):
        if (path := weights_of(folder / name)) is None:
            raise ValueError(
                f"{folder / name} holds no weights, but a .safetensors file is wanted: copy it again"
            )
        headers[name] = read_header(path)
        size += path.stat().st_size
        counted = count(
            headers[name].tensors, "text encoder"
        )  # as one part; any kind that has no parts will do
        parts += [
            part._replace(name=name if part.name != ASIDE else f"{name}, {ASIDE}")
            for part in counted
        ]
    return judge_folder(folder, index, headers, size, parts)


def parts_of(folder: Path, index: dict) -> list[str]:
    """The subfolders that hold weights. Those that the index names have to be there, but for some."""
    named = [
        name
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and None not in value
    ]
    if str(index.get("_class_name")).startswith("StableDiffusion"):
        named += [
            name
            for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
            if name not in named
        ]
    for name in named:
        if (
            not name.isidentifier()
            or not (folder / name).is_dir()
            and name not in OPTIONAL
        ):
            raise ValueError(
                f"{folder} has no folder {clean(name)}, but its model_index.json wants one: copy it again"
            )
    named += [
        name for name in ("clip", "judge") if name not in named
    ]  # the course's own
    found = [
        name
        for name in named
        if (folder / name).is_dir() and not name.startswith(WEIGHTLESS)
    ]
    if not found:
        raise ValueError(
            f"{folder} has no part with weights, but unet, vae and text_encoder are wanted: copy it again"
        )
    return found


def judge_folder(
    folder: Path, index: dict, headers: dict[str, Header], size: int, parts: list[Part]
) -> Report:
    """The words for a whole folder."""
    kind, unet = (
        clean(index.get("_class_name")),
        headers["unet"].tensors if "unet" in headers else {},
    )
    family, variant = family_of(unet, {}), variant_of(unet)
    fp16 = {
        ".fp16." in path.name for name in headers if (path := weights_of(folder / name))
    } == {True}
    what = WHOLE.get(family, kind)
    but = []
    if (
        not kind.startswith("StableDiffusion")
        or "XL" in kind
        or "3" in kind
        or family not in ("SD 1", "")
    ):
        but.append("sdlearn draws with Stable Diffusion 1.x")
        if family == "SD 2":
            scheduler = folder / "scheduler" / "scheduler_config.json"
            what += (
                f" ({clean(read_json(scheduler).get('prediction_type', 'epsilon'))})"
            )
    elif variant:
        but.append(
            f"sdlearn draws with plain models, not with {variant.removeprefix(', ')}"
        )
    elif not family:
        what = (
            "the course's own tiny model"
            if (folder / "judge").is_dir()
            else "a Stable Diffusion of its own sizes"
        )
    can = "" if but else f'sdlearn txt2img "..." --model {quote(str(folder))}'
    form = "diffusers folder" + (", fp16 variant" if fp16 else "")
    return Report(
        str(folder), kind, f"{what}{variant}, {form}", form, size, parts, {}, can, but
    )


def to_text(report: Report) -> str:
    """A few aligned lines."""
    shown = [
        (clean(key, 30), clean(value)) for key, value in sorted(report.metadata.items())
    ]
    lines = [
        ("path", report.path),
        ("is", report.description),
        ("size", f"{human(report.bytes)}, {report.format}"),
    ]
    lines += [("metadata", f"{key}: {value}") for key, value in shown[:6]]
    if shown[6:]:
        lines.append(
            ("metadata", f"and {len(shown) - 6} more entries; --json shows all")
        )
    lines.append(("draw", report.can or "no"))
    lines += [("but" if report.can else "because", reason) for reason in report.but]
    width = max(len(part.name) for part in report.parts)
    table = [
        f"  {x.name:<{width}} {x.tensors:>7} {x.parameters:>14,}  {x.precision}"
        for x in report.parts
    ]
    head = f"  {'part':<{width}} tensors     parameters  precision"
    return "\n".join([f"{key:<9} {value}" for key, value in lines] + [head, *table])


def to_json(report: Report) -> str:
    content = asdict(report)
    return json.dumps(
        content | {"parts": [part._asdict() for part in report.parts]}, indent=2
    )
