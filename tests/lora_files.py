"""A random LoRA, and its tensors as each program writes them."""

import json

import torch

from sdlearn.lora import LoRA, with_lora

ATTENTION = r"unet.*attn\d\.to_"
U_NET = r"unet.*(attn\d\.to_|proj_(in|out)|ff\.net|resnets.*conv1|time_emb_proj|samplers\.0\.conv|conv_shortcut)"
ALL = rf"{U_NET}|self_attn|mlp"


def random_lora(networks: dict, rank: int = 3, alpha: float | None = 2.0, targets: str = ALL) -> LoRA:
    """Changes the answers clearly, in every layer that it has."""
    g = torch.Generator().manual_seed(0)
    lora = with_lora(networks, rank, alpha, targets).requires_grad_(False)
    lora.detach()
    for _, pair in lora.items():
        for half in (pair.down, pair.up):
            half.copy_(torch.randn(half.shape, generator=g) * half[0].numel() ** -0.5)
    return lora


def kohya(lora: LoRA, alpha: bool = True) -> dict:
    tensors = {}
    for name, pair in lora.items():
        name = "lora_" + name.replace("text_encoder.", "te.", 1).replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": pair.down, f"{name}.lora_up.weight": pair.up}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def halves(lora: LoRA, down: str, up: str, change=lambda name: name) -> dict:
    return {
        change(name) + half: tensor.clone()
        for name, pair in lora.items()
        for half, tensor in ((down, pair.down), (up, pair.up))
    }


def processor(name: str) -> str:
    """....attn1.to_out.0 -> ....attn1.processor.to_out_lora"""
    head, _, layer = name.removesuffix(".0").rpartition(".")
    return f"{head}.processor.{layer}_lora"


def today(name: str) -> str:
    """Since transformers 5 the text encoder's names are shorter."""
    return name.replace("text_model.", "")


def metadata(lora: LoRA) -> dict[str, str]:
    """What diffusers keeps in the header."""
    parts = {name.partition(".")[0] for name in lora.layers}
    rank, alpha = lora.pairs[0].rank, lora.pairs[0].alpha
    said = {f"{part}.{key}": value for part in parts for key, value in (("r", rank), ("lora_alpha", alpha))}
    names = {part: [today(x).partition(".")[2] for x in lora.layers if x.startswith(part)] for part in parts}
    said |= {f"{part}.target_modules": x for part, x in names.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(said)}


# name -> (which layers it can have, whether it says alpha, its tensors)
DIALECTS = {
    "kohya": (ALL, True, kohya),
    "kohya, no alpha": (ALL, False, lambda lora: kohya(lora, alpha=False)),
    "PEFT": (ALL, False, lambda lora: halves(lora, ".lora_A.weight", ".lora_B.weight")),
    "PEFT, settings in the header": (ALL, True, lambda lora: halves(lora, ".lora_A.weight", ".lora_B.weight", today)),
    "lora.down": (ATTENTION, False, lambda lora: halves(lora, ".lora.down.weight", ".lora.up.weight")),
    "lora_linear_layer": (
        "self_attn",
        False,
        lambda lora: halves(lora, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ),
    "processors": (ATTENTION, False, lambda lora: halves(lora, ".down.weight", ".up.weight", processor)),
}
