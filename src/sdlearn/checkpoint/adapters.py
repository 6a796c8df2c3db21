"""A LoRA's file, in any dialect -> which two tensors change which layer.

Like `inspect` it works from names and shapes alone, so that the answer comes at once;
`sdlearn.lora` reads the numbers. Chapter 15 shows the dialects.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdlearn.checkpoint.dialects import called, recognise, rename
from sdlearn.checkpoint.files import Entry, Tensors, clean
from sdlearn.disk import read_json

if TYPE_CHECKING:
    from torch import nn

CONTEXT = re.compile(  # the context's projections to keys; LoRAs have their own
    r"(attn2[._](processor\.)?to_k(_lora)?|to_k_ip)\.((lora[._])?(down|A)\.(default\.)?)?"
    r"weight$|attn2_to_k\.hada_w1_b$"
)
# The width of the context -> the family.
WIDTHS = {768: "SD 1", 1024: "SD 2", 1280: "SDXL refiner", 2048: "SDXL"}
TINY = 192  # the course's own model
SDXL_WORD = {"clip_l": 768, "clip_g": 1280}  # the two tensors of a word: their widths
METHODS = {  # what is trained like a LoRA, and is none -> a sign in its names
    "a DoRA": r"\.(dora_scale|lora_magnitude_vector)\b",
    "a LoHa (LyCORIS)": r"\.hada_",
    "a LoKr (LyCORIS)": r"\.lokr_",
    "a LoCon with a third factor": r"\.lora_mid\.",
    "an OFT": r"\.oft_",
    "an IA3 (LyCORIS)": r"\.on_input$",
    "a full difference (LyCORIS)": r"\.diff(_b)?$",
}
HALF = re.compile(  # a layer, and what of it this tensor is
    r"(?P<layer>.+?)\.(?:alpha|(?:lora_|lora\.|lora_linear_layer\.)"
    r"(?P<half>down|up|A|B)(?:\.default)?\.weight)"
)
HALVES = {"down": "down", "A": "down", "up": "up", "B": "up", None: "alpha"}
HEADS = {
    "unet": ("unet_", ""),
    "text_encoder": ("te_", "te1_", "text_encoder_", ""),
    "text_encoder_2": ("te2_", "text_encoder_2_"),
}


class Change(NamedTuple):
    """The tensors that change one layer, and what to multiply them with.

    alpha: the tensor of that name, or the number that the file has elsewhere, or None.
    """

    down: str
    up: str
    alpha: str | float | None


def width_of(entries: Mapping[str, Entry]) -> int | None:
    """How wide the context is that a file's layers read."""
    for name, entry in entries.items():
        if CONTEXT.search(name) and len(entry.shape) > 1:
            return entry.shape[1]
    return None


def family_of(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> str:
    """The model that something belongs to: the context's width, or its maker's word."""
    if (width := width_of(entries)) is not None:
        return WIDTHS.get(width, "")
    if any(re.match(r"lora_te2_|text_encoder_2|clip_g", name) for name in entries):
        return "SDXL"
    if any(re.match(r"(lora_unet_|transformer\.)(single|double)_", x) for x in entries):
        return "FLUX"
    keys = ("modelspec.architecture", "ss_base_model_version")
    said = " ".join(metadata.get(key, "") for key in keys).lower()
    known = {"xl": "SDXL", "v2": "SD 2", "v1": "SD 1", "flux": "FLUX"}
    return next((family for word, family in known.items() if word in said), "")


def maker_of(entries: Mapping[str, Entry]) -> str:
    """Whose names they are."""
    kohya = any(re.match(r"lora_(unet|te\d?)_", name) for name in entries)
    peft = any(re.search(r"\.lora_[AB]\.", name) for name in entries)
    return "kohya" if kohya else "diffusers (PEFT)" if peft else "diffusers"


def find_changes(tensors: Tensors) -> dict[str, Change]:
    """{layer as the file names it: its tensors}, whatever the dialect.

    Raises ValueError, one sentence, for other methods, half pairs, impossible shapes.
    """
    path, entries = tensors.path, tensors.entries
    for method, sign in METHODS.items():
        if any(re.search(sign, name) for name in entries):
            raise ValueError(
                f"{path} is {method}, but only plain LoRAs are read: look for one, or "
                "let its maker's tools merge it into a model"
            )
    found: dict[str, dict[str, str]] = {}
    for name in entries:
        plain = re.sub(r"(\.processor)?\.(to_[a-z]+)_lora\.", r".\2.lora.", name)
        match = HALF.fullmatch(plain)
        if match is None:
            kind = recognise(entries)
            what = "is damaged, or no LoRA" if kind == "LoRA" else f"is {called(kind)}"
            raise ValueError(
                f"{path} {what} ({clean(name)} is no part of one), but a LoRA is wanted"
            )
        found.setdefault(match["layer"], {})[HALVES[match["half"]]] = name
    said = said_alphas(tensors)
    changes = {}
    for layer, names in found.items():
        if not {"down", "up"} <= names.keys():
            raise ValueError(
                f"{path} has only a part of {clean(layer)}: the file was cut off, take "
                "another copy"
            )
        check_shapes(path, layer, entries[names["down"]], entries[names["up"]])
        alpha = names.get("alpha", said(layer, entries[names["down"]].shape[0]))
        if isinstance(alpha, str) and math.prod(entries[alpha].shape) != 1:
            raise ValueError(
                f"{path}: the alpha of {clean(layer)} is {entries[alpha].shape}, but "
                "one number is wanted: take another copy"
            )
        changes[layer] = Change(names["down"], names["up"], alpha)
    return changes


def check_shapes(path: Path, layer: str, down: Entry, up: Entry) -> None:
    """down: (rank, in, ...), up: (out, rank, ...), both of numbers with a point."""
    rank = down.shape[0] if down.shape else 0
    if not rank:
        raise ValueError(
            f"{path}: {clean(layer)} has rank 0, which changes nothing: take another "
            "file"
        )
    flat = len(down.shape) in (2, 4) and len(up.shape) in (2, 4)
    small = flat and up.shape[1] == rank and set(up.shape[2:]) <= {1}
    if not small or "float" not in down.dtype or "float" not in up.dtype:
        raise ValueError(
            f"{path}: {clean(layer)} has {down.shape} of {down.dtype} and {up.shape} "
            f"of {up.dtype}, which are no two halves of a LoRA: take another copy"
        )


def said_alphas(tensors: Tensors) -> Any:
    """(layer, rank) -> the alpha that stands in PEFT's settings, not in a tensor.

    diffusers writes the settings into the file's header; PEFT into a file beside it.
    """
    text = tensors.metadata.get("lora_adapter_metadata", "")
    beside = tensors.path.with_name("adapter_config.json")
    try:
        settings = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    if not text and any(name.startswith("base_model.model.") for name in tensors):
        settings = read_json(beside) if beside.exists() else {}

    def alpha(layer: str, rank: int) -> float | None:
        part, dot, rest = layer.partition(".")
        head = f"{part}{dot}" if f"{part}.lora_alpha" in settings else ""
        rest = rest if head else layer
        value = settings.get(f"{head}lora_alpha")
        patterns = settings.get(f"{head}alpha_pattern")
        patterns = patterns if isinstance(patterns, dict) else {}
        for pattern, other in patterns.items():
            if rest == pattern or rest.endswith(f".{pattern}"):
                value = other
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return value * math.sqrt(rank) if settings.get(f"{head}use_rslora") else value

    return alpha


def places(networks: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Part, our path and layer of all linear layers and convolutions.

    networks: by their names in a pipeline, as `sd.networks()` gives them.
    """
    from torch import nn

    for part in HEADS.keys() & networks.keys():
        for path, layer in networks[part].named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield part, path, layer


def layers_of(networks: Mapping[str, Any]) -> dict[str, Any]:
    """{diffusers' name: layer}, of networks by their names in a pipeline."""
    for part in HEADS.keys() & networks.keys():
        if any(str(x.dtype) == "torch.int8" for x in networks[part].buffers()):
            raise ValueError(
                "weights in 8 bits cannot be changed any more: load the model again, "
                "and add or remove LoRAs before int8"
            )
    return {
        name_of(part, path, networks[part].config): layer
        for part, path, layer in places(networks)
    }


def name_of(part: str, path: str, config: Any, ldm: bool = False) -> str:
    """Our name of a layer -> diffusers' name, or CompVis' (ldm)."""
    from sdlearn.checkpoint.load import rules

    head = "text_model." * part.startswith("text_encoder")
    theirs = rename(f"{path}.weight", rules(config, ldm)).removesuffix(".weight")
    return f"{part}.{head}{theirs}"


def spellings(part: str, path: str, config: Any) -> Iterator[str]:
    """All the ways in which files call one of our layers, dots turned into `_`.

    Dots and underlines cannot be told apart afterwards, so that our names are made as
    flat as theirs; nobody has to guess where the dots were.
    """
    for ldm in (False, True) if part == "unet" else (False,):
        flat = name_of(part, path, config, ldm).replace(".", "_")
        flat = flat.removeprefix(f"{part}_")
        names = {flat, flat.removesuffix("_0") if flat.endswith("to_out_0") else flat}
        if part.startswith("text_encoder"):
            names |= {x.removeprefix("text_model_") for x in names}
            names |= {re.sub(r"_([qkv])_proj$", r"_to_\1", x) for x in names}
            names |= {re.sub(r"_out_proj$", "_to_out", x) for x in names}
        yield from (head + name for head in HEADS[part] for name in names)


def flat_name(layer: str) -> str:
    """A file's name of a layer, without what differs between the dialects."""
    layer = layer.removeprefix("base_model.model.").replace(".", "_")
    return layer.removeprefix("lora_")


def match_changes(tensors: Tensors, networks: Mapping[str, Any]) -> dict[str, Change]:
    """{layer as diffusers names it: its tensors}; each must have its place.

    Raises ValueError, one sentence, that says which model it is for if it is not this.
    """
    changes, layers = find_changes(tensors), layers_of(networks)
    known = {
        spelling: name_of(part, path, networks[part].config)
        for part, path, _ in places(networks)
        for spelling in spellings(part, path, networks[part].config)
    }
    placed = {}
    for theirs, change in changes.items():
        name = known.get(flat_name(theirs), "")
        down, up = tensors.entries[change.down].shape, tensors.entries[change.up].shape
        if name not in layers or not fits(layers[name], down, up):
            raise ValueError(misfit(tensors, networks, theirs))
        if name in placed:
            raise ValueError(
                f"{tensors.path} changes {clean(name, 120)} twice, under two names: "
                "take another copy"
            )
        placed[name] = change
    return placed


def fits(layer: nn.Linear | nn.Conv2d, down: tuple, up: tuple) -> bool:
    """Do two halves belong to a layer? 1x1 convolutions may be written as matrices."""
    shape = tuple(layer.weight.shape)
    kernel = tuple(down[2:]) or (1, 1)
    return up[0] == shape[0] and down[1] == shape[1] and kernel == (shape[2:] or (1, 1))


def misfit(tensors: Tensors, networks: Mapping[str, Any], layer: str) -> str:
    """Why a LoRA cannot be put on these networks."""
    unet = networks.get("unet")
    mine = unet.config.context_width if unet is not None else None
    theirs = width_of(tensors.entries)
    family = family_of(tensors.entries, tensors.metadata)
    family = family or {TINY: "the tiny model"}.get(theirs or 0, "")
    here = ({TINY: "the tiny model"} | WIDTHS).get(mine or 0, "another")
    if family and family != here and theirs != mine:
        return (
            f"{tensors.path} is a LoRA for {family}, but this model is {here}: take "
            "one that was made for it"
        )
    return (
        f"{tensors.path} changes {clean(layer)}, which this model has not, or not in "
        "that size: the LoRA belongs to another model"
    )


def find_word(tensors: Tensors) -> tuple[list[str], str]:
    """A textual inversion's one tensor, or SDXL's two; and what its word is called.

    Raises ValueError, one sentence, for other files.
    """
    path = tensors.path
    names = [name for name in tensors if not name.startswith("string_to_token.")]
    both = sorted(names, reverse=True) == [*SDXL_WORD]
    names = [*SDXL_WORD] if both else names
    entries = [tensors.entries[name] for name in names if both or len(names) == 1]
    kinds = [("float" in x.dtype and len(x.shape) in (1, 2)) for x in entries]
    if not entries or not all(kinds) or any(0 in x.shape for x in entries):
        raise ValueError(
            f"{path} is {called(recognise(tensors))}, but a textual inversion is "
            "wanted: one tensor of floats, (width,) or (n, width)"
        )
    counts = [math.prod(x.shape[:-1]) for x in entries]
    if len({*counts}) > 1:
        raise ValueError(
            f"{path} has {counts[0]} vectors for SDXL's first text encoder and "
            f"{counts[1]} for its second: take another copy"
        )
    nameless = ("emb_params", "string_to_param.*", *SDXL_WORD)
    return names, path.stem if names[0] in nameless else names[0]
