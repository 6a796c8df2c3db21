"""a drawing -> nearly the same for less, by sharing deep features. Chapter 19.
Exported from book/19_speed.ipynb by `make export`; edit it there.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sdlearn.request import Setup, number, whole_number
from sdlearn.unet import Stage, UNet


class Below(nn.Module):
    """Stands where the lower levels were, and says what they said last."""

    map: Tensor

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.map


def cut(unet: UNet, skips: int) -> tuple[UNet, nn.Module]:
    """The top of a U-Net, of the same layers; and the layer right below the cut.

    skips: how many maps of the way down the top makes for itself. What the layer below
    answers has to be put into `top.middle.map`.
    """
    stages = [i for i, part in enumerate(unet.up) if isinstance(part, Stage)]
    skips = whole_number(1, len(stages) - 1)("skips", skips)
    first, top = stages[-skips], copy.copy(unet)
    top._modules = dict(unet._modules)
    top.down, top.up = unet.down[: skips - 1], unet.up[first:]
    top.middle = Below()  # type: ignore[assignment]
    return top, unet.up[first - 1]


@dataclass
class Seen:
    """What came from below for one context: at which call, and how often it served."""

    context: Tensor
    map: Tensor
    call: int
    served: int = 0


@dataclass(frozen=True)
class Reuse:
    """An extra of a drawing: of `every` looks only one runs the whole U-Net.

    Ma et al. 2024. every: 1 draws the plain picture. skips: the maps of the way down
    that are computed in every look; 1 spares most. start: the share of the way, 0 to 1,
    on which every look is whole, because there the picture is laid out.
    """

    every: int = 2
    skips: int = 1
    start: float = 0.0

    def __post_init__(self) -> None:
        whole_number(1, 1000)("every", self.every)
        whole_number(1, 1000)("skips", self.skips)
        number(0, 1, "a share of the way, 0 to 1")("start", self.start)

    def said(self) -> dict[str, object]:
        names = {"every": self.every, "skips": self.skips, "start": self.start}
        return {f"Reuse {name}": value for name, value in names.items()}

    def __call__(self, sd: Any, setup: Setup) -> Setup:
        if sd.unet._compiled_call_impl is not None:
            raise ValueError(
                "a compiled U-Net is one program, and its lower levels cannot be left "
                "out: draw without compile, or without reuse"
            )
        first = round(self.start * (len(setup.levels) - 1))
        return replace(setup, network=Reused(self, sd, setup, setup.levels[first].t))


class Reused:
    """The network of one drawing, which remembers.

    Guidance in two passes takes turns between two contexts, so there is a memory for
    each. What lies further back than the looks just before, is forgotten: between the
    times of guidance, or where the way rises again (`Inpaint(resample=...)`).
    """

    def __init__(self, how: Reuse, sd: Any, setup: Setup, start: float):
        self.how, self.sd, self.network, self.start = how, sd, setup.network, start
        self.top, self.below = cut(sd.unet, how.skips)
        self.seen: list[Seen] = []
        self.calls, self.last = 0, float("inf")

    def __call__(self, latents: Tensor, t: Tensor, **told: Any) -> Tensor:
        now, context = float(t.flatten()[0]), told["context"]
        self.calls, rises, self.last = self.calls + 1, now > self.last, now
        near = [] if rises else [x for x in self.seen if self.calls - x.call <= 2]
        known = [x for x in near if x.context is context]
        self.seen = [x for x in near if x.context is not context]
        if known and known[0].served < self.how.every - 1 and now <= self.start:
            known[0].call, known[0].served = self.calls, known[0].served + 1
            self.seen.append(known[0])
            return self.shallow(known[0].map, latents, t, told)
        maps: list[Tensor] = []
        hook = self.below.register_forward_hook(lambda *call: maps.append(call[2]))
        try:
            answer = self.network(latents, t, **told)
        finally:
            hook.remove()
        self.seen.append(Seen(context, maps[0], self.calls))
        return answer

    def shallow(self, map: Tensor, latents: Tensor, t: Tensor, told: dict) -> Tensor:
        """The answer of the same network with the U-Net's top in the U-Net's place."""
        if told.get("residuals") is not None:  # those of below are in the map already
            told = told | {"residuals": (*told["residuals"][: self.how.skips], 0.0)}
        self.top.middle.map = map
        whole, self.sd.parts["unet"] = self.sd.parts["unet"], self.top
        try:
            return self.network(latents, t, **told)
        finally:
            self.sd.parts["unet"] = whole
