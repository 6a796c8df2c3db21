"""A few thin matrices -> a model that knows more: LoRA.
Exported from book/15_lora.ipynb by `make export`; edit it there.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.checkpoint.adapters import layers_of, match_changes
from sdlearn.checkpoint.files import clean, read_tensors, tensor_writer
from sdlearn.checkpoint.load import check_numbers, refuse_foreign
from sdlearn.disk import write_files
from sdlearn.unet import Pointwise

ATTENTION = r"attn\d\.to_(q|k|v|out)"  # what LoRAs of U-Nets change at least


class Pair(nn.Module):
    """What is added to one layer: alpha / rank * up(down(x)).

    Hu et al. 2022, section 4.1.

    down (rank, in), up (out, rank); of a convolution (rank, in, k, k), (out, rank, 1,
    1). A new pair adds nothing: `up` begins as zeros.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float | None = None
    ):
        super().__init__()
        out, width, *kernel = layer.weight.shape
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.conv: dict[str, Any] | None = None
        self.pointwise = isinstance(layer, Pointwise)  # SD 2: a Linear over a map
        if isinstance(layer, nn.Conv2d):
            self.conv = {"stride": layer.stride, "padding": layer.padding}
        device = layer.weight.device
        self.down = nn.Parameter(torch.empty(rank, width, *kernel, device=device))
        ones = [1] * len(kernel)
        self.up = nn.Parameter(torch.zeros(out, rank, *ones, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear begins

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x), self.up.to(x)
        if self.conv is not None:
            y = F.conv2d(F.conv2d(x, down, **self.conv), up)
        elif self.pointwise:
            y = F.linear(F.linear(x.movedim(1, -1), down), up).movedim(-1, 1)
        else:
            y = F.linear(F.linear(x, down), up)
        return self.alpha / self.rank * y

    def delta(self) -> Tensor:
        """The same as a change of the layer's weight, float32."""
        down, up = self.down.float(), self.up.float()
        product = up.flatten(1) @ down.flatten(1)
        return self.alpha / self.rank * product.unflatten(1, down.shape[1:])


class LoRA(nn.Module):
    """Pairs for some layers, {diffusers' name of a layer: Pair}."""

    def __init__(self, pairs: Mapping[str, Pair]):
        super().__init__()
        self.layers, self.pairs = tuple(pairs), nn.ModuleList(pairs.values())
        self.hooks: list[Any] = []

    def items(self) -> Sequence[tuple[str, Pair]]:
        return list(zip(self.layers, self.pairs, strict=True))  # type: ignore[arg-type]

    def attach(self, networks: Mapping[str, nn.Module], scale: float = 1.0) -> Self:
        """Stand beside the layers of these networks, whose weights stay as they are."""
        layers = find_layers(networks, self)

        def add(pair: Pair, layer: nn.Module, inputs: tuple, answer: Tensor) -> Tensor:
            return answer + scale * pair(inputs[0])

        for name, pair in self.items():
            self.hooks.append(layers[name].register_forward_hook(partial(add, pair)))
        return self

    def detach(self) -> None:
        """Step aside again."""
        while self.hooks:
            self.hooks.pop().remove()


def find_layers(networks: Mapping[str, nn.Module], lora: LoRA) -> dict[str, Any]:
    """The layers of these networks that a LoRA changes."""
    layers = layers_of(networks)
    for name, pair in lora.items():
        want = (pair.up.shape[0], *pair.down.shape[1:])
        if name not in layers or layers[name].weight.shape != want:
            raise ValueError(
                f"the LoRA changes {name}, which these networks do not have, or "
                "not in that size: take one that was made for this model"
            )
    return {name: layers[name] for name in lora.layers}


def with_lora(
    networks: Mapping[str, nn.Module],
    rank: int = 4,
    alpha: float | None = None,
    targets: str = ATTENTION,
) -> LoRA:
    """A new LoRA that stands beside its layers; the networks themselves are frozen.

    networks: {"unet": unet}, say. targets: a pattern, found in diffusers' names of the
    layers that it is for. alpha None: as the rank.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank}; give a whole number, 1 or more")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; give a finite number above 0")
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"targets {targets!r} is no pattern: {error}") from None
    layers = layers_of(networks)
    chosen = {name: x for name, x in sorted(layers.items()) if pattern.search(name)}
    if not chosen:
        raise ValueError(
            f"no layer is called {targets!r}; the first of {len(layers)} is called "
            f"{min(layers, default='nothing')}"
        )
    for network in networks.values():
        network.requires_grad_(False)
    pairs = {name: Pair(layer, rank, alpha) for name, layer in chosen.items()}
    return LoRA(pairs).attach(networks)


@torch.no_grad()
def merge(networks: Mapping[str, nn.Module], *loras: tuple[LoRA, float]) -> None:
    """Add (lora, scale), one or several, to the weights, in place.

    A scale may be negative. What was merged before is taken out first. The original
    weights are kept beside the layers, and `unmerge` puts them back.
    """
    for lora, scale in loras:
        find_layers(networks, lora)
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}; give a finite number, such as 0.8")
    unmerge(networks)
    layers = layers_of(networks)
    sums: dict[str, Tensor] = {}
    for lora, scale in loras:
        for name, pair in lora.items():
            sums[name] = sums.get(name, torch.tensor(0.0)) + scale * pair.delta()
    for name, change in sums.items():
        weight = layers[name].weight
        layers[name].original = weight.detach().to("cpu", copy=True)
        weight.copy_(weight.float() + change.to(weight.device))


@torch.no_grad()
def unmerge(networks: Mapping[str, nn.Module]) -> None:
    """The original weights again, bit for bit."""
    for layer in layers_of(networks).values():
        original = layer.__dict__.pop("original", None)
        if original is not None:
            layer.weight.copy_(original)


def load_lora(path: str | Path, networks: Mapping[str, Any]) -> LoRA:
    """A LoRA from a file of kohya's tools, PEFT or diffusers, for these networks.

    Raises ValueError, one sentence, if it is damaged or made for another model.
    """
    tensors = read_tensors(path)
    refuse_foreign(tensors)
    layers, pairs = layers_of(networks), {}
    for name, (down, up, alpha) in match_changes(tensors, networks).items():
        if isinstance(alpha, str):
            alpha = tensors[alpha].item()
        rank = tensors.entries[down].shape[0]
        if not math.isfinite(alpha or 0):
            raise ValueError(
                f"{path} has an alpha of {alpha} for {clean(name)}: the file is "
                "spoiled, take another copy"
            )
        pair = Pair(layers[name], rank, alpha or rank)  # 0 stands for the rank, too
        for mine, theirs in (pair.down, down), (pair.up, up):
            read = tensors[theirs].float()
            check_numbers(tensors[theirs], read, f"{path}: {clean(theirs, 120)}")
            mine.data.copy_(read.reshape(mine.shape))
        pairs[name] = pair
    return LoRA(pairs).requires_grad_(False)


def save_lora(
    path: str | Path,
    lora: LoRA,
    form: str = "kohya",
    dtype: torch.dtype | None = torch.float16,
) -> None:
    """One .safetensors file, with kohya's names (most programs read them) or
    diffusers', whose tensors have no room for alpha: there it is a part of `up`."""
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no name for a LoRA: let it end in .safetensors")
    if form not in ("kohya", "diffusers"):
        raise ValueError(f"form {form!r} is unknown: use kohya or diffusers")
    for name, pair in lora.items():
        if form == "diffusers":
            tensors[f"{name}.lora_A.weight"] = pair.down
            tensors[f"{name}.lora_B.weight"] = pair.alpha / pair.rank * pair.up
            continue
        flat = name.replace(".", "_").replace("text_encoder_2_", "te2_", 1)
        flat = flat.replace("text_encoder_", "te_", 1)
        tensors[f"lora_{flat}.lora_down.weight"] = pair.down
        tensors[f"lora_{flat}.lora_up.weight"] = pair.up
        tensors[f"lora_{flat}.alpha"] = torch.tensor(pair.alpha)
    write_files({path: tensor_writer(tensors, dtype)})


TAG = re.compile(r"\s*<lora:([^<>]+)>")


def split_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt -> its words, and the LoRAs that it names as other programs do:
    "a fox <lora:ink:0.8>" -> "a fox", [("ink", 0.8)]."""
    words = TAG.sub("", prompt).strip()
    if "<lora:" in words:
        raise ValueError(
            f"{prompt!r} has a LoRA's tag that nobody can read: write <lora:NAME:0.8>"
        )
    return words, [read_tag(tag) for tag in TAG.findall(prompt)]


def read_tag(text: str) -> tuple[str, float]:
    """NAME or NAME:SCALE -> both; the name may be a path, with colons of its own."""
    name, _, scale = text.rpartition(":")
    try:
        return (name, float(scale)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0


def find_lora(name: str, model: str | Path) -> Path:
    """A file, or NAME.safetensors in the folder `lora` of the model, or in ./lora."""
    model = Path(model)
    folders = [(model if model.is_dir() else model.parent) / "lora", Path("lora")]
    places = [Path(name), *(folder / f"{name}.safetensors" for folder in folders)]
    for place in places:
        if place.is_file():
            return place
    known = sorted({x.stem for folder in folders for x in folder.glob("*.safetensors")})
    there = f"one of {', '.join(known)}" if known else "put it into the folder lora"
    raise ValueError(f"there is no LoRA {name!r}: give its file, or {there}")
