"""A checkpoint file or folder -> what it is, and whether sdlearn draws with it.

What it is follows from names and shapes, without torch, so the answer comes at once.
Whether it draws is what the `plan` of its loader says, in `sdlearn.checkpoint.load` or
the module that USES names: the loader asks the same.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from sdlearn.checkpoint.adapters import (
    SDXL_WORD,
    TINY,
    WIDTHS,
    family_of,
    find_changes,
    find_word,
    maker_of,
    width_of,
)
from sdlearn.checkpoint.dialects import TEXTS, called, recognise, variant, why_ignored
from sdlearn.checkpoint.files import (
    WEIGHTS,
    Entry,
    Tensors,
    clean,
    find_parts,
    human,
    read_index,
    read_tensors,
    read_weights,
)
from sdlearn.disk import read_json

WHOLE = {
    "SD 1": "Stable Diffusion 1.x",
    "SD 2": "Stable Diffusion 2.x",
    "SDXL": "Stable Diffusion XL (base)",
    "SDXL refiner": "Stable Diffusion XL (refiner)",
    "SD 3": "Stable Diffusion 3",
    "FLUX": "FLUX",
}
SEVERAL = ("LoRA", "IP-Adapter", "VAE", "U-Net, LDM")  # kinds that have parts, too
PARTS = {  # of files that have several -> how the names of their tensors begin
    "transformer": r"model\.diffusion_model\.(joint|double|single)_",
    "U-Net": r"model\.diffusion_model\.|lora_unet_|unet\."
    r"|(base_model\.model\.)?(down|mid|up)_blocks?\.",
    "VAE": r"first_stage_model\.|vae\.",
    "text encoder": r"cond_stage_model\.|conditioner\.embedders\.0\.|lora_te1?_"
    r"|text_encoder\.|text_encoders\.",
    "text encoder 2": r"conditioner\.embedders\.1\.|lora_te2_|text_encoder_2\.",
    "encoder": r"encoder\.|quant_conv\.",
    "decoder": r"decoder\.|post_quant_conv\.",
    "image projection": r"image_proj\.",
    "attention": r"ip_adapter\.",
    "EMA copies": r"model_ema\.(diffusion_)?model",
}
CHANGED = {  # what a difference to a U-Net has whole -> what for, who adds it
    "conv_in.weight": ("inpainting", "sdlearn.tiny.inpainting.load_inpainting"),
    "add_embedding.linear_1.weight": ("crops", "sdlearn.tiny.crops.load_crops"),
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
ASIDE = "left aside"  # what nobody needs for drawing


USES = {  # what joins a model -> the module whose plan(path) accepts it, the command
    "ControlNet": (
        "sdlearn.controlnet",
        'sdlearn txt2img "..." --control {} --hint PICTURE',
    )
}


class Part(NamedTuple):
    """A part of a file, and what its numbers are."""

    name: str
    tensors: int
    parameters: int
    precision: str


@dataclass
class Report:
    """can: the command that uses it, or nothing; but: what cannot be done, and why."""

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
    """What a file or folder is. Raises ValueError, one sentence, if it is damaged."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        raise ValueError(
            f"there is nothing at {path}: give a .safetensors or .ckpt file, or a "
            "folder"
        )
    if not path.is_dir():
        return inspect_file(path, read_tensors(path))
    if not (path / "model_index.json").exists() and has_weights(path):
        return inspect_file(path, read_weights(path))
    return inspect_folder(path)


def has_weights(folder: Path) -> bool:
    """Is it one part of a model's folder?"""
    names = [name for file in WEIGHTS for name in (file, f"{file}.index.json")]
    return any((folder / name).is_file() for name in names)


def judged(report: Report, whole: bool) -> Report:
    """Add whether it can be drawn with, as whoever loads it says."""
    module, command = USES.get(report.kind.partition(",")[0], ("", ""))
    try:
        if module:
            importlib.import_module(module).plan(report.path)
            report.can = command.format(quote(report.path))
            return report
        if not whole:
            place = ": put it into the folder unet of one"
            raise ValueError(
                f"{report.path} is {called(report.kind)}, but a whole checkpoint of SD "
                f"1, SD 2 or SDXL is wanted{place * report.kind.startswith('U-Net')}"
            )
        from sdlearn.checkpoint.load import EPSILON, is_fast, plan

        found = plan(report.path)
        networks = found.networks
        config = networks["unet"].model.config
        plain = config.in_channels == config.out_channels
        how = 'txt2img "..."' if plain else 'inpaint "..." --image FILE --mask FILE'
        if plain and "text_encoder" not in networks:  # a refiner begins nothing
            how = 'img2img "..." --image FILE'
        if is_fast(found.schedule, found.prediction or EPSILON):  # SDXL-Turbo, say
            how += " --steps 4 --cfg-scale 1 --sampler euler_a"
        few = " --sampler lcm" * bool(config.guidance_width)
        report.can = f"sdlearn {how} --model {quote(report.path)}{few}"
    except ValueError as error:
        report.but.append(str(error))
    return report


def inspect_file(path: Path, tensors: Tensors) -> Report:
    """A file, or the weights in a folder of their own."""
    entries, kind = tensors.entries, recognise(tensors)
    if kind == "unknown" and len(entries) == 1:
        shape = next(iter(entries.values())).shape
        known = {TINY, *WIDTHS}
        kind = "textual inversion" if shape and shape[-1] in known else kind
    if kind == "unknown" and "base" in tensors.metadata:
        kind = "difference" if changed(entries) else kind
    words, parts = describe(kind, entries, tensors.metadata), count(entries, kind)
    about = tensors.format, tensors.bytes, parts, tensors.metadata
    report = Report(str(path), kind, words, *about)
    if kind == "LoRA":
        judge_lora(report, tensors)
    elif kind == "textual inversion":
        judge_word(report, tensors)
    elif kind == "difference":
        report.but.append(
            "it is the change of a U-Net, and no model: "
            f"{changed(entries)[1]}(BASE).save(FOLDER) writes the whole one"
        )
    else:
        judged(report, bool(tensors.foreign) or kind in TEXTS and not path.is_dir())
    if any(part.name == "EMA copies" for part in parts):
        report.but.append("the EMA copies are left aside, the plain weights are used")
    return report


def changed(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """What a difference to a U-Net is for, and who adds it; () if it is none."""
    return next((CHANGED[name] for name in CHANGED if name in entries), ())


def judge_lora(report: Report, tensors: Tensors) -> None:
    """Add whether it can be used, which its reader says."""
    family = family_of(tensors.entries, tensors.metadata)
    try:
        if tensors.foreign:
            from sdlearn.checkpoint.load import refuse_foreign

            refuse_foreign(tensors)
        find_changes(tensors)
        if family not in ("", *WIDTHS.values()):
            raise ValueError(
                f"{report.path} is a LoRA for {family}, but one for SD 1, SD 2 or SDXL "
                "is wanted"
            )
        tiny = width_of(tensors.entries) == TINY
        model = "" if tiny else " --model MODEL"
        few = " --sampler lcm" * ("lcm" in Path(report.path).name.lower())
        report.can = f'sdlearn txt2img "..." --lora {quote(report.path)}{model}{few}'
        if not family and not tiny:
            report.but.append("its names do not say for which model it is")
    except ValueError as error:
        report.but.append(str(error))


def judge_word(report: Report, tensors: Tensors) -> None:
    """Add whether it can be used, which its reader says."""
    try:
        if tensors.foreign:
            from sdlearn.checkpoint.load import refuse_foreign

            refuse_foreign(tensors)
        names, token = find_word(tensors)
        widths = [tensors.entries[name].shape[-1] for name in names]
        width, known = widths[0], [[768], [1024], [TINY], [*SDXL_WORD.values()]]
        if widths not in known:
            whose = f" for {WIDTHS[width]}" if width in WIDTHS else ""
            raise ValueError(
                f"{report.path} is a textual inversion{whose}, with vectors of {width} "
                "numbers, but the words of SD 1 have 768, those of SD 2 1024, and "
                "those of SDXL 768 and 1280"
            )
        model = "" if width == TINY else " --model MODEL"
        prompt = quote(f"... {clean(token)} ...")
        report.can = f"sdlearn txt2img {prompt} --embedding {quote(report.path)}{model}"
    except ValueError as error:
        report.but.append(str(error))


def precision(entries: Iterable[Entry]) -> str:
    """The types of the numbers, the most frequent first; whole ones if all are."""
    found = Counter(x.dtype for x in entries)
    names = sorted(found, key=lambda name: (-found[name], name))
    return ", ".join([name for name in names if "float" in name] or names)


def part_of(name: str, kind: str) -> str:
    """The part that a tensor belongs to; only some kinds have several."""
    averaged, alone = name.startswith("model_ema."), kind.partition(",")[0]
    if not averaged and why_ignored(name):
        return ASIDE
    if kind not in WHOLE and not kind.startswith(SEVERAL):
        return alone
    found = (part for part, sign in PARTS.items() if re.match(sign, name))
    return next(found, ASIDE if averaged else "others" if "SD" in kind else alone)


def count(entries: Mapping[str, Entry], kind: str) -> list[Part]:
    """The parts of a file."""
    groups: dict[str, list[Entry]] = {}
    for name, entry in entries.items():
        groups.setdefault(part_of(name, kind), []).append(entry)
    order = [*PARTS, kind.partition(",")[0], "others", ASIDE]
    return [
        Part(name, len(x), sum(math.prod(y.shape) for y in x), precision(x))
        for name, x in sorted(groups.items(), key=lambda item: order.index(item[0]))
    ]


def describe(kind: str, entries: Mapping[str, Entry], metadata: Mapping) -> str:
    """A file's kind in words."""
    word, _, names = kind.partition(", ")
    family, special = family_of(entries, metadata), special_of(entries)
    of = f" for {family}" if family else ""
    if kind in WHOLE:
        said = metadata.get("modelspec.prediction_type")
        what = WHOLE[kind]
        if kind == "SD 2":
            what += f" ({clean(said or 'base or v: its tensors do not say')})"
        elif "v_pred" in entries:
            what += " (v_prediction)"
        elif kind == "SDXL":
            what = "Stable Diffusion XL (base, or Turbo: its tensors do not say)"
        return f"{what}{special}, in one file, LDM names"
    if word == "U-Net":
        return f"U-Net alone{of}{special}, {names}"
    if word == "VAE":
        ends = (x for name, x in entries.items() if name.endswith("r.conv_in.weight"))
        usual = any(x.shape[:2] == (512, 4) for x in ends)
        of = " for SD 1, SD 2 or SDXL (their shapes are the same)" if usual else ""
        return f"VAE alone{of}, {names}"
    if kind == "LoRA":
        of = of or " for the tiny model" * (width_of(entries) == TINY)
        return f"LoRA{of}, {lora(entries)}"
    if kind == "textual inversion":
        shapes = (x.shape for name, x in entries.items() if "_to_token" not in name)
        *many, width = next(filter(None, shapes), (0, 0))
        families = WIDTHS | {TINY: "the tiny model"}
        family = "SDXL" if "clip_g" in entries else families.get(width, "")
        of = f" for {family}" if family else ""
        return f"textual inversion{of}, vectors: {math.prod(many)}"
    if kind == "difference":
        return f"difference to the tiny model's U-Net, for {changed(entries)[0]}"
    if kind == "unknown":
        return "unknown: its tensors have the names of no model that sdlearn knows"
    return f"{word}{of}" + (f", {names}" if names else "")


def special_of(entries: Mapping[str, Entry]) -> str:
    """What a U-Net is made for, as an addition to a description."""
    short = {"an upscaler": "upscaler", "latent consistency (LCM)": "LCM"}
    special = variant(entries)
    return f", {short.get(special, special)}" if special else ""


def lora(entries: Mapping[str, Entry]) -> str:
    """A LoRA's ranks, and who wrote it."""
    down = re.compile(r"lora[._](down|A)\.")
    ranks = [x.shape[0] for name, x in entries.items() if down.search(name) and x.shape]
    ends = sorted({min(ranks), max(ranks)}) if ranks else ["unknown"]
    return (
        f"rank {' to '.join(map(str, ends))} in {len(ranks)} layers, written by "
        f"{maker_of(entries)}"
    )


def inspect_folder(folder: Path) -> Report:
    """A model in diffusers' layout."""
    index = read_index(folder)
    weights = {name: read_weights(folder / name) for name in find_parts(folder, index)}
    parts = [
        part._replace(name=f"{name}, {ASIDE}" if part.name == ASIDE else name)
        for name, tensors in weights.items()
        for part in count(tensors.entries, "text encoder")  # a kind without parts
    ]
    kind = clean(index.get("_class_name"))
    unet = weights["unet"].entries if "unet" in weights else {}
    family = family_of(unet, {})
    what = WHOLE.get(family, kind)
    if family == "SD 2":
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        what += f" ({clean(scheduler.get('prediction_type', 'epsilon'))})"
    elif not family and kind in PIPELINES:
        ours, other = (
            "the course's own tiny model",
            "a Stable Diffusion of its own sizes",
        )
        what = ours if (folder / "judge").is_dir() else other
    fp16 = all(".fp16." in tensors.path.name for tensors in weights.values())
    form = "diffusers folder" + (", fp16 variant" if fp16 else "")
    size = sum(tensors.bytes for tensors in weights.values())
    words = f"{what}{special_of(unet)}, {form}"
    return judged(Report(str(folder), kind, words, form, size, parts), True)


def to_text(report: Report) -> str:
    """A few aligned lines."""
    said = [f"{clean(x, 30)}: {clean(y)}" for x, y in sorted(report.metadata.items())]
    said[6:] = [f"and {len(said) - 6} more entries; --json shows all"] * bool(said[6:])
    size = f"{human(report.bytes)}, {report.format}"
    lines = [("path", report.path), ("is", report.description), ("size", size)]
    lines += [("metadata", line) for line in said]
    lines.append(("draw", report.can or "no"))
    lines += [("but" if report.can else "because", reason) for reason in report.but]
    width = max(len(part.name) for part in report.parts)
    text = [f"{key:<9} {value}" for key, value in lines]
    text.append(f"  {'part':<{width}} tensors     parameters  precision")
    for name, tensors, parameters, kind in report.parts:
        text.append(f"  {name:<{width}} {tensors:>7} {parameters:>14,}  {kind}")
    return "\n".join(text)


def to_json(report: Report) -> str:
    """The same for programs."""
    parts = [part._asdict() for part in report.parts]
    return json.dumps(asdict(report) | {"parts": parts}, indent=2)
